"""The network: against a slow one, what a token may depend on, its losses, and what it refuses.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import VQAutoencoder
from te_quant.autoencoder import AutoencoderConfig
from te_quant.gpt import GPT, GPTConfig, Segment
from te_quant.gpt import blocks as _transformer
from tests.unit.gpt_oracles import BOTH, IMAGE, TEXT, build, draw, logits_oracle

ORDERS = [None, ("text", "image"), ("image", "text"), ("image",), ("text",)]
LENGTH = TEXT.length + IMAGE.length


def small(**options: Any) -> GPTConfig:
    return dataclasses.replace(BOTH, **options)


def close(got: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    """Equal but for rounding, with infinities in the same places."""
    np.testing.assert_allclose(
        got.detach().double().numpy(), torch.as_tensor(expected).detach().numpy(), rtol=0, atol=tolerance
    )


@pytest.fixture
def compiler() -> Iterator[None]:
    """No graph of one test serves another; deprecations inside the compiler are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "config",
    [
        BOTH,
        small(tied_head=False, num_heads=1, mlp_ratio=2.5),
        small(activation="gelu_tanh", depth=1),
        GPTConfig((Segment("text", 5, (9,), "sinusoidal"),), width=6, depth=1, num_heads=3),
        GPTConfig(
            (Segment("a", 3, (2, 5), "sinusoidal", pad_token=0), IMAGE, TEXT), width=8, depth=3, num_heads=2
        ),
        GPTConfig((Segment("a", 1, (1,), "learned"), Segment("b", 4, (2, 3), "learned")), width=4, num_heads=1),
    ],
)
def test_forward_agrees_with_a_slow_network(config: GPTConfig) -> None:
    """Every kind of position, padding, both heads, one to three segments, forwards and backwards, every length."""
    gpt = build(config)
    names = [segment.name for segment in config.segments]
    for order in (None, names[::-1], names[-1:]):
        most = sum(segment.length for segment in config.segments if order is None or segment.name in order)
        for length in {0, 1, most // 2, most - 1, most}:
            tokens = draw(config, 2, length, order)
            close(gpt(tokens, order), logits_oracle(gpt, tokens, order))


def test_logits_exist_within_the_vocabulary_alone() -> None:
    """Finite for the tokens of the segment, -inf beyond, in the columns of either."""
    tokens = draw(BOTH, 3, LENGTH)
    logits = build()(tokens)
    assert logits.shape == (3, LENGTH, 11)
    finite = logits.isfinite()
    assert finite[:, TEXT.length :].all()
    assert finite[:, : TEXT.length, :7].all()
    assert (logits[:, : TEXT.length, 7:] == -math.inf).all()


def influence(gpt: GPT, order: Any, column: int, **options: Any) -> Tensor:
    """(T,), how much the logits of each column change with the token in ``column``."""
    tokens = draw(gpt.config, 4, LENGTH, order)
    changed = tokens.clone()
    # Both segments have these, and none of them is the padding.
    tokens[:, column], changed[:, column] = 0, 1
    difference = gpt(tokens, order, **options) - gpt(changed, order, **options)
    return difference.nan_to_num(0.0).abs().amax((0, 2))


@pytest.mark.parametrize("order", [("text", "image"), ("image", "text")])
def test_logits_depend_on_earlier_tokens_alone(order: Any) -> None:
    """A token changes nothing up to its own column, and everything after it."""
    gpt = build()
    for column in range(LENGTH):
        effect = influence(gpt, order, column)
        assert effect[: column + 1].max() < 1e-12
        assert (effect[column + 1 :] > 1e-6).all()


def test_attention_that_looks_ahead_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The causality test fails for attention without a causal mask."""
    exact = F.scaled_dot_product_attention
    monkeypatch.setattr(
        _transformer.F,
        "scaled_dot_product_attention",
        lambda *tensors, **options: exact(*tensors, **{**options, "is_causal": False}),
    )
    assert influence(build(), None, 4)[:4].min() > 1e-6


def test_order_is_told_by_the_start_alone() -> None:
    """Another first segment is another start, whose vector is all that distinguishes an order so far."""
    gpt = build()
    image = draw(BOTH, 2, IMAGE.length, ("image",))
    alone, before_text = gpt(image, ("image",)), gpt(image, ("image", "text"))
    close(alone, before_text)
    after_text = gpt(torch.cat([draw(BOTH, 2, TEXT.length), image], 1))[:, TEXT.length :]
    assert (after_text - alone).abs().min(0).values.max() > 1e-3
    with torch.no_grad():
        gpt.start[0] += 1.0
    close(gpt(image, ("image",)), alone)
    with torch.no_grad():
        gpt.start[1] += torch.linspace(0, 1, 16)
    assert (gpt(image, ("image",)) - alone).abs().max() > 1e-3


def test_default_order_is_that_of_the_config() -> None:
    """Nothing else."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    close(gpt(tokens), gpt(tokens, ["text", "image"]), 0)


def test_rows_do_not_know_each_other() -> None:
    """Permuted rows have permuted logits."""
    gpt, tokens, turn = build(), draw(BOTH, 5, LENGTH), torch.randperm(5)
    close(gpt(tokens[turn]), gpt(tokens)[turn])
    assert (gpt(tokens) - gpt(tokens).roll(1, 0)).nan_to_num(0.0).abs().max() > 1e-3


def test_padding_is_a_token_of_its_own_at_every_position() -> None:
    """Its two places have unlike vectors; a segment without padding has one vector a token."""
    gpt = build()
    ends = gpt.ends[0]
    vectors = ends.embed(torch.tensor([[2, 2, 2, 2, 2]]), 0) - ends.positions
    close(vectors[0], ends.padding)
    others = ends.embed(torch.tensor([[3, 3, 3, 3, 3]]), 0) - ends.positions
    close(others[0], ends.tokens[3].expand(5, -1))
    assert gpt.ends[1].padding is None


@settings(deadline=None)
@given(st.data())
def test_masked_tokens_are_as_if_they_were_not_there(data: st.DataObject) -> None:
    """For any mask, the logits are those of the network without the masked tokens, whatever these are."""
    gpt = build(small(depth=2))
    order = data.draw(st.sampled_from(ORDERS))
    length = data.draw(st.integers(1, TEXT.length if order == ("text",) else IMAGE.length))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1)))
    tokens = draw(BOTH, len(mask), length, order)
    logits = gpt(tokens, order, mask=mask)
    close(logits, logits_oracle(gpt, tokens, order, mask))
    others = torch.where(mask, tokens, draw(BOTH, len(mask), length, order))
    close(gpt(others, order, mask=mask), logits)


