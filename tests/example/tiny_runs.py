"""Small stand-ins for what trainings leave behind: made in a moment, and read like the real ones.

Shape letters: B cells, N digits, c side of a cell, Q colours.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.classifier.model import CellClassifier, ClassifierOutput, save_classifier
from examples.te_vqgan.data.quadrants import QuadrantImages
from examples.te_vqgan.data.recipes import COLOR_RGB, COLORS
from examples.te_vqgan.data.sources import DigitSource, DigitSplit
from examples.te_vqgan.stage1.presets import PRESETS, Stage1Settings, to_dict
from te_quant import VQAutoencoder
from tests.helpers import numpy_generator

NAMES = tuple("0123456789")


def random_source(name: str = "random") -> DigitSource:
    """Fresh noise of all ten classes in all splits: nothing depends on what the pictures show."""
    rng = numpy_generator()

    def split(count: int) -> DigitSplit:
        labels = rng.permutation(np.arange(count) % 10)
        return DigitSplit(rng.integers(0, 256, (count, 7, 7), dtype=np.uint8), labels)

    return DigitSource(name, NAMES, split(40), split(20), split(20))


def stage1_settings(**changes: Any) -> Stage1Settings:
    """Those of the smoke preset on :func:`random_source`, with fewer images."""
    small = {"data": "random", "train_images": 64, "eval_images": 4, "eval_sprites": 2}
    return dataclasses.replace(PRESETS["smoke"], **{**small, **changes})


def finished_tokenizer(folder: Path, **changes: Any) -> Path:
    """Write what a finished Stage 1 run holds and later steps read: an untrained model, and settings."""
    settings = stage1_settings(**changes)
    model = VQAutoencoder(settings.model)
    # The codes of fresh weights lie so close to zero that one of them would be nearest to everything.
    latents = model.encode(torch.rand(64, 3, settings.canvas_size, settings.canvas_size) * 2 - 1).detach()
    model.quantizer.kmeans_init(latents)
    model.save_pretrained(folder / "model")
    (folder / "settings.json").write_text(json.dumps(to_dict(settings)))
    (folder / "evaluation.json").write_text("{}")
    return folder


def save_picture(path: Path, red: int, *, height: int = 97, width: int = 150) -> None:
    """Write a picture whose red tells which it is, green the row and blue the column, up to 255."""
    from PIL import Image

    rows, columns = np.minimum(np.arange(height), 255), np.minimum(np.arange(width), 255)
    pixels = np.stack(np.broadcast_arrays(np.array([[red]]), rows[:, None], columns), -1).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "png")


def write_pictures(folder: Path, count: int) -> None:
    """Write so many pictures of :func:`save_picture` into ``folder``."""
    for number in range(count):
        save_picture(folder / f"{number}.png", 20 * number)


def finished_classifier(folder: Path) -> Path:
    """Write an untrained classifier as a finished run holds it."""
    save_classifier(CellClassifier(widths=(8,), blocks=1), folder / "model")
    return folder


class PerfectReader(CellClassifier):
    """Knows all digits of a split by heart, in every colour, and names the one that is nearest to a cell."""

    def __init__(self, digits: DigitSplit, canvas_size: int) -> None:
        super().__init__(widths=(8,), blocks=1)
        cells = QuadrantImages(digits.images, canvas_size).cells
        ink = cells[:, None, None] * COLOR_RGB[:, :, None, None]
        self.known = torch.from_numpy(ink.reshape(-1, 3 * cells[0].size) / 127.5 - 1).float()
        self.labels = torch.from_numpy(np.repeat(digits.labels, len(COLORS)))
        self.colors = torch.arange(len(COLORS)).repeat(len(digits))
        self.seen: list[Tensor] = []
        self.eval()

    def forward(self, cells: Tensor) -> ClassifierOutput:
        """(B, 3, c, c) cells to certain answers."""
        self.seen.append(cells)
        nearest = torch.cdist(cells.flatten(1), self.known).argmin(1)
        digits, colors = self.labels[nearest], self.colors[nearest]
        return ClassifierOutput(F.one_hot(digits, len(NAMES)).float(), F.one_hot(colors, len(COLORS)).float())
