"""Resampling with the ideal low-pass filter by matrix products, for graphs that are exported.

:func:`te_quant.filters.fourier_resample` uses Fourier transforms, which ONNX has only in part. The filter is
separable, and along each axis it is one matrix.

Shape letters: B batch, C channels, H W pixels, N pixels along an axis, M pixels of the result, k frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["resample_by_products"]


def resample_by_products(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Do what ``fourier_resample`` does, up to rounding, in O(H·W·(H + W)) operations per channel.

    Args:
        images: floating point, below float32 computed in float32.
        size: (height, width) of the result; may be symbolic, as the sides of the images.

    Shape:
        images: (B, C, H, W). Returns (B, C, height, width).
    """
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    rows, columns = (
        _matrix(old, new, wide.dtype, wide.device) for old, new in zip(images.shape[2:], size, strict=True)
    )
    return (rows @ wide @ columns.T).to(images.dtype)


def _matrix(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(M, N): Σ_k w_k cos(2π·k·(u/M - v/N)) / N, over the frequencies of both grids; w is 1 at 0, else 2."""
    smaller = torch.sym_min(old, new)
    # The Nyquist frequency of an even side is among them, with a weight of zero. So there are two frequencies at
    # least; exporters treat an axis with one element as a special case.
    frequencies = torch.arange(smaller // 2 + 1, device=device)
    within = torch.where(2 * frequencies < smaller, 2.0, 0.0)
    weights = torch.where(frequencies > 0, within, 1.0).to(dtype) / old
    ours, theirs = (_waves(frequencies, count, dtype) for count in (new, old))
    return (ours * torch.cat((weights, weights))) @ theirs.T


def _waves(frequencies: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(count, 2k): the cosine, then the sine, of every frequency at every pixel."""
    places = torch.arange(count, device=frequencies.device).unsqueeze(1)
    # A sine is a cosine a quarter turn later, so both are counted in steps of which a quarter turn has ``count``.
    # Whole turns are taken off, and the rest is folded into a sine of at most a quarter turn, all in integers:
    # float32 would lose digits of a large angle.
    quarter = torch.full((1,), count, device=frequencies.device)
    cosines = 4 * places * frequencies
    steps = torch.cat((cosines, cosines - quarter), 1) % (4 * quarter)
    folded = quarter - torch.minimum(steps, 4 * quarter - steps)
    return ((math.pi / 2) * (folded.to(dtype) / quarter)).sin()
