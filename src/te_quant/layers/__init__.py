"""The layers that encoders and decoders are made of."""

from te_quant.layers.blocks import PaddedConv2d, ResidualBlock, SelfAttention2d, group_norm
from te_quant.layers.downsample import (
    DOWNSAMPLERS,
    BlurPool2d,
    ConvBlurPool,
    MaxBlurPool,
    MaxPool,
    StridedConv,
    build_downsample,
)
from te_quant.layers.upsample import NearestUpsample

__all__ = [
    "DOWNSAMPLERS",
    "BlurPool2d",
    "ConvBlurPool",
    "MaxBlurPool",
    "MaxPool",
    "NearestUpsample",
    "PaddedConv2d",
    "ResidualBlock",
    "SelfAttention2d",
    "StridedConv",
    "build_downsample",
    "group_norm",
]
