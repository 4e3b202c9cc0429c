"""Small helpers that tests of every area use."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import torch

from te_quant import VectorQuantizer

__all__ = ["exactly", "numpy_generator", "plain_quantizer"]

plain_quantizer = partial(
    VectorQuantizer, codebook_update="gradient", commitment_weight=0.25, decay=0.99, revival_threshold=0.0
)
"""A codebook that only moves by what the test is about: by default a parameter, and no code is ever replaced."""


def exactly(message: str) -> str:
    """Return a pattern for ``match=`` that the whole message must equal."""
    return f"^{re.escape(message)}$"


def numpy_generator() -> np.random.Generator:
    """Return a new generator, seeded from torch's global state, which ``conftest.py`` seeds before each test.

    Every call returns another stream. ``np.random.default_rng()`` would be different in every run.
    """
    return np.random.default_rng(int(torch.randint(2**63 - 1, ())))
