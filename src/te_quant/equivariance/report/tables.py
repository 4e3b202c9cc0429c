"""Markdown tables of reports: one alone, or several side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields

from te_quant._checks import require
from te_quant.equivariance.metrics._bootstrap import Interval
from te_quant.equivariance.metrics.agreement import Agreement
from te_quant.equivariance.metrics.margin import Margin, Spread
from te_quant.equivariance.metrics.shift_error import ShiftError
from te_quant.equivariance.report.report import AGREEMENT_LABELS, ERROR_LABELS, EquivarianceReport
from te_quant.equivariance.report.values import EquivarianceSettings

__all__ = ["comparison_table", "report_table"]

_UNDEFINED = "undefined"
_NOT_MEASURED = "not measured"


def report_table(report: EquivarianceReport) -> str:
    """Return one report: agreements with κ, errors, then code use, reconstruction error and conditions.

    Brackets hold 95 % confidence intervals.
    """
    rows = [
        [AGREEMENT_LABELS[name], rate_text(a), kappa_text(a), _number(a.chance), f"{a.tokens:,}"]
        for name, a in report.agreements().items()
    ]
    tables = [_markdown(["index agreement", "rate", "κ", "chance", "token pairs"], rows)]
    if report.errors():
        rows = [[ERROR_LABELS[n], error_text(e), f"{e.mean_square:.3g}"] for n, e in report.errors().items()]
        tables.append(_markdown(["error after a shift", "dB, more is better", "mean square"], rows))
    if report.margin is not None:
        tables.append(_margin_table(report.margin))
    if report.numerical_floor:
        rows = [[name, f"{a.differing:,}", f"{a.tokens:,}"] for name, a in report.numerical_floor.items()]
        tables.append(_markdown(["numerical floor", "differing indices", "tokens"], rows))
    beside = [[label, value(report)] for label, value in _beside().items()]
    tables.append(_markdown(["beside it", "value"], beside))
    tables.append(_conditions(report.settings) + "\n")
    return "\n".join(tables)


def comparison_table(reports: Mapping[str, EquivarianceReport]) -> str:
    """Return several reports side by side, one column each, every agreement as ``rate (κ …)`` with 95 % intervals.

    Conditions that differ between the reports appear as rows of their own, so that no column can pass for
    comparable when it is not.

    Args:
        reports: at least one report by name.
    """
    require(len(reports) > 0, "reports", "at least one", len(reports))
    values = list(reports.values())
    rows = []
    for field in fields(EquivarianceSettings):
        settings = [getattr(report.settings, field.name) for report in values]
        if any(setting != settings[0] for setting in settings):
            rows.append([field.name.replace("_", " "), *(_setting(setting) for setting in settings)])
    for label, texts in _measured(values):
        if any(text != _NOT_MEASURED for text in texts):
            rows.append([label, *texts])
    for label, value in _beside().items():
        rows.append([label, *(value(report) for report in values)])
    table = _markdown(["rate (κ)", *reports], rows)
    same = all(report.settings == values[0].settings for report in values)
    return f"{table}\n{_conditions(values[0].settings)}\n" if same else table


def _measured(reports: Sequence[EquivarianceReport]) -> Iterator[tuple[str, list[str]]]:
    for name, label in AGREEMENT_LABELS.items():
        yield label, [_cell(getattr(report, name)) for report in reports]
    for name, label in ERROR_LABELS.items():
        errors = [report.errors().get(name) for report in reports]
        yield label + " (dB)", [_NOT_MEASURED if error is None else error_text(error) for error in errors]
    for label, text in _MARGIN_ROWS.items():
        yield label, [_NOT_MEASURED if r.margin is None else text(r.margin) for r in reports]
    for name in dict.fromkeys(name for report in reports for name in report.numerical_floor):
        floors = [report.numerical_floor.get(name) for report in reports]
        yield f"numerical floor, {name}: differing", [_differing(floor) for floor in floors]


def rate_text(agreement: Agreement) -> str:
    """Write the rate with its interval."""
    return _number(agreement.rate) + _bracket(agreement.rate_interval)


def kappa_text(agreement: Agreement) -> str:
    """Write κ with its interval, or that it is undefined: one code alone was compared."""
    if not agreement.kappa_defined:
        return _UNDEFINED
    return _number(agreement.kappa) + _bracket(agreement.kappa_interval)


def error_text(error: ShiftError) -> str:
    """Write the decibels with their interval."""
    if math.isnan(error.decibels):
        return _UNDEFINED
    if error.decibels == math.inf:
        return "inf"
    return f"{error.decibels:.2f}" + _bracket(error.interval, ".2f")


def _bracket(interval: Interval, pattern: str = ".3f") -> str:
    low, high = interval
    return "" if math.isnan(low) else f" [{low:{pattern}}, {high:{pattern}}]"


def _spread(spread: Spread) -> str:
    interval = _bracket(spread.median_interval, ".3g")
    return f"{spread.median:.3g}{interval} ({spread.low:.3g} to {spread.high:.3g})"


_MARGIN_ROWS: dict[str, Callable[[Margin], str]] = {
    "certified rate (moves less than its margin)": lambda m: (
        _number(m.certified_rate) + _bracket(m.certified_interval)
    ),
    "margin, median (5 % to 95 %)": lambda m: _spread(m.margin),
    "movement under whole-token shifts, median (5 % to 95 %)": lambda m: _spread(m.movement),
    "movement / margin, median (5 % to 95 %)": lambda m: _spread(m.ratio),
}


def _margin_table(margin: Margin) -> str:
    rows = [[label, text(margin)] for label, text in _MARGIN_ROWS.items()]
    if margin.contradictions:
        rows.append(["certified, yet the indices differ (rounding)", f"{margin.contradictions:,}"])
    return _markdown(["margin", "value"], rows)


def _differing(floor: Agreement | None) -> str:
    return _NOT_MEASURED if floor is None else f"{floor.differing:,} of {floor.tokens:,}"


def _beside() -> dict[str, Callable[[EquivarianceReport], str]]:
    def reconstruction(name: str, pattern: str) -> Callable[[EquivarianceReport], str]:
        def text(report: EquivarianceReport) -> str:
            error = report.reconstruction
            if error is None:
                return _NOT_MEASURED
            return format(getattr(error, name), pattern) + _bracket(getattr(error, name + "_interval"), pattern)

        return text

    return {
        "used codes": lambda r: f"{r.code_use.used_codes} of {r.settings.num_codes}",
        "codes above 0.1 % of use": lambda r: str(r.code_use.frequent_codes),
        "perplexity": lambda r: f"{r.code_use.perplexity:.1f}",
        "tokens behind the code use": lambda r: f"{r.code_use.tokens:,}",
        "reconstruction L1": reconstruction("l1", ".4f"),
        "reconstruction MSE": reconstruction("mse", ".4f"),
        "reconstruction PSNR (dB)": reconstruction("psnr", ".2f"),
    }


def _conditions(s: EquivarianceSettings) -> str:
    bootstrapped = s.resamples > 0 and s.num_images > 1
    sampled = (
        f"in brackets 95 % intervals, {s.resamples:,} resamples of the images" if bootstrapped else "no intervals"
    )
    return (
        f"Protocol `{s.protocol}`, {s.num_images:,} images, {_setting(s.image_size)} pixels, stride {s.stride}, "
        f"K = {s.num_codes}; {len(s.shifts)} whole-token and {len(s.sub_stride_shifts)} "
        f"sub-stride shifts; foreground: more than {s.tau:g} from {s.ground:g}. Code use and reconstruction over "
        f"{s.reference_images}; {sampled}."
    )


def _cell(agreement: Agreement | None) -> str:
    if agreement is None:
        return _NOT_MEASURED
    return f"{rate_text(agreement)} (κ {kappa_text(agreement)})"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _setting(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    if value and isinstance(value[0], tuple):
        return " ".join(f"({dy},{dx})" for dy, dx in value)
    return "x".join(str(side) for side in value)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
