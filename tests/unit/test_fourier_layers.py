"""The ideal low-pass filter against Dirichlet kernels written out, and blurred upsampling against loops."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_quant.filters import PADDING_MODES, fourier_resample
from te_quant.layers import (
    UPSAMPLERS,
    BlurPool2d,
    BlurUpsample2d,
    FourierDownsample2d,
    FourierUpsample2d,
    build_downsample,
    build_upsample,
)
from te_quant.shifts import fourier_shift
from te_quant.testing import image_sides
from tests.unit.grid_oracles import blur, convolve, fresh, roll

SIDES = image_sides(1, largest=9)
STRIDES = st.integers(1, 4)
FRACTIONS = st.tuples(st.floats(-6, 6), st.floats(-6, 6))


def dirichlet(old: int, new: int) -> np.ndarray:
    """Row u': the weights of the old samples at position u'·old/new, frequencies below half the smaller size."""
    offsets = np.arange(new)[:, None] / new - np.arange(old)[None] / old
    kept = range(1, (min(old, new) - 1) // 2 + 1)
    return (1 + 2 * sum((np.cos(2 * np.pi * f * offsets) for f in kept), np.zeros((new, old)))) / old


def resample(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = dirichlet(images.shape[-2], size[0]), dirichlet(images.shape[-1], size[1])
    return np.einsum("uv,bcvx,yx->bcuy", rows, images, columns)


@given(sides=SIDES, size=SIDES)
@settings(deadline=None, max_examples=80)
def test_resampling_agrees_with_dirichlet_kernels(sides: tuple[int, int], size: tuple[int, int]) -> None:
    """Odd and even sides, smaller and larger ones, each axis by itself."""
    images = fresh(2, 3, *sides)
    expected = resample(images.numpy(), size)
    np.testing.assert_allclose(fourier_resample(images, size).numpy(), expected, atol=1e-12)


@given(cells=SIDES, stride=STRIDES, shift=FRACTIONS)
@settings(deadline=None, max_examples=60)
def test_downsampling_commutes_with_fractional_shifts(
    cells: tuple[int, int], stride: int, shift: tuple[float, float]
) -> None:
    """A shift by t pixels is one by t/s behind the layer, for any images."""
    layer = FourierDownsample2d(stride)
    images = fresh(2, 2, cells[0] * stride, cells[1] * stride)
    expected = fourier_shift(layer(images), (shift[0] / stride, shift[1] / stride))
    torch.testing.assert_close(layer(fourier_shift(images, shift)), expected, rtol=0, atol=1e-12)


@given(sides=SIDES, stride=STRIDES, shift=FRACTIONS)
@settings(deadline=None, max_examples=60)
def test_upsampling_commutes_with_fractional_shifts(
    sides: tuple[int, int], stride: int, shift: tuple[float, float]
) -> None:
    """A shift by k is one by s·k behind the layer, for any images."""
    layer = FourierUpsample2d(stride)
    images = fresh(2, 2, *sides)
    expected = fourier_shift(layer(images), (shift[0] * stride, shift[1] * stride))
    torch.testing.assert_close(layer(fourier_shift(images, shift)), expected, rtol=0, atol=1e-12)


def test_other_filters_do_not_commute_with_one_pixel() -> None:
    """Negative control: without a filter, and with the papers' blur, the error is there; the ideal has none."""
    images = fresh(2, 2, 16, 20)
    errors = []
    for layer in (lambda x: x[..., ::2, ::2], BlurPool2d(padding_mode="circular"), FourierDownsample2d()):
        error = layer(roll(images, 1, 1)) - fourier_shift(layer(images), (0.5, 0.5))
        errors.append((error.norm() / layer(images).norm()).item())
    assert errors[0] > 0.3
    assert errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-12


