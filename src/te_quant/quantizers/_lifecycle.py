"""Where a codebook may start, and what may replace its dead codes: computed from latents, written by others.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from te_quant._search import search_codes
from te_quant.quantizers._distributed import all_reduce_sum, sample_rows
from te_quant.quantizers._update import row_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["kmeans", "replacements"]


def kmeans(
    rows: Tensor,
    table: Tensor,
    iterations: int,
    project: Callable[[Tensor], Tensor],
    generator: torch.Generator | None,
    group: ProcessGroup | None,
    search: Callable[[Tensor, Tensor], Tensor] = search_codes,
) -> Tensor | None:
    """Lloyd's algorithm from K random rows: (N, C), (K, C) -> (K, C); None if no process has any row.

    ``search`` chooses the centre of each row. An empty cluster keeps its centre.
    """
    start = sample_rows(rows, table.shape[0], generator, group)
    if not len(start):
        return None
    centers = torch.cat([start, table[start.shape[0] :]])
    ones = torch.ones_like(rows[:, :1])
    for _ in range(iterations):
        chosen = search(rows, centers)
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
