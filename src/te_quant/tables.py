"""Tables of text: to print, to write as Markdown, and to show in a notebook.

Every report of this library prints itself this way, see :class:`Tabular`.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from te_quant._checks import require
from te_quant._measuring.text import name_end

__all__ = ["Table", "Tabular"]

# Columns of a terminal that printed tables keep to.
_WIDTH = 100
# A column of text is not cut shorter than this to save width.
_SHORTEST = 24
_GAP = "  "


@dataclass(frozen=True)
class Table:
    """A header, rows of cells, and an optional note below them.

    ``print(table)`` aligns the columns and keeps within 100 characters per line: texts that are too long end in an
    ellipsis, or begin with one if they are names without spaces, such as the path of a module, because similar
    paths differ at their end. Columns that do not fit follow in a second block. A notebook shows the same as an
    HTML table.

    Args:
        header: the title of each column.
        rows: the cells, as text; as many per row as there are titles.
        align: ``l`` (text) or ``r`` (numbers) for each column, as in ``"lrr"``. Empty: the first column holds text
            and all others numbers.
        note: text below the table; backticks mark code.

    Raises:
        ValueError: a row has more or fewer cells than the header, or ``align`` does not fit.

    Example:
        >>> table = Table(["model", "rate"], [["zero padding", "0.513"], ["circular", "1.000"]])
        >>> print(table)
        model          rate
        ------------  -----
        zero padding  0.513
        circular      1.000
        >>> print(table.to_markdown(), end="")
        | model | rate |
        | --- | ---: |
        | zero padding | 0.513 |
        | circular | 1.000 |
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        columns = len(self.header)
        for row in self.rows:
            require(len(row) == columns, "rows entry", f"of {columns} cells, one per column", list(row))
        if not self.align:
            object.__setattr__(self, "align", "l" + "r" * (columns - 1))
        fits = len(self.align) == columns and set(self.align) <= {"l", "r"}
        require(fits, "align", f"{columns} letters l or r", repr(self.align))

    def to_markdown(self) -> str:
        """Return the table in Markdown, columns of text aligned left and numbers right, and the note below it."""
        rule = ["---" if side == "l" else "---:" for side in self.align]
        lines = [_markdown_row(self.header), "| " + " | ".join(rule) + " |", *map(_markdown_row, self.rows)]
        table = "".join(line + "\n" for line in lines)
        return f"{table}\n{self.note}\n" if self.note else table

    def to_html(self) -> str:
        """Return the table as an HTML fragment, and the note as a paragraph below it."""

        def cells(tag: str, texts: Sequence[str]) -> str:
            sides = ("left" if side == "l" else "right" for side in self.align)
            pairs = zip(sides, texts, strict=True)
            return "".join(f'<{tag} style="text-align: {side}">{_html(text)}</{tag}>' for side, text in pairs)

        body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        table = f"<table>\n<thead><tr>{cells('th', self.header)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        return f"{table}\n<p>{_html(self.note)}</p>" if self.note else table

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        lines = [[" ".join(cell.split()) for cell in line] for line in (self.header, *self.rows)]
        widths = _narrowed([max(map(len, column)) for column in zip(*lines, strict=True)], self.align)
        texts = []
        for columns in _blocks(widths):
            rule = _GAP.join("-" * widths[column] for column in columns)
            first, *rest = (self._line(line, widths, columns) for line in lines)
            texts.append("\n".join([first, rule, *rest]))
        if self.note:
            texts.append(textwrap.fill(self.note, _WIDTH, break_long_words=False, break_on_hyphens=False))
        return "\n\n".join(texts)

    def _line(self, cells: Sequence[str], widths: Sequence[int], columns: Sequence[int]) -> str:
        padded = []
        for column in columns:
            width, text = widths[column], cells[column]
            if len(text) > width:
                text = text[: width - 1] + "…" if " " in text else name_end(text, width)
            padded.append(text.ljust(width) if self.align[column] == "l" else text.rjust(width))
        return _GAP.join(padded).rstrip()


class Tabular:
    """Something that prints as a short table, and that a notebook shows as one; derive from it.

    Example:
        >>> class Scores(Tabular):
        ...     def summary(self) -> Table:
        ...         return Table(["score", "value"], [["loss", "0.25"]])
        >>> print(Scores())
        score  value
        -----  -----
        loss    0.25
    """

    def summary(self) -> Table:
        """Return the table that is shown."""
        raise NotImplementedError(f"{type(self).__name__} must define summary().")

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary().to_html()


def _narrowed(widths: list[int], align: str) -> list[int]:
    """Cut the columns of text so that all columns fit the line, or else the first one next to any other."""
    texts = [column for column, side in enumerate(align) if side == "l"]
    room = _WIDTH - len(_GAP) * (len(widths) - 1)
    cut = _cut(widths, texts, room)
    if sum(cut) <= room or len(widths) < 2:
        return cut
    first = _cut([widths[0], max(widths[1:])], [0], _WIDTH - len(_GAP))
    return [first[0], *widths[1:]]


def _cut(widths: Sequence[int], texts: Sequence[int], room: int) -> list[int]:
    """Take from the widest columns of text until the sum fits, or until they are at their shortest."""
    cut = list(widths)
    while texts and sum(cut) > room:
        widest = max(texts, key=lambda column: cut[column])
        if cut[widest] <= _SHORTEST:
            break
        cut[widest] -= 1
    return cut


def _blocks(widths: Sequence[int]) -> list[list[int]]:
    """Divide the columns so that each block fits the line; the first column is part of every block."""
    blocks: list[list[int]] = [[0]] if widths else []
    for column in range(1, len(widths)):
        taken = sum(widths[other] + len(_GAP) for other in blocks[-1])
        if taken + widths[column] > _WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _html(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
