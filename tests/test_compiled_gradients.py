"""Compiled code computes the same gradients in bfloat16: an error there is silent, since losses still fall."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from examples.te_vqgan.presets import PRESETS
from te_quant import VQAutoencoder

# The example's network, narrower: the fault did not show in single layers.
CONFIG = dataclasses.replace(PRESETS["small"].model, base_channels=8, norm_groups=4, num_codes=16, code_dim=16)


def gradients(
    model: VQAutoencoder, images: torch.Tensor, *, bf16: bool = True, compiled: bool = False
) -> dict[str, torch.Tensor]:
    """Of reconstruction error and quantizer's loss, by parameter, under bfloat16 autocast or not."""
    torch.compiler.reset()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = (torch.compile(model) if compiled else model)(images)
    ((output.reconstruction.float() - images).square().mean() + output.loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
def test_both_halves_have_the_gradient_of_eager_mode() -> None:
    """In direction and size: no farther from float32 than a few times eager mode's own rounding.

    torch 2.13 gives the decoder none through an interpolation among its convolutions, and the encoder one that is
    more than four times that far off.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQAutoencoder(CONFIG).train()
        images = torch.rand(4, 3, 32, 32) * 2 - 1
    exact, eager = gradients(model, images, bf16=False), gradients(model, images)
    compiled = gradients(model, images, compiled=True)
    assert exact.keys() == eager.keys() == compiled.keys() == dict(model.named_parameters()).keys()
    for half in ("encoder.", "decoder.", "quantizer."):
        expected, rounded, found = (
            torch.cat([grads[name].flatten() for name in exact if name.startswith(half)])
            for grads in (exact, eager, compiled)
        )
        assert float((found - expected).norm()) < 3 * float((rounded - expected).norm()), half
