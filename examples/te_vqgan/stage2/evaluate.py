"""The step ``evaluate``: what a finished tokenizer, and the GPT on its tokens, is worth on held-out combinations.

Writes ``reading.json`` into the folder of the Stage 1 run, and ``generation.json`` and ``generation.safetensors``
(pictures) into that of the Stage 2 run. What is there is not measured again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.te_vqgan.classifier.model import CellClassifier, load_classifier
from examples.te_vqgan.data.heldout import allowed
from examples.te_vqgan.data.pairs import CaptionedImages
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs.checkpoint import save_checkpoint
from examples.te_vqgan.runs.checks import require, require_int
from examples.te_vqgan.runs.files import read_json_object, write_text_atomically
from examples.te_vqgan.runs.provenance import Execution, git_commit, versions
from examples.te_vqgan.runs.running import Clock
from examples.te_vqgan.stage1.evaluation import dataset
from examples.te_vqgan.stage1.perceptual import load_perceptual, measured_distances
from examples.te_vqgan.stage2.generation import evaluate_pairs, read_tokenizer
from examples.te_vqgan.stage2.settings import Stage2Settings
from examples.te_vqgan.stage2.train import is_finished, load_tokenizer, require_tokenizer_of, stage2_folder
from te_quant import GPT

__all__ = ["GENERATION", "READING", "evaluate_gpt", "evaluate_tokenizer", "is_read"]

READING, GENERATION = "reading.json", "generation.json"
_PICTURES = "generation.safetensors"
# Every seed and every arm is measured on the same pairs.
_EVALUATION_SEED = 0


def is_read(tokenizer: Path, perceptual: str | None = None) -> bool:
    """Say whether the folder of a tokenizer holds its reading, and in it the distance that is asked for."""
    return (tokenizer / READING).exists() and (perceptual in (None, "none") or perceptual in _measured(tokenizer))


def evaluate_tokenizer(
    tokenizer: Path,
    classifier: Path,
    source: DigitSource,
    *,
    execution: Execution | None = None,
    perceptual: str | None = None,
    command: str | None = None,
) -> bool:
    """Read the digits in a tokenizer's reconstructions of the test images.

    What is there is measured again only if a perceptual distance is asked for that it lacks.

    Args:
        tokenizer: folder of the finished Stage 1 run.
        classifier: folder of the finished classifier.
        source: the digits.
        execution: where to compute.
        perceptual: name of a perceptual distance to measure too, out of :data:`~.stage1.presets.PERCEPTUAL`; by
            default that of the tokenizer's loss.
        command: what was typed, for the record.

    Returns:
        False if that had been done before.

    Raises:
        ValueError: a run is not finished.
        ImportError: the package behind ``perceptual`` is not installed, or does not work here.
    """
    if is_read(tokenizer, perceptual):
        return False
    clock = Clock()
    device = (execution or Execution()).apply()
    autoencoder, settings = load_tokenizer(tokenizer, device)
    names = dict.fromkeys([settings.perceptual if perceptual is None else perceptual, *_measured(tokenizer)])
    distances = {name: load_perceptual(name, device) for name in names}
    numbers = read_tokenizer(
        autoencoder,
        load_classifier(classifier).to(device),
        dataset(settings, source, "test"),
        len(source.class_names),
        device=device,
        perceptual={name: distance for name, distance in distances.items() if distance is not None},
    )
    numbers["spent"] = clock.spent()
    _write(tokenizer / READING, numbers, command)
    return True


def evaluate_gpt(
    settings: Stage2Settings,
    tokenizer: Path,
    classifier: Path,
    source: DigitSource,
    *,
    execution: Execution | None = None,
    candidates: int | None = None,
    progress: bool = True,
    command: str | None = None,
) -> bool:
    """Measure both tasks on held-out combinations, and on half as many pairs of combinations that training saw.

    The digits are those of the test split in either case.

    Args:
        settings: of the Stage 2 run.
        tokenizer: folder of the finished Stage 1 run that it stands on.
        classifier: folder of the finished classifier.
        source: the digits.
        execution: where to compute.
        candidates: sample from so many codes, the likeliest, instead of the settings' share of all, to compare
            codebooks of different size. The numbers go to a file of their own, without pictures.
        progress: show progress bars.
        command: what was typed, for the record.

    Returns:
        False if that had been done before.

    Raises:
        ValueError: a run is not finished, or ``candidates`` is not in [1, K].
    """
    folder = stage2_folder(tokenizer, settings)
    path = folder / (GENERATION if candidates is None else f"generation-{candidates}.json")
    if path.exists():
        return False
    device = (execution or Execution()).apply()
    autoencoder, stage1 = load_tokenizer(tokenizer, device)
    require(is_finished(folder, settings, stage1), "out", "a folder with a finished stage2 run", str(folder))
    require_tokenizer_of(folder, tokenizer)
    sampling = settings if candidates is None else _sampling(settings, candidates, stage1.model.num_codes)
    gpt = GPT.from_pretrained(folder / "model").to(device)
    reader: CellClassifier = load_classifier(classifier).to(device)
    seen = allowed("train", len(source.class_names))
    numbers: dict[str, Any] = {}
    pictures: dict[str, torch.Tensor] = {}
    texts: dict[str, Any] = {}
    for name, size, table in (("held_out", settings.eval_images, None), ("seen", settings.eval_images // 2, seen)):
        pairs = CaptionedImages(
            source,
            "test",
            canvas_size=stage1.canvas_size,
            size=size,
            seed=_EVALUATION_SEED,
            style=settings.caption_style,
            allowed=table,
        )
        numbers[name], shown = evaluate_pairs(
            gpt, autoencoder, reader, pairs, sampling, device=device, progress=_bar(progress, name, size)
        )
        pictures |= {f"{name}.{key}": shown[key] for key in ("images", "generated")}
        texts[name] = {key: shown[key] for key in ("captions", "written")}
    if candidates is None:
        save_checkpoint(folder / _PICTURES, pictures, texts)
    _write(path, numbers, command)
    return True


def _measured(tokenizer: Path) -> dict[str, float]:
    path = tokenizer / READING
    return measured_distances(read_json_object(path)) if path.exists() else {}


def _sampling(settings: Stage2Settings, candidates: int, num_codes: int) -> Stage2Settings:
    require_int("candidates", candidates, 1)
    require(candidates <= num_codes, "candidates", f"at most the {num_codes} codes", candidates)
    return dataclasses.replace(settings, top_fraction=candidates / num_codes)


def _write(path: Path, numbers: dict[str, Any], command: str | None) -> None:
    numbers |= {"command": command, "commit": git_commit(), "versions": versions()}
    write_text_atomically(path, json.dumps(numbers, indent=1) + "\n")


def _bar(shown: bool, name: str, total: int) -> Callable[[int], object]:
    from tqdm import tqdm

    bar = tqdm(total=total, disable=not shown, desc=name, unit="pair")

    def show(done: int) -> None:
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
