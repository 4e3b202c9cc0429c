"""Markdown tables of reports: one alone, or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from te_quant._checks import require
from te_quant.equivariance.agreement import Agreement
from te_quant.equivariance.report import AGREEMENT_LABELS, EquivarianceReport, EquivarianceSettings

__all__ = ["comparison_table", "report_table"]

_UNDEFINED = "undefined"
_NOT_MEASURED = "not measured"


def report_table(report: EquivarianceReport) -> str:
    """Return one report: the agreements with κ, then code use, reconstruction error and conditions."""
    rows = [
        [AGREEMENT_LABELS[name], _number(a.rate), kappa_text(a), _number(a.chance), f"{a.tokens:,}"]
        for name, a in report.agreements().items()
    ]
    agreements = _markdown(["index agreement", "rate", "κ", "chance", "token pairs"], rows)
    beside = _markdown(["beside it", "value"], [[label, value(report)] for label, value in _beside().items()])
    return f"{agreements}\n{beside}\n{_conditions(report.settings)}\n"


def comparison_table(reports: Mapping[str, EquivarianceReport]) -> str:
    """Return several reports side by side, one column each, every agreement as ``rate (κ …)``.

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
    for name, label in AGREEMENT_LABELS.items():
        agreements = [getattr(report, name) for report in values]
        if any(agreement is not None for agreement in agreements):
            rows.append([label, *(_cell(agreement) for agreement in agreements)])
    for label, value in _beside().items():
        rows.append([label, *(value(report) for report in values)])
    table = _markdown(["rate (κ)", *reports], rows)
    same = all(report.settings == values[0].settings for report in values)
    return f"{table}\n{_conditions(values[0].settings)}\n" if same else table


def kappa_text(agreement: Agreement) -> str:
    """Write κ, or that it is undefined: one code alone was compared."""
    return _number(agreement.kappa) if agreement.kappa_defined else _UNDEFINED


def _beside() -> dict[str, Callable[[EquivarianceReport], str]]:
    def reconstruction(name: str, pattern: str) -> Callable[[EquivarianceReport], str]:
        return lambda r: (
            _NOT_MEASURED if r.reconstruction is None else pattern.format(getattr(r.reconstruction, name))
        )

    return {
        "used codes": lambda r: f"{r.code_use.used_codes} of {r.settings.num_codes}",
        "codes above 0.1 % of use": lambda r: str(r.code_use.frequent_codes),
        "perplexity": lambda r: f"{r.code_use.perplexity:.1f}",
        "tokens behind the code use": lambda r: f"{r.code_use.tokens:,}",
        "reconstruction L1": reconstruction("l1", "{:.4f}"),
        "reconstruction MSE": reconstruction("mse", "{:.4f}"),
        "reconstruction PSNR (dB)": reconstruction("psnr", "{:.2f}"),
    }


def _conditions(s: EquivarianceSettings) -> str:
    return (
        f"Protocol `{s.protocol}`, {s.num_images:,} images, {_setting(s.image_size)} pixels, stride {s.stride}, "
        f"K = {s.num_codes}; {len(s.shifts)} whole-token and {len(s.sub_stride_shifts)} "
        f"sub-stride shifts; foreground: more than {s.tau:g} from {s.ground:g}. Code use and reconstruction over "
        f"{s.reference_images}."
    )


def _cell(agreement: Agreement | None) -> str:
    if agreement is None:
        return _NOT_MEASURED
    return f"{_number(agreement.rate)} (κ {kappa_text(agreement)})"


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
