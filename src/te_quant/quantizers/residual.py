"""Residual quantization: every level quantizes what the levels before it left over.

Shape letters: B batch, C code size, h w token grid, K codes per codebook, Q indices per vector, L levels, N =
B*h*w latent vectors.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from te_quant._checks import plain, require, require_choice, require_int, require_number, require_type
from te_quant._precision import full_precision
from te_quant.functional import orthogonality
from te_quant.quantizers import _residual_steps
from te_quant.quantizers._combined import (
    CombinedQuantizer,
    Lifecycle,
    columns_of,
    is_distance,
    part_codes,
    part_terms,
    require_parts,
    width,
)
from te_quant.quantizers._losses import SURROGATES, GradientEstimator, distance_losses
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._update import Batch
from te_quant.quantizers.base import NO_CODE, Losses, NonfiniteMode, Quantized, Quantizer
from te_quant.quantizers.vector import CodebookUpdate, VectorQuantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ResidualVectorQuantizer"]

# Options of the codebooks that the constructor builds; given stages have their own.
_OF_ALL_CODEBOOKS = ("codebook_update", "commitment_weight", "orthogonal_reg", "decay", "revival_threshold")
_OF_CODEBOOKS = ("shared_codebook", *_OF_ALL_CODEBOOKS, "generator")
_SIZES = ("num_codes", "code_dim", "num_quantizers")


class ResidualVectorQuantizer(CombinedQuantizer):
    """Replace each latent vector by a sum of codes, each the nearest to what is left of it.

    There are two ways to build it. Three sizes make Q :class:`~te_quant.VectorQuantizer` with K codes each. A list
    of ``stages`` takes any quantizers, one for each level, and their sizes and classes may differ::

        ResidualVectorQuantizer(num_codes=1024, code_dim=64, num_quantizers=4)
        ResidualVectorQuantizer(stages=[FSQ((7, 5, 5, 5)), FSQ((5, 5, 5, 5))])

    Learnt codes of the second level learn how large the residuals are. Fixed codes cannot, so their later
    levels are scaled: by half of the distance between two levels after an :class:`~te_quant.FSQ`, because
    rounding leaves no more than that, and by 1/2 after an :class:`~te_quant.LFQ` or codes of unit length. Only
    the first FSQ bounds the latents by tanh, so its sum approximates tanh(z); the later ones clamp. Odd levels
    fit, because even ones are not symmetric about zero. Put fixed codes first: a learnt codebook leaves residuals
    of no known size, so fixed codes after it are not scaled and may be too far apart.

    Args:
        num_codes, code_dim, num_quantizers: K of each codebook, C and Q, each at least 1.
        stages: the quantizers of the levels, first to last, with equal ``code_dim``; instead of the three sizes.
        loss_weights: a factor >= 0 for the losses of each level; None is 1 for all.
        shared_codebook: one codebook serves all Q steps; otherwise each has its own. Not with ``stages``.
        quantizer_dropout: a share in [0, 1] of the elements of axis 0, drawn at random. In training each of them
            uses only its first n levels, n uniform in 1..L. ``True`` is all of them, ``False`` none. Afterwards
            the first few indices decode well without the others: ``decode(indices[..., :n])``.
        codebook_update: ``"ema"`` or ``"gradient"``, as for :class:`~te_quant.VectorQuantizer`. Under ``"ema"``
            all codebooks start at latents and move together between two steps. Not with ``stages``.
        commitment_weight: β of the commitment term, >= 0. The codebook term has weight 1. Not with ``stages``.
        orthogonal_reg: λ of the orthogonality penalty, the mean over the codebooks, >= 0. Not with ``stages``.
        gradient_estimator: ``"straight_through"`` or ``"rotation_trick"``, from the latents to the sum of codes;
            must equal that of every stage.
        decay: of the moving averages, in [0, 1). Not with ``stages``.
        revival_threshold: under ``"ema"``, as for :class:`~te_quant.VectorQuantizer`. Not with ``stages``.
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
            Must equal that of every stage.
        nonfinite: what to do about NaN and infinite latents, as for :class:`~te_quant.VectorQuantizer`.
        process_group: the processes over which statistics are summed. ``None`` is torch.distributed's default
            group, looked up at each call, and only this process when there is none. Must equal that of every
            stage.
        generator: randomness of the initial codebooks; the global one if ``None``. Not with ``stages``.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, of the codebooks' dtype or in half precision,
            which is computed in float32.
        quantized: as latents, in their memory format, contiguous or channels-last. codes: the same in the
            codebooks' dtype. losses: (). indices: the latents' shape without the channel axis and with Q
            behind, int64 in [0, K). -1 is a level that ``quantizer_dropout`` left out; a masked token has only -1.
            A stage with several indices has them next to each other.

    Attributes:
        stages: one quantizer for each level, or one for all if shared. Each is set by itself, for example
            ``quantizer.stages[0].set_codebook(codes)``. Where stages were built from sizes, weights and
            estimators are set on the whole, for example ``quantizer.commitment_weight = 0.25``.
            A stage in evaluation mode, frozen or inside its own ``accumulate()`` stands still while others move.
        num_quantizers: Q, the number of indices of a token: L, or more where a stage has several.
        num_codes: K; the largest one where stages differ.
        codebook_sizes: K of each of the Q indices.

    Raises:
        ValueError: an option is out of range or contradicts a stage, axis ``channel_dim`` of latents is not C, the
            rank or device does not fit, or latents are not finite.
        TypeError: stages are no sequence of quantizers; latents are not floating point, or of another dtype.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, Algorithm 1 and Section III-C (dropout); Kumar et al. 2023,
        arXiv:2306.06546 (dropout for a share of the batch); Lee et al. 2022, arXiv:2203.01941, Eq. 4
        to 6 and shared codebooks. Differs: the losses are the mean over the levels used, where Lee et al. sum, so
        that β and learning rates mean the same for every Q. Residual FSQ without a scale wastes its later levels
        (Zhu et al. 2025, arXiv:2508.15860); the scale here is the power of 1/(levels - 1) that public code uses.

    Example:
        >>> from te_quant import ResidualVectorQuantizer
        >>> quantizer = ResidualVectorQuantizer(num_codes=64, code_dim=8, num_quantizers=4)
        >>> output = quantizer(torch.randn(2, 8, 16, 16))
        >>> output.indices.shape
        torch.Size([2, 16, 16, 4])
        >>> coarse = quantizer.decode(output.indices[..., :2])  # the first two codebooks only
    """

    _fixed = (*CombinedQuantizer._fixed, "shared_codebook", "codebook_update")
    _handed_on = (*CombinedQuantizer._handed_on, "gradient_estimator", *_OF_ALL_CODEBOOKS)

    gradient_estimator: GradientEstimator
    quantizer_dropout: bool | float
    codebook_update: CodebookUpdate
    commitment_weight: float
    orthogonal_reg: float
    decay: float
    revival_threshold: float

    def __init__(
        self,
        num_codes: int | None = None,
        code_dim: int | None = None,
        num_quantizers: int | None = None,
        *,
        stages: Sequence[Quantizer] | None = None,
        loss_weights: Sequence[float] | None = None,
        shared_codebook: bool = False,
        quantizer_dropout: bool | float = False,
        codebook_update: CodebookUpdate = "ema",
        commitment_weight: float = 1.0,
        orthogonal_reg: float = 0.0,
        gradient_estimator: GradientEstimator = "straight_through",
        decay: float = 0.9,
        revival_threshold: float = 0.01,
        channel_dim: int = 1,
        nonfinite: NonfiniteMode | None = None,
        process_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        require_type("shared_codebook", shared_codebook, bool, "a bool")
        require_choice("gradient_estimator", gradient_estimator, SURROGATES)
        quantizer_dropout = _require_share(quantizer_dropout)
        alike: dict[str, Any] = {
            "channel_dim": channel_dim,
            "nonfinite": nonfinite,
            "process_group": process_group,
        }
        given: list[Quantizer]
        if stages is None:
            # One check for the three sizes, so that each is refused by its own name.
            sizes = {"num_codes": num_codes, "code_dim": code_dim, "num_quantizers": num_quantizers}
            if all(size is None for size in sizes.values()):
                raise TypeError(
                    "stages must be given, or num_codes, code_dim and num_quantizers, got none of them."
                )
            num_codes, code_dim, levels = (require_int(name, value, 1) for name, value in sizes.items())
            given = [
                VectorQuantizer(
                    num_codes,
                    code_dim,
                    codebook_update=codebook_update,
                    commitment_weight=commitment_weight,
                    orthogonal_reg=orthogonal_reg,
                    gradient_estimator=gradient_estimator,
                    decay=decay,
                    revival_threshold=revival_threshold,
                    generator=generator,
                    **alike,
                )
                for _ in range(1 if shared_codebook else levels)
            ]
        else:
            values = locals()
            defaults = inspect.signature(ResidualVectorQuantizer).parameters
            for name in (*_SIZES, *_OF_CODEBOOKS):
                unset = values[name] == defaults[name].default
                require(unset, name, "left out where stages are given, which have their own", repr(values[name]))
            reuse = "pass sizes with shared_codebook=True to share a codebook"
            given = require_parts("stages", stages, reuse=reuse, gradient_estimator=gradient_estimator, **alike)
            code_dim, levels = given[0].code_dim, len(given)
            for place, stage in enumerate(given):
                fits = stage.code_dim == code_dim
                require(fits, f"stages[{place}].code_dim", f"that of stages[0], {code_dim}", stage.code_dim)
        parts = given * (levels // len(given))
        super().__init__(parts, code_dim, drops=bool(quantizer_dropout), **alike)
        self.stages = nn.ModuleList(given)
        self.loss_weights = _require_weights(loss_weights, levels)
        self.shared_codebook = shared_codebook
        self.quantizer_dropout = quantizer_dropout
        self.gradient_estimator = gradient_estimator
        if stages is None:
            self.codebook_update = codebook_update
            self.commitment_weight = float(commitment_weight)
            self.orthogonal_reg = float(orthogonal_reg)
            self.decay = float(decay)
            self.revival_threshold = float(revival_threshold)
        # Codebooks of one size and one set of options are searched and updated as tables.
        self._built = stages is None
        for stage in given:
            stage._is_built_level = self._built
        self._scales = _residual_steps.cumulative([part.residual_scale for part in parts], code_dim)
        self.residual_scale = self._scales.pop() or 1.0

    def encode(self, latents: Tensor, *, mask: Tensor | None = None, num_quantizers: int | None = None) -> Tensor:
        """Return the indices of ``latents``: no losses, no gradient, no sampling, no change of state.

        Args:
            latents: see the class.
            mask: as for ``forward``; all Q indices are -1 where it is False.
            num_quantizers: how many of the Q indices to compute, at the cost of their levels only; None is all.
        """
        if num_quantizers is None:
            return super().encode(latents, mask=mask)
        count = require_int("num_quantizers", num_quantizers, 1, self.num_quantizers)
        self._require_length("num_quantizers", count, count)
        return self._encode(latents, mask, lambda rows: self._search_first(rows, count))

    def decode_levels(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return what each level adds to the codes; the sum is ``decode(indices)``.

        Args:
            indices: as for :meth:`decode`. A level with the index -1 adds zeros.

        Returns:
            One tensor for each level that the indices name, each in the layout of :meth:`decode`.

        Example:
            >>> from te_quant import ResidualVectorQuantizer
            >>> quantizer = ResidualVectorQuantizer(64, 8, 3)
            >>> first, second, third = quantizer.decode_levels(quantizer.encode(torch.randn(2, 8, 4, 4)))
        """
        indices = self._check_indices(indices)
        with full_precision(indices.device):
            return tuple(self._lay_out_codes(codes) for codes in self._level_codes(indices))

    def search(self, rows: Rows) -> Tensor:
        """Return all Q indices of each row, Q last; no dropout."""
        return self._search_first(rows, self.num_quantizers)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the sums of codes of the first n indices: (..., n) -> (..., C); -1 adds nothing."""
        return _residual_steps.partial_sums(self._level_codes(indices))[-1]

    def project(self, vectors: Tensor) -> Tensor:
        """Project as the first stage does."""
        return self._parts()[0].project(vectors)

    def project_residual(self, vectors: Tensor) -> Tensor:
        """Project as the first stage does."""
        return self._parts()[0].project_residual(vectors)

    def to_code_units(self, projected: Tensor) -> Tensor:
        """Project as the first stage does."""
        return self._parts()[0].to_code_units(projected)

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:
        """Quantize; changes no state.

        Args:
            rows: the projected latents.
            generator: randomness of ``quantizer_dropout`` and of the stages.
        """
        depths = None
        if self._drops:
            share = float(self.quantizer_dropout)
            depths = _residual_steps.draw_depths(rows, len(self._parts()), share, generator)
        return (
            self._quantize_tables(rows, depths) if self._built else self._quantize_stages(rows, depths, generator)
        )

    @torch.no_grad()
    def revive_dead_codes(
        self,
        latents: Tensor,
        *,
        mask: Tensor | None = None,
        threshold: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Move the codes hardly used onto what is left of random latents at their level.

        Returns (Q, K) bool, (1, K) if shared; else as :meth:`te_quant.VectorQuantizer.revive_dead_codes`. Where
        stages differ, K is that of the largest codebook that was looked at, and the rows of other stages are
        False.
        """
        revived = super().revive_dead_codes(latents, mask=mask, threshold=threshold, generator=generator)
        return revived[:1] if self.shared_codebook else revived

    def options(self) -> dict[str, Any]:
        """Return what the constructor was given, by name; see the base class."""
        left_out = ("stages",) if self._built else (*_SIZES, *_OF_CODEBOOKS)
        options = self._read_options(left_out)
        return options if self._built else {**options, "stages": list(self.stages)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_ALL_CODEBOOKS and not self.__dict__.get("_built", True):
            require(False, name, "set on each of quantizer.stages, which have their own", repr(value))
        super().__setattr__(name, value)

    def _checked(self, name: str, value: Any) -> Any:
        if name == "gradient_estimator":
            require_choice(name, value, SURROGATES)
        elif name == "loss_weights":
            value = _require_weights(value, len(self._parts()))
        elif name == "quantizer_dropout":
            value = _require_share(value)
            self.lowest_index = NO_CODE if value else min(part.lowest_index for part in self._parts())
        return super()._checked(name, value)

    def _cure_of(self, name: str) -> str:
        if self._built:
            return f"left out of a quantizer that builds its levels; build another with stages=[... {name}=...]"
        return "set on each of quantizer.stages, which have their own"

    @property
    def _drops(self) -> bool:
        return self.training and bool(self.quantizer_dropout)

    @property
    def _codebooks(self) -> list[VectorQuantizer]:
        return [cast("VectorQuantizer", stage) for stage in self.stages]

    def _parts(self) -> list[Quantizer]:
        """The quantizer of each level."""
        stages = cast("list[Quantizer]", list(self.stages))
        return stages * self.num_quantizers if self.shared_codebook else stages

    def _tables(self) -> list[Tensor]:
        """The codebook of every step: Q of (K, C), at least float32."""
        return _residual_steps.tables_of(self._codebooks, self.num_quantizers)

    def _lengths(self) -> list[int]:
        lengths, before = [], 0
        for part in self._parts():
            inside = part._lengths() if isinstance(part, CombinedQuantizer) else [*range(1, width(part) + 1)]
            lengths += [before + length for length in inside]
            before += width(part)
        return lengths

    def _search_first(self, rows: Rows, count: int) -> Tensor:
        """The first ``count`` indices of each row: -> (N, count)."""
        if self._built:
            return _residual_steps.search_residuals(rows.searchable, self._tables()[:count], None)
        return _residual_steps.search_stages(self._parts(), self._scales, rows, count)

    def _level_codes(self, indices: Tensor) -> list[Tensor]:
        """What each level that (..., n) indices name adds: -> (..., C) each."""
        if self._built:
            return _residual_steps.step_codes(indices, self._tables()[: indices.shape[-1]])
        return _residual_steps.stage_codes(self._parts(), self._scales, indices)

    def _quantize_tables(self, rows: Rows, depths: Tensor | None) -> Quantized:
        steps = _residual_steps
        tables = self._tables()
        chosen = steps.search_residuals(rows.searchable, tables, depths)
        codes = steps.step_codes(chosen, tables)
        *sums, total = steps.partial_sums(codes)
        left = steps.residuals(rows, sums, chosen, dropped=depths is not None)
        if self.loss_weights is None:
            losses = self._distances(steps.joined(left), torch.cat(codes))
            if self.orthogonal_reg:
                penalty = self.orthogonal_reg * steps.mean_penalty(self._codebooks)
                losses = losses._replace(regularization=penalty)
        else:
            losses = self._mean(
                [self._table_losses(*step) for step in zip(left, codes, tables, strict=True)], left
            )
        surrogate = SURROGATES[self.gradient_estimator](rows.vectors, total)
        return Quantized(surrogate=surrogate, indices=chosen, codes=total, losses=losses, memo=left)

    def _quantize_stages(self, rows: Rows, depths: Tensor | None, generator: torch.Generator | None) -> Quantized:
        parts = self._parts()
        levels = _residual_steps.quantize_stages(parts, self._scales, rows, depths, generator)
        total = _residual_steps.partial_sums([level.codes for level in levels])[-1]
        seen = [level.rows for level in levels]
        return Quantized(
            surrogate=SURROGATES[self.gradient_estimator](self.to_code_units(rows.vectors), total),
            indices=torch.cat([level.columns for level in levels], dim=1),
            codes=total,
            losses=self._mean([level.result.losses for level in levels], seen),
            memo=[(part, level.rows, level.result) for part, level in zip(parts, levels, strict=True)],
        )

    def _distances(self, rows: Rows, codes: Tensor) -> Losses:
        follows = self.codebook_update == "gradient"
        return distance_losses(rows, codes, self.commitment_weight, codebook_follows=follows)

    def _table_losses(self, rows: Rows, codes: Tensor, table: Tensor) -> Losses:
        losses = self._distances(rows, codes)
        if not self.orthogonal_reg:
            return losses
        return losses._replace(regularization=self.orthogonal_reg * orthogonality(table.clone()))

    def _shares(self, seen: Sequence[Rows]) -> tuple[Sequence[float | Tensor], list[float]]:
        """What the distances and the other terms of each level are multiplied by."""
        count = len(seen)
        weights = [1.0] * count if self.loss_weights is None else list(self.loss_weights)
        others = [weight / count for weight in weights]
        counted = [rows.weights.sum() for rows in seen if rows.weights is not None]
        if not counted:
            return others, others
        used = torch.stack(counted)
        used = used / (used.sum() + (used.sum() == 0))
        return [weight * share for weight, share in zip(weights, used.unbind(), strict=True)], others

    def _mean(self, losses: Sequence[Losses], seen: Sequence[Rows]) -> Losses:
        """The weighted mean over the levels; distances count the rows that used a level."""
        distances, others = self._shares(seen)
        return Losses(
            codebook=_dot(distances, [own.codebook for own in losses]),
            commitment=_dot(distances, [own.commitment for own in losses]),
            regularization=_dot(others, [own.regularization for own in losses]),
        )

    def _collect(self, result: Quantized, batches: list[Batch]) -> None:
        if self._built:
            batches += _residual_steps.batches(self._codebooks, result.memo, result.indices)
        else:
            super()._collect(result, batches)

    def _loss_terms(self, rows: Rows, indices: Tensor) -> dict[str, Tensor]:
        parts = self._parts()
        columns = indices.split([width(part) for part in parts], dim=1)
        codes = [code.detach() for code in self._level_codes(indices)]
        *sums, _ = _residual_steps.partial_sums(codes)
        seen = _residual_steps.rows_of_stages(
            parts, self._scales, rows, sums, columns, dropped=self.lowest_index < 0
        )
        distances, others = self._shares(seen)
        terms = {}
        for level, part in enumerate(parts):
            if self._built:
                own = part.look_up(columns[level].squeeze(1).clamp_min(0))
                found = self._table_losses(seen[level], own, self._tables()[level])._asdict()
            else:
                found = part_terms(part, seen[level], columns[level])
            for name, term in found.items():
                share = distances[level] if is_distance(name) else others[level]
                terms[f"levels.{level}.{name}"] = share * term
        return terms

    def _visit(self, rows: Tensor, lifecycle: Lifecycle) -> None:
        if self._built:
            self._visit_tables(rows, lifecycle)
            return
        units, total = self.to_code_units(rows), torch.zeros_like(rows)
        parts = self._parts()
        for level, (part, scale) in enumerate(zip(parts, self._scales, strict=True)):
            step = rows if level == 0 else part.project_residual(_residual_steps.divided(units - total, scale))
            lifecycle.visit(part, step)
            if level + 1 < len(parts):
                chosen = columns_of(part, part.search(Rows(step, step, None, (step.shape[0],))))
                total = total + _residual_steps.times(part_codes(part, chosen, dropped=False), scale)

    def _visit_tables(self, rows: Tensor, lifecycle: Lifecycle) -> None:
        """All codebooks of equal size move, or none."""
        stages, options = self._codebooks, (lifecycle.generator, lifecycle.group)
        if lifecycle.iterations is not None:
            _residual_steps.start_stages(stages, rows, lifecycle.iterations, *options)
            return
        revived = _residual_steps.revive_stages(stages, self.num_quantizers, rows, lifecycle.threshold, *options)
        lifecycle.revived += list(revived) * (self.num_quantizers // len(stages))


def _dot(shares: Sequence[float | Tensor], terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([share * term for share, term in zip(shares, terms, strict=True)]).sum()


def _require_share(value: object) -> bool | float:
    if isinstance(value, bool):
        return value
    share = plain(value)
    if not isinstance(share, (int, float)) or isinstance(share, bool):
        raise TypeError(f"quantizer_dropout must be a bool or a share in [0, 1], got {value!r}.")
    require(0 <= share <= 1, "quantizer_dropout", "a bool or a share in [0, 1]", repr(share))
    return float(share)


def _require_weights(weights: object, levels: int) -> tuple[float, ...] | None:
    if weights is None:
        return None
    if not isinstance(weights, Sequence) or isinstance(weights, (str, bytes)):
        raise TypeError(f"loss_weights must be a sequence of numbers, got {weights!r}.")
    require(len(weights) == levels, "loss_weights", f"one number for each of {levels} levels", f"{len(weights)}")
    return tuple(
        float(require_number(f"loss_weights[{place}]", weight, 0.0)) for place, weight in enumerate(weights)
    )
