"""Which images are compared: a reference view and its shifted views, for each protocol.

Shape letters: B batch, C channels, H W sides of what the tokenizer sees, h w token grid, S canvas, s stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from typing import Literal

from torch import Tensor

from te_quant._checks import (
    require,
    require_choice,
    require_floating,
    require_int,
    require_number,
    require_rank,
)
from te_quant.equivariance._draw import (
    FractionalShift,
    all_sub_stride_shifts,
    draw_fractional_shifts,
    draw_sub_stride_shifts,
)
from te_quant.shifts import (
    PROTOCOLS,
    Protocol,
    Region,
    Shift,
    crop,
    fourier_shift,
    lanczos_shift,
    place,
    roll,
)

__all__ = ["Sides", "SubStrideShifts", "Views"]

Sides = int | tuple[int, int]
SubStrideShifts = Iterable[Shift] | int | Literal["all"]
# Sub-stride shifts that are measured unless others are asked for: all of them up to a stride of 8.
_DEFAULT_DRAW = 64
# Half the width of the window that fractional shifts interpolate with, pixels.
_RADIUS = 3


@dataclass(frozen=True)
class Views:
    """How given images become what the tokenizer sees, before and after a shift.

    Attributes:
        protocol: ``canvas`` pastes sprites at the centre of a canvas twice as large and moves them there;
            ``circular`` rolls full images, or sprites on their canvas; ``crop`` moves a window.
        size: (H, W) in pixels of what the tokenizer sees.
        stride: s, pixels per token; divides both sides.
        ground: value around sprites; None where the images are no sprites.
        sprites: the given images are sprites of half the canvas, so the placement metric exists.
        reach: largest (|dy|, |dx|) in pixels that the protocol allows.
    """

    protocol: Protocol
    size: tuple[int, int]
    stride: int
    ground: float | None
    sprites: bool
    reach: tuple[int, int]

    @classmethod
    def plan(
        cls, images: Tensor, *, protocol: Protocol, canvas_size: Sides | None, stride: int, ground: float
    ) -> Views:
        """Check that the images fit the protocol and work out sizes and limits."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        require_floating("images", images)
        require(images.shape[0] > 0, "images", "at least one", f"shape {tuple(images.shape)}")
        require_choice("protocol", protocol, PROTOCOLS)
        stride = require_int("stride", stride, 1)
        ground = float(require_number("ground", ground))
        sides = (int(images.shape[-2]), int(images.shape[-1]))
        size = _size(sides, protocol, _pair(canvas_size), stride)
        sprites = protocol != "crop" and size != sides
        if sprites:
            _require_sprites(sides, size, stride)
        else:
            _require_divisible(sides, size, protocol, stride)
        reach = {
            "canvas": (size[0] // 4, size[1] // 4),
            "circular": (size[0] - 1, size[1] - 1),
            # Centred windows of odd play reach one pixel less to the top left.
            "crop": ((sides[0] - size[0]) // 2, (sides[1] - size[1]) // 2),
        }[protocol]
        return cls(protocol, size, stride, ground if sprites else None, sprites, reach)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens."""
        return self.size[0] // self.stride, self.size[1] // self.stride

    def shifted(self, images: Tensor, shift: Shift) -> Tensor:
        """Return the view whose content is moved by ``shift`` pixels; (0, 0) is the reference view."""
        if self.protocol == "crop":
            return crop(images, shift, size=self.size)
        top, left = self.size[0] // 4, self.size[1] // 4
        if self.ground is None:
            return roll(images, shift)
        if self.protocol == "canvas":
            return place(images, (top + shift[0], left + shift[1]), size=self.size, fill=self.ground)
        return roll(place(images, (top, left), size=self.size, fill=self.ground), shift)

    def interpolated(self, images: Tensor, shift: FractionalShift) -> Tensor:
        """Return the view whose content is moved by a fraction of a pixel.

        Circular images are shifted as band-limited signals, all others with Lanczos' window, which sees the
        pixels around the view: those of the photograph, or the ground.
        """
        if self.protocol == "circular":
            return fourier_shift(self.shifted(images, (0, 0)), shift)
        height, width = self.size
        if self.ground is None:
            # The photograph as it is, in which the view lies in the middle.
            top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        else:
            top = left = self.stride + _RADIUS
            corner = (top + height // 4, left + width // 4)
            images = place(images, corner, size=(height + 2 * top, width + 2 * left), fill=self.ground)
        moved, (rows, columns) = lanczos_shift(images, shift, radius=_RADIUS)
        top, left = top - rows.start, left - columns.start
        return moved[..., top : top + height, left : left + width]

    def moved(self, images: Tensor, shift: FractionalShift) -> tuple[Tensor, Region]:
        """Move what belongs to the reference view by the same operator, and say which part of it that determines.

        Shape:
            images: (B, C, H, W). Returns (B, C, h, w) and its region of the shifted view.
        """
        if self.protocol == "circular":
            return fourier_shift(images, shift), (slice(None), slice(None))
        return lanczos_shift(images, shift, radius=_RADIUS)

    def stride_shifts(self, given: Iterable[Shift] | None) -> tuple[Shift, ...]:
        """Check pixel shifts by whole tokens, or choose them: by one token and as far as the protocol allows.

        The choice does not grow with the grid: at most 24 shifts, the smallest and the largest distance in
        every direction. ``circular`` goes half around, where the largest distance is. Without any a window of
        ``crop`` is refused.
        """
        if given is None:
            reach = [self.size[i] // 2 if self.protocol == "circular" else self.reach[i] for i in (0, 1)]
            axes = [
                self._axis_choice(min(reach[i] // self.stride, self.grid[i] - 1), self.grid[i]) for i in (0, 1)
            ]
            chosen = [(dy * self.stride, dx * self.stride) for dy, dx in product(*axes) if (dy, dx) != (0, 0)]
            if self.protocol == "crop" and not chosen:
                self._refuse_window()
            return tuple(chosen)
        shifts = self._checked("shifts", given)
        for shift in shifts:
            whole = shift[0] % self.stride == 0 and shift[1] % self.stride == 0
            require(whole, "shifts", f"multiples of stride={self.stride}", shift)
        return shifts

    def sub_stride_shifts(self, given: SubStrideShifts | None, seed: int) -> tuple[Shift, ...]:
        """Check pixel shifts below one token, return all of {0..s-1}² but the identity, or draw some of them."""
        if given is None or isinstance(given, str | int | Integral):
            self._require_room("sub_stride_shifts", self.stride - 1)
            every = all_sub_stride_shifts(self.stride)
            if isinstance(given, str):
                expected = "pairs (dy, dx), the number of shifts to draw, or 'all'"
                require(given == "all", "sub_stride_shifts", expected, repr(given))
                return every
            count = _DEFAULT_DRAW if given is None else require_int("sub_stride_shifts", given, 1)
            return every if count >= len(every) else draw_sub_stride_shifts(self.stride, count, seed)
        shifts = self._checked("sub_stride_shifts", given)
        for shift in shifts:
            below = all(0 <= amount < self.stride for amount in shift)
            require(below, "sub_stride_shifts", f"pairs from 0 to stride - 1 = {self.stride - 1}", shift)
        return shifts

    def fractional_shifts(
        self, given: Iterable[FractionalShift] | int | None, seed: int
    ) -> tuple[FractionalShift, ...]:
        """Check shifts of [0, s)² that are not whole, or draw some."""
        if given is None:
            return ()
        if isinstance(given, int | Integral):
            self._require_room("fractional_shifts", self.stride - 1 + _RADIUS)
            return draw_fractional_shifts(self.stride, require_int("fractional_shifts", given, 1), seed)
        shifts = []
        for shift in given:
            if not isinstance(shift, Sequence) or len(shift) != 2:
                raise TypeError(f"fractional_shifts must be pairs (dy, dx) of numbers, got {shift!r}.")
            dy, dx = (float(require_number("fractional_shifts values", v, 0, below=self.stride)) for v in shift)
            broken = not (dy.is_integer() and dx.is_integer())
            require(broken, "fractional_shifts", "pairs of which one number at least is not whole", (dy, dx))
            self._require_room("fractional_shifts", math.floor(max(dy, dx)) + _RADIUS)
            shifts.append((dy, dx))
        return tuple(shifts)

    def _require_room(self, name: str, most: int) -> None:
        """Refuse photographs in which the window cannot move far enough."""
        if self.protocol != "crop" or min(self.reach) >= most:
            return
        height, width = self.size
        raise ValueError(
            f"{name} of up to {most} pixels must leave a window of {height}x{width} inside the images, got "
            f"{self.reach} pixels of room; pass images of at least {height + 2 * most}x{width + 2 * most} pixels, "
            f"a smaller canvas_size, or {name} that fit."
        )

    def _refuse_window(self) -> None:
        """Refuse a window of which no two tokens can be compared after a shift by a whole token."""
        step = 2 * self.stride
        height, width = (max(side, step) + step for side in self.size)
        sides = [side + 2 * room for side, room in zip(self.size, self.reach, strict=True)]
        window = tuple((side - step) // self.stride * self.stride for side in sides)
        cure = f" canvas_size={window}," if min(window) >= step else ""
        require(
            False,
            "canvas_size",
            f"a window of two tokens or more that can move by a token of {self.stride} pixels",
            f"{self.size[0]}x{self.size[1]} with {self.reach} pixels of room; pass images of at least "
            f"{height}x{width} pixels,{cure} or shifts=[] to measure no whole tokens",
        )

    def _axis_choice(self, most: int, grid: int) -> list[int]:
        steps = sorted({-most, -1, 0, 1, most} if most >= 1 else {0})
        if self.protocol != "circular":
            return steps
        # Half a turn to the left is half a turn to the right: count each place once.
        return sorted({step % grid for step in steps})

    def _checked(self, name: str, given: Iterable[Shift]) -> tuple[Shift, ...]:
        shifts: list[Shift] = []
        for shift in given:
            if not isinstance(shift, Sequence) or len(shift) != 2:
                raise TypeError(f"{name} must be pairs (dy, dx) of ints, got {shift!r}.")
            dy, dx = (require_int(f"{name} values", amount) for amount in shift)
            moves = (dy % self.size[0], dx % self.size[1]) != (0, 0) if self.protocol == "circular" else any(shift)
            require(moves, name, "without the identity", (dy, dx))
            inside = abs(dy) <= self.reach[0] and abs(dx) <= self.reach[1]
            require(inside, name, f"at most {self.reach} pixels under {self.protocol!r}", (dy, dx))
            shifts.append((dy, dx))
        circular = self.protocol == "circular"
        # Around the torus, shifts that differ by a side are one.
        distinct = {(dy % self.size[0], dx % self.size[1]) if circular else (dy, dx) for dy, dx in shifts}
        require(len(distinct) == len(shifts), name, "without repetition", shifts)
        return tuple(shifts)


def _pair(canvas_size: Sides | None) -> tuple[int, int] | None:
    if canvas_size is None:
        return None
    if not isinstance(canvas_size, tuple | list):
        side = require_int("canvas_size", canvas_size, 1)
        return side, side
    require(len(canvas_size) == 2, "canvas_size", "a side or a pair (height, width)", canvas_size)
    return require_int("canvas_size[0]", canvas_size[0], 1), require_int("canvas_size[1]", canvas_size[1], 1)


def _size(
    sides: tuple[int, int], protocol: Protocol, canvas_size: tuple[int, int] | None, stride: int
) -> tuple[int, int]:
    if protocol == "crop":
        if canvas_size is None:
            # Room for every shift below a token in both directions, fractions included.
            room = 2 * (stride + _RADIUS - 1)
            height, width = ((side - room) // stride * stride for side in sides)
            least = room + 2 * stride
            expected = (
                f"larger than {least - 1} pixels under 'crop', for a window of two tokens that moves by a token"
            )
            require(min(sides) >= least, "images sides", expected, sides)
            return height, width
        inside = canvas_size[0] <= sides[0] and canvas_size[1] <= sides[1]
        require(inside, "canvas_size", f"at most the images' sides {sides} under 'crop'", canvas_size)
        return canvas_size
    if canvas_size is not None:
        full = protocol == "canvas" and canvas_size == sides
        require(not full, "images sides", f"half of canvas_size={_text(canvas_size)} under 'canvas'", sides)
        return canvas_size
    return sides if protocol == "circular" else (2 * sides[0], 2 * sides[1])


def _require_sprites(sides: tuple[int, int], size: tuple[int, int], stride: int) -> None:
    halves = (2 * sides[0], 2 * sides[1])
    require(halves == size, "images sides", f"half of canvas_size={_text(size)}", sides)
    side = max(sides)
    cure = f"{sides}; pad the images to {side}x{side} pixels of ground"
    require(
        sides[0] == sides[1], "images sides", "equal, as sprites are placed in the quadrants of a square", cure
    )
    step = 4 * stride
    fits = size[0] % step == 0 and size[1] % step == 0
    if fits:
        return
    # The canvas is twice as large as the sprite, and grows by the same factor.
    cure = f"pad the images to {_text(_rounded(sides, 2 * stride))} pixels of ground"
    if all(side % stride == 0 for side in sides):
        cure += ", or pass protocol='circular'"
    require(False, "canvas_size", f"a multiple of 4 * stride = {step}", f"{_text(size)}; {cure}")


def _require_divisible(sides: tuple[int, int], size: tuple[int, int], protocol: Protocol, stride: int) -> None:
    if size[0] % stride == 0 and size[1] % stride == 0:
        return
    if protocol == "crop":
        cure = f"pass canvas_size={tuple(side // stride * stride for side in size)}"
        require(False, "canvas_size", f"multiples of stride={stride}", f"{size}; {cure}")
    cure = f"pad the images to {_text(_rounded(sides, stride))} or crop them"
    require(False, "images sides", f"multiples of stride={stride}", f"{sides}; {cure}")


def _rounded(sides: tuple[int, int], step: int) -> tuple[int, int]:
    """Return the next multiples of ``step``."""
    return -(-sides[0] // step) * step, -(-sides[1] // step) * step


def _text(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
