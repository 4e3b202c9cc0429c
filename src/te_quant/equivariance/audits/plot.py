"""Pictures of audits and of constant images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from te_quant._measuring.figure import new_figure
from te_quant._measuring.text import name_end
from te_quant.equivariance.audits.rows import PARTS, AuditRow, decibels, worst_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_audit", "plot_constant_image"]

# Okabe and Ito's palette: told apart by colour-blind readers too.
_COLOURS = {"border": "#D55E00", "global": "#CC79A7", "aliasing": "#0072B2"}
_OFFSETS = {"border": -0.28, "global": 0.0, "aliasing": 0.28}
_MARKS = {"border": "o", "global": "D", "aliasing": "s"}
# Better than this is drawn on the line that says exact; float32 rounds at about 100 dB.
_BEST = 80.0
# Worse than this is drawn here.
_WORST = -40.0
_STEP = 10
_LONGEST = 49
# Characters of the headline in one line.
_CAPTION = 130


def plot_audit(rows: Sequence[AuditRow], *, headline: str = "") -> Figure:
    """Draw one line per module, in the order of execution: the error after it, and what it adds, by part.

    Args:
        rows: of a report, in the order of execution.
        headline: what readers must know before the rest.

    Returns:
        A figure that belongs to no window; use its ``savefig``.
    """
    places = range(len(rows))
    figure = new_figure(10.5, 1.9 + 0.17 * max(4, len(rows)))
    after, added = figure.subplots(1, 2, sharey=True)
    if headline:
        figure.suptitle(textwrap.fill(headline, _CAPTION), fontsize=9, color=_COLOURS["border"])
    exact = _exact_line(rows)
    for label, field, colour, dash in (
        ("whole strides", "whole_error", "#000000", "-"),
        ("less than the stride", "sub_stride_error", "#009E73", "--"),
    ):
        values = [_decibels(row, getattr(row, field), exact) for row in rows]
        after.plot(values, places, dash, color=colour, marker=".", label=label, clip_on=False)
    for part in PARTS:
        values = [_decibels(row, row.part(part), exact) if row.part(part) else math.nan for row in rows]
        beside = [place + _OFFSETS[part] for place in places]
        lengths = [value - exact for value in values]
        added.barh(beside, lengths, 0.28, left=exact, color=_COLOURS[part], zorder=2)
        worst = worst_row(rows, part)
        name = "nothing" if worst is None else f"most by {worst.name or 'the model'}"
        style: dict[str, Any] = {"ls": "", "markersize": 4, "zorder": 3}
        added.plot(values, beside, _MARKS[part], color=_COLOURS[part], label=f"{part}: {name}", **style)
    for axes, title in ((after, "Error after each module, shifts by"), (added, "Error that each module adds")):
        axes.axvline(exact, color="0.6", lw=0.8)
        worst_seen = min([0.0, *(x for line in axes.lines for x in line.get_xdata() if math.isfinite(x))])
        # Worse is further to the right, so that a longer bar is a larger loss.
        axes.set_xlim(exact + _STEP / 4, worst_seen - _STEP / 4)
        ticks = list(range(int(worst_seen / _STEP) * _STEP, int(exact), _STEP))
        axes.set_xticks([exact, *ticks], ["exact", *map(str, ticks)], fontsize=8)
        axes.set_xlabel("dB below the signal", fontsize=8)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        placed = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
        axes.legend(title=title, title_fontsize=9, fontsize=8, alignment="left", frameon=False, **placed)
    _mark_strides(after, rows, exact)
    added.tick_params(axis="y", left=False)
    after.set_yticks(places, [_label(row) for row in rows], fontsize=7)
    after.set_ylim(max(4, len(rows)) - 0.4, -0.6)
    return figure


def plot_constant_image(
    deviation: Tensor,
    phases: Tensor,
    profile: Sequence[float],
    *,
    grid_error: float,
    border_error: float,
    margin: int,
) -> Figure:
    """Draw what became of a constant image: its deviation, the same enlarged in the middle, phases and profile.

    Args:
        deviation: the output less the mean of its interior.
        phases: mean of the interior at each position modulo the stride.
        profile: RMS of the deviation at each distance from the border.
        grid_error: RMS of the phases.
        border_error: RMS of the deviation near the border.
        margin: width of the border, pixels.

    Shape:
        deviation: (B, I, H, W), of which the first image is drawn. phases: (I, s, s).

    Returns:
        A figure that belongs to no window; use its ``savefig``.
    """
    s = phases.shape[-1]
    image = deviation[0].mean(0)
    height, width = image.shape
    zoom = min(8 * s, height - 2 * margin, width - 2 * margin)
    top, left = (height - zoom) // 2 // s * s, (width - zoom) // 2 // s * s
    figure = new_figure(13, 3.6)
    axes = figure.subplots(1, 4)
    panels = (
        ("deviation from the interior's mean", image),
        (f"enlarged: {zoom} pixels in the middle", image[top : top + zoom, left : left + zoom]),
        (f"mean by position modulo {s}: RMS {grid_error:.2g}", phases.mean(0)),
    )
    for axis, (title, values) in zip(axes, panels, strict=False):
        most = float(values.abs().max()) or 1.0
        drawn = axis.imshow(values.to(torch.float64).numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
        axis.set_title(title, fontsize=9)
    for axis in axes[1:3]:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes[3].plot(profile, color="black", marker=".")
    axes[3].axvline(margin - 0.5, color="0.6", ls="--", lw=0.8)
    axes[3].set_title(f"RMS by distance; border: {border_error:.2g}", fontsize=9)
    axes[3].set_xlabel("pixels from the border")
    axes[3].set_ylim(bottom=0)
    axes[3].spines[["top", "right"]].set_visible(False)
    return figure


def _exact_line(rows: Sequence[AuditRow]) -> float:
    """Where to draw what is exact: one step better than the best value that is not."""
    errors = [(row, error) for row in rows for error in (row.whole_error, row.sub_stride_error)]
    errors += [(row, row.part(part)) for row in rows for part in PARTS]
    shown = [decibels(error) for row, error in errors if error is not None and error > row.floor]
    best = max([0.0, *(value for value in shown if value < _BEST)])
    return _STEP * (math.floor(best / _STEP) + 2.0)


def _decibels(row: AuditRow, error: float | None, exact: float) -> float:
    if error is None:
        return math.nan
    return exact if error <= row.floor else max(_WORST, min(exact, decibels(error)))


def _label(row: AuditRow) -> str:
    return f"{name_end(row.title(), _LONGEST)} ({row.kind})"


def _mark_strides(axes: Any, rows: Sequence[AuditRow], exact: float) -> None:
    previous = None
    for place, row in enumerate(rows):
        if row.stride != previous:
            axes.axhline(place - 0.5, color="0.7", lw=0.8, zorder=0)
            text = {"xytext": (5, -1), "textcoords": "offset points", "fontsize": 7, "va": "top"}
            axes.annotate(f"stride {row.stride:g}", (exact, place - 0.5), **text)
        previous = row.stride
