"""Filtered and polynomial activations: values, what aliases and what does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fourier_layers import resample
from torch import nn

from te_quant.layers import ACTIVATIONS, FilteredActivation, PolynomialActivation, build_activation
from te_quant.shifts import fourier_shift
from te_quant.testing import image_sides
from tests.unit.grid_oracles import fresh, roll, silu

SIDES = image_sides(1, largest=8)
FRACTIONS = st.tuples(st.floats(-5, 5), st.floats(-5, 5))


def polynomial(channels: int) -> PolynomialActivation:
    layer = PolynomialActivation(channels).double()
    layer.coefficients.data = fresh(3, channels)
    return layer


def relative(layer: object, images: torch.Tensor, shift: tuple[float, float]) -> float:
    """How far the layer is from commuting with a shift, over the size of what it gives."""
    error = layer(fourier_shift(images, shift)) - fourier_shift(layer(images), shift)
    return (error.norm() / layer(images).norm()).item()


@given(sides=SIDES, upsampling=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_filtered_activation_agrees_with_dirichlet_kernels(sides: tuple[int, int], upsampling: int) -> None:
    """Up, act, low-pass, down."""
    images = fresh(2, 2, *sides)
    finer = resample(images.numpy(), (upsampling * sides[0], upsampling * sides[1]))
    result = FilteredActivation(upsampling=upsampling)(images)
    np.testing.assert_allclose(result.numpy(), resample(silu(finer), sides), atol=1e-12)


@given(sides=SIDES)
@settings(deadline=None, max_examples=40)
def test_polynomial_activation_is_a_convolution_of_spectra(sides: tuple[int, int]) -> None:
    """The square of a signal is its spectrum convolved with itself; what leaves the band is cut."""
    layer, images = polynomial(2), fresh(1, 2, *sides)
    band = resample(images.numpy(), sides)
    size = tuple(4 * side + 1 for side in sides)
    spectrum = np.fft.fftshift(np.fft.fft2(band), axes=(-2, -1)) / (sides[0] * sides[1])
    square = np.zeros((1, 2, *size), dtype=complex)
    middle = (2 * sides[0], 2 * sides[1])
    for i, j in np.ndindex(*sides):
        for k, m in np.ndindex(*sides):
            row, column = i + k - 2 * (sides[0] // 2), j + m - 2 * (sides[1] // 2)
            product = spectrum[:, :, i, j] * spectrum[:, :, k, m]
            square[:, :, middle[0] + row, middle[1] + column] += product
    kept = np.zeros((1, 2, *sides))
    for row in range(-((sides[0] - 1) // 2), (sides[0] - 1) // 2 + 1):
        for column in range(-((sides[1] - 1) // 2), (sides[1] - 1) // 2 + 1):
            wave = np.add.outer(np.arange(sides[0]) * row / sides[0], np.arange(sides[1]) * column / sides[1])
            weight = square[:, :, middle[0] + row, middle[1] + column, None, None]
            kept += (weight * np.exp(2j * np.pi * wave)).real
    a, b, c = layer.coefficients.detach().numpy()[:, :, None, None]
    np.testing.assert_allclose(layer(images).detach().numpy(), a + b * band + c * kept, atol=1e-10)


@given(sides=SIDES, shift=FRACTIONS)
@settings(deadline=None, max_examples=60)
def test_polynomial_commutes_with_fractional_shifts(sides: tuple[int, int], shift: tuple[float, float]) -> None:
    """Every circular shift, every side, any images: there is no aliasing to break it."""
    layer, images = polynomial(2), fresh(2, 2, *sides)
    shifted, expected = layer(fourier_shift(images, shift)), fourier_shift(layer(images), shift)
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-11)


def test_pointwise_functions_alias_and_filters_reduce_it() -> None:
    """Negative controls: neither SiLU nor a square commutes on the pixels; twice the grid helps and heals."""
    images, shift = fourier_shift(fresh(2, 2, 16, 20), (0.5, 0.5)), (0.5, 0.25)
    plain, filtered = relative(F.silu, images, shift), relative(FilteredActivation(), images, shift)
    assert plain > 1e-2
    assert 1e-8 < filtered < plain / 3
    assert relative(torch.square, images, shift) > 1e-2
    assert relative(FilteredActivation(torch.square, upsampling=1), images, shift) > 1e-2
    assert relative(FilteredActivation(torch.square, upsampling=2), images, shift) < 1e-12


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_activation_commutes_with_integer_shifts(kind: str) -> None:
    """Circular ones, odd and even sides."""
    layer, images = build_activation(kind, 2).double(), fresh(2, 2, 5, 6)
    for shift in ((1, 0), (2, 3)):
        torch.testing.assert_close(layer(roll(images, *shift)), roll(layer(images), *shift), rtol=0, atol=1e-12)


def test_builder_knows_three_kinds() -> None:
    """SiLU, SiLU filtered, and the polynomial."""
    assert ACTIVATIONS == ("silu", "filtered", "polynomial")
    assert isinstance(build_activation("silu", 2), nn.SiLU)
    images = fresh(1, 2, 4, 4)
    assert torch.equal(build_activation("filtered", 2)(images), FilteredActivation(F.silu, upsampling=2)(images))
    assert isinstance(build_activation("polynomial", 2), PolynomialActivation)


def test_polynomial_starts_like_silu_at_zero_and_learns_per_channel() -> None:
    """x/2 + x²/4 to second order, and a gradient for each of three coefficients a channel."""
    layer = PolynomialActivation(3).double()
    images = 1e-3 * fresh(1, 3, 1, 1)
    torch.testing.assert_close(layer(images), F.silu(images), rtol=0, atol=1e-9)
    images = fresh(2, 3, 5, 5).requires_grad_()
    layer(images).square().sum().backward()
    assert layer.coefficients.shape == (3, 3)
    assert layer.coefficients.grad.all()
    assert torch.autograd.gradcheck(polynomial(2), fresh(1, 2, 3, 4).requires_grad_())


@pytest.mark.parametrize("kind", ["filtered", "polynomial"])
def test_activations_keep_dtype_batch_and_graph(kind: str) -> None:
    """bfloat16, an empty batch, one graph when compiled."""
    layer = build_activation(kind, 2)
    assert layer(fresh(1, 2, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer(fresh(0, 2, 4, 5, dtype=torch.float32)).shape == (0, 2, 4, 5)
    images = fresh(2, 2, 4, 5, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(images), layer(images))


def test_options_are_readable() -> None:
    """In the printed model."""
    assert "silu, upsampling=2" in repr(FilteredActivation())
    assert repr(PolynomialActivation(7)) == "PolynomialActivation(7)"


@pytest.mark.parametrize(
    ("use", "error", "match"),
    [
        (lambda: FilteredActivation(upsampling=0), ValueError, "upsampling must be an int >= 1, got 0"),
        (lambda: FilteredActivation(upsampling=1.5), TypeError, "upsampling must be an int >= 1, got 1.5"),
        (lambda: FilteredActivation()(fresh(4, 4)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (lambda: PolynomialActivation(0), ValueError, "channels must be an int >= 1, got 0"),
        (lambda: PolynomialActivation(2)(fresh(4, 4)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (
            lambda: PolynomialActivation(2)(fresh(1, 3, 4, 4)),
            ValueError,
            "images axis 1 must be channels=2, got 3",
        ),
        (lambda: build_activation("relu", 2), ValueError, "activation must be one of 'silu'.*got 'relu'"),
        (lambda: build_activation("silu", 0), ValueError, "channels must be an int >= 1, got 0"),
    ],
)
def test_activations_refuse(use: object, error: type[Exception], match: str) -> None:
    """Options out of range, and what is no image."""
    with pytest.raises(error, match=match):
        use()
