"""Images as sequences of tokens: the grid row by row, preceded by one phase token if the tokenizer has phases.

An encoder with adaptive polyphase downsampling chooses, image by image, which pixels it keeps. Its grid alone does
not say where in a token's cell the image lies; the phases of its L downsamplings do. They become one more token,
in [0, 4^L).

Shape letters: B images, M tokens per image (h·w, and one more with a phase), h w token grid, S side of an image,
L downsamplings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.te_vqgan.stage2.settings import DIRECTIONS
from te_quant import AutoencoderConfig, Segment, VQAutoencoder

__all__ = ["PHASE", "decode_images", "encode_images", "num_phases", "sequence_order"]

PHASE = "phase"
"""Name of the segment."""


def num_phases(config: AutoencoderConfig) -> int:
    """Return how many phases an encoder chooses from; 0 if it does not choose."""
    levels = len(config.widths) - 1
    return 4**levels if config.downsample == "polyphase" and levels else 0


def sequence_order(direction: str, segments: Sequence[Segment]) -> tuple[str, ...]:
    """Return the segment names in sequence order; the phase comes directly before its grid."""
    known = {segment.name for segment in segments}
    order = (part for name in DIRECTIONS[direction] for part in ((PHASE, name) if name == "image" else (name,)))
    return tuple(name for name in order if name in known)


@torch.no_grad()
def encode_images(model: VQAutoencoder, images: Tensor) -> Tensor:
    """Return the tokens of images, (B, 3, S, S) to (B, M) int64.

    Args:
        model: in evaluation mode.
        images: on its device.
    """
    if not num_phases(model.config):
        return model.encode_to_indices(images).flatten(1)
    encoded = model.encode_with_phases(images)
    bits = encoded.phases.flatten(1)
    phase = (bits << torch.arange(bits.shape[1], device=bits.device)).sum(1, keepdim=True)
    return torch.cat([phase, model.quantizer.encode(encoded.latents).flatten(1)], 1)


@torch.no_grad()
def decode_images(model: VQAutoencoder, tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Decode the tokens of :func:`encode_images` into images: (B, M) to (B, 3, S, S).

    Args:
        model: in evaluation mode.
        tokens: int64, on its device.
        grid: (h, w).
    """
    choices = num_phases(model.config)
    indices = tokens[:, -grid[0] * grid[1] :].reshape(len(tokens), *grid)
    if not choices:
        return model.decode_indices(indices)
    levels = len(model.config.widths) - 1
    bits = tokens[:, :1] >> torch.arange(2 * levels, device=tokens.device) & 1
    return model.decode_indices(indices, bits.view(-1, levels, 2))
