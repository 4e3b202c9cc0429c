"""How a quantizer trains: the two distance terms of its loss, and the gradient that passes to the latents.

Shape letters: N latent vectors, C code size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from te_quant._execution import in_transform
from te_quant.functional import rotated_latents
from te_quant.quantizers._rows import Rows
from te_quant.quantizers.base import Losses

__all__ = ["SURROGATES", "GradientEstimator", "distance_losses"]

GradientEstimator: TypeAlias = Literal["straight_through", "rotation_trick"]
SURROGATES: dict[GradientEstimator, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": lambda latents, codes: latents,  # noqa: ARG005
    "rotation_trick": rotated_latents,
}
"""What the gradient of the codes passes straight through to, by name: latents, codes (N, C) -> (N, C)."""

# Elements that are looked at together on a CPU: 1 MiB of float32 stays in a core's cache.
_CHUNK = 1 << 18


def distance_losses(
    rows: Rows,
    codes: Tensor,
    commitment_weight: float,
    *,
    codebook_follows: bool,
    codebook_weight: float = 1.0,
) -> Losses:
    """Return the weighted codebook and commitment terms: mean squared differences over the rows that count.

    Args:
        rows: the latents.
        codes: of each row.
        commitment_weight: β.
        codebook_follows: whether the codebook takes gradients; its term is zero otherwise.
        codebook_weight: of the codebook term.

    Shape:
        codes: (N, C).

    Returns:
        The terms, each (), with a regularization of zero.

    Source: van den Oord et al. 2017, arXiv:1711.00937, Eq. 3.
    """
    vectors = rows.vectors
    counted = vectors.shape[0] if rows.weights is None else rows.weights.sum()
    # An empty batch has a loss of zero, not of 0/0.
    size = counted * vectors.shape[1] + (counted == 0)
    if torch.compiler.is_compiling() or in_transform():
        weights = vectors.new_ones(()) if rows.weights is None else rows.weights
        commitment = (weights * (vectors - codes.detach()).square()).sum() / size
        codebook = (weights * (vectors.detach() - codes).square()).sum() / size
    else:
        # Both have the same value.
        value = _sum_of_squares(vectors.detach(), codes.detach(), rows.weights) / size
        commitment = _Distance.apply(vectors, codes.detach(), rows.weights, size, value)  # type: ignore[no-untyped-call]
        codebook = _Distance.apply(codes, vectors.detach(), rows.weights, size, value)  # type: ignore[no-untyped-call]
    commitment, codebook = commitment_weight * commitment, codebook_weight * codebook
    nothing = torch.zeros_like(commitment)
    return Losses(
        codebook=codebook if codebook_follows else nothing, commitment=commitment, regularization=nothing
    )


def _sum_of_squares(vectors: Tensor, codes: Tensor, weights: Tensor | None) -> Tensor:
    rows, length = vectors.shape
    step = max(1, _CHUNK // length) if vectors.device.type == "cpu" else max(1, rows)
    total = vectors.new_zeros(())
    for row in range(0, rows, step):
        squares = (vectors[row : row + step] - codes[row : row + step]).square_()
        total += (
            squares.sum() if weights is None else (squares.sum(1, keepdim=True) * weights[row : row + step]).sum()
        )
    return total


class _Distance(torch.autograd.Function):
    """A mean square whose value is known, with its gradient to ``one``; plain code would keep the differences."""

    # With its own setup_context, which only transforms need, torch would inspect the signature at every call.
    @staticmethod
    def forward(
        ctx: Any, one: Tensor, other: Tensor, weights: Tensor | None, size: int | Tensor, value: Tensor
    ) -> Tensor:
        ctx.save_for_backward(one, other)
        ctx.weights, ctx.size = weights, size
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        one, other = ctx.saved_tensors
        scale = 2 * gradient / ctx.size
        # A product in place would hide the difference from a second derivative.
        times = torch.mul if torch.is_grad_enabled() else Tensor.mul_
        return times(one - other, scale if ctx.weights is None else scale * ctx.weights), None, None, None, None