def test_row_with_masked_padding_is_the_row_without() -> None:
    """Padding after a shorter caption leaves its logits, and those of the first image token, as they are."""
    gpt, tokens = build(), draw(BOTH, 3, LENGTH)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[:, 3 : TEXT.length] = False
    padded = gpt(tokens, mask=mask)
    close(padded[:, :4], gpt(tokens[:, :4]))
    # The state after the third token says what comes next, be it a fourth or an image.
    state = gpt._read(gpt._layout(None), tokens[:, :3])[:, -1]
    close(padded[:, TEXT.length], gpt.ends[1].logits(state))
    close(gpt(tokens, mask=torch.ones_like(mask)), gpt(tokens))
    # Without the mask the padding is read.
    assert (padded - gpt(tokens))[:, TEXT.length :].abs().max() > 1e-3
    assert influence(gpt, None, 4, mask=mask[:1].expand(4, -1)).max() < 1e-12 < influence(gpt, None, 4).max()


@pytest.mark.parametrize("order", ORDERS)
def test_losses_are_the_cross_entropy_of_the_logits(order: Any) -> None:
    """Segment by segment, with the same gradient as the mean over all -inf padded logits."""
    gpt = build()
    names = order or ("text", "image")
    lengths = {"text": TEXT.length, "image": IMAGE.length}
    length = sum(lengths[name] for name in names)
    tokens = draw(BOTH, 3, length, order)
    losses = gpt.losses(tokens, order)
    assert list(losses) == list(names)
    logits, begin = gpt(tokens, order), 0
    for name in names:
        end = begin + lengths[name]
        own = logits[:, begin:end].detach().numpy()
        chosen = np.take_along_axis(own, tokens[:, begin:end, None].numpy(), 2)[..., 0]
        close(losses[name], (np.log(np.exp(own).sum(-1)) - chosen).mean())
        begin = end
    total = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    close(sum(losses[name] * lengths[name] / length for name in names), total)
    wanted = torch.autograd.grad(total, list(gpt.parameters()), allow_unused=True, materialize_grads=True)
    mixed = sum(losses[name] * lengths[name] / length for name in names)
    got = torch.autograd.grad(mixed, list(gpt.parameters()), allow_unused=True, materialize_grads=True)
    for a, b in zip(got, wanted, strict=True):
        close(a, b)


