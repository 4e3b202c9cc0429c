"""The blocks of a convolutional autoencoder: padded convolution, residual block, attention.

Shape letters: B batch, C channels, H W pixels of the grid at hand.

Source: Esser et al. 2021, arXiv:2012.09841, whose encoder and decoder are made of these.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require, require_choice, require_int, require_number
from te_quant.filters import PADDING_MODES, Margins, PaddingMode, pad2d

__all__ = ["PaddedConv2d", "ResidualBlock", "SelfAttention2d", "group_norm"]

GROUP_NORM_EPS = 1e-6
"""As in the published VQGAN; PyTorch's own default is 1e-5."""


def group_norm(channels: int, norm_groups: int) -> nn.GroupNorm:
    """A :class:`~torch.nn.GroupNorm` that refuses a number of groups which does not divide the channels.

    Raises:
        ValueError: an argument is smaller than 1, or ``norm_groups`` does not divide ``channels``.
    """
    require_int("channels", channels, 1)
    require_int("norm_groups", norm_groups, 1)
    require(channels % norm_groups == 0, "norm_groups", f"a divisor of channels={channels}", norm_groups)
    return nn.GroupNorm(norm_groups, channels, eps=GROUP_NORM_EPS)


class PaddedConv2d(nn.Conv2d):
    """A convolution whose padding goes through :func:`te_quant.filters.pad2d`.

    :class:`torch.nn.Conv2d` pads both ends of an axis alike; a stride-2 convolution that keeps stride
    multiples aligned needs one more row at the end only.

    Args:
        in_channels: C of the input, at least 1.
        out_channels: C of the output, at least 1.
        kernel_size: k, at least 1.
        stride: s, at least 1.
        margins: pixels added on the (left, right, top, bottom); ``(k - 1) // 2`` before and ``k // 2`` after
            if not given.
        padding_mode: see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, in_channels, H, W).
        result: (B, out_channels, ⌈H/s⌉, ⌈W/s⌉) with the margins that are used if none are given.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        margins: Margins | None = None,
        padding_mode: PaddingMode,
    ) -> None:
        require_int("in_channels", in_channels, 1)
        require_int("out_channels", out_channels, 1)
        require_int("kernel_size", kernel_size, 1)
        require_int("stride", stride, 1)
        require_choice("padding_mode", padding_mode, PADDING_MODES)
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding_mode=padding_mode)
        before, after = (kernel_size - 1) // 2, kernel_size // 2
        self.margins: Margins = (before, after, before, after) if margins is None else margins
        self._mode: PaddingMode = padding_mode

    def forward(self, images: Tensor) -> Tensor:
        """Pad, then convolve."""
        left, right, top, bottom = self.margins
        if self._mode == "zeros" and left == right and top == bottom:
            # The convolution pads with zeros itself, without a padded copy of its input.
            return F.conv2d(images, self.weight, self.bias, self.stride, (top, left))
        padded = pad2d(images, self.margins, self._mode)
        return F.conv2d(padded, self.weight, self.bias, self.stride)

    def extra_repr(self) -> str:
        """The options."""
        options = f"kernel_size={self.kernel_size[0]}, stride={self.stride[0]}, margins={self.margins}"
        return f"{self.in_channels}, {self.out_channels}, {options}, padding_mode={self.padding_mode}"


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU, 3x3 convolution; the input is added, through a 1x1 convolution if C changes.

    Args:
        in_channels: C of the input, a multiple of ``norm_groups``.
        out_channels: C of the output, a multiple of ``norm_groups``.
        norm_groups: groups of both normalisations.
        dropout: share of the values zeroed before the second convolution in training, in [0, 1).
        padding_mode: of the 3x3 convolutions; see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, in_channels, H, W).
        result: (B, out_channels, H, W).

    Raises:
        ValueError: an option is out of range, or ``norm_groups`` does not divide a number of channels.

    Source: Esser et al. 2021, arXiv:2012.09841. Differs: no time embedding, which it has and never uses.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm_groups: int = 32,
        dropout: float = 0.0,
        padding_mode: PaddingMode,
    ) -> None:
        super().__init__()
        require_number("dropout", dropout, 0, below=1)
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = PaddedConv2d(in_channels, out_channels, 3, padding_mode=padding_mode)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = PaddedConv2d(out_channels, out_channels, 3, padding_mode=padding_mode)
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The input plus what the two convolutions make of it."""
        hidden = self.conv1(F.silu(self.norm1(images)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        result: Tensor = self.shortcut(images) + hidden
        return result


class SelfAttention2d(nn.Module):
    """Every pixel attends to every pixel of its image with one head; the input is added.

    There is no position in it: permuting the pixels permutes the result, so that it keeps whatever
    equivariance its input has (and spreads what its input has lost to the whole grid).

    Args:
        channels: C, a multiple of ``norm_groups``.
        norm_groups: groups of the normalisation.

    Shape:
        images: (B, C, H, W).
        result: as images.

    Raises:
        ValueError: ``norm_groups`` does not divide ``channels``.

    Source: Esser et al. 2021, arXiv:2012.09841. Differs: queries, keys and values come from one projection,
        which is the same function, and the H·W x H·W weights are never stored where a fused kernel exists.
    """

    def __init__(self, channels: int, *, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The input plus the projected averages of the values."""
        # (B, 3C, H, W) -> (B, 1 head, H·W, 3C): pixels are the sequence.
        tokens = self.qkv(self.norm(images)).flatten(2).transpose(1, 2).unsqueeze(1)
        queries, keys, values = tokens.chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        grid: Tensor = self.out(mixed.squeeze(1).transpose(1, 2).reshape(images.shape))
        return images + grid
