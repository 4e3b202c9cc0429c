"""The moving-average codebook, and the penalty that lasts under it.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import copy
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
from te_quant.functional import orthogonality
from te_quant.quantizers._penalized_means import penalized_means, smoothed
from tests.helpers import plain_quantizer
from tests.unit.quantizer_cases import state_of
from tests.unit.quantizer_oracles import mean_squared_cosine, objective

EPSILON = 1e-5


def correlated(n: int, c: int, generator: torch.Generator) -> Tensor:
    """Latents around a common direction: their cosines are high."""
    return 3.0 + torch.randn(n, c, generator=generator, dtype=torch.float64)


def trained(steps: int, *, k: int = 16, c: int = 16, **options: Any) -> tuple[float, float]:
    """Mean squared cosine of the codes in use before and after ``steps`` on correlated latents."""
    generator = torch.Generator().manual_seed(0)
    quantizer = plain_quantizer(k, c, **options).double()
    quantizer.kmeans_init(correlated(512, c, generator), generator=generator)
    before = mean_squared_cosine(quantizer.codebook)
    optimizer = None
    if quantizer.codebook_update == "gradient":
        optimizer = torch.optim.Adam([quantizer.codebook], lr=0.05)
    for _ in range(steps):
        output = quantizer(correlated(256, c, generator), generator=generator)
        if optimizer:
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
    return before, mean_squared_cosine(quantizer.codebook)


# The plain moving average


@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_plain_update_is_the_one_of_van_den_oord(decay: float, metric: str) -> None:
    """Counts, sums and codebook follow the published recursion over several batches."""
    k, c = 6, 3
    quantizer = plain_quantizer(k, c, codebook_update="ema", decay=decay, metric=metric).double()  # type: ignore[arg-type]
    table = quantizer.codebook.detach().numpy().copy()
    counts, sums = np.ones(k), table.copy()
    for step in range(6):
        latents = torch.randn(40, c, dtype=torch.float64) * (1 + step)
        output = quantizer(latents)
        quantizer.apply_pending()
        z, e = latents.numpy(), table
        if metric == "cosine":
            # A code that nothing chose is zero where decay is 0, and stays zero.
            z, e = (t / np.linalg.norm(t, axis=1, keepdims=True).clip(1e-12) for t in (z, e))
        chosen = ((z[:, None] - e[None]) ** 2).sum(2).argmin(1)
        np.testing.assert_array_equal(output.indices.numpy(), chosen)
        for code in range(k):
            mine = z[chosen == code]
            counts[code] = decay * counts[code] + (1 - decay) * len(mine)
            sums[code] = decay * sums[code] + (1 - decay) * mine.sum(0)
        laplace = (counts + EPSILON) / (counts.sum() + k * EPSILON) * counts.sum()
        table = sums / laplace[:, None]
        np.testing.assert_allclose(quantizer.usage.numpy(), counts, rtol=1e-12)
        np.testing.assert_allclose(quantizer.code_sums.numpy(), sums, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(quantizer.codebook.detach().numpy(), table, rtol=1e-10, atol=1e-14)


def test_codes_are_those_that_were_searched() -> None:
    """What forward returns is what decode gives before and after it, until the codebook moves."""
    quantizer = plain_quantizer(6, 3, codebook_update="ema", decay=0.5)
    latents = torch.randn(40, 3)
    before = quantizer.decode(quantizer.encode(latents))
    output = quantizer(latents)
    assert torch.equal(output.codes, before)
    assert torch.equal(output.codes, quantizer.decode(output.indices))
    quantizer.apply_pending()
    assert not torch.equal(output.codes, quantizer.decode(output.indices))


def test_eval_changes_nothing() -> None:
    """Only training moves the averages."""
    quantizer = plain_quantizer(6, 3, codebook_update="ema", orthogonal_reg=1.0).eval()
    before = state_of(quantizer)
    quantizer(torch.randn(40, 3))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    quantizer.train()(torch.randn(40, 3))
    quantizer(torch.randn(40, 3))
    assert not any(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_smoothing_keeps_the_total(counts: list[int]) -> None:
    """Laplace smoothing leaves the sum as it is and no count at zero, unless all are."""
    usage = torch.tensor(counts, dtype=torch.float64)
    result = smoothed(usage, EPSILON)
    assert result.sum().item() == pytest.approx(sum(counts))
    assert (result > 0).all() or sum(counts) == 0


# The objective


@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 10),
    c=st.integers(1, 7),
    weight=st.sampled_from([1e-4, 0.1, 1.0, 10.0, 1e3]),
    common=st.sampled_from([0.0, 3.0]),
    holes=st.booleans(),
    masked=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_a_step_never_raises_the_objective(
    seed: int, k: int, c: int, weight: float, common: float, holes: bool, masked: bool
) -> None:
    """From any codebook, for K <= C and K > C, correlated or not, with codes unused, at zero, or masked."""
    generator = torch.Generator().manual_seed(seed)
    codebook, means = (common + torch.randn(k, c, generator=generator, dtype=torch.float64) for _ in range(2))
    shares = torch.rand(k, generator=generator, dtype=torch.float64)
    mask = torch.rand(k, generator=generator) < 0.6 if masked else None
    start = codebook.clone()
    if holes:
        shares[torch.rand(k, generator=generator) < 0.3] = 0
        zero = torch.rand(k, generator=generator) < 0.3
        # A zero code has no direction; the step starts from its mean.
        codebook[zero], start[zero] = 0, means[zero]
    shares /= shares.sum().clamp_min(1e-9)
    for _ in range(4):
        before = objective(start, means, shares, weight, mask).item()
        codebook = penalized_means(codebook, means, shares, weight, mask)
        after = objective(codebook, means, shares, weight, mask).item()
        assert codebook.isfinite().all()
        assert after <= before + 1e-10 * (1 + abs(before))
        start = codebook


def test_the_objective_test_can_fail() -> None:
    """Negative control: writing the means, as a plain moving average does, raises the objective."""
    generator = torch.Generator().manual_seed(0)
    means = correlated(6, 6, generator)
    shares = torch.full((6,), 1 / 6, dtype=torch.float64)
    codebook = means
    for _ in range(200):
        codebook = penalized_means(codebook, means, shares, 10.0)
    assert objective(means, means, shares, 10.0) > objective(codebook, means, shares, 10.0) + 1


def at_rest(step: Callable[[Tensor], Tensor], codebook: Tensor) -> Tensor:
    """Where repeated steps lead, to a few thousand roundings."""
    for _ in range(20_000):
        before, codebook = codebook, step(codebook)
        if float((codebook - before).norm()) < 1e-12 * float(codebook.norm()):
            break
    return codebook


@pytest.mark.parametrize(("k", "c"), [(5, 8), (9, 4)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weight", [0.3, 10.0])
def test_repeated_steps_reach_a_stationary_point(k: int, c: int, masked: bool, weight: float) -> None:
    """With the statistics held, the gradient of F vanishes, for that λ and no other."""
    generator = torch.Generator().manual_seed(k)
    means = 1.0 + torch.randn(k, c, generator=generator, dtype=torch.float64)
    shares = torch.rand(k, generator=generator, dtype=torch.float64) + 0.5
    shares /= shares.sum()
    mask = torch.arange(k) != 2 if masked else None
    codebook = means.clone()
    codebook = at_rest(lambda e: penalized_means(e, means, shares, weight, mask), codebook)
    sizes = {}
    for scale in (1.0, 2.0):
        point = codebook.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(point, means, shares, scale * weight, mask), point)
        sizes[scale] = gradient.norm().item()
    assert sizes[1.0] < 1e-6
    assert sizes[2.0] > 1e-4


@pytest.mark.parametrize("unit", [True, False])
def test_under_cosine_the_directions_alone_come_to_rest(unit: bool) -> None:
    """Where lengths do not count, F has radius 1; the step made for free lengths rests somewhere else."""
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(6, 8, generator=generator, dtype=torch.float64) + 0.5
    means = 0.7 * torch.nn.functional.normalize(means, dim=1)
    shares = torch.full((6,), 1 / 6, dtype=torch.float64)
    codebook = means.clone()
    codebook = at_rest(lambda e: penalized_means(e, means, shares, 0.5, unit=unit), codebook)
    point = codebook.clone().requires_grad_()
    directions = torch.nn.functional.normalize(point, dim=1)
    data = -(2 / 8) * (shares[:, None] * directions * means).sum()
    penalty = 0.5 * ((directions @ directions.T - torch.eye(6, dtype=torch.float64)) ** 2).sum() / 36
    (gradient,) = torch.autograd.grad(data + penalty, point)
    assert (gradient.norm().item() < 1e-8) == unit


@pytest.mark.parametrize("lam", [0.5, 10.0])
def test_lambda_means_the_same_in_both_modes(lam: float) -> None:
    """Where the ema codebook comes to rest on a fixed batch, the gradient loss with the same λ has no gradient."""
    generator = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(5, 6, generator=generator, dtype=torch.float64) + 2
    latents = (centres[:, None] + 0.3 * torch.randn(5, 40, 6, generator=generator, dtype=torch.float64)).flatten(
        0, 1
    )
    ema = plain_quantizer(5, 6, codebook_update="ema", orthogonal_reg=lam, decay=0.0).double()
    ema.codebook.copy_(centres)
    ema.code_sums.copy_(centres)

    def step(_: Tensor) -> Tensor:
        ema(latents)
        return ema.codebook.detach().clone()

    at_rest(step, step(centres))
    gradients = {}
    for scale in (1.0, 2.0, 0.0):
        learnt = plain_quantizer(5, 6, orthogonal_reg=scale * lam).double()
        learnt.codebook.data.copy_(ema.codebook)
        output = learnt(latents)
        assert len(output.indices.unique()) == 5
        output.loss.backward()
        assert learnt.codebook.grad is not None
        gradients[scale] = learnt.codebook.grad.norm().item()
    # Laplace smoothing moves the rest point by about its ε.
    assert gradients[1.0] < 1e-4
    assert gradients[2.0] > 100 * gradients[1.0]
    assert gradients[0.0] > 100 * gradients[1.0]


def test_a_vanishing_lambda_gives_the_means() -> None:
    """As λ goes to zero one step tends to the plain moving average."""
    generator = torch.Generator().manual_seed(0)
    codebook, means = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    shares = torch.full((7,), 1 / 7, dtype=torch.float64)
    torch.testing.assert_close(penalized_means(codebook, means, shares, 1e-12), means, rtol=1e-7, atol=1e-7)
    assert (penalized_means(codebook, means, shares, 1.0) - means).norm() > 0.1
    seen = []
    for lam in (0.0, 1e-12):
        quantizer = plain_quantizer(7, 5, codebook_update="ema", orthogonal_reg=lam).double()
        quantizer.codebook.copy_(codebook)
        quantizer.code_sums.copy_(codebook)
        for seed in range(3):
            quantizer(torch.randn(50, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        seen.append(quantizer.codebook.clone())
    torch.testing.assert_close(*seen, rtol=1e-7, atol=1e-7)


# The effect


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_cosines_fall_with_the_penalty_and_stay_without(update: str, metric: str) -> None:
    """On correlated latents, λ = 10 makes the codes nearly orthogonal in both modes; λ = 0 leaves them alike."""
    before, after = trained(200, codebook_update=update, metric=metric, orthogonal_reg=10.0)
    assert before > 0.5
    assert after < 0.02
    before, after = trained(200, codebook_update=update, metric=metric)
    assert min(before, after) > 0.5


def test_cosines_fall_step_by_step() -> None:
    """Under ema the fall is steady and lasting, not one jump that the next average undoes."""
    curve = [trained(steps, codebook_update="ema", orthogonal_reg=10.0)[1] for steps in (1, 5, 20, 80, 320)]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.01


def test_a_penalty_in_the_loss_alone_does_not_last() -> None:
    """Negative control, what peers do: a gradient step on the penalty, then the averages overwrite it."""
    generator = torch.Generator().manual_seed(0)
    quantizer = plain_quantizer(16, 16, codebook_update="ema").double()
    quantizer.kmeans_init(correlated(512, 16, generator), generator=generator)
    learnt = torch.nn.Parameter(quantizer.codebook.detach().clone())
    optimizer = torch.optim.Adam([learnt], lr=0.05)
    for _ in range(200):
        quantizer(correlated(256, 16, generator))
        learnt.data.copy_(quantizer.codebook)
        optimizer.zero_grad()
        (10 * orthogonality(learnt)).backward()
        optimizer.step()
        quantizer.codebook.copy_(learnt.data)
    quantizer(correlated(256, 16, generator))
    assert mean_squared_cosine(quantizer.codebook) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"orthogonal_active_only": True},
        {"orthogonal_max_codes": 6},
        {"orthogonal_max_codes": 6, "orthogonal_active_only": True},
    ],
)
def test_the_effect_lasts_under_every_option(options: dict[str, Any]) -> None:
    """Codes outside one step's penalty keep what earlier steps gave them, those no longer in use included."""
    (before, soon), (_, late) = (
        trained(steps, codebook_update="ema", orthogonal_reg=10.0, **options) for steps in (50, 400)
    )
    assert before > 0.5
    assert soon < 0.4 * before
    assert late < soon + 0.02


