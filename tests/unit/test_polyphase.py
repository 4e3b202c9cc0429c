"""Adaptive polyphase sampling: which pixels it keeps, the law of integer shifts, and the way back."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from te_quant.filters import PADDING_MODES
from te_quant.layers import (
    ConvPolyphaseDownsample,
    PaddedConv2d,
    PolyphaseDownsample2d,
    PolyphaseUpsample2d,
    PolyphaseUpsampleConv,
    build_downsample,
    build_upsample,
)
from te_quant.testing import image_sides, shifts
from tests.unit.grid_oracles import convolve, fresh, roll

STRIDES = st.integers(1, 4)
CELLS = image_sides(1, largest=4)
SHIFTS = shifts(9, identity=True)


def choose(image: np.ndarray, stride: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The loudest component of one image, by trying all of them."""
    parts = {(p, q): image[:, p::stride, q::stride] for p in range(stride) for q in range(stride)}
    best = max(parts, key=lambda phase: (parts[phase] ** 2).sum())
    return parts[best], best


def moves(shift: tuple[int, int], before: Tensor, after: Tensor, stride: int) -> list[list[int]]:
    """How many output pixels each image moves, which must be whole."""
    result = []
    for b in range(len(before)):
        pixels = [shift[i] + int(before[b, i]) - int(after[b, i]) for i in (0, 1)]
        assert all(pixel % stride == 0 for pixel in pixels)
        result.append([pixel // stride for pixel in pixels])
    return result


def roll_each(images: Tensor, shifts: list[list[int]]) -> Tensor:
    """Every image by its own shift."""
    return torch.stack([roll(image, *shift) for image, shift in zip(images, shifts, strict=True)])


@given(stride=STRIDES, cells=CELLS)
@settings(deadline=None, max_examples=40)
def test_the_loudest_component_is_kept(stride: int, cells: tuple[int, int]) -> None:
    """Values and phase, image by image, against all components tried in turn."""
    images = fresh(3, 2, cells[0] * stride, cells[1] * stride)
    kept, phase = PolyphaseDownsample2d(stride)(images)
    assert phase.dtype == torch.int64
    for b in range(3):
        expected, best = choose(images[b].numpy(), stride)
        np.testing.assert_array_equal(kept[b].numpy(), expected)
        assert tuple(phase[b].tolist()) == best


@given(stride=STRIDES, cells=CELLS, shift=SHIFTS)
@settings(deadline=None, max_examples=60)
def test_downsampling_follows_every_integer_shift(
    stride: int, cells: tuple[int, int], shift: tuple[int, int]
) -> None:
    """The kept pixels are the same, moved by (t + phase - phase')/s, which is whole."""
    layer = PolyphaseDownsample2d(stride)
    images = fresh(2, 3, cells[0] * stride, cells[1] * stride)
    kept, phase = layer(images)
    again, other = layer(roll(images, *shift))
    assert torch.equal(again, roll_each(kept, moves(shift, phase, other, stride)))


@given(cells=CELLS, shift=SHIFTS)
@settings(deadline=None, max_examples=40)
def test_circular_convolution_before_it_keeps_the_law(cells: tuple[int, int], shift: tuple[int, int]) -> None:
    """ConvPolyphaseDownsample is what the builder takes; the way back follows with it."""
    down = ConvPolyphaseDownsample(3, padding_mode="circular").double()
    up = PolyphaseUpsampleConv(3, padding_mode="circular").double()
    images = fresh(2, 3, 2 * cells[0], 2 * cells[1])
    (kept, phase), (again, other) = down(images), down(roll(images, *shift))
    torch.testing.assert_close(again, roll_each(kept, moves(shift, phase, other, 2)), rtol=0, atol=1e-12)
    torch.testing.assert_close(up(again, other), roll(up(kept, phase), *shift), rtol=0, atol=1e-12)


_SCALES = [
    *((torch.float32, scale) for scale in (1e19, 1e37, 1e-23, 1e-37)),
    *((torch.bfloat16, scale) for scale in (1e19, 1e-23)),
    *((torch.float64, scale) for scale in (1e160, 1e300, 1e-170, 1e-290)),
]


@pytest.mark.parametrize(("dtype", "scale"), _SCALES)
def test_features_of_huge_or_tiny_scale_choose_the_ordinary_phase(dtype: torch.dtype, scale: float) -> None:
    """Their squares lie outside the range of the dtype; the factor rounds the images, not the choice."""
    images = fresh(64, 3, 8, 8).to(dtype)
    phase = PolyphaseDownsample2d()(images)[1]
    assert phase.unique(dim=0).shape[0] == 4
    assert torch.equal(PolyphaseDownsample2d()(images * scale)[1], phase)


def test_images_of_one_batch_with_different_scales_choose_by_themselves() -> None:
    """A huge image does not make the others vanish."""
    images = fresh(64, 3, 8, 8).float()
    scales = torch.tensor([1e-30, 1.0, 1e30, 1e19]).repeat(16)[:, None, None, None]
    assert torch.equal(PolyphaseDownsample2d()(images * scales)[1], PolyphaseDownsample2d()(images)[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**10])
def test_phases_of_ordinary_features_are_those_of_plain_norms(
    dtype: torch.dtype, layout: torch.memory_format, scale: float
) -> None:
    """Bit for bit: also where nearly equal components make the last digit decide."""
    noise = 1e-7 * torch.randn(512, 4, 8, 8)
    repeated = torch.randn(512, 4, 4, 4).repeat_interleave(2, -1).repeat_interleave(2, -2)
    images = torch.cat((torch.randn(512, 4, 8, 8), repeated + noise)) * scale
    images = images.to(dtype).contiguous(memory_format=layout)
    parts = images.reshape(1024, 4, 4, 2, 4, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    best = torch.linalg.vector_norm(parts, dim=(1, 2, 4), dtype=wide).flatten(1).argmax(1)
    assert torch.equal(PolyphaseDownsample2d()(images)[1], torch.stack((best // 2, best % 2), 1))


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
def test_other_padding_before_it_breaks_the_law(mode: str) -> None:
    """Negative control: the border makes other values, whatever is kept of them."""
    down = ConvPolyphaseDownsample(3, padding_mode=mode).double()
    images = fresh(2, 3, 6, 8)
    (kept, _), (again, _) = down(images), down(roll(images, 1, 2))
    errors = [(again - roll(kept, i, j)).abs().amax((1, 2, 3)) for i in range(3) for j in range(4)]
    assert (torch.stack(errors).amin(0) > 1e-3).all()


def test_a_fixed_phase_breaks_the_law() -> None:
    """Negative control: the content must choose."""
    images = fresh(1, 2, 6, 8)
    kept, again = images[..., ::2, ::2], roll(images, 1, 0)[..., ::2, ::2]
    assert all((again - roll(kept, i, j)).abs().max() > 1e-3 for i in range(3) for j in range(4))


def test_sides_that_are_not_divisible_have_no_law() -> None:
    """Negative control: chosen on seven pixels, the components are not shifts of one another."""
    image = fresh(2, 7, 8).numpy()
    first, second = choose(image, 2)[0], choose(np.roll(image, 3, 1), 2)[0]
    rolled = (np.roll(first, (i, j), (1, 2)) for i in range(4) for j in range(4))
    assert first.shape != second.shape or all(np.abs(second - other).max() > 1e-3 for other in rolled)


@pytest.mark.parametrize("sides", [(7, 8), (8, 7)])
def test_sides_that_are_not_divisible_are_refused(sides: tuple[int, int]) -> None:
    """For want of a law."""
    with pytest.raises(
        ValueError, match=r"images sides must be divisible by 2, got shape .*; pad them with te_quant\.autoencoder"
    ):
        PolyphaseDownsample2d()(fresh(1, 2, *sides))


def test_ties_of_repeating_images_are_harmless() -> None:
    """Of a constant or striped image all tied components are equal up to a shift, and so is the way back."""
    stripes = fresh(1, 2, 6, 1).expand(1, 2, 6, 8)
    period = fresh(1, 2, 3, 4).repeat(1, 1, 2, 2)
    down, up = PolyphaseDownsample2d(2), PolyphaseUpsample2d(2, interpolate=True)
    for images in (torch.full((1, 2, 6, 8), -1.0, dtype=torch.float64), stripes, period):
        kept, phase = down(images)
        for shift in ((1, 0), (0, 1), (3, 5)):
            again, other = down(roll(images, *shift))
            assert any(torch.equal(again, roll(kept, i, j)) for i in range(3) for j in range(4))
            if images is not period:
                torch.testing.assert_close(up(again, other), roll(up(kept, phase), *shift), rtol=0, atol=1e-12)


@given(stride=STRIDES, cells=CELLS, interpolate=st.booleans())
@settings(deadline=None, max_examples=40)
def test_upsampling_agrees_with_loops(stride: int, cells: tuple[int, int], interpolate: bool) -> None:
    """Every pixel at its phase; interpolated, spread as a tent that wraps around."""
    images = fresh(3, 2, *cells)
    phase = torch.randint(stride, (3, 2))
    H, W = cells[0] * stride, cells[1] * stride
    expected = np.zeros((3, 2, H, W))
    for b, (p, q) in enumerate(phase.tolist()):
        for u in range(cells[0]):
            for v in range(cells[1]):
                reach = range(1 - stride, stride) if interpolate else (0,)
                for i in reach:
                    for j in reach:
                        weight = (1 - abs(i) / stride) * (1 - abs(j) / stride)
                        y, x = (u * stride + p + i) % H, (v * stride + q + j) % W
                        expected[b, :, y, x] += weight * images[b, :, u, v].numpy()
    layer = PolyphaseUpsample2d(stride, interpolate=interpolate).double()
    np.testing.assert_allclose(layer(images, phase).numpy(), expected, atol=1e-12)


@given(stride=STRIDES, cells=CELLS, shift=SHIFTS, interpolate=st.booleans())
@settings(deadline=None, max_examples=40)
def test_down_and_up_together_follow_every_integer_shift(
    stride: int, cells: tuple[int, int], shift: tuple[int, int], interpolate: bool
) -> None:
    """The phase carries what the kept pixels have lost; at a phase of zero, the negative control, it is lost."""
    down, up = PolyphaseDownsample2d(stride), PolyphaseUpsample2d(stride, interpolate=interpolate)
    images = fresh(2, 3, cells[0] * stride, cells[1] * stride)
    (kept, phase), (again, other) = down(images), down(roll(images, *shift))
    torch.testing.assert_close(up(again, other), roll(up(kept, phase), *shift), rtol=0, atol=1e-12)
    if not interpolate:
        assert torch.equal(torch.where(up(kept, phase) != 0, images, 0), up(kept, phase))
        canonical = up(kept, torch.zeros_like(phase))
        for b in range(2):
            assert torch.equal(canonical[b], up(kept, phase)[b]) == (not phase[b].any())


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_interpolation_keeps_constants(stride: int) -> None:
    """No grid shows in a flat image under circular padding; with zeros alone, the negative control, it does."""
    images, phase = torch.full((2, 1, 3, 4), 0.75), torch.randint(stride, (2, 2))
    flat = PolyphaseUpsample2d(stride, interpolate=True)(images, phase)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.75))
    assert (PolyphaseUpsample2d(stride)(images, phase).std() > 0.1) == (stride > 1)


def test_gradient_reaches_the_kept_pixels_alone() -> None:
    """Finite differences agree where the choice does not change; interpolation carries on."""
    down, up = PolyphaseDownsample2d(2), PolyphaseUpsample2d(2, interpolate=True)
    images = fresh(2, 2, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: up(*down(x)), images)
    kept, phase = down(images)
    (gradient,) = torch.autograd.grad(kept.sum(), images)
    torch.testing.assert_close(gradient, PolyphaseUpsample2d(2)(torch.ones_like(kept), phase), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_kept_and_summed_wide_enough(dtype: torch.dtype) -> None:
    """Squares of 300 do not fit float16; ten thousand ones are lost in a bfloat16 sum."""
    images = torch.full((1, 1, 200, 200), 300.0, dtype=dtype)
    images[..., 1::2, ::2] = 301.0 if dtype != torch.bfloat16 else 302.0
    kept, phase = PolyphaseDownsample2d()(images)
    assert kept.dtype == dtype
    assert phase.tolist() == [[1, 0]]
    assert PolyphaseUpsample2d(interpolate=True)(kept, phase).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str) -> None:
    """Values, phases and gradients as without compiling."""
    layers = nn.ModuleList(
        (ConvPolyphaseDownsample(2, padding_mode="circular"), PolyphaseUpsampleConv(2, padding_mode="circular"))
    )

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        kept, phase = layers[0](images)
        return layers[1](kept, phase), phase

    compiled = torch.compile(both, fullgraph=True, backend=backend)
    images = fresh(2, 2, 4, 6, dtype=torch.float32).requires_grad_()
    for got, expected in zip(compiled(images), both(images), strict=True):
        torch.testing.assert_close(got, expected)
    first, second = (torch.autograd.grad(f(images)[0].square().sum(), images)[0] for f in (compiled, both))
    torch.testing.assert_close(first, second)


def test_layers_store_nothing_copy_and_take_empty_batches() -> None:
    """No weights, a readable name, and the other axes of nothing."""
    down, up = PolyphaseDownsample2d(3), PolyphaseUpsample2d(3, interpolate=True, padding_mode="zeros")
    assert not down.state_dict()
    assert not up.state_dict()
    assert "stride=3" in repr(down)
    assert "stride=3, interpolate=True, padding_mode=zeros" in repr(up)
    kept, phase = down(fresh(0, 2, 6, 9))
    assert (kept.shape, phase.shape) == ((0, 2, 2, 3), (0, 2))
    assert up(kept, phase).shape == (0, 2, 6, 9)
    images = fresh(2, 1, 6, 6)
    for twin in (copy.deepcopy(up), pickle.loads(pickle.dumps(up))):
        assert torch.equal(twin(*down(images)), up(*down(images)))


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_builder_puts_a_convolution_beside_the_sampling(mode: str) -> None:
    """Before it on the way down, behind it on the way up, with the padding asked for."""
    down, up = (
        build_downsample("polyphase", 2, padding_mode=mode).double(),
        build_upsample("polyphase", 2, padding_mode=mode).double(),
    )
    images = fresh(2, 2, 4, 6)
    kept, phase = down(images)
    convolved = convolve(images.numpy(), down.conv.weight, down.conv.bias, (1,) * 4, mode)
    for b in range(2):
        expected, best = choose(convolved[b], 2)
        np.testing.assert_allclose(kept[b].detach().numpy(), expected, atol=1e-12)
        assert tuple(phase[b].tolist()) == best
    larger = PolyphaseUpsample2d(2, interpolate=True, padding_mode=mode).double()(kept, phase)
    expected = convolve(larger.detach().numpy(), up.conv.weight, up.conv.bias, (1,) * 4, mode)
    np.testing.assert_allclose(up(kept, phase).detach().numpy(), expected, atol=1e-12)
    assert {m.padding_mode for m in up.modules() if isinstance(m, PaddedConv2d | PolyphaseUpsample2d)} == {mode}


@pytest.mark.parametrize(
    ("use", "error", "match"),
    [
        (lambda: PolyphaseDownsample2d(0), ValueError, "stride must be an int >= 1, got 0"),
        (lambda: PolyphaseDownsample2d(2.0), TypeError, "stride must be an int >= 1, got 2.0"),
        (lambda: PolyphaseUpsample2d(0), ValueError, "stride must be an int >= 1, got 0"),
        (lambda: PolyphaseUpsample2d(padding_mode="same"), ValueError, "padding_mode must be one of 'zeros'"),
        (lambda: PolyphaseDownsample2d()(fresh(4, 4)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (lambda: up(fresh(2, 4, 4), (2, 2)), ValueError, r"images must be of shape \(B, C, H, W\)"),
        (lambda: up(fresh(2, 1, 4, 4), (2,)), ValueError, r"phase must be of shape \(B, 2\), got shape \(2,\)"),
        (lambda: up(fresh(2, 1, 4, 4), (3, 2)), ValueError, "phase axis 0 must be B=2, got 3"),
        (lambda: up(fresh(2, 1, 4, 4), (2, 3)), ValueError, "phase axis 1 must be 2=2, got 3"),
        (lambda: up(fresh(2, 1, 4, 4), (2, 2), torch.float32), TypeError, "phase must be an integer tensor"),
    ],
)
def test_layers_refuse(use: object, error: type[Exception], match: str) -> None:
    """Options out of range, images and phases of another shape."""
    with pytest.raises(error, match=match):
        use()


def up(images: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return PolyphaseUpsample2d()(images, torch.zeros(shape, dtype=dtype))
