"""Search for tokens whose picture is close to the image and is read back, mostly, as the same tokens.

Shape letters: B images, C channels, H W pixels, h w token grid, K codes, D code size, L downsamplings,
R changes of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.stage1.joint import vector_quantizer
from examples.te_vqgan.stage1.round_trip import Tokens, encode_at, read, rounded
from examples.te_vqgan.stage1.wanted_codes import wanted_code_losses
from te_quant import VQAutoencoder

__all__ = ["PENALTIES", "search_tokens"]

PENALTIES = (0.003, 0.012, 0.04)
"""Of a picture none of whose tokens come back, in units of the squared error of pixels in [-1, 1]."""

# Squared error that is added, beyond the slope, for a change as large as the mean squared distance of two codes.
_CURVATURE = 1e-3
# Of the hinge in the slope.
_MARGIN = 0.02
# The slope promises more tokens back than a change of one code brings. This share of the promise counts.
_BELIEVED = 0.3
# Tokens that did not come back which are tried one by one.
_ADOPTED = 8
_READINGS = 4


class _Found(NamedTuple):
    """Tokens with what they cost.

    Attributes:
        indices: (B, h, w).
        costs: (B,), squared error plus penalty.
        again: (B, h, w), the tokens of the picture of ``indices``; ``indices`` where it was not read, or is
            sampled at other phases.
    """

    indices: Tensor
    costs: Tensor
    again: Tensor


def search_tokens(
    model: VQAutoencoder,
    images: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    candidates: int = 64,
    max_steps: int = 100,
) -> Tokens:
    """Search for tokens whose picture is close to the image and is read back, mostly, as the same tokens.

    The search starts at what the encoder says and changes one token at a time, as long as that lowers

        mean squared error of the 8-bit picture + penalty · share of its tokens that the encoder reads differently.

    A picture that is sampled at other phases has lost all its tokens. One that was decoded from tokens that come
    back has the cost 0 at these tokens; the search starts there and stays. Every step is the same for every image
    of a batch and at every place, so what the encoder is equivariant to, the search is too.

    Each step decodes these variants of each image: the ``candidates`` changes of one token that the slope of the
    cost favours; the eight tokens that were read differently whose codes are nearest to those that were read, each
    set to what was read; and all tokens as they were read. If none of them costs less and some tokens were read
    differently, all variants are encoded and decoded four times, and the cheapest tokens on the way are taken.

    The slope of the cost needs a smooth penalty. For each token that did not come back it is the hinge of
    :func:`~.wanted_codes.wanted_code_losses`, divided by its present value.

    Args:
        model: in evaluation mode; the phases that its encoder chooses are kept.
        images: in [-1, 1].
        penalties: one after the other; each search goes on where that before it ended.
        candidates: decoded in each step, for each image; so many pictures per image are in memory at once.
        max_steps: for each penalty.

    Raises:
        TypeError: the quantizer of the model is none with one codebook.
        ValueError: its metric is not "l2".

    Shape:
        images: (B, C, H, W). Returns indices (B, h, w) and phases (B, L, 2).

    Source: Schroeder and Atal 1985, "Code-excited linear prediction", which chooses codes by what they decode to.
        The penalty is ours.
    """
    quantizer = vector_quantizer(model)
    require(quantizer.metric == "l2", "model.quantizer.metric", '"l2"', repr(quantizer.metric))
    codes = quantizer.codebook.detach()
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
            best = _step(model, found, start.phases[going], images[going], codes, spread, penalty, candidates)
            better = best.costs < found.costs
            indices[going[better]] = best.indices[better]
            going = going[better]
            found = _Found(*(part[better] for part in best))
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
    """Return what tokens cost.

    Where the squared error alone reaches ``below``, the picture is not read, and the cost is that error.
    """
    pictures = _pictures(model, indices, phases)
    costs = _errors(pictures, images).double()
    again = indices.clone()
    near = (
        torch.arange(len(images), device=images.device) if below is None else (costs < below).nonzero().squeeze(1)
    )
    if len(near):
        found = read(model, pictures[near])
        # Tokens at other phases lie elsewhere, so none of them can be compared or taken.
        off = (found.phases != phases[near]).flatten(1).any(1)
        again[near] = torch.where(off.view(-1, 1, 1), indices[near], found.indices)
        lost = (found.indices != indices[near]).flatten(1).double().mean(1)
        costs[near] += penalty * torch.where(off, 1.0, lost)
    return _Found(indices, costs, again)


def _cheapest(found: _Found, owners: Tensor, count: int) -> _Found:
    """Return the first of the cheapest tokens of each of ``count`` owners, all of which have some."""
    order = torch.sort(found.costs, stable=True).indices
    places = torch.arange(len(order), device=order.device)
    first = torch.full((count,), len(order), device=order.device)
    chosen = order[first.scatter_reduce(0, owners[order], places, "amin")]
    return _Found(*(part[chosen] for part in found))


def _step(
    model: VQAutoencoder,
    found: _Found,
    phases: Tensor,
    images: Tensor,
    codes: Tensor,
    spread: Tensor,
    penalty: float,
    candidates: int,
) -> _Found:
    """Return the best change of each image, which may cost more than what it has."""
    changed, owners = _changes(model, found, phases, images, codes, spread, penalty, candidates)
    tried = _cost(model, changed, phases[owners], images[owners], penalty, found.costs[owners])
    best = _cheapest(tried, owners, len(images))
    # Where no change helps, what their pictures are read as may, which is several changes at once.
    lost = (found.again != found.indices).flatten(1).any(1)
    stuck = ((best.costs >= found.costs) & lost).nonzero().squeeze(1)
    if len(stuck):
        several = torch.isin(owners, stuck)
        owners = owners[several]
        tried = _cost(model, changed[several], phases[owners], images[owners], penalty)
        for _ in range(_READINGS):
            tried = _cost(model, tried.again, phases[owners], images[owners], penalty)
            number = torch.searchsorted(stuck, owners)
            read_on = _cheapest(tried, number, len(stuck))
            better = read_on.costs < best.costs[stuck]
            for part, other in zip(best, read_on, strict=True):
                part[stuck[better]] = other[better]
    return best


def _slope(
    model: VQAutoencoder, found: _Found, phases: Tensor, images: Tensor, codes: Tensor, penalty: float
) -> Tensor:
    """Return (B, h, w, D), that of a smooth cost in the codes of the tokens."""
    lost = found.again != found.indices
    with torch.enable_grad():
        quantized = F.embedding(found.indices, codes).movedim(-1, 1).requires_grad_(True)
        pictures = model.decode(quantized, phases)
        cost = _errors(pictures.clamp(-1, 1), images).sum()
        if bool(lost.any()):
            latents, _ = encode_at(model, rounded(pictures), phases)
            hinges = wanted_code_losses(latents, codes, found.indices, margin=_MARGIN)
            shares = torch.where(lost, hinges / hinges.detach().clamp_min(1e-4), 0.0)
            cost = cost + _BELIEVED * penalty * shares.flatten(1).mean(1).sum()
        (slope,) = torch.autograd.grad(cost, quantized)
    return slope.movedim(1, -1)


def _changes(
    model: VQAutoencoder,
    found: _Found,
    phases: Tensor,
    images: Tensor,
    codes: Tensor,
    spread: Tensor,
    penalty: float,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Return (R, h, w), the tokens after each change worth a try, and (R,), which image each belongs to."""
    indices = found.indices
    slope = _slope(model, found, phases, images, codes, penalty)
    present = F.embedding(indices, codes)
    distances = present.square().sum(-1, keepdim=True) - 2 * present @ codes.T + codes.square().sum(1)
    expected = slope @ codes.T - (slope * present).sum(-1, keepdim=True)
    expected = (expected + _CURVATURE / spread * distances).scatter(3, indices.unsqueeze(3), torch.inf)
    expected = expected.flatten(1)
    promising = expected.topk(min(candidates, expected.shape[1]), largest=False)
    # Each token that did not come back becomes what it was read as, those first whose codes are nearest.
    lost = found.again != indices
    gaps = distances.gather(3, found.again.unsqueeze(3)).squeeze(3).masked_fill(~lost, torch.inf)
    gaps, cells = gaps.flatten(1).topk(min(_ADOPTED, lost[0].numel()), largest=False)
    adopted = cells * len(codes) + found.again.flatten(1).gather(1, cells)
    places = torch.cat([promising.indices, adopted], 1)
    worth = torch.cat([promising.values, gaps], 1) < torch.inf
    changed = indices.flatten(1).unsqueeze(1).repeat(1, places.shape[1], 1)
    changed.scatter_(2, (places // len(codes)).unsqueeze(2), (places % len(codes)).unsqueeze(2))
    # All of these at once.
    changed = torch.cat([changed.view(*places.shape, *indices.shape[1:]), found.again.unsqueeze(1)], 1)
    worth = torch.cat([worth, lost.flatten(1).any(1, keepdim=True)], 1)
    return changed[worth], worth.nonzero()[:, 0]
