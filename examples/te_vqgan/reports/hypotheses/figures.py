"""Figures of the confirmatory analysis: a forest plot of the effects, and accuracy by number of candidates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from examples.te_vqgan.reports.hypotheses.analysis import Result, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_candidates", "draw_effects"]

_COLORS = {"confirmed": "C2", "contradicted": "C3", "not resolved": "0.35"}


def draw_effects(panels: Mapping[str, Sequence[tuple[str, Result, str]]]) -> Figure:
    """Draw every comparison: its mean with the 95 % interval, a small point per seed, and a shaded stated side.

    The colour is that of the comparison's own test, the word behind it the verdict of its hypothesis. Differences
    of differences vary more, and have a scale of their own below the others.

    Args:
        panels: by title, for each comparison its name, the result, and the verdict of its hypothesis.
    """
    from matplotlib.figure import Figure

    first = next(iter(panels.values()))
    groups = [
        [place for place, (_, one, _) in enumerate(first) if (len(one.comparison.terms) > 2) is later]
        for later in (False, True)
    ]
    groups = [group for group in groups if group]
    figure = Figure(
        figsize=(5.6 * len(panels) + 2.2, 0.75 * len(first) + 1.6 + 0.6 * (len(groups) - 1)), layout="constrained"
    )
    grid = figure.subplots(
        len(groups), len(panels), sharey="row", squeeze=False, height_ratios=[len(group) + 0.2 for group in groups]
    )
    for axes, group in zip(grid, groups, strict=True):
        for axis, comparisons in zip(axes, panels.values(), strict=True):
            _draw_comparisons(axis, [comparisons[place] for place in group])
        axes[0].invert_yaxis()
    for axis, title in zip(grid[0], panels, strict=True):
        axis.set_title(title)
    for axis in grid[-1]:
        axis.set_xlabel("difference in digit accuracy")
    figure.suptitle(
        "Preregistered comparisons: mean and 95 % interval (diamond, line), seeds (points); grey: the stated side"
    )
    return figure


def _draw_comparisons(axis: Axes, comparisons: Sequence[tuple[str, Result, str]]) -> None:
    axis.axvline(0, color="black", linewidth=0.8)
    # Symmetric, so that the eye does not take the middle for zero.
    ends = [abs(x) for _, one, _ in comparisons for x in (*one.test.interval, *one.differences.values())]
    limit = 1.05 * max(*ends, 0.01)
    for place, (_, one, judged) in enumerate(comparisons):
        low, high = one.test.interval
        color = _COLORS[verdict([one])]
        axis.barh(place, one.comparison.sign * limit, height=0.8, color="0.94", zorder=0)
        axis.plot([low, high], [place, place], color=color, linewidth=2, marker="|", label="interval")
        axis.plot(one.test.mean, place, marker="D", markersize=7, color=color, label="mean")
        values = list(one.differences.values())
        heights = [place + 0.22] * len(values)
        axis.plot(values, heights, linestyle="none", marker="o", markersize=3.5, color="0.5", label="seeds")
        axis.text(1.02, place, judged, transform=axis.get_yaxis_transform(), va="center", color=_COLORS[judged])
    axis.set_xlim(-limit, limit)
    axis.set_yticks(range(len(comparisons)), [text for text, _, _ in comparisons])
    axis.grid(axis="x", alpha=0.3)


def draw_candidates(tasks: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Figure:
    """Draw digit accuracy against the number of candidates: a line per tokenizer, a point per seed.

    Args:
        tasks: by task, tokenizer and number of candidates, the outcome of each seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(tasks) + 1, 4.4), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    order = list(dict.fromkeys(number for arms in tasks.values() for curve in arms.values() for number in curve))
    for axis, (task, arms) in zip(axes, tasks.items(), strict=True):
        for index, (name, curve) in enumerate(arms.items()):
            color = f"C{index % 10}"
            places = [order.index(number) for number in curve]
            means = [statistics.fmean(values) for values in curve.values()]
            axis.plot(places, means, color=color, linewidth=1.6, label=name)
            # Beside each other, so that no tokenizer hides another.
            beside = 0.04 * (index - (len(arms) - 1) / 2)
            for place, values in zip(places, curve.values(), strict=True):
                spots = [place + beside] * len(values)
                axis.plot(spots, values, linestyle="none", marker="osD^"[index % 4], markersize=4, color=color)
        axis.set(title=task, xlabel="largest logits that are drawn from")
        axis.set_xticks(range(len(order)), order)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("digit accuracy, held-out combinations")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Accuracy by number of candidates (exploratory except for 2)")
    return figure
