"""What quantizers have in common that are made of other quantizers, their parts.

Shape letters: C code size, N latent vectors, Q indices per vector, n of them for one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require, require_generator, require_int, require_number, require_type
from te_quant._execution import reshard_owners
from te_quant._precision import full_precision, widen
from te_quant._values import require_in_range
from te_quant.quantizers._lifecycle import replacements
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._update import Batch, record, restart, revive
from te_quant.quantizers.base import NO_CODE, NonfiniteMode, Quantized, Quantizer, option_names
from te_quant.quantizers.sim import SimVQ
from te_quant.quantizers.vector import VectorQuantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "CombinedQuantizer",
    "Lifecycle",
    "columns_of",
    "first_columns",
    "is_distance",
    "part_codes",
    "part_terms",
    "require_parts",
    "width",
]


class Lifecycle:
    """How codebooks start, or how dead codes are revived: one visit of each codebook, with its rows.

    Args:
        group: the other processes.
        generator: randomness.
        iterations: Lloyd steps; None revives.
        threshold: a code is dead below this fraction of the average usage.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        generator: torch.Generator | None,
        *,
        iterations: int | None = None,
        threshold: float = 0.0,
    ) -> None:
        self.group, self.generator = group, generator
        self.iterations, self.threshold = iterations, threshold
        self.revived: list[Tensor] = []

    def visit(self, part: Quantizer, rows: Tensor) -> None:
        """Start or revive every codebook of ``part`` from its projected rows, (·, C)."""
        if isinstance(part, CombinedQuantizer):
            part._visit(rows, self)
            return
        revived = rows.new_zeros(0, dtype=torch.bool)
        if isinstance(part, VectorQuantizer) and self.iterations is not None:
            centers = part._kmeans(rows, self.iterations, self.generator, self.group)
            if centers is not None:
                restart(part._state(), centers)
        elif isinstance(part, VectorQuantizer):
            revived, fresh = replacements(rows, part.usage, self.threshold, self.generator, self.group)
            revive(part._state(), revived, fresh)
        self.revived += [revived] * width(part)


