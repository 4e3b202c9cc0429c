"""When a codebook moves: between two training steps, once for each, and never inside one.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from te_quant import FSQ, ProductQuantizer, Quantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from te_quant._execution import recomputation
from te_quant.quantizers import _residual_steps
from tests.helpers import exactly, plain_quantizer, plain_residual
from tests.unit.quantizer_cases import QUANTIZERS, latents_for, state_of
from tests.unit.quantizer_oracles import mean_squared_cosine

# Four small draws are not one large one, and which codes are active depends on the batch.
DETERMINISTIC = [
    name
    for name in QUANTIZERS
    if name.split("-")[0] in ("vq", "rvq", "sim")
    and name != "vq-ema-cosine"
    and not {"temperature", "dropout", "subset"} & set(name.split("-"))
]
EMA = [name for name in QUANTIZERS if "ema" in name]
RECORDING = [name for name in QUANTIZERS if name.split("-")[0] in ("vq", "rvq", "sim")]


class Tokenizer(nn.Module):
    """A stranger's model: something learnt before and after a quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        size = quantizer.code_dim
        self.before = nn.Conv2d(size, size, 1)
        self.quantizer = quantizer
        self.after = nn.Conv2d(size, size, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """Return a loss."""
        output = self.quantizer(self.before(latents))
        loss: Tensor = self.after(output.quantized).square().mean() + output.loss
        return loss


def build(name: str) -> Tokenizer:
    """A tokenizer whose numbers depend on the name alone."""
    torch.manual_seed(0)
    return Tokenizer(QUANTIZERS[name]())


def batch(model: Tokenizer, seed: int, size: int = 2) -> Tensor:
    """(size, C, 4, 5) latents."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, model.quantizer.code_dim, 4, 5, generator=generator)


def train(model: Tokenizer, call: Callable[[Tensor], Any], steps: int = 4) -> list[Tensor]:
    """Return all gradients and the state after training with ``call``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        latents = batch(model, seed).requires_grad_()
        call(latents).backward()
        assert latents.grad is not None
        gradients += [latents.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*gradients, *state_of(model).values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Say whether two lists are equal bit for bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    """Gradients, statistics and codebook are those of a run without, although every pass is computed twice."""
    plain, checkpointed = build(name), build(name)
    expected = train(plain, plain)
    found = train(checkpointed, lambda latents: checkpoint(checkpointed, latents, use_reentrant=reentrant))
    assert same(expected, found)


@pytest.mark.parametrize("name", ["vq-ema-penalty", "rvq-ema", "vq", "sim"])
def test_a_second_pass_that_counts_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without looking where it runs, a quantizer counts twice, and moves in between."""
    plain = build(name)
    expected = train(plain, plain)
    monkeypatch.setattr(recomputation, "_in_backward", lambda: False)
    checkpointed = build(name)
    found = train(checkpointed, lambda latents: checkpoint(checkpointed, latents, use_reentrant=False))
    assert not same(expected, found)


COMPILED = ["vq", "vq-cosine", "vq-ema", "vq-ema-subset", "vq-ema-cosine-penalty", "rvq-ema", "rvq-shared", "sim"]


@pytest.mark.parametrize("nesting", ["compiled", "checkpoint of compiled", "compiled checkpoint"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name == "vq-ema" else getattr(pytest.mark, "slow" if "ema" in name else "long")
        )
        for name in COMPILED
    ],
)
def test_one_graph_checkpoints_alike(name: str, nesting: str) -> None:
    """In every nesting with torch.compile too, as one graph."""
    torch._dynamo.reset()
    plain, compiled = build(name), build(name)
    expected = train(plain, plain)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "compiled": compiled,
        "checkpoint of compiled": compiled,
        "compiled checkpoint": lambda latents: checkpoint(compiled, latents, use_reentrant=False),
    }
    call = torch.compile(calls[nesting], backend="aot_eager", fullgraph=True)
    if nesting == "checkpoint of compiled":
        found = train(compiled, lambda latents: checkpoint(call, latents, use_reentrant=False))
    else:
        found = train(compiled, call)
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
@pytest.mark.parametrize("nesting", ["checkpoint of compiled", "compiled checkpoint"])
@pytest.mark.parametrize(
    "name", ["vq-ema-penalty", *(pytest.param(name, marks=pytest.mark.long) for name in ("vq-ema", "rvq-ema"))]
)
def test_generated_code_checkpoints_alike(name: str, nesting: str) -> None:
    """The default compiler too, which may move and merge operators."""
    torch._dynamo.reset()
    plain, compiled = build(name), build(name)
    expected = train(plain, plain)
    if nesting == "checkpoint of compiled":
        inner = torch.compile(compiled, fullgraph=True)
        found = train(compiled, lambda latents: checkpoint(inner, latents, use_reentrant=False))
    else:
        outer = torch.compile(lambda latents: checkpoint(compiled, latents, use_reentrant=False), fullgraph=True)
        found = train(compiled, outer)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "quantizer",
    [
        plain_quantizer(11, 6, temperature=1.0),
        plain_quantizer(11, 6, orthogonal_reg=1.0, orthogonal_max_codes=3),
        plain_residual(11, 6, 3, quantizer_dropout=True),
    ],
)
def test_a_generator_cannot_be_drawn_from_twice(quantizer: Quantizer) -> None:
    """Checkpointing does not restore it, so the second pass would have nothing to do with the first."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 6, 4, 5, requires_grad=True)

    def forward(latents: Tensor) -> Tensor:
        output = quantizer(latents, generator=generator)
        return output.quantized.sum() + output.loss

    loss = checkpoint(forward, latents, use_reentrant=False)
    message = (
        "generator must be None under activation checkpointing, which restores only torch's own generators, "
        "got a generator while a forward pass is recomputed."
    )
    with pytest.raises(RuntimeError, match=exactly(message)):
        loss.backward()


# Several passes, one update


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_micro_batches_make_one_update(name: str) -> None:
    """Four passes inside accumulate() move statistics and codebook as one pass over all of them does."""
    whole, parts = build(name).quantizer.double(), build(name).quantizer.double()
    latents = latents_for(whole, (4, -1, 4, 5)).double()
    for _ in range(3):
        whole(latents)
        with parts.accumulate():
            for part in latents.chunk(4):
                parts(part)
    whole.apply_pending()
    parts.apply_pending()
    for entry, value in state_of(whole).items():
        torch.testing.assert_close(parts.state_dict()[entry], value, rtol=1e-10, atol=1e-12)


def test_passes_outside_of_a_block_make_an_update_each() -> None:
    """Negative control: four small updates are not one large one."""
    whole, parts = build("vq-ema-penalty").quantizer, build("vq-ema-penalty").quantizer
    latents = latents_for(whole, (4, -1, 4, 5))
    whole(latents)
    for part in latents.chunk(4):
        parts(part)
    whole.apply_pending()
    parts.apply_pending()
    assert (whole.codebook - parts.codebook).abs().max() > 1e-3


def test_the_codebook_stands_still_inside_a_block() -> None:
    """What was pending is applied at the start, nothing more until the block is over, also when blocks nest."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema", decay=0.5)
    quantizer(torch.randn(50, 6))
    start = quantizer.codebook.clone()
    with quantizer.accumulate():
        moved = quantizer.codebook.clone()
        quantizer(torch.randn(50, 6))
        with quantizer.accumulate():
            quantizer(torch.randn(50, 6))
        quantizer(torch.randn(50, 6))
        assert torch.equal(quantizer.codebook, moved)
        assert quantizer.pending_counts.sum() == 150
    assert not torch.equal(start, moved)
    quantizer(torch.randn(50, 6))
    assert not torch.equal(quantizer.codebook, moved)
    assert quantizer.pending_counts.sum() == 50


def test_validation_does_not_split_a_block() -> None:
    """eval() inside a block applies nothing; the block stays one update."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema", decay=0.5)
    before = quantizer.codebook.clone()
    with quantizer.accumulate():
        quantizer(torch.randn(50, 6))
        quantizer.eval()(torch.randn(50, 6))
        quantizer.train()(torch.randn(50, 6))
        assert torch.equal(quantizer.codebook, before)
    assert quantizer.pending_counts.sum() == 100


def test_a_block_that_fails_is_over() -> None:
    """After an exception the next pass moves what was recorded."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema")

    def block() -> None:
        with quantizer.accumulate():
            quantizer(torch.randn(50, 6))
            quantizer(torch.full((2, 6), torch.nan))

    with pytest.raises(ValueError, match="finite"):
        block()
    quantizer(torch.randn(7, 6))
    assert quantizer.pending_counts.sum() == 7


def test_checkpointed_passes_before_one_backward_pass_need_a_block() -> None:
    """Inside accumulate() their gradients are exact, since the codebook they searched is still there."""
    gradients = []
    for checkpointed in (False, True):
        model = build("vq-ema-penalty")
        with model.quantizer.accumulate():
            parts = [batch(model, seed).requires_grad_() for seed in range(3)]
            losses = [
                checkpoint(model, part, use_reentrant=False) if checkpointed else model(part) for part in parts
            ]
            sum(losses).backward()
        gradients.append([*(part.grad for part in parts), *(p.grad for p in model.parameters())])
    assert same(*gradients)


# The peer


@pytest.mark.parametrize("decay", [0.99, 0.8])
def test_it_computes_what_vector_quantize_pytorch_does(decay: float) -> None:
    """Codes, commitment and codebook under moving averages agree over 20 steps."""
    peers = pytest.importorskip("vector_quantize_pytorch")
    theirs = peers.VectorQuantize(dim=6, codebook_size=11, decay=decay, commitment_weight=0.25, eps=1e-5)
    ours = plain_quantizer(11, 6, codebook_update="ema", decay=decay, channel_dim=-1)
    ours.set_codebook(theirs.codebook)
    theirs._codebook.embed_avg.copy_(theirs._codebook.embed)
    theirs._codebook.cluster_size.fill_(1)
    for seed in range(20):
        latents = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(seed))
        quantized, indices, loss = theirs(latents)
        output = ours(latents)
        assert torch.equal(output.indices, indices)
        torch.testing.assert_close(output.codes, quantized, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.loss, loss.sum(), rtol=1e-5, atol=1e-7)
    ours.apply_pending()
    torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=1e-5, atol=1e-6)


# What applies, what saves, what forgets


@pytest.mark.parametrize("name", RECORDING)
def test_codes_are_those_of_decode_until_the_codebook_moves(name: str) -> None:
    """While training, bit for bit."""
    quantizer = build(name).quantizer
    for seed in range(3):
        output = quantizer(latents_for(quantizer, (seed + 1, -1, 4, 5)))
        assert torch.equal(quantizer.decode(output.indices), output.codes)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", ["single", "levels", "groups", "sim"])
def test_copies_made_inside_a_block_are_outside_of_it(kind: str, copied: Callable[[Any], Any]) -> None:
    """What the block recorded before the copy counts once in each of the two; later passes count in their own."""
    quantizer: Any = {
        "single": lambda: VectorQuantizer(8, 4),
        "levels": lambda: ResidualVectorQuantizer(8, 4, 2),
        "groups": lambda: ProductQuantizer([VectorQuantizer(8, 2) for _ in range(2)]),
        "sim": lambda: SimVQ(8, 4),
    }[kind]()
    first, second = torch.randn(2, 50, 4)
    alone = copy.deepcopy(quantizer)
    with quantizer.accumulate():
        quantizer(first)
        taken = copied(quantizer)
        before = state_of(quantizer)
        quantizer(second)  # The negative control: the original stays in the block.
        names = [name for name in before if not name.rpartition(".")[2].startswith("pending")]
        assert all(torch.equal(state_of(quantizer)[name], before[name]) for name in names)
    alone(first)
    for one in (alone, taken):
        one(second)
        one.eval()
    assert all(torch.equal(state_of(alone)[name], state_of(taken)[name]) for name in before)
    assert not all(torch.equal(state_of(alone)[name], before[name]) for name in names)


@pytest.mark.parametrize("action", ["eval", "freeze", "accumulate", "revive_dead_codes", "apply_pending"])
@pytest.mark.parametrize("name", ["vq-ema-penalty", "rvq-ema"])
def test_what_applies_what_is_pending(name: str, action: str) -> None:
    """Each moves the codebook as the next training pass would have."""
    one, other = build(name).quantizer, build(name).quantizer
    latents = latents_for(one, (2, -1, 4, 5))
    one(latents)
    other(latents)
    actions: dict[str, Callable[[], object]] = {
        "eval": one.eval,
        "freeze": one.freeze,
        "accumulate": lambda: one.accumulate().__enter__(),
        "revive_dead_codes": lambda: one.revive_dead_codes(latents, threshold=0.0),
        "apply_pending": one.apply_pending,
    }
    before = state_of(one)
    actions[action]()
    assert not torch.equal(before[f"{'stages.0.' * (name == 'rvq-ema')}codebook"], one.reference)
    other(latents)
    for entry, value in state_of(one).items():
        if "pending" in entry:
            assert not value.any()
        else:
            assert torch.equal(other.state_dict()[entry], value)


def test_nothing_pending_changes_nothing() -> None:
    """Applied twice is applied once; so is a pass whose latents are all empty or skipped."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema", nonfinite="skip", orthogonal_reg=1.0)
    quantizer(torch.randn(50, 6))
    quantizer.apply_pending()
    before = state_of(quantizer)
    quantizer.apply_pending()
    quantizer(torch.empty(0, 6))
    quantizer(torch.full((3, 6), torch.nan))
    quantizer.apply_pending()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_looking_moves_nothing() -> None:
    """state_dict(), encode and decode leave what is pending where it is."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema")
    output = quantizer(torch.randn(50, 6))
    before = state_of(quantizer)
    quantizer.encode(torch.randn(5, 6))
    quantizer.decode(output.indices)
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    assert before["pending_counts"].sum() == 50


@pytest.mark.parametrize("name", ["vq-ema-penalty", "rvq-ema", "vq"])
def test_kmeans_forgets_what_is_pending(name: str) -> None:
    """A codebook that starts anew owes nothing to batches from before."""
    one, other = build(name).quantizer, build(name).quantizer
    latents = latents_for(one, (2, -1, 4, 5))
    one(latents)
    for quantizer in (one, other):
        quantizer.kmeans_init(latents, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(other.state_dict()[entry], value) for entry, value in one.state_dict().items())


@pytest.mark.parametrize("name", RECORDING)
def test_training_goes_on_from_any_step(name: str) -> None:
    """A copy that loads the state between any two steps makes the same next step, bit for bit."""
    model = build(name)
    for seed in range(3):
        torch.manual_seed(seed)
        model(batch(model, seed))
        copied = build(name)
        copied.load_state_dict(model.state_dict())
        for each in (model, copied):
            torch.manual_seed(100)
            each(batch(model, 100))
        assert same([*state_of(model).values()], [*state_of(copied).values()])


def test_a_step_cannot_be_resumed_without_what_is_pending() -> None:
    """Negative control: the pending sums are part of the state."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema")
    quantizer(torch.randn(50, 6))
    copied = copy.deepcopy(quantizer)
    copied.load_state_dict(
        {name: value for name, value in quantizer.state_dict().items() if "pending" not in name}
    )
    for each in (quantizer, copied):
        each.apply_pending()
    assert not torch.equal(quantizer.codebook, copied.codebook)


