"""Errors in decibels: of latents before quantization, and of images after decoding.

Indices only say that something changed; these say by how much.

Shape letters: B batch, D latent channels, h w compared tokens, C image channels, H W compared pixels, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from te_quant._measuring.bootstrap import NO_INTERVAL, ImageSums, Interval, Resamples
from te_quant._measuring.float64 import float64
from te_quant._measuring.text import UNDEFINED, with_interval
from te_quant.tables import Table, Tabular

__all__ = ["FeatureTally", "PixelTally", "ShiftError"]


@dataclass(frozen=True)
class ShiftError(Tabular):
    """How far a shifted result is from the shift of the result.

    Attributes:
        decibels: more is better; inf for no error at all, NaN where it is undefined (no signal and no error, or
            nothing compared). Of features 10·log10(Σ‖z - z̄‖² / Σ‖z' - z‖²), of images the PSNR.
        interval: 95 % confidence interval (low, high) of the decibels, by percentile bootstrap over images.
        mean_square: mean of the squared error: of features ‖z' - z‖² per token, of images per pixel and channel.

    Example:
        >>> print(ShiftError(23.5, (22.1, 24.9), 0.01))
        dB, more is better  mean square
        --------------------  -----------
        23.50 [22.10, 24.90]         0.01
    """

    decibels: float
    interval: Interval
    mean_square: float

    def decibels_text(self) -> str:
        """Write the decibels with their interval."""
        if math.isnan(self.decibels):
            return UNDEFINED
        return "inf" if self.decibels == math.inf else with_interval(self.decibels, self.interval, ".2f")

    def summary(self) -> Table:
        """Return the error in decibels and as a mean square."""
        cells = [self.decibels_text(), f"{self.mean_square:.3g}"]
        return Table(["dB, more is better", "mean square"], [cells], "rr")


class FeatureTally:
    """Sums behind the feature error: both sides over the compared tokens, pooled over images and shifts.

    Args:
        pooled: keep only the sums of all images, without intervals.
    """

    def __init__(self, *, pooled: bool = False) -> None:
        self._sums = ImageSums(pooled=pooled)
        self._origin: Tensor | None = None

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """Compare the images of this batch once more.

        Args:
            expected: z, brought to the place of the shifted image or the other way round.
            actual: z'.

        Shape:
            expected, actual: (B, D, h, w).
        """
        z = float64(expected)
        error = (float64(actual) - z).square().sum((1, 2, 3))
        tokens = torch.full_like(error, z[0, 0].numel())
        if self._origin is None and z.numel():
            # Any fixed origin gives the same variance; one near the mean keeps it accurate.
            self._origin = z[:1].mean((2, 3), keepdim=True)
        if self._origin is not None:
            z = z - self._origin
        self._sums.add(error, tokens, z.square().sum((1, 2, 3)), z.sum((2, 3)))

    def close(self) -> None:
        """End the batch; what is added next belongs to other images."""
        self._sums.close()

    def error(self, resamples: Resamples | None) -> ShiftError:
        """Return the error, with its interval unless ``resamples`` is None."""
        total = self._sums.total
        interval = (
            NO_INTERVAL if resamples is None else resamples.interval_of_sums(self._sums.rows, _signal_to_error)
        )
        return ShiftError(float(_signal_to_error(total)), interval, float(total[0, 0] / total[0, 1]))


class PixelTally:
    """Sums behind the error of decoded images.

    Args:
        peak: width of the range of the pixel values, for the PSNR.
        pooled: keep only the sums of all images, without intervals.
    """

    def __init__(self, *, peak: float, pooled: bool = False) -> None:
        self._peak = peak
        self._sums = ImageSums(pooled=pooled)

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """Compare the images of this batch once more.

        Shape:
            expected, actual: (B, C, H, W).
        """
        difference = (float64(actual.to(expected.device)) - float64(expected)).flatten(1)
        counted = torch.full_like(difference[:, :1], difference.shape[1])
        self._sums.add(difference.abs().sum(1), difference.square().sum(1), counted)

    def close(self) -> None:
        """End the batch; what is added next belongs to other images."""
        self._sums.close()

    def merge(self, other: PixelTally) -> None:
        """Count the images of another tally after those of this one; both must be closed."""
        self._sums.merge(other._sums)

    @property
    def rows(self) -> Tensor:
        """Sums of |d|, of d² and the number of values: (N, 3), or (1, 3) if pooled."""
        return self._sums.rows

    def error(self, resamples: Resamples | None) -> ShiftError:
        """Return the PSNR, with its interval unless ``resamples`` is None."""
        total = self._sums.total
        interval = NO_INTERVAL if resamples is None else resamples.interval_of_sums(self._sums.rows, self.psnr)
        return ShiftError(float(self.psnr(total)), interval, float(total[0, 1] / total[0, 2]))

    def psnr(self, sums: Tensor) -> Tensor:
        """Return 10·log10(peak² / mean d²) of sums as in :attr:`rows`, (R, 3) -> (R,)."""
        return 10 * torch.log10(self._peak**2 * sums[:, 2] / sums[:, 1])


def _signal_to_error(sums: Tensor) -> Tensor:
    error, tokens, squares, z = sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3:]
    # Σ‖z - z̄‖² = Σ‖z‖² - ‖Σz‖²/n, which rounding may take below zero.
    signal = (squares - z.square().sum(1) / tokens).clamp_min(0)
    return 10 * torch.log10(signal / error)
