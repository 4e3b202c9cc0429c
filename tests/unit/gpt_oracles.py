"""GPTs of random weights, and a slow float64 version of the network, one row and one head at a time.

Shape letters: B batch, T tokens, V vocabulary, D width, H heads, n places of the stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from te_quant.gpt import GPT, GPTConfig, Segment
from tests.unit.grid_oracles import fresh

TEXT = Segment("text", 7, (5,), "learned", pad_token=2)
IMAGE = Segment("image", 11, (3, 4), "axial")
BOTH = GPTConfig((TEXT, IMAGE), width=16, depth=2, num_heads=2)
"""Small, with two segments of unlike vocabularies, padding and a grid that is not square."""


def build(config: GPTConfig = BOTH, dtype: torch.dtype = torch.float64, scale: float = 0.3) -> GPT:
    """A network in evaluation mode whose weights are large enough for every one to show in the logits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        gpt = GPT(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            is_gain = ".norm" in f".{name}" and name.endswith("weight")
            parameter.copy_(scale * fresh(*parameter.shape) + float(is_gain))
    return gpt.eval()


def spans(config: GPTConfig, order: Sequence[str] | None) -> list[tuple[int, Segment, int]]:
    """For every column: the number of its segment, the segment, and the place in it."""
    numbers = {segment.name: number for number, segment in enumerate(config.segments)}
    names = [segment.name for segment in config.segments] if order is None else order
    return [
        (numbers[name], config.segments[numbers[name]], place)
        for name in names
        for place in range(math.prod(config.segments[numbers[name]].shape))
    ]


def draw(config: GPTConfig, batch: int, length: int, order: Sequence[str] | None = None) -> Tensor:
    """(B, T) tokens that fit."""
    vocabularies = [segment.vocab_size for _, segment, _ in spans(config, order)[:length]]
    columns = [torch.randint(V, (batch,)) for V in vocabularies]
    return torch.stack(columns, 1) if columns else torch.zeros(batch, 0, dtype=torch.int64)


def sinusoid(place: int, width: int) -> np.ndarray:
    """The vector of Vaswani et al. 2017, Section 3.5, one number at a time; sines, then cosines."""
    angles = [place / 10_000 ** (2 * i / width) for i in range(width // 2)]
    return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def embedding(
    state: dict[str, Any], number: int, segment: Segment, place: int, token: int, width: int
) -> np.ndarray:
    """What enters the stream for one token."""
    ends = f"ends.{number}."
    is_padding = segment.pad_token is not None and token == segment.pad_token
    vector = state[ends + "padding"][place] if is_padding else state[ends + "tokens"][token]
    row, column = divmod(place, segment.shape[-1])
    if segment.positions == "learned":
        return vector + state[ends + "positions"][place]
    if segment.positions == "axial":
        return vector + state[ends + "rows"][row] + state[ends + "columns"][column]
    if len(segment.shape) == 1:
        return vector + sinusoid(place, width)
    return vector + np.concatenate([sinusoid(row, width // 2), sinusoid(column, width // 2)])


def logits_oracle(
    gpt: GPT, tokens: Tensor, order: Sequence[str] | None = None, mask: Tensor | None = None
) -> np.ndarray:
    """(B, T, V): every row computed alone, without the tokens that the mask takes out."""
    state = {name: tensor.double().numpy() for name, tensor in gpt.state_dict().items()}
    config, columns = gpt.config, spans(gpt.config, order)
    V = max(segment.vocab_size for segment in config.segments)
    B, T = tokens.shape
    result = np.full((B, T, V), -np.inf)
    for b in range(B):
        there = [i for i in range(T) if mask is None or bool(mask[b, i])]
        vectors = [state["start"][columns[0][0]]]
        vectors += [embedding(state, *columns[i], int(tokens[b, i]), config.width) for i in there]
        said = _network(config, state, np.stack(vectors))
        for i in range(T):
            number, segment, _ = columns[i]
            last = said[sum(j < i for j in there)]
            head = state[f"ends.{number}." + ("tokens" if config.tied_head else "head")]
            result[b, i, : segment.vocab_size] = head @ last
    return result


def _network(config: GPTConfig, state: dict[str, Any], stream: np.ndarray) -> np.ndarray:
    """(n, D) to (n, D): the blocks and the last norm."""
    for layer in range(config.depth):
        block = f"blocks.{layer}."
        stream = stream + _attention(config.num_heads, state, block, _norm(stream, state, block + "norm1"))
        hidden = _linear(_norm(stream, state, block + "norm2"), state, block + "up")
        if config.activation == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
            hidden = hidden * 0.5 * (1 + np.tanh(inner))
        else:
            hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        stream = stream + _linear(hidden, state, block + "down")
    return _norm(stream, state, "norm")


def _attention(num_heads: int, state: dict[str, Any], block: str, normed: np.ndarray) -> np.ndarray:
    n, D = normed.shape
    size = D // num_heads
    packed = _linear(normed, state, block + "qkv")
    queries, keys, values = packed[:, :D], packed[:, D : 2 * D], packed[:, 2 * D :]
    mixed = np.zeros((n, D))
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(size)
        for i in range(n):
            for j in range(i + 1, n):
                scores[i, j] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        mixed[:, part] = weights / weights.sum(1, keepdims=True) @ values[:, part]
    return _linear(mixed, state, block + "out")


def _linear(values: np.ndarray, state: dict[str, Any], name: str) -> np.ndarray:
    return values @ state[name + ".weight"].T + state[name + ".bias"]


def _norm(values: np.ndarray, state: dict[str, Any], name: str) -> np.ndarray:
    centered = values - values.mean(1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-5)
    return scaled * state[name + ".weight"] + state[name + ".bias"]