class CombinedQuantizer(Quantizer):
    """A quantizer whose indices, codes and state are those of its parts.

    A subclass names its parts in :meth:`_parts`; one of them may serve several times.
    """

    _fixed = (*Quantizer._fixed, "num_quantizers")

    _handed_on: ClassVar[tuple[str, ...]] = ("channel_dim", "nonfinite")
    """Names of the options that the parts have too; assigned to the whole they are assigned to all of these."""

    def __init__(
        self,
        parts: Sequence[Quantizer],
        code_dim: int,
        *,
        drops: bool = False,
        channel_dim: int = 1,
        nonfinite: NonfiniteMode | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            max(part.num_codes for part in parts),
            code_dim,
            channel_dim=channel_dim,
            nonfinite=nonfinite,
            process_group=process_group,
        )
        self.num_quantizers: int = sum(width(part) for part in parts)
        # A part that was left out has the index -1.
        self.lowest_index = NO_CODE if drops else min(part.lowest_index for part in parts)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of each of the Q indices of a token; ``num_codes`` is the largest."""
        sizes: tuple[int, ...] = ()
        for part in self._parts():
            if isinstance(part, CombinedQuantizer):
                sizes += part.codebook_sizes
            else:
                sizes += (part.num_codes,) * width(part)
        return sizes

    @property
    def reference(self) -> Tensor | None:
        """That of the first part that has one."""
        return next((part.reference for part in self._parts() if part.reference is not None), None)

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the first part that has one."""
        return next((part.dtype for part in self._parts() if part.dtype is not None), None)

    def record(self, rows: Rows, result: Quantized) -> None:  # noqa: ARG002
        """Let every part record that trains and is not frozen; one collective serves all codebooks together."""
        batches: list[Batch] = []
        self._collect(result, batches)
        if batches:
            record(batches, self._group.resolve())

    def advance(self, rows: Rows) -> None:
        """Move every part that is neither frozen nor inside its own :meth:`accumulate`; see the base class."""
        if self._accumulating:
            return
        for part in self._owned():
            if isinstance(part, CombinedQuantizer):
                part.advance(rows)
            elif not part.frozen and not part._accumulating:
                part.apply_pending()

    def apply_pending(self) -> None:
        """Move every part that is not frozen; see the base class."""
        for part in self._owned():
            if not part.frozen:
                part.apply_pending()

    @torch.no_grad()
    def kmeans_init(
        self,
        latents: Tensor,
        *,
        mask: Tensor | None = None,
        iterations: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set the codebook of every :class:`~te_quant.VectorQuantizer` inside to the k-means centres of its rows.

        The levels of a residual quantizer start one after the other, each from what the ones before it leave over;
        a shared codebook starts from the latents. Other quantizers stay as they are. Nothing starts if one of them
        is frozen. Else as :meth:`te_quant.VectorQuantizer.kmeans_init`.
        """
        iterations = require_int("iterations", iterations, 0)
        require_generator(generator)
        self._require_writable_parts("kmeans_init")
        reshard_owners(self)
        rows = self._counted(latents, mask)
        with full_precision(latents.device):
            self._visit(rows, Lifecycle(self._group.resolve(), generator, iterations=iterations))

    @torch.no_grad()
    def revive_dead_codes(
        self,
        latents: Tensor,
        *,
        mask: Tensor | None = None,
        threshold: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Revive the dead codes of every :class:`~te_quant.VectorQuantizer` inside.

        Else as :meth:`te_quant.VectorQuantizer.revive_dead_codes`.

        Returns:
            (Q, K) bool, the codes revived, one row for each index of a token; K is that of the largest codebook
            that was looked at, and 0 if there is none.
        """
        threshold = require_number("threshold", threshold, 0.0, 1.0)
        require_generator(generator)
        self._require_writable_parts("revive_dead_codes")
        reshard_owners(self)
        rows = self._counted(latents, mask)
        self.apply_pending()
        lifecycle = Lifecycle(self._group.resolve(), generator, threshold=threshold)
        with full_precision(latents.device):
            self._visit(rows, lifecycle)
        longest = max(len(revived) for revived in lifecycle.revived)
        return torch.stack([F.pad(revived, (0, longest - len(revived))) for revived in lifecycle.revived])

    def __setattr__(self, name: str, value: Any) -> None:
        new = name not in self.__dict__ and name not in option_names(type(self))
        if new and self.__dict__.get("_modules"):
            parts = (part for part in self._all_quantizers() if part is not self)
            if any(name in option_names(type(part)) for part in parts):
                require(False, name, self._cure_of(name), repr(value))
        super().__setattr__(name, value)

    def _cure_of(self, name: str) -> str:
        """What an error expects where ``name`` is an option of the parts only."""
        raise NotImplementedError(f"{type(self).__name__} must define _cure_of(name).")

    def _checked(self, name: str, value: Any) -> Any:
        value = super()._checked(name, value)
        if name in self._handed_on:
            for part in self._all_quantizers():
                if part is not self and name in part.__dict__:
                    part._assign(name, value)
                    value = getattr(part, name)
        return value

    def _parts(self) -> Sequence[Quantizer]:
        """The quantizer of each level or group."""
        raise NotImplementedError(f"{type(self).__name__} must define _parts().")

    def _visit(self, rows: Tensor, lifecycle: Lifecycle) -> None:
        """Let ``lifecycle`` visit every part with its rows: (·, C), projected."""
        raise NotImplementedError(f"{type(self).__name__} must define _visit(rows, lifecycle).")

    def _owned(self) -> Iterator[Quantizer]:
        """Every part once."""
        return iter(dict.fromkeys(self._parts()))

    def _collect(self, result: Quantized, batches: list[Batch]) -> None:
        """Add what codebooks saw to ``batches``; let other parts record."""
        steps: list[tuple[Quantizer, Rows, Quantized]] = result.memo
        for part, rows, own in steps:
            if not part._changes():
                continue
            kind = type(part)
            if isinstance(part, CombinedQuantizer):
                part._collect(own, batches)
            elif isinstance(part, VectorQuantizer) and kind.record is VectorQuantizer.record:
                batches.append(Batch(part._state(), rows, own.indices, own.memo))
            elif isinstance(part, SimVQ) and kind.record is SimVQ.record:
                batches.append(Batch(part._state(), rows, own.indices))
            else:
                part.record(rows, own)

    def _require_writable_parts(self, method: str) -> None:
        """Refuse before anything moves: to start only half of the codebooks again would be worse than none."""
        for module in self._all_quantizers():
            module._require_writable(method)

    def _learnt(self) -> Iterator[nn.Parameter]:
        for part in self._owned():
            yield from part._learnt()

    def _records(self) -> bool:
        return not self.frozen and any(part._changes() and part._records() for part in self._owned())

    def _remembered(self) -> Iterator[Tensor]:
        for part in self._owned():
            yield from part._remembered()

    def _codes_of(self, indices: Tensor) -> Tensor:
        # Some of the indices of a token may be -1, and the others still have codes.
        return self.look_up(indices)

    def _search_first(self, rows: Rows, count: int) -> Tensor:
        """The first ``count`` indices of each row: -> (N, count)."""
        return self.search(rows)[:, :count]

    def _lengths(self) -> list[int]:
        """How many of the Q indices can be decoded without the others."""
        raise NotImplementedError(f"{type(self).__name__} must define _lengths().")

    def _require_length(self, name: str, count: int, actual: object) -> None:
        """Refuse a number of indices that cuts a part which decodes only as a whole."""
        lengths = self._lengths()
        some = "" if len(lengths) == 1 else "one of "
        expected = f"{some}{', '.join(map(str, lengths))}, because a ProductQuantizer needs all of its indices"
        require(count in lengths, name, expected, actual)

    def _check_indices(self, indices: Tensor) -> Tensor:
        indices = super()._check_indices(indices)
        given = indices.shape[-1]
        if given not in self._lengths():
            shape = tuple(indices.shape)
            self._require_length(f"indices axis {indices.ndim - 1}", given, f"{given} (indices shape {shape})")
        sizes = self.codebook_sizes[:given]
        if set(sizes) == {self.num_codes}:
            return indices
        # Each place has a codebook of its own size.
        columns = [
            require_in_range(f"indices[..., {place}]", column, size, "num_codes", NO_CODE)
            for place, (column, size) in enumerate(zip(indices.unbind(-1), sizes, strict=True))
        ]
        return torch.stack(columns, dim=-1)


def width(part: Quantizer) -> int:
    """How many of the indices of a token are those of ``part``."""
    return part.num_quantizers or 1


def columns_of(part: Quantizer, indices: Tensor) -> Tensor:
    """Indices as ``part`` has them, with an axis for its n or not: (N,) or (N, n) -> (N, n)."""
    return indices.unsqueeze(-1) if part.num_quantizers is None else indices


def first_columns(part: Quantizer, rows: Rows, count: int) -> Tensor:
    """The first indices of each row, fewer than ``part`` has: -> (N, count)."""
    if isinstance(part, CombinedQuantizer):
        return part._search_first(rows, count)
    return part.search(rows)[:, :count]


def part_codes(part: Quantizer, columns: Tensor, *, dropped: bool = True) -> Tensor:
    """The codes of ``part``, at least float32: (..., n) -> (..., C); zero where it was left out.

    Args:
        part: which.
        columns: its indices.
        dropped: some of them may be -1.
    """
    indices = columns if part.num_quantizers is not None else columns.squeeze(-1)
    return widen(part._codes_of(indices) if dropped else part.look_up(indices))


def part_terms(part: Quantizer, rows: Rows, columns: Tensor) -> dict[str, Tensor]:
    """The terms of the loss of ``part`` by name; (N, n) indices may be -1 where rows have no weight."""
    return part._loss_terms(rows, columns.squeeze(1) if part.num_quantizers is None else columns)


def is_distance(name: str) -> bool:
    """Whether a term of a loss is a mean over rows."""
    return name.endswith(("codebook", "commitment"))


def require_parts(name: str, parts: object, *, reuse: str, **wanted: Any) -> list[Quantizer]:
    """Refuse what is no list of different quantizers that fit into a whole with the options ``wanted``.

    ``reuse`` says how one quantizer serves several times.
    """
    if not isinstance(parts, Sequence) and not isinstance(parts, nn.ModuleList):
        raise TypeError(f"{name} must be a sequence of quantizers, got {parts!r}.")
    found: list[Quantizer] = []
    for place, part in enumerate(parts):
        title = f"{name}[{place}]"
        require_type(title, part, Quantizer, "a te_quant.Quantizer")
        expected = "another quantizer than those before it"
        require(part not in found, title, expected, f"one of them again; {reuse}, or pass copy.deepcopy of it")
        found.append(part)
        for inner in part._all_quantizers():
            _require_alike(title, inner, wanted)
    require(bool(found), name, "at least one quantizer", "none")
    return found


def _require_alike(title: str, part: Quantizer, wanted: dict[str, Any]) -> None:
    for option, value in wanted.items():
        own = getattr(part, option, value)
        # A part that leaves it to the default does what the whole does before.
        fits = own == value or (option == "nonfinite" and own is None)
        require(fits, f"{title}.{option}", f"{value!r} as that of the whole", f"{own!r} ({type(part).__name__})")
