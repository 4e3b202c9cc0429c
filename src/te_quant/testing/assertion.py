"""The verdict: an assertion that fails where an output does not follow its input.

Shape letters: B batch, C channels, H W sides of the images, h w sides of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from te_quant._checks import require, require_number
from te_quant.shifts import Protocol, Shift
from te_quant.testing.difference import ShiftDifference, TokenShift, equivariance_error

__all__ = ["TOLERANCES", "assert_shift_equivariant"]

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
    tolerance: float | None = None,
    protocol: Protocol = "circular",
    token_shift: TokenShift | None = None,
    fill: float = -1.0,
    size: tuple[int, int] | None = None,
) -> None:
    """Fail at the first shift that the output does not follow.

    Example:
        >>> layer = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular").double()
        >>> photos = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
        >>> assert_shift_equivariant(layer, photos, shifts=[(2, 0), (-4, 6)], stride=2)

    Args:
        function: images -> feature map or indices. Put a model in evaluation mode first.
        images: any images; under ``crop`` larger than the window.
        shifts: pixel shifts (dy, dx), at least one.
        stride: s, pixels from one position of the output to the next.
        tolerance: largest ``relative_error`` of a floating output; of indices, the largest share that may differ.
            None: :data:`TOLERANCES` of the dtype of the output, and no index.
        protocol: how images move: ``circular``, ``canvas`` or ``crop``; see :mod:`te_quant.shifts`.
        token_shift: how far the output has to move, image by image, where that is not ``shift / stride``, as
            :func:`phase_token_shift` gives for adaptive polyphase layers.
        fill: value of the ground, under ``canvas``.
        size: (height, width) of the window, under ``crop``.

    Shape:
        images: (B, C, H, W). function: -> (B, ..., h, w), floating point or integer.

    Raises:
        AssertionError: the output does not move with the images. The message names the shift, the position, the
            size of the error and the likely cause.
        ValueError: there is no shift, a shift is no multiple of the stride, the output has another shape after
            the shift, or no position is valid in both.
    """
    amounts = list(shifts)
    require(len(amounts) > 0, "shifts", "at least one", "none")
    if tolerance is not None:
        tolerance = require_number("tolerance", tolerance, 0)
    options: dict[str, Any] = {"protocol": protocol, "token_shift": token_shift, "fill": fill, "size": size}
    for shift in amounts:
        error = equivariance_error(function, images, shift, stride=stride, **options)
        allowed = tolerance
        if allowed is None:
            allowed = 0.0 if error.is_indices else TOLERANCES[error.dtype]
        if (error.rate if error.is_indices else error.relative_error) > allowed:
            raise AssertionError(_complaint(error, allowed, stride))


def _complaint(error: ShiftDifference, allowed: float, stride: int) -> str:
    expected, actual = error.expected, error.actual
    if error.is_indices:
        size = f"{error.differing} of {error.compared} indices differ ({allowed:.3g} of them may)"
        values = f"first at {error.position}: expected {int(expected)}, got {int(actual)}"
    else:
        size = f"relative error {error.relative_error:.3g} (tolerance {allowed:.3g} for {error.dtype})"
        values = f"largest at {error.position}: expected {expected:.6g}, got {actual:.6g}"
    if any(part % stride for part in error.shift):
        look = "the shift is no multiple of the stride, so at the downsampling layers"
    # Nearer to all of it than to the share that an error without any place would have there.
    elif error.near_border > (1 + error.border_area) / 2:
        look = f"{error.near_border:.0%} of the error lies beside the border, so at the padding"
    else:
        look = "the error lies all over the map, so at the stride, normalisation, attention and absolute positions"
    where = "position (image, ..., row, column) of the output for unshifted images"
    return (
        f"not equivariant at shift {error.shift}: {size}; {values} ({where}). Where to look: {look}. "
        "te_quant.equivariance.audit names the module."
    )
