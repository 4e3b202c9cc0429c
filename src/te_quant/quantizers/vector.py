"""Vector quantization with a learnt codebook.

Shape letters: B batch, C code size, h w token grid, K codes, N = B*h*w latent vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from te_quant._checks import (
    require,
    require_axis,
    require_choice,
    require_floating,
    require_generator,
    require_int,
    require_number,
    require_rank,
    require_type,
)
from te_quant._execution import gathered, refuse_redraw, reshard_owners
from te_quant._precision import full_precision, unit_rows, widen
from te_quant._search import sample_codes, search_codes
from te_quant._values import require_finite
from te_quant.functional import orthogonality
from te_quant.quantizers._lifecycle import kmeans, replacements
from te_quant.quantizers._losses import SURROGATES, GradientEstimator, distance_losses
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._update import (
    MAX_REPLACEMENTS,
    NEVER_USED,
    Batch,
    CodebookState,
    Penalized,
    choose_penalized,
    complete,
    count,
    move,
    record,
    restart,
    revive,
)
from te_quant.quantizers.base import Losses, NonfiniteMode, Quantized, Quantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CodebookUpdate", "Metric", "VectorQuantizer"]

Metric: TypeAlias = Literal["l2", "cosine", "cosine_raw", "dot"]
CodebookUpdate: TypeAlias = Literal["gradient", "ema"]
_REVIVAL_THRESHOLD = 0.01

# Options that only the whole reads where it has built this quantizer as a level, and what to do instead.
_ON_THE_WHOLE = "set it on the ResidualVectorQuantizer"
_AS_STAGES = "pass stages to ResidualVectorQuantizer to give them options of their own"
_WITHOUT_EFFECT = {
    "commitment_weight": _ON_THE_WHOLE,
    "orthogonal_reg": _ON_THE_WHOLE,
    "gradient_estimator": _ON_THE_WHOLE,
    "codebook_weight": _AS_STAGES,
    "orthogonal_active_only": _AS_STAGES,
    "temperature": _AS_STAGES,
}


def _check_options(
    *,
    metric: object,
    codebook_update: object,
    commitment_weight: object,
    codebook_weight: object,
    orthogonal_reg: object,
    orthogonal_active_only: object,
    orthogonal_max_codes: object,
    gradient_estimator: object,
    temperature: object,
    decay: object,
    revival_threshold: object,
) -> dict[str, Any]:
    """Refuse options that are out of range or contradict each other; return them as they are stored."""
    require_choice("metric", metric, get_args(Metric))
    require_choice("codebook_update", codebook_update, get_args(CodebookUpdate))
    follows = metric != "dot" or codebook_update == "gradient"
    require(follows, "codebook_update", "'gradient' with metric='dot'", repr(codebook_update))
    commitment_weight = require_number("commitment_weight", commitment_weight, 0.0)
    codebook_weight = require_number("codebook_weight", codebook_weight, 0.0)
    has_term = codebook_update == "gradient" or codebook_weight == 1
    expected = "1 with codebook_update='ema', under which there is no codebook term"
    require(has_term, "codebook_weight", expected, repr(codebook_weight))
    orthogonal_reg = require_number("orthogonal_reg", orthogonal_reg, 0.0)
    require_type("orthogonal_active_only", orthogonal_active_only, bool, "a bool")
    if orthogonal_max_codes is not None:
        orthogonal_max_codes = require_int("orthogonal_max_codes", orthogonal_max_codes, 1)
    require_choice("gradient_estimator", gradient_estimator, SURROGATES)
    temperature = require_number("temperature", temperature, 0.0)
    decay = require_number("decay", decay, 0.0, below=1.0)
    revival_threshold = require_number("revival_threshold", revival_threshold, 0.0, below=1.0)
    unused = codebook_update == "ema" or revival_threshold in (0.0, _REVIVAL_THRESHOLD)
    expected = f"0 or its default {_REVIVAL_THRESHOLD:g} with codebook_update='gradient'"
    got = f"{revival_threshold!r}; call revive_dead_codes between two steps"
    require(unused, "revival_threshold", expected, got)
    return {
        "metric": metric,
        "codebook_update": codebook_update,
        "commitment_weight": float(commitment_weight),
        "codebook_weight": float(codebook_weight),
        "orthogonal_reg": float(orthogonal_reg),
        "orthogonal_active_only": orthogonal_active_only,
        "orthogonal_max_codes": orthogonal_max_codes,
        "gradient_estimator": gradient_estimator,
        "temperature": float(temperature),
        "decay": float(decay),
        "revival_threshold": float(revival_threshold),
    }


class VectorQuantizer(Quantizer):
    """Replace each latent vector by its nearest code.

    Args:
        num_codes: K, at least 1.
        code_dim: C, at least 1.
        metric: how codes are compared. ``"l2"``: the nearest one (Eq. 3). ``"cosine"``: latents and codes are
            scaled to unit length before everything else, so the returned codes have unit length too.
            ``"cosine_raw"``: the code at the smallest angle, but codes, losses and averages are those of the
            vectors as they are. ``"dot"``: the code of the largest product z·e, also with vectors as they are.
            Means of latents do not maximize products, so ``"dot"`` needs ``codebook_update="gradient"``.
        codebook_update: ``"ema"``: the codebook is a buffer that starts at latents of the first training pass and
            follows moving averages of the latents between two passes. It needs no optimizer, and feels the
            penalty with the same λ (:mod:`te_quant.quantizers._penalized_means` says how). ``"gradient"``: it is a
            parameter that starts at random and follows ``codebook_loss`` and the penalty through your optimizer,
            as in Shin et al. 2021; start it with :meth:`kmeans_init`.
        commitment_weight: β of the commitment term ‖z - sg(e)‖², >= 0; .25 in Shin et al. 2021.
        codebook_weight: of the codebook term ‖sg(z) - e‖², >= 0; 1 in Shin et al. 2021, and under ``"ema"``, where
            there is no such term. Code that has β on the wrong term (taming-transformers, and diffusers with
            ``legacy=True``) trains with ``commitment_weight=1.0, codebook_weight=β``.
        orthogonal_reg: λ of the orthogonality penalty; unitless, >= 0. 10 in Shin et al. 2021.
        orthogonal_active_only: the penalty looks only at the codes that this batch uses. Without effect while
            ``orthogonal_reg`` is 0, so a schedule may start or end there.
        orthogonal_max_codes: while training, the penalty looks at a random subset of at most this many codes.
            Without effect while ``orthogonal_reg`` is 0.
        gradient_estimator: ``"straight_through"`` or ``"rotation_trick"``: how the gradient passes to the
            latents.
        temperature: 0 takes the code that ``metric`` says. Above 0, while training, a code is drawn with
            probability proportional to exp(-‖z - e‖² / (2 · temperature)), z and e of unit length under both
            cosines; under ``"dot"`` to exp(z·e / temperature).
        decay: of the moving averages, in [0, 1). Used only under ``"ema"`` and for :meth:`revive_dead_codes`.
        revival_threshold: of use under ``"ema"``, in [0, 1). A code is dead while it is used less than this
            fraction of the average code. Between two steps up to 4,096 dead codes move onto latents of the last
            training pass. At first no code has been used, so this is how the codebook starts. 0 leaves dead codes
            where they are. A codebook that follows gradients has :meth:`kmeans_init` and
            :meth:`revive_dead_codes` for that; there only 0 and the default, which change nothing, are accepted.
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
        nonfinite: what to do about NaN and infinite latents. ``"raise"`` raises a ``ValueError``. ``"skip"`` skips
            the vectors that have any: they take no part in losses and updates, get no gradient, and are quantized
            as if zero. ``"off"`` does not look for them. ``None`` is ``"raise"`` on the CPU and ``"off"`` on
            accelerators, where looking means waiting for the device. With several processes prefer
            ``"skip"``: where one process raises, the others wait for it in the next collective.
        process_group: the processes over which statistics are summed and random rows are drawn. ``None`` is
            torch.distributed's default group, looked up at each call, and only this process when there is none.
        generator: randomness of the initial codebook; the global one if ``None``.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, of the codebook's dtype or in half precision,
            which is computed in float32.
        quantized: as latents, in their memory format, contiguous or channels-last. codes: the same in the
            codebook's dtype. indices: the latents' shape without the channel axis, int64 in [0, K), or -1 where
            masked. losses: ().

    Attributes:
        codebook: (K, C), a parameter; under ``"ema"`` a buffer. Set it with :meth:`set_codebook`.
        usage: (K,) moving average of how often each code is used; starts at 1, or near 0 with revival.
        code_sums: (K, C) moving average of the sum of each code's latents (``"ema"`` only).
        pending_counts, pending_sums: (K,) and (K, C), what training passes have recorded since these three moved.
            The next training pass moves them before it searches; so do ``eval()`` and :meth:`apply_pending`.
        pending_rows: (R, C + 1) latents of the last training pass that dead codes may move onto, with a 1 behind
            each; zero where it had fewer. Only where codes are revived, as ``revivals``.
        revivals: () int64, how many codes have moved that way, those of the start included.

    Raises:
        ValueError: an option is out of range, axis ``channel_dim`` of latents is not C, the rank or device does
            not fit, or latents are not finite.
        TypeError: latents are not floating point, or of another dtype than the codebook and not in half precision.

    Source: Shin et al. 2021, arXiv:2112.00384, Eq. 3 and 5; van den Oord et al. 2017, arXiv:1711.00937, Eq. 3
        and appendix A.1; Shi et al. 2024, arXiv:2412.02692 (IBQ), for ``"dot"``. Differs: β is on the commitment
        term, as in the paper of 2017 and unlike some code (``codebook_weight``); the penalty lasts under
        ``"ema"``.

    Example:
        >>> from te_quant import VectorQuantizer
        >>> quantizer = VectorQuantizer(num_codes=256, code_dim=64)
        >>> output = quantizer(torch.randn(8, 64, 16, 16, requires_grad=True))
        >>> output.quantized.shape, output.indices.shape
        (torch.Size([8, 64, 16, 16]), torch.Size([8, 16, 16]))
        >>> output.loss.backward()  # add your reconstruction loss; the next training pass moves the codes
        >>> torch.equal(quantizer.decode(output.indices), output.codes)
        True
    """

    statistics = ("usage", "code_sums", "pending_counts", "pending_sums", "pending_subset", "pending_rows")
    _checks = (*Quantizer._checks, _check_options)
    _fixed = (*Quantizer._fixed, "metric", "codebook_update", "orthogonal_max_codes")

    metric: Metric
    codebook_update: CodebookUpdate
    commitment_weight: float
    codebook_weight: float
    orthogonal_reg: float
    orthogonal_active_only: bool
    orthogonal_max_codes: int | None
    gradient_estimator: GradientEstimator
    temperature: float
    decay: float
    revival_threshold: float
    codebook: Tensor
    usage: Tensor
    code_sums: Tensor
    pending_counts: Tensor
    pending_sums: Tensor
    pending_subset: Tensor
    pending_rows: Tensor
    revivals: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        metric: Metric = "l2",
        codebook_update: CodebookUpdate = "ema",
        commitment_weight: float = 1.0,
        codebook_weight: float = 1.0,
        orthogonal_reg: float = 0.0,
        orthogonal_active_only: bool = False,
        orthogonal_max_codes: int | None = None,
        gradient_estimator: GradientEstimator = "straight_through",
        temperature: float = 0.0,
        decay: float = 0.9,
        revival_threshold: float = _REVIVAL_THRESHOLD,
        channel_dim: int = 1,
        nonfinite: NonfiniteMode | None = None,
        process_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            num_codes, code_dim, channel_dim=channel_dim, nonfinite=nonfinite, process_group=process_group
        )
        require_generator(generator)
        self._set_options(
            _check_options,
            metric=metric,
            codebook_update=codebook_update,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            orthogonal_reg=orthogonal_reg,
            orthogonal_active_only=orthogonal_active_only,
            orthogonal_max_codes=orthogonal_max_codes,
            gradient_estimator=gradient_estimator,
            temperature=temperature,
            decay=decay,
            revival_threshold=revival_threshold,
        )
        # Codes of unit length cannot learn how long the residuals of a level are.
        self.residual_scale = 0.5 if metric == "cosine" else 1.0
        # The range of taming-transformers and of the paper's code.
        initial = torch.empty(num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes, generator=generator)
        ema = codebook_update == "ema"
        revives = ema and revival_threshold > 0
        if ema:
            self.register_buffer("codebook", initial)
        else:
            self.codebook = nn.Parameter(initial)
        # In float32 at least, whatever torch's default is: half precision cannot count to 3,000.
        # One pseudo-count per code, so that sums = codebook · smoothed(usage) holds from the first step on. Under
        # "cosine" too: nothing of a random start is worth the weight of a unit vector.
        self.register_buffer("usage", widen(torch.full((num_codes,), NEVER_USED if revives else 1.0)))
        self.register_buffer("pending_counts", torch.zeros_like(self.usage))
        if ema:
            self.register_buffer("code_sums", widen(initial.clone()) * self.usage[:1])
            self.register_buffer("pending_sums", torch.zeros_like(self.code_sums))
            if self._subset is not None:
                # Random, so it is drawn while recording, and moving draws nothing.
                self.register_buffer("pending_subset", torch.arange(self._subset))
            if revives:
                rows = torch.zeros(min(num_codes, MAX_REPLACEMENTS), code_dim + 1)
                self.register_buffer("pending_rows", widen(rows))
                self.register_buffer("revivals", torch.zeros((), dtype=torch.int64))

    @property
    def reference(self) -> Tensor:
        """The codebook."""
        return self.codebook

    def search(self, rows: Rows) -> Tensor:
        """Return the code of each row that ``metric`` says."""
        return self._nearest(rows.searchable, self._table())

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the rows of the codebook, scaled to unit length under ``"cosine"``."""
        return F.embedding(indices, self._table())

    def project(self, vectors: Tensor) -> Tensor:
        """Scale to unit length under ``"cosine"``."""
        return unit_rows(vectors) if self.metric == "cosine" else vectors

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:
        """Return the weighted terms; the penalty looks at the codes that it looks at in evaluation."""
        losses = self._distances(rows, codes)
        if not self.orthogonal_reg:
            return losses
        table = self._table()
        counts = count(indices, rows, self.num_codes, None) if self.orthogonal_active_only else None
        penalized = choose_penalized(counts, table, None, None, None)
        penalty = self.orthogonal_reg * orthogonality(penalized.rows(table), penalized.mask)
        return losses._replace(regularization=penalty)

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Quantize; changes no state.

        Args:
            rows: the projected latents.
            generator: randomness for ``temperature`` and ``orthogonal_max_codes``.
        """
        table = self._table()
        if self.training and self.temperature > 0:
            latents, codes = self._compared(rows.searchable, table)
            drawn = sample_codes(latents, codes, self.temperature, generator, dot=self.metric == "dot")
            indices = refuse_redraw(drawn, generator)
        else:
            indices = self._nearest(rows.searchable, table)
        codes = F.embedding(indices, table)
        losses = self._distances(rows, codes)
        penalized = Penalized()
        if self.orthogonal_reg:
            penalized = self._penalized(rows, indices, table, generator)
            penalty = self.orthogonal_reg * orthogonality(penalized.rows(table), penalized.mask)
            losses = losses._replace(regularization=penalty)
        surrogate = SURROGATES[self.gradient_estimator](rows.vectors, codes)
        return Quantized(
            surrogate=surrogate, indices=indices, codes=codes, losses=losses, table=table, memo=penalized
        )

    def record(self, rows: Rows, result: Quantized) -> None:
        """Add the counts and, under ``"ema"``, the sums of the latents to what is pending."""
        record([Batch(self._state(), rows, result.indices, result.memo)], self._group.resolve())

    @torch.no_grad()
    def apply_pending(self) -> None:
        """Move the statistics and, under ``"ema"``, the codebook by what is pending; see the base class."""
        if not self.frozen:
            if self.codebook_update == "ema":
                self._require_plain_codebook("apply_pending")
            move(
                self._state(),
                decay=self.decay,
                orthogonal_reg=self.orthogonal_reg,
                active_only=self.orthogonal_active_only,
                unit=self.metric == "cosine",
                revival_threshold=self.revival_threshold,
            )

    @torch.no_grad()
    def set_codebook(self, codes: Tensor, usage: Tensor | None = None) -> None:
        """Put the codebook at ``codes`` and restart the statistics, so that training goes on from there.

        Under ``"gradient"`` you may also write into ``codebook``; under ``"ema"`` the next step would undo that.
        What is pending is forgotten. All processes must set the same codes.

        Args:
            codes: (K, C), floating point, finite, on any device.
            usage: (K,), how often each code has been used, on the scale of one batch; >= 0 and not all zero. None
                counts each once.

        Raises:
            ValueError: a shape does not fit, a number is not finite, or usage is negative or zero everywhere.
            TypeError: codes or usage are not floating point.
            RuntimeError: the quantizer is frozen, or its codebook parametrized.

        Example:
            >>> from te_quant import VectorQuantizer
            >>> quantizer = VectorQuantizer(16, 4, codebook_update="ema")
            >>> quantizer.set_codebook(torch.eye(16)[:, :4])
        """
        self._require_writable("set_codebook")
        _check_codes(codes, usage, self.num_codes, self.code_dim)
        reshard_owners(self)
        restart(self._state(), codes, usage, unit=self.metric == "cosine")

    @torch.no_grad()
    def kmeans_init(
        self,
        latents: Tensor,
        *,
        mask: Tensor | None = None,
        iterations: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set the codebook to the k-means centres of ``latents``, restart the statistics, forget what is pending.

        Starts from K latent vectors drawn from all processes; where there are fewer, the other codes keep their
        values. Without any, for example under a mask that is False everywhere, nothing changes at all. Under
        ``"cosine"`` this is spherical k-means; under ``"cosine_raw"`` latents choose by angle and the centres are
        their means; under ``"dot"`` it is that of ``"l2"``. All processes must call it together, between any two
        steps.

        Args:
            latents: as for ``forward``.
            mask: as for ``forward``; the other latents are no part of it.
            iterations: Lloyd steps, >= 0.
            generator: randomness of the draw.

        Raises:
            RuntimeError: the quantizer is frozen, or its codebook parametrized.
        """
        iterations = require_int("iterations", iterations, 0)
        require_generator(generator)
        rows = self._counted_rows(latents, mask, "kmeans_init")
        group = self._group.resolve()
        with full_precision(latents.device):
            centers = self._kmeans(rows, iterations, generator, group)
        if centers is not None:
            restart(self._state(), centers)

    @torch.no_grad()
    def revive_dead_codes(
        self,
        latents: Tensor,
        *,
        mask: Tensor | None = None,
        threshold: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Move the codes that are hardly used onto random latents, and give them the usage of an average code.

        All processes must call it together, after the backward pass: what is pending is applied first. What an
        optimizer remembers of these codes is not touched.

        Args:
            latents: as for ``forward``; where there are fewer vectors than dead codes, the rest stay dead.
            mask: as for ``forward``; no code moves onto a latent where it is False.
            threshold: a code is dead below this fraction of the average usage, in [0, 1].
            generator: randomness of the draw.

        Returns:
            (K,) bool, the codes revived; the same on every process.

        Raises:
            RuntimeError: the quantizer is frozen, or its codebook parametrized.
        """
        threshold = require_number("threshold", threshold, 0.0, 1.0)
        require_generator(generator)
        rows = self._counted_rows(latents, mask, "revive_dead_codes")
        self.apply_pending()
        revived, fresh = replacements(rows, self.usage, threshold, generator, self._group.resolve())
        revive(self._state(), revived, fresh)
        return revived

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "codebook" and isinstance(value, nn.Parameter) and name in self.__dict__.get("_buffers", ()):
            raise TypeError("codebook must be set by set_codebook under codebook_update='ema', got a Parameter.")
        if self.__dict__.get("_is_built_level") and name in _WITHOUT_EFFECT and value != self.__dict__[name]:
            expected = f"{self.__dict__[name]!r} in a level that a ResidualVectorQuantizer has built"
            require(False, name, expected, f"{value!r}; {_WITHOUT_EFFECT[name]}")
        super().__setattr__(name, value)

    def _checked(self, name: str, value: Any) -> Any:
        value = super()._checked(name, value)
        if name == "revival_threshold" and self.codebook_update == "ema":
            expected = "0, as the quantizer was built, which keeps no latents to replace codes by"
            cure = "build another quantizer with it and load this one's state_dict"
            require(value == 0 or "pending_rows" in self._buffers, name, expected, f"{value!r}; {cure}")
        return value

    def _learnt(self) -> Iterator[nn.Parameter]:
        # A moving-average codebook never takes gradients.
        return self.parameters() if self.codebook_update == "gradient" else iter(())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Derive the statistics that a state lacks; drop those of the other ``codebook_update``."""
        complete(state_dict, prefix, self._state(), self.codebook, unit=self.metric == "cosine")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def _subset(self) -> int | None:
        """How many codes are drawn for the penalty; None for no draw."""
        limit = self.orthogonal_max_codes
        return None if limit is None or limit >= self.num_codes else limit

    def _distances(self, rows: Rows, codes: Tensor) -> Losses:
        return distance_losses(
            rows,
            codes,
            self.commitment_weight,
            codebook_follows=self.codebook_update == "gradient",
            codebook_weight=self.codebook_weight,
        )

    def _penalized(
        self, rows: Rows, indices: Tensor, table: Tensor, generator: torch.Generator | None
    ) -> Penalized:
        changing = self._changes()
        group = self._group.resolve() if changing else None
        counts = count(indices, rows, self.num_codes, group) if self.orthogonal_active_only else None
        return choose_penalized(counts, table, self._subset if changing else None, generator, group)

    def _state(self) -> CodebookState:
        if self.codebook_update == "gradient":
            return CodebookState(self.codebook, self.usage, self.pending_counts)
        subset = None if self._subset is None else self.pending_subset
        return CodebookState(
            self.codebook,
            self.usage,
            self.pending_counts,
            self.code_sums,
            self.pending_sums,
            subset,
            # Kept where revival stopped later, as the state dict is that of the construction.
            self._buffers.get("pending_rows"),
            self._buffers.get("revivals"),
        )

    def _table(self) -> Tensor:
        codebook = gathered(self.codebook)
        # Whatever else toggles requires_grad.
        return self.project(widen(codebook.detach() if self.frozen else codebook))

    def _compared(self, vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) latents and (K, C) codes as the search wants them."""
        if self.metric == "cosine_raw":
            return unit_rows(vectors), unit_rows(table)
        return vectors, table

    def _nearest(self, vectors: Tensor, table: Tensor) -> Tensor:
        return search_codes(*self._compared(vectors, table), dot=self.metric == "dot")

    def _kmeans(
        self,
        rows: Tensor,
        iterations: int,
        generator: torch.Generator | None,
        group: ProcessGroup | None,
    ) -> Tensor | None:
        """The centres of (N, C) projected rows; see :func:`~te_quant.quantizers._lifecycle.kmeans`."""

        def search(vectors: Tensor, centers: Tensor) -> Tensor:
            # Not by products: long centres would take the latents of others, and the means never settle.
            return search_codes(*self._compared(vectors, centers))

        return kmeans(rows, self._table(), iterations, self.project, generator, group, search)

    def _require_writable(self, method: str) -> None:
        super()._require_writable(method)
        self._require_plain_codebook(method)

    def _require_plain_codebook(self, method: str) -> None:
        """Refuse a parametrized codebook: what a parametrization has computed is a copy."""
        if is_parametrized(self, "codebook"):
            raise RuntimeError(
                f"codebook must be a plain tensor for {method}, which writes to it, got a parametrized one; call "
                "it before you parametrize, or after torch.nn.utils.parametrize.remove_parametrizations."
            )

    def _counted_rows(self, latents: Tensor, mask: Tensor | None, method: str) -> Tensor:
        self._require_writable(method)
        reshard_owners(self)
        return self._counted(latents, mask)


def _check_codes(codes: Tensor, usage: Tensor | None, *shape: int) -> None:
    """Refuse what is no codebook of ``shape`` (K, C)."""
    require_rank("codes", codes, (len(shape),), f"{shape}")
    require_floating("codes", codes)
    for axis, (size, name) in enumerate(zip(shape, ("num_codes", "code_dim"), strict=True)):
        require_axis("codes", codes, axis, size, name)
    require_finite("codes", codes)
    if usage is None:
        return
    require_rank("usage", usage, (1,), f"({shape[0]},)")
    require_floating("usage", usage)
    require_axis("usage", usage, 0, shape[0], "num_codes")
    require_finite("usage", usage)
    lowest, total = float(usage.min()), float(usage.sum())
    require(lowest >= 0 and total > 0, "usage", "at least 0, and above 0 somewhere", f"a minimum of {lowest:g}")
