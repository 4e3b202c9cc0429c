"""The command ``run``: every step of a preset's plan that is not done yet, several at once, then the report.

Under a launcher its processes, all together, take one step after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.te_vqgan.cli.options import announce, out_folder, stage1_settings
from examples.te_vqgan.cli.plans import PLANS, Plan
from examples.te_vqgan.cli.stage2 import classifier_folder
from examples.te_vqgan.data.sources import is_pictures
from examples.te_vqgan.reports.results import run_folder
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.pipeline import Job, run_jobs
from examples.te_vqgan.stage1.presets import Stage1Settings
from examples.te_vqgan.stage2.rules import DEFAULT_RULES
from examples.te_vqgan.stage2.settings import STAGE2, Stage2Settings, stage2_settings_for

__all__ = ["other_data_folder", "plan_jobs", "run_plan"]


def other_data_folder(out: Path, data: str) -> Path:
    """Return where the runs on the plan's other data set lie."""
    return out / data


def run_plan(options: argparse.Namespace, *, perform: Callable[[Sequence[str]], None]) -> None:
    """Do what is not done yet, and write the report.

    Args:
        options: of the command line.
        perform: runs another command, given its words, in this process; for the processes of a launcher.

    Raises:
        ValueError: a folder holds a run of other settings, or ``--workers`` is given under a launcher.
        FileNotFoundError: the plan's other data set is not in ``--data-dir``.
        ImportError: the package of the perceptual distance is not installed, or does not work here.
        JobFailed: a step ended with an error.
        KeyboardInterrupt: the user, or SIGTERM, stopped it.
    """
    from examples.te_vqgan.reports.report import write_report
    from examples.te_vqgan.runs.provenance import command_line

    start = time.perf_counter()
    out = out_folder(options)
    fresh = distributed.from_main(lambda: not any(out.rglob("settings.json")))
    distributed.from_main(lambda: _require_other_data(options))
    jobs = distributed.from_main(lambda: list(plan_jobs(options)))
    if jobs:
        distributed.from_main(lambda: _require_distance(options))
    if distributed.launched():
        _run_here(jobs, perform)
    elif jobs:
        workers, threads = _share_of_cores(options)
        run_jobs(jobs, workers=workers, threads=threads)
    # The total is known only if this call did every step: none existed before it.
    spent = time.perf_counter() - start if fresh else None
    words = command_line(options.words)
    distributed.from_main(lambda: announce(write_report(out, command=words, wall_seconds=spent)))


def _require_other_data(options: argparse.Namespace) -> None:
    """Find the plan's other data set before hours go into the first."""
    from examples.te_vqgan.data.sources import load_digits

    other = _plan(options).other_data
    if other is not None:
        load_digits(other, options.data_dir)


def _require_distance(options: argparse.Namespace) -> None:
    """Load the perceptual distance of the plan once before hours go into anything, the classifier included."""
    from examples.te_vqgan.stage1.perceptual import require_perceptual

    require_perceptual(stage1_settings(options, _plan(options).arms[0]).perceptual)


def _run_here(jobs: Sequence[Job], perform: Callable[[Sequence[str]], None]) -> None:
    from examples.te_vqgan.runs.running import Interrupted

    try:
        for job in jobs:
            perform(job.arguments)
    except Interrupted as outcome:
        raise KeyboardInterrupt from outcome


