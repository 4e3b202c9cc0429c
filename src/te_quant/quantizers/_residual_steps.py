"""The steps of residual quantization: their arithmetic, and how their codebooks move, start and are revived.

Codebooks move together after a step; at a restart one follows the other.

Shape letters: N latent vectors, C code size, K codes per codebook, Q steps, S codebooks: Q, or 1 for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant._precision import widen
from te_quant._search import search_codes
from te_quant.functional import orthogonality
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._update import observe
from te_quant.quantizers.vector import VectorQuantizer

__all__ = [
    "draw_depths",
    "joined",
    "mean_penalty",
    "observe_stages",
    "partial_sums",
    "residuals",
    "revive_stages",
    "search_residuals",
    "start_stages",
    "step_codes",
    "tables_of",
]


def draw_depths(rows: Rows, steps: int, generator: torch.Generator | None) -> Tensor:
    """How many steps each row takes, uniform in 1..Q, one value for each element of axis 0: -> (N,) int64."""
    batch, positions = rows.grid[0], math.prod(rows.grid[1:])
    # In place, because a compiler that knows no batch size cannot trace torch.randint with a generator.
    drawn = torch.empty(batch, 1, device=rows.vectors.device).uniform_(generator=generator) * steps
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
        steps.append(Rows(vectors, searchable, weights, rows.grid))
    return steps


def joined(steps: Sequence[Rows]) -> Rows:
    """Rows of all steps, one step after the other: Q of (N, C) -> (Q*N, C)."""
    vectors, searchable, weights, _ = zip(*steps, strict=True)
    joint = torch.cat(vectors)
    weighted = None if weights[0] is None else torch.cat(weights)
    return Rows(joint, torch.cat(searchable), weighted, (joint.shape[0],))


def _codes(indices: Tensor, table: Tensor) -> Tensor:
    return torch.where((indices >= 0).unsqueeze(-1), F.embedding(indices.clamp_min(0), table), 0.0)


def tables_of(stages: Sequence[VectorQuantizer], steps: int) -> list[Tensor]:
    """The codebook of every step as it is now, at least float32: -> Q of (K, C)."""
    tables = [widen(stage.codebook) for stage in stages]
    return tables * (steps // len(tables))


def mean_penalty(stages: Sequence[VectorQuantizer]) -> Tensor:
    """The orthogonality penalty without λ, the mean over the codebooks: -> ()."""
    return torch.stack([orthogonality(stage.codebook) for stage in stages]).mean()


def observe_stages(stages: Sequence[VectorQuantizer], steps: Sequence[Rows], chosen: Tensor) -> None:
    """Count the codes and update every codebook that is not frozen: S, Q steps of N rows, (N, Q) indices.

    A shared codebook sees all steps at once. Were it moved between them, the code of an early step would no longer
    be what its index decodes to.
    """
    picks = list(chosen.clamp_min(0).unbind(1))
    if len(stages) < len(steps):
        steps, picks = [joined(steps)], [torch.cat(picks)]
    for stage, rows, indices in zip(stages, steps, picks, strict=True):
        if not stage.frozen:
            group, weight = stage._group.resolve(), stage.orthogonal_reg
            observe(stage._state(), rows, indices, decay=stage.decay, group=group, orthogonal_reg=weight)


def start_stages(
    stages: Sequence[VectorQuantizer], left: Tensor, iterations: int, generator: torch.Generator | None
) -> None:
    """k-means of (N, C) rows, then of what its centres leave of them, and so on."""
    _refuse_frozen(stages, "kmeans_init")
    for stage in stages:
        stage.kmeans_init(left, iterations=iterations, generator=generator)
        left = _after(stage, left)


def revive_stages(
    stages: Sequence[VectorQuantizer],
    steps: int,
    left: Tensor,
    threshold: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Revive the dead codes of every codebook, using the residuals of the steps that share it: -> (S, K) bool."""
    _refuse_frozen(stages, "revive_dead_codes")
    revived = []
    for stage in stages:
        pool = [left]
        while len(pool) < steps // len(stages):
            pool.append(_after(stage, pool[-1]))
        revived.append(stage.revive_dead_codes(torch.cat(pool), threshold=threshold, generator=generator))
        left = _after(stage, left)
    return torch.stack(revived)


def _refuse_frozen(stages: Sequence[VectorQuantizer], method: str) -> None:
    # Before anything moves: to start only half of the codebooks again would be worse than none.
    for stage in stages:
        stage._refuse_frozen(method)


def _after(stage: VectorQuantizer, rows: Tensor) -> Tensor:
    return rows - stage.decode(stage.encode(rows))
