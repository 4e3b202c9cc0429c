"""What is done to an image between decoding and encoding, each with its known action on the token grid.

Shape letters: B batch, C channels, H W pixels, h w token grid, s = H/h = W/w pixels per token.
"""

# Each transform takes all that any of them may need.
# ruff: noqa: ARG002

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from te_quant._checks import require, require_choice, require_int, require_number, require_rank, require_type
from te_quant._measuring.data_range import DataRange
from te_quant.shifts import Shift

__all__ = [
    "JPEG",
    "Border",
    "CropAndPlace",
    "EightBit",
    "Flip",
    "Identity",
    "Resize",
    "ShiftPixels",
    "ShiftTokens",
    "Transform",
    "apply_transform",
    "checked_transforms",
    "default_transforms",
    "move",
    "valid",
]

Border = Literal["circular", "replicate"]
_BORDERS: tuple[Border, ...] = get_args(Border)
# Width and height of the window that CropAndPlace keeps, of those of the image.
_KEPT = 0.75


class Transform:
    """A change of images whose action on the token grid is known; derive your own from it.

    A subclass defines ``name`` and :meth:`transform_images`. One that moves content also defines
    :meth:`move_tokens`, and one that loses content defines :meth:`valid_tokens`. By default tokens keep their
    places and all of them count.

    Example:
        >>> class Darken(Transform):
        ...     name = "darker by a tenth"
        ...
        ...     def transform_images(self, images, *, stride, data_range):
        ...         low, _ = data_range
        ...         return low + 0.9 * (images - low)
        >>> Darken().transform_images(torch.ones(1, 1, 2, 2), stride=1, data_range=(0.0, 1.0)).mean().item()
        0.8999999761581421
    """

    @property
    def name(self) -> str:
        """What reports call it; no two transforms of one measurement may share a name."""
        return type(self).__name__

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return the changed images.

        Args:
            images: what the decoder made.
            stride: s, pixels per token.
            data_range: (low, high) of the pixel values.

        Shape:
            images: (B, C, H, W). Returns the same.
        """
        raise NotImplementedError(f"{type(self).__name__} must define transform_images.")

    def move_tokens(self, tokens: Tensor, *, stride: int) -> Tensor:
        """Return the tokens where the transform moves them; what comes to places that are not valid is arbitrary.

        Args:
            tokens: indices, or a mask of them.
            stride: s, pixels per token.

        Shape:
            tokens: (..., h, w). Returns the same.
        """
        return tokens

    def valid_tokens(self, grid: tuple[int, int], *, stride: int) -> Tensor:
        """Return True where a token of the changed images has a counterpart among the moved tokens.

        Args:
            grid: (h, w).
            stride: s, pixels per token.

        Shape:
            returns: (h, w) bool, on the CPU.
        """
        return torch.ones(grid, dtype=torch.bool, device="cpu")


@dataclass(frozen=True)
class Identity(Transform):
    """Leave the images as the decoder made them."""

    @property
    def name(self) -> str:
        """``identity``."""
        return "identity"

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return ``images``."""
        return images


@dataclass(frozen=True)
class EightBit(Transform):
    """Clamp to the data range and round to 256 levels, as a PNG file does."""

    @property
    def name(self) -> str:
        """``8-bit``."""
        return "8-bit"

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return the rounded images."""
        return _from_bytes(_to_bytes(images, data_range), images, data_range)


@dataclass(frozen=True)
class JPEG(Transform):
    """Write every image as a JPEG file and read it back. Pillow does it, on the CPU.

    Args:
        quality: 1 to 100; chroma is subsampled 4:2:0, as Pillow does by default.

    Raises:
        ImportError: Pillow is not installed (``te_quant[jpeg]``).
        ValueError: the quality is out of range, or images have neither 1 nor 3 channels.

    Source: ITU-T T.81.
    """

    quality: int = 75

    def __post_init__(self) -> None:
        object.__setattr__(self, "quality", require_int("quality", self.quality, 1, 100))
        _pillow()

    @property
    def name(self) -> str:
        """``JPEG`` and the quality."""
        return f"JPEG {self.quality}"

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return the images that the files hold."""
        image_module = _pillow()
        channels = images.shape[1]
        require(channels in (1, 3), "images axis 1", "1 or 3 channels for JPEG", channels)
        decoded = []
        for pixels in _to_bytes(images, data_range).cpu().movedim(1, -1):
            grey = channels == 1
            picture = image_module.fromarray((pixels[..., 0] if grey else pixels).contiguous().numpy())
            file = io.BytesIO()
            picture.save(file, format="JPEG", quality=self.quality)
            # A copy that may be written to, which torch wants.
            read = bytearray(image_module.open(file).tobytes())
            values = torch.tensor(read, dtype=torch.uint8, device="cpu")
            decoded.append(values.view(pixels.shape))
        return _from_bytes(torch.stack(decoded).movedim(-1, 1), images, data_range)


