"""Drawing tokens: guided logits, which of them are kept, which token is drawn, and one column after the other.

Nothing here knows of a network; it is a function that predicts.

Shape letters: B batch, T tokens of a sequence, V vocabulary, k logits kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from te_quant._checks import (
    plain_fields,
    require,
    require_floating,
    require_generator,
    require_int,
    require_number,
    require_type,
)
from te_quant._precision import widen

__all__ = ["Drawn", "Ending", "Sampler", "extend", "guided_logits"]


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Combine logits with and without a condition: ``unconditional + scale · (conditional - unconditional)``.

    Tokens whose logit is -inf in either, as beyond a vocabulary, stay at -inf; the plain formula gives NaN there.
    NaN and +inf in either become NaN, so that no later step overlooks them.

    Args:
        conditional: logits of a network that has read the condition.
        unconditional: logits of the same network without it, about the same tokens.
        scale: finite, at least 0. 1 gives ``conditional`` and 0 ``unconditional``, both bit for bit; above 1 the
            condition counts for more than the network learned.

    Shape:
        conditional, unconditional: (..., V). result: (..., V), float32 where they have half precision.

    Example:
        >>> conditional = torch.tensor([2.0, 1.0, -torch.inf])
        >>> guided_logits(conditional, torch.tensor([1.0, 1.0, -torch.inf]), 3.0)
        tensor([4., 1., -inf])

    Raises:
        ValueError: shapes or dtypes differ, or the scale is negative, NaN or infinite.
        TypeError: the logits are not floating point, or the scale is no number.

    Source: Ho and Salimans 2022, arXiv:2207.12598, Equation 6, for scores; Gafni et al. 2022, arXiv:2203.13131,
        for logits of tokens. The scale is 1 + w of the former.
    """
    require_floating("conditional", conditional)
    require_floating("unconditional", unconditional)
    wanted, found = conditional.dtype, unconditional.dtype
    require(found == wanted, "unconditional", f"of dtype {wanted} as conditional", found)
    # The sentence only where it is needed: to write a symbolic size would fix it.
    if unconditional.shape != conditional.shape:
        shape = tuple(conditional.shape)
        require(False, "unconditional", f"of shape {shape} as conditional", f"shape {tuple(unconditional.shape)}")
    scale = require_number("scale", scale, 0)
    conditional, unconditional = widen(conditional), widen(unconditional)
    # At the weights 0 and 1 lerp returns its arguments without rounding.
    guided = torch.lerp(unconditional, conditional, scale)
    guided = guided.masked_fill(torch.minimum(conditional, unconditional) == -math.inf, -math.inf)
    # The largest of both is NaN where either is.
    return torch.where(torch.maximum(conditional, unconditional) < math.inf, guided, math.nan)


class Drawn(NamedTuple):
    """(B,) tokens and the (B,) probabilities with which they were drawn."""

    tokens: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn; :meth:`te_quant.gpt.GPT.generate` says what the options mean.

    Raises:
        ValueError: an option is out of range, both ``top_k`` and ``top_fraction`` are given, or two rows share a
            generator.
        TypeError: an option has the wrong type.

    Source: Holtzman et al. 2020, arXiv:1904.09751, Section 3.1 for ``top_p``.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_fraction: float | None = None
    top_p: float | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        require_number("temperature", self.temperature, 0)
        if self.top_k is not None:
            require_int("top_k", self.top_k, 1)
            require(self.top_fraction is None, "top_fraction", "None with top_k", self.top_fraction)
        if isinstance(self.generator, Sequence):
            for entry in self.generator:
                require_type("generator entry", entry, torch.Generator, "a torch.Generator")
            # A stream that two rows share would give each tokens that depend on the other.
            distinct = len({id(entry) for entry in self.generator})
            count = len(self.generator)
            require(distinct == count, "generator", f"{count} different torch.Generators", distinct)
        else:
            require_generator(self.generator)
        for name in ("top_fraction", "top_p"):
            share = getattr(self, name)
            if share is not None:
                require_number(name, share, maximum=1)
                require(share > 0, name, "> 0", share)

    def draw(self, logits: Tensor, idle: Sequence[bool] | None = None) -> Drawn:
        """(B, V) logits to (B,) tokens and their probabilities.

        Args:
            logits: what tokens are drawn from.
            idle: B flags, True for rows whose token nobody needs; it is arbitrary, and a generator of such a row
                does not move. ``None``: there are no such rows.
        """
        if self.temperature == 0:
            return Drawn(logits.argmax(-1), widen(logits).new_ones(logits.shape[0]))
        scores, tokens = self._kept(widen(logits))
        if self.top_p is not None:
            shares = scores.softmax(-1)
            # The mass before a token, not up to it, so that the likeliest is always kept.
            before = shares.cumsum(-1) - shares
            scores = scores.masked_fill(before >= self.top_p, -math.inf)
        shares = scores.softmax(-1)
        # Of arrivals at rates exp(scores), the first is that of token i with probability softmax(scores)_i.
        # torch.multinomial draws the same way, but on an accelerator waits to look at its weights.
        chosen = (shares / self._waits(scores, tokens, logits.shape[-1], idle)).argmax(-1, keepdim=True)
        drawn = chosen if tokens is None else tokens.gather(-1, chosen)
        return Drawn(drawn.squeeze(-1), shares.gather(-1, chosen).squeeze(-1))

    def _waits(self, scores: Tensor, tokens: Tensor | None, V: int, idle: Sequence[bool] | None) -> Tensor:
        """(B, k) exponential numbers, one for each of the ``scores``, which belong to ``tokens``."""
        if self.generator is None or isinstance(self.generator, torch.Generator):
            waits = torch.empty_like(scores).exponential_(generator=self.generator)
        else:
            # One for each token of the vocabulary, not for each rank: tokens that nearly tie may change places
            # when the batch size changes the rounding, and then keep their numbers.
            waits = scores.new_ones(scores.shape[0], V)
            for row, generator in enumerate(self.generator):
                if idle is None or not idle[row]:
                    waits[row].exponential_(generator=generator)
            if tokens is not None:
                waits = waits.gather(-1, tokens)
        # A draw of exactly zero would let a token win that was not kept.
        return waits.clamp_min_(torch.finfo(waits.dtype).tiny)

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


