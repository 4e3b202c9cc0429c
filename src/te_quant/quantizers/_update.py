"""What a quantizer remembers: its codebook, the statistics of its use, and what is pending; and how they change.

A training pass only *records*: it adds its counts and sums to the pending ones. Between two steps these *move* the
statistics and, where it follows moving averages, the codebook.

Shape letters: N latent vectors, C code size, K codes, S codes under the penalty.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from te_quant._execution import gathered, overwrite, refuse_redraw
from te_quant._precision import full_precision, unit_rows, widen
from te_quant.quantizers._distributed import all_reduce_sum
from te_quant.quantizers._penalized_means import penalized_means, smoothed
from te_quant.quantizers._rows import Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "EPSILON",
    "MAX_REPLACEMENTS",
    "NEVER_USED",
    "Batch",
    "CodebookState",
    "Penalized",
    "choose_penalized",
    "complete",
    "count",
    "move",
    "record",
    "restart",
    "revive",
    "row_sums",
]

EPSILON = 1e-5
"""Laplace smoothing of the running counts; the value of van den Oord et al. 2017."""

NEVER_USED = 1e-9
"""The usage of a code that waits for its first latent: dead next to any code that was used."""

MAX_REPLACEMENTS = 4096
"""How many codes can be replaced between two steps."""

# The golden ratio's fraction in units of 2^-32: its multiples modulo 1 spread evenly, however many there are.
_GOLDEN = 2654435769


class CodebookState(NamedTuple):
    """The tensors of one quantizer, which the functions below write to.

    Attributes:
        codebook: (K, C); None where the codes are computed from something else.
        usage: (K,) moving average of the counts.
        pending_counts: (K,) counts since the last move.
        code_sums: (K, C) moving average of the sums of latents; None where the codebook follows gradients.
        pending_sums: (K, C) sums since the last move; None with ``code_sums``.
        pending_subset: (S,) int64, the codes under the penalty at the next move; None where it is on all.
        pending_rows: (R, C + 1) latents of the last batch that may replace dead codes, with a 1 behind each; zero
            where it had fewer. None where dead codes stay.
        revivals: () int64, how many codes were replaced so far; None with ``pending_rows``.
    """

    codebook: Tensor | None
    usage: Tensor
    pending_counts: Tensor
    code_sums: Tensor | None = None
    pending_sums: Tensor | None = None
    pending_subset: Tensor | None = None
    pending_rows: Tensor | None = None
    revivals: Tensor | None = None


class Penalized(NamedTuple):
    """The codes under the penalty in one step.

    Attributes:
        subset: (S,) their indices; None for all K.
        mask: (S,) or (K,) bool, False for those of them that do not count; None if all do.
        counts: (K,) how often each code was chosen by all processes, where that had to be known.
    """

    subset: Tensor | None = None
    mask: Tensor | None = None
    counts: Tensor | None = None

    def rows(self, table: Tensor) -> Tensor:
        """(K, C) -> (S, C), a copy: the codebook may be written to before the backward pass reads it."""
        return table.clone() if self.subset is None else table[self.subset]


class Batch(NamedTuple):
    """What one quantizer saw in one training pass.

    Attributes:
        state: of the quantizer.
        rows: the latents of this process.
        chosen: (N,), their codes.
        penalized: the codes under the penalty.
    """

    state: CodebookState
    rows: Rows
    chosen: Tensor
    penalized: Penalized = Penalized()


@torch.no_grad()
def choose_penalized(
    counts: Tensor | None,
    table: Tensor,
    max_codes: int | None,
    generator: torch.Generator | None,
    group: ProcessGroup | None,
) -> Penalized:
    """Choose the codes of one step, alike on all ranks: all, those that ``counts``, or ``max_codes`` of them.

    Args:
        counts: (K,) of all processes; None if codes that nobody chose count too.
        table: (K, C).
        max_codes: None for no limit.
        generator: randomness of the subset.
        group: the other processes.
    """
    num_codes = table.shape[0]
    active = None if counts is None else counts > 0
    if max_codes is None or max_codes >= num_codes:
        return Penalized(None, active, counts)
    scores = refuse_redraw(torch.rand(num_codes, generator=generator, device=table.device), generator)
    # The sum of every rank's scores orders the codes at random too, and equally everywhere.
    all_reduce_sum(scores, group)
    if active is not None:
        scores = scores.masked_fill(~active, -1.0)
    subset = scores.topk(max_codes).indices
    return Penalized(subset, None if active is None else active[subset], counts)


def count(chosen: Tensor, rows: Rows, num_codes: int, group: ProcessGroup | None) -> Tensor:
    """Count how often the rows of all processes chose each code: (N,) -> (K,)."""
    return all_reduce_sum(row_sums(chosen, _weights(rows), num_codes).squeeze(1), group)


def row_sums(chosen: Tensor, rows: Tensor, num_codes: int) -> Tensor:
    """Sum the rows that chose each code: (N,), (N, C) -> (K, C)."""
    return rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, chosen, rows)


@torch.no_grad()
def record(batches: Sequence[Batch], group: ProcessGroup | None) -> None:
    """Add counts and, where there are any, sums to what is pending; one collective for all batches together."""
    before = [batch.state.pending_counts.sum() for batch in batches]
    targets, fresh = [], []
    for state, rows, chosen, (_, _, counts) in batches:
        parts = []
        if counts is None:
            parts.append((state.pending_counts.unsqueeze(1), _weights(rows)))
        else:
            state.pending_counts.add_(counts)
        if state.pending_sums is not None:
            parts.append((state.pending_sums, rows.searchable))
        for target, values in parts:
            if group is None:
                target.index_add_(0, chosen, values.to(target.dtype))
            else:
                targets.append(target)
                fresh.append(row_sums(chosen, values.to(target.dtype), target.shape[0]))
    reviving = [batch for batch in batches if batch.state.pending_rows is not None]
    spare = [_spare_rows(batch, group) for batch in reviving]
    if group is not None and fresh + spare:
        summed = _sum_together(fresh + spare, group)
        for target, part in zip(targets, summed[: len(fresh)], strict=True):
            target.add_(part.view_as(target))
        spare = summed[len(fresh) :]
    for batch, found in zip(reviving, spare, strict=True):
        kept = cast("Tensor", batch.state.pending_rows)
        kept.copy_(torch.where(found[:, -1].any(), found, kept))
    for total, batch in zip(before, batches, strict=True):
        _keep_subset(batch, total)


def _sum_together(parts: Sequence[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Sum tensors over the group, in one collective."""
    sums = all_reduce_sum(torch.cat([part.flatten() for part in parts]), group)
    pieces = sums.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def _keep_subset(batch: Batch, total: Tensor) -> None:
    """Remember the codes under the penalty; a pass that all processes left empty changes nothing."""
    pending, subset = batch.state.pending_subset, batch.penalized.subset
    if pending is not None and subset is not None:
        pending.copy_(torch.where(batch.state.pending_counts.sum() > total, subset, pending))


