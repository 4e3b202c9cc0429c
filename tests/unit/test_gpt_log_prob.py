"""Log-probabilities of given tokens and of those that are drawn.

Shape letters: B batch, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from te_quant.gpt import GPTConfig, Segment, guided_logits
from tests.unit.gpt_oracles import BOTH, IMAGE, TEXT, build, draw, logits_oracle

LENGTH = TEXT.length + IMAGE.length
ORDERS = [None, ("image", "text"), ("image",)]


@pytest.fixture
def compiler() -> Iterator[None]:
    """No graph of one test serves another; deprecations inside the compiler are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
        yield
    torch._dynamo.reset()


def chosen(logits: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens, by numpy."""
    logits = np.asarray(logits)
    own = np.take_along_axis(logits, tokens[..., None].numpy(), -1)[..., 0]
    return torch.from_numpy(own - np.log(np.exp(logits).sum(-1)))


@pytest.mark.parametrize("order", ORDERS)
def test_log_prob_is_that_of_a_slow_network(order: Any) -> None:
    """Of every length, the empty one included."""
    gpt = build()
    for length in (0, 3, 6, 12 if order == ("image",) else LENGTH):
        tokens = draw(BOTH, 2, length, order)
        got = gpt.log_prob(tokens, order)
        torch.testing.assert_close(got, chosen(logits_oracle(gpt, tokens, order), tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_are_means_of_log_prob(masked: bool) -> None:
    """With the same gradient; a mask takes the same tokens out of both."""
    gpt, tokens = build(), draw(BOTH, 3, LENGTH)
    mask = torch.rand(3, LENGTH) < 0.6 if masked else torch.ones(3, LENGTH, dtype=torch.bool)
    options = {"mask": mask} if masked else {}
    log_prob, losses = gpt.log_prob(tokens, **options), gpt.losses(tokens, **options)
    assert (log_prob[~mask] == 0).all()
    means = {
        name: -log_prob[:, columns].sum() / mask[:, columns].sum()
        for name, columns in (("text", slice(0, 5)), ("image", slice(5, None)))
    }
    for name, mean in means.items():
        torch.testing.assert_close(mean, losses[name])
    parameters = list(gpt.parameters())
    gradients = [
        torch.autograd.grad(sum(each.values()), parameters, allow_unused=True, materialize_grads=True)
        for each in (means, losses)
    ]
    torch.testing.assert_close(*gradients)


def test_probabilities_of_all_sequences_add_up_to_one() -> None:
    """In either order of the segments, whose joint distributions are not the same."""
    config = GPTConfig((Segment("a", 2, (2,), "learned"), Segment("b", 3, (1,), "learned")), width=8, num_heads=2)
    gpt = build(config)
    every = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3))
    forward = gpt.log_prob(every).sum(1)
    backward = gpt.log_prob(every[:, [2, 0, 1]], ("b", "a")).sum(1)
    assert abs(forward.exp().sum() - 1) < 1e-12
    assert abs(backward.exp().sum() - 1) < 1e-12
    assert (forward - backward).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_prob_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    """And close."""
    gpt, tokens = build(dtype=torch.float32, scale=0.1), draw(BOTH, 4, LENGTH)
    wanted = gpt.log_prob(tokens)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = gpt.log_prob(tokens)
    for got in (under_autocast, gpt.to(dtype).log_prob(tokens)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01)


def test_log_prob_of_a_network_with_nan_is_nan() -> None:
    """As its losses are; generation refuses it."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    with torch.no_grad():
        gpt.norm.bias[0] = math.nan
    assert gpt.log_prob(tokens).isnan().all()
    with pytest.raises(ValueError, match="logits must be finite"):
        gpt.generate(tokens[:, :5], return_log_prob=True)


def test_log_prob_refuses_what_forward_refuses() -> None:
    """Tokens outside their vocabulary, masks of another shape."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    with pytest.raises(ValueError, match=r"tokens of 'text' must be in \[0, vocab_size=7\)"):
        gpt.log_prob(tokens + 7)
    with pytest.raises(ValueError, match=r"mask must be of shape \(2, 17\) as the tokens"):
        gpt.log_prob(tokens, mask=torch.ones(2, 3, dtype=torch.bool))


def kept(logits: np.ndarray, temperature: float, keep: int, top_p: float) -> Tensor:
    """(..., V) log-probabilities of what is drawn from, one row of logits at a time."""
    result = np.full(logits.shape, -math.inf)
    for place in np.ndindex(logits.shape[:-1]):
        row = logits[place]
        best = sorted((i for i in range(len(row)) if np.isfinite(row[i])), key=lambda i: -row[i])[:keep]
        weights = [math.exp((row[i] - row[best[0]]) / temperature) for i in best]
        total, mass, nucleus = sum(weights), 0.0, 0
        while mass < top_p * total:
            mass += weights[nucleus]
            nucleus += 1
        for i, weight in zip(best[:nucleus], weights, strict=False):
            result[(*place, i)] = math.log(weight / mass)
    return torch.from_numpy(result)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["generators", "generator"])
@pytest.mark.parametrize(
    ("options", "temperature", "keep", "top_p", "scale"),
    [
        ({}, 1.0, 11, 1.0, 1.0),
        ({"temperature": 0.5, "top_k": 4}, 0.5, 4, 1.0, 1.0),
        ({"top_fraction": 0.6, "top_p": 0.8}, 1.0, 6, 0.8, 1.0),
        ({"guidance_scale": 2.0, "temperature": 2.0, "top_k": 6}, 2.0, 6, 1.0, 2.0),
    ],
    ids=["plain", "top-k", "top-p", "guided"],
)
def test_returned_log_prob_is_that_of_the_draw(
    options: dict[str, Any], temperature: float, keep: int, top_p: float, scale: float, own: bool, use_cache: bool
) -> None:
    """Of drawn tokens under what they were drawn from, by brute force; 0 for those that are given."""
    gpt, tokens = build(scale=0.15), draw(BOTH, 2, LENGTH)
    mask = torch.rand(2, LENGTH) < 0.3
    mask[:, : TEXT.length] = True
    mask[:, -1] = False

    def generate(**more: Any) -> Any:
        seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        generator = seeds if own else seeds[0]
        return gpt.generate(tokens, prompt_mask=mask, generator=generator, use_cache=use_cache, **options, **more)

    drawn, log_prob = generate(return_log_prob=True)
    assert torch.equal(generate(), drawn)
    assert log_prob.dtype == torch.float64
    assert (log_prob[mask] == 0).all()
    conditional = torch.from_numpy(logits_oracle(gpt, drawn))[:, TEXT.length :]
    unconditional = torch.from_numpy(logits_oracle(gpt, drawn[:, TEXT.length :], ("image",)))
    logits = guided_logits(conditional, unconditional, scale).numpy()
    wanted = kept(logits, temperature, keep, top_p).gather(-1, drawn[:, TEXT.length :, None])[..., 0]
    places = ~mask[:, TEXT.length :]
    torch.testing.assert_close(log_prob[:, TEXT.length :][places], wanted[places], rtol=0, atol=1e-9)
    if not options:
        torch.testing.assert_close(log_prob[~mask], gpt.log_prob(drawn)[~mask].detach())


def test_returned_log_prob_of_certain_tokens_is_zero() -> None:
    """Greedy, and after the end of a row; a row that goes on has its own."""
    gpt, image = build(scale=0.05), draw(BOTH, 64, IMAGE.length, ("image", "text"))
    options: dict[str, Any] = {"order": ("image", "text"), "return_log_prob": True}
    assert (gpt.generate(image, temperature=0, **options)[1] == 0).all()
    text, log_prob = (each[:, IMAGE.length :] for each in gpt.generate(image, stop_token=3, **options))
    ended = (text == 3).cumsum(1) - (text == 3).long() > 0
    assert ended.any()
    assert (log_prob[ended] == 0).all()
    assert (log_prob[~ended] < 0).all()


def test_returned_log_prob_is_a_tensor_like_any_other() -> None:
    """One may train with it; an empty batch has an empty one."""
    gpt, prompt = build(dtype=torch.float32), draw(BOTH, 2, TEXT.length)
    drawn, before = gpt.generate(prompt, return_log_prob=True)
    assert (before.dtype, before.is_inference(), before.requires_grad) == (torch.float32, False, False)
    ratio = (gpt.log_prob(drawn) - before)[:, TEXT.length :].exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio))
    ratio.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gpt.parameters())
    assert gpt.generate(prompt[:0], return_log_prob=True)[1].shape == (0, LENGTH)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.usefixtures("compiler")
def test_compiled_log_prob_and_its_gradient_equal_eager() -> None:
    """With a mask, as one graph."""
    gpt = build(GPTConfig((TEXT, IMAGE), width=16, depth=1, num_heads=2))
    compiled = torch.compile(gpt.log_prob, fullgraph=True, backend="aot_eager")
    tokens, mask = draw(BOTH, 3, LENGTH), torch.rand(3, LENGTH) < 0.7
    results = [compiled(tokens, mask=mask), gpt.log_prob(tokens, mask=mask)]
    torch.testing.assert_close(*results)
    parameters = list(gpt.parameters())
    gradients = [
        torch.autograd.grad(each.sum(), parameters, allow_unused=True, materialize_grads=True) for each in results
    ]
    torch.testing.assert_close(*gradients)
