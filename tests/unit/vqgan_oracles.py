"""The VQGAN of taming-transformers, written out as functions of its tensors, and fixtures in published layouts.

Shape letters: B batch, K codes, C code size.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
BASE = 32
TAPS = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64) / 16


class Shape(NamedTuple):
    """What a fixture is made of; 32 groups, as all of these have."""

    mult: tuple[int, ...] = (1, 2)
    decoder_mult: tuple[int, ...] | None = None
    attention: tuple[int, ...] = (1,)
    blocks: int = 1
    z: int = 6
    codes: tuple[int, int] = (12, 5)
    # Of the encoder of the paper's code.
    down: str = "strided_conv"
    replicate: bool = False
    down_replicates: bool = False


class _Fixture:
    """Random tensors under the names that taming-transformers gives them."""

    def __init__(self, shape: Shape) -> None:
        self.state: State = {}
        self.shape = shape
        self.inner = ".1" if shape.replicate else ""

    def conv(self, name: str, inputs: int, outputs: int, side: int) -> None:
        self.state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side) / (inputs * side**2) ** 0.5
        self.state[f"{name}.bias"] = torch.randn(outputs) / 10

    def norm(self, name: str, width: int) -> None:
        self.state[f"{name}.weight"] = 1 + torch.randn(width) / 5
        self.state[f"{name}.bias"] = torch.randn(width) / 5

    def block(self, name: str, inputs: int, outputs: int, inner: str) -> None:
        for number, width in ((1, inputs), (2, outputs)):
            self.norm(f"{name}.norm{number}", width)
            self.conv(f"{name}.conv{number}{inner}", width, outputs, 3)
        if inputs != outputs:
            self.conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(self, name: str, width: int) -> None:
        self.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", width, width, 1)

    def stage(self, name: str, level: int, inputs: int, width: int, blocks: int, inner: str) -> None:
        for index in range(blocks):
            self.block(f"{name}.{level}.block.{index}", inputs if index == 0 else width, width, inner)
            if level in self.shape.attention:
                self.attention(f"{name}.{level}.attn.{index}", width)

    def middle(self, half: str, width: int, inner: str) -> None:
        self.block(f"{half}.mid.block_1", width, width, inner)
        self.attention(f"{half}.mid.attn_1", width)
        self.block(f"{half}.mid.block_2", width, width, inner)

    def downsample(self, name: str, width: int) -> None:
        place = {"strided_conv": "conv", "convblurpool": "module.0"}.get(self.shape.down)
        if place:
            self.conv(f"{name}.{place}", width, width, 3)
        if "blur" in self.shape.down:
            self.state[f"{name}.module.1.filt"] = torch.outer(TAPS, TAPS).expand(width, 1, 5, 5).clone()

    def encoder(self) -> None:
        self.conv(f"encoder.conv_in{self.inner}", 3, BASE, 3)
        widths = [BASE, *(BASE * multiplier for multiplier in self.shape.mult)]
        for level, (inputs, width) in enumerate(pairwise(widths)):
            self.stage("encoder.down", level, inputs, width, self.shape.blocks, self.inner)
            if level < len(self.shape.mult) - 1:
                self.downsample(f"encoder.down.{level}.downsample", width)
        self.middle("encoder", widths[-1], self.inner)
        self.norm("encoder.norm_out", widths[-1])
        self.conv(f"encoder.conv_out{self.inner}", widths[-1], self.shape.z, 3)

    def decoder(self) -> None:
        widths = [BASE * multiplier for multiplier in self.shape.decoder_mult or self.shape.mult]
        self.conv("decoder.conv_in", self.shape.z, widths[-1], 3)
        self.middle("decoder", widths[-1], "")
        for level, inputs in reversed(list(enumerate([*widths[1:], widths[-1]]))):
            self.stage("decoder.up", level, inputs, widths[level], self.shape.blocks + 1, "")
            if level > 0:
                self.conv(f"decoder.up.{level}.upsample.conv", widths[level], widths[level], 3)
        self.norm("decoder.norm_out", widths[0])
        self.conv("decoder.conv_out", widths[0], 3, 3)


def tensors(shape: Shape) -> State:
    """Random tensors under the names that taming-transformers gives them, float64."""
    fixture = _Fixture(shape)
    fixture.encoder()
    fixture.conv("quant_conv", shape.z, shape.codes[1], 1)
    fixture.state["quantize.embedding.weight"] = torch.randn(shape.codes)
    fixture.conv("post_quant_conv", shape.codes[1], shape.z, 1)
    fixture.decoder()
    return {name: tensor.double() for name, tensor in fixture.state.items()}


def as_llamagen(state: State) -> State:
    """The same tensors under the names of LlamaGen, whose decoder counts from the coarsest level."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))

    def renamed(name: str) -> str:
        name = name.replace("encoder.down.", "encoder.conv_blocks.").replace(".block.", ".res.")
        name = re.sub(
            r"decoder\.up\.(\d+)", lambda found: f"decoder.conv_blocks.{levels - 1 - int(found[1])}", name
        )
        for theirs, own in (("mid.block_1", "mid.0"), ("mid.attn_1", "mid.1"), ("mid.block_2", "mid.2")):
            name = name.replace(theirs, own)
        return name

    return {renamed(name): tensor for name, tensor in state.items()}


