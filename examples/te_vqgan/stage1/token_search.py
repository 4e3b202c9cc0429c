"""The tokens of an image by search, so that its picture is better and reads back as the same tokens.

Shape letters: B images, C channels, H W pixels, h w token grid, K codes, D code size, L downsamplings,
M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.stage1.joint import vector_quantizer
from examples.te_vqgan.stage1.round_trip import Tokens, read, rounded
from te_quant import VQAutoencoder

__all__ = ["PENALTIES", "search_tokens"]

PENALTIES = (0.003, 0.012, 0.05, 0.2)
"""Of a picture none of whose tokens come back, in units of the squared error of pixels in [-1, 1]."""

# What two codes at the mean squared distance of two codes are assumed to add to the error, beyond the slope.
_CURVATURE = 1e-3
# Tokens that did not come back which are tried one by one.
_ADOPTED = 8
_READINGS = 8


class _Found(NamedTuple):
    """Tokens with what they cost.

    Attributes:
        indices: (B, h, w).
        costs: (B,), squared error plus penalty.
        again: (B, h, w), the tokens of the picture of ``indices``.
    """

    indices: Tensor
    costs: Tensor
    again: Tensor


def search_tokens(
    model: VQAutoencoder,
    images: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    candidates: int = 24,
    max_steps: int = 100,
) -> Tokens:
    """Return tokens whose picture is near the image and reads back as the same tokens.

    The search starts at what the encoder says and changes one token at a time, as long as that lowers

        mean squared error of the 8-bit picture + penalty · share of its tokens that the encoder reads differently.

    A picture whose own tokens all come back has the cost 0 there, and the encoder starts at them: so it is read
    back whole. Every step is the same for every image of a batch and at every place, so what the encoder is
    equivariant to, the search is too.

    In each step these changes of one token are tried: the ``candidates`` that promise most by the slope of the
    error, as many at and next to the tokens that did not come back, and that each of these becomes what it was
    read as. At the end the picture is encoded and decoded eight times, and the cheapest tokens of these are taken.

    Args:
        model: in evaluation mode; the phases that its encoder chooses are kept.
        images: in [-1, 1].
        penalties: one after the other; each search goes on where that before it ended.
        candidates: decoded in each step, for each image.
        max_steps: changed tokens for each penalty.

    Shape:
        images: (B, C, H, W). Returns indices (B, h, w) and phases (B, L, 2).

    Source: Schroeder and Atal 1985, "Code-excited linear prediction", which chooses codes by what they decode to.
        The penalty is ours.
    """
    codes = vector_quantizer(model).codebook.detach()
    spread = torch.cdist(codes, codes).square().mean()
    with torch.no_grad():
        start = read(model, images)
    indices = start.indices.clone()
    for penalty in penalties:
        going = torch.arange(len(images), device=images.device)
        found = _cost(model, indices, start.phases, images, penalty)
        for _ in range(max_steps):
            if len(going) == 0:
                break
            some, phases = images[going], start.phases[going]
            changed, worth = _changes(model, found, phases, some, codes, spread, candidates)
            best = _best(model, changed, worth, phases, some, penalty, found.costs)
            better = best.costs < found.costs
            indices[going[better]] = best.indices[better]
            going = going[better]
            found = _Found(*(part[better] for part in best))
    _settle(model, indices, start.phases, images, penalties[-1])
    return Tokens(indices, start.phases)


def _errors(pictures: Tensor, images: Tensor) -> Tensor:
    return (pictures - images).square().flatten(1).mean(1)


def _pictures(model: VQAutoencoder, indices: Tensor, phases: Tensor) -> Tensor:
    return rounded(model.decode_indices(indices, phases))


@torch.no_grad()
def _cost(
    model: VQAutoencoder,
    indices: Tensor,
    phases: Tensor,
    images: Tensor,
    penalty: float,
    below: Tensor | None = None,
) -> _Found:
    """Return what tokens cost; those that cost at least ``below`` may have a lower cost than theirs."""
    pictures = _pictures(model, indices, phases)
    costs = _errors(pictures, images).double()
    again = indices.clone()
    near = (
        torch.arange(len(images), device=images.device) if below is None else (costs < below).nonzero().squeeze(1)
    )
    if len(near):
        found = read(model, pictures[near])
        again[near] = found.indices
        lost = (found.indices != indices[near]).flatten(1).double().mean(1)
        costs[near] += penalty * (lost + (found.phases != phases[near]).flatten(1).any(1))
    return _Found(indices, costs, again)


def _settle(model: VQAutoencoder, indices: Tensor, phases: Tensor, images: Tensor, penalty: float) -> None:
    """Replace tokens by those of their picture, or of that of these and so on, where they cost least."""
    found = _cost(model, indices, phases, images, penalty)
    costs = found.costs
    for _ in range(_READINGS):
        found = _cost(model, found.again, phases, images, penalty)
        better = found.costs < costs
        indices[better] = found.indices[better]
        costs = torch.minimum(costs, found.costs)


def _changes(
    model: VQAutoencoder,
    found: _Found,
    phases: Tensor,
    images: Tensor,
    codes: Tensor,
    spread: Tensor,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Return (B, M, h, w), the tokens after each change, and (B, M), whether it is worth a try."""
    indices = found.indices
    with torch.enable_grad():
        quantized = F.embedding(indices, codes).movedim(-1, 1).requires_grad_(True)
        errors = _errors(model.decode(quantized, phases).clamp(-1, 1), images)
        (slope,) = torch.autograd.grad(errors.sum(), quantized)
    with torch.no_grad():
        present, slope = quantized.movedim(1, -1), slope.movedim(1, -1)
        distances = present.square().sum(-1, keepdim=True) - 2 * present @ codes.T + codes.square().sum(1)
        expected = slope @ codes.T - (slope * present).sum(-1, keepdim=True)
        expected = (expected + _CURVATURE / spread * distances).scatter(3, indices.unsqueeze(3), torch.inf)
        # Each token that did not come back becomes what it was read as, those first whose codes are nearest.
        lost = found.again != indices
        gaps = distances.gather(3, found.again.unsqueeze(3)).squeeze(3).masked_fill(~lost, torch.inf)
        gaps, cells = gaps.flatten(1).topk(min(_ADOPTED, lost[0].numel()), largest=False)
        adopted = cells * len(codes) + found.again.flatten(1).gather(1, cells)
        # Others at these tokens and next to them may bring them back.
        around = F.pad(lost.to(expected.dtype), (1, 1, 1, 1), mode="circular")
        near = F.max_pool2d(around, 3, stride=1).unsqueeze(-1) > 0
        first, second = (
            scores.flatten(1).topk(candidates, largest=False)
            for scores in (expected, expected.masked_fill(~near, torch.inf))
        )
        places = torch.cat([first.indices, second.indices, adopted], 1)
        worth = torch.cat([first.values, second.values, gaps], 1) < torch.inf
        changed = indices.flatten(1).unsqueeze(1).repeat(1, places.shape[1], 1)
        changed.scatter_(2, (places // len(codes)).unsqueeze(2), (places % len(codes)).unsqueeze(2))
        # All of them at once.
        changed = torch.cat([changed.view(*places.shape, *indices.shape[1:]), found.again.unsqueeze(1)], 1)
        return changed, torch.cat([worth, lost.flatten(1).any(1, keepdim=True)], 1)


@torch.no_grad()
def _best(
    model: VQAutoencoder,
    changed: Tensor,
    worth: Tensor,
    phases: Tensor,
    images: Tensor,
    penalty: float,
    below: Tensor,
) -> _Found:
    """Return the cheapest of the changes of each image; only those below the present cost are read back."""
    image, change = worth.nonzero().unbind(1)
    found = _cost(model, changed[image, change], phases[image], images[image], penalty, below[image])
    costs = torch.full_like(worth, torch.inf, dtype=found.costs.dtype)
    costs[image, change] = found.costs
    costs, choice = costs.min(1)
    row = torch.empty_like(worth, dtype=torch.int64)
    row[image, change] = torch.arange(len(image), device=row.device)
    chosen = row.gather(1, choice.unsqueeze(1)).squeeze(1)
    return _Found(found.indices[chosen], costs, found.again[chosen])
