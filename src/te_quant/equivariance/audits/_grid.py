"""Where a feature map lies on the image, which of its positions a border can reach, and how far it moved wrongly.

Shape letters: B batch, C channels, H W sides of the image, h w sides of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import product
from typing import Any

import torch
from torch import Tensor

from te_quant._measuring.float64 import float64
from te_quant.equivariance._border import border_distances
from te_quant.shifts import Shift, fourier_shift, roll

__all__ = [
    "Amount",
    "error_map",
    "first_grid",
    "map_tensors",
    "near_border",
    "stride_of",
    "token_amount",
]

Amount = tuple[Fraction, Fraction]
# With fewer positions along an axis nothing would be left between the two borders and the seam of a shift.
MIN_SIDE = 4


def stride_of(value: object, sides: tuple[int, int], batch: int) -> Fraction | None:
    """Pixels from one position of a feature map to the next; None for what is no grid over the image.

    A grid is a floating (B, C, h, w) tensor whose sides are those of the image divided (or multiplied) by one
    integer and are at least 4.
    """
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        return None
    h, w = value.shape[2:]
    if value.shape[0] != batch or min(h, w) < MIN_SIDE or Fraction(sides[0], h) != Fraction(sides[1], w):
        return None
    stride = Fraction(sides[0], h)
    return stride if 1 in (stride.numerator, stride.denominator) else None


def first_grid(values: object, sides: tuple[int, int], batch: int) -> Tensor | None:
    """The first grid among nested tuples, lists and mappings, in their order; None without one."""
    if isinstance(values, Tensor):
        return None if stride_of(values, sides, batch) is None else values
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            found = first_grid(value, sides, batch)
            if found is not None:
                return found
    return None


def map_tensors(values: Any, change: Any) -> Any:
    """Apply ``change`` to every tensor in nested tuples, lists and dicts; leave the rest as it is."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(map_tensors(value, change) for value in values))
    if type(values) in (list, tuple):
        return type(values)(map_tensors(value, change) for value in values)
    if type(values) is dict:
        return {key: map_tensors(value, change) for key, value in values.items()}
    return values


def token_amount(shift: Shift, stride: Fraction) -> Amount:
    """A shift in pixels, in positions of a grid."""
    return Fraction(shift[0]) / stride, Fraction(shift[1]) / stride


def near_border(grid: tuple[int, int], amount: Amount, share: int) -> Tensor:
    """Mark the positions closer than ``side // share`` to the border, before or after a circular shift.

    After a shift the old border runs through the middle of the map as a seam. Positions next to it
    were near the border before, and count as near.

    Shape:
        (h, w) bool.
    """
    marks = []
    for distances, moved in zip(border_distances(grid), amount, strict=True):
        near = distances < len(distances) // share
        marks.append(near | near.roll(math.ceil(moved)))
    return marks[0][:, None] | marks[1][None, :]


def error_map(reference: Tensor, moved: Tensor, amount: Amount, inside: Tensor | None = None) -> Tensor:
    """Squared error of ``moved`` against ``reference`` shifted by ``amount``, summed over channels.

    A whole shift has one meaning. Under a fractional one a feature map may move as band-limited signals do (the
    Fourier shift, both sides without their Nyquist frequency, whose shift is undefined), or by one of the whole
    shifts next to it, as adaptive polyphase layers do. Each image is judged by the meaning that fits it best.

    Args:
        reference: z(x).
        moved: z(T x).
        amount: positions, down and right.
        inside: (h, w) bool, the positions that choose the meaning; all if None.

    Shape:
        reference, moved: (B, C, h, w). Returns (B, h, w) float64.
    """
    reference, moved = float64(reference), float64(moved)
    steps = [sorted({math.floor(part), math.ceil(part)}) for part in amount]
    errors = [(moved - roll(reference, (dy, dx))).square().sum(1) for dy, dx in product(*steps)]
    if len(errors) == 1:
        return errors[0]
    smooth = moved
    for axis, part in zip((-2, -1), amount, strict=True):
        if part.denominator != 1:
            smooth = _without_nyquist(smooth, axis)
    shifted = fourier_shift(reference, (float(amount[0]), float(amount[1])))
    stacked = torch.stack([*errors, (smooth - shifted).square().sum(1)])
    scores = stacked if inside is None else stacked[..., inside.to(stacked.device)].unsqueeze(-1)
    best = scores.sum(dim=(-2, -1)).argmin(dim=0)
    return stacked[best, torch.arange(len(best), device=best.device)]


def _without_nyquist(values: Tensor, axis: int) -> Tensor:
    side = values.shape[axis]
    if side % 2:
        return values
    signs = 1 - 2 * (torch.arange(side, device=values.device) % 2).to(values.dtype)
    signs = signs.unsqueeze(-1) if axis == -2 else signs
    return values - (values * signs).mean(axis, keepdim=True) * signs
