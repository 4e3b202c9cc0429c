"""Upsampling by two in the decoder: a larger grid, then a 3x3 convolution.

Shape letters: B batch, C channels, H W pixels, k taps.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require_choice, require_int, require_rank
from te_quant.contract import Reach, Statement, sliding_window
from te_quant.filters import PADDING_MODES, PaddingMode, binomial_plane, filter_constant, in_format_of
from te_quant.layers.blocks import PaddedConv2d
from te_quant.layers.fourier import FourierUpsample2d
from te_quant.layers.polyphase import PolyphaseUpsample2d
from te_quant.layers.stating import derived, in_series, statement_of

__all__ = [
    "UPSAMPLERS",
    "BlurUpsample2d",
    "BlurUpsampleConv",
    "FourierUpsampleConv",
    "NearestUpsampleConv",
    "PolyphaseUpsampleConv",
    "Upsample",
    "UpsampleFactory",
    "build_upsample",
]


Upsample: TypeAlias = Literal["nearest", "blur", "fourier", "polyphase"]
"""The upsampling layers of this package; :data:`UPSAMPLERS` may hold more."""


class UpsampleFactory(Protocol):
    """A layer class, or a function that builds a layer, for :data:`UPSAMPLERS`.

    The layer doubles both sides of (B, C, H, W) images and keeps C. A class may state ``adaptive = True`` (its
    forward takes the phase of an adaptive downsampling as second argument) and ``periodic = True`` (the image
    counts as one period, so only circular padding fits).
    """

    def __call__(self, channels: int, /, *, padding_mode: PaddingMode) -> nn.Module:
        """Build the layer."""


def _repeated(images: Tensor, times: int) -> Tensor:
    """(B, C, H, W) to (B, C, times·H, times·W)."""
    B, C, H, W = images.shape
    larger = images[:, :, :, None, :, None].expand(B, C, H, times, W, times)
    return in_format_of(images, larger.reshape(B, C, times * H, times * W))


class NearestUpsampleConv(nn.Module):
    """Repeat every pixel twice along both axes, then a 3x3 convolution.

    Exact for: circular shifts by whole pixels of the smaller grid, under circular padding. Under another padding a
    constant image shows the border, never the grid.
    Cost: the convolution at the larger size.

    Args:
        channels: C, at least 1.
        padding_mode: padding of the convolution; see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W).
        result: (B, C, 2H, 2W).

    Raises:
        ValueError: an option is out of range.

    Source: Esser et al. 2021, arXiv:2012.09841.

    Example:
        >>> NearestUpsampleConv(8, padding_mode="zeros")(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 8, 8])
    """

    reach, exact_for = derived(
        lambda self: Statement(Reach(1, Fraction(1, 2)), "integer").then(statement_of(self.conv))
    )

    def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        """Repeat, then convolve."""
        if torch.compiler.is_compiling():
            # The gradient of interpolate is zero in code that inductor makes for bfloat16 on a CPU (torch 2.13).
            repeated = _repeated(images, 2)
        else:
            repeated = F.interpolate(images, scale_factor=2.0, mode="nearest")
        larger: Tensor = self.conv(repeated)
        return larger


class BlurUpsample2d(nn.Module):
    """Repeat every pixel ``stride`` times along both axes, then a binomial low-pass filter.

    For ``stride=2`` and three taps this is the kernel (1, 3, 3, 1)/4 on the pixels with zeros between.
    Exact for: circular shifts by whole pixels of the smaller grid, under circular padding; fractional ones only
    as far as the filter removes the repeated images of the spectrum, hence approximately.
    Cost: one depthwise convolution with k x k taps at the larger size. No weights.

    Args:
        kernel_size: k, at least 1, better odd: an even one moves the content by half a pixel.
        stride: how often a pixel is repeated, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W).
        result: (B, C, stride·H, stride·W).

    Raises:
        ValueError: an option is out of range; a side is too small to be reflected.
        TypeError: kernel_size or stride is not an int.

    Source: Karras et al. 2019, arXiv:1812.04948, appendix C, after Zhang 2019, arXiv:1904.11486.

    Example:
        >>> step = torch.tensor([[[[0.0, 4.0]]]])
        >>> BlurUpsample2d(kernel_size=3, stride=2, padding_mode="replicate")(step)[0, 0, 0]
        tensor([0., 1., 3., 4.])
    """

    reach, exact_for = derived(lambda self: self._statement())

    def __init__(self, *, kernel_size: int = 3, stride: int = 2, padding_mode: PaddingMode = "replicate") -> None:
        super().__init__()
        kernel_size = require_int("kernel_size", kernel_size, 1)
        stride = require_int("stride", stride, 1)
        require_choice("padding_mode", padding_mode, PADDING_MODES)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding_mode: PaddingMode = padding_mode

    def forward(self, images: Tensor) -> Tensor:
        """Repeat, then filter."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        larger = _repeated(images, self.stride)
        return filter_constant(larger, binomial_plane, self.kernel_size, stride=1, padding_mode=self.padding_mode)

    def _statement(self) -> Statement:
        before, after = (self.kernel_size - 1) // 2, self.kernel_size // 2
        repeated = Statement(Reach(1, Fraction(1, self.stride)), "integer")
        circular = self.padding_mode == "circular"
        return repeated.then(sliding_window(self.kernel_size, before=before, after=after, circular=circular))

    def extra_repr(self) -> str:
        """The options."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding_mode={self.padding_mode}"


class BlurUpsampleConv(nn.Module):
    """:class:`BlurUpsample2d` by two with three taps, then a 3x3 convolution; exact where that is.

    Args:
        channels: C, at least 1.
        padding_mode: padding of both; see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W).
        result: (B, C, 2H, 2W).

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> BlurUpsampleConv(8, padding_mode="zeros")(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 8, 8])
    """

    reach, exact_for = derived(lambda self: in_series(self.upsample, self.conv))

    def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.upsample = BlurUpsample2d(padding_mode=padding_mode)
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        """Enlarge, then convolve."""
        larger: Tensor = self.conv(self.upsample(images))
        return larger


class FourierUpsampleConv(nn.Module):
    """:class:`~te_quant.layers.FourierUpsample2d` by two, then a 3x3 convolution; exact where that is.

    Args:
        channels: C, at least 1.
        padding_mode: padding of the convolution; see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W).
        result: (B, C, 2H, 2W).

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> FourierUpsampleConv(8, padding_mode="circular")(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 8, 8])
    """

    periodic = True
    reach, exact_for = derived(lambda self: in_series(self.upsample, self.conv))

    def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.upsample = FourierUpsample2d(2)
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        """Enlarge, then convolve."""
        larger: Tensor = self.conv(self.upsample(images))
        return larger


class PolyphaseUpsampleConv(nn.Module):
    """:class:`~te_quant.layers.PolyphaseUpsample2d` by two with interpolation, then a 3x3 convolution.

    Exact where that is, so under circular padding.

    Args:
        channels: C, at least 1.
        padding_mode: padding of both; see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W).
        phase: (B, 2) int64 in {0, 1}.
        result: (B, C, 2H, 2W).

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> layer, phase = PolyphaseUpsampleConv(8, padding_mode="circular"), torch.tensor([[1, 0]])
        >>> layer(torch.zeros(1, 8, 4, 4), phase).shape
        torch.Size([1, 8, 8, 8])
    """

    adaptive = True
    reach, exact_for = derived(lambda self: in_series(self.upsample, self.conv))

    def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.upsample = PolyphaseUpsample2d(2, interpolate=True, padding_mode=padding_mode)
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)

    def forward(self, images: Tensor, phase: Tensor) -> Tensor:
        """Place and interpolate, then convolve."""
        larger: Tensor = self.conv(self.upsample(images, phase))
        return larger


UPSAMPLERS: dict[Upsample | str, UpsampleFactory] = {
    "nearest": NearestUpsampleConv,
    "blur": BlurUpsampleConv,
    "fourier": FourierUpsampleConv,
    "polyphase": PolyphaseUpsampleConv,
}
"""The layer class of each name, called with the number of channels and ``padding_mode``.

Add your own layer with ``UPSAMPLERS["my_layer"] = MyLayer``; every config then accepts its name."""


def build_upsample(upsample: Upsample | str, channels: int, *, padding_mode: PaddingMode) -> nn.Module:
    """Build a layer that doubles both sides.

    Args:
        upsample: ``nearest``, ``blur``, ``fourier``, ``polyphase``, or a name added to :data:`UPSAMPLERS`. The
            forward of an adaptive layer such as ``polyphase`` takes the phase too.
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W).
        result: (B, C, 2H, 2W).

    Raises:
        ValueError: upsample or padding_mode is unknown, or channels is smaller than 1.

    Example:
        >>> build_upsample("nearest", 8, padding_mode="zeros").conv
        PaddedConv2d(8, 8, kernel_size=3, stride=1, margins=(1, 1, 1, 1), padding_mode=zeros)
    """
    require_choice("upsample", upsample, UPSAMPLERS)
    channels = require_int("channels", channels, 1)
    require_choice("padding_mode", padding_mode, PADDING_MODES)
    return UPSAMPLERS[upsample](channels, padding_mode=padding_mode)
