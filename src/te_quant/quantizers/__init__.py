"""Quantizers: latents in, codes and indices out."""

from te_quant.quantizers.base import QuantizerOutput
from te_quant.quantizers.vector import VectorQuantizer

__all__ = ["QuantizerOutput", "VectorQuantizer"]
