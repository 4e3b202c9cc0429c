"""Collapsing codebooks next to their cures: the command, and what is published of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import collapse
from tests.readme_tables import ROOT

RESULTS = ROOT / "benchmarks/results/collapse"


@pytest.mark.slow
def test_the_command_resumes_and_writes_table_and_figure(tmp_path: Path) -> None:
    """A second call trains only what is missing; other settings start again."""
    arguments = ["--data", "digits", "--steps", "2", "--out", str(tmp_path)]
    assert collapse.main(arguments) == 0
    path = tmp_path / "collapse.json"
    first = json.loads(path.read_text(encoding="utf-8"))
    texts = {setup.text for case in collapse.CASES for setup in (case.failing, case.cured)}
    assert {text: len(entries) for text, entries in first["results"].items()} == dict.fromkeys(texts, 3)
    removed = first["results"]["the defaults"].pop()
    path.write_text(json.dumps(first), encoding="utf-8")
    assert collapse.main(arguments) == 0
    second = json.loads(path.read_text(encoding="utf-8"))
    again = second["results"]["the defaults"].pop()
    assert {**again, "median": 0} == {**removed, "median": 0}
    assert second["results"] == first["results"]
    assert (tmp_path / "collapse.png").read_bytes().startswith(b"\x89PNG")


def test_every_case_changes_one_training_into_another() -> None:
    """Failing and cured have different texts, and one text always means the same training."""
    meanings: dict[str, collapse.Setup] = {}
    for case in collapse.CASES:
        assert case.failing.text != case.cured.text
        for setup in (case.failing, case.cured):
            assert meanings.setdefault(setup.text, setup) is setup


def test_published_table_follows_from_the_published_trainings() -> None:
    """Every cell; and each cure uses more codes or has a smaller error than its failure."""
    document = json.loads((RESULTS / "collapse.json").read_text(encoding="utf-8"))
    assert collapse.table(document["results"]) == (RESULTS / "collapse.md").read_text(encoding="utf-8")
    assert document["stamp"]["data"] == "mnist"
