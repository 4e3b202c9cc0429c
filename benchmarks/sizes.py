"""Which sizes are measured.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

from benchmarks.problem import Size

__all__ = ["MEMORY_SIZES", "ONE_THREAD", "SEARCH_SIZES", "SIZES", "growth_sizes"]

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
"""For quantizers, by grid; searches have them too."""

SEARCH_SIZES: dict[str, tuple[Size, ...]] = {
    "quick": SIZES["quick"],
    "full": (
        *SIZES["full"],
        # Codes of current tokenizers are short. Batches and codebooks need not be powers of two: 196 tokens are an
        # image of 14 x 14.
        Size(1000, 256, 4),
        Size(10000, 65536, 4),
        Size(16384, 1024, 4),
        Size(20000, 8192, 4),
        Size(65536, 4096, 4),
        Size(1000000, 512, 4),
        Size(1000, 1024, 8),
        Size(2048, 2048, 8),
        Size(4096, 262144, 8),
        Size(6000, 1000, 8),
        Size(16384, 16384, 8),
        Size(65536, 1024, 8),
        Size(100000, 10000, 8),
        Size(1000000, 1024, 8),
        Size(1000, 4096, 12),
        Size(64 * 196, 1024, 12),
        Size(50000, 16384, 12),
        Size(1024 * 196, 8192, 12),
        Size(1000, 16384, 16),
        Size(4096, 1024, 16),
        Size(10000, 10000, 16),
        Size(25000, 16384, 16),
        Size(100000, 4096, 16),
        Size(1000000, 256, 16),
        Size(1000, 1024, 32),
        Size(10000, 16384, 32),
        Size(64 * 196, 8192, 32),
        Size(262144, 1024, 32),
        # Long codes.
        Size(1000, 262144, 64),
        Size(32 * 196, 1024, 64),
        Size(10000, 16384, 64),
        Size(50000, 1000, 64),
        Size(1000, 8192, 128),
        Size(64 * 196, 1024, 128),
        Size(6000, 65536, 128),
        Size(100000, 1000, 128),
        Size(1000, 16384, 256),
        Size(4096, 256, 256),
        Size(1000, 65536, 256),
        Size(256 * 196, 1024, 256),
        Size(250000, 256, 256),
    ),
}
"""For the search, by grid: at most 10^12 operations each."""

ONE_THREAD: dict[str, tuple[Size, ...]] = {
    "quick": (),
    "full": (
        Size(1000, 1024, 32),
        Size(4096, 1024, 16),
        Size(16384, 1024, 256),
        Size(16384, 8192, 32),
        Size(65536, 1024, 8),
    ),
}
"""Of these, those that are measured with one thread as well."""

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
