"""What every quantizer promises, checked on the whole conformance table.

Shape letters: B batch, C code size, h w token grid, N = B*h*w latent vectors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import Quantizer
from te_quant.testing import (
    QUANTIZER_CHECKS,
    assert_shift_equivariant,
    image_sides,
    images,
    shifts,
)
from tests.helpers import exactly
from tests.unit.quantizer_cases import QUANTIZERS, has_loss, index_axes, index_layout, latents_for, state_of

pytestmark = pytest.mark.parametrize("name", QUANTIZERS)


def build(name: str, channel_dim: int = 1, *, training: bool = False, **options: Any) -> Quantizer:
    """A quantizer of the table, with a codebook, if it has one, as wide as the latents."""
    quantizer: Quantizer = QUANTIZERS[name](channel_dim=channel_dim, **options).train(training)
    if hasattr(quantizer, "kmeans_init"):
        quantizer.kmeans_init(torch.randn(64, quantizer.code_dim), iterations=2)
    return quantizer


def grid_last(quantizer: Quantizer, indices: Tensor) -> Tensor:
    """Indices of images with h and w as their last two axes, where they have an axis behind them."""
    return indices.movedim(-1, 1) if index_axes(quantizer) else indices


@pytest.mark.parametrize("check", QUANTIZER_CHECKS)
def test_keeps_its_promise(name: str, check: str) -> None:
    """The public conformance check, one promise at a time."""
    QUANTIZER_CHECKS[check](QUANTIZERS[name])


def test_quantizing_commutes_with_token_shifts(name: str) -> None:
    """Tokens, codes and what the decoder sees move with the latents by any shift; the losses stay."""
    quantizer = build(name).double()

    @given(shifts(9, identity=True), st.data())
    @settings(deadline=None, max_examples=6)
    def holds(shift: tuple[int, int], data: st.DataObject) -> None:
        latents = data.draw(images(image_sides(1, smallest=2, largest=6), channels=quantizer.code_dim))
        for function in (
            lambda z: grid_last(quantizer, quantizer.encode(z)),
            lambda z: quantizer(z).quantized,
            lambda z: quantizer(z).codes,
        ):
            assert_shift_equivariant(function, latents, shifts=[shift, (1, 0)], tolerance=0)
        before, after = quantizer(latents), quantizer(latents.roll(shift, (-2, -1)))
        torch.testing.assert_close(after.loss, before.loss, rtol=1e-12, atol=0)

    holds()
    # The control: a quantizer that knows where a token lies does not.
    places = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    latents = latents_for(quantizer, (2, -1, 3, 4), torch.float64)
    with pytest.raises(AssertionError, match=r"not equivariant at shift \(0, 1\)"):
        assert_shift_equivariant(lambda z: quantizer(z).codes + places, latents, shifts=[(0, 1)])


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_moves_the_latents(name: str, training: bool) -> None:
    """Where there is a loss, its gradient to the latents is not zero."""
    quantizer = build(name, training=training)
    latents = latents_for(quantizer, (3, -1, 4, 5)).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(latents).loss, latents)
    assert bool(gradient.any()) == has_loss(quantizer)


def test_other_indices_decode_to_other_codes(name: str) -> None:
    """The negative control of decoding."""
    quantizer = build(name)
    if quantizer.num_codes == 1 or quantizer.code_dim == 1:
        return
    indices = quantizer(latents_for(quantizer, (3, -1, 4, 5))).indices
    other = (indices + 1) % quantizer.num_codes
    assert not torch.equal(quantizer.decode(other), quantizer.decode(indices))


def test_thawing_resumes_the_changes(name: str) -> None:
    """What is remembered moves again."""
    quantizer = build(name, training=True).freeze().freeze(False)
    before = state_of(quantizer)
    quantizer(latents_for(quantizer, (9, -1)))
    after = quantizer.state_dict()
    assert not before or any(not torch.equal(before[key], after[key]) for key in before)


def test_refuses_float64_under_autocast(name: str) -> None:
    """Autocast admits half precision, nothing else."""
    quantizer = build(name)
    with (
        torch.autocast("cpu"),
        pytest.raises(TypeError, match=r"^latents must be torch\.float32 as the quantizer"),
    ):
        quantizer(torch.zeros(2, quantizer.code_dim, dtype=torch.float64))


def test_refuses_half_precision_for_a_float64_codebook(name: str) -> None:
    """Half precision is computed in float32, under autocast too."""
    quantizer = build(name).double()
    message = "latents must be torch.float64 as the quantizer, got torch.bfloat16; convert one of the two."
    with torch.autocast("cpu"), pytest.raises(TypeError, match=exactly(message)):
        quantizer(torch.zeros(2, quantizer.code_dim, dtype=torch.bfloat16))


def test_latents_of_the_other_layout_name_the_cure(name: str) -> None:
    """C may lie in the last axis."""
    quantizer = build(name)
    size = quantizer.code_dim
    message = f"latents axis 1 must be code_dim={size}, as axis -1 is, got {size + 1}; pass channel_dim=-1."
    with pytest.raises(ValueError, match=exactly(message)):
        quantizer(torch.zeros(2, size + 1, size))


def test_refuses_indices_without_a_token_axis(name: str) -> None:
    """The shapes that fit are named."""
    quantizer = build(name)
    axes = index_axes(quantizer)
    message = f"indices must be of shape {index_layout(quantizer)}, got shape {axes}."
    with pytest.raises(ValueError, match=exactly(message)):
        quantizer.decode(torch.zeros(axes, dtype=torch.int64))


def test_refuses_indices_of_another_device(name: str) -> None:
    """By name, unless the quantizer holds no tensor and so runs on any device."""
    quantizer = build(name)
    if quantizer.reference is None:
        assert quantizer.decode(torch.zeros(3, dtype=torch.int64, device="meta")).is_meta
        return
    with pytest.raises(ValueError, match=exactly("indices must be on cpu as the quantizer, got meta.")):
        quantizer.decode(torch.zeros(3, *index_axes(quantizer), dtype=torch.int64, device="meta"))


def test_refuses_indices_that_are_no_tensor(name: str) -> None:
    """An int is no index."""
    with pytest.raises(TypeError, match=exactly("indices must be a tensor, got int.")):
        build(name).decode(0)


def _saved(quantizer: Quantizer) -> Quantizer:
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [lambda q: pickle.loads(pickle.dumps(q)), _saved], ids=["pickle", "torch.save"])
def test_pickles_go_on_alike_and_apart(name: str, copied: Callable[[Quantizer], Quantizer]) -> None:
    """A pickle goes on exactly as the original, and changing one leaves the other."""
    original = build(name, training=True)
    original(latents_for(original, (3, -1, 4, 5)))
    twin, before = copied(original), state_of(original)
    assert repr(original) == repr(twin)
    latents = latents_for(original, (3, -1, 4, 5))
    torch.manual_seed(0)
    changed = twin(latents)
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(original(latents), changed, strict=True))
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in original.state_dict().items())
