"""The step ``evaluate``: what a finished tokenizer, and the GPT on its tokens, is worth on held-out combinations.

Writes ``reading.json`` into the folder of the Stage 1 run, and for each rule ``rule-NAME.json`` into that of the
Stage 2 run, with pictures in ``rule-paper.safetensors``. Existing files are not measured again unless they are
damaged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.te_vqgan.classifier.model import CellClassifier, load_classifier, weights_path
from examples.te_vqgan.classifier.settings import require_reader_of
from examples.te_vqgan.data.heldout import allowed
from examples.te_vqgan.data.pairs import CaptionedImages
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import read_json_object, sha256, write_text_atomically
from examples.te_vqgan.runs.provenance import Execution, git_commit, versions
from examples.te_vqgan.runs.recorded import require_recorded
from examples.te_vqgan.runs.running import Clock
from examples.te_vqgan.stage1.evaluation import dataset
from examples.te_vqgan.stage1.perceptual import load_perceptual, measured_distances
from examples.te_vqgan.stage2.generation import evaluate_pairs, read_tokenizer
from examples.te_vqgan.stage2.rules import HEADLINE, rule_named
from examples.te_vqgan.stage2.settings import Stage2Settings
from examples.te_vqgan.stage2.train import is_finished, load_tokenizer, stage2_folder
from examples.te_vqgan.stage2.transformers import load_transformer

__all__ = ["PICTURES", "READING", "evaluate_gpt", "evaluate_tokenizer", "is_measured", "is_read", "rule_file"]

READING = "reading.json"
PICTURES = "rule-paper.safetensors"
# Every seed and every arm is measured on the same pairs.
_EVALUATION_SEED = 0


def is_read(tokenizer: Path, perceptual: str | None = None) -> bool:
    """Say whether the folder of a tokenizer holds its whole reading, and in it the distance that is asked for."""
    path = tokenizer / READING
    asked = perceptual not in (None, "none")
    return path.exists() and not _is_damaged(path) and (not asked or perceptual in _measured(tokenizer))


def is_measured(folder: Path, rule: str) -> bool:
    """Say whether the folder of a Stage 2 run holds the numbers of ``rule``, and nothing damaged of them."""
    return (folder / rule_file(rule)).exists() and not any(map(_is_damaged, _files(folder, rule)))


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

    What is there is measured again only if it is damaged, or lacks a perceptual distance that is asked for.

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
        ValueError: a run is not finished, or the classifier reads other digits.
        ImportError: the package behind ``perceptual`` is not installed, or does not work here.
    """
    if is_read(tokenizer, perceptual):
        return False
    _tell_damaged(tokenizer / READING)
    clock = Clock()
    device = (execution or Execution()).apply()
    autoencoder, settings = load_tokenizer(tokenizer, device)
    require_reader_of(settings.data, settings.canvas_size, classifier)
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
    numbers |= {"classifier": sha256(weights_path(classifier)), "spent": clock.spent()}
    _write(tokenizer / READING, numbers, command)
    return True


def evaluate_gpt(
    settings: Stage2Settings,
    tokenizer: Path,
    classifier: Path,
    source: DigitSource,
    *,
    rule: str,
    execution: Execution | None = None,
    progress: bool = True,
    command: str | None = None,
) -> bool:
    """Measure both tasks on held-out combinations.

    Under the rule ``paper``, also measure combinations seen in training, on half as many pairs. The digits are
    those of the test split in either case. What is there is measured again only if it is damaged.

    Args:
        settings: of the Stage 2 run.
        tokenizer: folder of the finished Stage 1 run that it stands on.
        classifier: folder of the finished classifier.
        source: the digits.
        rule: how to draw, a name that :func:`~.stage2.rules.rule_named` knows.
        execution: where to compute.
        progress: show progress bars.
        command: what was typed, for the record.

    Returns:
        False if that had been done before.

    Raises:
        ValueError: a run is not finished, the weights of the GPT or of its tokenizer are not those that it ended
            with, the classifier reads other digits, or there is no such rule.
    """
    folder = stage2_folder(tokenizer, settings)
    if is_measured(folder, rule):
        return False
    _tell_damaged(*_files(folder, rule))
    device = (execution or Execution()).apply()
    autoencoder, stage1 = load_tokenizer(tokenizer, device)
    require(is_finished(folder, settings, stage1), "out", "a folder with a finished stage2 run", str(folder))
    require_recorded(folder)
    require_reader_of(stage1.data, stage1.canvas_size, classifier)
    clock = Clock()
    gpt = load_transformer(folder / "model").to(device)
    reader: CellClassifier = load_classifier(classifier).to(device)
    numbers: dict[str, Any] = {}
    pictures: dict[str, torch.Tensor] = {}
    texts: dict[str, Any] = {}
    splits: dict[str, tuple[int, Any]] = {"held_out": (settings.eval_images, None)}
    if rule == HEADLINE:
        splits["seen"] = (settings.eval_images // 2, allowed("train", len(source.class_names)))
    for name, (size, table) in splits.items():
        pairs = CaptionedImages(
            source,
            "test",
            canvas_size=stage1.canvas_size,
            size=size,
            seed=_EVALUATION_SEED,
            style=settings.caption_style,
            allowed=table,
        )
        decoding = rule_named(rule, stage1.model.num_codes, pairs.tokenizer.vocab_size)
        bar = _bar(progress, f"{folder.parent.name}, {name}, {rule}", size)
        numbers[name], shown = evaluate_pairs(
            gpt, autoencoder, reader, pairs, decoding, seed=settings.seed, device=device, progress=bar
        )
        pictures |= {f"{name}.{key}": shown[key] for key in ("images", "generated")}
        texts[name] = {key: shown[key] for key in ("captions", "written")}
    if rule == HEADLINE:
        save_checkpoint(folder / PICTURES, pictures, texts)
    numbers |= {"rule": decoding._asdict(), "classifier": sha256(weights_path(classifier)), "spent": clock.spent()}
    _write(folder / rule_file(rule), numbers, command)
    return True


def rule_file(rule: str) -> str:
    """Return the name of the file with the numbers of a rule."""
    return f"rule-{rule}.json"


def _files(folder: Path, rule: str) -> list[Path]:
    return [folder / rule_file(rule), *([folder / PICTURES] if rule == HEADLINE else [])]


def _measured(tokenizer: Path) -> dict[str, float]:
    path = tokenizer / READING
    return measured_distances(read_json_object(path)) if path.exists() and not _is_damaged(path) else {}


def _is_damaged(path: Path) -> bool:
    """Say whether a file is there and cannot be read."""
    read = load_checkpoint if path.suffix == ".safetensors" else read_json_object
    try:
        if path.exists():
            read(path)
    except ValueError:
        return True
    return False


def _tell_damaged(*paths: Path) -> None:
    for path in filter(_is_damaged, paths):
        print(f"{path}: damaged, is measured again.", file=sys.stderr)


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
