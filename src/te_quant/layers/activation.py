"""Nonlinearities, with and without aliasing.

A pointwise function commutes with every integer shift. Between the pixels it does not: it makes frequencies
that the grid cannot hold, and these fold back onto those it can. Applied on a finer grid and then filtered, it
folds back less; a polynomial folds back nothing.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require_axis, require_choice, require_int, require_rank
from te_quant._execution import overwrite
from te_quant.contract import Group, Reach
from te_quant.filters import fourier_resample

__all__ = ["ACTIVATIONS", "Activation", "FilteredActivation", "PolynomialActivation", "build_activation"]

Activation: TypeAlias = Literal["silu", "filtered", "polynomial"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class FilteredActivation(nn.Module):
    """Upsample, apply the function, remove what the coarse grid cannot hold, downsample: all ideal filters.

    Exact for: every integer circular shift. For fractional ones only as far as the function's frequencies beyond
    ``upsampling`` times the band are negligible; see :class:`PolynomialActivation` for one that has none.
    The image counts as periodic: only circular padding fits around it.
    Cost: the function on ``upsampling ** 2`` times the pixels, and four transforms, O(H·W·log(H·W)) per channel;
    every pixel of the result sees the whole image. The Nyquist frequency of even sides is lost.

    Args:
        function: acts on each pixel by itself, at any size of the images.
        upsampling: how many times finer the grid is on which the function acts, along each axis; at least 1.

    Shape:
        images: (B, C, H, W).
        result: as images.

    Raises:
        ValueError: upsampling is smaller than 1, or a side is empty.
        TypeError: upsampling is not an int, or images are not floating point.

    Source: Karras et al. 2021, arXiv:2106.12423, section 2. Differs: an ideal low-pass filter on the periodic
        image, where it has Kaiser windows and margins that are cropped.

    Example:
        >>> images = torch.rand(1, 8, 6, 6)
        >>> FilteredActivation(upsampling=2)(images).shape
        torch.Size([1, 8, 6, 6])
    """

    reach = Reach(None)
    exact_for: Group = "integer"

    def __init__(self, function: Callable[[Tensor], Tensor] = F.silu, *, upsampling: int = 2) -> None:
        super().__init__()
        upsampling = require_int("upsampling", upsampling, 1)
        self.function = function
        self.upsampling = upsampling

    def forward(self, images: Tensor) -> Tensor:
        """Up, act, low-pass and down."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        height, width = images.shape[2:]
        finer = fourier_resample(images, (self.upsampling * height, self.upsampling * width))
        return fourier_resample(self.function(finer), (height, width))

    def extra_repr(self) -> str:
        """The options."""
        function = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{function}, upsampling={self.upsampling}"


class PolynomialActivation(nn.Module):
    """a + b·x + c·x² with learnt a, b and c per channel, without any aliasing.

    A square at most doubles the band, which the grid of twice the pixels holds; the low-pass filter then takes
    the upper half away.
    Exact for: every circular shift, fractional ones too. Only circular padding fits around it.
    Cost: as :class:`FilteredActivation` with ``upsampling=2``; a square is not bounded by its argument, so a
    normalization should precede it.

    Args:
        channels: C, at least 1.

    Shape:
        images: (B, C, H, W).
        result: as images.

    Raises:
        ValueError: channels is smaller than 1, or the images have another number of channels.

    Source: Michaeli et al. 2023, arXiv:2303.08085, section 3. Differs: it starts as x/2 + x²/4, the first
        terms of SiLU at 0, where the paper fits a ReLU.

    Example:
        >>> constant = torch.full((1, 1, 3, 3), 2.0)
        >>> PolynomialActivation(1)(constant)[0, 0, 0, 0].item()  # 2/2 + 4/4
        2.0
    """

    reach = Reach(None)
    exact_for: Group = "integer"

    def __init__(self, channels: int) -> None:
        super().__init__()
        channels = require_int("channels", channels, 1)
        self.channels = channels
        self.coefficients = nn.Parameter(torch.empty(3, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again at x/2 + x²/4, in every channel."""
        overwrite(self.coefficients, torch.tensor([0.0, 0.5, 0.25])[:, None].repeat(1, self.channels))

    def forward(self, images: Tensor) -> Tensor:
        """The polynomial, its square on the finer grid."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        require_axis("images", images, 1, self.channels, "channels")
        height, width = images.shape[2:]
        constant, linear, quadratic = self.coefficients[:, :, None, None].to(images.dtype)
        finer = fourier_resample(images, (2 * height, 2 * width))
        return fourier_resample(constant + finer * (linear + quadratic * finer), (height, width))

    def extra_repr(self) -> str:
        """The options."""
        return f"{self.channels}"


def build_activation(activation: Activation, channels: int) -> nn.Module:
    """Build a nonlinearity.

    Args:
        activation: ``silu``, ``filtered`` (SiLU in a :class:`FilteredActivation`) or ``polynomial``
            (:class:`PolynomialActivation`).
        channels: C, at least 1.

    Raises:
        ValueError: activation is unknown, or channels is smaller than 1.
    """
    require_choice("activation", activation, ACTIVATIONS)
    channels = require_int("channels", channels, 1)
    if activation == "polynomial":
        return PolynomialActivation(channels)
    return FilteredActivation() if activation == "filtered" else nn.SiLU()
