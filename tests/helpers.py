"""Small helpers that tests of every area use."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import torch

from te_quant import ResidualVectorQuantizer, VectorQuantizer

__all__ = ["exactly", "not_finite", "numpy_generator", "plain_quantizer", "plain_residual"]

_PLAIN: dict[str, Any] = {
    "codebook_update": "gradient",
    "commitment_weight": 0.25,
    "decay": 0.99,
    "revival_threshold": 0.0,
}

plain_quantizer = partial(VectorQuantizer, **_PLAIN)
"""A codebook that only moves by what the test is about: by default a parameter, and no code is ever replaced."""

plain_residual = partial(ResidualVectorQuantizer, **_PLAIN)
"""Codebooks of which the same is true."""


def exactly(message: str) -> str:
    """Return a pattern for ``match=`` that the whole message must equal."""
    return f"^{re.escape(message)}$"


def not_finite(bad: int, total: int) -> str:
    """Return what a quantizer says about ``bad`` of ``total`` latent values."""
    found = f"latents must be finite, got {bad} NaN or infinite of {total} values"
    return f"{found}; build the quantizer with nonfinite='skip' to leave such vectors out."


def numpy_generator() -> np.random.Generator:
    """Return a new generator, seeded from torch's global state, which ``conftest.py`` seeds before each test.

    Every call returns another stream. ``np.random.default_rng()`` would be different in every run.
    """
    return np.random.default_rng(int(torch.randint(2**63 - 1, ())))
