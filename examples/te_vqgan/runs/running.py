"""What every training run does alike: one process a folder, a stop at any step, and the same bits after it.

A run's folder holds ``settings.json``, ``log.jsonl`` and ``checkpoint.safetensors``; and when it is finished
``provenance.json`` and, last of all, ``evaluation.json``, whose presence says that nothing is left to do. Of the
processes of :mod:`~.runs.distributed` the main one alone needs the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol

from torch import Tensor

from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.differences import differing
from examples.te_vqgan.runs.files import read_json_object, write_text_atomically
from examples.te_vqgan.runs.logs import RunLog
from examples.te_vqgan.runs.provenance import Execution, git_commit, versions

__all__ = [
    "CHECKPOINT",
    "WEIGHTS",
    "Clock",
    "Interrupted",
    "PresentForm",
    "RunSettings",
    "RunTrainer",
    "begun_run",
    "finished_run",
    "has_ended",
    "only_process_in",
    "provenance",
    "recorded_hash",
    "require_finished",
    "run_steps",
    "stop_signals",
]

CHECKPOINT = "checkpoint.safetensors"
# As ``save_pretrained`` calls them.
WEIGHTS = "model/model.safetensors"
_LOCK_SECONDS = 30.0
# Of file systems without locks, such as some that are mounted over a network.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

PresentForm = Callable[[Mapping[str, Any]], dict[str, Any]]


class Interrupted(Exception):  # noqa: N818  (an outcome, not an error)
    """The run was asked to stop: before it began, or in training, whose checkpoint is written."""


class RunSettings(Protocol):
    """The settings that say when a run logs, saves and ends, all in steps."""

    @property
    def steps(self) -> int:
        """Length of the run."""

    @property
    def log_every(self) -> int:
        """Steps between two lines of the log."""

    @property
    def validate_every(self) -> int:
        """Steps between two validations; a multiple of ``log_every``."""

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints."""


class RunTrainer(Protocol):
    """A model with what trains it."""

    step: int
    """Steps done."""

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""


class Clock:
    """Seconds spent on a run, over all its processes.

    Args:
        before: what :meth:`spent` gave in the last process; ``None`` in the first.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self._before = before or {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        """Return ``wall_seconds`` and ``cpu_seconds`` up to now."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {
            "wall_seconds": self._before["wall_seconds"] + wall,
            "cpu_seconds": self._before["cpu_seconds"] + cpu,
        }


def finished_run(folder: Path, settings: Mapping[str, Any], present: PresentForm = dict) -> bool:
    """Say whether ``folder`` holds the finished run of ``settings``, which are as JSON gives them back.

    Args:
        folder: of the run.
        settings: that it should have.
        present: brings settings that an older version stored into the form of this one.

    Raises:
        ValueError: it holds a run of other settings.
    """

    def finished() -> bool:
        path = folder / "settings.json"
        if not path.exists():
            return False
        changes = differing(present(read_json_object(path)), settings)
        require(not changes, "settings", f"those of the run in {folder}", _others(changes, "use another --out"))
        return has_ended(folder)

    return distributed.from_main(finished)


def _others(changes: Sequence[str], cure: str) -> str:
    return f"others: {'; '.join(changes)}; {cure}"


def has_ended(folder: Path) -> bool:
    """Say whether the run in ``folder`` was trained and measured to the end, whatever its settings."""
    return (folder / "evaluation.json").is_file()


def require_finished(folder: Path, step: str, command: str) -> None:
    """Refuse a folder that holds no finished run, and name the command that makes it one.

    Args:
        folder: of the run.
        step: whose run it should be, such as ``stage1``.
        command: the words that train it.

    Raises:
        ValueError: it holds none, or an unfinished one.
    """
    begun = (folder / CHECKPOINT).exists()
    cure = f", which is unfinished; {command} --resume finishes it" if begun else f"; {command} trains it"
    require(has_ended(folder), "out", f"a folder with a finished {step} run", f"{folder}{cure}")


