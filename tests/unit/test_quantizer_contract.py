"""What every quantizer promises, checked on the whole conformance table.

Shape letters: B batch, C code size, h w token grid, N = B*h*w latent vectors.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import QuantizerOutput
from te_quant.testing import assert_shift_equivariant, image_sides, images, shifts
from tests.helpers import exactly
from tests.unit.quantizer_cases import (
    EMPTY_SHAPES,
    QUANTIZERS,
    SHAPES,
    has_loss,
    index_axes,
    index_layout,
    index_shape,
    is_random,
    latents_for,
    lowest_index,
    state_of,
)

pytestmark = pytest.mark.parametrize("name", QUANTIZERS)

FIELDS = ("quantized", "indices", "loss", "codebook_loss", "commitment_loss", "regularization_loss", "codes")
MODES = [pytest.param(True, id="train"), pytest.param(False, id="eval")]


def build(name: str, channel_dim: int = 1, *, training: bool = False, spread: bool = True, **options: Any) -> Any:
    """A quantizer of the table, with a codebook, if it has one, as wide as the latents."""
    quantizer = QUANTIZERS[name](channel_dim=channel_dim, **options).train(training)
    if spread and hasattr(quantizer, "kmeans_init"):
        quantizer.kmeans_init(torch.randn(64, quantizer.code_dim), iterations=2)
    return quantizer


def equal_states(first: torch.nn.Module, second: torch.nn.Module | dict[str, Tensor]) -> bool:
    """Whether two states are the same bit for bit."""
    a, b = (m.state_dict() if isinstance(m, torch.nn.Module) else m for m in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def grid_last(quantizer: Any, indices: Tensor) -> Tensor:
    """Indices of images with h and w as their last two axes, where they have an axis behind them."""
    return indices.movedim(-1, 1) if index_axes(quantizer) else indices


@pytest.mark.parametrize("training", MODES)
def test_output_has_the_same_fields_always(name: str, training: bool) -> None:
    """One fixed-arity named tuple; shapes and types as documented; loss exactly the sum of its terms."""
    quantizer = build(name, training=training)
    latents = latents_for(quantizer, (3, -1, 4, 5)).requires_grad_()
    output = quantizer(latents)
    assert type(output) is QuantizerOutput
    assert output._fields == FIELDS
    assert output.quantized.shape == output.codes.shape == latents.shape
    assert output.quantized.dtype == output.codes.dtype == latents.dtype
    assert output.indices.dtype == torch.int64
    assert output.indices.min() >= lowest_index(quantizer)
    assert output.indices.max() < quantizer.num_codes
    for term in (output.loss, output.codebook_loss, output.commitment_loss, output.regularization_loss):
        assert term.shape == ()
        assert term.isfinite()
        assert term >= 0
    assert torch.equal(output.loss, output.codebook_loss + output.commitment_loss + output.regularization_loss)
    assert not output.codes.requires_grad
    assert output.quantized.requires_grad


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("layout", SHAPES)
def test_decoding_the_indices_gives_the_codes(name: str, training: bool, layout: str) -> None:
    """decode(indices), codes and quantized are bit-equal, three training steps in a row."""
    channel_dim, shape = SHAPES[layout]
    quantizer = build(name, channel_dim, training=training)
    for _ in range(3):
        latents = latents_for(quantizer, shape).requires_grad_()
        output = quantizer(latents)
        assert output.indices.shape == index_shape(quantizer, shape)
        assert torch.equal(quantizer.decode(output.indices), output.codes)
        assert torch.equal(output.quantized, output.codes)
        assert torch.equal(quantizer.decode(output.indices.int()), output.codes)
        if quantizer.num_codes > 1 and quantizer.code_dim > 1:
            other = (output.indices + 1) % quantizer.num_codes
            assert not torch.equal(quantizer.decode(other), output.codes)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_decoding_under_autocast(name: str, training: bool, half: torch.dtype) -> None:
    """Under autocast, with latents in float32 or in half precision, the codes are still bit-equal."""
    quantizer = build(name, training=training)
    for dtype in (torch.float32, half):
        latents = latents_for(quantizer, (3, -1, 4, 5), dtype).requires_grad_()
        with torch.autocast("cpu", dtype=half):
            output = quantizer(latents)
            inside = quantizer.decode(output.indices)
        assert output.codes.dtype == torch.float32
        assert torch.equal(inside, output.codes)
        assert torch.equal(quantizer.decode(output.indices), output.codes)
        assert torch.equal(output.quantized, output.codes)
        output.quantized.sum().backward()
        assert latents.grad is not None
        assert latents.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    """A converted module takes latents of its dtype, stays finite and bit-equal, and refuses others."""
    quantizer = build(name, training=True).to(dtype)
    for _ in range(3):
        output = quantizer(latents_for(quantizer, (3, -1, 4, 5), dtype).requires_grad_())
        output.loss.backward()
        assert output.codes.dtype == output.quantized.dtype == dtype
        assert output.loss.isfinite()
        assert torch.equal(quantizer.decode(output.indices), output.codes)
        assert torch.equal(output.quantized, output.codes)
    message = f"latents must be {dtype} as the codebook, got torch.float32."
    with pytest.raises(TypeError, match=exactly(message)):
        quantizer(latents_for(quantizer, (3, -1, 4, 5)))


def test_quantizing_commutes_with_token_shifts(name: str) -> None:
    """Tokens, codes and what the decoder sees move with the latents by any shift; the losses stay."""
    quantizer = build(name).double()

    @given(shifts(9), st.data())
    @settings(deadline=None, max_examples=6)
    def holds(shift: tuple[int, int], data: st.DataObject) -> None:
        latents = data.draw(images(image_sides(1, largest=6), channels=quantizer.code_dim))
        for function in (
            lambda z: grid_last(quantizer, quantizer.encode(z)),
            lambda z: quantizer(z).quantized,
            lambda z: quantizer(z).codes,
        ):
            assert_shift_equivariant(function, latents, shifts=[shift], tolerance=0)
        before, after = quantizer(latents), quantizer(latents.roll(shift, (-2, -1)))
        torch.testing.assert_close(after.loss, before.loss, rtol=1e-12, atol=0)

    holds()
    # The control: a quantizer that knows where a token lies does not.
    places = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    latents = latents_for(quantizer, (2, -1, 3, 4), torch.float64)
    with pytest.raises(AssertionError, match=r"not equivariant at shift \(0, 1\)"):
        assert_shift_equivariant(lambda z: quantizer(z).codes + places, latents, shifts=[(0, 1)])


def test_layouts_agree(name: str) -> None:
    """The same vectors in any layout give the same indices, the same losses, and the codes moved alike."""
    first = build(name, 1)
    last = QUANTIZERS[name](channel_dim=-1).eval()
    last.load_state_dict(first.state_dict())
    image = latents_for(first, (2, -1, 3, 4))
    rows = image.permute(0, 2, 3, 1).reshape(24, first.code_dim)
    expected = first(image)
    views = {
        "BCN": (first, image.flatten(2)),
        "BCdhw": (first, image.view(2, first.code_dim, 3, 2, 2)),
        "NC": (first, rows),
        "BNC": (last, rows.view(2, 12, -1)),
        "BhwC": (last, rows.view(2, 3, 4, -1)),
    }
    for layout, (quantizer, latents) in views.items():
        output = quantizer(latents)
        assert torch.equal(output.indices.flatten(), expected.indices.flatten()), layout
        assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        codes = output.codes if quantizer is last or layout == "NC" else output.codes.movedim(1, -1)
        assert torch.equal(codes.reshape(24, -1), expected.codes.permute(0, 2, 3, 1).reshape(24, -1)), layout


@pytest.mark.parametrize("layout", SHAPES)
def test_memory_order_does_not_matter(name: str, layout: str) -> None:
    """Permuted, strided and expanded latents give what their contiguous copies give."""
    channel_dim, shape = SHAPES[layout]
    quantizer = build(name, channel_dim)
    latents = latents_for(quantizer, shape)
    backwards = tuple(reversed(range(latents.ndim)))
    doubled = torch.stack([latents, latents + 9], dim=-1)[..., 0]
    permuted = latents.permute(backwards).contiguous().permute(backwards)
    expected = quantizer(latents)
    for view in (permuted, doubled):
        output = quantizer(view.requires_grad_())
        assert torch.equal(output.indices, expected.indices)
        assert torch.equal(output.codes, expected.codes)
        output.quantized.square().sum().backward()
    expanded = latents[:1].expand_as(latents)
    assert torch.equal(quantizer(expanded).indices, quantizer(expanded.contiguous()).indices)


def test_encoding_is_forward_without_the_rest(name: str) -> None:
    """Method encode gives forward's indices in eval, carries no gradient, and neither changes any state."""
    quantizer = build(name)
    before = state_of(quantizer)
    latents = latents_for(quantizer, (3, -1, 4, 5)).requires_grad_()
    output = quantizer(latents)
    assert torch.equal(quantizer.encode(latents), output.indices)
    assert torch.equal(quantizer(latents).indices, output.indices)
    quantizer.train().encode(latents)
    assert equal_states(quantizer, before)