@dataclass(frozen=True)
class ShiftPixels(Transform):
    """Move the content by pixels.

    Tokens are expected to move by the nearest number of whole tokens; half a token counts as none. After a shift
    below half a token they are therefore expected to stay. Only multiples of the stride are met exactly by a
    tokenizer that is equivariant to whole tokens. Over several cycles every shift is rounded on its own.

    Args:
        shift: (dy, dx), down and right.
        border: ``circular``: what leaves on one side comes back on the other, and all tokens count. ``replicate``:
            the edge is repeated, and only tokens that show nothing but moved content count.
    """

    shift: Shift
    border: Border = "circular"

    def __post_init__(self) -> None:
        _check_shift(self)

    @property
    def name(self) -> str:
        """The shift in pixels."""
        return _shift_name(self.shift, "px", self.border)

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return the moved images."""
        return _shifted(images, self.shift, self.border)

    def move_tokens(self, tokens: Tensor, *, stride: int) -> Tensor:
        """Return the tokens, moved by the nearest number of whole tokens."""
        return torch.roll(tokens, [_nearest(amount, stride) for amount in self.shift], dims=(-2, -1))

    def valid_tokens(self, grid: tuple[int, int], *, stride: int) -> Tensor:
        """Return True for the tokens that show moved content only."""
        return _shown(grid, self.shift, stride, self.border)


@dataclass(frozen=True)
class ShiftTokens(Transform):
    """Move the content by whole tokens.

    Args:
        shift: (dy, dx) in tokens, down and right.
        border: as for :class:`ShiftPixels`.
    """

    shift: Shift
    border: Border = "circular"

    def __post_init__(self) -> None:
        _check_shift(self)

    @property
    def name(self) -> str:
        """The shift in tokens."""
        return _shift_name(self.shift, "tokens", self.border)

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return the moved images."""
        return _shifted(images, (self.shift[0] * stride, self.shift[1] * stride), self.border)

    def move_tokens(self, tokens: Tensor, *, stride: int) -> Tensor:
        """Return the moved tokens."""
        return torch.roll(tokens, self.shift, dims=(-2, -1))

    def valid_tokens(self, grid: tuple[int, int], *, stride: int) -> Tensor:
        """Return True for the tokens that show moved content only."""
        return _shown(grid, (self.shift[0] * stride, self.shift[1] * stride), stride, self.border)


