"""Copy the tables that the README names from their reports into the README: ``python -m tests.readme_tables``.

A marker names the file, and below it the columns and the rows to take; without them, all. A row is named by its
first cells, as many as it takes to tell it from the others, in the notation of the table::

    <!-- table: FOLDER/FILE.md
    columns: mode | N | te_quant, ms
    rows: eval | 4,096; eval | 8,192 -->
    (filled in)
    <!-- /table -->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MARKED = re.compile(r"(<!-- table: (\S+)\s(.*?)-->\n).*?(<!-- /table -->)", re.DOTALL)


def first_table(text: str) -> str:
    """The first run of lines that begin with ``|``."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[start:end]) + "\n"


def selection(table: str, columns: Sequence[str] = (), rows: Sequence[Sequence[str]] = ()) -> str:
    """``table`` with these columns and rows only, in this order.

    Args:
        table: in Markdown.
        columns: titles; none for all.
        rows: the first cells of each; none for all.

    Raises:
        ValueError: a title, or the beginning of a row, occurs never or more than once.
    """
    header, rule, *body = (cells(line) for line in table.splitlines())
    kept = [_place([[title] for title in header], [name], "column") for name in columns or header]
    chosen = [body[_place(body, name, "row")] for name in rows] or body
    lines = ([line[place] for place in kept] for line in (header, rule, *chosen))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(line: str) -> list[str]:
    """The cells of a row, or of what names one; a bar behind a backslash belongs to its cell."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def filled(page: str) -> str:
    """``page`` with every marked table as its source has it now."""
    return _MARKED.sub(_filled, page)


def _filled(marked: re.Match[str]) -> str:
    begin, source, options, end = marked.groups()
    columns = [name for names in re.findall(r"^columns: (.*)$", options, re.MULTILINE) for name in cells(names)]
    rows = [
        cells(name) for names in re.findall(r"^rows: (.*)$", options, re.MULTILINE) for name in names.split(";")
    ]
    table = first_table((ROOT / source).read_text(encoding="utf-8"))
    return begin + selection(table, columns, rows) + end


def _place(lines: Sequence[Sequence[str]], name: Sequence[str], what: str) -> int:
    places = [place for place, line in enumerate(lines) if list(line[: len(name)]) == list(name)]
    if len(places) != 1:
        raise ValueError(f"{what} {' | '.join(name)!r} must occur once, got {len(places)} times.")
    return places[0]


def main() -> None:
    """Fill the README."""
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
