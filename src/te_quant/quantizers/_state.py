"""What a quantizer remembers, its codebook and the statistics of its use, and how these move, in place.

Shape letters: N latent vectors, C code size, K codes.

How *far* they move is said by the pure functions of :mod:`te_quant.quantizers._codebook`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from te_quant._precision import widen
from te_quant.quantizers._codebook import Penalized, draw_penalized, move_codebook, row_sums
from te_quant.quantizers._distributed import all_reduce_sum
from te_quant.quantizers._penalized_means import smoothed
from te_quant.quantizers._rows import Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CodebookState", "observe", "restart", "revive"]

# Laplace smoothing of the running counts; the value of van den Oord et al. 2017.
_EPSILON = 1e-5


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
    penalized = draw_penalized(active if active_only else None, drawn, state.codebook, generator, group)
    if not updating:
        return penalized, None
    # All processes may have been empty; then nothing changes, decided without waiting for the device.
    seen = counts.any()
    usage = torch.where(seen, state.usage.lerp(counts.to(state.usage.dtype), 1 - decay), state.usage)
    codebook = None
    if state.code_sums is not None:
        sums = all_reduce_sum(row_sums(chosen, rows.searchable, state.codebook.shape[0]), group)
        sums = state.code_sums.lerp(sums.to(state.code_sums.dtype), 1 - decay)
        before, after = (state.usage, state.code_sums), (usage, sums)
        codebook = move_codebook(widen(state.codebook), before, after, _EPSILON, orthogonal_reg, penalized, unit)
        codebook = torch.where(seen, codebook.to(state.codebook.dtype), state.codebook)
        state.codebook.copy_(codebook)
        state.code_sums.copy_(torch.where(seen, sums, state.code_sums))
    state.usage.copy_(usage)
    return penalized, codebook


@torch.no_grad()
def restart(state: CodebookState, centers: Tensor) -> None:
    """Put the codebook at ``centers`` (K, C), as if each had been seen once."""
    state.codebook.copy_(centers)
    state.usage.fill_(1)
    if state.code_sums is not None:
        state.code_sums.copy_(state.codebook)


@torch.no_grad()
def revive(state: CodebookState, revived: Tensor, fresh: Tensor) -> None:
    """Put the codes that ``revived`` (K,) marks at ``fresh`` (K, C), with the usage of an average code."""
    column = revived.unsqueeze(1)
    state.codebook.copy_(torch.where(column, fresh.to(state.codebook.dtype), state.codebook))
    state.usage.copy_(torch.where(revived, state.usage.mean(), state.usage))
    if state.code_sums is not None:
        # Without this the next step would write the old means over the revived codes.
        weighted = widen(state.codebook) * smoothed(state.usage, _EPSILON).unsqueeze(1)
        state.code_sums.copy_(torch.where(column, weighted, state.code_sums))
