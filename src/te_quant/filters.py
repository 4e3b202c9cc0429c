"""Low-pass kernels on pixel grids, and the padding that every convolution of the package shares.

Shape letters: B batch, C channels, H W pixels, k taps, s stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant._checks import require, require_choice, require_floating, require_int, require_rank, require_type
from te_quant._constants import constant
from te_quant._execution import is_exporting
from te_quant._pixels import pad_borders, resample_by_products

__all__ = ["PADDING_MODES", "Margins", "PaddingMode", "binomial_kernel", "filter2d", "fourier_resample", "pad2d"]

PaddingMode: TypeAlias = Literal["zeros", "replicate", "reflect", "circular"]
PADDING_MODES: tuple[PaddingMode, ...] = get_args(PaddingMode)

Margins: TypeAlias = tuple[int, int, int, int]
"""Pixels added on the (left, right, top, bottom), the order of :func:`torch.nn.functional.pad`."""


# How many numbers of a batch are filtered at once on a CPU.
_CPU_PIXELS = 1 << 19


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
        TypeError: size is not an int, or dtype not floating point.

    Source: Zhang 2019, arXiv:1904.11486, section 4 (its Rect-2, Tri-3 and Bin-5 are k = 2, 3 and 5).

    Example:
        >>> binomial_kernel(3)
        tensor([0.2500, 0.5000, 0.2500], dtype=torch.float64)
    """
    size = require_int("size", size, 1)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}.")
    return torch.tensor(_binomial_taps(size), dtype=torch.float64, device="cpu").to(device=device, dtype=dtype)


def binomial_plane(size: int) -> list[list[float]]:
    """Return the outer product of :func:`binomial_kernel` with itself, as numbers."""
    taps = _binomial_taps(size)
    return [[row * column for column in taps] for row in taps]


def _binomial_taps(size: int) -> list[float]:
    total = 2 ** (size - 1)
    return [math.comb(size - 1, place) / total for place in range(size)]


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
        ValueError: mode is unknown, margins are not four, one is negative, there is no pixel to repeat, or a
            reflected margin is not smaller than the side it mirrors.
        TypeError: margins are no tuple.

    Example:
        >>> pad2d(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (1, 1, 0, 0), "circular")
        tensor([[[[3., 1., 2., 3., 1.]]]])
    """
    require_choice("mode", mode, PADDING_MODES)
    require_rank("images", images, (4,), "(B, C, H, W)")
    require_type("margins", margins, (tuple, list), "four ints")
    require(len(margins) == 4, "margins", "four ints (left, right, top, bottom)", margins)
    if not any(margins):
        return images
    require(min(margins) >= 0, "margins", "at least 0 each", margins)
    if mode == "zeros":
        return F.pad(images, margins)
    height, width = images.shape[-2:]
    if not (height > 0 and width > 0):
        require(False, "images sides", f"at least 1 for mode={mode!r}", f"shape {tuple(images.shape)}")
    left, right, top, bottom = margins
    wide, high = max(left, right), max(top, bottom)
    if mode == "circular" and (wide > width or high > height):
        rows = torch.arange(-top, height + bottom, device=images.device) % height
        columns = torch.arange(-left, width + right, device=images.device) % width
        return images[:, :, rows[:, None], columns]
    if mode == "reflect":
        if not (wide < width and high < height):
            expected = f"larger than the reflected margins (rows {high}, columns {wide})"
            require(False, "images sides", expected, f"shape {tuple(images.shape)}")
        return F.pad(images, margins, mode=mode)
    return pad_borders(images, margins, mode == "circular")


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
        TypeError: images or taps are not floating point.

    Example:
        >>> row = torch.tensor([[[[0.0, 0.0, 4.0, 0.0]]]])
        >>> filter2d(row, binomial_kernel(3), stride=2, padding_mode="circular")
        tensor([[[[0., 2.]]]])
    """
    require_rank("taps", taps, (1,), "(k,)")
    require_floating("taps", taps)
    require(len(taps) > 0, "taps", "at least one", "none")
    stride = require_int("stride", stride, 1)
    return filter_by(images, torch.outer(taps, taps), stride, padding_mode)


def filter_constant(
    images: Tensor,
    plane: Callable[[int], list[list[float]]] | Callable[[int], list[list[int]]],
    option: int,
    *,
    stride: int,
    padding_mode: PaddingMode,
) -> Tensor:
    """As :func:`filter_by`, with the kernel ``plane(option)`` in the dtype and on the device of the images."""
    require_floating("images", images)
    kernel = constant(plane, option, dtype=images.dtype, device=images.device)
    return filter_by(images, kernel, stride, padding_mode)


