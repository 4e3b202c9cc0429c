"""A tokenizer that reads its own pictures back: the loss that trains it, and how far a trained one does.

The pictures are stored in between with 8 bits per channel, as files are. Where the encoder chooses a phase, that
is stored with the tokens.

Shape letters: B images, C channels, H W pixels, D code size, K codes, h w token grid, L downsamplings.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.data.rows import ImageRows
from te_quant import VQAutoencoder

__all__ = ["Tokens", "measure_round_trips", "round_trip_loss", "rounded"]

_BATCH = 128
_GROUND = -1.0


def rounded(images: Tensor) -> Tensor:
    """Clip to [-1, 1] and round to 8 bits; the gradient passes as if nothing had been rounded."""
    clipped = images.clamp(-1, 1)
    levels = ((clipped + 1) * 127.5).round() / 127.5 - 1
    return clipped + (levels - clipped).detach()


def round_trip_loss(latents: Tensor, codebook: Tensor, indices: Tensor, *, margin: float) -> Tensor:
    """Return how far re-encoded latents are from the side of the codes that they came from, with a margin.

    With d the squared distance of a latent to the code that it should have and d' that to the nearest other one,
    the mean of max(0, (d - d') / (d + d') + margin). Zero where every latent is nearer to its code by the margin,
    whatever the scale of the codes.

    Args:
        latents: of the pictures that were decoded from ``indices``.
        codebook: all codes.
        indices: the tokens that should come back.
        margin: in (0, 1). At 1 only a latent on its code has no loss.

    Shape:
        latents: (B, D, h, w). codebook: (K, D), K >= 2. indices: (B, h, w). Result: ().

    Source: Sato and Yamada 1995, "Generalized learning vector quantization", Eq. 2, with the codes of the tokens
        in place of those of a class, and a hinge.
    """
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    wanted = indices.reshape(-1, 1)
    with torch.no_grad():
        # Only the two distances that count take part in the gradient, without the cancellation of this form.
        products = codebook.square().sum(1) - 2 * rows @ codebook.T
        others = products.scatter(1, wanted, math.inf).argmin(1)
    own = (rows - F.embedding(wanted.squeeze(1), codebook)).square().sum(1)
    other = (rows - F.embedding(others, codebook)).square().sum(1)
    return F.relu((own - other) / (own + other) + margin).mean()


class Tokens(NamedTuple):
    """What has to be stored of images.

    Attributes:
        indices: (B, h, w).
        phases: (B, L, 2), zeros unless the encoder chooses them.
    """

    indices: Tensor
    phases: Tensor


def _encode(model: VQAutoencoder, images: Tensor) -> Tokens:
    latents, phases = model.encode_with_phases(images)
    return Tokens(model.quantizer(latents).indices, phases)


@torch.no_grad()
def measure_round_trips(
    model: VQAutoencoder, images: ImageRows, count: int, device: torch.device, *, cycles: int = 3
) -> dict[str, Any]:
    """Encode, decode to 8 bits and encode again, several times, in float32 and evaluation mode.

    Returns:
        ``images``: how many; ``match``: the share of the tokens that come back from each round trip, compared
        with those before it; ``ink``: the same of the first, only where the image shows more than the ground;
        ``whole``: the share of the images all of whose tokens, and the phase, come back from the first;
        ``phases``: of those whose phase does.
    """
    was_training = model.training
    model.eval()
    stride = model.config.stride
    ink = cells = inked = whole = phases = 0
    match = [0] * cycles
    count = min(count, len(images))
    for start in range(0, count, _BATCH):
        batch = images.fixed(start, min(start + _BATCH, count)).to(device)
        marked = F.max_pool2d((batch != _GROUND).any(1, keepdim=True).float(), stride).squeeze(1) > 0
        tokens = _encode(model, batch)
        for cycle in range(cycles):
            again = _encode(model, rounded(model.decode_indices(*tokens)))
            equal = again.indices == tokens.indices
            match[cycle] += int(equal.sum())
            if cycle == 0:
                kept = (again.phases == tokens.phases).flatten(1).all(1)
                ink += int((equal & marked).sum())
                inked += int(marked.sum())
                cells += equal.numel()
                whole += int((equal.flatten(1).all(1) & kept).sum())
                phases += int(kept.sum())
            tokens = again
    model.train(was_training)
    return {
        "images": count,
        "match": [number / cells for number in match],
        "ink": ink / inked,
        "whole": whole / count,
        "phases": phases / count,
    }
