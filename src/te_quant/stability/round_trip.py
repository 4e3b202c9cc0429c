"""Decode, change and encode again: the tokens that come back, and where they should be.

Shape letters: B batch, C channels, H W pixels, h w token grid, s stride, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from te_quant._checks import require, require_floating, require_integer_tensor, require_rank
from te_quant._measuring.calls import call_unchanged
from te_quant._measuring.data_range import DataRange
from te_quant._values import require_finite, require_in_range
from te_quant.stability.transforms import Transform, apply_transform, move, valid

__all__ = ["ImageMap", "RoundTrip", "decoded", "first_tokens", "passes", "round_trips"]

ImageMap = Callable[[Tensor], Tensor]


class RoundTrip(NamedTuple):
    """One cycle of one transform on one batch.

    Attributes:
        transform: which one, counted from 0.
        cycle: counted from 1.
        expected: the first tokens, moved once per cycle.
        before: the tokens of the cycle before, moved once.
        after: the tokens that came back.
        foreground: the mask of the first tokens, moved once per cycle.
        valid: True for the tokens that count.

    Shape:
        expected, before, after, foreground: (B, h, w). valid: (h, w) bool.
    """

    transform: int
    cycle: int
    expected: Tensor
    before: Tensor
    after: Tensor
    foreground: Tensor
    valid: Tensor


def passes(transforms: Sequence[Transform], cycles: int, *, from_images: bool) -> int:
    """Return how often one batch goes through the encoder or the decoder."""
    return from_images + 1 + len(transforms) * (2 * cycles - 1)


def first_tokens(encode: ImageMap, images: Tensor, num_codes: int | None) -> tuple[Tensor, int]:
    """Encode images; returns the tokens and the stride, which follows from both shapes."""
    label = "encode(images)"
    tokens = call_unchanged("encode", encode, images)
    require_integer_tensor(label, tokens)
    require_rank(label, tokens, (3,), "(B, h, w), one index per token")
    return _checked(label, tokens, images, (tokens.shape[1], tokens.shape[2]), num_codes), _stride(
        label, images, tokens
    )


def decoded(decode: ImageMap, tokens: Tensor, images: Tensor | None) -> tuple[Tensor, int]:
    """Decode tokens, into the shape of ``images`` if given; returns the images and the stride."""
    label = "decode(indices)"
    result = call_unchanged("decode", decode, tokens)
    require_floating(label, result)
    require_rank(label, result, (4,), "(B, C, H, W)")
    expected = (len(tokens), *result.shape[1:]) if images is None else tuple(images.shape)
    require(tuple(result.shape) == expected, label, f"of shape {expected}", f"shape {tuple(result.shape)}")
    return require_finite(label, result), _stride(label, result, tokens)


def round_trips(
    encode: ImageMap,
    decode: ImageMap,
    tokens: Tensor,
    images: Tensor,
    foreground: Tensor,
    *,
    transforms: Sequence[Transform],
    cycles: int,
    num_codes: int | None,
    data_range: DataRange,
) -> Iterator[RoundTrip]:
    """Run every transform for every cycle.

    Args:
        encode: images -> indices.
        decode: indices -> images.
        tokens: where all cycles begin.
        images: what ``decode`` makes of them.
        foreground: True where a token shows more than ground.
        transforms: at least one.
        cycles: at least 1.
        num_codes: K, if known.
        data_range: (low, high) of the pixel values.

    Shape:
        tokens, foreground: (B, h, w). images: (B, C, H, W).
    """
    grid = (tokens.shape[1], tokens.shape[2])
    stride = images.shape[-1] // grid[1]
    # Asked first, so that nothing is computed for nothing.
    counting = [valid(transform, grid, stride=stride).to(tokens.device) for transform in transforms]
    for number, (transform, here) in enumerate(zip(transforms, counting, strict=True)):
        shown, expected, marked, current, mask = images, tokens, foreground, tokens, here
        for cycle in range(1, cycles + 1):
            if cycle > 1:
                shown, _ = decoded(decode, current, images)
                mask = here & move(transform, mask, stride=stride)
                label = f"valid_tokens of {transform.name!r}"
                require(bool(mask.any()), label, f"True for some token after {cycle} cycles", "none")
            changed = apply_transform(transform, shown, stride=stride, data_range=data_range)
            after = call_unchanged("encode", encode, changed)
            after = _checked("encode(images)", after, changed, grid, num_codes).to(tokens.device)
            before = move(transform, current, stride=stride)
            expected, marked = (move(transform, part, stride=stride) for part in (expected, marked))
            yield RoundTrip(number, cycle, expected, before, after, marked, mask)
            current = after


def _checked(label: str, tokens: Tensor, images: Tensor, grid: tuple[int, int], num_codes: int | None) -> Tensor:
    require_integer_tensor(label, tokens)
    expected = (len(images), *grid)
    require(tuple(tokens.shape) == expected, label, f"of shape {expected}", f"shape {tuple(tokens.shape)}")
    stop, name = (2**31, "2**31") if num_codes is None else (num_codes, "num_codes")
    return require_in_range(label, tokens.to(torch.int64), stop, name)


def _stride(label: str, images: Tensor, tokens: Tensor) -> int:
    """Refuse a grid that does not divide the images into squares, and return their side."""
    (height, width), (rows, columns) = images.shape[-2:], tokens.shape[-2:]
    divides = rows > 0 and columns > 0 and height % rows == 0 and width % columns == 0
    fits = divides and height // rows == width // columns
    require(fits, label, f"one token per square of {height}x{width} pixels", f"a grid of {rows}x{columns}")
    return int(height // rows)
