"""The parts of a GPT: where segments enter and leave it, and the blocks between.

Shape letters: B batch, t tokens at hand, V vocabulary, D width, H heads, L tokens of a segment.

Source: Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2), Section 2.3.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from te_quant._execution import is_exporting
from te_quant._precision import HALF, full_precision, is_autocast, widen
from te_quant.gpt.config import GPTConfig, Segment

__all__ = ["INITIAL_STD", "Block", "SegmentEnds"]

INITIAL_STD = 0.02
"""Of weights and embeddings. Source: Radford et al. 2018, "Improving language understanding", Section 4.1."""


class SegmentEnds(nn.Module):
    """Where one segment enters the network and where it leaves it: embeddings of tokens and positions, logits."""

    positions: Tensor

    def __init__(self, segment: Segment, width: int, tied_head: bool) -> None:
        super().__init__()
        self.segment = segment
        L, V = segment.length, segment.vocab_size
        self.tokens = _vectors(V, width)
        self.head = None if tied_head else _vectors(V, width)
        self.padding = None if segment.pad_token is None else _vectors(L, width)
        if segment.positions == "axial":
            self.rows, self.columns = (_vectors(side, width) for side in segment.shape)
        elif segment.positions == "learned":
            self.positions = _vectors(L, width)
        else:
            # In the state dict, so that loading gives it the dtype of the weights.
            self.register_buffer("positions", _sinusoids(segment.shape, width))

    def extra_repr(self) -> str:
        """The segment."""
        return f"{self.segment}"

    def embed(self, tokens: Tensor, first: int) -> Tensor:
        """(B, t) tokens, the segment's own from the ``first`` on, to (B, t, D)."""
        last = first + tokens.shape[1]
        vectors = F.embedding(tokens, self.tokens)
        if self.padding is not None and self.segment.pad_token is not None:
            is_padding = tokens.eq(self.segment.pad_token).unsqueeze(-1)
            vectors = torch.where(is_padding, self.padding[first:last], vectors)
        return vectors + self._positions(first, last)

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) to (..., V) of this segment."""
        return F.linear(states, self._output())

    def embed_step(self, tokens: Tensor, place: Tensor) -> Tensor:
        """(B,) tokens, all at one (1,) place of the segment, to (B, D): :meth:`embed`, to be compiled."""
        vectors = F.embedding(tokens, self.tokens)
        if self.padding is not None and self.segment.pad_token is not None:
            is_padding = tokens.eq(self.segment.pad_token).unsqueeze(-1)
            vectors = torch.where(is_padding, F.embedding(place, self.padding), vectors)
        if self.segment.positions != "axial":
            return vectors + F.embedding(place, self.positions)
        side = self.segment.shape[1]
        return vectors + (F.embedding(place // side, self.rows) + F.embedding(place % side, self.columns))

    def logits_step(self, states: Tensor) -> Tensor:
        """(B, D) to (B, V): :meth:`logits` but for rounding, to be compiled."""
        return _sums(states, self._output(), None) if _is_lone(states) else self.logits(states)

    def _output(self) -> Tensor:
        return self.tokens if self.head is None else self.head

    def _positions(self, first: int, last: int) -> Tensor:
        if self.segment.positions != "axial":
            return self.positions[first:last]
        # Only the rows of the grid that are asked for: in generation that is one.
        side = self.segment.shape[1]
        if is_exporting():
            # For a symbolic column, of which nothing says how many rows of the grid it spans.
            places = torch.arange(first, last, device=self.rows.device)
            return F.embedding(places // side, self.rows) + F.embedding(places % side, self.columns)
        top, bottom = first // side, (last - 1) // side + 1
        grid = (self.rows[top:bottom, None] + self.columns).flatten(0, 1)
        return grid[first - top * side : last - top * side]


class Block(nn.Module):
    """Attention, then an MLP, each of a LayerNorm of the stream and added to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D = config.width
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        # So the 2·depth additions to the stream are together as large as one.
        added = INITIAL_STD / math.sqrt(2 * config.depth)
        self.qkv, self.out = _linear(D, 3 * D), _linear(D, D, added)
        self.up, self.down = _linear(D, config.mlp_width), _linear(config.mlp_width, D, added)

    def extra_repr(self) -> str:
        """The options that no layer inside shows."""
        return f"num_heads={self.num_heads}, dropout={self.dropout:g}, approximate={self.approximate!r}"

    def forward(self, stream: Tensor, visible: Tensor | None, memory: Tensor | None, past: int) -> Tensor:
        """(B, t, D) to (B, t, D).

        Args:
            stream: what the block reads and adds to.
            visible: (..., t, past + t) bool, what each may look at; ``None``: whatever does not lie after it, for
                which either t is 1 or ``past`` is 0.
            memory: (2, B, H, capacity, D/H) keys and values, those of ``stream`` to be written from ``past`` on.
            past: how many keys are written already.
        """
        B, t, D = stream.shape
        H, dropout = self.num_heads, self.dropout if self.training else 0.0
        packed = self.qkv(self.norm1(stream)).view(B, t, 3, H, D // H).permute(2, 0, 3, 1, 4)
        queries, stored = packed[0], packed[1:]
        if memory is not None:
            memory[..., past : past + t, :] = stored
            stored = memory[..., : past + t, :]
        queries = queries.to(stored.dtype)
        # In half precision its gradient costs a CPU four times as much as in float32.
        widened = stored.requires_grad and stored.device.type == "cpu"
        if widened:
            queries, stored = widen(queries), widen(stored)
        with full_precision(stored.device) if widened else nullcontext():
            mixed = F.scaled_dot_product_attention(
                queries,
                stored[0],
                stored[1],
                attn_mask=visible,
                dropout_p=dropout,
                # It would align the first query with the first key, which is right only if nothing is past.
                is_causal=visible is None and not past,
            )
        mixed = mixed.to(packed.dtype).transpose(1, 2).reshape(B, t, D)
        stream = stream + F.dropout(self.out(mixed), dropout, self.training)
        hidden = self.down(F.gelu(self.up(self.norm2(stream)), approximate=self.approximate))
        return stream + F.dropout(hidden, dropout, self.training)

    def step(self, stream: Tensor, memory: Tensor, past: int) -> Tensor:
        """(B, D) to (B, D): :meth:`forward` of one token per row, but for rounding, to be compiled.

        A compiler turns the sums into loops that read each weight and each of the ``past`` keys and values once.
        The products of the libraries that eager code calls are made for many rows; with one they take several
        times as long as reading what they multiply.

        Args:
            stream: what the block reads and adds to.
            memory: as of :meth:`forward`.
            past: as of :meth:`forward`.
        """
        B, D = stream.shape
        H = self.num_heads
        packed = _linear_step(self.qkv, self.norm1(stream)).view(B, 3, H, 1, D // H).transpose(0, 1)
        memory[..., past : past + 1, :] = packed[1:]
        keys, values = memory[..., : past + 1, :]
        queries = packed[0].to(memory.dtype)
        if _is_summed(queries):
            mixed = _attend(queries, keys, values)
        else:
            mixed = F.scaled_dot_product_attention(queries, keys, values)
        stream = stream + _linear_step(self.out, mixed.to(packed.dtype).reshape(B, D))
        hidden = F.gelu(_linear_step(self.up, self.norm2(stream)), approximate=self.approximate)
        return stream + _linear_step(self.down, hidden)


def _is_summed(tensor: Tensor) -> bool:
    """Whether plain sums are faster than the products of a library: compiled, on CPUs, in full precision."""
    on_cpu = tensor.is_cpu and tensor.dtype not in HALF and not is_autocast(tensor.device)
    return is_compiling() and on_cpu


def _is_lone(rows: Tensor) -> bool:
    return rows.shape[0] == 1 and _is_summed(rows)


def _sums(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(1, inputs) to (1, outputs)."""
    # Has the compiler store the row; it would compute it again for every output, such as the norm that made it.
    row = row.as_strided(row.shape, row.stride())
    sums = (weight * row).sum(-1)
    return (sums if bias is None else sums + bias).unsqueeze(0)


def _linear_step(layer: nn.Linear, rows: Tensor) -> Tensor:
    # Anything else that stands in its place, such as an adapter or another forward, does more than the product.
    plain = type(layer) is nn.Linear and "forward" not in vars(layer)
    if plain and not (layer._forward_hooks or layer._forward_pre_hooks) and _is_lone(rows):
        return _sums(rows, layer.weight, layer.bias)
    result: Tensor = layer(rows)
    return result


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(B, H, 1, D/H) queries over (B, H, n, D/H) keys and values."""
    scores: Tensor = (queries * queries.shape[-1] ** -0.5 * keys).sum(-1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights.unsqueeze(-1) * values).sum(-2) / weights.sum(-1, keepdim=True)


def _vectors(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(INITIAL_STD * torch.randn(count, width))


def _linear(inputs: int, outputs: int, std: float = INITIAL_STD) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def _sinusoids(shape: tuple[int, ...], width: int) -> Tensor:
    """(L, D) fixed vectors; for a grid, half of each for the row and half for the column.

    Source: Vaswani et al. 2017, arXiv:1706.03762, Section 3.5. Differs: the sines before the cosines.
    """
    share = width // len(shape)
    # On the CPU first, as some devices have no float64.
    rates = 10_000.0 ** (-torch.arange(0, share, 2, dtype=torch.float64, device="cpu") / share)
    sides = (torch.arange(side, dtype=torch.float64, device="cpu") for side in shape)
    axes = torch.meshgrid(*sides, indexing="ij")
    angles = [axis.flatten().outer(rates) for axis in axes]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    # In torch 2.9 torch.get_default_device() fails once set_default_device(None) was called.
    return table.to(torch.get_default_dtype()).to(torch.empty(0).device)
