"""The figures that the paper prints, to stand beside ours.

Source: Shin et al. 2021, arXiv:2112.00384, Tables 1, 2 and 3; mean and standard deviation over three seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["CLASSIFIER", "TABLE1", "TABLE2", "TABLE3", "Printed", "Printed3"]


CLASSIFIER = 0.995
"""Share of digits that its classifier reads (section 4.1)."""


class Printed(NamedTuple):
    """A cell of Tables 1 and 2."""

    mean: float
    deviation: float


class Printed3(NamedTuple):
    """A row of Table 3 for one tokenizer."""

    codes: int
    reconstruction: float
    perceptual: float


def _row(*cells: tuple[float, float]) -> tuple[Printed, ...]:
    return tuple(Printed(*cell) for cell in cells)


# By our name of the arm, then of the task: Quad1 to Quad4.
TABLE1: Mapping[str, Mapping[str, tuple[Printed, ...]]] = {
    "mb": {
        "text_to_image": _row((0.724, 0.033), (0.697, 0.066), (0.635, 0.067), (0.620, 0.077)),
        "image_to_text": _row((0.587, 0.032), (0.507, 0.021), (0.433, 0.013), (0.378, 0.020)),
    },
    "mp": {
        "text_to_image": _row((0.713, 0.007), (0.703, 0.015), (0.669, 0.017), (0.656, 0.028)),
        "image_to_text": _row((0.561, 0.042), (0.500, 0.038), (0.412, 0.034), (0.360, 0.039)),
    },
    "cb": {
        "text_to_image": _row((0.753, 0.037), (0.741, 0.034), (0.682, 0.043), (0.649, 0.055)),
        "image_to_text": _row((0.563, 0.041), (0.455, 0.056), (0.362, 0.046), (0.309, 0.043)),
    },
    "vqgan": {
        "text_to_image": _row((0.812, 0.032), (0.806, 0.030), (0.790, 0.038), (0.761, 0.051)),
        "image_to_text": _row((0.786, 0.052), (0.692, 0.063), (0.595, 0.086), (0.542, 0.106)),
    },
    "te_vqgan": {
        "text_to_image": _row((0.931, 0.033), (0.913, 0.032), (0.890, 0.048), (0.868, 0.059)),
        "image_to_text": _row((0.825, 0.037), (0.713, 0.066), (0.621, 0.061), (0.554, 0.065)),
    },
}

# Quad1, text to image, by size of the training set.
TABLE2: Mapping[int, Mapping[str, Printed]] = {
    300_000: {"vqgan": Printed(0.812, 0.032), "te_vqgan": Printed(0.931, 0.033)},
    100_000: {"vqgan": Printed(0.739, 0.037), "te_vqgan": Printed(0.919, 0.022)},
}

TABLE3: Mapping[str, Mapping[str, Printed3]] = {
    "mnist": {"vqgan": Printed3(252, 0.0079, 0.0036), "te_vqgan": Printed3(14, 0.0084, 0.0048)},
    "fashion-mnist": {"vqgan": Printed3(250, 0.0150, 0.0108), "te_vqgan": Printed3(18, 0.0187, 0.0198)},
}
