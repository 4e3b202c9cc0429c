"""What type checkers see in a call of a quantizer or a model; never run."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

from te_quant import (
    FSQ,
    LFQ,
    AutoencoderOutput,
    ProductQuantizer,
    Quantizer,
    QuantizerOutput,
    ResidualVectorQuantizer,
    SimVQ,
    VectorQuantizer,
    VQAutoencoder,
)


def calls(
    base: Quantizer,
    vector: VectorQuantizer,
    residual: ResidualVectorQuantizer,
    product: ProductQuantizer,
    fsq: FSQ,
    lfq: LFQ,
    sim: SimVQ,
    model: VQAutoencoder,
    latents: Tensor,
) -> None:
    """Hold the types of outputs."""
    assert_type(base(latents), QuantizerOutput)
    assert_type(vector(latents), QuantizerOutput)
    assert_type(residual(latents), QuantizerOutput)
    assert_type(product(latents), QuantizerOutput)
    assert_type(residual.encode(latents, num_quantizers=1), Tensor)
    assert_type(residual.decode_levels(residual.encode(latents)), tuple[Tensor, ...])
    assert_type(base.loss_terms(latents, latents), dict[str, Tensor])
    assert_type(fsq(latents), QuantizerOutput)
    assert_type(lfq(latents), QuantizerOutput)
    assert_type(sim(latents), QuantizerOutput)
    assert_type(vector.freeze(), VectorQuantizer)
    assert_type(base.decode(base.encode(latents)), Tensor)
    assert_type(model(latents), AutoencoderOutput)
    assert_type(model.quantizer, Quantizer)
