"""Pictures of audits. matplotlib is imported here only when a picture is asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from te_quant.equivariance.audit_report import PARTS, AuditReport, AuditRow, decibels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from te_quant.equivariance.audit_constant import ConstantImageReport

__all__ = ["plot_audit", "plot_constant_image"]

# Okabe and Ito's palette: told apart by colour-blind readers too.
_COLOURS = {"border": "#D55E00", "global": "#CC79A7", "aliasing": "#0072B2"}
_OFFSETS = {"border": -0.28, "global": 0.0, "aliasing": 0.28}
_MARKS = {"border": "o", "global": "D", "aliasing": "s"}
# Better than this is drawn on the line that says exact; float32 rounds at about 100 dB.
_EXACT = 80.0


def plot_audit(report: AuditReport) -> Figure:
    """Draw the error after each module, and under it what each module adds, by part; down is worse.

    Args:
        report: of :func:`~te_quant.equivariance.audit`.

    Returns:
        A figure that belongs to no window; use its ``savefig``.
    """
    from matplotlib.figure import Figure

    rows = report.rows
    places = range(len(rows))
    width = min(30.0, max(7.0, 2.5 + 0.22 * len(rows)))
    figure = Figure(figsize=(width, 7.5), layout="constrained")
    after, added = figure.subplots(2, 1, sharex=True)
    for label, field, colour, style in (
        ("shifts by whole strides", "whole_error", "#000000", "-"),
        ("shifts below the stride", "sub_stride_error", "#009E73", "--"),
    ):
        heights = [_height(row, getattr(row, field)) for row in rows]
        after.plot(places, heights, style, color=colour, marker=".", label=label)
    for part in PARTS:
        heights = [_height(row, row.part(part)) if row.part(part) else math.nan for row in rows]
        colour = _COLOURS[part]
        drops = [math.nan if math.isnan(height) else height - _EXACT for height in heights]
        beside = [place + _OFFSETS[part] for place in places]
        added.bar(beside, drops, 0.28, bottom=_EXACT, color=colour)
        worst = report.worst(part)
        name = "none" if worst is None else f"most by {worst.name or 'the model'}"
        added.plot(beside, heights, _MARKS[part], ls="", color=colour, label=f"{part} ({name})", markersize=4)
    after.set_title("Error after each module", fontsize=10)
    added.set_title("Error that each module adds", fontsize=10)
    for axes in (after, added):
        axes.axhline(_EXACT, color="0.6", lw=0.8)
        low = min([0.0, *(y for line in axes.lines for y in line.get_ydata() if math.isfinite(y))])
        axes.set_ylim(low - 4, _EXACT + 4)
        axes.set_yticks([*range(0, int(_EXACT), 20), _EXACT], [*map(str, range(0, int(_EXACT), 20)), "exact"])
        axes.set_ylabel("dB (more is better)")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _mark_strides(after, rows)
    added.set_xticks(places, [_label(row) for row in rows], rotation=90, fontsize=6.5)
    added.set_xlim(-0.8, len(rows) - 0.2)
    return figure


def plot_constant_image(report: ConstantImageReport) -> Figure:
    """Draw what became of a constant image: its deviation, the same enlarged in the middle, phases and profile.

    Args:
        report: of :func:`~te_quant.equivariance.constant_image_probe`.

    Returns:
        A figure that belongs to no window; use its ``savefig``.
    """
    from matplotlib.figure import Figure

    s = report.stride
    image = report.deviation[0].mean(0)
    height, width = image.shape
    zoom = min(8 * s, height - 2 * report.margin, width - 2 * report.margin)
    top, left = (height - zoom) // 2 // s * s, (width - zoom) // 2 // s * s
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = (
        ("deviation from the interior's mean", image),
        (f"enlarged: {zoom} pixels in the middle", image[top : top + zoom, left : left + zoom]),
        (f"mean by position modulo {s}: RMS {report.grid_error:.2g}", report.phases.mean(0)),
    )
    for axis, (title, values) in zip(axes, panels, strict=False):
        most = float(values.abs().max()) or 1.0
        drawn = axis.imshow(values.to(torch.float64).numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
        axis.set_title(title, fontsize=9)
    for axis in axes[1:3]:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes[3].plot(report.profile, color="black", marker=".")
    axes[3].axvline(report.margin - 0.5, color="0.6", ls="--", lw=0.8)
    axes[3].set_title(f"RMS by distance; border: {report.border_error:.2g}", fontsize=9)
    axes[3].set_xlabel("pixels from the border")
    axes[3].set_ylim(bottom=0)
    axes[3].spines[["top", "right"]].set_visible(False)
    return figure


def _height(row: AuditRow, error: float | None) -> float:
    if error is None:
        return math.nan
    return _EXACT if error <= row.floor else max(-40.0, min(_EXACT, decibels(error)))


def _label(row: AuditRow) -> str:
    name = row.name or "(the model)"
    short = name if len(name) <= _LONGEST else "…" + name[-_LONGEST:]
    return f"{short} ({row.kind})"


_LONGEST = 34


def _mark_strides(axes: Any, rows: tuple[AuditRow, ...]) -> None:
    previous = None
    for place, row in enumerate(rows):
        if row.stride != previous:
            axes.axvline(place - 0.5, color="0.8", lw=0.8)
            axes.text(
                place - 0.4, 0.02, f"stride {row.stride:g}", transform=axes.get_xaxis_transform(), fontsize=7
            )
        previous = row.stride
