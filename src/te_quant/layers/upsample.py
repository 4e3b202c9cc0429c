"""Upsampling by two, as the decoder does it.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from te_quant.filters import PaddingMode
from te_quant.layers.blocks import PaddedConv2d

__all__ = ["NearestUpsample"]


class NearestUpsample(nn.Module):
    """Repeat every pixel twice along both axes, then a 3x3 convolution.

    Args:
        channels: C, at least 1.
        padding_mode: of the convolution; see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, C, H, W).
        result: (B, C, 2H, 2W).

    Raises:
        ValueError: an option is out of range.

    Source: Esser et al. 2021, arXiv:2012.09841.
    """

    def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = PaddedConv2d(channels, channels, 3, padding_mode=padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        """Repeat, then convolve."""
        larger: Tensor = self.conv(F.interpolate(images, scale_factor=2.0, mode="nearest"))
        return larger
