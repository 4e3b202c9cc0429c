"""The nearest code in one expression of torch's own operators, for exported graphs and function transforms.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_quant._search import tiles

__all__ = ["plain_search"]


def plain_search(
    latents: Tensor,
    codebook: Tensor,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    dot: bool = False,
) -> Tensor:
    """Return the index of the nearest code, or of a drawn one, for each row, from a table of all N x K scores.

    Two codes that are equal may round to different scores, so that the second of them may be chosen.

    Args:
        latents: z, before quantization.
        codebook: e.
        temperature: 0 takes the nearest code; above, code e has probability ∝ exp(-‖z - e‖² / (2 · temperature)).
        generator: of the draws; the global one if None.
        dot: compare by the product z·e, with probabilities ∝ exp(z·e / temperature).

    Shape:
        latents: (N, C). codebook: (K, C). Returns (N,) int64.
    """
    center = tiles.center_of(codebook)
    centered = codebook - center
    origin = tiles.origin_of(center, dot)
    if not temperature:
        factors, terms = tiles.factors_of(centered, dot)
        return torch.addmm(terms, latents - origin, factors.T, alpha=-1).argmin(1)
    scores = torch.addmm(tiles.half_norms_of(centered, dot), latents - origin, centered.T, alpha=-1)
    # Gumbel-max: -log of an exponential variate is a Gumbel variate.
    noise = torch.empty_like(scores).exponential_(generator=generator).log()
    return (scores + temperature * noise).argmin(1)
