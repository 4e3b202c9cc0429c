"""What a finished tokenizer is worth: reconstruction, use of the codebook, equivariance, and pictures of it.

Shape letters: B images, C channels, S canvas side, h w token grid, K codes, M offsets.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.data.heldout import allowed
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.recipes import LAYOUTS
from examples.te_vqgan.data.rows import ImageRows
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.stage1.joint import joint_indices, num_combinations, vector_quantizer
from examples.te_vqgan.stage1.presets import Stage1Settings
from te_quant import CodebookUsage, VQAutoencoder, measure_equivariance
from te_quant.equivariance import place_sprites
from te_quant.functional import orthogonality
from te_quant.shifts import place

__all__ = ["EVALUATION_SEED", "codebook_numbers", "dataset", "eight_bits", "evaluate", "psnr", "quality"]

_BATCH = 128
_PICTURES = 8
EVALUATION_SEED = 0
"""Every seed is measured on the same images."""
# Chosen by eye among the first ten: a digit that even 8x8 pixels show well.
_PICTURE_SEED = 5


def dataset(settings: Stage1Settings, source: DigitSource, split: str) -> QuadrantDataset:
    """Return one split of the quadrant images, the fifth layout (one digit at the centre) included."""
    training = split == "train"
    return QuadrantDataset(
        source,
        split,
        canvas_size=settings.canvas_size,
        size=settings.train_images if training else settings.eval_images,
        seed=settings.seed if training else EVALUATION_SEED,
        layouts=LAYOUTS,
        allowed=allowed(split, len(source.class_names)) if settings.held_out else None,
    )


def psnr(mean_squared_error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [-1, 1], whose peak-to-peak range is 2."""
    return math.inf if mean_squared_error == 0 else 10.0 * math.log10(4.0 / mean_squared_error)


@torch.no_grad()
def quality(model: VQAutoencoder, images: ImageRows, count: int, device: torch.device) -> dict[str, Any]:
    """Measure reconstruction and code use over the first ``count`` images, in float32 and evaluation mode.

    Returns:
        ``images`` and ``tokens`` counted; ``l1``, ``l2`` means over all values; ``psnr`` of the pooled ``l2``,
        dB; ``used_codes`` seen at least once, ``frequent_codes`` above 0.1 % of the tokens, ``perplexity``, all
        three of combinations where a token has several indices.
    """
    was_training = model.training
    model.eval()
    usage = CodebookUsage(num_combinations(model.quantizer), device=device)
    absolute = squared = 0.0
    values = 0
    count = min(count, len(images))
    for start in range(0, count, _BATCH):
        batch = images.fixed(start, min(start + _BATCH, count)).to(device)
        output = model(batch)
        difference = output.reconstruction.double() - batch.double()
        absolute += float(difference.abs().sum())
        squared += float(difference.square().sum())
        values += difference.numel()
        usage.update(joint_indices(output.indices, model.quantizer))
    model.train(was_training)
    use = usage.compute()
    return {
        "images": count,
        "tokens": use.tokens,
        "l1": absolute / values,
        "l2": squared / values,
        "psnr": psnr(squared / values),
        "used_codes": use.used_codes,
        "frequent_codes": use.frequent_codes,
        "perplexity": use.perplexity,
    }


@torch.no_grad()
def evaluate(
    model: VQAutoencoder, settings: Stage1Settings, source: DigitSource, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure a trained model.

    Returns:
        Numbers for JSON (``validation`` and ``test`` quality, ``codebook``, ``equivariance``), and the tensors
        that the figures show.
    """
    model.eval()
    test = dataset(settings, source, "test")
    validation = dataset(settings, source, "validation")
    sprites = test.sprites(settings.eval_sprites, seed=EVALUATION_SEED).to(device)
    report = measure_equivariance(
        model.encode_to_indices,
        sprites,
        stride=model.config.stride,
        num_codes=model.config.num_codes,
        canvas_size=settings.canvas_size,
        reconstruct=lambda images: model(images).reconstruction,
        latents=model.encode,
        codebook=vector_quantizer(model).codebook.detach(),
    )
    numbers = {
        "validation": quality(model, validation, settings.eval_images, device),
        "test": quality(model, test, settings.eval_images, device),
        "codebook": codebook_numbers(model, test, settings, device),
        "equivariance": report.to_dict(),
    }
    return numbers, _samples(model, test, settings, device)


def codebook_numbers(
    model: VQAutoencoder, images: ImageRows, settings: Stage1Settings, device: torch.device
) -> dict[str, float]:
    """Say how far from orthogonal the codes are: Eq. 5 without λ, and the mean |cosine| of two codes."""
    codebook = vector_quantizer(model).codebook.detach().double()
    indices = [
        model.encode_to_indices(images.fixed(start, start + _BATCH).to(device)).flatten()
        for start in range(0, settings.eval_images, _BATCH)
    ]
    used = torch.unique(torch.cat(indices))
    return {
        "orthogonality": float(orthogonality(codebook)),
        "mean_abs_cosine": _mean_abs_cosine(codebook),
        "mean_abs_cosine_used": _mean_abs_cosine(codebook[used]),
        "mean_norm": float(codebook.norm(dim=1).mean()),
    }


def _mean_abs_cosine(codes: Tensor) -> float:
    """Mean |cosine| over all pairs of different codes; 0 for fewer than two."""
    count = len(codes)
    if count < 2:
        return 0.0
    unit = F.normalize(codes, dim=1)
    total = (unit @ unit.T).abs().sum() - unit.square().sum()
    return float(total) / (count * (count - 1))


def _samples(
    model: VQAutoencoder, images: QuadrantDataset, settings: Stage1Settings, device: torch.device
) -> dict[str, Tensor]:
    """Return originals with reconstructions, and one digit at many places with its tokens.

    Shape:
        images, reconstructions: (B, 3, S, S) uint8. placed_images: (5, 3, S, S) uint8; placed_tokens:
        (5, h, w) int64. shifted_images: (M, 3, S, S) uint8; shifted_tokens: (M, h, w) int64, the digit at
        the centre moved right by 0, 1, ..., M - 1 pixels, M - 1 the stride.
    """
    originals = images.fixed(0, min(_PICTURES, len(images))).to(device)
    sprite = images.sprites(1, seed=_PICTURE_SEED, color="white").to(device)
    stride, side = model.config.stride, settings.canvas_size
    placed = place_sprites(sprite, canvas_size=side, stride=stride)[:, 0]
    corner = side // 4
    shifted = torch.cat(
        [place(sprite, (corner, corner + d), size=(side, side), fill=-1.0) for d in range(stride + 1)]
    )
    return {
        "images": eight_bits(originals),
        "reconstructions": eight_bits(model(originals).reconstruction),
        "placed_images": eight_bits(placed),
        "placed_tokens": model.encode_to_indices(placed).cpu(),
        "shifted_images": eight_bits(shifted),
        "shifted_tokens": model.encode_to_indices(shifted).cpu(),
    }


def eight_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 on the CPU; values beyond are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
