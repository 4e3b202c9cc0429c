"""GPT-2 of transformers.

Shape letters: V vocabulary, D width, L tokens of a sequence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_quant import _pretrained
from te_quant._checks import require, require_int, require_number
from te_quant.gpt import GPT, GPTConfig, Segment
from te_quant.interop._files import Source, options_of, weights_in, without_wrappers
from te_quant.interop._sources import require_names

__all__ = ["load_gpt2"]

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PREFIX = "transformer."
_WORDS, _PLACES, _HEAD = "wte.weight", "wpe.weight", "lm_head.weight"
# The defaults of GPT2Config, to which old config files leave what was not given.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "tie_word_embeddings": True,
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_FIXED: dict[str, Any] = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# Parts of a block: ours, theirs, and whether theirs is transposed.
_PARTS = {
    "norm1": ("ln_1", False),
    "qkv": ("attn.c_attn", True),
    "out": ("attn.c_proj", True),
    "norm2": ("ln_2", False),
    "up": ("mlp.c_fc", True),
    "down": ("mlp.c_proj", True),
}
# Causal masks, which old files hold for each block.
_MASKS = (".attn.bias", ".attn.masked_bias")


def load_gpt2(
    source: nn.Module | str | os.PathLike[str],
    *,
    start_token: int | None = None,
    name: str = "text",
    shape: tuple[int, ...] | None = None,
    dropout: float | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    filename: str | None = None,
    subfolder: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> GPT:
    """Return a GPT-2 of transformers as a GPT of this library, in evaluation mode.

    A GPT reads a start before the first token, GPT-2 reads only tokens. So one token of the vocabulary becomes the
    start, and the GPT has one segment, whose positions are those of GPT-2 from the second on:
    ``gpt(tokens)[:, i]`` are the logits of GPT-2 about ``tokens[:, i]`` after ``[start_token, *tokens[:, :i]]``.
    GPT-2 was trained with ``<|endoftext|>`` between its texts. transformers itself is not needed.

    Args:
        source: a ``GPT2LMHeadModel`` or ``GPT2Model``; a folder that ``save_pretrained`` wrote; a file with its
            weights; or a hub id ``owner/name``.
        start_token: the token that stands in front of every sequence; None takes ``bos_token_id`` of the config.
        name: of the segment.
        shape: of the segment, ``(length,)``, or ``(h, w)`` for a GPT-2 over image tokens; at most
            ``n_positions - 1`` tokens, which is what None takes.
        dropout: for training; None takes that of the config, if its three rates are equal.
        config: the options of the ``GPT2Config``, or the path of their JSON file; by default those of the model,
            or ``config.json`` next to the weights.
        filename: of the weights; by default ``model.safetensors``, else ``pytorch_model.bin``.
        subfolder: of the folder or repository.
        device: where to put the model; None is the CPU.
        dtype: floating-point type to convert it to; None keeps the saved ones.
        revision: branch, tag or commit, for a hub id only.
        token: of an account that may read the repository, for a hub id only.
        cache_dir: where downloads are kept, for a hub id only.
        local_files_only: use only what has been downloaded before.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: an option has no counterpart here (cross-attention, scaling by layer, another epsilon or
            activation), a tensor is missing, unexpected or of another shape, or an argument is out of range.
        TypeError: an argument has the wrong type.
        ImportError: safetensors or huggingface_hub is not installed (``te_quant[hub]``).

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners".

    Example:
        >>> gpt = load_gpt2("openai-community/gpt2")  # doctest: +SKIP
        >>> prompt = torch.tensor([tokenizer.encode("The cat")])  # doctest: +SKIP
        >>> gpt.generate(prompt, max_new_tokens=20, stop_token=50256)  # doctest: +SKIP
    """
    hub = _pretrained.Hub(revision, token, cache_dir, local_files_only)
    if isinstance(source, nn.Module):
        where: dict[str, Any] = {"filename": filename, "subfolder": subfolder, **hub._asdict()}
        for option, value in where.items():
            require(not value, option, "left out for a model", repr(value))
        options = _options_of_model(source) if config is None else options_of(config)
        tensors = {key: tensor.cpu() for key, tensor in without_wrappers(source.state_dict()).items()}
    else:
        files = Source(source, filename, subfolder, hub)
        path = files.weights(_WEIGHTS)
        described = files.beside(path, _CONFIG) if config is None else config
        if described is None:
            raise ValueError(f"config must be given where no {_CONFIG} lies beside, got None.")
        options = options_of(described)
        tensors = weights_in(path)
    if dtype is not None:
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        require(floating, "dtype", "a floating-point torch.dtype, or None", repr(dtype))
    options = _checked(options)
    own = _own_config(options, name, shape, dropout)
    if start_token is None:
        start_token, vocabulary = options["bos_token_id"], options["vocab_size"]
        known = isinstance(start_token, int) and 0 <= start_token < vocabulary
        expected = f"given, a token in [0, {vocabulary})"
        require(known, "start_token", expected, f"None, and bos_token_id of the config is {start_token}")
    start_token = require_int("start_token", start_token, 0, options["vocab_size"] - 1)
    # The weights are replaced at once, so drawing them must not move the caller's random state. What is not in the
    # file must be where the weights are, not on the default device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        gpt = GPT(own)
    # assign, not copy: half precision comes back as it was.
    weights = _own_weights(tensors, gpt.state_dict(), options["n_positions"], start_token)
    gpt.load_state_dict(weights, assign=True)
    return gpt.to(device=device, dtype=dtype).eval()


def _options_of_model(model: nn.Module) -> dict[str, Any]:
    describe = getattr(getattr(model, "config", None), "to_dict", None)
    if describe is None:
        raise TypeError(
            f"source must be a GPT-2 of transformers, a folder, a file or a hub id, got {type(model)}."
        )
    return dict(describe())


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a GPT2Config with their defaults; refuse what changes what the network computes."""
    for name, fixed in _FIXED.items():
        value = options.get(name, fixed)
        require(value == fixed, f"config {name}", repr(fixed), repr(value))
    known = {name: options.get(name, default) for name, default in _DEFAULTS.items()}
    function = known["activation_function"]
    expected = " or ".join(repr(each) for each in _ACTIVATIONS)
    require(function in _ACTIVATIONS, "config activation_function", expected, repr(function))
    for name in ("vocab_size", "n_embd", "n_layer", "n_head"):
        require_int(f"config {name}", known[name], 1)
    require_int("config n_positions", known["n_positions"], 2)
    return known