@torch.no_grad()
def extend(
    sequence: Tensor,
    first: int,
    predict: Callable[[int, int], Tensor],
    sampler: Sampler,
    *,
    own: Tensor | None = None,
    ending: Ending | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
    shares: Tensor | None = None,
) -> None:
    """Draw the columns of ``sequence`` from ``first`` on, in place; those that every row has are skipped.

    Args:
        sequence: (B, T) int64, the columns before ``first`` given.
        first: the first column to draw.
        predict: (begin, end) -> (B, V) logits about column ``end``. The columns before ``begin`` are those that it
            had seen when it was last called.
        sampler: how tokens are drawn.
        own: (B, T) bool, where a row has a token of its own, which stays.
        ending: ends a row when its stop token is drawn, and everything when all rows have ended.
        callback: called with each column drawn and its (B,) tokens.
        shares: (B, T), where to write the probabilities with which tokens were drawn; the others stay.

    Raises:
        ValueError: logits that a token is drawn from have NaN, +inf or nothing above -inf. A CPU raises at once,
            an accelerator, which would have to be waited for, after the last column.
    """
    B, T = sequence.shape
    ended = torch.zeros(B, dtype=torch.bool, device=sequence.device)
    failed = torch.full((B,), T, device=sequence.device)
    at_once = _looks_at_once(sequence)
    # The same as lists, which are read without waiting for a device.
    own_rows = [[False] * B] * T if own is None else own.T.tolist()
    over = [False] * B
    seen = 0
    for column in range(first, T):
        if own is not None and all(own_rows[column]):
            continue
        idle = [a or b for a, b in zip(own_rows[column], over, strict=True)]
        logits = predict(seen, column)
        tokens, probabilities = sampler.draw(logits, idle)
        seen = column
        settled = ended if own is None else ended | own[:, column]
        # The largest is NaN where any is; -inf takes a token out of the draw, which is fine while others remain.
        failed = _look(logits.amax(-1), settled, failed, column, at_once)
        if at_once:
            _refuse_failed(failed, T)
        if shares is not None:
            shares[:, column] = torch.where(settled, 1.0, probabilities)
        if ending is not None:
            tokens = torch.where(ended, ending.fill, tokens)
            ended = ended | (tokens == ending.stop) & ~settled
        if own is not None:
            tokens = torch.where(own[:, column], sequence[:, column], tokens)
        sequence[:, column] = tokens
        if callback is not None:
            callback(column, tokens)
        if ending is not None:
            over = ended.tolist()
            if all(over):
                _fill(sequence, column + 1, own, ending.fill)
                break
    _refuse_failed(failed, T)


def _fill(sequence: Tensor, first: int, own: Tensor | None, token: int) -> None:
    """Write ``token`` into the columns from ``first`` on, but for the tokens of the rows' own."""
    rest = sequence[:, first:]
    rest[...] = token if own is None else torch.where(own[:, first:], rest, token)


def _looks_at_once(sequence: Tensor) -> bool:
    return sequence.is_cpu


def _look(largest: Tensor, settled: Tensor, failed: Tensor, column: int, at_once: bool) -> Tensor:
    """Add a column to the (B,) first ``failed`` ones where the largest logit of a drawn row is not finite."""
    # What is not finite has no difference of zero from itself. A CPU mostly needs no more than this look.
    if at_once and bool((largest - largest == 0).all()):
        return failed
    return torch.where(largest.isfinite() | settled, failed, failed.clamp_max(column))


def _refuse_failed(failed: Tensor, length: int) -> None:
    """Refuse (B,) columns whose logits no token could be drawn from, unless all are ``length``."""
    column = int(failed.min()) if len(failed) else length
    if column < length:
        row = int(failed.argmin())
        expected = "finite, or -inf for some tokens, to draw from"
        cure = "generate in float32 or look for NaN in the weights"
        require(False, "logits", expected, f"NaN, +inf or only -inf about token {column} of row {row}; {cure}")