@given(cells=SIDES, stride=STRIDES)
@settings(deadline=None, max_examples=40)
def test_up_is_the_adjoint_of_down_and_its_inverse_in_the_band(cells: tuple[int, int], stride: int) -> None:
    """⟨down x, y⟩·s² = ⟨x, up y⟩, and down(up(y)) is y without its Nyquist frequency."""
    down, up = FourierDownsample2d(stride), FourierUpsample2d(stride)
    images, small = fresh(2, 1, cells[0] * stride, cells[1] * stride), fresh(2, 1, *cells)
    torch.testing.assert_close((down(images) * small).sum() * stride**2, (images * up(small)).sum())
    band = torch.from_numpy(resample(small.numpy(), cells))
    torch.testing.assert_close(down(up(small)), band, rtol=0, atol=1e-12)
    assert torch.equal(band.isclose(small).all(), torch.tensor(cells[0] % 2 == 1 and cells[1] % 2 == 1))


@pytest.mark.parametrize("layer", [FourierDownsample2d(2), FourierUpsample2d(3)])
def test_constants_stay(layer: torch.nn.Module) -> None:
    """The mean is a frequency that every grid holds."""
    images = torch.full((1, 2, 6, 10), -0.75, dtype=torch.float64)
    result = layer(images)
    torch.testing.assert_close(result, torch.full_like(result, -0.75), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_transformed_in_float32(dtype: torch.dtype) -> None:
    """The result is the exact one, rounded once; also under autocast."""
    images = fresh(2, 3, 6, 10, dtype=dtype)
    expected = resample(images.double().numpy(), (3, 5))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = FourierDownsample2d()(images)
    assert result.dtype == dtype
    np.testing.assert_allclose(result.double().numpy(), expected, atol=4 * torch.finfo(dtype).eps)


def test_gradients_agree_with_finite_differences() -> None:
    """Down and up, odd and even."""
    images = fresh(1, 1, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(FourierDownsample2d(2), images)
    assert torch.autograd.gradcheck(FourierUpsample2d(2), images)


def test_fourier_layers_compile_store_nothing_and_take_empty_batches() -> None:
    """One graph, no weights, the other axes of nothing."""
    for layer, sides in ((FourierDownsample2d(2), (2, 3)), (FourierUpsample2d(2), (8, 12))):
        images = fresh(2, 3, 4, 6, dtype=torch.float32)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), layer(images))
        assert not layer.state_dict()
        assert "stride=2" in repr(layer)
        assert layer(fresh(0, 3, 4, 6)).shape == (0, 3, *sides)


@given(sides=SIDES, size=st.integers(1, 5), stride=STRIDES, mode=st.sampled_from(PADDING_MODES))
@settings(deadline=None, max_examples=40)
def test_blur_upsampling_agrees_with_loops(sides: tuple[int, int], size: int, stride: int, mode: str) -> None:
    """Repeated, then Pascal's row."""
    layer = BlurUpsample2d(kernel_size=size, stride=stride, padding_mode=mode)
    images = fresh(2, 2, *sides)
    larger = images.numpy().repeat(stride, axis=2).repeat(stride, axis=3)
    if mode == "reflect" and size > 1 and size // 2 >= min(larger.shape[2:]):
        with pytest.raises(ValueError, match="images sides must be larger than the reflected margins"):
            layer(images)
        return
    taps = np.array([1.0])
    for _ in range(size - 1):
        taps = np.convolve(taps, [0.5, 0.5])
    np.testing.assert_allclose(layer(images).numpy(), blur(larger, taps, 1, mode), atol=1e-13)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_only_circular_blur_upsampling_commutes_with_shifts(mode: str) -> None:
    """A pixel of the small grid is two of the large one."""
    layer, images = BlurUpsample2d(padding_mode=mode), fresh(2, 2, 4, 5)
    error = (layer(roll(images, 1, 2)) - roll(layer(images), 2, 4)).abs().max()
    assert (error < 1e-12) == (mode == "circular")


def test_blur_upsampling_stores_nothing_and_copies() -> None:
    """As the blur on the way down."""
    layer = BlurUpsample2d(kernel_size=5, stride=3, padding_mode="reflect")
    assert not layer.state_dict()
    assert "kernel_size=5, stride=3, padding_mode=reflect" in repr(layer)
    assert layer(fresh(0, 2, 3, 4)).shape == (0, 2, 9, 12)
    images = fresh(1, 2, 3, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(images), layer(images))


