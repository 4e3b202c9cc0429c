"""Normalization: over the whole image, or at each pixel by itself.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

from te_quant._checks import require, require_axis, require_choice, require_int, require_rank
from te_quant.contract import Group, Reach
from te_quant.filters import in_format_of

__all__ = ["NORMS", "ChannelNorm", "Norm", "build_norm", "group_norm"]

Norm: TypeAlias = Literal["group", "channel"]
NORMS: tuple[Norm, ...] = get_args(Norm)

NORM_EPS = 1e-6
"""As in the published VQGAN; PyTorch's own default is 1e-5."""


def group_norm(channels: int, norm_groups: int) -> nn.GroupNorm:
    """Build a :class:`~torch.nn.GroupNorm`, and refuse a number of groups that does not divide the channels.

    Its statistics are those of the whole image, so that permuting the pixels permutes the result: it is exact
    for every circular shift, fractional shifts of band-limited images included. An error at the border,
    however, goes through the statistics to every pixel.

    Args:
        channels: C, at least 1.
        norm_groups: groups of channels that share their statistics, at least 1, a divisor of ``channels``.

    Raises:
        ValueError: an argument is smaller than 1, or ``norm_groups`` does not divide ``channels``.
    """
    channels = require_int("channels", channels, 1)
    norm_groups = require_int("norm_groups", norm_groups, 1)
    require(channels % norm_groups == 0, "norm_groups", f"a divisor of channels={channels}", norm_groups)
    # A config marks its default by a subclass of int, which no symbolic size can be divided by.
    return nn.GroupNorm(int(norm_groups), channels, eps=NORM_EPS)


class _OverChannels(nn.LayerNorm):
    """A LayerNorm of images: it is called, so that hooks which fetch its weights run, and audits see a grid."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to the same, in any layout."""
        return super().forward(images.movedim(1, -1)).movedim(-1, 1)


class ChannelNorm(nn.Module):
    """Zero mean and unit variance over the channels of every pixel, then a gain and an offset per channel.

    Exact for: every integer shift, circular or not, under any padding, since no pixel sees another; what is
    wrong at a border stays there. Not exact for fractional shifts: dividing by a norm that changes from pixel
    to pixel leaves the band.
    Cost: that of :func:`group_norm`.

    Args:
        channels: C, at least 2 (a single channel has no spread).

    Shape:
        images: (B, C, H, W).
        result: as images.

    Raises:
        ValueError: channels is smaller than 2, or the images have another number of channels.

    Source: Ba et al. 2016, arXiv:1607.06450, only over the channels as in Liu et al. 2022, arXiv:2201.03545.

    Example:
        >>> import torch
        >>> pixel = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
        >>> ChannelNorm(2)(pixel).flatten().tolist()
        [-0.9999995231628418, 0.9999995231628418]
    """

    reach = Reach(1)
    exact_for: Group = "integer"

    def __init__(self, channels: int) -> None:
        super().__init__()
        channels = require_int("channels", channels, 2)
        self.channels = channels
        self.norm = _OverChannels(channels, eps=NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize every pixel."""
        require_rank("images", images, (4,), "(B, C, H, W)")
        require_axis("images", images, 1, self.channels, "channels")
        # Laid out as images again: convolutions choose their algorithm, and so their rounding, by the strides.
        return in_format_of(images, self.norm(images))

    def extra_repr(self) -> str:
        """The options."""
        return f"{self.channels}"


def build_norm(norm: Norm, channels: int, *, norm_groups: int) -> nn.Module:
    """Build a normalization.

    Args:
        norm: ``group`` (:func:`group_norm`) or ``channel`` (:class:`ChannelNorm`).
        channels: number of channels, C.
        norm_groups: groups of channels, for ``norm="group"`` only.

    Raises:
        ValueError: norm is unknown, or the layer refuses its number of channels or groups.
    """
    require_choice("norm", norm, NORMS)
    return group_norm(channels, norm_groups) if norm == "group" else ChannelNorm(channels)
