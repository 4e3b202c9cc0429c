"""The nearest code of every latent vector, in tiles: no N x K tensor is ever held.

Shape letters: N latent vectors, C code size, K codes, n rows of a tile, g codes of a group.

argmin_k ‖z - e_k‖² = argmin_k ½‖e_k‖² - z·e_k, so the work is one matrix product, taken a tile at a time into
one reused buffer that stays in cache, with a running minimum over the tiles. Two details make it exact where
the plain expanded form is not:

- latents and codes are first shifted to the middle of the codes, which changes no distance but keeps the two
  terms small; without it float32 picks more than half of the codes wrongly at an offset of 1,000;
- the running minimum takes a later tile only where it is strictly smaller, so ties go to the lowest index. A
  matrix product may round the same code differently at two places of a tile, so equal codes, which is where ties
  come from in practice (k-means and revival on blank images), are sent to the first of them at the end.

A CPU pays more for a minimum with its index than for the product, because only the minimum alone is vectorised.
There (:func:`_grouped_argmin`) each score is looked at once by such a minimum, over groups of g codes in a row;
the index is then sought among the minima of the groups, set by set, and among the g codes of the best one.

An accelerator, and a CPU that has no more than one tile, minimise whole tiles (:func:`_tiled_argmin`); where
:data:`FUSED` asks for it, an accelerator does all of it in one kernel (:mod:`te_quant._search.fused`).

Registered as dispatcher operators, so that a compiled graph holds one opaque node whatever N is.
"""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

__all__ = ["FUSED", "sample_codes", "search_codes"]

FUSED = "TE_QUANT_FUSED_SEARCH"
"""The variable that, set to 1, lets float32 searches on CUDA devices run as one Triton kernel; 0 or unset: not."""

# Elements of the score buffer. On a CPU 4 MiB of float32 stay in cache; on an accelerator launches cost more than
# memory, and 32 MiB is still independent of N and K.
_CPU_TILE = 1 << 20
_DEVICE_TILE = 1 << 23
# The middle of the codes is taken from about so many of them.
_CENTER_CODES = 16
# The widest tile of codes: wider tiles leave too few rows for an efficient product, sooner so for long codes.
_MAX_TILE_CODES = 4096
_LONG_CODE, _MAX_TILE_LONG_CODES = 128, 2048
# Codes a group, half as many if they are long; groups a set, of which there are none below so many groups.
_GROUP, _MAX_SET, _FEW_GROUPS = 8, 16, 64
# Rows whose index is sought at once, and at most so many elements of the minima of their groups.
_MIN_ROWS, _MAX_ROWS, _CPU_MINIMA = 64, 2048, 1 << 20
# Rows more than a power of two.
_STAGGER = 24

# Numbers that a thread keeps at most between searches.
_MAX_SCRATCH = 3 << 20
_kept = threading.local()

# Odd, so that its powers, one a column, are invertible modulo 2^64. Source: Knuth, MMIX's generator.
_HASH_MULTIPLIER = 6364136223846793005

