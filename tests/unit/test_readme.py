"""The README says what the committed results say, and its code runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.readme_tables import ROOT, filled, first_table, selection

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TABLE = """\
| mode | N | time, ms | text |
| --- | ---: | ---: | --- |
| eval | 4,096 | 1.5 | a \\| b |
| eval | 8,192 | 2.5 | c |
| ema | 4,096 | 3.5 | d |
"""


def test_readme_is_short() -> None:
    """It opens the door; the long tables are in the documentation."""
    assert len(README.splitlines()) <= 120


def test_readme_tables_are_those_of_the_committed_reports() -> None:
    """A table in the README equals the table in the report that it names; an edited one does not."""
    assert README.count("<!-- table: ") >= 2
    assert filled(README) == README
    table = first_table(README[README.index("<!-- table: ") :])
    assert filled(README.replace(table, table.replace("0", "1"))) == README


def test_a_selection_keeps_the_named_columns_and_rows_in_their_order() -> None:
    """Rows are named by as many of their cells as it takes."""
    expected = "| text | mode |\n| --- | --- |\n| d | ema |\n| c | eval |\n"
    assert selection(TABLE, ["text", "mode"], [["ema"], ["eval", "8,192"]]) == expected


def test_a_selection_of_nothing_in_particular_is_everything() -> None:
    """A bar behind a backslash stays in its cell."""
    assert selection(TABLE) == TABLE


@pytest.mark.parametrize(
    ("columns", "rows", "told"),
    [
        (["speed"], [], "column 'speed' must occur once, got 0 times."),
        ([], [["eval"]], "row 'eval' must occur once, got 2 times."),
        ([], [["eval", "1"]], "row 'eval | 1' must occur once, got 0 times."),
    ],
)
def test_a_selection_of_what_is_not_there_or_ambiguous_is_refused(
    columns: list[str], rows: list[list[str]], told: str
) -> None:
    """A renamed row of a report does not vanish from the README unseen."""
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        selection(TABLE, columns, rows)


ZERO_PADDING = """
encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 4, 2, 1))
try:
    test_latents_follow_shifts_by_whole_tokens()
except AssertionError as error:
    assert "not equivariant at shift (4, 0)" in str(error) and "beside the border" in str(error)
else:
    raise RuntimeError("zero padding must fail the test")
"""


def test_readme_code_runs() -> None:
    """The Python blocks and their test run in a fresh interpreter, one after the other, with warnings as errors.

    Negative control: with zero padding that test fails, and names the border, as the README says.
    """
    assert len(BLOCKS) >= 3
    code = "\n".join([*BLOCKS, "test_latents_follow_shifts_by_whole_tokens()", ZERO_PADDING])
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_readme_links_lead_somewhere(link: str) -> None:
    """A relative link names a file of this repository."""
    assert (ROOT / link).exists()
