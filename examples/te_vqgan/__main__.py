"""Command line: ``python -m examples.te_vqgan prepare|stage1|report|run|...``.

``run`` does everything for a preset; the other commands are its steps. Interrupted steps resume, and finished
steps are skipped. Under ``torchrun --nproc-per-node 2 -m examples.te_vqgan``, on one host or several, the same
commands train each model on all processes together.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from examples.te_vqgan.cli.family import add_family_command
from examples.te_vqgan.cli.options import (
    COMPUTE,
    SETTINGS,
    WHERE,
    add_options,
    announce,
    execution,
    image_source,
    out_folder,
    positive,
    require_folder,
    require_unset,
    stage1_settings,
)
from examples.te_vqgan.cli.pack import add_pack_command
from examples.te_vqgan.cli.photographs import add_photographs_command
from examples.te_vqgan.cli.published import add_published_commands
from examples.te_vqgan.cli.round_trips import add_round_trips_command
from examples.te_vqgan.cli.stability import add_stability_command
from examples.te_vqgan.cli.stage2 import add_stage2_commands
from examples.te_vqgan.data.sources import is_pictures
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.stage1.presets import ARMS, Stage1Settings

__all__ = ["main"]

# They choose the engine of the library's search for the nearest code; the second is older.
ENGINES = ("TE_QUANT_SEARCH", "TE_QUANT_FUSED_SEARCH")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused or failed, 130 interrupted).

    Of several processes that stop together, the main one tells it and has the status.
    """
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    with _searched_by_torch():
        try:
            return _status(options)
        finally:
            distributed.stop()


@contextlib.contextmanager
def _searched_by_torch() -> Iterator[None]:
    """Keep faiss away unless the user chose, so that numbers do not depend on whether it is installed."""
    if any(name in os.environ for name in ENGINES):
        yield
        return
    os.environ[ENGINES[0]] = "torch"
    try:
        yield
    finally:
        os.environ.pop(ENGINES[0], None)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    return _parser().parse_args(words, argparse.Namespace(words=list(words)))


def _status(options: argparse.Namespace) -> int:
    from examples.te_vqgan.runs.pipeline import STOPPED, JobFailed
    from examples.te_vqgan.stage1.train import Interrupted

    try:
        distributed.start(getattr(options, "device", "cpu"))
        with _quiet_unless_main():
            _perform(options)
    except distributed.MainFailed:
        return 0
    except (Interrupted, KeyboardInterrupt) as outcome:
        if not distributed.is_main():
            return 0
        again = "\nInterrupted. Give the same command again to resume (stage1: with --resume)."
        print(outcome if isinstance(outcome, Interrupted) else again, file=sys.stderr)
        return STOPPED
    except (ValueError, OSError, ImportError, FloatingPointError, JobFailed) as error:
        whose = "" if distributed.is_main() else f"process {distributed.rank()}: "
        print(f"{whose}error: {error}", file=sys.stderr)
        return 1
    return 0


def _perform(options: argparse.Namespace) -> None:
    """Run the command on all processes, or, if it does not share its work, on the main one while they wait."""
    if options.together:
        options.command(options)
    else:
        distributed.from_main(lambda: options.command(options))


@contextlib.contextmanager
def _quiet_unless_main() -> Iterator[None]:
    if distributed.is_main():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _prepare(options: argparse.Namespace) -> None:
    from examples.te_vqgan.data.prepare import prepare
    from examples.te_vqgan.data.sources import SPLITS, load_digits
    from examples.te_vqgan.stage1.evaluation import dataset

    settings = stage1_settings(options, next(iter(ARMS)))
    if is_pictures(settings.data):
        _prepare_pictures(options, settings)
        return
    folder = out_folder(options)
    source = load_digits(settings.data, options.data_dir)
    summary = prepare(source, {split: dataset(settings, source, split) for split in SPLITS}, folder / "data")
    counts = ", ".join(f"{split.digits:,} {name}" for name, split in summary.splits.items())
    print(f"Data {summary.data}: {counts} digits. A picture of them: {folder / 'data' / 'samples.png'}")


