"""From latents in any layout to rows of vectors and back, with every check on the way.

Shape letters: B batch, C code size, h w token grid, N = B*h*w latent vectors, Q indices a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from te_quant._checks import (
    require,
    require_axis,
    require_choice,
    require_device,
    require_floating,
    require_int,
    require_integer_tensor,
    require_rank,
)
from te_quant._precision import AUTOCAST_DEVICES, HALF, widen
from te_quant._values import require_finite, require_in_range
from te_quant.quantizers.base import QuantizerOutput

__all__ = ["Layout", "Rows"]


class Rows(NamedTuple):
    """Latents as rows.

    Attributes:
        vectors: (N, C), at least float32, with gradient; zero where skipped.
        searchable: (N, C), the same values without gradient, checked for NaN where that was asked for.
        weights: (N, 1), 0 for skipped rows and 1 for the others; None if every row counts.
    """

    vectors: Tensor
    searchable: Tensor
    weights: Tensor | None

    @property
    def counted(self) -> Tensor:
        """(·, C), the values of the rows that count."""
        return self.searchable if self.weights is None else self.searchable[self.weights.squeeze(1) > 0]


@dataclass(frozen=True)
class Layout:
    """How the latents of one quantizer lie in memory, and what it refuses."""

    code_dim: int
    channel_dim: int
    nonfinite: str | None

    def __post_init__(self) -> None:
        require_int("channel_dim", self.channel_dim)
        require_choice("channel_dim", self.channel_dim, (1, -1))
        require_choice("nonfinite", self.nonfinite, (None, "raise", "skip", "off"))

    def check(self, latents: Tensor, codebook: Tensor) -> None:
        """Refuse latents that do not fit ``codebook``; call it before autocast is switched off."""
        shape = "(B, C, h, w) or (N, C)" if self.channel_dim == 1 else "(B, N, C) or (N, C)"
        require_rank("latents", latents, (2, 3, 4, 5), shape)
        require_floating("latents", latents)
        axis = 1 if self.channel_dim == 1 else latents.ndim - 1
        require_axis("latents", latents, axis, self.code_dim, "code_dim")
        require_device("latents", latents, codebook.device, "codebook")
        if latents.dtype != codebook.dtype:
            device = latents.device.type
            cast = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
            # Half precision is computed in float32, which a codebook in float64 does not fit.
            if not (cast and latents.dtype in HALF and codebook.dtype != torch.float64):
                raise TypeError(f"latents must be {codebook.dtype} as the codebook, got {latents.dtype}.")

    def to_rows(self, latents: Tensor) -> Rows:
        """(B, C, h, w) or any other layout -> (N, C); looks at NaN as asked."""
        pattern = "b c ... -> (b ...) c" if self.channel_dim == 1 else "b ... c -> (b ...) c"
        vectors = widen(rearrange(latents, pattern))
        mode = self.nonfinite or ("raise" if latents.device.type == "cpu" else "off")
        if mode == "raise":
            return Rows(vectors, require_finite("latents", vectors), None)
        if mode == "skip":
            finite = vectors.isfinite().all(1, keepdim=True)
            vectors = torch.where(finite, vectors, torch.zeros_like(vectors))
            return Rows(vectors, vectors.detach(), finite.to(vectors.dtype))
        return Rows(vectors, vectors.detach(), None)

    def counted(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """(B, C, h, w) -> (·, C), the checked vectors that count, in the dtype of ``codebook``."""
        self.check(latents, codebook)
        return self.to_rows(latents).counted.to(codebook.dtype)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(N, C) -> the layout of latents of ``shape``."""
        if self.channel_dim == -1:
            return rows.view(shape)
        return rows.view(shape[0], *shape[2:], self.code_dim).movedim(-1, 1)

    def indices_from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(N,) or (N, Q) -> the shape of latents of ``shape`` without the channel axis, and Q behind."""
        grid = shape[:-1] if self.channel_dim == -1 else (shape[0], *shape[2:])
        return rows.view(*grid, *rows.shape[1:])

    def output(
        self, latents: Tensor, dtype: torch.dtype, quantized: Tensor, chosen: Tensor, codes: Tensor, *terms: Tensor
    ) -> QuantizerOutput:
        """What was computed for rows, in the layout of ``latents``: codes of ``dtype``, and the sum of the terms.

        Args:
            latents: what was quantized.
            dtype: of the codes.
            quantized: (N, C) with a gradient path.
            chosen: (N,) or (N, Q).
            codes: (N, C).
            terms: codebook, commitment and regularization loss.
        """
        codebook_loss, commitment_loss, regularization_loss = terms
        return QuantizerOutput(
            quantized=self.from_rows(quantized.to(dtype), latents.shape),
            indices=self.indices_from_rows(chosen, latents.shape),
            loss=codebook_loss + commitment_loss + regularization_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            regularization_loss=regularization_loss,
            codes=self.from_rows(codes.detach().to(dtype), latents.shape),
        )

    def check_indices(
        self,
        indices: Tensor,
        device: torch.device,
        num_codes: int,
        *,
        num_quantizers: int | None = None,
        lowest: int = 0,
    ) -> Tensor:
        """Refuse what no code belongs to; return the indices as int64.

        Args:
            indices: one for each vector, or 1 to ``num_quantizers`` of them in the last axis.
            device: where the codebook lives.
            num_codes: K; indices are below it.
            num_quantizers: Q; None where a vector has one index and no axis for it.
            lowest: indices start here.
        """
        require_integer_tensor("indices", indices)
        if num_quantizers is None:
            require_rank("indices", indices, (1, 2, 3, 4), "(B, h, w), (B, N) or (N,)")
        else:
            require_rank("indices", indices, (2, 3, 4, 5), "(B, h, w, Q), (B, N, Q) or (N, Q)")
            stages, shape = indices.shape[-1], tuple(indices.shape)
            expected = f"1 to num_quantizers={num_quantizers}"
            fits = 1 <= stages <= num_quantizers
            require(fits, f"indices axis {indices.ndim - 1}", expected, f"{stages} (indices shape {shape})")
        require_device("indices", indices, device, "codebook")
        # A negative index would silently count from the end.
        return require_in_range("indices", indices.long(), num_codes, "num_codes", lowest)
