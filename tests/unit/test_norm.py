"""Normalization over the image and at every pixel, and which shifts they commute with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from te_quant.layers import NORMS, ChannelNorm, build_norm
from te_quant.shifts import fourier_shift
from tests.unit.grid_oracles import fresh, roll


def test_channel_norm_agrees_with_loops() -> None:
    """Pixel by pixel, with gain and offset; small inputs, so that the ε shows."""
    layer = ChannelNorm(5).double()
    layer.norm.weight.data, layer.norm.bias.data = fresh(5), fresh(5)
    images = 1e-3 * fresh(2, 5, 3, 4)
    expected = np.empty(images.shape)
    for b in range(2):
        for u in range(3):
            for v in range(4):
                pixel = images[b, :, u, v].numpy()
                spread = np.sqrt(((pixel - pixel.mean()) ** 2).mean() + 1e-6)
                expected[b, :, u, v] = (pixel - pixel.mean()) / spread
    expected = expected * layer.norm.weight.detach().numpy()[:, None, None]
    expected += layer.norm.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(layer(images).detach().numpy(), expected, atol=1e-12)


def test_only_channel_norm_keeps_a_change_where_it_is() -> None:
    """One pixel changed changes one pixel; GroupNorm, the negative control, tells all of them."""
    images = fresh(1, 4, 5, 6)
    other = images.clone()
    other[:, :, 2, 3] += fresh(4)
    for kind, reached in (("channel", 1), ("group", 30)):
        layer = build_norm(kind, 4, norm_groups=2).double()
        changed = (layer(other) != layer(images)).any(1)
        assert int(changed.sum()) == reached


@pytest.mark.parametrize("kind", NORMS)
def test_both_commute_with_integer_shifts(kind: str) -> None:
    """Whatever the sides."""
    layer, images = build_norm(kind, 4, norm_groups=2).double(), fresh(2, 4, 5, 6)
    torch.testing.assert_close(layer(roll(images, 2, 3)), roll(layer(images), 2, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", NORMS)
def test_only_group_norm_commutes_with_fractional_shifts(kind: str) -> None:
    """Mean and energy of a band-limited image stay; a division that changes from pixel to pixel aliases."""
    layer, images = build_norm(kind, 4, norm_groups=2).double(), fourier_shift(fresh(2, 4, 6, 8), (0.5, 0.5))
    error = (layer(fourier_shift(images, (0.5, 0.3))) - fourier_shift(layer(images), (0.5, 0.3))).abs().max()
    assert (error < 1e-12) == (kind == "group")
    assert kind == "group" or error > 1e-2


def test_channel_norm_keeps_memory_layout_dtype_and_batch() -> None:
    """Contiguous as images are; half precision; nothing of nothing; gradients."""
    layer = ChannelNorm(4)
    assert layer(fresh(2, 4, 3, 5, dtype=torch.float32)).is_contiguous()
    assert layer.bfloat16()(fresh(2, 4, 3, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert ChannelNorm(4)(fresh(0, 4, 3, 5, dtype=torch.float32)).shape == (0, 4, 3, 5)
    assert torch.autograd.gradcheck(ChannelNorm(3).double(), fresh(1, 3, 2, 2).requires_grad_())
    assert repr(layer).startswith("ChannelNorm(\n  4")


def test_hooks_of_the_norm_inside_run() -> None:
    """Libraries that keep weights elsewhere fetch them there: accelerate, DeepSpeed, fully_shard."""
    layer, images = ChannelNorm(4), fresh(2, 4, 3, 5, dtype=torch.float32)
    expected = torch.nn.functional.layer_norm(images.movedim(1, -1), (4,), torch.arange(4.0), eps=1e-6)
    layer.norm.weight.data.zero_()

    def fetch(norm: nn.LayerNorm, inputs: object) -> None:
        norm.weight.data.copy_(torch.arange(4.0))

    layer.norm.register_forward_pre_hook(fetch)
    assert torch.equal(layer(images), expected.movedim(-1, 1))


def test_builder_knows_two_kinds() -> None:
    """Over the image in groups, or over the channels."""
    assert NORMS == ("group", "channel")
    assert isinstance(build_norm("group", 6, norm_groups=3), nn.GroupNorm)
    assert isinstance(build_norm("channel", 6, norm_groups=4), ChannelNorm)


@pytest.mark.parametrize(
    ("use", "error", "match"),
    [
        (lambda: ChannelNorm(1), ValueError, "channels must be an int >= 2, got 1"),
        (lambda: ChannelNorm(2.0), TypeError, "channels must be an int >= 2, got 2.0"),
        (lambda: ChannelNorm(2)(fresh(1, 3, 4, 4)), ValueError, "images axis 1 must be channels=2, got 3"),
        (lambda: ChannelNorm(2)(fresh(2, 4)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (
            lambda: build_norm("batch", 2, norm_groups=1),
            ValueError,
            "norm must be one of 'group', 'channel', got 'batch'",
        ),
        (
            lambda: build_norm("group", 6, norm_groups=4),
            ValueError,
            "norm_groups must be a divisor of channels=6",
        ),
    ],
)
def test_norms_refuse(use: object, error: type[Exception], match: str) -> None:
    """Options out of range, and images of another shape."""
    with pytest.raises(error, match=match):
        use()
