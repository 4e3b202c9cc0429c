"""What all searches share: the sizes of their tiles, and the point from which they measure distances.

Shape letters: K codes, C code size.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["CPU_TILE", "DEVICE_TILE", "MAX_TILE_CODES", "center_of"]

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
