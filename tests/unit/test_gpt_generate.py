"""The cache against passes without it, generation against its definition, and drawing against exact distributions.

Shape letters: B batch, T tokens, P tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant.gpt import GPT, GPTConfig, Segment
from te_quant.gpt import blocks as _transformer
from te_quant.gpt import sampling as _sampling
from te_quant.gpt.sampling import Sampler
from tests.unit.gpt_oracles import BOTH, IMAGE, TEXT, build, draw

LENGTH = TEXT.length + IMAGE.length
ORDERS = [("text", "image"), ("image", "text"), ("image",)]


def total(order: Any) -> int:
    return sum({"text": TEXT.length, "image": IMAGE.length}[name] for name in order)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, where infinities must be equal."""
    assert torch.equal(a.isinf(), b.isinf())
    return float((a - b).detach().nan_to_num(0.0).abs().max()) if a.numel() else 0.0


def in_chunks(gpt: GPT, tokens: Tensor, order: Any, cuts: list[int]) -> tuple[Tensor, list[Tensor]]:
    """The logits about all tokens, and after each chunk those about the next token where there is one."""
    about, after = gpt.new_cache(len(tokens), order=order), gpt.new_cache(len(tokens), order=order)
    logits, following = [], []
    for begin, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        logits.append(gpt(tokens[:, begin:end], cache=about))
        if end < total(order):
            following.append(gpt.next_logits(after, tokens[:, begin:end]))
    assert about.length == tokens.shape[1]
    return torch.cat(logits, 1), following


@settings(deadline=None)
@given(st.sampled_from(ORDERS), st.data())
def test_cache_changes_nothing_however_the_tokens_are_cut(order: Any, data: st.DataObject) -> None:
    """Chunks of any sizes, empty ones included, give the logits of one pass, about their tokens and the next."""
    length = data.draw(st.integers(0, total(order)))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    gpt = build(dtype=torch.float32, scale=0.2)
    tokens = draw(BOTH, 2, total(order), order)
    exact = gpt(tokens, order)
    got, following = in_chunks(gpt, tokens[:, :length], order, cuts)
    assert difference(got, exact[:, :length]) < 1e-5
    for end, logits in zip([*cuts, length], following, strict=False):
        assert difference(logits, exact[:, end]) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
