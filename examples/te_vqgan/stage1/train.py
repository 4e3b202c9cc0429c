"""Stage 1: train one arm with one seed in one folder, so that it can stop anywhere and go on.

A run's folder holds ``settings.json``, ``log.jsonl``, ``tensorboard/``, ``checkpoint.safetensors``; and when it
is finished ``model/`` (for ``VQAutoencoder.from_pretrained``), ``samples.safetensors``, ``provenance.json`` and,
last of all, ``evaluation.json``, whose presence says that nothing is left to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from examples.te_vqgan.data.pictures import PictureSource
from examples.te_vqgan.data.rows import ImageRows
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checkpoint import save_checkpoint
from examples.te_vqgan.runs.files import sha256, write_text_atomically
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.runs.running import (
    CHECKPOINT,
    WEIGHTS,
    Clock,
    Interrupted,
    begun_run,
    finished_run,
    provenance,
    run_steps,
)
from examples.te_vqgan.stage1.evaluation import dataset, evaluate, quality
from examples.te_vqgan.stage1.joint import vector_quantizer
from examples.te_vqgan.stage1.perceptual import require_perceptual
from examples.te_vqgan.stage1.pictures import crops, evaluate_pictures
from examples.te_vqgan.stage1.presets import Stage1Settings, present_form, to_dict
from examples.te_vqgan.stage1.trainer import Stage1Trainer
from te_quant.functional import orthogonality

__all__ = ["CHECKPOINT", "Interrupted", "is_finished", "train_stage1"]

_VALIDATION_IMAGES = 128


def is_finished(folder: Path, settings: Stage1Settings) -> bool:
    """Say whether ``folder`` holds the finished run of ``settings``.

    Raises:
        ValueError: it holds a run of other settings.
    """
    return finished_run(folder, to_dict(settings), present_form)


def train_stage1(
    settings: Stage1Settings,
    folder: Path,
    source: DigitSource | PictureSource,
    *,
    execution: Execution | None = None,
    resume: bool = False,
    stop: Callable[[int], bool] | None = None,
    progress: bool = True,
    command: str | None = None,
) -> bool:
    """Train, measure and save one run.

    Args:
        settings: of the run.
        folder: the run's own; made if it is not there.
        source: the digits or pictures.
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
        ImportError: the package of the perceptual distance is not installed, or does not work here.
        FloatingPointError: the loss is no longer finite.
    """
    if is_finished(folder, settings):
        return False
    # Before the folder is taken, or it would hold settings that never ran.
    require_perceptual(settings.perceptual)
    plain = to_dict(settings)
    with begun_run(folder, plain, resume=resume, present=present_form) as checkpoint:
        where = execution or Execution()
        device = where.apply()
        trainer = Stage1Trainer(settings, device, channels_last=where.channels_last, compiled=where.compiled)
        train, validation = (_images(settings, source, split) for split in ("train", "validation"))
        if checkpoint is None:
            trainer.initialize(lambda number: train.batch(number, settings.batch_size))
        else:
            trainer.load(*checkpoint)

        def advance() -> dict[str, Tensor]:
            rows = distributed.share(train.row_batch(trainer.step, settings.batch_size))
            return trainer.train_step(train.render(rows))

        def validate() -> dict[str, float]:
            measured = quality(trainer.model, validation, _VALIDATION_IMAGES, trainer.device)
            penalty = float(orthogonality(vector_quantizer(trainer.model).codebook.detach()))
            return {**{f"validation_{name}": value for name, value in measured.items()}, "orthogonality": penalty}

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
            shown={"codes": "batch_used_codes"},
        )
        trained, processes = clock.spent(), distributed.size()

        def finish() -> None:
            trainer.model.save_pretrained(folder / "model")
            hashes = {"weights": sha256(folder / WEIGHTS)}
            if isinstance(source, PictureSource):
                numbers, samples = evaluate_pictures(trainer.model, settings, source, trainer.device)
            else:
                numbers, samples = evaluate(trainer.model, settings, source, trainer.device)
            save_checkpoint(folder / "samples.safetensors", samples, {})
            facts = provenance(command, where, trained, clock.spent(), processes=processes, hashes=hashes)
            if isinstance(source, PictureSource):
                facts["pictures"] = list(source.manifest)
            write_text_atomically(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
            write_text_atomically(folder / "evaluation.json", json.dumps(numbers, indent=2) + "\n")

        distributed.from_main(finish)
    return True


def _images(settings: Stage1Settings, source: DigitSource | PictureSource, split: str) -> ImageRows:
    if isinstance(source, PictureSource):
        return crops(settings, source, split)
    return dataset(settings, source, split)
