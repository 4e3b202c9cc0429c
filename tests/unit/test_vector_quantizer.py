"""The losses, options and refusals of VectorQuantizer.

Shape letters: B batch, C code size, h w token grid, K codes, N = B*h*w latent vectors.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import ResidualVectorQuantizer, VectorQuantizer
from te_quant.functional import rotation_trick
from te_quant.testing import assert_shift_equivariant, codebooks, latents_off_boundaries, shifts
from tests.helpers import exactly, plain_quantizer
from tests.unit.quantizer_cases import state_of
from tests.unit.quantizer_oracles import assert_nearest, orthogonality_oracle

METRICS = ("l2", "cosine")


def double_vq(*, codes: int = 7, dim: int = 4, **options: Any) -> VectorQuantizer:
    """A float64 quantizer whose codes are spread like the latents."""
    quantizer = plain_quantizer(codes, dim, **options).double()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(codes, dim, dtype=torch.float64))
        if quantizer.codebook_update == "ema":
            quantizer.code_sums.copy_(quantizer.codebook)
    return quantizer


def rows(*shape: int) -> Tensor:
    """Fresh float64 latents that take gradient."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# Losses and their gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("beta", "own"), [(0.25, 1.0), (0.0, 1.0), (3.0, 1.0), (1.0, 0.25), (0.5, 0.0)])
def test_loss_terms_and_their_gradients(beta: float, own: float, training: bool) -> None:
    """The mean of (z - e)², with its own weight for the codes alone and β times it for the latents alone."""
    quantizer = double_vq(commitment_weight=beta, codebook_weight=own).train(training)
    latents = rows(30, 4)
    output = quantizer(latents)
    z, e, i = latents.detach().numpy(), quantizer.codebook.detach().numpy(), output.indices.numpy()
    mean_square = np.mean((z - e[i]) ** 2)
    assert output.codebook_loss.item() == pytest.approx(own * mean_square, rel=1e-12)
    assert quantizer.loss_terms(latents, output.indices)["codebook"].item() == output.codebook_loss.item()
    assert output.commitment_loss.item() == pytest.approx(beta * mean_square, rel=1e-12)
    assert output.regularization_loss.item() == 0
    to_codes = np.zeros_like(e)
    for n, k in enumerate(i):
        to_codes[k] += 2 * own * (e[k] - z[n]) / z.size
    to_latents = 2 * beta * (z - e[i]) / z.size
    for term, wanted_latents, wanted_codes in (
        (output.codebook_loss, None, to_codes),
        (output.commitment_loss, to_latents, None),
        (output.loss, to_latents, to_codes),
    ):
        got = torch.autograd.grad(term, (latents, quantizer.codebook), retain_graph=True, allow_unused=True)
        for gradient, wanted in zip(got, (wanted_latents, wanted_codes), strict=True):
            if wanted is None:
                assert gradient is None
            else:
                assert gradient is not None
                np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-10, atol=1e-14)


def test_cosine_losses_are_between_unit_vectors() -> None:
    """Under cosine the terms compare unit latents with unit codes, and their gradients pass the scaling."""
    quantizer = double_vq(metric="cosine", commitment_weight=0.5)
    latents = rows(30, 4)
    output = quantizer(latents)
    z = latents.detach().clone().requires_grad_()
    e = quantizer.codebook.detach().clone().requires_grad_()
    unit_z, unit_e = z / z.norm(dim=1, keepdim=True), e / e.norm(dim=1, keepdim=True)
    cosine = (unit_z * unit_e[output.indices]).sum(1)
    # ‖a - b‖² = 2 - 2·a·b for unit vectors.
    assert output.codebook_loss.item() == pytest.approx((2 - 2 * cosine).mean().item() / 4, rel=1e-10)
    assert output.commitment_loss.item() == pytest.approx(0.5 * output.codebook_loss.item(), rel=1e-12)
    held_z, held_e = unit_z.detach(), unit_e.detach()[output.indices]
    reference = (2 - 2 * (held_z * unit_e[output.indices]).sum(1)).mean() / 4
    reference = reference + 0.5 * (2 - 2 * (unit_z * held_e).sum(1)).mean() / 4
    wanted = torch.autograd.grad(reference, (z, e))
    got = torch.autograd.grad(output.loss, (latents, quantizer.codebook))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_assignment_is_the_nearest_or_most_alike(metric: str) -> None:
    """l2 takes the nearest code; cosine the one of the largest cosine; the two differ."""
    quantizer = double_vq(metric=metric, codes=40)
    latents = torch.randn(200, 4, dtype=torch.float64)
    indices = quantizer(latents).indices
    cosines = torch.nn.functional.cosine_similarity(latents[:, None], quantizer.codebook.detach()[None], dim=2)
    if metric == "l2":
        assert_nearest(indices, latents, quantizer.codebook.detach(), clear_share=1.0)
    assert torch.equal(indices, cosines.argmax(1)) == (metric == "cosine")


