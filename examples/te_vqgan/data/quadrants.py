"""The paper's quadrant images, rendered on the fly from recipes.

A canvas of side S has four cells of side S/2; a digit fills 7/8 of its cell (28 of 32 px in the paper, by
2 px of padding on every side). Everything is integer arithmetic up to the last step, so that the same seed
gives the same bytes on every machine.

Shape letters: B images, N digits of a split, S canvas side, P places, n source side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.te_vqgan.data.recipes import (
    COLOR_RGB,
    COLORS,
    EMPTY,
    QUADRANT_LAYOUTS,
    QuadrantRecipe,
    sample_recipes,
)
from examples.te_vqgan.data.rows import EpochOrder
from examples.te_vqgan.data.sources import SPLITS, DigitSource
from examples.te_vqgan.runs.checks import require, require_choice, require_int

__all__ = ["PAPER_SIZES", "QuadrantDataset", "QuadrantImages", "resize_digits"]

PAPER_SIZES = {"train": 300_000, "validation": 3_000, "test": 3_000}
"""Images in each split of the paper's data."""

_RECIPES, _ORDER, _SPRITES = range(3)
_CANVAS_STEP = 32
_CHUNK = 4096


class QuadrantImages:
    """Renders recipes.

    Args:
        digits: the digits that recipes index, intensities 0 (ground) to 255 (ink).
        canvas_size: S in pixels, a multiple of 32; 64 in the paper.

    Shape:
        digits: (N, n, n) uint8.

    Raises:
        ValueError: a wrong shape or dtype, a canvas side that is no multiple of 32, or a source that can be
            brought to the size of a cell by no rule of :func:`resize_digits`.
    """

    canvas_size: int
    cell_size: int
    cells: NDArray[np.uint8]

    def __init__(self, digits: NDArray[np.uint8], canvas_size: int = 64) -> None:
        require_int("canvas_size", canvas_size, _CANVAS_STEP)
        require(canvas_size % _CANVAS_STEP == 0, "canvas_size", f"a multiple of {_CANVAS_STEP}", canvas_size)
        require(len(digits) > 0, "digits", "at least one picture", "none")
        self.canvas_size = canvas_size
        self.cell_size = canvas_size // 2
        margin = self.cell_size // 16
        content = resize_digits(digits, self.cell_size - 2 * margin)
        self.cells = np.pad(content, ((0, 0), (margin, margin), (margin, margin)))

    def render(self, recipe: QuadrantRecipe) -> Tensor:
        """Draw the images of ``recipe``.

        Args:
            recipe: B images; its digits index this object's.

        Shape:
            result: (B, 3, S, S) float32 in [-1, 1]; the ground is -1, full ink is 1.

        Raises:
            ValueError: the recipe names a digit that is not there.
        """
        largest = recipe.digits.max(initial=EMPTY)
        if largest >= len(self.cells):
            raise ValueError(f"recipe.digits must be < {len(self.cells)}, the digits held, got {largest}.")
        B, S, c = len(recipe), self.canvas_size, self.cell_size
        # EMPTY is -1 and picks the last colour, black, so an empty place needs no case of its own.
        rgb = np.concatenate([COLOR_RGB, np.zeros((1, 3), np.uint8)])[recipe.colors]
        canvas = np.empty((B, 3, 2, c, 2, c), np.uint8)
        for place in range(4):
            ink = self.cells[recipe.digits[:, place], None]
            np.multiply(ink, rgb[:, place, :, None, None], out=canvas[:, :, place // 2, :, place % 2])
        pixels = canvas.reshape(B, 3, S, S)
        rows = np.flatnonzero(recipe.filled[:, 4])
        centre = slice(c // 2, c // 2 + c)
        ink = self.cells[recipe.digits[rows, 4], None]
        pixels[rows, :, centre, centre] = ink * rgb[rows, 4, :, None, None]
        # Division, not a product with 2 / 255: 255 must become 1 exactly.
        return torch.from_numpy(pixels).to(torch.float32).div_(127.5).sub_(1.0)


class QuadrantDataset:
    """One split of the paper's data: a table of recipes and the means to draw them.

    A batch is a pure function of the arguments below and of its step, so a resumed training needs no stored
    loader state to see the same images.

    Args:
        source: the digits.
        split: "train", "validation" or "test"; each draws from its own digits alone.
        canvas_size: S in pixels, a multiple of 32; 64 in the paper.
        size: number of images; by default the paper's, :data:`PAPER_SIZES`.
        seed: >= 0; another seed gives another data set and another order.
        layouts: names out of :data:`~examples.te_vqgan.data.recipes.LAYOUTS`, equally likely.
        allowed: (class, place, colour) combinations that may occur, as in
            :func:`~examples.te_vqgan.data.recipes.sample_recipes`.

    Raises:
        ValueError: an unknown split, a size below 1, a negative seed, or what the parts refuse.
    """

    split: str
    size: int
    seed: int
    labels: NDArray[np.int64]
    recipes: QuadrantRecipe
    images: QuadrantImages

    def __init__(
        self,
        source: DigitSource,
        split: str,
        *,
        canvas_size: int = 64,
        size: int | None = None,
        seed: int = 0,
        layouts: Sequence[str] = QUADRANT_LAYOUTS,
        allowed: NDArray[np.bool_] | None = None,
    ) -> None:
        digits = source.split(split)
        size = PAPER_SIZES[split] if size is None else size
        require_int("size", size, 1)
        require_int("seed", seed, 0)
        self.split, self.size, self.seed = split, size, seed
        self.labels = digits.labels
        self.images = QuadrantImages(digits.images, canvas_size)
        self.recipes = sample_recipes(
            digits.labels,
            size,
            self._rng(_RECIPES),
            num_classes=len(source.class_names),
            layouts=layouts,
            allowed=allowed,
        )
        self._order = EpochOrder(size, lambda epoch: self._rng(_ORDER, epoch).permutation(size))

    def __len__(self) -> int:
        return self.size

    def row_batch(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """The table's rows of batch ``step``: every epoch is a new permutation of the table, none is left out.

        Args:
            step: >= 0; batches follow each other without a gap, across the end of an epoch too.
            batch_size: B, at least 1.

        Shape:
            result: (B,).
        """
        return self._order.batch(step, batch_size)

    def recipe_batch(self, step: int, batch_size: int) -> QuadrantRecipe:
        """The recipes of :meth:`row_batch`."""
        return self.recipes[self.row_batch(step, batch_size)]

    def render(self, rows: NDArray[np.int64]) -> Tensor:
        """The images of ``rows``, (B,): (B, 3, S, S) float32 in [-1, 1], ground -1."""
        return self.images.render(self.recipes[rows])

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The images of batch ``step``: (batch_size, 3, S, S) float32 in [-1, 1], ground -1."""
        return self.images.render(self.recipe_batch(step, batch_size))

    def fixed(self, start: int, stop: int) -> Tensor:
        """Images ``start`` to ``stop`` in the table's order, for evaluation; fewer at its end."""
        return self.images.render(self.recipes[start:stop])

    def classes(self, recipe: QuadrantRecipe) -> NDArray[np.int64]:
        """Class of each digit of ``recipe``, (B, P); ``EMPTY`` where there is none."""
        return np.where(recipe.filled, self.labels[recipe.digits], EMPTY)

    def sprites(self, count: int, *, seed: int | None = None, color: str | None = None) -> Tensor:
        """Single coloured digits of this split on the black ground, as the placement metric takes them.

        Args:
            count: number of sprites, >= 0; classes are equally likely.
            seed: of this draw alone; the data set's by default.
            color: one of :data:`~examples.te_vqgan.data.recipes.COLORS` for all; drawn for each by default.

        Shape:
            result: (count, 3, S/2, S/2) float32 in [-1, 1], padding included.

        Raises:
            ValueError: a colour that is none of the four.
        """
        if color is not None:
            require_choice("color", color, COLORS)
        if seed is not None:
            require_int("seed", seed, 0)
        rng = self._rng(_SPRITES, seed=seed)
        num_classes = int(self.labels.max()) + 1
        recipe = sample_recipes(self.labels, count, rng, num_classes=num_classes, layouts=("centre",))
        if color is not None:
            colors = np.where(recipe.filled, np.int8(COLORS.index(color)), recipe.colors)
            recipe = QuadrantRecipe(recipe.digits, colors)
        centre = slice(self.images.cell_size // 2, self.images.cell_size // 2 + self.images.cell_size)
        return self.images.render(recipe)[:, :, centre, centre].contiguous()

    def _rng(self, *purpose: int, seed: int | None = None) -> np.random.Generator:
        # The purpose is part of the key: two uses of one seed must not share their random numbers.
        key = [self.seed if seed is None else seed, SPLITS.index(self.split), *purpose]
        return np.random.default_rng(key)


def resize_digits(digits: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Bring digits to ``side`` pixels: block means down by an integer factor, bilinear up, rounding half up.

    Args:
        digits: intensities 0 to 255.
        side: pixels; a divisor of n, or at least n.

    Shape:
        digits: (N, n, n) uint8. result: (N, side, side) uint8.

    Raises:
        ValueError: not square, not uint8, or ``side`` is below n and no divisor of it.
    """
    if digits.ndim != 3 or digits.shape[1] != digits.shape[2] or digits.dtype != np.uint8:
        raise ValueError(f"digits must be (N, n, n) uint8, got {digits.dtype} of {digits.shape}.")
    n = digits.shape[1]
    if side == n:
        return digits
    if n % side and side < n:
        raise ValueError(f"digits must have a side that {side} divides or exceeds, got {n}.")
    weights, unit = _block_weights(n, side) if side < n else _bilinear_weights(n, side)
    total = unit * unit
    resized = np.empty((len(digits), side, side), np.uint8)
    for start in range(0, len(digits), _CHUNK):
        part = digits[start : start + _CHUNK].astype(np.float64)
        # Integers far below 2**53, so the float products are exact and as fast as matrix products are.
        sums = (weights @ part @ weights.T).astype(np.int64)
        resized[start : start + _CHUNK] = (sums + total // 2) // total
    return resized


def _block_weights(n: int, side: int) -> tuple[NDArray[np.float64], int]:
    weights = np.repeat(np.eye(side), n // side, axis=1)
    return weights, n // side


def _bilinear_weights(n: int, side: int) -> tuple[NDArray[np.float64], int]:
    """Rows of integer weights that sum to the second value; pixel centres aligned, edges repeated."""
    unit = 2 * side
    position = np.clip((2 * np.arange(side) + 1) * n - side, 0, (n - 1) * unit)
    low, fraction = np.divmod(position, unit)
    weights = np.zeros((side, n))
    weights[np.arange(side), low] += unit - fraction
    weights[np.arange(side), np.minimum(low + 1, n - 1)] += fraction
    return weights, unit
