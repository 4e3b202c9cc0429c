"""The layers that encoders and decoders are made of.

Names list the operations in order: ``ConvBlurPool`` convolves, then blurs; ``BlurUpsampleConv`` enlarges with a
blur, then convolves; ``BlurPool2d``, ``BlurUpsample2d`` and their Fourier and polyphase relatives resample without
weights. The layers of the paper keep its names (``StridedConv``, ``MaxPool``, ``MaxBlurPool``, ``ConvBlurPool``).

Every layer states its ``reach`` and the shifts that it is ``exact_for`` (:mod:`te_quant.contract`).
"""

from te_quant.filters import PADDING_MODES, PaddingMode
from te_quant.layers.activation import (
    ACTIVATIONS,
    Activation,
    FilteredActivation,
    PolynomialActivation,
    build_activation,
)
from te_quant.layers.blocks import PaddedConv2d, ResidualBlock, SelfAttention2d
from te_quant.layers.blur import BlurPool2d
from te_quant.layers.downsample import (
    DOWNSAMPLERS,
    ConvBlurPool,
    ConvFourierDownsample,
    ConvPolyphaseDownsample,
    Downsample,
    DownsampleFactory,
    MaxBlurPool,
    MaxPool,
    StridedConv,
    UnpaddedMaxBlurPool,
    build_downsample,
)
from te_quant.layers.fourier import FourierDownsample2d, FourierUpsample2d
from te_quant.layers.norm import NORMS, ChannelNorm, Norm, build_norm, group_norm
from te_quant.layers.polyphase import PolyphaseDownsample2d, PolyphaseUpsample2d
from te_quant.layers.stating import derived, in_series, statement_of
from te_quant.layers.upsample import (
    UPSAMPLERS,
    BlurUpsample2d,
    BlurUpsampleConv,
    FourierUpsampleConv,
    NearestUpsampleConv,
    PolyphaseUpsampleConv,
    Upsample,
    UpsampleFactory,
    build_upsample,
)

__all__ = [
    "ACTIVATIONS",
    "DOWNSAMPLERS",
    "NORMS",
    "PADDING_MODES",
    "UPSAMPLERS",
    "Activation",
    "BlurPool2d",
    "BlurUpsample2d",
    "BlurUpsampleConv",
    "ChannelNorm",
    "ConvBlurPool",
    "ConvFourierDownsample",
    "ConvPolyphaseDownsample",
    "Downsample",
    "DownsampleFactory",
    "FilteredActivation",
    "FourierDownsample2d",
    "FourierUpsample2d",
    "FourierUpsampleConv",
    "MaxBlurPool",
    "MaxPool",
    "NearestUpsampleConv",
    "Norm",
    "PaddedConv2d",
    "PaddingMode",
    "PolynomialActivation",
    "PolyphaseDownsample2d",
    "PolyphaseUpsample2d",
    "PolyphaseUpsampleConv",
    "ResidualBlock",
    "SelfAttention2d",
    "StridedConv",
    "UnpaddedMaxBlurPool",
    "Upsample",
    "UpsampleFactory",
    "build_activation",
    "build_downsample",
    "build_norm",
    "build_upsample",
    "derived",
    "group_norm",
    "in_series",
    "statement_of",
]
