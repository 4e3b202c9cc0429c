"""Find the markers in pages, compare the numbers before them with the data, and correct those that differ.

A marker is a comment right behind a number, ``0.861<!-- small: vqgan.t2i.quad1 -->``: the name of the data, a
colon, and an expression (:mod:`~.expressions`). Readers do not see it. ``0.861 ± 0.051`` checks a mean and the
standard deviation between seeds, or the spread that the expression gives. ``99.4 %`` checks a hundred times the
value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from examples.te_vqgan.reports.numbers.data import DATA, ROOT
from examples.te_vqgan.reports.numbers.expressions import evaluate
from examples.te_vqgan.reports.numbers.values import FUNCTIONS, Place, Sample, Spread, mean

__all__ = ["Marked", "marked_numbers", "published_pages", "read_page", "rewritten", "unmarked_decimals"]

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_MARKED = re.compile(
    rf"(?P<sign>[-+−]?)(?P<number>{_NUMBER})(?P<between>\s+±\s+)?(?(between)(?P<spread>{_NUMBER}))"
    r"(?P<percent>\s+%)?<!-- (?P<data>[a-z0-9]+): (?P<expression>[^>]*?) -->"
)
_COMMENT = re.compile(r"<!-- (?P<data>[a-z0-9]+): .*?-->", re.DOTALL)
# Parts of a page that state no result: tables copied from reports, code, comments, targets of links.
_NOT_PROSE = re.compile(
    r"<!-- table: .*?<!-- /table -->|^```.*?^```|<!--.*?-->|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|https?://\S+",
    re.DOTALL | re.MULTILINE,
)
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?!\.?\d)")


class Marked(NamedTuple):
    """A number with its marker.

    Attributes:
        line: of the page, counted from 1.
        printed: the number as the page has it.
        current: as the data have it, at the same precision.
        marker: data and expression.
    """

    line: int
    printed: str
    current: str
    marker: str


def published_pages() -> list[Path]:
    """Return the README and the pages of the documentation."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", *(page for page in pages if "_build" not in page.parts)]


def read_page(path: Path) -> str:
    """Return the source of a page.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a folder, or no text.
    """
    expected = "pages must be Markdown files in UTF-8"
    if not path.exists():
        raise FileNotFoundError(f"{expected}, got none at {path}.")
    if path.is_dir():
        raise ValueError(f"{expected}, got the folder {path}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{expected}, got {path} ({error}).") from error


def marked_numbers(page: str, data: Mapping[str, Callable[[], Place]] = DATA) -> list[Marked]:
    """Return every marked number of a page, in order.

    Args:
        page: its source.
        data: by the name that markers begin with.

    Raises:
        ValueError: a marker does not follow a number, or its data or expression has no value.
    """
    found = []
    for match in _matches(page, data):
        line = page.count("\n", 0, match.start()) + 1
        marker = f"{match['data']}: {' '.join(match['expression'].split())}"
        found.append(Marked(line, _printed(match), _current(match, data, line), marker))
    return found


def rewritten(page: str, data: Mapping[str, Callable[[], Place]] = DATA) -> str:
    """Return the page with every marked number as the data have it; the arguments are those of the function above.

    Raises:
        ValueError: as above.
    """
    for match in reversed(_matches(page, data)):
        line = page.count("\n", 0, match.start()) + 1
        start = match.start()
        page = page[:start] + _current(match, data, line) + page[start + len(_printed(match)) :]
    return page


def unmarked_decimals(page: str) -> list[tuple[int, str]]:
    """Return the line and the text of each decimal number in prose that no marker follows."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    prose = _NOT_PROSE.sub(blank, _MARKED.sub(blank, page))
    return [(prose.count("\n", 0, match.start()) + 1, match[0]) for match in _DECIMAL.finditer(prose)]


def _matches(page: str, data: Mapping[str, Callable[[], Place]]) -> list[re.Match[str]]:
    matches = list(_MARKED.finditer(page))
    ends = {match.end() for match in matches}
    for comment in _COMMENT.finditer(page):
        if comment["data"] == "table":
            continue
        line = page.count("\n", 0, comment.start()) + 1
        if comment["data"] not in data:
            raise ValueError(f"line {line}: data must be one of {', '.join(data)}, got {comment['data']!r}.")
        if comment.end() not in ends:
            raise ValueError(f"line {line}: marker must stand right behind a number, got {comment[0]}.")
    return matches


def _printed(match: re.Match[str]) -> str:
    spread = f"{match['between']}{match['spread']}" if match["between"] else ""
    return f"{match['sign']}{match['number']}{spread}"


def _current(match: re.Match[str], data: Mapping[str, Callable[[], Place]], line: int) -> str:
    try:
        value = evaluate(match["expression"], data[match["data"]]())
        middle = mean(value)
        scale = 100.0 if match["percent"] else 1.0
        text = _written(middle * scale, match["number"], match["sign"])
        if match["between"] is None:
            return text
        if isinstance(value, Sample):
            value = Spread(middle, mean(FUNCTIONS["sd"](value)))
        if not isinstance(value, Spread):
            raise ValueError("number behind ± must belong to a sample or a spread, got a number.")  # noqa: TRY301, TRY004
        return text + match["between"] + _written(value.spread * scale, match["spread"], "")
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from error


def _written(value: float, like: str, sign: str) -> str:
    """Write a number with the decimals, the commas and the kind of sign of another."""
    decimals = len(like.partition(".")[2])
    comma = "," if "," in like or "." not in like else ""
    text = format(abs(value), f"{comma}.{decimals}f")
    if value < 0 and float(text.replace(",", "")) != 0:
        return (sign if sign in ("-", "−") else "-") + text
    return ("+" if sign == "+" else "") + text