class Result(NamedTuple):
    """What the original computes."""

    latents: Tensor
    indices: Tensor
    images: Tensor


def run(state: State, shape: Shape, images: Tensor, *, cosine: bool = False) -> Result:
    """Run the network of ``tensors``."""
    latents = encode(state, shape, images)
    rows, codes = latents.movedim(1, -1), state["quantize.embedding.weight"]
    if cosine:
        rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
    indices = (rows[..., None, :] - codes).square().sum(-1).argmin(-1)
    return Result(latents, indices, decode(state, codes[indices].movedim(-1, 1), len(shape.mult)))


def encode(state: State, shape: Shape, images: Tensor) -> Tensor:
    """Images to latents."""
    inner, replicate = ".1" if shape.replicate else "", shape.replicate
    hidden = _conv(state, f"encoder.conv_in{inner}", images, replicate=replicate)
    for level in range(len(shape.mult)):
        hidden = _stage(state, f"encoder.down.{level}", hidden, inner)
        if level < len(shape.mult) - 1:
            hidden = _down(state, f"encoder.down.{level}.downsample", hidden, shape)
    hidden = F.silu(_norm(state, "encoder.norm_out", _middle(state, "encoder", hidden, inner)))
    return _conv(state, "quant_conv", _conv(state, f"encoder.conv_out{inner}", hidden, replicate=replicate))


def decode(state: State, codes: Tensor, levels: int) -> Tensor:
    """Codes to images."""
    hidden = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", codes))
    hidden = _middle(state, "decoder", hidden, "")
    for level in reversed(range(levels)):
        hidden = _stage(state, f"decoder.up.{level}", hidden, "")
        if level > 0:
            larger = hidden.repeat_interleave(2, -1).repeat_interleave(2, -2)
            hidden = _conv(state, f"decoder.up.{level}.upsample.conv", larger)
    return _conv(state, "decoder.conv_out", F.silu(_norm(state, "decoder.norm_out", hidden)))


def _conv(state: State, name: str, hidden: Tensor, *, replicate: bool = False, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    margin = weight.shape[-1] // 2
    margins = (margin,) * 4 if stride == 1 else (0, 1, 0, 1)
    padded = F.pad(hidden, margins, mode="replicate" if replicate else "constant")
    return F.conv2d(padded, weight, state[f"{name}.bias"], stride)


def _norm(state: State, name: str, hidden: Tensor) -> Tensor:
    groups = hidden.unflatten(1, (32, -1))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
    hidden = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    return hidden * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def _block(state: State, name: str, hidden: Tensor, inner: str) -> Tensor:
    branch = hidden
    for number in (1, 2):
        branch = F.silu(_norm(state, f"{name}.norm{number}", branch))
        branch = _conv(state, f"{name}.conv{number}{inner}", branch, replicate=bool(inner))
    shortcut = f"{name}.nin_shortcut"
    return branch + (_conv(state, shortcut, hidden) if f"{shortcut}.weight" in state else hidden)


def _attention(state: State, name: str, hidden: Tensor) -> Tensor:
    normed = _norm(state, f"{name}.norm", hidden)
    queries, keys, values = (_conv(state, f"{name}.{part}", normed).flatten(2) for part in "qkv")
    weights = torch.einsum("bci,bcj->bij", queries, keys).div(queries.shape[1] ** 0.5).softmax(-1)
    mixed = torch.einsum("bij,bcj->bci", weights, values).view_as(hidden)
    return hidden + _conv(state, f"{name}.proj_out", mixed)


def _stage(state: State, name: str, hidden: Tensor, inner: str) -> Tensor:
    index = 0
    while f"{name}.block.{index}.norm1.weight" in state:
        hidden = _block(state, f"{name}.block.{index}", hidden, inner)
        if f"{name}.attn.{index}.norm.weight" in state:
            hidden = _attention(state, f"{name}.attn.{index}", hidden)
        index += 1
    return hidden


def _middle(state: State, half: str, hidden: Tensor, inner: str) -> Tensor:
    hidden = _block(state, f"{half}.mid.block_1", hidden, inner)
    hidden = _attention(state, f"{half}.mid.attn_1", hidden)
    return _block(state, f"{half}.mid.block_2", hidden, inner)


def _down(state: State, name: str, hidden: Tensor, shape: Shape) -> Tensor:
    if shape.down == "strided_conv":
        return _conv(state, f"{name}.conv", hidden, replicate=shape.down_replicates, stride=2)
    if shape.down == "maxpool":
        return F.max_pool2d(hidden, 2)
    if shape.down == "maxblurpool":
        hidden = F.max_pool2d(hidden, 2, stride=1)
    else:
        hidden = _conv(state, f"{name}.module.0", hidden, replicate=shape.down_replicates)
    kernel = torch.outer(TAPS, TAPS).expand(hidden.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(hidden, (2, 2, 2, 2), mode="replicate"), kernel, stride=2, groups=hidden.shape[1])
