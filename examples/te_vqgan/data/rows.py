"""What a training asks of its images: rows of a table in an order that is new in every epoch, and pixels of rows.

Shape letters: B images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from examples.te_vqgan.runs.checks import require_int

__all__ = ["EpochOrder", "ImageRows"]


class ImageRows(Protocol):
    """One split of a data set. A batch is a pure function of its step, so nothing has to be stored to resume."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def row_batch(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """Return the rows of training batch ``step``, (B,)."""

    def render(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the images of ``rows``, (B, C, H, W) float32 in [-1, 1]."""

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Return the images of training batch ``step``."""

    def fixed(self, start: int, stop: int) -> Tensor:
        """Return images ``start`` to ``stop`` in the table's order; fewer at its end."""


class EpochOrder:
    """The rows of each batch: every epoch is a new permutation of the table, so no row is left out.

    Args:
        size: rows of the table.
        permutation: gives that of an epoch, counted from 0; called once per epoch that is used.

    Shape:
        permutation: (size,) int64.
    """

    def __init__(self, size: int, permutation: Callable[[int], NDArray[np.int64]]) -> None:
        self.size = size
        self._permutation = permutation
        self._latest: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """Return the rows of batch ``step``, (B,).

        Args:
            step: >= 0; batches follow each other without a gap, also across the end of an epoch.
            batch_size: B, at least 1.
        """
        require_int("step", step, 0)
        require_int("batch_size", batch_size, 1)
        positions = step * batch_size + np.arange(batch_size)
        epochs, within = np.divmod(positions, self.size)
        rows = np.empty(batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            rows[chosen] = self._of(epoch)[within[chosen]]
        return rows

    def _of(self, epoch: int) -> NDArray[np.int64]:
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self._permutation(epoch))
        return self._latest[1]
