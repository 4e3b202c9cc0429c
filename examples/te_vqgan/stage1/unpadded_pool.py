"""The max-blur pooling of the paper's authors, a layer that the library does not have.

Importing this module adds it to :data:`te_quant.layers.DOWNSAMPLERS`, so that saved models can name it.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from examples.te_vqgan.runs.checks import require
from te_quant import BlurPool2d
from te_quant.contract import Group, Reach
from te_quant.filters import PaddingMode
from te_quant.layers import DOWNSAMPLERS

__all__ = ["UNPADDED_MAX_BLUR_POOL", "UnpaddedMaxBlurPool"]

UNPADDED_MAX_BLUR_POOL = "unpadded_max_blur_pool"
"""Its name as ``downsample``."""


class UnpaddedMaxBlurPool(nn.Module):
    """The largest value of each 2x2 window inside the image, then a 5-tap blur with stride 2.

    There is one window less per axis than there are pixels, so the last row and column count less than the others.
    The blur pads by replication whatever the convolutions do.
    Exact for: multiples of the stride, away from the border.

    Shape:
        images: (B, C, H, W), H and W even. result: (B, C, H/2, W/2).

    Raises:
        ValueError: a side is odd.

    Source: MB of Shin et al. 2021, arXiv:2112.00384, as its authors' code has it.
    """

    stride = 2
    reach = Reach(6, stride=2)
    exact_for: Group = "interior"

    def __init__(self) -> None:
        super().__init__()
        self.blur = BlurPool2d(kernel_size=5, stride=2, padding_mode="replicate")

    def forward(self, images: Tensor) -> Tensor:
        """Pool, then blur."""
        height, width = images.shape[-2:]
        require(height % 2 == width % 2 == 0, "images sides", "divisible by 2", f"shape {tuple(images.shape)}")
        result: Tensor = self.blur(F.max_pool2d(images, 2, stride=1))
        return result


def _build(channels: int, *, padding_mode: PaddingMode) -> nn.Module:  # noqa: ARG001
    return UnpaddedMaxBlurPool()


DOWNSAMPLERS[UNPADDED_MAX_BLUR_POOL] = _build
