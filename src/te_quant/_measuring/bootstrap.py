"""Confidence intervals by resampling images, and the sums by image that they need.

Tokens of one image depend on each other, images do not: so whole images are drawn with replacement, every pooled
sum is formed again from the sums of the drawn images, and the percentiles of the results are the interval.

Shape letters: N images, R resamples, B batch, M sums an image, T values an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from te_quant._checks import require_int
from te_quant._measuring.float64 import float64

__all__ = ["NO_INTERVAL", "ImageSums", "Interval", "Resamples", "percentile_place"]

Interval = tuple[float, float]
NO_INTERVAL: Interval = (math.nan, math.nan)
_LEVEL = 0.95
# Elements of the largest temporary: 32 MiB of float64.
_MOST_ELEMENTS = 2**22


def percentile_place(share: float, count: int) -> int:
    """Which of ``count`` sorted values, counted from 0, stands for the percentile ``share``: the nearest one."""
    return round(share * (count - 1))


class Resamples:
    """R draws of N images with replacement, the same for everything that is measured in one run.

    Args:
        num_images: number of images, N.
        count: R; 0 asks for no intervals.
        seed: of the draws; the global random state is neither read nor changed.
    """

    def __init__(self, num_images: int, count: int, seed: int) -> None:
        count = require_int("resamples", count, 0)
        seed = require_int("seed", seed, 0)
        self._times: list[Tensor] = []
        if num_images < 2:
            return
        generator = torch.Generator().manual_seed(seed)
        rows = max(1, _MOST_ELEMENTS // num_images)
        for start in range(0, count, rows):
            size = (min(rows, count - start), num_images)
            drawn = torch.randint(0, num_images, size, generator=generator, device="cpu")
            times = torch.zeros(size, dtype=torch.int32, device="cpu")
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
        low, high = _bounds(len(ordered))
        return float(ordered[low]), float(ordered[high])

    def interval_of_sums(self, sums: Tensor, estimate: Callable[[Tensor], Tensor]) -> Interval:
        """Return the interval of an estimate that follows from sums.

        Args:
            sums: one row an image.
            estimate: pooled sums (r, M) -> values (r,).

        Shape:
            sums: (N, M) float64.
        """
        return self.interval(lambda times: estimate(times @ sums))

    def interval_of_median(self, values: Tensor) -> Interval:
        """Return the interval of the median over all values, of which every image has equally many.

        A resample has N·T values. Its median is at most v if enough of them are, which counts by image tell; so
        the two medians that bound the interval are found by bisection, without a median of any resample.

        Args:
            values: may be infinite, not NaN.

        Shape:
            values: (N, T).
        """
        if not self._times or values.numel() == 0:
            return NO_INTERVAL
        by_image, ordered = values.sort(dim=1).values, values.flatten().sort().values
        enough = percentile_place(0.5, len(ordered)) + 1

        def medians_up_to(value: Tensor) -> int:
            counts = torch.searchsorted(by_image, value.repeat(len(by_image), 1), right=True).double()
            return sum(int((times.double() @ counts >= enough).sum()) for times in self._times)

        def median(place: int) -> float:
            """The median that comes at ``place`` among the sorted medians of the resamples."""
            low, high = 0, len(ordered) - 1
            while low < high:
                middle = (low + high) // 2
                if medians_up_to(ordered[middle]) > place:
                    high = middle
                else:
                    low = middle + 1
            return float(ordered[low])

        first, last = _bounds(sum(len(times) for times in self._times))
        return median(first), median(last)


def _bounds(count: int) -> tuple[int, int]:
    """Which of ``count`` sorted estimates bound the interval: order statistics, rounded outwards."""
    tail, last = (1 - _LEVEL) / 2, count - 1
    return math.floor(tail * last), math.ceil((1 - tail) * last)


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
        rows = torch.cat([float64(part) for part in parts], dim=1)
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

    def merge(self, other: ImageSums) -> None:
        """Append the images of other sums, which are as closed and as pooled as these."""
        for rows in other._closed:
            self._open = rows
            self.close()

    @property
    def rows(self) -> Tensor:
        """(N, M) float64, or (1, M) if pooled."""
        return torch.cat(self._closed)

    @property
    def total(self) -> Tensor:
        """(1, M) float64."""
        return self.rows.sum(dim=0, keepdim=True)
