"""Single coloured digits, as a quadrant of an image shows them: what the classifier learns from and is judged on.

A cell of an image with side S is S/2 wide and holds one digit, in one of four colours, on black. Shape letters:
B cells, N digits of a split, S canvas side, c = S/2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.data.quadrants import QuadrantImages
from examples.te_vqgan.data.recipes import COLOR_RGB, COLORS
from examples.te_vqgan.data.sources import SPLITS, DigitSource
from examples.te_vqgan.runs.checks import require_int, require_number

__all__ = ["CellBatch", "CellDataset", "Distortion"]

_ORDER, _COLORS, _DISTORTION = range(3)
# Smaller cells are distorted at this canvas's resolution and averaged down afterwards: at 14 pixels a digit,
# bilinear resampling alone would blur what the test cells show sharply.
_FINE_CANVAS = 64
# One row of the binomial filter; its outer product is the 3x3 blur.
_BLUR = (0.25, 0.5, 0.25)


class CellBatch(NamedTuple):
    """Cells with what they show.

    Shape:
        cells: (B, 3, c, c) float32 in [-1, 1], ground -1. digits: (B,) int64, the class. colors: (B,) int64,
        index into ``COLORS``.
    """

    cells: Tensor
    digits: Tensor
    colors: Tensor


class Distortion(NamedTuple):
    """How far training cells may differ from the digits; every field 0 leaves them as they are.

    Attributes:
        shift: largest move along each axis, as a share of the cell's side.
        rotation: largest turn either way, degrees.
        scale: side lengths change by a factor in [1 - scale, 1 + scale], each axis by its own.
        shear: largest x displacement for a y of one.
        flaws: share of the cells that are made to look generated: dimmer, blurred, noisy, with a square missing.
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    flaws: float = 0.0

    def check(self) -> None:
        """Refuse a field that is out of range, by name."""
        for name in ("shift", "scale", "shear"):
            require_number(name, getattr(self, name), 0.0, 0.5)
        require_number("rotation", self.rotation, 0.0, 180.0)
        require_number("flaws", self.flaws, 0.0, 1.0)


class CellDataset:
    """One split's digits, each coloured at random.

    A batch is a pure function of the arguments below and of its step, so a resumed training sees the same cells.

    Args:
        source: the digits.
        split: "train", "validation" or "test".
        canvas_size: S in pixels, a multiple of 32.
        seed: >= 0; of order, colours and distortions.

    Raises:
        ValueError: an unknown split, a negative seed, or a canvas size that ``QuadrantImages`` refuses.
    """

    labels: NDArray[np.int64]

    def __init__(self, source: DigitSource, split: str, *, canvas_size: int, seed: int = 0) -> None:
        digits = source.split(split)
        require_int("seed", seed, 0)
        self.split, self.seed, self.canvas_size = split, seed, canvas_size
        self.labels = digits.labels
        self._cells = QuadrantImages(digits.images, canvas_size).cells
        fine = max(canvas_size, _FINE_CANVAS)
        self._fine = self._cells if fine == canvas_size else QuadrantImages(digits.images, fine).cells
        self._colors = self._rng(_COLORS).integers(len(COLORS), size=len(self.labels))
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def fixed(self, start: int, stop: int) -> CellBatch:
        """Digits ``start`` to ``stop`` in the split's order, undistorted, each always in the same colour."""
        ink = torch.from_numpy(self._cells[start:stop]).to(torch.float32)[:, None] / 255
        return self._colored(ink, np.arange(len(self))[start:stop], self._colors[start:stop])

    def batch(self, step: int, batch_size: int, distortion: Distortion) -> CellBatch:
        """The cells of batch ``step``: every epoch is a new permutation of the split, in new colours.

        Args:
            step: >= 0.
            batch_size: B, at least 1.
            distortion: how far they may differ from the digits.
        """
        rows = self._rows(step, batch_size)
        rng = self._rng(_DISTORTION, step)
        colors = rng.integers(len(COLORS), size=batch_size)
        ink = torch.from_numpy(self._fine[rows]).to(torch.float32)[:, None] / 255
        ink = _warp(ink, distortion, rng)
        factor = self._fine.shape[-1] // self._cells.shape[-1]
        if factor > 1:
            ink = F.avg_pool2d(ink, factor)
        flawed = torch.from_numpy(rng.random(batch_size) < distortion.flaws)
        ink[flawed] = _flawed_ink(ink[flawed], rng)
        batch = self._colored(ink, rows, colors)
        batch.cells[flawed] = _noisy(batch.cells[flawed], rng)
        return batch

    def _colored(self, ink: Tensor, rows: NDArray[np.int64], colors: NDArray[np.int64]) -> CellBatch:
        rgb = torch.from_numpy(COLOR_RGB[colors]).to(torch.float32)[:, :, None, None]
        digits = torch.from_numpy(self.labels[rows])
        return CellBatch(ink * rgb * 2.0 - 1.0, digits, torch.from_numpy(colors))

    def _rows(self, step: int, batch_size: int) -> NDArray[np.int64]:
        require_int("step", step, 0)
        require_int("batch_size", batch_size, 1)
        epochs, within = np.divmod(step * batch_size + np.arange(batch_size), len(self))
        rows = np.empty(batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            rows[chosen] = self._permutation(epoch)[within[chosen]]
        return rows

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._rng(_ORDER, epoch).permutation(len(self)))
        return self._order[1]

    def _rng(self, *purpose: int) -> np.random.Generator:
        # The purpose is part of the key: two uses of one seed must not share their random numbers.
        return np.random.default_rng([self.seed, SPLITS.index(self.split), *purpose])


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))


