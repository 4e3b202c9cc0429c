"""What quantizers load: checkpoints of any moment, of the other codebook update, of older versions, and codebooks.

Shape letters: K codes, C code size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant import AutoencoderConfig, ResidualVectorQuantizer, SimVQ, VectorQuantizer, VQAutoencoder
from tests.helpers import plain_quantizer
from tests.unit.module_cases import (
    CASES,
    QUANTIZER_CASES,
    assert_same_bits,
    fresh,
    prepared,
    state_of,
    training_step,
)

STEPS = 4
K, C = 11, 6
# What a quantizer learns or was built from; everything else in its state is statistics.
CODES = ("codebook", "coefficients", "basis")

WITH_STATISTICS = [
    name
    for name, case in QUANTIZER_CASES.items()
    if set(case.kinds) & {VectorQuantizer, ResidualVectorQuantizer, SimVQ}
]
MOVING = [name for name in WITH_STATISTICS if getattr(fresh(CASES[name]), "codebook_update", None) == "ema"]
# The penalty moves every code, used or not, and a decay of zero remembers none.
PLAIN_MOVING = [name for name in MOVING if fresh(CASES[name]).orthogonal_reg == 0 and fresh(CASES[name]).decay > 0]

DROPPED = r"which these options have no use for; dropped\.$"

# What differs between the two updates is only the update.
PAIRS: dict[str, Callable[[str], Any]] = {
    "l2": lambda update: plain_quantizer(K, C, codebook_update=update),
    "cosine": lambda update: plain_quantizer(K, C, codebook_update=update, metric="cosine"),
    "penalty": lambda update: plain_quantizer(K, C, codebook_update=update, orthogonal_reg=10.0),
    "subset": lambda update: plain_quantizer(
        K, C, codebook_update=update, orthogonal_reg=10.0, orthogonal_max_codes=5
    ),
    "residual": lambda update: ResidualVectorQuantizer(K, C, 3, codebook_update=update),
    "residual-shared": lambda update: ResidualVectorQuantizer(
        K, C, 3, codebook_update=update, shared_codebook=True
    ),
}


def last(name: str) -> str:
    """A name in a state dict without the modules before it."""
    return name.rpartition(".")[2]


def codes_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state that is no statistic."""
    return {name: value for name, value in state.items() if last(name) in CODES}


def stages_of(quantizer: nn.Module) -> list[Any]:
    """The modules that hold a codebook."""
    return [part for part in quantizer.modules() if isinstance(part, VectorQuantizer | SimVQ)]


def trained(build: Callable[[], Any], seed: int = 0, steps: int = 3) -> Any:
    """A quantizer after a few steps, the last of them still pending."""
    torch.manual_seed(seed)
    quantizer = build().train()
    for step in range(steps):
        training_step(quantizer, (torch.randn(40, C).requires_grad_(),), seed=seed + step)
    return quantizer