@pytest.mark.parametrize("training", MODES)
def test_gradients_reach_the_latents(name: str, training: bool) -> None:
    """Through quantized and, if there is one, through the loss, finite and not zero."""
    quantizer = build(name, training=training)
    latents = latents_for(quantizer, (3, -1, 4, 5)).requires_grad_()
    output = quantizer(latents)
    for scalar in (output.quantized.square().sum(), output.loss):
        (gradient,) = torch.autograd.grad(scalar, latents, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient.abs().max() > 0) == (has_loss(quantizer) or scalar is not output.loss)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("layout", EMPTY_SHAPES)
def test_an_empty_batch_changes_nothing(name: str, training: bool, layout: str) -> None:
    """Empty results, a finite loss to backpropagate, no change of state; and the next batch is as without it."""
    channel_dim, shape = EMPTY_SHAPES[layout]
    quantizer = build(name, channel_dim, training=training)
    before = state_of(quantizer)
    latents = latents_for(quantizer, shape).requires_grad_()
    output = quantizer(latents)
    assert output.quantized.shape == output.codes.shape == latents.shape
    assert output.indices.shape == index_shape(quantizer, shape)
    assert output.codebook_loss.item() == output.commitment_loss.item() == 0
    assert output.loss.isfinite()
    (output.loss + output.quantized.sum()).backward()
    assert latents.grad is not None
    assert all(p.grad is None or p.grad.isfinite().all() for p in quantizer.parameters())
    assert equal_states(quantizer, before)
    assert quantizer.encode(latents).shape == output.indices.shape
    assert quantizer.decode(output.indices).shape == latents.shape


