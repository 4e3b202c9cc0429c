"""Exact shifts of images and token grids, and what stays comparable after them.

A shift (dy, dx) moves the *content* down by dy and right by dx, in every function here. Three protocols:

- ``circular``: what leaves on one side comes back on the other (:func:`roll`);
- ``canvas``: content moves on a constant ground and must stay inside (:func:`canvas`);
- ``crop``: a window moves over a larger image, against the shift (:func:`crop`).

Fractions of a pixel need interpolation: :func:`fourier_shift` wraps around, :func:`lanczos_shift` does not.

Shape letters: H W the last two axes, pixels or tokens; any axes before them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from te_quant._checks import require, require_choice, require_floating, require_int, require_number, require_type

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "Region",
    "Shift",
    "align",
    "canvas",
    "crop",
    "fourier_shift",
    "lanczos_shift",
    "place",
    "roll",
    "valid_tokens",
]

Protocol = Literal["circular", "canvas", "crop"]
Shift = tuple[int, int]
Region = tuple[slice, slice]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


def roll(images: Tensor, shift: Shift) -> Tensor:
    """Shift circularly: content that leaves on one side comes back on the other.

    Args:
        images: pixels or tokens, any dtype.
        shift: (dy, dx), down and right; any integers.

    Shape:
        images: (..., H, W). Returns the same.

    Raises:
        ValueError: fewer than two axes, or ``shift`` is not a pair.
        TypeError: ``shift`` does not hold ints.
    """
    _require_plane("images", images)
    return torch.roll(images, _pair("shift", shift), dims=(-2, -1))


def canvas(images: Tensor, shift: Shift, *, fill: float) -> Tensor:
    """Move content over a constant ground; vacated places become ground.

    Nothing but ground may leave the canvas: a shift that would cut content off is refused, since the two
    images would then no longer show the same thing. Reads the data (a device synchronization).

    Args:
        images: pixels or tokens, any real dtype.
        shift: (dy, dx), down and right.
        fill: value of the ground, in the unit of ``images``; -1 for black in images in [-1, 1].

    Shape:
        images: (..., H, W). Returns the same.

    Raises:
        ValueError: content would leave, or integer ``images`` cannot hold ``fill``.
    """
    _require_plane("images", images)
    dy, dx = _pair("shift", shift)
    _require_ground(images, fill)
    source, target = valid_tokens((images.shape[-2], images.shape[-1]), (dy, dx), "canvas")
    moved = torch.full_like(images, fill)
    moved[..., target[0], target[1]] = images[..., source[0], source[1]]
    lost = int((images != fill).sum()) - int((moved != fill).sum())
    if lost > 0 and not bool((images == fill).any()):
        require(False, "fill", "the value of the ground of images", f"{fill:g}, which no pixel has")
    require(lost == 0, "shift", "one that keeps all content on the canvas", f"{(dy, dx)}, which cuts {lost} off")
    return moved


def crop(images: Tensor, shift: Shift, *, size: tuple[int, int]) -> Tensor:
    """Cut a window out of larger images, so placed that the content in it moves by ``shift``.

    The window lies in the middle for a shift of (0, 0), its corner at ``(H - size) // 2``, and moves by
    ``-shift``.

    Args:
        images: pixels or tokens, any dtype.
        shift: (dy, dx), down and right.
        size: (height, width) of the window, at least 1 each.

    Shape:
        images: (..., H, W). Returns (..., height, width).

    Raises:
        ValueError: the window leaves the image.
    """
    _require_plane("images", images)
    dy, dx = _pair("shift", shift)
    height, width = _pair("size", size)
    sides = (images.shape[-2], images.shape[-1])
    require(height >= 1 and width >= 1, "size", "at least 1 pixel each way", (height, width))
    top, left = (sides[0] - height) // 2 - dy, (sides[1] - width) // 2 - dx
    inside = 0 <= top <= sides[0] - height and 0 <= left <= sides[1] - width
    cure = "pass larger images, or a smaller window or shift"
    require(inside, "shift", f"one that keeps a {height}x{width} window inside {sides}", f"{(dy, dx)}; {cure}")
    return images[..., top : top + height, left : left + width]


def place(sprites: Tensor, offset: Shift, *, size: tuple[int, int], fill: float) -> Tensor:
    """Paste sprites on a constant ground with their top left corner at ``offset``.

    Args:
        sprites: pixels or tokens.
        offset: (top, left) in pixels of the canvas.
        size: (height, width) of the canvas.
        fill: value of the ground, in the unit of ``sprites``.

    Shape:
        sprites: (..., H, W). Returns (..., height, width).

    Raises:
        ValueError: the sprite does not lie inside the canvas, or integer ``sprites`` cannot hold ``fill``.
    """
    _require_plane("sprites", sprites)
    top, left = _pair("offset", offset)
    height, width = _pair("size", size)
    _require_ground(sprites, fill)
    sides = (sprites.shape[-2], sprites.shape[-1])
    inside = 0 <= top <= height - sides[0] and 0 <= left <= width - sides[1]
    require(inside, "offset", f"one that keeps a {sides} sprite inside {(height, width)}", (top, left))
    canvases = sprites.new_full((*sprites.shape[:-2], height, width), fill)
    canvases[..., top : top + sides[0], left : left + sides[1]] = sprites
    return canvases


def valid_tokens(grid: tuple[int, int], shift: Shift, protocol: Protocol) -> tuple[Region, Region]:
    """Say where both the reference and the shifted grid show the same content.

    Args:
        grid: (height, width) in tokens (or pixels).
        shift: (dy, dx) in the same unit.
        protocol: ``circular``, ``canvas`` or ``crop``.

    Returns:
        The region of the reference and the region of the shifted grid, as pairs of slices of equal size.
        Position u of the first region corresponds to u + shift, the same place in the second one. Under
        ``circular`` both are the whole grid and correspondence is modulo the sides.
    """
    height, width = _pair("grid", grid)
    dy, dx = _pair("shift", shift)
    require_choice("protocol", protocol, PROTOCOLS)
    if protocol == "circular":
        whole = (slice(0, height), slice(0, width))
        return whole, whole
    rows, columns = _overlap(height, dy), _overlap(width, dx)
    return (rows[0], columns[0]), (rows[1], columns[1])


def align(reference: Tensor, shifted: Tensor, shift: Shift, *, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Bring the shifted tokens back onto the reference and keep those valid in both.

    Args:
        reference: tokens of x.
        shifted: tokens of the shifted x.
        shift: (dy, dx) in tokens.
        protocol: ``circular``, ``canvas`` or ``crop``.

    Shape:
        reference, shifted: (..., h, w). Returns two tensors of one shape; element u of the first is
        reference(u), of the second shifted(u + shift).
    """
    _require_plane("reference", reference)
    sides = (reference.shape[-2], reference.shape[-1])
    require(
        shifted.shape == reference.shape,
        "shifted",
        f"of shape {tuple(reference.shape)}",
        tuple(shifted.shape),
    )
    dy, dx = _pair("shift", shift)
    first, second = valid_tokens(sides, (dy, dx), protocol)
    if protocol == "circular":
        return reference, roll(shifted, (-dy, -dx))
    return reference[..., first[0], first[1]], shifted[..., second[0], second[1]]


