"""What all searches share: the sizes of their tiles, the point from which they measure, and what they minimise.

Shape letters: K codes, C code size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CPU_TILE", "DEVICE_TILE", "MAX_TILE_CODES", "center_of", "half_norms_of", "origin_of"]

# Elements of the score buffer. On a CPU 4 MiB of float32 stay in cache; on an accelerator launches cost more than
# memory, and 32 MiB is still independent of N and K.
CPU_TILE = 1 << 20
DEVICE_TILE = 1 << 23
# The widest tile of codes: wider tiles leave too few rows for an efficient product.
MAX_TILE_CODES = 4096
# The middle of the codes is taken from about so many of them.
_CENTER_CODES = 16


def center_of(codebook: Tensor) -> Tensor:
    """Return any point amid the codes: (K, C) -> (C,)."""
    # A median of some, not the mean, which one runaway code would drag along. By sorting, since torch.median is
    # refused on CUDA where deterministic algorithms are asked for.
    some = codebook[:: max(1, len(codebook) // _CENTER_CODES)]
    return some.sort(0).values[(len(some) - 1) // 2]


def origin_of(center: Tensor, dot: bool) -> Tensor:
    """Return the point from which latents are measured: the ``center`` (C,) of the codes, or zero for products."""
    return torch.zeros_like(center) if dot else center


def half_norms_of(centered: Tensor, dot: bool) -> Tensor:
    """Return what is added to minus the product with each code: (K, C) -> (K,); nothing where products decide."""
    return centered.new_zeros(len(centered)) if dot else centered.square().sum(1).mul_(0.5)
