"""The blocks of a convolutional autoencoder: padded convolution, residual block, attention.

Shape letters: B batch, C channels, H W pixels of the current grid.

Source: Esser et al. 2021, arXiv:2012.09841, whose encoder and decoder are made of these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require_choice, require_int, require_number
from te_quant._execution import is_exporting
from te_quant.contract import Group, Reach, Statement, sliding_window
from te_quant.filters import PADDING_MODES, Margins, PaddingMode, pad2d
from te_quant.layers.activation import Activation, build_activation
from te_quant.layers.norm import Norm, build_norm
from te_quant.layers.stating import both_axes, derived, in_series, statement_of

__all__ = ["PaddedConv2d", "ResidualBlock", "SelfAttention2d"]

# Up to so many pixels attention rounds as in older versions, so that published results stay; weights take 4 MiB.
_MOST_PLAIN = 1024


class PaddedConv2d(nn.Conv2d):
    """A convolution whose padding goes through :func:`te_quant.filters.pad2d`.

    :class:`torch.nn.Conv2d` pads both ends of an axis equally; a stride-2 convolution that keeps stride
    multiples aligned needs one more row only at the end.
    Exact for: multiples of the stride, under circular padding (or with margins of zero and k <= s).

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

    Example:
        >>> conv = PaddedConv2d(3, 8, 3, stride=2, margins=(0, 1, 0, 1), padding_mode="circular")
        >>> conv.reach, conv.exact_for
        (Reach(size=3, stride=2), 'stride')
    """

    reach, exact_for = derived(lambda self: self._statement())

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
        in_channels = require_int("in_channels", in_channels, 1)
        out_channels = require_int("out_channels", out_channels, 1)
        kernel_size = require_int("kernel_size", kernel_size, 1)
        stride = require_int("stride", stride, 1)
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

    def _statement(self) -> Statement:
        left, right, top, bottom = self.margins
        circular = self._mode == "circular"
        rows, columns = (
            sliding_window(size, stride=stride, before=before, after=after, circular=circular)
            for size, stride, before, after in zip(
                self.kernel_size, self.stride, (top, left), (bottom, right), strict=True
            )
        )
        return both_axes(rows, columns)

    def extra_repr(self) -> str:
        """The options."""
        options = f"kernel_size={self.kernel_size[0]}, stride={self.stride[0]}, margins={self.margins}"
        return f"{self.in_channels}, {self.out_channels}, {options}, padding_mode={self.padding_mode}"


class ResidualBlock(nn.Module):
    """Twice norm, activation, 3x3 convolution; the input is added, through a 1x1 convolution if C changes.

    Exact for: every integer circular shift, under circular padding.

    Args:
        in_channels: C of the input, a multiple of ``norm_groups`` for ``norm="group"``.
        out_channels: C of the output, a multiple of ``norm_groups`` for ``norm="group"``.
        norm: ``group`` or ``channel``; see :func:`te_quant.layers.build_norm`.
        norm_groups: groups of both normalizations, for ``norm="group"`` only.
        activation: ``silu``, ``filtered`` or ``polynomial``; see :func:`te_quant.layers.build_activation`.
        dropout: share of the values zeroed before the second convolution in training, in [0, 1).
        padding_mode: padding of the 3x3 convolutions; see :func:`te_quant.filters.pad2d`.

    Shape:
        images: (B, in_channels, H, W).
        result: (B, out_channels, H, W).

    Raises:
        ValueError: an option is out of range, or ``norm_groups`` does not divide a number of channels.

    Source: Esser et al. 2021, arXiv:2012.09841. Differs: no time embedding, which it has and never uses.

    Example:
        >>> import torch
        >>> block = ResidualBlock(8, 16, norm="channel", padding_mode="circular")
        >>> block(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 16, 4, 4])
        >>> block.reach, block.exact_for
        (Reach(size=5, stride=1), 'integer')
    """

    reach, exact_for = derived(lambda self: self._branch().beside(statement_of(self.shortcut)))

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: Norm = "group",
        norm_groups: int = 32,
        activation: Activation = "silu",
        dropout: float = 0.0,
        padding_mode: PaddingMode,
    ) -> None:
        super().__init__()
        dropout = require_number("dropout", dropout, 0, below=1)
        self.norm1 = build_norm(norm, in_channels, norm_groups=norm_groups)
        self.activation1 = build_activation(activation, in_channels)
        self.conv1 = PaddedConv2d(in_channels, out_channels, 3, padding_mode=padding_mode)
        self.norm2 = build_norm(norm, out_channels, norm_groups=norm_groups)
        self.activation2 = build_activation(activation, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = PaddedConv2d(out_channels, out_channels, 3, padding_mode=padding_mode)
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The input plus what the two convolutions make of it."""
        hidden = self.conv1(self.activation1(self.norm1(images)))
        hidden = self.conv2(self.dropout(self.activation2(self.norm2(hidden))))
        result: Tensor = self.shortcut(images) + hidden
        return result

    def _branch(self) -> Statement:
        first = (self.norm1, self.activation1, self.conv1)
        return in_series(*first, self.norm2, self.activation2, self.dropout, self.conv2)


class SelfAttention2d(nn.Module):
    """Every pixel attends to every pixel of its image with one head; the input is added.

    It knows no positions: permuting the pixels permutes the result. So it keeps the equivariance of its input
    under integer shifts, and spreads an error at the border to the whole grid. It is not exact for fractional
    shifts, because the exponentials of a softmax leave the band.
    Cost: O((H·W)²·C).

    Args:
        channels: C, a multiple of ``norm_groups`` for ``norm="group"``.
        norm: ``group`` or ``channel``; see :func:`te_quant.layers.build_norm`.
        norm_groups: groups of the normalization, for ``norm="group"`` only.

    Shape:
        images: (B, C, H, W).
        result: as images.

    Raises:
        ValueError: ``norm_groups`` does not divide ``channels``.

    Source: Esser et al. 2021, arXiv:2012.09841. Differs: queries, keys and values come from one projection,
        which is the same function, and the H·W x H·W weights are not stored above 1,024 pixels, nor below in
        channels-last format, where torch has a fused kernel.

    Example:
        >>> import torch
        >>> SelfAttention2d(8, norm_groups=4)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    reach = Reach(None)
    exact_for: Group = "integer"

    def __init__(self, channels: int, *, norm: Norm = "group", norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = build_norm(norm, channels, norm_groups=norm_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The input plus the projected averages of the values."""
        # (B, 3C, H, W) -> (B, 1 head, H·W, 3C): pixels are the sequence.
        tokens = self.qkv(self.norm(images)).flatten(2).transpose(1, 2).unsqueeze(1)
        # Fused kernels want each pixel's channels side by side. A graph must not depend on the size of the grid.
        if not torch.compiler.is_compiling() and not is_exporting() and tokens.shape[2] > _MOST_PLAIN:
            tokens = tokens.contiguous()
        queries, keys, values = tokens.chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        grid: Tensor = self.out(mixed.squeeze(1).transpose(1, 2).reshape(images.shape))
        return images + grid
