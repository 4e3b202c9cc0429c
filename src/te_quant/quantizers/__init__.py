"""Quantizers: latents in, codes and indices out."""

from te_quant.quantizers._losses import distance_losses
from te_quant.quantizers._rows import Rows
from te_quant.quantizers.base import Losses, Quantized, Quantizer, QuantizerOutput
from te_quant.quantizers.fsq import FSQ
from te_quant.quantizers.lfq import LFQ
from te_quant.quantizers.product import ProductQuantizer
from te_quant.quantizers.residual import ResidualVectorQuantizer
from te_quant.quantizers.sim import SimVQ
from te_quant.quantizers.vector import VectorQuantizer

__all__ = [
    "FSQ",
    "LFQ",
    "QUANTIZERS",
    "Losses",
    "ProductQuantizer",
    "Quantized",
    "Quantizer",
    "QuantizerOutput",
    "ResidualVectorQuantizer",
    "Rows",
    "SimVQ",
    "VectorQuantizer",
    "distance_losses",
]

QUANTIZERS: dict[str, type[Quantizer]] = {
    kind.__name__: kind for kind in (FSQ, LFQ, ProductQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer)
}
"""The classes that a config may name. Add your own here before you load a model that uses it."""
