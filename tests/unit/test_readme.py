"""The README says what the committed results say, and its code runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.readme_tables import ROOT, filled, first_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_tables_are_those_of_the_committed_reports() -> None:
    """A table in the README equals the table in the report that it names; an edited one does not."""
    assert README.count("<!-- table: ") >= 2
    assert filled(README) == README
    table = first_table(README[README.index("<!-- table: ") :])
    assert filled(README.replace(table, table.replace("0", "1"))) == README


def test_readme_code_runs() -> None:
    """Every Python block of the README runs in a fresh interpreter, with warnings as errors."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, timeout=120)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_readme_links_lead_somewhere(link: str) -> None:
    """A relative link names a file of this repository."""
    assert (ROOT / link).exists()
