"""Blur layers in place of those of antialiased-cnns and timm: their weights load, and images are the same."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant.layers import BlurPool2d
from tests.helpers import exactly

MODES = {"reflect": "reflect", "repl": "replicate", "zero": "zeros"}


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pad", MODES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_it_computes_what_antialiased_cnns_does(size: int, pad: str, stride: int) -> None:
    """Every size and padding, odd and even sides, with their weights loaded strictly."""
    theirs = pytest.importorskip("antialiased_cnns").BlurPool(3, pad_type=pad, filt_size=size, stride=stride)
    ours = BlurPool2d(channels=3, kernel_size=size, stride=stride, padding_mode=MODES[pad])
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 11, 14)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_whole_network_of_antialiased_cnns_goes_on() -> None:
    """A ResNet with its blur layers replaced loads strictly and says the same."""
    theirs = pytest.importorskip("antialiased_cnns").resnet18(pretrained=False, filter_size=4).eval()
    ours = copy.deepcopy(theirs)
    for parent in list(ours.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "BlurPool":
                setattr(parent, name, BlurPool2d(kernel_size=4, stride=child.stride, padding_mode="reflect"))
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    assert sum(isinstance(module, BlurPool2d) for module in ours.modules()) > 3
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def layout(kernel: Tensor, channels: int = 3) -> dict[str, Tensor]:
    """The names and shapes of a published file: a convolution, then a blur."""
    taps = kernel / kernel.sum()
    return {
        "0.weight": torch.randn(channels, 2, 1, 1),
        "0.bias": torch.randn(channels),
        "1.filt": torch.outer(taps, taps).repeat(channels, 1, 1, 1),
    }


def network(**options: Any) -> nn.Sequential:
    """What the layout belongs to."""
    return nn.Sequential(nn.Conv2d(2, 3, 1), BlurPool2d(kernel_size=4, **options))


BINOMIAL = torch.tensor([1.0, 3.0, 3.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_is_dropped(dtype: torch.dtype) -> None:
    """The rest is loaded; the caller's state dict and the layer's own stay as they were."""
    state = {name: tensor.to(dtype) for name, tensor in layout(BINOMIAL).items()}
    ours = network(channels=3)
    ours.load_state_dict(state)
    assert torch.equal(ours[0].weight, state["0.weight"].float())
    assert "1.filt" in state
    assert list(ours.state_dict()) == ["0.weight", "0.bias"]


def test_an_own_state_still_loads() -> None:
    """Without any kernel."""
    network().load_state_dict(network().state_dict())


@pytest.mark.parametrize(
    "state",
    [
        layout(torch.tensor([1.0, 2.0, 2.0, 1.0])),
        layout(torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])),
        layout(BINOMIAL) | {"1.filt": torch.ones(4, 4) / 16},
        layout(BINOMIAL) | {"1.filt": layout(BINOMIAL, 4)["1.filt"]},
    ],
    ids=["other taps", "other size", "other rank", "other channels"],
)
def test_another_kernel_is_refused(state: dict[str, Tensor]) -> None:
    """By its name; an image would change silently."""
    shape = tuple(state["1.filt"].shape)
    message = f"1.filt must be the binomial kernel of 4 taps for each channel, got another of shape {shape}."
    with pytest.raises(RuntimeError, match=message.replace("(", r"\(").replace(")", r"\)")):
        network(channels=3).load_state_dict(state)


def create_aa(aa_layer: Any, channels: int, stride: int) -> nn.Module:
    """How timm builds the layer that a user chose."""
    made: nn.Module = aa_layer(channels=channels, stride=stride)
    return made


@pytest.mark.parametrize("aa_layer", [BlurPool2d, partial(BlurPool2d, kernel_size=3, padding_mode="reflect")])
def test_it_is_an_aa_layer_of_timm(aa_layer: Any) -> None:
    """As a class, or with options."""
    layer = create_aa(aa_layer, channels=6, stride=2)
    assert layer(torch.rand(1, 6, 8, 8)).shape == (1, 6, 4, 4)


def test_other_channels_are_refused() -> None:
    """Where the layer was told how many there are."""
    message = "images axis 1 must be channels=6, got 5 (images shape (1, 5, 8, 8))."
    with pytest.raises(ValueError, match=exactly(message)):
        BlurPool2d(channels=6)(torch.rand(1, 5, 8, 8))


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        (0, ValueError, "channels must be an int >= 1, got 0."),
        ("3", TypeError, "channels must be an int >= 1, got '3'."),
    ],
)
def test_channels_out_of_range_are_refused(channels: Any, error: type[Exception], message: str) -> None:
    """As every size."""
    with pytest.raises(error, match=exactly(message)):
        BlurPool2d(channels=channels)