@given(codebooks(), st.floats(0.01, 0.24), shifts(2), st.data())
@settings(deadline=None, max_examples=40)
def test_tokens_follow_latents_that_move_and_stir_less_than_their_margin(
    codebook: Tensor, margin: float, shift: tuple[int, int], data: st.DataObject
) -> None:
    """What the certified rate rests on: moved, and disturbed by less than the margin, latents keep their codes."""
    quantizer = double_vq(codes=len(codebook), dim=codebook.shape[1]).eval()
    quantizer.codebook.data.copy_(codebook)
    latents, indices = data.draw(latents_off_boundaries(codebook, margin=margin, grid=(3, 5), batch=2))
    assert torch.equal(quantizer.encode(latents), indices)
    assert_shift_equivariant(quantizer.encode, latents, shifts=[shift])
    stir = torch.randn_like(latents)
    stir *= 0.99 * margin / stir.norm(dim=1, keepdim=True)
    moved = quantizer(latents.roll(shift, (-2, -1)) + stir)
    assert torch.equal(moved.indices, indices.roll(shift, (-2, -1)))
    assert torch.equal(moved.codes, quantizer(latents).codes.roll(shift, (-2, -1)))


def test_tokens_do_not_follow_latents_that_stir_more_than_their_margin() -> None:
    """The control: twice the way to the boundary is another code."""
    quantizer = double_vq(codes=2, dim=1).eval()
    quantizer.codebook.data.copy_(torch.tensor([[0.0], [1.0]]))
    latents = torch.tensor([[[[0.2, 0.9]]]], dtype=torch.float64)
    margins = torch.tensor([[[[0.3, -0.4]]]])
    assert quantizer.encode(latents + 0.99 * margins).tolist() == [[[0, 1]]]
    assert quantizer.encode(latents + 1.01 * margins).tolist() == [[[1, 0]]]


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("training", [True, False])
def test_cosine_codes_have_unit_length(update: str, training: bool) -> None:
    """Returned and decoded; the latents' length does not matter to the choice."""
    quantizer = double_vq(metric="cosine", codebook_update=update).train(training)
    latents = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    frozen = copy.deepcopy(quantizer).freeze()
    assert torch.equal(frozen(latents).indices, frozen(latents * 1e3).indices)
    output = quantizer(latents)
    torch.testing.assert_close(output.codes.norm(dim=1), torch.ones(2, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(quantizer.decode(output.indices).norm(dim=1), torch.ones(2, 3, 5).double())


def test_ema_has_no_codebook_term() -> None:
    """Under ema the codebook is no subject of gradients and its term is zero."""
    quantizer = double_vq(codebook_update="ema", orthogonal_reg=2.0)
    latents = rows(30, 4)
    output = quantizer(latents)
    assert output.codebook_loss.item() == 0
    assert output.loss.item() == pytest.approx((output.commitment_loss + output.regularization_loss).item())
    output.loss.backward()
    assert quantizer.codebook.grad is None
    codes = quantizer.decode(output.indices)
    assert output.commitment_loss.item() == pytest.approx(0.25 * (latents - codes).square().mean().item())
    assert output.regularization_loss.item() == pytest.approx(2 * orthogonality_oracle(quantizer.codebook))


# Estimators


@pytest.mark.parametrize("estimator", ["straight_through", "rotation_trick"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_the_estimator_carries_the_gradient(estimator: str, channel_dim: int) -> None:
    """End to end: upstream unchanged for straight-through; rotated row by row for the trick."""
    quantizer = double_vq(gradient_estimator=estimator, channel_dim=channel_dim)
    latents = rows(2, 4, 3, 5) if channel_dim == 1 else rows(2, 3, 5, 4)
    upstream = torch.randn_like(latents)
    output = quantizer(latents)
    (gradient,) = torch.autograd.grad(output.quantized, latents, upstream)
    if estimator == "straight_through":
        assert torch.equal(gradient, upstream)
        return
    z, codes, up = (t.movedim(channel_dim, -1).reshape(-1, 4) for t in (latents.detach(), output.codes, upstream))
    z.requires_grad_()
    (wanted,) = torch.autograd.grad(rotation_trick(z, codes), z, up)
    torch.testing.assert_close(gradient.movedim(channel_dim, -1).reshape(-1, 4), wanted)
    assert not torch.allclose(gradient, upstream)


# Temperature


def test_temperature_samples_in_training_alone() -> None:
    """In train a warm quantizer draws other codes, reproducibly; eval and encode take the nearest."""
    quantizer = double_vq(temperature=5.0, codes=20)
    latents = torch.randn(300, 4, dtype=torch.float64)
    nearest = quantizer.encode(latents)
    first, again, other = (
        quantizer(latents, generator=torch.Generator().manual_seed(seed)).indices for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first != nearest).double().mean() > 0.3
    assert torch.equal(quantizer.encode(latents), nearest)
    assert torch.equal(quantizer.eval()(latents).indices, nearest)


# The penalty


@pytest.mark.parametrize(("codes", "dim"), [(4, 6), (9, 4)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("training", [True, False])
def test_penalty_is_lambda_times_equation_5(codes: int, dim: int, metric: str, training: bool) -> None:
    """Value and gradient, for K <= C and K > C; it does not touch the latents."""
    quantizer = double_vq(codes=codes, dim=dim, metric=metric, orthogonal_reg=10.0).train(training)
    latents = rows(30, dim)
    output = quantizer(latents)
    assert output.regularization_loss.item() == pytest.approx(10 * orthogonality_oracle(quantizer.codebook))
    e = quantizer.codebook.detach().clone().requires_grad_()
    units = e / e.norm(dim=1, keepdim=True)
    naive = 10 * (units @ units.T - torch.eye(codes).double()).square().sum() / codes**2
    (wanted,) = torch.autograd.grad(naive, e)
    gradient, none = torch.autograd.grad(
        output.regularization_loss, (quantizer.codebook, latents), retain_graph=True, allow_unused=True
    )
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    assert none is None
    total = torch.autograd.grad(output.loss, quantizer.codebook, retain_graph=True)[0]
    term = torch.autograd.grad(output.codebook_loss, quantizer.codebook)[0]
    torch.testing.assert_close(total - term, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_active_only_looks_at_the_codes_of_the_batch(training: bool) -> None:
    """The penalty counts the chosen codes and moves no other, in training and in evaluation."""
    quantizer = double_vq(codes=12, orthogonal_reg=10.0, orthogonal_active_only=True).train(training)
    latents = rows(5, 4)
    output = quantizer(latents)
    active = torch.zeros(12, dtype=torch.bool)
    active[output.indices] = True
    assert 1 < active.sum() < 12
    wanted = 10 * orthogonality_oracle(quantizer.codebook, active)
    assert output.regularization_loss.item() == pytest.approx(wanted)
    assert output.regularization_loss.item() != pytest.approx(10 * orthogonality_oracle(quantizer.codebook))
    (gradient,) = torch.autograd.grad(output.regularization_loss, quantizer.codebook)
    assert (gradient[active].abs().sum(1) > 0).all()
    assert (gradient[~active] == 0).all()


def touched_codes(quantizer: VectorQuantizer, latents: Tensor, seed: int | None = None) -> tuple[Tensor, float]:
    """Which codes the penalty of one forward pass moves, and its value."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    output = quantizer(latents, generator=generator)
    (gradient,) = torch.autograd.grad(output.regularization_loss, quantizer.codebook)
    return gradient.abs().sum(1) > 0, output.regularization_loss.item()


def test_max_codes_draws_a_subset_while_training() -> None:
    """At most that many codes, another draw each step, all in their turn; all at once in eval or if K is less."""
    quantizer = double_vq(codes=12, orthogonal_reg=10.0, orthogonal_max_codes=5)
    latents = rows(30, 4)
    seen = torch.zeros(12, dtype=torch.int64)
    for seed in range(60):
        touched, value = touched_codes(quantizer, latents, seed)
        assert touched.sum() == 5
        assert value == pytest.approx(10 * orthogonality_oracle(quantizer.codebook, touched))
        seen += touched
    # 60 draws of 5 in 12: 25 each, standard deviation 3.8.
    assert seen.min() >= 8
    assert seen.max() <= 42
    assert torch.equal(touched_codes(quantizer, latents, 3)[0], touched_codes(quantizer, latents, 3)[0])
    assert touched_codes(quantizer.eval(), latents)[0].all()
    loose = double_vq(codes=12, orthogonal_reg=10.0, orthogonal_max_codes=12)
    assert touched_codes(loose, latents)[0].all()


def test_max_codes_among_active_codes() -> None:
    """Both options together: a subset of the chosen codes, fewer if fewer are chosen."""
    quantizer = double_vq(codes=30, orthogonal_reg=10.0, orthogonal_max_codes=6, orthogonal_active_only=True)
    for count in (3, 40):
        latents = rows(count, 4)
        active = torch.zeros(30, dtype=torch.bool)
        active[quantizer.encode(latents)] = True
        touched, value = touched_codes(quantizer, latents, count)
        assert not (touched & ~active).any()
        assert touched.sum() == min(6, int(active.sum()))
        assert value == pytest.approx(10 * orthogonality_oracle(quantizer.codebook, touched))


# NaN and infinities


def test_nonfinite_vectors_are_skipped() -> None:
    """The losses, gradients and statistics are those of the finite vectors alone; the others get none."""
    for options in (
        {"codebook_update": "ema", "orthogonal_reg": 1.0, "orthogonal_active_only": True},
        {"metric": "cosine", "codebook_update": "ema"},
        {"gradient_estimator": "rotation_trick"},
        {"metric": "cosine", "orthogonal_reg": 1.0},
    ):
        one = double_vq(nonfinite="skip", **options)
        two = copy.deepcopy(one)
        bad = torch.zeros(30, dtype=torch.bool)
        bad[[0, 7, 29]] = True
        dirty = torch.randn(30, 4, dtype=torch.float64)
        clean = dirty[~bad].clone().requires_grad_()
        dirty[0, 1], dirty[7], dirty[29, 3] = math.nan, math.inf, -math.inf
        dirty.requires_grad_()
        got, wanted = one(dirty), two(clean)
        for a, b in zip(got[2:6], wanted[2:6], strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(got.indices[~bad], wanted.indices)
        assert got.quantized.isfinite().all()
        assert torch.equal(got.quantized, one.decode(got.indices))
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, two.state_dict()[name])
        (got.loss + got.quantized[~bad].square().sum() + got.quantized[bad].sum()).backward()
        (wanted.loss + wanted.quantized.square().sum()).backward()
        assert dirty.grad is not None
        assert clean.grad is not None
        assert (dirty.grad[bad] == 0).all()
        torch.testing.assert_close(dirty.grad[~bad], clean.grad)
        if one.codebook.grad is not None:
            torch.testing.assert_close(one.codebook.grad, two.codebook.grad)


def test_a_batch_of_skipped_vectors_changes_nothing() -> None:
    """Zero loss, no update; k-means and revival do not look at them either."""
    quantizer = double_vq(nonfinite="skip", codebook_update="ema")
    before = state_of(quantizer)
    output = quantizer(torch.full((5, 4), math.nan, dtype=torch.float64))
    assert output.loss.item() == 0
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    latents = torch.randn(50, 4, dtype=torch.float64)
    latents[::2, 0] = math.nan
    quantizer.kmeans_init(latents)
    quantizer.usage[:3] = 0
    assert quantizer.revive_dead_codes(latents).sum() == 3
    assert quantizer.codebook.isfinite().all()


def test_off_does_not_look() -> None:
    """No error and no index out of range, whatever the values."""
    quantizer = plain_quantizer(7, 4, nonfinite="off").eval()
    latents = torch.randn(10, 4)
    latents[3, 1], latents[4, 0] = math.nan, math.inf
    output = quantizer(latents)
    assert output.indices.min() >= 0
    assert output.indices.max() < 7
    assert output.loss.isnan()


# Refusals of options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_codes": 0}, ValueError, "num_codes must be an int >= 1, got 0."),
        ({"num_codes": True}, TypeError, "num_codes must be an int >= 1, got True."),
        ({"num_codes": 4.0}, TypeError, "num_codes must be an int >= 1, got 4.0."),
        ({"code_dim": 0}, ValueError, "code_dim must be an int >= 1, got 0."),
        ({"code_dim": -3}, ValueError, "code_dim must be an int >= 1, got -3."),
        ({"metric": "euclidean"}, ValueError, "metric must be one of 'l2', 'cosine', 'cosine_raw', 'dot', got 'euclidean'."),  # noqa: E501
        ({"metric": "dot", "codebook_update": "ema"}, ValueError, "codebook_update must be 'gradient' with metric='dot', got 'ema'."),  # noqa: E501
        ({"codebook_update": "sgd"}, ValueError, "codebook_update must be one of 'gradient', 'ema', got 'sgd'."),
        ({"commitment_weight": -0.1}, ValueError, "commitment_weight must be a finite number >= 0, got -0.1."),
        ({"commitment_weight": math.nan}, ValueError, "commitment_weight must be a finite number >= 0, got nan."),
        ({"commitment_weight": "1"}, TypeError, "commitment_weight must be a finite number >= 0, got '1'."),
        ({"codebook_weight": -1}, ValueError, "codebook_weight must be a finite number >= 0, got -1."),
        ({"codebook_weight": 0.25, "codebook_update": "ema"}, ValueError, "codebook_weight must be 1 with codebook_update='ema', under which there is no codebook term, got 0.25."),  # noqa: E501
        ({"orthogonal_reg": -1}, ValueError, "orthogonal_reg must be a finite number >= 0, got -1."),
        ({"orthogonal_reg": math.inf}, ValueError, "orthogonal_reg must be a finite number >= 0, got inf."),
        ({"orthogonal_max_codes": 0, "orthogonal_reg": 1.0}, ValueError, "orthogonal_max_codes must be an int >= 1, got 0."),  # noqa: E501
        ({"orthogonal_max_codes": 2.5, "orthogonal_reg": 1.0}, TypeError, "orthogonal_max_codes must be an int >= 1, got 2.5."),  # noqa: E501
        ({"gradient_estimator": "ste"}, ValueError, "gradient_estimator must be one of 'straight_through', 'rotation_trick', got 'ste'."),  # noqa: E501
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number >= 0, got -1.0."),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number >= 0, got nan."),
        ({"decay": 1.0}, ValueError, "decay must be a finite number >= 0 and < 1, got 1.0."),
        ({"decay": -0.1}, ValueError, "decay must be a finite number >= 0 and < 1, got -0.1."),
        ({"decay": True}, TypeError, "decay must be a finite number >= 0 and < 1, got True."),
        ({"channel_dim": 2}, ValueError, "channel_dim must be one of 1, -1, got 2."),
        ({"channel_dim": True}, TypeError, "channel_dim must be an int, got True."),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of None, 'raise', 'skip', 'off', got 'ignore'."),  # noqa: E501
    ],
)  # fmt: skip
def test_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each bad option has its own sentence."""
    with pytest.raises(error, match=exactly(message)):
        plain_quantizer(**{"num_codes": 4, "code_dim": 3, **options})


def test_options_are_keywords() -> None:
    """Nothing but the two sizes is positional."""
    with pytest.raises(TypeError, match="positional argument"):
        plain_quantizer(4, 3, "l2")  # type: ignore[misc]


def test_unknown_options_are_refused() -> None:
    """None is swallowed."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        plain_quantizer(4, 3, beta=1.0)  # type: ignore[call-arg]


# State


def test_initial_codebook() -> None:
    """Uniform on ±1/K from the generator given, which leaves the global state alone."""
    state = torch.get_rng_state()
    one, two, other = (
        plain_quantizer(50, 8, generator=torch.Generator().manual_seed(seed)).codebook for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.shape == (50, 8)
    assert 0.019 < one.abs().max().item() <= 0.02
    assert plain_quantizer(5, 2).codebook.requires_grad
    assert not plain_quantizer(5, 2, codebook_update="ema").codebook.requires_grad


def test_the_state_of_each_update() -> None:
    """What is stored is what training needs to go on."""
    gradient, ema = plain_quantizer(5, 2), plain_quantizer(5, 2, codebook_update="ema")
    assert sorted(gradient.state_dict()) == ["codebook", "pending_counts", "usage"]
    assert sorted(ema.state_dict()) == ["code_sums", "codebook", "pending_counts", "pending_sums", "usage"]
    assert list(dict(gradient.named_parameters())) == ["codebook"]
    assert not list(ema.parameters())


def test_usage_is_counted_while_training_by_gradient_too() -> None:
    """The moving average of the counts starts at 1 a code and follows the decay."""
    quantizer = double_vq(decay=0.9)
    expected = np.ones(7)
    for _ in range(4):
        indices = quantizer(torch.randn(20, 4, dtype=torch.float64)).indices
        expected = 0.9 * expected + 0.1 * np.bincount(indices, minlength=7)
    quantizer.apply_pending()
    np.testing.assert_allclose(quantizer.usage.numpy(), expected)


def test_repr_names_the_options() -> None:
    """The printed module tells what it is."""
    text = repr(plain_quantizer(5, 2, metric="cosine", orthogonal_reg=10.0))
    parts = ("num_codes=5", "code_dim=2", "metric='cosine'", "codebook_update='gradient'", "orthogonal_reg=10")
    for part in parts:
        assert part in text


def test_gradient_training_finds_clusters() -> None:
    """A short run of SGD on the loss brings each code to its cluster; without the codebook term it cannot."""
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    data = centres.repeat(20, 1) + 0.1 * torch.randn(60, 2, dtype=torch.float64)
    for term, arrives in (("loss", True), ("commitment_loss", False)):
        quantizer = plain_quantizer(3, 2).double()
        quantizer.codebook.data.copy_(centres * 0.2)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            latents = data.clone().requires_grad_()
            getattr(quantizer(latents), term).backward()
            optimizer.step()
        assert ((quantizer.codebook - centres).norm(dim=1).max().item() < 0.2) == arrives


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("build", [VectorQuantizer, partial(ResidualVectorQuantizer, num_quantizers=2)])
def test_the_layouts_that_a_refusal_names_work(build: Callable[..., Any], channel_dim: int) -> None:
    """All of them and no others: for latents, and for indices of one or Q axes."""
    quantizer = build(9, 3, channel_dim=channel_dim)
    sizes = {"N": 5, "B": 2, "C": 3, "T": 4, "d": 3, "h": 2, "w": 5, "Q": 2}
    found = []
    for method, wrong in (
        (quantizer, torch.zeros(3)),
        (quantizer.decode, torch.zeros([1] * 7, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"must be of shape \(.*\), got shape \(.*\)\.$") as refused:
            method(wrong)
        named = str(refused.value).partition(" of shape ")[2].partition(", got")[0]
        found.append(
            [[sizes[axis] for axis in re.findall(r"\w", shape)] for shape in re.findall(r"\(.*?\)", named)]
        )
    latents, indices = found
    assert [len(shape) for shape in latents] == [2, 3, 4, 5]
    for shape, chosen in zip(latents, indices, strict=True):
        output = quantizer(torch.randn(shape))
        assert list(output.indices.shape) == chosen
        assert list(quantizer.decode(output.indices).shape) == shape
    for shape in ([3], [2, 3, 2, 2, 2, 3]):
        with pytest.raises(ValueError, match=r"latents must be of shape \(N, C\), .*, got shape"):
            quantizer(torch.zeros(shape))
