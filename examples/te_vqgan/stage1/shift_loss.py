"""A loss that makes tokens follow their pixels, for shifts by whole tokens and by less.

Shape letters: B images, C channels, H W pixels, D code size, K codes, h w token grid, s stride.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.stage1.wanted_codes import wanted_code_loss
from te_quant import VQAutoencoder

__all__ = ["START", "Moves", "draw_moves", "roll_each", "shift_loss", "wanted_tokens"]

START = 0.1
"""The loss begins after this share of the steps: before, tokens say little."""

# All tokens count if an image is within this many pixels of a shift by whole tokens.
_NEAR = 1
_GROUND = -1.0
# Half of what separates two 8-bit levels.
_EQUAL = 1 / 255


class Moves(NamedTuple):
    """By how much each image of a batch is rolled, down and to the right.

    Attributes:
        tokens: (B, 2) whole tokens.
        pixels: (B, 2) pixels, in all.
    """

    tokens: Tensor
    pixels: Tensor


def draw_moves(count: int, side: int, stride: int, device: torch.device) -> Moves:
    """Draw a move for each image.

    In every other image each axis moves by half the side or not at all, which takes quadrants onto quadrants; the
    others move by any number of tokens. The second half of the images then moves by 1 to s - 1 pixels more. The
    tokens of a move are the nearest whole number of them; ties round down.

    Args:
        count: B.
        side: H = W.
        stride: s, at least 2.
        device: device of the result.
    """
    grid = side // stride
    tokens = torch.randint(grid, (count, 2), device=device)
    tokens[::2] = torch.randint(2, (len(tokens[::2]), 2), device=device) * (grid // 2)
    rest = torch.randint(1, stride, (count, 2), device=device)
    rest[: count // 2] = 0
    return Moves((tokens + (2 * rest > stride).long()) % grid, tokens * stride + rest)


def roll_each(images: Tensor, offsets: Tensor) -> Tensor:
    """Roll each image by its own offset.

    Shape:
        images: (B, ..., H, W). offsets: (B, 2), rows and columns. Returns images of the same shape.
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]) % height
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]) % width
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.movedim((0, -2, -1), (0, 1, 2))[batch, rows[:, :, None], columns[:, None]].movedim(
        (1, 2), (-2, -1)
    )


def wanted_tokens(images: Tensor, moves: Moves, stride: int) -> Tensor:
    """Say which tokens of rolled images should equal those of the images rolled by whole tokens.

    These are the tokens whose pixels are equal, and all tokens of an image within one pixel of such a roll. No
    token counts in an image whose digits are cut by the border.

    Shape:
        images: (B, C, H, W). Returns (B, h, w) bool.
    """
    side = images.shape[-1]
    change = (roll_each(images, moves.pixels) - roll_each(images, moves.tokens * stride)).abs()
    wanted = F.max_pool2d(change.amax(1, keepdim=True), stride).squeeze(1) < _EQUAL
    # Between -s/2 and s/2.
    apart = (moves.pixels - moves.tokens * stride + stride // 2) % side - stride // 2
    wanted |= (apart.abs() <= _NEAR).all(1)[:, None, None]
    drawn = (images != _GROUND).any(1)
    batch = torch.arange(len(images), device=images.device)
    rows, columns = ((side - moves.pixels) % side).unbind(1)
    cut = (drawn[batch, rows - 1] & drawn[batch, rows]).any(1) & (rows > 0)
    cut |= (drawn[batch, :, columns - 1] & drawn[batch, :, columns]).any(1) & (columns > 0)
    return wanted & ~cut[:, None, None]


def shift_loss(
    model: VQAutoencoder, images: Tensor, indices: Tensor, codebook: Tensor, *, margin: float
) -> Tensor:
    """Return the loss of latents of rolled images that should have the rolled tokens of the images.

    Only those tokens count that :func:`wanted_tokens` names.

    Args:
        model: the tokenizer; gradients reach its encoder.
        images: in [-1, 1]; -1 is the ground.
        indices: their tokens.
        codebook: the codes.
        margin: of :func:`~.wanted_codes.wanted_code_loss`.

    Shape:
        images: (B, C, H, W), H = W. indices: (B, h, w). codebook: (K, D). Result: ().
    """
    stride = model.config.stride
    moves = draw_moves(len(images), images.shape[-1], stride, images.device)
    latents = model.encode(roll_each(images, moves.pixels)).float()
    where = wanted_tokens(images, moves, stride)
    return wanted_code_loss(latents, codebook, roll_each(indices, moves.tokens), margin=margin, where=where)
