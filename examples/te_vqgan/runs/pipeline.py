"""Everything for a preset: prepare, one process a run, report. Finished runs are skipped, stopped ones go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.logs import last_step

__all__ = ["Job", "JobFailed", "run_jobs"]

_POLL_SECONDS = 0.5
_LINE_SECONDS = 20.0
STOPPED = 130  # what shells report after Ctrl-C


class Job(NamedTuple):
    """One process.

    Attributes:
        name: shown beside its progress bar.
        arguments: of ``python -m examples.te_vqgan``.
        folder: of the run; its ``log.jsonl`` tells the progress.
        steps: of the whole run.
        after: names of jobs that must have ended before; those that are not among the jobs are done already.
    """

    name: str
    arguments: Sequence[str]
    folder: Path
    steps: int
    after: Sequence[str] = ()


class JobFailed(Exception):  # noqa: N818
    """A process ended with an error; the message shows the end of its output."""


def run_jobs(jobs: Sequence[Job], *, workers: int, threads: int) -> None:
    """Run ``jobs``, so many at once, with one progress bar each.

    What a process prints goes to ``console.txt`` in its folder. After Ctrl-C the processes write their
    checkpoints, then ``KeyboardInterrupt`` comes out of here; killed, this process takes them with it in the
    same way.

    Args:
        jobs: in the order in which they start, but that one whose turn has not come lets others pass.
        workers: processes at once, at least 1.
        threads: of each process.

    Raises:
        JobFailed: one of them ended with an error; the others are stopped and keep their checkpoints.
        KeyboardInterrupt: the user, or SIGTERM, stopped it.
    """
    waiting = list(enumerate(jobs))
    running: dict[int, _Process] = {}
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            pending = {job.name for _, job in waiting} | {process.job.name for process in running.values()}
            for number, job in list(waiting):
                if len(running) < workers and not pending.intersection(job.after):
                    waiting.remove((number, job))
                    running[number] = _Process(job, number, threads)
            require(bool(running), "jobs", "without a circle of dependencies", ", ".join(sorted(pending)))
            time.sleep(_POLL_SECONDS)
            for number in list(running):
                if running[number].poll():
                    del running[number]
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running.values():
            process.stop()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _Process:
    """A running job with its progress."""

    def __init__(self, job: Job, number: int, threads: int) -> None:
        self.job = job
        job.folder.mkdir(parents=True, exist_ok=True)
        self.console = job.folder / "console.txt"
        # Set before torch starts there: its thread pools are sized once.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "examples.te_vqgan", *job.arguments, "--parent", str(os.getpid())]
        self.progress = _progress(job, number)
        with self.console.open("a", encoding="utf-8") as output:
            # A session of its own, or Ctrl-C in a terminal would reach it twice: from there and from stop().
            self.process = subprocess.Popen(  # noqa: S603
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def poll(self) -> bool:
        """Show the progress; say whether the process has ended, and raise if it ended badly."""
        code = self.process.poll()
        self.progress.show(last_step(self.job.folder / "log.jsonl"))
        if code is None:
            return False
        self.progress.close()
        if code in (STOPPED, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        if code != 0:
            lines = self.console.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
            raise JobFailed(
                f"{self.job.name} ended with code {code}. {self.console} ends with:\n" + "\n".join(lines)
            )
        return True

    def stop(self) -> None:
        """Ask the process to write its checkpoint and wait for it."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self.progress.close()


class _Bar:
    """A bar for a terminal."""

    def __init__(self, job: Job, number: int, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=job.steps, desc=job.name, unit="step", position=number, initial=done)

    def show(self, done: int) -> None:
        """Move the bar."""
        self.bar.update(done - self.bar.n)
        if done == self.bar.total and self.bar.postfix is None:
            self.bar.set_postfix_str("measuring")

    def close(self) -> None:
        """Leave the bar where it is."""
        self.bar.close()


class _Lines:
    """A line now and then, for a file or a build log."""

    def __init__(self, job: Job, done: int) -> None:
        self.job, self.first, self.shown = job, done, -1
        self.start = self.last = time.monotonic()

    def show(self, done: int) -> None:
        """Write a line if the last one is long ago or all steps are done."""
        now = time.monotonic()
        finished = done == self.job.steps
        if done == self.shown or not (finished or now - self.last >= _LINE_SECONDS):
            return
        speed = (done - self.first) / (now - self.start)
        left = f"about {(self.job.steps - done) / speed:.0f} s left" if speed > 0 else "starting"
        print(
            f"{self.job.name}: step {done} of {self.job.steps}, {'measuring' if finished else left}",
            file=sys.stderr,
        )
        self.shown, self.last = done, now

    def close(self) -> None:
        """Nothing is held open."""


def _progress(job: Job, number: int) -> _Bar | _Lines:
    done = last_step(job.folder / "log.jsonl")
    return _Bar(job, number, done) if sys.stderr.isatty() else _Lines(job, done)
