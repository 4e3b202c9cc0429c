"""Confidence intervals by resampling images, and the sums by image that they need.

Tokens of one image depend on each other, images do not: so whole images are drawn with replacement, every pooled
sum is formed again from the sums of the drawn images, and the percentiles of the results are the interval.

Shape letters: N images, R resamples, B batch, M sums an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from te_quant._checks import require_int

__all__ = ["NO_INTERVAL", "ImageSums", "Interval", "Resamples"]

Interval = tuple[float, float]
NO_INTERVAL: Interval = (math.nan, math.nan)
_LEVEL = 0.95
# Elements of the largest temporary: 32 MiB of float64.
_MOST_ELEMENTS = 2**22


class Resamples:
    """R draws of N images with replacement, the same for everything that is measured in one run.

    Args:
        num_images: N.
        count: R; 0 asks for no intervals.
        seed: of the draws; the global random state is neither read nor changed.
    """

    def __init__(self, num_images: int, count: int, seed: int) -> None:
        require_int("resamples", count, 0)
        require_int("seed", seed, 0)
        self._times: list[Tensor] = []
        if num_images < 2:
            return
        generator = torch.Generator().manual_seed(seed)
        rows = max(1, _MOST_ELEMENTS // num_images)
        for start in range(0, count, rows):
            drawn = torch.randint(0, num_images, (min(rows, count - start), num_images), generator=generator)
            times = torch.zeros(drawn.shape, dtype=torch.int32)
            self._times.append(times.scatter_add_(1, drawn, torch.ones_like(times)))

    def interval(self, estimate: Callable[[Tensor], Tensor]) -> Interval:
        """Return the 95 % percentile interval of an estimate.

        Resamples in which it is undefined (NaN) are left out. The bounds are order statistics, rounded outwards,
        so that infinities may be among the values.

        Args:
            estimate: how often each image was drawn (r, N) float64 -> values (r,).

        Returns:
            (low, high); NaN for fewer than two images, no resamples, or nothing defined.
        """
        values = [estimate(times.double()) for times in self._times]
        if not values:
            return NO_INTERVAL
        joined = torch.cat(values)
        ordered = joined[~joined.isnan()].sort().values
        if len(ordered) == 0:
            return NO_INTERVAL
        tail, last = (1 - _LEVEL) / 2, len(ordered) - 1
        return float(ordered[math.floor(tail * last)]), float(ordered[math.ceil((1 - tail) * last)])

    def interval_of_sums(self, sums: Tensor, estimate: Callable[[Tensor], Tensor]) -> Interval:
        """Return the interval of an estimate that follows from sums.

        Args:
            sums: one row an image.
            estimate: pooled sums (r, M) -> values (r,).

        Shape:
            sums: (N, M) float64.
        """
        return self.interval(lambda times: estimate(times @ sums))


class ImageSums:
    """A row of sums for every image, gathered batch by batch.

    Args:
        pooled: keep the sum over all images alone, as one row.
    """

    def __init__(self, *, pooled: bool = False) -> None:
        self._pooled = pooled
        self._closed: list[Tensor] = []
        self._open: Tensor | None = None

    def add(self, *columns: Tensor) -> None:
        """Add to the rows of this batch.

        Shape:
            columns: (B,) or (B, m) each, the same in every call.
        """
        parts = [column.unsqueeze(1) if column.ndim == 1 else column for column in columns]
        rows = torch.cat([part.double() for part in parts], dim=1)
        self._open = rows if self._open is None else self._open + rows

    def close(self) -> None:
        """End the batch; what is added next belongs to other images."""
        if self._open is None:
            return
        rows = self._open.cpu()
        self._open = None
        if self._pooled:
            rows = rows.sum(dim=0, keepdim=True)
            if self._closed:
                rows = rows + self._closed.pop()
        self._closed.append(rows)

    @property
    def rows(self) -> Tensor:
        """(N, M) float64, or (1, M) if pooled."""
        return torch.cat(self._closed)

    @property
    def total(self) -> Tensor:
        """(1, M) float64."""
        return self.rows.sum(dim=0, keepdim=True)
