"""Compiled code computes the same gradients in bfloat16: an error there is silent, since losses still fall."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from examples.te_vqgan.stage1.presets import PRESETS
from te_quant import VQAutoencoder

# The example's network, as narrow and shallow as it goes: the fault does not show in single layers.
CONFIG = dataclasses.replace(
    PRESETS["small"].model,
    base_channels=8,
    channel_multipliers=(1, 1),
    attention_levels=(),
    norm_groups=4,
    num_codes=16,
    code_dim=16,
)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
def test_the_decoder_passes_on_the_gradient_of_eager_mode() -> None:
    """In direction and size: no farther from float32 than a few times eager mode's own rounding.

    torch 2.13 gives everything before an interpolation among the convolutions a gradient of zero, and that is more
    than forty times as far off.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = VQAutoencoder(CONFIG).train().decoder
        latents, images = torch.randn(4, 16, 16, 16), torch.rand(4, 3, 32, 32) * 2 - 1

    def gradients(*, bf16: bool, compiled: bool = False) -> dict[str, torch.Tensor]:
        torch.compiler.reset()
        decoder.zero_grad()
        inputs = latents.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = (torch.compile(decoder) if compiled else decoder)(inputs)
        (output.float() - images).square().mean().backward()
        named = {"latents": inputs, **dict(decoder.named_parameters())}
        return {name: tensor.grad.clone() for name, tensor in named.items() if tensor.grad is not None}

    exact, eager, compiled = gradients(bf16=False), gradients(bf16=True), gradients(bf16=True, compiled=True)
    assert exact.keys() == eager.keys() == compiled.keys() == {"latents", *dict(decoder.named_parameters())}
    for names in (["latents"], sorted(exact.keys() - {"latents"})):
        expected, rounded, found = (
            torch.cat([grads[name].flatten() for name in names]) for grads in (exact, eager, compiled)
        )
        assert float((found - expected).norm()) < 3 * float((rounded - expected).norm()), names