def test_builder_knows_all_upsamplings() -> None:
    """What this test and the others of upsampling cover is all there is."""
    assert set(UPSAMPLERS) == {"nearest", "blur", "fourier", "polyphase"}


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_builder_puts_a_convolution_beside_the_filter(mode: str) -> None:
    """Before it on the way down, behind it on the way up, with the padding asked for."""
    images = fresh(2, 2, 6, 4)
    down = build_downsample("fourier", 2, padding_mode=mode).double()
    convolved = convolve(images.numpy(), down.conv.weight, down.conv.bias, (1,) * 4, mode)
    np.testing.assert_allclose(down(images).detach().numpy(), resample(convolved, (3, 2)), atol=1e-12)
    for kind in ("fourier", "blur"):
        up = build_upsample(kind, 2, padding_mode=mode).double()
        larger = resample(images.numpy(), (12, 8))
        if kind == "blur":
            repeated = images.numpy().repeat(2, axis=2).repeat(2, axis=3)
            larger = blur(repeated, np.array([0.25, 0.5, 0.25]), 1, mode)
        expected = convolve(larger, up.conv.weight, up.conv.bias, (1,) * 4, mode)
        np.testing.assert_allclose(up(images).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("use", "error", "match"),
    [
        (lambda: FourierDownsample2d(0), ValueError, "stride must be an int >= 1, got 0"),
        (lambda: FourierUpsample2d(1.0), TypeError, "stride must be an int >= 1, got 1.0"),
        (
            lambda: FourierDownsample2d()(fresh(1, 1, 5, 4)),
            ValueError,
            r"images sides must be positive multiples of 2, got shape .*; pad them with te_quant",
        ),
        (
            lambda: FourierDownsample2d()(fresh(1, 1, 4, 5)),
            ValueError,
            r"images sides must be positive multiples of 2, got shape .*; pad them with te_quant",
        ),
        (
            lambda: FourierDownsample2d()(fresh(1, 1, 0, 4)),
            ValueError,
            r"images sides must be positive multiples of 2, got shape \(1, 1, 0, 4\)\.$",
        ),
        (lambda: FourierDownsample2d()(fresh(4, 4)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (lambda: FourierUpsample2d()(fresh(4, 4)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (lambda: FourierUpsample2d()(fresh(1, 1, 0, 4)), ValueError, "size\\[0\\] must be an int >= 1, got 0"),
        (lambda: fourier_resample(fresh(1, 1, 4, 0), (2, 2)), ValueError, "images sides must be at least 1"),
        (
            lambda: fourier_resample(fresh(1, 1, 4, 4), (2, 0)),
            ValueError,
            "size\\[1\\] must be an int >= 1, got 0",
        ),
        (lambda: fourier_resample(fresh(1, 1, 4, 4), (2.0, 2)), TypeError, "size\\[0\\] must be an int >= 1"),
        (lambda: fourier_resample(fresh(4, 4), (2, 2)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (
            lambda: fourier_resample(torch.zeros(1, 1, 4, 4, dtype=torch.int64), (2, 2)),
            TypeError,
            "images must be floating point",
        ),
        (lambda: BlurUpsample2d(kernel_size=0), ValueError, "kernel_size must be an int >= 1, got 0"),
        (lambda: BlurUpsample2d(stride=0), ValueError, "stride must be an int >= 1, got 0"),
        (lambda: BlurUpsample2d(padding_mode="same"), ValueError, "padding_mode must be one of 'zeros'"),
        (lambda: BlurUpsample2d()(fresh(4, 4)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (
            lambda: build_upsample("bilinear", 2, padding_mode="zeros"),
            ValueError,
            "upsample must be one of 'nearest'.*got 'bilinear'",
        ),
        (
            lambda: build_upsample("nearest", 0, padding_mode="zeros"),
            ValueError,
            "channels must be an int >= 1, got 0",
        ),
        (
            lambda: build_upsample("nearest", 2, padding_mode="same"),
            ValueError,
            "padding_mode must be one of 'zeros'",
        ),
    ],
)
def test_layers_refuse(use: object, error: type[Exception], match: str) -> None:
    """Options out of range, sides that do not fit, and what is no image."""
    with pytest.raises(error, match=match):
        use()