# Frozen


@pytest.mark.parametrize("name", RECORDING)
def test_frozen_stays_frozen(name: str) -> None:
    """Whatever else toggles requires_grad, as trainers of GANs do."""
    model = build(name)
    model(batch(model, 0)).backward()
    model.quantizer.freeze()
    model.zero_grad()
    before = state_of(model.quantizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(3):
        model.requires_grad_(False)
        model.requires_grad_(True)
        model(batch(model, seed)).backward()
        optimizer.step()
    assert all(torch.equal(before[entry], value) for entry, value in model.quantizer.state_dict().items())


@pytest.mark.parametrize("name", EMA)
def test_a_moving_average_takes_no_gradient(name: str) -> None:
    """There is no parameter for anybody to toggle."""
    assert not list(QUANTIZERS[name]().requires_grad_(True).parameters())


# A penalty that lasts


def test_the_penalty_lasts_under_moving_averages() -> None:
    """500 steps on latents from 64 clusters: at most a tenth of the cosines that there are without it."""
    cosines = []
    for weight in (0.0, 10.0):
        generator = torch.Generator().manual_seed(0)
        centers = torch.randn(64, 64, generator=generator)
        quantizer = plain_quantizer(
            64, 64, codebook_update="ema", orthogonal_reg=weight, decay=0.99, generator=generator
        )
        for _ in range(500):
            noise = 0.1 * torch.randn(512, 64, generator=generator)
            quantizer(centers[torch.randint(64, (512,), generator=generator)] + noise)
        cosines.append(mean_squared_cosine(quantizer.eval().codebook))
    assert cosines[1] < 0.1 * cosines[0]


# Between a forward and a backward pass


@pytest.mark.parametrize("action", ["kmeans_init", "revive_dead_codes", "eval", "set_codebook"])
@pytest.mark.parametrize(
    "name", ["vq", "vq-cosine", "vq-penalty", "vq-ema", "vq-ema-penalty", "rvq", "rvq-shared", "rvq-ema"]
)
def test_a_codebook_set_after_forward_leaves_the_gradient(name: str, action: str) -> None:
    """The backward pass is that of the codebook that was searched."""
    gradients = []
    for acts in (False, True):
        torch.manual_seed(0)
        quantizer = QUANTIZERS[name]()
        latents = torch.randn(50, 6, requires_grad=True)
        output = quantizer(latents)
        if acts and action == "set_codebook":
            for stage in getattr(quantizer, "stages", [quantizer]):
                stage.set_codebook(torch.randn(11, 6))
        elif acts:
            getattr(quantizer, action)(*([] if action == "eval" else [latents.detach()]))
        (output.loss + output.quantized.square().sum()).backward()
        gradients.append([latents.grad, *(p.grad for p in quantizer.parameters())])
    assert same(*gradients)


# All or nothing


@pytest.mark.parametrize(("method", "step"), [("kmeans_init", "kmeans"), ("revive_dead_codes", "replacements")])
def test_stages_move_all_or_none(method: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails at the second codebook, the first has not moved."""
    quantizer = ResidualVectorQuantizer(11, 6, 3, codebook_update="ema")
    quantizer.stages[0].usage[:5] = 0
    before = state_of(quantizer)
    original, calls = getattr(_residual_steps, step), []

    def fail_second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the second")
        return original(*arguments)

    monkeypatch.setattr(_residual_steps, step, fail_second)
    with pytest.raises(RuntimeError, match="the second"):
        getattr(quantizer, method)(torch.randn(50, 6))
    assert all(torch.equal(before[entry], value) for entry, value in quantizer.state_dict().items())


# A codebook from elsewhere


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_codebook_from_elsewhere_stays(update: Any, metric: Any) -> None:
    """After set_codebook a step moves it no further than the decay says."""
    quantizer = plain_quantizer(11, 6, codebook_update=update, metric=metric)
    quantizer(torch.randn(50, 6))
    codes = 10 * torch.randn(11, 6)
    quantizer.set_codebook(codes)
    assert torch.equal(quantizer.codebook, codes)
    assert quantizer.usage.eq(1).all()
    assert not quantizer.pending_counts.any()
    quantizer(codes)
    quantizer.eval()
    expected = quantizer.project(codes)
    assert (quantizer.project(quantizer.codebook) - expected).norm() < 0.1 * expected.norm()


def test_a_codebook_written_past_its_statistics_is_undone() -> None:
    """Negative control: a plain copy under moving averages lasts one step."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema")
    codes = 10 * torch.randn(11, 6)
    quantizer.codebook.copy_(codes)
    quantizer(codes)
    quantizer.eval()
    assert quantizer.codebook.norm() < 0.2 * codes.norm()


def test_a_codebook_comes_with_its_usage() -> None:
    """The statistics say that each code is the mean of so many latents."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema")
    codes, usage = torch.randn(11, 6, dtype=torch.float64), torch.rand(11)
    quantizer.set_codebook(codes, usage)
    assert torch.equal(quantizer.usage, usage)
    share = (usage + 1e-5) / (usage.sum() + 11e-5) * usage.sum()
    torch.testing.assert_close(quantizer.code_sums, codes.float() * share[:, None])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.zeros(11),), ValueError, "codes must be of shape (11, 6), got shape (11,)."),
        ((torch.zeros(10, 6),), ValueError, "codes axis 0 must be num_codes=11, got 10 (codes shape (10, 6))."),
        ((torch.zeros(11, 5),), ValueError, "codes axis 1 must be code_dim=6, got 5 (codes shape (11, 5))."),
        ((torch.zeros(11, 6).long(),), TypeError, "codes must be floating point, got torch.int64."),
        (
            (torch.full((11, 6), torch.inf),),
            ValueError,
            "codes must be finite, got 66 NaN or infinite of 66 values.",
        ),
        (
            (torch.zeros(11, 6), torch.ones(6)),
            ValueError,
            "usage axis 0 must be num_codes=11, got 6 (usage shape (6,)).",
        ),
        (
            (torch.zeros(11, 6), torch.zeros(11)),
            ValueError,
            "usage must be at least 0, and above 0 somewhere, got a minimum of 0.",
        ),
        (
            (torch.zeros(11, 6), -torch.ones(11)),
            ValueError,
            "usage must be at least 0, and above 0 somewhere, got a minimum of -1.",
        ),
    ],
)
def test_what_is_no_codebook(arguments: tuple[Tensor, ...], kind: type[Exception], message: str) -> None:
    """Refused before anything is written."""
    quantizer = plain_quantizer(11, 6, codebook_update="ema")
    before = state_of(quantizer)
    with pytest.raises(kind, match=exactly(message)):
        quantizer.set_codebook(*arguments)
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_a_frozen_codebook_cannot_be_set() -> None:
    """As k-means is refused."""
    message = "set_codebook must be called on a quantizer that is not frozen, got a frozen one."
    with pytest.raises(RuntimeError, match=exactly(message)):
        plain_quantizer(11, 6).freeze().set_codebook(torch.zeros(11, 6))


PARTS: dict[str, Callable[[], Any]] = {
    **{name: QUANTIZERS[name] for name in ("rvq", "rvq-shared", "rvq-ema", "rvq-ema-shared-dropout")},
    "product": lambda: ProductQuantizer([VectorQuantizer(11, 6), FSQ((3, 5))]),
}


@pytest.mark.parametrize("name", PARTS)
def test_one_codebook_of_a_combined_quantizer_is_set(name: str) -> None:
    """As that of a quantizer by itself: it has the new statistics, and the others go on with what is pending."""
    quantizer = PARTS[name]()
    latents = torch.randn(50, quantizer.code_dim)
    quantizer(latents)
    first, *others = quantizer.quantizers if name == "product" else quantizer.stages
    before = [state_of(other) for other in others]
    codes = torch.randn(11, 6)
    first.set_codebook(codes)
    for other, state in zip(others, before, strict=True):
        assert all(torch.equal(state[entry], value) for entry, value in other.state_dict().items())
    indices = quantizer.encode(latents)
    shown = quantizer.decode(indices)[:, :6] if name == "product" else quantizer.decode(indices[:, :1])
    assert torch.equal(shown, codes[indices[:, 0]])
    # Saving and loading between the two steps changes nothing.
    loaded = PARTS[name]()
    loaded.load_state_dict(state_of(quantizer))
    for each in (quantizer, loaded):
        torch.manual_seed(1)
        each(latents)
        each.apply_pending()
    assert all(torch.equal(value, loaded.state_dict()[entry]) for entry, value in quantizer.state_dict().items())
    quantizer.freeze()
    with pytest.raises(RuntimeError, match=r"^set_codebook must be called on a quantizer that is not frozen"):
        first.set_codebook(codes)


# States of other versions and of the other update


def test_a_state_with_a_codebook_alone() -> None:
    """Loads strictly; the statistics are those of a codebook just set."""
    codes = torch.randn(11, 6)
    loaded, placed = (plain_quantizer(11, 6, codebook_update="ema") for _ in range(2))
    for quantizer in (loaded, placed):
        quantizer(torch.randn(50, 6))
    loaded.load_state_dict({"codebook": codes})
    placed.set_codebook(codes)
    for name, value in placed.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)


@pytest.mark.parametrize("name", ["vq-ema", "rvq-ema", "sim", "vq"])
def test_states_of_older_versions(name: str) -> None:
    """They say nothing of pending statistics; then nothing is pending."""
    quantizer, copied = QUANTIZERS[name](), QUANTIZERS[name]()
    quantizer(latents_for(quantizer, (2, -1, 4, 5)))
    quantizer.eval()
    copied(latents_for(quantizer, (3, -1, 4, 5)))
    state = {entry: value for entry, value in quantizer.state_dict().items() if "pending" not in entry}
    copied.load_state_dict(state)
    assert all(torch.equal(quantizer.state_dict()[entry], value) for entry, value in copied.state_dict().items())


@pytest.mark.parametrize("kind", [plain_quantizer, partial(plain_residual, num_quantizers=3)])
def test_states_of_the_two_updates_load_into_each_other(kind: Callable[..., Any]) -> None:
    """Sums are derived, so that the codebook goes on from where it is, or dropped with a word."""
    gradient, ema = kind(11, 6), kind(11, 6, codebook_update="ema")
    gradient(torch.randn(50, 6))
    gradient.eval()
    ema.load_state_dict(gradient.state_dict())
    assert torch.equal(ema.reference, gradient.reference)
    start = ema.reference.clone()
    ema.train()(ema.decode(ema.encode(torch.randn(50, 6))) if kind is plain_quantizer else torch.zeros(0, 6))
    ema.eval()
    torch.testing.assert_close(ema.reference, start)
    with pytest.warns(UserWarning, match="the state holds code_sums and pending_sums, which these options"):
        gradient.load_state_dict(ema.state_dict())
    assert torch.equal(gradient.reference, ema.reference)


def test_a_state_without_a_codebook_changes_no_statistics() -> None:
    """A partial load of something else leaves the quantizer alone."""
    model = build("vq-ema")
    model(batch(model, 0))
    before = state_of(model.quantizer)
    model.load_state_dict(build("vq-ema").before.state_dict(prefix="before."), strict=False)
    assert all(torch.equal(before[name], value) for name, value in model.quantizer.state_dict().items())


def test_loading_leaves_the_given_state_alone() -> None:
    """What is derived is not written into the caller's dictionary."""
    state = {"codebook": torch.randn(11, 6)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_quantizer(11, 6, codebook_update="ema").load_state_dict(state)
    assert list(state) == ["codebook"]


def test_a_basis_state_says_what_is_pending() -> None:
    """SimVQ's counts are saved too."""
    quantizer = SimVQ(11, 6)
    quantizer(torch.randn(50, 6))
    assert quantizer.state_dict()["pending_counts"].sum() == 50


@pytest.mark.parametrize("name", ["vq", "rvq", "rvq-shared"])
def test_a_gradient_state_with_counts_pending_leaves_the_codes(name: str) -> None:
    """Counts whose sums nobody kept would shrink the codes when they are applied."""
    gradient = QUANTIZERS[name]()
    gradient(latents_for(gradient, (2, -1, 4, 5)))
    kind = type(gradient)
    ema = kind(**{**gradient.options(), "codebook_update": "ema"})
    ema.load_state_dict(gradient.state_dict())
    ema.eval()
    torch.testing.assert_close(ema.reference, gradient.reference)


def test_a_parameter_is_no_moving_average() -> None:
    """The usual way to set a codebook would make it a parameter that the next step overwrites."""
    message = "codebook must be set by set_codebook under codebook_update='ema', got a Parameter."
    with pytest.raises(TypeError, match=exactly(message)):
        plain_quantizer(11, 6, codebook_update="ema").codebook = nn.Parameter(torch.zeros(11, 6))
    gradient = plain_quantizer(11, 6)
    gradient.codebook = nn.Parameter(torch.zeros(11, 6))
    assert not gradient.codebook.any()


def test_a_strangers_frozen_quantizer_applies_nothing() -> None:
    """The base class asks before it calls, so that a class of one's own need not."""

    class Restless(Quantizer):
        moved = 0

        def apply_pending(self) -> None:
            self.moved += 1

    quantizer = Restless(4, 2).freeze()
    moved = quantizer.moved
    quantizer.eval().train()
    with quantizer.accumulate():
        pass
    quantizer.freeze()
    assert quantizer.moved == moved


def test_a_training_pass_cannot_be_exported() -> None:
    """A graph that records statistics would need this library."""
    message = "mode must be evaluation to export a quantizer, got training; call eval\\(\\) first."
    for quantizer in (plain_quantizer(11, 6), SimVQ(11, 6)):
        with pytest.raises(RuntimeError, match=message):
            torch.export.export(quantizer, (torch.randn(4, 6),))
        torch.export.export(quantizer.freeze(), (torch.randn(4, 6),))