def test_cache_agrees_token_by_token(order: Any) -> None:
    """At every length, in both precisions."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        gpt, tokens = build(dtype=dtype, scale=0.2), draw(BOTH, 3, total(order), order)
        exact = gpt(tokens, order)
        got, following = in_chunks(gpt, tokens, order, list(range(1, total(order))))
        assert difference(got, exact) < tolerance
        assert difference(torch.stack(following, 1), exact[:, 1:]) < tolerance


def test_causal_attention_aligned_at_the_first_key_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails for chunks that are given ``is_causal`` instead of a mask."""
    exact = F.scaled_dot_product_attention

    def aligned(*tensors: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor:
        options["is_causal"] = options["is_causal"] or attn_mask is not None
        return exact(*tensors, **options)

    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    wanted = gpt(tokens)
    assert difference(in_chunks(gpt, tokens, ORDERS[0], [4])[0], wanted) < 1e-12
    monkeypatch.setattr(_transformer.F, "scaled_dot_product_attention", aligned)
    assert difference(in_chunks(gpt, tokens, ORDERS[0], [4])[0], wanted) > 1e-3


def test_cache_is_written_in_place_and_has_no_gradient() -> None:
    """The memory is allocated once, holds all tokens and the start, and keeps what was written."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    cache = gpt.new_cache(2)
    addresses = [memory.data_ptr() for memory in cache.memory]
    assert cache.order == ("text", "image")
    assert [tuple(memory.shape) for memory in cache.memory] == [(2, 2, 2, 1 + LENGTH, 8)] * 2
    assert not gpt(tokens[:, :6], cache=cache).requires_grad
    kept = [memory[..., :7, :].clone() for memory in cache.memory]
    assert not gpt.next_logits(cache, tokens[:, 6:9]).requires_grad
    assert [memory.data_ptr() for memory in cache.memory] == addresses
    assert all(torch.equal(a, b[..., :7, :]) for a, b in zip(kept, cache.memory, strict=True))
    assert (cache.length, cache.batch) == (9, 2)


def test_asking_again_for_the_next_token_changes_nothing() -> None:
    """Without more tokens the answer is the same, before the first token as well."""
    gpt, tokens = build(), draw(BOTH, 2, 4)
    cache = gpt.new_cache(2)
    first = gpt.next_logits(cache)
    assert torch.equal(gpt.next_logits(cache), first)
    gpt(tokens, cache=cache)
    later = gpt.next_logits(cache)
    assert torch.equal(gpt.next_logits(cache, tokens[:, :0]), later)
    exact = gpt(draw(BOTH, 2, 1))
    assert difference(first, exact[:, 0]) < 1e-12 < difference(first, later)


def test_cache_takes_the_dtype_that_is_asked_for() -> None:
    """That of autocast where it is on, that of the weights elsewhere; half precision stays close."""
    gpt, tokens = build(dtype=torch.float32, scale=0.2), draw(BOTH, 2, LENGTH)
    exact = gpt(tokens)
    assert gpt.new_cache(2).memory[0].dtype == torch.float32
    for options in ({}, {"dtype": torch.bfloat16}):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not options):
            cache = gpt.new_cache(2, **options)
            assert cache.memory[0].dtype == torch.bfloat16
            logits = torch.cat([gpt(tokens[:, :7], cache=cache), gpt(tokens[:, 7:], cache=cache)], 1)
        assert difference(logits.float(), exact) < 0.1 * float(exact[exact.isfinite()].detach().abs().max())
    with pytest.raises(TypeError, match=r"dtype must be floating point, got torch\.int8"):
        gpt.new_cache(2, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda gpt, tokens, cache: gpt(tokens[:, -2:], mask=tokens[:, -2:] > 0, cache=cache),
            "mask must be None with a cache, got a tensor",
        ),
        (
            lambda gpt, tokens, cache: gpt(tokens[:, -2:], ("image",), cache=cache),
            r"order must be that of the cache, \('text', 'image'\), got \('image',\)",
        ),
        (
            lambda gpt, tokens, cache: gpt(tokens[:1, -2:], ["text", "image"], cache=cache),
            "tokens axis 0 must be batch of the cache=2, got 1",
        ),
        (
            lambda gpt, tokens, cache: gpt(tokens[:, :3], cache=cache),
            r"tokens axis 1 must be at most 2, what the order .* has left, got 3",
        ),
        (
            lambda gpt, tokens, cache: gpt.next_logits(cache, tokens[:, :2]),
            "cache must be short of the end of its order, 17 tokens, got 17 with the",
        ),
    ],
    ids=["mask", "order", "batch", "length", "end"],
)
def test_caches_refuse_what_does_not_belong_to_them(call: Callable, match: str) -> None:
    """A mask, another order, another batch, more tokens than there are; the cache stays as it was."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    cache = gpt.new_cache(2)
    gpt(tokens[:, :-2], cache=cache)
    with pytest.raises(ValueError, match=match):
        call(gpt, tokens, cache)
    assert cache.length == LENGTH - 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cache_of_another_network_is_refused(compiled: bool) -> None:
    """By its shape; one of a network of the same sizes is not known from its own."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    for changes in ({"depth": BOTH.depth + 1}, {"width": 2 * BOTH.width}, {"num_heads": 2 * BOTH.num_heads}):
        other = build(dataclasses.replace(BOTH, **changes)).new_cache(2, compiled=compiled)
        match = (
            r"cache must be that of a model with \(depth, num_heads, width / num_heads\)=\(.*\), got one with \("
        )
        with pytest.raises(ValueError, match=match):
            gpt.next_logits(other, tokens[:, :1])
        assert other.length == 0


def test_caches_of_a_negative_batch_are_refused() -> None:
    """None is no cache."""
    with pytest.raises(ValueError, match="batch must be an int >= 0, got -1"):
        build().new_cache(-1)


@pytest.mark.parametrize(
    "call",
    [
        lambda gpt, tokens, cache: gpt.new_cache(2),
        lambda gpt, tokens, cache: gpt(tokens, cache=cache),
        lambda gpt, tokens, cache: gpt.next_logits(cache),
        lambda gpt, tokens, cache: gpt.generate(tokens),
        lambda gpt, tokens, cache: gpt.generate(tokens, use_cache=False),
    ],
    ids=["new_cache", "forward", "next_logits", "generate", "generate-uncached"],
)
def test_dropout_and_caches_exclude_each_other(call: Callable) -> None:
    """In training mode a pass with a cache would draw other zeros than one without."""
    gpt, tokens = build(dataclasses.replace(BOTH, dropout=0.1)), draw(BOTH, 2, LENGTH)
    cache = gpt.new_cache(2)
    gpt.train()
    match = r"GPT must be in evaluation mode .*call eval\(\)\), got training mode with dropout=0\.1"
    with pytest.raises(ValueError, match=match):
        call(gpt, tokens, cache)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prompt", [0, 1, 7])
def test_greedy_generation_repeats_the_likeliest_token(order: Any, prompt: int) -> None:
    """With and without a cache: the argmax of a whole pass, again and again."""
    gpt = build()
    tokens = draw(BOTH, 3, prompt, order)
    wanted = tokens
    while wanted.shape[1] < total(order):
        following = gpt(F.pad(wanted, (0, 1)), order)[:, -1].argmax(-1)
        wanted = torch.cat([wanted, following[:, None]], 1)
    for use_cache in (True, False):
        got = gpt.generate(tokens, order=order, temperature=0, use_cache=use_cache)
        assert torch.equal(got, wanted)
        some = gpt.generate(tokens, order=order, temperature=0, use_cache=use_cache, max_new_tokens=4)
        assert torch.equal(some, wanted[:, : prompt + 4])


def test_generation_follows_the_distribution_of_the_network() -> None:
    """Of a sequence so short that its joint distribution can be written down, with and without a cache."""
    gpt = build(
        GPTConfig((Segment("a", 2, (2,), "learned"), Segment("b", 3, (1,), "learned")), width=8, num_heads=2)
    )
    every = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3))
    logits = gpt(every).log_softmax(-1)
    wanted = logits.gather(2, every[..., None]).sum((1, 2)).exp()
    assert abs(wanted.sum() - 1) < 1e-12
    rows = 20_000
    for use_cache in (True, False):
        drawn = gpt.generate(torch.zeros(rows, 0, dtype=torch.int64), use_cache=use_cache)
        counts = torch.bincount(drawn @ torch.tensor([6, 3, 1]), minlength=12)
        assert ((counts - rows * wanted).abs() < 6 * (rows * wanted).sqrt() + 6).all()


def test_sampling_is_decided_by_the_generator_alone() -> None:
    """The same seed, the same tokens, with and without a cache, whatever the global state, which stays."""
    gpt, prompt = build(scale=0.2), draw(BOTH, 4, 3)
    before = torch.get_rng_state()
    first = gpt.generate(prompt, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(gpt.generate(prompt, generator=seeded()), first)
    assert torch.equal(gpt.generate(prompt, generator=seeded(), use_cache=False), first)
    assert not torch.equal(gpt.generate(prompt, generator=seeded(1)), first)
    torch.manual_seed(3)
    default = gpt.generate(prompt)
    torch.manual_seed(3)
    assert torch.equal(gpt.generate(prompt), default)


def test_every_token_is_read_once() -> None:
    """With the cache a block reads each column but the last one time; without, all of them again and again."""
    gpt, prompt = build(), draw(BOTH, 2, 4)
    read: list[int] = []
    gpt.blocks[0].register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[1]))
    gpt.generate(prompt)
    assert read == [5] + [1] * (LENGTH - 5)
    read.clear()
    gpt.generate(prompt, use_cache=False)
    assert read == list(range(5, LENGTH + 1))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(ORDERS[:2]), st.booleans(), st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_rows_with_prompts_of_their_own_come_out_as_alone(order: Any, use_cache: bool, lengths: list[int]) -> None:
    """Greedy, for any lengths: no padding enters the context, and positions are those of the columns."""
    gpt = build()
    prompt = draw(BOTH, len(lengths), 8, order)
    padded = prompt.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = -7
    options: dict[str, Any] = {"order": order, "temperature": 0, "use_cache": use_cache}
    together = gpt.generate(padded, prompt_lengths=torch.tensor(lengths), **options)
    assert together.shape == (len(lengths), LENGTH)
    for row, length in enumerate(lengths):
        assert torch.equal(together[row], gpt.generate(prompt[row : row + 1, :length], **options)[0])


def test_prompt_lengths_matter() -> None:
    """Without them the padding would be part of the prompt."""
    gpt, prompt = build(), draw(BOTH, 8, 5)
    lengths = torch.full((8,), 2)
    own = gpt.generate(prompt, prompt_lengths=lengths, temperature=0)
    assert not torch.equal(own, gpt.generate(prompt, temperature=0))
    assert torch.equal(own[:, :2], prompt[:, :2])
    full = gpt.generate(prompt, prompt_lengths=torch.full((8,), 5), temperature=0)
    assert torch.equal(full, gpt.generate(prompt, temperature=0))


def constant(tokens: list[int], segments: tuple[Segment, ...] = (IMAGE, TEXT)) -> GPT:
    """A network that is certain what stands in each column of its default order, whatever came before."""
    length = sum(segment.length for segment in segments)
    config = GPTConfig(segments, width=64, depth=1, num_heads=1, tied_head=False)
    gpt = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.zero_()
        gpt.norm.weight.fill_(1.0)
        # Column i is announced by the i-th unit vector: the start for the first, then the position before.
        gpt.start[0, 0] = 1.0
        column = 0
        for ends in gpt.ends:
            for place in range(ends.segment.length):
                if ends.segment.positions == "learned" and column + 1 < length:
                    ends.positions[place, column + 1] = 1.0
                ends.head[tokens[column], column] = 100.0
                column += 1
    return gpt


FLAT = Segment("image", 11, (3,), "learned")


@pytest.mark.parametrize(("pad_token", "fill"), [(2, 2), (None, 4), (0, 0)])
def test_rows_end_at_the_stop_token(pad_token: int | None, fill: int) -> None:
    """What is left is padding, else the stop token; nothing is drawn once all rows have ended."""
    text = Segment("text", 7, (5,), "learned", pad_token)
    gpt = constant([1, 2, 3, 4, 6, 4, 5, 3], (FLAT, text))
    columns: list[int] = []
    options: dict[str, Any] = {"temperature": 0, "callback": lambda column, _: columns.append(column)}
    # What is drawn in place of a row's own token ends nothing, nor does a 4 of its own, nor one in an image.
    options["prompt_lengths"] = torch.tensor([3, 4, 4])
    prompt = torch.tensor([[4, 4, 4, 0], [4, 4, 4, 5], [4, 4, 4, 4]])
    free = gpt.generate(prompt, **options)
    assert free[:, 3:].tolist() == [[4, 6, 4, 5, 3], [5, 6, 4, 5, 3], [4, 6, 4, 5, 3]]
    assert columns == [3, 4, 5, 6, 7]
    columns.clear()
    for use_cache in (True, False):
        got = gpt.generate(prompt, stop_token=4, use_cache=use_cache, **options)
        assert got[:, :3].tolist() == [[4, 4, 4]] * 3
        assert got[:, 3:].tolist() == [[4] + [fill] * 4, [5, 6, 4, fill, fill], [4, 6, 4, fill, fill]]
    assert columns == [3, 4, 5] * 2


def test_rows_end_each_for_itself() -> None:
    """A row that goes on is what it would be if the other had not ended."""
    gpt = build(scale=0.05)
    prompt = draw(BOTH, 64, IMAGE.length, ("image", "text"))
    options: dict[str, Any] = {"order": ("image", "text"), "generator": None}
    free = gpt.generate(prompt, **{**options, "generator": seeded()})
    got = gpt.generate(prompt, stop_token=3, **{**options, "generator": seeded()})
    for row, other in zip(got[:, IMAGE.length :].tolist(), free[:, IMAGE.length :].tolist(), strict=True):
        end = other.index(3) + 1 if 3 in other else TEXT.length
        assert row == other[:end] + [2] * (TEXT.length - end)
    assert (got != free).any()


def test_callback_sees_every_new_column_in_turn() -> None:
    """As it will be in the result, with the rows' own tokens where they have them."""
    gpt, prompt = build(), draw(BOTH, 3, 6)
    seen: list[tuple[int, list[int]]] = []
    got = gpt.generate(
        prompt,
        prompt_lengths=torch.tensor([6, 2, 4]),
        callback=lambda column, tokens: seen.append((column, tokens.tolist())),
    )
    assert seen == [(column, got[:, column].tolist()) for column in range(2, LENGTH)]
    assert torch.equal(got[0, :6], prompt[0])


def test_result_is_a_tensor_like_any_other() -> None:
    """One may train on it, and write to it without changing the prompt."""
    gpt, prompt = build(), draw(BOTH, 2, LENGTH)
    sampled = gpt.generate(prompt[:, :3])
    assert (sampled.dtype, sampled.is_inference()) == (torch.int64, False)
    gpt.losses(sampled)["image"].backward()
    for new in (gpt.generate(prompt), gpt.generate(prompt[:, :4], max_new_tokens=0)):
        assert torch.equal(new, prompt[:, : new.shape[1]])
        new += 1
        assert not torch.equal(new, prompt[:, : new.shape[1]])


def test_tokens_of_the_callback_may_be_trained_on() -> None:
    """They too are tensors like any other."""
    gpt, seen = build(), []
    gpt.generate(draw(BOTH, 2, 3), callback=lambda _, tokens: seen.append(tokens))
    table = torch.nn.Embedding(100, 2)
    for tokens in seen:
        table(tokens).sum().backward()
    assert table.weight.grad is not None
    assert int(table.weight.grad[:, 0].sum()) == 2 * len(seen)


@pytest.mark.parametrize("P", [0, 3])
def test_batch_may_be_empty(P: int) -> None:
    """No rows in, no rows out."""
    prompt = torch.zeros(0, P, dtype=torch.int64)
    gpt = build()
    assert gpt.generate(prompt).shape == (0, LENGTH)
    assert gpt.generate(prompt, prompt_lengths=torch.zeros(0, dtype=torch.int64), top_p=0.5).shape == (0, LENGTH)
    assert gpt(prompt).shape == (0, P, 11)


def test_tokens_are_of_their_segment() -> None:
    """Each from the vocabulary of its column, all of which occurs."""
    drawn = build(scale=0.05).generate(torch.zeros(500, 0, dtype=torch.int64), generator=seeded())
    assert set(drawn[:, : TEXT.length].flatten().tolist()) == set(range(7))
    assert set(drawn[:, TEXT.length :].flatten().tolist()) == set(range(11))


def test_generation_under_autocast() -> None:
    """Runs in half precision, cached or not, and gives tokens that fit."""
    gpt = build(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for use_cache in (True, False):
            drawn = gpt.generate(draw(BOTH, 3, 4), use_cache=use_cache, top_p=0.9)
            gpt(drawn)
    half = gpt.bfloat16()
    half(half.generate(draw(BOTH, 3, 4), top_k=3))


def distribution(logits: np.ndarray, temperature: float, keep: int, top_p: float | None) -> np.ndarray:
    """Of one token, by sorting and adding up one probability after the other."""
    V = len(logits)
    kept = sorted(range(V), key=lambda i: -logits[i])[:keep]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in kept}
    if top_p is not None:
        nucleus: list[int] = []
        while sum(weights[i] for i in nucleus) < top_p * sum(weights.values()):
            nucleus.append(kept[len(nucleus)])
        weights = {i: weights[i] for i in nucleus}
    result = np.zeros(V)
    for i, weight in weights.items():
        result[i] = weight / sum(weights.values())
    return result


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12),
    st.floats(0.2, 3),
    st.one_of(
        st.tuples(st.just("top_k"), st.integers(1, 15)),
        st.tuples(st.just("top_fraction"), st.integers(1, 100)),
        st.none(),
    ),
    st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_drawing_follows_the_distribution_written_out(
    V: int, temperature: float, kept: tuple[str, Any] | None, top_p: float | None
) -> None:
    """For all that may be kept, frequencies are those of the brute force, and no other token occurs."""
    logits, rows = 2 * torch.randn(V, dtype=torch.float64), 4_000
    options: dict[str, Any] = {}
    keep = V
    if kept is not None:
        name, amount = kept
        # Shares are drawn in hundredths, so that rounding down is exact.
        options[name] = amount if name == "top_k" else amount / 100
        keep = min(amount, V) if name == "top_k" else max(1, amount * V // 100)
    wanted = rows * distribution(logits.numpy(), temperature, keep, top_p)
    drawn = Sampler(temperature, **options, top_p=top_p).draw(logits.expand(rows, V)).tokens
    counts = np.bincount(drawn.numpy(), minlength=V)
    assert drawn.shape == (rows,)
    assert (counts[wanted == 0] == 0).all()
    assert (np.abs(counts - wanted) < 6 * np.sqrt(wanted) + 6).all()
    # The opposite order of preference would be seen.
    if V > 1 and keep == 1:
        assert drawn[0] != logits.argmin()


@pytest.mark.parametrize(
    ("share", "V", "kept"), [(0.1, 256, 25), (0.29, 100, 29), (0.07, 100, 7), (0.1, 5, 1), (1, 9, 9), (0.5, 3, 1)]
)
def test_top_fraction_keeps_a_share_of_the_vocabulary(share: float, V: int, kept: int) -> None:
    """Rounded down, though not for want of a last bit; at least one."""
    logits = torch.linspace(0, 1e-3, V)[torch.randperm(V)]
    drawn = Sampler(top_fraction=share).draw(logits.expand(60 * kept, V)).tokens
    assert set(drawn.tolist()) == set(logits.topk(kept).indices.tolist())


def test_options_reach_the_drawing() -> None:
    """Each of them makes generation certain when it leaves one token, and free otherwise."""
    gpt, prompt = build(scale=0.1), draw(BOTH, 8, 3)
    greedy = gpt.generate(prompt, temperature=0)
    for certain in ({"top_k": 1}, {"top_fraction": 0.01}, {"top_p": 1e-6}, {"temperature": 1e-9}):
        assert torch.equal(gpt.generate(prompt, **certain), greedy)
    for loose in ({"top_k": 20}, {"top_fraction": 1.0}, {"top_p": 1.0}, {"temperature": 1.0}):
        assert not torch.equal(gpt.generate(prompt, **loose), greedy)


@pytest.mark.parametrize("temperature", [1e-30, 1e-320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_smallest_temperatures_are_greedy(temperature: float, dtype: torch.dtype) -> None:
    """No division by zero, no infinities less infinities."""
    logits = 50 * torch.randn(40, 9).to(dtype)
    best = logits.max(-1).values
    for options in ({}, {"top_p": 0.5}, {"top_k": 4}):
        drawn = Sampler(temperature, **options).draw(logits).tokens
        assert torch.equal(logits.gather(1, drawn[:, None])[:, 0], best)


def test_noise_of_zero_draws_no_dropped_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponential numbers may round to zero; a token of probability zero stays impossible."""
    monkeypatch.setattr(Tensor, "exponential_", lambda self, generator=None: self.zero_())
    logits = torch.randn(50, 9)
    drawn = Sampler(top_p=0.3).draw(logits).tokens
    shares = logits.softmax(-1).sort(-1, descending=True)
    kept = (shares.values.cumsum(-1) - shares.values < 0.3).sum(-1)
    ranks = (shares.indices == drawn[:, None]).int().argmax(-1)
    assert (ranks < kept).all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"temperature": -0.1}, ValueError, r"temperature must be a finite number >= 0, got -0\.1"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite number >= 0, got inf"),
        ({"top_k": 0}, ValueError, "top_k must be an int >= 1, got 0"),
        ({"top_k": 2.0}, TypeError, r"top_k must be an int >= 1, got 2\.0"),
        ({"top_fraction": 0}, ValueError, "top_fraction must be > 0, got 0"),
        ({"top_fraction": 1.1}, ValueError, r"top_fraction must be a finite number <= 1, got 1\.1"),
        ({"top_p": 0.0}, ValueError, r"top_p must be > 0, got 0\.0"),
        ({"top_p": "0.9"}, TypeError, "top_p must be a finite number <= 1, got '0.9'"),
        ({"top_k": 3, "top_fraction": 0.1}, ValueError, r"top_fraction must be None with top_k, got 0\.1"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be an int >= 0 and <= 14, got -1"),
        ({"max_new_tokens": 15}, ValueError, "max_new_tokens must be an int >= 0 and <= 14, got 15"),
        ({"order": ("audio",)}, ValueError, "order entry must be one of 'text', 'image', got 'audio'"),
        ({"stop_token": 1}, ValueError, "stop_token must be None where more than one segment is generated, got 1"),
        (
            {"stop_token": 7, "max_new_tokens": 2},
            ValueError,
            "stop_token must be an int >= 0 and <= 6, got 7",
        ),
        ({"prompt_lengths": torch.tensor([3])}, ValueError, "prompt_lengths axis 0 must be batch of the prompt=2"),
        (
            {"prompt_lengths": torch.tensor([[3, 3]])},
            ValueError,
            r"prompt_lengths must be of shape \(B,\), got sha",
        ),
        ({"prompt_lengths": torch.tensor([4, -1])}, ValueError, r"prompt_lengths must be in \[0, 3\].*\[4, -1\]"),
        (
            {"prompt_lengths": torch.ones(2)},
            TypeError,
            "prompt_lengths must be an integer tensor, got torch.float32",
        ),
        ({"prompt_lengths": [3, 3]}, TypeError, "prompt_lengths must be a tensor, got list"),
    ],
)
def test_generation_refuses_options(options: dict, error: type, match: str) -> None:
    """Out of range, of another type, or against each other."""
    with pytest.raises(error, match=match):
        build().generate(torch.zeros(2, 3, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        (
            torch.zeros(2, LENGTH + 1, dtype=torch.int64),
            ValueError,
            r"prompt axis 1 must be at most 17, what the order \('text', 'image'\) has left, got 18",
        ),
        (torch.full((2, 3), 7), ValueError, r"prompt of 'text' must be in \[0, vocab_size=7\), got 7"),
        (torch.full((2, 3), -1), ValueError, r"prompt of 'text' must be in \[0, vocab_size=7\), got -1"),
        (torch.zeros(2, 3), TypeError, "prompt must be an integer tensor, got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"prompt must be of shape \(B, T\), got shape \(3,\)"),
    ],
)
def test_generation_refuses_prompts(prompt: Tensor, error: type, match: str) -> None:
    """Too long, outside the vocabulary, or no tokens at all."""
    with pytest.raises(error, match=match):
        build().generate(prompt)


def test_generator_of_another_device_is_refused() -> None:
    """Before anything is drawn."""

    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator must be on cpu as the prompt, got cuda"):
        build().generate(draw(BOTH, 2, 3), generator=Elsewhere())


def _biased(gpt: GPT, values: dict[int, float], row: int = 0, call: int = 0) -> GPT:
    """Put values into the logits of one row, from the given drawn column on."""
    head, calls = gpt.ends[1].logits, iter(range(10_000))

    def logits(states: Tensor) -> Tensor:
        result = head(states).clone()
        if next(calls) >= call:
            for token, value in values.items():
                result[row, token] = value
        return result

    gpt.ends[1].logits = logits
    return gpt


_ALL = dict.fromkeys(range(IMAGE.vocab_size), -math.inf)
_UNDRAWABLE = {
    "nan": {2: math.nan},
    "inf": {1: math.inf},
    "all-minus-inf": _ALL,
    "nan-and-minus-inf": _ALL | {0: math.nan},
}
_DRAWS: list[dict[str, Any]] = [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {"use_cache": False}]


@pytest.mark.parametrize("accelerator", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("options", _DRAWS, ids=str)
@pytest.mark.parametrize("values", _UNDRAWABLE.values(), ids=_UNDRAWABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_generation_from_nan_or_infinite_logits_is_an_error(
    dtype: torch.dtype,
    values: dict[int, float],
    options: dict[str, Any],
    accelerator: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The message names the first token and row; an accelerator draws all columns before it looks."""
    monkeypatch.setattr(_sampling, "_looks_at_once", lambda _: not accelerator)
    gpt = _biased(build().to(dtype), values, row=1, call=2)
    drawn: list[int] = []
    expected = (
        r"^logits must be finite, or -inf for some tokens.*got NaN, \+inf or only -inf about token 2 of row 1; "
    )
    with pytest.raises(ValueError, match=expected):
        gpt.generate(
            torch.zeros(3, 0, dtype=torch.int64),
            order=("image",),
            callback=lambda column, _: drawn.append(column),
            **options,
        )
    assert drawn == list(range(IMAGE.length if accelerator else 2))


def test_generation_from_half_precision_that_overflows_is_an_error() -> None:
    """Weights that float32 holds, and float16 too, but not their products."""
    gpt = build()
    with torch.no_grad():
        gpt.norm.weight.fill_(6e4)
    prompt = torch.zeros(2, 0, dtype=torch.int64)
    gpt.generate(prompt, order=("image",))
    with torch.no_grad():
        gpt.norm.weight.fill_(6e4)
        gpt.ends[1].tokens.mul_(1000)
    with pytest.raises(ValueError, match="about token 0 of row"):
        gpt.half().generate(prompt, order=("image",))


@pytest.mark.parametrize("options", _DRAWS, ids=str)
def test_tokens_whose_logits_are_minus_infinity_are_never_drawn(options: dict[str, Any]) -> None:
    """As those outside a vocabulary, or taken out by hand; the others are drawn as ever."""
    allowed = {0, 1}
    banned = {token: -math.inf for token in range(IMAGE.vocab_size) if token not in allowed}
    gpt = _biased(build(), banned, row=0)
    result = gpt.generate(torch.zeros(1, 0, dtype=torch.int64), order=("image",), generator=seeded(), **options)
    assert set(result.flatten().tolist()) <= allowed


def test_nan_in_a_row_that_has_ended_or_keeps_its_own_token_is_no_error() -> None:
    """Nothing is drawn from those logits."""
    gpt = _biased(build(), {0: math.nan}, row=0)
    prompt = torch.zeros(2, IMAGE.length, dtype=torch.int64)
    result = gpt.generate(prompt, order=("image",), prompt_lengths=torch.tensor([IMAGE.length, 0]))
    assert torch.equal(result[0], prompt[0])
    later = _biased(build(), {0: math.nan}, row=0, call=1)
    sure = _biased(later, {3: 1e9}, row=0)
    ended = sure.generate(torch.zeros(2, 0, dtype=torch.int64), order=("image",), stop_token=3)
    assert (ended[0] == 3).all()
