"""Latents in any layout as rows of vectors, and rows laid out again.

Shape letters: B batch, C code size, h w token grid, N = B*h*w latent vectors, Q indices per vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from te_quant._precision import widen
from te_quant._values import require_finite

__all__ = ["Rows", "lay_out", "to_rows"]


class Rows(NamedTuple):
    """Latents as rows.

    Attributes:
        vectors: (N, C), at least float32, with gradient; zero where skipped.
        searchable: (N, C), the same values without gradient, checked for NaN where that was asked for.
        weights: (N, 1), 0 for skipped rows and 1 for the others; None if every row counts.
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


def to_rows(latents: Tensor, channel_dim: int, nonfinite: str | None) -> Rows:
    """(B, C, h, w) or any other layout -> (N, C); NaN and infinities are treated as ``nonfinite`` says."""
    pattern = "b c ... -> (b ...) c" if channel_dim == 1 else "b ... c -> (b ...) c"
    vectors = widen(rearrange(latents, pattern))
    shape = latents.shape
    grid = tuple(shape[:-1]) if channel_dim == -1 else (shape[0], *shape[2:])
    mode = nonfinite or ("raise" if latents.device.type == "cpu" else "off")
    if mode == "raise":
        return Rows(vectors, require_finite("latents", vectors), None, grid)
    if mode == "skip":
        finite = vectors.isfinite().all(1, keepdim=True)
        vectors = torch.where(finite, vectors, torch.zeros_like(vectors))
        return Rows(vectors, vectors.detach(), finite.to(vectors.dtype), grid)
    return Rows(vectors, vectors.detach(), None, grid)


def lay_out(rows: Tensor, grid: tuple[int, ...], channel_dim: int) -> Tensor:
    """(N, C) -> (B, C, h, w), or the layout of another ``grid`` and ``channel_dim``."""
    laid = rows.view(*grid, rows.shape[1])
    return laid if channel_dim == -1 else laid.movedim(-1, 1)