def fourier_shift(latents: Tensor, shift: tuple[float, float]) -> Tensor:
    """Shift circularly by a fraction of a token, with the band-limited (Fourier) interpolation.

    Along an axis whose shift is not an integer, the Nyquist frequency of an even side is set to zero: a
    fractional shift of it is not defined for real signals. An integer shift needs no interpolation and is
    a roll, bit by bit.

    Args:
        latents: any floating dtype; below float32 the transform runs in float32.
        shift: (dy, dx) in tokens, down and right.

    Shape:
        latents: (..., h, w). Returns the same, in the dtype of ``latents``.

    Raises:
        TypeError: latents are not floating point, or shift does not hold numbers.

    Source: shift theorem of the discrete Fourier transform; Nyquist as in Karras et al. 2021 (StyleGAN3).
    """
    _require_plane("latents", latents)
    require_floating("latents", latents)
    wide = latents if latents.dtype in (torch.float32, torch.float64) else latents.float()
    for axis, amount in zip((-2, -1), _amounts(shift), strict=True):
        wide = _shift_axis(wide, amount, axis)
    return wide.to(latents.dtype)


def lanczos_shift(images: Tensor, shift: tuple[float, float], *, radius: int = 3) -> tuple[Tensor, Region]:
    """Shift by a fraction of a pixel, with Lanczos' windowed sinc, and keep what the given pixels determine.

    Nothing wraps around and nothing is padded: an axis with a fractional shift loses ``2 * radius - 1`` pixels of
    its side, one with a whole shift only those that leave.

    Args:
        images: any floating dtype; below float32 the sums run in float32.
        shift: (dy, dx) in pixels, down and right.
        radius: a, half the width of the window in pixels.

    Shape:
        images: (..., H, W).

    Returns:
        The moved pixels, (..., h, w) in the dtype of ``images``, and their region of the shifted image:
        ``moved`` corresponds to ``shifted[..., rows, columns]``.

    Example:
        >>> moved, (rows, columns) = lanczos_shift(torch.ones(8, 8), (0.5, 1))
        >>> moved.shape, rows, columns
        (torch.Size([3, 7]), slice(3, 6, None), slice(1, 8, None))

    Raises:
        ValueError: no pixel is left.
        TypeError: images are not floating point, or shift does not hold numbers.

    Source: Lanczos-3 as in the metric EQ-T_frac of Karras et al. 2021 (StyleGAN3); its taps, too, sum to one.
    """
    _require_plane("images", images)
    require_floating("images", images)
    radius = require_int("radius", radius, 1)
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    regions = []
    for axis, amount in zip((-2, -1), _amounts(shift), strict=True):
        whole = math.floor(amount)
        fraction = amount - whole
        if fraction == 1.0:  # of an amount just below an integer, by rounding
            whole, fraction = whole + 1, 0.0
        taps = _lanczos_taps(fraction, radius)
        start = max(0, whole + max(taps))
        stop = min(images.shape[axis], images.shape[axis] + whole + min(taps))
        expected = f"one that leaves pixels of images of {images.shape[-2]}x{images.shape[-1]}"
        require(start < stop, "shift", f"{expected}, whose window is {len(taps)} pixels wide", shift)
        parts = (weight * wide.narrow(axis, start - whole - j, stop - start) for j, weight in taps.items())
        wide = functools.reduce(torch.add, parts)
        regions.append(slice(start, stop))
    return wide.to(images.dtype), (regions[0], regions[1])


