"""A tokenizer that reads its own pictures back: the loss that trains it, and how far a trained one does.

The pictures are stored in between with 8 bits per channel, as files are. Where the encoder chooses a phase, that
is stored with the tokens.

Shape letters: B images, C channels, H W pixels, D code size, K codes, h w token grid, L downsamplings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from examples.te_vqgan.data.rows import ImageRows
from examples.te_vqgan.stage1.evaluation import psnr
from te_quant import CodebookUsage, VQAutoencoder
from te_quant.layers import PolyphaseDownsample2d

__all__ = ["Tokens", "encode_at", "growth", "measure_round_trips", "read", "rounded"]

_BATCH = 128
_GROUND = -1.0
# The norms of two phases of a picture differ by some percent.
_PHASE_MARGIN = 0.01
# Share of all steps over which the losses grow to their weights.
_GROWTH = 0.1


def growth(step: int, steps: int, start: float) -> float:
    """Return the share of its weight that a loss has which begins after the share ``start`` of ``steps``."""
    return min(1.0, max(0.0, (step + 1 - start * steps) / (_GROWTH * steps)))


def rounded(images: Tensor) -> Tensor:
    """Clip to [-1, 1] and round to 8 bits; the gradient passes as if nothing had been rounded."""
    clipped = images.clamp(-1, 1)
    levels = ((clipped + 1) * 127.5).round() / 127.5 - 1
    return clipped + (levels - clipped).detach()


def encode_at(model: VQAutoencoder, images: Tensor, phases: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images at given phases, and say how far the encoder is from choosing them itself.

    Args:
        model: its polyphase downsamplings, if it has any, take ``phases`` instead of what they would choose.
        images: to encode.
        phases: one for each downsampling.

    Shape:
        images: (B, C, H, W). phases: (B, L, 2).

    Returns:
        The latents (B, D, h, w); and (), the sum over the downsamplings of max(0, 1 + (n' - n) / (n + n') / 0.01),
        n the norm at the phase that is wanted and n' the largest other one, as a mean over the images.
    """
    total = images.new_zeros((), dtype=torch.float32)

    def take(place: int, stride: int) -> Callable[[nn.Module, tuple[Tensor], object], tuple[Tensor, Tensor]]:
        def hook(_: nn.Module, arguments: tuple[Tensor], __: object) -> tuple[Tensor, Tensor]:
            nonlocal total
            (hidden,), wanted = arguments, phases[:, place]
            parts = rearrange(hidden, "b c (h p) (w q) -> b (p q) c h w", p=stride, q=stride)
            chosen = (wanted[:, :1] * stride + wanted[:, 1:]).flatten()
            norms = parts.float().square().sum((2, 3, 4)).sqrt()
            own = norms.gather(1, chosen.unsqueeze(1)).squeeze(1)
            other = norms.scatter(1, chosen.unsqueeze(1), -math.inf).amax(1)
            total = total + F.relu(1 + (other - own) / (own + other) / _PHASE_MARGIN).mean()
            return parts[torch.arange(len(parts), device=parts.device), chosen], wanted

        return hook

    layers = [layer for layer in model.encoder.modules() if isinstance(layer, PolyphaseDownsample2d)]
    hooks = [layer.register_forward_hook(take(place, layer.stride)) for place, layer in enumerate(layers)]
    try:
        latents: Tensor = model.encode(images)
    finally:
        for one in hooks:
            one.remove()
    return latents, total


class Tokens(NamedTuple):
    """What has to be stored of images.

    Attributes:
        indices: (B, h, w).
        phases: (B, L, 2), zeros unless the encoder chooses them.
    """

    indices: Tensor
    phases: Tensor


def read(model: VQAutoencoder, images: Tensor) -> Tokens:
    """Return what the encoder says."""
    latents, phases = model.encode_with_phases(images)
    return Tokens(model.quantizer(latents).indices, phases)


@torch.no_grad()
def measure_round_trips(
    model: VQAutoencoder,
    images: ImageRows,
    count: int,
    device: torch.device,
    *,
    cycles: int = 3,
    first: Callable[[VQAutoencoder, Tensor], Tokens] = read,
) -> dict[str, Any]:
    """Encode, decode to 8 bits and encode again, several times, in float32 and evaluation mode.

    ``first`` makes the tokens of the images. Those of decoded pictures are always what the encoder says.

    Returns:
        ``images``: how many; ``match``: the share of the tokens that come back from each round trip, compared
        with those before it; ``psnr``: of the pictures of the tokens before each of them, dB; ``ink``: the share
        that comes back from the first, only where the image shows more than the ground; ``whole``: the share of
        the images all of whose tokens, and the phase, come back from the first; ``phases``: of those whose phase
        does; ``used_codes`` and ``perplexity``: of the tokens before the first.
    """
    was_training = model.training
    model.eval()
    stride = model.config.stride
    ink = cells = inked = whole = phases = 0
    match, squared = [0] * cycles, [0.0] * cycles
    usage = CodebookUsage(model.config.num_codes, device=device)
    count = min(count, len(images))
    for start in range(0, count, _BATCH):
        batch = images.fixed(start, min(start + _BATCH, count)).to(device)
        marked = F.max_pool2d((batch != _GROUND).any(1, keepdim=True).float(), stride).squeeze(1) > 0
        tokens = first(model, batch)
        usage.update(tokens.indices)
        for cycle in range(cycles):
            pictures = rounded(model.decode_indices(*tokens))
            squared[cycle] += float((pictures.double() - batch.double()).square().mean((1, 2, 3)).sum())
            again = read(model, pictures)
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
    use = usage.compute()
    return {
        "images": count,
        "match": [number / cells for number in match],
        "psnr": [psnr(total / count) for total in squared],
        "ink": ink / inked,
        "whole": whole / count,
        "phases": phases / count,
        "used_codes": use.used_codes,
        "perplexity": use.perplexity,
    }
