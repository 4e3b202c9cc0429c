"""Pictures of reports. matplotlib is imported here only when a picture is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from te_quant._checks import require
from te_quant.equivariance.report import EquivarianceReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_reports"]

# Okabe and Ito's palette: told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_SHORT = {
    "placement": "placement\n(paper)",
    "placement_foreground": "placement\nforeground",
    "aligned": "whole-token\nshifts",
    "aligned_foreground": "whole-token\nforeground",
    "sub_stride": "sub-stride\nshifts",
    "sub_stride_foreground": "sub-stride\nforeground",
    "sub_stride_fourier": "sub-stride\nFourier",
    "sub_stride_fourier_foreground": "sub-stride\nFourier fg.",
}


def plot_reports(reports: Mapping[str, EquivarianceReport]) -> Figure:
    """Draw reports side by side: rates and κ by metric, and one map over sub-stride shifts each.

    The short line across a rate is what chance gives with the same code frequencies. Each map's title
    carries the code use and the reconstruction error, without which an agreement means little.

    Args:
        reports: at least one report by name.

    Returns:
        A figure that belongs to no window; use its ``savefig``.
    """
    require(len(reports) > 0, "reports", "at least one", len(reports))
    from matplotlib.figure import Figure

    columns = min(4, len(reports))
    map_rows = math.ceil(len(reports) / columns)
    figure = Figure(figsize=(max(9.0, 3.4 * columns), 6.4 + 3.6 * map_rows), layout="constrained")
    grid = figure.add_gridspec(2 + map_rows, columns, height_ratios=[2.6, 2.6] + [3.4] * map_rows)
    measured = {name: report.agreements() for name, report in reports.items()}
    metrics = [metric for metric in _SHORT if any(metric in values for values in measured.values())]
    for row, (field, label) in enumerate((("rate", "equal indices"), ("kappa", "Cohen's κ"))):
        axes = figure.add_subplot(grid[row, :])
        _draw_bars(axes, measured, metrics, field)
        axes.set_ylabel(label)
        axes.set_xticks(range(len(metrics)), [_SHORT[metric] for metric in metrics], fontsize=8)
        if row == 0:
            axes.set_title("Index agreement (black line: what chance gives)", fontsize=10)
            if len(reports) > 1:
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=len(reports), frameon=False)
    for position, (name, report) in enumerate(reports.items()):
        axes = figure.add_subplot(grid[2 + position // columns, position % columns])
        _draw_map(axes, report)
        axes.set_title(f"{name}: equal indices by sub-stride shift\n{_beside(report)}", fontsize=9)
    return figure


def _draw_bars(axes: Any, measured: Mapping[str, Mapping[str, Any]], metrics: list[str], field: str) -> None:
    width = 0.8 / len(measured)
    lowest = 0.0
    for number, (name, values) in enumerate(measured.items()):
        for position, metric in enumerate(metrics):
            if metric not in values:
                continue
            agreement = values[metric]
            centre = position - 0.4 + width * (number + 0.5)
            value = getattr(agreement, field)
            label = {"label": name} if metric == next(iter(values)) else {}
            height = value if math.isfinite(value) else 0.0
            axes.bar(centre, height, width * 0.92, color=_COLOURS[number % len(_COLOURS)], **label)
            text = f"{value:.2f}" if math.isfinite(value) else "undef."
            axes.text(centre, max(height, 0.0) + 0.015, text, ha="center", va="bottom", fontsize=7)
            if field == "rate" and math.isfinite(agreement.chance):
                axes.hlines(agreement.chance, centre - width * 0.46, centre + width * 0.46, color="black", lw=2)
            lowest = min(lowest, height)
    axes.set_ylim(lowest * 1.1, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.axhline(0, color="black", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(axes: Any, report: EquivarianceReport) -> None:
    stride = report.settings.stride
    rates = [[math.nan] * stride for _ in range(stride)]
    for entry in report.sub_stride_by_shift:
        rates[entry.shift[0]][entry.shift[1]] = entry.agreement.rate
    axes.imshow(rates, vmin=0, vmax=1, cmap="viridis")
    axes.set_facecolor("0.85")
    axes.set_xlabel("shift right (pixels)")
    axes.set_ylabel("shift down (pixels)")
    ticks = range(0, stride, max(1, stride // 8))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    if stride > _MOST_NUMBERED:
        return
    for dy, row in enumerate(rates):
        for dx, rate in enumerate(row):
            text = "not shifted" if dy == dx == 0 else "" if math.isnan(rate) else f"{rate:.2f}"
            colour = "0.3" if math.isnan(rate) else "white" if rate < _DARK else "black"
            axes.text(dx, dy, text.replace(" ", "\n"), ha="center", va="center", color=colour, fontsize=7)


_MOST_NUMBERED = 8
# Below this viridis is dark enough for white figures.
_DARK = 0.6


def _beside(report: EquivarianceReport) -> str:
    use, error = report.code_use, report.reconstruction
    quality = "reconstruction not measured" if error is None else f"L1 {error.l1:.3f}, PSNR {error.psnr:.1f} dB"
    return f"{use.used_codes} of {report.settings.num_codes} codes, perplexity {use.perplexity:.1f}\n{quality}"
