"""``python -m benchmarks.paired --before SRC``: the time of a quantizer's step in two versions of the library.

Both versions run in one process, on the same latents, and take turns: before, after, after, before, and so on.
What disturbs the machine hits both, so the ratio of a pair is worth more than that of two medians. Two processes
of the same code would differ by several percent, mostly in where their memory lies. Within one that difference is
smaller, but not zero: what is built first gets other memory than what comes second, a few percent faster or
slower. So each cell is measured in several processes, in half of which the version after is built first, and its
interval comes from their means.

Every size of the quantizer benchmark is measured, in evaluation and in training by gradient and by moving
averages, the latter also with the revival that a version may have. A second call adds only the processes that the
result file lacks. Sizes whose interval is wide are measured in more processes; what the interval says plays no
part in that. How much is noise shows where a version is compared with itself.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from unittest import mock

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

from benchmarks.contest import OURS
from benchmarks.peers import EMA_REVIVAL, MODES
from benchmarks.problem import Problem, Size
from benchmarks.quantizers import quantizer_contender
from benchmarks.results import stamp, three_digits
from benchmarks.sizes import SIZES
from examples.te_vqgan.runs.files import write_text_atomically

__all__ = [
    "PACKAGES",
    "Timer",
    "Version",
    "Worker",
    "by_size",
    "compare",
    "interval",
    "interval_of_processes",
    "main",
    "pooled",
]

_ROOT = Path(__file__).parent.parent
_MODES = (*MODES, EMA_REVIVAL)
_RESAMPLES = 2_000
# Otherwise glibc keeps freed memory or returns it, depending on what a process did before, and page faults take up
# to a quarter of a call, in one process and not in the next.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
# Seconds that a sample should take at least.
_SAMPLE = 0.005
PACKAGES = ("te_quant_before", "te_quant")
"""What the version before and that after are called in a worker."""


class Interval(NamedTuple):
    """What ratios are on average, with the ends of its 95 % interval."""

    low: float
    mean: float
    high: float


class Timer(Protocol):
    """Whatever times calls."""

    def ask(self, **question: Any) -> Any:
        """With ``mode`` and ``size``, build a call; return its seconds, on average over ``calls``."""


class Worker:
    """A process that times calls with two versions of the library.

    Args:
        sources: the folders that hold ``te_quant``, before and after.
        threads: of torch.
    """

    def __init__(self, sources: Sequence[Path], threads: int) -> None:
        before, after = map(str, sources)
        self._folder = tempfile.TemporaryDirectory()
        _rename(Path(before) / "te_quant", Path(self._folder.name) / PACKAGES[0])
        paths = [after, str(_ROOT), self._folder.name]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.paired", "--worker", "--threads", str(threads)],
            env={**os.environ, **_KEEP_MEMORY, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )

    def ask(self, **question: object) -> Any:
        """Send a question and return the answer."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a worker must have pipes, got none.")
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a worker must answer, got exit status {self.process.wait()}.")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        # Waits, and closes the pipes.
        self.process.communicate()
        self._folder.cleanup()


class Version(NamedTuple):
    """One of the two versions of a worker, which times its calls only."""

    worker: Worker
    package: str

    def ask(self, **question: Any) -> Any:
        """Pass the question on."""
        return self.worker.ask(package=self.package, **question)


def _rename(package: Path, copy: Path) -> None:
    """Copy a package under the name of ``copy``, operators included: it can be imported next to the original."""
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(rf"\b{PACKAGES[1]}\b", copy.name, text), encoding="utf-8")


def interval(ratios: Sequence[float]) -> Interval:
    """Return the median of pairs of calls and its bootstrap interval, seeded.

    A median, because now and then a call takes several times as long as its neighbours.
    """
    logs = np.log(np.asarray(ratios))
    picks = np.random.default_rng(0).integers(len(logs), size=(_RESAMPLES, len(logs)))
    low, high = np.percentile(np.median(logs[picks], axis=1), (2.5, 97.5))
    return Interval(*(math.exp(value) for value in (low, np.median(logs), high)))


