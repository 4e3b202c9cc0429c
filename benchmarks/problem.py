"""Latents and codes of a given size, and whether indices are those of the nearest codes.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import Unavailable

__all__ = ["MEMORY_LIMIT", "Problem", "Size", "require_memory"]

MEMORY_LIMIT = 6 * 2**30
"""Bytes; a contender that would need more is skipped."""

# Rows that are compared with float64, spread over all.
_CHECKED = 256
# Of |z|² + |e|²: a float32 sum of squares is this exact, and a code that is worse by more is a wrong one.
_TOLERANCE = 1e-5


class Size(NamedTuple):
    """N latents, K codes, C entries each."""

    N: int
    K: int
    C: int

    @property
    def label(self) -> str:
        """For a key."""
        return f"N{self.N}-K{self.K}-C{self.C}"


@dataclass(frozen=True)
class Problem:
    """Standard normal latents and codes in float32, the same for every contender.

    Args:
        size: N, K and C.
        device: where they lie.
        sets: how many different latents take turns. On an accelerator one would stay in cache.
        seed: of all numbers.
    """

    size: Size
    device: torch.device
    sets: int = 1
    seed: int = 0

    @cached_property
    def codebook(self) -> Tensor:
        """(K, C)."""
        return self._normal(0, self.size.K)

    @cached_property
    def latents(self) -> list[Tensor]:
        """(N, C) each."""
        return [self._normal(1 + number, self.size.N) for number in range(self.sets)]

    @cached_property
    def upstream(self) -> Tensor:
        """(N, C), the gradient that comes from a decoder."""
        return self._normal(1 + self.sets, self.size.N)

    def verdict(self, indices: Tensor, number: int = 0) -> str | None:
        """``None`` if every index checked is that of a nearest code, up to float32's own rounding."""
        size = self.size
        if indices.shape != (size.N,) or indices.dtype.is_floating_point:
            return f"indices are {tuple(indices.shape)} {indices.dtype}, not ({size.N},) integers"
        if int(indices.min()) < 0 or int(indices.max()) >= size.K:
            return "indices lie outside of the codebook"
        rows = torch.arange(0, size.N, max(1, size.N // _CHECKED), device=self.device)
        latents, codes = self.latents[number][rows].double(), self.codebook.double()
        norms = codes.square().sum(1)
        distances = norms - 2 * latents @ codes.T
        excess = distances.gather(1, indices[rows, None]).squeeze(1) - distances.amin(1)
        wrong = excess > _TOLERANCE * (latents.square().sum(1) + norms.max())
        count = int(wrong.sum())
        return f"{count} of {len(rows)} indices are not those of the nearest code" if count else None

    def _normal(self, stream: int, rows: int) -> Tensor:
        # Drawn where they lie: a CPU would take longer for some sizes than a GPU for everything that follows.
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + stream)
        return torch.randn(rows, self.size.C, generator=generator, device=self.device)


def require_memory(size: Size, bytes_per_pair: int) -> None:
    """Refuse a contender that holds so many bytes for each pair of a latent and a code.

    Raises:
        Unavailable: together they exceed :data:`MEMORY_LIMIT`.
    """
    needed = size.N * size.K * bytes_per_pair
    if needed > MEMORY_LIMIT:
        text = f"would hold about {needed / 2**30:.1f} GiB, more than {MEMORY_LIMIT / 2**30:g} GiB"
        raise Unavailable("skipped", text)
