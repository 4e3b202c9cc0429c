"""Small helpers that tests of every area use."""

from __future__ import annotations

import re

import numpy as np
import torch

__all__ = ["exactly", "numpy_generator"]


def exactly(message: str) -> str:
    """Return a pattern for ``match=`` that the whole message must equal."""
    return f"^{re.escape(message)}$"


def numpy_generator() -> np.random.Generator:
    """Return a new generator, seeded from torch's global state, which ``conftest.py`` seeds before each test.

    Every call returns another stream. ``np.random.default_rng()`` would be different in every run.
    """
    return np.random.default_rng(int(torch.randint(2**63 - 1, ())))
