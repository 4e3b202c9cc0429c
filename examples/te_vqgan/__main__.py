"""Command line: ``python -m examples.te_vqgan prepare|stage1|exactness|report|compare|run``.

``run`` does everything for a preset; the other commands are its steps. Each step that was interrupted goes on
where it was, each that is finished is skipped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.te_vqgan.presets import ARMS, DEFAULT_ARMS, PRESETS, Stage1Settings, settings_for
from examples.te_vqgan.sources import SOURCES

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused or failed, 130 interrupted)."""
    from examples.te_vqgan.pipeline import STOPPED, JobFailed
    from examples.te_vqgan.stage1 import Interrupted

    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words, argparse.Namespace(words=words))
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except Interrupted as outcome:
        print(outcome, file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("\nInterrupted. Give the same command again to go on (stage1: with --resume).", file=sys.stderr)
        return STOPPED
    except (ValueError, OSError, ImportError, FloatingPointError, JobFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _prepare(options: argparse.Namespace) -> None:
    from examples.te_vqgan.prepare import prepare
    from examples.te_vqgan.recipes import LAYOUTS

    settings = _settings(options, next(iter(ARMS)))
    sizes = {"train": settings.train_images, "validation": settings.eval_images, "test": settings.eval_images}
    folder = _out(options)
    summary = prepare(
        settings.data,
        folder / "data",
        data_dir=options.data_dir,
        canvas_size=settings.canvas_size,
        sizes=sizes,
        seed=settings.seed,
        layouts=LAYOUTS,
    )
    counts = ", ".join(f"{split.digits:,} {name}" for name, split in summary.splits.items())
    print(f"Data {summary.data}: {counts} digits. A picture of them: {folder / 'data' / 'samples.png'}")


def _stage1(options: argparse.Namespace) -> None:
    from examples.te_vqgan.provenance import Execution, command_line
    from examples.te_vqgan.results import run_folder
    from examples.te_vqgan.sources import load_digits
    from examples.te_vqgan.stage1 import train_stage1

    settings = _settings(options, options.arm)
    folder = run_folder(_out(options), options.arm, settings.seed)
    orphaned = None if options.parent is None else lambda _: os.getppid() != options.parent
    trained = train_stage1(
        settings,
        folder,
        load_digits(settings.data, options.data_dir),
        execution=Execution(options.device, options.threads),
        resume=options.resume,
        stop=orphaned,
        progress=options.parent is None,
        command=command_line(options.words),
    )
    print(f"{folder}: {'finished' if trained else 'was finished before, nothing to do'}.")


def _report(options: argparse.Namespace) -> None:
    from examples.te_vqgan.provenance import command_line
    from examples.te_vqgan.report import render, write_report

    if options.results is not None:
        render(options.results)
        folder = options.results
    else:
        folder = write_report(_out(options), command=command_line(options.words))
    _announce(folder)


def _exactness(options: argparse.Namespace) -> None:
    import json

    import torch
    from tqdm import tqdm

    from examples.te_vqgan.exactness import numerical_check
    from examples.te_vqgan.files import write_text_atomically
    from examples.te_vqgan.provenance import command_line, git_commit, versions
    from examples.te_vqgan.results import run_folder
    from examples.te_vqgan.sources import load_digits
    from examples.te_vqgan.stage1 import is_finished
    from te_quant import VQAutoencoder

    settings = _settings(options, options.arm)
    folder = run_folder(_out(options), options.arm, settings.seed)
    if not is_finished(folder, settings):
        raise ValueError(f"out must hold a finished run of these settings, got none in {folder}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = VQAutoencoder.from_pretrained(folder / "model")
    source = load_digits(settings.data, options.data_dir)
    with tqdm(total=options.tokens, unit="token", unit_scale=True, desc=options.arm) as bar:
        found = numerical_check(
            model,
            settings,
            source,
            tokens=options.tokens,
            progress=lambda count: bar.update(count - bar.n) if count > bar.n else None,
        )
    found |= {"arm": options.arm, "data": settings.data, "command": command_line(options.words)}
    found |= {"versions": versions(), "commit": git_commit()}
    write_text_atomically(folder / "exactness.json", json.dumps(found, indent=1) + "\n")
    for dtype, count in found["counts"].items():
        print(f"{dtype}: {count['differing']:,} of {count['compared']:,} indices differ")


def _compare(options: argparse.Namespace) -> None:
    from examples.te_vqgan.compare import write_comparison

    folder = _out(options) / "report" if options.results is None else options.results
    write_comparison(folder)
    print((folder / "comparison.md").read_text(encoding="utf-8"))


def _run(options: argparse.Namespace) -> None:
    from examples.te_vqgan.pipeline import Job, run_jobs
    from examples.te_vqgan.provenance import command_line
    from examples.te_vqgan.report import write_report
    from examples.te_vqgan.results import run_folder
    from examples.te_vqgan.stage1 import is_finished

    start = time.perf_counter()
    _prepare(options)
    out = _out(options)
    jobs = []
    for seed in options.seeds or [options.seed]:
        options.seed = seed
        for arm in options.arms:
            settings = _settings(options, arm)
            folder = run_folder(out, arm, settings.seed)
            if is_finished(folder, settings):
                print(f"{folder}: was finished before, skipped.")
                continue
            jobs.append(Job(folder.name, _stage1_arguments(options, arm, settings), folder, settings.steps))
    if jobs:
        workers, threads = _share_of_cores(options)
        run_jobs(jobs, workers=workers, threads=threads)
    seconds = time.perf_counter() - start
    _announce(write_report(out, command=command_line(options.words), wall_seconds=seconds if jobs else None))


def _stage1_arguments(options: argparse.Namespace, arm: str, settings: Stage1Settings) -> list[str]:
    given = {
        "preset": options.preset,
        "data": settings.data,
        "out": _out(options),
        "arm": arm,
        "seed": settings.seed,
    }
    given |= {"steps": options.steps, "device": options.device, "threads": _share_of_cores(options)[1]}
    given |= {"data-dir": options.data_dir, "perceptual": options.perceptual}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    if options.bf16 is not None:
        words.append("--bf16" if options.bf16 else "--no-bf16")
    return ["stage1", *words, "--resume"]


def _share_of_cores(options: argparse.Namespace) -> tuple[int, int]:
    """Return trainings at once and threads of each.

    Counts all runs asked for, finished or not: a training that goes on later has as many threads as before,
    since their number changes the last bits.
    """
    cores = options.threads or os.cpu_count() or 1
    workers = options.workers or min(cores, len(options.arms) * len(options.seeds or [options.seed]))
    return workers, max(1, cores // workers)


def _announce(folder: Path) -> None:
    print((folder / "report.md").read_text(encoding="utf-8").split("## Pictures")[0].strip())
    print(f"\nReport: {folder / 'report.html'}")


def _out(options: argparse.Namespace) -> Path:
    data = options.data or PRESETS[options.preset].data
    return Path("runs", "te_vqgan", f"{options.preset}-{data}") if options.out is None else Path(options.out)


def _settings(options: argparse.Namespace, arm: str) -> Stage1Settings:
    changes: dict[str, Any] = {"data": options.data, "steps": options.steps, "seed": options.seed}
    changes |= {"bf16": options.bf16, "perceptual": options.perceptual}
    if options.perceptual not in (None, "none"):
        changes["perceptual_weight"] = 1.0
    return settings_for(options.preset, arm, changes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.te_vqgan", description="VQGAN against TE-VQGAN.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        shared = added.add_argument
        shared("--preset", choices=tuple(PRESETS), default="quick", help="size of everything (default: quick)")
        shared("--data", choices=SOURCES, help="the digits (default: the preset's)")
        shared("--data-dir", type=Path, help="folder of the IDX files (default: $TE_QUANT_DATA, else downloaded)")
        shared("--out", type=Path, help="folder of the results (default: runs/te_vqgan/PRESET-DATA)")
        shared("--seed", type=int, help="of weights and images (default: the preset's, 0)")
        shared("--steps", type=int, help="optimiser steps, instead of the preset's")
        shared("--perceptual", choices=("none", "lpips"), help="perceptual distance in the loss (default: none)")
        shared("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 in encoder and decoder")
        shared("--device", default="cpu", help="as torch names it (default: cpu)")
        shared("--threads", type=int, default=0, help="of the CPU in all (default: every core)")
        return added

    add("prepare", _prepare, "fetch and check the data, draw some images")
    stage1 = add("stage1", _stage1, "train the tokenizer of one arm")
    stage1.add_argument("--arm", choices=tuple(ARMS), required=True, help="which tokenizer")
    stage1.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    stage1.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    exactness = add("exactness", _exactness, "count the indices that differ after shifts, for an exact arm")
    exactness.add_argument("--arm", choices=tuple(ARMS), required=True, help="which tokenizer")
    exactness.add_argument("--tokens", type=int, default=10_000_000, help="comparisons (default: 10 million)")
    report = add("report", _report, "write the report of the finished runs")
    report.add_argument("--results", type=Path, help="write a report anew from the results.json in this folder")
    compare = add("compare", _compare, "table and scatter plot of the arms in a report")
    compare.add_argument("--results", type=Path, help="folder of a results.json (default: that of --out)")
    run = add("run", _run, "prepare, train every arm, report")
    run.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=DEFAULT_ARMS, help="which tokenizers")
    run.add_argument("--seeds", nargs="+", type=int, help="several seeds, instead of --seed")
    run.add_argument("--workers", type=int, default=0, help="trainings at once (default: one a core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
