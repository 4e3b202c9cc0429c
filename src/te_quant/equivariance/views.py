"""Which images are compared: a reference view and its shifted views, for each protocol.

Shape letters: B batch, C channels, H W sides of what the tokenizer sees, h w token grid, S canvas, s stride.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from te_quant._checks import (
    require,
    require_choice,
    require_floating,
    require_int,
    require_number,
    require_rank,
)
from te_quant.shifts import PROTOCOLS, Protocol, Shift, crop, place, roll

__all__ = ["Views"]


@dataclass(frozen=True)
class Views:
    """How given images become what the tokenizer sees, before and after a shift.

    Attributes:
        protocol: ``canvas`` pastes sprites at the centre of a canvas twice as large and moves them there;
            ``circular`` rolls full images, or sprites on their canvas; ``crop`` moves a window.
        size: (H, W) in pixels of what the tokenizer sees.
        stride: s, pixels a token; divides both sides.
        ground: value around sprites.
        sprites: the given images are sprites of half the canvas, so the placement metric exists.
        reach: largest (|dy|, |dx|) in pixels that the protocol allows.
    """

    protocol: Protocol
    size: tuple[int, int]
    stride: int
    ground: float
    sprites: bool
    reach: tuple[int, int]

    @classmethod
    def plan(
        cls, images: Tensor, *, protocol: Protocol, canvas_size: int | None, stride: int, ground: float
    ) -> Views:
        """Check that the images fit the protocol and work out sizes and limits."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        require_floating("images", images)
        require(images.shape[0] > 0, "images", "at least one", f"shape {tuple(images.shape)}")
        require_choice("protocol", protocol, PROTOCOLS)
        stride = require_int("stride", stride, 1)
        ground = require_number("ground", ground)
        if canvas_size is not None:
            canvas_size = require_int("canvas_size", canvas_size, 1)
        sides = (images.shape[-2], images.shape[-1])
        size = _size(sides, protocol, canvas_size)
        sprites = protocol != "crop" and size != sides
        if sprites:
            halves = (2 * sides[0], 2 * sides[1])
            require(halves == size, "images sides", f"half of canvas_size={size[0]}", sides)
            require(
                size[0] % (4 * stride) == 0,
                "canvas_size",
                f"a multiple of 4 * stride = {4 * stride}",
                size[0],
            )
        divisible = size[0] % stride == 0 and size[1] % stride == 0
        require(divisible, "the sides the tokenizer sees", f"multiples of stride={stride}", size)
        reach = {
            "canvas": (size[0] // 4, size[1] // 4),
            "circular": (size[0] - 1, size[1] - 1),
            # Centred windows of odd play reach one pixel less to the top left.
            "crop": ((sides[0] - size[0]) // 2, (sides[1] - size[1]) // 2),
        }[protocol]
        return cls(protocol, size, stride, float(ground), sprites, reach)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens."""
        return self.size[0] // self.stride, self.size[1] // self.stride

    def shifted(self, images: Tensor, shift: Shift) -> Tensor:
        """Return the view whose content is moved by ``shift`` pixels; (0, 0) is the reference view."""
        if self.protocol == "crop":
            return crop(images, shift, size=self.size)
        top, left = self.size[0] // 4, self.size[1] // 4
        if self.protocol == "canvas":
            return place(images, (top + shift[0], left + shift[1]), size=self.size, fill=self.ground)
        if self.sprites:
            images = place(images, (top, left), size=self.size, fill=self.ground)
        return roll(images, shift)

    def stride_shifts(self, given: Iterable[Shift] | None) -> tuple[Shift, ...]:
        """Check pixel shifts by whole tokens, or choose them: by one token and as far as the protocol allows.

        The choice does not grow with the grid: at most 24 shifts, the smallest and the largest distance in
        every direction. ``circular`` goes half around, where the largest distance is.
        """
        if given is None:
            reach = [self.size[i] // 2 if self.protocol == "circular" else self.reach[i] for i in (0, 1)]
            axes = [
                self._axis_choice(min(reach[i] // self.stride, self.grid[i] - 1), self.grid[i]) for i in (0, 1)
            ]
            return tuple((dy * self.stride, dx * self.stride) for dy, dx in product(*axes) if (dy, dx) != (0, 0))
        shifts = self._checked("shifts", given)
        for shift in shifts:
            whole = shift[0] % self.stride == 0 and shift[1] % self.stride == 0
            require(whole, "shifts", f"multiples of stride={self.stride}", shift)
        return shifts

    def sub_stride_shifts(self, given: Iterable[Shift] | None) -> tuple[Shift, ...]:
        """Check pixel shifts below one token, or return all of {0..s-1}² but the identity."""
        if given is None:
            reachable = min(self.reach) >= self.stride - 1
            expected = f"given where a shift of stride - 1 = {self.stride - 1} pixels leaves the image"
            require(reachable, "sub_stride_shifts", expected, None)
            steps = range(self.stride)
            return tuple((dy, dx) for dy, dx in product(steps, steps) if (dy, dx) != (0, 0))
        shifts = self._checked("sub_stride_shifts", given)
        for shift in shifts:
            below = all(0 <= amount < self.stride for amount in shift)
            require(below, "sub_stride_shifts", f"pairs from 0 to stride - 1 = {self.stride - 1}", shift)
        return shifts

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
        require(len(set(shifts)) == len(shifts), name, "without repetition", shifts)
        return tuple(shifts)


def _size(sides: tuple[int, int], protocol: Protocol, canvas_size: int | None) -> tuple[int, int]:
    if protocol == "crop":
        if canvas_size is None:
            raise ValueError("canvas_size must be the side of the window under 'crop', got None.")
        inside = canvas_size <= min(sides)
        require(inside, "canvas_size", f"at most the images' sides {sides} under 'crop'", canvas_size)
        return canvas_size, canvas_size
    if canvas_size is not None:
        size = (canvas_size, canvas_size)
        full = protocol == "canvas" and size == sides
        require(not full, "images sides", f"half of canvas_size={canvas_size} under 'canvas'", sides)
        return size
    return sides if protocol == "circular" else (2 * sides[0], 2 * sides[1])
