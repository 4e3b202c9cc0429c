"""Downsampling by two: the four of the paper, and the two that lose no shift.

Every layer here commutes with circular shifts by multiples of its stride when it pads circularly: output
pixel u depends on input pixels around s·u in the same way for all u. Of shifts below the stride,
:class:`ConvPolyphase` commutes with the integer ones and :class:`ConvFourier` with all in the sense of
:func:`te_quant.shifts.fourier_shift`; the others with none, and the blurred ones only come closer.

Shape letters: B batch, C channels, H W pixels, s stride.

Source: Shin et al. 2021, arXiv:2112.00384, section 4 (StridedConv, ConvBlurpool, MaxPool, MaxBlurpool).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require, require_choice, require_int, require_rank
from te_quant.filters import PADDING_MODES, PaddingMode, pad2d
from te_quant.layers.blocks import PaddedConv2d
from te_quant.layers.blur import BlurPool2d
from te_quant.layers.fourier import FourierDownsample2d
from te_quant.layers.polyphase import PolyphaseDownsample2d

__all__ = [
    "DOWNSAMPLERS",
    "ConvBlurPool",
    "ConvFourier",
    "ConvPolyphase",
    "MaxBlurPool",
    "MaxPool",
    "StridedConv",
    "build_downsample",
]


class StridedConv(nn.Module):
    """A 3x3 convolution with stride 2, padded on the right and at the bottom only.

    Args:
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: an option is out of range, or a side is odd.

    Source: SC of the paper; Esser et al. 2021, arXiv:2012.09841.
    """

    stride = 2

    def __init__(self, channels: int, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, stride=2, margins=(0, 1, 0, 1), padding_mode=padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve every second pixel."""
        _require_even_sides(images)
        result: Tensor = self.conv(images)
        return result


class MaxPool(nn.Module):
    """The largest value of each 2x2 cell; no cell crosses the border, so no padding mode changes it.

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: a side is odd.

    Source: MP of the paper.
    """

    stride = 2

    def forward(self, images: Tensor) -> Tensor:
        """Pool."""
        _require_even_sides(images)
        return F.max_pool2d(images, 2)


class MaxBlurPool(nn.Module):
    """The largest value of each 2x2 window, at every pixel, then a 5-tap blur with stride 2.

    The windows are padded on the right and at the bottom, so that the size is kept. Under ``zeros`` the pool
    ignores what lies outside, as :class:`torch.nn.MaxPool2d` does: a zero among negative features would win
    although the image holds no such value. The blur pads with zeros then.

    Args:
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: padding_mode is unknown, or a side is odd.

    Source: MB of the paper; Zhang 2019, arXiv:1904.11486. Differs: Zhang pools without padding, which loses
        a row, so that it could not commute with circular shifts.
    """

    stride = 2

    def __init__(self, padding_mode: PaddingMode) -> None:
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


class ConvBlurPool(nn.Module):
    """A 3x3 convolution, then a 5-tap blur with stride 2 and no nonlinearity between.

    Args:
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W), H and W even.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: an option is out of range, or a side is odd.

    Source: CB of the paper. Differs from Zhang 2019, which has a ReLU between the two.
    """

    stride = 2

    def __init__(self, channels: int, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)
        self.blur = BlurPool2d(kernel_size=5, stride=2, padding_mode=padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve, then blur."""
        _require_even_sides(images)
        result: Tensor = self.blur(self.conv(images))
        return result


class ConvPolyphase(nn.Module):
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
    """

    stride = 2

    def __init__(self, channels: int, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)
        self.sample = PolyphaseDownsample2d(2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve, then choose and keep."""
        _require_even_sides(images)
        result: tuple[Tensor, Tensor] = self.sample(self.conv(images))
        return result


class ConvFourier(nn.Module):
    """A 3x3 convolution at every pixel, then :class:`~te_quant.layers.FourierDownsample2d` by two.

    Exact for: every circular shift under circular padding, in the sense stated there.
    Cost: four times the convolution of :class:`StridedConv`, and two transforms.

    Args:
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`; only ``circular`` suits the transform.

    Shape:
        images: (B, C, H, W), H and W even and positive.
        result: (B, C, H/2, W/2).

    Raises:
        ValueError: an option is out of range, or a side is odd.
    """

    stride = 2

    def __init__(self, channels: int, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)
        self.sample = FourierDownsample2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve, then filter and keep."""
        _require_even_sides(images)
        result: Tensor = self.sample(self.conv(images))
        return result


DOWNSAMPLERS: dict[str, Callable[[int, PaddingMode], nn.Module]] = {
    "strided_conv": StridedConv,
    "max_pool": lambda channels, padding_mode: MaxPool(),  # noqa: ARG005
    "max_blur_pool": lambda channels, padding_mode: MaxBlurPool(padding_mode),  # noqa: ARG005
    "conv_blur_pool": ConvBlurPool,
    "polyphase": ConvPolyphase,
    "fourier": ConvFourier,
}
"""What each name builds, from the number of channels and the padding mode; every one halves the sides."""


def build_downsample(kind: str, channels: int, padding_mode: PaddingMode) -> nn.Module:
    """Build a layer that halves both sides.

    Args:
        kind: ``strided_conv`` (SC in the paper), ``max_pool`` (MP), ``max_blur_pool`` (MB),
            ``conv_blur_pool`` (CB), ``polyphase`` or ``fourier``; the forward of ``polyphase`` returns the
            phase too.
        channels: C, at least 1.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Raises:
        ValueError: kind or padding_mode is unknown, or channels is smaller than 1.
    """
    require_choice("kind", kind, DOWNSAMPLERS)
    require_int("channels", channels, 1)
    require_choice("padding_mode", padding_mode, PADDING_MODES)
    return DOWNSAMPLERS[kind](channels, padding_mode)


def _require_even_sides(images: Tensor) -> None:
    require_rank("images", images, (4,), "(B, C, H, W)")
    height, width = images.shape[-2:]
    # An odd side cannot be shifted circularly by the stride: the grid of kept pixels would not close.
    if height % 2 or width % 2:
        require(False, "images sides", "divisible by 2", f"shape {tuple(images.shape)}")
