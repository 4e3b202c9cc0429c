"""Classifier-free guidance: against its formula over two passes of a slow network, and what it refuses.

Shape letters: B batch, V vocabulary.
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

from te_quant.gpt import GPT, GPTConfig, Segment, guided_logits
from te_quant.gpt import sampling as _sampling
from tests.unit.gpt_oracles import BOTH, IMAGE, TEXT, build, draw, logits_oracle

LENGTH = TEXT.length + IMAGE.length
STYLE = Segment("style", 5, (2,), "learned")
THREE = GPTConfig((TEXT, STYLE, IMAGE), width=16, depth=1, num_heads=2)
INF, NAN = math.inf, math.nan


@pytest.fixture
def compiler() -> Iterator[None]:
    """No graph of one test serves another; deprecations inside the compiler are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
        yield
    torch._dynamo.reset()


def guided_oracle(gpt: GPT, tokens: Tensor, order: Any, kept: Any, scale: float) -> np.ndarray:
    """Guided logits about the segments of ``kept``, which end ``order``; numpy, two whole passes."""
    conditional = logits_oracle(gpt, tokens, order)
    columns = sum(math.prod(s.shape) for s in gpt.config.segments if s.name in kept)
    unconditional = logits_oracle(gpt, tokens[:, -columns:], kept)
    with np.errstate(invalid="ignore"):
        return unconditional + scale * (conditional[:, -columns:] - unconditional)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("order", [("text", "image"), ("image", "text")])
def test_guided_tokens_follow_the_formula(order: Any, scale: float, use_cache: bool) -> None:
    """Greedy: each is the argmax of the formula over the result; the first segment is the condition."""
    gpt = build()
    condition = TEXT.length if order[0] == "text" else IMAGE.length
    prompt = draw(BOTH, 2, condition, order)
    got = gpt.generate(prompt, order=order, temperature=0, guidance_scale=scale, use_cache=use_cache)
    wanted = np.nanargmax(guided_oracle(gpt, got, order, order[1:], scale), -1)
    assert torch.equal(got[:, :condition], prompt)
    assert got[:, condition:].tolist() == wanted.tolist()


