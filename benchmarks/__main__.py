"""``python -m benchmarks``: measure what is not measured yet, then write tables and pictures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.contest import Cell, Context
from benchmarks.plots import write_plots
from benchmarks.results import Store, command_line, stamp
from benchmarks.sections import SECTIONS
from benchmarks.sizes import SIZES
from benchmarks.tables import tables, write_tables
from benchmarks.timing import Limits

__all__ = ["main", "measure_all"]

_LIMITS = {"quick": Limits(budget=0.3, max_rounds=5), "full": Limits()}
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device must be one that torch sees, got cuda.", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    folder: Path = options.out / options.device
    names = list(dict.fromkeys(options.only)) if options.only else list(SECTIONS)
    limits = _LIMITS[options.grid]
    if options.budget is not None:
        limits = limits._replace(budget=options.budget)
    facts = stamp(device=device, grid=options.grid, threads=options.threads, budget=limits.budget)
    try:
        store = Store(
            folder / "results.json",
            device=options.device,
            grid=options.grid,
            stamp=facts,
            command=command_line(arguments),
            fresh=options.fresh,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    context = Context(device, options.threads, options.grid, limits, store.cells)
    status = 0
    if not options.tables:
        if options.fresh:
            for name in names:
                store.forget(name)
        try:
            measure_all(store, {name: SECTIONS[name](context) for name in names}, context)
        except KeyboardInterrupt:
            print("Stopped; the same command goes on from here.", file=sys.stderr)
            status = _INTERRUPTED
    write_tables(store.document, folder)
    write_plots(store.document, folder)
    print(tables(store.document)["targets"])
    return status


def measure_all(store: Store, sections: dict[str, list[Cell]], context: Context) -> None:
    """Measure the cells that the store lacks; those of a section that are no longer asked for go."""
    waiting = [cell for cells in sections.values() for cell in cells if not store.finished(cell.key)]
    with tqdm(waiting, unit="cell", disable=not waiting) as progress:
        for cell in progress:
            progress.set_postfix_str(cell.key)
            begin = time.perf_counter()
            result = cell.run(context)
            store.put(cell.key, {"settings": dict(cell.settings), **result}, time.perf_counter() - begin)
    for name, cells in sections.items():
        store.forget(name, keep=[cell.key for cell in cells])
    store.write()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        type=_sections,
        metavar="SECTION,...",
        help=f"measure these alone and keep what is known of the others: {', '.join(SECTIONS)}",
    )
    parser.add_argument("--grid", choices=tuple(SIZES), default="full", help="sizes to measure (default: full)")
    parser.add_argument(
        "--threads",
        type=_positive,
        default=torch.get_num_threads(),
        help="of torch's CPU kernels (default: torch's)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--budget", type=float, help="seconds a cell should take, more or less")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder; each device has one in it (default: benchmarks/results)",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write tables and pictures anew")
    return parser


def _sections(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(SECTIONS)}, got {name!r}.")
    return names


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}.")
    return value


if __name__ == "__main__":
    sys.exit(main())
