"""The nearest code in one expression of torch's own operators, for exported graphs and function transforms.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_quant._search import tiles

__all__ = ["plain_search"]


def plain_search(
    latents: Tensor, codebook: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return the index of the nearest code, or of a drawn one, for each row, from a table of all N x K scores.

    Two codes that are equal may round to different scores, so that the second of them may be chosen.

    Args:
        latents: z, before quantization.
        codebook: e.
        temperature: 0 takes the nearest code; above, code e has probability ∝ exp(-‖z - e‖² / (2 · temperature)).
        generator: of the draws; the global one if None.

    Shape:
        latents: (N, C). codebook: (K, C). Returns (N,) int64.
    """
    center = tiles.center_of(codebook)
    centered = codebook - center
    if not temperature:
        factors, terms = tiles.factors_of(centered)
        return torch.addmm(terms, latents - center, factors.T, alpha=-1).argmin(1)
    scores = torch.addmm(0.5 * centered.square().sum(1), latents - center, centered.T, alpha=-1)
    # Gumbel-max: -log of an exponential variate is a Gumbel variate.
    noise = torch.empty_like(scores).exponential_(generator=generator).log()
    return (scores + temperature * noise).argmin(1)