def test_refuses_wrong_ranks(name: str) -> None:
    """Vectors alone and six axes are refused, the layout named."""
    for channel_dim, wanted in ((1, "(B, C, h, w) or (N, C)"), (-1, "(B, N, C) or (N, C)")):
        quantizer = build(name, channel_dim)
        c = quantizer.code_dim
        for shape in ((c,), (1, c, 1, 1, 1, c)):
            for method in (quantizer, quantizer.encode):
                with pytest.raises(
                    ValueError, match=exactly(f"latents must be of shape {wanted}, got shape {shape}.")
                ):
                    method(torch.zeros(shape))


def test_refuses_wrong_channels(name: str) -> None:
    """The code size is looked for at channel_dim, never guessed."""
    for channel_dim, shape, axis in (
        (1, (2, 17, 3, 4), 1),
        (-1, (2, 3, 17), 2),
        (1, (5, 17), 1),
        (-1, (5, 17), 1),
    ):
        quantizer = build(name, channel_dim)
        message = f"latents axis {axis} must be code_dim={quantizer.code_dim}, got 17 (latents shape {shape})."
        for method in (quantizer, quantizer.encode):
            with pytest.raises(ValueError, match=exactly(message)):
                method(torch.zeros(shape))
    quantizer = build(name, 1)
    if quantizer.code_dim != 7:
        c = quantizer.code_dim
        message = f"latents axis 1 must be code_dim={c}, got 7 (latents shape (2, 7, {c}))."
        with pytest.raises(ValueError, match=exactly(message)):
            quantizer(torch.zeros(2, 7, quantizer.code_dim))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_refuses_latents_that_are_not_floating(name: str, dtype: torch.dtype) -> None:
    """Integer, boolean and complex latents are a TypeError; so is what is no tensor."""
    quantizer = build(name)
    for method in (quantizer, quantizer.encode):
        with pytest.raises(TypeError, match=exactly(f"latents must be floating point, got {dtype}.")):
            method(torch.zeros(2, quantizer.code_dim, dtype=dtype))
    with pytest.raises(TypeError, match=exactly("latents must be a tensor, got list.")):
        quantizer([[0.0]])


