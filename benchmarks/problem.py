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

# Rows that are compared with float64, spread over all, and distances that are held at once for it.
_CHECKED = 4096
_HELD = 1 << 19
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
    def _oracles(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        # Once for all contenders: at the largest sizes it takes seconds.
        return {}

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
        rows, lowest, longest = self._oracle(number)
        latents, codes = self.latents[number][rows].double(), self.codebook[indices[rows]].double()
        excess = codes.square().sum(1) - 2 * (latents * codes).sum(1) - lowest
        wrong = excess > _TOLERANCE * (latents.square().sum(1) + longest)
        count = int(wrong.sum())
        return f"{count} of {len(rows)} indices are not those of the nearest code" if count else None

    def _oracle(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows checked, ‖e‖² - 2·z·e of their nearest codes, and the largest ‖e‖², in float64."""
        if number not in self._oracles:
            count = min(self.size.N, _CHECKED)
            rows = torch.arange(count, device=self.device) * self.size.N // count
            latents = self.latents[number][rows].double()
            lowest = latents.new_full((count,), torch.inf)
            longest = latents.new_zeros(())
            # Some codes at a time: all distances at once would be gigabytes.
            for codes in self.codebook.split(max(1, _HELD // count)):
                wide = codes.double()
                norms = wide.square().sum(1)
                lowest = torch.minimum(lowest, torch.addmm(norms, latents, wide.T, alpha=-2).amin(1))
                longest = torch.maximum(longest, norms.max())
            self._oracles[number] = rows, lowest, longest
        return self._oracles[number]

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
