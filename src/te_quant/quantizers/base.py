"""The class that every quantizer derives from, and the one value that every quantizer returns.

Shape letters: B batch, C code size, h w token grid, K codes, N = B*h*w latent vectors, Q indices per vector.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from te_quant._checks import (
    require,
    require_axis,
    require_choice,
    require_device,
    require_floating,
    require_generator,
    require_int,
    require_integer_tensor,
    require_mask,
    require_rank,
    require_type,
)
from te_quant._execution import between_steps, overwrite, refuse_training_export, refuse_transform, reshard_owners
from te_quant._precision import HALF, full_precision, wide_buffers
from te_quant._values import may_be_true, require_in_range
from te_quant.functional import straight_through
from te_quant.quantizers._distributed import GroupReference
from te_quant.quantizers._rows import Layout, Rows, grid_of, is_channels_last, to_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Losses", "NonfiniteMode", "Quantized", "Quantizer", "QuantizerOutput"]

NonfiniteMode: TypeAlias = Literal["raise", "skip", "off"]
_Self = TypeVar("_Self", bound="Quantizer")

# The index of a token that is masked, or of a codebook that is left out.
NO_CODE = -1

# The layouts that are read: rows, a sequence, an image and a volume or video, by ``channel_dim``.
LATENT_SHAPES = {
    1: "(N, C), (B, C, T), (B, C, h, w) or (B, C, d, h, w)",
    -1: "(N, C), (B, T, C), (B, h, w, C) or (B, d, h, w, C)",
}

# Parameters of a constructor that describe a run, not the quantizer.
_NO_OPTIONS = ("self", "generator", "process_group")


class Losses(NamedTuple):
    """The three weighted terms of a quantizer's loss, each (), >= 0.

    Attributes:
        codebook: moves the codes towards the latents. Zero where no code is learnt by gradient.
        commitment: moves the latents towards the codes.
        regularization: the penalty on the codebook, or on how evenly it is used; zero at the optimum.
    """

    codebook: Tensor
    commitment: Tensor
    regularization: Tensor


class Quantized(NamedTuple):
    """The result of :meth:`Quantizer.quantize` for N rows.

    Attributes:
        surrogate: (N, C), usually ``rows.vectors``. It receives the gradient of the codes unchanged; its values
            are not used.
        indices: (N,) or (N, Q) int64.
        codes: (N, C), bit-equal to ``look_up(indices)``.
        losses: the three weighted terms.
        table: (K, C), if the codes are its rows at ``indices`` and there is one index per row.
        memo: anything else that :meth:`Quantizer.record` needs; no other method reads it.
    """

    surrogate: Tensor
    indices: Tensor
    codes: Tensor
    losses: Losses
    table: Tensor | None = None
    memo: Any = None


class QuantizerOutput(NamedTuple):
    """What a quantizer computed; the same fields in training and in evaluation.

    The three terms are already weighted, so ``loss`` is exactly their sum and a term whose weight is zero
    is zero.

    Attributes:
        quantized: the codes, with a gradient path to the latents; shape, dtype and memory format of the latents.
            Zero, and without gradient, where masked.
        indices: the chosen codes, int64 in [0, K), and -1 where masked; shape of the latents without the channel
            axis. :class:`~te_quant.ResidualVectorQuantizer` and :class:`~te_quant.ProductQuantizer` put the axis
            of the Q indices of a token last.
        loss: (), ``codebook_loss + commitment_loss + regularization_loss``.
        codebook_loss: (), moves the codes towards the latents. Zero where the codebook is not learnt by
            gradient.
        commitment_loss: (), moves the latents towards the codes.
        regularization_loss: (), the penalty on the codebook, or on how evenly it is used, >= 0 and zero at the
            optimum: the orthogonality penalty of :class:`~te_quant.VectorQuantizer` and
            :class:`~te_quant.ResidualVectorQuantizer`, the entropy terms of :class:`~te_quant.LFQ`.
        codes: the codes without gradient, in the quantizer's dtype; bit-equal to ``decode(indices)`` until the
            codebook moves.

    Example:
        >>> from te_quant import VectorQuantizer
        >>> quantizer = VectorQuantizer(num_codes=16, code_dim=4)
        >>> output = quantizer(torch.randn(2, 4, 8, 8))
        >>> output.indices.shape
        torch.Size([2, 8, 8])
        >>> torch.equal(quantizer.decode(output.indices), output.codes)
        True
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    regularization_loss: Tensor
    codes: Tensor


