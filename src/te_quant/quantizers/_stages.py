"""How the codebooks of a residual quantizer move: together after a step, one after the other at a restart.

Shape letters: N latent vectors, C code size, K codes a codebook, Q steps, S codebooks: Q, or 1 for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from te_quant._precision import widen
from te_quant.functional import orthogonality
from te_quant.quantizers._residual import joined
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._state import observe
from te_quant.quantizers.vector import VectorQuantizer

__all__ = ["mean_penalty", "observe_stages", "revive_stages", "start_stages", "tables_of"]


def tables_of(stages: Sequence[VectorQuantizer], steps: int) -> list[Tensor]:
    """The codebook of every step as it is now, at least float32: -> Q of (K, C)."""
    tables = [widen(stage.codebook) for stage in stages]
    return tables * (steps // len(tables))


def mean_penalty(stages: Sequence[VectorQuantizer]) -> Tensor:
    """The orthogonality penalty without λ, the mean over the codebooks: -> ()."""
    return torch.stack([orthogonality(stage.codebook) for stage in stages]).mean()


def observe_stages(stages: Sequence[VectorQuantizer], steps: Sequence[Rows], chosen: Tensor) -> None:
    """Count the codes and let the codebooks follow that are not frozen: S, Q steps of N rows, (N, Q) indices.

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
    """Revive the dead codes of every codebook from the rows of the steps, of Q, that it serves: -> (S, K) bool."""
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
    # Before anything moves: half of the codebooks started anew would be worse than none.
    for stage in stages:
        stage._refuse_frozen(method)


def _after(stage: VectorQuantizer, rows: Tensor) -> Tensor:
    return rows - stage.decode(stage.encode(rows))
