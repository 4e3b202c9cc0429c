"""How often two token grids agree, and how much of that chance alone would give.

Counts are integers and pooled over everything compared, so a result does not depend on how images were
split into batches.

Shape letters: B batch, C channels, H W pixels, h w token grid, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from te_quant._checks import (
    require,
    require_floating,
    require_int,
    require_integer_tensor,
    require_mask,
    require_rank,
)
from te_quant._measuring.bootstrap import NO_INTERVAL, Interval
from te_quant._measuring.calls import call_unchanged
from te_quant._measuring.data_range import (
    DEFAULT_RANGE,
    DataRange,
    checked_range,
    ground_and_tau,
    require_within,
)
from te_quant._measuring.text import UNDEFINED, with_interval
from te_quant._values import require_in_range
from te_quant.tables import Table, Tabular

__all__ = [
    "CHANCE_GAP",
    "Agreement",
    "PairCounts",
    "checked_tokens",
    "count_pairs",
    "foreground_tokens",
    "mark_foreground",
    "require_repeatable",
    "tokens_of",
]

# Below this 1 - P_e is rounding error: with n pooled tokens the smallest non-zero value is about 1/n.
CHANCE_GAP = 1e-12
# Share of tokens that may differ when the same images are tokenized twice: kernels may sum in any order.
_MOST_DIFFERING = 0.01


@dataclass(frozen=True)
class Agreement(Tabular):
    """A rate of equal indices next to the rate that chance would give.

    Attributes:
        rate: share of equal indices A, in [0, 1]; NaN where no token was compared.
        kappa: Cohen's κ = (A - P_e) / (1 - P_e), at most 1, about 0 for unrelated tokens; NaN
            where undefined.
        kappa_defined: False where 1 - P_e vanishes (all compared tokens are one code) or no token was
            compared. A collapsed codebook agrees perfectly: this flag says that it means nothing.
        tokens: number of token pairs compared.
        chance: P_e = Σ_c p_c q_c from the marginal code frequencies of the two sides; NaN without tokens.
        rate_interval: 95 % confidence interval (low, high) of the rate, by percentile bootstrap over images. NaN
            where it was not asked for or cannot be known: one image, or nothing compared. It has no width where
            no two indices differed, which is no proof that none ever will.
        kappa_interval: the same of κ, with the marginal frequencies formed anew in every resample; resamples that
            leave κ undefined are left out. NaN in the maps by shift, which keep only pooled frequencies.

    Example:
        >>> first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0])
        >>> print(count_pairs(first, second, num_codes=2).agreement())
         rate      κ  chance  differing  token pairs
        -----  -----  ------  ---------  -----------
        0.750  0.500   0.500          1            4

    Source: Cohen 1960, "A coefficient of agreement for nominal scales"; Efron 1979 for the bootstrap. Whole images
        are drawn, because the tokens of one image are not independent.
    """

    rate: float
    kappa: float
    kappa_defined: bool
    tokens: int
    chance: float
    rate_interval: Interval = NO_INTERVAL
    kappa_interval: Interval = NO_INTERVAL

    @property
    def differing(self) -> int:
        """How many of the compared pairs differ, exactly."""
        return 0 if self.tokens == 0 else self.tokens - round(self.rate * self.tokens)

    def rate_text(self) -> str:
        """Write the rate with its interval."""
        return with_interval(self.rate, self.rate_interval)

    def kappa_text(self) -> str:
        """Write κ with its interval, or that it is undefined because only one code was compared."""
        return with_interval(self.kappa, self.kappa_interval) if self.kappa_defined else UNDEFINED

    def summary(self) -> Table:
        """Return the rate, κ, what chance gives, and the counts behind them."""
        cells = [self.rate_text(), self.kappa_text(), f"{self.chance:.3f}", f"{self.differing:,}"]
        header = ["rate", "κ", "chance", "differing", "token pairs"]
        return Table(header, [[*cells, f"{self.tokens:,}"]], "rrrrr")


@dataclass(frozen=True)
class PairCounts:
    """Sums behind an :class:`Agreement`; add two to pool them.

    Attributes:
        equal: number of pairs with equal indices.
        first: how often each code occurs on the side of x.
        second: how often each code occurs on the side of the shifted x.

    Shape:
        first, second: (K,) int64, equal sums.
    """

    equal: int
    first: Tensor
    second: Tensor

    @classmethod
    def zero(cls, num_codes: int) -> PairCounts:
        """Start a sum: nothing compared yet."""
        num_codes = require_int("num_codes", num_codes, 1)
        empty = torch.zeros(num_codes, dtype=torch.int64, device="cpu")
        return cls(0, empty, empty)

    def __add__(self, other: PairCounts) -> PairCounts:
        """Pool two sets of pairs.

        Raises:
            ValueError: they have other numbers of codes.
        """
        fits = other.first.shape == self.first.shape
        require(fits, "other", f"of num_codes={len(self.first)}", len(other.first))
        return PairCounts(self.equal + other.equal, self.first + other.first, self.second + other.second)

    def agreement(self, *, symmetric: bool = False) -> Agreement:
        """Compute the rate, and κ where it is defined.

        Args:
            symmetric: neither side is the reference; count every pair in both orders, so that κ does not
                depend on which member was called the first. The rate is the same either way.
        """
        tokens = int(self.first.sum())
        if tokens == 0:
            return Agreement(math.nan, math.nan, False, 0, math.nan)
        rate = self.equal / tokens
        # float64: the product of two counts may leave int64.
        p, q = self.first.double() / tokens, self.second.double() / tokens
        if symmetric:
            p = q = (p + q) / 2
        chance = float((p * q).sum())
        if 1.0 - chance <= CHANCE_GAP:
            return Agreement(rate, math.nan, False, tokens, chance)
        return Agreement(rate, (rate - chance) / (1.0 - chance), True, tokens, chance)


def count_pairs(first: Tensor, second: Tensor, num_codes: int, mask: Tensor | None = None) -> PairCounts:
    """Count equal indices at equal positions.

    Args:
        first: indices of x.
        second: indices of the shifted x, aligned with ``first``.
        num_codes: K; all indices that count lie in [0, K).
        mask: True where a position counts; None counts all.

    Shape:
        first, second: one shape, integer. mask: the same, bool.

    Raises:
        ValueError: shapes differ, or an index that counts lies outside [0, K).
        TypeError: the indices are not integer, or the mask is not bool.

    Example:
        >>> count_pairs(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), num_codes=2).equal
        2
    """
    require_integer_tensor("first", first)
    require_integer_tensor("second", second)
    require(second.shape == first.shape, "second", f"of shape {tuple(first.shape)}", tuple(second.shape))
    num_codes = require_int("num_codes", num_codes, 1)
    if mask is not None:
        require_mask("mask", mask, first.shape, first.device, "first")
        first, second = first[mask], second[mask]
    # Not every unsigned dtype can be counted.
    first = require_in_range("first", first.long(), num_codes, "num_codes")
    second = require_in_range("second", second.long(), num_codes, "num_codes")
    return PairCounts(
        int((first == second).sum()),
        torch.bincount(first.reshape(-1), minlength=num_codes).cpu(),
        torch.bincount(second.reshape(-1), minlength=num_codes).cpu(),
    )


def foreground_tokens(
    images: Tensor,
    *,
    stride: int,
    ground: float | None = None,
    tau: float | None = None,
    data_range: DataRange = DEFAULT_RANGE,
) -> Tensor:
    """Mark the tokens whose pixel cell shows more than ground.

    Args:
        images: in ``data_range``.
        stride: s, pixels per token; the cell of token (a, b) is the s x s square at (s·a, s·b).
        ground: value of the ground, in the unit of ``images``. None: the low end of ``data_range``.
        tau: τ, a cell is foreground when any pixel of any channel differs from the ground by more. None: a
            twentieth of ``data_range``, which is 0.1 for [-1, 1].
        data_range: (low, high) of the pixel values.

    Shape:
        images: (B, C, H, W), H and W multiples of s. Returns (B, H/s, W/s) bool.

    Example:
        >>> images = torch.full((1, 1, 4, 4), -1.0)
        >>> images[0, 0, 3, 0] = 1.0
        >>> foreground_tokens(images, stride=2).tolist()
        [[[False, False], [True, False]]]

    Raises:
        ValueError: sides, options or values do not fit; values may leave ``data_range`` by a quarter of it.
        TypeError: the images are not floating point.
    """
    require_rank("images", images, (4,), "(B, C, H, W)")
    require_floating("images", images)
    data_range = checked_range(data_range)
    ground, tau = ground_and_tau(data_range, ground, tau)
    if images.numel() > 0:
        require_within("images", images, data_range)
    return mark_foreground(images, stride=stride, ground=ground, tau=tau)


def mark_foreground(images: Tensor, *, stride: int, ground: float, tau: float) -> Tensor:
    """Mark the same without looking at the range of the values; see :func:`foreground_tokens`."""
    stride = require_int("stride", stride, 1)
    height, width = images.shape[-2:]
    divisible = height % stride == 0 and width % stride == 0
    require(divisible, "images sides", f"multiples of stride={stride}", (height, width))
    difference = (images - ground).abs().amax(dim=1, keepdim=True)
    return max_pool2d(difference, stride)[:, 0] > tau


def tokens_of(
    tokenize: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    grid: tuple[int, int],
    num_codes: int,
    name: str = "tokenize",
    argument: str = "images",
) -> Tensor:
    """Call a stranger's tokenizer and refuse anything but a grid of indices in [0, K).

    Args:
        tokenize: any callable; ``images`` is its one argument.
        images: batch first.
        grid: (h, w) the indices must have.
        num_codes: number of codes, K.
        name: what errors call the callable.
        argument: what they call its argument.

    Shape:
        images: (B, ...). Returns (B, h, w) int64 on the device of ``images``.
    """
    return checked_tokens(
        call_unchanged(name, tokenize, images), images, grid=grid, num_codes=num_codes, label=f"{name}({argument})"
    )


def checked_tokens(
    indices: Tensor, images: Tensor, *, grid: tuple[int, int], num_codes: int, label: str
) -> Tensor:
    """Refuse anything but a grid of indices in [0, K); see :func:`tokens_of`."""
    require_integer_tensor(label, indices)
    expected = (images.shape[0], *grid)
    require(tuple(indices.shape) == expected, label, f"of shape {expected}", f"shape {tuple(indices.shape)}")
    # Unsigned integers of more than 8 bits have no minimum.
    indices = indices.to(device=images.device, dtype=torch.int64)
    if indices.numel() > 0:
        low, high = int(indices.min()), int(indices.max())
        inside = low >= 0 and high < num_codes
        require(inside, label, f"indices in [0, num_codes={num_codes})", f"values from {low} to {high}")
    return indices


def require_repeatable(name: str, tokenize: Callable[[Tensor], Tensor], images: Tensor, tokens: Tensor) -> None:
    """Refuse a tokenizer that draws random numbers or learns while it is measured; calls it once.

    Args:
        name: what the error calls it.
        tokenize: images -> indices.
        images: what it has tokenized before.
        tokens: what it returned then.
    """
    again = call_unchanged(name, tokenize, images).to(tokens)
    differing = int((again != tokens).sum()) if again.shape == tokens.shape else tokens.numel()
    require(
        differing <= _MOST_DIFFERING * tokens.numel(),
        name,
        "the same for the same images; call model.eval() first",
        f"other indices for {differing:,} of {tokens.numel():,} tokens",
    )