def interval_of_processes(means: Sequence[float], first: Sequence[int]) -> Interval:
    """Return the geometric mean of the ratios of several processes and its t interval.

    The two orders of building are two strata: their difference is no noise. NaN unless each order has a process
    and there are at least three.

    Args:
        means: the ratio of each process.
        first: 0 or 1, which version was built first in it.
    """
    logs, orders = np.log(np.asarray(means)), np.asarray(first)
    strata = [logs[orders == order] for order in np.unique(orders)]
    centre = float(np.mean([stratum.mean() for stratum in strata]))
    half, freedom = math.nan, len(logs) - len(strata)
    if len(strata) == 2 and freedom > 0:
        variance = sum(((stratum - stratum.mean()) ** 2).sum() for stratum in strata) / freedom
        error = math.sqrt(variance * sum(1 / len(stratum) for stratum in strata)) / 2
        half = float(scipy.stats.t.ppf(0.975, freedom)) * error
    return Interval(*(math.exp(value) for value in (centre - half, centre, centre + half)))


def compare(
    pair: Sequence[Timer], mode: str, size: Size, *, budget: float, min_pairs: int, first: int = 0
) -> dict[str, Any]:
    """Measure one cell in one process: seconds a call of both versions, and the interval of after / before.

    Args:
        pair: the versions before and after.
        mode: of the quantizer.
        size: N, K and C.
        budget: seconds.
        min_pairs: calls of each, whatever the budget.
        first: 0 or 1, which version is built first and gets the memory that comes first.
    """
    built = {place: pair[place].ask(mode=mode, size=list(size)) for place in (first, 1 - first)}
    once = list(built.values())
    calls = max(1, math.ceil(_SAMPLE / min(once)))
    pairs: list[tuple[float, float]] = []
    end = time.monotonic() + budget
    while len(pairs) < min_pairs or time.monotonic() < end:
        order = (0, 1) if len(pairs) % 2 == 0 else (1, 0)
        taken = {place: pair[place].ask(calls=calls) for place in order}
        pairs.append((taken[0], taken[1]))
    ratio = interval([after / before for before, after in pairs])
    before, after = np.median(np.asarray(pairs), axis=0)
    return {
        "mode": mode,
        **size._asdict(),
        "before_ms": 1e3 * float(before),
        "after_ms": 1e3 * float(after),
        "ratio": ratio._asdict(),
        "pairs": len(pairs),
        "calls": calls,
        "first": first,
    }