@contextlib.contextmanager
def begun_run(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    present: PresentForm = dict,
    inputs: Mapping[str, str] | None = None,
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]] | None]:
    """Keep ``folder`` for the unfinished run of ``settings``, and give its checkpoint, ``None`` at the beginning.

    Args:
        folder: the run's own; made if it is not there.
        settings: as JSON gives them back.
        resume: accept a folder with a checkpoint.
        present: brings settings that an older version stored into the form of this one.
        inputs: hashes of the files that the run stands on, by name; as :func:`run_steps` has them.

    Raises:
        ValueError: there is a checkpoint and ``resume`` is not set, or it is of other settings or inputs, or
            another process works in ``folder``.
    """
    path = folder / CHECKPOINT
    with contextlib.ExitStack() as kept:

        def begin() -> tuple[dict[str, Tensor], dict[str, Any]] | None:
            require(resume or not path.exists(), "resume", f"set, as {folder} holds an unfinished run", "False")
            kept.enter_context(only_process_in(folder))
            cure = "delete it, and the training begins again"
            checkpoint = load_checkpoint(path, cure=cure) if path.exists() else None
            if checkpoint is not None:
                _require_own(checkpoint[1], folder, settings, present, inputs or {})
            write_text_atomically(folder / "settings.json", json.dumps(dict(settings), indent=2) + "\n")
            return checkpoint

        yield distributed.from_main(begin)


def _require_own(
    facts: Mapping[str, Any],
    folder: Path,
    settings: Mapping[str, Any],
    present: PresentForm,
    inputs: Mapping[str, str],
) -> None:
    """Refuse the checkpoint of another run, which may lie in ``folder`` next to the right settings.json."""
    cure = f"delete {folder / CHECKPOINT} to train from the beginning, or use another --out"
    without = f"one without settings in {folder}; {cure}"
    require("settings" in facts, CHECKPOINT, "the checkpoint of a training", without)
    changes = differing(present(facts["settings"]), settings)
    require(not changes, "settings", f"those of the checkpoint in {folder}", _others(changes, cure))
    # Older checkpoints do not say what they stand on.
    for name, known in facts.get("inputs", {}).items():
        same = inputs.get(name, known) == known
        expected = f"the one that the checkpoint in {folder} was trained with"
        require(same, name, expected, f"other weights; {cure}")


