"""Where a feature map lies on the image, which of its positions a border can reach, and how far it moved wrongly.

Shape letters: B batch, C channels, H W sides of the image, h w sides of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import product
from typing import Any

import torch
from torch import Tensor

from te_quant._checks import require
from te_quant._measuring.float64 import float64
from te_quant.equivariance._border import border_distances
from te_quant.shifts import Shift, fourier_shift, roll

__all__ = [
    "Amount",
    "error_map",
    "first_grid",
    "first_map",
    "has_positions",
    "map_tensors",
    "near_border",
    "refuse_sides",
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
    return next((value for value in _tensors(values) if stride_of(value, sides, batch) is not None), None)


def first_map(values: object, batch: int) -> Tensor | None:
    """The first floating (B, C, h, w) tensor, whatever its sides; None without one."""
    maps = (v for v in _tensors(values) if v.ndim == 4 and v.is_floating_point() and v.shape[0] == batch)
    return next(maps, None)


def has_positions(values: object) -> bool:
    """Whether a floating tensor in there holds more than one position: (B, N, D), (B, C, h, w) or larger."""
    return any(
        value.is_floating_point() and value.ndim >= 3 and (value.ndim == 3 or math.prod(value.shape[2:]) > 1)
        for value in _tensors(values)
    )


def refuse_sides(module: str, source: Tensor, result: Tensor, sides: tuple[int, int]) -> None:
    """Refuse images whose sides keep the output of a module from being a grid, and name sides that do not.

    Args:
        module: what the error calls the module.
        source: the grid that it was given.
        result: its output, which is no grid.
        sides: (H, W) of the images.

    Raises:
        ValueError: other sides would help.

    Shape:
        source: (B, ·, h, w). result: (B, ·, h', w').
    """
    h, w = (int(side) for side in result.shape[2:])
    gives = f"of {module}, which gives {h}x{w}"
    ratio = Fraction(sides[0], h)
    if ratio == Fraction(sides[1], w) and ratio.denominator == 1:
        # One position is a mean over the image, in which nothing can move.
        fits = max(h, w) == 1 or min(h, w) >= MIN_SIDE
        require(fits, "images sides", f"at least {MIN_SIDE} times the stride {ratio} {gives}", sides)
        return
    before = [int(side) for side in source.shape[2:]]
    step = max(1, round(before[0] / h))
    rounded = all(
        new in (old // step, -(-old // step)) for old, new in zip(before, (h, w), strict=True)
    )  # floor or ceiling of the quotient: what a stride leaves of sides that it does not divide
    if step > 1 and rounded:
        stride = step * Fraction(sides[0], before[0])
        cure = "x".join(str(side // stride * stride) for side in sides)
        fits = all(side % stride == 0 for side in sides)
        require(fits, "images sides", f"multiples of the stride {stride} {gives}", f"{sides}; crop them to {cure}")


def _tensors(values: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings, in their order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


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
