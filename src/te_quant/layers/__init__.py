"""The layers that encoders and decoders are made of."""

from te_quant.layers.activation import ACTIVATIONS, FilteredActivation, PolynomialActivation, build_activation
from te_quant.layers.blocks import PaddedConv2d, ResidualBlock, SelfAttention2d
from te_quant.layers.blur import BlurPool2d
from te_quant.layers.downsample import (
    DOWNSAMPLERS,
    ConvBlurPool,
    ConvFourier,
    ConvPolyphase,
    MaxBlurPool,
    MaxPool,
    StridedConv,
    build_downsample,
)
from te_quant.layers.fourier import FourierDownsample2d, FourierUpsample2d
from te_quant.layers.norm import NORMS, ChannelNorm, build_norm, group_norm
from te_quant.layers.polyphase import PolyphaseDownsample2d, PolyphaseUpsample2d
from te_quant.layers.upsample import (
    UPSAMPLERS,
    BlurUpsample,
    BlurUpsample2d,
    FourierUpsample,
    NearestUpsample,
    PolyphaseUpsample,
    build_upsample,
)

__all__ = [
    "ACTIVATIONS",
    "DOWNSAMPLERS",
    "NORMS",
    "UPSAMPLERS",
    "BlurPool2d",
    "BlurUpsample",
    "BlurUpsample2d",
    "ChannelNorm",
    "ConvBlurPool",
    "ConvFourier",
    "ConvPolyphase",
    "FilteredActivation",
    "FourierDownsample2d",
    "FourierUpsample",
    "FourierUpsample2d",
    "MaxBlurPool",
    "MaxPool",
    "NearestUpsample",
    "PaddedConv2d",
    "PolynomialActivation",
    "PolyphaseDownsample2d",
    "PolyphaseUpsample",
    "PolyphaseUpsample2d",
    "ResidualBlock",
    "SelfAttention2d",
    "StridedConv",
    "build_activation",
    "build_downsample",
    "build_norm",
    "build_upsample",
    "group_norm",
]
