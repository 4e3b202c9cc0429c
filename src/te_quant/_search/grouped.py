"""The nearest code on a CPU, where finding a minimum with its index costs more than the matrix product.

Shape letters: N latent vectors, C code size, K codes, n rows of a tile, g codes of a group.

Only the minimum without its index is vectorized. So each score is read once by such a minimum, over groups of
g consecutive codes. The index is then sought among the minima of the groups, set by set, and among the g codes of
the best group. Groups are contiguous, so ties still go to the lowest index.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from te_quant._search import tiles

__all__ = ["grouped_argmin"]

# The widest tile for long codes: wider tiles leave too few rows for an efficient product.
_LONG_CODE, _MAX_TILE_LONG_CODES = 128, 2048
# Codes per group, half as many if they are long; groups per set. Below so many groups there are no sets.
_GROUP, _MAX_SET, _FEW_GROUPS = 8, 16, 64
# Rows whose index is sought at once, and at most so many elements of the minima of their groups.
_MIN_ROWS, _MAX_ROWS, _CPU_MINIMA = 64, 2048, 1 << 20
# Rows more than a power of two.
_STAGGER = 24

# A thread keeps at most so many numbers between searches.
_MAX_SCRATCH = 3 << 20
_kept = threading.local()


def grouped_argmin(latents: Tensor, codebook: Tensor, dot: bool = False) -> Tensor:
    """Return the index of the nearest code for each row, on a CPU.

    Args:
        latents: z.
        codebook: e.
        dot: take the code of the largest product z·e instead.

    Shape:
        latents: (N, C). codebook: (K, C). Returns (N,) int64.
    """
    (rows, size), codes = latents.shape, codebook.shape[0]
    indices = torch.empty(rows, dtype=torch.int64)
    if rows == 0:
        return indices
    center = tiles.center_of(codebook)
    widest = tiles.MAX_TILE_CODES if size < _LONG_CODE else _MAX_TILE_LONG_CODES
    group = _GROUP if size <= _LONG_CODE else _GROUP // 2
    several = _groups_together(-(-codes // group))
    unit = group * several
    sets = -(-codes // unit)
    groups = sets * several
    filled = groups * group
    origin = tiles.origin_of(center, dot)
    factors, half_norms = (_filled(filled, part) for part in tiles.factors_of(codebook - center, dot))
    half_norms = half_norms.unsqueeze(1)
    if filled > codes:
        # What fills the last groups is infinitely far.
        half_norms[codes:] = torch.inf
    tile_codes = min(filled, max(1, widest // unit) * unit)
    # The index is sought for many rows at once, since each call costs some microseconds.
    most = max(_MIN_ROWS, min(_MAX_ROWS, _CPU_MINIMA // groups, tiles.CPU_TILE // (group * size)))
    # All tiles about as large as that of the rows that are left at the end.
    count_tiles = -(-rows // max(1, min(most, tiles.CPU_TILE // tile_codes)))
    share = -(-rows // count_tiles)
    tile_rows = _uneven(share)
    batch_rows = min(rows, most // share * tile_rows)
    needed = (tile_rows * tile_codes, batch_rows * size, groups * batch_rows, batch_rows * group * size)
    buffer, vectors, minima, candidates = _scratch(sum(needed), latents.dtype).split(needed)
    for row in range(0, rows, batch_rows):
        count = min(batch_rows, rows - row)
        batch = vectors[: count * size].view(count, size)
        torch.sub(latents[row : row + count], origin, out=batch)
        best = minima[: groups * count].view(groups, count)
        for first in range(0, count, tile_rows):
            tile = batch[first : first + tile_rows]
            for code in range(0, filled, tile_codes):
                block = factors[code : code + tile_codes]
                scores = buffer[: len(tile) * len(block)].view(len(block), len(tile))
                torch.addmm(half_norms[code : code + tile_codes], block, tile.T, alpha=-1, out=scores)
                places = slice(code // group, (code + len(block)) // group)
                block_minima = best[places, first : first + tile_rows]
                torch.amin(scores.view(-1, group, len(tile)), 1, out=block_minima)
        nearest = _argmin_by_sets(best, several)
        # Recompute the winning group's scores: reading data that another core wrote is more expensive.
        again = candidates[: count * group * size].view(count, group * size)
        torch.index_select(factors.view(groups, -1), 0, nearest, out=again)
        norms = half_norms.view(groups, 1, group).index_select(0, nearest)
        codes_again = again.view(count, group, size).transpose(1, 2)
        within = torch.baddbmm(norms, batch.unsqueeze(1), codes_again, alpha=-1)
        torch.add(within.squeeze(1).min(1).indices, nearest, alpha=group, out=indices[row : row + count])
    # What fills the last groups is never chosen: where it gives NaN, in a coordinate with an infinite latent, the
    # code that is the centre's median there gives NaN as well, and comes first.
    return indices


def _filled(length: int, rows: Tensor) -> Tensor:
    """Append zeros: (K, ...) -> (length, ...)."""
    return rows if len(rows) == length else torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def _uneven(rows: int) -> int:
    """Add a few rows where scores a multiple of 4 KiB apart would share a few places in the cache."""
    return rows + _STAGGER if rows % 512 == 0 else rows


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Return memory that this thread keeps for its next search: fresh pages would dominate a small one."""
    if count > _MAX_SCRATCH:
        return torch.empty(count, dtype=dtype)
    kept: Tensor | None = getattr(_kept, "scratch", None)
    if kept is None or kept.dtype != dtype or len(kept) < count:
        # Made in inference mode it could not be written to elsewhere.
        with torch.inference_mode(False):
            kept = _kept.scratch = torch.empty(count, dtype=dtype)
    return kept[:count]


def _groups_together(groups: int) -> int:
    """Return the groups per set: the power of two next below the root, up to a limit; 1 if groups are few."""
    return 1 if groups <= _FEW_GROUPS else min(1 << (groups.bit_length() - 1) // 2, _MAX_SET)


def _argmin_by_sets(minima: Tensor, several: int) -> Tensor:
    """Return the first lowest of each column, (groups, n) to (n,), by the lowest of each ``several`` in a row."""
    if several == 1:
        return minima.min(0).indices
    count = minima.shape[1]
    chosen = torch.amin(minima.view(-1, several, count), 1).min(0).indices
    columns = torch.arange(count)
    flat = torch.add(columns, chosen, alpha=several * count) + (torch.arange(several) * count).unsqueeze(1)
    within = minima.view(-1).index_select(0, flat.view(-1)).view(several, count)
    return torch.add(within.min(0).indices, chosen, alpha=several)
