"""The measure: how far f(T x) is from T f(x), for any callable, and where they differ.

Shape letters: B batch, C channels, H W sides of the images, h w sides of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from te_quant._checks import require, require_choice, require_int, require_integer_tensor, require_rank
from te_quant._measuring.calls import call_on_copy
from te_quant._measuring.float64 import float64
from te_quant.equivariance._border import border_distances
from te_quant.shifts import PROTOCOLS, Protocol, Shift, align, canvas, crop, roll
from te_quant.tables import Table, Tabular

__all__ = ["ShiftDifference", "TokenShift", "equivariance_error", "phase_token_shift"]

TokenShift = Callable[[Tensor, Tensor, Shift], Tensor]
"""(images, shifted images, shift) -> (B, 2) integers, how far the output of each image has to move."""


@dataclass(frozen=True)
class ShiftDifference(Tabular):
    """How far f(T x) is from T f(x), over the positions valid in both.

    Attributes:
        shift: (dy, dx) of the images, pixels.
        max_error: largest absolute difference; inf where only one side is NaN or infinite.
        relative_error: the same over the largest finite absolute value of f(x); 0 if both vanish.
        differing: values (or indices) that are not bitwise equal.
        compared: values compared.
        position: (image, ..., row, column) in f(x): of the largest difference, or for indices the first one;
            None if nothing differs. Of an invariant output (image, channel) or (image,).
        expected: the value of f(x) there.
        actual: the value of f(T x) where it should have moved to.
        near_border: share of the squared error (of the differing indices) within an eighth of the side, or one
            position, from the border of f(x) or of f(T x); NaN if nothing differs, and without positions.
        border_area: share of such positions; NaN without positions.
        is_indices: whether the output is an integer tensor.
        dtype: of the output.
        is_invariant: whether the output has no positions, so that it has to stay as it is.
        input_sides: (H, W) of what the function was given.
        output_sides: (h, w) of f(x); None without positions.
        output_shape: of f(x).
    """

    shift: Shift
    max_error: float
    relative_error: float
    differing: int
    compared: int
    position: tuple[int, ...] | None
    expected: float
    actual: float
    near_border: float
    border_area: float
    is_indices: bool
    dtype: torch.dtype
    is_invariant: bool = False
    input_sides: tuple[int, int] = (0, 0)
    output_sides: tuple[int, int] | None = None
    output_shape: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """Share of values that differ."""
        return self.differing / self.compared

    def where(self) -> str:
        """Return what the entries of ``position`` count."""
        if self.is_invariant:
            return "position (image, channel)"
        return "position (image, ..., row, column)"

    def summary(self) -> Table:
        """Return by how much, how often and where f(T x) differs."""
        rows = [
            ["shift (pixels)", str(self.shift)],
            ["largest difference / largest value", f"{self.relative_error:.3g}"],
            ["values that differ", f"{self.differing:,} of {self.compared:,}"],
        ]
        if self.position is not None:
            rows += [
                [self.where(), str(self.position)],
                ["value expected there", f"{self.expected:.6g}"],
                ["value found", f"{self.actual:.6g}"],
            ]
            if not self.is_invariant:
                rows.append(["share of the error near the border", f"{self.near_border:.0%}"])
        return Table(["f(T x) against T f(x)", "value"], rows)


@torch.no_grad()
def equivariance_error(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    shift: Shift,
    *,
    stride: int = 1,
    upsampling: int = 1,
    protocol: Protocol = "circular",
    token_shift: TokenShift | None = None,
    fill: float = -1.0,
    size: tuple[int, int] | None = None,
) -> ShiftDifference:
    """Compare f(T x) with f(x), moved by the same shift in positions of the output.

    An output without positions, (B, K) or (B,), is compared as it is. The function has to return the same for the
    same images; of a random one the noise is measured too.

    Example:
        >>> layer = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular").double()
        >>> equivariance_error(layer, torch.rand(1, 1, 8, 8).double(), (3, -2)).relative_error < 1e-12
        True

    Args:
        function: images -> feature map, indices or numbers; or tokens -> images. Put a model in evaluation mode
            first.
        images: any images, codes or indices; under ``crop`` larger than the window.
        shift: (dy, dx) in pixels (in tokens for a decoder), down and right.
        stride: s, pixels from one position of the output to the next.
        upsampling: positions of the output for one of the input: of a decoder, the pixels per token.
        protocol: how images move, see :mod:`te_quant.shifts`.
        token_shift: how far the output has to move, image by image, where that is not ``shift * upsampling /
            stride``; see :func:`phase_token_shift`. None: that must be whole.
        fill: value of the ground, under ``canvas``.
        size: (height, width) of the window, under ``crop``.

    Shape:
        images: (B, C, H, W), or (B, H, W) integer. function: -> (B, ..., h, w), (B, K) or (B,), floating point or
        integer.

    Raises:
        ValueError: the shift is no multiple of the stride, the output has another shape after the shift, or no
            position is valid in both.
        TypeError: the output is no tensor, or is complex or boolean.
    """
    whole_numbers = isinstance(images, Tensor) and not images.is_floating_point()
    expected = "(B, C, H, W), or (B, H, W) of integers"
    require_rank("images", images, (3, 4) if whole_numbers else (4,), expected)
    stride = require_int("stride", stride, 1)
    upsampling = require_int("upsampling", upsampling, 1)
    require_choice("protocol", protocol, PROTOCOLS)
    first, second = (_view(images, t, protocol, fill, size) for t in ((0, 0), shift))
    reference, moved = _output(function, first), _output(function, second)
    require(
        len(reference) == len(images), "function(images)", f"one output per image, {len(images)}", len(reference)
    )
    fits = moved.shape == reference.shape and moved.dtype == reference.dtype
    shown = f"{tuple(reference.shape)} and {tuple(moved.shape)}"
    require(fits, "function(images)", "of one shape (B, ..., h, w) and dtype before and after the shift", shown)
    if token_shift is None:
        dy, dx = shift[0] * upsampling, shift[1] * upsampling
        multiple = f"a multiple of the stride {stride}, as no token_shift is given"
        if upsampling > 1:
            multiple = f"such that shift * upsampling {upsampling} is {multiple}"
        require(dy % stride == 0 and dx % stride == 0, "shift", multiple, shift)
        steps = [(dy // stride, dx // stride)] * len(images)
    else:
        law = token_shift(first, second, shift)
        fits = isinstance(law, Tensor) and law.shape == (len(images), 2) and not law.is_floating_point()
        require(fits, "token_shift(...)", f"an integer tensor of shape {(len(images), 2)}", law)
        steps = [(int(dy), int(dx)) for dy, dx in law.tolist()]
    found = _compare(reference, moved, steps, shift, protocol)
    return replace(
        found,
        input_sides=_sides(first),
        output_sides=None if found.is_invariant else _sides(reference),
        output_shape=tuple(reference.shape),
    )


def phase_token_shift(offsets: Callable[[Tensor], Tensor], stride: int) -> TokenShift:
    """Return the law of adaptive polyphase models: images moved by t move tokens by (t + o - o') / s.

    Args:
        offsets: images -> o, the pixel at which the sampling grid starts. For layers l of strides s_l with
            phases p_l it is Σ_l p_l · Π_{m<l} s_m.
        stride: s of the model.

    Shape:
        offsets: (B, C, H, W) -> (B, 2) integers, rows and columns.

    Raises:
        ValueError: (when called) t + o - o' is no multiple of s, so that the offsets do not follow the law.

    Source: Chaman & Dokmanić 2021, arXiv:2011.14214, whose layers choose the phase by its content.
    """
    stride = require_int("stride", stride, 1)

    def law(images: Tensor, shifted: Tensor, shift: Shift) -> Tensor:
        before, after = offsets(images), offsets(shifted)
        for found in (before, after):
            require_integer_tensor("offsets(images)", found)
        # As signed numbers: differences of bytes would wrap around.
        moved = before.long() - after.long()
        moved = moved + torch.tensor(shift, device=moved.device)
        whole = bool((moved % stride == 0).all())
        require(whole, "offsets", f"such that t + o - o' is a multiple of the stride {stride}", moved.tolist())
        return moved // stride

    return law


def _view(images: Tensor, shift: Shift, protocol: Protocol, fill: float, size: tuple[int, int] | None) -> Tensor:
    if protocol == "circular":
        return roll(images, shift)
    if protocol == "canvas":
        return canvas(images, shift, fill=fill)
    if size is None:
        raise ValueError("size must be (height, width) under the crop protocol, got None.")
    return crop(images, shift, size=size)


def _sides(values: Tensor) -> tuple[int, int]:
    return values.shape[-2], values.shape[-1]


def _output(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    output = call_on_copy(function, images)
    if not isinstance(output, Tensor) or output.is_complex() or output.dtype == torch.bool:
        actual = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"function(images) must be a floating-point or integer tensor, got {actual}.")
    expected = "of shape (B, ..., h, w), or (B, K) or (B,) without positions"
    fits = output.ndim >= 3 or (output.ndim > 0 and len(output) == len(images))
    require(fits, "function(images)", expected, f"shape {tuple(output.shape)}")
    return output


def _compare(
    reference: Tensor, moved: Tensor, steps: list[Shift], shift: Shift, protocol: Protocol
) -> ShiftDifference:
    is_indices, is_invariant = not reference.is_floating_point(), reference.ndim < 3
    if is_invariant:
        # One position per image, which stays where it is.
        shape = reference.shape
        reference, moved = (output.reshape(len(output), -1, 1, 1) for output in (reference, moved))
        steps = [(0, 0)] * len(steps)
    near = _near_border(reference)
    compared = differing = area = 0
    weight = beside = largest = score = 0.0
    place: tuple[int, ...] | None = None
    values = (0.0, 0.0)
    for image, step in enumerate(steps):
        first, second = align(reference[image], moved[image], step, protocol=protocol)
        border = torch.stack(align(near, near, step, protocol=protocol)).any(0)
        unequal, difference = _difference(first, second)
        compared += unequal.numel()
        differing += int(unequal.sum())
        area += int(border.expand_as(unequal).sum())
        # Of indices the first difference counts, of values the largest.
        error = float64(unequal) if is_indices else difference.nan_to_num(posinf=1e150).square()
        weight += float(error.sum())
        beside += float((error * border).sum())
        most = float(difference.max()) if difference.numel() else 0.0
        largest = max(largest, most)
        new = float(error.max()) if error.numel() else 0.0
        if new > score:
            score = new
            found = torch.unravel_index(error.flatten().argmax(), error.shape)
            inner = [int(i) for i in found]
            values = (float(first[tuple(inner)]), float(second[tuple(inner)]))
            if protocol != "circular":
                # Aligned positions are counted from the first one that is valid in both.
                inner[-2:] = [p + max(0, -k) for p, k in zip(inner[-2:], step, strict=True)]
            place = (image, *inner)
    if is_invariant and place is not None:
        place = place[: len(shape)]
    positions = "x".join(str(side) for side in _sides(reference))
    cure = f"the output has {positions} positions: pass larger images or a smaller shift"
    require(compared > 0, "shift", "one that leaves positions valid in both", f"{shift}; {cure}")
    # An infinity is no scale: everything would be small beside it.
    scale = float(float64(reference).abs().nan_to_num(nan=0.0, posinf=0.0).max())
    return ShiftDifference(
        shift=shift,
        max_error=largest,
        relative_error=largest / scale if scale > 0 else largest,
        differing=differing,
        compared=compared,
        position=place,
        expected=values[0],
        actual=values[1],
        near_border=beside / weight if differing and not is_invariant else math.nan,
        border_area=math.nan if is_invariant else area / compared,
        is_indices=is_indices,
        dtype=reference.dtype,
        is_invariant=is_invariant,
    )


def _difference(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    # Equal infinities are equal; a NaN equals nothing, not even the same NaN.
    unequal = first != second
    difference = (float64(first) - float64(second)).abs()
    difference = torch.where(unequal.to(difference.device), difference, 0.0)
    return unequal, difference.nan_to_num(nan=math.inf, posinf=math.inf)


def _near_border(output: Tensor) -> Tensor:
    sides = (int(output.shape[-2]), int(output.shape[-1]))
    rows, columns = (distance < max(1, len(distance) // 8) for distance in border_distances(sides))
    return (rows[:, None] | columns[None, :]).to(output.device)
