"""The page of situations names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "situations.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith(("| situation |", "| --- |"))
]


def _exists(name: str) -> bool:
    """Whether ``path::function`` is a function of a file of tests."""
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file():
        return False
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_situation_names_a_test_that_exists(row: list[str]) -> None:
    """A test that is renamed is renamed on the page too."""
    situation, answer, test = row
    assert situation
    assert answer.endswith(".")
    match = re.fullmatch(r"`(tests/[\w/]+\.py::\w+)`", test)
    assert match is not None
    assert _exists(match[1])


def test_situations_are_told_once() -> None:
    """In four tables."""
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 40


@pytest.mark.parametrize("name", ["tests/unit/test_situations.py::no_such", "tests/unit/test_no_such.py::_exists"])
def test_a_test_that_is_missing_is_noticed(name: str) -> None:
    """Negative control."""
    assert _exists("tests/unit/test_situations.py::_exists")
    assert not _exists(name)
