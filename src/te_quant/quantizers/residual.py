"""Residual vector quantization: every codebook quantizes what the ones before it left over.

Shape letters: B batch, C code size, h w token grid, K codes a codebook, Q codebooks, N = B*h*w latent vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from te_quant._checks import require_generator, require_int, require_number, require_type
from te_quant._precision import full_precision
from te_quant.quantizers import _residual_steps
from te_quant.quantizers._distributed import reshard_owners
from te_quant.quantizers._losses import SURROGATES, GradientEstimator, distance_losses
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._update import record
from te_quant.quantizers.base import NonfiniteMode, Quantized, Quantizer
from te_quant.quantizers.vector import CodebookUpdate, VectorQuantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ResidualVectorQuantizer"]


class ResidualVectorQuantizer(Quantizer):
    """Replace each latent vector by a sum of Q codes, each the nearest to what is left of it.

    Args:
        num_codes, code_dim, num_quantizers: K of each codebook, C and Q, each at least 1.
        shared_codebook: one codebook serves all Q steps; otherwise each has its own.
        quantizer_dropout: if True, each element of axis 0 uses its first n codebooks alone in training, n uniform
            in 1..Q. Afterwards the first few indices alone decode well: ``decode(indices[..., :n])``.
        codebook_update: ``"gradient"`` or ``"ema"``, as for :class:`~te_quant.VectorQuantizer`. Under ``"ema"``
            all codebooks move together between two steps.
        commitment_weight: β of the commitment term, >= 0. The codebook term has weight 1.
        orthogonal_reg: λ of the orthogonality penalty, the mean over the codebooks, >= 0.
        gradient_estimator: ``"straight_through"`` or ``"rotation_trick"``, from the latents to the sum of codes.
        decay, channel_dim, nonfinite, process_group: as for :class:`~te_quant.VectorQuantizer`.
        generator: randomness of the initial codebooks; the global one if ``None``.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, of the codebooks' dtype or in half precision,
            which is computed in float32.
        quantized: as latents, in their memory format, contiguous or channels-last. codes: the same in the
            codebooks' dtype. losses: (). indices: the latents' shape without the channel axis and with Q
            behind, int64 in [0, K); -1, only under ``quantizer_dropout``, is a codebook that was not used.

    Attributes:
        stages: Q quantizers, or one if shared, with their codebook and statistics.

    Raises ``ValueError`` and ``TypeError`` as :class:`~te_quant.VectorQuantizer`.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, Algorithm 1 and Section III-C (dropout); Lee et al. 2022,
        arXiv:2203.01941, Eq. 4 to 6 and shared codebooks. Differs: the distance terms are the mean over the
        codebooks used, where Lee et al. sum, so that β and learning rates mean the same for every Q.

    Example:
        >>> from te_quant import ResidualVectorQuantizer
        >>> quantizer = ResidualVectorQuantizer(num_codes=64, code_dim=8, num_quantizers=4)
        >>> output = quantizer(torch.randn(2, 8, 16, 16))
        >>> output.indices.shape
        torch.Size([2, 16, 16, 4])
        >>> coarse = quantizer.decode(output.indices[..., :2])  # the first two codebooks only
    """

    num_quantizers: int

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        num_quantizers: int,
        *,
        shared_codebook: bool = False,
        quantizer_dropout: bool = False,
        codebook_update: CodebookUpdate = "gradient",
        commitment_weight: float = 0.25,
        orthogonal_reg: float = 0.0,
        gradient_estimator: GradientEstimator = "straight_through",
        decay: float = 0.99,
        channel_dim: int = 1,
        nonfinite: NonfiniteMode | None = None,
        process_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            num_codes, code_dim, channel_dim=channel_dim, nonfinite=nonfinite, process_group=process_group
        )
        num_quantizers = require_int("num_quantizers", num_quantizers, 1)
        require_type("shared_codebook", shared_codebook, bool, "a bool")
        require_type("quantizer_dropout", quantizer_dropout, bool, "a bool")
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
        self.num_quantizers: int = num_quantizers
        self.shared_codebook = shared_codebook
        self.quantizer_dropout = quantizer_dropout
        self.codebook_update: CodebookUpdate = codebook_update
        self.commitment_weight = float(commitment_weight)
        self.orthogonal_reg = float(orthogonal_reg)
        self.gradient_estimator: GradientEstimator = gradient_estimator
        self.decay = float(decay)
        # A codebook that was left out has the index -1.
        self.lowest_index = -1 if quantizer_dropout else 0

    @property
    def reference(self) -> Tensor:
        """The first codebook."""
        return self._quantizers[0].codebook

    def search(self, rows: Rows) -> Tensor:
        """Return all Q indices of each row, Q last; no dropout."""
        return _residual_steps.search_residuals(rows.searchable, self._tables(), None)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the sums of codes of the first n codebooks: (..., n) -> (..., C); -1 adds nothing."""
        tables = self._tables()[: indices.shape[-1]]
        return _residual_steps.partial_sums(_residual_steps.step_codes(indices, tables))[-1]

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Quantize; changes no state.

        Args:
            rows: the latents.
            generator: randomness of ``quantizer_dropout``.
        """
        steps = _residual_steps
        dropped, tables = self._drops, self._tables()
        depths = steps.draw_depths(rows, self.num_quantizers, generator) if dropped else None
        chosen = steps.search_residuals(rows.searchable, tables, depths)
        codes = steps.step_codes(chosen, tables)
        *sums, total = steps.partial_sums(codes)
        left = steps.residuals(rows, sums, chosen, dropped=dropped)
        losses = distance_losses(
            steps.joined(left),
            torch.cat(codes),
            self.commitment_weight,
            codebook_follows=self.codebook_update == "gradient",
        )
        if self.orthogonal_reg:
            penalty = self.orthogonal_reg * steps.mean_penalty(self._quantizers)
            losses = losses._replace(regularization=penalty)
        surrogate = SURROGATES[self.gradient_estimator](rows.vectors, total)
        return Quantized(surrogate=surrogate, indices=chosen, codes=total, losses=losses, memo=left)

    def record(self, rows: Rows, result: Quantized) -> None:  # noqa: ARG002
        """Add the counts and sums of every codebook that is not frozen to what is pending."""
        batches = _residual_steps.batches(self._quantizers, result.memo, result.indices)
        record(batches, self._group.resolve())

    def apply_pending(self) -> None:
        """Move every codebook that is not frozen; see the base class."""
        for stage in self._quantizers:
            stage.apply_pending()

    @torch.no_grad()
    def kmeans_init(
        self, latents: Tensor, *, iterations: int = 10, generator: torch.Generator | None = None
    ) -> None:
        """Set each codebook to the k-means centres of what the ones before it leave over.

        A shared one is set to those of the latents. All of them start, or none. As
        :meth:`te_quant.VectorQuantizer.kmeans_init`.
        """
        iterations = require_int("iterations", iterations, 0)
        require_generator(generator)
        _residual_steps.refuse_frozen(self._quantizers, "kmeans_init")
        reshard_owners(self)
        rows, group = self._counted(latents), self._group.resolve()
        with full_precision(latents.device):
            _residual_steps.start_stages(self._quantizers, rows, iterations, generator, group)

    @torch.no_grad()
    def revive_dead_codes(
        self, latents: Tensor, *, threshold: float = 0.01, generator: torch.Generator | None = None
    ) -> Tensor:
        """Move the codes hardly used onto what is left of random latents at their step.

        Returns (Q, K) bool, (1, K) if shared; else as :meth:`te_quant.VectorQuantizer.revive_dead_codes`.
        """
        threshold = require_number("threshold", threshold, 0.0, 1.0)
        require_generator(generator)
        _residual_steps.refuse_frozen(self._quantizers, "revive_dead_codes")
        reshard_owners(self)
        rows, group = self._counted(latents), self._group.resolve()
        self.apply_pending()
        with full_precision(latents.device):
            return _residual_steps.revive_stages(
                self._quantizers, self.num_quantizers, rows, threshold, generator, group
            )

    def extra_repr(self) -> str:
        """What the stages do not tell."""
        return f"num_quantizers={self.num_quantizers}, shared_codebook={self.shared_codebook}"

    @property
    def _drops(self) -> bool:
        return self.training and self.quantizer_dropout

    def _learnt(self) -> Iterator[nn.Parameter]:
        for stage in self._quantizers:
            yield from stage._learnt()

    def _tables(self) -> list[Tensor]:
        """The codebook of every step: Q of (K, C), at least float32."""
        return _residual_steps.tables_of(self._quantizers, self.num_quantizers)

    @property
    def _quantizers(self) -> list[VectorQuantizer]:
        return [cast("VectorQuantizer", stage) for stage in self.stages]
