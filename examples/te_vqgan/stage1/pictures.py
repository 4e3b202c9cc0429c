"""Crops of pictures for Stage 1, and what a tokenizer of them is worth.

There are no sprites to place on a ground here. A window moves over a larger picture (protocol ``crop``), so that
new content enters on one side, or the content of the window is shifted circularly (protocol ``circular``).

Shape letters: B images, C channels, S side of a crop, n half of it, h w token grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.te_vqgan.data.crops import CropDataset
from examples.te_vqgan.data.pictures import PictureSource
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.stage1.evaluation import EVALUATION_SEED, codebook_numbers, eight_bits, quality
from examples.te_vqgan.stage1.joint import vector_quantizer
from examples.te_vqgan.stage1.presets import Stage1Settings
from te_quant import AutoencoderOutput, VQAutoencoder, measure_equivariance
from te_quant.shifts import crop

__all__ = ["Interior", "crops", "evaluate_pictures", "reach", "smallest_side"]

_PICTURES = 5


def reach(settings: Stage1Settings) -> int:
    """Return how far a window moves in the measurements, pixels: a quarter of its side."""
    return settings.canvas_size // 4


def smallest_side(settings: Stage1Settings) -> int:
    """Return the side that a picture needs at least, pixels: a window with its room to move."""
    return settings.canvas_size + 2 * reach(settings)


def crops(settings: Stage1Settings, source: PictureSource, split: str) -> CropDataset:
    """Return the crops of one split; those for evaluation are the same for every seed.

    Raises:
        ValueError: the pictures are not those of the settings.
    """
    require(source.name == settings.data, "data", f"the pictures {settings.data!r} of the settings", source.name)
    training = split == "train"
    return CropDataset(
        source,
        split,
        crop_size=settings.canvas_size,
        size=settings.train_images if training else settings.eval_images,
        seed=settings.seed if training else EVALUATION_SEED,
        max_reduction=settings.max_reduction,
    )


@torch.no_grad()
def evaluate_pictures(
    model: VQAutoencoder, settings: Stage1Settings, source: PictureSource, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure a trained model on pictures that it was not trained on.

    Returns:
        Numbers for JSON (``validation`` and ``test`` quality, ``codebook``, and three equivariance reports:
        ``equivariance`` of a moving window, ``equivariance_interior`` of its interior tokens only, and
        ``equivariance_circular``), and the tensors that the figure shows.
    """
    model.eval()
    test, validation = (crops(settings, source, split) for split in ("test", "validation"))
    wide = test.windows(settings.eval_sprites, smallest_side(settings)).to(device)
    size = (settings.canvas_size, settings.canvas_size)
    centred = crop(wide, (0, 0), size=size).contiguous()
    passes = _Passes(model)
    interior = Interior(settings.canvas_size, model.config.stride)
    common: dict[str, Any] = {
        "stride": model.config.stride,
        "num_codes": model.config.num_codes,
        "codebook": vector_quantizer(model).codebook.detach(),
        # Photographs have no ground; without it new reports would lack figures that the published ones contain.
        "ground": -1.0,
    }
    whole: dict[str, Any] = common | {
        "reconstruct": lambda images: passes(images).reconstruction,
        "latents": lambda images: passes(images).latents,
    }

    def tokens(images: Tensor) -> Tensor:
        return passes(images).indices

    moving = measure_equivariance(tokens, wide, protocol="crop", canvas_size=settings.canvas_size, **whole)
    inside = measure_equivariance(
        lambda images: interior.of_tokens(model.encode_to_indices(interior.windows(images))),
        interior.stacked(wide),
        protocol="crop",
        canvas_size=settings.canvas_size // 2,
        latents=lambda images: interior.of_tokens(model.encode(interior.windows(images))),
        **common,
    )
    circular = measure_equivariance(tokens, centred, protocol="circular", **whole)
    numbers = {
        "validation": quality(model, validation, settings.eval_images, device),
        "test": quality(model, test, settings.eval_images, device),
        "codebook": codebook_numbers(model, test, settings, device),
        "equivariance": moving.to_dict(),
        "equivariance_interior": inside.to_dict(),
        "equivariance_circular": circular.to_dict(),
    }
    return numbers, _samples(model, wide[:_PICTURES], size)


class Interior:
    """Tokens at least a quarter of the window away from its border, measured like whole windows.

    The measurement cuts windows out of pictures and compares all of their tokens. To let it see only interior
    tokens, although the tokenizer sees whole windows, the four quarters of a window travel as channels: one crop
    of the stacked pictures, half as wide as the window, holds the whole window.

    Args:
        side: S, of the window in pixels; a multiple of four times the stride.
        stride: pixels per token.
    """

    def __init__(self, side: int, stride: int) -> None:
        self.half = side // 2
        first = side // 4 // stride
        self._inner = slice(first, side // stride - first)

    def stacked(self, pictures: Tensor) -> Tensor:
        """(B, C, P, P) pictures to (B, 4C, P - n, P - n): four views of each, n apart."""
        kept = pictures.shape[-1] - self.half
        places = [(top, left) for top in (0, self.half) for left in (0, self.half)]
        return torch.cat([pictures[..., top : top + kept, left : left + kept] for top, left in places], 1)

    def windows(self, quarters: Tensor) -> Tensor:
        """(B, 4C, n, n) crops of stacked pictures to the windows (B, C, S, S) of which they are the quarters."""
        upper_left, upper_right, lower_left, lower_right = quarters.chunk(4, 1)
        upper, lower = torch.cat([upper_left, upper_right], -1), torch.cat([lower_left, lower_right], -1)
        return torch.cat([upper, lower], -2)

    def of_tokens(self, grid: Tensor) -> Tensor:
        """(..., h, w) of a window to its middle (..., h / 2, w / 2)."""
        return grid[..., self._inner, self._inner]


class _Passes:
    """The latest forward pass: the measurement asks three questions about the same images."""

    def __init__(self, model: VQAutoencoder) -> None:
        self._model = model
        self._latest: tuple[Tensor, AutoencoderOutput] | None = None

    def __call__(self, images: Tensor) -> AutoencoderOutput:
        if self._latest is None or self._latest[0] is not images:
            self._latest = (images, self._model(images))
        return self._latest[1]


def _samples(model: VQAutoencoder, wide: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return windows with reconstructions, and their tokens before and after the content moves right by a pixel.

    Shape:
        images, reconstructions, moved_images: (B, 3, S, S) uint8. tokens, moved_tokens: (B, h, w) int16 or int64.
    """
    images, moved = (crop(wide, shift, size=size).contiguous() for shift in ((0, 0), (0, 1)))
    small = torch.int16 if model.config.num_codes <= 2**15 else torch.int64
    return {
        "images": eight_bits(images),
        "reconstructions": eight_bits(model(images).reconstruction),
        "moved_images": eight_bits(moved),
        "tokens": model.encode_to_indices(images).to(small).cpu(),
        "moved_tokens": model.encode_to_indices(moved).to(small).cpu(),
    }
