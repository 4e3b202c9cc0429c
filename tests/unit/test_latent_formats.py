"""Latents in half precision, and in either memory format, through every quantizer.

Shape letters: B batch, C code size, h w token grid.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.quantizer_cases import QUANTIZERS, latents_for, mostly_slow

HALF = [torch.bfloat16, torch.float16]


def build(name: str, *, training: bool, **options: Any) -> Any:
    """The same quantizer at each call, with a codebook as wide as the latents."""
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name](**options).train(training)
    if hasattr(quantizer, "kmeans_init"):
        quantizer.kmeans_init(torch.randn(64, quantizer.code_dim), iterations=2)
    return quantizer


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", mostly_slow())
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype, training: bool) -> None:
    """Bit for bit what the same latents give in float32; only ``quantized`` and the gradient are rounded."""
    latents = latents_for(build(name, training=False), (3, -1, 4, 5)).to(dtype)
    outputs, gradients = [], []
    for given in (latents.clone().requires_grad_(), latents.float().requires_grad_()):
        quantizer = build(name, training=training)
        torch.manual_seed(1)
        output = quantizer(given)
        (output.loss + output.quantized.float().square().sum()).backward()
        outputs.append(output)
        gradients.append(given.grad)
    half, full = outputs
    assert half.quantized.dtype == dtype
    assert half.codes.dtype == full.codes.dtype
    assert gradients[0].dtype == dtype
    for field in ("indices", "codes", "loss", "codebook_loss", "commitment_loss", "regularization_loss"):
        assert torch.equal(getattr(half, field), getattr(full, field)), field
    assert torch.equal(half.quantized, full.quantized.to(dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", mostly_slow())
def test_half_precision_has_the_tokens_of_float32(name: str, dtype: torch.dtype) -> None:
    """Encoding, and the codes of the tokens, bit for bit."""
    quantizer = build(name, training=False)
    latents = latents_for(quantizer, (3, -1, 4, 5)).to(dtype)
    indices = quantizer.encode(latents)
    assert torch.equal(indices, quantizer.encode(latents.float()))
    codes = quantizer(latents).codes
    decoded = quantizer.decode(indices)
    assert decoded.dtype == codes.dtype == torch.float32
    assert torch.equal(decoded, codes)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(3, -1, 4, 5), (3, -1, 4), (7, -1), (2, -1, 2, 3, 2)], ids=len)
@pytest.mark.parametrize("name", mostly_slow())
def test_contiguous_latents_give_contiguous_codes(name: str, shape: tuple[int, ...], training: bool) -> None:
    """So that ``view`` and safetensors take them."""
    quantizer = build(name, training=training)
    output = quantizer(latents_for(quantizer, shape))
    assert output.quantized.is_contiguous()
    assert output.codes.is_contiguous()
    assert quantizer.decode(output.indices).is_contiguous()


@pytest.mark.parametrize("name", mostly_slow())
def test_latents_with_channels_behind_give_contiguous_codes(name: str) -> None:
    """Where the quantizer has the channels in the last axis."""
    quantizer = build(name, training=False, channel_dim=-1)
    output = quantizer(latents_for(quantizer, (3, 4, -1)))
    assert output.quantized.is_contiguous()
    assert output.codes.is_contiguous()
    assert quantizer.decode(output.indices).is_contiguous()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", mostly_slow())
def test_channels_last_latents_give_channels_last_codes(name: str, training: bool) -> None:
    """The values are those of contiguous latents, bit for bit."""
    latents = latents_for(build(name, training=False), (3, -1, 4, 5))
    outputs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        quantizer = build(name, training=training)
        torch.manual_seed(1)
        given = latents.contiguous(memory_format=memory_format).requires_grad_()
        output = quantizer(given)
        assert output.quantized.is_contiguous(memory_format=memory_format)
        assert output.codes.is_contiguous(memory_format=memory_format)
        outputs.append(output)
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
