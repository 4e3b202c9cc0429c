"""The steps of residual quantization: their arithmetic, and how their codebooks start and are revived.

Codebooks move together, between two steps.

Shape letters: N latent vectors, C code size, K codes per codebook, Q steps, S codebooks: Q, or 1 for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant._execution import refuse_redraw
from te_quant._search import search_codes
from te_quant.functional import orthogonality
from te_quant.quantizers._lifecycle import kmeans, replacements
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._update import Batch, restart, revive
from te_quant.quantizers.vector import VectorQuantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "batches",
    "draw_depths",
    "joined",
    "mean_penalty",
    "partial_sums",
    "refuse_frozen",
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
    drawn = refuse_redraw(drawn, generator)
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
    tables = [stage._table() for stage in stages]
    return tables * (steps // len(tables))


def mean_penalty(stages: Sequence[VectorQuantizer]) -> Tensor:
    """The orthogonality penalty without λ, the mean over the codebooks: -> ()."""
    return torch.stack([orthogonality(stage._table().clone()) for stage in stages]).mean()


def batches(stages: Sequence[VectorQuantizer], steps: Sequence[Rows], chosen: Tensor) -> list[Batch]:
    """What every codebook that is not frozen saw: S, Q steps of N rows, (N, Q) indices.

    A shared codebook sees all steps as one batch.
    """
    picks = list(chosen.clamp_min(0).unbind(1))
    if len(stages) < len(steps):
        steps, picks = [joined(steps)], [torch.cat(picks)]
    return [
        Batch(stage._state(), rows, indices)
        for stage, rows, indices in zip(stages, steps, picks, strict=True)
        if not stage.frozen
    ]


def start_stages(
    stages: Sequence[VectorQuantizer],
    left: Tensor,
    iterations: int,
    generator: torch.Generator | None,
    group: ProcessGroup | None,
) -> None:
    """k-means of (N, C) rows, then of what its centres leave of them, and so on.

    Nothing moves before all are known.
    """
    found = []
    for table in tables_of(stages, len(stages)):
        centers = kmeans(left, table, iterations, _unchanged, generator, group)
        found.append(centers)
        left = _after(table if centers is None else centers, left)
    for stage, centers in zip(stages, found, strict=True):
        if centers is not None:
            restart(stage._state(), centers)


def revive_stages(
    stages: Sequence[VectorQuantizer],
    steps: int,
    left: Tensor,
    threshold: float,
    generator: torch.Generator | None,
    group: ProcessGroup | None,
) -> Tensor:
    """Revive the dead codes of every codebook, using the residuals of the steps that share it: -> (S, K) bool.

    Nothing moves before all are known.
    """
    found = []
    for stage, table in zip(stages, tables_of(stages, len(stages)), strict=True):
        pool = [left]
        while len(pool) < steps // len(stages):
            pool.append(_after(table, pool[-1]))
        revived, fresh = replacements(torch.cat(pool), stage.usage, threshold, generator, group)
        found.append((revived, fresh))
        left = _after(torch.where(revived.unsqueeze(1), fresh, table), left)
    for stage, (revived, fresh) in zip(stages, found, strict=True):
        revive(stage._state(), revived, fresh)
    return torch.stack([revived for revived, _ in found])


def refuse_frozen(stages: Sequence[VectorQuantizer], method: str) -> None:
    """Refuse before anything moves: to start only half of the codebooks again would be worse than none."""
    for stage in stages:
        stage._refuse_frozen(method)


def _unchanged(rows: Tensor) -> Tensor:
    return rows


def _after(table: Tensor, rows: Tensor) -> Tensor:
    return rows - F.embedding(search_codes(rows, table), table)
