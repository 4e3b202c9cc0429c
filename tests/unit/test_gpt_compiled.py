"""Generation by compiled steps against the ordinary code, and the memory of the cache in both.

Most tests run the formulas that are compiled without a compiler, which would take seconds; slow ones compile them.

Shape letters: B batch, T tokens, P tokens of a prompt, H heads, D width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from te_quant.gpt import GPT, GPTConfig, Segment
from te_quant.gpt import blocks as _blocks
from te_quant.gpt import model as _model
from te_quant.gpt import sampling as _sampling
from tests.unit.gpt_oracles import BOTH, IMAGE, TEXT, build, draw

LENGTH = TEXT.length + IMAGE.length
SINUSOIDAL = dataclasses.replace(IMAGE, positions="sinusoidal")


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


class Steps:
    """The formulas of compiled steps, run as they are; counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """As the step."""
        self.calls += 1
        return _model._next_step(*arguments)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(_model, "_compiled_step", lambda: steps)
    monkeypatch.setattr(_blocks, "is_compiling", lambda: True)
    return steps


def of(P: int, order: tuple[str, ...] = ("text", "image")) -> dict[str, Any]:
    return {"prompt": draw(BOTH, 4, P, order), "order": order}


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "no prompt": lambda: of(0),
    "caption": lambda: of(5) | {"top_k": 4},
    "image first": lambda: of(12, ("image", "text")) | {"stop_token": 3},
    "one row": lambda: {"prompt": draw(BOTH, 1, 5), "top_p": 0.8},
    "guidance": lambda: of(5) | {"guidance_scale": 2.0, "temperature": 0.5, "top_fraction": 0.5},
    "lengths": lambda: of(7) | {"prompt_lengths": torch.tensor([2, 7, 5, 3])},
    "mask": lambda: of(LENGTH) | {"prompt_mask": torch.rand(4, LENGTH) < 0.6},
    "some": lambda: of(5) | {"max_new_tokens": 4, "temperature": 0},
    "no rows": lambda: {"prompt": torch.zeros(0, 5, dtype=torch.int64)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_steps_draw_the_same_tokens(options: Callable[[], dict[str, Any]], steps: Steps) -> None:
    """In float64, where rounding would need a tie of 1e-15 to show; log-probabilities too."""
    gpt, given = build(scale=0.2), options()
    prompt = given.pop("prompt")
    B = len(prompt)
    wanted = gpt.generate(prompt, generator=seeded(B), return_log_prob=True, **given)
    got = gpt.generate(prompt, generator=seeded(B), return_log_prob=True, compiled=True, **given)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-11)
    assert bool(steps.calls) == (B > 0)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(BOTH, tied_head=False, activation="gelu_tanh"),
        dataclasses.replace(BOTH, segments=(TEXT, SINUSOIDAL)),
        dataclasses.replace(BOTH, num_heads=1, mlp_ratio=2),
    ],
    ids=["head", "sinusoidal", "one-head"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_steps_have_the_logits_of_one_pass(config: GPTConfig, batch: int, steps: Steps) -> None:
    """Token by token, by a cache of one's own, in both segments."""
    gpt, tokens = build(config, scale=0.2), draw(config, batch, LENGTH)
    exact = gpt(tokens).detach()
    cache = gpt.new_cache(batch, compiled=True)
    got = [gpt.next_logits(cache), *(gpt.next_logits(cache, tokens[:, i : i + 1]) for i in range(LENGTH - 1))]
    torch.testing.assert_close(torch.stack(got, 1), exact, rtol=0, atol=1e-12)
    # All but the first token and the one before the image.
    assert (steps.calls, cache.length) == (LENGTH - 3, LENGTH - 1)


def test_nan_in_compiled_steps_is_an_error(steps: Steps) -> None:
    """As in ordinary generation, with the column and the row."""
    gpt = build()
    with torch.no_grad():
        gpt.ends[1].columns[2] = torch.nan
    with pytest.raises(ValueError, match="about token 8 of row 0"):
        gpt.generate(draw(BOTH, 2, 5), compiled=True)
    assert steps.calls == 3


@pytest.mark.parametrize("replaced", ["layer", "forward"])
def test_other_layers_in_the_place_of_linear_ones_are_called(replaced: str, steps: Steps) -> None:
    """An adapter or a forward of its own counts, also for a batch of one, where plain layers are sums."""

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, rows: Tensor) -> Tensor:
            return 2 * self.layer(rows)

    gpt, tokens = build(), draw(BOTH, 1, 7)

    def logits(compiled: bool) -> Tensor:
        cache = gpt.new_cache(1, compiled=compiled)
        gpt.next_logits(cache, tokens[:, :6])
        return gpt.next_logits(cache, tokens[:, 6:])

    before = logits(False)
    for block in gpt.blocks:
        adapter = Adapter(copy.deepcopy(block.up))
        if replaced == "layer":
            block.up = adapter
        else:
            block.up.forward = adapter.forward
    torch.testing.assert_close(logits(True), logits(False), rtol=0, atol=1e-12)
    assert not torch.allclose(logits(False), before)
    assert steps.calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast_stay_as_close_as_ordinary_steps(dtype: torch.dtype, steps: Steps) -> None:
    """To the logits in float32."""
    gpt, tokens = build(dtype=torch.float32, scale=0.2), draw(BOTH, 3, LENGTH)
    exact = gpt(tokens).detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        gpt.to(dtype)
        for compiled in (False, True):
            cache = gpt.new_cache(3, compiled=compiled)
            assert cache.memory[0].dtype == torch.bfloat16
            gpt.next_logits(cache, tokens[:, :7])
            logits = torch.stack([gpt.next_logits(cache, tokens[:, i : i + 1]) for i in range(7, 12)], 1)
            assert (logits.float() - exact[:, 8:13]).abs().max() < 0.1 * exact[exact.isfinite()].abs().max()
    assert steps.calls == 5


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"use_cache": False, "compiled": True},
            ValueError,
            "compiled must be False with use_cache=False, got True; drop use_cache=False",
        ),
        ({"compiled": 1}, TypeError, "compiled must be a bool, got 1"),
    ],
    ids=["use_cache", "type"],
)
def test_what_cannot_be_compiled_is_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    """There are no single tokens to read without a cache."""
    with pytest.raises(error, match=match):
        build().generate(draw(BOTH, 2, 5), **options)


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        call()
    events = records.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def wide() -> tuple[GPT, int]:
    """A network whose cache of one block is much larger than anything else, and the bytes of that for one row."""
    image = Segment("image", 5, (2000,), "learned")
    return build(GPTConfig((image,), 16, 1, 2)), 2 * 8 * 16 * 2001