def _prepare_pictures(options: argparse.Namespace, settings: Stage1Settings) -> None:
    from examples.te_vqgan.data.pictures import PictureSource, find_pictures, folder_of
    from examples.te_vqgan.data.prepare import prepare_pictures
    from examples.te_vqgan.data.sources import SPLITS
    from examples.te_vqgan.stage1.pictures import crops

    folder = out_folder(options) / "data"
    left_out = find_pictures(folder_of(options.data)).left_out
    source = image_source(options, settings)
    assert isinstance(source, PictureSource)
    prepare_pictures(source, {split: crops(settings, source, split) for split in SPLITS}, left_out, folder)
    counts = ", ".join(f"{len(source.pixels[split])} {split}" for split in SPLITS)
    print(f"Data {source.name}: {counts} pictures. Crops of them: {folder / 'samples.png'}")
    if left_out:
        print(f"Left out, by their suffix or as copies: {', '.join(left_out)}")


def _stage1(options: argparse.Namespace) -> None:
    from examples.te_vqgan.reports.results import run_folder
    from examples.te_vqgan.runs.provenance import command_line
    from examples.te_vqgan.stage1.train import train_stage1

    settings = stage1_settings(options, options.arm)
    folder = run_folder(out_folder(options), options.arm, settings.seed)
    orphaned = None if options.parent is None else lambda _: os.getppid() != options.parent
    trained = train_stage1(
        settings,
        folder,
        image_source(options, settings),
        execution=execution(options),
        resume=options.resume,
        stop=orphaned,
        progress=options.parent is None,
        command=command_line(options.words),
    )
    print(f"{folder}: {'finished' if trained else 'was finished before, nothing to do'}.")


def _report(options: argparse.Namespace) -> None:
    from examples.te_vqgan.reports.report import render, write_report
    from examples.te_vqgan.runs.provenance import command_line

    if options.results is not None:
        require_unset(options, "results", "into", "out", "data")
        render(options.results)
        folder = options.results
    else:
        if options.into is not None:
            require_folder("into", options.into)
        folder = write_report(out_folder(options), command=command_line(options.words), into=options.into)
    announce(folder)


def _exactness(options: argparse.Namespace) -> None:
    import json

    import torch
    from tqdm import tqdm

    from examples.te_vqgan.data.sources import load_digits
    from examples.te_vqgan.reports.results import run_folder
    from examples.te_vqgan.runs.checks import require
    from examples.te_vqgan.runs.files import write_text_atomically
    from examples.te_vqgan.runs.provenance import command_line, git_commit, versions
    from examples.te_vqgan.stage1.exactness import finished_settings, numerical_check
    from te_quant import VQAutoencoder

    folder = run_folder(out_folder(options), options.arm, stage1_settings(options, options.arm).seed)
    settings = finished_settings(folder)
    source = load_digits(settings.data, options.data_dir)
    require(options.data in (None, settings.data), "data", f"{settings.data!r} as in {folder}", options.data)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = VQAutoencoder.from_pretrained(folder / "model")
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
    from examples.te_vqgan.reports.compare import gather, write_comparison
    from examples.te_vqgan.runs.checks import require
    from examples.te_vqgan.runs.provenance import command_line

    if options.results:
        require_unset(options, "results", "out", "data")
    folders = options.results or [out_folder(options) / "report"]
    folder = require_folder("into" if options.into else "results", options.into or folders[0])
    together = options.into is not None
    require(together == bool(options.arms), "arms", "given together with --into, or neither of them", options.arms)
    require(together or len(folders) == 1, "into", "a folder where --results names several", None)
    if together:
        gather(folders, options.arms, folder, command=command_line(options.words))
    write_comparison(folder)
    print((folder / "comparison.md").read_text(encoding="utf-8"))


def _regimes(options: argparse.Namespace) -> None:
    from examples.te_vqgan.reports.regimes import write_regimes
    from examples.te_vqgan.runs.checks import require

    require(not options.into.is_dir(), "into", "a Markdown file to write", f"the folder {options.into}")
    write_regimes(options.results, options.into)
    print(options.into.read_text(encoding="utf-8"))


