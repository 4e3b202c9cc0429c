"""Downsampling by two: the four layers of the paper, two of them also as in its code, and two that lose no shift.

Every layer that pads as it is told commutes with circular shifts by multiples of its stride when it pads
circularly: output pixel u depends on input pixels around s·u in the same way for all u. Below the stride,
:class:`ConvPolyphaseDownsample` commutes with every integer shift, and :class:`ConvFourierDownsample` with every
shift in the sense of :func:`te_quant.shifts.fourier_shift`. The others commute with none; a blur only helps.

Shape letters: B batch, C channels, H W pixels, s stride.

Source: Shin et al. 2021, arXiv:2112.00384, section 4 (StridedConv, ConvBlurpool, MaxPool, MaxBlurpool).
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import padding_cure, require, require_choice, require_int, require_rank
from te_quant.contract import Group, Reach, Statement, sliding_window
from te_quant.filters import PADDING_MODES, PaddingMode, pad2d
from te_quant.layers.blocks import PaddedConv2d
from te_quant.layers.blur import BlurPool2d
from te_quant.layers.fourier import FourierDownsample2d
from te_quant.layers.polyphase import PolyphaseDownsample2d
from te_quant.layers.stating import derived, in_series, statement_of

__all__ = [
    "DOWNSAMPLERS",
    "ConvBlurPool",
    "ConvFourierDownsample",
    "ConvPolyphaseDownsample",
    "Downsample",
    "DownsampleFactory",
    "MaxBlurPool",
    "MaxPool",
    "StridedConv",
    "UnpaddedMaxBlurPool",
    "build_downsample",
]


Downsample: TypeAlias = Literal[
    "strided_conv",
    "max_pool",
    "max_blur_pool",
    "unpadded_max_blur_pool",
    "conv_blur_pool",
    "conv_replicate_blur_pool",
    "polyphase",
    "fourier",
]
"""The downsampling layers of this package; :data:`DOWNSAMPLERS` may hold more."""


class DownsampleFactory(Protocol):
    """A layer class, or a function that builds a layer, for :data:`DOWNSAMPLERS`.

    The layer halves both sides of (B, C, H, W) images and keeps C. It states ``reach`` and ``exact_for``
    (:mod:`te_quant.contract`). A class may also state ``adaptive = True`` (its forward returns the pixels and
    their phase) and ``periodic = True`` (the image counts as one period, so only circular padding fits).
    """

    def __call__(self, channels: int, /, *, padding_mode: PaddingMode) -> nn.Module:
        """Build the layer."""


class StridedConv(nn.Module):
    """A 3x3 convolution with stride 2, padded only on the right and at the bottom.

    Exact for: multiples of the stride, under circular padding.

    Args:
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: an option is out of range, or a side is odd.

    Source: SC of the paper; Esser et al. 2021, arXiv:2012.09841.

    Example:
        >>> StridedConv(8, padding_mode="circular").exact_for, StridedConv(8, padding_mode="zeros").exact_for
        ('stride', 'interior')
    """

    stride = 2
    reach, exact_for = derived(lambda self: statement_of(self.conv))

    def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, stride=2, margins=(0, 1, 0, 1), padding_mode=padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve every second pixel."""
        _require_even_sides(images)
        result: Tensor = self.conv(images)
        return result


class MaxPool(nn.Module):
    """The largest value of each 2x2 cell.

    Exact for: multiples of the stride, under any padding, since no cell crosses the border.

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: a side is odd.

    Source: MP of the paper.

    Example:
        >>> import torch
        >>> MaxPool()(torch.tensor([[[[1.0, 2.0], [4.0, 3.0]]]])).item()
        4.0
    """

    stride = 2
    reach = Reach(2, stride=2)
    exact_for: Group = "stride"

    def forward(self, images: Tensor) -> Tensor:
        """Pool."""
        _require_even_sides(images)
        return F.max_pool2d(images, 2)