def filter_by(images: Tensor, kernel: Tensor, stride: int, padding_mode: PaddingMode) -> Tensor:
    """As :func:`filter2d`, with the (k, k) kernel of both axes.

    One 2-D depthwise convolution: its backward costs less than that of two 1-D ones for k = 5.
    """
    require_rank("images", images, (4,), "(B, C, H, W)")
    require_floating("images", images)
    batch, channels, height, width = images.shape
    size = kernel.shape[0]
    before, after = (size - 1) // 2, size // 2
    if kernel.dtype != images.dtype:
        kernel = kernel.to(images.dtype)
    weight = kernel.expand(channels, 1, size, size)

    # The convolution can pad with zeros itself, without a padded copy.
    alone = padding_mode == "zeros" and before == after

    def filtered(part: Tensor) -> Tensor:
        if alone:
            return F.conv2d(part, weight, None, stride, before, 1, channels)
        padded = pad2d(part, (before, after, before, after), padding_mode)
        return F.conv2d(padded, weight, None, stride, 0, 1, channels)

    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if traced or not images.is_cpu:
        return filtered(images)
    # On a CPU so many images at once as stay in its cache, padded copy included. Without a copy, joining the
    # gradients of the parts would cost more than the cache saves.
    if alone and images.requires_grad and torch.is_grad_enabled():
        return filtered(images)
    some = max(1, _CPU_PIXELS // max(1, channels * height * width))
    return filtered(images) if some >= batch else torch.cat([filtered(part) for part in images.split(some)])


def fourier_resample(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Change the number of pixels with the ideal low-pass filter, by cutting or extending the spectrum.

    The images count as one period of a band-limited signal; the result samples it at other pixels, the first
    of which stays where it is. Kept are the frequencies strictly below half of the smaller number of pixels
    along each axis: an even side has a Nyquist frequency, which no fractional shift is defined for, and it is
    set to zero. So the function commutes with *every* circular shift, integer or fractional
    (:func:`te_quant.shifts.fourier_shift`), of any images.

    Args:
        images: any floating dtype; below float32 the transform runs in float32.
        size: (height, width) of the result in pixels, at least 1 each, odd or even, larger or smaller.

    Shape:
        images: (B, C, H, W).
        result: (B, C, height, width), in the dtype of ``images``.

    Raises:
        ValueError: a side of the images or of the result is empty, or the images have another rank.
        TypeError: images are not floating point, or ``size`` does not hold ints.

    Source: Karras et al. 2021, arXiv:2106.12423, section 2 (the ideal filter); Michaeli et al. 2023,
        arXiv:2303.08085, section 3 (by the transform of the whole, periodic image).

    Example:
        >>> wave = torch.cos(2 * torch.pi * torch.arange(4) / 4).expand(1, 1, 4, 4)
        >>> fourier_resample(wave, (4, 8))[0, 0, 0, ::2].round().abs()
        tensor([1., 0., 1., 0.])
    """
    require_rank("images", images, (4,), "(B, C, H, W)")
    require_floating("images", images)
    require_type("size", size, (tuple, list), "a pair of ints")
    require(len(size) == 2, "size", "a pair (height, width)", size)
    if is_exporting():
        return resample_by_products(images, size)
    height, width = require_int("size[0]", size[0], 1), require_int("size[1]", size[1], 1)
    sides = images.shape[2:]
    require(sides[0] > 0 and sides[1] > 0, "images sides", "at least 1", f"shape {tuple(images.shape)}")
    if not images.numel():
        # The transforms refuse an empty batch.
        return images[:, :, :1, :1].expand(-1, -1, height, width)
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    spectrum = torch.fft.rfft2(wide)
    rows, columns = (min(sides[0], height) - 1) // 2, (min(sides[1], width) - 1) // 2
    spectrum = spectrum[..., : columns + 1]
    top, bottom = spectrum[..., : rows + 1, :], spectrum[..., sides[0] - rows :, :]
    between = spectrum.new_zeros((*spectrum.shape[:2], height - 2 * rows - 1, columns + 1))
    spectrum = torch.cat((top, between, bottom), dim=-2)
    gain = height * width / (sides[0] * sides[1])
    result: Tensor = torch.fft.irfft2(F.pad(spectrum, (0, width // 2 - columns)), s=(height, width))
    return in_format_of(images, (gain * result).to(images.dtype))


def in_format_of(images: Tensor, result: Tensor) -> Tensor:
    """Return ``result``, channels-last if ``images`` are, else contiguous: both (B, C, H, W) of any size."""
    # Strides are asked for in this way because vmap refuses the question for a memory format.
    if not images.is_contiguous() and images.movedim(1, -1).is_contiguous():
        return result.movedim(1, -1).contiguous().movedim(-1, 1)
    return result.contiguous()