def _audit(options: argparse.Namespace) -> None:
    from examples.te_vqgan.reports.audits import AUDITED, write_audits
    from examples.te_vqgan.runs.provenance import command_line

    require_folder("out", options.out)
    names = options.modules or tuple(AUDITED)
    write_audits(options.out, names=names, seed=options.seed, command=command_line(options.words))
    print((options.out / "audits.md").read_text(encoding="utf-8"))


def _run(options: argparse.Namespace) -> None:
    from examples.te_vqgan.cli.run import run_plan

    distributed.from_main(lambda: _prepare(options))
    run_plan(options, perform=lambda words: _perform(_parse(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.te_vqgan", description="Train and compare VQGAN and TE-VQGAN."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Callable[[argparse.Namespace], None], text: str, *options: str
    ) -> argparse.ArgumentParser:
        # No abbreviations: "--seed" must not pass for "--seeds" where only that one is taken.
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=command, together=False)
        add_options(added, *options)
        return added

    compute = (*SETTINGS, *COMPUTE)
    add("prepare", _prepare, "fetch and check the data, and draw some images", *WHERE, "data-dir", "seed")
    stage1 = add("stage1", _stage1, "train the tokenizer of one arm", *WHERE, *compute)
    stage1.set_defaults(together=True)
    stage1.add_argument("--arm", choices=tuple(ARMS), required=True, help="which tokenizer")
    stage1.add_argument("--resume", action="store_true", help="resume from the checkpoint, if there is one")
    stage1.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    add_stage2_commands(add)
    counted = "count the indices of an exact arm that differ after shifts"
    exactness = add("exactness", _exactness, counted, *WHERE, "data-dir", "seed", "threads")
    exactness.add_argument("--arm", choices=tuple(ARMS), required=True, help="which tokenizer")
    exactness.add_argument("--tokens", type=int, default=10_000_000, help="comparisons (default: 10 million)")
    report = add("report", _report, "write the report of the finished runs", *WHERE)
    report.add_argument("--into", type=Path, help="add the runs to the report in this folder")
    report.add_argument("--results", type=Path, help="rewrite the report in this folder from its results.json")
    compare = add(
        "compare",
        _compare,
        "write a table and a scatter plot of the arms in a report, or of several (--into)",
        *WHERE,
    )
    compare.add_argument(
        "--results", type=Path, nargs="+", help="folder of a results.json, or several (default: that of --out)"
    )
    compare.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), metavar="ARM", help="tokenizers to take; required with --into"
    )
    compare.add_argument("--into", type=Path, help="write results.json and the comparison of --arms here")
    several = add("regimes", _regimes, "write one table over reports of presets that differ in one setting")
    several.add_argument(
        "--results", type=Path, nargs="+", required=True, help="folders of reports, named as their presets"
    )
    several.add_argument("--into", type=Path, required=True, help="Markdown file to write")
    add_family_command(add)
    add_pack_command(add)
    add_photographs_command(add)
    add_published_commands(add)
    add_round_trips_command(add)
    add_stability_command(add)
    audit = add("audit", _audit, "find the modules of some networks that lose equivariance")
    audit.add_argument("--out", type=Path, default=Path("runs/te_vqgan/audits"), help="folder of the results")
    audit.add_argument("--modules", nargs="+", help="networks to audit (default: all)")
    audit.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    run = add("run", _run, "run all steps of the preset's plan, then write the report", *WHERE, *compute)
    run.set_defaults(together=True)
    run.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), help="train only these tokenizers (default: the plan's)"
    )
    run.add_argument("--stage2-steps", type=int, help="optimizer steps of the GPT, instead of the preset's")
    run.add_argument("--seeds", nargs="+", type=int, help="several seeds, instead of --seed")
    run.add_argument(
        "--workers", type=positive, default=0, help="trainings at once (default: one per core, or one on a GPU)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