class MaxBlurPool(nn.Module):
    """The largest value of each 2x2 window, at every pixel, then a 5-tap blur with stride 2.

    The windows are padded on the right and at the bottom, so that the size is kept. Under ``zeros`` the pool
    ignores the outside, as :class:`torch.nn.MaxPool2d` does: a zero among negative features would win although the
    image holds no such value. The blur does pad with zeros.
    Exact for: multiples of the stride, under circular padding.

    Args:
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: padding_mode is unknown, or a side is odd.

    Source: Zhang 2019, arXiv:1904.11486, and the layer MB of the paper. Differs from both: they pool without
        padding, so the blur sees one row and one column less, and no circular shift is exact.
        :class:`UnpaddedMaxBlurPool` is the layer of the paper's code.

    Example:
        >>> MaxBlurPool(padding_mode="circular").reach  # the maximum of 2 pixels, then 5 taps
        Reach(size=6, stride=2)
    """

    stride = 2
    reach, exact_for = derived(lambda self: self._windows().then(statement_of(self.blur)))

    def __init__(self, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.blur = BlurPool2d(kernel_size=5, stride=2, padding_mode=padding_mode)
        # In a 2x2 window the replicated neighbour is already there, so repeating it is to ignore the outside.
        self.pool_mode: PaddingMode = "replicate" if padding_mode == "zeros" else padding_mode

    def forward(self, images: Tensor) -> Tensor:
        """Pool, then blur."""
        _require_even_sides(images)
        pooled = F.max_pool2d(pad2d(images, (0, 1, 0, 1), self.pool_mode), 2, stride=1)
        result: Tensor = self.blur(pooled)
        return result

    def _windows(self) -> Statement:
        return sliding_window(2, after=1, circular=self.pool_mode == "circular")


class UnpaddedMaxBlurPool(nn.Module):
    """The largest value of each 2x2 window inside the image, then a 5-tap blur with stride 2.

    There is one window less along each axis than there are pixels. The blur replicates the border, whatever the
    convolutions of the model do. Use it to run models that were trained with it; :class:`MaxBlurPool` is exact for
    more shifts.
    Exact for: multiples of the stride, away from the border.

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: a side is odd.

    Source: MB of Shin et al. 2021, arXiv:2112.00384, as its authors' code has it.

    Example:
        >>> UnpaddedMaxBlurPool().reach, UnpaddedMaxBlurPool().exact_for
        (Reach(size=6, stride=2), 'interior')
    """

    stride = 2
    reach, exact_for = derived(lambda self: sliding_window(2).then(statement_of(self.blur)))

    def __init__(self) -> None:
        super().__init__()
        self.blur = BlurPool2d(kernel_size=5, stride=2, padding_mode="replicate")

    def forward(self, images: Tensor) -> Tensor:
        """Pool, then blur."""
        _require_even_sides(images)
        result: Tensor = self.blur(F.max_pool2d(images, 2, stride=1))
        return result


class ConvBlurPool(nn.Module):
    """A 3x3 convolution, then a 5-tap blur with stride 2 and no nonlinearity between.

    Exact for: multiples of the stride, under circular padding of both.

    Args:
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.
        blur_padding_mode: that of the blur, if it is not that of the convolution; the paper's code replicates the
            border here whatever the convolutions do (``conv_replicate_blur_pool``).

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: an option is out of range, or a side is odd.

    Source: CB of the paper. Differs from Zhang 2019, which has a ReLU between the two.

    Example:
        >>> ConvBlurPool(8, padding_mode="circular").reach  # 3 pixels, then 5 taps
        Reach(size=7, stride=2)
    """

    stride = 2
    reach, exact_for = derived(lambda self: in_series(self.conv, self.blur))

    def __init__(
        self, channels: int, *, padding_mode: PaddingMode, blur_padding_mode: PaddingMode | None = None
    ) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)
        if blur_padding_mode is None:
            blur_padding_mode = padding_mode
        else:
            require_choice("blur_padding_mode", blur_padding_mode, PADDING_MODES)
        self.blur = BlurPool2d(kernel_size=5, stride=2, padding_mode=blur_padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve, then blur."""
        _require_even_sides(images)
        result: Tensor = self.blur(self.conv(images))
        return result


class ConvPolyphaseDownsample(nn.Module):
    """A 3x3 convolution at every pixel, then :class:`~te_quant.layers.PolyphaseDownsample2d` by two.

    Exact for: every integer circular shift under circular padding, in the sense stated there.
    Cost: four times the convolution of :class:`StridedConv`.

    Args:
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W), H and W even.
        result: a pair: (B, C, H/2, W/2), and the phase (B, 2) int64 in {0, 1}.

    Raises:
        ValueError: an option is out of range, or a side is odd.

    Example:
        >>> import torch
        >>> layer = ConvPolyphaseDownsample(3, padding_mode="circular")
        >>> pixels, phase = layer(torch.rand(2, 3, 8, 8))
        >>> pixels.shape, phase.shape, layer.exact_for
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 2]), 'integer')
    """

    stride = 2
    adaptive = True
    reach, exact_for = derived(lambda self: in_series(self.conv, self.sample))

    def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)
        self.sample = PolyphaseDownsample2d(2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve, then choose and keep."""
        _require_even_sides(images)
        result: tuple[Tensor, Tensor] = self.sample(self.conv(images))
        return result