def _lanczos_taps(fraction: float, radius: int) -> dict[int, float]:
    """Return the weights of the pixels j places back, for a shift by a fraction in [0, 1)."""
    if fraction == 0:
        return {0: 1.0}

    def sinc(t: float) -> float:
        return math.sin(math.pi * t) / (math.pi * t)

    taps = {j: sinc(j - fraction) * sinc((j - fraction) / radius) for j in range(1 - radius, radius + 1)}
    total = math.fsum(taps.values())
    return {j: weight / total for j, weight in taps.items()}


def _shift_axis(signal: Tensor, amount: float, axis: int) -> Tensor:
    if amount.is_integer():
        return torch.roll(signal, int(amount), dims=axis)
    side = signal.shape[axis]
    # In float64, and small: float32 would round the product of a large shift and a frequency to whole turns.
    amount = math.fmod(amount, side)
    # Half spectrum of a real signal: the inverse transform then is real by construction.
    frequencies = torch.fft.rfftfreq(side, dtype=signal.dtype, device=signal.device)
    angle = -2 * torch.pi * amount * frequencies
    phase = torch.polar(torch.ones_like(angle), angle)
    if side % 2 == 0:
        phase[-1] = 0
    if axis == -2:
        phase = phase.unsqueeze(-1)
    shifted: Tensor = torch.fft.irfft(torch.fft.rfft(signal, dim=axis) * phase, n=side, dim=axis)
    return shifted


def _overlap(side: int, shift: int) -> tuple[slice, slice]:
    kept = max(0, side - abs(shift))
    first, second = max(0, -shift), max(0, shift)
    return slice(first, first + kept), slice(second, second + kept)


def _amounts(shift: tuple[float, float]) -> tuple[float, float]:
    require_type("shift", shift, (tuple, list), "a pair of numbers")
    amounts = tuple(shift)
    require(len(amounts) == 2, "shift", "a pair (dy, dx)", shift)
    dy, dx = (float(require_number(f"shift[{i}]", amount)) for i, amount in enumerate(amounts))
    return dy, dx


def _pair(name: str, value: Iterable[int]) -> Shift:
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a pair of ints, got {value!r}.")
    require(len(value) == 2, name, "a pair of ints", repr(value))
    return require_int(f"{name}[0]", value[0]), require_int(f"{name}[1]", value[1])


def _require_ground(images: Tensor, fill: float) -> None:
    fill = require_number("fill", fill)
    if not images.is_floating_point() and images.dtype != torch.bool:
        limits = torch.iinfo(images.dtype)
        fits = float(fill).is_integer() and limits.min <= fill <= limits.max
        require(fits, "fill", f"an integer in [{limits.min}, {limits.max}] for {images.dtype}", fill)


def _require_plane(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
    require(tensor.ndim >= 2, name, "of shape (..., H, W)", f"shape {tuple(tensor.shape)}")
