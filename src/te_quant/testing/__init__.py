"""Shift equivariance as a test: measure it, judge it, and draw the inputs with hypothesis.

Only the strategies need hypothesis (``te_quant[testing]``).
"""

from te_quant.testing.assertion import TOLERANCES, assert_shift_equivariant
from te_quant.testing.difference import ShiftDifference, TokenShift, equivariance_error, phase_token_shift
from te_quant.testing.strategies import codebooks, image_sides, images, latents_off_boundaries, shifts

__all__ = [
    "TOLERANCES",
    "ShiftDifference",
    "TokenShift",
    "assert_shift_equivariant",
    "codebooks",
    "equivariance_error",
    "image_sides",
    "images",
    "latents_off_boundaries",
    "phase_token_shift",
    "shifts",
]
