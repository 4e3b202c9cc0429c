"""The picture of token stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from te_quant._checks import require
from te_quant._measuring.bootstrap import Interval
from te_quant._measuring.figure import add_legend, new_figure
from te_quant.stability.tables import beside, common_cycles
from te_quant.stability.values import StabilityValues, TransformStability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_stability"]

# Okabe and Ito's palette: told apart by colour-blind readers too. Shapes help where colours are printed in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_SHAPES = "osD^vP"
# Share of a row that the marks of several reports take.
_SPREAD = 0.62
_Shown = tuple[float, Interval, float]
_Panel = tuple[str, Callable[[TransformStability], "_Shown | None"]]


def plot_stability(reports: Mapping[str, StabilityValues]) -> Figure:
    """Draw reports side by side: one row per transform, panels for all tokens, foreground and whole images.

    Lines through the marks are 95 % intervals. The short vertical line is the chance level for the same code
    frequencies. The legend carries the code use and the reconstruction error, without which a match means little.

    Args:
        reports: at least one report by name.

    Returns:
        A figure that belongs to no window; use its ``savefig``.

    Raises:
        ValueError: there is no report.
        ImportError: matplotlib is not installed (``te_quant[plot]``).
    """
    require(len(reports) > 0, "reports", "at least one", len(reports))
    names = list(dict.fromkeys(name for report in reports.values() for name in report.transforms))
    panels = _panels(reports)
    rows = 0.3 + 0.12 * len(reports)
    figure = new_figure(2.2 + 2.6 * len(panels), 1.7 + rows * len(names) + 0.2 * len(reports))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, value) in zip(axes, panels, strict=True):
        marks = _draw(panel, names, reports, value)
        panel.set_title(title, fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle("Do tokens survive decoding, a transform and encoding?", fontsize=11)
    only = len(reports) == 1
    handles = {
        beside(report) if only else f"{name}: {beside(report)}": mark
        for (name, report), mark in zip(reports.items(), marks, strict=True)
    }
    note = "lines: 95 % intervals; vertical line: chance level"
    add_legend(figure, handles, loc="outside lower center", fontsize=8, title=note, title_fontsize=8)
    return figure


def _panels(reports: Mapping[str, StabilityValues]) -> list[_Panel]:
    found = [one for report in reports.values() for one in report.transforms.values()]
    cycles = common_cycles(reports.values())
    panels: list[_Panel] = [("share of tokens\nthat return", _match)]
    if any(one.foreground is not None for one in found):
        panels.append(("the same,\nforeground only", _foreground))
    panels.append(
        ("share of images\nthat return whole", lambda one: (one.whole.share, one.whole.interval, math.nan))
    )
    if cycles > 1:
        panels.append((f"tokens that are left\nafter {cycles} cycles", partial(_after, cycles)))
    return panels


def _match(one: TransformStability) -> _Shown:
    return one.match.rate, one.match.rate_interval, one.match.chance


def _foreground(one: TransformStability) -> _Shown | None:
    found = one.foreground
    return None if found is None else (found.rate, found.rate_interval, found.chance)


def _after(cycles: int, one: TransformStability) -> _Shown | None:
    if len(one.cycles) < cycles:
        return None
    found = one.cycles[cycles - 1].match
    return found.rate, found.rate_interval, found.chance


def _draw(
    panel: Any,
    names: list[str],
    reports: Mapping[str, StabilityValues],
    value: Callable[[TransformStability], _Shown | None],
) -> list[Any]:
    """Fill one panel, and return a mark of each report for the legend."""
    marks = []
    step = _SPREAD / len(reports)
    for number, report in enumerate(reports.values()):
        colour, shape = _COLOURS[number % len(_COLOURS)], _SHAPES[number % len(_SHAPES)]
        # One without a place, so that every report has one.
        marks += panel.plot([], [], shape, color=colour, ms=5)
        for row, name in enumerate(names):
            if name not in report.transforms:
                continue
            shown = value(report.transforms[name])
            if shown is None or math.isnan(shown[0]):
                continue
            share, (low, high), chance = shown
            height = row + step * (number - (len(reports) - 1) / 2)
            if math.isfinite(low) and math.isfinite(high):
                panel.plot([low, high], [height, height], color=colour, lw=1.4, zorder=2)
            panel.plot([share], [height], shape, color=colour, ms=5, zorder=3)
            if math.isfinite(chance):
                panel.plot([chance, chance], [height - step * 0.4, height + step * 0.4], color="0.35", lw=1.4)
            if len(reports) == 1:
                right = share < 0.8
                panel.annotate(
                    f"{share:.2f}",
                    (max(high, share) if right and math.isfinite(high) else share, height),
                    xytext=(6, 0) if right else (-8, 0),
                    textcoords="offset points",
                    ha="left" if right else "right",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                )
    panel.set_xlim(-0.04, 1.04)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"], fontsize=8)
    panel.grid(axis="x", color="0.9", lw=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    for row in range(1, len(names)):
        panel.axhline(row - 0.5, color="0.93", lw=0.8, zorder=0)
    return marks
