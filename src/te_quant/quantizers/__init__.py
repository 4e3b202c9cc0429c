"""Quantizers: latents in, codes and indices out."""

from te_quant.quantizers.base import QuantizerOutput
from te_quant.quantizers.fsq import FSQ
from te_quant.quantizers.lfq import LFQ
from te_quant.quantizers.residual import ResidualVectorQuantizer
from te_quant.quantizers.sim import SimVQ
from te_quant.quantizers.vector import VectorQuantizer

__all__ = ["FSQ", "LFQ", "QuantizerOutput", "ResidualVectorQuantizer", "SimVQ", "VectorQuantizer"]
