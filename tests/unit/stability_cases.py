"""Tokenizers whose stability is known, and an oracle that counts position by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "K",
    "Oracle",
    "S",
    "cell_images",
    "decode",
    "encode",
    "moved",
    "permuting",
    "planted",
    "spoilt",
    "tokens_of",
]

K, S = 16, 4
"""Codes, and pixels per token, of the tokenizers here."""


def cell_images(tokens: Tensor, channels: int = 1) -> Tensor:
    """(B, h, w) tokens to (B, C, s·h, s·w) images: each cell has the one level of its code, -1 for code 0."""
    levels = tokens.float() * (2 / (K - 1)) - 1
    cells = levels.repeat_interleave(S, -2).repeat_interleave(S, -1)
    return cells[:, None].expand(-1, channels, -1, -1).contiguous()


decode = cell_images


def encode(images: Tensor) -> Tensor:
    """The nearest level of the mean over a cell: undoes ``decode`` exactly, whatever moves by whole cells."""
    means = torch.nn.functional.avg_pool2d(images.float().mean(1, keepdim=True), S)[:, 0]
    return ((means + 1) * ((K - 1) / 2)).round().clamp(0, K - 1).long()


def tokens_of(count: int, *, grid: tuple[int, int] = (4, 5), seed: int = 0) -> Tensor:
    """Random tokens; a third of them show ground."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, K, (count, *grid), generator=generator)
    return tokens * (torch.rand(tokens.shape, generator=generator) > 1 / 3)


def planted(places: Tensor) -> Callable[[Tensor], Tensor]:
    """A decoder that changes the code at ``places``, (B, h, w) bool, of every batch by one."""
    return lambda tokens: cell_images(torch.where(places[: len(tokens)], (tokens + 1) % K, tokens))


def permuting(order: Tensor) -> Callable[[Tensor], Tensor]:
    """A decoder that shows another code in place of each."""
    return lambda tokens: cell_images(order[tokens])


def spoilt(images: Tensor) -> Tensor:
    """An encoder that is right for most codes, wrong for some, and depends on neighbours."""
    tokens = encode(images)
    right = torch.roll(tokens, 1, -1)
    return torch.where((tokens + right) % 3 == 0, (tokens * 7 + right) % K, tokens)


def moved(image: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens of one image go, and which places count, written down position by position."""
    h, w = image.shape
    result, valid = np.full((h, w), -1), np.zeros((h, w), dtype=bool)
    for row in range(h):
        for column in range(w):
            # name -> where the token at this place comes from; None where nothing does
            source: tuple[int, int] | None = {
                "identity": (row, column),
                "shift (1, -2) tokens": ((row - 1) % h, (column + 2) % w),
                "shift (0, 1) tokens, replicate": (row, column - 1) if column >= 1 else None,
                "shift (-1, 3) px": (row, (column - 1) % w),
                "shift (3, 0) px, replicate": (row - 1, column) if row >= 1 else None,
                "crop 0.5 and place back": (row, column) if row in (1, 2) and column in (2,) else None,
                "flip horizontal": (row, w - 1 - column),
                "flip vertical": (h - 1 - row, column),
            }[name]
            if source is not None:
                result[row, column], valid[row, column] = image[source], True
    return result, valid


@dataclass
class Oracle:
    """Pairs of one transform and cycle, image by image, in numpy."""

    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, expected: np.ndarray, actual: np.ndarray, mask: np.ndarray) -> None:
        """Take in one more image."""
        self.pairs.append((expected[mask], actual[mask]))

    def rate_and_kappa(self, images: Sequence[int] | None = None) -> tuple[float, float]:
        """Pool the images, which may repeat."""
        chosen = range(len(self.pairs)) if images is None else images
        a = np.concatenate([self.pairs[i][0] for i in chosen])
        b = np.concatenate([self.pairs[i][1] for i in chosen])
        if len(a) == 0:
            return math.nan, math.nan
        rate = float(np.mean(a == b))
        chance = sum(float(np.mean(a == code)) * float(np.mean(b == code)) for code in range(K))
        return rate, (rate - chance) / (1 - chance)

    def whole(self, images: Sequence[int] | None = None) -> float:
        """Share of images without a difference."""
        chosen = range(len(self.pairs)) if images is None else images
        return float(np.mean([np.array_equal(*self.pairs[i]) for i in chosen]))
