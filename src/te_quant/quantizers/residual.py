"""Residual vector quantization: every codebook quantizes what the ones before it left over.

Shape letters: B batch, C code size, h w token grid, K codes a codebook, Q codebooks, N = B*h*w latent vectors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from te_quant._checks import require_int
from te_quant._precision import full_precision, widen
from te_quant.functional import orthogonality, rotation_trick, straight_through
from te_quant.quantizers._layout import Layout
from te_quant.quantizers._losses import distance_losses
from te_quant.quantizers._residual import joined, partial_sums, residuals, search_residuals, step_codes
from te_quant.quantizers._stages import observe_stages, revive_stages, stages_of, start_stages
from te_quant.quantizers.base import QuantizerOutput
from te_quant.quantizers.vector import VectorQuantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ResidualVectorQuantizer"]


class ResidualVectorQuantizer(nn.Module):
    """Replace each latent vector by a sum of Q codes, each the nearest to what is left of it.

    Args:
        num_codes: K of each codebook, at least 1.
        code_dim: C, at least 1.
        num_quantizers: Q, at least 1.
        shared_codebook: one codebook serves all Q steps; otherwise each has its own.
        quantizer_dropout: while training, each element of axis 0 uses only its first n codebooks, n uniform in
            1..Q. Afterwards the first few indices alone decode well: ``decode(indices[..., :n])``.
        codebook_update: ``"gradient"`` or ``"ema"``, as for :class:`~te_quant.VectorQuantizer`. Under ``"ema"``
            all codebooks move together at the end of a step, and the codes returned are those after it.
        commitment_weight: β of the commitment term, >= 0. The codebook term has weight 1.
        orthogonal_reg: λ of the orthogonality penalty, the mean over the codebooks, >= 0.
        gradient_estimator: ``"straight_through"`` or ``"rotation_trick"``, from the latents to the sum of codes.
        decay: of the moving averages, in [0, 1).
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
        nonfinite: as for :class:`~te_quant.VectorQuantizer`.
        process_group: as for :class:`~te_quant.VectorQuantizer`.
        generator: randomness of the initial codebooks; the global one if ``None``.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, floating point, of the codebooks' dtype; under
            autocast also half precision, which is computed in float32.
        quantized, codes: as latents. losses: (). indices: the latents' shape without the channel axis and with Q
            behind, int64 in [0, K); -1, only under ``quantizer_dropout``, is a codebook that was not used.

    Attributes:
        stages: Q quantizers, or one if shared, with their ``codebook``, ``usage`` and ``code_sums``.

    Raises:
        ValueError: an option is out of range, axis ``channel_dim`` of latents is not C, the rank or device does
            not fit, or latents are not finite.
        TypeError: latents are not floating point, or of another dtype than the codebooks.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, Algorithm 1 and Section III-C (dropout); Lee et al. 2022,
        arXiv:2203.01941, Eq. 4 to 6 and shared codebooks. Differs: the distance terms are the mean over the
        codebooks used, where Lee et al. sum, so that β and learning rates mean the same for every Q.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        num_quantizers: int,
        *,
        shared_codebook: bool = False,
        quantizer_dropout: bool = False,
        codebook_update: Literal["gradient", "ema"] = "gradient",
        commitment_weight: float = 0.25,
        orthogonal_reg: float = 0.0,
        gradient_estimator: Literal["straight_through", "rotation_trick"] = "straight_through",
        decay: float = 0.99,
        channel_dim: int = 1,
        nonfinite: Literal["raise", "skip", "off"] | None = None,
        process_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_int("num_quantizers", num_quantizers, 1)
        self._layout = Layout(code_dim, channel_dim, nonfinite)
        self.stages = nn.ModuleList(
            VectorQuantizer(
                num_codes,
                code_dim,
                codebook_update=codebook_update,
                commitment_weight=commitment_weight,
                orthogonal_reg=orthogonal_reg,
                gradient_estimator=gradient_estimator,
                decay=decay,
                nonfinite=nonfinite,
                process_group=process_group,
                generator=generator,
            )
            for _ in range(1 if shared_codebook else num_quantizers)
        )
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.num_quantizers = num_quantizers
        self.shared_codebook = bool(shared_codebook)
        self.quantizer_dropout = bool(quantizer_dropout)
        self.channel_dim = channel_dim

    def forward(self, latents: Tensor, *, generator: torch.Generator | None = None) -> QuantizerOutput:
        """Quantize ``latents``; while training also update the statistics and, under ``"ema"``, the codebooks.

        Args:
            latents: see the class.
            generator: randomness of ``quantizer_dropout``.
        """
        first = self._first
        self._layout.check(latents, first.codebook)
        with full_precision(latents.device):
            rows = self._layout.to_rows(latents)
            depths, tables = self._draw_depths(latents, generator), self._tables()
            chosen = search_residuals(rows.searchable, tables, depths)
            dropped = depths is not None
            if self.training and not first.frozen:
                sums = partial_sums(step_codes(chosen, tables))[:-1]
                observe_stages(stages_of(self.stages), residuals(rows, sums, chosen, dropped=dropped), chosen)
                # Under "ema" the codebooks have just moved, and decode(indices) will read them where they are now.
                tables = self._tables()
            codes = step_codes(chosen, tables)
            *sums, total = partial_sums(codes)
            codebook_loss, commitment_loss = distance_losses(
                joined(residuals(rows, sums, chosen, dropped=dropped)),
                torch.cat(codes),
                first.commitment_weight,
                codebook_follows=first.codebook_update == "gradient",
            )
            penalty = torch.zeros_like(commitment_loss)
            if first.orthogonal_reg:
                own = tables[: len(self.stages)]
                penalty = first.orthogonal_reg * torch.stack([orthogonality(table) for table in own]).mean()
            estimate = rotation_trick if first.gradient_estimator == "rotation_trick" else straight_through
            dtype, shape = first.codebook.dtype, latents.shape
            return QuantizerOutput(
                quantized=self._layout.from_rows(estimate(rows.vectors, total).to(dtype), shape),
                indices=self._layout.indices_from_rows(chosen, shape),
                loss=codebook_loss + commitment_loss + penalty,
                codebook_loss=codebook_loss,
                commitment_loss=commitment_loss,
                regularization_loss=penalty,
                codes=self._layout.from_rows(total.detach().to(dtype), shape),
            )

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """All Q indices of each latent vector, Q last: no losses, no update, no dropout."""
        self._layout.check(latents, self._first.codebook)
        with full_precision(latents.device):
            chosen = search_residuals(self._layout.to_rows(latents).searchable, self._tables(), None)
        return self._layout.indices_from_rows(chosen, latents.shape)

    def decode(self, indices: Tensor) -> Tensor:
        """The sums of codes of ``indices``, with C at ``channel_dim``; differentiable in the codebooks.

        Args:
            indices: (B, h, w, n), (B, N, n) or (N, n), integer, in [0, K), with n in 1..Q: fewer than Q are those
                of the first codebooks. Under ``quantizer_dropout`` -1 adds nothing.

        Raises:
            ValueError: an index is out of range, or the rank, the number of codebooks or device does not fit.
            TypeError: the indices are not integers.
        """
        book, lowest = self._first.codebook, -1 if self.quantizer_dropout else 0
        indices = self._layout.check_indices(
            indices, book.device, self.num_codes, num_quantizers=self.num_quantizers, lowest=lowest
        )
        with full_precision(indices.device):
            codes = partial_sums(step_codes(indices, self._tables()[: indices.shape[-1]]))[-1].to(book.dtype)
        return codes if self.channel_dim == -1 else codes.movedim(-1, 1)

    @property
    def frozen(self) -> bool:
        """Whether :meth:`freeze` is in force."""
        return self._first.frozen

    def freeze(self, frozen: bool = True) -> ResidualVectorQuantizer:
        """Stop (or resume) every change of state; as :meth:`te_quant.VectorQuantizer.freeze`."""
        for stage in stages_of(self.stages):
            stage.freeze(frozen)
        return self

    @torch.no_grad()
    def kmeans_init(
        self, latents: Tensor, *, iterations: int = 10, generator: torch.Generator | None = None
    ) -> None:
        """Set each codebook to the k-means centres of what the ones before it leave over.

        A shared codebook is set to the centres of the latents; else as
        :meth:`te_quant.VectorQuantizer.kmeans_init`.
        """
        start_stages(stages_of(self.stages), self._counted(latents), iterations, generator)

    @torch.no_grad()
    def revive_dead_codes(
        self, latents: Tensor, *, threshold: float = 0.01, generator: torch.Generator | None = None
    ) -> Tensor:
        """Move the codes hardly used onto what is left of random latents at their step.

        Returns (Q, K) bool, (1, K) if shared; else as :meth:`te_quant.VectorQuantizer.revive_dead_codes`.
        """
        repeats = self.num_quantizers // len(self.stages)
        return revive_stages(stages_of(self.stages), repeats, self._counted(latents), threshold, generator)

    def extra_repr(self) -> str:
        """What the stages do not tell."""
        return f"num_quantizers={self.num_quantizers}, shared_codebook={self.shared_codebook}"

    @property
    def _first(self) -> VectorQuantizer:
        return stages_of(self.stages)[0]

    def _tables(self) -> list[Tensor]:
        """Q of (K, C)."""
        tables = [widen(stage.codebook) for stage in stages_of(self.stages)]
        return tables * (self.num_quantizers // len(tables))

    def _counted(self, latents: Tensor) -> Tensor:
        self._layout.check(latents, self._first.codebook)
        return self._layout.to_rows(latents).counted.to(self._first.codebook.dtype)

    def _draw_depths(self, latents: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """(N,) int64 in 1..Q, one value for each element of axis 0; None where nothing is dropped."""
        if not (self.training and self.quantizer_dropout):
            return None
        batch, positions = latents.shape[0], math.prod(latents.shape[1:]) // self.code_dim
        # In place, because a compiler that knows no batch size cannot trace torch.randint with a generator.
        drawn = torch.empty(batch, 1, device=latents.device).uniform_(generator=generator) * self.num_quantizers
        return (drawn.long().clamp_max(self.num_quantizers - 1) + 1).expand(batch, positions).reshape(-1)
