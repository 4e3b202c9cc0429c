"""The arithmetic of residual quantization, the same in ``forward``, ``encode`` and ``decode``.

Shape letters: N latent vectors, C code size, K codes a codebook, Q codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant._checks import require_generator
from te_quant._search import search_codes
from te_quant.quantizers._rows import Rows

__all__ = ["draw_depths", "joined", "partial_sums", "residuals", "search_residuals", "step_codes"]


def draw_depths(latents: Tensor, code_dim: int, steps: int, generator: torch.Generator | None) -> Tensor:
    """How many steps each row takes, uniform in 1..Q, one value for each element of axis 0: -> (N,) int64."""
    require_generator(generator)
    batch, positions = latents.shape[0], math.prod(latents.shape[1:]) // code_dim
    # In place, because a compiler that knows no batch size cannot trace torch.randint with a generator.
    drawn = torch.empty(batch, 1, device=latents.device).uniform_(generator=generator) * steps
    return (drawn.long().clamp_max(steps - 1) + 1).expand(batch, positions).reshape(-1)


def step_codes(chosen: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """The code of every step, zero where the index is -1: (..., Q), Q of (K, C) -> Q of (..., C)."""
    return [_codes(indices, table) for indices, table in zip(chosen.unbind(-1), tables, strict=True)]


def partial_sums(codes: Sequence[Tensor]) -> list[Tensor]:
    """0, the first, the first two, ...: Q of (..., C) -> Q + 1 of (..., C)."""
    sums = [torch.zeros_like(codes[0])]
    for code in codes:
        sums.append(sums[-1] + code)
    return sums


def search_residuals(vectors: Tensor, tables: Sequence[Tensor], depths: Tensor | None) -> Tensor:
    """The nearest code to what the steps before left over: (N, C), Q of (K, C), (N,) -> (N, Q) int64.

    Args:
        vectors: the latents.
        tables: the codebook of every step.
        depths: how many steps a row takes, -1 standing for the others; None for all.
    """
    total = torch.zeros_like(vectors)
    chosen = []
    for step, table in enumerate(tables):
        indices = search_codes(vectors - total, table)
        if depths is not None:
            indices = torch.where(depths > step, indices, -1)
        total = total + _codes(indices, table.detach())
        chosen.append(indices)
    return torch.stack(chosen, dim=1)


def residuals(rows: Rows, sums: Sequence[Tensor], chosen: Tensor, *, dropped: bool) -> list[Rows]:
    """What each step had to quantize, without weight where it was not used.

    Args:
        rows: the latents.
        sums: Q (N, C) sums of the codes before each step; no gradient passes into them.
        chosen: (N, Q).
        dropped: some of ``chosen`` may be -1.
    """
    steps = []
    for before, indices in zip(sums, chosen.unbind(1), strict=True):
        vectors, searchable = rows.vectors - before.detach(), rows.searchable - before.detach()
        weights = rows.weights
        if dropped:
            used = (indices >= 0).to(vectors.dtype).unsqueeze(1)
            weights = used if weights is None else weights * used
        if weights is not None:
            vectors, searchable = vectors * weights, searchable * weights
        steps.append(Rows(vectors, searchable, weights))
    return steps


def joined(steps: Sequence[Rows]) -> Rows:
    """Rows of all steps, one step after the other: Q of (N, C) -> (Q*N, C)."""
    vectors, searchable, weights = zip(*steps, strict=True)
    return Rows(torch.cat(vectors), torch.cat(searchable), None if weights[0] is None else torch.cat(weights))


def _codes(indices: Tensor, table: Tensor) -> Tensor:
    return torch.where((indices >= 0).unsqueeze(-1), F.embedding(indices.clamp_min(0), table), 0.0)