@torch.no_grad()
def move(
    state: CodebookState,
    *,
    decay: float,
    orthogonal_reg: float = 0.0,
    active_only: bool = False,
    unit: bool = False,
    revival_threshold: float = 0.0,
) -> None:
    """Update the statistics and, where there are sums, the codebook by what is pending.

    Args:
        state: what is written to.
        decay: of the moving averages.
        orthogonal_reg: λ.
        active_only: penalize only the codes that were chosen.
        unit: only the directions of the codes count.
        revival_threshold: codes below this fraction of the average usage are replaced by latents of the batch.
    """
    # Nothing may be pending, or all processes were empty; then nothing changes, decided without waiting for the
    # device.
    counts, sums = state.pending_counts, state.pending_sums
    seen = (counts > 0).any()
    share = seen.to(state.usage.dtype) * (1 - decay)
    if state.codebook is None or state.code_sums is None or sums is None:
        state.usage.lerp_(counts, share)
        counts.zero_()
        return
    if orthogonal_reg:
        mask = counts > 0 if active_only else None
        subset = state.pending_subset
        penalized = Penalized(subset, mask if mask is None or subset is None else mask[subset])
        before = state.usage.clone(), state.code_sums.clone()
        after = state.usage.lerp_(counts, share), state.code_sums.lerp_(sums, share)
        # Outside of a forward pass autocast may still be on.
        with full_precision(counts.device):
            moved = _penalized(widen(state.codebook), before, after, orthogonal_reg, penalized, unit)
    else:
        usage = state.usage.lerp_(counts, share)
        moved = state.code_sums.lerp_(sums, share) / smoothed(usage, EPSILON).unsqueeze(1)
    if not _may_look(state.codebook):
        state.codebook.copy_(torch.where(seen, moved.to(state.codebook.dtype), state.codebook))
    elif bool(seen):
        state.codebook.copy_(moved)
    if revival_threshold:
        _replace_dead(state, revival_threshold)
    _forget(state)