class ConvFourierDownsample(nn.Module):
    """A 3x3 convolution at every pixel, then :class:`~te_quant.layers.FourierDownsample2d` by two.

    Exact for: every circular shift under circular padding, in the sense stated there. Tokens computed from it move
    by whole tokens only for multiples of the stride.
    Cost: four times the convolution of :class:`StridedConv`, and two transforms.

    Args:
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`; only ``circular`` suits the transform.

    Shape:
        images: (B, C, H, W), H and W even and positive.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: an option is out of range, or a side is odd.

    Example:
        >>> import torch
        >>> ConvFourierDownsample(3, padding_mode="circular")(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """

    stride = 2
    periodic = True
    reach, exact_for = derived(lambda self: in_series(self.conv, self.sample))

    def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)
        self.sample = FourierDownsample2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve, then filter and keep."""
        _require_even_sides(images)
        result: Tensor = self.sample(self.conv(images))
        return result


DOWNSAMPLERS: dict[Downsample | str, DownsampleFactory] = {
    "strided_conv": StridedConv,
    "max_pool": lambda channels, *, padding_mode: MaxPool(),  # noqa: ARG005
    "max_blur_pool": lambda channels, *, padding_mode: MaxBlurPool(padding_mode=padding_mode),  # noqa: ARG005
    "unpadded_max_blur_pool": lambda channels, *, padding_mode: UnpaddedMaxBlurPool(),  # noqa: ARG005
    "conv_blur_pool": ConvBlurPool,
    "conv_replicate_blur_pool": lambda channels, *, padding_mode: ConvBlurPool(
        channels, padding_mode=padding_mode, blur_padding_mode="replicate"
    ),
    "polyphase": ConvPolyphaseDownsample,
    "fourier": ConvFourierDownsample,
}
"""The layer class of each name, called with the number of channels and ``padding_mode``.

Add your own layer with ``DOWNSAMPLERS["my_layer"] = MyLayer``; every config then accepts its name."""


def build_downsample(downsample: Downsample | str, channels: int, *, padding_mode: PaddingMode) -> nn.Module:
    """Build a layer that halves both sides.

    Args:
        downsample: ``strided_conv`` (SC in the paper), ``max_pool`` (MP), ``max_blur_pool`` (MB, but with
            a padded pool), ``unpadded_max_blur_pool`` (MB as in the paper's code), ``conv_blur_pool`` (CB),
            ``conv_replicate_blur_pool`` (CB as in the paper's code, whose blur replicates the border),
            ``polyphase``, ``fourier``, or a name added to :data:`DOWNSAMPLERS`. The forward of an adaptive layer
            such as ``polyphase`` returns a pair, the pixels and the phase.
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Raises:
        ValueError: downsample or padding_mode is unknown, channels is smaller than 1, or the layer states that its
            stride is not 2.

    Example:
        >>> build_downsample("max_pool", 8, padding_mode="zeros")
        MaxPool()
    """
    require_choice("downsample", downsample, DOWNSAMPLERS)
    channels = require_int("channels", channels, 1)
    require_choice("padding_mode", padding_mode, PADDING_MODES)
    layer = DOWNSAMPLERS[downsample](channels, padding_mode=padding_mode)
    kept = statement_of(layer)
    if kept.exact_for != "none":
        stride = kept.reach.stride
        require(
            stride == 2,
            "downsample",
            "a layer whose reach states stride=2",
            f"{downsample!r}, which states {stride}",
        )
    return layer


def _require_even_sides(images: Tensor) -> None:
    require_rank("images", images, (4,), "(B, C, H, W)")
    height, width = images.shape[-2:]
    # An odd side cannot be shifted circularly by the stride: the grid of kept pixels would not close.
    if height % 2 or width % 2:
        cure = f"{padding_cure(2)}, or use BlurPool2d, which takes any side"
        require(False, "images sides", "divisible by 2", f"shape {tuple(images.shape)}; {cure}")