def test_guidance_changes_what_is_drawn() -> None:
    """The negative control: greedy tokens of many rows differ between no condition, no guidance and guidance."""
    gpt, prompt = build(), draw(BOTH, 64, TEXT.length)
    drawn = [gpt.generate(prompt, temperature=0, guidance_scale=scale) for scale in (0.0, 1.0, 3.0)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(drawn[one], drawn[other])


def test_guidance_with_given_tokens() -> None:
    """Both passes read them, and where a part of the image is given the caption is still the condition."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    mask = torch.rand(2, LENGTH) < 0.5
    mask[:, : TEXT.length + 2] = True
    mask[0, -1] = mask[1, -2] = False
    got = gpt.generate(tokens, prompt_mask=mask, temperature=0, guidance_scale=3.0)
    wanted = torch.from_numpy(np.nanargmax(guided_oracle(gpt, got, None, ("image",), 3.0), -1))
    assert torch.equal(got[mask], tokens[mask])
    drawn = ~mask[:, TEXT.length :]
    assert torch.equal(got[:, TEXT.length :][drawn], wanted[drawn])


@pytest.mark.parametrize(("prompted", "kept"), [(5, ("style", "image")), (7, ("image",)), (9, ("image",))])
def test_condition_is_all_segments_before_that_of_the_first_token_drawn(prompted: int, kept: Any) -> None:
    """Of three segments one or two, also where a part of the last is given."""
    gpt = build(THREE)
    got = gpt.generate(draw(THREE, 2, prompted), temperature=0, guidance_scale=3.0)
    wanted = np.nanargmax(guided_oracle(gpt, got, None, kept, 3.0), -1)
    new = got.shape[1] - prompted
    assert got[:, -new:].tolist() == wanted[:, -new:].tolist()


def test_scale_one_is_no_guidance() -> None:
    """The same bits, no second pass, with or without a condition."""
    gpt, prompt = build(scale=0.1), draw(BOTH, 3, TEXT.length)
    read: list[int] = []
    gpt.blocks[0].register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[1]))

    def generate(**options: Any) -> Tensor:
        read.clear()
        return gpt.generate(prompt, generator=torch.Generator().manual_seed(0), **options)

    plain = generate()
    alone = list(read)
    assert torch.equal(generate(guidance_scale=1), plain)
    assert read == alone
    gpt.generate(prompt[:, :2], guidance_scale=1.0)
    generate(guidance_scale=2.0)
    # The second pass reads the start and eleven tokens, and no caption.
    assert sorted(read) == sorted([*alone, *[1] * IMAGE.length])


@pytest.mark.slow
def test_guidance_makes_images_follow_their_captions() -> None:
    """Trained with the order without captions in one step of four; images are right in 60 % of the data."""
    torch.manual_seed(0)
    text, image = Segment("text", 4, (1,), "learned"), Segment("image", 4, (2, 2), "axial")
    gpt = GPT(GPTConfig((text, image), width=32, depth=1, num_heads=2))
    optimizer = torch.optim.Adam(gpt.parameters(), 3e-3)
    for step in range(300):
        captions = torch.randint(4, (64, 1))
        noise = torch.randint(4, (64, 4))
        images = torch.where(torch.rand(64, 4) < 0.6, captions, noise)
        if step % 4 == 0:
            loss = gpt.losses(images, order=("image",))["image"]
        else:
            loss = gpt.losses(torch.cat([captions, images], 1))["image"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    captions = torch.arange(4).repeat(250)[:, None]
    right = [
        float((gpt.eval().generate(captions, guidance_scale=scale)[:, 1:] == captions).double().mean())
        for scale in (0.0, 1.0, 3.0)
    ]
    assert abs(right[0] - 0.25) < 0.1
    assert abs(right[1] - 0.7) < 0.06
    # Not to certainty: the tokens before tell the caption to the unconditional pass as well.
    assert right[2] > right[1] + 0.1


@pytest.mark.parametrize(
    ("conditional", "unconditional", "scale", "wanted"),
    [
        (-INF, -INF, 3.0, -INF),
        (-INF, -INF, 1.0, -INF),
        (-INF, 2.0, 3.0, -INF),
        (-INF, 2.0, 0.0, -INF),
        (2.0, -INF, 3.0, -INF),
        (2.0, -INF, 0.5, -INF),
        (NAN, 1.0, 3.0, NAN),
        (1.0, NAN, 3.0, NAN),
        (NAN, -INF, 3.0, NAN),
        (-INF, NAN, 3.0, NAN),
        (1.0, NAN, 1.0, NAN),
        (INF, 1.0, 3.0, NAN),
        (1.0, INF, 3.0, NAN),
        (INF, INF, 3.0, NAN),
        (INF, -INF, 3.0, NAN),
        (-INF, INF, 0.5, NAN),
        (1.0, 3.0, 0.0, 3.0),
        (1.0, 3.0, 1.0, 1.0),
        (1.0, 3.0, 2.0, -1.0),
        (0.5, 0.25, 0.5, 0.375),
    ],
)
def test_infinite_logits_and_nan(conditional: float, unconditional: float, scale: float, wanted: float) -> None:
    """-inf in either rules a token out; what no network should say stays visible as NaN."""
    got = guided_logits(torch.tensor([conditional]), torch.tensor([unconditional]), scale)
    assert torch.equal(got.nan_to_num(99.0, 98.0, 97.0), torch.tensor([wanted]).nan_to_num(99.0, 98.0, 97.0))


@pytest.mark.slow
def test_the_plain_formula_is_nan_beyond_a_vocabulary() -> None:
    """The negative control, on the logits of the network; ours are finite where those are."""
    gpt, tokens = build(), draw(BOTH, 2, LENGTH)
    captions = gpt.generate(torch.cat([tokens[:, TEXT.length :]], 1), order=("image", "text"))
    conditional = gpt(captions, ("image", "text"))[:, IMAGE.length :]
    unconditional = gpt(captions[:, IMAGE.length :], ("text",))
    plain = unconditional + 3 * (conditional - unconditional)
    assert plain[..., TEXT.vocab_size :].isnan().all()
    guided = guided_logits(conditional, unconditional, 3.0)
    assert (guided[..., TEXT.vocab_size :] == -INF).all()
    torch.testing.assert_close(guided[..., : TEXT.vocab_size], plain[..., : TEXT.vocab_size])


def test_scales_zero_and_one_return_the_logits() -> None:
    """Bit for bit, where adding and subtracting would round."""
    a, b = 100 * torch.randn(2, 3, 50)
    assert torch.equal(guided_logits(a, b, 1), a)
    assert torch.equal(guided_logits(a, b, 0), b)
    assert not torch.equal(b + 1 * (a - b), a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_guided_logits_of_every_dtype_have_gradients(dtype: torch.dtype) -> None:
    """Half precision is computed in float32, and the gradient is the scale, zero where a token is ruled out."""
    a, b = (torch.randn(2, 5).to(dtype) for _ in range(2))
    a[:, 3:], b[:, 4:] = -INF, -INF
    a.requires_grad_()
    b.requires_grad_()
    guided = guided_logits(a, b, 3.0)
    assert guided.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    guided[:, :3].square().sum().backward()
    for leaf, factor in ((a, 3.0), (b, -2.0)):
        wanted = torch.zeros(2, 5, dtype=guided.dtype)
        wanted[:, :3] = 2 * factor * guided.detach()[:, :3]
        torch.testing.assert_close(leaf.grad, wanted.to(dtype))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.zeros(2, 3), torch.zeros(3), 2.0), ValueError, r"unconditional must be of shape \(2, 3\) as cond"),
        (
            (torch.zeros(2), torch.zeros(2).double(), 2.0),
            ValueError,
            "unconditional must be of dtype torch.float32 as conditional, got torch.float64",
        ),
        (
            (torch.zeros(2).long(), torch.zeros(2), 2.0),
            TypeError,
            "conditional must be floating point, got torch.int",
        ),
        ((torch.zeros(2), [0.0, 0.0], 2.0), TypeError, "unconditional must be a tensor, got list"),
        ((torch.zeros(2), torch.zeros(2), NAN), ValueError, "scale must be a finite number >= 0, got nan"),
        ((torch.zeros(2), torch.zeros(2), -1), ValueError, "scale must be a finite number >= 0, got -1"),
        ((torch.zeros(2), torch.zeros(2), "3"), TypeError, "scale must be a finite number >= 0, got '3'"),
    ],
    ids=["shape", "dtype", "integers", "list", "nan", "negative", "text"],
)
def test_logits_that_do_not_fit_are_refused(arguments: Any, error: type, match: str) -> None:
    """Other shapes or dtypes, and scales that are none."""
    with pytest.raises(error, match=match):
        guided_logits(*arguments)


@pytest.mark.parametrize(
    ("P", "options", "error", "match"),
    [
        (5, {"guidance_scale": INF}, ValueError, "guidance_scale must be a finite number >= 0, got inf"),
        (5, {"guidance_scale": -0.5}, ValueError, r"guidance_scale must be a finite number >= 0, got -0\.5"),
        (5, {"guidance_scale": "3"}, TypeError, "guidance_scale must be a finite number >= 0, got '3'"),
        (
            3,
            {"guidance_scale": 2.0},
            ValueError,
            f"prompt must be at least the {TEXT.length} tokens of 'text', the condition of guidance_scale=2, "
            "got 3; generate 'text' with guidance_scale=1 first",
        ),
        (
            3,
            {"guidance_scale": 2.0, "order": ("text",)},
            ValueError,
            r"order must be one of at least two segments with guidance_scale=2, .*\('text',\); pass ",
        ),
        (
            5,
            {"guidance_scale": 2.0, "prompt_lengths": torch.tensor([5, 4])},
            ValueError,
            r"prompt must be complete up to the same segment .*go on in \['image', 'text'\]; generate them in sep",
        ),
    ],
    ids=lambda value: "" if isinstance(value, (dict, type)) else str(value)[:30],
)
def test_guidance_that_does_not_fit_is_refused(P: int, options: Any, error: type, match: str) -> None:
    """Scales that are none, and no condition to leave out."""
    with pytest.raises(error, match=match):
        build().generate(draw(BOTH, 2, P), **options)


@pytest.mark.parametrize("accelerator", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("which", [0, 1], ids=["conditional", "unconditional"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_nan_and_infinity_in_either_pass_are_an_error(
    use_cache: bool, which: int, value: float, accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although +inf without the condition would guide to -inf, which looks like a token ruled out."""
    monkeypatch.setattr(_sampling, "_looks_at_once", lambda _: not accelerator)
    gpt, calls = build(), iter(range(1_000))
    head = gpt.ends[1].logits

    def logits(states: Tensor) -> Tensor:
        result = head(states).clone()
        # The two passes take turns; from the third token on one of them is wrong.
        call = next(calls)
        if call >= 4 and call % 2 == which:
            result[1, 3] = value
        return result

    gpt.ends[1].logits = logits
    with pytest.raises(ValueError, match=r"logits must be finite.*about token 7 of row 1"):
        gpt.generate(draw(BOTH, 2, TEXT.length), guidance_scale=3.0, use_cache=use_cache)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.usefixtures("compiler")
def test_compiled_guided_logits_equal_eager() -> None:
    """One graph, whatever the scale; infinities and NaN included."""
    compiled = torch.compile(guided_logits, fullgraph=True, dynamic=True)
    a, b = torch.randn(2, 4, 9)
    a[:, 7:], b[:, 7:] = -INF, -INF
    a[0, 0], b[1, 1] = NAN, INF
    for scale in (2.0, 3.0, 0.5):
        torch.testing.assert_close(compiled(a, b, scale), guided_logits(a, b, scale), equal_nan=True)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_generate_the_same_and_refuse_nan() -> None:
    """Guidance, given tokens and one generator per row, over blocks that are compiled."""
    gpt, compiled, tokens = build(), build(), draw(BOTH, 2, LENGTH)
    compiled.load_state_dict(gpt.state_dict())
    for block in compiled.blocks:
        block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    mask = torch.rand(2, LENGTH) < 0.5
    mask[:, : TEXT.length] = True
    mask[:, -1] = False

    def generate(model: GPT) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return model.generate(tokens, prompt_mask=mask, guidance_scale=2.0, generator=generators, top_k=5)

    assert torch.equal(generate(compiled), generate(gpt))
    with torch.no_grad():
        compiled.blocks[1].up.weight[0, 0] = NAN
    with pytest.raises(ValueError, match="logits must be finite"):
        generate(compiled)
