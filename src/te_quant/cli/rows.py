"""A table in a Markdown file that grows by one row per command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from te_quant._checks import require
from te_quant._pretrained import write_atomically
from te_quant.tables import Table

__all__ = ["put_row", "require_table"]


def put_row(path: Path, header: Sequence[str], row: Sequence[str], align: str) -> None:
    """Add a row to the table in ``path``, or replace the one with the same first cell.

    A file that does not exist is made. What else the file says, before and behind its table, stays as it is.

    Args:
        path: a file in Markdown.
        header: of the table.
        row: as many cells.
        align: as for :class:`~te_quant.tables.Table`.

    Raises:
        ValueError: the file has no table, or one with another header.
    """
    head, rule, *_ = Table(header, [], align).to_markdown().splitlines()
    line = Table(header, [row], align).to_markdown().splitlines()[2]
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [head, rule]
    require(head in lines, str(path), f"a file with a table that begins with {head!r}", "none")
    start = lines.index(head) + 2
    end = next((n for n, text in enumerate(lines[start:], start) if not text.startswith("|")), len(lines))
    names = [_first_cell(text) for text in lines[start:end]]
    if _first_cell(line) in names:
        lines[start + names.index(_first_cell(line))] = line
    else:
        lines.insert(end, line)
    write_atomically(path, lambda beside: beside.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def require_table(path: Path | None, first_title: str) -> None:
    """Refuse a file without a table that begins with this title, before anything is measured."""
    if path is None or not path.exists():
        return
    # Not a text at all, perhaps.
    text = path.read_text(encoding="utf-8", errors="replace")
    head = f"| {first_title} |"
    has = any(line.startswith(head) for line in text.splitlines())
    require(has, str(path), f"a file with a table that begins with {head!r}", "none")


def _first_cell(line: str) -> str:
    # A bar behind a backslash belongs to its cell.
    return re.split(r"(?<!\\)\|", line)[1].strip()