_library = torch.library.Library("te_quant", "FRAGMENT")
_library.define(
    "search_codes(Tensor latents, Tensor codebook) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sample_codes(Tensor latents, Tensor codebook, float temperature, Generator? generator) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)


def search_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to each row of ``latents``: (N, C), (K, C) -> (N,) int64."""
    result: Tensor = torch.ops.te_quant.search_codes(latents.detach(), codebook.detach())
    return result


def sample_codes(
    latents: Tensor, codebook: Tensor, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a code for each row with probability ∝ exp(-‖z - e‖² / (2 · temperature)): -> (N,) int64."""
    result: Tensor = torch.ops.te_quant.sample_codes(latents.detach(), codebook.detach(), temperature, generator)
    return result


def _search(latents: Tensor, codebook: Tensor) -> Tensor:
    if latents.device.type == "cpu" and len(latents) * len(codebook) > _CPU_TILE:
        indices = _grouped_argmin(latents, codebook)
    elif _fused(latents.device.type, latents.dtype):
        # Triton is no dependency: CUDA builds of torch for Linux bring it along.
        try:
            from te_quant._search.fused import fused_argmin
        except ImportError as error:
            raise ImportError(f"{FUSED} must be 0 or unset where triton cannot be imported, got 1.") from error

        indices = fused_argmin(latents, codebook, _center(codebook))
    else:
        indices = _tiled_argmin(latents, codebook, 0.0, None)
    first = _first_of_equals(codebook)
    return indices if first is None else first[indices]


def _fused(device: str, dtype: torch.dtype) -> bool:
    """Whether one kernel does it.

    Raises:
        ValueError: the variable says neither yes nor no.
    """
    if device != "cuda":
        return False
    wanted = os.environ.get(FUSED, "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"{FUSED} must be 0 or 1, got {wanted!r}.")
    return wanted == "1" and dtype == torch.float32


def _first_of_equals(codebook: Tensor) -> Tensor | None:
    """The lowest index that holds the same code, for each code: (K, C) -> (K,); None if all codes differ."""
    # Almost always no two codes agree even in length and sum. On an accelerator asking would mean waiting for it.
    if codebook.device.type == "cpu":
        length, total = (_bits(numbers).long() for numbers in (codebook.square().sum(1), codebook.sum(1)))
        keys = (length * _HASH_MULTIPLIER + total).sort().values
        if not (keys[1:] == keys[:-1]).any():
            return None
    # A hash of the bits of each row, in integers because these have no rounding.
    bits = _bits(codebook)
    bits = bits ^ (bits >> (4 * bits.element_size()))
    multipliers = torch.full_like(bits[0], _HASH_MULTIPLIER, dtype=torch.int64).cumprod(0)
    keys, order = (bits * multipliers).sum(1).sort(stable=True)
    same = (keys[1:] == keys[:-1]) & (codebook[order[1:]] == codebook[order[:-1]]).all(1)
    place = torch.arange(len(keys), device=keys.device)
    place[1:].masked_fill_(same, 0)
    return torch.empty_like(order).scatter_(0, order, order[place.cummax(0).values])


def _bits(numbers: Tensor) -> Tensor:
    """The same memory as integers; + 0 makes -0 equal to 0."""
    return (numbers + 0.0).view(torch.int64 if numbers.dtype == torch.float64 else torch.int32)


def _center(codebook: Tensor) -> Tensor:
    """Any point amid the codes, (C,)."""
    # A median of some, not the mean, which one runaway code would drag along. By sorting, since torch.median is
    # refused on CUDA where deterministic algorithms are asked for.
    some = codebook[:: max(1, len(codebook) // _CENTER_CODES)]
    return some.sort(0).values[(len(some) - 1) // 2]


def _grouped_argmin(latents: Tensor, codebook: Tensor) -> Tensor:
    (rows, size), codes = latents.shape, codebook.shape[0]
    indices = torch.empty(rows, dtype=torch.int64)
    if rows == 0:
        return indices
    center = _center(codebook)
    widest = _MAX_TILE_CODES if size < _LONG_CODE else _MAX_TILE_LONG_CODES
    group = _GROUP if size <= _LONG_CODE else _GROUP // 2
    several = _groups_together(-(-codes // group))
    unit = group * several
    sets = -(-codes // unit)
    groups = sets * several
    filled = groups * group
    centered = codebook.new_empty(filled, size)
    torch.sub(codebook, center, out=centered[:codes])
    if filled > codes:
        centered[codes:] = 0
    half_norms = centered.square().sum(1, keepdim=True).mul_(0.5)
    if filled > codes:
        # What fills the last groups is infinitely far.
        half_norms[codes:] = torch.inf
    tile_codes = min(filled, max(1, widest // unit) * unit)
    # The index is sought for many rows at once, since each call costs some microseconds.
    most = max(_MIN_ROWS, min(_MAX_ROWS, _CPU_MINIMA // groups, _CPU_TILE // (group * size)))
    # All tiles about as large as that of the rows that are left at the end.
    tiles = -(-rows // max(1, min(most, _CPU_TILE // tile_codes)))
    share = -(-rows // tiles)
    tile_rows = _uneven(share)
    batch_rows = min(rows, most // share * tile_rows)
    needed = (tile_rows * tile_codes, batch_rows * size, groups * batch_rows, batch_rows * group * size)
    buffer, vectors, minima, candidates = _scratch(sum(needed), latents.dtype).split(needed)
    for row in range(0, rows, batch_rows):
        count = min(batch_rows, rows - row)
        batch = vectors[: count * size].view(count, size)
        torch.sub(latents[row : row + count], center, out=batch)
        best = minima[: groups * count].view(groups, count)
        for first in range(0, count, tile_rows):
            tile = batch[first : first + tile_rows]
            for code in range(0, filled, tile_codes):
                block = centered[code : code + tile_codes]
                scores = buffer[: len(tile) * len(block)].view(len(block), len(tile))
                torch.addmm(half_norms[code : code + tile_codes], block, tile.T, alpha=-1, out=scores)
                places = slice(code // group, (code + len(block)) // group)
                block_minima = best[places, first : first + tile_rows]
                torch.amin(scores.view(-1, group, len(tile)), 1, out=block_minima)
        nearest = _argmin_by_sets(best, several)
        # The codes of the nearest group once more: cheaper than to read what another core has written.
        again = candidates[: count * group * size].view(count, group * size)
        torch.index_select(centered.view(groups, -1), 0, nearest, out=again)
        norms = half_norms.view(groups, 1, group).index_select(0, nearest)
        codes_again = again.view(count, group, size).transpose(1, 2)
        within = torch.baddbmm(norms, batch.unsqueeze(1), codes_again, alpha=-1)
        torch.add(within.squeeze(1).min(1).indices, nearest, alpha=group, out=indices[row : row + count])
    # What fills the last groups is never chosen: where it gives NaN, in a coordinate with an infinite latent, the
    # code that is the centre's median there gives NaN as well, and comes first.
    return indices


def _uneven(rows: int) -> int:
    """A little more where scores a multiple of 4 KiB apart would share a few places in the cache."""
    return rows + _STAGGER if rows % 512 == 0 else rows


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Memory for ``count`` numbers, kept for this thread's next search: fresh pages take a small one's time."""
    if count > _MAX_SCRATCH:
        return torch.empty(count, dtype=dtype)
    kept: Tensor | None = getattr(_kept, "scratch", None)
    if kept is None or kept.dtype != dtype or len(kept) < count:
        # Made in inference mode it could not be written to elsewhere.
        with torch.inference_mode(False):
            kept = _kept.scratch = torch.empty(count, dtype=dtype)
    return kept[:count]


def _groups_together(groups: int) -> int:
    """How many groups make a set: the power of two next below the root, up to a limit; 1 if they are few."""
    return 1 if groups <= _FEW_GROUPS else min(1 << (groups.bit_length() - 1) // 2, _MAX_SET)


def _argmin_by_sets(minima: Tensor, several: int) -> Tensor:
    """The first lowest of each column, (groups, n) to (n,), by way of the lowest of each ``several`` in a row."""
    if several == 1:
        return minima.min(0).indices
    count = minima.shape[1]
    chosen = torch.amin(minima.view(-1, several, count), 1).min(0).indices
    columns = torch.arange(count)
    flat = torch.add(columns, chosen, alpha=several * count) + (torch.arange(several) * count).unsqueeze(1)
    within = minima.view(-1).index_select(0, flat.view(-1)).view(several, count)
    return torch.add(within.min(0).indices, chosen, alpha=several)


def _tiled_argmin(
    latents: Tensor, codebook: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    rows, codes = latents.shape[0], codebook.shape[0]
    center = _center(codebook)
    centered = codebook - center
    half_norms = centered.square().sum(1).mul_(0.5)
    tile_codes = min(codes, _MAX_TILE_CODES)
    budget = _CPU_TILE if latents.device.type == "cpu" else _DEVICE_TILE
    tile_rows = max(1, min(rows, budget // tile_codes))
    buffer = latents.new_empty(tile_rows * tile_codes)
    indices = torch.empty(rows, dtype=torch.int64, device=latents.device)
    for row in range(0, rows, tile_rows):
        tile = latents[row : row + tile_rows] - center
        best: Tensor | None = None
        chosen = indices[row : row + tile_rows]
        for code in range(0, codes, tile_codes):
            block = centered[code : code + tile_codes]
            scores = buffer[: tile.shape[0] * block.shape[0]].view(tile.shape[0], block.shape[0])
            torch.addmm(half_norms[code : code + tile_codes], tile, block.T, alpha=-1, out=scores)
            if temperature:
                # Gumbel-max: -log of an exponential variate is a Gumbel variate.
                noise = torch.empty_like(scores).exponential_(generator=generator)
                scores.add_(noise.log_(), alpha=temperature)
            if tile_codes == codes:
                torch.argmin(scores, 1, out=chosen)
                break
            value, index = scores.min(1)
            if best is None:
                best = value
                chosen.copy_(index)
            else:
                better = value < best
                best = torch.where(better, value, best)
                chosen.copy_(torch.where(better, index + code, chosen))
    return indices


def _indices_like(latents: Tensor, codebook: Tensor, *_: object) -> Tensor:  # noqa: ARG001
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


_library.impl("search_codes", _search, "CompositeExplicitAutograd")
_library.impl("sample_codes", _tiled_argmin, "CompositeExplicitAutograd")
torch.library.register_fake("te_quant::search_codes", _indices_like, lib=_library)
torch.library.register_fake("te_quant::sample_codes", _indices_like, lib=_library)
