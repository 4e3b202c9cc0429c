"""The first step of the pipeline: the data are there and right, and a picture shows what will be trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.crops import CropDataset
from examples.te_vqgan.data.heldout import held_out
from examples.te_vqgan.data.pictures import PictureSource
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.rows import ImageRows
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs.files import write_bytes_atomically, write_text_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DataSummary", "SplitSummary", "contact_sheet", "prepare", "prepare_pictures"]

SUMMARY_FILE = "data.json"
PICTURE_FILE = "samples.png"
_FORMAT = 2
_ROWS, _COLUMNS = 2, 12


@dataclass(frozen=True)
class SplitSummary:
    """One split: what there is to draw from, and the images drawn.

    Args:
        digits: to draw from.
        digits_by_class: the same by class.
        images: in the split.
        images_by_num_digits: the same by number of digits, 1 to 4.
        seed: of the images.
        drawn: digits in all images.
        held_out: ...of which in combinations that training never shows
            (:func:`~examples.te_vqgan.data.heldout.held_out`).
    """

    digits: int
    digits_by_class: tuple[int, ...]
    images: int
    images_by_num_digits: tuple[int, ...]
    seed: int
    drawn: int
    held_out: int


@dataclass(frozen=True)
class DataSummary:
    """What :func:`prepare` found; ``fingerprint`` is the SHA-256 over all pictures and labels."""

    data: str
    fingerprint: str
    class_names: tuple[str, ...]
    canvas_size: int
    splits: Mapping[str, SplitSummary]

    def to_json(self) -> str:
        """The summary as indented JSON; the same data give the same text."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"


def prepare(source: DigitSource, datasets: Mapping[str, QuadrantDataset], out_dir: Path) -> DataSummary:
    """Write ``data.json``, a summary of the data sets that will be used, and ``samples.png``.

    Args:
        source: the digits.
        datasets: images of them, by split.
        out_dir: made if it is not there; both files are replaced whole or not at all.
    """
    splits = {name: _summarize(dataset, len(source.class_names)) for name, dataset in datasets.items()}
    size = next(iter(datasets.values())).images.canvas_size
    summary = DataSummary(source.name, source.fingerprint(), source.class_names, size, splits)
    drawn = {name: f"{split.digits:,} pictures" for name, split in splits.items()}
    _write(out_dir, contact_sheet(datasets, drawn), summary.to_json())
    return summary


def prepare_pictures(
    source: PictureSource, datasets: Mapping[str, CropDataset], left_out: Sequence[str], out_dir: Path
) -> None:
    """Write ``data.json``, which names every picture with its hash and split, and ``samples.png``.

    Args:
        source: the pictures.
        datasets: crops of them, by split.
        left_out: names of files that do not count as pictures.
        out_dir: made if it is not there; both files are replaced whole or not at all.
    """
    facts = {"format": _FORMAT, "data": source.name, "pictures": source.manifest, "left_out": left_out}
    drawn = {name: _counted(len(source.pixels[name])) for name in datasets}
    _write(out_dir, contact_sheet(datasets, drawn), json.dumps(facts, indent=2) + "\n")


def _counted(pictures: int) -> str:
    """Write "1 picture" or "3 pictures"."""
    return f"{pictures:,} picture{'' if pictures == 1 else 's'}"


def _write(out_dir: Path, sheet: Figure, summary: str) -> None:
    picture = BytesIO()
    sheet.savefig(picture, format="png")
    write_bytes_atomically(out_dir / PICTURE_FILE, picture.getvalue())
    # Last, since it is what tells a later step that this one is done.
    write_text_atomically(out_dir / SUMMARY_FILE, summary)


def contact_sheet(datasets: Mapping[str, ImageRows], drawn: Mapping[str, str]) -> Figure:
    """A figure of the first images of each data set, one block each.

    Args:
        datasets: by split.
        drawn: from how many pictures those of each split are drawn, in words.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.95 * len(datasets)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(datasets), 1, squeeze=False)[:, 0]
    for axes, (name, dataset) in zip(rows, datasets.items(), strict=True):
        axes.imshow(_mosaic(dataset), interpolation="nearest")
        counts = f"the first of {len(dataset):,} images, drawn from {drawn[name]}"
        axes.set_title(f"{name}: {counts}", fontsize=9, loc="left")
        axes.set_axis_off()
    return figure


def _mosaic(dataset: ImageRows) -> NDArray[np.float32]:
    """The first images on a grey sheet, so that black canvases show their borders; (height, width, 3)."""
    images = dataset.fixed(0, _ROWS * _COLUMNS).numpy() / 2 + 0.5
    side = images.shape[-1]
    gap = max(1, side // 32)
    pitch = side + gap
    sheet = np.full((_ROWS * pitch + gap, _COLUMNS * pitch + gap, 3), 0.6, np.float32)
    for index, image in enumerate(images):
        top, left = (gap + part * pitch for part in divmod(index, _COLUMNS))
        sheet[top : top + side, left : left + side] = image.transpose(1, 2, 0)
    return sheet


def _summarize(dataset: QuadrantDataset, num_classes: int) -> SplitSummary:
    recipes = dataset.recipes
    _, places = np.nonzero(recipes.filled)
    classes, colors = dataset.classes(recipes)[recipes.filled], recipes.colors[recipes.filled]
    return SplitSummary(
        digits=len(dataset.labels),
        digits_by_class=tuple(np.bincount(dataset.labels, minlength=num_classes).tolist()),
        images=len(dataset),
        images_by_num_digits=tuple(np.bincount(recipes.num_digits, minlength=5)[1:].tolist()),
        seed=dataset.seed,
        drawn=len(places),
        held_out=int(held_out(num_classes)[classes, places, colors].sum()),
    )