def plan_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Give the steps that are not done yet, each after those that it needs.

    Raises:
        ValueError: a folder holds a run of other settings.
    """
    plan = _plan(options)
    out = out_folder(options)
    settings = stage1_settings(options, plan.arms[0])
    has_stage2 = STAGE2[options.preset] is not None
    expected = "a data set of digits for a preset with a Stage 2; 'photos' and 'quick' take pictures"
    require(not (has_stage2 and is_pictures(settings.data)), "data", expected, options.data)
    if has_stage2:
        yield from _classifier_job(options, out, settings)
    for seed in plan.seeds:
        for arm in plan.arms:
            yield from _arm_jobs(options, plan, out, arm, seed)
    if plan.other_data is None or plan.other_data == settings.data:
        return
    other = other_data_folder(out, plan.other_data)
    yield from _classifier_job(options, other, dataclasses.replace(settings, data=plan.other_data))
    for seed in plan.seeds:
        for arm in plan.other_arms:
            first = dataclasses.replace(stage1_settings(options, arm), data=plan.other_data, seed=seed)
            yield from _stage1_jobs(options, other, arm, first)
            yield from _evaluate_jobs(options, other, arm, first, None)


def _plan(options: argparse.Namespace) -> Plan:
    plan = PLANS[options.preset]
    changes: dict[str, Any] = {}
    if options.arms:
        # What is asked for by name is all that is done.
        changes |= {"arms": tuple(options.arms), "other_data": None, "smaller_images": None}
    if options.seeds or options.seed is not None:
        require(not options.seeds or options.seed is None, "seed", "None with --seeds", options.seed)
        changes["seeds"] = tuple(options.seeds or [options.seed])
    return dataclasses.replace(plan, **changes)


def _arm_jobs(options: argparse.Namespace, plan: Plan, out: Path, arm: str, seed: int) -> Iterator[Job]:
    first = dataclasses.replace(stage1_settings(options, arm), seed=seed)
    yield from _stage1_jobs(options, out, arm, first)
    if STAGE2[options.preset] is None:
        return
    sizes: list[int | None] = [] if arm in plan.without_stage2 else [None]
    if plan.smaller_images is not None and arm in plan.smaller_arms:
        sizes.append(plan.smaller_images)
    for images in sizes:
        changes = {"seed": seed, "steps": options.stage2_steps, "train_images": images}
        second = stage2_settings_for(options.preset, changes | {"bf16": options.bf16})
        yield from _stage2_jobs(options, out, arm, first, second)
        yield from _evaluate_jobs(options, out, arm, first, second)
    if not sizes:
        yield from _evaluate_jobs(options, out, arm, first, None)


def _classifier_job(options: argparse.Namespace, out: Path, settings: Stage1Settings) -> Iterator[Job]:
    from examples.te_vqgan.classifier.settings import require_reader_of
    from examples.te_vqgan.classifier.trainer import CLASSIFIERS
    from examples.te_vqgan.runs.running import has_ended

    folder = classifier_folder(out)
    require_reader_of(settings.data, settings.canvas_size, folder)
    if not has_ended(folder):
        words = ["classifier", *_words(options, {"data": settings.data, "out": out}), "--resume"]
        yield Job(_name(folder), words, folder, CLASSIFIERS[options.preset].steps)


def _stage1_jobs(options: argparse.Namespace, out: Path, arm: str, settings: Stage1Settings) -> Iterator[Job]:
    from examples.te_vqgan.stage1.train import is_finished

    folder = run_folder(out, arm, settings.seed)
    if is_finished(folder, settings):
        print(f"{folder}: was finished before, skipped.")
        return
    # The settings name pictures by their contents, the command line by their folder.
    data = options.data if is_pictures(settings.data) else settings.data
    given = {"data": data, "out": out, "arm": arm, "seed": settings.seed}
    given |= {"steps": options.steps, "perceptual": options.perceptual, "max-reduction": options.max_reduction}
    given["round-trip-weight"] = options.round_trip_weight
    words = ["stage1", *_words(options, given), *_flags(options, "bf16", "channels_last", "compile"), "--resume"]
    yield Job(_name(folder), words, folder, settings.steps)


def _stage2_jobs(
    options: argparse.Namespace, out: Path, arm: str, first: Stage1Settings, second: Stage2Settings
) -> Iterator[Job]:
    from examples.te_vqgan.stage2.train import is_finished, stage2_folder

    tokenizer = run_folder(out, arm, first.seed)
    folder = stage2_folder(tokenizer, second)
    if is_finished(folder, second, first):
        print(f"{folder}: was finished before, skipped.")
        return
    given = {"data": first.data, "out": out, "arm": arm, "seed": second.seed}
    given |= {"steps": options.stage2_steps, "train-images": second.train_images}
    words = ["stage2", *_words(options, given), *_flags(options, "bf16", "compile"), "--resume"]
    yield Job(_name(folder), words, folder, second.steps, (_name(tokenizer),))


def _evaluate_jobs(
    options: argparse.Namespace, out: Path, arm: str, first: Stage1Settings, second: Stage2Settings | None
) -> Iterator[Job]:
    from examples.te_vqgan.stage2.evaluate import is_measured, is_read
    from examples.te_vqgan.stage2.train import stage2_folder

    tokenizer = run_folder(out, arm, first.seed)
    folder = tokenizer if second is None else stage2_folder(tokenizer, second)
    read = first.perceptual == "none" or is_read(tokenizer, first.perceptual)
    measured = is_read(tokenizer) if second is None else all(is_measured(folder, rule) for rule in DEFAULT_RULES)
    if read and measured:
        return
    given = {"data": first.data, "out": out, "arm": arm, "seed": first.seed, "perceptual": options.perceptual}
    if second is not None:
        given |= {"train-images": second.train_images, "stage2-steps": options.stage2_steps}
    words = [
        "evaluate",
        *_words(options, given),
        *(["--tokenizer-alone"] if second is None else _flags(options, "bf16")),
    ]
    needs = (_name(folder), _name(classifier_folder(out)))
    yield Job(f"{_name(folder)}, evaluation", words, folder, (second or first).steps, needs)


def _name(folder: Path) -> str:
    """The last two parts of a path tell every run of a plan from the others."""
    return "/".join(folder.parts[-2:])


def _words(options: argparse.Namespace, given: Mapping[str, object]) -> list[str]:
    everything = {"preset": options.preset, **given, "data-dir": options.data_dir, "device": options.device}
    everything["threads"] = _share_of_cores(options)[1]
    return [word for name, value in everything.items() if value is not None for word in (f"--{name}", str(value))]


def _flags(options: argparse.Namespace, *names: str) -> list[str]:
    """The switches that were given, as they were."""
    given = {name.replace("_", "-"): getattr(options, name) for name in names}
    return [f"--{name}" if value else f"--no-{name}" for name, value in given.items() if value is not None]


def _share_of_cores(options: argparse.Namespace) -> tuple[int, int]:
    """Return trainings at once and threads of each.

    Counts all runs asked for, finished or not: a training that goes on later has as many threads as before,
    since their number changes the last bits. Under a launcher all cores take part in one training after the other.
    On a GPU one training runs at a time, because all would share its memory.
    """
    plan = _plan(options)
    cores = options.threads or os.cpu_count() or 1
    if distributed.launched():
        require(not options.workers, "workers", "unset under a launcher", options.workers)
        return 1, cores
    at_once = cores if options.device.partition(":")[0] == "cpu" else 1
    workers = options.workers or min(at_once, len(plan.arms) * len(plan.seeds))
    return workers, max(1, cores // workers)
