"""k-means, revival of dead codes, freezing.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from te_quant import FSQ, ResidualVectorQuantizer, VectorQuantizer
from tests.helpers import exactly, not_finite, plain_quantizer
from tests.unit.quantizer_cases import state_of

UPDATES = ("gradient", "ema")


def unchanged(module: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the state is bit-identical to ``before``."""
    state = module.state_dict()
    return state.keys() == before.keys() and all(torch.equal(before[name], state[name]) for name in before)


def seeded(seed: int) -> torch.Generator:
    """A generator with that seed."""
    return torch.Generator().manual_seed(seed)


def blobs(*, k: int = 5, each: int = 30, seed: int = 0, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Points around ``k`` far centres, shuffled, and the centres."""
    centres = 5 * torch.randn(k, 3, generator=seeded(seed), dtype=torch.float64)
    points = centres.repeat(each, 1) + spread * torch.randn(k * each, 3, generator=seeded(seed + 1)).double()
    return points[torch.randperm(len(points), generator=seeded(seed + 2))], centres


# k-means


def lloyd(points: np.ndarray, centres: np.ndarray, iterations: int, spherical: bool) -> np.ndarray:
    """Lloyd's algorithm, one centre at a time."""
    centres = centres.copy()
    for _ in range(iterations):
        owner = np.array([int(((p - centres) ** 2).sum(1).argmin()) for p in points])
        for k in range(len(centres)):
            if (owner == k).any():
                centres[k] = points[owner == k].mean(0)
                if spherical:
                    centres[k] /= np.linalg.norm(centres[k])
    return centres


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_kmeans_is_lloyds_algorithm(update: str, metric: str, channel_dim: int) -> None:
    """From the same K rows, drawn without replacement, the centres are those of a plain implementation."""
    points = torch.randn(80, 3, generator=seeded(0), dtype=torch.float64)
    options: dict[str, Any] = {"metric": metric, "codebook_update": update, "channel_dim": channel_dim}
    quantizer = plain_quantizer(7, 3, **options).double()
    latents = points.view(2, 40, 3) if channel_dim == -1 else points.view(2, 40, 3).movedim(-1, 1)
    table = points.numpy()
    if metric == "cosine":
        table = table / np.linalg.norm(table, axis=1, keepdims=True)
    quantizer.kmeans_init(latents, iterations=0, generator=seeded(5))
    start = quantizer.codebook.detach().numpy().copy()
    places = [int(np.abs(table - row).sum(1).argmin()) for row in start]
    assert len(set(places)) == 7
    np.testing.assert_allclose(start, table[places], atol=1e-14)
    for iterations in (1, 4, 10):
        quantizer.kmeans_init(latents, iterations=iterations, generator=seeded(5))
        expected = lloyd(table, start, iterations, metric == "cosine")
        np.testing.assert_allclose(quantizer.codebook.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        assert not np.allclose(expected, start)


@pytest.mark.parametrize("update", UPDATES)
def test_kmeans_restarts_the_statistics(update: str) -> None:
    """Usage is 1 again and, under ema, the next averages start from the centres."""
    points, _ = blobs()
    quantizer = plain_quantizer(5, 3, codebook_update=update).double()  # type: ignore[arg-type]
    for _ in range(5):
        quantizer(points)
    assert not torch.equal(quantizer.usage, torch.ones(5, dtype=torch.float64))
    quantizer.kmeans_init(points)
    assert torch.equal(quantizer.usage, torch.ones(5, dtype=torch.float64))
    centres = quantizer.codebook.detach().clone()
    quantizer(points)
    quantizer(points)
    if update == "ema":
        assert quantizer.codebook.shape == centres.shape
        # On the data it was fitted to, k-means has almost converged.
        assert (quantizer.codebook - centres).norm(dim=1).max() < 0.2 * centres.norm(dim=1).max()


@pytest.mark.parametrize("update", UPDATES)
def test_kmeans_with_fewer_latents_than_codes(update: str) -> None:
    """Every latent becomes a code; the other codes keep their values."""
    quantizer = plain_quantizer(9, 3, codebook_update=update).double()  # type: ignore[arg-type]
    before = quantizer.codebook.detach().clone()
    points = torch.randn(4, 3, dtype=torch.float64)
    quantizer.kmeans_init(points)
    assert torch.equal(quantizer.codebook[4:], before[4:])
    torch.testing.assert_close(quantizer.decode(quantizer.encode(points)), points, rtol=1e-12, atol=0)
    assert len(quantizer.encode(points).unique()) == 4


def test_kmeans_of_equal_latents_is_finite() -> None:
    """Blank images: all rows alike; empty clusters keep their centres, and the choice is the first copy."""
    quantizer = plain_quantizer(6, 3)
    quantizer.kmeans_init(torch.ones(50, 3))
    assert torch.equal(quantizer.codebook, torch.ones(6, 3))
    assert (quantizer.encode(torch.randn(40, 3)) == 0).all()


def test_kmeans_follows_its_generator() -> None:
    """Same seed, same centres; another seed, another start; the global state is left alone."""
    points = torch.randn(60, 3)
    state = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        quantizer = plain_quantizer(8, 3, generator=seeded(0))
        quantizer.kmeans_init(points, generator=seeded(seed))
        results.append(quantizer.codebook.detach())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("iterations", [-1, -5])
def test_kmeans_refuses_negative_iterations(iterations: int) -> None:
    """The count of iterations is not negative."""
    with pytest.raises(ValueError, match=f"^iterations must be an int >= 0, got {iterations}.$"):
        plain_quantizer(3, 3).kmeans_init(torch.zeros(5, 3), iterations=iterations)


def test_kmeans_checks_the_size_of_its_latents() -> None:
    """As forward does."""
    with pytest.raises(
        ValueError, match=exactly("latents axis 1 must be code_dim=4, got 3 (latents shape (5, 3)).")
    ):
        plain_quantizer(3, 4).kmeans_init(torch.zeros(5, 3))


def test_revival_checks_the_values_of_its_latents() -> None:
    """As forward does."""
    with pytest.raises(ValueError, match=exactly(not_finite(1, 4))):
        plain_quantizer(3, 4).revive_dead_codes(torch.tensor([[0.0, torch.nan, 0.0, 0.0]]))


# Revival


def half_dead(update: str, **options: Any) -> VectorQuantizer:
    """A trained quantizer, 8 codes, of which the first 4 are far from all latents and hardly used."""
    quantizer = plain_quantizer(8, 3, codebook_update=update, decay=0.7, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        quantizer.codebook[:4] += 100
        quantizer.codebook[4:] = torch.randn(4, 3, generator=seeded(3)).double()
        if update == "ema":
            quantizer.code_sums.copy_(quantizer.codebook)
    for seed in range(30):
        quantizer(torch.randn(64, 3, generator=seeded(seed), dtype=torch.float64))
    quantizer.apply_pending()
    return quantizer


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("options", [{}, {"orthogonal_reg": 0.1}])
def test_revived_codes_live_on(update: str, options: dict[str, Any]) -> None:
    """They are rows of the latents, stay where they were put while unused, and are used afterwards."""
    quantizer = half_dead(update, **options)
    points = torch.randn(200, 3, generator=seeded(100), dtype=torch.float64)
    live = quantizer.codebook[4:].detach().clone()
    revived = quantizer.revive_dead_codes(points, generator=seeded(1))
    assert revived.tolist() == [True] * 4 + [False] * 4
    assert torch.equal(quantizer.codebook[4:], live)
    fresh = quantizer.codebook[:4].detach().clone()
    assert all((points == row).all(1).any() for row in fresh)
    assert len(fresh.unique(dim=0)) == 4
    for seed in range(5):
        quantizer(torch.randn(64, 3, generator=seeded(200 + seed), dtype=torch.float64))
    assert (quantizer.codebook[:4] - fresh).norm(dim=1).max() < 3
    counts = torch.bincount(quantizer.encode(points), minlength=8)
    assert (counts[:4] > 0).all()
    assert not quantizer.revive_dead_codes(points).any()


def test_revived_codes_do_not_move_at_the_next_step() -> None:
    """Under ema a revived code that the next batch does not use stays exactly put."""
    quantizer = half_dead("ema")
    quantizer.revive_dead_codes(torch.full((40, 3), 50.0, dtype=torch.float64) + torch.arange(40).unsqueeze(1))
    fresh = quantizer.codebook[:4].detach().clone()
    quantizer(torch.randn(64, 3, generator=seeded(0), dtype=torch.float64))
    quantizer.apply_pending()
    torch.testing.assert_close(quantizer.codebook[:4], fresh, rtol=1e-4, atol=0)


def test_revival_without_the_sums_does_not_last() -> None:
    """Negative control, what peers do: with the old sums kept, the next step throws the codes away again."""
    quantizer = half_dead("ema")
    sums = quantizer.code_sums.clone()
    quantizer.revive_dead_codes(torch.full((40, 3), 50.0, dtype=torch.float64) + torch.arange(40).unsqueeze(1))
    fresh = quantizer.codebook[:4].detach().clone()
    quantizer.code_sums.copy_(sums)
    quantizer(torch.randn(64, 3, generator=seeded(0), dtype=torch.float64))
    quantizer.apply_pending()
    assert (quantizer.codebook[:4] - fresh).norm(dim=1).min() > 10


@pytest.mark.parametrize("update", UPDATES)
def test_threshold_is_relative_to_the_average(update: str) -> None:
    """A code is dead strictly below that fraction of the mean usage, whatever the batch size."""
    for scale in (1.0, 1e4):
        for threshold, dead in ((0.0, 0), (0.05, 1), (0.5, 2), (1.0, 4)):
            quantizer = plain_quantizer(6, 3, codebook_update=update)  # type: ignore[arg-type]
            # Mean 1: fractions 0.04, 0.4, 0.9, 0.96, 1.7, 2.
            quantizer.usage.copy_(scale * torch.tensor([0.04, 0.4, 0.9, 0.96, 1.7, 2.0]))
            revived = quantizer.revive_dead_codes(torch.randn(30, 3), threshold=threshold)
            assert int(revived.sum()) == dead
            assert quantizer.usage[revived].tolist() == pytest.approx([scale] * dead)


@pytest.mark.parametrize("update", UPDATES)
def test_nothing_dead_changes_nothing(update: str) -> None:
    """All codes in use, or no latents to put them on: the state is bit-identical."""
    quantizer = plain_quantizer(6, 3, codebook_update=update)  # type: ignore[arg-type]
    quantizer(torch.randn(50, 3))
    quantizer.apply_pending()
    before = state_of(quantizer)
    assert not quantizer.revive_dead_codes(torch.randn(50, 3), threshold=0.0).any()
    assert unchanged(quantizer, before)
    quantizer.usage[:3] = 0
    before = state_of(quantizer)
    assert not quantizer.revive_dead_codes(torch.empty(0, 3)).any()
    assert unchanged(quantizer, before)
    assert quantizer.revive_dead_codes(torch.randn(50, 3)).sum() == 3


def test_more_dead_codes_than_latents() -> None:
    """The first ones are revived, each by a latent of its own; the rest stay dead."""
    quantizer = half_dead("ema")
    rest = quantizer.codebook[2:].detach().clone()
    points = torch.randn(2, 3, dtype=torch.float64)
    assert quantizer.revive_dead_codes(points).tolist() == [True, True] + [False] * 6
    assert torch.equal(quantizer.codebook[2:], rest)
    assert torch.equal(quantizer.codebook[:2].detach().sort(0).values, points.sort(0).values)


def test_cosine_revives_directions() -> None:
    """Under cosine the new codes have unit length and are used."""
    quantizer = plain_quantizer(6, 3, metric="cosine", codebook_update="ema")
    quantizer.usage[:3] = 0
    points = 100 * torch.randn(40, 3)
    assert quantizer.revive_dead_codes(points).sum() == 3
    torch.testing.assert_close(quantizer.codebook[:3].norm(dim=1), torch.ones(3))


def test_revival_follows_its_generator() -> None:
    """Same seed, same codes; another seed, others; the global state is left alone."""
    original = half_dead("ema")
    points = torch.randn(100, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        quantizer = copy.deepcopy(original)
        quantizer.revive_dead_codes(points, generator=seeded(seed))
        results.append(quantizer.codebook.detach())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_revival_refuses_thresholds(threshold: float) -> None:
    """The threshold is a fraction."""
    message = f"threshold must be a finite number >= 0 and <= 1, got {threshold}."
    with pytest.raises(ValueError, match=exactly(message)):
        plain_quantizer(3, 3).revive_dead_codes(torch.zeros(5, 3), threshold=threshold)


# Freezing


@pytest.mark.parametrize(
    "options",
    [
        {"orthogonal_reg": 10.0},
        {"orthogonal_reg": 10.0, "orthogonal_max_codes": 3, "temperature": 1.0},
        {"codebook_update": "ema", "orthogonal_reg": 10.0},
        {"codebook_update": "ema", "metric": "cosine"},
    ],
)
def test_frozen_means_bit_identical(options: dict[str, Any]) -> None:
    """Training, momentum, weight decay and a gradient left behind change nothing; thawed, everything moves."""
    quantizer = plain_quantizer(7, 3, **options)
    parameters = [*quantizer.parameters(), torch.nn.Parameter(torch.zeros(()))]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)

    def step() -> Tensor:
        latents = torch.randn(40, 3, requires_grad=True)
        output = quantizer(latents)
        (output.loss + output.quantized.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert latents.grad is not None
        return latents.grad

    step()
    quantizer(torch.randn(40, 3, requires_grad=True)).loss.backward()
    assert quantizer.freeze() is quantizer
    before = state_of(quantizer)
    twin = copy.deepcopy(quantizer)
    for _ in range(3):
        assert step().abs().max() > 0
    assert unchanged(quantizer, before)
    twin(torch.randn(40, 3, requires_grad=True)).loss.backward()
    assert unchanged(twin, before)
    for method in ("kmeans_init", "revive_dead_codes"):
        message = f"{method} must be called on a quantizer that is not frozen, got a frozen one."
        with pytest.raises(RuntimeError, match=exactly(message)):
            getattr(quantizer, method)(torch.randn(20, 3))
    assert unchanged(quantizer, before)
    quantizer.freeze(False)
    # The first records, the second moves.
    step()
    step()
    assert all(not torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    assert unchanged(twin, before)


def test_freezing_is_no_part_of_the_state() -> None:
    """A frozen and a free quantizer have the same state_dict; loading does not thaw."""
    quantizer = plain_quantizer(7, 3).freeze()
    assert quantizer.frozen
    quantizer.load_state_dict(plain_quantizer(7, 3).state_dict())
    assert quantizer.frozen
    assert not quantizer.codebook.requires_grad


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_kmeans_without_latents_changes_nothing(update: str) -> None:
    """An empty batch leaves every bit of the state, under cosine too, where codes are not of unit length."""
    quantizer = plain_quantizer(5, 3, codebook_update=update, metric="cosine")
    quantizer(torch.randn(7, 3))
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.kmeans_init(torch.empty(0, 3))
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "level"])
def test_a_parametrized_codebook_is_refused_by_what_writes_to_it(inside: bool) -> None:
    """Writing to what a parametrization computes changes nothing; without it (the control) the codebook moves."""
    latents = torch.randn(50, 4)
    part = plain_quantizer(8, 4)
    whole = ResidualVectorQuantizer(stages=[part, FSQ((3, 3, 3, 3))]) if inside else part
    torch.nn.utils.parametrizations.weight_norm(part, "codebook")
    calls = {"set_codebook": torch.ones(8, 4), "kmeans_init": latents, "revive_dead_codes": latents}
    for method, argument in calls.items():
        message = (
            f"codebook must be a plain tensor for {method}, which writes to it, got a parametrized one; call "
            "it before you parametrize, or after torch.nn.utils.parametrize.remove_parametrizations."
        )
        with pytest.raises(RuntimeError, match=exactly(message)):
            getattr(part if method == "set_codebook" else whole, method)(argument)
    whole(latents.requires_grad_()).loss.backward()
    torch.nn.utils.parametrize.remove_parametrizations(part, "codebook")
    before = part.codebook.detach().clone()
    whole.kmeans_init(latents)
    assert not torch.equal(part.codebook, before)


def test_a_parametrized_codebook_follows_no_moving_average() -> None:
    """It would stay where it is for ever."""
    quantizer = VectorQuantizer(8, 4)
    torch.nn.utils.parametrize.register_parametrization(quantizer, "codebook", torch.nn.Identity())
    with pytest.raises(
        RuntimeError, match="codebook must be a plain tensor for apply_pending, which writes to it, got"
    ):
        quantizer(torch.randn(50, 4))
    frozen = VectorQuantizer(8, 4).freeze()
    torch.nn.utils.parametrize.register_parametrization(frozen, "codebook", torch.nn.Identity())
    frozen(torch.randn(50, 4))
