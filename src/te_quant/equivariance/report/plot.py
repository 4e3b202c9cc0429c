"""Pictures of reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from te_quant._checks import require, require_choice
from te_quant._measuring.bootstrap import Interval
from te_quant._measuring.figure import add_legend, new_figure
from te_quant.equivariance.report.values import EquivarianceValues, ShiftAgreement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_reports", "plot_shift_maps"]

# Okabe and Ito's palette: told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
# What tells the bars of the next rounds of colours from those of the first.
_HATCHES = (None, "..", "xx", "oo")
_SHORT = {
    "placement": "placement\n(paper)",
    "placement_foreground": "placement\nforeground",
    "aligned": "whole-token\nshifts",
    "aligned_foreground": "whole-token\nforeground",
    "sub_stride": "sub-stride\nshifts",
    "sub_stride_foreground": "sub-stride\nforeground",
    "sub_stride_fourier": "sub-stride\nFourier",
    "sub_stride_fourier_foreground": "sub-stride\nFourier fg.",
    "fractional": "fractional\nshifts",
}
_SHORT_ERRORS = {
    "feature_error": "features\nwhole-token shifts",
    "feature_error_sub_stride": "features\nsub-stride shifts",
    "feature_error_fractional": "features\nfractional shifts",
    "end_to_end": "end to end PSNR\nwhole-token shifts",
    "end_to_end_sub_stride": "end to end PSNR\nsub-stride shifts",
    "end_to_end_fractional": "end to end PSNR\nfractional shifts",
}
_MAP_VALUES = ("agreement", "feature_error", "end_to_end")
_MAP_TITLES = {"agreement": "equal indices", "feature_error": "feature error, dB", "end_to_end": "PSNR, dB"}
_MOST_NUMBERED = 8
# Below this share of the range viridis is dark enough for white figures.
_DARK = 0.6
# Below this a value is written as zero, without a sign.
_ZERO = 0.005
# Inches that a value written upright takes, with room beside it.
_BAR_INCHES = 0.21


class _Bar(NamedTuple):
    value: float
    interval: Interval
    chance: float = math.nan


def plot_reports(reports: Mapping[str, EquivarianceValues]) -> Figure:
    """Draw reports side by side: rates, κ and errors by metric, and one map over sub-stride shifts each.

    The short line across a rate is what chance gives with the same code frequencies; whiskers are 95 % intervals.
    Each map's title carries the code use and the reconstruction error, without which an agreement means little.

    Args:
        reports: at least one report by name.

    Returns:
        A figure that belongs to no window; use its ``savefig``.

    Raises:
        ValueError: there is no report.
        ImportError: matplotlib is not installed (``te_quant[plot]``).
    """
    require(len(reports) > 0, "reports", "at least one", len(reports))
    panels = _panels(reports)
    columns = min(4, len(reports))
    map_rows = math.ceil(len(reports) / columns)
    bars = max(len(groups) for _, groups in panels) * (len(reports) + 1)
    width = max(9.0, 3.4 * columns, _BAR_INCHES * bars)
    figure = new_figure(width, 2.9 * len(panels) + 3.8 * map_rows)
    grid = figure.add_gridspec(
        len(panels) + map_rows, columns, height_ratios=[2.7] * len(panels) + [3.5] * map_rows
    )
    bars_of: dict[str, Any] = {}
    for row, (label, groups) in enumerate(panels):
        axes = figure.add_subplot(grid[row, :])
        bars_of = _draw_bars(axes, groups, list(reports), decibels="dB" in label) | bars_of
        axes.set_ylabel(label)
    first = figure.axes[0]
    first.set_title("Index agreement (black line: what chance gives; whiskers: 95 % intervals)", fontsize=10)
    if len(reports) > 1:
        handles = {name: bars_of[name] for name in reports if name in bars_of}
        add_legend(figure, handles, loc="outside upper center", ncols=columns)
    for position, (name, report) in enumerate(reports.items()):
        axes = figure.add_subplot(grid[len(panels) + position // columns, position % columns])
        _draw_map(axes, report, report.sub_stride_by_shift, "agreement")
        drawn = f", {len(report.sub_stride_by_shift)} drawn" if report.settings.sub_stride_drawn else ""
        heading = [f"equal indices by sub-stride shift{drawn}", _beside(report)]
        axes.set_title("\n".join([name, *heading] if name else heading), fontsize=9)
    return figure


def plot_shift_maps(reports: Mapping[str, EquivarianceValues], *, value: str = "agreement") -> Figure:
    """Draw one column per report: above the map over shifts by whole tokens, below the map over sub-stride shifts.

    Args:
        reports: at least one report by name.
        value: ``agreement`` (rate of equal indices), ``feature_error`` or ``end_to_end`` (decibels). Maps in
            decibels share one colour scale; what was not measured stays grey.

    Returns:
        A figure that belongs to no window; use its ``savefig``.

    Raises:
        ValueError: there is no report, or ``value`` is none of the three.
        ImportError: matplotlib is not installed (``te_quant[plot]``).
    """
    require(len(reports) > 0, "reports", "at least one", len(reports))
    require_choice("value", value, _MAP_VALUES)

    figure = new_figure(max(4.2, 3.7 * len(reports)), 8.4)
    grid = figure.add_gridspec(2, len(reports))
    limits = _limits(reports, value)
    for column, (name, report) in enumerate(reports.items()):
        rows = (("whole-token", report.aligned_by_shift), ("sub-stride", report.sub_stride_by_shift))
        for row, (kind, entries) in enumerate(rows):
            axes = figure.add_subplot(grid[row, column])
            _draw_map(axes, report, entries, value, limits)
            beside = f"\n{_beside(report)}" if row == 0 else ""
            axes.set_title(f"{name}\n{_MAP_TITLES[value]}, {kind} shifts{beside}", fontsize=9)
    return figure


_Groups = dict[str, dict[str, _Bar]]


def _panels(reports: Mapping[str, EquivarianceValues]) -> list[tuple[str, _Groups]]:
    def groups(names: Mapping[str, str], bars: Callable[[EquivarianceValues], Mapping[str, _Bar]]) -> _Groups:
        measured = {name: bars(report) for name, report in reports.items()}
        found = {
            short: {name: values[metric] for name, values in measured.items() if metric in values}
            for metric, short in names.items()
        }
        return {short: values for short, values in found.items() if values}

    panels = [
        (
            "equal indices",
            groups(
                _SHORT, lambda r: {n: _Bar(a.rate, a.rate_interval, a.chance) for n, a in r.agreements().items()}
            ),
        ),
        (
            "Cohen's κ",
            groups(_SHORT, lambda r: {n: _Bar(a.kappa, a.kappa_interval) for n, a in r.agreements().items()}),
        ),
    ]
    errors = groups(_SHORT_ERRORS, lambda r: {n: _Bar(e.decibels, e.interval) for n, e in r.errors().items()})
    return [*panels, ("signal to error, dB", errors)] if errors else panels


def _draw_bars(axes: Any, groups: _Groups, names: list[str], *, decibels: bool) -> dict[str, Any]:
    """Draw one panel, and return a bar of each report for the legend."""
    drawn: dict[str, Any] = {}
    width = 0.84 / len(names)
    ends = [
        end
        for bars in groups.values()
        for bar in bars.values()
        for end in (bar.value, *bar.interval)
        if math.isfinite(end)
    ]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    # Values of many bars are written upright, because side by side they would run into each other.
    upright = len(names) > 2
    room = 0.26 if upright else 0.14
    for number, name in enumerate(names):
        for position, bars in enumerate(groups.values()):
            if name not in bars:
                continue
            bar = bars[name]
            centre = position - 0.42 + width * (number + 0.5)
            height = bar.value if math.isfinite(bar.value) else high if bar.value == math.inf else 0.0
            # An exact result has no height in decibels: its bar is as high as the highest, and hatched.
            turn, shade = divmod(number, len(_COLOURS))
            hatch = "//" if bar.value == math.inf else _HATCHES[turn % len(_HATCHES)]
            colour = _COLOURS[shade]
            shape = axes.bar(centre, height, width * 0.92, color=colour, hatch=hatch, edgecolor="white", lw=0)
            drawn.setdefault(name, shape)
            top = max(height, 0.0)
            if all(math.isfinite(end) for end in bar.interval):
                axes.vlines(centre, *bar.interval, color="0.25", lw=1.2)
                top = max(top, bar.interval[1])
            if math.isfinite(bar.chance):
                axes.hlines(bar.chance, centre - width * 0.46, centre + width * 0.46, color="black", lw=2)
            axes.text(
                centre,
                top + (high - low) * 0.02,
                _bar_text(bar.value, ".1f" if decibels else ".2f"),
                ha="center",
                va="bottom",
                fontsize=7,
                rotation=90 if upright else 0,
            )
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.set_ylim(low * 1.1, high + (high - low) * room)
    if not decibels:
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.axhline(0, color="black", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _bar_text(value: float, pattern: str) -> str:
    if math.isnan(value):
        return "undef."
    if value == math.inf:
        return "exact"
    # Rounding to -0.00 would suggest a sign.
    return format(0.0 if abs(value) < _ZERO else value, pattern)


def _draw_map(
    axes: Any,
    report: EquivarianceValues,
    entries: Sequence[ShiftAgreement],
    value: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    if entries == report.sub_stride_by_shift:
        rows = columns = list(range(report.settings.stride))
    else:
        rows = sorted({0, *(entry.shift[0] for entry in entries)})
        columns = sorted({0, *(entry.shift[1] for entry in entries)})
    values = [[math.nan] * len(columns) for _ in rows]
    for entry in entries:
        values[rows.index(entry.shift[0])][columns.index(entry.shift[1])] = _value(entry, value)
    low, high = limits
    clipped = [[min(max(v, low), high) for v in row] for row in values]
    axes.imshow(clipped, vmin=low, vmax=high, cmap="viridis")
    axes.set_facecolor("0.85")
    axes.set_xlabel("shift right (pixels)")
    axes.set_ylabel("shift down (pixels)")
    for names, set_ticks in ((columns, axes.set_xticks), (rows, axes.set_yticks)):
        ticks = range(0, len(names), max(1, len(names) // 8))
        set_ticks(ticks, [str(names[tick]) for tick in ticks])
    if max(len(rows), len(columns)) > _MOST_NUMBERED:
        return
    pattern = ".2f" if value == "agreement" else ".1f"
    for row, dy in enumerate(rows):
        for column, dx in enumerate(columns):
            v = values[row][column]
            text = "not\nshifted" if dy == dx == 0 else "" if math.isnan(v) else _bar_text(v, pattern)
            dark = not math.isnan(v) and clipped[row][column] < low + _DARK * (high - low)
            colour = "0.3" if math.isnan(v) else "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


def _value(entry: ShiftAgreement, value: str) -> float:
    if value == "agreement":
        return entry.agreement.rate
    found: float | None = getattr(entry, value)
    return math.nan if found is None else found


def _limits(reports: Mapping[str, EquivarianceValues], value: str) -> tuple[float, float]:
    if value == "agreement":
        return 0.0, 1.0
    found = [
        _value(entry, value)
        for report in reports.values()
        for entry in (*report.aligned_by_shift, *report.sub_stride_by_shift)
    ]
    finite = [v for v in found if math.isfinite(v)]
    return min([0.0, *finite]), max([1.0, *finite])


def _beside(report: EquivarianceValues) -> str:
    use, error = report.code_use, report.reconstruction
    quality = "reconstruction not measured" if error is None else f"L1 {error.l1:.3f}, PSNR {error.psnr:.1f} dB"
    return f"{use.used_codes} of {report.settings.num_codes} codes, perplexity {use.perplexity:.1f}\n{quality}"
