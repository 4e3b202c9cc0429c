"""How many training images a second the paper's data is drawn with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import OURS, Cell, Contender, Context, compete
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.sources import load_digits

__all__ = ["cells"]

# Canvas side and batch: of the presets `small` and `paper`.
_SHAPES = {"quick": ((32, 4),), "full": ((32, 16), (64, 192))}


def cells(context: Context) -> list[Cell]:
    """One a canvas."""
    return [
        Cell(
            f"rendering/S{side}-B{batch}",
            {"canvas": side, "batch": batch},
            partial(_run, side=side, batch=batch),
        )
        for side, batch in _SHAPES[context.grid]
    ]


def _run(context: Context, side: int, batch: int) -> dict[str, Any]:
    # On the CPU whatever the device: that is where the data is made.
    digits = load_digits("digits")
    data = QuadrantDataset(digits, "train", canvas_size=side, size=1024)

    def call(number: int) -> Tensor:
        return data.batch(number, batch)

    def check() -> str | None:
        images = call(0)
        fits = images.shape == (batch, 3, side, side) and float(images.min()) == -1 and float(images.max()) <= 1
        return None if fits else f"the images are {tuple(images.shape)} in other bounds than [-1, 1]"

    out = torch.empty(batch, 3, side, side)
    builders = {
        OURS: lambda: Contender(call, check),
        "fill of the result": lambda: Contender(lambda _: out.fill_(-1.0)),
    }
    on_cpu = Context(torch.device("cpu"), context.threads, context.grid, context.limits)
    return {"contenders": compete(builders, on_cpu), "facts": {"images": batch}}
