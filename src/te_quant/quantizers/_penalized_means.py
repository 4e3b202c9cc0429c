"""The codebook that fits running means of the latents, with or without the orthogonality penalty.

Shape letters: K codes, C code size.

Without a penalty the best codebook is the running mean of each code's latents, and the moving-average update of
van den Oord et al. simply writes it. A penalty that is only added to the loss cannot last under that update: the
next step writes the means again. Here the codebook minimizes both together,

    F(e) = Σ_k (w_k / C) ‖e_k - m_k‖² + λ · ‖ÊÊᵀ - I‖²_F / n²,

w_k the share and m_k the mean of the latents of code k, n the number of codes under the penalty: the objective
that the codebook follows under gradient training, with the running statistics in place of one batch. Each step
takes one majorize-minimize step, which is the plain moving average where λ = 0. (The curvature is bounded where
the step starts. That F falls is therefore tested on random problems, not proven.)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["penalized_means", "smoothed"]


def smoothed(usage: Tensor, epsilon: float) -> Tensor:
    """Laplace smoothing: the same total, no count at zero. Source: van den Oord et al. 2017, appendix A.1."""
    total = usage.sum()
    return (usage + epsilon) / (total + usage.shape[0] * epsilon) * total


def penalized_means(
    codebook: Tensor,
    means: Tensor,
    shares: Tensor,
    weight: float,
    mask: Tensor | None = None,
    *,
    unit: bool = False,
) -> Tensor:
    """One majorize-minimize step on F from ``codebook``.

    With e = ρ·u and u of unit length, F is minimal in ρ at ρ = u·m, linear in u in its first term, and its
    second term has curvature at most 12·σ²/n² (σ² the largest eigenvalue of ÊᵀÊ, bounded here by its Frobenius
    norm). Minimizing that bound over the unit sphere gives the next u in closed form.

    Args:
        codebook: (K, C) where the step starts.
        means: (K, C), m.
        shares: (K,), w, summing to 1.
        weight: λ > 0.
        mask: (K,) bool, the codes under the penalty, all if None.
        unit: only the directions of the codes count, as under cosine similarity: ρ is 1 in F.

    Returns:
        (K, C), the next codebook; rows outside the mask mean nothing.
    """
    tiny = torch.finfo(codebook.dtype).tiny ** 0.5
    norms = codebook.norm(dim=1, keepdim=True)
    # A zero code has no direction yet; its mean is the best first guess.
    start = torch.where(norms > tiny, codebook, means)
    units = torch.nn.functional.normalize(start, dim=1, eps=tiny)
    radii = (units * means).sum(1, keepdim=True)
    # The penalty does not see signs, so a code whose mean lies behind it turns around.
    units, radii = torch.where(radii < 0, -units, units), radii.abs()
    penalized = units if mask is None else units * mask.unsqueeze(1)
    count = units.shape[0] if mask is None else mask.sum().clamp_min(1)
    if units.shape[0] > units.shape[1]:
        gram = penalized.T @ penalized
        product = penalized @ gram
    else:
        gram = penalized @ penalized.T
        product = gram @ penalized
    scale = weight / (count * count)
    pull = (2 / units.shape[1]) * shares.unsqueeze(1) * (means if unit else radii * means)
    target = scale * ((12 * gram.norm() + 4) * units - 4 * product) + pull
    units = torch.nn.functional.normalize(target, dim=1, eps=tiny)
    radii = (units * means).sum(1, keepdim=True)
    # A radius of zero would forget the direction; a negative one is as good as a positive one.
    return torch.where(radii.abs() > tiny, radii, tiny) * units
