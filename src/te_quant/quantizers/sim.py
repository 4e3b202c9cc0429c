"""Vector quantization with a frozen random codebook behind one learnt linear map.

Shape letters: B batch, C code size, h w token grid, K codes, N = B*h*w latent vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require_choice, require_generator, require_number
from te_quant._execution import gathered
from te_quant._precision import full_precision, widen
from te_quant._search import search_codes
from te_quant.quantizers._losses import SURROGATES, GradientEstimator, distance_losses
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._update import Batch, CodebookState, complete, move, record
from te_quant.quantizers.base import Losses, NonfiniteMode, Quantized, Quantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SimVQ"]


def _check_options(*, commitment_weight: object, gradient_estimator: object, decay: object) -> dict[str, Any]:
    """Refuse options that are out of range; return them as they are stored."""
    commitment_weight = require_number("commitment_weight", commitment_weight, 0.0)
    require_choice("gradient_estimator", gradient_estimator, SURROGATES)
    decay = require_number("decay", decay, 0.0, below=1.0)
    return {
        "commitment_weight": float(commitment_weight),
        "gradient_estimator": gradient_estimator,
        "decay": float(decay),
    }


class SimVQ(Quantizer):
    """Replace each latent vector by its nearest code, all codes being moved together by one matrix.

    In an ordinary codebook only the codes that were chosen get a gradient; the others stay behind and die. Here
    code k is ``coefficients[k] @ basis``, the coefficients random and fixed, the basis learnt: the gradient of a
    chosen code moves all of them.

    Args:
        num_codes: K, at least 1.
        code_dim: C, at least 1.
        commitment_weight: β of the commitment term ‖z - sg(e)‖², >= 0. The codebook term has weight 1.
        gradient_estimator: ``"straight_through"`` or ``"rotation_trick"``: how the gradient passes to the
            latents.
        decay: of the moving average ``usage``, in [0, 1).
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
        nonfinite: what to do about NaN and infinite latents, as for :class:`~te_quant.VectorQuantizer`.
        process_group: the processes over which ``usage`` is summed. ``None`` is torch.distributed's default
            group, looked up at each call, and only this process when there is none.
        generator: randomness of the coefficients; the global one if ``None``.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, of the basis's dtype or in half precision,
            which is computed in float32.
        quantized: as latents, in their memory format, contiguous or channels-last. codes: the same in the basis's
            dtype. indices: the latents' shape without the channel axis, int64 in [0, K), or -1 where masked.
            losses: ().

    Attributes:
        coefficients: (K, C) buffer, normal with variance 1/C, never changed.
        basis: (C, C) parameter, the identity at first.
        usage: (K,) moving average of how often each code is used, starting at 1.
        pending_counts: (K,), what training passes have counted since ``usage`` moved; the next one moves it.

    Raises:
        ValueError: an option is out of range, axis ``channel_dim`` of latents is not C, the rank or device does
            not fit, or latents are not finite.
        TypeError: latents are not floating point, or of another dtype than the basis and not in half precision.

    Source: Zhu et al. 2024, arXiv:2411.02038, Section 4 (e = C·W with C frozen, and the loss of van den Oord et
        al. 2017, arXiv:1711.00937, Eq. 3, on it). Differs: the basis starts at the identity, not at a random
        matrix, which would only rotate and shrink codes that are random already.

    Example:
        >>> from te_quant import SimVQ
        >>> quantizer = SimVQ(num_codes=1024, code_dim=8)
        >>> quantizer(torch.randn(2, 8, 4, 4)).indices.shape
        torch.Size([2, 4, 4])
        >>> [name for name, _ in quantizer.named_parameters()]
        ['basis']
    """

    statistics = ("usage", "pending_counts")
    _checks = (*Quantizer._checks, _check_options)

    commitment_weight: float
    gradient_estimator: GradientEstimator
    decay: float
    coefficients: Tensor
    usage: Tensor
    pending_counts: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
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
        require_generator(generator)
        self._set_options(
            _check_options,
            commitment_weight=commitment_weight,
            gradient_estimator=gradient_estimator,
            decay=decay,
        )
        initial = torch.empty(num_codes, code_dim).normal_(std=code_dim**-0.5, generator=generator)
        self.register_buffer("coefficients", initial)
        self.basis = nn.Parameter(torch.eye(code_dim))
        self.register_buffer("usage", widen(torch.ones(num_codes)))
        self.register_buffer("pending_counts", torch.zeros_like(self.usage))

    @property
    def codebook(self) -> Tensor:
        """(K, C), the codes as they are now, at least float32; differentiable in the basis."""
        basis = gathered(self.basis.detach() if self.frozen else self.basis)
        with full_precision(basis.device):
            return widen(self.coefficients) @ widen(basis)

    @property
    def reference(self) -> Tensor:
        """The basis."""
        return self.basis

    def search(self, rows: Rows) -> Tensor:
        """Return the nearest code of each row."""
        return search_codes(rows.searchable, self.codebook)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the codes of ``indices``; differentiable in the basis."""
        # A product with the rows of these indices alone would be cheaper, but may round otherwise than forward's.
        return F.embedding(indices, self.codebook)

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:  # noqa: ARG002
        """Return both distances."""
        return distance_losses(rows, codes, self.commitment_weight, codebook_follows=True)

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:  # noqa: ARG002
        """Quantize; nothing is drawn at random."""
        table = self.codebook
        indices = search_codes(rows.searchable, table)
        codes = F.embedding(indices, table)
        losses = self.losses(rows, codes, indices)
        surrogate = SURROGATES[self.gradient_estimator](rows.vectors, codes)
        return Quantized(surrogate=surrogate, indices=indices, codes=codes, losses=losses, table=table)

    def record(self, rows: Rows, result: Quantized) -> None:
        """Add the counts to what is pending."""
        record([Batch(self._state(), rows, result.indices)], self._group.resolve())

    @torch.no_grad()
    def apply_pending(self) -> None:
        """Move the statistics by what is pending; see the base class."""
        if not self.frozen:
            move(self._state(), decay=self.decay)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Where a state does not say what is pending, nothing is."""
        complete(state_dict, prefix, self._state(), self.basis)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _remembered(self) -> Iterator[Tensor]:
        return iter((self.usage, self.pending_counts))

    def _state(self) -> CodebookState:
        return CodebookState(None, self.usage, self.pending_counts)
