"""The one description of a GPT that a checkpoint has to store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from te_quant._checks import plain_fields, require, require_choice, require_int, require_number, require_type

__all__ = ["ACTIVATIONS", "POSITIONS", "GPTActivation", "GPTConfig", "Positions", "Segment"]

Positions = Literal["learned", "sinusoidal", "axial"]
POSITIONS: tuple[Positions, ...] = ("learned", "sinusoidal", "axial")

GPTActivation = Literal["gelu", "gelu_tanh"]
ACTIVATIONS: tuple[GPTActivation, ...] = ("gelu", "gelu_tanh")

_Options = TypeVar("_Options", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Segment:
    """One stretch of a sequence with its own vocabulary and positions: a caption, the tokens of an image.

    Args:
        name: by which an order refers to it; not empty.
        vocab_size: number of its tokens, at least 1; they are the integers from 0.
        shape: ``(length,)``, or ``(h, w)`` for a grid read row by row. The number of tokens is the product.
        positions: ``learned``, a table of vectors; ``sinusoidal``, a fixed one, two-dimensional for a grid; or
            ``axial``, a learned vector per row plus one per column, for a grid only.
        pad_token: the token that fills the rest of the segment. Its embedding is a learned vector for each
            position instead of one for all. ``None``: there is no such token.

    Example:
        >>> Segment("image", vocab_size=256, shape=(16, 16), positions="axial").length
        256

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.

    Source: Ramesh et al. 2021, arXiv:2102.12092, Section 2.2 for padding with a vector for each position and axial
        positions; Vaswani et al. 2017, arXiv:1706.03762, Section 3.5 for sinusoids.
    """

    name: str
    vocab_size: int
    shape: tuple[int, ...]
    positions: Positions
    pad_token: int | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str, got {self.name!r}.")
        require(self.name != "", "name", "a str that is not empty", repr(self.name))
        require_int("vocab_size", self.vocab_size, 1)
        # A list, as JSON gives it, would make the config unhashable and unequal to its own copy.
        sides = _tuple("shape", self.shape, "ints")
        require(len(sides) in (1, 2), "shape", "(length,) or (h, w)", sides)
        object.__setattr__(self, "shape", tuple(require_int("shape entry", side, 1) for side in sides))
        require_choice("positions", self.positions, POSITIONS)
        fits = len(self.shape) == 2 or self.positions != "axial"
        require(fits, "positions", f"one other than 'axial' for shape {self.shape}", repr(self.positions))
        if self.pad_token is not None:
            require_int("pad_token", self.pad_token, 0, self.vocab_size - 1)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GPTConfig:
    """Every option of a :class:`~te_quant.gpt.GPT`.

    Args:
        segments: at least one, with distinct names; the order here is the default order of a sequence.
        width: D, of the residual stream: a multiple of ``num_heads``; even for sinusoids, a multiple of 4 for
            sinusoids of a grid.
        depth: blocks, at least 1.
        num_heads: H, at least 1.
        mlp_ratio: width of the hidden layer of each block over D, rounded to a whole number; positive.
        dropout: of embeddings, attention weights and what each block adds, in [0, 1).
        tied_head: whether the logits of a segment are products with the embeddings of its tokens, or with a
            matrix of their own.
        activation: of the hidden layer of each block: ``gelu``, exact, or ``gelu_tanh``, its approximation by
            tanh, which GPT-2 was trained with (``gelu_new`` in transformers).

    Example:
        >>> config = GPTConfig((Segment("text", 40, (24,), "learned"),), width=64, num_heads=4)
        >>> GPTConfig.from_dict(config.to_dict()) == config
        True

    Raises:
        ValueError: an option is out of range, or two contradict each other.
        TypeError: an option has the wrong type.

    Source: the width, depth and heads are those of Shin et al. 2021, arXiv:2112.00384, stage 2. Differs: heads of
        D/H = 32, where its code has 64 and projects D to 2D. Hendrycks & Gimpel 2016, arXiv:1606.08415, Section 2,
        for both activations.
    """

    segments: tuple[Segment, ...]
    width: int = 256
    depth: int = 8
    num_heads: int = 8
    mlp_ratio: float = 4
    dropout: float = 0.0
    tied_head: bool = True
    activation: GPTActivation = "gelu"

    def __post_init__(self) -> None:
        plain_fields(self)
        object.__setattr__(self, "segments", _tuple("segments", self.segments, "Segment"))
        require(len(self.segments) > 0, "segments", "at least one Segment", "none")
        for segment in self.segments:
            if not isinstance(segment, Segment):
                raise TypeError(f"segments entry must be a Segment, got {segment!r}.")
        names = [segment.name for segment in self.segments]
        require(len(set(names)) == len(names), "segments", "of distinct names", names)
        for name in ("width", "depth", "num_heads"):
            require_int(name, getattr(self, name), 1)
        fits = self.width % self.num_heads == 0
        require(fits, "num_heads", f"a divisor of width={self.width}", self.num_heads)
        for segment in self.segments:
            divisor = 2 * len(segment.shape) if segment.positions == "sinusoidal" else 1
            whole = self.width % divisor == 0
            require(whole, "width", f"a multiple of {divisor} for the sinusoids of {segment.name!r}", self.width)
        require_number("mlp_ratio", self.mlp_ratio, 0)
        require(self.mlp_width > 0, "mlp_ratio", f"at least {1 / self.width:g}", self.mlp_ratio)
        require_number("dropout", self.dropout, 0, below=1)
        require_type("tied_head", self.tied_head, bool, "a bool")
        require_choice("activation", self.activation, ACTIVATIONS)

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of each block."""
        return round(self.mlp_ratio * self.width)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as values that JSON keeps: :meth:`from_dict` reads them, before or after JSON."""
        options = dataclasses.asdict(self)
        options["segments"] = [{**segment, "shape": list(segment["shape"])} for segment in options["segments"]]
        return options

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> GPTConfig:
        """Return the config with these options; options that are not named keep their defaults.

        Raises:
            ValueError: an option does not exist, or is out of range.
            TypeError: an option has the wrong type, or one without a default is missing.
        """
        options = dict(_known(cls, "config key", options))
        if "segments" in options:
            entries = _tuple("segments", options["segments"], "objects")
            for entry in entries:
                if not isinstance(entry, Mapping):
                    raise TypeError(f"segments entry must be an object, got {entry!r}.")
            options["segments"] = tuple(Segment(**_known(Segment, "segment key", entry)) for entry in entries)
        return cls(**options)


def _known(owner: type[GPTConfig | Segment], name: str, options: _Options) -> _Options:
    known = [field.name for field in dataclasses.fields(owner)]
    for key in options:
        require(key in known, name, "one of " + ", ".join(known), repr(key))
    return options


def _tuple(name: str, value: object, entries: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of {entries}, got {value!r}.")
    return tuple(value)
