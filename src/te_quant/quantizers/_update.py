"""What a quantizer remembers, its codebook and the statistics of its use, and how one batch moves them.

Shape letters: N latent vectors, C code size, K codes, S codes under the penalty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from te_quant._precision import as_factor, widen
from te_quant.quantizers._distributed import all_reduce_sum
from te_quant.quantizers._penalized_means import penalized_means, smoothed
from te_quant.quantizers._rows import Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["EPSILON", "CodebookState", "Penalized", "observe", "row_sums"]

EPSILON = 1e-5
"""Laplace smoothing of the running counts; the value of van den Oord et al. 2017."""


class CodebookState(NamedTuple):
    """The tensors of one quantizer, which the functions below write to.

    Attributes:
        codebook: (K, C).
        usage: (K,) moving average of the counts.
        code_sums: (K, C) moving average of the sums of latents; None where the codebook follows gradients.
    """

    codebook: Tensor
    usage: Tensor
    code_sums: Tensor | None


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


@torch.no_grad()
def observe(
    state: CodebookState,
    rows: Rows,
    chosen: Tensor,
    *,
    decay: float,
    group: ProcessGroup | None,
    updating: bool = True,
    active_only: bool = False,
    max_codes: int | None = None,
    orthogonal_reg: float = 0.0,
    unit: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Penalized, Tensor | None]:
    """Count; choose the codes to penalize; update the statistics and, where it has sums, the codebook.

    Args:
        state: what is written to.
        rows: the latents of this process.
        chosen: their codes.
        decay: of the moving averages.
        group: the other processes.
        updating: change what is remembered; otherwise only choose.
        active_only: penalize only codes that were chosen.
        max_codes: penalize at most so many, while updating.
        orthogonal_reg: λ.
        unit: only the directions of the codes count.
        generator: randomness of the subset.

    Shape:
        chosen: (N,).

    Returns:
        The codes under the penalty, and the codebook (K, C) if it moved.
    """
    active = None
    if updating or active_only:
        ones = torch.ones_like(rows.searchable[:, :1]) if rows.weights is None else rows.weights
        counts = all_reduce_sum(row_sums(chosen, ones, state.codebook.shape[0]).squeeze(1), group)
        active = counts > 0
    drawn = max_codes if updating else None
    penalized = _draw_penalized(active if active_only else None, drawn, state.codebook, generator, group)
    if not updating:
        return penalized, None
    # All processes may have been empty; then nothing changes, decided without waiting for the device.
    seen = counts.any()
    weight = as_factor(1 - decay, state.usage)
    usage = torch.where(seen, state.usage.lerp(counts.to(state.usage.dtype), weight), state.usage)
    codebook = None
    if state.code_sums is not None:
        sums = all_reduce_sum(row_sums(chosen, rows.searchable, state.codebook.shape[0]), group)
        sums = state.code_sums.lerp(sums.to(state.code_sums.dtype), weight)
        before, after = (state.usage, state.code_sums), (usage, sums)
        codebook = _move_codebook(widen(state.codebook), before, after, EPSILON, orthogonal_reg, penalized, unit)
        codebook = torch.where(seen, codebook.to(state.codebook.dtype), state.codebook)
        state.codebook.copy_(codebook)
        state.code_sums.copy_(torch.where(seen, sums, state.code_sums))
    state.usage.copy_(usage)
    return penalized, codebook


def row_sums(chosen: Tensor, rows: Tensor, num_codes: int) -> Tensor:
    """Sum the rows that chose each code: (N,), (N, C) -> (K, C)."""
    return rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, chosen, rows)


def _draw_penalized(
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


def _move_codebook(
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
