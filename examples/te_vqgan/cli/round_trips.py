"""The command ``round-trips``: how many tokens survive with and without the loss, and at what cost."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from examples.te_vqgan.cli.options import require_folder
from examples.te_vqgan.data.sources import load_digits

__all__ = ["add_round_trips_command"]


def add_round_trips_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Register it.

    Args:
        add: makes the parser of a command from its name, function, help text and shared options.
    """
    text = "measure whether tokenizers read back their own pictures, and what that costs"
    trips = add("round-trips", _round_trips, text, "data-dir", "threads")
    trips.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        help="folders of finished stage1 runs that differ in --seed and --round-trip-weight only (without "
        "them the table and the picture of --into are written again)",
    )
    trips.add_argument("--into", type=Path, required=True, help="add the results to those in this folder")
    trips.add_argument(
        "--images", type=int, default=512, help="test images for each, at most all of them (default: 512)"
    )
    trips.add_argument(
        "--search-images",
        type=int,
        default=0,
        metavar="N",
        help="encode the first N of them by search too, unless the weight is 0; takes seconds each (default: 0)",
    )


def _round_trips(options: argparse.Namespace) -> None:
    import torch

    from examples.te_vqgan.reports.round_trips import (
        measure_run,
        render,
        require_alike,
        run_name,
        write_round_trips,
    )
    from examples.te_vqgan.runs.provenance import command_line
    from examples.te_vqgan.stage1.exactness import finished_settings

    require_folder("into", options.into)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.runs:
        require_alike(options.runs, options.into, options.images, options.search_images)
    for folder in options.runs or ():
        source = load_digits(finished_settings(folder).data, options.data_dir)
        run = measure_run(folder, source, options.images, options.search_images)
        name = run_name(folder)
        # One by one, so that an interruption loses only the current one.
        write_round_trips(options.into, {name: run}, command=command_line(options.words))
        print(f"{name}: {run['round_trip']['match'][0]:.3f} of the tokens come back", flush=True)
    if not options.runs:
        render(options.into)
    print((options.into / "round-trips.md").read_text(encoding="utf-8"))
