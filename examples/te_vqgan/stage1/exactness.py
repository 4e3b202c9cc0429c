"""Count the indices that differ after circular integer shifts, for a trained tokenizer that promises none.

Every comparison is another one: no image comes twice, no shift comes twice for an image, and the identity never.

Shape letters: B images, C channels, H W pixels, h w token grid, s stride.

The promise is the encoder's own contract: tokens of a shifted image are the tokens of the image, moved by
(t + o - o') / s, o and o' the offsets at which either was sampled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.recipes import LAYOUTS
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs.checks import require, require_int
from examples.te_vqgan.stage1.presets import Stage1Settings, read_settings
from te_quant import VQAutoencoder
from te_quant.shifts import Shift

__all__ = ["count_differences", "distinct", "draw_shifts", "finished_settings", "moved", "numerical_check"]

_BATCH = 64
_SEED = 0
# Shifts of each batch, compared with one encoding of the unshifted images.
_SHIFTS = 16


def finished_settings(folder: Path) -> Stage1Settings:
    """Read the settings of the finished run in ``folder``.

    Raises:
        ValueError: there is none.
    """
    finished = (folder / "evaluation.json").exists() and (folder / "settings.json").exists()
    require(finished, "folder", "that of a finished stage1 run", f"{folder}; stage1 --resume finishes one")
    return read_settings(folder / "settings.json")


def moved(tokens: Tensor, by: Tensor) -> Tensor:
    """Roll each grid of tokens by its own number of rows and columns.

    Shape:
        tokens: (B, h, w). by: (B, 2) int64. Returns (B, h, w).
    """
    batch, height, width = tokens.shape
    rows = (torch.arange(height) - by[:, :1]) % height
    columns = (torch.arange(width) - by[:, 1:]) % width
    return tokens[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def draw_shifts(sides: tuple[int, int], multiple: int, count: int, generator: torch.Generator) -> list[Shift]:
    """Draw circular shifts (dy, dx) without replacement, the identity left out.

    Args:
        sides: (H, W), multiples of ``multiple``.
        multiple: all shifts are multiples of so many pixels.
        count: how many; all there are, if they are fewer.
        generator: the only source of chance.
    """
    columns = sides[1] // multiple
    others = sides[0] // multiple * columns - 1
    # Place 0 of the grid of shifts is the identity.
    places = (torch.randperm(others, generator=generator)[:count] + 1).tolist()
    return [(place // columns * multiple, place % columns * multiple) for place in places]


def distinct(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Batch images anew, each only the first time that it comes; what is left at the end is a smaller batch.

    Shape:
        batches: (·, C, H, W) each. Yields (size, C, H, W).
    """
    seen: set[bytes] = set()
    waiting: list[Tensor] = []
    for batch in batches:
        for image in batch:
            name = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
            if name in seen:
                continue
            seen.add(name)
            waiting.append(image)
            if len(waiting) == size:
                yield torch.stack(waiting)
                waiting = []
    if waiting:
        yield torch.stack(waiting)


@torch.no_grad()
def count_differences(
    model: VQAutoencoder,
    batches: Iterable[Tensor],
    tokens: int,
    *,
    multiple: int = 1,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, int]:
    """Compare at least ``tokens`` indices.

    Args:
        model: in evaluation mode, in the dtype that is tested.
        batches: images; those that come again are left out, and no more are taken than needed.
        tokens: at least so many comparisons.
        multiple: shifts are multiples of so many pixels.
        autocast: compute the network in this dtype.
        progress: told the number of comparisons after each batch.

    Shape:
        batches: (·, C, H, W) each, in the model's dtype.

    Returns:
        ``compared`` and ``differing`` indices, ``distinct_images``, ``distinct_pairs`` of an image and a shift,
        and ``unaligned``: pairs where t + o - o' is no multiple of s.

    Raises:
        ValueError: the distinct images are too few for so many comparisons.
    """
    require_int("tokens", tokens, 1)
    generator = torch.Generator().manual_seed(_SEED)
    counts = dict.fromkeys(("compared", "differing", "distinct_images", "distinct_pairs", "unaligned"), 0)
    for images in distinct(batches, _BATCH):
        shifts = draw_shifts((images.shape[-2], images.shape[-1]), multiple, _SHIFTS, generator)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            _compare(model, images, shifts, counts)
        progress(counts["compared"])
        if counts["compared"] >= tokens:
            return counts
    expected = f"at most the {counts['compared']:,} comparisons that {counts['distinct_images']:,} images give"
    raise ValueError(f"tokens must be {expected}, got {tokens:,}.")


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
        ValueError: the model promises nothing that could be counted, or the source has too few images.
    """
    group = model.encoder.equivariance.group
    require(group in ("integer", "stride"), "arm", "one with an exact encoder", f"the group {group!r}")
    multiple = 1 if group == "integer" else model.config.stride
    grid = (settings.canvas_size // model.config.stride) ** 2
    shifts = max(1, min(_SHIFTS, (settings.canvas_size // multiple) ** 2 - 1))
    # As many again, as the recipes are drawn with replacement: pictures of a single digit come several times.
    images = 2 * (tokens // (shifts * grid)) + 16 * _BATCH
    test = QuadrantDataset(
        source, "test", canvas_size=settings.canvas_size, size=images, seed=_SEED, layouts=LAYOUTS
    )
    counts = {}
    for name, dtype, autocast, count in (
        ("float64", torch.float64, None, tokens),
        ("float32", torch.float32, None, max(1, tokens // 100)),
        ("bfloat16", torch.float32, torch.bfloat16, max(1, tokens // 100)),
    ):
        counts[name] = count_differences(
            model.to(dtype).eval(),
            (test.fixed(start, start + _BATCH).to(dtype) for start in range(0, len(test), _BATCH)),
            count,
            multiple=multiple,
            autocast=autocast,
            progress=progress,
        )
    return {"group": group, "shifts": f"multiples of {multiple} px but 0, circular", "counts": counts}


def _compare(model: VQAutoencoder, images: Tensor, shifts: list[Shift], counts: dict[str, int]) -> None:
    """Add the comparisons of ``images`` with themselves after ``shifts`` to ``counts``."""
    stride = model.config.stride
    before = model.encode_with_phases(images)
    reference = model.quantizer.encode(before.latents)
    for dy, dx in shifts:
        after = model.encode_with_phases(images.roll((dy, dx), (-2, -1)))
        found = model.quantizer.encode(after.latents)
        shift = torch.tensor([dy, dx]) + before.offsets - after.offsets
        expected = moved(reference, shift.div(stride, rounding_mode="floor"))
        counts["differing"] += int((expected != found).sum())
        counts["unaligned"] += int((shift % stride != 0).any(1).sum())
        counts["compared"] += found.numel()
    counts["distinct_images"] += len(images)
    counts["distinct_pairs"] += len(images) * len(shifts)
