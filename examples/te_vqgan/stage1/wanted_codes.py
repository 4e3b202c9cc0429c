"""The loss of latents that should have certain codes.

Shape letters: B images, D code size, K codes, h w token grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["wanted_code_loss", "wanted_code_losses"]


def wanted_code_losses(latents: Tensor, codebook: Tensor, indices: Tensor, *, margin: float) -> Tensor:
    """Return a hinge for each token: zero where its latent is nearest to its wanted code, by a margin.

    With d the squared distance of a latent to the code that it should have and d' that to the nearest other one,
    it is max(0, (d - d') / (d + d') + margin). The scale of the codes does not matter.

    Args:
        latents: before quantization.
        codebook: the codes.
        indices: of the codes that they should have.
        margin: in [0, 1]. At 1 only a latent on its code has no loss.

    Shape:
        latents: (B, D, h, w). codebook: (K, D), K >= 2. indices: (B, h, w). Result: (B, h, w).

    Source: Sato and Yamada 1995, "Generalized learning vector quantization", Eq. 2, with the codes of the tokens
        in place of those of a class, and a hinge.
    """
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    wanted = indices.reshape(-1, 1)
    with torch.no_grad():
        # This form cancels, so it only chooses the code. The gradient flows through the two exact distances below.
        products = codebook.square().sum(1) - 2 * rows @ codebook.T
        others = products.scatter(1, wanted, math.inf).argmin(1)
    own = (rows - F.embedding(wanted.squeeze(1), codebook)).square().sum(1)
    other = (rows - F.embedding(others, codebook)).square().sum(1)
    return F.relu((own - other) / (own + other) + margin).view_as(indices)


def wanted_code_loss(
    latents: Tensor, codebook: Tensor, indices: Tensor, *, margin: float, where: Tensor | None = None
) -> Tensor:
    """Return the mean of :func:`wanted_code_losses` over the tokens.

    Args:
        latents: before quantization.
        codebook: the codes.
        indices: of the codes that they should have.
        margin: in [0, 1].
        where: tokens that count, all by default. The loss is zero if none does.

    Shape:
        latents: (B, D, h, w). codebook: (K, D), K >= 2. indices, where: (B, h, w). Result: ().
    """
    losses = wanted_code_losses(latents, codebook, indices, margin=margin)
    if where is None:
        return losses.mean()
    return (losses * where).sum() / where.sum().clamp_min(1)
