"""Square crops of pictures: which picture, how far reduced, where. Pixels exist only for the crops in use.

Shape letters: B crops, S side of a crop.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.te_vqgan.data.decoding import reduced
from examples.te_vqgan.data.pictures import PictureSource
from examples.te_vqgan.data.rows import EpochOrder
from examples.te_vqgan.data.sources import SPLITS
from examples.te_vqgan.runs.checks import require, require_choice, require_int

__all__ = ["CropDataset"]

# Keys of random numbers, after those of digits and captions that are made from the same seed.
_CROPS, _ORDER, _WINDOWS = 32, 33, 34


class CropDataset:
    """One split of a folder of pictures: a table of crops and the means to cut them.

    Every picture is equally likely, then every reduction that leaves it large enough, then every position. The
    table is a pure function of the arguments below, so equal seeds give every arm the same crops.

    Args:
        source: the pictures.
        split: "train", "validation" or "test"; each cuts only its own pictures, or parts of pictures.
        crop_size: S in pixels.
        size: number of crops.
        seed: >= 0; another seed gives other crops and another order.
        max_reduction: crops come from the picture reduced 1, 2, 4, ... times, up to this; a power of two.

    Raises:
        ValueError: an unknown split, or a number out of range.
    """

    def __init__(
        self,
        source: PictureSource,
        split: str,
        *,
        crop_size: int = 64,
        size: int = 3_000,
        seed: int = 0,
        max_reduction: int = 1,
    ) -> None:
        require_choice("split", split, SPLITS)
        for name, value in (("crop_size", crop_size), ("size", size), ("max_reduction", max_reduction)):
            require_int(name, value, 1)
        require_int("seed", seed, 0)
        require(crop_size <= source.smallest, "crop_size", f"<= {source.smallest}, the smallest side", crop_size)
        self.split, self.crop_size, self.size, self.seed = split, crop_size, size, seed
        # By picture, then by reduction, each half as large as the one before.
        self._levels = [_levels(pixels, max_reduction, source.smallest) for pixels in source.pixels[split]]
        self._table = self._draw(self._rng(_CROPS), size, crop_size)
        self._order = EpochOrder(size, lambda epoch: self._rng(_ORDER, epoch).permutation(size))

    def __len__(self) -> int:
        return self.size

    def row_batch(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """The table's rows of batch ``step``, (batch_size,): every epoch is a new permutation of the table."""
        return self._order.batch(step, batch_size)

    def render(self, rows: NDArray[np.int64]) -> Tensor:
        """The crops of ``rows``, (B,): (B, 3, S, S) float32 in [-1, 1]."""
        return self._cut(self._table[rows], self.crop_size)

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The crops of batch ``step``: (batch_size, 3, S, S) float32 in [-1, 1]."""
        return self.render(self.row_batch(step, batch_size))

    def fixed(self, start: int, stop: int) -> Tensor:
        """Crops ``start`` to ``stop`` in the table's order, for evaluation; fewer at its end."""
        return self._cut(self._table[start:stop], self.crop_size)

    def windows(self, count: int, side: int) -> Tensor:
        """Other crops of this split, of another size, in which a window of a crop's size can move.

        Args:
            count: number of crops, >= 0.
            side: pixels, at most the source's smallest side.

        Shape:
            result: (count, 3, side, side) float32 in [-1, 1].
        """
        return self._cut(self._draw(self._rng(_WINDOWS), count, side), side)

    def _draw(self, rng: np.random.Generator, count: int, side: int) -> NDArray[np.int64]:
        """Rows of picture, level, top and left, (count, 4)."""
        numbers = np.array([len(levels) for levels in self._levels])
        picture = rng.integers(len(self._levels), size=count)
        level = rng.integers(numbers[picture])
        chosen = zip(picture, level, strict=True)
        sides = np.array([self._levels[p][k].shape[:2] for p, k in chosen], np.int64).reshape(count, 2)
        return np.column_stack([picture, level, rng.integers(sides - side + 1)])

    def _cut(self, table: NDArray[np.int64], side: int) -> Tensor:
        pixels = np.empty((len(table), 3, side, side), np.uint8)
        for crop, (picture, level, top, left) in zip(pixels, table, strict=True):
            found = self._levels[picture][level][top : top + side, left : left + side]
            crop[:] = found.transpose(2, 0, 1)
        # Division, not a product with 2 / 255: 255 must become 1 exactly.
        return torch.from_numpy(pixels).to(torch.float32).div_(127.5).sub_(1.0)

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), *purpose])


def _levels(pixels: NDArray[np.uint8], max_reduction: int, smallest: int) -> list[NDArray[np.uint8]]:
    levels = [pixels]
    while 2 ** len(levels) <= max_reduction and min(levels[-1].shape[:2]) // 2 >= smallest:
        levels.append(reduced(levels[-1], 2))
    return levels