def copies_of_the_cache(compiled: bool) -> None:
    gpt, row = wide()
    cache = gpt.new_cache(8, compiled=compiled)
    addresses = [memory.data_ptr() for memory in cache.memory]
    tokens = torch.zeros(8, 1901, dtype=torch.int64)
    gpt.next_logits(cache, tokens[:, :1900])

    def read() -> None:
        for column in range(1900, 1903):
            gpt.next_logits(cache, tokens[:, -1:])
            assert cache.length == column + 1

    read()
    cache.length = 1900
    # Scores take 1 of 8 numbers of a head in keys or values; half of all keys would be a copy of note.
    assert largest_allocation(read) < 8 * row / 4
    assert [memory.data_ptr() for memory in cache.memory] == addresses
    ordinary = gpt.new_cache(8)
    logits = gpt.next_logits(ordinary, tokens[:, :1900])
    for _ in range(3):
        logits = gpt.next_logits(ordinary, tokens[:, -1:])
    torch.testing.assert_close(gpt.next_logits(cache), logits, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_cache_is_never_copied() -> None:
    """A step allocates less than a quarter of the cache of a block; a cache that grows by ``cat`` would show."""
    copies_of_the_cache(compiled=False)
    memory = torch.empty(2, 8, 2, 1900, 8, dtype=torch.float64)
    assert largest_allocation(lambda: F.pad(memory, (0, 0, 0, 1))) > 8 * wide()[1] / 2


@pytest.mark.slow
def test_one_graph_serves_all_columns_and_batches_of_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths of prompts and sequences, and other batches, compile nothing; a single row does, once."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(_model._next_step, dynamic=True, fullgraph=True, backend=count)
    monkeypatch.setattr(_model, "_compiled_step", lambda: step)
    gpt = build(dataclasses.replace(BOTH, depth=1))
    gpt.generate(draw(BOTH, 4, 5), compiled=True)
    gpt.generate(draw(BOTH, 3, 8), compiled=True)
    gpt.generate(draw(BOTH, 7, 0, ("image",)), order=("image",), compiled=True, max_new_tokens=9)
    gpt.generate(draw(BOTH, 2, 5), compiled=True, guidance_scale=2.0)
    assert len(graphs) == 1
    gpt.generate(draw(BOTH, 1, 5), compiled=True)
    gpt.generate(draw(BOTH, 1, 9), compiled=True)
    assert len(graphs) == 2
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_code_neither_copies_the_cache_nor_draws_other_tokens() -> None:
    """By torch's code generator, in one graph: the tokens of ordinary code in float64."""
    torch._dynamo.reset()
    copies_of_the_cache(compiled=True)
    (gpt, _), prompt = wide(), torch.zeros(1, 1, dtype=torch.int64)
    options: dict[str, Any] = {"top_k": 4, "max_new_tokens": 9}
    wanted = gpt.generate(prompt, generator=seeded(1), **options)
    assert torch.equal(gpt.generate(prompt, generator=seeded(1), compiled=True, **options), wanted)


def test_accelerators_look_at_the_logits_of_compiled_steps_at_the_end(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ordinary generation."""
    monkeypatch.setattr(_sampling, "_looks_at_once", lambda _: False)
    gpt, drawn = build(), []
    with torch.no_grad():
        gpt.ends[1].columns[2] = torch.nan
    with pytest.raises(ValueError, match="about token 8 of row 0"):
        gpt.generate(draw(BOTH, 2, 5), compiled=True, callback=lambda column, _: drawn.append(column))
    assert drawn == list(range(5, LENGTH))
