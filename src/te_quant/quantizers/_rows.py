"""Latents in any layout as rows of vectors, and rows laid out again.

Shape letters: B batch, C code size, h w token grid, N = B*h*w latent vectors, Q indices per vector.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from te_quant._execution import in_transform
from te_quant._precision import widen
from te_quant._values import require_finite

__all__ = ["Layout", "Rows", "grid_of", "is_channels_last", "to_rows"]

# Numbers of an image from which a call for each image takes less than moving channels.
_MANY = 1 << 15

_SKIP = "build the quantizer with nonfinite='skip' to leave such vectors out"


class Rows(NamedTuple):
    """Latents as rows.

    Attributes:
        vectors: (N, C), at least float32, with gradient. Rows that are masked or skipped are as if zero, and their
            gradient does not reach the latents.
        searchable: (N, C), the same values without gradient, checked for NaN where that was asked for.
        weights: (N, 1), 0 for rows that are masked or skipped and 1 for the others; None if every row counts.
        grid: the shape of the tokens, such as (B, h, w); N is its product.
    """

    vectors: Tensor
    searchable: Tensor
    weights: Tensor | None
    grid: tuple[int, ...]

    @property
    def counted(self) -> Tensor:
        """(·, C), the values of the rows that count."""
        return self.searchable if self.weights is None else self.searchable[self.weights.squeeze(1) > 0]


def grid_of(latents: Tensor, channel_dim: int) -> tuple[int, ...]:
    """The shape of the tokens: that of the latents without the channel axis."""
    shape = latents.shape
    return tuple(shape[:-1]) if channel_dim == -1 else (shape[0], *shape[2:])


def to_rows(latents: Tensor, channel_dim: int, nonfinite: str | None, kept: Tensor | None = None) -> Rows:
    """(B, C, h, w) or any other layout -> (N, C); NaN and infinities are treated as ``nonfinite`` says.

    Args:
        latents: see :class:`te_quant.Quantizer`.
        channel_dim: 1 or -1.
        nonfinite: a mode, or None for that of the device.
        kept: (N, 1) bool, False for masked rows, at whose values nothing looks; None if there are none.
    """
    pattern = "b c ... -> (b ...) c" if channel_dim == 1 else "b ... c -> (b ...) c"
    vectors = widen(rearrange(latents, pattern))
    grid = grid_of(latents, channel_dim)
    weights = None
    if kept is not None:
        # Chosen, not multiplied by zero: neither NaN nor its gradient may pass.
        vectors, weights = torch.where(kept, vectors, 0.0), kept.to(vectors.dtype)
    mode = nonfinite or ("raise" if latents.device.type == "cpu" else "off")
    if mode == "raise":
        return Rows(vectors, require_finite("latents", vectors, _SKIP), weights, grid)
    if mode == "skip":
        finite = vectors.isfinite().all(1, keepdim=True)
        vectors = torch.where(finite, vectors, torch.zeros_like(vectors))
        finite = finite if kept is None else finite & kept
        return Rows(vectors, vectors.detach(), finite.to(vectors.dtype), grid)
    return Rows(vectors, vectors.detach(), weights, grid)


class Layout(NamedTuple):
    """How rows become tensors in the layout of the latents again.

    Attributes:
        grid: the shape of the tokens.
        channel_dim: 1 or -1.
        channels_last: with ``channel_dim`` 1, leave the channels innermost in memory; otherwise contiguous.
    """

    grid: tuple[int, ...]
    channel_dim: int
    channels_last: bool = False

    def arrange(self, rows: Tensor) -> Tensor:
        """(N, C) -> (B, C, h, w), or whatever this layout is."""
        laid = self.view(rows)
        return laid if self.channels_last or self.channel_dim == -1 else laid.contiguous()

    def look_up(self, table: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
        """Return what :meth:`arrange` gives for ``rows``, those of ``table`` at ``indices``; bit for bit.

        A CPU moves channels at a fraction of the speed of its memory. Where there are no more codes than tokens in
        an image, it takes less time to look them up again, one channel after the other.

        Args:
            table: (K, C), without gradient.
            indices: (N,).
            rows: (N, C).
        """
        images, tokens, (codes, size) = self.grid[0], math.prod(self.grid[1:]), table.shape
        moved = self.channel_dim == 1 and not self.channels_last
        eager = table.device.type == "cpu" and not (torch.compiler.is_compiling() or in_transform())
        if not (moved and eager and codes <= tokens and tokens * size >= _MANY):
            return self.arrange(rows)
        channels = table.T.contiguous()
        laid = table.new_empty(images, size, tokens)
        for image, own in zip(laid, indices.view(images, tokens), strict=True):
            torch.index_select(channels, 1, own, out=image)
        return laid.view(images, size, *self.grid[1:])

    def view(self, rows: Tensor) -> Tensor:
        """The same shape without moving anything in memory."""
        laid = rows.view(*self.grid, rows.shape[1])
        return laid if self.channel_dim == -1 else laid.movedim(-1, 1)


def is_channels_last(latents: Tensor, channel_dim: int) -> bool:
    """Say whether channels are innermost in memory although ``channel_dim`` is 1."""
    return channel_dim == 1 and not latents.is_contiguous() and latents.movedim(1, -1).is_contiguous()
