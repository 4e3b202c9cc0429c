"""Count the indices that differ after circular integer shifts, for a trained tokenizer that promises none.

Shape letters: B images, h w token grid.

The promise is the encoder's own contract: tokens of a shifted image are the tokens of the image, moved by
(t + o - o') / s, o and o' the offsets at which either was sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.te_vqgan.checks import require
from examples.te_vqgan.evaluation import dataset
from examples.te_vqgan.presets import Stage1Settings
from examples.te_vqgan.sources import DigitSource
from te_quant import VQAutoencoder

__all__ = ["count_differences", "moved", "numerical_check"]

_BATCH = 64
_SEED = 0
# Random shifts of each batch, compared with one encoding of the unshifted images.
_SHIFTS = 16


def moved(tokens: Tensor, by: Tensor) -> Tensor:
    """Roll each grid of tokens by its own number of rows and columns.

    Shape:
        tokens: (B, h, w). by: (B, 2) int64. Returns (B, h, w).
    """
    batch, height, width = tokens.shape
    rows = (torch.arange(height) - by[:, :1]) % height
    columns = (torch.arange(width) - by[:, 1:]) % width
    return tokens[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.no_grad()
def count_differences(
    model: VQAutoencoder,
    batch: Callable[[int], Tensor],
    tokens: int,
    *,
    multiple: int = 1,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, int]:
    """Compare at least ``tokens`` indices.

    Args:
        model: in evaluation mode, in the dtype that is tested.
        batch: number -> images, (B, C, H, W) in the model's dtype.
        tokens: at least so many comparisons.
        multiple: shifts are random multiples of this many pixels.
        autocast: compute the network in this dtype.
        progress: told the number of comparisons after each batch.

    Returns:
        ``compared``, ``differing``, ``images``, and ``unaligned``: comparisons of images where t + o - o' is no
        multiple of s.
    """
    generator = torch.Generator().manual_seed(_SEED)
    stride = model.config.stride
    compared = differing = images_seen = unaligned = 0
    number = 0
    while compared < tokens:
        images = batch(number)
        number += 1
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            before = model.encode_with_phases(images)
            reference = model.quantizer.encode(before.latents)
            for _ in range(_SHIFTS):
                dy, dx = (
                    int(torch.randint(0, side // multiple, (), generator=generator)) * multiple
                    for side in images.shape[-2:]
                )
                after = model.encode_with_phases(images.roll((dy, dx), (-2, -1)))
                found = model.quantizer.encode(after.latents)
                shift = torch.tensor([dy, dx]) + before.offsets - after.offsets
                expected = moved(reference, shift.div(stride, rounding_mode="floor"))
                differing += int((expected != found).sum())
                unaligned += int((shift % stride != 0).any(1).sum())
                compared += found.numel()
        images_seen += len(images)
        progress(compared)
    return {"compared": compared, "differing": differing, "images": images_seen, "unaligned": unaligned}


def numerical_check(
    model: VQAutoencoder,
    settings: Stage1Settings,
    source: DigitSource,
    *,
    tokens: int,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Count in float64 over at least ``tokens`` indices, and in float32 and bfloat16 over a hundredth of them.

    Raises:
        ValueError: the model promises nothing that could be counted.
    """
    group = model.encoder.equivariance.group
    require(group in ("integer", "stride"), "arm", "one with an exact encoder", f"the group {group!r}")
    multiple = 1 if group == "integer" else model.config.stride
    test = dataset(settings, source, "test")
    counts = {}
    for name, dtype, share in (("float64", torch.float64, 1.0), ("float32", torch.float32, 0.01)):
        run = model.to(dtype).eval()
        counts[name] = count_differences(
            run,
            lambda number, dtype=dtype: test.batch(number, _BATCH).to(dtype),  # type: ignore[misc]
            int(tokens * share),
            multiple=multiple,
            progress=progress,
        )
    counts["bfloat16"] = count_differences(
        model.to(torch.float32).eval(),
        lambda number: test.batch(number, _BATCH),
        tokens // 100,
        multiple=multiple,
        autocast=torch.bfloat16,
        progress=progress,
    )
    return {"group": group, "shifts": f"random multiples of {multiple} px, circular", "counts": counts}
