"""The two distance terms of a quantizer's loss.

Shape letters: N latent vectors, C code size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_quant.quantizers._layout import Rows

__all__ = ["distance_losses"]


def distance_losses(
    rows: Rows, codes: Tensor, commitment_weight: float, *, codebook_follows: bool
) -> tuple[Tensor, Tensor]:
    """The weighted codebook and commitment terms: mean squared differences over the rows that count.

    Args:
        rows: the latents.
        codes: of each row.
        commitment_weight: β.
        codebook_follows: the codebook takes gradients; its term is zero otherwise.

    Shape:
        codes: (N, C). Returns (), ().

    Source: van den Oord et al. 2017, arXiv:1711.00937, Eq. 3.
    """
    vectors = rows.vectors
    weights = vectors.new_ones(()) if rows.weights is None else rows.weights
    counted = vectors.shape[0] if rows.weights is None else rows.weights.sum()
    # An empty batch has a loss of zero, not of 0/0.
    size = counted * vectors.shape[1] + (counted == 0)
    commitment = (weights * (vectors - codes.detach()).square()).sum() / size
    if not codebook_follows:
        return torch.zeros_like(commitment), commitment_weight * commitment
    codebook = (weights * (vectors.detach() - codes).square()).sum() / size
    return codebook, commitment_weight * commitment
