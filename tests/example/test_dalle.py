"""The transformer of the paper's authors: what each token looks at, what is predicted, and what is generated.

Shape letters: B batch, T tokens, n all of them, h w token grid.
"""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from examples.te_vqgan.data.caption_tokens import CaptionTokenizer
from examples.te_vqgan.data.captions import Grammar
from examples.te_vqgan.stage2 import dalle
from examples.te_vqgan.stage2.attention_patterns import ATTENTION_KINDS, attention_pattern
from examples.te_vqgan.stage2.dalle import DalleConfig, DalleTransformer
from examples.te_vqgan.stage2.settings import stage2_settings_for
from examples.te_vqgan.stage2.trainer import gpt_config
from examples.te_vqgan.stage2.transformers import build_transformer, load_transformer
from te_quant import GPT, GPTConfig, Segment

ORDERS = (("text", "image"), ("image", "text"))
TEXT, GRID, CODES, PAD, START, STOP = 6, (4, 5), 7, 0, 2, 1
N = TEXT + GRID[0] * GRID[1]
SMALL = DalleConfig(
    vocab_size=9,
    text_length=TEXT,
    pad_token=PAD,
    start_token=START,
    num_codes=CODES,
    grid=GRID,
    width=16,
    depth=4,
    num_heads=2,
    head_width=12,
    kernel_size=3,
)


def _model(**changes: Any) -> DalleTransformer:
    """In float64, with scales of one, so that every block weighs."""
    model = DalleTransformer(dataclasses.replace(SMALL, **changes)).double().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.scale1.fill_(1.0)
            block.scale2.fill_(1.0)
    return model


def _tokens(order: tuple[str, str], batch: int = 2) -> Tensor:
    """Captions without padding, and images."""
    text = torch.randint(3, SMALL.vocab_size, (batch, TEXT))
    text[:, 0] = START
    parts = {"text": text, "image": torch.randint(CODES, (batch, GRID[0] * GRID[1]))}
    return torch.cat([parts[name] for name in order], 1)


def _changed(tokens: Tensor, order: tuple[str, str], column: int) -> Tensor:
    """The tokens with another one, of the same segment and no padding, in one column."""
    changed = tokens.clone()
    first_image = TEXT if order[0] == "text" else 0
    is_image = first_image <= column < first_image + GRID[0] * GRID[1]
    least, count = (0, CODES) if is_image else (3, SMALL.vocab_size - 3)
    changed[:, column] = least + (changed[:, column] - least + 1) % count
    return changed


def _seen(kind: str, order: tuple[str, str], query: int, key: int, text: int, grid: tuple[int, int]) -> bool:
    """Whether a column looks at another, told in words of the paper's sources, one pair at a time."""
    if key > query:
        return False
    first_image = text if order[0] == "text" else 0
    inside = [first_image <= column < first_image + grid[0] * grid[1] for column in (query, key)]
    if not all(inside) or kind == "full":
        return True
    (r1, c1), (r2, c2) = (divmod(column - first_image, grid[1]) for column in (query, key))
    if kind == "row":
        return r1 == r2
    if kind == "column":
        return c1 == c2
    assert kind == "convolution"
    return r1 - r2 in (-1, 0, 1) and c1 - c2 in (-1, 0, 1)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_patterns_are_those_of_their_definition(kind: str, order: tuple[str, str]) -> None:
    """Against a loop over all pairs, for several grids; no two kinds are the same on a large grid."""
    for text, grid in ((1, (1, 1)), (TEXT, GRID), (3, (5, 2))):
        found = attention_pattern(kind, order, text, grid, kernel_size=3)
        n = text + grid[0] * grid[1]
        expected = [[_seen(kind, order, query, key, text, grid) for key in range(n)] for query in range(n)]
        assert found.tolist() == expected
        assert found.diagonal().all()
    others = [attention_pattern(other, order, TEXT, GRID, kernel_size=3) for other in ATTENTION_KINDS]
    mine = attention_pattern(kind, order, TEXT, GRID, kernel_size=3)
    assert sum(torch.equal(mine, other) for other in others) == 1


