"""Vector quantization with a learnt codebook.

Shape letters: B batch, C code size, h w token grid, K codes, N = B*h*w latent vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require, require_choice, require_generator, require_int, require_number, require_type
from te_quant._precision import full_precision, unit_rows, wide_buffers, widen
from te_quant._search import sample_codes, search_codes
from te_quant.functional import orthogonality, rotation_trick, straight_through
from te_quant.quantizers._codebook import kmeans, replacements
from te_quant.quantizers._distributed import GroupReference
from te_quant.quantizers._losses import distance_losses
from te_quant.quantizers._rows import Layout, Rows
from te_quant.quantizers._state import CodebookState, observe, restart, revive
from te_quant.quantizers.base import QuantizerOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VectorQuantizer"]


class VectorQuantizer(nn.Module):
    """Replace each latent vector by its nearest code.

    Args:
        num_codes: K, at least 1.
        code_dim: C, at least 1.
        metric: ``"l2"`` (Eq. 3), or ``"cosine"``: latents and codes are scaled to unit length before everything
            else, so the returned codes have unit length too.
        codebook_update: ``"gradient"``: the codebook is a parameter that follows ``codebook_loss`` and the
            penalty through your optimizer, as in the paper. ``"ema"``: it follows moving averages of the latents
            inside ``forward``, needs no optimizer, and feels the penalty there with the same λ
            (:mod:`te_quant.quantizers._penalized_means` says how).
        commitment_weight: β of the commitment term ‖z - sg(e)‖², >= 0. The codebook term has weight 1.
        orthogonal_reg: λ of the orthogonality penalty; unitless, >= 0. 10 in the paper.
        orthogonal_active_only: the penalty looks only at the codes that this batch uses.
        orthogonal_max_codes: while training, the penalty looks at a random subset of at most this many codes.
        gradient_estimator: ``"straight_through"`` or ``"rotation_trick"``: how the gradient passes to the
            latents.
        temperature: 0 takes the nearest code. Above 0, while training, a code is drawn with probability
            proportional to exp(-‖z - e‖² / (2 · temperature)).
        decay: of the moving averages, in [0, 1). Of use under ``"ema"`` and for :meth:`revive_dead_codes`.
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
        nonfinite: what to do about NaN and infinite latents. ``"raise"`` a ``ValueError``; ``"skip"`` the
            vectors that have any: they take no part in losses and updates, get no gradient, and are quantized
            as if zero; ``"off"`` does not look. ``None`` is ``"raise"`` on the CPU and ``"off"`` on
            accelerators, where looking means waiting for the device. With several processes prefer
            ``"skip"``: where one process raises, the others wait for it in the next collective.
        process_group: the processes over which statistics are summed and random rows are drawn. ``None`` is
            torch.distributed's default group, looked up at each call, and this process alone when there is none.
        generator: randomness of the initial codebook; the global one if ``None``.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, floating point, of the codebook's dtype; under
            autocast also half precision, which is computed in float32.
        quantized, codes: as latents. indices: the latents' shape without the channel axis, int64 in [0, K).
        losses: ().

    Attributes:
        codebook: (K, C) parameter. Under ``"ema"`` it takes no gradient.
        usage: (K,) moving average of how often each code is used, starting at 1.
        code_sums: (K, C) moving average of the sum of each code's latents (``"ema"`` only).

    Raises:
        ValueError: an option is out of range, axis ``channel_dim`` of latents is not C, the rank or device does
            not fit, or latents are not finite.
        TypeError: latents are not floating point, or of another dtype than the codebook.

    Source: Shin et al. 2021, arXiv:2112.00384, Eq. 3 and 5; van den Oord et al. 2017, arXiv:1711.00937, Eq. 3
        and appendix A.1. Differs: β is on the commitment term, as in the paper of 2017 and unlike some code;
        under ``"ema"`` the returned codes are those after the update, so that ``decode(indices)`` gives them
        back bit for bit; the penalty lasts under ``"ema"``.
    """

    usage: Tensor
    code_sums: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        metric: Literal["l2", "cosine"] = "l2",
        codebook_update: Literal["gradient", "ema"] = "gradient",
        commitment_weight: float = 0.25,
        orthogonal_reg: float = 0.0,
        orthogonal_active_only: bool = False,
        orthogonal_max_codes: int | None = None,
        gradient_estimator: Literal["straight_through", "rotation_trick"] = "straight_through",
        temperature: float = 0.0,
        decay: float = 0.99,
        channel_dim: int = 1,
        nonfinite: Literal["raise", "skip", "off"] | None = None,
        process_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_int("num_codes", num_codes, 1)
        require_int("code_dim", code_dim, 1)
        require_choice("metric", metric, ("l2", "cosine"))
        require_choice("codebook_update", codebook_update, ("gradient", "ema"))
        require_number("commitment_weight", commitment_weight, 0.0)
        require_number("orthogonal_reg", orthogonal_reg, 0.0)
        require_type("orthogonal_active_only", orthogonal_active_only, bool, "a bool")
        if orthogonal_max_codes is not None:
            require_int("orthogonal_max_codes", orthogonal_max_codes, 1)
        subset = {"orthogonal_active_only": orthogonal_active_only, "orthogonal_max_codes": orthogonal_max_codes}
        for name, value in subset.items():
            require(not value or orthogonal_reg > 0, name, "unset while orthogonal_reg is 0", repr(value))
        require_choice("gradient_estimator", gradient_estimator, ("straight_through", "rotation_trick"))
        require_number("temperature", temperature, 0.0)
        require_number("decay", decay, 0.0, below=1.0)
        require_generator(generator)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.metric = metric
        self.codebook_update = codebook_update
        self.commitment_weight = float(commitment_weight)
        self.orthogonal_reg = float(orthogonal_reg)
        self.orthogonal_active_only = orthogonal_active_only
        self.orthogonal_max_codes = orthogonal_max_codes
        self.gradient_estimator = gradient_estimator
        self.temperature = float(temperature)
        self.decay = float(decay)
        self.channel_dim = channel_dim
        self.nonfinite = nonfinite
        self.frozen = False
        self._layout = Layout(code_dim, channel_dim, nonfinite)
        self._group = GroupReference(process_group)
        # The range of taming-transformers and of the paper's code.
        initial = torch.empty(num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes, generator=generator)
        self.codebook = nn.Parameter(initial, requires_grad=codebook_update == "gradient")
        # One pseudo-count a code, so that sums = codebook · smoothed(usage) holds from the first step on.
        self.register_buffer("usage", torch.ones(num_codes))
        if codebook_update == "ema":
            self.register_buffer("code_sums", initial.clone())

    def forward(self, latents: Tensor, *, generator: torch.Generator | None = None) -> QuantizerOutput:
        """Quantize ``latents``; while training also update the statistics and, under ``"ema"``, the codebook.

        Args:
            latents: see the class.
            generator: randomness for ``temperature`` and ``orthogonal_max_codes``.
        """
        self._layout.check(latents, self.codebook)
        require_generator(generator)
        with full_precision(latents.device):
            rows = self._rows(latents)
            table = self._table()
            if self.training and self.temperature > 0:
                chosen = sample_codes(rows.searchable, table, self.temperature, generator)
            else:
                chosen = search_codes(rows.searchable, table)
            updating = self.training and not self.frozen
            penalized, moved = observe(
                self._state(),
                rows,
                chosen,
                updating=updating,
                active_only=self.orthogonal_active_only,
                max_codes=self.orthogonal_max_codes,
                decay=self.decay,
                orthogonal_reg=self.orthogonal_reg,
                unit=self.metric == "cosine",
                generator=generator,
                group=self._group.resolve() if updating else None,
            )
            # Under "ema" the codebook has just moved, and decode(indices) will read it where it is now.
            table = table if moved is None else self._project(widen(moved))
            codes = F.embedding(chosen, table)
            codebook_loss, commitment_loss = distance_losses(
                rows, codes, self.commitment_weight, codebook_follows=self.codebook_update == "gradient"
            )
            penalty = torch.zeros_like(commitment_loss)
            if self.orthogonal_reg:
                penalty = self.orthogonal_reg * orthogonality(penalized.rows(table), penalized.mask)
            estimate = rotation_trick if self.gradient_estimator == "rotation_trick" else straight_through
            quantized, dtype = estimate(rows.vectors, codes), self.codebook.dtype
            terms = (codebook_loss, commitment_loss, penalty)
            return self._layout.output(latents, dtype, quantized, chosen, codes, *terms)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """The nearest code of each latent vector: indices only, no losses, no update, no sampling."""
        self._layout.check(latents, self.codebook)
        with full_precision(latents.device):
            chosen = search_codes(self._rows(latents).searchable, self._table())
        return self._layout.indices_from_rows(chosen, latents.shape)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of ``indices``, with C at ``channel_dim``; differentiable in the codebook.

        Args:
            indices: (B, h, w), (B, N) or (N,), integer, in [0, K).

        Raises:
            ValueError: an index is negative or >= K, or the rank or device does not fit.
            TypeError: the indices are not integers.
        """
        indices = self._layout.check_indices(indices, self.codebook.device, self.num_codes)
        with full_precision(indices.device):
            codes = F.embedding(indices, self._table()).to(self.codebook.dtype)
        return codes if self.channel_dim == -1 else codes.movedim(-1, 1)

    def freeze(self, frozen: bool = True) -> VectorQuantizer:
        """Stop (or resume) every change of state: gradients, moving averages, k-means and revival.

        The flag belongs to this object: copies and pickles carry it, ``state_dict`` does not.
        """
        require_type("frozen", frozen, bool, "a bool")
        self.frozen = frozen
        self.codebook.requires_grad_(not frozen and self.codebook_update == "gradient")
        if frozen:
            # An optimizer would still step on a gradient left behind.
            self.codebook.grad = None
        return self

    @torch.no_grad()
    def kmeans_init(
        self, latents: Tensor, *, iterations: int = 10, generator: torch.Generator | None = None
    ) -> None:
        """Set the codebook to the k-means centres of ``latents`` and restart the statistics.

        Starts from K latent vectors drawn from all processes; where there are fewer, the other codes keep their
        values. Under ``"cosine"`` this is spherical k-means. All processes must call it together.

        Args:
            latents: as for ``forward``.
            iterations: Lloyd steps, >= 0.
            generator: randomness of the draw.

        Raises:
            RuntimeError: the quantizer is frozen.
        """
        require_int("iterations", iterations, 0)
        require_generator(generator)
        rows = self._counted_rows(latents, "kmeans_init")
        group = self._group.resolve()
        with full_precision(latents.device):
            centers = kmeans(rows, self._table(), iterations, self._project, generator, group)
        if centers is not None:
            restart(self._state(), centers)

    @torch.no_grad()
    def revive_dead_codes(
        self, latents: Tensor, *, threshold: float = 0.01, generator: torch.Generator | None = None
    ) -> Tensor:
        """Move the codes that are hardly used onto random latents, and give them the usage of an average code.

        All processes must call it together. What an optimizer remembers of these codes is not touched.

        Args:
            latents: as for ``forward``; where there are fewer vectors than dead codes, the rest stay dead.
            threshold: a code is dead below this fraction of the average usage, in [0, 1].
            generator: randomness of the draw.

        Returns:
            (K,) bool, the codes revived; the same on every process.

        Raises:
            RuntimeError: the quantizer is frozen.
        """
        require_number("threshold", threshold, 0.0, 1.0)
        require_generator(generator)
        rows = self._counted_rows(latents, "revive_dead_codes")
        revived, fresh = replacements(rows, self.usage, threshold, generator, self._group.resolve())
        revive(self._state(), revived, fresh)
        return revived

    def extra_repr(self) -> str:
        """The options that tell one quantizer from the next."""
        return (
            f"num_codes={self.num_codes}, code_dim={self.code_dim}, metric={self.metric!r}, "
            f"codebook_update={self.codebook_update!r}, orthogonal_reg={self.orthogonal_reg:g}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorQuantizer:
        """Keep the statistics in float32 at least."""
        with wide_buffers(self, ("usage", "code_sums")):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _state(self) -> CodebookState:
        sums = self.code_sums if self.codebook_update == "ema" else None
        return CodebookState(self.codebook, self.usage, sums)

    def _project(self, vectors: Tensor) -> Tensor:
        return unit_rows(vectors) if self.metric == "cosine" else vectors

    def _table(self) -> Tensor:
        return self._project(widen(self.codebook))

    def _rows(self, latents: Tensor) -> Rows:
        rows = self._layout.to_rows(latents)
        return Rows(self._project(rows.vectors), self._project(rows.searchable), rows.weights)

    def _refuse_frozen(self, method: str) -> None:
        if self.frozen:
            raise RuntimeError(f"{method} must be called on a quantizer that is not frozen, got a frozen one.")

    def _counted_rows(self, latents: Tensor, method: str) -> Tensor:
        self._refuse_frozen(method)
        self._layout.check(latents, self.codebook)
        with full_precision(latents.device):
            rows = self._rows(latents)
        return rows.counted
