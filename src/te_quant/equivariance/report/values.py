"""The parts of a report, as typed values."""

from __future__ import annotations

from dataclasses import dataclass

from te_quant.equivariance.metrics._bootstrap import NO_INTERVAL, Interval
from te_quant.equivariance.metrics.agreement import Agreement
from te_quant.shifts import Protocol, Shift
from te_quant.usage import CodebookUsageReport

__all__ = ["CodeUse", "EquivarianceSettings", "ReconstructionError", "ShiftAgreement"]


@dataclass(frozen=True)
class ShiftAgreement:
    """What was measured at one pixel shift (dy, dx); only the rate has an interval.

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
class CodeUse:
    """How the codebook was used over a stated number of tokens.

    Attributes:
        used_codes: codes that occur at least once; grows with the number of tokens.
        frequent_codes: codes that make up more than 0.1 % of the tokens; does not.
        perplexity: exp of the entropy of the code frequencies, in [1, K].
        tokens: how many tokens were counted.
    """

    used_codes: int
    frequent_codes: int
    perplexity: float
    tokens: int

    @classmethod
    def of(cls, usage: CodebookUsageReport) -> CodeUse:
        """Keep the figures of a :class:`~te_quant.CodebookUsage`, without its histogram."""
        return cls(usage.used_codes, usage.frequent_codes, usage.perplexity, usage.tokens)


@dataclass(frozen=True)
class ReconstructionError:
    """How far decoded images are from the originals, over all pixels of the reference images.

    Attributes:
        l1: mean absolute error, images in [-1, 1].
        mse: mean squared error.
        psnr: 10·log10(2² / mse) in dB, peak-to-peak range 2; inf for a perfect copy.
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


@dataclass(frozen=True)
class EquivarianceSettings:
    """Under which conditions a report was measured.

    Attributes:
        protocol: ``canvas``, ``circular`` or ``crop``.
        image_size: (H, W) of what the tokenizer saw, in pixels.
        stride: s, pixels a token.
        num_codes: K.
        num_images: images (or sprites) given.
        ground: value of the ground.
        tau: τ of the foreground.
        shifts: pixel shifts of the aligned agreement, multiples of s.
        sub_stride_shifts: pixel shifts of the sub-stride agreement.
        reference_images: the images over which code use and reconstruction error were taken, in words.
        resamples: of the images, behind the intervals.
        seed: of the resamples.
    """

    protocol: Protocol
    image_size: tuple[int, int]
    stride: int
    num_codes: int
    num_images: int
    ground: float
    tau: float
    shifts: tuple[Shift, ...]
    sub_stride_shifts: tuple[Shift, ...]
    reference_images: str
    resamples: int
    seed: int