@dataclass(frozen=True)
class CropAndPlace(Transform):
    """Keep the middle of the image and paint everything around it in one colour; the tokens of the middle count.

    Args:
        keep: width and height of the middle, as a share of those of the image, in (0, 1]; rounded to whole pixels.
        fill: value of the colour, in the unit of the images; None is the low end of the data range.
    """

    keep: float = _KEPT
    fill: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", float(require_number("keep", self.keep, 0, 1)))
        require(self.keep > 0, "keep", "above 0", self.keep)
        if self.fill is not None:
            object.__setattr__(self, "fill", float(require_number("fill", self.fill)))

    @property
    def name(self) -> str:
        """The share that stays, and the colour if it was given."""
        colour = "" if self.fill is None else f", fill {self.fill:g}"
        return f"crop {self.keep:g} and place back{colour}"

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return the middles on their ground."""
        rows, columns = (_middle(side, self.keep) for side in images.shape[-2:])
        placed = torch.full_like(images, data_range[0] if self.fill is None else self.fill)
        placed[..., rows, columns] = images[..., rows, columns]
        return placed

    def valid_tokens(self, grid: tuple[int, int], *, stride: int) -> Tensor:
        """Return True for the tokens whose pixels all lie in the middle."""
        pixels = torch.zeros([side * stride for side in grid], device="cpu")
        rows, columns = (_middle(side, self.keep) for side in pixels.shape)
        pixels[rows, columns] = 1
        return F.avg_pool2d(pixels[None], stride)[0] == 1


@dataclass(frozen=True)
class Flip(Transform):
    """Mirror the images.

    Args:
        direction: ``horizontal`` swaps left and right, ``vertical`` top and bottom.
    """

    direction: Literal["horizontal", "vertical"] = "horizontal"

    def __post_init__(self) -> None:
        require_choice("direction", self.direction, ("horizontal", "vertical"))

    @property
    def name(self) -> str:
        """``flip`` and the direction."""
        return f"flip {self.direction}"

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return the mirrored images."""
        return self.move_tokens(images, stride=1)

    def move_tokens(self, tokens: Tensor, *, stride: int) -> Tensor:
        """Return the mirrored tokens."""
        return tokens.flip(-1 if self.direction == "horizontal" else -2)


