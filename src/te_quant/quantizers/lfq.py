"""Lookup-free quantization: the sign of every channel is one bit of the index.

Shape letters: B batch, C channels, h w token grid, K = 2^C codes, N = B*h*w latent vectors.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from te_quant._checks import require, require_int, require_number, require_type
from te_quant._constants import constant
from te_quant._precision import unit_rows
from te_quant.quantizers._entropy import assignment_entropy, missing_entropy
from te_quant.quantizers._losses import distance_losses
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._tensor_free import TensorFreeQuantizer
from te_quant.quantizers.base import Losses, NonfiniteMode, Quantized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LFQ", "MAX_CODE_DIM"]

MAX_CODE_DIM = 62
"""Indices below 2^62 and all that is computed from them fit into int64."""

# 2^24 probabilities are 64 MiB in float32, and as much again for their gradient.
_MAX_JOINT = 24


def _check_options(
    *,
    code_dim: int,
    commitment_weight: object,
    entropy_weight: object,
    diversity_weight: object,
    temperature: object,
    entropy_group_dim: object,
    spherical: object,
) -> dict[str, Any]:
    """Refuse options that are out of range or contradict each other; return them as they are stored."""
    commitment_weight = require_number("commitment_weight", commitment_weight, 0.0)
    entropy_weight = require_number("entropy_weight", entropy_weight, 0.0)
    diversity_weight = require_number("diversity_weight", diversity_weight, 0.0)
    temperature = require_number("temperature", temperature, 0.0)
    require(temperature > 0, "temperature", "a finite number > 0", repr(temperature))
    require_type("spherical", spherical, bool, "a bool")
    if entropy_group_dim is not None:
        entropy_group_dim = require_int("entropy_group_dim", entropy_group_dim, 1, min(code_dim, _MAX_JOINT))
    diverse = entropy_weight > 0 and diversity_weight > 0
    joint = code_dim <= _MAX_JOINT or not diverse or entropy_group_dim is not None
    require(
        joint,
        "entropy_group_dim",
        f"an int <= {_MAX_JOINT} for the entropies of code_dim={code_dim} channels",
        None,
    )
    return {
        "commitment_weight": float(commitment_weight),
        "entropy_weight": float(entropy_weight),
        "diversity_weight": float(diversity_weight),
        "temperature": float(temperature),
        "entropy_group_dim": entropy_group_dim,
        "spherical": spherical,
    }


class LFQ(TensorFreeQuantizer):
    """Replace each channel by its sign: codes are the corners {-1, 1}^C of a cube, or of one in the unit sphere.

    There is no codebook, so nothing is looked up, learnt or remembered. That the corners are used evenly is asked
    for in the loss: ``regularization_loss`` is

        entropy_weight · (E[H(q(c|z))] + diversity_weight · (log K - H(E[q(c|z)]))),

    with the soft assignment q(c|z) ∝ exp(-‖z - c‖² / (2 · temperature)). The first term wants every latent near
    one corner, the second all corners used alike; both are in nats, >= 0, and zero at their optimum. To see which
    codes are used, count the indices with :class:`~te_quant.CodebookUsage`. :meth:`loss_terms` returns the two
    terms apart, as ``"entropy"`` and ``"diversity"``.

    ``LFQ(code_dim, spherical=True)`` is binary spherical quantization (BSQ): latents are scaled to unit length
    before everything else, and the codes are {-1/√C, 1/√C}^C, so that latents and codes lie on one sphere.

    Args:
        code_dim: C = log2 K, from 1 to 62. 18 in the paper.
        commitment_weight: β of the commitment term ‖z - sg(c)‖², >= 0.
        entropy_weight: of both entropy terms, >= 0.
        diversity_weight: of the second relative to the first, >= 0; 1 in the paper.
        temperature: of the soft assignment, > 0, in squared units of the latents; as in ``VectorQuantizer``.
        entropy_group_dim: None takes the entropy of the mean assignment over all K codes exactly, which holds K
            numbers and so wants C <= 24. Otherwise channels are grouped, so many at a time, and log K - H becomes
            the sum over the groups: what is missing within groups but not what they share, hence never more.
            Without effect while ``entropy_weight`` or ``diversity_weight`` is 0, so a schedule may start or end
            there.
        spherical: latents and codes have unit length. The temperature is then in squared units of that sphere.
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
        nonfinite: what to do about NaN and infinite latents, as for :class:`~te_quant.VectorQuantizer`. Vectors
            that are skipped are quantized as if zero. Under ``"off"`` NaN becomes -1.
        process_group: while training, the mean assignment is that over all its processes. ``None`` is
            torch.distributed's default group, looked up at each call, and only this process when there is none.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, of the module's dtype or in half precision,
            which is computed in float32. As for a module with weights, that dtype is torch's default when it is
            built, and follows ``half()`` or ``double()``. Only a module in float64 takes no half precision.
        quantized: as latents, -1 or 1, or ±1/√C if spherical. codes: the same in the module's dtype. indices: the
            latents' shape without the channel axis, int64 in [0, K), or -1 where masked. losses: ().

    Attributes:
        num_codes: number of codes, K.

    Raises:
        ValueError: an option is out of range, axis ``channel_dim`` of latents is not C, the rank or device does
            not fit, or latents are not finite.
        TypeError: latents are not floating point, or of another dtype than the module and not in half precision.

    Source: Yu et al. 2023, arXiv:2310.05737 (MAGVIT-v2), Eq. 3 (sign, zero counting as -1), Eq. 4 (index =
        Σ_i 2^(i-1)·[z_i > 0], so the first channel is the lowest bit) and Eq. 5 (entropy terms). Differs: log K is
        added, so that no term is negative; the entropies are exact where memory allows, see
        :mod:`te_quant.quantizers._entropy`. ``spherical``: Zhao et al. 2024, arXiv:2406.07548 (BSQ). Differs: the
        commitment term is the mean over the channels, not their sum.

    Example:
        >>> from te_quant import LFQ
        >>> quantizer = LFQ(code_dim=3, entropy_weight=0.0)
        >>> quantizer(torch.tensor([[0.3, -1.2, 2.0]])).indices  # bits 1, 0, 1, the lowest first
        tensor([5])
    """

    _checks = (*TensorFreeQuantizer._checks, _check_options)
    _fixed = (*TensorFreeQuantizer._fixed, "spherical")

    commitment_weight: float
    entropy_weight: float
    diversity_weight: float
    temperature: float
    entropy_group_dim: int | None
    spherical: bool

    # Each level halves the size of the codes, as binary digits do.
    residual_scale = 0.5

    def __init__(
        self,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        temperature: float = 0.01,
        entropy_group_dim: int | None = None,
        spherical: bool = False,
        channel_dim: int = 1,
        nonfinite: NonfiniteMode | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        code_dim = require_int("code_dim", code_dim, 1, MAX_CODE_DIM)
        super().__init__(
            2**code_dim, code_dim, channel_dim=channel_dim, nonfinite=nonfinite, process_group=process_group
        )
        self._set_options(
            partial(_check_options, code_dim=code_dim),
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            diversity_weight=diversity_weight,
            temperature=temperature,
            entropy_group_dim=entropy_group_dim,
            spherical=spherical,
        )

    def search(self, rows: Rows) -> Tensor:
        """Return the index of each row; zero counts as -1."""
        return self._pack(rows.searchable > 0)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the corners of ``indices``."""
        return self._codes(indices.unsqueeze(-1) // self._place_values(indices) % 2)

    def project(self, vectors: Tensor) -> Tensor:
        """Scale to unit length if ``spherical``."""
        return unit_rows(vectors) if self.spherical else vectors

    def losses(self, rows: Rows, codes: Tensor, indices: Tensor) -> Losses:  # noqa: ARG002
        """Return the commitment term, and the entropies as regularization; no index is needed."""
        losses = distance_losses(rows, codes, self.commitment_weight, codebook_follows=False)
        if not self.entropy_weight:
            return losses
        penalty, diversity = self._entropies(rows, self._group.resolve() if self.training else None)
        if diversity is not None:
            penalty = penalty + diversity
        return losses._replace(regularization=self.entropy_weight * penalty)

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:  # noqa: ARG002
        """Quantize; only the entropy terms of several processes differ between training and evaluation."""
        bits = rows.searchable > 0
        codes = self._codes(bits).to(rows.vectors.dtype)
        losses = self.losses(rows, codes, bits)
        return Quantized(
            surrogate=rows.vectors,
            indices=self._pack(bits),
            codes=codes,
            losses=losses,
        )

    def _codes(self, bits: Tensor) -> Tensor:
        # -1 + 2·bit in one operation; on a CPU looking the two values up costs more.
        below = constant(_below, dtype=self.dtype, device=bits.device)
        corners = torch.add(below, bits.to(self.dtype), alpha=2)
        if self.spherical:
            corners = corners * constant(float, self._size, dtype=self.dtype, device=bits.device)
        return corners

    def _pack(self, bits: Tensor) -> Tensor:
        """(N, C) -> (N,)."""
        return (bits.long() * self._place_values(bits)).sum(1)

    def _place_values(self, like: Tensor) -> Tensor:
        """What each bit adds to the index, (C,) int64 where ``like`` is; ONNX has no bit shifts of int64."""
        return constant(_powers, self.code_dim, dtype=torch.int64, device=like.device)

    def _loss_terms(self, rows: Rows, indices: Tensor) -> dict[str, Tensor]:
        codes = self.look_up(indices.clamp_min(0)).to(rows.vectors.dtype)
        distances = distance_losses(rows, codes, self.commitment_weight, codebook_follows=False)
        nothing = torch.zeros_like(distances.codebook)
        terms = {
            "codebook": distances.codebook,
            "commitment": distances.commitment,
            "entropy": nothing,
            "diversity": nothing,
        }
        if self.entropy_weight:
            entropy, diversity = self._entropies(rows, None)
            terms["entropy"] = self.entropy_weight * entropy
            if diversity is not None:
                terms["diversity"] = self.entropy_weight * diversity
        return terms

    def _entropies(self, rows: Rows, group: ProcessGroup | None) -> tuple[Tensor, Tensor | None]:
        """E[H(q)] and, if it has a weight, diversity_weight · (log K - H(E[q]))."""
        # ‖z - c‖² is -2·z·c and a constant, so exp(-‖z - c‖² / 2T) ∝ exp(z·c / T).
        logits = rows.vectors * (2 * self._size / self.temperature)
        entropy = assignment_entropy(logits, rows.weights)
        if not self.diversity_weight:
            return entropy, None
        parts = logits.split(self.entropy_group_dim or self.code_dim, dim=1)
        missing = [missing_entropy(part, rows.weights, group) for part in parts]
        return entropy, self.diversity_weight * torch.stack(missing).sum()

    @property
    def _size(self) -> float:
        """The absolute value of each channel of a code."""
        return float(self.code_dim**-0.5) if self.spherical else 1.0


def _powers(count: int) -> list[int]:
    return [2**place for place in range(count)]


def _below() -> float:
    """The value of a bit that is not set."""
    return -1.0