@torch.no_grad()
def restart(state: CodebookState, codes: Tensor, usage: Tensor | None = None, *, unit: bool = False) -> None:
    """Put the codebook at ``codes`` (K, C), used as ``usage`` (K,) says or each once; forget what is pending.

    Where only the directions of the codes count (``unit``), their lengths do not weigh the statistics.
    """
    codebook = cast("Tensor", state.codebook)
    overwrite(codebook, codes)
    if usage is None:
        state.usage.fill_(1)
    else:
        state.usage.copy_(usage)
    if state.code_sums is not None:
        codes = unit_rows(widen(codebook)) if unit else widen(codebook)
        state.code_sums.copy_(codes if usage is None else _sums(codes, state.usage))
    _forget(state)


@torch.no_grad()
def revive(state: CodebookState, revived: Tensor, fresh: Tensor) -> None:
    """Put the codes that ``revived`` (K,) marks at ``fresh`` (K, C), with the usage of an average code."""
    column = revived.unsqueeze(1)
    codebook = gathered(cast("Tensor", state.codebook))
    replaced = torch.where(column, fresh.to(codebook.dtype), codebook)
    overwrite(cast("Tensor", state.codebook), replaced)
    state.usage.copy_(torch.where(revived, state.usage.mean(), state.usage))
    if state.code_sums is not None:
        # Without this the next step would write the old means over the revived codes.
        weighted = _sums(widen(replaced), state.usage)
        state.code_sums.copy_(torch.where(column, weighted, state.code_sums))


def complete(
    entries: MutableMapping[str, Tensor],
    prefix: str,
    state: CodebookState,
    learnt: Tensor,
    *,
    unit: bool = False,
) -> None:
    """Make ``entries``, which are about to be loaded, fit ``state``.

    Statistics that they lack are derived from the codebook, those that ``state`` has no place for are dropped with
    a warning, and where nothing is said of it nothing is pending. Entries that are tensors of ``state`` itself,
    next to another codebook, are lacking too: a dict of the module that others were written into has them.

    Args:
        entries: tensors by name, changed in place.
        prefix: of the names that concern this quantizer.
        state: of the quantizer.
        learnt: the codebook, or what the codes are computed from.
        unit: only the directions of the codes count, so their lengths do not weigh the statistics.
    """
    anchor = entries.get(f"{prefix}{'basis' if state.codebook is None else 'codebook'}")
    if anchor is None or anchor.shape != learnt.shape:
        # Nothing of this quantizer, or a misfit that torch will name.
        return
    _drop_foreign(entries, prefix, state, beside_own=_is_stored_in(anchor, learnt))
    _drop_lone_sums(entries, prefix)
    for name in ("usage", "pending_counts", "code_sums", "pending_sums", "pending_rows"):
        # Others may have cast the whole file.
        if f"{prefix}{name}" in entries:
            entries[f"{prefix}{name}"] = widen(entries[f"{prefix}{name}"])
    device, num_codes = anchor.device, state.usage.shape[0]
    ones = torch.ones(num_codes, device=device, dtype=widen(anchor).dtype)
    usage = entries.setdefault(f"{prefix}usage", ones)
    nothing = torch.zeros_like(usage)
    if state.pending_sums is not None and f"{prefix}pending_sums" not in entries:
        # Counts whose sums nobody kept would shrink the codes.
        entries[f"{prefix}pending_counts"] = nothing
    entries.setdefault(f"{prefix}pending_counts", nothing)
    if state.code_sums is not None and usage.shape == state.usage.shape:
        codes = widen(gathered(anchor))
        sums = _sums(unit_rows(codes) if unit else codes, usage)
        entries.setdefault(f"{prefix}code_sums", sums)
        entries.setdefault(f"{prefix}pending_sums", torch.zeros_like(sums))
    if state.pending_subset is not None:
        drawn = torch.arange(len(state.pending_subset), device=device)
        # Another number of codes was drawn where orthogonal_max_codes was another.
        if entries.setdefault(f"{prefix}pending_subset", drawn).shape != drawn.shape:
            entries[f"{prefix}pending_subset"] = drawn
    if state.pending_rows is not None and state.revivals is not None:
        entries.setdefault(f"{prefix}pending_rows", torch.zeros_like(state.pending_rows, device=device))
        entries.setdefault(f"{prefix}revivals", torch.zeros_like(state.revivals, device=device))


def _drop_foreign(
    entries: MutableMapping[str, Tensor], prefix: str, state: CodebookState, *, beside_own: bool
) -> None:
    """Drop entries that ``state`` has no place for, with a warning, and its own ones next to another codebook."""
    unused = []
    for name, own in state._asdict().items():
        entry = entries.get(f"{prefix}{name}")
        if entry is None:
            continue
        if own is None:
            unused.append(name)
        elif beside_own or not _is_stored_in(entry, own):
            continue
        del entries[f"{prefix}{name}"]
    if unused:
        text = "the state holds {}, which these options have no use for; dropped."
        warnings.warn(text.format(" and ".join(unused)), stacklevel=3)