@dataclass(frozen=True)
class Resize(Transform):
    """Make the images smaller, or larger, and bring them back to their size; bilinear, with antialiasing.

    Args:
        scale: of both sides, above 0; the sides are rounded to whole pixels.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(require_number("scale", self.scale, 0)))
        require(self.scale > 0, "scale", "above 0", self.scale)

    @property
    def name(self) -> str:
        """``resize`` and the scale."""
        return f"resize {self.scale:g} and back"

    def transform_images(self, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
        """Return the images after both steps."""
        sides = (images.shape[-2], images.shape[-1])
        # Some devices cannot resample half precision.
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        for size in ([max(1, round(side * self.scale)) for side in sides], list(sides)):
            wide = F.interpolate(wide, size, mode="bilinear", antialias=True)
        return wide.to(images.dtype)


def default_transforms() -> tuple[Transform, ...]:
    """Return what :func:`measure_stability` measures if nothing is asked for; needs Pillow.

    Raises:
        ImportError: Pillow is not installed (``te_quant[jpeg]``).

    Example:
        >>> [transform.name for transform in default_transforms()][:3]
        ['identity', '8-bit', 'JPEG 90']
    """
    return (
        Identity(),
        EightBit(),
        JPEG(90),
        JPEG(75),
        JPEG(50),
        ShiftTokens((1, 1)),
        ShiftPixels((1, 1)),
        CropAndPlace(),
        Flip("horizontal"),
        Flip("vertical"),
        Resize(),
    )


def checked_transforms(transforms: Sequence[Transform] | None) -> tuple[Transform, ...]:
    """Refuse anything but transforms with names of their own; None gives the default."""
    chosen = default_transforms() if transforms is None else transforms
    require_type("transforms", chosen, (list, tuple), "a list or tuple of transforms")
    for position, transform in enumerate(chosen):
        require_type(f"transforms[{position}]", transform, Transform, "a te_quant.stability.Transform")
    require(len(chosen) > 0, "transforms", "at least one", len(chosen))
    names = [transform.name for transform in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "transforms", "of different names", f"several called {', '.join(map(repr, twice))}")
    return tuple(chosen)


def apply_transform(transform: Transform, images: Tensor, *, stride: int, data_range: DataRange) -> Tensor:
    """Change the images and refuse a result that has not their shape."""
    changed = transform.transform_images(images, stride=stride, data_range=data_range)
    label = f"transform_images of {transform.name!r}"
    require_rank(label, changed, (4,), "(B, C, H, W)")
    fits = changed.shape == images.shape
    require(fits, label, f"of shape {tuple(images.shape)}", f"shape {tuple(changed.shape)}")
    return changed.to(images)


def move(transform: Transform, tokens: Tensor, *, stride: int) -> Tensor:
    """Move tokens or masks and refuse a result that has not their shape."""
    moved = transform.move_tokens(tokens, stride=stride)
    label = f"move_tokens of {transform.name!r}"
    fits = isinstance(moved, Tensor) and moved.shape == tokens.shape and moved.dtype == tokens.dtype
    expected = f"of shape {tuple(tokens.shape)} and {tokens.dtype}"
    actual = f"{moved.dtype} of shape {tuple(moved.shape)}" if isinstance(moved, Tensor) else type(moved).__name__
    require(fits, label, expected, actual)
    return moved


def valid(transform: Transform, grid: tuple[int, int], *, stride: int) -> Tensor:
    """Return the places that count, and refuse anything but a boolean grid with at least one of them."""
    mask = transform.valid_tokens(grid, stride=stride)
    label = f"valid_tokens of {transform.name!r}"
    require_rank(label, mask, (2,), "(h, w)")
    if mask.dtype != torch.bool:
        raise TypeError(f"{label} must be bool, got {mask.dtype}; return mask.bool().")
    require(tuple(mask.shape) == grid, label, f"of shape {grid}", f"shape {tuple(mask.shape)}")
    expected = f"True for at least one token of a {grid[0]}x{grid[1]} grid"
    require(bool(mask.any()), label, expected, "none; pass transforms= without it, or larger images")
    return mask


def _to_bytes(images: Tensor, data_range: DataRange) -> Tensor:
    low, high = data_range
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return ((wide - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def _from_bytes(pixels: Tensor, images: Tensor, data_range: DataRange) -> Tensor:
    low, high = data_range
    wide = pixels.to(images.device, torch.promote_types(images.dtype, torch.float32))
    return (wide * ((high - low) / 255) + low).to(images.dtype)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Pillow must be installed for JPEG: pip install 'te_quant[jpeg]', or pass transforms without JPEG."
        ) from error
    return Image


def _check_shift(transform: ShiftPixels | ShiftTokens) -> None:
    require_type("shift", transform.shift, (tuple, list), "a pair of ints")
    require(len(transform.shift) == 2, "shift", "a pair (dy, dx)", repr(transform.shift))
    pair = tuple(require_int(f"shift[{axis}]", amount) for axis, amount in enumerate(transform.shift))
    object.__setattr__(transform, "shift", pair)
    require_choice("border", transform.border, _BORDERS)


def _shift_name(shift: Shift, unit: str, border: Border) -> str:
    edge = "" if border == "circular" else f", {border}"
    return f"shift ({shift[0]}, {shift[1]}) {unit}{edge}"


def _nearest(amount: int, stride: int) -> int:
    """The nearest number of whole tokens, towards zero from halfway."""
    return int(math.copysign((2 * abs(amount) + stride - 1) // (2 * stride), amount))


def _shifted(images: Tensor, shift: Shift, border: Border) -> Tensor:
    if border == "circular":
        return torch.roll(images, shift, dims=(-2, -1))
    rows, columns = (
        (torch.arange(side, device=images.device) - amount).clamp(0, side - 1)
        for side, amount in zip(images.shape[-2:], shift, strict=True)
    )
    return images[..., rows[:, None], columns]


def _shown(grid: tuple[int, int], shift: Shift, stride: int, border: Border) -> Tensor:
    if border == "circular":
        return torch.ones(grid, dtype=torch.bool, device="cpu")
    sides = []
    for side, amount in zip(grid, shift, strict=True):
        places = torch.arange(side, device="cpu")
        source = places - _nearest(amount, stride)
        moved = (places * stride >= amount) & ((places + 1) * stride <= side * stride + amount)
        sides.append((source >= 0) & (source < side) & moved)
    return sides[0][:, None] & sides[1]


def _middle(side: int, share: float) -> slice:
    kept = max(1, round(side * share))
    start = (side - kept) // 2
    return slice(start, start + kept)
