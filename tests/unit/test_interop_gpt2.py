"""GPT-2 of transformers, loaded: logits and generated tokens are its own.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant import GPT
from te_quant.interop import load_gpt2
from tests.helpers import exactly

safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

V, START = 11, 3
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact-gelu": {"activation_function": "gelu"},
    "own-head": {"tie_word_embeddings": False},
    "narrow": {"n_inner": 10, "n_head": 1, "n_layer": 1},
    "other-name": {"activation_function": "gelu_pytorch_tanh", "n_positions": 40},
}


SIZES = {"vocab_size": V, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": START}


def theirs(**options: Any) -> nn.Module:
    """A small GPT-2 whose weights are far from zero, in evaluation mode."""
    # Imported where it is needed: importing it takes seconds, and only slow tests have to.
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(**{**SIZES, "eos_token_id": None, **options})
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def with_start(tokens: Tensor, start: int = START) -> Tensor:
    """What GPT-2 reads."""
    return torch.cat([torch.full((len(tokens), 1), start), tokens], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_its_own(name: str) -> None:
    """About every token, of sequences of every length."""
    model = theirs(**CASES[name])
    gpt = load_gpt2(model)
    tokens = torch.randint(V, (3, 7))
    for length in (1, 4, 7):
        wanted = model(with_start(tokens[:, :length])).logits[:, :-1]
        torch.testing.assert_close(gpt(tokens[:, :length]), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_other_activation_gives_other_logits() -> None:
    """Negative control: GELU and its approximation by tanh are told apart."""
    model = theirs()
    described = {**model.config.to_dict(), "activation_function": "gelu"}
    tokens = torch.randint(V, (3, 7))
    difference = load_gpt2(model)(tokens) - load_gpt2(model, config=described)(tokens)
    assert difference.abs().max() > 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_generated_tokens_are_its_own() -> None:
    """Greedily, with both caches, and the cached logits too."""
    model = theirs()
    gpt = load_gpt2(model)
    prompt = torch.randint(V, (5, 2))
    found = gpt.generate(prompt, temperature=0)
    mask = torch.ones(5, 3, dtype=torch.int64)
    wanted = model.generate(
        with_start(prompt), attention_mask=mask, do_sample=False, max_new_tokens=5, pad_token_id=0
    )
    assert torch.equal(found, wanted[:, 1:])
    cache = gpt.new_cache(5)
    gpt(found[:, :3], cache=cache)
    wanted = model(with_start(found[:, :4])).logits[:, 3]
    torch.testing.assert_close(gpt(found[:, 3:4], cache=cache)[:, 0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_losses_are_its_own() -> None:
    """The mean cross entropy of what follows the start."""
    model = theirs()
    tokens = torch.randint(V, (3, 7))
    wanted = model(with_start(tokens), labels=with_start(tokens)).loss
    found = load_gpt2(model, name="words").losses(tokens)["words"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_another_start() -> None:
    """Any token may stand in front; the wrong one gives other logits."""
    model = theirs()
    tokens = torch.randint(V, (3, 7))
    wanted = model(with_start(tokens, 5)).logits[:, :-1]
    torch.testing.assert_close(load_gpt2(model, start_token=5)(tokens), wanted, rtol=1e-5, atol=1e-5)
    assert (load_gpt2(model)(tokens) - wanted).abs().max() > 0.01


@pytest.mark.slow
@torch.no_grad()
def test_image_tokens_are_a_grid() -> None:
    """A shorter segment of two axes, read row by row."""
    model = theirs()
    gpt = load_gpt2(model, name="image", shape=(2, 3))
    (segment,) = gpt.config.segments
    assert (segment.name, segment.shape) == ("image", (2, 3))
    tokens = torch.randint(V, (3, 6))
    torch.testing.assert_close(gpt(tokens), model(with_start(tokens)).logits[:, :-1], rtol=1e-5, atol=1e-5)


# Sources


class Published(nn.Module):
    """Weights with the published names and shapes, and a config as a model of transformers has it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: {"model_type": "gpt2", **SIZES, **options})
        D = 16
        block = {
            "ln_1": (D,),
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "ln_2": (D,),
            "mlp.c_fc": (D, 4 * D),
            "mlp.c_proj": (4 * D, D),
        }
        shapes = {"wte.weight": (V, D), "wpe.weight": (8, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
        for layer in range(2):
            for part, shape in block.items():
                shapes |= {f"h.{layer}.{part}.weight": shape, f"h.{layer}.{part}.bias": shape[-1:]}
        self.tensors = {f"transformer.{name}": torch.randn(shape) for name, shape in shapes.items()}
        self.tensors["lm_head.weight"] = self.tensors["transformer.wte.weight"]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Those tensors."""
        return dict(self.tensors)


def formula(tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(B, T) tokens to (B, T, V) logits of GPT-2 with two heads, written from its paper."""
    named = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}

    def norm(x: Tensor, part: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], named[f"{part}.weight"], named[f"{part}.bias"], 1e-5)

    def linear(x: Tensor, part: str) -> Tensor:
        return x @ named[f"{part}.weight"] + named[f"{part}.bias"]

    B, T = tokens.shape
    hidden_places = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = named["wte.weight"][tokens] + named["wpe.weight"][:T]
    for layer in range(2):
        packed = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
        q, k, v = (part.view(B, T, 2, 8).transpose(1, 2) for part in packed.chunk(3, -1))
        scores = (q @ k.mT / 8**0.5).masked_fill(hidden_places, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, 16)
        x = x + linear(mixed, f"h.{layer}.attn.c_proj")
        wide = linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        wide = 0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
        x = x + linear(wide, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ named["wte.weight"].T


@torch.no_grad()
def test_published_weights_give_the_logits_of_the_formula() -> None:
    """In float64, without transformers; the start of another token gives others."""
    model = Published()
    model.tensors = {name: tensor.double() for name, tensor in model.tensors.items()}
    tokens = torch.randint(V, (3, 7))
    wanted = formula(model.tensors, with_start(tokens))[:, :-1]
    torch.testing.assert_close(load_gpt2(model)(tokens), wanted)
    other = load_gpt2(model, start_token=START + 1)(tokens)
    assert (other - wanted).abs().max() > 0.01


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What ``save_pretrained`` writes."""
    model = Published()
    state = {name: tensor.clone() for name, tensor in model.tensors.items()}
    safetensors_torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    return tmp_path


def same(one: GPT, other: GPT) -> bool:
    """Config and weights."""
    states = [gpt.state_dict() for gpt in (one, other)]
    return one.config == other.config and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def old_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published file of GPT-2: no prefix, no head, masks in each block."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if "lm_head" not in name}
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


@pytest.mark.parametrize("kind", ["folder", "file", "pickle", "old"])
def test_every_source_says_the_same(kind: str, folder: Path) -> None:
    """A folder, a file next to its config, a pickle, and a file of the first versions."""
    wanted = load_gpt2(folder)
    assert not wanted.training
    state = safetensors_torch.load_file(folder / "model.safetensors")
    if kind in ("pickle", "old"):
        torch.save(state if kind == "pickle" else old_layout(state), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert same(load_gpt2(folder / "model.safetensors" if kind == "file" else folder), wanted)


def test_loaded_models_are_on_one_device_under_any_default(folder: Path) -> None:
    """The CPU, because none is asked for; what a default device gets is on the meta device here."""
    load_gpt2(folder).save_pretrained(folder / "own")
    torch.set_default_device("meta")
    try:
        models = [load_gpt2(folder), GPT.from_pretrained(folder / "own")]
    finally:
        torch.set_default_device(None)
    for gpt in models:
        assert {tensor.device.type for tensor in (*gpt.state_dict().values(), *gpt.buffers())} == {"cpu"}
        assert gpt(torch.zeros(1, 7, dtype=torch.int64)).isfinite().all()


def test_wrappers_of_training_leave_no_prefix(folder: Path) -> None:
    """Nor does another prefix stay unnamed."""
    load_file, save_file = safetensors_torch.load_file, safetensors_torch.save_file
    expected, weights = load_gpt2(folder), folder / "model.safetensors"
    state = load_file(weights)
    save_file({f"module._orig_mod.{name}": tensor.clone() for name, tensor in state.items()}, weights)
    assert same(load_gpt2(folder), expected)
    save_file({f"decoder.{name}": tensor.clone() for name, tensor in state.items()}, weights)
    match = (
        r"source must be complete \(.* tensors\), got none named .*, but one with the prefix '.*'; "
        r"save the state dict \{name\["
    )
    with pytest.raises(ValueError, match=match):
        load_gpt2(folder)


@pytest.mark.slow
def test_what_transformers_saves_is_loaded(tmp_path: Path) -> None:
    """The folder, the model, and the model without its head say the same."""
    model = theirs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    wanted = load_gpt2(model)
    assert same(load_gpt2(tmp_path), wanted)
    assert same(load_gpt2(model.transformer), wanted)


def test_it_saves_and_loads_as_any_gpt(tmp_path: Path) -> None:
    """With its activation."""
    gpt = load_gpt2(Published())
    gpt.save_pretrained(tmp_path)
    assert same(GPT.from_pretrained(tmp_path), gpt)


def test_weights_are_a_copy_that_trains() -> None:
    """The model that was given stays as it was."""
    model = Published()
    before = model.tensors["transformer.wte.weight"].clone()
    gpt = load_gpt2(model, dropout=0.0).train()
    gpt.losses(torch.randint(V, (3, 7)))["text"].backward()
    assert all(parameter.grad is not None for parameter in gpt.parameters())
    with torch.no_grad():
        gpt.ends[0].tokens.zero_()
    assert torch.equal(model.tensors["transformer.wte.weight"], before)


def test_dropout_is_that_of_the_config() -> None:
    """If there is one."""
    assert load_gpt2(Published()).config.dropout == 0.1
    model = Published(attn_pdrop=0.0)
    with pytest.raises(
        ValueError, match=r"dropout must be given where the config has several, got \{'resid_pdrop'"
    ):
        load_gpt2(model)
    assert load_gpt2(model, dropout=0.2).config.dropout == 0.2


def test_dtypes_are_kept_or_converted() -> None:
    """As for every model that is loaded."""
    model = Published()
    model.tensors = {name: tensor.bfloat16() for name, tensor in model.tensors.items()}
    assert load_gpt2(model).start.dtype == torch.bfloat16
    assert load_gpt2(model, dtype=torch.float64).start.dtype == torch.float64


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "gpt_neo"}, "config model_type must be 'gpt2', got 'gpt_neo'."),
        ({"layer_norm_epsilon": 1e-6}, "config layer_norm_epsilon must be 1e-05, got 1e-06."),
        ({"scale_attn_weights": False}, "config scale_attn_weights must be True, got False."),
        ({"scale_attn_by_inverse_layer_idx": True}, "config scale_attn_by_inverse_layer_idx must be False, got True."),  # noqa: E501
        ({"add_cross_attention": True}, "config add_cross_attention must be False, got True."),
        ({"activation_function": "relu"}, "config activation_function must be 'gelu' or 'gelu_new' or 'gelu_pytorch_tanh' or 'gelu_fast', got 'relu'."),  # noqa: E501
        ({"bos_token_id": 50256}, "start_token must be given, a token in [0, 11), got None, and bos_token_id of the config is 50256."),  # noqa: E501
        ({"n_positions": 1}, "config n_positions must be an int >= 2, got 1."),
    ],
)  # fmt: skip
def test_configs_without_a_counterpart_are_refused(options: dict[str, Any], message: str) -> None:
    """By the name of the option."""
    with pytest.raises(ValueError, match=exactly(message)):
        load_gpt2(Published(**options))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start_token": 11}, ValueError, "start_token must be an int >= 0 and <= 10, got 11."),
        ({"shape": (2, 4)}, ValueError, "shape must be of at most n_positions - 1 = 7 tokens, got (2, 4)."),
        ({"dropout": 1.0}, ValueError, "dropout must be a finite number >= 0 and < 1, got 1.0."),
        ({"revision": "main"}, ValueError, "revision must be left out for a model, got 'main'."),
        ({"dtype": torch.int64}, ValueError, "dtype must be a floating-point torch.dtype, or None, got torch.int64."),  # noqa: E501
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Each in one sentence."""
    with pytest.raises(error, match=exactly(message)):
        load_gpt2(Published(), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer.h.1.ln_1.bias"), "source must be complete (28 tensors), got none named 'h.1.ln_1.bias'."),  # noqa: E501
        (lambda s: s.update({"score.weight": torch.zeros(2)}), "source must be of 28 tensors, got unexpected 'score.weight'."),  # noqa: E501
        (lambda s: s.update({"transformer.wpe.weight": torch.zeros(9, 16)}), "wpe.weight must be floating point of shape (8, 16), got torch.float32 of shape (9, 16)."),  # noqa: E501
        (lambda s: s.update({"lm_head.weight": torch.zeros(V, 16)}), "lm_head.weight must be equal to wte.weight with tie_word_embeddings, got another tensor."),  # noqa: E501
    ],
)  # fmt: skip
def test_other_tensors_are_refused_by_name(change: Any, message: str, folder: Path) -> None:
    """Missing, unexpected, of another shape, or untied."""
    state = safetensors_torch.load_file(folder / "model.safetensors")
    change(state)
    torch.save(state, folder / "changed.pt")
    with pytest.raises(ValueError, match=exactly(message)):
        load_gpt2(folder / "changed.pt")


def test_a_file_without_its_config_is_refused(folder: Path) -> None:
    """Nothing is guessed; the config may be given."""
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match=exactly("config must be given where no config.json lies beside, got None.")
    ):
        load_gpt2(folder)
    assert load_gpt2(folder, config=described).config.width == 16


def test_other_models_are_refused() -> None:
    """They have no config."""
    with pytest.raises(
        TypeError, match="source must be a GPT-2 of transformers, a folder, a file or a hub id, got"
    ):
        load_gpt2(nn.Linear(2, 2))
