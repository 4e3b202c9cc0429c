"""How a codebook moves without gradient: moving averages, k-means, revival.

Shape letters: N latent vectors, C code size, K codes, S codes under the penalty.

Pure functions of tensors; :class:`~te_quant.VectorQuantizer` holds the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from te_quant._search import search_codes
from te_quant.quantizers._distributed import all_reduce_sum, sample_rows
from te_quant.quantizers._penalized_means import penalized_means, smoothed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Penalized", "draw_penalized", "kmeans", "move_codebook", "replacements", "row_sums"]


class Penalized(NamedTuple):
    """The codes under the penalty in one step.

    Attributes:
        subset: (S,) their indices; None for all K.
        mask: (S,) or (K,) bool, False for those of them that do not count; None if all do.
    """

    subset: Tensor | None
    mask: Tensor | None

    def rows(self, table: Tensor) -> Tensor:
        """(K, C) -> (S, C)."""
        return table if self.subset is None else table[self.subset]


def row_sums(chosen: Tensor, rows: Tensor, num_codes: int) -> Tensor:
    """Sum the rows that chose each code: (N,), (N, C) -> (K, C)."""
    return rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, chosen, rows)


def draw_penalized(
    active: Tensor | None,
    max_codes: int | None,
    codebook: Tensor,
    generator: torch.Generator | None,
    group: ProcessGroup | None,
) -> Penalized:
    """Choose the codes of one step, alike on all ranks: all, the ``active`` ones, or ``max_codes`` of them."""
    num_codes = codebook.shape[0]
    if max_codes is None or max_codes >= num_codes:
        return Penalized(None, active)
    scores = torch.rand(num_codes, generator=generator, device=codebook.device)
    # The sum of every rank's scores orders the codes at random too, and equally everywhere.
    all_reduce_sum(scores, group)
    if active is not None:
        scores = scores.masked_fill(~active, -1.0)
    subset = scores.topk(max_codes).indices
    return Penalized(subset, None if active is None else active[subset])


def move_codebook(
    codebook: Tensor,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    epsilon: float,
    weight: float,
    penalized: Penalized,
    unit: bool,
) -> Tensor:
    """The next codebook, (K, C), given the running (usage, code_sums) before and after a batch."""
    counts = smoothed(after[0], epsilon)
    means = after[1] / counts.unsqueeze(1)
    if weight == 0:
        return means
    # A code outside the penalty in this step follows its mean but keeps the distance that earlier steps gave it;
    # sending it back to the mean would undo the penalty.
    moved = codebook + means - before[1] / smoothed(before[0], epsilon).unsqueeze(1)
    shares = counts / counts.sum()
    if penalized.subset is None:
        mask = penalized.mask
        stepped = penalized_means(codebook, means, shares, weight, mask, unit=unit)
        return stepped if mask is None else torch.where(mask.unsqueeze(1), stepped, moved)
    subset = penalized.subset
    stepped = penalized_means(codebook[subset], means[subset], shares[subset], weight, penalized.mask, unit=unit)
    if penalized.mask is not None:
        stepped = torch.where(penalized.mask.unsqueeze(1), stepped, moved[subset])
    return moved.index_copy(0, subset, stepped)


def kmeans(
    rows: Tensor,
    table: Tensor,
    iterations: int,
    project: Callable[[Tensor], Tensor],
    generator: torch.Generator | None,
    group: ProcessGroup | None,
) -> Tensor | None:
    """Lloyd's algorithm from K random rows: (N, C), (K, C) -> (K, C); None if no process has any row.

    An empty cluster keeps its centre.
    """
    start = sample_rows(rows, table.shape[0], generator, group)
    if not len(start):
        return None
    centers = torch.cat([start, table[start.shape[0] :]])
    ones = torch.ones_like(rows[:, :1])
    for _ in range(iterations):
        chosen = search_codes(rows, centers)
        counts = all_reduce_sum(row_sums(chosen, ones, len(table)), group)
        sums = all_reduce_sum(row_sums(chosen, rows, len(table)), group)
        centers = project(torch.where(counts > 0, sums / counts.clamp_min(1), centers))
    return centers


def replacements(
    rows: Tensor,
    usage: Tensor,
    threshold: float,
    generator: torch.Generator | None,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Which codes are dead and can be replaced, (K,) bool, and by what, (K, C), zero elsewhere."""
    dead = usage < threshold * usage.mean()
    fresh = sample_rows(rows, usage.shape[0], generator, group)
    # The j-th dead code takes the j-th row drawn; where the rows run out, the rest stay as they are.
    order = dead.cumsum(0) - 1
    revived = dead & (order < fresh.shape[0])
    padded = torch.cat([fresh, fresh.new_zeros(1, fresh.shape[1])])
    return revived, padded[torch.where(revived, order, fresh.shape[0])]
