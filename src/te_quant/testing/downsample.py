"""A check of downsampling layers: whether a layer keeps what it states.

Shape letters: B batch, C channels, H W pixels, s stride.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from te_quant._checks import require_int
from te_quant.contract import Statement
from te_quant.filters import PADDING_MODES, PaddingMode
from te_quant.layers import DownsampleFactory, statement_of
from te_quant.shifts import Shift, crop, roll
from te_quant.testing._surroundings import fixed_surroundings
from te_quant.testing.assertion import TOLERANCES, assert_shift_equivariant
from te_quant.testing.difference import phase_token_shift

__all__ = ["check_downsample"]

_SIDES = (12, 16)


def check_downsample(factory: DownsampleFactory, *, channels: int = 3) -> None:
    """Fail if a downsampling layer does not keep what it states, with a message that names the broken promise.

    The layer is built once per padding mode (only for ``circular`` if the class states ``periodic = True``) and
    measured in float64: it must halve even sides, return a phase if and only if it is adaptive, follow the shifts
    that it is ``exact_for``, and read no pixel beyond its ``reach``. It may state less than it keeps.

    Args:
        factory: the layer class, as you would add it to :data:`te_quant.layers.DOWNSAMPLERS`.
        channels: C of the images, at least 1.

    Raises:
        AssertionError: a promise is broken, or the layer states nothing although it could.

    Example:
        >>> from te_quant.contract import Reach
        >>> class Pick(nn.Module):
        ...     reach, exact_for = Reach(1, stride=2), "integer"
        ...
        ...     def __init__(self, channels, *, padding_mode):
        ...         super().__init__()
        ...
        ...     def forward(self, images):
        ...         return images[..., ::2, ::2]
        >>> check_downsample(Pick)
        Traceback (most recent call last):
        AssertionError: Pick with padding_mode='zeros' states exact_for='integer', so it must be adaptive.
        >>> Pick.exact_for = "stride"
        >>> check_downsample(Pick)
    """
    channels = require_int("channels", channels, 1)
    modes: tuple[PaddingMode, ...] = ("circular",) if getattr(factory, "periodic", False) else PADDING_MODES
    for mode in modes:
        with fixed_surroundings(0):
            layer = factory(channels, padding_mode=mode).double().eval()
            name = getattr(factory, "__name__", type(layer).__name__)
            _check(layer, f"{name} with padding_mode={mode!r}", channels)


def _check(layer: nn.Module, name: str, channels: int) -> None:
    kept = statement_of(layer)
    if not hasattr(layer, "reach") or not hasattr(layer, "exact_for"):
        _require(kept.exact_for != "none", f"{name} must state reach and exact_for, and is treated as 'none'.")
    # Larger than any margin that reflects them.
    more = 4 * ((kept.reach.size or 0) // 8)
    images = _noise(4, channels, *(side + more for side in _SIDES))
    _check_output(layer, name, images, kept)
    if kept.exact_for == "none":
        return
    stride = kept.reach.stride
    _require(stride == 2, f"{name} states a stride of {stride}, but it must be 2.")
    law = f"{name} states exact_for={kept.exact_for!r}, so it must be adaptive."
    _require(kept.exact_for != "integer" or kept.adaptive, law)
    if kept.exact_for == "interior":
        _check_interior(layer, name, kept, channels)
    else:
        _check_shifts(layer, name, images, kept)
    if kept.reach.size is not None:
        _check_reach(layer, name, kept, channels)


def _check_output(layer: nn.Module, name: str, images: Tensor, kept: Statement) -> None:
    output = layer(images)
    pair = isinstance(output, tuple)
    found = "it returns a pair" if pair else "it returns no phase"
    _require(pair == kept.adaptive, f"{name} states adaptive={kept.adaptive}, but {found}.")
    expected = (*images.shape[:2], *(side // 2 for side in images.shape[2:]))
    shape = tuple(_pixels(layer, images).shape)
    _require(shape == expected, f"{name} must turn {tuple(images.shape)} into {expected}, but returns {shape}.")


def _check_shifts(layer: nn.Module, name: str, images: Tensor, kept: Statement) -> None:
    shifts: list[Shift] = [(2, 0), (0, 2), (4, -6)]
    law = None
    if kept.exact_for == "integer":
        shifts += [(1, 0), (0, 1), (3, -5)]
        law = phase_token_shift(lambda images: layer(images)[1], 2)
    try:
        assert_shift_equivariant(
            lambda images: _pixels(layer, images), images, shifts=shifts, stride=2, token_shift=law
        )
    except (AssertionError, ValueError) as error:
        raise AssertionError(f"{name} states exact_for={kept.exact_for!r}, but it is {error}") from error


def _check_interior(layer: nn.Module, name: str, kept: Statement, channels: int) -> None:
    """Compare the pixels inside two windows of a larger image that is loud outside their intersection."""
    size = kept.reach.size
    if size is None:
        raise AssertionError(f"{name} states exact_for='interior', so its reach must have a size.")
    side, margin = 2 * (size + 10), 8
    larger = _noise(2, channels, side + 2 * margin, side + 2 * margin)
    larger[..., margin:-margin, margin:-margin] /= 30
    views = [crop(larger, shift, size=(side, side)) for shift in ((0, 0), (4, -2))]
    before, after = (_pixels(layer, view) for view in views)
    # A distance of `size` pixels to every side, before and after.
    inner = slice((size + 1) // 2 + 2, (side - size) // 2 - 2)
    difference = (roll(after, (-2, 1)) - before)[..., inner, inner].abs().max()
    close = bool(difference <= TOLERANCES[torch.float64] * before.abs().max())
    _require(close, f"{name} states exact_for='interior', but pixels {size} pixels from the border feel it.")


def _check_reach(layer: nn.Module, name: str, kept: Statement, channels: int) -> None:
    """Measure which pixels move one pixel of the output, over several images and every channel."""
    size = kept.reach.size or 0
    side = 4 * (size // 2 + 4)
    images = _noise(16, channels, side, side).requires_grad_()
    output = _pixels(layer, images)
    middle = output.shape[-1] // 2
    (gradient,) = torch.autograd.grad(output[..., middle, middle].sum(), images)
    for axis in (-2, -1):
        touched = (gradient != 0).any(axis).any(1)
        # A phase selects another square in each image; that does not count as reach.
        groups = touched if kept.adaptive else touched.any(0, keepdim=True)
        for group in groups:
            places = group.nonzero().flatten()
            span = int(places[-1] - places[0]) + 1 if len(places) else 0
            _require(span <= size, f"{name} states a reach of {size} pixels, but it reads {span}.")


def _pixels(layer: nn.Module, images: Tensor) -> Tensor:
    output = layer(images)
    pixels: Tensor = output[0] if isinstance(output, tuple) else output
    return pixels


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