def _warp(ink: Tensor, distortion: Distortion, rng: np.random.Generator) -> Tensor:
    """Shift, turn, scale and shear each digit about the centre of its cell; what comes from outside is ground."""
    count = len(ink)
    turn = _uniform(rng, -1, 1, count) * (distortion.rotation * np.pi / 180)
    stretch = 1 / (1 + _uniform(rng, -1, 1, count, 2) * distortion.scale)
    shear = _uniform(rng, -1, 1, count) * distortion.shear
    # A grid's coordinates run from -1 to 1 over the cell, so a share of the side is twice as much.
    shift = _uniform(rng, -2, 2, count, 2) * distortion.shift
    cosine, sine = turn.cos(), turn.sin()
    rows = [
        torch.stack([cosine, shear - sine, torch.zeros(count)], 1) * stretch[:, :1],
        torch.stack([sine, cosine, torch.zeros(count)], 1) * stretch[:, 1:],
    ]
    matrix = torch.stack(rows, 1)
    matrix[:, :, 2] = shift
    grid = F.affine_grid(matrix, list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _flawed_ink(ink: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur each digit by a random share, dim it, and take a square of a fifth of the side out of half of them."""
    count, side = len(ink), ink.shape[-1]
    row = torch.tensor(_BLUR)
    blurred = F.conv2d(ink, (row[:, None] * row)[None, None], padding=1)
    share = _uniform(rng, 0, 1, count, 1, 1, 1)
    ink = torch.lerp(ink, blurred, share) * _uniform(rng, 0.6, 1, count, 1, 1, 1)
    # A corner beyond the cell takes nothing out.
    width = side // 5
    corner = torch.from_numpy(rng.integers(0, side - width + 1, (count, 2)))
    corner[torch.from_numpy(rng.random(count) < 0.5)] = side
    offset = torch.arange(side)[None, :, None] - corner[:, None, :]
    inside = (offset >= 0) & (offset < width)
    return ink * ~(inside[:, None, :, None, 0] & inside[:, None, None, :, 1])


def _noisy(cells: Tensor, rng: np.random.Generator) -> Tensor:
    """Add white noise, whose size is another for each cell, and stay in [-1, 1]."""
    noise = torch.from_numpy(rng.standard_normal(cells.shape, np.float32))
    return (cells + noise * _uniform(rng, 0, 0.2, len(cells), 1, 1, 1)).clamp(-1, 1)
