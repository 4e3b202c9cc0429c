"""The command ``family``, from parsed options to trainings, table and picture."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from examples.te_vqgan.cli.options import (
    WHERE,
    execution,
    out_folder,
    require_folder,
    require_unset,
    stage1_settings,
)
from examples.te_vqgan.runs.checks import require

__all__ = ["add_family_command"]


def add_family_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Register it.

    Args:
        add: makes the parser of a command from its name, function, help text and shared options.
    """
    trained_alike = "train every quantizer of the library under the same settings, and write one table"
    family = add("family", _family, trained_alike, *WHERE, "seed", "steps", "data-dir", "device", "threads")
    family.add_argument("--quantizers", nargs="+", help="train only these (default: all that are not trained yet)")
    family.add_argument("--seeds", nargs="+", type=int, help="several seeds, instead of --seed")
    family.add_argument(
        "--into", type=Path, help="folder of results, table and picture (default: OUT/family/report)"
    )
    family.add_argument(
        "--results", type=Path, help="rewrite table and picture in this folder from its results.json"
    )


def _family(options: argparse.Namespace) -> None:
    from examples.te_vqgan.data.sources import load_digits
    from examples.te_vqgan.family.train import FAMILY, collect_family, train_family
    from examples.te_vqgan.reports.family import write_family
    from examples.te_vqgan.reports.results import to_text
    from examples.te_vqgan.runs.files import write_text_atomically
    from examples.te_vqgan.runs.provenance import command_line

    folder = options.results
    if folder is not None:
        require_unset(
            options, "results", "into", "out", "data", "seed", "seeds", "steps", "quantizers", "data_dir"
        )
    else:
        settings, out = stage1_settings(options, "vqgan"), out_folder(options) / "family"
        folder = require_folder("into", options.into or out / "report")
        require(not options.seeds or options.seed is None, "seed", "None with --seeds", options.seed)
        seeds = options.seeds or [settings.seed]
        words = command_line(options.words)
        source = load_digits(settings.data, options.data_dir)
        for seed in seeds:
            train_family(
                dataclasses.replace(settings, seed=seed),
                out,
                source,
                names=options.quantizers or tuple(FAMILY),
                execution=execution(options),
                command=words,
            )
        folder.mkdir(parents=True, exist_ok=True)
        results = collect_family(settings, out, seeds=seeds, command=words)
        write_text_atomically(folder / "results.json", to_text(results))
    write_family(folder)
    print((folder / "family.md").read_text(encoding="utf-8"))