def test_the_square_of_the_authors_has_five_tokens_a_side() -> None:
    """The token in the middle of a large grid sees two rows above and two tokens to the left: 12 and itself."""
    pattern = attention_pattern("convolution", ("image", "text"), 1, (9, 9))
    row, column = divmod(int(pattern[40].nonzero()[0]), 9)
    assert pattern[40].sum() == 2 * 5 + 2 + 1
    assert (row, column) == (2, 2)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_block_looks_where_its_pattern_says(
    kind: str, order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through one block, a changed token changes the predictions of the columns that look at it, and no other."""
    monkeypatch.setattr(dalle, "ATTENTION_KINDS", (kind,))
    model, tokens = _model(depth=1), _tokens(order, 1)
    before = model(tokens, order)
    for key in range(N - 1):
        # Logits number i come from the state of column i.
        after = model(_changed(tokens, order, key), order)
        moved = ((after - before).nan_to_num().abs().amax(-1)[0] > 1e-12).tolist()
        assert moved == [_seen(kind, order, query, key, TEXT, GRID) for query in range(N - 1)]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_no_prediction_depends_on_a_later_token(order: tuple[str, str]) -> None:
    """Through all blocks; the negative control: each token changes the prediction of the next one."""
    model, tokens = _model(), _tokens(order)
    before = model(tokens, order)
    assert before.shape == (2, N - 1, SMALL.vocab_size)
    for column in range(N - 1):
        after = model(_changed(tokens, order, column), order)
        assert torch.equal(after[:, :column], before[:, :column])
        assert not torch.equal(after[:, column], before[:, column])


def test_nothing_looks_at_padding() -> None:
    """Its vectors change no prediction but that after their own column; another word in its place changes more."""
    order = ("text", "image")
    model, tokens = _model(), _tokens(order)
    tokens[:, 3:TEXT] = PAD
    before = model(tokens, order)
    for column in range(3, TEXT):
        with torch.no_grad():
            model.padding.weight[column] += 1.0
        after = model(tokens, order)
        moved = (after - before).nan_to_num().abs().amax((0, 2)) > 0
        # The last column of the text predicts the first image token, the others predict padding.
        assert moved.nonzero().flatten().tolist() == [column]
        before = after
    word = tokens.clone()
    word[:, 3] = 5
    assert ((model(word, order) - before).nan_to_num().abs().amax((0, 2)) > 0)[TEXT:].all()


def test_padding_has_a_vector_for_each_position() -> None:
    """Two padded columns differ by more than their positions; a word does not."""
    model = _model()
    span = model._spans(("text", "image"), N)[0]

    def vectors(token: int) -> Tensor:
        embedded = model._embed(span, torch.full((1, TEXT), token), 0)[0]
        return embedded - model.text_positions.weight

    assert torch.allclose(vectors(PAD), model.padding.weight)
    assert torch.allclose(vectors(5), vectors(5)[:1].expand(TEXT, -1))


def test_image_positions_are_the_librarys_sinusoids() -> None:
    """Those of a GPT with the same grid and width."""
    config = GPTConfig((Segment("image", CODES, GRID, "sinusoidal"),), width=16, depth=1, num_heads=2)
    assert torch.equal(DalleTransformer(SMALL).positions, GPT(config).ends[0].positions)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_losses_are_cross_entropies_of_what_is_predicted(order: tuple[str, str]) -> None:
    """Against the logits in a loop; the first token and ignored ones do not count."""
    model, tokens = _model(), _tokens(order)
    targets = tokens.clone()
    targets[0, 2] = targets[1, N - 2] = -100
    found = model.losses(tokens, order, targets=targets)
    assert tuple(found) == order
    logits = model(tokens, order)
    lengths = {"text": TEXT, "image": GRID[0] * GRID[1]}
    begin = 0
    for name in order:
        costs = [
            (torch.logsumexp(logits[row, column - 1], 0) - logits[row, column - 1, targets[row, column]]).item()
            for row, column in product(range(2), range(max(begin, 1), begin + lengths[name]))
            if targets[row, column] >= 0
        ]
        assert found[name].item() == pytest.approx(sum(costs) / len(costs), rel=1e-5)
        begin += lengths[name]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_generation_continues_greedily_as_the_logits_say(order: tuple[str, str]) -> None:
    """With keys and values kept, each token is the likeliest by a pass over all before it; the start is set."""
    model = _model()
    lengths = {"text": TEXT, "image": GRID[0] * GRID[1]}
    prompt = _tokens(order)[:, : lengths[order[0]]]
    found = model.generate(prompt, order=order, temperature=0.0)
    assert found.shape == (2, N)
    assert torch.equal(found[:, : prompt.shape[1]], prompt)
    likeliest = model(found, order).argmax(-1)
    begin = prompt.shape[1]
    if order[1] == "text":
        assert (found[:, begin] == START).all()
        begin += 1
    assert torch.equal(found[:, begin:], likeliest[:, begin - 1 :])
    # The negative control: of other weights.
    assert not torch.equal(found[:, begin:], _model()(found, order).argmax(-1)[:, begin - 1 :])


def test_generation_ends_captions_and_pads_them() -> None:
    """After the stop token a row is padding, whatever the other rows do."""
    model = _model()
    with torch.no_grad():
        model.heads["text"].bias[STOP] += 1.0
    prompt = _tokens(("image", "text"), 64)[:, : N - TEXT]
    texts = model.generate(
        prompt, order=("image", "text"), generator=torch.Generator().manual_seed(0), stop_token=STOP
    )[:, N - TEXT :].tolist()
    ends = [row.index(STOP) for row in texts if STOP in row]
    assert len(set(ends)) > 1
    for row in texts:
        if STOP in row:
            assert set(row[row.index(STOP) + 1 :]) <= {PAD}


def test_chance_comes_from_the_generator_and_the_likeliest_are_kept() -> None:
    """Equal seeds draw equal tokens; the k likeliest are drawn, all of them and no other; one is greedy."""
    model, order = _model(), ("text", "image")
    prompt = _tokens(order, 1)[:, :TEXT].expand(400, -1)

    def draw(seed: int = 0, **options: Any) -> Tensor:
        return model.generate(prompt, order=order, generator=torch.Generator().manual_seed(seed), **options)

    state = torch.get_rng_state()
    assert torch.equal(draw(top_k=3), draw(top_k=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(top_k=3), draw(1, top_k=3))
    best = model(torch.cat([prompt[:1], torch.zeros(1, 1, dtype=torch.int64)], 1), order)[0, -1].topk(3).indices
    assert set(draw(top_k=3)[:, TEXT].tolist()) == set(best.tolist())
    assert torch.equal(draw(top_k=1), draw(temperature=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ("text",)}, r"order must be \('text', 'image'\) or \('image', 'text'\), got \('text',\)"),
        ({"order": "text"}, "order must be .*, got text"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1.0"),
        ({"top_k": 0}, "top_k must be an int >= 1, got 0"),
        ({"order": ("image", "text"), "empty": True}, "prompt must be at least one token where the image comes"),
    ],
)
def test_generation_refuses(options: dict[str, Any], message: str) -> None:
    """Each option by name."""
    given = {"order": ("text", "image"), **options}
    prompt = torch.zeros(1, 0 if given.pop("empty", False) else 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        _model().generate(prompt, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "width must be a multiple of 4, got 18"),
        ({"depth": 19}, "depth must be at most 18, got 19"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"pad_token": 9}, "pad_token must be below 9, got 9"),
        ({"start_token": 0}, "start_token must be another than pad_token, got 0"),
        ({"grid": (4,)}, r"grid must be \(h, w\), got \(4,\)"),
        ({"head_width": 0}, "head_width must be an int >= 1, got 0"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each option by name."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_the_papers_transformer_has_10_7_million_parameters() -> None:
    """Counted by hand. The authors' has 50 more logits, for padding, which is never a target: 10,728,832."""
    tokenizer = CaptionTokenizer(Grammar(tuple("0123456789"), "numerals"))
    config = gpt_config(stage2_settings_for("paper"), tokenizer, 256, (16, 16))
    with torch.device("meta"):
        model = build_transformer(config)
    assert isinstance(model, DalleTransformer)
    D, inner, hidden = 256, 8 * 64, 4 * 256
    attention = D * 3 * inner + (inner * D + D)
    gated = (D * 2 * hidden + 2 * hidden) + (hidden * D + D)
    blocks = 8 * (attention + gated + 2 * 2 * D + 2 * D)
    assert blocks == 10_518_528
    ends = (78 + 50 + 256) * D + 50 * D + 2 * D + (78 + 256) * (D + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == blocks + ends == 10_715_982
    assert blocks + ends + 50 * (D + 1) == 10_728_832
    assert (config.kernel_size, config.text_length, config.vocab_size) == (5, 50, 78)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit for bit, and in its dtype; the file says which class to load, and another class is refused."""
    model = DalleTransformer(SMALL).to(dtype)
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded = load_transformer(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(loaded, DalleTransformer)
    assert not loaded.training
    assert loaded.config == model.config
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    config = tmp_path / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "class_name": "Other"}))
    with pytest.raises(ValueError, match=r"class_name must be one of 'GPT', 'DalleTransformer', got 'Other'"):
        load_transformer(tmp_path)
    with pytest.raises(ValueError, match=r"class_name must be 'DalleTransformer', got 'Other'"):
        DalleTransformer.from_pretrained(tmp_path)


def test_the_librarys_gpt_is_loaded_by_the_same_function(tmp_path: Path) -> None:
    """What older runs left behind."""
    gpt = GPT(GPTConfig(SMALL.segments, width=16, depth=1, num_heads=2))
    gpt.save_pretrained(tmp_path)
    loaded = load_transformer(tmp_path)
    assert isinstance(loaded, GPT)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in gpt.state_dict().items())


def test_initial_scales_and_logits() -> None:
    """Blocks add little at first, and what is beyond a segment's vocabulary cannot be drawn."""
    model = DalleTransformer(SMALL)
    assert all((scale == 0.1).all() for block in model.blocks for scale in (block.scale1, block.scale2))
    logits = model(_tokens(("text", "image")), ("text", "image"))
    assert (logits[:, TEXT - 1 :, CODES:] == -math.inf).all()
    assert logits[:, : TEXT - 1].isfinite().all()


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_attention_that_trains_in_half_precision_is_the_fused_kernels(kind: str) -> None:
    """Outputs and gradients, against float64 on the same inputs; without the mask they are others."""
    visible = attention_pattern(kind, ORDERS[0], TEXT, GRID)
    exact = torch.randn(3, 2, 4, N, 12, dtype=torch.float64)
    goal = torch.randn(2, 4, N, 12, dtype=torch.float64)

    def distances(mask: Tensor) -> Tensor:
        """Of the output and of three gradients, by the largest entry of float64's."""
        rounded = exact.bfloat16().requires_grad_()
        reference = rounded.detach().double().requires_grad_()
        expected = functional.scaled_dot_product_attention(*reference, attn_mask=visible)
        found = dalle._attend_in_steps(*rounded, mask)
        assert found.dtype == torch.bfloat16
        wanted, given = (
            torch.autograd.grad((out * goal).sum(), leaf)[0].double()
            for out, leaf in ((expected, reference), (found, rounded))
        )
        pairs = [(expected, found), *zip(wanted, given, strict=True)]
        return torch.stack([(b.double() - a).abs().max() / a.abs().max() for a, b in pairs])

    assert (distances(visible) < 4 * torch.finfo(torch.bfloat16).eps).all()
    assert (distances(torch.ones_like(visible)) > 0.1).all()


def test_only_training_in_half_precision_leaves_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not generation, nor float32; and losses and gradients are those of float64 but for rounding."""
    order = ORDERS[0]
    model, tokens = _model(), _tokens(order)
    exact = torch.autograd.grad(sum(model.losses(tokens, order).values()), model.tokens["text"].weight)[0]
    calls: list[torch.dtype] = []
    stepwise = dalle._attend_in_steps

    def counted(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        calls.append(queries.dtype)
        return stepwise(queries, keys, values, visible)

    monkeypatch.setattr(dalle, "_attend_in_steps", counted)
    model.losses(tokens, order)
    model.float().losses(tokens, order)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(tokens[:1, :TEXT], order=order)
        assert not calls
        loss = sum(model.losses(tokens, order).values())
    assert calls == [torch.bfloat16] * SMALL.depth
    rounded = torch.autograd.grad(loss, model.tokens["text"].weight)[0].double()
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.long
@pytest.mark.no_cover
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
def test_a_compiler_changes_rounding_only() -> None:
    """The losses of both orders and their gradients, traced, and run by torch's own kernels."""
    torch._dynamo.reset()
    model = _model()
    compiled = torch.compile(model.losses, backend="aot_eager", fullgraph=True)
    for order in ORDERS:
        tokens = _tokens(order)
        found, expected = compiled(tokens, order), model.losses(tokens, order)
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-6)
        gradients = [torch.autograd.grad(sum(part.values()), model.norm.weight)[0] for part in (found, expected)]
        assert torch.allclose(*gradients, rtol=1e-4)
