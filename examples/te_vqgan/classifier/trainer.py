"""Train the classifier in one folder, so that it can stop anywhere and go on, and say how good it is.

A run's folder is that of :mod:`~.runs.running`; a finished one has ``model/`` too, for
:func:`~.classifier.model.load_classifier`.

Shape letters: B cells, L classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.te_vqgan.classifier.cells import CellBatch, CellDataset
from examples.te_vqgan.classifier.model import (
    CellClassifier,
    ClassifierOutput,
    ClassifierSettings,
    save_classifier,
)
from examples.te_vqgan.data.recipes import COLORS
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs.checkpoint import adam_state, load_adam_state, under
from examples.te_vqgan.runs.files import write_text_atomically
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.runs.running import (
    Clock,
    Interrupted,
    begun_run,
    finished_run,
    provenance,
    run_steps,
)
from examples.te_vqgan.runs.schedule import rate_factor

__all__ = [
    "CLASSIFIERS",
    "ClassifierTrainer",
    "Interrupted",
    "accuracy",
    "train_classifier",
]

_BATCH = 500
# Whatever the training's seed, the same cells in the same colours.
_EVALUATION_SEED = 0

CLASSIFIERS: dict[str, ClassifierSettings] = {
    "smoke": ClassifierSettings(
        data="digits",
        steps=6,
        batch_size=16,
        warmup_steps=2,
        widths=(8, 16),
        log_every=1,
        validate_every=3,
        checkpoint_every=2,
        validation_cells=50,
    ),
    "small": ClassifierSettings(
        steps=6000,
        widths=(16, 64, 128),
        stem_stride=1,
        flaws=0.1,
        rotation=8.0,
        scale=0.08,
    ),
    # Read the generated images of the reports before the one above.
    "small-strided": ClassifierSettings(),
    "small-64": ClassifierSettings(
        canvas_size=64,
        steps=5500,
        learning_rate=4e-3,
        warmup_steps=200,
        stem_stride=4,
        flaws=0.1,
        rotation=8.0,
        scale=0.08,
        bf16=True,
    ),
    "paper": ClassifierSettings(
        canvas_size=64,
        steps=8000,
        batch_size=256,
        learning_rate=2e-3,
        warmup_steps=400,
        widths=(64, 128, 256, 512),
        blocks=2,
        stem_stride=1,
        margin=2,
        bf16=True,
    ),
}
CLASSIFIERS |= dict.fromkeys(("small-best", "small-captions", "small-fine"), CLASSIFIERS["small"])
CLASSIFIERS["narrow"] = dataclasses.replace(CLASSIFIERS["small-64"], margin=2)
"""Settings by name. "smoke" takes seconds. "small" takes nine minutes of one core and reads 99.53 % of MNIST's
test digits, 14 pixels wide; "small-strided" takes three and reads 99.35 %. "small-64" takes three, with bfloat16
arithmetic, and reads 99.50 %, 28 pixels wide. "paper" has the paper's network, for an accelerator."""


