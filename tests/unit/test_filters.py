"""Binomial kernels, padding and filtering against NumPy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import filters
from te_quant.filters import PADDING_MODES, binomial_kernel, filter2d, pad2d
from te_quant.testing import image_sides
from tests.unit.grid_oracles import blur, fresh, pad, roll

MODES = st.sampled_from(PADDING_MODES)


@given(size=st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_binomial_kernel_is_a_repeated_average_of_two(size: int) -> None:
    """Pascal's row comes from convolving (1/2, 1/2) with itself."""
    expected = np.ones(1)
    for _ in range(size - 1):
        expected = np.convolve(expected, [0.5, 0.5])
    np.testing.assert_allclose(binomial_kernel(size).numpy(), expected, rtol=1e-14, atol=0)


def test_binomial_kernel_knows_the_papers_five_taps() -> None:
    """The 5-tap kernel is the (1, 4, 6, 4, 1)/16 of Zhang 2019."""
    assert binomial_kernel(5).tolist() == [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]


def test_binomial_kernel_survives_sizes_beyond_float_factorials() -> None:
    """2^1999 is no float; the taps still are and still sum to one."""
    assert math.isclose(binomial_kernel(2000).sum().item(), 1, rel_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_binomial_kernel_takes_the_dtype_asked_for(dtype: torch.dtype) -> None:
    """The five taps are exact even in bfloat16."""
    kernel = binomial_kernel(5, dtype=dtype, device="cpu")
    assert kernel.dtype == dtype
    assert torch.equal(kernel.double(), binomial_kernel(5))


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_binomial_kernel_refuses_sizes_that_are_none(size: object, error: type[Exception]) -> None:
    """A kernel has at least one tap."""
    with pytest.raises(error, match=r"size must be an int >= 1, got"):
        binomial_kernel(size)


@given(mode=MODES, sides=image_sides(1, largest=5), margins=st.tuples(*[st.integers(0, 4)] * 4))
@settings(deadline=None, max_examples=60)
def test_pad2d_agrees_with_numpy(mode: str, sides: tuple[int, int], margins: tuple[int, int, int, int]) -> None:
    """Every mode, every margin, sides smaller than the margin included."""
    left, right, top, bottom = margins
    images = fresh(2, 3, *sides)
    if mode == "reflect" and (max(left, right) >= sides[1] or max(top, bottom) >= sides[0]) and any(margins):
        with pytest.raises(ValueError, match="images sides must be larger than the reflected margins"):
            pad2d(images, margins, mode)
        return
    np.testing.assert_array_equal(pad2d(images, margins, mode).numpy(), pad(images.numpy(), margins, mode))


@pytest.mark.parametrize("margins", [(3, 0, 0, 0), (0, 3, 0, 0), (0, 0, 2, 0), (0, 0, 0, 2)])
def test_pad2d_reflects_all_but_the_whole_side(margins: tuple[int, int, int, int]) -> None:
    """One pixel less than the side is the most that a mirror shows, on each of the four edges."""
    images = fresh(1, 1, 2, 3)
    with pytest.raises(ValueError, match="images sides must be larger than the reflected margins"):
        pad2d(images, margins, "reflect")
    fewer = tuple(max(margin - 1, 0) for margin in margins)
    np.testing.assert_array_equal(pad2d(images, fewer, "reflect").numpy(), pad(images.numpy(), fewer, "reflect"))


def test_pad2d_wraps_more_than_once() -> None:
    """A circular margin wider than the image continues its period."""
    images = fresh(1, 1, 2, 3)
    expected = pad(images.numpy(), (7, 5, 5, 4), "circular")
    np.testing.assert_array_equal(pad2d(images, (7, 5, 5, 4), "circular").numpy(), expected)


@pytest.mark.parametrize("margins", [(4, 3, 1, 4), (1, 2, 2, 0), (0, 0, 0, 1), (2, 0, 0, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_pad2d_has_the_right_gradient(mode: str, margins: tuple[int, int, int, int]) -> None:
    """Finite differences agree, of the gradient too, wide circular margins included."""
    if mode == "reflect" and max(margins) > 2:
        return
    images = fresh(1, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pad2d(x, margins, mode), images)
    assert torch.autograd.gradgradcheck(lambda x: pad2d(x, margins, mode).square(), images)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_pad2d_keeps_the_order_in_memory(mode: str) -> None:
    """Channels-last images stay so, which is what the convolution behind it wants, and so do their gradients."""
    for layout in (torch.contiguous_format, torch.channels_last):
        images = fresh(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
        padded = pad2d(images, (1, 2, 2, 1), mode)
        assert padded.is_contiguous(memory_format=layout)
        (gradient,) = torch.autograd.grad(padded.square().sum(), images)
        assert gradient.stride(1) == images.stride(1)


@pytest.mark.parametrize("mode", ["replicate", "circular"])
def test_pad2d_is_the_same_under_vmap(mode: str) -> None:
    """A gradient a sample, as in a maker's own audit."""
    images = fresh(3, 1, 2, 3, 4)

    def energy(image: torch.Tensor) -> torch.Tensor:
        return pad2d(image, (1, 2, 1, 1), mode).square().sum()

    each = torch.stack([torch.func.grad(energy)(image) for image in images])
    assert torch.equal(torch.func.vmap(torch.func.grad(energy))(images), each)


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*")
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_pad2d_has_forward_derivatives_under_transforms(mode: str) -> None:
    """Padding is linear, so the tangent is padded too; Jacobians agree in both modes."""
    images, direction = fresh(2, 2, 3, 4), fresh(2, 2, 3, 4)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return pad2d(x, (1, 2, 1, 1), mode)

    _, tangent = torch.func.jvp(padded, (images,), (direction,))
    assert torch.equal(tangent, padded(direction))
    one = images[:1]
    jacobians = [find(lambda x: padded(x).square().sum(1))(one) for find in (torch.func.jacfwd, torch.func.jacrev)]
    torch.testing.assert_close(*jacobians)
    _, curvature = torch.func.jvp(torch.func.grad(lambda x: padded(x).pow(3).sum()), (one,), (direction[:1],))
    hessian = torch.func.hessian(lambda x: padded(x).pow(3).sum())(one)
    torch.testing.assert_close(curvature, torch.einsum("abcdefgh,efgh->abcd", hessian, direction[:1]))


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_traced_padding_is_saved(mode: str, tmp_path: Path) -> None:
    """As a program of torch's own operators, with the same numbers."""
    program = str(tmp_path / "program.pt")
    torch.jit.trace(lambda x: pad2d(x, (1, 2, 1, 1), mode), fresh(2, 3, 4, 5)).save(program)
    loaded, others = torch.jit.load(program), fresh(2, 3, 4, 5)
    assert torch.equal(loaded(others), pad2d(others, (1, 2, 1, 1), mode))


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
@pytest.mark.parametrize("mode", ["replicate", "circular"])
def test_pad2d_compiles_with_its_gradient(mode: str) -> None:
    """In both orders in memory, with eager mode's numbers; torch's own replicate padding fails channels last."""
    weight = fresh(4, 3, 3, 3)

    def energy(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(pad2d(images, (1, 1, 1, 1), mode), weight).square().sum()

    for layout in (torch.contiguous_format, torch.channels_last):
        torch._dynamo.reset()
        images = fresh(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
        (expected,) = torch.autograd.grad(energy(images), images)
        compiled = torch.compile(energy, fullgraph=True)
        (found,) = torch.autograd.grad(compiled(images), images)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
def test_pad2d_refuses_an_image_without_pixels(mode: str) -> None:
    """There is no edge to repeat; zeros need none."""
    assert pad2d(fresh(1, 1, 0, 2), (1, 1, 1, 1), "zeros").shape == (1, 1, 2, 4)
    message = rf"images sides must be at least 1 for mode='{mode}', got shape \(1, 1, 0, 2\)"
    with pytest.raises(ValueError, match=message):
        pad2d(fresh(1, 1, 0, 2), (1, 1, 1, 1), mode)


@pytest.mark.parametrize(
    ("shape", "mode", "match"),
    [
        ((1, 1, 2, 2), "mirror", r"mode must be one of 'zeros'.*got 'mirror'"),
        ((2, 2), "zeros", r"images must be of shape \(B, C, H, W\), got shape \(2, 2\)"),
    ],
)
def test_pad2d_refuses_what_is_no_image_or_mode(shape: tuple[int, ...], mode: str, match: str) -> None:
    """Rank and mode are checked before anything else happens."""
    with pytest.raises(ValueError, match=match):
        pad2d(fresh(*shape), (1, 1, 1, 1), mode)


@given(mode=MODES, sides=image_sides(1, smallest=5, largest=8), size=st.integers(1, 5), stride=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_filter2d_agrees_with_loops(mode: str, sides: tuple[int, int], size: int, stride: int) -> None:
    """Any kernel, not only symmetric ones: correlation, not convolution, aligned at (k - 1) // 2."""
    images, taps = fresh(2, 3, *sides), fresh(size)
    result = filter2d(images, taps, stride=stride, padding_mode=mode)
    np.testing.assert_allclose(result.numpy(), blur(images.numpy(), taps.numpy(), stride, mode), atol=1e-12)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_only_circular_filtering_commutes_with_every_shift(mode: str) -> None:
    """At stride 1 a circular filter is exactly equivariant; the other modes see the border."""
    images = fresh(2, 3, 6, 7)
    shifted = filter2d(roll(images, 2, 3), binomial_kernel(4), padding_mode=mode)
    error = (shifted - roll(filter2d(images, binomial_kernel(4), padding_mode=mode), 2, 3)).abs().max()
    assert (error < 1e-12) == (mode == "circular")


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_batch_may_be_filtered_in_parts(
    mode: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, gradients and strides are those of the whole batch at once."""
    taps, upstream, data = fresh(5), fresh(7, 3, 3, 4), fresh(7, 3, 6, 8)

    def both() -> tuple[Tensor, Tensor]:
        images = data.clone(memory_format=memory_format).requires_grad_()
        result = filter2d(images, taps, stride=2, padding_mode=mode)
        result.backward(upstream)
        assert images.grad is not None
        return result, images.grad

    whole, whole_gradient = both()
    convolved = []
    convolution = F.conv2d

    def counted(part: Tensor, *options: object) -> Tensor:
        convolved.append(len(part))
        return convolution(part, *options)

    monkeypatch.setattr(filters, "_CPU_PIXELS", 300)
    monkeypatch.setattr(F, "conv2d", counted)
    result, gradient = both()
    assert convolved == ([7] if mode == "zeros" else [2, 2, 2, 1])
    filter2d(data, taps, stride=2, padding_mode=mode)
    assert convolved[-4:] == [2, 2, 2, 1]
    assert result.stride() == whole.stride()
    torch.testing.assert_close(result, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=1e-13)


def test_filter2d_converts_the_kernel_to_the_images() -> None:
    """A float64 kernel filters float32 and bfloat16 images in their own dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        result = filter2d(fresh(1, 2, 4, 4, dtype=dtype), binomial_kernel(3), stride=2, padding_mode="reflect")
        assert result.dtype == dtype


@pytest.mark.parametrize(
    ("images", "taps", "match"),
    [
        ((1, 1, 4, 4), (3, 3), r"taps must be of shape \(k,\), got shape \(3, 3\)"),
        ((4, 4), (3,), r"images must be of shape \(B, C, H, W\), got shape \(4, 4\)"),
    ],
)
def test_filter2d_refuses_wrong_ranks(images: tuple[int, ...], taps: tuple[int, ...], match: str) -> None:
    """The kernel is one row, the images have four axes."""
    with pytest.raises(ValueError, match=match):
        filter2d(fresh(*images), fresh(*taps), padding_mode="zeros")
