"""How many tokens of finished tokenizers survive a round trip: ``stability.json``, tables and a picture.

Shape letters: B images, S canvas side.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.te_vqgan.data.pictures import PictureSource
from examples.te_vqgan.data.rows import ImageRows
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.runs.checks import require, require_int
from examples.te_vqgan.runs.files import read_json_object, write_bytes_atomically, write_text_atomically
from examples.te_vqgan.runs.provenance import git_commit, versions
from examples.te_vqgan.stage1.evaluation import dataset
from examples.te_vqgan.stage1.exactness import finished_settings
from examples.te_vqgan.stage1.pictures import crops
from examples.te_vqgan.stage1.presets import ARMS, Stage1Settings, from_dict, settings_for
from te_quant import StabilityReport, VQAutoencoder, measure_stability
from te_quant.stability import TransformStability, plot_stability
from te_quant.tables import Table

__all__ = ["Tokenizer", "find_tokenizer", "measure_tokenizer", "render", "write_stability"]

_CYCLES = 3
# More colours than these could not be told apart. Where none of them is there, all are drawn.
_PICTURED = (
    "small-mnist/vqgan-seed0",
    "small-mnist/te_vqgan-seed0",
    "small-mnist/k16-seed0",
    "small-mnist/stride_exact-seed0",
    "round-trip-1/integer_exact-seed0",
    "photos-photographs/vqgan-seed0",
    "photos-photographs/stride_exact-seed0",
)


class Tokenizer(NamedTuple):
    """A finished tokenizer and what it was trained on.

    Attributes:
        name: folder of the results and of the run, as in ``small-mnist/stride_exact-seed0``.
        title: how the arm is called.
        weights: folder for ``from_pretrained``.
        settings: of its training.
    """

    name: str
    title: str
    weights: Path
    settings: Stage1Settings


def find_tokenizer(folder: Path) -> Tokenizer:
    """Find the tokenizer in the folder of a finished run, or in one that ``publish`` has written.

    Raises:
        ValueError: there is none.
    """
    if (folder / "about.json").is_file():
        about = read_json_object(folder / "about.json")
        arm, seed = about["arm"].rsplit("-seed", 1)
        if "stage1" in about:
            settings, results = from_dict(about["stage1"]), about["results"]
        else:
            # The first version noted the command only.
            words = shlex.split(about["command"])
            preset, out = (words[words.index(option) + 1] for option in ("--preset", "--out"))
            settings = settings_for(preset, arm, {"data": about["data"], "seed": int(seed)})
            results = Path(out).name
        name, weights = f"{results}/{about['arm']}", folder / "tokenizer"
    else:
        settings = finished_settings(folder)
        arm = folder.name.rsplit("-seed", 1)[0]
        name, weights = f"{folder.resolve().parent.name}/{folder.name}", folder / "model"
    title = ARMS[arm].title if arm in ARMS else arm
    return Tokenizer(name, f"{title}, seed {settings.seed}", weights, settings)


def first_images(settings: Stage1Settings, source: DigitSource | PictureSource, count: int) -> Tensor:
    """Return the first test images, the same for every seed: (B, 3, S, S) in [-1, 1]."""
    require_int("images", count, 2)
    images: ImageRows
    if isinstance(source, PictureSource):
        images = crops(settings, source, "test")
    else:
        images = dataset(settings, source, "test")
    require(count <= len(images), "images", f"at most the {len(images):,} test images", count)
    return images.fixed(0, count)


def measure_tokenizer(
    tokenizer: Tokenizer, source: DigitSource | PictureSource, *, count: int, progress: bool | None = None
) -> StabilityReport:
    """Measure one tokenizer in float32 on test images; phases of a polyphase encoder are not kept.

    Args:
        tokenizer: which one.
        source: the digits or pictures of its settings.
        count: B, images.
        progress: as for :func:`te_quant.measure_stability`.
    """
    model = VQAutoencoder.from_pretrained(tokenizer.weights, dtype=torch.float32)
    images = first_images(tokenizer.settings, source, count)
    return measure_stability(
        model.encode_to_indices,
        model.decode_indices,
        images,
        cycles=_CYCLES,
        num_codes=model.config.num_codes,
        progress=progress,
    )


def write_stability(folder: Path, reports: Mapping[str, tuple[str, StabilityReport]], *, command: str) -> None:
    """Add reports to those in ``folder``, and write everything that :func:`render` makes of them.

    Args:
        folder: where; a report of the same name is replaced.
        reports: title and report by name.
        command: what was typed, for the record.
    """
    path = folder / "stability.json"
    before: dict[str, Any] = read_json_object(path)["tokenizers"] if path.is_file() else {}
    facts = {"command": command, "commit": git_commit(), "versions": versions()}
    after = {
        name: {"title": title, **facts, "report": report.to_dict()} for name, (title, report) in reports.items()
    }
    tokenizers = dict(sorted((before | after).items()))
    write_text_atomically(path, json.dumps({"tokenizers": tokenizers}) + "\n")
    render(folder)


def render(folder: Path) -> None:
    """Write tables and picture from the ``stability.json`` in ``folder``."""
    path = folder / "stability.json"
    require(path.is_file(), "into", "a folder with stability.json", folder)
    found = read_json_object(path)["tokenizers"]
    reports = {name: StabilityReport.from_dict(entry["report"]) for name, entry in found.items()}
    titles = {name: entry["title"] for name, entry in found.items()}
    write_text_atomically(folder / "stability.md", _tables(titles, reports))
    parts = [f"**{name}**, {titles[name]}\n\n{report.to_markdown()}" for name, report in reports.items()]
    write_text_atomically(folder / "tokenizers.md", "\n".join(parts))
    shown = {name: reports[name] for name in _PICTURED if name in reports} or reports
    write_bytes_atomically(folder / "stability.png", encode_png(plot_stability(shown), dpi=110))


def _tables(titles: Mapping[str, str], reports: Mapping[str, StabilityReport]) -> str:
    names = list(dict.fromkeys(name for report in reports.values() for name in report.transforms))
    labels = {name: f"{titles[name]}<br>`{name}`" for name in reports}

    def figures(title: str, value: Callable[[TransformStability], float]) -> Table:
        rows = [
            [
                labels[name],
                *(f"{value(report.transforms[one]):.3f}" if one in report.transforms else "" for one in names),
            ]
            for name, report in reports.items()
        ]
        return Table([title, *names], rows)

    header = ["8-bit round trip", "token match", "on foreground", "images whole", f"left after {_CYCLES} cycles"]
    header += ["used codes", "perplexity", "PSNR (dB)", "images"]
    rows = [[labels[name], *_beside(report)] for name, report in reports.items()]
    tables = [
        figures("token match", lambda one: one.match.rate),
        figures("κ", lambda one: one.match.kappa),
        Table(header, rows, note=_conditions(list(reports.values()))),
    ]
    return "\n".join(table.to_markdown() for table in tables)


def _beside(report: StabilityReport) -> list[str]:
    found, error = report.transforms["8-bit"], report.reconstruction
    return [
        found.match.rate_text(),
        "no ground" if found.foreground is None else found.foreground.rate_text(),
        found.whole.text(),
        f"{found.cycles[-1].match.rate:.3f}",
        f"{report.code_use.used_codes} of {report.settings.num_codes}",
        f"{report.code_use.perplexity:.1f}",
        "" if error is None else f"{error.psnr:.2f}",
        str(report.settings.num_images),
    ]


def _conditions(reports: Sequence[StabilityReport]) -> str:
    sizes = sorted({report.settings.image_size[0] for report in reports})
    sides = " or ".join(f"{side}x{side}" for side in sizes)
    return (
        f"Test images of {sides} pixels, float32. In brackets 95 % intervals over images; `tokenizers.md` has "
        "those of all figures."
    )
