"""One number a token, whatever the quantizer: Q indices in [0, K) are one combination in [0, K^Q).

Shape letters: B images, h w token grid, K codes a codebook, Q codebooks.
"""

from __future__ import annotations

from torch import Tensor, nn

from examples.te_vqgan.runs.checks import require

__all__ = ["joint_indices", "num_combinations"]


def num_combinations(quantizer: nn.Module) -> int:
    """Return K^Q, or K of a quantizer with one index a token.

    Raises:
        ValueError: its indices are not all in [0, K), as it drops codebooks.
    """
    codes, quantizers = _sizes(quantizer)
    return int(codes ** (quantizers or 1))


def joint_indices(indices: Tensor, quantizer: nn.Module) -> Tensor:
    """(B, h, w) as it is, or (B, h, w, Q) to (B, h, w): the first codebook changes fastest."""
    codes, quantizers = _sizes(quantizer)
    if quantizers is None:
        return indices
    return (indices * indices.new_tensor([codes**place for place in range(quantizers)])).sum(-1)


def _sizes(quantizer: nn.Module) -> tuple[int, int | None]:
    dropped = getattr(quantizer, "quantizer_dropout", False)
    require(not dropped, "quantizer_dropout", "False where combinations are counted", dropped)
    codes, quantizers = getattr(quantizer, "num_codes", None), getattr(quantizer, "num_quantizers", None)
    if not isinstance(codes, int) or not isinstance(quantizers, int | None):
        raise TypeError(f"quantizer must have an int num_codes, got {type(quantizer).__name__}.")
    return codes, quantizers
