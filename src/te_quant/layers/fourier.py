"""Resampling with the ideal low-pass filter, by the Fourier transform of the whole image.

Shape letters: B batch, C channels, H W pixels, s stride.
"""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor, nn

from te_quant._checks import padding_cure, require, require_int, require_rank
from te_quant.contract import Reach, Statement
from te_quant.filters import fourier_resample
from te_quant.layers.stating import derived

__all__ = ["FourierDownsample2d", "FourierUpsample2d"]


class FourierDownsample2d(nn.Module):
    """Keep the frequencies that the smaller grid can hold, and no others.

    Exact for: every circular shift t, fractional ones too: ``down(T_t x) = R_{t/s} down(x)``, where a
    fractional shift is :func:`te_quant.shifts.fourier_shift`. The result has no Nyquist frequency, so nothing
    in it is undefined. Tokens computed from it move by whole tokens only for multiples of s, which is what
    ``exact_for`` states. The image counts as periodic: only circular padding fits around it.
    Cost: two transforms, O(H·W·log(H·W)) per channel, in float32 for half precision; every pixel of the result
    sees the whole image, with the ringing of an ideal filter at edges.

    Args:
        stride: s, at least 1.

    Shape:
        images: (B, C, H, W), H and W divisible by s; their quotients may be odd or even.
        result: (B, C, H/s, W/s).

    Raises:
        ValueError: stride is smaller than 1, or a side is not divisible by it.
        TypeError: stride is not an int, or images are not floating point.

    Source: Michaeli et al. 2023, arXiv:2303.08085, section 3. Differs: the mask follows the shape, so that
        images need not be square, and the Nyquist frequency is removed.

    Example:
        >>> import torch
        >>> wave = torch.cos(2 * torch.pi * torch.arange(8) / 8).expand(1, 1, 8, 8)
        >>> FourierDownsample2d(2)(wave)[0, 0, 0].abs().round(decimals=4)
        tensor([1., 0., 1., 0.])
    """

    reach, exact_for = derived(
        lambda self: Statement(Reach(None, self.stride), "integer" if self.stride == 1 else "stride")
    )

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        stride = require_int("stride", stride, 1)
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Filter and sample at once."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        s, (height, width) = self.stride, images.shape[2:]
        if height % s or width % s or not height or not width:
            given = f"shape {tuple(images.shape)}" + (f"; {padding_cure(s)}" if height and width else "")
            require(False, "images sides", f"positive multiples of {s}", given)
        return fourier_resample(images, (height // s, width // s))

    def extra_repr(self) -> str:
        """The options."""
        return f"stride={self.stride}"


class FourierUpsample2d(nn.Module):
    """The one signal on the larger grid that has no frequencies but those of the smaller one.

    Exact for: every circular shift k, fractional ones too: ``up(R_k y) = T_{s·k} up(y)``. The Nyquist frequency
    that even sides have is removed. Only circular padding fits around it.
    Cost: as :class:`FourierDownsample2d`.

    Args:
        stride: s, at least 1.

    Shape:
        images: (B, C, H, W).
        result: (B, C, s·H, s·W).

    Raises:
        ValueError: stride is smaller than 1, or a side is empty.
        TypeError: stride is not an int, or images are not floating point.

    Source: as :class:`FourierDownsample2d`, whose adjoint it is but for the gain s².

    Example:
        >>> import torch
        >>> images = torch.rand(1, 1, 5, 5)
        >>> torch.allclose(FourierDownsample2d(2)(FourierUpsample2d(2)(images)), images, atol=1e-6)
        True
    """

    reach, exact_for = derived(lambda self: Statement(Reach(None, Fraction(1, self.stride)), "integer"))

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        stride = require_int("stride", stride, 1)
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Extend the spectrum with zeros."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        return fourier_resample(images, (self.stride * images.shape[2], self.stride * images.shape[3]))

    def extra_repr(self) -> str:
        """The options."""
        return f"stride={self.stride}"