def pooled(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pool the cells of equal mode and size, each from another process."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in ("mode", *Size._fields)), []).append(cell)
    return [
        {
            **dict(zip(("mode", *Size._fields), key, strict=True)),
            **{name: statistics.median(cell[name] for cell in group) for name in ("before_ms", "after_ms")},
            "ratio": interval_of_processes(
                [cell["ratio"]["mean"] for cell in group], [cell["first"] for cell in group]
            )._asdict(),
            "processes": len(group),
        }
        for key, group in groups.items()
    ]


def by_size(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pool the modes of the quantizer benchmark too: the mean of the ratios of each process is one value.

    Args:
        cells: of each mode and size in the order of the processes, one for each.
    """
    groups: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for cell in cells:
        if cell["mode"] in MODES:
            key = tuple(cell[name] for name in Size._fields)
            groups.setdefault(key, {}).setdefault(cell["mode"], []).append(cell)
    rows = []
    for key, modes in groups.items():
        processes = list(zip(*modes.values(), strict=False))
        means = [statistics.geometric_mean(cell["ratio"]["mean"] for cell in cells) for cells in processes]
        ratio = interval_of_processes(means, [cells[0]["first"] for cells in processes])
        size = dict(zip(Size._fields, key, strict=True))
        rows.append({**size, "ratio": ratio._asdict(), "processes": len(processes)})
    return rows


def table(cells: Sequence[dict[str, Any]], sizes: Sequence[dict[str, Any]]) -> str:
    """Return the ratios as a table in Markdown: one row per size, one column per mode and one for three modes."""
    modes = list(dict.fromkeys(cell["mode"] for cell in cells))
    header = ["N", "K", "C", "before, ms", "three modes", *modes]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for size in sizes:
        found = {cell["mode"]: cell for cell in cells if all(cell[name] == size[name] for name in Size._fields)}
        ratios = [size["ratio"], *(found[mode]["ratio"] if mode in found else None for mode in modes)]
        texts = ["" if ratio is None else "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**ratio) for ratio in ratios]
        numbers = [f"{size[name]:,}" for name in Size._fields]
        before = three_digits(found[MODES[0]]["before_ms"])
        lines.append(f"| {' | '.join([*numbers, before, *texts])} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.worker:
        _work(sys.stdin)
        return 0
    if options.before is None:
        print("error: --before must be the folder with the other te_quant, got none.", file=sys.stderr)
        return 2
    facts = stamp(device=torch.device("cpu"), grid=options.grid, threads=options.threads, budget=options.budget)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "paired.json"
    measured: list[dict[str, Any]] = []
    if path.exists() and not options.fresh:
        measured = json.loads(path.read_text(encoding="utf-8"))["measured"]
    known = Counter((cell["mode"], Size(*(cell[name] for name in Size._fields))) for cell in measured)
    cells = list(product(_MODES, SIZES[options.grid]))
    with tqdm(unit="cell", file=sys.stderr) as progress:
        for number in range(max(options.processes, options.most)):
            wide = _wide(measured, options.width)
            left = [
                (mode, size)
                for mode, size in cells
                if known[mode, size] <= number and (number < options.processes or (mode in MODES and size in wide))
            ]
            if not left:
                continue
            with closing(Worker([options.before, options.after], options.threads)) as worker:
                pair = [Version(worker, package) for package in PACKAGES]
                for mode, size in left:
                    known[mode, size] += 1
                    budget, min_pairs = options.budget, options.min_pairs
                    measured.append(
                        compare(pair, mode, size, budget=budget, min_pairs=min_pairs, first=number % 2)
                    )
                    report = {
                        "stamp": facts,
                        "label": options.label,
                        "sizes": by_size(measured),
                        "cells": pooled(measured),
                        "measured": measured,
                    }
                    write_text_atomically(path, json.dumps(report, indent=1, allow_nan=True) + "\n")
                    progress.update()
    text = table(pooled(measured), by_size(measured))
    write_text_atomically(options.out / "paired.md", text)
    print(text)
    return 0


def _wide(measured: Sequence[dict[str, Any]], width: float) -> set[Size]:
    """Say of which sizes the interval over the modes reaches further than ``width`` to one side."""
    halves = {
        Size(*(row[name] for name in Size._fields)): row["ratio"]["high"] / row["ratio"]["mean"] - 1
        for row in by_size(measured)
    }
    return {size for size, half in halves.items() if not half <= width}


def _work(questions: IO[str]) -> None:
    """Build what a question with ``mode`` describes and answer how long a call takes; then time calls."""
    calls: dict[str, Callable[[int], object]] = {}
    problem: Problem | None = None
    for line in questions:
        question = json.loads(line)
        package = question["package"]
        if "mode" in question:
            size = Size(*question["size"])
            if problem is None or problem.size != size:
                calls.clear()
                problem = Problem(size, torch.device("cpu"))
            quantizer = import_module(package).VectorQuantizer
            with mock.patch("benchmarks.peers.VectorQuantizer", quantizer):
                calls[package] = quantizer_contender(OURS, question["mode"], problem).call
            calls[package](0)
        if package not in calls:
            raise RuntimeError("the first question must describe a call, got none.")
        count = question.get("calls", 1)
        start = time.perf_counter()
        for number in range(count):
            calls[package](number)
        print(json.dumps((time.perf_counter() - start) / count), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paired", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--before", type=Path, metavar="SRC", help="folder that holds the te_quant to compare with"
    )
    parser.add_argument("--after", type=Path, metavar="SRC", default=_ROOT / "src", help="default: this checkout")
    parser.add_argument("--label", default="", help="what the two versions are, for the result file")
    parser.add_argument("--grid", choices=tuple(SIZES), default="full")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=2.0, metavar="S", help="seconds for each of them")
    parser.add_argument("--processes", type=int, default=6, help="processes for each cell")
    parser.add_argument(
        "--most",
        type=int,
        default=24,
        help="processes for sizes whose interval over the modes is wider than --width",
    )
    parser.add_argument("--width", type=float, default=0.03, help="of half an interval (default: 0.03)")
    parser.add_argument("--min-pairs", type=int, default=4, help="pairs of samples for each of them")
    parser.add_argument("--fresh", action="store_true", help="measure every cell again")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "paired")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