def _own_config(
    options: Mapping[str, Any], name: str, shape: tuple[int, ...] | None, dropout: float | None
) -> GPTConfig:
    longest = options["n_positions"] - 1
    segment = Segment(name, options["vocab_size"], (longest,) if shape is None else shape, "learned")
    expected = f"of at most n_positions - 1 = {longest} tokens"
    require(segment.length <= longest, "shape", expected, f"{segment.shape}")
    if dropout is None:
        rates = {rate: options[rate] for rate in _DROPOUTS}
        dropout = rates[_DROPOUTS[0]]
        require(len(set(rates.values())) == 1, "dropout", "given where the config has several", rates)
    width, hidden = options["n_embd"], options["n_inner"]
    return GPTConfig(
        (segment,),
        width=width,
        depth=options["n_layer"],
        num_heads=options["n_head"],
        mlp_ratio=4 if hidden is None else require_int("config n_inner", hidden, 1) / width,
        dropout=require_number("dropout", dropout, 0, below=1),
        tied_head=bool(options["tie_word_embeddings"]),
        activation=_ACTIVATIONS[options["activation_function"]],  # type: ignore[arg-type]
    )


def _own_weights(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_positions: int, start_token: int
) -> dict[str, Tensor]:
    """The tensors of a GPT with the names and shapes of ``expected``; refuse those that are not theirs."""
    names = _names_of(expected)
    shapes = {}
    for own, (theirs, transposed) in names.items():
        shape = tuple(expected[own].shape)
        shapes[theirs] = shape[::-1] if transposed else shape
    shapes[_PLACES] = (num_positions, expected["start"].shape[1])
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_MASKS)}
    if _HEAD not in shapes and _HEAD in state:
        # A copy: files of tied heads may hold both.
        same = torch.equal(state.pop(_HEAD), state.get(_WORDS, torch.empty(0)))
        require(same, _HEAD, f"equal to {_WORDS} with tie_word_embeddings", "another tensor")
    require_names("source", state, shapes)
    for name, shape in shapes.items():
        found = tuple(state[name].shape)
        fits = found == shape and state[name].is_floating_point()
        require(fits, name, f"floating point of shape {shape}", f"{state[name].dtype} of shape {found}")
    own_weights = {
        own: (state[theirs].T if transposed else state[theirs]) for own, (theirs, transposed) in names.items()
    }
    places = state[_PLACES]
    own_weights["start"] = (state[_WORDS][start_token] + places[0]).unsqueeze(0)
    own_weights["ends.0.positions"] = places[1 : 1 + len(expected["ends.0.positions"])]
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in own_weights.items()
    }


def _names_of(expected: Mapping[str, Tensor]) -> dict[str, tuple[str, bool]]:
    """Our names, theirs, and whether theirs is transposed; positions and the start are left out."""
    outside = {
        "ends.0.tokens": _WORDS,
        "ends.0.head": _HEAD,
        "norm.weight": "ln_f.weight",
        "norm.bias": "ln_f.bias",
    }
    names = {own: (theirs, False) for own, theirs in outside.items() if own in expected}
    for own in expected:
        if own.startswith("blocks."):
            _, layer, part, kind = own.split(".")
            theirs, transposed = _PARTS[part]
            names[own] = (f"h.{layer}.{theirs}.{kind}", transposed and kind == "weight")
    return names
