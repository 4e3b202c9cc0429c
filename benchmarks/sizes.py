"""Which sizes are measured.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

from benchmarks.problem import Size

__all__ = ["MEMORY_SIZES", "SIZES", "growth_sizes"]

SIZES: dict[str, tuple[Size, ...]] = {
    "quick": (Size(4096, 256, 8), Size(1024, 1024, 32), Size(1024, 1024, 128)),
    "full": (
        # Small ones, where calls cost more than arithmetic.
        Size(4096, 256, 8),
        Size(4096, 256, 64),
        Size(4096, 1024, 32),
        Size(4096, 1024, 128),
        # Those of tokenizers.
        Size(16384, 1024, 64),
        Size(16384, 1024, 256),
        Size(16384, 8192, 32),
        Size(16384, 8192, 256),
        Size(8192, 16384, 8),
        Size(65536, 2048, 128),
        # Corners: many latents, many codes.
        Size(262144, 256, 8),
        Size(262144, 1024, 8),
        Size(262144, 1024, 64),
        Size(4096, 65536, 64),
    ),
}
"""For search and quantizers, by grid."""

MEMORY_SIZES: dict[str, tuple[Size, ...]] = {
    "quick": (Size(4096, 1024, 64),),
    "full": (Size(16384, 1024, 64), Size(65536, 16384, 64)),
}
"""For peak memory, by grid."""

_GROWTH = {
    "quick": ((1024, 4096), (256, 1024), 256, 1024),
    "full": ((4096, 16384, 65536, 262144), (256, 1024, 4096, 16384, 65536), 1024, 4096),
}


def growth_sizes(grid: str) -> dict[str, tuple[Size, ...]]:
    """Along N with K fixed, and along K with N fixed; C = 64."""
    many_latents, many_codes, K, N = _GROWTH[grid]
    return {
        "N": tuple(Size(count, K, 64) for count in many_latents),
        "K": tuple(Size(N, count, 64) for count in many_codes),
    }
