"""The nearest code in one expression of torch's own operators, for exported graphs and function transforms.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_quant._search import tiles

__all__ = ["plain_argmin"]


def plain_argmin(latents: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest code for each row, from a table of all N x K scores.

    Shape:
        latents: (N, C). codebook: (K, C). Returns (N,) int64.
    """
    center = tiles.center_of(codebook)
    centered = codebook - center
    scores = torch.addmm(0.5 * centered.square().sum(1), latents - center, centered.T, alpha=-1)
    return scores.argmin(1)
