"""Convolution, residual block, attention and upsampling against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from te_quant.filters import PADDING_MODES
from te_quant.layers import NearestUpsampleConv, PaddedConv2d, ResidualBlock, SelfAttention2d, group_norm
from tests.unit.grid_oracles import convolve, fresh, normalize, roll, silu


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize(
    ("size", "stride", "margins"),
    [(3, 1, None), (4, 1, None), (5, 2, None), (1, 1, None), (3, 2, (0, 1, 0, 1)), (3, 1, (1, 1, 2, 2))],
)
def test_padded_conv_agrees_with_loops(mode: str, size: int, stride: int, margins: tuple | None) -> None:
    """Symmetric and one-sided margins, odd and even kernels, every mode."""
    layer = PaddedConv2d(2, 3, size, stride=stride, margins=margins, padding_mode=mode).double()
    images = fresh(2, 2, 6, 7)
    used = margins or ((size - 1) // 2, size // 2, (size - 1) // 2, size // 2)
    expected = convolve(images.numpy(), layer.weight, layer.bias, used, mode, stride)
    np.testing.assert_allclose(layer(images).detach().numpy(), expected, atol=1e-12)
    assert f"margins={used}, padding_mode={mode}" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0, 1, 3), {}, "in_channels must be an int >= 1, got 0"),
        ((1, 0, 3), {}, "out_channels must be an int >= 1, got 0"),
        ((1, 1, 0), {}, "kernel_size must be an int >= 1, got 0"),
        ((1, 1, 3), {"stride": 0}, "stride must be an int >= 1, got 0"),
        ((1, 1, 3), {"padding_mode": "same"}, "padding_mode must be one of 'zeros'.*got 'same'"),
    ],
)
def test_padded_conv_refuses(arguments: tuple, options: dict, match: str) -> None:
    """Options out of range."""
    with pytest.raises(ValueError, match=match):
        PaddedConv2d(*arguments, **({"padding_mode": "zeros"} | options))


@pytest.mark.parametrize("channels", [(4, 4), (4, 6)])
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_residual_block_agrees_with_loops(mode: str, channels: tuple[int, int]) -> None:
    """Norm, SiLU, convolution, twice; small inputs, so that the ε of the norm shows."""
    block = ResidualBlock(*channels, norm_groups=2, padding_mode=mode).double()
    images = 1e-3 * fresh(2, channels[0], 4, 5)
    hidden = silu(normalize(images.numpy(), 2))
    hidden = convolve(hidden, block.conv1.weight, block.conv1.bias, (1,) * 4, mode)
    hidden = convolve(silu(normalize(hidden, 2)), block.conv2.weight, block.conv2.bias, (1,) * 4, mode)
    skipped = images.numpy()
    if channels[0] != channels[1]:
        skipped = convolve(skipped, block.shortcut.weight, block.shortcut.bias, (0,) * 4, mode)
    np.testing.assert_allclose(block(images).detach().numpy(), skipped + hidden, atol=1e-10)


def test_shortcut_has_weights_only_where_channels_change() -> None:
    """Equal channels are added as they are."""
    same, other = (ResidualBlock(4, c, norm_groups=2, padding_mode="zeros") for c in (4, 6))
    assert not list(same.shortcut.parameters())
    assert sum(p.numel() for p in other.shortcut.parameters()) == 4 * 6 + 6


def test_dropout_acts_in_training_only() -> None:
    """Two passes differ in training and agree in evaluation."""
    block = ResidualBlock(4, 4, norm_groups=2, dropout=0.5, padding_mode="zeros").double()
    images = fresh(1, 4, 6, 6)
    assert not torch.equal(block(images), block(images))
    block.eval()
    assert torch.equal(block(images), block(images))


def test_attention_agrees_with_a_softmax_written_out() -> None:
    """One head of size C, weights softmax(q·k/√C), values averaged, projected and added."""
    block = SelfAttention2d(4, norm_groups=2).double()
    images = fresh(2, 4, 3, 5)
    weight, bias = block.qkv.weight.detach().numpy()[:, :, 0, 0], block.qkv.bias.detach().numpy()
    normed = normalize(images.numpy(), 2).reshape(2, 4, 15)
    q, k, v = np.split(np.einsum("oc,bcn->bon", weight, normed) + bias[:, None], 3, axis=1)
    expected = np.empty((2, 4, 15))
    for b in range(2):
        for n in range(15):
            weights = np.exp(k[b].T @ q[b, :, n] / np.sqrt(4))
            expected[b, :, n] = v[b] @ (weights / weights.sum())
    projection, offset = block.out.weight.detach().numpy()[:, :, 0, 0], block.out.bias.detach().numpy()
    expected = np.einsum("oc,bcn->bon", projection, expected) + offset[:, None]
    expected = images.numpy() + expected.reshape(2, 4, 3, 5)
    np.testing.assert_allclose(block(images).detach().numpy(), expected, atol=1e-12)


def test_attention_commutes_with_any_permutation_of_pixels() -> None:
    """There is no position in it; a residual block, the negative control, has neighbourhoods."""
    images, order = fresh(2, 4, 4, 5), torch.randperm(20)

    def permute(grid: torch.Tensor) -> torch.Tensor:
        return grid.flatten(2)[:, :, order].reshape(grid.shape)

    attention = SelfAttention2d(4, norm_groups=2).double()
    torch.testing.assert_close(attention(permute(images)), permute(attention(images)), rtol=0, atol=1e-12)
    block = ResidualBlock(4, 4, norm_groups=2, padding_mode="circular").double()
    assert (block(permute(images)) - permute(block(images))).abs().max() > 1e-3


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_only_circular_residual_blocks_commute_with_shifts(mode: str) -> None:
    """Every integer shift, GroupNorm included."""
    block = ResidualBlock(4, 6, norm_groups=2, padding_mode=mode).double()
    images = fresh(2, 4, 5, 6)
    error = (block(roll(images, 1, 2)) - roll(block(images), 1, 2)).abs().max()
    assert (error < 1e-12) == (mode == "circular")


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_upsampling_repeats_then_convolves(mode: str) -> None:
    """Nearest neighbour by two, then 3x3."""
    layer = NearestUpsampleConv(2, padding_mode=mode).double()
    images = fresh(2, 2, 3, 4)
    larger = images.numpy().repeat(2, axis=2).repeat(2, axis=3)
    expected = convolve(larger, layer.conv.weight, layer.conv.bias, (1,) * 4, mode)
    np.testing.assert_allclose(layer(images).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "groups", "match"),
    [
        (6, 4, "norm_groups must be a divisor of channels=6, got 4"),
        (6, 0, "norm_groups must be an int >= 1, got 0"),
        (0, 1, "channels must be an int >= 1, got 0"),
    ],
)
def test_group_norm_refuses_groups_that_do_not_divide(channels: int, groups: int, match: str) -> None:
    """Before PyTorch says it less clearly."""
    with pytest.raises(ValueError, match=match):
        group_norm(channels, groups)


def test_group_norm_is_torchs_with_a_smaller_epsilon() -> None:
    """1e-6, as in the published VQGAN."""
    layer = group_norm(6, 3)
    assert isinstance(layer, nn.GroupNorm)
    assert (layer.num_groups, layer.num_channels, layer.eps) == (3, 6, 1e-6)


@pytest.mark.parametrize("dropout", [1.0, -0.1])
def test_residual_block_refuses_dropout_out_of_range(dropout: float) -> None:
    """Dropping everything would leave nothing to rescale."""
    with pytest.raises(ValueError, match="dropout must be a finite number >= 0 and < 1"):
        ResidualBlock(4, 4, norm_groups=2, dropout=dropout, padding_mode="zeros")


@pytest.mark.parametrize(("side", "stored"), [(34, False), (16, True)])
def test_attention_on_large_grids_stores_no_weights_in_training(side, stored):
    """A contiguous image must not choose the kernel that keeps (H·W)² numbers; small grids stay as they were."""
    attention = SelfAttention2d(4, norm_groups=2)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attention(torch.rand(1, 4, side, side))
    assert (max(sizes) >= side**4) == stored


def test_attention_is_the_same_on_both_sides_of_the_bound():
    """A grid that is one row too large, against the formula."""
    attention, images = SelfAttention2d(4, norm_groups=2).double(), torch.rand(1, 4, 33, 32).double()
    q, k, v = attention.qkv(attention.norm(images)).flatten(2).transpose(1, 2).chunk(3, -1)
    mixed = torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v
    expected = images + attention.out(mixed.transpose(1, 2).reshape(images.shape))
    torch.testing.assert_close(attention(images), expected, rtol=1e-12, atol=1e-12)
