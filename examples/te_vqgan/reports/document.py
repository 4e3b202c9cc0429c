"""A report as a list of blocks, written as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from te_quant import tables

__all__ = ["Block", "Bullets", "Heading", "Paragraph", "Picture", "Table", "to_html", "to_markdown"]


class Heading(NamedTuple):
    """A title; ``level`` 1 is the document's own."""

    level: int
    text: str


class Paragraph(NamedTuple):
    """Running text; ``code`` stands between backticks."""

    text: str


class Bullets(NamedTuple):
    """A list of sentences."""

    items: Sequence[str]


class Table(NamedTuple):
    """A header and rows of cells, as text; the first column names the rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A PNG by its file name, with the text below it."""

    name: str
    caption: str


Block = Heading | Paragraph | Bullets | Table | Picture

_NO_VALUE = ("skipped", "failed", "refused", "not installed", "not measured")

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0; font-size: .93rem; display: block; overflow-x: auto }
th, td { padding: .3rem .75rem; border-bottom: 1px solid #ddd; text-align: right }
td { font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption { color: #555; font-size: .9rem }
code { background: #f2f2f2; padding: .1rem .3rem; border-radius: .2rem; overflow-wrap: anywhere }
""".strip()


def to_markdown(blocks: Sequence[Block]) -> str:
    """Write ``blocks`` as Markdown; pictures are links to the files beside it."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Bullets(items):
                parts.append("\n".join(f"- {item}" for item in items))
            case Table(header, rows):
                parts.append(tables.Table(header, rows, align=_sides(header, rows)).to_markdown().rstrip())
            case Picture(name, caption):
                parts.append(f"![{_short(name)}]({name})\n\n*{caption}*")
    return "\n\n".join(parts) + "\n"


def _sides(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return ``l`` for each column of text and ``r`` for each of numbers; the first names the rows.

    Numbers may have a sign, a bound, a deviation or an interval. Cells without a value, such as a dash, do not
    count.
    """
    columns = [[row[place] for row in rows] for place in range(1, len(header))]
    return "l" + "".join("l" if _is_text(column) else "r" for column in columns)


def to_html(blocks: Sequence[Block], pictures: Mapping[str, bytes], title: str) -> str:
    """Write ``blocks`` as one HTML file that needs no other: style inline, pictures as data URIs.

    Args:
        blocks: the content.
        pictures: the PNG of every :class:`Picture`, by name.
        title: of the window.
    """
    parts = [_html_block(block, pictures) for block in blocks]
    view = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{view}<title>{_escape(title)}</title>\n<style>\n{_STYLE}\n</style></head>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n{head}\n<body>\n{body}\n</body>\n</html>\n'


def _html_block(block: Block, pictures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            top = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            lines = ("<tr>" + "".join(f"<td>{_number(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f"<table><thead><tr>{top}</tr></thead>\n<tbody>{chr(10).join(lines)}</tbody></table>"
        case Picture(name, caption):
            data = base64.b64encode(pictures[name]).decode("ascii")
            image = f'<img alt="{_escape(_short(name))}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{_inline(caption)}</figcaption></figure>"


def _short(name: str) -> str:
    """The text instead of a picture; its caption, which says more, stands below."""
    return name.rpartition(".")[0].replace("_", " ")


def _is_text(column: Sequence[str]) -> bool:
    """Whether at least half of the cells begin with no number; cells without a value do not count."""
    telling = [cell for cell in column if any(letter.isalnum() for letter in cell) and cell not in _NO_VALUE]
    numbers = sum(bool(re.match(r"[\s≤≥<>~*+−–/-]*\d", cell)) for cell in telling)
    return bool(telling) and 2 * numbers <= len(telling)


def _number(cell: str) -> str:
    """A cell, with a mean and its deviation, behind ± or in brackets, on one line."""
    return re.sub(r" (± |/ |\([\d.]+\))", r"&nbsp;\1", _inline(cell)).replace("± ", "±&nbsp;")


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
