"""The transformer of the paper's authors: a small DALL-E that reads captions and image tokens in either order.

Its state after each token predicts the next one. Nothing stands in front, so the first token of a sequence is not
predicted: captions begin with a start token, and of an image that comes first the first token is only read.

Shape letters: B batch, T tokens of a sequence, n all of them, t tokens at hand, V vocabulary, D width, H heads, L
caption tokens, h w token grid.

Source: Shin et al. 2021, arXiv:2112.00384, and its published Stage 2, after Ramesh et al. 2021, arXiv:2102.12092.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.checks import require, require_int, require_number
from examples.te_vqgan.runs.files import read_json_object, write_text_atomically
from examples.te_vqgan.stage2.attention_patterns import ATTENTION_KINDS, attention_pattern, require_order
from te_quant import Segment

__all__ = ["DalleConfig", "DalleTransformer"]

CLASS_NAME = "DalleTransformer"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_MLP_RATIO = 4
# Source: Touvron et al. 2021, arXiv:2103.17239, for at most 18 blocks.
_INITIAL_SCALE, _MAX_DEPTH = 0.1, 18


@dataclasses.dataclass(frozen=True)
class DalleConfig:
    """Every option of a :class:`DalleTransformer`.

    Args:
        vocab_size: of the captions.
        text_length: L, tokens of a caption, at least 2.
        pad_token: fills a caption after its end.
        start_token: the first of every caption.
        num_codes: of the image tokenizer.
        grid: (h, w) of its tokens.
        width: D, a multiple of 4.
        depth: blocks, in [1, 18].
        num_heads: H.
        head_width: of each head; H · head_width need not be D.
        kernel_size: side of the square that attention of kind ``convolution`` sees, odd.

    Raises:
        ValueError: an option is out of range.
    """

    vocab_size: int
    text_length: int
    pad_token: int
    start_token: int
    num_codes: int
    grid: tuple[int, int]
    width: int = 256
    depth: int = 8
    num_heads: int = 8
    head_width: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        # A list, as JSON gives it, would make the config unhashable and unequal to its own copy.
        object.__setattr__(self, "grid", tuple(self.grid))
        require(len(self.grid) == 2, "grid", "(h, w)", self.grid)
        for name in ("vocab_size", "num_codes", "width", "depth", "num_heads", "head_width", "kernel_size"):
            require_int(name, getattr(self, name), 1)
        for side in self.grid:
            require_int("grid entry", side, 1)
        require_int("text_length", self.text_length, 2)
        require(self.width % 4 == 0, "width", "a multiple of 4", self.width)
        require(self.depth <= _MAX_DEPTH, "depth", f"at most {_MAX_DEPTH}", self.depth)
        require(self.kernel_size % 2 == 1, "kernel_size", "odd", self.kernel_size)
        for name in ("pad_token", "start_token"):
            require_int(name, getattr(self, name), 0)
            require(getattr(self, name) < self.vocab_size, name, f"below {self.vocab_size}", getattr(self, name))
        require(self.pad_token != self.start_token, "start_token", "another than pad_token", self.start_token)

    @property
    def segments(self) -> tuple[Segment, Segment]:
        """Text and image, as a :class:`te_quant.GPTConfig` describes them."""
        text = Segment("text", self.vocab_size, (self.text_length,), "learned", pad_token=self.pad_token)
        return text, Segment("image", self.num_codes, self.grid, "sinusoidal")

    def to_dict(self) -> dict[str, Any]:
        """Return all options in the form in which JSON gives them back."""
        return {**dataclasses.asdict(self), "grid": list(self.grid)}


class _Span(NamedTuple):
    """The columns [begin, end) of a segment."""

    segment: Segment
    begin: int
    end: int


class _Block(nn.Module):
    """Attention, then a gated MLP; each reads a LayerNorm of the stream and adds what it has to it, scaled."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        D, inner = config.width, config.num_heads * config.head_width
        self.num_heads = config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * inner, bias=False), nn.Linear(inner, D)
        self.up, self.down = nn.Linear(D, 2 * _MLP_RATIO * D), nn.Linear(_MLP_RATIO * D, D)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((D,), _INITIAL_SCALE)) for _ in range(2))

    def forward(self, stream: Tensor, visible: Tensor, memory: Tensor | None, past: int) -> Tensor:
        """(B, t, D) to (B, t, D).

        Args:
            stream: what the block reads and adds to.
            visible: (B or 1, 1, t, past + t) bool, which columns each looks at.
            memory: (2, B, H, capacity, D/H) keys and values, those of ``stream`` to be written from ``past`` on.
            past: how many keys are written already.
        """
        B, t, _ = stream.shape
        packed = self.qkv(self.norm1(stream)).view(B, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, stored = packed[0], packed[1:]
        if memory is not None:
            memory[..., past : past + t, :] = stored
            stored = memory[..., : past + t, :]
        # The fused kernel's gradient in half precision is slow on a CPU.
        slow = stored.requires_grad and stored.device.type == "cpu" and stored.dtype.itemsize < 4
        attend = _attend_in_steps if slow else F.scaled_dot_product_attention
        mixed = attend(queries, stored[0], stored[1], visible)
        stream = stream + self.scale1 * self.out(mixed.transpose(1, 2).reshape(B, t, -1))
        values, gates = self.up(self.norm2(stream)).chunk(2, -1)
        # Source: Shazeer 2020, arXiv:2002.05202 (GEGLU).
        added: Tensor = self.down(values * F.gelu(gates))
        return stream + self.scale2 * added


class DalleTransformer(nn.Module):
    """Predicts each token of a caption with its image, in either order, from the tokens before it.

    Blocks take the kinds of attention in turn: full, row, column, convolution
    (:func:`~examples.te_vqgan.stage2.attention_patterns.attention_pattern`). Padding has a learned vector for each
    position and is looked at by no token. Image positions are fixed sinusoids, text positions are learned.

    It offers what Stage 2 uses of a :class:`te_quant.GPT`: ``config.segments``, :meth:`losses`, :meth:`generate`,
    :meth:`save_pretrained` and :meth:`from_pretrained`.

    Args:
        config: every option.

    Shape:
        tokens: (B, T) int64, those of the first segment of the order, then those of the second.
        logits: (B, T - 1, V) about all tokens but the first, V the larger vocabulary; -inf beyond that of the
            token's segment.

    Raises:
        ValueError: the order does not name text and image once each, or there are more tokens than it has.
    """

    positions: Tensor

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.tokens = nn.ModuleDict({part.name: nn.Embedding(part.vocab_size, D) for part in config.segments})
        self.padding = nn.Embedding(config.text_length, D)
        self.text_positions = nn.Embedding(config.text_length, D)
        # In the state dict, so that loading gives it the dtype of the weights.
        self.register_buffer("positions", _sinusoids(config.grid, D))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        self.heads = nn.ModuleDict({part.name: nn.Linear(D, part.vocab_size) for part in config.segments})

    def forward(self, tokens: Tensor, order: Sequence[str]) -> Tensor:
        """(B, T) tokens to (B, T - 1, V) logits, each about the next token."""
        spans = self._spans(order, tokens.shape[1])
        states = self._read(tokens[:, :-1], order)
        largest = max(part.vocab_size for part in self.config.segments)
        parts = []
        for span, begin, end in _predicted(spans, tokens.shape[1]):
            known = self.heads[span.segment.name](states[:, begin - 1 : end - 1])
            parts.append(F.pad(known, (0, largest - known.shape[-1]), value=-math.inf))
        return torch.cat(parts, 1)

    def losses(
        self, tokens: Tensor, order: Sequence[str], ignore_index: int = -100, *, targets: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the mean cross entropy of the tokens of each segment in nats; the first token has none.

        Args:
            tokens: (B, T), as of the class.
            order: as of the class.
            ignore_index: the integer that takes a target out of the mean.
            targets: (B, T) int64, what should be predicted; by default the tokens.
        """
        wanted = tokens if targets is None else targets
        spans = self._spans(order, tokens.shape[1])
        states = self._read(tokens[:, :-1], order)
        losses = {}
        for span, begin, end in _predicted(spans, tokens.shape[1]):
            goals = wanted[:, begin:end].flatten()
            logits = self.heads[span.segment.name](states[:, begin - 1 : end - 1]).flatten(0, 1).float()
            total = F.cross_entropy(logits, goals, ignore_index=ignore_index, reduction="sum")
            losses[span.segment.name] = total / (goals != ignore_index).sum().clamp_min(1)
        return losses

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        *,
        order: Sequence[str],
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        stop_token: int | None = None,
    ) -> Tensor:
        """(B, P) tokens to (B, n) tokens: each new one drawn from what the network says about it.

        A caption begins with its start token, which is set and not drawn.

        Args:
            prompt: (B, P) int64, as of the class; P is at least 1 where the image comes first.
            order: as of the class.
            temperature: what logits are divided by, >= 0; 0 takes the likeliest token.
            top_k: keep the k largest logits, or all of a smaller vocabulary.
            generator: all randomness; the global one if ``None``.
            stop_token: the token that ends a caption; padding fills the rest of it.

        Raises:
            ValueError: also an option out of range, or an empty prompt where the image comes first.
        """
        config = self.config
        require_number("temperature", temperature, 0.0)
        if top_k is not None:
            require_int("top_k", top_k, 1)
        B, P = prompt.shape
        spans = self._spans(order, P)
        n = spans[-1].end
        first = spans[0].segment.name
        require(P > 0 or first == "text", "prompt", "at least one token where the image comes first", "none")
        sequence = F.pad(prompt, (0, n - P), value=config.pad_token)
        patterns = self._patterns(order, n)
        shape = (2, B, config.num_heads, n, config.head_width)
        memory = [self.norm.weight.new_empty(shape) for _ in range(config.depth)]
        ended = torch.zeros(B, dtype=torch.bool, device=prompt.device)
        seen = 0
        for column in range(P, n):
            span = next(span for span in spans if column < span.end)
            if span.segment.name == "text" and column == span.begin:
                sequence[:, column] = config.start_token
                continue
            states = self._run(sequence[:, :column], order, patterns, memory, seen)
            seen = column
            logits = self.heads[span.segment.name](states[:, -1]).float()
            drawn = _draw(logits, temperature, top_k, generator)
            if stop_token is not None:
                drawn = torch.where(ended, config.pad_token, drawn)
                ended = ended | (drawn == stop_token)
            sequence[:, column] = drawn
            if stop_token is not None and bool(ended.all()):
                break
        return sequence

    def save_pretrained(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, each as a whole or not at all."""
        save_checkpoint(folder / _WEIGHTS, self.state_dict(), {})
        content = {"class_name": CLASS_NAME, "config": self.config.to_dict()}
        write_text_atomically(folder / _CONFIG, json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path) -> DalleTransformer:
        """Return the model that :meth:`save_pretrained` wrote, on the CPU, in evaluation mode and saved dtypes.

        Raises:
            ValueError: ``folder`` holds another model.
        """
        content = read_json_object(folder / _CONFIG)
        name = content.get("class_name")
        require(name == CLASS_NAME, f"{folder / _CONFIG} class_name", repr(CLASS_NAME), repr(name))
        # The weights are replaced at once, so drawing them must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            model = cls(DalleConfig(**content["config"]))
        tensors, _ = load_checkpoint(folder / _WEIGHTS)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def _spans(self, order: Sequence[str], count: int) -> tuple[_Span, _Span]:
        """Where text and image lie; refuses more than ``n`` tokens."""
        parts = {part.name: part for part in self.config.segments}
        first, second = (parts[name] for name in require_order(order))
        n = first.length + second.length
        require(count <= n, "tokens axis 1", f"at most {n}", count)
        return _Span(first, 0, first.length), _Span(second, first.length, n)

    def _patterns(self, order: Sequence[str], count: int) -> list[Tensor]:
        """(count, count) bool for each kind of attention, in turn."""
        text, image = self.config.segments
        height, width = image.shape
        return [
            attention_pattern(
                kind,
                order,
                text.length,
                (height, width),
                kernel_size=self.config.kernel_size,
                device=self.positions.device,
            )[:count, :count]
            for kind in ATTENTION_KINDS[: self.config.depth]
        ]

    def _read(self, tokens: Tensor, order: Sequence[str]) -> Tensor:
        """(B, T) tokens to (B, T, D) states."""
        return self._run(tokens, order, self._patterns(order, tokens.shape[1]), None, 0)

    def _run(
        self, tokens: Tensor, order: Sequence[str], patterns: list[Tensor], memory: list[Tensor] | None, past: int
    ) -> Tensor:
        """(B, T) tokens to the states of those from ``past`` on; earlier ones are in ``memory``."""
        count = tokens.shape[1]
        there = torch.ones_like(tokens, dtype=torch.bool)
        parts = []
        for span in self._spans(order, count):
            part = tokens[:, span.begin : min(span.end, count)]
            if span.segment.name == "text":
                there[:, span.begin : span.begin + part.shape[1]] = part != self.config.pad_token
            # Only what is not read yet; the places say which positions that is.
            begin = max(span.begin, past)
            if begin < min(span.end, count):
                parts.append(self._embed(span, tokens[:, begin : min(span.end, count)], begin - span.begin))
        stream = torch.cat(parts, 1)
        masks = [pattern[past:count, :count] & there[:, None, None] for pattern in patterns]
        for number, block in enumerate(self.blocks):
            store = None if memory is None else memory[number]
            stream = block(stream, masks[number % len(masks)], store, past)
        states: Tensor = self.norm(stream)
        return states

    def _embed(self, span: _Span, tokens: Tensor, first: int) -> Tensor:
        """(B, t) tokens of a segment, from its token number ``first`` on, to (B, t, D)."""
        vectors: Tensor = self.tokens[span.segment.name](tokens)
        last = first + tokens.shape[1]
        if span.segment.name == "image":
            return vectors + self.positions[first:last]
        padding, positions = (table.weight[first:last] for table in (self.padding, self.text_positions))
        is_padding = tokens.eq(self.config.pad_token).unsqueeze(-1)
        return torch.where(is_padding, padding, vectors) + positions


def _attend_in_steps(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Scaled dot-product attention, one operation at a time; every query sees something."""
    scores = queries * queries.shape[-1] ** -0.5 @ keys.transpose(-1, -2)
    unseen = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, -math.inf)
    # Autocast would make softmax read and write float32. In half precision it computes in float32 all the same.
    with torch.autocast(scores.device.type, enabled=False):
        shares = scores.add_(unseen).softmax(-1)
    mixed: Tensor = shares @ values
    return mixed


def _predicted(spans: Sequence[_Span], count: int) -> list[tuple[_Span, int, int]]:
    """The columns of each segment that are predicted, of the first ``count``: all but the very first."""
    found = [(span, max(span.begin, 1), min(span.end, count)) for span in spans]
    return [(span, begin, end) for span, begin, end in found if begin < end]


def _draw(logits: Tensor, temperature: float, keep: int | None, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits to (B,) tokens."""
    if temperature == 0:
        return logits.argmax(-1)
    best = logits.topk(min(keep or logits.shape[-1], logits.shape[-1]), -1)
    # Subtracting the largest keeps the quotient finite, however small the temperature is.
    shares = ((best.values - best.values[:, :1]) / temperature).softmax(-1)
    chosen = torch.multinomial(shares, 1, generator=generator)
    return best.indices.gather(-1, chosen).squeeze(-1)


def _sinusoids(grid: Sequence[int], width: int) -> Tensor:
    """(h·w, D) fixed vectors: half of each for the row and half for the column, the sines before the cosines.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, per axis.
    """
    share = width // 2
    rates = 10_000.0 ** (-torch.arange(0, share, 2, dtype=torch.float64) / share)
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.flatten().outer(rates) for axis in axes]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    return table.to(torch.get_default_dtype())
