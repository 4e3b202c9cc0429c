"""Tables of text: printed, in Markdown and as HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from te_quant.tables import Table, Tabular


class _Cells(HTMLParser):
    """The texts of an HTML table with their alignment, as a browser would read them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str]]] = []
        self.open: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.open = dict(attrs)["style"]
            self.rows[-1].append(("", self.open or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.open = None

    def handle_data(self, data: str) -> None:
        if self.open is not None:
            text, style = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, style)


def test_markdown_aligns_text_left_and_numbers_right() -> None:
    """The first column is text, unless ``align`` says more."""
    table = Table(["a", "b", "c"], [["x", "y", "1"]], "llr")
    assert table.to_markdown() == "| a | b | c |\n| --- | --- | ---: |\n| x | y | 1 |\n"
    assert Table(["a", "b"], []).to_markdown() == "| a | b |\n| --- | ---: |\n"


@pytest.mark.parametrize(("cell", "written"), [("a|b", "a\\|b"), ("a\nb", "a b")])
def test_markdown_keeps_every_cell_in_its_column(cell: str, written: str) -> None:
    """A bar or a new line would end it."""
    assert Table(["a"], [[cell]]).to_markdown().splitlines()[-1] == f"| {written} |"


def test_the_note_stands_below_the_table() -> None:
    """In Markdown it needs an empty line before it."""
    table = Table(["a"], [["x"]], note="Measured with `canvas`.")
    assert table.to_markdown().endswith("| x |\n\nMeasured with `canvas`.\n")
    assert str(table).endswith("x\n\nMeasured with `canvas`.")
    assert table.to_html().endswith("<p>Measured with <code>canvas</code>.</p>")


def test_html_escapes_its_texts_and_aligns_them() -> None:
    """A browser reads the cells as they were given."""
    cells = [["<b>&amp;", "1"], ['"quoted" `code`', "2 | 3"]]
    parser = _Cells()
    parser.feed(Table(["model", "x < y"], cells)._repr_html_())
    assert [[text for text, _ in row] for row in parser.rows] == [
        ["model", "x < y"],
        ["<b>&amp;", "1"],
        ['"quoted" code', "2 | 3"],
    ]
    assert all([style for _, style in row] == ["text-align: left", "text-align: right"] for row in parser.rows)


def test_print_aligns_columns() -> None:
    """Widths are those of the longest texts."""
    lines = str(Table(["name", "n"], [["a", "1,000"], ["longer", "2"]])).splitlines()
    assert lines == ["name        n", "------  -----", "a       1,000", "longer      2"]


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("encoder." * 20, "…", "encoder."), ("encoder " * 20, "encoder encoder ", "…")],
)
def test_print_shortens_text_to_keep_within_100_characters(name: str, start: str, end: str) -> None:
    """Sentences keep their beginning, names their end; numbers are never cut."""
    number = "0.123456 [0.1, 0.2]"
    lines = str(Table(["module", "kind", "error"], [[name, "Conv2d", number]], "llr")).splitlines()
    assert max(map(len, lines)) == 100
    assert lines[-1].startswith(start)
    assert lines[-1].endswith(f"{end}  Conv2d  {number}")


def test_print_continues_in_a_second_block() -> None:
    """Columns of numbers that do not fit follow below, with the names again."""
    header = ["metric", *(f"report {number}" for number in range(8))]
    table = Table(header, [["rate", *("0.500 [0.400, 0.600]" for _ in range(8))]])
    blocks = str(table).split("\n\n")
    assert len(blocks) == 2
    assert all(line.startswith(("metric", "------", "rate")) for block in blocks for line in block.splitlines())
    assert max(len(line) for line in str(table).splitlines()) <= 100
    assert len(re.findall(r"0\.500 \[0\.400, 0\.600\]", str(table))) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], [["x"]]), r"^rows entry must be of 2 cells, one per column, got \['x'\]\.$"),
        ((["a", "b"], [], "l"), r"^align must be 2 letters l or r, got 'l'\.$"),
        ((["a", "b"], [], "lc"), r"^align must be 2 letters l or r, got 'lc'\.$"),
    ],
)
def test_tables_of_another_shape_are_refused(arguments: tuple[list[str], list[list[str]]], message: str) -> None:
    """Each with its own sentence."""
    with pytest.raises(ValueError, match=message):
        Table(*arguments)


def test_a_tabular_without_a_summary_says_so() -> None:
    """The one method that a class has to define."""
    with pytest.raises(NotImplementedError, match=r"^Tabular must define summary\(\)\.$"):
        str(Tabular())
