"""Numbers so large or small that float32 cannot hold their squares.

A square overflows from 2e19 on and loses accuracy below 1e-19. Nothing that is trained gets there, but latents and
codes may.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LARGE", "SMALL", "moderating"]

SMALL, LARGE = 2.0**-40, 2.0**40
"""Between these, squares and sums of squares are ordinary numbers."""


def moderating(sizes: Tensor) -> Tensor:
    """Return factors that bring numbers of these sizes, >= 0, to the nearer limit; exactly 1 between the two.

    The factor of a size of zero is finite.
    """
    sizes = sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    return sizes.clamp(SMALL, LARGE) / sizes
