"""Residual vector quantization: every codebook quantizes what the ones before it left over.

Shape letters: B batch, C code size, h w token grid, K codes a codebook, Q codebooks, N = B*h*w latent vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from te_quant._checks import require_int, require_type
from te_quant._precision import full_precision
from te_quant.functional import rotation_trick, straight_through
from te_quant.quantizers import _residual, _stages
from te_quant.quantizers._losses import distance_losses
from te_quant.quantizers._rows import Layout
from te_quant.quantizers.base import QuantizerOutput
from te_quant.quantizers.vector import VectorQuantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ResidualVectorQuantizer"]


class ResidualVectorQuantizer(nn.Module):
    """Replace each latent vector by a sum of Q codes, each the nearest to what is left of it.

    Args:
        num_codes, code_dim, num_quantizers: K of each codebook, C and Q, each at least 1.
        shared_codebook: one codebook serves all Q steps; otherwise each has its own.
        quantizer_dropout: if True, each element of axis 0 uses its first n codebooks alone in training, n uniform
            in 1..Q. Afterwards the first few indices alone decode well: ``decode(indices[..., :n])``.
        codebook_update: ``"gradient"`` or ``"ema"``, as for :class:`~te_quant.VectorQuantizer`. Under ``"ema"``
            all codebooks move together at the end of a step, and the codes returned are those after it.
        commitment_weight: β of the commitment term, >= 0. The codebook term has weight 1.
        orthogonal_reg: λ of the orthogonality penalty, the mean over the codebooks, >= 0.
        gradient_estimator: ``"straight_through"`` or ``"rotation_trick"``, from the latents to the sum of codes.
        decay, channel_dim, nonfinite, process_group: as for :class:`~te_quant.VectorQuantizer`.
        generator: randomness of the initial codebooks; the global one if ``None``.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, floating point, of the codebooks' dtype; under
            autocast also half precision, which is computed in float32.
        quantized, codes: as latents. losses: (). indices: the latents' shape without the channel axis and with Q
            behind, int64 in [0, K); -1, only under ``quantizer_dropout``, is a codebook that was not used.

    Attributes:
        stages: Q quantizers, or one if shared, with their ``codebook``, ``usage`` and ``code_sums``.

    Raises ``ValueError`` and ``TypeError`` as :class:`~te_quant.VectorQuantizer`.

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
        require_type("shared_codebook", shared_codebook, bool, "a bool")
        require_type("quantizer_dropout", quantizer_dropout, bool, "a bool")
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
        self.num_codes, self.code_dim, self.num_quantizers = num_codes, code_dim, num_quantizers
        self.shared_codebook, self.quantizer_dropout = shared_codebook, quantizer_dropout
        self.channel_dim, self.frozen = channel_dim, False

    def forward(self, latents: Tensor, *, generator: torch.Generator | None = None) -> QuantizerOutput:
        """Quantize ``latents``; while training also update the statistics and, under ``"ema"``, the codebooks.

        ``generator`` is the randomness of ``quantizer_dropout``.
        """
        stages, first = self._quantizers, self._quantizers[0]
        self._layout.check(latents, first.codebook)
        with full_precision(latents.device):
            rows = self._layout.to_rows(latents)
            dropped, steps = self.training and self.quantizer_dropout, self.num_quantizers
            depths = _residual.draw_depths(latents, self.code_dim, steps, generator) if dropped else None
            tables = _stages.tables_of(stages, steps)
            chosen = _residual.search_residuals(rows.searchable, tables, depths)
            if self.training and not self.frozen:
                sums = _residual.partial_sums(_residual.step_codes(chosen, tables))[:-1]
                _stages.observe_stages(stages, _residual.residuals(rows, sums, chosen, dropped=dropped), chosen)
                # Under "ema" the codebooks have just moved, and decode(indices) will read them where they are now.
                tables = _stages.tables_of(stages, steps)
            codes = _residual.step_codes(chosen, tables)
            *sums, total = _residual.partial_sums(codes)
            codebook_loss, commitment_loss = distance_losses(
                _residual.joined(_residual.residuals(rows, sums, chosen, dropped=dropped)),
                torch.cat(codes),
                first.commitment_weight,
                codebook_follows=first.codebook_update == "gradient",
            )
            nothing = torch.zeros_like(commitment_loss)
            penalty = first.orthogonal_reg * _stages.mean_penalty(stages) if first.orthogonal_reg else nothing
            estimate = rotation_trick if first.gradient_estimator == "rotation_trick" else straight_through
            terms = (codebook_loss, commitment_loss, penalty)
            quantized = estimate(rows.vectors, total)
            return self._layout.output(latents, first.codebook.dtype, quantized, chosen, total, *terms)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """All Q indices of each latent vector, Q last: no losses, no update, no dropout."""
        self._layout.check(latents, self._quantizers[0].codebook)
        with full_precision(latents.device):
            tables = _stages.tables_of(self._quantizers, self.num_quantizers)
            chosen = _residual.search_residuals(self._layout.to_rows(latents).searchable, tables, None)
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
        book, lowest = self._quantizers[0].codebook, -1 if self.quantizer_dropout else 0
        indices = self._layout.check_indices(
            indices, book.device, self.num_codes, num_quantizers=self.num_quantizers, lowest=lowest
        )
        with full_precision(indices.device):
            tables = _stages.tables_of(self._quantizers, self.num_quantizers)[: indices.shape[-1]]
            codes = _residual.partial_sums(_residual.step_codes(indices, tables))[-1].to(book.dtype)
        return codes if self.channel_dim == -1 else codes.movedim(-1, 1)

    def freeze(self, frozen: bool = True) -> ResidualVectorQuantizer:
        """Stop (or resume) every change of state; as :meth:`te_quant.VectorQuantizer.freeze`."""
        for stage in self._quantizers:
            stage.freeze(frozen)
        self.frozen = frozen
        return self

    @torch.no_grad()
    def kmeans_init(
        self, latents: Tensor, *, iterations: int = 10, generator: torch.Generator | None = None
    ) -> None:
        """Set each codebook to the k-means centres of what the ones before it leave over.

        A shared one is set to those of the latents. As :meth:`te_quant.VectorQuantizer.kmeans_init`.
        """
        rows = self._layout.counted(latents, self._quantizers[0].codebook)
        _stages.start_stages(self._quantizers, rows, iterations, generator)

    @torch.no_grad()
    def revive_dead_codes(
        self, latents: Tensor, *, threshold: float = 0.01, generator: torch.Generator | None = None
    ) -> Tensor:
        """Move the codes hardly used onto what is left of random latents at their step.

        Returns (Q, K) bool, (1, K) if shared; else as :meth:`te_quant.VectorQuantizer.revive_dead_codes`.
        """
        rows = self._layout.counted(latents, self._quantizers[0].codebook)
        return _stages.revive_stages(self._quantizers, self.num_quantizers, rows, threshold, generator)

    def extra_repr(self) -> str:
        """What the stages do not tell."""
        return f"num_quantizers={self.num_quantizers}, shared_codebook={self.shared_codebook}"

    @property
    def _quantizers(self) -> list[VectorQuantizer]:
        return [cast("VectorQuantizer", stage) for stage in self.stages]
