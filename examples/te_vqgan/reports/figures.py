"""Pictures of a comparison: loss curves, reconstructions, and token grids as coloured index maps.

Shape letters: B images, M offsets, S canvas side, h w token grid.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["code_colors", "draw_curves", "draw_placements", "draw_reconstructions", "draw_shifts", "most_alike"]

Samples = Mapping[str, NDArray[Any]]
_GROUND_COLOR = (0.93, 0.93, 0.93)
_PLACES = ("upper left", "upper right", "lower left", "lower right", "centre")


def draw_curves(logs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> Figure:
    """Draw error, code use and the orthogonality penalty over the steps.

    Args:
        logs: by title of the arm, the log lines of each seed.
    """
    # What a panel shows of every batch, its label, what it shows of the validations, its scale.
    panels: list[tuple[str | None, str, str | None, str]] = [
        ("l1", "reconstruction L1 (images in [-1, 1])", "validation_l1", "log"),
        ("codebook_loss", "codebook loss, mean of (sg[z] - e)²", None, "log"),
        ("batch_perplexity", "perplexity of the code use", "validation_perplexity", "linear"),
        (None, "orthogonality penalty, without λ (Eq. 5)", "orthogonality", "log"),
    ]
    figure = _figure(11.0, 7.0)
    axes = figure.subplots(2, 2, sharex=True).flatten()
    for axis, (name, label, measured, scale) in zip(axes, panels, strict=True):
        for number, (title, seeds) in enumerate(logs.items()):
            for nth, lines in enumerate(seeds):
                color = f"C{number}"
                if name is not None:
                    steps, values = _series(lines, name)
                    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                    legend = f"{title}, training batches" if nth == 0 else None
                    axis.plot(steps, _smooth(values), color=color, linewidth=1.4, label=legend)
                if measured is not None:
                    points, heights = _series(lines, measured)
                    legend = f"{title}, validation images" if nth == 0 else None
                    axis.plot(
                        points, heights, color=color, linestyle="none", marker="o", markersize=3.5, label=legend
                    )
        axis.set(ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
    for axis in axes[2:]:
        axis.set_xlabel("optimizer step")
    if len(logs) <= 2:
        axes[0].legend(fontsize=8)
    else:  # inside, so many lines would cover the curves
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle("Training: thin lines are single batches, thick lines their running mean")
    return figure


def draw_reconstructions(samples: Mapping[str, Samples], notes: Mapping[str, str]) -> Figure:
    """Draw test images over what each arm makes of their tokens.

    Args:
        samples: by title of the arm.
        notes: a line under the title of each arm, such as its error.
    """
    first = next(iter(samples.values()))["images"]
    rows = [("original\n(test digits)", first)]
    rows += [(f"{title}\n{notes.get(title, '')}", arm["reconstructions"]) for title, arm in samples.items()]
    figure = _figure(1.15 * len(first) + 2.2, 1.3 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), len(first), squeeze=False)
    for row, (label, images) in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=True):
            _show(axis, image)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.suptitle("Test images and their reconstructions from tokens")
    return figure


def draw_placements(samples: Mapping[str, Samples]) -> Figure:
    """Draw the tokens of one digit at five places, as the paper's Fig. 1 does.

    An equivariant tokenizer shows the same outlined block in every column.

    Args:
        samples: by title of the arm; ``placed_images`` and ``placed_tokens`` are shown.
    """
    # The centre first: it is what the four others are compared with.
    order = [4, 0, 1, 2, 3]
    names = [_PLACES[number] for number in order]
    grids = {title: arm["placed_tokens"][order] for title, arm in samples.items()}
    images = next(iter(samples.values()))["placed_images"][order]
    n = next(iter(grids.values())).shape[-1]
    corners = [[place] for place in ((n // 4, n // 4), (0, 0), (0, n // 2), (n // 2, 0), (n // 2, n // 2))]
    figure = _draw_grids(samples, images, names, grids, corners, n // 2, "like the centre's")
    figure.suptitle(
        "One test digit at five places: the tokenizer's indices\n"
        "same number = same colour = same code (colours are each arm's own); outlined: the digit's block"
    )
    return figure


def draw_shifts(samples: Mapping[str, Samples]) -> Figure:
    """Draw the tokens of one digit moved right pixel by pixel, up to one token.

    Args:
        samples: by title of the arm; ``shifted_images`` and ``shifted_tokens`` are shown.
    """
    grids = {title: arm["shifted_tokens"] for title, arm in samples.items()}
    images = next(iter(samples.values()))["shifted_images"]
    n = next(iter(grids.values())).shape[-1]
    names = ["not moved", *(f"{d} px right" for d in range(1, len(images)))]
    names[-1] += " (one token)"
    unmoved, moved = (n // 4, n // 4), (n // 4, n // 4 + 1)
    # Below one token either neighbouring token shift is right, as in the sub-stride agreement: an exact tokenizer
    # may move its tokens with the first pixel.
    corners = [[unmoved], *([[unmoved, moved]] * (len(images) - 2)), [moved]]
    figure = _draw_grids(samples, images, names, grids, corners, n // 2, "like the first")
    figure.suptitle(
        "The same digit moved by less than a token, and by one token: the tokenizer's indices\n"
        "outlined: the digit's block, unmoved or moved by one token,\n"
        "whichever is more like the first picture's"
    )
    return figure


def code_colors(grids: NDArray[Any]) -> dict[int, tuple[float, float, float]]:
    """Give every code in ``grids`` a colour: grey to the most frequent, the others hues far apart."""
    codes, counts = np.unique(grids, return_counts=True)
    ranked = [int(code) for code in codes[np.argsort(-counts, kind="stable")]]
    colors = {ranked[0]: _GROUND_COLOR}
    for rank, code in enumerate(ranked[1:]):
        # The golden ratio keeps any number of hues apart; three levels of lightness tell neighbours apart.
        hue = (rank * 0.618034) % 1.0
        colors[code] = colorsys.hls_to_rgb(hue, (0.62, 0.78, 0.47)[rank % 3], 0.75)
    return colors


def most_alike(
    grid: NDArray[Any], block: NDArray[Any], corners: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], int]:
    """Return the corner in ``grid`` at which most tokens equal those of ``block``, and how many; first of ties.

    Shape:
        grid: (h, w). block: (n, n), within the grid at every corner (row, column).
    """
    side = len(block)
    counts = [int((grid[y : y + side, x : x + side] == block).sum()) for y, x in corners]
    best = int(np.argmax(counts))
    return corners[best], counts[best]


def _draw_grids(
    arms: Mapping[str, Samples],
    images: NDArray[Any],
    names: Sequence[str],
    grids: Mapping[str, NDArray[Any]],
    corners: Sequence[Sequence[tuple[int, int]]],
    block: int,
    compared: str,
) -> Figure:
    from matplotlib.patches import Rectangle

    figure = _figure(2.35 * len(images) + 0.6, 2.55 * (1 + len(grids)) + 0.8)
    axes = figure.subplots(1 + len(grids), len(images), squeeze=False)
    n = next(iter(grids.values())).shape[-1]
    scale = images.shape[-1] / n
    for axis, image, name, places in zip(axes[0], images, names, corners, strict=True):
        top, left = places[0]
        _show(axis, image)
        axis.set_title(name, fontsize=10)
        edges = (left * scale - 0.5, top * scale - 0.5)
        axis.add_patch(
            Rectangle(edges, block * scale, block * scale, fill=False, edgecolor="yellow", linewidth=1.2)
        )
    axes[0][0].set_ylabel("image", fontsize=10)
    for row, (title, tokens) in zip(axes[1:], grids.items(), strict=True):
        # One map an arm for both figures, so that a code has the same colour in both.
        colors = code_colors(np.concatenate([arms[title]["placed_tokens"], arms[title]["shifted_tokens"]]))
        (top, left) = corners[0][0]
        first = tokens[0][top : top + block, left : left + block]
        for number, (axis, grid, places) in enumerate(zip(row, tokens, corners, strict=True)):
            _show_tokens(axis, grid, colors)
            (top, left), same = most_alike(grid, first, places)
            edges = (left - 0.5, top - 0.5)
            axis.add_patch(
                Rectangle(edges, block, block, fill=False, edgecolor="black", linewidth=3, clip_on=False)
            )
            label = "reference block" if number == 0 else f"{same} of {block * block} tokens {compared}"
            axis.set_xlabel(label, fontsize=9)
        row[0].set_ylabel(title, fontsize=10)
    return figure


def _show_tokens(axis: Axes, grid: NDArray[Any], colors: Mapping[int, tuple[float, float, float]]) -> None:
    axis.imshow([[colors[int(code)] for code in row] for row in grid])
    n = len(grid)
    if n <= 8:  # finer grids leave no room for numbers
        for y, row in enumerate(grid):
            for x, code in enumerate(row):
                ink = "white" if _luminance(colors[int(code)]) < 0.45 else "black"
                axis.text(x, y, str(int(code)), ha="center", va="center", fontsize=6.5, color=ink)
    axis.set_xticks(np.arange(-0.5, n), minor=True)
    axis.set_yticks(np.arange(-0.5, n), minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="both", length=0)
    axis.set(xticks=[], yticks=[])


def _luminance(color: tuple[float, float, float]) -> float:
    # Rec. 709 weights.
    return 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]


def _show(axis: Axes, image: NDArray[Any]) -> None:
    axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def _series(lines: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    kept = [line for line in lines if name in line]
    return [line["step"] for line in kept], [line[name] for line in kept]


def _smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """Centred running mean over a twentieth of the curve, over fewer values at its ends."""
    width = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, float))])
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    smooth: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return smooth


def _figure(width: float, height: float) -> Figure:
    # Figure, not pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)
