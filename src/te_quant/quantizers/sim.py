"""Vector quantization with a frozen random codebook behind one learnt linear map.

Shape letters: B batch, C code size, h w token grid, K codes, N = B*h*w latent vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant._checks import require_choice, require_generator, require_int, require_number, require_type
from te_quant._precision import full_precision, wide_buffers, widen
from te_quant._search import search_codes
from te_quant.functional import rotation_trick, straight_through
from te_quant.quantizers._distributed import GroupReference
from te_quant.quantizers._losses import distance_losses
from te_quant.quantizers._rows import Layout
from te_quant.quantizers._state import CodebookState, observe
from te_quant.quantizers.base import QuantizerOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SimVQ"]


class SimVQ(nn.Module):
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
            group, looked up at each call, and this process alone when there is none.
        generator: randomness of the coefficients; the global one if ``None``.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, floating point, of the basis's dtype; under
            autocast also half precision, which is computed in float32.
        quantized, codes: as latents. indices: the latents' shape without the channel axis, int64 in [0, K).
        losses: ().

    Attributes:
        coefficients: (K, C) buffer, normal with variance 1/C, never changed.
        basis: (C, C) parameter, the identity at first.
        usage: (K,) moving average of how often each code is used, starting at 1.

    Raises:
        ValueError: an option is out of range, axis ``channel_dim`` of latents is not C, the rank or device does
            not fit, or latents are not finite.
        TypeError: latents are not floating point, or of another dtype than the basis.

    Source: Zhu et al. 2024, arXiv:2411.02038, Section 4 (e = C·W with C frozen, and the loss of van den Oord et
        al. 2017, arXiv:1711.00937, Eq. 3, on it). Differs: the basis starts at the identity, not at a random
        matrix, which would only rotate and shrink codes that are random already.
    """

    coefficients: Tensor
    usage: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
        gradient_estimator: Literal["straight_through", "rotation_trick"] = "straight_through",
        decay: float = 0.99,
        channel_dim: int = 1,
        nonfinite: Literal["raise", "skip", "off"] | None = None,
        process_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_int("num_codes", num_codes, 1)
        require_int("code_dim", code_dim, 1)
        require_number("commitment_weight", commitment_weight, 0.0)
        require_choice("gradient_estimator", gradient_estimator, ("straight_through", "rotation_trick"))
        require_number("decay", decay, 0.0, below=1.0)
        require_generator(generator)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.commitment_weight = float(commitment_weight)
        self.gradient_estimator = gradient_estimator
        self.decay = float(decay)
        self.channel_dim = channel_dim
        self.nonfinite = nonfinite
        self.frozen = False
        self._layout = Layout(code_dim, channel_dim, nonfinite)
        self._group = GroupReference(process_group)
        initial = torch.empty(num_codes, code_dim).normal_(std=code_dim**-0.5, generator=generator)
        self.register_buffer("coefficients", initial)
        self.basis = nn.Parameter(torch.eye(code_dim))
        self.register_buffer("usage", torch.ones(num_codes))

    @property
    def codebook(self) -> Tensor:
        """(K, C), the codes as they are now, at least float32; differentiable in the basis."""
        with full_precision(self.basis.device):
            return widen(self.coefficients) @ widen(self.basis)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize ``latents``; while training also count the codes."""
        self._layout.check(latents, self.basis)
        with full_precision(latents.device):
            rows = self._layout.to_rows(latents)
            table = self.codebook
            chosen = search_codes(rows.searchable, table)
            if self.training and not self.frozen:
                state = CodebookState(table, self.usage, None)
                observe(state, rows, chosen, decay=self.decay, group=self._group.resolve())
            codes = F.embedding(chosen, table)
            codebook_loss, commitment_loss = distance_losses(
                rows, codes, self.commitment_weight, codebook_follows=True
            )
            estimate = rotation_trick if self.gradient_estimator == "rotation_trick" else straight_through
            nothing = torch.zeros_like(commitment_loss)
            quantized, dtype = estimate(rows.vectors, codes), self.basis.dtype
            terms = (codebook_loss, commitment_loss, nothing)
            return self._layout.output(latents, dtype, quantized, chosen, codes, *terms)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """The nearest code of each latent vector: indices only, no losses, no counting."""
        self._layout.check(latents, self.basis)
        with full_precision(latents.device):
            chosen = search_codes(self._layout.to_rows(latents).searchable, self.codebook)
        return self._layout.indices_from_rows(chosen, latents.shape)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of ``indices``, with C at ``channel_dim``; differentiable in the basis.

        Args:
            indices: (B, h, w), (B, N) or (N,), integer, in [0, K).

        Raises:
            ValueError: an index is negative or >= K, or the rank or device does not fit.
            TypeError: the indices are not integers.
        """
        indices = self._layout.check_indices(indices, self.basis.device, self.num_codes)
        # A product with the rows of these indices alone would be cheaper, but may round otherwise than forward's.
        codes = F.embedding(indices, self.codebook).to(self.basis.dtype)
        return codes if self.channel_dim == -1 else codes.movedim(-1, 1)

    def freeze(self, frozen: bool = True) -> SimVQ:
        """Stop (or resume) every change of state; as :meth:`te_quant.VectorQuantizer.freeze`."""
        require_type("frozen", frozen, bool, "a bool")
        self.frozen = frozen
        self.basis.requires_grad_(not frozen)
        if frozen:
            # An optimizer would still step on a gradient left behind.
            self.basis.grad = None
        return self

    def extra_repr(self) -> str:
        """The options that tell one quantizer from the next."""
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SimVQ:
        """Keep the statistics in float32 at least."""
        with wide_buffers(self, ("usage",)):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
