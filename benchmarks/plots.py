"""The measurements as pictures: growth on logarithmic axes, and how many times slower the others are."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.contest import OURS
from benchmarks.peers import MODES, QUANTIZERS
from benchmarks.targets import ratio
from benchmarks.training import CONTENDERS, NONE, OWN, RATE, results
from examples.te_vqgan.runs.files import write_bytes_atomically

__all__ = ["write_plots"]

_MIB = 2**20
_DPI = 110


def write_plots(document: Mapping[str, Any], folder: Path) -> None:
    """Write ``growth.png`` and ``ratios.png`` into ``folder``, those that there are measurements for."""
    import matplotlib as mpl

    mpl.use("Agg")
    cells = document["cells"]
    if any(key.startswith("growth/") for key in cells):
        write_bytes_atomically(folder / "growth.png", _growth(cells))
    if any(key.startswith("training/") for key in cells):
        write_bytes_atomically(folder / "training.png", _training(cells))
    if any(key.startswith("quantizer/") for key in cells):
        write_bytes_atomically(folder / "ratios.png", _ratios(cells))


def _growth(cells: Mapping[str, Any]) -> bytes:
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained", squeeze=False)
    panels = [("time", "median", 1e-3, "ms"), ("memory", "bytes", _MIB, "MiB beyond input and output")]
    for row, (what, field, unit, label) in enumerate(panels):
        for column, axis in enumerate(("N", "K")):
            axes = grid[row][column]
            for name in QUANTIZERS:
                points = []
                for cell in cells.values():
                    settings, entry = cell["settings"], cell["contenders"].get(name, {})
                    if (settings.get("what"), settings.get("along")) == (what, axis) and entry.get(
                        "status"
                    ) == "ok":
                        points.append((settings[axis], max(entry[field], 1e-9) / unit))
                if points:
                    axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
            axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            axes.grid(alpha=0.3)
    if grid[0][0].lines:
        grid[0][0].legend(frameon=False, fontsize="small")
    figure.suptitle("Forward pass in evaluation")
    return _png(figure)


def _ratios(cells: Mapping[str, Any]) -> bytes:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    modes = [mode for mode in MODES if any(key.startswith(f"quantizer/{mode}-") for key in cells)]
    sizes = {tuple(cell["settings"][name] for name in "NKC") for key, cell in cells.items() if "quantizer/" in key}
    rows = sorted(sizes, reverse=True)
    figure, grid = plt.subplots(
        1,
        len(modes),
        figsize=(2 + 3 * len(modes), 1.5 + 0.45 * len(rows)),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    others = [name for name in QUANTIZERS if name != OURS]
    height = 0.8 / len(others)
    for axes, mode in zip(grid[0], modes, strict=True):
        for number, name in enumerate(others):
            values = []
            for N, K, C in rows:
                cell = cells.get(f"quantizer/{mode}-N{N}-K{K}-C{C}")
                values.append((cell and ratio(cell, name, OURS)) or math.nan)
            places = [index - number * height for index in range(len(rows))]
            # From 1 to the right where they are slower than ours, to the left where they are faster.
            axes.barh(places, [value - 1 for value in values], left=1, height=height, label=name)
        axes.set(xscale="log", title=mode, xlabel="times ours")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="x", alpha=0.3)
    labels = [f"{N:,}, {K:,}, {C}" for N, K, C in rows]
    grid[0][0].set_yticks([index - 0.3 for index in range(len(rows))], labels, fontsize="small")
    grid[0][0].set_ylabel("N, K, C")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(others), frameon=False, fontsize="small")
    return _png(figure)


def _training(cells: Mapping[str, Any]) -> bytes:
    """Error beyond that of the same network without a quantizer, by grid and contender."""
    from matplotlib import pyplot as plt

    groups = results(cells)
    figure, grid = plt.subplots(
        1, len(groups), figsize=(2.5 + 2.6 * len(groups), 4.6), layout="constrained", squeeze=False, sharey=True
    )
    names = [name for name in CONTENDERS if name != NONE and any(name in group for group in groups.values())]
    for axes, ((data, K, C), group) in zip(grid[0], groups.items(), strict=True):
        base = group[NONE].mean("mse") if NONE in group else math.nan
        for place, name in enumerate(names):
            if name in group:
                errors = [entry["mse"] - base for entry in group[name].by_rate.get(RATE, ())]
                color = "tab:blue" if name in OWN else "tab:gray"
                axes.plot(errors, [place] * len(errors), "o", color=color, markersize=5, alpha=0.8)
        axes.set(xscale="log", title=f"{data}\nK = {K:,}, C = {C}", xlabel="test MSE beyond\nno quantizer")
        axes.grid(alpha=0.3)
    grid[0][0].set_yticks(range(len(names)), names, fontsize="small")
    grid[0][0].invert_yaxis()
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    # Without the version of the program that drew it: equal numbers give equal files.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