def run_steps(
    trainer: RunTrainer,
    settings: RunSettings,
    plain: Mapping[str, Any],
    folder: Path,
    *,
    advance: Callable[[], Mapping[str, Tensor]],
    validate: Callable[[], Mapping[str, float]],
    clock: Clock,
    stop: Callable[[int], bool] | None = None,
    progress: bool = True,
    shown: Mapping[str, str] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Take the steps that are left, with log and checkpoints, which the main process writes.

    Args:
        trainer: what is trained.
        settings: of the run.
        plain: the same settings as JSON gives them back, for the checkpoint.
        folder: the run's own.
        advance: take one step and return the numbers of it, each (); ``loss`` is among them. The log has their
            means over all processes; integers are alike on all of them.
        validate: return the numbers that ``settings.validate_every`` adds to a line of the log.
        clock: the seconds spent on the run, for the checkpoint.
        stop: asked after every step, given the steps done, whether to stop there; one process's answer is enough.
        progress: show a progress bar.
        shown: what the bar shows beside the loss: the name there, and that of the number.
        inputs: hashes of the files that the run stands on, by name, for the checkpoint.

    Raises:
        Interrupted: ``stop``, Ctrl-C or SIGTERM ended the training early, on all processes at the same step.
        FloatingPointError: the loss is no longer finite.
    """
    from tqdm import tqdm

    main = distributed.is_main()
    hidden = not (progress and main)
    bar = tqdm(total=settings.steps, initial=trainer.step, disable=hidden, desc=folder.name, unit="step")
    log = RunLog(folder / "log.jsonl", trainer.step, folder / "tensorboard") if main else None
    with bar, log or contextlib.nullcontext(), stop_signals() as signalled:
        while trainer.step < settings.steps:
            numbers = advance()
            done = trainer.step
            if done % settings.log_every == 0 or done == settings.steps:
                means = distributed.mean_of(numbers)
                line = {"step": done, **{name: value.item() for name, value in means.items()}}
                if not math.isfinite(line["loss"]):
                    raise FloatingPointError(f"loss must be finite, got {line['loss']} at step {done}.")
                if log is not None:
                    if done % settings.validate_every == 0 or done == settings.steps:
                        line |= validate()
                    log.write(**line)
                others = {title: f"{line[name]:.4g}" for title, name in (shown or {}).items()}
                bar.set_postfix(loss=f"{line['loss']:.3f}", **others)
            bar.update()
            wish = done < settings.steps and (signalled() or (stop is not None and stop(done)))
            interrupted = distributed.agree(wish)
            if main and (interrupted or done % settings.checkpoint_every == 0 or done == settings.steps):
                facts = {"step": done, "settings": plain, "spent": clock.spent(), "inputs": dict(inputs or {})}
                save_checkpoint(folder / CHECKPOINT, trainer.tensors(), facts)
            if interrupted:
                raise Interrupted(
                    f"{folder}: stopped at step {done} of {settings.steps}; --resume goes on from there."
                )


def provenance(
    command: str | None,
    where: Execution,
    trained: Mapping[str, float],
    all_in_all: Mapping[str, float],
    *,
    processes: int = 1,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the content of ``provenance.json``.

    Args:
        command: what was typed.
        where: it was computed.
        trained: seconds of the training, as :meth:`Clock.spent` gives them for the main process.
        all_in_all: seconds with the evaluation.
        processes: that trained together.
        hashes: of files, by name: of the weights, and of what the run stands on.
    """
    import torch

    return {
        "command": command,
        "commit": git_commit(),
        "device": where.device,
        "channels_last": where.channels_last,
        "compiled": where.compiled,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "training": dict(trained),
        "evaluation": {name: all_in_all[name] - seconds for name, seconds in trained.items()},
        "training_and_evaluation": dict(all_in_all),
        "hashes": dict(hashes or {}),
        "versions": versions(),
    }


def recorded_hash(folder: Path, name: str) -> str | None:
    """Return a hash in the ``provenance.json`` of a finished run; ``None`` where an older version wrote none."""
    path = folder / "provenance.json"
    found: str | None = read_json_object(path).get("hashes", {}).get(name) if path.exists() else None
    return found


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
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
def only_process_in(folder: Path) -> Iterator[None]:
    """Make ``folder``, and refuse it if another process works there.

    A process that ends soon, as those of a killed ``run`` do, is waited for, and standard error says so. On a file
    system without locks none is noticed.

    Raises:
        ValueError: the other process is still there after a while.
        Interrupted: Ctrl-C ended the waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # a system without such locks
            yield
            return
        _take(file, folder, fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _take(file: IO[str], folder: Path, lock: Callable[[IO[str], int], object], how: int) -> None:
    """Wait for the lock of ``folder``."""
    deadline: float | None = None
    while True:
        try:
            lock(file, how)
        except BlockingIOError as error:
            if deadline is None:
                deadline = time.monotonic() + _LOCK_SECONDS
                print(f"waiting for the process that works in {folder}", file=sys.stderr, flush=True)
            elif time.monotonic() > deadline:
                cure = "wait, or choose another --out"
                raise ValueError(
                    f"{folder} must not be in use, but another process works there; {cure}."
                ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return
        else:
            return
        try:
            time.sleep(0.2)
        except KeyboardInterrupt as error:
            raise Interrupted(f"{folder}: stopped waiting for the process that works there.") from error
