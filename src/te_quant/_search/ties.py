"""Equal codes: the first of them stands for all.

A matrix product may round the same code differently at two places of a tile. Equal codes are where ties come from
in practice (k-means and revival on blank images), so their indices are sent to the lowest one after the search.

Shape letters: K codes, C code size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["first_of_equal_codes", "first_of_equals"]

# Odd, so that its powers, one per column, are invertible modulo 2^64. Source: Knuth, MMIX's generator.
_HASH_MULTIPLIER = 6364136223846793005
# Entries of each code that are looked at first: codes in half precision often agree in one or two.
_FIRST_ENTRIES = 4


def first_of_equal_codes(indices: Tensor, codebook: Tensor) -> Tensor:
    """Replace the index of a code by that of the first code that equals it."""
    first = first_of_equals(codebook)
    return indices if first is None else first[indices]


def first_of_equals(codebook: Tensor) -> Tensor | None:
    """Return the lowest index of the same code, for each code: (K, C) -> (K,); None if all codes differ."""
    if codebook.device.type != "cpu":
        # Asking how many could be equal would mean waiting for the device.
        return _first_of_equal_rows(codebook)
    # Almost no two codes agree even in their first entries. Only those that do are compared as a whole.
    keys, order = _hash(codebook[:, :_FIRST_ENTRIES]).sort()
    shared = keys[1:] == keys[:-1]
    if not shared.any():
        return None
    before, behind = (F.pad(shared, side) for side in ((0, 1), (1, 0)))
    suspects = order[before | behind].sort().values
    first = torch.arange(len(codebook), device=codebook.device)
    first[suspects] = suspects[_first_of_equal_rows(codebook[suspects])]
    return first


def _first_of_equal_rows(codes: Tensor) -> Tensor:
    """Return the lowest index of the same row, for each row: (n, C) -> (n,)."""
    keys, order = _hash(codes).sort(stable=True)
    same = (keys[1:] == keys[:-1]) & (codes[order[1:]] == codes[order[:-1]]).all(1)
    place = torch.arange(len(keys), device=keys.device)
    place[1:].masked_fill_(same, 0)
    return torch.empty_like(order).scatter_(0, order, order[place.cummax(0).values])


def _hash(codes: Tensor) -> Tensor:
    """Hash the bits of each row, in integers because these have no rounding: (n, C) -> (n,) int64."""
    bits = _bits(codes)
    bits = bits ^ (bits >> (4 * bits.element_size()))
    multipliers = torch.full_like(bits[0], _HASH_MULTIPLIER, dtype=torch.int64).cumprod(0)
    return (bits * multipliers).sum(1)


def _bits(numbers: Tensor) -> Tensor:
    """The same memory as integers; + 0 makes -0 equal to 0."""
    return (numbers + 0.0).view(torch.int64 if numbers.dtype == torch.float64 else torch.int32)
