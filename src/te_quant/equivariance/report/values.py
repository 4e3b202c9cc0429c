"""What a report holds: its parts as typed values, their labels in tables, and all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from te_quant._measuring.bootstrap import NO_INTERVAL, Interval, Resamples
from te_quant._measuring.data_range import DEFAULT_RANGE, DataRange
from te_quant._measuring.text import with_interval
from te_quant.equivariance._draw import FractionalShift
from te_quant.equivariance.metrics.agreement import Agreement
from te_quant.equivariance.metrics.margin import Margin
from te_quant.equivariance.metrics.shift_error import PixelTally, ShiftError
from te_quant.shifts import Protocol, Shift
from te_quant.tables import Table, Tabular
from te_quant.usage import CodebookUsageReport

__all__ = [
    "AGREEMENT_LABELS",
    "ERROR_LABELS",
    "EquivarianceSettings",
    "EquivarianceValues",
    "ReconstructionError",
    "ShiftAgreement",
    "reconstruction_error",
]

AGREEMENT_LABELS: dict[str, str] = {
    "placement": "placement (paper: 5 places, 10 pairs)",
    "placement_foreground": "placement, foreground",
    "aligned": "aligned (whole tokens)",
    "aligned_foreground": "aligned, foreground",
    "sub_stride": "sub-stride (best token shift)",
    "sub_stride_foreground": "sub-stride, foreground",
    "sub_stride_fourier": "sub-stride (Fourier)",
    "sub_stride_fourier_foreground": "sub-stride (Fourier), foreground",
    "fractional": "fractional (best token shift)",
}
ERROR_LABELS: dict[str, str] = {
    "feature_error": "features, whole tokens",
    "feature_error_sub_stride": "features, sub-stride (Fourier)",
    "feature_error_fractional": "features, fractional (Fourier)",
    "end_to_end": "end to end PSNR, whole tokens",
    "end_to_end_sub_stride": "end to end PSNR, sub-stride",
    "end_to_end_fractional": "end to end PSNR, fractional",
}


@dataclass(frozen=True)
class ShiftAgreement:
    """Agreement and errors at one pixel shift (dy, dx); only the rate has an interval.

    Attributes:
        shift: (dy, dx), down and right.
        agreement: of the indices.
        feature_error: of the latents in dB, see :class:`ShiftError`; None without ``latents``.
        end_to_end: PSNR of the decoded images in dB; None without ``reconstruct``.
    """

    shift: Shift
    agreement: Agreement
    feature_error: float | None = None
    end_to_end: float | None = None


@dataclass(frozen=True)
class ReconstructionError(Tabular):
    """How far decoded images are from the originals, over all pixels of the reference images.

    Attributes:
        l1: mean absolute error, in the unit of the images.
        mse: mean squared error.
        psnr: 10·log10((high - low)² / mse) in dB of images in ``data_range``, which is 10·log10(2² / mse) for
            [-1, 1]; inf for a perfect copy.
        l1_interval: 95 % confidence interval (low, high), by percentile bootstrap over the given images.
        mse_interval: the same of the mean squared error.
        psnr_interval: the same of the PSNR.
    """

    l1: float
    mse: float
    psnr: float
    l1_interval: Interval = NO_INTERVAL
    mse_interval: Interval = NO_INTERVAL
    psnr_interval: Interval = NO_INTERVAL

    def texts(self) -> dict[str, str]:
        """Write the three errors with their intervals, by their labels in tables."""
        return {
            "reconstruction L1": with_interval(self.l1, self.l1_interval, ".4f"),
            "reconstruction MSE": with_interval(self.mse, self.mse_interval, ".4f"),
            "reconstruction PSNR (dB)": with_interval(self.psnr, self.psnr_interval, ".2f"),
        }

    def summary(self) -> Table:
        """Return the three errors."""
        return Table(["reconstruction", "value"], [[label, text] for label, text in self.texts().items()])


def reconstruction_error(pixels: PixelTally, resamples: Resamples) -> ReconstructionError:
    """Return the three errors of the images in a tally, with their intervals."""
    sums = pixels.rows
    total = sums.sum(dim=0, keepdim=True)
    return ReconstructionError(
        l1=float(_mean_absolute(total)),
        mse=float(_mean_square(total)),
        psnr=float(pixels.psnr(total)),
        l1_interval=resamples.interval_of_sums(sums, _mean_absolute),
        mse_interval=resamples.interval_of_sums(sums, _mean_square),
        psnr_interval=resamples.interval_of_sums(sums, pixels.psnr),
    )


def _mean_absolute(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 2]


def _mean_square(sums: Tensor) -> Tensor:
    return sums[:, 1] / sums[:, 2]


@dataclass(frozen=True)
class EquivarianceSettings:
    """The conditions of a measurement.

    Attributes:
        protocol: ``canvas``, ``circular`` or ``crop``.
        image_size: (H, W) of the images that the tokenizer saw, pixels.
        stride: s, pixels per token.
        num_codes: number of codes, K.
        num_images: images (or sprites) given.
        ground: value of the ground; None where the images have none.
        tau: τ; a token is foreground where a pixel of its cell differs from the ground by more.
        shifts: pixel shifts of the aligned agreement, multiples of s.
        sub_stride_shifts: pixel shifts of the sub-stride agreement.
        reference_images: the images over which code use and reconstruction error were taken, in words.
        resamples: how often the images were resampled for the intervals.
        seed: of the resampling.
        data_range: (low, high) of the pixel values.
        sub_stride_drawn: whether ``sub_stride_shifts`` are a stratified draw, by ``seed``, from the s² - 1 that
            there are.
        fractional_shifts: pixel shifts by fractions.
    """

    protocol: Protocol
    image_size: tuple[int, int]
    stride: int
    num_codes: int
    num_images: int
    ground: float | None
    tau: float
    shifts: tuple[Shift, ...]
    sub_stride_shifts: tuple[Shift, ...]
    reference_images: str
    resamples: int
    seed: int
    data_range: DataRange = DEFAULT_RANGE
    sub_stride_drawn: bool = False
    fractional_shifts: tuple[FractionalShift, ...] = ()


@dataclass(frozen=True)
class EquivarianceValues:
    """The values of a report, without its table, picture and files.

    :class:`te_quant.equivariance.EquivarianceReport` adds those and documents every field.
    """

    placement: Agreement | None
    placement_foreground: Agreement | None
    aligned: Agreement
    aligned_foreground: Agreement | None
    sub_stride: Agreement
    sub_stride_foreground: Agreement | None
    sub_stride_fourier: Agreement | None
    sub_stride_fourier_foreground: Agreement | None
    feature_error: ShiftError | None
    feature_error_sub_stride: ShiftError | None
    end_to_end: ShiftError | None
    end_to_end_sub_stride: ShiftError | None
    margin: Margin | None
    numerical_floor: Mapping[str, Agreement]
    code_use: CodebookUsageReport
    reconstruction: ReconstructionError | None
    aligned_by_shift: tuple[ShiftAgreement, ...] = field(repr=False)
    sub_stride_by_shift: tuple[ShiftAgreement, ...] = field(repr=False)
    settings: EquivarianceSettings
    fractional: Agreement | None = None
    feature_error_fractional: ShiftError | None = None
    end_to_end_fractional: ShiftError | None = None

    def agreements(self) -> dict[str, Agreement]:
        """Return the measured agreements by field name, in the order of the table."""
        values = {name: getattr(self, name) for name in AGREEMENT_LABELS}
        return {name: value for name, value in values.items() if value is not None}

    def errors(self) -> dict[str, ShiftError]:
        """Return the measured errors in dB by field name, in the order of the table."""
        values = {name: getattr(self, name) for name in ERROR_LABELS}
        return {name: value for name, value in values.items() if value is not None}
