"""Stage 1: train one arm with one seed in one folder, so that it can stop anywhere and go on.

A run's folder holds ``settings.json``, ``log.jsonl``, ``tensorboard/``, ``checkpoint.safetensors``; and when it
is finished ``model/`` (for ``VQAutoencoder.from_pretrained``), ``samples.safetensors``, ``provenance.json`` and,
last of all, ``evaluation.json``, whose presence says that nothing is left to do.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from examples.te_vqgan.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.checks import require
from examples.te_vqgan.evaluation import dataset, evaluate, quality
from examples.te_vqgan.files import write_text_atomically
from examples.te_vqgan.logs import RunLog
from examples.te_vqgan.presets import Stage1Settings, differing, to_dict
from examples.te_vqgan.provenance import Execution, git_commit, versions
from examples.te_vqgan.quadrants import QuadrantDataset
from examples.te_vqgan.sources import DigitSource
from examples.te_vqgan.trainer import Stage1Trainer
from te_quant.functional import orthogonality

__all__ = ["Interrupted", "is_finished", "train_stage1"]

CHECKPOINT = "checkpoint.safetensors"
_VALIDATION_IMAGES = 128
_LOCK_SECONDS = 30.0


class Interrupted(Exception):  # noqa: N818  (an outcome, not an error)
    """Training was asked to stop; its checkpoint is written."""


def is_finished(folder: Path, settings: Stage1Settings) -> bool:
    """Say whether ``folder`` holds the finished run of ``settings``.

    Raises:
        ValueError: it holds a run of other settings.
    """
    path = folder / "settings.json"
    if not path.exists():
        return False
    changes = differing(json.loads(path.read_text(encoding="utf-8")), to_dict(settings))
    require(not changes, "settings", f"those of the run in {folder}", "; ".join(changes))
    return (folder / "evaluation.json").exists()


def train_stage1(
    settings: Stage1Settings,
    folder: Path,
    source: DigitSource,
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
    if is_finished(folder, settings):
        return False
    checkpoint = folder / CHECKPOINT
    require(resume or not checkpoint.exists(), "resume", f"set, as {folder} holds an unfinished run", "False")
    with _only_process_in(folder):
        write_text_atomically(folder / "settings.json", json.dumps(to_dict(settings), indent=2) + "\n")
        where = execution or Execution()
        trainer = Stage1Trainer(settings, where.apply())
        train = dataset(settings, source, "train")
        spent = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        if checkpoint.exists():
            tensors, facts = load_checkpoint(checkpoint)
            trainer.load(tensors, facts)
            spent = facts["spent"]
        else:
            trainer.initialize(lambda number: train.batch(number, settings.batch_size))
        clock = _Clock(spent)
        _loop(trainer, train, dataset(settings, source, "validation"), folder, clock, stop, progress)
        trained = clock.spent()
        trainer.model.save_pretrained(folder / "model")
        numbers, samples = evaluate(trainer.model, settings, source, trainer.device)
        save_checkpoint(folder / "samples.safetensors", samples, {})
        facts = _provenance(command, where, trained, clock.spent())
        write_text_atomically(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
        write_text_atomically(folder / "evaluation.json", json.dumps(numbers, indent=2) + "\n")
    return True


def _loop(
    trainer: Stage1Trainer,
    train: QuadrantDataset,
    validation: QuadrantDataset,
    folder: Path,
    clock: _Clock,
    stop: Callable[[int], bool] | None,
    progress: bool,
) -> None:
    from tqdm import tqdm

    settings = trainer.settings
    bar = tqdm(total=settings.steps, initial=trainer.step, disable=not progress, desc=folder.name, unit="step")
    log = RunLog(folder / "log.jsonl", trainer.step, folder / "tensorboard")
    with bar, log, _stop_signals() as signalled:
        while trainer.step < settings.steps:
            numbers = trainer.train_step(train.batch(trainer.step, settings.batch_size))
            done = trainer.step
            if done % settings.log_every == 0 or done == settings.steps:
                line = {"step": done, **{name: value.item() for name, value in numbers.items()}}
                if not math.isfinite(line["loss"]):
                    raise FloatingPointError(f"loss must be finite, got {line['loss']} at step {done}.")
                if done % settings.validate_every == 0 or done == settings.steps:
                    measured = quality(trainer.model, validation, _VALIDATION_IMAGES, trainer.device)
                    line |= {f"validation_{name}": value for name, value in measured.items()}
                    line["orthogonality"] = float(orthogonality(trainer.model.quantizer.codebook.detach()))
                log.write(**line)
                bar.set_postfix(loss=f"{line['loss']:.3f}", codes=int(line["batch_used_codes"]))
            bar.update()
            interrupted = done < settings.steps and (signalled() or (stop is not None and stop(done)))
            if interrupted or done % settings.checkpoint_every == 0 or done == settings.steps:
                facts = {"step": done, "settings": to_dict(settings), "spent": clock.spent()}
                save_checkpoint(folder / CHECKPOINT, trainer.tensors(), facts)
            if interrupted:
                raise Interrupted(
                    f"{folder}: stopped at step {done} of {settings.steps}; --resume goes on from there."
                )


class _Clock:
    """Seconds spent on a run, over all its processes."""

    def __init__(self, before: dict[str, float]) -> None:
        self._before = before
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {
            "wall_seconds": self._before["wall_seconds"] + wall,
            "cpu_seconds": self._before["cpu_seconds"] + cpu,
        }


def _provenance(
    command: str | None, where: Execution, trained: dict[str, float], all_in_all: dict[str, float]
) -> dict[str, Any]:
    import torch

    return {
        "command": command,
        "commit": git_commit(),
        "device": where.device,
        "threads": torch.get_num_threads(),
        "training": trained,
        "training_and_evaluation": all_in_all,
        "versions": versions(),
    }


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question, since an exception could come in the middle of a step.

    A second signal is obeyed at once.
    """
    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before: dict[signal.Signals, Any] = {}
    # Only the main thread may set handlers; elsewhere signals keep their meaning.
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _only_process_in(folder: Path) -> Iterator[None]:
    """Refuse a folder in which another process works, unless it ends soon, as those of a killed ``run`` do."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # a system without such locks
            yield
            return
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder} must not be in use, but another process works there.") from error
            time.sleep(0.2)
        yield
