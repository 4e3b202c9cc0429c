"""Low-pass kernels on pixel grids, and the padding they share with every convolution of the package.

Shape letters: B batch, C channels, H W pixels, k taps, s stride.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant._checks import require, require_choice, require_int, require_rank

__all__ = ["PADDING_MODES", "Margins", "PaddingMode", "binomial_kernel", "filter2d", "pad2d"]

PaddingMode: TypeAlias = Literal["zeros", "replicate", "reflect", "circular"]
PADDING_MODES: tuple[PaddingMode, ...] = get_args(PaddingMode)

Margins: TypeAlias = tuple[int, int, int, int]
"""Pixels added on the (left, right, top, bottom), the order of :func:`torch.nn.functional.pad`."""


def binomial_kernel(
    size: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """One row of Pascal's triangle, divided by its sum.

    Args:
        size: k, the number of taps, at least 1; ``(1, 4, 6, 4, 1) / 16`` for 5.
        dtype: type of the result. Each tap is rounded once, from the exact fraction.
        device: where the result lives.

    Shape:
        result: (k,).

    Raises:
        ValueError: size is smaller than 1.
        TypeError: size is not an int.

    Source: Zhang 2019, arXiv:1904.11486, section 4 (its Rect-2, Tri-3 and Bin-5 are k = 2, 3 and 5).
    """
    require_int("size", size, 1)
    total = 2 ** (size - 1)
    taps = [math.comb(size - 1, i) / total for i in range(size)]
    return torch.tensor(taps, dtype=torch.float64, device="cpu").to(device=device, dtype=dtype)


def pad2d(images: Tensor, margins: Margins, mode: PaddingMode) -> Tensor:
    """Pad the last two axes.

    Args:
        images: any floating dtype.
        margins: pixels added on the (left, right, top, bottom), each at least 0.
        mode: ``zeros``, ``replicate`` (the edge pixel), ``reflect`` (mirrored without repeating the edge
            pixel) or ``circular`` (the opposite edge; it may wrap around more than once).

    Shape:
        images: (B, C, H, W).
        result: (B, C, top + H + bottom, left + W + right).

    Raises:
        ValueError: mode is unknown, or a reflected margin is not smaller than the side it mirrors.
    """
    require_choice("mode", mode, PADDING_MODES)
    require_rank("images", images, (4,), "(B, C, H, W)")
    if not any(margins):
        return images
    if mode == "zeros":
        return F.pad(images, margins)
    height, width = images.shape[-2:]
    left, right, top, bottom = margins
    wide, high = max(left, right), max(top, bottom)
    if mode == "circular" and (wide > width or high > height):
        rows = torch.arange(-top, height + bottom, device=images.device) % height
        columns = torch.arange(-left, width + right, device=images.device) % width
        return images[:, :, rows[:, None], columns]
    if mode == "reflect" and (wide >= width or high >= height):
        expected = f"larger than the reflected margins (rows {high}, columns {wide})"
        require(False, "images sides", expected, f"shape {tuple(images.shape)}")
    return F.pad(images, margins, mode=mode)


def filter2d(images: Tensor, taps: Tensor, *, stride: int = 1, padding_mode: PaddingMode) -> Tensor:
    """Convolve every channel with the same separable kernel, then keep one pixel in ``stride``.

    The margins are ``(k - 1) // 2`` before and ``k // 2`` after, for odd and even k alike, so that output
    pixel u sits at input pixel s·u (half a pixel later for even k) and no row is lost.

    Args:
        images: any floating dtype; the kernel is converted to it.
        taps: the 1-D kernel, applied along both axes.
        stride: s, pixels, at least 1.
        padding_mode: see :func:`pad2d`.

    Shape:
        images: (B, C, H, W).
        taps: (k,).
        result: (B, C, ⌈H/s⌉, ⌈W/s⌉).

    Raises:
        ValueError: a shape or an option is not as said above.
    """
    require_rank("images", images, (4,), "(B, C, H, W)")
    require_rank("taps", taps, (1,), "(k,)")
    channels, size = images.shape[1], taps.shape[0]
    before, after = (size - 1) // 2, size // 2
    padded = pad2d(images, (before, after, before, after), padding_mode)
    taps = taps.to(images.dtype)
    # One 2-D depthwise convolution: its backward costs less than that of two 1-D ones for k = 5.
    kernel = torch.outer(taps, taps).expand(channels, 1, size, size)
    return F.conv2d(padded, kernel, stride=stride, groups=channels)