def _drop_lone_sums(entries: MutableMapping[str, Tensor], prefix: str) -> None:
    """Drop sums without the counts that they were taken with, next to which only they mean something."""
    for counts, sums in (("usage", "code_sums"), ("pending_counts", "pending_sums")):
        if f"{prefix}{counts}" not in entries:
            entries.pop(f"{prefix}{sums}", None)


def _is_stored_in(entry: Tensor, own: Tensor) -> bool:
    """Whether two tensors share memory, that of this process where FSDP2 has sharded them."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in (entry, own)]
    first, second = (tensor.untyped_storage().data_ptr() for tensor in local)
    # The meta device has no memory.
    return first == second != 0


def _weights(rows: Rows) -> Tensor:
    return torch.ones_like(rows.searchable[:, :1]) if rows.weights is None else rows.weights


def _sums(codes: Tensor, usage: Tensor) -> Tensor:
    """The sums whose means are ``codes``."""
    return codes * smoothed(usage, EPSILON).unsqueeze(1)


def _forget(state: CodebookState) -> None:
    state.pending_counts.zero_()
    if state.pending_sums is not None:
        state.pending_sums.zero_()
    if state.pending_rows is not None:
        state.pending_rows.zero_()


def _spare_rows(batch: Batch, group: ProcessGroup | None) -> Tensor:
    """Rows of this process that may replace dead codes, spread over the batch: (R, C + 1), as ``pending_rows``.

    Nothing is drawn at random: the number of codes replaced so far says where to go on, so that the next
    replacement takes another place of its batch.
    """
    state, rows = batch.state, batch.rows
    target, revivals = cast("Tensor", state.pending_rows), cast("Tensor", state.revivals)
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    slots = torch.arange(target.shape[0], device=target.device)
    turn = slots // world
    fraction = ((revivals + slots) & 0x7FFFFFFF) * _GOLDEN & 0xFFFFFFFF
    count = rows.searchable.shape[0]
    if count == 0:
        return torch.zeros_like(target)
    if rows.weights is None:
        places, valid = fraction * count >> 32, turn < count
    else:
        running = rows.weights.squeeze(1).cumsum(0).long()
        places, valid = fraction * running[-1] >> 32, turn < running[-1]
        places = torch.searchsorted(running, places + 1).clamp_max(count - 1)
    if world > 1:
        valid = valid & (slots % world == rank)
    marked = F.pad(rows.searchable[places].to(target.dtype), (0, 1), value=1.0)
    return torch.where(valid.unsqueeze(1), marked, 0.0)


def _replace_dead(state: CodebookState, threshold: float) -> None:
    """Move the codes that are hardly used onto pending rows, and give them the usage of an average code."""
    codebook, rows = cast("Tensor", state.codebook), cast("Tensor", state.pending_rows)
    mean = state.usage.mean()
    dead = state.usage < threshold * mean
    # The j-th dead code takes the j-th row; where the rows run out, the rest stay as they are.
    if _may_look(codebook):
        # Most codes of a large codebook stay, and these are not even read.
        codes = dead.nonzero().squeeze(1)[: rows.shape[0]]
        found = rows[: len(codes), -1] > 0
        codes, fresh = codes[found], rows[: len(codes)][found, :-1].to(codebook.dtype)
        codebook[codes] = fresh
        state.usage[codes] = mean
        weights = smoothed(state.usage, EPSILON)[codes]
        cast("Tensor", state.code_sums)[codes] = widen(fresh) * weights.unsqueeze(1)
        cast("Tensor", state.revivals).add_(len(codes))
        return
    order = dead.cumsum(0) - 1
    candidates = rows[order.clamp(0, rows.shape[0] - 1)]
    replaced = dead & (order < rows.shape[0]) & (candidates[:, -1] > 0)
    revive(state, replaced, candidates[:, :-1])
    cast("Tensor", state.revivals).add_(replaced.sum())


def _may_look(tensor: Tensor) -> bool:
    """Whether a value may decide what is computed: elsewhere that would mean waiting for the device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _penalized(
    codebook: Tensor,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    weight: float,
    penalized: Penalized,
    unit: bool,
) -> Tensor:
    """The next codebook under the penalty, (K, C), given the running (usage, code_sums) before and after."""
    counts = smoothed(after[0], EPSILON)
    means = after[1] / counts.unsqueeze(1)
    # A code outside the penalty in this step follows its mean but keeps the distance that earlier steps gave it;
    # sending it back to the mean would undo the penalty.
    moved = codebook + means - before[1] / smoothed(before[0], EPSILON).unsqueeze(1)
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
