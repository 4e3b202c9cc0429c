"""BlurPool and the paper's four downsamplings: values, sizes, equivariance."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from te_quant.autoencoder import pad_to_divisor
from te_quant.filters import PADDING_MODES
from te_quant.layers import (
    DOWNSAMPLERS,
    BlurPool2d,
    ConvBlurPool,
    Downsample,
    FourierDownsample2d,
    PolyphaseDownsample2d,
    StridedConv,
    build_downsample,
)
from te_quant.testing import image_sides, shifts
from tests.unit.grid_oracles import blur, convolve, fresh, pad, roll

KINDS = ("strided_conv", "max_pool", "max_blur_pool", "conv_blur_pool")
SIDES = image_sides(1, largest=9)


def pascal(size: int) -> np.ndarray:
    return np.array([math.comb(size - 1, i) for i in range(size)]) / 2 ** (size - 1)


@given(sides=SIDES, size=st.integers(1, 7), stride=st.integers(1, 4), mode=st.sampled_from(PADDING_MODES))
@settings(deadline=None, max_examples=60)
def test_blur_pool_agrees_with_loops(sides: tuple[int, int], size: int, stride: int, mode: str) -> None:
    """Odd and even kernels, any stride, sides smaller than the kernel: values and the size ⌈H/s⌉ x ⌈W/s⌉."""
    layer = BlurPool2d(kernel_size=size, stride=stride, padding_mode=mode)
    images = fresh(2, 3, *sides)
    if mode == "reflect" and size // 2 >= min(sides) and size > 1:
        with pytest.raises(ValueError, match="images sides must be larger than the reflected margins"):
            layer(images)
        return
    result = layer(images)
    assert result.shape[2:] == (math.ceil(sides[0] / stride), math.ceil(sides[1] / stride))
    np.testing.assert_allclose(result.numpy(), blur(images.numpy(), pascal(size), stride, mode), atol=1e-13)


@given(size=st.integers(2, 9), stride=st.integers(1, 4), value=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_blur_pool_keeps_constants(size: int, stride: int, value: float) -> None:
    """Without zeros around it a constant image stays what it is; with zeros its border fades."""
    images = torch.full((1, 2, 9, 10), value, dtype=torch.float64)
    images[:, 1] *= -1
    for mode in ("replicate", "reflect", "circular"):
        result = BlurPool2d(kernel_size=size, stride=stride, padding_mode=mode)(images)
        assert (result - images[:, :, :1, :1]).abs().max() <= 1e-13 * value
    faded = BlurPool2d(kernel_size=size, stride=1, padding_mode="zeros")(images)
    assert (faded - images).abs().max() >= 0.1 * value


@given(size=st.integers(1, 6), stride=st.integers(1, 4), k=shifts(3, identity=True))
@settings(deadline=None, max_examples=40)
def test_circular_blur_pool_commutes_with_stride_multiples(size: int, stride: int, k: tuple[int, int]) -> None:
    """Shifting the input by s·k shifts the output by k, exactly, if s divides the sides."""
    layer = BlurPool2d(kernel_size=size, stride=stride, padding_mode="circular")
    images = fresh(2, 2, 3 * stride, 4 * stride)
    shifted = layer(roll(images, stride * k[0], stride * k[1]))
    torch.testing.assert_close(shifted, roll(layer(images), *k), rtol=0, atol=1e-12)


def test_circular_blur_pool_breaks_where_the_stride_does_not_divide_the_side() -> None:
    """Negative control: the grid of kept pixels does not close."""
    layer = BlurPool2d(kernel_size=3, stride=2, padding_mode="circular")
    images = fresh(2, 2, 7, 7)
    assert (layer(roll(images, 2, 2)) - roll(layer(images), 1, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_blur_pool_takes_every_dtype_moved_or_not(dtype: torch.dtype) -> None:
    """The kernel follows the images, and ``to`` moves it without harm."""
    images = fresh(2, 3, 6, 6, dtype=dtype)
    expected = blur(images.double().numpy(), pascal(5), 2, "replicate")
    tolerance = 8 * torch.finfo(dtype).eps
    for layer in (BlurPool2d(), BlurPool2d().to(dtype)):
        result = layer(images)
        assert result.dtype == dtype
        np.testing.assert_allclose(result.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_blur_pool_has_nothing_to_store_and_can_be_copied() -> None:
    """Checkpoints of a model do not change when a blur is put in; copies behave the same."""
    layer = BlurPool2d(kernel_size=4, stride=3, padding_mode="circular")
    assert not layer.state_dict()
    assert not list(layer.parameters())
    assert "kernel_size=4, stride=3, padding_mode=circular" in repr(layer)
    images = fresh(2, 3, 7, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(images), layer(images))


def test_blur_pool_of_no_images_is_no_images() -> None:
    """An empty batch keeps its other axes."""
    assert BlurPool2d()(fresh(0, 3, 5, 6)).shape == (0, 3, 3, 3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size must be an int >= 1, got 0"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int >= 1, got 3.0"),
        ({"stride": 0}, ValueError, "stride must be an int >= 1, got 0"),
        ({"padding_mode": "same"}, ValueError, "padding_mode must be one of 'zeros'.*got 'same'"),
    ],
)
def test_blur_pool_refuses_options_out_of_range(options: dict, error: type[Exception], match: str) -> None:
    """One clear error for each."""
    with pytest.raises(error, match=match):
        BlurPool2d(**options)


def test_builder_knows_the_papers_kinds_twice_and_two_more() -> None:
    """Those two have tests of their own."""
    # Others may have added theirs.
    kinds = {*KINDS, "unpadded_max_blur_pool", "conv_replicate_blur_pool", "polyphase", "fourier"}
    assert {*get_args(Downsample)} == kinds <= DOWNSAMPLERS.keys()


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_downsamplings_agree_with_loops(kind: str, mode: str) -> None:
    """What each name means, spelled out pixel by pixel."""
    layer = build_downsample(kind, 3, padding_mode=mode).double()
    images = fresh(2, 3, 6, 8)
    array = images.numpy()
    if kind == "strided_conv":
        expected = convolve(array, layer.conv.weight, layer.conv.bias, (0, 1, 0, 1), mode, stride=2)
    elif kind == "conv_blur_pool":
        expected = blur(convolve(array, layer.conv.weight, layer.conv.bias, (1,) * 4, mode), pascal(5), 2, mode)
    elif kind == "max_pool":
        expected = array.reshape(2, 3, 3, 2, 4, 2).max((3, 5))
    else:
        if mode == "zeros":
            padded = np.pad(array, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=-np.inf)
        else:
            padded = pad(array, (0, 1, 0, 1), mode)
        windows = [padded[:, :, i : i + 6, j : j + 8] for i in (0, 1) for j in (0, 1)]
        expected = blur(np.max(windows, axis=0), pascal(5), 2, mode)
    np.testing.assert_allclose(layer(images).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_the_pooling_of_the_papers_code_agrees_with_loops(mode: str) -> None:
    """Only the windows inside the image, then a blur over replicated borders, whatever the mode."""
    images = fresh(2, 3, 6, 8)
    array = images.numpy()
    inside = np.max([array[:, :, i : i + 5, j : j + 7] for i in (0, 1) for j in (0, 1)], axis=0)
    layer = build_downsample("unpadded_max_blur_pool", 3, padding_mode=mode)
    expected = blur(inside, pascal(5), 2, "replicate")
    np.testing.assert_allclose(layer(images).numpy(), expected, atol=1e-12)
    padded = build_downsample("max_blur_pool", 3, padding_mode="replicate")(images)
    same = (layer(images) - padded).abs() < 1e-12
    # With a padded pool the last rows and columns differ, and nothing else does.
    assert same[..., :-2, :-2].all()
    assert not same[..., -1, :].all()


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_the_blur_of_the_papers_code_replicates_behind_any_convolution(mode: str) -> None:
    """The convolution pads as it is told."""
    layer = build_downsample("conv_replicate_blur_pool", 3, padding_mode=mode).double()
    images = fresh(2, 3, 6, 8)
    convolved = convolve(images.numpy(), layer.conv.weight, layer.conv.bias, (1,) * 4, mode)
    expected = blur(convolved, pascal(5), 2, "replicate")
    np.testing.assert_allclose(layer(images).detach().numpy(), expected, atol=1e-12)


def test_a_blur_of_an_unknown_padding_is_refused() -> None:
    """By the name of its own option."""
    with pytest.raises(ValueError, match=r"blur_padding_mode must be one of 'zeros', .* got 'same'"):
        ConvBlurPool(3, padding_mode="zeros", blur_padding_mode="same")


@given(kind=st.sampled_from(KINDS), k=shifts(4, identity=True))
@settings(deadline=None, max_examples=40)
def test_circular_downsampling_commutes_with_even_shifts(kind: str, k: tuple[int, int]) -> None:
    """All four are exactly equivariant under multiples of the stride."""
    layer = build_downsample(kind, 3, padding_mode="circular").double()
    images = fresh(2, 3, 8, 10)
    shifted = layer(roll(images, 2 * k[0], 2 * k[1]))
    torch.testing.assert_close(shifted, roll(layer(images), *k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_downsampling_commutes_with_one_pixel(kind: str) -> None:
    """Negative control: below the stride no shift of the output makes up for that of the input."""
    layer = build_downsample(kind, 3, padding_mode="circular").double()
    images = fresh(2, 3, 8, 8)
    shifted, original = layer(roll(images, 1, 1)), layer(images)
    for i in (0, 1):
        for j in (0, 1):
            assert (shifted - roll(original, i, j)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_padding_breaks_even_shifts_unless_no_window_meets_the_border(kind: str, mode: str) -> None:
    """Negative control: the border enters, except in 2x2 cells, which never cross it."""
    layer = build_downsample(kind, 3, padding_mode=mode).double()
    images = fresh(2, 3, 8, 8)
    error = (layer(roll(images, 2, 4)) - roll(layer(images), 1, 2)).abs().max()
    assert (error > 1e-3) == (kind != "max_pool")


def test_zero_padding_puts_no_zero_into_a_maximum() -> None:
    """Negative features stay so beside the border: only the one row of zeros of the blur fades the corner."""
    images = -1 - fresh(1, 2, 6, 6).abs()
    layer = build_downsample("max_blur_pool", 2, padding_mode="zeros")
    assert layer(images)[..., -1, -1].max() <= -((15 / 16) ** 2)


@pytest.mark.parametrize("kind", [*KINDS, "fourier", "unpadded_max_blur_pool", "conv_replicate_blur_pool"])
def test_downsampling_halves_the_sides(kind: str) -> None:
    """Of no images too."""
    layer = build_downsample(kind, 2, padding_mode="circular").double()
    assert layer(fresh(0, 2, 4, 6)).shape == (0, 2, 2, 3)
    assert layer.stride == 2


@pytest.mark.parametrize("kind", [*KINDS, "fourier", "unpadded_max_blur_pool", "conv_replicate_blur_pool"])
@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 2, 5, 4), r"images sides must be divisible by 2, got shape \(1, 2, 5, 4\); pad them with"),
        ((1, 2, 4, 5), r"images sides must be divisible by 2, got shape \(1, 2, 4, 5\); pad them with"),
        ((4, 4), r"images must be of shape \(B, C, H, W\), got shape \(4, 4\)"),
    ],
)
def test_downsampling_refuses_odd_sides(kind: str, shape: tuple[int, ...], match: str) -> None:
    """An odd side has no circular grid of every second pixel."""
    with pytest.raises(ValueError, match=match):
        build_downsample(kind, 2, padding_mode="circular").double()(fresh(*shape))


@pytest.mark.parametrize(
    "layer", [StridedConv(2, padding_mode="circular"), PolyphaseDownsample2d(3), FourierDownsample2d(3)]
)
def test_the_cure_for_sides_that_do_not_fit_works(layer: nn.Module) -> None:
    """As each message names it, with the stride of the layer; a blur needs none."""
    images, s = fresh(1, 2, 5, 7).float(), layer.stride
    for cure in (f"pad_to_divisor(images, {s})", "BlurPool2d" if isinstance(layer, StridedConv) else "pad"):
        with pytest.raises(ValueError, match=re.escape(cure)):
            layer(images)
    padded = layer(pad_to_divisor(images, s))
    result = padded[0] if isinstance(padded, tuple) else padded
    assert result.shape == BlurPool2d(stride=s)(images).shape == (1, 2, -(-5 // s), -(-7 // s))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("average", 2, "zeros"), ValueError, "downsample must be one of 'strided_conv'.*got 'average'"),
        (("max_pool", 0, "zeros"), ValueError, "channels must be an int >= 1, got 0"),
        (("max_pool", 2.0, "zeros"), TypeError, "channels must be an int >= 1, got 2.0"),
        (("max_pool", 2, "wrap"), ValueError, "padding_mode must be one of 'zeros'.*got 'wrap'"),
    ],
)
def test_build_downsample_refuses(arguments: tuple, error: type[Exception], match: str) -> None:
    """Also for the kinds that would not use the argument."""
    downsample, channels, padding_mode = arguments
    with pytest.raises(error, match=match):
        build_downsample(downsample, channels, padding_mode=padding_mode)