def smoothed(usage: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Laplace smoothing that keeps the sum, as van den Oord et al. 2017 have it; in float64."""
    usage = usage.double()
    return (usage + epsilon) / (usage.sum() + len(usage) * epsilon) * usage.sum()


@pytest.mark.parametrize(
    "step", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
@pytest.mark.parametrize("name", QUANTIZER_CASES)
def test_a_checkpoint_of_any_step_gives_the_next_step_bit_for_bit(name: str, step: int) -> None:
    """Into a quantizer that has been trained on something else."""
    case = CASES[name]
    original = prepared(case, steps=step)
    resumed = fresh(case).train()
    for other in range(3):
        training_step(resumed, case.example(50 + other), seed=other)
    resumed.load_state_dict(state_of(original))
    for later in (step, step + 1):
        results = [training_step(module, case.example(later), seed=later) for module in (original, resumed)]
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        assert_same_bits(state_of(resumed), state_of(original))


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_saving_changes_nothing(name: str) -> None:
    """A state dict only reads: what is pending stays pending."""
    case = CASES[name]
    saved, never = prepared(case), prepared(case)
    saved.state_dict()
    results = [training_step(module, case.example(5), seed=5) for module in (saved, never)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert_same_bits(state_of(saved), state_of(never))


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_pending_statistics_matter(name: str) -> None:
    """The negative control: a state without them goes on otherwise."""
    case = CASES[name]
    whole, part = prepared(case), prepared(case)
    state = state_of(whole)
    pending = [key for key in state if "pending" in key]
    assert pending
    part.load_state_dict(
        {key: torch.zeros_like(value) if key in pending else value for key, value in state.items()}
    )
    for module in (whole, part):
        module.apply_pending()
    kept, lost = state_of(whole), state_of(part)
    assert any(not torch.equal(kept[key], lost[key]) for key in kept if key not in pending)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_checkpoint_of_an_older_version_has_nothing_pending(name: str) -> None:
    """It loads as it is, over whatever was pending."""
    case = CASES[name]
    old = {key: value for key, value in state_of(prepared(case)).items() if "pending" not in key}
    quantizer = prepared(case, steps=1)
    quantizer.load_state_dict(old)
    assert_same_bits({key: state_of(quantizer)[key] for key in old}, old)
    quantizer.apply_pending()
    assert_same_bits({key: state_of(quantizer)[key] for key in old}, old)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_codebook_loads_with_statistics_of_a_fresh_one(name: str, strict: bool) -> None:
    """Each code counts once, with itself as its mean, and nothing is pending."""
    case = CASES[name]
    codes = codes_of(state_of(prepared(case)))
    quantizer = prepared(case, steps=1)
    quantizer.load_state_dict(codes, strict=strict)
    loaded = state_of(quantizer)
    assert_same_bits(codes_of(loaded), codes)
    for stage in stages_of(quantizer):
        assert torch.equal(stage.usage, torch.ones_like(stage.usage))
        if "code_sums" in dict(stage.named_buffers()):
            mean = stage.project(stage.codebook.detach())
            torch.testing.assert_close(stage.code_sums, mean, rtol=1e-6, atol=1e-7)
    assert not any(value.any() for key, value in loaded.items() if last(key) in ("pending_counts", "pending_sums"))


@pytest.mark.parametrize("name", PLAIN_MOVING)
def test_a_loaded_codebook_is_not_undone(name: str) -> None:
    """Codes that a step does not use stay where they are; under cosine their directions do."""
    case = CASES[name]
    codes = {key: 10 * value for key, value in codes_of(state_of(prepared(case))).items()}
    quantizer = prepared(case)
    quantizer.load_state_dict(codes)
    results = quantizer(case.example(5)[0][:1, :, :1, :2])
    quantizer.apply_pending()
    moved = 0
    for number, stage in enumerate(stages_of(quantizer)):
        chosen = results.indices if results.indices.ndim == 3 else results.indices[..., number]
        if getattr(quantizer, "shared_codebook", False):
            chosen = results.indices
        unused = torch.ones(stage.num_codes, dtype=torch.bool).index_fill_(0, chosen[chosen >= 0].flatten(), False)
        before, after = stage.project(list(codes.values())[number]), stage.project(stage.codebook.detach())
        torch.testing.assert_close(after[unused], before[unused], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(after[~unused], before[~unused])
    assert moved


def test_a_loaded_codebook_moves_as_one_that_was_seen_once() -> None:
    """The moving average of a code with itself and the latents of the first step, in float64."""
    codes = torch.randn(K, C)
    quantizer = trained(lambda: plain_quantizer(K, C, codebook_update="ema", decay=0.7))
    quantizer.load_state_dict({"codebook": codes})
    latents = torch.randn(50, C)
    indices = quantizer(latents).indices
    quantizer.apply_pending()
    counts = torch.bincount(indices, minlength=K).double()
    sums = torch.zeros(K, C, dtype=torch.float64).index_add_(0, indices, latents.double())
    usage = 0.7 + 0.3 * counts
    expected = (0.7 * codes.double() + 0.3 * sums) / smoothed(usage)[:, None]
    torch.testing.assert_close(quantizer.codebook.detach().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.usage.double(), usage, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_gradient_checkpoint_continues_under_moving_averages(pair: str) -> None:
    """With its usage, and with sums that keep every code where it is."""
    source = trained(lambda: PAIRS[pair]("gradient"))
    target = trained(lambda: PAIRS[pair]("ema"), seed=9)
    target.load_state_dict(state_of(source))
    for old, new in zip(stages_of(source), stages_of(target), strict=True):
        assert torch.equal(new.codebook, old.codebook.detach())
        assert torch.equal(new.usage, old.usage)
        expected = new.project(old.codebook.detach()).double() * smoothed(old.usage)[:, None]
        torch.testing.assert_close(new.code_sums.double(), expected, rtol=1e-5, atol=1e-6)
    training_step(target, (torch.randn(40, C).requires_grad_(),), seed=3)
    assert all(torch.isfinite(value).all() for value in state_of(target).values())


@pytest.mark.parametrize("pair", PAIRS)
def test_a_moving_average_checkpoint_continues_under_gradients(pair: str) -> None:
    """With its codes and their usage; its sums have no place, which a warning says."""
    source = trained(lambda: PAIRS[pair]("ema"))
    target = trained(lambda: PAIRS[pair]("gradient"), seed=9)
    with pytest.warns(UserWarning, match=DROPPED):
        target.load_state_dict(state_of(source))
    for old, new in zip(stages_of(source), stages_of(target), strict=True):
        assert torch.equal(new.codebook.detach(), old.codebook.detach())
        assert torch.equal(new.usage, old.usage)
    assert not [key for key in state_of(target) if "sums" in key]
    before = codes_of(state_of(target))
    training_step(target, (torch.randn(40, C).requires_grad_(),), seed=3)
    after = codes_of(state_of(target))
    assert all(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("updates", [("gradient", "ema"), ("ema", "gradient")])
def test_a_model_loads_the_checkpoint_of_the_other_update(updates: tuple[str, str]) -> None:
    """Also where the quantizer is a part of a model."""
    options = {"base_channels": 4, "channel_multipliers": (1, 2), "norm_groups": 2, "num_codes": 7, "code_dim": 3}
    source, target = (VQAutoencoder(AutoencoderConfig(**options, codebook_update=update)) for update in updates)
    source(torch.rand(2, 3, 8, 8))
    dropped = pytest.warns(UserWarning, match=DROPPED) if updates[1] == "gradient" else contextlib.nullcontext()
    with dropped:
        target.load_state_dict(state_of(source))
    images = torch.rand(2, 3, 8, 8)
    indices = source.encode_to_indices(images)
    assert torch.equal(target.encode_to_indices(images), indices)
    assert torch.equal(target.decode_indices(indices), source.decode_indices(indices))


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_model_loads_a_checkpoint_without_statistics(update: str) -> None:
    """Of a codebook that another library has trained, for example."""
    options = {"base_channels": 4, "channel_multipliers": (1, 2), "norm_groups": 2, "num_codes": 7, "code_dim": 3}
    source, target = (VQAutoencoder(AutoencoderConfig(**options, codebook_update=update)) for _ in range(2))
    source(torch.rand(2, 3, 8, 8))
    weights = {
        key: value
        for key, value in state_of(source).items()
        if not key.startswith("quantizer.") or last(key) in CODES
    }
    target.load_state_dict(weights)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(target.encode_to_indices(images), source.encode_to_indices(images))
    assert torch.equal(target.quantizer.usage, torch.ones(7))


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_checkpoint_without_the_codes_is_refused(name: str) -> None:
    """Statistics are derived from codes, never codes from statistics."""
    state = state_of(prepared(CASES[name]))
    key = next(iter(codes_of(state)))
    del state[key]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        fresh(CASES[name]).load_state_dict(state)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_checkpoint_with_a_stranger_is_refused(name: str) -> None:
    """Only what the other update remembers is left out."""
    state = {**state_of(prepared(CASES[name])), "stranger": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "stranger"'):
        fresh(CASES[name]).load_state_dict(state)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_checkpoint_of_another_part_leaves_the_statistics(name: str) -> None:
    """Loading an encoder must not restart the quantizer behind it."""
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "quantizer": prepared(CASES[name])})
    before = state_of(model["quantizer"])
    model.load_state_dict({"encoder.weight": torch.ones(2, 2)}, strict=False)
    assert_same_bits(state_of(model["quantizer"]), before)


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_codebook_that_was_set_replaces_what_is_pending(metric: str, update: str) -> None:
    """Nothing of the earlier codebook comes back."""
    quantizer = trained(lambda: plain_quantizer(K, C, codebook_update=update, metric=metric))
    codes = torch.randn(K, C)
    quantizer.set_codebook(codes)
    quantizer.apply_pending()
    assert torch.equal(quantizer.decode(torch.arange(K)), _decoded(codes, metric, update))
    assert torch.equal(quantizer.usage, torch.ones(K))


def _decoded(codes: Tensor, metric: str, update: str) -> Tensor:
    other = plain_quantizer(K, C, codebook_update=update, metric=metric)
    other.load_state_dict({"codebook": codes}, strict=False)
    return other.decode(torch.arange(K)).detach()


@pytest.mark.parametrize("usage", [None, torch.linspace(0.5, 100.0, K)], ids=["once", "given"])
def test_a_codebook_that_was_set_moves_as_its_usage_says(usage: Tensor | None) -> None:
    """The moving average of the codes, each with its usage, and the latents of the first step; in float64."""
    quantizer = trained(lambda: plain_quantizer(K, C, codebook_update="ema", decay=0.7))
    codes = torch.randn(K, C)
    quantizer.set_codebook(codes, usage=usage)
    latents = torch.randn(50, C)
    indices = quantizer(latents).indices
    quantizer.apply_pending()
    before = torch.ones(K) if usage is None else usage
    counts = torch.bincount(indices, minlength=K).double()
    sums = torch.zeros(K, C, dtype=torch.float64).index_add_(0, indices, latents.double())
    after = 0.7 * before.double() + 0.3 * counts
    expected = (0.7 * codes.double() * smoothed(before)[:, None] + 0.3 * sums) / smoothed(after)[:, None]
    torch.testing.assert_close(quantizer.codebook.detach().double(), expected, rtol=1e-5, atol=1e-6)


def _moved(quantizer: Any, latents: Tensor) -> Tensor:
    """How far a step moves the codebooks, relative to their size."""
    before = torch.stack([stage.codebook.detach().clone() for stage in stages_of(quantizer)])
    quantizer(latents)
    quantizer.apply_pending()
    after = torch.stack([stage.codebook.detach() for stage in stages_of(quantizer)])
    return (after - before).norm() / before.norm()


@pytest.mark.parametrize("build", [PAIRS["l2"], PAIRS["cosine"], PAIRS["residual"]])
@pytest.mark.parametrize("known", ["all of the source", "codes"])
def test_statistics_of_the_module_do_not_pass_for_loaded_ones(build: Callable[[str], Any], known: str) -> None:
    """``own = q.state_dict(); own.update(given)`` completes ``given`` by the statistics of other codes."""
    source, target = trained(lambda: build("gradient")), trained(lambda: build("ema"), seed=9)
    given = state_of(source) if known != "codes" else codes_of(state_of(source))
    alone = trained(lambda: build("ema"), seed=9)
    alone.load_state_dict(given)
    own = target.state_dict()
    own.update(given)
    target.load_state_dict(own)
    assert_same_bits(state_of(target), state_of(alone))


def test_a_loaded_codebook_survives_the_next_step() -> None:
    """Where a state was completed with that of the module; its own statistics (the control) would move it away."""
    source = VectorQuantizer(16, 8, codebook_update="gradient")
    source.kmeans_init(torch.randn(500, 8))
    target = VectorQuantizer(16, 8)
    own = target.state_dict()
    copied = {name: tensor.clone() for name, tensor in own.items()}
    for state in (own, copied):
        state.update(source.state_dict())
    target.load_state_dict(own)
    assert _moved(target, torch.randn(8, 8)) < 0.5
    target.load_state_dict(copied)
    assert _moved(target, torch.randn(8, 8)) > 0.5


def test_the_state_of_a_module_loads_into_it_unchanged() -> None:
    """Where the codebook is the module's own too, its statistics belong to it."""
    quantizer = trained(lambda: plain_quantizer(K, C, codebook_update="ema", revival_threshold=0.1))
    before = state_of(quantizer)
    quantizer.load_state_dict(quantizer.state_dict())
    assert_same_bits(state_of(quantizer), before)


def test_a_full_state_dict_of_codes_derives_the_statistics() -> None:
    """torch.distributed.checkpoint completes what it is given with the tensors of the module."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    codes = torch.randn(16, 8)
    quantizer, alone = VectorQuantizer(16, 8), VectorQuantizer(16, 8)
    set_model_state_dict(quantizer, {"codebook": codes}, options=StateDictOptions(full_state_dict=True))
    alone.load_state_dict({"codebook": codes})
    assert_same_bits(state_of(quantizer), state_of(alone))


@pytest.mark.parametrize(
    "build", [lambda: VectorQuantizer(K, C), lambda: ResidualVectorQuantizer(K, C, 2)], ids=["vq", "rvq"]
)
def test_a_quantizer_that_stopped_reviving_loads_its_own_state(build: Callable[[], Any]) -> None:
    """Its buffers are those that it was built with, and stay in the state; nothing is dropped."""
    quantizer = trained(build)
    quantizer.revival_threshold = 0.0
    state = state_of(quantizer)
    quantizer.load_state_dict(state)
    assert_same_bits(state_of(quantizer), state)
    stages_of(quantizer)[0].set_codebook(torch.randn(K, C))
    assert not stages_of(quantizer)[0].pending_rows.any()
    revivals = [int(stage.revivals) for stage in stages_of(quantizer)]
    quantizer(torch.randn(1, C))
    quantizer.apply_pending()
    assert [int(stage.revivals) for stage in stages_of(quantizer)] == revivals


@pytest.mark.parametrize("way", ["set", "load"])
def test_lengths_of_codes_do_not_matter_under_cosine(way: str) -> None:
    """A step turns long and short codes equally far; the old weights (control) move them further."""
    torch.manual_seed(1)
    units = nn.functional.normalize(torch.randn(64, 8), dim=1)
    latents = torch.randn(500, 8)

    def turned(scale: float, *, fresh: bool = False) -> Tensor:
        quantizer = VectorQuantizer(64, 8, metric="cosine", revival_threshold=0.0)
        if way == "set":
            quantizer.set_codebook(units * scale)
        else:
            quantizer.load_state_dict({"codebook": units * scale})
        if fresh:
            quantizer.code_sums.copy_(units * scale)
        quantizer(latents)
        quantizer.apply_pending()
        return nn.functional.normalize(quantizer.codebook, dim=1)

    expected = turned(1.0)
    for scale in (46.0, 1 / 256):
        torch.testing.assert_close(turned(scale), expected, rtol=0, atol=1e-5)
    moved = [float((codes - units).norm(dim=1).mean()) for codes in (expected, turned(1 / 256, fresh=True))]
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("sizes", [(5, 8), (8, 5)])
def test_a_state_loads_where_the_penalty_looks_at_more_or_fewer_codes(sizes: tuple[int, int]) -> None:
    """The codes drawn for the next move are drawn for a number of codes; everything else is kept."""

    def build(size: int) -> VectorQuantizer:
        return plain_quantizer(K, C, codebook_update="ema", orthogonal_reg=1.0, orthogonal_max_codes=size)

    source = trained(lambda: build(sizes[0]))
    target = trained(lambda: build(sizes[1]), seed=9)
    target.load_state_dict(state_of(source))
    state, loaded = state_of(source), state_of(target)
    assert torch.equal(loaded.pop("pending_subset"), torch.arange(sizes[1]))
    assert len(state.pop("pending_subset")) == sizes[0]
    assert_same_bits(loaded, state)
    same = trained(lambda: build(sizes[0]), seed=9)
    same.load_state_dict(state_of(source))
    assert torch.equal(same.pending_subset, source.pending_subset)


@pytest.mark.parametrize(
    "options", [{}, {"metric": "cosine"}, {"orthogonal_reg": 10.0}], ids=["l2", "cosine", "penalty"]
)
@pytest.mark.parametrize(("missing", "derived"), [("usage", "code_sums"), ("pending_counts", "pending_sums")])
def test_statistics_are_only_loaded_with_those_that_they_belong_to(
    missing: str, derived: str, options: dict[str, Any]
) -> None:
    """Sums without their counts are as if they were missing too: the codes stay near where they are."""
    quantizer = plain_quantizer(K, C, codebook_update="ema", **options)
    batches = [torch.randn(64, C) for _ in range(4)]
    for latents in batches[:3]:
        quantizer(latents)
    state = quantizer.state_dict()
    without = {name: tensor for name, tensor in state.items() if name != missing}
    one, other = (plain_quantizer(K, C, codebook_update="ema", **options) for _ in range(2))
    one.load_state_dict(without)
    other.load_state_dict({name: tensor for name, tensor in without.items() if name != derived})
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for loaded in (one, other):
        before = loaded.codebook.clone()
        with loaded.accumulate():
            loaded(torch.cat(batches))
        loaded.apply_pending()
        assert (loaded.codebook - before).abs().max() < 1
    assert torch.equal(one.codebook, other.codebook)
