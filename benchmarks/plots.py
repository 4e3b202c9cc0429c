"""The measurements as pictures: growth, how many times slower the others are, and small trainings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.contest import OURS
from benchmarks.peers import MODES, QUANTIZERS
from benchmarks.share import CONTENDERS as STEPS
from benchmarks.share import IDENTITY, share
from benchmarks.targets import ratio
from benchmarks.training import CONTENDERS, CURVE_STEPS, DEFAULTS, NONE, OWN, PEER, PEER_ALIVE, RATE, results
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.runs.files import write_bytes_atomically

__all__ = ["write_plots"]

_MIB = 2**20
_DPI = 110
_MARKERS = "osD^v"
_CURVES = {
    NONE: "black",
    DEFAULTS: "tab:blue",
    "VectorQuantizer, gradient": "tab:cyan",
    PEER: "tab:orange",
    PEER_ALIVE: "tab:red",
    "diffusers VectorQuantizer": "tab:green",
}
"""Contenders whose curves are drawn, with their colours."""
_SHARES = {
    "step": "of the step's time",
    "inside": "its passes inside the step",
    "peak": "of the step's peak memory",
}
"""What is drawn of the share of a training step."""


def write_plots(document: Mapping[str, Any], folder: Path) -> None:
    """Write the pictures that there are measurements for into ``folder``."""
    import matplotlib as mpl

    mpl.use("Agg")
    cells = document["cells"]
    if any(key.startswith("growth/") for key in cells):
        write_bytes_atomically(folder / "growth.png", _growth(cells))
    if any(key.startswith("training/") for key in cells):
        write_bytes_atomically(folder / "training.png", _training(cells))
        write_bytes_atomically(folder / "training-curves.png", _training_curves(cells))
    if any(key.startswith("quantizer/") for key in cells):
        write_bytes_atomically(folder / "ratios.png", _ratios(cells))
    if any(key.startswith("share/") for key in cells):
        write_bytes_atomically(folder / "share.png", _share(cells))


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


def _share(cells: Mapping[str, Any]) -> bytes:
    """Shares of a training step and of its peak memory, one panel per network."""
    from matplotlib import pyplot as plt

    found = [cell for key, cell in cells.items() if key.startswith("share/")]
    names = [name for name in STEPS if name != IDENTITY]
    size = (2.5 + 2.8 * len(found), 1.5 + 0.5 * len(names))
    figure, grid = plt.subplots(1, len(found), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axes, cell in zip(grid[0], found, strict=True):
        for number, (field, label) in enumerate(_SHARES.items()):
            for row, name in enumerate(names):
                value = share(cell, name, field)
                if value is not None:
                    low, middle, high = (100 * end for end in value)
                    place = row + 0.28 * (number - 1)
                    color = f"C{number}"
                    axes.barh(place, middle, 0.26, color=color, label=label if row == 0 else None)
                    axes.plot([low, high], [place, place], color="black", linewidth=1)
        settings = cell["settings"]
        axes.set(title="{network}, {side} px\nK = {K:,}, C = {C}".format(**settings), xlabel="share, %")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
    grid[0][0].set_yticks(range(len(names)), names)
    grid[0][0].invert_yaxis()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _png(figure)


def _training(cells: Mapping[str, Any]) -> bytes:
    """Test error of each contender, divided by that of the same network without a quantizer."""
    from matplotlib import pyplot as plt

    groups = [(place, group) for place, group in results(cells).items() if NONE in group]
    names = [name for name in CONTENDERS if name != NONE and any(name in group for _, group in groups)]
    figure, axes = plt.subplots(figsize=(8, 1.8 + 0.3 * len(names)), layout="constrained")
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for number, ((data, K, C), group) in enumerate(groups):
        base = group[NONE].mean("mse")
        points = {row: group[name].mean("mse") / base for row, name in enumerate(names) if name in group}
        known = {row: value for row, value in points.items() if math.isfinite(value)}
        for row, value in known.items():
            ratios[names[row]].append(value)
        label = f"{data}, K = {K:,}, C = {C}"
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(list(known.values()), list(known), marker, color="gray", markersize=6, alpha=0.7, label=label)
    for row, name in enumerate(names):
        if ratios[name]:
            mean = math.exp(statistics.fmean(map(math.log, ratios[name])))
            color = "tab:blue" if name in OWN else "tab:orange"
            axes.plot([mean, mean], [row - 0.35, row + 0.35], color=color, linewidth=4)
    for name, color in (("te_quant, geometric mean", "tab:blue"), ("others, geometric mean", "tab:orange")):
        axes.plot([], [], color=color, linewidth=4, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="test MSE / that without a quantizer (lower is better)")
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _png(figure)


def _training_curves(cells: Mapping[str, Any]) -> bytes:
    """Training error and codes in use along the training, means over the seeds."""
    from matplotlib import pyplot as plt

    curves: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = {}
    for key, cell in cells.items():
        settings = cell["settings"]
        if key.startswith("training/") and "facts" in cell and settings["rate"] == RATE:
            group = curves.setdefault((settings["data"], settings["K"], settings["C"]), {})
            group.setdefault(settings["quantizer"], []).append(cell["facts"])
    places = [place for place in results(cells) if place in curves]
    figure, grid = plt.subplots(
        2, len(places), figsize=(1 + 2.7 * len(places), 6), layout="constrained", squeeze=False, sharex=True
    )
    for column, place in enumerate(places):
        for name in _CURVES:
            found = curves[place].get(name, [])
            for row, field in enumerate(("curve", "used_curve")):
                values = [facts[field] for facts in found if facts[field]]
                if values:
                    means = [statistics.fmean(step) for step in zip(*values, strict=True)]
                    steps = [CURVE_STEPS * (number + 1) for number in range(len(means))]
                    grid[row][column].plot(steps, means, color=_CURVES[name], linewidth=1.5, label=name)
        grid[0][column].set(yscale="log", ylim=(None, 1), title="{}\nK = {:,}, C = {}".format(*place))
        grid[1][column].set(yscale="log", xlabel="step")
        for row in range(2):
            grid[row][column].grid(alpha=0.3)
    grid[0][0].set_ylabel("training MSE")
    grid[1][0].set_ylabel(f"codes used in {CURVE_STEPS} steps")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    content = encode_png(figure, dpi=_DPI)
    plt.close(figure)
    return content
