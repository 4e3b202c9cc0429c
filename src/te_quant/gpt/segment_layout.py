"""What lies where in a sequence: the columns of each segment, and the tokens that may stand in them.

Shape letters: B batch, T tokens, P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from te_quant._checks import (
    require,
    require_axis,
    require_choice,
    require_device,
    require_integer_tensor,
    require_mask,
    require_rank,
)
from te_quant._values import require_in_range
from te_quant.gpt.config import Segment

__all__ = ["Layout", "Span", "own_columns"]


@dataclass(frozen=True)
class Span:
    """The columns [begin, end) that a segment takes; ``number`` is its place in the config."""

    segment: Segment
    number: int
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The segments of a sequence as they follow each other."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, segments: tuple[Segment, ...], order: Sequence[str] | None) -> Layout:
        """The layout of the segments that ``order`` names; of all as they are if ``None``.

        Raises:
            ValueError: the order is empty, or names a segment twice or one that is not there.
            TypeError: the order is a str, or no sequence.
        """
        if isinstance(order, str) or not (order is None or isinstance(order, Sequence)):
            raise TypeError(f"order must be a sequence of names of segments, got {order!r}.")
        known = [segment.name for segment in segments]
        names = known if order is None else list(order)
        require(len(names) > 0, "order", "at least one name of a segment", "none")
        spans, begin = [], 0
        for name in names:
            require_choice("order entry", name, known)
            number = known.index(name)
            spans.append(Span(segments[number], number, begin, begin + segments[number].length))
            begin = spans[-1].end
        require(len(set(names)) == len(names), "order", "without repetition", names)
        return cls(tuple(spans))

    @property
    def names(self) -> tuple[str, ...]:
        """The order."""
        return tuple(span.segment.name for span in self.spans)

    @property
    def length(self) -> int:
        """Columns of all segments."""
        return self.spans[-1].end

    def at(self, column: int) -> Span:
        """The segment of a column."""
        return next(span for span in self.spans if column < span.end)

    def within(self, first: int, last: int) -> Iterator[tuple[Span, int, int]]:
        """Each segment that has columns in [first, last), and which those are."""
        for span in self.spans:
            # Not min and max: an exporter with a symbolic column would carry them into every shape.
            begin = first if first >= span.begin else span.begin
            end = last if last <= span.end else span.end
            if begin < end:
                yield span, begin, end

    def checked(
        self,
        name: str,
        tokens: Tensor,
        device: torch.device,
        *,
        first: int = 0,
        ignored: int | None = None,
        always_look: bool = False,
    ) -> Tensor:
        """The (B, T) tokens as int64, if they may stand in the columns from ``first`` on.

        Args:
            name: what an error calls them.
            tokens: integers, each of the vocabulary of its segment.
            device: where they have to be.
            first: column of the first.
            ignored: an integer outside every vocabulary that may stand everywhere.
            always_look: look at the values on every device. Otherwise only a CPU does: elsewhere it would stop the
                queue, and the kernels refuse what lies outside by themselves.

        Raises:
            ValueError: more tokens than columns, one outside its vocabulary, another rank or device.
            TypeError: not integers.
        """
        require_rank(name, tokens, (2,), "(B, T)")
        require_integer_tensor(name, tokens)
        require_device(name, tokens, device, "weights")
        T, room = tokens.shape[1], self.length - first
        # The sentence only where it is needed: to write a symbolic size would fix it.
        if room < T:
            require(False, f"{name} axis 1", f"at most {room}, what the order {self.names} has left", T)
        tokens = tokens.long()
        if not (always_look or device.type == "cpu"):
            return tokens
        parts = []
        for span, begin, end in self.within(first, first + T):
            part, segment = tokens[:, begin - first : end - first], span.segment
            known = part if ignored is None else part.masked_fill(part == ignored, 0)
            known = require_in_range(f"{name} of {segment.name!r}", known, segment.vocab_size, "vocab_size")
            parts.append(known if ignored is None else torch.where(part == ignored, part, known))
        return torch.cat(parts, 1) if parts else tokens


def own_columns(prompt: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B, P) bool: which tokens of the prompt belong to it; ``None`` if all do."""
    require_rank("prompt", prompt, (2,), "(B, T)")
    B, P = prompt.shape
    if mask is not None:
        require(lengths is None, "prompt_lengths", "None with prompt_mask", "a tensor")
        require_mask("prompt_mask", mask, (B, P), prompt.device, "prompt")
        return mask
    if lengths is None:
        return None
    require_rank("prompt_lengths", lengths, (1,), "(B,)")
    require_integer_tensor("prompt_lengths", lengths)
    lengths = lengths.long()
    require_device("prompt_lengths", lengths, prompt.device, "prompt")
    require_axis("prompt_lengths", lengths, 0, B, "batch of the prompt")
    outside = [length for length in lengths.tolist() if not 0 <= length <= P]
    require(not outside, "prompt_lengths", f"in [0, {P}], the width of the prompt", outside)
    return torch.arange(P, device=prompt.device) < lengths.unsqueeze(1)
