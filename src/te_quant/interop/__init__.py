"""Weights of other libraries, read into models of this one, and written back where they can be expressed there."""

from te_quant.interop.diffusers import load_diffusers, save_diffusers
from te_quant.interop.gpt2 import load_gpt2
from te_quant.interop.llamagen import load_llamagen
from te_quant.interop.taming import load_taming
from te_quant.interop.te_vqgan import load_te_vqgan
from te_quant.interop.vector_quantize import load_vector_quantize, reverse_bits

__all__ = [
    "load_diffusers",
    "load_gpt2",
    "load_llamagen",
    "load_taming",
    "load_te_vqgan",
    "load_vector_quantize",
    "reverse_bits",
    "save_diffusers",
]
