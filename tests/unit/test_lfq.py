"""LFQ against enumeration of all codes, its entropies, and beside another library's.

Shape letters: N latent vectors, C channels, K = 2^C codes.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import LFQ
from te_quant.quantizers._entropy import assignment_entropy, missing_entropy
from tests.helpers import exactly
from tests.unit.quantizer_oracles import LargestTensor


def corners(channels: int) -> Tensor:
    """(K, C) float64, the first channel being the lowest bit."""
    listed = [tuple(reversed(code)) for code in itertools.product((-1.0, 1.0), repeat=channels)]
    return torch.tensor(listed, dtype=torch.float64)


def soft_assignments(latents: Tensor, temperature: float) -> Tensor:
    """q(c|z) over all K codes: (N, C) -> (N, K)."""
    distances = (latents[:, None] - corners(latents.shape[1])).square().sum(2)
    return torch.softmax(-distances / (2 * temperature), dim=1)


def entropy(shares: Tensor) -> Tensor:
    """In nats, over the last axis."""
    return -torch.xlogy(shares, shares).sum(-1)


def penalty_oracle(latents: Tensor, temperature: float, diversity: float, group: int | None) -> Tensor:
    """E[H(q)] + γ·Σ_groups (log 2^G - H(E[q])) by enumeration; differentiable."""
    result = entropy(soft_assignments(latents, temperature)).mean()
    for part in latents.split(group or latents.shape[1], dim=1):
        mean = soft_assignments(part, temperature).mean(0)
        result = result + diversity * (part.shape[1] * math.log(2) - entropy(mean))
    return result


@given(st.integers(1, 7), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_indices_are_those_of_the_nearest_corners(channels: int, seed: int) -> None:
    """Among all K codes, in their documented order, by distance; decode lists them."""
    quantizer = LFQ(channels).double()
    latents = torch.randn(40, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    output = quantizer(latents)
    codes = corners(channels)
    assert quantizer.num_codes == len(codes)
    assert torch.equal(output.indices, (latents[:, None] - codes).square().sum(2).argmin(1))
    assert torch.equal(quantizer.decode(torch.arange(len(codes))), codes)
    assert torch.equal(quantizer.encode(codes), torch.arange(len(codes)))


def test_zero_counts_as_negative() -> None:
    """As in Eq. 3, also the zero with a sign."""
    assert LFQ(2)(torch.tensor([[0.0, -0.0]])).codes.tolist() == [[-1, -1]]


def test_the_largest_codebook_has_no_negative_index() -> None:
    """2^62 codes fit into int64, one channel more is refused."""
    quantizer = LFQ(62, diversity_weight=0.0)
    output = quantizer(torch.ones(3, 62))
    assert output.indices.tolist() == [2**62 - 1] * 3
    assert torch.equal(quantizer.decode(output.indices), output.codes)


@given(
    st.integers(1, 6),
    st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.sampled_from([None, 1, 2, 4]),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_penalty_and_gradient_by_enumeration(
    channels: int, temperature: float, diversity: float, group: int | None, seed: int
) -> None:
    """Both entropy terms and their gradients, in groups or not, equal those summed over all codes."""
    if group is not None and (group > channels or diversity == 0):
        group = None
    quantizer = LFQ(
        channels,
        temperature=temperature,
        diversity_weight=diversity,
        entropy_weight=0.3,
        entropy_group_dim=group,
        commitment_weight=0.7,
    ).double()
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(25, channels, dtype=torch.float64, generator=generator).mul_(0.3).requires_grad_()
    output = quantizer(latents)
    wanted = 0.3 * penalty_oracle(latents, temperature, diversity, group)
    torch.testing.assert_close(output.regularization_loss, wanted, rtol=1e-9, atol=1e-12)
    assert output.regularization_loss >= 0
    got = torch.autograd.grad(output.regularization_loss, latents, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(wanted, latents)[0], rtol=1e-7, atol=1e-10)
    commitment = 0.7 * (latents - output.codes).square().mean()
    torch.testing.assert_close(output.commitment_loss, commitment)
    assert output.codebook_loss == 0


def test_the_optimum_is_zero_and_collapse_is_dear() -> None:
    """All corners used alike and surely cost nothing; one corner alone costs γ log K; no opinion costs log K."""
    codes = corners(5).float()
    assert LFQ(5, temperature=0.01)(codes).loss == pytest.approx(0, abs=1e-6)
    for weight, diversity in ((1.0, 1.0), (0.1, 2.0)):
        quantizer = LFQ(5, entropy_weight=weight, diversity_weight=diversity)
        collapsed = quantizer(codes[:1].expand(40, -1)).regularization_loss.item()
        assert collapsed == pytest.approx(weight * diversity * 5 * math.log(2), rel=1e-5)
        undecided = quantizer(torch.zeros(40, 5)).regularization_loss.item()
        assert undecided == pytest.approx(weight * 5 * math.log(2), rel=1e-5)


def test_groups_never_ask_for_more() -> None:
    """What is missing within groups is at most what is missing in all, and less where groups copy one another."""
    latents = torch.randn(200, 6, dtype=torch.float64)
    logits = latents * 20
    whole = missing_entropy(logits, None, None)
    halves = sum(missing_entropy(part, None, None) for part in logits.split(3, dim=1))
    assert halves <= whole
    copied = torch.cat([logits[:, :3], logits[:, :3]], dim=1)
    alone = missing_entropy(logits[:, :3], None, None)
    assert missing_entropy(copied, None, None) > 2 * alone + 1


def test_gradients_stay_finite_where_probabilities_vanish() -> None:
    """Far from the boundaries, and at zero, in float32; a naive p·log p would give NaN."""
    for scale in (0.0, 1.0, 1e3, 1e18):
        latents = (torch.randn(30, 8).sign() * scale).requires_grad_()
        output = LFQ(8, commitment_weight=0.0)(latents)
        (gradient,) = torch.autograd.grad(output.loss, latents)
        assert output.loss.isfinite()
        assert gradient.isfinite().all()
    shares = torch.zeros(2, requires_grad=True)
    naive = (shares * shares.log()).sum()
    assert torch.autograd.grad(naive, shares)[0].isnan().all() or naive.isnan()


def test_memory_is_that_of_the_halves() -> None:
    """No N x K tensor: 2^16 codes and 500 latents take K numbers and tables of √K columns."""
    quantizer = LFQ(16)
    latents = torch.randn(500, 16, requires_grad=True)
    with LargestTensor() as watch:
        quantizer(latents).loss.backward()
    assert watch.elements <= max(2**16, 500 * 2**8 * 2)
    assert watch.elements < 500 * 2**16 / 100


def test_skipped_rows_do_not_count() -> None:
    """Losses and their gradients are those of the other rows alone; with none left they are zero."""
    latents = torch.randn(12, 4)
    spoiled = latents.clone()
    spoiled[3, 1], spoiled[7, 0] = math.nan, math.inf
    spoiled.requires_grad_()
    kept = torch.tensor([row not in (3, 7) for row in range(12)])
    quantizer = LFQ(4, nonfinite="skip", temperature=0.5)
    output, clean = quantizer(spoiled), quantizer(latents[kept])
    torch.testing.assert_close(output.regularization_loss, clean.regularization_loss)
    torch.testing.assert_close(output.commitment_loss, clean.commitment_loss)
    output.loss.backward()
    assert spoiled.grad is not None
    assert spoiled.grad[~kept].eq(0).all()
    assert spoiled.grad[kept].ne(0).any(1).all()
    nothing = quantizer(torch.full((3, 4), math.nan))
    assert nothing.loss == 0


def test_no_rows_no_entropy() -> None:
    """Both terms of an empty batch are zero."""
    assert assignment_entropy(torch.empty(0, 3), None) == 0
    assert missing_entropy(torch.empty(0, 3), None, None) == 0


def test_nothing_is_remembered() -> None:
    """No state to save, and none to change."""
    quantizer = LFQ(3)
    assert not quantizer.state_dict()
    assert not list(quantizer.parameters())


@pytest.mark.parametrize(
    ("dim", "options", "error", "message"),
    [
        (0, {}, ValueError, "code_dim must be an int >= 1 and <= 62, got 0."),
        (63, {}, ValueError, "code_dim must be an int >= 1 and <= 62, got 63."),
        (4.0, {}, TypeError, "code_dim must be an int >= 1 and <= 62, got 4.0."),
        (4, {"commitment_weight": -1}, ValueError, "commitment_weight must be a finite number >= 0, got -1."),
        (4, {"entropy_weight": -1}, ValueError, "entropy_weight must be a finite number >= 0, got -1."),
        (4, {"diversity_weight": "1"}, TypeError, "diversity_weight must be a finite number >= 0, got '1'."),
        (4, {"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0."),
        (4, {"temperature": math.nan}, ValueError, "temperature must be a finite number >= 0, got nan."),
        (4, {"entropy_group_dim": 5}, ValueError, "entropy_group_dim must be an int >= 1 and <= 4, got 5."),
        (40, {"entropy_group_dim": 30}, ValueError, "entropy_group_dim must be an int >= 1 and <= 24, got 30."),
        (
            25,
            {},
            ValueError,
            "entropy_group_dim must be an int <= 24 for the entropies of code_dim=25 channels, got None.",
        ),
        (4, {"channel_dim": 0}, ValueError, "channel_dim must be one of 1, -1, got 0."),
    ],
)
def test_refuses_bad_options(dim: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """One sentence that names the option, what is wanted and what came."""
    with pytest.raises(error, match=exactly(message)):
        LFQ(dim, **options)


def test_shows_its_options() -> None:
    """In print."""
    assert repr(LFQ(4)) == "LFQ(code_dim=4)"


def test_beside_vector_quantize_pytorch() -> None:
    """Same corners; bits in the other order; the same entropies and commitment, and a loss log K higher by γ.

    Their q is ∝ exp(2·β·z·c) with β the inverse temperature, ours exp(z·c / T), so β = 1/(2T). Their logarithm
    stops at 10⁻⁵, which a soft assignment does not reach.
    """
    peers = pytest.importorskip("vector_quantize_pytorch")
    channels, temperature, gamma = 4, 1.0, 1.5
    ours = LFQ(channels, temperature=temperature, diversity_weight=gamma, channel_dim=-1)
    theirs = peers.LFQ(
        dim=channels, entropy_loss_weight=0.1, commitment_loss_weight=0.25, diversity_gamma=gamma
    ).train()
    latents = torch.randn(2, 30, channels).mul_(0.5)
    output = ours(latents)
    result, breakdown = theirs(latents, inv_temperature=1 / (2 * temperature), return_loss_breakdown=True)
    torch.testing.assert_close(output.codes, result.quantized)
    reversed_bits = sum(((result.indices >> i) & 1) << (channels - 1 - i) for i in range(channels))
    assert torch.equal(output.indices, reversed_bits.long())
    shift = 0.1 * gamma * channels * math.log(2)
    torch.testing.assert_close(output.loss - shift, result.entropy_aux_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.commitment_loss, 0.25 * breakdown.commitment)


def test_spherical_codes_and_penalty_by_enumeration() -> None:
    """Latents on the unit sphere, the nearest corner of the cube inside it, and the entropies of its distances."""
    quantizer = LFQ(4, spherical=True, temperature=0.1, entropy_weight=0.3, diversity_weight=2.0).double()
    latents = torch.randn(25, 4, dtype=torch.float64, requires_grad=True)
    output = quantizer(latents)
    units = latents / latents.norm(dim=1, keepdim=True)
    codes = corners(4) / 2
    assert torch.equal(output.indices, (units[:, None] - codes).square().sum(2).argmin(1))
    assert torch.equal(quantizer.decode(torch.arange(16)), codes)
    torch.testing.assert_close(output.commitment_loss, 0.25 * (units - output.codes).square().mean())
    # On the sphere distances are a quarter of those between the doubled vectors, which are corners again.
    wanted = 0.3 * penalty_oracle(2 * units, 4 * 0.1, 2.0, None)
    torch.testing.assert_close(output.regularization_loss, wanted, rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad(output.regularization_loss, latents, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(wanted, latents)[0], rtol=1e-7, atol=1e-10)


def test_the_length_of_latents_does_not_matter_on_the_sphere() -> None:
    """Indices, codes and losses are those of the direction."""
    quantizer = LFQ(6, spherical=True).double()
    latents = torch.randn(20, 6, dtype=torch.float64)
    for one, other in zip(quantizer(latents), quantizer(latents * 37.0), strict=True):
        torch.testing.assert_close(one, other)
    assert LFQ(6, spherical=True, entropy_weight=0.2).extra_repr().endswith("spherical=True")


@pytest.mark.parametrize("group", [None, 2])
def test_both_entropies_by_name(group: int | None) -> None:
    """Weighted as in the loss; each equals its enumeration."""
    options: dict[str, Any] = {"temperature": 0.5, "entropy_weight": 0.3, "diversity_weight": 2.0}
    quantizer = LFQ(4, entropy_group_dim=group, **options).double()
    latents = torch.randn(25, 4, dtype=torch.float64)
    output = quantizer(latents)
    terms = quantizer.loss_terms(latents, output.indices)
    both = penalty_oracle(latents, 0.5, 2.0, group)
    first = penalty_oracle(latents, 0.5, 0.0, group)
    torch.testing.assert_close(terms["entropy"], 0.3 * first)
    torch.testing.assert_close(terms["diversity"], 0.3 * (both - first))
    torch.testing.assert_close(terms["entropy"] + terms["diversity"], output.regularization_loss)
    assert terms["commitment"] == output.commitment_loss


def test_terms_without_a_weight_are_zero() -> None:
    """Also with more channels than an entropy could enumerate."""
    quantizer = LFQ(40, entropy_weight=0.0)
    latents = torch.randn(3, 40)
    terms = quantizer.loss_terms(latents, quantizer(latents).indices)
    assert terms["entropy"] == terms["diversity"] == 0
    sure = LFQ(40, diversity_weight=0.0).loss_terms(latents, quantizer(latents).indices)
    assert sure["diversity"] == 0
    assert sure["entropy"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("spherical", [False, True])
def test_our_default_temperature_is_half_as_sharp_as_theirs(spherical: bool) -> None:
    """Theirs, an inverse temperature of 100, is our 0.005; their first bit is our last."""
    peers = pytest.importorskip("vector_quantize_pytorch")
    assert LFQ(5).temperature == 0.01
    theirs = peers.LFQ(dim=5, spherical=spherical).train()
    latents = torch.randn(2, 30, 5).mul_(0.05)
    result, breakdown = theirs(latents, return_loss_breakdown=True)
    found = {}
    for temperature in (0.01, 0.005):
        options: dict[str, Any] = {"entropy_weight": 1.0, "spherical": spherical, "channel_dim": -1}
        ours = LFQ(5, temperature=temperature, **options)
        output = ours(latents)
        found[temperature] = ours.loss_terms(latents, output.indices)
        torch.testing.assert_close(output.codes, result.quantized.detach())
        reversed_bits = sum(((result.indices >> i) & 1) << (4 - i) for i in range(5))
        assert torch.equal(output.indices, reversed_bits.long())
    # Their logarithm stops at 10⁻⁵.
    torch.testing.assert_close(found[0.005]["entropy"], breakdown.per_sample_entropy, rtol=1e-3, atol=1e-3)
    diversity = 5 * math.log(2) - found[0.005]["diversity"]
    torch.testing.assert_close(diversity, breakdown.batch_entropy, rtol=1e-3, atol=1e-3)
    assert (found[0.01]["entropy"] - breakdown.per_sample_entropy).abs() > 0.05
