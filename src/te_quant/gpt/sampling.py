"""Drawing tokens: which logits are kept, which token is drawn of them, and one column after the other.

Nothing here knows of a network; it is a function that predicts.

Shape letters: B batch, T tokens of a sequence, P of a prompt, V vocabulary, k logits kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from te_quant._checks import plain_fields, require, require_generator, require_int, require_number
from te_quant._precision import widen

__all__ = ["Ending", "Sampler", "extend"]


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn; :meth:`te_quant.gpt.GPT.generate` says what the options mean.

    Raises:
        ValueError: an option is out of range, or both ``top_k`` and ``top_fraction`` are given.
        TypeError: an option has the wrong type.

    Source: Holtzman et al. 2020, arXiv:1904.09751, Section 3.1 for ``top_p``.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_fraction: float | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        require_number("temperature", self.temperature, 0)
        if self.top_k is not None:
            require_int("top_k", self.top_k, 1)
            require(self.top_fraction is None, "top_fraction", "None with top_k", self.top_fraction)
        require_generator(self.generator)
        for name in ("top_fraction", "top_p"):
            share = getattr(self, name)
            if share is not None:
                require_number(name, share, maximum=1)
                require(share > 0, name, "> 0", share)

    def draw(self, logits: Tensor) -> Tensor:
        """(B, V) logits to (B,) tokens."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores, tokens = self._kept(widen(logits))
        if self.top_p is not None:
            shares = scores.softmax(-1)
            # The mass before a token, not up to it, so that the likeliest is always kept.
            before = shares.cumsum(-1) - shares
            scores = scores.masked_fill(before >= self.top_p, -math.inf)
        # Of arrivals at rates exp(scores), the first is that of token i with probability softmax(scores)_i.
        # torch.multinomial draws the same way, but on an accelerator waits to look at its weights.
        arrivals = torch.empty_like(scores).exponential_(generator=self.generator)
        # A draw of exactly zero would let a token win that was not kept.
        arrivals.clamp_min_(torch.finfo(arrivals.dtype).tiny)
        chosen = (scores.softmax(-1) / arrivals).argmax(-1, keepdim=True)
        return (chosen if tokens is None else tokens.gather(-1, chosen)).squeeze(-1)

    def _kept(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, k) scaled logits, largest first, and whose they are; all V as they are if none is dropped."""
        V = logits.shape[-1]
        keep = V
        if self.top_k is not None:
            keep = min(self.top_k, V)
        if self.top_fraction is not None:
            # 0.29 of 100 are 29, although their product in floating point is a little less.
            keep = max(1, math.floor(self.top_fraction * V + 1e-9))
        # Subtracting the largest keeps the quotient finite, however small the temperature is.
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        scores = (logits - logits.amax(-1, keepdim=True)) / temperature
        if keep == V and self.top_p is None:
            return scores, None
        best = scores.topk(keep, dim=-1)
        return best.values, best.indices


class Ending(NamedTuple):
    """The token that ends a row, and the one that fills what is left of it."""

    stop: int
    fill: int


@torch.inference_mode()
def extend(
    sequence: Tensor,
    first: int,
    predict: Callable[[int, int], Tensor],
    sampler: Sampler,
    *,
    own: Tensor | None = None,
    ending: Ending | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
) -> None:
    """Draw the columns of ``sequence`` from ``first`` on, in place.

    Args:
        sequence: (B, T) int64, the columns before ``first`` given.
        first: the first column to draw.
        predict: (begin, end) -> (B, V) logits about column ``end``. The columns before ``begin`` are those that it
            had seen when it was last called.
        sampler: how tokens are drawn.
        own: (B, P) bool, where a row has a token of its own, which stays; none of the columns from P on has.
        ending: ends a row when its stop token is drawn, and everything when all rows have ended.
        callback: called with each column drawn and its (B,) tokens.

    Raises:
        ValueError: logits that a token is drawn from have NaN, +inf or nothing above -inf. A CPU raises at once,
            an accelerator, which would have to be waited for, after the last column.
    """
    B, T = sequence.shape
    ended = torch.zeros(B, dtype=torch.bool, device=sequence.device)
    failed = torch.full((B,), T, device=sequence.device)
    at_once = _looks_at_once(sequence)
    seen = 0
    for column in range(first, T):
        logits = predict(seen, column)
        tokens = sampler.draw(logits)
        seen = column
        kept = own[:, column] if own is not None and column < own.shape[1] else None
        # The largest is NaN where any is; -inf takes a token out of the draw, which is fine while others remain.
        good = logits.amax(-1).isfinite() | ended
        if kept is not None:
            good |= kept
        failed = torch.where(good, failed, failed.clamp_max(column))
        if at_once:
            _refuse_failed(failed, T)
        if ending is not None:
            tokens = torch.where(ended, ending.fill, tokens)
            stopping = tokens == ending.stop
            ended |= stopping if kept is None else stopping & ~kept
        if kept is not None:
            tokens = torch.where(kept, sequence[:, column], tokens)
        sequence[:, column] = tokens
        if callback is not None:
            callback(column, tokens)
        if ending is not None and bool(ended.all()):
            sequence[:, column + 1 :] = ending.fill
            break
    _refuse_failed(failed, T)


def _looks_at_once(sequence: Tensor) -> bool:
    return sequence.is_cpu


def _refuse_failed(failed: Tensor, length: int) -> None:
    """Refuse (B,) columns whose logits no token could be drawn from, unless all are ``length``."""
    column = int(failed.min()) if len(failed) else length
    if column < length:
        row = int(failed.argmin())
        expected = "finite, or -inf for some tokens, to draw from"
        cure = "generate in float32 or look for NaN in the weights"
        require(False, "logits", expected, f"NaN, +inf or only -inf about token {column} of row {row}; {cure}")
