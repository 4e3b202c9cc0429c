"""What evaluation and training ask of a tokenizer's quantizer.

One number per token, whatever the quantizer: Q indices in [0, K) are one combination in [0, K^Q).

Shape letters: B images, h w token grid, K codes per codebook, Q codebooks.
"""

from __future__ import annotations

from torch import Tensor

from examples.te_vqgan.runs.checks import require
from te_quant import Quantizer, VectorQuantizer, VQAutoencoder

__all__ = ["joint_indices", "num_combinations", "vector_quantizer"]


def vector_quantizer(model: VQAutoencoder) -> VectorQuantizer:
    """Return the quantizer of an arm, which has a codebook.

    Raises:
        TypeError: the model has another quantizer.
    """
    if not isinstance(model.quantizer, VectorQuantizer):
        raise TypeError(f"quantizer must be a VectorQuantizer, got {type(model.quantizer).__name__}.")
    return model.quantizer


def num_combinations(quantizer: Quantizer) -> int:
    """Return K^Q, or K of a quantizer with one index per token.

    Raises:
        ValueError: its indices are not all in [0, K), as it drops codebooks.
    """
    _refuse_dropout(quantizer)
    return int(quantizer.num_codes ** (quantizer.num_quantizers or 1))


def joint_indices(indices: Tensor, quantizer: Quantizer) -> Tensor:
    """(B, h, w) as it is, or (B, h, w, Q) to (B, h, w): the first codebook changes fastest."""
    _refuse_dropout(quantizer)
    if quantizer.num_quantizers is None:
        return indices
    places = [quantizer.num_codes**place for place in range(quantizer.num_quantizers)]
    return (indices * indices.new_tensor(places)).sum(-1)


def _refuse_dropout(quantizer: Quantizer) -> None:
    dropped = quantizer.lowest_index < 0
    require(not dropped, "quantizer_dropout", "False where combinations are counted", dropped)