def test_losses_of_a_beginning_are_of_the_segments_in_it() -> None:
    """A segment that has no tokens has no loss."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    assert list(gpt.losses(tokens[:, :3])) == ["text"]
    assert list(gpt.losses(tokens[:, :6])) == ["text", "image"]
    assert gpt.losses(tokens[:, :0]) == {}
    close(gpt.losses(tokens[:, :6])["text"], gpt.losses(tokens)["text"])


def test_ignored_targets_do_not_count() -> None:
    """The mean is over the others; a segment without others has loss and gradient zero."""
    gpt, tokens = build(), draw(BOTH, 3, LENGTH)
    targets = torch.where(torch.rand(3, LENGTH) < 0.4, -1, tokens)
    targets[:, : TEXT.length] = -1
    losses = gpt.losses(tokens, ignore_index=-1, targets=targets)
    logits = gpt(tokens)[:, TEXT.length :].flatten(0, 1)
    kept = targets[:, TEXT.length :].flatten() >= 0
    close(losses["image"], F.cross_entropy(logits[kept], tokens[:, TEXT.length :].flatten()[kept]))
    assert losses["text"] == 0
    gradients = torch.autograd.grad(
        losses["text"], list(gpt.parameters()), materialize_grads=True, allow_unused=True
    )
    assert all((gradient == 0).all() for gradient in gradients)
    # Targets need not be the tokens.
    other = draw(BOTH, 3, LENGTH)
    close(
        gpt.losses(tokens, targets=other)["image"],
        F.cross_entropy(logits, other[:, TEXT.length :].flatten()),
    )


def test_masked_tokens_are_no_targets() -> None:
    """Unless targets say otherwise."""
    gpt, tokens = build(), draw(BOTH, 3, LENGTH)
    mask = torch.rand(3, LENGTH) < 0.6
    mask[0, :] = True
    got = gpt.losses(tokens, mask=mask)
    wanted = gpt.losses(tokens, mask=mask, targets=tokens.masked_fill(~mask, -100))
    every = gpt.losses(tokens, mask=mask, targets=tokens)
    logits = gpt(tokens, mask=mask)
    for name, columns in (("text", slice(0, 5)), ("image", slice(5, None))):
        close(got[name], wanted[name])
        close(every[name], F.cross_entropy(logits[:, columns].flatten(0, 1), tokens[:, columns].flatten()))


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_learns(tied: bool) -> None:
    """No weight is without a gradient when both orders are trained, and the fixed sinusoids are no weights."""
    config = GPTConfig(
        (TEXT, IMAGE, Segment("more", 3, (2, 2), "sinusoidal")), width=8, depth=2, num_heads=2, tied_head=tied
    )
    gpt = build(config)
    tokens = torch.cat([draw(config, 8, LENGTH + 3), torch.zeros(8, 1, dtype=torch.int64)], 1)
    tokens[:, 1:5] = 2
    tokens[4:, 0] = 2
    losses = sum(gpt.losses(tokens).values())
    for order in (("image", "text", "more"), ("more", "image", "text")):
        losses = losses + sum(gpt.losses(draw(config, 8, LENGTH + 4, order), order).values())
    losses.backward()
    assert all((p.grad != 0).any() for p in gpt.parameters())
    names = {name for name, _ in gpt.named_parameters()}
    assert set(gpt.state_dict()) - names == {"ends.2.positions"}
    assert any(name.endswith("head") for name in names) != tied


def test_training_learns_both_orders_by_heart() -> None:
    """A few pairs, in either order, with one set of weights: what follows from the rest becomes certain."""
    torch.manual_seed(0)
    gpt = GPT(small(width=32))
    text, image = draw(BOTH, 4, TEXT.length), draw(BOTH, 4, IMAGE.length, ("image",))
    text[:, 0] = torch.arange(4)
    image[:, 0] = torch.arange(4)
    orders = {("text", "image"): torch.cat([text, image], 1), ("image", "text"): torch.cat([image, text], 1)}
    optimizer = torch.optim.Adam(gpt.parameters(), 3e-3)
    for _ in range(60):
        for order, tokens in orders.items():
            losses = gpt.losses(tokens, order)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    for order, tokens in orders.items():
        losses = gpt.losses(tokens, order)
        # The first token is one of four, each as likely.
        first, second = (TEXT, IMAGE) if order[0] == "text" else (IMAGE, TEXT)
        assert losses[second.name] < 0.1
        assert abs(losses[first.name] - math.log(4) / first.length) < 0.1


def test_initial_weights_are_those_of_gpt_2() -> None:
    """Standard deviation 0.02; what is added to the stream is smaller by the root of 2·depth; biases are zero."""
    gpt = GPT(GPTConfig((Segment("text", 400, (64,), "learned", 0),), width=128, depth=8, tied_head=False))
    for name, parameter in gpt.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == float(name.endswith("weight"))).all()
        else:
            wanted = 0.005 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert abs(parameter.std() / wanted - 1) < 6 / math.sqrt(2 * parameter.numel()), name


def test_dropout_acts_in_training_only() -> None:
    """On the embeddings, the attention and both branches; the same in evaluation."""
    gpt, tokens = build(small(dropout=0.5)), draw(BOTH, 2, LENGTH)
    close(gpt(tokens), gpt(tokens), 0)
    gpt.train()
    first, second = gpt(tokens), gpt(tokens)
    assert (first - second)[:, 1:].nan_to_num(0.0).abs().amax((0, 2)).min() > 1e-6
    gpt.losses(tokens)["image"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gpt.parameters())


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.usefixtures("compiler")
def test_compiled_equals_eager() -> None:
    """Forward is one graph for several sizes, which refuses tokens as eager code does."""
    gpt, order = build(small(depth=1)), ("image", "text")
    forward = torch.compile(gpt, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for B, T in ((3, LENGTH), (2, 14)):
            tokens = draw(BOTH, B, T, order)
            close(forward(tokens, order), gpt(tokens, order))
        tokens[0, -1] = 7
        with pytest.raises(ValueError, match=r"tokens of 'text' must be in \[0, vocab_size=7\), got 7"):
            forward(tokens, order)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.usefixtures("compiler")
def test_compiled_losses_and_gradients_equal_eager() -> None:
    """With a mask and with targets."""
    gpt = build(small(depth=1))
    losses = torch.compile(gpt.losses, fullgraph=True, backend="aot_eager")
    tokens, mask = draw(BOTH, 3, LENGTH), torch.rand(3, LENGTH) < 0.7
    for options in ({"mask": mask}, {"targets": tokens.masked_fill(~mask, -100)}):
        got, wanted = losses(tokens, **options), gpt.losses(tokens, **options)
        for name in ("text", "image"):
            close(got[name], wanted[name])
        names, parameters = zip(*gpt.named_parameters(), strict=True)
        gradients = [
            torch.autograd.grad(sum(each.values()), parameters, allow_unused=True, materialize_grads=True)
            for each in (got, wanted)
        ]
        for name, a, b in zip(names, *gradients, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_attention_is_wide_where_it_takes_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU under autocast, where that in half precision is slow; without one it is as narrow as the rest."""
    gpt, tokens = build(dtype=torch.float32), draw(BOTH, 3, LENGTH)
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        mixed = attention(*arguments, **options)
        seen.append(mixed.dtype)
        return mixed

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt(tokens).dtype == torch.bfloat16
        assert set(seen) == {torch.float32}
        with torch.no_grad():
            gpt(tokens)
    assert seen[len(seen) // 2 :] == [torch.bfloat16] * (len(seen) // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_close(dtype: torch.dtype) -> None:
    """Weights in half precision or under autocast give the same losses to a few digits; losses stay float32."""
    gpt, tokens = build(dtype=torch.float32), draw(BOTH, 8, LENGTH)
    wanted = gpt.losses(tokens)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.autocast("cpu", dtype=dtype):
        assert gpt(tokens, mask=mask).dtype == dtype
        results = [gpt.losses(tokens), gpt.losses(tokens, mask=mask)]
    assert gpt.to(dtype)(tokens).dtype == dtype
    results.append(gpt.losses(tokens))
    for losses in results:
        for name, loss in losses.items():
            assert loss.dtype == torch.float32
            assert abs(loss - wanted[name]) < 0.05 * wanted[name]


@pytest.mark.parametrize("method", ["forward", "losses"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: t.float(), TypeError, "tokens must be an integer tensor, got torch.float32"),
        (lambda t: t.tolist(), TypeError, "tokens must be a tensor, got list"),
        (lambda t: t.reshape(2, -1, 1), ValueError, r"tokens must be of shape \(B, T\), got shape \(2, 17, 1\)"),
        (
            lambda t: torch.cat([t, t[:, :1]], 1),
            ValueError,
            r"tokens axis 1 must be at most 17, what the order \('text', 'image'\) has left, got 18",
        ),
        (lambda t: t + 7, ValueError, r"tokens of 'text' must be in \[0, vocab_size=7\), got"),
        (
            lambda t: F.pad(t[:, 1:], (0, 1), value=11),
            ValueError,
            r"tokens of 'image' must be in \[0, vocab_size=11\), got 11",
        ),
        (
            lambda t: F.pad(t[:, 1:], (0, 1), value=-1),
            ValueError,
            r"tokens of 'image' must be in \[0, vocab_size=11\), got -1",
        ),
        (lambda t: t.to("meta"), ValueError, "tokens must be on cpu as the weights, got meta"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(change: Callable, error: type, match: str, method: str) -> None:
    """By both passes, whichever token it is, the last included."""
    tokens = change(torch.zeros(2, LENGTH, dtype=torch.int64))
    with pytest.raises(error, match=match):
        getattr(build(), method)(tokens)


def test_masked_tokens_may_be_anything() -> None:
    """As in ``generate``: -1 of a quantizer that left tokens out. Elsewhere (the control) it is refused."""
    gpt, tokens = build(), draw(BOTH, 3, LENGTH)
    mask = torch.rand(3, LENGTH) < 0.6
    holes = tokens.masked_fill(~mask, -1)
    close(gpt(holes, mask=mask), gpt(tokens.masked_fill(~mask, 0), mask=mask), 0)
    close(gpt.log_prob(holes, mask=mask), gpt.log_prob(tokens, mask=mask), 0)
    for name, loss in gpt.losses(holes, mask=mask).items():
        close(loss, gpt.losses(tokens, mask=mask)[name], 0)
    with pytest.raises(
        ValueError, match=r"tokens of '(text|image)' must be in \[0, vocab_size=[0-9]+\), got -1\."
    ):
        gpt(holes, mask=torch.ones_like(mask))


def test_other_integers_are_tokens_too() -> None:
    """As compact data sets and the token files of the command line hold them."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    kept = torch.arange(4).expand(2, 4) % 2 == 0
    options: list[dict[str, Any]] = [{"prompt_lengths": torch.tensor([1, 3])}, {"prompt_mask": kept}]
    for option in options:
        wanted = gpt.generate(tokens[:, :4], temperature=0, **option)
        for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16):
            small = {
                name: value if value.dtype == torch.bool else value.to(dtype) for name, value in option.items()
            }
            assert torch.equal(gpt.generate(tokens[:, :4].to(dtype), temperature=0, **small), wanted)
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        close(gpt(tokens.to(dtype)), gpt(tokens), 0)
    close(gpt(tokens.to(torch.uint8)), gpt(tokens), 0)
    close(gpt.losses(tokens.to(torch.int32))["image"], gpt.losses(tokens)["image"], 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda gpt, tokens, order: gpt(tokens, order),
        lambda gpt, tokens, order: gpt.losses(tokens, order),
        lambda gpt, tokens, order: gpt.generate(tokens, order=order),
        lambda gpt, tokens, order: gpt.new_cache(2, order=order),
    ],
    ids=["forward", "losses", "generate", "new_cache"],
)
@pytest.mark.parametrize(
    ("order", "error", "match"),
    [
        (("text", "audio"), ValueError, "order entry must be one of 'text', 'image', got 'audio'"),
        (("text", "text"), ValueError, r"order must be without repetition, got \['text', 'text'\]"),
        ((), ValueError, "order must be at least one name of a segment, got none"),
        ("text", TypeError, "order must be a sequence of names of segments, got 'text'"),
    ],
)
def test_orders_that_are_none_are_refused(order: Any, error: type, match: str, call: Callable) -> None:
    """By all that take one."""
    with pytest.raises(error, match=match):
        call(build(), draw(BOTH, 2, 3), order)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mask": torch.ones(2, 3)}, TypeError, "^mask must be bool, got torch.float32"),
        (
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"mask must be of shape \(2, 3\) as the tokens, got shape \(2, 4\)",
        ),
        (
            {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")},
            ValueError,
            "mask must be on cpu as the tokens",
        ),
        (
            {"targets": torch.zeros(2, 2, dtype=torch.int64)},
            ValueError,
            r"targets must be of shape \(2, 3\) as the tokens, got shape \(2, 2\)",
        ),
        ({"targets": torch.zeros(2, 3)}, TypeError, "targets must be an integer tensor, got torch.float32"),
        (
            {"targets": torch.full((2, 3), 7)},
            ValueError,
            r"targets of 'text' must be in \[0, vocab_size=7\), got 7",
        ),
        (
            {"targets": torch.full((2, 3), -1)},
            ValueError,
            r"targets of 'text' must be in \[0, vocab_size=7\), got -1",
        ),
        ({"ignore_index": 0}, ValueError, "ignore_index must be an int <= -1, got 0"),
    ],
)
def test_losses_refuse(options: dict, error: type, match: str) -> None:
    """Masks and targets that do not fit the tokens, and a real token as the one to ignore."""
    with pytest.raises(error, match=match):
        build().losses(draw(BOTH, 2, 3), **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"name": ""}, ValueError, "name must be a str that is not empty, got ''"),
        ({"name": 3}, TypeError, "name must be a str, got 3"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be an int >= 1, got 0"),
        ({"shape": 5}, TypeError, "shape must be a sequence of ints, got 5"),
        ({"shape": "5"}, TypeError, "shape must be a sequence of ints, got '5'"),
        ({"shape": ()}, ValueError, r"shape must be \(length,\) or \(h, w\), got \(\)"),
        ({"shape": (1, 2, 3)}, ValueError, r"shape must be \(length,\) or \(h, w\), got \(1, 2, 3\)"),
        ({"shape": (0,)}, ValueError, "shape entry must be an int >= 1, got 0"),
        ({"positions": "rotary"}, ValueError, "positions must be one of 'learned', .*got 'rotary'"),
        (
            {"positions": "axial"},
            ValueError,
            r"positions must be one other than 'axial' for shape \(4,\), got 'axial'",
        ),
        ({"pad_token": 7}, ValueError, "pad_token must be an int >= 0 and <= 6, got 7"),
        ({"pad_token": -1}, ValueError, "pad_token must be an int >= 0 and <= 6, got -1"),
    ],
)
def test_segment_refuses(options: dict, error: type, match: str) -> None:
    """Options out of range, and rows and columns where there is no grid."""
    with pytest.raises(error, match=match):
        Segment(**{"name": "text", "vocab_size": 7, "shape": (4,), "positions": "learned", **options})


GRID = Segment("grid", 3, (2, 2), "sinusoidal")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"segments": ()}, ValueError, "segments must be at least one Segment, got none"),
        ({"segments": TEXT}, TypeError, "segments must be a sequence of Segment, got Segment"),
        ({"segments": (3,)}, TypeError, "segments entry must be a Segment, got 3"),
        (
            {"segments": (TEXT, TEXT)},
            ValueError,
            r"segments must be of distinct names, got \['text', 'text'\]",
        ),
        ({"width": 0}, ValueError, "width must be an int >= 1, got 0"),
        ({"depth": 0}, ValueError, "depth must be an int >= 1, got 0"),
        ({"num_heads": 3}, ValueError, "num_heads must be a divisor of width=16, got 3"),
        (
            {"segments": (GRID,), "width": 6},
            ValueError,
            "width must be a multiple of 4 for the sinusoids of 'grid', got 6",
        ),
        ({"mlp_ratio": -1}, ValueError, "mlp_ratio must be a finite number >= 0, got -1"),
        ({"mlp_ratio": 0.01}, ValueError, r"mlp_ratio must be at least 0\.0625, got 0\.01"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a finite number >= 0 and < 1, got 1\.0"),
        ({"tied_head": 1}, TypeError, "tied_head must be a bool, got 1"),
        ({"activation": "relu"}, ValueError, "activation must be one of 'gelu', 'gelu_tanh', got 'relu'"),
    ],
)
def test_config_refuses(options: dict, error: type, match: str) -> None:
    """Options out of range, and those that contradict each other."""
    with pytest.raises(error, match=match):
        small(**options)


def test_config_defaults_are_the_papers() -> None:
    """Width 256, depth 8, 8 heads."""
    config = GPTConfig((TEXT,))
    assert (config.width, config.depth, config.num_heads, config.mlp_ratio, config.dropout) == (256, 8, 8, 4, 0)
    assert config.tied_head


def test_config_goes_through_json() -> None:
    """And comes back equal, hashable, with what is not named at its default."""
    config = small(mlp_ratio=2.5, dropout=0.1, tied_head=False, activation="gelu_tanh", segments=[TEXT, IMAGE])
    again = GPTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert Segment("a", 2, [3, 4], "axial") == Segment("a", 2, (3, 4), "axial")
    assert GPTConfig.from_dict({"segments": config.to_dict()["segments"]}) == GPTConfig((TEXT, IMAGE))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda o: o.update(n_layer=3), ValueError, "config key must be one of segments, width, .*got 'n_layer'"),
        (
            lambda o: o["segments"][0].update(length=3),
            ValueError,
            "segment key must be one of name, .*got 'length'",
        ),
        (lambda o: o.update(segments=[3]), TypeError, "segments entry must be an object, got 3"),
        (lambda o: o.update(segments="text"), TypeError, "segments must be a sequence of objects, got 'text'"),
        (lambda o: o.pop("segments"), TypeError, "missing 1 required positional argument: 'segments'"),
    ],
)
def test_options_that_make_no_config_are_refused(change: Callable, error: type, match: str) -> None:
    """Keys that do not exist, in the config or in a segment, and values of another kind."""
    options = BOTH.to_dict()
    change(options)
    with pytest.raises(error, match=match):
        GPTConfig.from_dict(options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loaded_model_is_the_saved_one(tmp_path: Path, dtype: torch.dtype) -> None:
    """Same config, same logits to the bit, same dtypes, in evaluation mode; fixed sinusoids included."""
    gpt = build(small(segments=(TEXT, Segment("image", 5, (2, 3), "sinusoidal"))), torch.float32).to(dtype).train()
    gpt.save_pretrained(tmp_path / "new" / "model")
    state = torch.get_rng_state()
    again = GPT.from_pretrained(str(tmp_path / "new" / "model"))
    assert torch.equal(torch.get_rng_state(), state)
    assert not again.training
    assert again.config == gpt.config
    tokens = draw(gpt.config, 2, 11)
    assert again(tokens).dtype == dtype
    assert torch.equal(again(tokens), gpt.eval()(tokens))
    assert all(p.requires_grad for p in again.parameters())
    content = json.loads((tmp_path / "new" / "model" / "config.json").read_text())
    assert content == {"class_name": "GPT", "format_version": 1, "config": gpt.config.to_dict()}


@pytest.mark.parametrize(
    ("vocab_size", "match"),
    [
        (0, r"config\.json must hold a valid config, got: vocab_size must be an int"),
        (8, r"model\.safetensors must be saved together with the config\.json.*'segm"),
    ],
)
def test_weights_of_another_config_are_refused(tmp_path: Path, vocab_size: int, match: str) -> None:
    """And a config that is none."""
    GPT(BOTH).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    assert '"vocab_size": 7' in text
    path.write_text(text.replace('"vocab_size": 7', f'"vocab_size": {vocab_size}'))
    with pytest.raises(ValueError, match=match):
        GPT.from_pretrained(tmp_path)


def test_folders_that_hold_no_gpt_are_refused(tmp_path: Path) -> None:
    """By the class that they name."""
    tokenizer = AutoencoderConfig(base_channels=4, norm_groups=2, num_codes=4, code_dim=4)
    VQAutoencoder(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json class_name must be 'GPT', got 'VQAutoencoder'"):
        GPT.from_pretrained(tmp_path)