def test_more_codes_than_dimensions_approach_a_tight_frame() -> None:
    """With K > C the penalty nears its bound 1/C - 1/K, which is far below where the latents lie."""
    generator = torch.Generator().manual_seed(0)
    quantizer = plain_quantizer(24, 6, codebook_update="ema", orthogonal_reg=10.0).double()
    quantizer.kmeans_init(correlated(512, 6, generator), generator=generator)
    start = orthogonality(quantizer.codebook).item()
    for _ in range(200):
        quantizer(correlated(256, 6, generator))
    assert start > 0.5
    assert 1 / 6 - 1 / 24 - 1e-9 <= orthogonality(quantizer.codebook).item() < 0.2


def test_codes_outside_the_penalty_follow_their_means() -> None:
    """A code that the subset leaves out moves by the change of its mean, no more and no less."""
    generator = torch.Generator().manual_seed(0)
    quantizer = plain_quantizer(
        8, 4, codebook_update="ema", orthogonal_reg=5.0, orthogonal_max_codes=3, decay=0.8
    ).double()
    quantizer.kmeans_init(correlated(100, 4, generator), generator=generator)
    for seed in range(5):
        before = state_of(quantizer)
        quantizer(correlated(64, 4, generator), generator=torch.Generator().manual_seed(seed))
        quantizer.apply_pending()
        after = state_of(quantizer)
        old, new = (s["code_sums"] / smoothed(s["usage"], EPSILON).unsqueeze(1) for s in (before, after))
        left = (after["codebook"] - (before["codebook"] + new - old)).norm(dim=1) < 1e-12
        assert left.sum() == 5


@pytest.mark.parametrize("way", ["eval", "freeze", "apply_pending", "accumulate", "revive_dead_codes"])
@pytest.mark.parametrize("build", [VectorQuantizer, partial(ResidualVectorQuantizer, num_quantizers=2)])
def test_the_codebook_moves_alike_under_autocast(way: str, build: Callable[..., Any]) -> None:
    """Whatever moves it; without a penalty nothing that autocast would round is computed."""
    torch.manual_seed(0)
    plain = build(num_codes=16, code_dim=8, orthogonal_reg=10.0)
    plain(torch.randn(200, 8))
    plain(torch.randn(200, 8))
    rounded = copy.deepcopy(plain)
    latents = (torch.randn(200, 8),) if way == "revive_dead_codes" else ()
    for quantizer, on in ((plain, False), (rounded, True)):
        before = quantizer.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            torch.manual_seed(1)
            result = getattr(quantizer, way)(*latents)
            if way == "accumulate":
                with result:
                    pass
        assert not all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    for name, value in plain.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], value), name
