"""A table in a Markdown file that grows by one row per command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from te_quant._checks import require
from te_quant._pretrained import write_atomically
from te_quant.cli.files import require_writable
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
    lines = _lines(path, head) if path.exists() else [head, rule, ""]
    bare = [line.removesuffix("\r") for line in lines]
    start = bare.index(head) + 2
    carriage = lines[start - 2].removeprefix(head)
    end = next((n for n, text in enumerate(lines[start:], start) if not text.startswith("|")), len(lines))
    names = [_first_cell(text) for text in lines[start:end]]
    if _first_cell(line) in names:
        place = start + names.index(_first_cell(line))
        lines[place] = line + lines[place].removeprefix(bare[place])
    else:
        # A table at the end of a file may lack its last line end.
        lines[end - 1] = bare[end - 1] + carriage
        lines[end:] = [line + carriage, *(lines[end:] or [""])]
    write_atomically(path, lambda beside: beside.write_bytes("\n".join(lines).encode()))


def require_table(path: Path | None, header: Sequence[str]) -> None:
    """Refuse, before anything is measured, a file that :func:`put_row` refuses.

    Raises:
        ValueError: the file has no table with this header, or no file can be there.
    """
    if path is None:
        return
    require_writable(path, "--table")
    if path.exists():
        _lines(path, Table(header, []).to_markdown().splitlines()[0])


def _lines(path: Path, head: str) -> list[str]:
    """Return the lines of a file; refuse one without the line ``head``, with which its table begins."""
    try:
        # Bytes, and no line ends but these: everything else stays as it is.
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8, got another file ({error}).") from error
    bare = [line.removesuffix("\r") for line in lines]
    found = next((repr(line) for line in bare if line.startswith("|")), "none")
    expected = f"a file with a table that begins with {head!r}"
    require(head in bare, str(path), expected, f"{found}; pass another file")
    return lines


def _first_cell(line: str) -> str:
    # A bar behind a backslash belongs to its cell.
    return re.split(r"(?<!\\)\|", line)[1].strip()
