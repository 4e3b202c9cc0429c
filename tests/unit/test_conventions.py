"""What every test file keeps to, read from its source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parents[1].rglob("*.py"))


def calls_in(path: Path) -> list[tuple[str, ast.Call]]:
    """The name and the node of every call in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_names_of_test_files_are_unique() -> None:
    """Two files of one name cannot be collected together."""
    names = [path.name for path in FILES if path.name.startswith("test_")]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_generator_is_seeded_by_the_system(path: Path) -> None:
    """``default_rng()`` and ``Generator.seed()`` take their seed from the operating system: it never repeats."""
    unseeded = ("default_rng", ".seed", "SystemRandom", "urandom")
    bare = [(name, node.lineno) for name, node in calls_in(path) if not node.args and not node.keywords]
    assert not [(name, line) for name, line in bare if name.endswith(unseeded)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_refusal_is_matched_by_its_message(path: Path) -> None:
    """Another error of the same type must not pass for the one that is meant."""
    expected = [node for name, node in calls_in(path) if name in ("pytest.raises", "pytest.warns")]
    assert not [node.lineno for node in expected if "match" not in {word.arg for word in node.keywords}]
