"""The placement metric of the paper's authors: one digit at five places, ten pairs of token blocks.

All offsets are multiples of a quarter of the canvas, hence of the stride. Decimation commutes with such
shifts, so this metric **cannot see aliasing**; it sees padding, normalization statistics, attention,
near-ties and codebook collapse. Read it beside the sub-stride agreement.

Shape letters: B batch, C channels, S side of the canvas, s stride, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from te_quant._checks import require, require_floating, require_int, require_rank
from te_quant._measuring.bootstrap import Resamples
from te_quant._measuring.data_range import (
    DEFAULT_RANGE,
    DataRange,
    checked_range,
    ground_and_tau,
    require_within,
    warn_of_another_range,
)
from te_quant.equivariance.metrics.agreement import Agreement, mark_foreground, require_repeatable, tokens_of
from te_quant.equivariance.metrics.pair_tally import PairTally
from te_quant.shifts import Shift, place

__all__ = ["paste_sprites", "place_sprites", "placement_agreement", "placement_offsets", "placement_pairs"]


def placement_offsets(canvas_size: int) -> tuple[Shift, ...]:
    """Return the five (top, left) offsets in pixels: four quadrants in reading order, then the centre.

    Args:
        canvas_size: S in pixels.

    Example:
        >>> placement_offsets(64)
        ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16))
    """
    half, quarter = canvas_size // 2, canvas_size // 4
    return (0, 0), (0, half), (half, 0), (half, half), (quarter, quarter)


def place_sprites(
    sprites: Tensor,
    *,
    canvas_size: int,
    stride: int,
    ground: float | None = None,
    data_range: DataRange = DEFAULT_RANGE,
) -> Tensor:
    """Paste every sprite at each of the five placements.

    Args:
        sprites: in ``data_range``, half as wide and high as the canvas.
        canvas_size: S in pixels; S/4 must be a multiple of the stride, so that tokens align.
        stride: s, pixels per token.
        ground: value of the canvas around the sprite. None: the low end of ``data_range``.
        data_range: (low, high) of the pixel values.

    Shape:
        sprites: (B, C, S/2, S/2). Returns (5, B, C, S, S).

    Raises:
        ValueError: S/4 is no multiple of s, the sprites are not S/2 wide and high, or values leave
            ``data_range`` by more than a quarter of it.
    """
    _require_placeable(sprites, canvas_size, stride)
    data_range = checked_range(data_range)
    ground, _ = ground_and_tau(data_range, ground, None)
    if sprites.numel() > 0:
        require_within("sprites", sprites, data_range)
    return paste_sprites(sprites, canvas_size=canvas_size, ground=ground)


def paste_sprites(sprites: Tensor, *, canvas_size: int, ground: float) -> Tensor:
    """Paste them without looking at sizes and values; see :func:`place_sprites`."""
    size = (canvas_size, canvas_size)
    return torch.stack([place(sprites, o, size=size, fill=ground) for o in placement_offsets(canvas_size)])


def _require_placeable(sprites: Tensor, canvas_size: int, stride: int) -> None:
    require_rank("sprites", sprites, (4,), "(B, C, S/2, S/2)")
    require_floating("sprites", sprites)
    stride = require_int("stride", stride, 1)
    canvas_size = require_int("canvas_size", canvas_size, 4)
    aligned = canvas_size % (4 * stride) == 0
    step = 4 * stride
    cure = f"{canvas_size}; pad the sprites to {-(-canvas_size // step) * step // 2} pixels of ground"
    require(aligned, "canvas_size", f"a multiple of 4 * stride = {step}", cure)
    half = canvas_size // 2
    sides = tuple(sprites.shape[-2:])
    require(sides == (half, half), "sprites", f"of shape (B, C, {half}, {half})", f"shape {tuple(sprites.shape)}")


def placement_pairs(indices: Tensor, *, stride: int) -> tuple[Tensor, Tensor]:
    """Cut the five token blocks and pair them in all ten ways; neither side of a pair is the reference.

    Args:
        indices: tokens of the five canvases, in the order of :func:`placement_offsets`.
        stride: s, pixels per token.

    Shape:
        indices: (5, B, S/s, S/s). Returns two of (B, 10, S/(2s), S/(2s)).
    """
    grid = indices.shape[-1]
    block = grid // 2
    corners = [(top // stride, left // stride) for top, left in placement_offsets(grid * stride)]
    blocks = [
        placed[:, top : top + block, left : left + block]
        for placed, (top, left) in zip(indices, corners, strict=True)
    ]
    first, second = zip(*combinations(blocks, 2), strict=True)
    return torch.stack(first, dim=1), torch.stack(second, dim=1)


@torch.no_grad()
def placement_agreement(
    tokenize: Callable[[Tensor], Tensor],
    sprites: Tensor,
    *,
    canvas_size: int,
    stride: int,
    num_codes: int,
    ground: float | None = None,
    tau: float | None = None,
    data_range: DataRange = DEFAULT_RANGE,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Measure the paper's placement metric: one digit encoded at five places, equal indices over ten pairs.

    Args:
        tokenize: images -> indices; set your model to evaluation mode first.
        sprites: in ``data_range``.
        canvas_size: S in pixels, a multiple of 4·s.
        stride: s, pixels per token.
        num_codes: number of codes, K.
        ground: value of the canvas around the sprite; a warning says where no sprite contains it. None: the low
            end of ``data_range``.
        tau: None compares all tokens of the blocks, as the authors do; a number only those whose pixels
            differ from the ground by more.
        data_range: (low, high) of the pixel values; those clearly outside are refused.
        batch_size: images per call.
        resamples: how often the sprites are resampled for the intervals; 0 for none.
        seed: of the resampling.

    Shape:
        sprites: (B, C, S/2, S/2). tokenize: (N, C, S, S) -> (N, S/s, S/s) integer.

    Example:
        >>> sprites = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
        >>> tokenize = lambda images: (images[:, 0, ::4, ::4] > 0).long()
        >>> placement_agreement(tokenize, sprites, canvas_size=16, stride=4, num_codes=2).rate
        1.0

    Raises:
        ValueError: S/4 is no multiple of s, the sprites are not S/2 wide and high, values leave ``data_range`` by
            more than a quarter of it, or ``tokenize`` returns another shape, indices outside [0, K), or other
            indices for the same images; the first batch is tokenized once more to see that.

    Source: evaluation code of Shin et al. 2021, arXiv:2112.00384. Differs: κ is ours, with
        every pair counted in both orders, since no placement is the reference.
    """
    batch_size = require_int("batch_size", batch_size, 1)
    num_codes = require_int("num_codes", num_codes, 1)
    data_range = checked_range(data_range)
    ground, tolerance = ground_and_tau(data_range, ground, tau)
    _require_placeable(sprites, canvas_size, stride)
    drawn = Resamples(len(sprites), resamples, seed)
    if sprites.numel() > 0:
        # The decorator above is one more frame.
        warn_of_another_range("sprites", sprites, data_range, ground=ground, tau=tolerance, stacklevel=3)
    tally, checked = PairTally(num_codes), False
    for batch in torch.split(sprites, batch_size):
        canvases = paste_sprites(batch, canvas_size=canvas_size, ground=ground)
        grid = (canvas_size // stride, canvas_size // stride)
        indices = []
        for placed in canvases:
            indices.append(tokens_of(tokenize, placed, grid=grid, num_codes=num_codes))
            if not checked:
                require_repeatable("tokenize", tokenize, placed, indices[0])
                checked = True
        first, second = placement_pairs(torch.stack(indices), stride=stride)
        mask = None if tau is None else mark_foreground(batch, stride=stride, ground=ground, tau=tolerance)
        tally.add(first, second, None if mask is None else mask.unsqueeze(1).expand_as(first))
        tally.close()
    return tally.agreement(drawn, symmetric=True)
