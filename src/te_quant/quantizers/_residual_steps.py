"""The steps of residual quantization: their arithmetic, and how their codebooks start and are revived.

Codebooks move together, between two steps.

Shape letters: N latent vectors, C code size, K codes per codebook, Q steps, S codebooks: Q, or 1 for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant._constants import constant
from te_quant._execution import refuse_redraw
from te_quant._search import search_codes
from te_quant.functional import orthogonality
from te_quant.quantizers._combined import columns_of, first_columns, part_codes, width
from te_quant.quantizers._lifecycle import kmeans, replacements
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._update import Batch, restart, revive
from te_quant.quantizers.base import Quantized, Quantizer
from te_quant.quantizers.vector import VectorQuantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Level",
    "batches",
    "cumulative",
    "divided",
    "draw_depths",
    "joined",
    "mean_penalty",
    "partial_sums",
    "quantize_stages",
    "residuals",
    "revive_stages",
    "rows_of_stages",
    "search_residuals",
    "search_stages",
    "stage_codes",
    "start_stages",
    "step_codes",
    "tables_of",
    "times",
]


def draw_depths(rows: Rows, steps: int, share: float, generator: torch.Generator | None) -> Tensor:
    """How many steps each row takes, one number for each element of axis 0: -> (N,) int64.

    Uniform in 1..Q with probability ``share``, and Q otherwise.
    """
    batch, positions = rows.grid[0], math.prod(rows.grid[1:])
    # In place, because a compiler that knows no batch size cannot trace torch.randint with a generator.
    drawn = torch.empty(batch, 1, device=rows.vectors.device).uniform_(generator=generator)
    drawn = refuse_redraw(drawn, generator)
    if share < 1:
        # One draw says both whether and how many: below the share it is uniform again.
        drawn = torch.where(drawn < share, drawn / share, 1.0)
    drawn = drawn * steps
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
    """What every codebook saw that trains and is not frozen: S, Q steps of N rows, (N, Q) indices.

    A shared codebook sees all steps as one batch.
    """
    picks = list(chosen.clamp_min(0).unbind(1))
    if len(stages) < len(steps):
        steps, picks = [joined(steps)], [torch.cat(picks)]
    return [
        Batch(stage._state(), rows, indices)
        for stage, rows, indices in zip(stages, steps, picks, strict=True)
        if stage._changes()
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


def _unchanged(rows: Tensor) -> Tensor:
    return rows


def _after(table: Tensor, rows: Tensor) -> Tensor:
    return rows - F.embedding(search_codes(rows, table), table)


class Level(NamedTuple):
    """What one level of given stages did in one pass.

    Attributes:
        result: what its quantizer returned, for every row.
        rows: what it had to quantize; zero, and without weight, where it was not used.
        columns: (N, n), its indices, -1 where it was not used.
        codes: (N, C), what it adds to the sum.
    """

    result: Quantized
    rows: Rows
    columns: Tensor
    codes: Tensor


def cumulative(scales: Sequence[float | tuple[float, ...]], code_dim: int) -> list[tuple[float, ...] | None]:
    """What the codes of each level are multiplied by, and those of a level behind the last one; None for 1.

    Args:
        scales: what each level asks of the later ones.
        code_dim: C.
    """
    products: list[tuple[float, ...]] = [(1.0,) * code_dim]
    for scale in scales:
        factors = scale if isinstance(scale, tuple) else (scale,) * code_dim
        products.append(tuple(one * other for one, other in zip(products[-1], factors, strict=True)))
    return [None if set(product) == {1.0} else product for product in products]


def times(codes: Tensor, scale: tuple[float, ...] | None) -> Tensor:
    """Codes on the scale of a level: (..., C) -> (..., C)."""
    return codes if scale is None else codes * constant(list, scale, dtype=codes.dtype, device=codes.device)


def divided(left: Tensor, scale: tuple[float, ...] | None) -> Tensor:
    """What is left over on the scale of the codes of a level: (N, C) -> (N, C)."""
    return left if scale is None else left / constant(list, scale, dtype=left.dtype, device=left.device)


def quantize_stages(
    parts: Sequence[Quantizer],
    scales: Sequence[tuple[float, ...] | None],
    rows: Rows,
    depths: Tensor | None,
    generator: torch.Generator | None,
) -> list[Level]:
    """Let each quantizer quantize what the ones before it left over.

    Args:
        parts: the quantizer of each level.
        scales: of each level.
        rows: what the first level has to quantize.
        depths: (N,) how many levels a row takes; None for all.
        generator: randomness of the quantizers.
    """
    units = parts[0].to_code_units(rows.vectors), parts[0].to_code_units(rows.searchable)
    total = torch.zeros_like(units[1])
    levels = []
    for place, (part, scale) in enumerate(zip(parts, scales, strict=True)):
        used = None if depths is None else (depths > place).unsqueeze(1)
        step = rows if place == 0 else _left_over(part, scale, rows, units, total)
        step = step._replace(weights=_both(rows.weights, used, step.vectors.dtype))
        result = part.quantize(step, generator)
        columns, codes = columns_of(part, result.indices), result.codes
        if used is not None:
            columns, codes = torch.where(used, columns, -1), torch.where(used, codes, 0.0)
        codes = times(codes, scale)
        total = total + codes.detach()
        levels.append(Level(result, _weighted(step), columns, codes))
    return levels


def search_stages(
    parts: Sequence[Quantizer], scales: Sequence[tuple[float, ...] | None], rows: Rows, count: int
) -> Tensor:
    """The first ``count`` indices of each row, all of them used: -> (N, count)."""
    units = parts[0].to_code_units(rows.searchable)
    total = torch.zeros_like(units)
    found: list[Tensor] = []
    for place, (part, scale) in enumerate(zip(parts, scales, strict=True)):
        step = rows if place == 0 else _left_over(part, scale, rows, (units, units), total)
        count -= width(part)
        if count < 0:
            found.append(first_columns(part, step, count + width(part)))
            break
        found.append(columns_of(part, part.search(step)))
        if count == 0:
            break
        total = total + times(part_codes(part, found[-1], dropped=False).detach(), scale)
    return torch.cat(found, dim=1)


def stage_codes(
    parts: Sequence[Quantizer], scales: Sequence[tuple[float, ...] | None], indices: Tensor
) -> list[Tensor]:
    """What each level that (..., n) indices name adds to the sum: -> (..., C) each; zero where they are -1.

    Args:
        parts: the quantizer of each level.
        scales: of each level.
        indices: of the first levels; the last of them may lack some of its own.
    """
    codes, start = [], 0
    for part, scale in zip(parts, scales, strict=True):
        if start < indices.shape[-1]:
            columns = indices[..., start : start + width(part)]
            codes.append(times(part_codes(part, columns), scale))
        start += width(part)
    return codes


def rows_of_stages(
    parts: Sequence[Quantizer],
    scales: Sequence[tuple[float, ...] | None],
    rows: Rows,
    sums: Sequence[Tensor],
    columns: Sequence[Tensor],
    *,
    dropped: bool,
) -> list[Rows]:
    """What each level had to quantize, given the codes before it; zero, and without weight, where it was not used.

    Args:
        parts: the quantizer of each level.
        scales: of each level.
        rows: what the first level had to quantize.
        sums: (N, C) sums of the codes before each level.
        columns: (N, n) indices of each level.
        dropped: some of them may be -1.
    """
    units = parts[0].to_code_units(rows.vectors), parts[0].to_code_units(rows.searchable)
    steps = []
    for place, (part, scale) in enumerate(zip(parts, scales, strict=True)):
        step = rows if place == 0 else _left_over(part, scale, rows, units, sums[place])
        used = (columns[place] >= 0).any(1, keepdim=True) if dropped else None
        steps.append(_weighted(step._replace(weights=_both(rows.weights, used, step.vectors.dtype))))
    return steps


def _left_over(
    part: Quantizer, scale: tuple[float, ...] | None, rows: Rows, units: tuple[Tensor, Tensor], total: Tensor
) -> Rows:
    """What the codes before a level left over, as its quantizer compares it."""
    vectors, searchable = (part.project_residual(divided(own - total, scale)) for own in units)
    return Rows(vectors, searchable, rows.weights, rows.grid)


def _both(weights: Tensor | None, used: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if used is None:
        return weights
    return used.to(dtype) if weights is None else weights * used


def _weighted(rows: Rows) -> Rows:
    if rows.weights is None:
        return rows
    return rows._replace(vectors=rows.vectors * rows.weights, searchable=rows.searchable * rows.weights)
