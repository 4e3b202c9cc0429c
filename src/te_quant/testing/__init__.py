"""Shift equivariance as a test, inputs drawn with hypothesis, and conformance checks for quantizers and layers.

Only the strategies need hypothesis (``te_quant[testing]``).
"""

from te_quant.testing.assertion import TOLERANCES, assert_shift_equivariant
from te_quant.testing.conformance import QUANTIZER_CHECKS, QuantizerFactory, check_quantizer
from te_quant.testing.difference import ShiftDifference, TokenShift, equivariance_error, phase_token_shift
from te_quant.testing.downsample import check_downsample
from te_quant.testing.strategies import codebooks, image_sides, images, latents_off_boundaries, shifts

__all__ = [
    "QUANTIZER_CHECKS",
    "TOLERANCES",
    "QuantizerFactory",
    "ShiftDifference",
    "TokenShift",
    "assert_shift_equivariant",
    "check_downsample",
    "check_quantizer",
    "codebooks",
    "equivariance_error",
    "image_sides",
    "images",
    "latents_off_boundaries",
    "phase_token_shift",
    "shifts",
]