def test_refuses_another_dtype_or_device(name: str) -> None:
    """float64 and, without autocast, half latents do not fit a float32 quantizer; nor does another device."""
    quantizer = build(name)
    for dtype in (torch.float64, torch.bfloat16):
        message = f"latents must be torch.float32 as the codebook, got {dtype}."
        with pytest.raises(TypeError, match=exactly(message)):
            quantizer(torch.zeros(2, quantizer.code_dim, dtype=dtype))
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"^latents must be torch\.float32 as the codebook"):
        quantizer(torch.zeros(2, quantizer.code_dim, dtype=torch.float64))
    message = "latents must be torch.float64 as the codebook, got torch.bfloat16."
    with torch.autocast("cpu"), pytest.raises(TypeError, match=exactly(message)):
        build(name).double()(torch.zeros(2, quantizer.code_dim, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=exactly("latents must be on cpu as the codebook, got meta.")):
        quantizer(torch.zeros(2, quantizer.code_dim, device="meta"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_latents_that_are_not_finite(name: str, bad: float) -> None:
    """Unless told otherwise; the state stays as it was."""
    quantizer = build(name, training=True, nonfinite="raise")
    before = state_of(quantizer)
    latents = latents_for(quantizer, (3, -1, 4, 5))
    latents[1, 0, 2, 3] = bad
    message = f"latents must be finite, got 1 NaN or infinite of {latents.numel()} values."
    for method in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=exactly(message)):
            method(latents)
    assert equal_states(quantizer, before)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skips_latents_that_are_not_finite(name: str, training: bool, bad: float) -> None:
    """Where told to: all is as without that vector, which gets the code of zero and no gradient."""
    quantizer = build(name, training=training, nonfinite="skip")
    twin, latents = copy.deepcopy(quantizer), latents_for(quantizer, (9, -1))
    kept = torch.arange(9) != 4
    others = latents[kept].requires_grad_()
    indices = quantizer.encode(torch.where(kept.unsqueeze(1), latents, 0.0))
    latents[4, 0] = bad
    latents.requires_grad_()
    output = quantizer(latents)
    (output.loss + output.quantized[kept].square().sum()).backward()
    assert latents.grad is not None
    assert (latents.grad[4] == 0).all()
    assert torch.equal(output.quantized, output.codes)
    assert torch.equal(quantizer.decode(output.indices), output.codes)
    if training and is_random(quantizer):
        assert all(value.isfinite().all() for value in (output.loss, *quantizer.state_dict().values()))
        return
    expected = twin(others)
    (expected.loss + expected.quantized.square().sum()).backward()
    assert torch.equal(output.indices, indices)
    assert torch.equal(output.indices[kept], expected.indices)
    torch.testing.assert_close(output.codes[kept], expected.codes)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(latents.grad[kept], others.grad)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(quantizer.state_dict()[key], value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_does_not_look_at_latents_where_told_so(name: str, bad: float) -> None:
    """Every vector gets some code of its own, and the vectors beside it theirs."""
    quantizer = build(name, nonfinite="off")
    latents = latents_for(quantizer, (9, -1))
    clean = quantizer.encode(latents)
    latents[4, 0] = bad
    output = quantizer(latents)
    assert torch.equal(output.quantized, output.codes)
    assert torch.equal(quantizer.decode(output.indices), output.codes)
    assert torch.equal(quantizer.encode(latents), output.indices)
    kept = torch.arange(9) != 4
    assert torch.equal(output.indices[kept], clean[kept])


def test_frozen_means_frozen(name: str) -> None:
    """In training nothing moves, nothing is counted and nothing has a gradient; afterwards as before."""
    quantizer = build(name, training=True)
    latents = latents_for(quantizer, (9, -1)).requires_grad_()
    if hasattr(quantizer, "freeze"):
        assert quantizer.freeze() is quantizer
        assert quantizer.frozen
    else:
        # Where nothing is learnt or counted there is nothing to freeze.
        assert not list(quantizer.parameters())
    before = state_of(quantizer)
    output = quantizer(latents)
    (output.loss + output.quantized.square().sum()).backward()
    assert latents.grad is not None
    assert equal_states(quantizer, before)
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    if hasattr(quantizer, "freeze"):
        quantizer.freeze(False)(latents)
        assert not equal_states(quantizer, before)


def test_refuses_indices_without_a_code(name: str) -> None:
    """Negative ones, which would count from the end, and those from K on."""
    quantizer = build(name)
    k, lowest = quantizer.num_codes, lowest_index(quantizer)
    for bad in (lowest - 1, -k - 2, k, k + 5):
        indices = torch.zeros(3, *index_axes(quantizer), dtype=torch.int64)
        indices[1] = bad
        message = f"indices must be in [{lowest}, num_codes={k}), got {bad}."
        with pytest.raises(ValueError, match=exactly(message)):
            quantizer.decode(indices)


def test_refuses_indices_of_a_wrong_kind(name: str) -> None:
    """Floats, booleans, no token axis and four of them, another device, and what is no tensor."""
    quantizer = build(name)
    axes = index_axes(quantizer)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=exactly(f"indices must be an integer tensor, got {dtype}.")):
            quantizer.decode(torch.zeros(3, *axes, dtype=dtype))
    with pytest.raises(TypeError, match=exactly("indices must be a tensor, got int.")):
        quantizer.decode(0)
    for shape in (axes, (1, 1, 1, 1, 1, *axes)):
        message = f"indices must be of shape {index_layout(quantizer)}, got shape {shape}."
        with pytest.raises(ValueError, match=exactly(message)):
            quantizer.decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=exactly("indices must be on cpu as the codebook, got meta.")):
        quantizer.decode(torch.zeros(3, *axes, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_behave_alike_and_apart(name: str, how: str) -> None:
    """A copy goes on exactly as the original, and changing one leaves the other."""
    original = build(name, training=True)
    original(latents_for(original, (3, -1, 4, 5)))
    if how == "deepcopy":
        twin = copy.deepcopy(original)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(original))
    else:
        buffer = io.BytesIO()
        torch.save(original, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert equal_states(original, twin)
    assert repr(original) == repr(twin)
    before = state_of(original)
    latents = latents_for(original, (3, -1, 4, 5))
    outputs = []
    for quantizer in (twin, original):
        torch.manual_seed(0)
        outputs.append(quantizer(latents))
        if quantizer is twin:
            assert equal_states(original, before)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert equal_states(original, twin)


def test_state_dict_round_trip(name: str) -> None:
    """Loaded strictly into a fresh quantizer, in memory and from a weights-only file, the state goes on alike."""
    original = build(name, training=True)
    original(latents_for(original, (3, -1, 4, 5)))
    buffer = io.BytesIO()
    torch.save(original.state_dict(), buffer)
    buffer.seek(0)
    twin = build(name, training=True, spread=False)
    twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert equal_states(original, twin)
    latents = latents_for(original, (3, -1, 4, 5))
    outputs = []
    for quantizer in (original, twin):
        torch.manual_seed(0)
        outputs.append(quantizer(latents))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert equal_states(original, twin)
