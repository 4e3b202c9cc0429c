"""Tables of stability reports: one report, in short or in full, or several side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from te_quant._checks import require
from te_quant._measuring.data_range import DEFAULT_RANGE
from te_quant._measuring.text import NOT_MEASURED, counted, setting_text
from te_quant.equivariance.metrics.agreement import Agreement
from te_quant.stability.values import StabilitySettings, StabilityValues
from te_quant.tables import Table, Tabular

__all__ = ["StabilityTable", "beside", "common_cycles", "report_table", "stability_table", "summary_table"]

_INTERVAL = re.compile(r" \[[^\]]*\]")


def summary_table(report: StabilityValues) -> Table:
    """Return the short table: one row per transform, intervals of the token match only."""
    return _table(report, short=True)


def report_table(report: StabilityValues) -> str:
    """Return the tables in Markdown, with all intervals, and one of the further cycles if there are any."""
    tables = [_table(report, short=False)]
    if report.settings.cycles > 1:
        rows = [
            [name, str(number), *cells]
            for name, found in report.transforms.items()
            for number, cells in enumerate(
                (
                    (c.match.rate_text(), c.match.kappa_text(), c.whole.text(), c.step.rate_text())
                    for c in found.cycles
                ),
                1,
            )
        ]
        header = ["by cycle", "cycle", "token match", "κ", "images whole", "match with the cycle before"]
        tables.append(Table(header, rows))
    return "\n".join(table.to_markdown() for table in tables)


@dataclass(frozen=True)
class StabilityTable(Tabular):
    """Several reports side by side; ``print`` and notebooks leave out the intervals, :meth:`to_markdown` has them.

    Attributes:
        reports: the reports by name.
    """

    reports: Mapping[str, StabilityValues]

    def summary(self) -> Table:
        """Return one column per report, every token match as ``rate (κ)``, without intervals.

        Settings that differ between the reports are the first rows. If all are equal, a note below names them.
        """
        return _comparison(self.reports, short=True)

    def to_markdown(self) -> str:
        """Return one column per report, every token match as ``rate (κ)``, with 95 % intervals of the rates."""
        return _comparison(self.reports).to_markdown()


def stability_table(reports: Mapping[str, StabilityValues]) -> StabilityTable:
    """Put several reports side by side.

    Args:
        reports: at least one report by name.

    Raises:
        ValueError: there is no report.
    """
    require(len(reports) > 0, "reports", "at least one", len(reports))
    return StabilityTable(reports)


def _table(report: StabilityValues, *, short: bool) -> Table:
    first = next(iter(report.transforms.values()))
    inked, cycles = first.foreground is not None, report.settings.cycles
    header = ["decode, then …, then encode", "token match", "κ"]
    header += ["on foreground", *([] if short else ["κ on foreground"])] if inked else []
    header += ["images whole", *([f"match, {cycles} cycles"] if cycles > 1 else [])]
    rows = []
    for name, found in report.transforms.items():
        kappa, whole = found.match.kappa_text(), found.whole.text()
        cells = [found.match.rate_text(), _short(kappa, short)]
        if found.foreground is not None:
            cells.append(_short(found.foreground.rate_text(), short))
            cells += [] if short else [found.foreground.kappa_text()]
        cells.append(_short(whole, short))
        if cycles > 1:
            cells.append(_short(found.cycles[-1].match.rate_text(), short))
        rows.append([name, *cells])
    return Table(header, rows, note=f"{beside(report)}. {_conditions(report)}")


def common_cycles(reports: Iterable[StabilityValues]) -> int:
    """Return the last cycle that all reports with several cycles share; 1 if no report has several."""
    return min((report.settings.cycles for report in reports if report.settings.cycles > 1), default=1)


def _comparison(reports: Mapping[str, StabilityValues], *, short: bool = False) -> Table:
    values = list(reports.values())
    names = list(dict.fromkeys(name for report in values for name in report.transforms))
    cycles = common_cycles(values)
    rows = []
    for field in fields(StabilitySettings):
        settings = [getattr(report.settings, field.name) for report in values]
        if any(setting != settings[0] for setting in settings):
            rows.append([field.name.replace("_", " "), *(setting_text(setting) for setting in settings)])
    for name in names:
        found = [report.transforms.get(name) for report in values]
        rows.append([name, *(NOT_MEASURED if one is None else _cell(one.match) for one in found)])
    for label in ("on foreground", "images whole", "cycles"):
        for name in names:
            cells = [_other(report, name, label, cycles) for report in values]
            if name == names[0] and any(cells):
                title = f"after {cycles} cycles" if label == "cycles" else label
                rows.append([f"{name}, {title}", *(cell or NOT_MEASURED for cell in cells)])
    rows += [
        ["used codes", *(_codes(report) for report in values)],
        ["perplexity", *(f"{report.code_use.perplexity:.1f}" for report in values)],
    ]
    if any(report.reconstruction is not None for report in values):
        errors = [report.reconstruction for report in values]
        rows.append(
            [
                "reconstruction PSNR (dB)",
                *(NOT_MEASURED if error is None else f"{error.psnr:.2f}" for error in errors),
            ]
        )
    if short:
        rows = [[_INTERVAL.sub("", cell) for cell in row] for row in rows]
    same = all(report.settings == values[0].settings for report in values)
    note = _conditions(values[0], intervals=not short) if same else ""
    return Table(["token match (κ)", *reports], rows, note=note)


def _other(report: StabilityValues, name: str, label: str, cycles: int) -> str:
    found = report.transforms.get(name)
    if found is None:
        return ""
    if label == "images whole":
        return found.whole.text()
    if label == "cycles":
        return _cell(found.cycles[cycles - 1].match) if report.settings.cycles > 1 else ""
    return "" if found.foreground is None else _cell(found.foreground)


def beside(report: StabilityValues) -> str:
    """Write what a token match means little without: code use and reconstruction error."""
    use, error = report.code_use, report.reconstruction
    quality = "reconstruction not measured" if error is None else f"PSNR {error.psnr:.2f} dB, MSE {error.mse:.3g}"
    return f"{_codes(report)} codes used, perplexity {use.perplexity:.1f}; {quality}"


def _codes(report: StabilityValues) -> str:
    known = "" if report.settings.num_codes is None else f" of {report.settings.num_codes}"
    return f"{report.code_use.used_codes}{known}"


def _cell(agreement: Agreement) -> str:
    return f"{agreement.rate_text()} (κ {_INTERVAL.sub('', agreement.kappa_text())})"


def _short(text: str, short: bool) -> str:
    return _INTERVAL.sub("", text) if short else text


def _conditions(report: StabilityValues, *, intervals: bool = True) -> str:
    s = report.settings
    sampled = "no intervals"
    if s.resamples > 0 and s.num_images > 1:
        sampled = f"in brackets 95 % intervals, {s.resamples:,} resamples of the images"
        if not intervals:
            sampled = "intervals in to_markdown()"
    low, high = s.data_range
    values = "" if s.data_range == DEFAULT_RANGE else f", values in [{low:g}, {high:g}]"
    first = "" if s.tokens_from == "images" else " of given tokens"
    ground = "" if s.ground is None else f"; foreground: more than {s.tau:g} from {s.ground:g}"
    return (
        f"{counted(s.num_images, 'image')}{first}, {s.image_size[0]}x{s.image_size[1]} pixels, "
        f"{s.grid[0]}x{s.grid[1]} tokens{values}{ground}; "
        f"{sampled}."
    )
