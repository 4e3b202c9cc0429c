"""Cached generation, ordinary and compiled, against uncached, and Hugging Face's GPT-2 with our weights.

GPT-2 takes part twice: as ``generate`` is called by default, and with a static cache and a compiled forward pass,
the fastest way that transformers has for CPUs. (Compiling with ``max-autotune``, with frozen weights or with
``reduce-overhead``, which is for GPUs, was no faster in trials.) Everything is compiled before it is timed.

Without a cache every token costs a pass over all before it, minutes for the large batch. There the time of a
single step is measured after four prompts; it is a polynomial of their length, of degree two (products by length,
attention by its square), so that summing the cubic through the four over all lengths leaves out nothing but noise.
For the small batch the whole is measured as well, which shows how good that is.

Shape letters: B batch, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import OURS, Cell, Contender, Context, compete, optional_module
from te_quant import GPT, GPTConfig, Segment

__all__ = [
    "COMPILED",
    "HUGGING_FACE",
    "HUGGING_FACE_COMPILED",
    "Setting",
    "build_gpt",
    "build_hugging_face",
    "cells",
    "combined",
    "step_weights",
]

WHOLE = "uncached"
SUMMED = "uncached (summed)"
COMPILED = "te_quant compiled"
HUGGING_FACE = "transformers GPT-2"
HUGGING_FACE_COMPILED = "transformers GPT-2, static cache, compiled"

_TOLERANCE = 1e-3
_PROMPTS = 4
_FLOAT = 4


@dataclass(frozen=True)
class Setting:
    """A network and how much it generates.

    Args:
        batch: B.
        side: the image has side x side tokens.
        width: D.
        depth: blocks.
        num_heads: heads.
        vocab_size: V.
        top_k: logits kept.
        whole: also generate everything without a cache.
    """

    batch: int
    side: int = 16
    width: int = 256
    depth: int = 8
    num_heads: int = 8
    vocab_size: int = 256
    top_k: int = 25
    whole: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.side**2


_SETTINGS = {
    "quick": (Setting(2, side=4, width=32, depth=2, num_heads=2, whole=True),),
    "full": (Setting(1, whole=True), Setting(64)),
}


def build_gpt(setting: Setting) -> GPT:
    """Ours, for one segment of image tokens, with weights drawn from a fixed seed."""
    segment = Segment("image", setting.vocab_size, (setting.side, setting.side), "learned")
    config = GPTConfig((segment,), setting.width, setting.depth, setting.num_heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(config)
        with torch.no_grad():
            # Spread like a trained network's, so that comparing logits means something.
            for name, parameter in gpt.named_parameters():
                if parameter.ndim == 2 and name.startswith("blocks"):
                    parameter.mul_(4)
    return gpt.eval()


def build_hugging_face(gpt: GPT, setting: Setting) -> Any:
    """GPT-2 of the same size with the same weights; token V stands for the start.

    Raises:
        Unavailable: transformers is not installed.
    """
    library = optional_module("transformers", "transformers")
    V, T = setting.vocab_size, setting.tokens
    config = library.GPT2Config(
        vocab_size=V + 1,
        n_positions=T + 1,
        n_embd=setting.width,
        n_layer=setting.depth,
        n_head=setting.num_heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=V,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = library.GPT2LMHeadModel(config).eval()
    ours = dict(gpt.named_parameters())
    with torch.no_grad():
        body = model.transformer
        body.wte.weight.zero_()
        body.wte.weight[:V] = ours["ends.0.tokens"]
        body.wte.weight[V] = ours["start"][0]
        body.wpe.weight.zero_()
        body.wpe.weight[1:] = ours["ends.0.positions"]
        for number, block in enumerate(body.h):
            names = {"norm1": block.ln_1, "norm2": block.ln_2}
            linear = {"qkv": block.attn.c_attn, "out": block.attn.c_proj}
            linear |= {"up": block.mlp.c_fc, "down": block.mlp.c_proj}
            for name, layer in (names | linear).items():
                weight = ours[f"blocks.{number}.{name}.weight"]
                layer.weight.copy_(weight.T if name in linear else weight)
                layer.bias.copy_(ours[f"blocks.{number}.{name}.bias"])
        body.ln_f.weight.copy_(ours["norm.weight"])
        body.ln_f.bias.copy_(ours["norm.bias"])
    return model


def step_weights(lengths: tuple[int, ...], total: int) -> list[float]:
    """Weights of values at ``lengths`` whose sum is that of the polynomial through them over 0 ... total - 1."""
    columns = np.arange(total)
    weights = []
    for own in lengths:
        others = [other for other in lengths if other != own]
        basis = np.prod([(columns - other) / (own - other) for other in others], axis=0)
        weights.append(float(basis.sum()))
    return weights


def cells(context: Context) -> list[Cell]:
    """One a batch."""
    settings = _SETTINGS[context.grid]
    return [
        Cell(
            f"generation/B{setting.batch}-T{setting.tokens}-D{setting.width}",
            {"B": setting.batch, "T": setting.tokens, "D": setting.width, "depth": setting.depth},
            partial(_run, setting=setting),
        )
        for setting in settings
    ]


def _run(context: Context, setting: Setting) -> dict[str, Any]:
    gpt = build_gpt(setting).to(context.device)
    B, T = setting.batch, setting.tokens
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(setting.vocab_size, (B, T), generator=generator).to(context.device)
    lengths = tuple(round(index * (T - 1) / (_PROMPTS - 1)) for index in range(_PROMPTS))

    def ours(prompt: Tensor, new: int | None, use_cache: bool) -> Contender:
        def call(_: int) -> Tensor:
            return gpt.generate(prompt, max_new_tokens=new, top_k=setting.top_k, use_cache=use_cache)

        # Without a cache it is the same function, and a call takes long.
        return Contender(call, lambda: _wrong_shape(call(0), (B, T)) if use_cache else None)

    builders: dict[str, Callable[[], Contender]] = {
        OURS: lambda: ours(tokens[:, :0], None, True),
        COMPILED: lambda: _compiled(gpt, setting, tokens[:, :0]),
        HUGGING_FACE: lambda: _hugging_face(gpt, setting, tokens.device, compiled=False),
        HUGGING_FACE_COMPILED: lambda: _hugging_face(gpt, setting, tokens.device, compiled=True),
    }
    if setting.whole:
        builders[WHOLE] = lambda: ours(tokens[:, :0], None, False)
    steps = {f"step after {length}": length for length in lengths}
    builders |= {name: partial(ours, tokens[:, :length], 1, False) for name, length in steps.items()}
    limits = context.limits._replace(call=60.0, max_rounds=7, budget=2 * context.limits.budget)
    entries = compete(builders, context, limits)
    parts = [entries.pop(name) for name in steps]
    entries[SUMMED] = combined(parts, step_weights(lengths, T))
    return {"contenders": entries, "facts": _facts(gpt, setting)}


def combined(parts: list[dict[str, Any]], weights: list[float]) -> dict[str, Any]:
    """The entry of a whole from those of its parts; that of the first part without a time, if there is one."""
    for part in parts:
        if part["status"] != "ok":
            return part
    times = {
        key: sum(weight * part[key] for weight, part in zip(weights, parts, strict=True))
        for key in ("median", "low", "high")
    }
    return {"status": "ok", **times, "rounds": min(part["rounds"] for part in parts), "calls": 1}


def _compiled(gpt: GPT, setting: Setting, prompt: Tensor) -> Contender:
    def call(_: int) -> Tensor:
        return gpt.generate(prompt, top_k=setting.top_k, compiled=True)

    def check() -> str | None:
        drawn, found = gpt.generate(prompt, compiled=True, return_log_prob=True)
        with torch.no_grad():
            return _wrong_logits(found, gpt.log_prob(drawn)) or _wrong_shape(call(0), tuple(drawn.shape))

    return Contender(call, check)


def _hugging_face(gpt: GPT, setting: Setting, device: torch.device, *, compiled: bool) -> Contender:
    model = build_hugging_face(gpt, setting).to(device)
    start = torch.full((setting.batch, 1), setting.vocab_size, device=device)
    options: dict[str, Any] = {}
    if compiled:
        # As its documentation says. By itself, generate compiles for accelerators only.
        model.forward = torch.compile(model.forward, fullgraph=True)
        options["cache_implementation"] = "static"

    @torch.no_grad()
    def generate(**more: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=setting.tokens,
                do_sample=True,
                top_k=setting.top_k,
                use_cache=True,
                **options,
                **more,
            )

    @torch.no_grad()
    def check() -> str | None:
        # It may draw the token that stands for the start, which ours does not have.
        without = [setting.vocab_size]
        answer = generate(output_logits=True, return_dict_in_generate=True, suppress_tokens=without)
        logits = torch.stack(answer.logits, 1)[..., : setting.vocab_size]
        drawn = answer.sequences[:, 1:]
        shape = (setting.batch, setting.tokens)
        return _wrong_shape(drawn, shape) or _wrong_logits(logits, gpt(drawn))

    return Contender(lambda _: generate(), check)


def _wrong_logits(found: Tensor, expected: Tensor) -> str | None:
    error = float((found - expected).abs().max() / expected.abs().max())
    return None if error <= _TOLERANCE else f"its logits differ by up to {error:.1e} of the largest"


def _wrong_shape(result: Tensor, expected: tuple[int, ...]) -> str | None:
    shape = tuple(result.shape)
    return None if shape == expected else f"the result is {shape}, not {expected}"


def _facts(gpt: GPT, setting: Setting) -> dict[str, int]:
    """What the cached loop must read: all weights each step, and the keys and values of all tokens before."""
    weights = sum(parameter.numel() for parameter in gpt.parameters())
    products = sum(parameter.numel() for name, parameter in gpt.named_parameters() if name.startswith("blocks"))
    products += setting.vocab_size * setting.width
    T, D, depth, B = setting.tokens, setting.width, setting.depth, setting.batch
    pairs = T * (T + 1) // 2
    # Keys and values of each token before, D numbers a block each: read once, multiplied and added.
    cache = 2 * depth * B * D * pairs
    return {"bytes": _FLOAT * (T * weights + cache), "operations": 2 * (T * B * products + cache)}