class ClassifierTrainer:
    """A classifier with what trains it.

    Args:
        settings: decide, with the batches, every number.
        num_classes: L.
        device: where to train.

    The initial weights depend on ``settings.seed`` alone: they are drawn on the CPU from a generator state that
    is put back afterwards. Nothing else is drawn here.
    """

    def __init__(self, settings: ClassifierSettings, num_classes: int, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = CellClassifier(
                num_classes=num_classes,
                num_colors=len(COLORS),
                widths=settings.widths,
                blocks=settings.blocks,
                stem_stride=settings.stem_stride,
                margin=settings.margin,
            )
        # Channels last is a fifth faster on CPUs and changes nothing but rounding.
        self.model = model.to(device, memory_format=_layout(device))  # type: ignore[call-overload]
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    def train_step(self, batch: CellBatch) -> dict[str, Tensor]:
        """Take one step and return the numbers of it, each ()."""
        settings = self.settings
        factor = rate_factor(
            self.step,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            final_share=settings.final_lr_share,
        )
        self.model.train()
        cells = batch.cells.to(self.device, memory_format=_layout(self.device))
        digits, colors = batch.digits.to(self.device), batch.colors.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
            output = self.model(cells)
        output = ClassifierOutput(output.digit_logits.float(), output.color_logits.float())
        digit_loss = F.cross_entropy(output.digit_logits, digits, label_smoothing=settings.label_smoothing)
        color_loss = F.cross_entropy(output.color_logits, colors)
        loss = digit_loss + color_loss
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        numbers = {"loss": loss, "digit_loss": digit_loss, "color_loss": color_loss, "grad_norm": norm}
        numbers["digit_accuracy"] = (output.digit_logits.argmax(dim=1) == digits).float().mean()
        numbers["color_accuracy"] = (output.color_logits.argmax(dim=1) == colors).float().mean()
        numbers["learning_rate"] = torch.tensor(settings.learning_rate * factor)
        self.step += 1
        return {name: value.detach() for name, value in numbers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        moments = adam_state(self.optimizer, self.model.named_parameters())
        return state | {f"adam.{name}": tensor for name, tensor in moments.items()}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from what :meth:`tensors` gave and from the step in ``facts``."""
        self.model.load_state_dict(under("model", tensors))
        load_adam_state(self.optimizer, self.model.named_parameters(), under("adam", tensors))
        self.step = facts["step"]


@torch.no_grad()
def accuracy(classifier: CellClassifier, cells: CellDataset, count: int | None = None) -> dict[str, Any]:
    """Measure a classifier on the first ``count`` cells of a split, all by default, in evaluation mode.

    Returns:
        ``cells`` counted; shares of them in [0, 1]: ``digit_accuracy``, ``color_accuracy`` and ``accuracy``, where
        both are right; ``class_accuracy``, the digit accuracy of each class, ``None`` where there is no cell;
        ``confusion``, L x L counts, a row for each true class, a column for each answer.
    """
    was_training = classifier.training
    classifier.eval()
    device = classifier.digit_head.weight.device
    classes: int = classifier.config["num_classes"]
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    colors_right = both_right = 0
    count = len(cells) if count is None else min(count, len(cells))
    for start in range(0, count, _BATCH):
        batch = cells.fixed(start, min(start + _BATCH, count))
        pixels = batch.cells.to(device, memory_format=_layout(device))
        output = classifier(pixels)
        digits, colors = (logits.argmax(dim=1).cpu() for logits in output)
        confusion += torch.bincount(batch.digits * classes + digits, minlength=classes * classes)
        colors_right += int((colors == batch.colors).sum())
        both_right += int(((colors == batch.colors) & (digits == batch.digits)).sum())
    classifier.train(was_training)
    table = confusion.reshape(classes, classes)
    right, shown = table.diagonal().tolist(), table.sum(dim=1).tolist()
    return {
        "cells": count,
        "digit_accuracy": sum(right) / count,
        "color_accuracy": colors_right / count,
        "accuracy": both_right / count,
        "class_accuracy": [hits / seen if seen else None for hits, seen in zip(right, shown, strict=True)],
        "confusion": table.tolist(),
    }


def train_classifier(
    settings: ClassifierSettings,
    folder: Path,
    source: DigitSource,
    *,
    execution: Execution | None = None,
    resume: bool = False,
    stop: Callable[[int], bool] | None = None,
    progress: bool = True,
    command: str | None = None,
) -> bool:
    """Train, measure and save one classifier.

    Args:
        settings: of the run.
        folder: the run's own; made if it is not there.
        source: the digits.
        execution: where to compute.
        resume: go on from the checkpoint in ``folder``, if there is one.
        stop: asked after every step, given the steps done, whether to stop there.
        progress: show a progress bar.
        command: what was typed, for the record.

    Returns:
        False if the run had been finished before and nothing was done.

    Raises:
        ValueError: the folder holds a run of other settings, or an unfinished one and ``resume`` is not set.
        Interrupted: ``stop``, Ctrl-C or SIGTERM ended the training early.
        FloatingPointError: the loss is no longer finite.
    """
    plain = settings.to_dict()
    present = ClassifierSettings.present_form
    if finished_run(folder, plain, present):
        return False
    with begun_run(folder, plain, resume=resume, present=present) as checkpoint:
        where = execution or Execution()
        trainer = ClassifierTrainer(settings, len(source.class_names), where.apply())
        train = CellDataset(source, "train", canvas_size=settings.canvas_size, seed=settings.seed)
        validation = CellDataset(source, "validation", canvas_size=settings.canvas_size, seed=_EVALUATION_SEED)
        if checkpoint is not None:
            trainer.load(*checkpoint)

        def advance() -> dict[str, Tensor]:
            return trainer.train_step(train.batch(trainer.step, settings.batch_size, settings.distortion))

        def validate() -> dict[str, float]:
            found = accuracy(trainer.model, validation, settings.validation_cells)
            return {f"validation_{name}": found[name] for name in ("digit_accuracy", "color_accuracy")}

        clock = Clock(None if checkpoint is None else checkpoint[1]["spent"])
        run_steps(
            trainer,
            settings,
            plain,
            folder,
            advance=advance,
            validate=validate,
            clock=clock,
            stop=stop,
            progress=progress,
            shown={"digits": "digit_accuracy"},
        )
        trained = clock.spent()
        save_classifier(trainer.model, folder / "model")
        test = CellDataset(source, "test", canvas_size=settings.canvas_size, seed=_EVALUATION_SEED)
        numbers = {
            "validation": accuracy(trainer.model, validation),
            "test": accuracy(trainer.model, test),
        }
        facts = provenance(command, where, trained, clock.spent())
        write_text_atomically(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
        write_text_atomically(folder / "evaluation.json", json.dumps(numbers, indent=2) + "\n")
    return True


def _layout(device: torch.device) -> torch.memory_format:
    """Channels-last, the faster one, but on a CPU without AVX-512.

    On one with AVX2 alone the backward pass of a strided 1x1 convolution from 4 to 8 channels writes beyond its
    memory (torch 2.13), and such a one is in small classifiers.
    """
    crashes = device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return torch.contiguous_format if crashes else torch.channels_last
