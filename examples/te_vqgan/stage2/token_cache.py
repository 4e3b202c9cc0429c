"""The training images of Stage 2 as tokens: each image is drawn and encoded once, its small integers are kept.

Shape letters: N images, M tokens of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.stage2.image_tokens import encode_images
from te_quant import VQAutoencoder

__all__ = ["cached_tokens", "encode_dataset"]

_BATCH = 128
_MAX_CODES = 2**15


@torch.no_grad()
def encode_dataset(
    model: VQAutoencoder,
    images: QuadrantDataset,
    device: torch.device,
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """Return the tokens of every image of ``images`` in the table's order, (N, M) int16 on the CPU.

    Args:
        model: in evaluation mode, on ``device``.
        images: the data set.
        device: where to encode, in float32.
        progress: told the number of images after each batch.

    Raises:
        ValueError: the model has more codes than int16 can count.
    """
    codes = model.config.num_codes
    require(codes <= _MAX_CODES, "num_codes", f"at most {_MAX_CODES:,}", codes)
    parts = []
    for start in range(0, len(images), _BATCH):
        batch = images.fixed(start, start + _BATCH).to(device)
        parts.append(encode_images(model, batch).to("cpu", torch.int16))
        progress(start + len(batch))
    return torch.cat(parts)


def cached_tokens(path: Path, facts: dict[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """Return the tokens in ``path`` if it was written with the same ``facts``; else make and write them.

    A damaged file is replaced, and one line on standard error says so.
    """
    if path.exists():
        try:
            tensors, written = load_checkpoint(path, cure="the tokens are made again")
        except ValueError as error:
            print(error, file=sys.stderr)
        else:
            if written == facts:
                return tensors["tokens"]
    tokens = make()
    save_checkpoint(path, {"tokens": tokens}, facts)
    return tokens