def _check_layout(*, channel_dim: object, nonfinite: object) -> dict[str, Any]:
    """Refuse what is no layout or no mode; return both."""
    channel_dim = require_int("channel_dim", channel_dim)
    require_choice("channel_dim", channel_dim, (1, -1))
    require_choice("nonfinite", nonfinite, (None, "raise", "skip", "off"))
    return {"channel_dim": channel_dim, "nonfinite": nonfinite}


@cache
def names_of(check: Callable[..., dict[str, Any]]) -> tuple[str, ...]:
    return tuple(inspect.signature(check).parameters)


def option_names(kind: type[Quantizer]) -> frozenset[str]:
    """Return the options of ``kind`` and of the classes it is built on."""
    kinds = (base for base in kind.__mro__ if issubclass(base, Quantizer) and "__init__" in vars(base))
    return frozenset(name for base in kinds for name in names_of(base.__init__)) - {*_NO_OPTIONS}


class Quantizer(nn.Module):
    """Base class of all quantizers: latents in any layout in, codes and indices out.

    The base class checks the latents, turns them into rows, widens half precision, calls the steps below and lays
    their results out again. A subclass overrides the steps that differ:

    - :meth:`search` (required): the index of each row. Reads state, never changes it.
    - :meth:`look_up` (required): the code of each index. Any index that :meth:`search` returns has exactly one
      code, and looking it up twice gives the same bits.
    - :meth:`losses` (optional, zero by default): the weighted terms.
    - :meth:`project` (optional, the identity by default): what a row becomes before it is compared, for example
      unit length.
    - :meth:`quantize` (optional): all of the above for one training or evaluation pass. Override it to sample. It
      returns codes that are bit-equal to ``look_up(indices)`` and changes no state.
    - :meth:`project_residual`, :meth:`to_code_units` and ``residual_scale`` (optional): for quantizers that bound
      latents, or whose codes have a fixed size, inside a :class:`~te_quant.ResidualVectorQuantizer`.
    - :meth:`record` and :meth:`apply_pending` (optional): for quantizers that learn from the latents themselves. A
      training pass ends with ``record``, which puts what it saw into buffers of its own. The next one begins with
      :meth:`advance`, which calls ``apply_pending``: it moves the codebook. So the codebook never moves inside a
      step. Neither is called while frozen, or while autograd recomputes a forward pass; and a
      pass inside ``torch.func`` is refused where it would record.

    ``te_quant.testing.check_quantizer`` holds a subclass to all of this; the page "Add a quantizer" builds one.

    Args:
        num_codes: K, at least 1.
        code_dim: C, at least 1.
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
        nonfinite: what to do about NaN and infinite latents: ``"raise"`` a ``ValueError``, ``"skip"`` the vectors
            that have any, or ``"off"``, which does not look. ``None`` is ``"raise"`` on the CPU and ``"off"`` on
            accelerators.
        process_group: the processes over which statistics are summed. ``None`` is torch.distributed's default
            group, looked up at each call, and only this process when there is none.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, of the quantizer's dtype or in half precision,
            which is computed in float32.
        mask: the latents' shape without the channel axis, bool.
        quantized: as latents, in their memory format, contiguous or channels-last. codes: the same in the
            quantizer's dtype. indices: the latents' shape without the channel axis, and Q behind where a token
            has Q indices. losses: ().

    Attributes:
        frozen: whether :meth:`freeze` was called.
        num_quantizers: Q where a token has Q indices in the last axis; None where it has one and no such axis.

    Raises:
        ValueError: an option is out of range, axis ``channel_dim`` of latents is not C, the rank or device does
            not fit, latents are not finite, or the shape or device of the mask does not fit.
        TypeError: latents are not floating point, or of a dtype that the quantizer does not take; the mask is not
            bool.

    Example:
        >>> from te_quant import Quantizer
        >>> class Sign(Quantizer):
        ...     def search(self, rows):
        ...         return ((rows.searchable > 0) * 2 ** torch.arange(self.code_dim)).sum(1)
        ...     def look_up(self, indices):
        ...         return (indices.unsqueeze(-1) >> torch.arange(self.code_dim) & 1) * 2.0 - 1
        >>> Sign(num_codes=8, code_dim=3)(torch.tensor([[0.5, -2.0, 0.1]])).indices
        tensor([5])
    """

    channel_dim: int
    nonfinite: NonfiniteMode | None
    num_quantizers: int | None = None
    lowest_index: int = 0
    """The smallest index of a token that counts; -1 where codebooks may be left out. Masked tokens have -1."""

    residual_scale: float | tuple[float, ...] = 1.0
    """Inside a ResidualVectorQuantizer, what the codes of all later levels are multiplied by: a number, or one for
    each channel. 1 where codes are learnt, because they learn their size."""

    _is_built_level: bool = False
    """Whether a ResidualVectorQuantizer has built this quantizer and reads most options from itself."""

    statistics: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers that stay in float32 when the module is converted to half precision."""

    _checks: ClassVar[tuple[Callable[..., dict[str, Any]], ...]] = (_check_layout,)
    """What checks options, in the constructor all together and later again whenever one of them is assigned."""

    _fixed: ClassVar[tuple[str, ...]] = ("num_codes", "code_dim")
    """Names of the options that buffers or codes depend on."""

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        channel_dim: int = 1,
        nonfinite: NonfiniteMode | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_codes = require_int("num_codes", num_codes, 1)
        self.code_dim = require_int("code_dim", code_dim, 1)
        self._set_options(_check_layout, channel_dim=channel_dim, nonfinite=nonfinite)
        self.frozen = False
        self._accumulating = False
        self._group = GroupReference(process_group)

    if TYPE_CHECKING:
        # torch types it as returning Any.
        def __call__(
            self, latents: Tensor, *, mask: Tensor | None = None, generator: torch.Generator | None = None
        ) -> QuantizerOutput:
            """Run :meth:`forward` and the hooks."""

    def forward(
        self, latents: Tensor, *, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> QuantizerOutput:
        """Quantize ``latents``; while training and not frozen, also record them for the next update.

        Args:
            latents: see the class.
            mask: bool, the latents' shape without the channel axis; None if every token counts. Tokens with mask
                False take no part: they have no loss and no gradient, do not change statistics or codebook, and
                their latents may be anything, also NaN. Their index is -1, their code zero. The other tokens
                get what a pass over these tokens only would give them, apart from numbers drawn at random.
            generator: randomness of what is drawn in training; the global one if None.

        Raises:
            RuntimeError: a pass that would change state is exported, or run by a transform of ``torch.func``.

        Example:
            >>> from te_quant import VectorQuantizer
            >>> latents = torch.randn(2, 3, 4)  # two sequences, padded to three tokens
            >>> mask = torch.tensor([[True, True, True], [True, False, False]])
            >>> output = VectorQuantizer(16, 4, channel_dim=-1)(latents, mask=mask)
            >>> output.indices[1, 1:]
            tensor([-1, -1])
            >>> output.indices[mask].shape  # for CodebookUsage, and for everything else that wants codes only
            torch.Size([4])
        """
        self._check_latents(latents)
        kept = self._kept(latents, mask)
        require_generator(generator)
        changing = self._changes()
        refuse_training_export(changing, "a quantizer")
        if changing and self._records():
            refuse_transform()
        with full_precision(latents.device):
            rows = self._rows(latents, kept)
            if changing:
                between_steps(rows.searchable, self._remembered(), lambda: self.advance(rows))
            result = self.quantize(rows, generator)
            if changing:
                between_steps(rows.searchable, self._remembered(), lambda: self.record(rows, result))
        layout = Layout(rows.grid, self.channel_dim, is_channels_last(latents, self.channel_dim))
        surrogate, codes, indices = result.surrogate, result.codes.detach(), result.indices
        if kept is not None:
            # The surrogate too: what the gradient passes to may depend on parameters.
            surrogate, codes = torch.where(kept, surrogate, 0.0), torch.where(kept, codes, 0.0)
            indices = _without_masked(indices, kept)
        if result.table is None or kept is not None:  # What is masked has no row in a table.
            codes = layout.arrange(codes)
        else:
            codes = layout.look_up(result.table.detach(), indices, codes)
        # After laying out: moving channels costs several times as much as a copy in place.
        quantized = straight_through(layout.view(surrogate), codes)
        codebook, commitment, regularization = result.losses
        return QuantizerOutput(
            quantized=quantized.to(latents.dtype),
            indices=self._lay_out_indices(indices, rows.grid),
            loss=codebook + commitment + regularization,
            codebook_loss=codebook,
            commitment_loss=commitment,
            regularization_loss=regularization,
            codes=codes if self.dtype is None else codes.to(self.dtype),
        )

    def encode(self, latents: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the indices of ``latents``: no losses, no gradient, no sampling, no change of state.

        Args:
            latents: see the class.
            mask: as for :meth:`forward`; the index is -1 where it is False.
        """
        return self._encode(latents, mask, self.search)

    def decode(self, indices: Tensor) -> Tensor:
        """Return the codes of ``indices``, contiguous, C at ``channel_dim``; differentiable in what is learnt.

        Args:
            indices: (N,), (B, T), (B, h, w) or (B, d, h, w), integer, in [0, K), or -1, whose code is zero; with 1
                to Q indices per token in a last axis where ``num_quantizers`` is set.

        Raises:
            ValueError: an index has no code, or the rank, the number of codebooks or the device does not fit.
            TypeError: the indices are not integers.
        """
        refuse_training_export(self._changes(), "a quantizer")
        indices = self._check_indices(indices)
        with full_precision(indices.device):
            codes = self._codes_of(indices)
        return self._lay_out_codes(codes)

    def loss_terms(self, latents: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss by name: what ``forward`` adds up to ``loss``, already weighted.

        Searches nothing and changes no state, so it is cheap enough for logging. Call it with the latents and the
        indices of a step before an optimizer or another training pass moves the codebook. Quantizers that are made
        of others name the terms of each part, for example ``"levels.0.commitment"``. It looks only at the rows of
        this process, and at the whole codebook where training penalizes a random part of it.

        Args:
            latents: as for ``forward``.
            indices: their indices, as ``forward`` returned them. Tokens without any, which have only -1, do not
                count.

        Returns:
            Each term, (), >= 0, differentiable.

        Raises:
            ValueError: the indices are not of the shape that ``forward`` returns for these latents, or either is
                refused as by ``forward`` and :meth:`decode`.

        Example:
            >>> from te_quant import LFQ
            >>> quantizer, latents = LFQ(4), torch.randn(2, 4, 8, 8)
            >>> list(quantizer.loss_terms(latents, quantizer(latents).indices))
            ['codebook', 'commitment', 'entropy', 'diversity']
        """
        self._check_latents(latents)
        indices = self._check_indices(indices)
        with full_precision(latents.device):
            behind = () if self.num_quantizers is None else (self.num_quantizers,)
            shape, found = (*grid_of(latents, self.channel_dim), *behind), tuple(indices.shape)
            require(found == shape, "indices", f"of shape {shape} for these latents", f"shape {found}")
            indices = indices.reshape(-1, *behind)
            # The size by name, as -1 for it is ambiguous where there are no tokens.
            kept = (indices >= 0).view(len(indices), self.num_quantizers or 1).any(1, keepdim=True)
            rows = self._rows(latents, kept if may_be_true(~kept) else None)
            return self._loss_terms(rows, indices)

    def freeze(self: _Self, frozen: bool = True) -> _Self:
        """Stop (or resume) every change of state: gradients, moving averages, k-means and revival.

        What is pending is applied first. Frozen stays frozen whatever else toggles ``requires_grad``. Does nothing
        for a quantizer that learns and remembers nothing. The flag belongs to this object: copies and pickles
        carry it, ``state_dict`` does not.
        """
        require_type("frozen", frozen, bool, "a bool")
        if frozen and not self.frozen:
            self.apply_pending()
        for module in self._all_quantizers():
            module.frozen = frozen
        for parameter in self._learnt():
            parameter.requires_grad_(not frozen)
            if frozen:
                # An optimizer would still step on a gradient left behind.
                parameter.grad = None
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again: give the parameters and buffers of this module new values, as those of a new quantizer.

        For modules that were built on the meta device, whose values ``to_empty`` leaves undefined. It does not
        reset quantizers inside this one: call it for every module that has it, as for torch's own layers. Random
        values are those of the global generator, which needs the same seed in all processes.

        Raises:
            RuntimeError: the quantizer is frozen, or its codebook parametrized.
            AttributeError: a quantizer of your own has an option that is not an attribute of the same name, or
                ``**kwargs``.

        Example:
            >>> from te_quant import VectorQuantizer
            >>> with torch.device("meta"):
            ...     quantizer = VectorQuantizer(16, 4)
            >>> quantizer = quantizer.to_empty(device="cpu")
            >>> for module in quantizer.modules():
            ...     if hasattr(module, "reset_parameters"):
            ...         module.reset_parameters()
            >>> float(quantizer.codebook.abs().max()) <= 1 / 16
            True
        """
        own = {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if "." not in name}
        if own:
            self._require_writable("reset_parameters")
            reshard_owners(self)
            values = type(self)(**self.options()).state_dict()
            for name, tensor in own.items():
                # A new quantizer lacks what an option that was changed since needs no more.
                overwrite(tensor, values.get(name, torch.zeros(tensor.shape)))

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set the mode; ``train(False)``, which is ``eval()``, first applies what is pending.

        Not inside :meth:`accumulate`, where a look at other data must not split a block.
        """
        if not mode and not self._accumulating and not self.frozen:
            self.apply_pending()
        super().train(mode)
        return self

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Count all training passes inside the ``with`` block as one: its micro-batches make one update.

        What is pending is applied at the start, then the codebook stands still; the first training pass after the
        block moves it by everything that the block recorded. Use it for gradient accumulation, and where several
        checkpointed passes come before one backward pass. A copy that is made inside is outside of the block:
        what was recorded until then is pending in both, and each moves by it once.

        Example:
            >>> from te_quant import VectorQuantizer
            >>> quantizer = VectorQuantizer(16, 4, codebook_update="ema")
            >>> with quantizer.accumulate():
            ...     for latents in torch.randn(4, 2, 4, 8, 8):
            ...         output = quantizer(latents)
            >>> int(quantizer.pending_counts.sum())
            512
        """
        quantizers = [module for module in self._all_quantizers() if not module._accumulating]
        if not self._accumulating and not self.frozen:
            self.apply_pending()
        for module in quantizers:
            module._accumulating = True
        try:
            yield
        finally:
            for module in quantizers:
                module._accumulating = False

    def search(self, rows: Rows) -> Tensor:
        """Return the index of each row, int64: (N, C) -> (N,), or (N, Q); no gradient, no change of state.

        Args:
            rows: compare ``rows.searchable``, which carries no gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} must define search(rows).")

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the codes of checked int64 indices: (...) -> (..., C), or (..., n) -> (..., C) for n of Q.

        In float32, or float64 where the module is; with a gradient to what is learnt.
        """
        raise NotImplementedError(f"{type(self).__name__} must define look_up(indices).")

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:  # noqa: ARG002
        """Return the weighted terms for the rows that count, all zero here.

        Args:
            rows: with gradient in ``rows.vectors``, and ``rows.weights`` where some do not count.
            codes: (N, C), with gradient to what is learnt.
            indices: (N,) or (N, Q).
        """
        # Zero, but of the rows: `loss.backward()` stays valid.
        nothing = (rows.vectors * 0).sum()
        return Losses(codebook=nothing.detach(), commitment=nothing, regularization=nothing.detach())

    def project(self, vectors: Tensor) -> Tensor:
        """Return what rows are compared as: (N, C) -> (N, C), differentiable; the identity here."""
        return vectors

    def project_residual(self, vectors: Tensor) -> Tensor:
        """Return what is left over by earlier levels of a ResidualVectorQuantizer as it is compared.

        (N, C) -> (N, C). :meth:`project` by default; override it where ``project`` bounds the latents, because
        residuals are bounded already.
        """
        return self.project(vectors)

    def to_code_units(self, projected: Tensor) -> Tensor:
        """Return projected rows in the units of the codes: (N, C) -> (N, C); the identity by default.

        The difference between these rows and their codes is the error.
        """
        return projected

    def advance(self, rows: Rows) -> None:  # noqa: ARG002
        """Do what is due between two training steps, before the search: apply what is pending.

        The one place where a codebook may move by itself.

        Args:
            rows: the projected latents of the step that begins.
        """
        if not self._accumulating:
            self.apply_pending()

    def apply_pending(self) -> None:
        """Move the codebook and the statistics by what training passes recorded; nothing where nothing is pending.

        Called by the next training pass, ``eval()``, :meth:`freeze` and :meth:`accumulate`; call it yourself to
        export or compare a codebook in the middle of training. Runs no collective and draws nothing: with several
        processes each may call it when it likes. Nothing happens while frozen.
        """

    def record(self, rows: Rows, result: Quantized) -> None:
        """Put what a training pass saw into buffers, summed over all processes; nothing here.

        Args:
            rows: the projected latents.
            result: what :meth:`quantize` made of them.
        """

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:  # noqa: ARG002
        """Search, look up and take the losses; changes no state.

        Args:
            rows: the projected latents.
            generator: randomness; the global one if None.
        """
        indices = self.search(rows)
        codes = self.look_up(indices)
        losses = self.losses(rows, codes, indices)
        return Quantized(surrogate=rows.vectors, indices=indices, codes=codes, losses=losses)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group that was given; None is the default group."""
        return self._group.group

    @property
    def reference(self) -> Tensor | None:
        """The tensor whose device and dtype latents must have; None if any will do.

        The first floating-point parameter or buffer that is not among the :attr:`statistics`.
        """
        tensors = (*self.named_parameters(), *self.named_buffers())
        fitting = (tensor for name, tensor in tensors if name not in self.statistics)
        return next((tensor for tensor in fitting if tensor.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point type of the codes; None if that of :meth:`look_up` will do."""
        return None if self.reference is None else self.reference.dtype

    def options(self) -> dict[str, Any]:
        """Return what the constructor was given, by name; a checkpoint of an autoencoder stores it.

        Randomness (``generator``) and processes (``process_group``) belong to a run and are left out.

        Raises:
            AttributeError: an option is not an attribute of the same name, or is one of ``*args`` or ``**kwargs``.
        """
        return self._read_options()

    def _read_options(self, left_out: Collection[str] = ()) -> dict[str, Any]:
        """Read the options of the constructor, without some of them."""
        kind, options = type(self), {}
        for name, parameter in inspect.signature(kind.__init__).parameters.items():
            if name in _NO_OPTIONS or name in left_out:
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise AttributeError(
                    f"{kind.__name__} must name every option in its constructor, got {parameter}; what is in it "
                    "cannot be read."
                )
            try:
                options[name] = getattr(self, name)
            except AttributeError as error:
                raise AttributeError(
                    f"{kind.__name__} must keep every option as an attribute of the same name, got none named "
                    f"{name!r}; set self.{name} in the constructor."
                ) from error
        return options

    def extra_repr(self) -> str:
        """Name the options that have no default, and those that differ from theirs."""
        shown = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            # What is no attribute is not known, and modules inside are printed below.
            value = getattr(self, name, parameter.default)
            hidden = name in _NO_OPTIONS or isinstance(value, Tensor | nn.Module)
            if not hidden and value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    def __setattr__(self, name: str, value: Any) -> None:
        # Until it is set for the first time, the constructor checks it.
        super().__setattr__(name, self._checked(name, value) if name in self.__dict__ else value)

    def _assign(self, name: str, value: Any) -> None:
        """Set an option, checked, as the whole of which this is a part says."""
        nn.Module.__setattr__(self, name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        """Return the new value of an attribute as it is stored; refuse what the constructor refuses."""
        if name in self._fixed:
            own = self.__dict__[name]
            expected, got = f"{own!r}, as the quantizer was built", f"{value!r}; build another quantizer with it"
            require(type(value) is type(own) and value == own, name, expected, got)
        for check in self._checks:
            names = names_of(check)
            if name in names:
                value = check(**{**{each: self.__dict__[each] for each in names}, name: value}).get(name, value)
        return value

    def _set_options(self, check: Callable[..., dict[str, Any]], **options: Any) -> None:
        """Check options together, then set them."""
        for name, value in check(**options).items():
            setattr(self, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build a copy or an unpickled quantizer; no block ends for it, so it is outside of every one."""
        super().__setstate__({**state, "_accumulating": False})  # type: ignore[no-untyped-call]

    def _learnt(self) -> Iterator[nn.Parameter]:
        """The parameters that take gradients unless frozen."""
        return self.parameters()

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """Keep the statistics in float32 at least."""
        with wide_buffers(self, self.statistics):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _changes(self) -> bool:
        """Whether passes may change state."""
        return self.training and not self.frozen

    def _records(self) -> bool:
        """Whether a training pass puts anything into buffers."""
        return not self.frozen and type(self).record is not Quantizer.record

    def _remembered(self) -> Iterator[Tensor]:
        """The buffers that training passes change."""
        return self.buffers()

    def _all_quantizers(self) -> Iterator[Quantizer]:
        return (module for module in self.modules() if isinstance(module, Quantizer))

    def _check_latents(self, latents: Tensor) -> None:
        """Refuse latents that do not fit."""
        require_rank("latents", latents, (2, 3, 4, 5), LATENT_SHAPES[self.channel_dim])
        require_floating("latents", latents)
        axis = 1 if self.channel_dim == 1 else latents.ndim - 1
        other = -1 if self.channel_dim == 1 else 1
        if latents.shape[axis] != self.code_dim and latents.shape[other] == self.code_dim:
            expected = f"code_dim={self.code_dim}, as axis {other} is"
            require(False, f"latents axis {axis}", expected, f"{latents.shape[axis]}; pass channel_dim={other}")
        require_axis("latents", latents, axis, self.code_dim, "code_dim")
        if self.reference is not None:
            require_device("latents", latents, self.reference.device, "quantizer")
        # Half precision is computed in float32, which a codebook in float64 does not fit.
        widened = latents.dtype in HALF and self.dtype != torch.float64
        if self.dtype is not None and latents.dtype != self.dtype and not widened:
            raise TypeError(
                f"latents must be {self.dtype} as the quantizer, got {latents.dtype}; convert one of the two."
            )

    def _kept(self, latents: Tensor, mask: Tensor | None) -> Tensor | None:
        """(N, 1) bool, the rows that count; refuse a mask that does not fit."""
        if mask is None:
            return None
        grid = grid_of(latents, self.channel_dim)
        require_mask("mask", mask, grid, latents.device, "latents without their channel axis")
        return mask.reshape(-1, 1)

    def _rows(self, latents: Tensor, kept: Tensor | None = None) -> Rows:
        rows = to_rows(latents, self.channel_dim, self.nonfinite, kept)
        return rows._replace(vectors=self.project(rows.vectors), searchable=self.project(rows.searchable))

    def _counted(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        """(B, C, h, w) -> (·, C), the checked and projected vectors that count, at least float32."""
        self._check_latents(latents)
        kept = self._kept(latents, mask)
        with full_precision(latents.device):
            return self._rows(latents, kept).counted

    @torch.no_grad()
    def _encode(self, latents: Tensor, mask: Tensor | None, search: Callable[[Rows], Tensor]) -> Tensor:
        """The indices that ``search`` finds, laid out."""
        # Nothing is recorded here, but what is pending has not been applied.
        refuse_training_export(self._changes(), "a quantizer")
        self._check_latents(latents)
        kept = self._kept(latents, mask)
        with full_precision(latents.device):
            rows = self._rows(latents, kept)
            indices = search(rows)
        if kept is not None:
            indices = _without_masked(indices, kept)
        return self._lay_out_indices(indices, rows.grid)

    def _codes_of(self, indices: Tensor) -> Tensor:
        """:meth:`look_up`, and zero where an index is -1."""
        used = indices >= 0
        if not may_be_true(~used):
            return self.look_up(indices)
        if self.num_quantizers is not None:
            used = used.all(-1)
        return torch.where(used.unsqueeze(-1), self.look_up(indices.clamp_min(0)), 0.0)

    def _loss_terms(self, rows: Rows, indices: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name, without any collective.

        Args:
            rows: the projected latents.
            indices: (N,) or (N, Q); -1 only where rows have no weight.
        """
        indices = indices.clamp_min(0)
        return self.losses(rows, self.look_up(indices), indices)._asdict()

    def _require_writable(self, method: str) -> None:
        """Refuse to let ``method`` write to what must not, or cannot, be written to."""
        if self.frozen:
            raise RuntimeError(f"{method} must be called on a quantizer that is not frozen, got a frozen one.")

    def _lay_out_indices(self, indices: Tensor, grid: tuple[int, ...]) -> Tensor:
        return indices.view(*grid, *indices.shape[1:])

    def _lay_out_codes(self, codes: Tensor) -> Tensor:
        """(..., C) codes that were looked up, in the quantizer's dtype and layout."""
        if self.dtype is not None:
            codes = codes.to(self.dtype)
        return codes if self.channel_dim == -1 else codes.movedim(-1, 1).contiguous()

    def _check_indices(self, indices: Tensor) -> Tensor:
        """Refuse what no code belongs to; return the indices as int64."""
        require_integer_tensor("indices", indices)
        if self.num_quantizers is None:
            require_rank("indices", indices, (1, 2, 3, 4), "(N,), (B, T), (B, h, w) or (B, d, h, w)")
        else:
            require_rank("indices", indices, (2, 3, 4, 5), "(N, Q), (B, T, Q), (B, h, w, Q) or (B, d, h, w, Q)")
            stages, shape = indices.shape[-1], tuple(indices.shape)
            expected = f"1 to num_quantizers={self.num_quantizers}"
            fits = 1 <= stages <= self.num_quantizers
            require(fits, f"indices axis {indices.ndim - 1}", expected, f"{stages} (indices shape {shape})")
        if self.reference is not None:
            require_device("indices", indices, self.reference.device, "quantizer")
        # A negative index would silently count from the end.
        return require_in_range("indices", indices.long(), self.num_codes, "num_codes", NO_CODE)


def _without_masked(indices: Tensor, kept: Tensor) -> Tensor:
    """(N,) or (N, Q) indices, -1 where (N, 1) says that a row does not count."""
    return torch.where(kept if indices.ndim > 1 else kept.squeeze(1), indices, NO_CODE)
