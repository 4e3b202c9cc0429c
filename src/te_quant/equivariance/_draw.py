"""Stratified draws of shifts below one token, where all of them would take too long.

Shape letters: s stride, n shifts drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TypeVar

import torch

from te_quant.shifts import Shift

__all__ = ["FractionalShift", "all_sub_stride_shifts", "draw_fractional_shifts", "draw_sub_stride_shifts"]

FractionalShift = tuple[float, float]
_Item = TypeVar("_Item")
# Parts of a pixel that a drawn shift is a multiple of: a report stays readable, and binary fractions are exact.
_PARTS = 1024


def all_sub_stride_shifts(stride: int) -> tuple[Shift, ...]:
    """Return {0..s-1}² without the identity."""
    return tuple(shift for shift in product(range(stride), range(stride)) if shift != (0, 0))


def draw_sub_stride_shifts(stride: int, count: int, seed: int) -> tuple[Shift, ...]:
    """Draw shifts that are spread over {0..s-1}² without the identity, the same for the same seed.

    The shifts are ordered along Morton's curve, on which neighbours are close to each other in both directions.
    The curve is cut into ``count`` parts of equal length (up to one), and one shift is drawn from each.

    Args:
        stride: s.
        count: n, at most s² - 1.
        seed: of the draw; the global random state is neither read nor changed.
    """
    ordered = sorted(all_sub_stride_shifts(stride), key=_morton)
    return tuple(sorted(_one_of_each(ordered, count, torch.Generator().manual_seed(seed))))


def draw_fractional_shifts(stride: int, count: int, seed: int) -> tuple[FractionalShift, ...]:
    """Draw real shifts that are spread over [0, s)², in the same way; a place is drawn in each of n small squares.

    Args:
        stride: s.
        count: n.
        seed: of the draw; the global random state is neither read nor changed.
    """
    generator = torch.Generator().manual_seed(seed)
    side = 1
    while side**2 < count:
        side *= 2
    squares = _one_of_each(sorted(product(range(side), range(side)), key=_morton), count, generator)
    within = torch.rand(count, 2, generator=generator, dtype=torch.float64, device="cpu").tolist()

    def pixels(place: float) -> float:
        return math.floor(place * stride / side * _PARTS) / _PARTS

    return tuple((pixels(y + v), pixels(x + w)) for (y, x), (v, w) in zip(squares, within, strict=True))


def _one_of_each(ordered: Sequence[_Item], count: int, generator: torch.Generator) -> list[_Item]:
    drawn = []
    for part in range(count):
        start, stop = (len(ordered) * bound // count for bound in (part, part + 1))
        drawn.append(ordered[int(torch.randint(start, stop, (), generator=generator, device="cpu"))])
    return drawn


def _morton(place: Shift) -> int:
    """Interleave the bits of both coordinates."""
    bits = range(max(place).bit_length())
    return sum(((place[0] >> bit & 1) << 2 * bit + 1) | ((place[1] >> bit & 1) << 2 * bit) for bit in bits)
