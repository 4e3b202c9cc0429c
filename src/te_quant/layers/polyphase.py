"""Adaptive polyphase sampling: the image decides which pixels are kept, so that integer shifts lose nothing.

An image splits into s² polyphase components, the pixels (s·u + p, s·v + q) for the phases (p, q). A shift of
the image permutes the components and shifts them. A choice by *content* therefore keeps the same pixels before
and after the shift, moved by a whole number of output pixels.

Shape letters: B batch, C channels, H W pixels, s stride.

Source: Chaman & Dokmanić 2021, arXiv:2011.14214 (downsampling); Chaman & Dokmanić 2021, arXiv:2105.04040
    (upsampling at the phase).
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from te_quant._checks import (
    padding_cure,
    require,
    require_axis,
    require_choice,
    require_device,
    require_int,
    require_integer_tensor,
    require_rank,
)
from te_quant.contract import Reach, Statement, sliding_window
from te_quant.filters import PADDING_MODES, PaddingMode, filter_constant, in_format_of
from te_quant.layers.stating import derived

__all__ = ["PolyphaseDownsample2d", "PolyphaseUpsample2d"]


# Magnitudes between 2 ** -n and 2 ** n can be squared and summed in this dtype, with room for 2 ** 26 terms; other
# finite ones can after scaling by 2 ** (2 * n) or its inverse.
_EXPONENT = {torch.float32: 50, torch.float64: 400}


class PolyphaseDownsample2d(nn.Module):
    """Keep the polyphase component with the largest L2 norm over all its channels and pixels.

    Exact for: every integer circular shift. With (p, q) the phase of x and (p', q') that of T_t x,
    ``down(T_t x) = R_k down(x)`` for k = (t + (p, q) - (p', q'))/s, always a whole number. What lies before it
    must commute with integer shifts too: convolutions with circular padding and stride 1. Not exact for
    fractional shifts, nor where content enters at a border and changes the choice.
    Ties: a component is tied with another where the image repeats itself (a constant image, a stripe); the two
    are then shifts of one another, either choice is right, and only ``phase`` is arbitrary. Any other tie is a
    coincidence of measure zero, but norms closer than the rounding error of the layers before are not: in
    float64 that does not happen in practice, in float32 seldom, in bfloat16 it may, and such an image is
    sampled at another phase, all of its pixels at once. The norms are summed in float32 at least, and neither
    overflow nor vanish at any scale of the images.
    Cost: two passes over the images for the norms, a copy of 1/s² of them; what lies before runs at s² times the
    pixels that a strided convolution would compute. No weights; the gradient reaches only the kept pixels.

    Args:
        stride: s, pixels, at least 1.

    Shape:
        images: (B, C, H, W), H and W divisible by s.
        result: a pair: the kept pixels (B, C, H/s, W/s), and the phase (B, 2) int64 in [0, s), of the rows and
            of the columns.

    Raises:
        ValueError: stride is smaller than 1, or a side is not divisible by it.
        TypeError: stride is not an int.

    Source: Chaman & Dokmanić 2021, arXiv:2011.14214, section 3, with p = 2.

    Example:
        >>> images = torch.tensor([[[[0.0, 0.0], [0.0, 5.0]]]])
        >>> pixels, phase = PolyphaseDownsample2d(2)(images)
        >>> pixels.item(), phase.tolist()
        (5.0, [[1, 1]])
    """

    adaptive = True
    reach, exact_for = derived(lambda self: Statement(Reach(1, self.stride), "integer"))

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        stride = require_int("stride", stride, 1)
        self.stride = stride

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Choose, then sample."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        s, (B, C, H, W) = self.stride, images.shape
        # Without divisibility the components differ in size, and a shift does not permute them.
        if H % s or W % s:
            require(False, "images sides", f"divisible by {s}", f"shape {tuple(images.shape)}; {padding_cure(s)}")
        parts = images.reshape(B, C, H // s, s, W // s, s)
        norms = torch.linalg.vector_norm(_squarable(parts.detach()), dim=(1, 2, 4))
        best = norms.flatten(1).argmax(1)
        row, column = best // s, best % s
        return parts[torch.arange(B, device=images.device), :, :, row, :, column], torch.stack((row, column), 1)

    def extra_repr(self) -> str:
        """The options."""
        return f"stride={self.stride}"


def _squarable(parts: Tensor) -> Tensor:
    """Return ``parts`` in float32 at least, each image scaled so that sums of its squares are normal numbers.

    The factor is a power of two, and 1 at ordinary scales: it changes no comparison of norms.
    """
    parts = parts if parts.dtype == torch.float64 else parts.float()
    if not parts.numel():
        return parts
    exponent = _EXPONENT[parts.dtype]
    peak = parts.abs().amax(tuple(range(1, parts.ndim)), keepdim=True)
    factor = torch.where(peak > 2.0**exponent, 2.0 ** (-2 * exponent), torch.ones_like(peak))
    return parts * torch.where(peak < 2.0**-exponent, 2.0 ** (2 * exponent), factor)


def _triangle_plane(stride: int) -> list[list[int]]:
    # Whole numbers, which small dtypes hold too; the division by s² follows in the dtype of the images.
    taps = [min(place, 2 * stride - place) for place in range(1, 2 * stride)]
    return [[row * column for column in taps] for row in taps]


class PolyphaseUpsample2d(nn.Module):
    """Put every pixel back at its phase in an s x s cell, zeros elsewhere, and interpolate if asked to.

    Exact for: every integer circular shift, together with :class:`PolyphaseDownsample2d`: if y' = R_k y for
    the k stated there, then ``up(y', phase') = T_t up(y, phase)``; with interpolation under circular padding.
    For one and the same phase, every shift by multiples of s.
    Cost: one copy at the larger size, and a depthwise convolution with 2·s - 1 taps along each axis.

    Args:
        stride: s, pixels, at least 1.
        interpolate: spread the pixels linearly (a triangle of 2·s - 1 taps with a gain of s along each axis),
            so that a constant stays constant.
        padding_mode: padding of the interpolation; see :func:`te_quant.filters.pad2d`. Unless it is ``circular``,
            the first or last s - 1 rows and columns, which lie outside the outermost pixels, fade: the edge of a
            grid of zeros is not an edge of the image.

    Shape:
        images: (B, C, H, W).
        phase: (B, 2) int64 in [0, s). A pixel with another phase would fall out of its cell and is lost.
        result: (B, C, s·H, s·W).

    Raises:
        ValueError: an option is out of range, or images and phase do not have these shapes.
        TypeError: stride is not an int, or phase does not hold integers.

    Source: Chaman & Dokmanić 2021, arXiv:2105.04040, section 3.

    Example:
        >>> pixel, phase = torch.full((1, 1, 1, 1), 5.0), torch.tensor([[1, 0]])
        >>> PolyphaseUpsample2d(2)(pixel, phase)
        tensor([[[[0., 0.],
                  [5., 0.]]]])
    """

    adaptive = True
    reach, exact_for = derived(lambda self: self._statement())

    def __init__(
        self, stride: int = 2, *, interpolate: bool = False, padding_mode: PaddingMode = "circular"
    ) -> None:
        super().__init__()
        stride = require_int("stride", stride, 1)
        require_choice("padding_mode", padding_mode, PADDING_MODES)
        self.stride = stride
        self.interpolate = interpolate
        self.padding_mode: PaddingMode = padding_mode

    def forward(self, images: Tensor, phase: Tensor) -> Tensor:
        """Place, then interpolate."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        require_rank("phase", phase, (2,), "(B, 2)")
        require_integer_tensor("phase", phase)
        require_axis("phase", phase, 0, images.shape[0], "B")
        require_axis("phase", phase, 1, 2, "2")
        require_device("phase", phase, images.device, "images")
        s, (B, C, H, W) = self.stride, images.shape
        places = torch.arange(s, device=images.device)
        rows, columns = (places == phase[:, i : i + 1] for i in (0, 1))
        chosen = rows[:, None, None, :, None, None] & columns[:, None, None, None, None, :]
        placed = torch.where(chosen, images[:, :, :, None, :, None], 0).reshape(B, C, s * H, s * W)
        placed = in_format_of(images, placed)
        if not self.interpolate:
            return placed
        return filter_constant(placed / s**2, _triangle_plane, s, stride=1, padding_mode=self.padding_mode)

    def _statement(self) -> Statement:
        placed = Statement(Reach(1, Fraction(1, self.stride)), "integer", adaptive=True)
        taps = 2 * self.stride - 1 if self.interpolate else 1
        margin, circular = taps // 2, self.padding_mode == "circular"
        return placed.then(sliding_window(taps, before=margin, after=margin, circular=circular))

    def extra_repr(self) -> str:
        """The options."""
        return f"stride={self.stride}, interpolate={self.interpolate}, padding_mode={self.padding_mode}"
