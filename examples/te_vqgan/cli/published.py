"""The commands that read published results only: ``hypotheses`` and ``numbers``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from examples.te_vqgan.runs.checks import require

__all__ = ["add_published_commands"]


def add_published_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Register them.

    Args:
        add: makes the parser of a command from its name, function and help text.
    """
    tested = add("hypotheses", _hypotheses, "test the preregistered hypotheses on finished runs")
    tested.add_argument(
        "--results", type=Path, required=True, help="folder of a results.json with all planned runs"
    )
    tested.add_argument("--into", type=Path, help="folder of the tables and figures (default: that of --results)")
    tested.add_argument(
        "--interim", action="store_true", help="print the means of the runs that are there and test nothing"
    )
    numbers = add("numbers", _numbers, "hold the marked numbers of pages against the published results")
    numbers.add_argument("pages", type=Path, nargs="*", help="Markdown files (default: README and documentation)")
    numbers.add_argument("--write", action="store_true", help="correct the numbers that differ")


def _hypotheses(options: argparse.Namespace) -> None:
    from examples.te_vqgan.reports.hypotheses.document import interim, write_hypotheses
    from examples.te_vqgan.runs.provenance import command_line

    if options.interim:
        require(options.into is None, "into", "unset with --interim, which writes no file", options.into)
        print(interim(options.results))
        return
    into = options.into or options.results
    write_hypotheses(options.results, into, command=command_line(options.words))
    print((into / "hypotheses.md").read_text(encoding="utf-8"))


def _numbers(options: argparse.Namespace) -> None:
    from examples.te_vqgan.reports.numbers.pages import marked_numbers, published_pages, read_page, rewritten

    different = 0
    for path in options.pages or published_pages():
        page = read_page(path)
        try:
            found = marked_numbers(page)
            if options.write and any(one.printed != one.current for one in found):
                path.write_text(rewritten(page), encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"{path}, {error}") from error
        for one in found:
            same = one.printed == one.current
            different += not same
            change = one.current if same else f"{one.printed} -> {one.current}"
            print(f"{path}:{one.line}: {change}  ({one.marker})")
    if different and not options.write:
        raise ValueError(
            f"marked numbers must be those of the data, got {different} others; --write corrects them."
        )
