"""The verdict: an assertion that fails where an output does not follow its input.

Shape letters: B batch, C channels, H W sides of the images, h w sides of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from te_quant._checks import require, require_number
from te_quant.shifts import Protocol, Shift
from te_quant.testing.difference import ShiftDifference, TokenShift, equivariance_error

__all__ = ["TOLERANCES", "assert_shift_equivariant"]

# A share of the error that leaves nothing for the inside.
_ALL = 0.99
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}
"""Largest difference over largest value that counts as rounding, for each dtype.

Kernels sum in another order at another place. A circular encoder of forty layers, exact on paper, shows
13 epsilons in float64, 9 in float32 and 2 in the half precisions. These are 25 to 50 epsilons in half precision,
800 in single, and more in double, where even that stands nine orders below what a wrong border or a strided layer
does (0.1 and more). In bfloat16 the two are close, so use float64 for a verdict."""


def assert_shift_equivariant(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    shifts: Iterable[Shift],
    stride: int = 1,
    upsampling: int = 1,
    tolerance: float | None = None,
    protocol: Protocol = "circular",
    token_shift: TokenShift | None = None,
    fill: float = -1.0,
    size: tuple[int, int] | None = None,
) -> None:
    """Fail at the first shift that the output does not follow.

    An output without positions, (B, K) or (B,), has to be invariant: it must not change. Where the assertion
    fails, the function is called twice more on the same images, and the message says so if it is random.
    An output that is the same everywhere, such as that of a quantizer of one code, follows every shift and passes:
    of a collapsed tokenizer, test the latents instead.

    Example:
        >>> layer = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular").double()
        >>> photos = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
        >>> assert_shift_equivariant(layer, photos, shifts=[(2, 0), (-4, 6)], stride=2)
        >>> decoder = torch.nn.ConvTranspose2d(8, 3, 4, stride=4).double()
        >>> codes = torch.rand(2, 8, 6, 6, dtype=torch.float64)
        >>> assert_shift_equivariant(decoder, codes, shifts=[(1, 0), (0, -2)], upsampling=4)

    Args:
        function: images -> feature map, indices or numbers; or tokens -> images. Put a model in evaluation mode
            first.
        images: any images, or what a decoder takes: codes or indices. Under ``crop`` larger than the window.
        shifts: shifts (dy, dx) in pixels (in tokens for a decoder), at least one of which moves the images: under
            ``circular`` (0, 0) and multiples of the sides do not.
        stride: s, pixels from one position of the output to the next.
        upsampling: positions of the output for one of the input: of a decoder, the pixels per token.
        tolerance: largest ``relative_error`` of a floating output; of indices, the largest share that may differ.
            None: :data:`TOLERANCES` of the dtype of the output; no index may differ.
        protocol: how images move: ``circular``, ``canvas`` or ``crop``; see :mod:`te_quant.shifts`.
        token_shift: how far the output has to move, image by image, where that is not ``shift * upsampling /
            stride``, as :func:`phase_token_shift` gives for adaptive polyphase layers.
        fill: value of the ground, under ``canvas``.
        size: (height, width) of the window, under ``crop``.

    Shape:
        images: (B, C, H, W), or (B, H, W) integer. function: -> (B, ..., h, w), (B, K) or (B,), floating point or
        integer.

    Raises:
        AssertionError: the output does not move with the images. The message names the shift, the position, the
            size of the error and the likely cause: a layer, a random function, NaN or infinity in the output, or
            that the sides of the output show another ``stride`` or ``upsampling``, or do not fit circular shifts.
        ValueError: no shift moves the images, a shift does not move the output by whole positions, the output has
            another shape after the shift, or no position is valid in both.
    """
    amounts = list(shifts)
    require(len(amounts) > 0, "shifts", "at least one", "none")
    if tolerance is not None:
        tolerance = require_number("tolerance", tolerance, 0)
    options: dict[str, Any] = {"protocol": protocol, "fill": fill, "size": size}
    moving, sides = False, (0, 0)
    for shift in amounts:
        factors: dict[str, Any] = {"stride": stride, "upsampling": upsampling, "token_shift": token_shift}
        error = equivariance_error(function, images, shift, **factors, **options)
        sides = error.input_sides
        periods = sides if protocol == "circular" else (math.inf, math.inf)
        moving |= any(part % period for part, period in zip(shift, periods, strict=True))
        allowed = tolerance
        if allowed is None:
            allowed = 0.0 if error.is_indices else TOLERANCES[error.dtype]
        if _size(error) > allowed:
            noise = equivariance_error(function, images, (0, 0), **options)
            # NaN differs from itself without any randomness.
            random = allowed < _size(noise) < math.inf
            if random:
                look = _randomness(noise)
            elif not _is_finite(error):
                look = _not_finite(images)
            else:
                call = _other_call(error, stride, upsampling, protocol) if token_shift is None else ""
                look = call or f"Where to look: {_suspect(error, stride)}."
            raise AssertionError(f"{_complaint(error, allowed)} {look}")
    still = f"{amounts}, which every function follows"
    require(moving, "shifts", f"some that move images of {_text(sides)} under {protocol!r}", still)


def _size(error: ShiftDifference) -> float:
    """Return what the tolerance bounds."""
    return error.rate if error.is_indices else error.relative_error


def _is_finite(error: ShiftDifference) -> bool:
    """Return whether the largest difference is one of numbers."""
    return math.isfinite(error.expected) and math.isfinite(error.actual)


def _complaint(error: ShiftDifference, allowed: float) -> str:
    expected, actual = error.expected, error.actual
    kind = "invariant" if error.is_invariant else "equivariant"
    if not _is_finite(error):
        place = f"{error.position} ({error.where()})"
        return (
            f"not {kind} at shift {error.shift}: the output is {expected:.6g} at {place} for unshifted images, "
            f"and {actual:.6g} where that should have moved to for shifted ones."
        )
    if error.is_indices:
        size = f"{error.differing} of {error.compared} indices differ ({allowed:.3g} of them may)"
        values = f"first at {error.position}: expected {int(expected)}, got {int(actual)}"
    else:
        size = f"relative error {error.relative_error:.3g} (tolerance {allowed:.3g} for {error.dtype})"
        values = f"largest at {error.position}: expected {expected:.6g}, got {actual:.6g}"
    where = f"{error.where()} of the output for unshifted images"
    return f"not {kind} at shift {error.shift}: {size}; {values} ({where})."


def _randomness(noise: ShiftDifference) -> str:
    by = f"{noise.differing} of {noise.compared} indices"
    if not noise.is_indices:
        by = f"a relative error of {noise.relative_error:.3g}"
    return (
        f"But the function is random or changes its own state: two calls on the same images differ by {by}. "
        "Call model.eval(), or fix the seed inside the function, and try again."
    )


def _not_finite(images: Tensor) -> str:
    if not bool(images.isfinite().all()):
        return "The images have NaN or infinity themselves."
    return "Find where the function first makes NaN or infinity, which no tolerance can judge."


def _other_call(error: ShiftDifference, stride: int, upsampling: int, protocol: Protocol) -> str:
    """Name the stride or the upsampling that the sides of the output show; empty where the given ones agree.

    Other sides show neither. Circular shifts cannot move such an output with the images.
    """
    if error.output_sides is None:
        return ""
    sides = list(zip(error.input_sides, error.output_sides, strict=True))
    if all(before * upsampling == behind * stride for before, behind in sides):
        return ""
    (height, width), (h, w) = error.input_sides, error.output_sides
    wanted = [before * upsampling / stride for before, _ in sides]
    shape = error.output_shape
    if shape[1:3] == tuple(wanted):
        return (
            f"The output is (B, h, w, ...), {tuple(shape)}, but positions must be its last two axes: return "
            "output.movedim(-1, 1)."
        )
    if len(shape) == 3 and math.prod(wanted) in shape[1:]:
        return (
            f"The output is a sequence, {tuple(shape)}, but positions must be its last two axes: reshape it to "
            f"(B, ..., {wanted[0]:g}, {wanted[1]:g})."
        )
    larger = height >= h
    found = f"The output is {h}x{w} for {'images' if larger else 'an input'} of {height}x{width}"
    factors = {before / behind if larger else behind / before for before, behind in sides}
    factor = factors.pop()
    if factors or not factor.is_integer():
        needed = "x".join(f"{before * upsampling / stride:g}" for before, _ in sides)
        call = f"stride={stride}" + (f" and upsampling={upsampling}" if upsampling > 1 else "")
        cure = "pad circularly, or pass protocol='crop' with a size"
        if any(before * upsampling % stride for before, _ in sides):
            cure = f"pass inputs whose sides are multiples of {stride // math.gcd(stride, upsampling)}"
        fits = protocol != "circular"
        return "" if fits else f"{found}, but a circular shift needs {needed} at {call}: {cure}."
    right = {"stride": int(factor) if larger else 1, "upsampling": 1 if larger else int(factor)}
    given = {"stride": stride, "upsampling": upsampling}
    cure = " and ".join(f"{name}={value}" for name, value in right.items() if value != given[name])
    return f"{found}; pass {cure}."


def _text(sides: tuple[int, int]) -> str:
    return "x".join(str(side) for side in sides)


def _suspect(error: ShiftDifference, stride: int) -> str:
    audit = "te_quant.equivariance.audit names the module"
    if error.is_invariant:
        return (
            "an output without positions must not change; if it has positions in its axis, reshape it to "
            f"(B, ..., h, w). {audit}"
        )
    if any(part % stride for part in error.shift):
        look = "the shift is no multiple of the stride, so at the downsampling layers"
    # Nearer to all of it than to the share that an error without any place would have there.
    elif error.near_border > (1 + error.border_area) / 2:
        look = f"{error.near_border:.0%} of the error lies beside the border, so at the padding"
        if error.near_border < _ALL:
            look += ", and for the rest at what acts everywhere: absolute positions, normalization, attention"
    else:
        look = "the error lies all over the map, so at the stride, normalization, attention and absolute positions"
    return f"{look}. {audit}"
