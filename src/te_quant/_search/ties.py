"""Equal codes: the first of them stands for all.

A matrix product may round the same code differently at two places of a tile. Equal codes are where ties come from
in practice (k-means and revival on blank images), so their indices are sent to the lowest one after the search.

Shape letters: K codes, C code size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_of_equals"]

# Odd, so that its powers, one per column, are invertible modulo 2^64. Source: Knuth, MMIX's generator.
_HASH_MULTIPLIER = 6364136223846793005


def first_of_equals(codebook: Tensor) -> Tensor | None:
    """Return the lowest index of the same code, for each code: (K, C) -> (K,); None if all codes differ."""
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
