"""What all searches share: sizes of tiles, the point and the scale in which they measure, and what they minimize.

Shape letters: K codes, C code size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_quant._execution import wants_plain
from te_quant._magnitudes import moderating

__all__ = [
    "CPU_TILE",
    "DEVICE_TILE",
    "LONG",
    "MAX_TILE_CODES",
    "SHORT",
    "center_of",
    "factors_of",
    "half_norms_of",
    "origin_of",
    "typical_square",
]

# Elements of the score buffer. On a CPU 4 MiB of float32 stay in cache; on an accelerator launches cost more than
# memory, and 32 MiB is still independent of N and K.
CPU_TILE = 1 << 20
DEVICE_TILE = 1 << 23
# The widest tile of codes: wider tiles leave too few rows for an efficient product.
MAX_TILE_CODES = 4096
# The middle of the codes is taken from about so many of them, and their scale.
_CENTER_CODES = 16
# Squared lengths of codes in between need no scale.
SHORT, LONG = 2.0**-80, 2.0**80


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


def typical_square(codebook: Tensor, center: Tensor) -> float:
    """Return the median squared distance of some codes, (K, C), from ``center`` (C,)."""
    # As for the centre: where few codes lie far from all others, those others decide.
    squares = (codebook[:: max(1, len(codebook) // _CENTER_CODES)] - center).square().sum(1).sort().values
    return float(squares[(len(squares) - 1) // 2])


def factors_of(centered: Tensor, dot: bool = False) -> tuple[Tensor, Tensor]:
    """Return factors a and terms b of the codes, so that the score of a code for a latent z is b - z·a.

    Scores are ½‖e‖² - z·e, or -z·e with ``dot``, times a constant where codes are so large or small that float32
    cannot hold their squares.

    Shape:
        centered: (K, C), codes seen from their middle. Returns (K, C) and (K,).
    """
    half_norms = half_norms_of(centered, dot=False)
    if centered.device.type == "cpu" and not wants_plain() and SHORT <= float(half_norms.amax()) <= LONG:
        return centered, half_norms_of(centered, dot=True) if dot else half_norms
    # Of most codes, not of the largest: one runaway code would make all others vanish.
    some = centered[:: max(1, len(centered) // _CENTER_CODES)]
    sizes = torch.linalg.vector_norm(some, torch.inf, dim=1).sort().values
    factor = moderating(sizes[(3 * len(some)) // 4])
    scaled = centered * factor
    return scaled * factor, half_norms_of(scaled, dot)
