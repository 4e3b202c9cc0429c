"""Pictures of Stage 2: samples with captions, generated images by arm, confusion matrices, accuracy against κ.

Shape letters: B images, S canvas side, L classes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Point", "draw_captions", "draw_confusions", "draw_generated", "draw_tradeoff"]

_COLUMNS = 4
_SHOWN = 8
_MARKERS = "osD^vP*Xh"


class Point(NamedTuple):
    """One arm with one seed in :func:`draw_tradeoff`."""

    arm: str
    kappa: float
    perplexity: float
    accuracy: float


def draw_captions(images: NDArray[np.uint8], captions: Sequence[str]) -> Figure:
    """Draw test images with their captions, as the paper's Fig. 2.

    Shape:
        images: (B, 3, S, S).
    """
    rows = -(-len(images) // _COLUMNS)
    figure = _figure(2.9 * _COLUMNS, 2.75 * rows)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions, strict=False):
        _show(axis, image)
        axis.set_title("\n".join(textwrap.wrap(caption, 34)), fontsize=8)
    figure.suptitle("Test images with their first captions: only held-out combinations")
    return figure


def draw_generated(
    captions: Sequence[str], originals: NDArray[np.uint8], generated: Mapping[str, NDArray[np.uint8]]
) -> Figure:
    """Draw what each arm makes of the same captions.

    Args:
        captions: of the columns.
        originals: the images that the captions were written for.
        generated: by title of the arm.

    Shape:
        originals, and each of generated: (B, 3, S, S).
    """
    count = min(_SHOWN, len(captions))
    rows = {"the caption's image": originals, **generated}
    figure = _figure(1.55 * count + 2.2, 1.45 * len(rows) + 1.2)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=False):
            _show(axis, image)
        label = "\n".join(textwrap.wrap(title, 20))
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    for axis, caption in zip(axes[0], captions, strict=False):
        axis.set_title("\n".join(textwrap.wrap(caption, 22)), fontsize=7)
    figure.suptitle("One sample of each arm for the same held-out captions, none chosen")
    return figure


def draw_confusions(counts: Mapping[str, NDArray[np.int64]], class_names: Sequence[str]) -> Figure:
    """Draw which digits the classifier reads in generated images.

    Args:
        counts: by title of the arm.
        class_names: of the L classes.

    Shape:
        each of counts: (L, L + 1), true classes by read classes; the last column is "nothing read".
    """
    columns = min(3, len(counts))
    rows = -(-len(counts) // columns)
    figure = _figure(3.7 * columns, 4.0 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(counts) :]:
        axis.set_axis_off()
    ticks = range(len(class_names))
    for axis, (title, table) in zip(axes, counts.items(), strict=False):
        shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares[:, : len(class_names)], cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares[:, : len(class_names)]):
            if share >= 0.005:
                ink = "white" if share > 0.5 else "black"
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=ink)
        axis.set_title(title, fontsize=9)
        small = any(len(name) > 2 for name in class_names)
        axis.set_xticks(ticks, class_names, rotation=90 if small else 0, fontsize=7)
        axis.set_yticks(ticks, class_names, fontsize=7)
        axis.set(xlabel="read", ylabel="asked for")
    figure.suptitle("Text to image, held-out combinations: digits asked for and read, % of each row")
    return figure


def draw_tradeoff(points: Sequence[Point]) -> Figure:
    """Draw the accuracy of text to image against equivariance and against code use, one point per run."""
    figure = _figure(10.5, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    arms = list(dict.fromkeys(point.arm for point in points))
    for number, arm in enumerate(arms):
        chosen = [point for point in points if point.arm == arm]
        style: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{number % 10}"}
        heights = [point.accuracy for point in chosen]
        for axis, name in ((left, "kappa"), (right, "perplexity")):
            places = [getattr(point, name) for point in chosen]
            axis.plot(places, heights, linestyle="none", markersize=8, label=arm, **style)
    left.set(xlabel="κ of indices after shifts below a token", ylabel="text to image: digit accuracy, Quad1")
    right.set(xlabel="perplexity of the code use")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.suptitle("Does an equivariant tokenizer draw better? Held-out combinations, one point per seed")
    return figure


def _show(axis: Axes, image: NDArray[np.uint8]) -> None:
    axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def _figure(width: float, height: float) -> Figure:
    # Figure, not pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)
