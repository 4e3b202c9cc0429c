"""Tables of reports: one report, in full or in short, or several side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from te_quant._checks import require
from te_quant._measuring.data_range import DEFAULT_RANGE
from te_quant._measuring.text import NOT_MEASURED, counted, setting_text
from te_quant.equivariance.metrics.agreement import Agreement
from te_quant.equivariance.metrics.margin import MARGIN_LABELS
from te_quant.equivariance.report.values import (
    AGREEMENT_LABELS,
    ERROR_LABELS,
    EquivarianceSettings,
    EquivarianceValues,
)
from te_quant.tables import Table, Tabular

__all__ = ["ComparisonTable", "comparison_table", "report_table", "summary_table"]

_INTERVAL = re.compile(r" \[[^]]*\]")
# What short tables leave out.
_LONG_ROWS = (
    *MARGIN_LABELS[1:],
    "codes above 0.1 % of use",
    "tokens behind the code use",
    "reconstruction MSE",
)


def summary_table(report: EquivarianceValues) -> Table:
    """Return the figures to look at first, one per row, with the conditions below.

    Brackets hold 95 % confidence intervals.
    """
    rows = [
        [AGREEMENT_LABELS[name], a.rate_text(), a.kappa_text(), f"{a.chance:.3f}"]
        for name, a in report.agreements().items()
    ]
    rest = {f"{ERROR_LABELS[name]} (dB)": error.decibels_text() for name, error in report.errors().items()}
    if report.margin is not None:
        rest["certified rate"] = report.margin.certified_text()
    for name, floor in report.numerical_floor.items():
        rest[f"numerical floor, {name}: differing"] = _differing(floor)
    listed = _code_use_and_reconstruction(report)
    rest |= {label: text for label, text in listed.items() if label not in _LONG_ROWS and text != NOT_MEASURED}
    rows += [[label, text, "", ""] for label, text in rest.items()]
    return Table(["measured", "rate or value", "κ", "chance"], rows, note=_conditions(report.settings))


def report_table(report: EquivarianceValues) -> str:
    """Return one report in Markdown: agreements with κ, errors, then code use, reconstruction and conditions.

    Brackets hold 95 % confidence intervals.
    """
    rows = [
        [AGREEMENT_LABELS[name], a.rate_text(), a.kappa_text(), f"{a.chance:.3f}", f"{a.tokens:,}"]
        for name, a in report.agreements().items()
    ]
    tables = [Table(["index agreement", "rate", "κ", "chance", "token pairs"], rows)]
    if report.errors():
        rows = [
            [ERROR_LABELS[name], e.decibels_text(), f"{e.mean_square:.3g}"] for name, e in report.errors().items()
        ]
        tables.append(Table(["error after a shift", "dB, more is better", "mean square"], rows))
    if report.margin is not None:
        tables.append(report.margin.summary())
    if report.numerical_floor:
        rows = [[name, f"{a.differing:,}", f"{a.tokens:,}"] for name, a in report.numerical_floor.items()]
        tables.append(Table(["numerical floor", "differing indices", "tokens"], rows))
    rows = [[label, text] for label, text in _code_use_and_reconstruction(report).items()]
    tables.append(Table(["code use and reconstruction", "value"], rows, note=_conditions(report.settings)))
    return "\n".join(table.to_markdown() for table in tables)


@dataclass(frozen=True)
class ComparisonTable(Tabular):
    """Several reports side by side; ``print`` and notebooks leave out the intervals, :meth:`to_markdown` has them.

    Conditions that differ between the reports appear as rows, so that columns under different conditions cannot
    pass for comparable ones.

    Attributes:
        reports: the reports by name.
    """

    reports: Mapping[str, EquivarianceValues]

    def summary(self) -> Table:
        """Return one column per report, every agreement as ``rate (κ)``, without intervals."""
        return _comparison(self.reports, short=True)

    def to_markdown(self) -> str:
        """Return one column per report, every agreement as ``rate (κ …)``, with 95 % intervals."""
        return _comparison(self.reports).to_markdown()


def comparison_table(reports: Mapping[str, EquivarianceValues]) -> ComparisonTable:
    """Put several reports side by side.

    Args:
        reports: at least one report by name.

    Raises:
        ValueError: there is no report.
    """
    require(len(reports) > 0, "reports", "at least one", len(reports))
    return ComparisonTable(reports)


def _comparison(reports: Mapping[str, EquivarianceValues], *, short: bool = False) -> Table:
    values = list(reports.values())
    rows = []
    for field in fields(EquivarianceSettings):
        settings = [getattr(report.settings, field.name) for report in values]
        # That they were drawn is said with the shifts.
        if field.name != "sub_stride_drawn" and any(setting != settings[0] for setting in settings):
            texts = [setting_text(setting) for setting in settings]
            if field.name == "sub_stride_shifts":
                drawn = zip(values, texts, strict=True)
                texts = [_drawn(r.settings) if r.settings.sub_stride_drawn else text for r, text in drawn]
            rows.append([field.name.replace("_", " "), *texts])
    for label, texts in _measured(values):
        if any(text != NOT_MEASURED for text in texts):
            rows.append([label, *texts])
    columns = [_code_use_and_reconstruction(report) for report in values]
    rows += [[label, *(column[label] for column in columns)] for label in columns[0]]
    if short:
        rows = [[_INTERVAL.sub("", cell) for cell in row] for row in rows if row[0] not in _LONG_ROWS]
    same = all(report.settings == values[0].settings for report in values)
    note = _conditions(values[0].settings, intervals=not short) if same else ""
    return Table(["rate (κ)", *reports], rows, note=note)


def _measured(reports: Sequence[EquivarianceValues]) -> Iterator[tuple[str, list[str]]]:
    for name, label in AGREEMENT_LABELS.items():
        yield label, [_cell(getattr(report, name)) for report in reports]
    for name, label in ERROR_LABELS.items():
        errors = [report.errors().get(name) for report in reports]
        yield label + " (dB)", [NOT_MEASURED if error is None else error.decibels_text() for error in errors]
    margins = [{} if report.margin is None else report.margin.texts() for report in reports]
    for label in MARGIN_LABELS:
        yield label, [texts.get(label, NOT_MEASURED) for texts in margins]
    for name in dict.fromkeys(name for report in reports for name in report.numerical_floor):
        floors = [report.numerical_floor.get(name) for report in reports]
        yield f"numerical floor, {name}: differing", [_differing(floor) for floor in floors]


def _differing(floor: Agreement | None) -> str:
    return NOT_MEASURED if floor is None else f"{floor.differing:,} of {floor.tokens:,}"


def _code_use_and_reconstruction(report: EquivarianceValues) -> dict[str, str]:
    use, error = report.code_use, report.reconstruction
    texts = {
        "used codes": f"{use.used_codes} of {use.num_codes}",
        "codes above 0.1 % of use": str(use.frequent_codes),
        "perplexity": f"{use.perplexity:.1f}",
        "tokens behind the code use": f"{use.tokens:,}",
    }
    labels = ("reconstruction L1", "reconstruction MSE", "reconstruction PSNR (dB)")
    return texts | (dict.fromkeys(labels, NOT_MEASURED) if error is None else error.texts())


def _conditions(s: EquivarianceSettings, *, intervals: bool = True) -> str:
    sampled = "no intervals"
    if s.resamples > 0 and s.num_images > 1:
        sampled = f"in brackets 95 % intervals, {s.resamples:,} resamples of the images"
        if not intervals:
            sampled = "intervals in to_markdown()"
    values = "" if s.data_range == DEFAULT_RANGE else f"values in {setting_text(s.data_range)}, "
    below = counted(len(s.sub_stride_shifts), "sub-stride shift")
    if s.sub_stride_drawn:
        below = f"{_drawn(s)} sub-stride shifts"
    fractions = f", {counted(len(s.fractional_shifts), 'fractional shift')}" if s.fractional_shifts else ""
    ground = "no ground given, hence no foreground"
    if s.ground is not None:
        ground = f"foreground: more than {s.tau:g} from {s.ground:g}"
    return (
        f"Protocol `{s.protocol}`, {counted(s.num_images, 'image')}, {values}{setting_text(s.image_size)} pixels, "
        f"stride {s.stride}, K = {s.num_codes}; {len(s.shifts)} whole-token and {below}"
        f"{fractions}; {ground}. Code use and reconstruction over "
        f"{s.reference_images}; {sampled}."
    )


def _drawn(s: EquivarianceSettings) -> str:
    return f"{len(s.sub_stride_shifts)} of {s.stride**2 - 1} (stratified draw, seed {s.seed})"


def _cell(agreement: Agreement | None) -> str:
    if agreement is None:
        return NOT_MEASURED
    return f"{agreement.rate_text()} (κ {agreement.kappa_text()})"
