"""Weights of other libraries, read into the models of this one, and written back where they can be expressed."""

from te_quant.interop.vector_quantize import load_vector_quantize, reverse_bits

__all__ = ["load_vector_quantize", "reverse_bits"]
