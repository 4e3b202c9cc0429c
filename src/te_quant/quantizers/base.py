"""The one value every quantizer returns, in training and in evaluation alike."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["QuantizerOutput"]


class QuantizerOutput(NamedTuple):
    """What a quantizer computed; the same fields in training and in evaluation.

    The three terms are already weighted, so ``loss`` is exactly their sum and a term whose weight is zero
    is zero.

    Attributes:
        quantized: the codes, with a gradient path to the latents; shape and layout of the latents.
        indices: the chosen codes, int64 in [0, K); shape of the latents without the channel axis. A
            :class:`~te_quant.ResidualVectorQuantizer` puts the axis of its Q codebooks last.
        loss: (), ``codebook_loss + commitment_loss + regularization_loss``.
        codebook_loss: (), moves the codes towards the latents. Zero where the codebook is not learnt by
            gradient.
        commitment_loss: (), moves the latents towards the codes.
        regularization_loss: (), what is asked of the codebook or of its use, >= 0 and zero at the optimum: the
            orthogonality penalty of :class:`~te_quant.VectorQuantizer` and
            :class:`~te_quant.ResidualVectorQuantizer`, the entropy terms of :class:`~te_quant.LFQ`.
        codes: the codes without gradient; bit-equal to ``decode(indices)``.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    regularization_loss: Tensor
    codes: Tensor
