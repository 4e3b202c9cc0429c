"""Tests draw the same numbers in every run, alone and among others, and ``--seed`` gives them other ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Every way of drawing that our tests use; each test appends its draws to a file.
SUITE = """
import json, random
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.helpers import numpy_generator

AT_IMPORT = torch.rand(()).item()

def draw():
    return [random.random(), np.random.rand(), torch.rand(()).item(), numpy_generator().random()]

def tell(name, *values):
    with open("draws.jsonl", "a") as file:
        print(json.dumps([name, values]), file=file)

@pytest.fixture(scope="module")
def shared():
    return draw()

@pytest.fixture
def own():
    return draw()

def test_first(own):
    tell("first", AT_IMPORT, own, draw())

def test_second(shared, own):
    tell("second", shared, own, draw())

@pytest.mark.parametrize("seed", ["a", "b"])
def test_cases(seed, shared):
    tell(seed, shared, draw())

@given(st.floats())
@settings(max_examples=5, deadline=None)
def test_given(value):
    tell("given", repr(value), draw())

def test_fails():
    assert False
"""


def draws(folder: Path, *arguments: str) -> tuple[dict[str, list], str]:
    """Run ``SUITE`` under our conftest; return what each test drew and what pytest printed."""
    folder.mkdir(exist_ok=True)
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    told = folder / "draws.jsonl"
    told.unlink(missing_ok=True)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", *arguments]
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pytest; sys.exit(pytest.main({options!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
    found: dict[str, list] = {}
    for line in told.read_text().splitlines():
        name, values = json.loads(line)
        found.setdefault(name, []).append(values)
    return found, done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list], str]:
    """The whole suite, run in order."""
    return draws(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_each_test_draws_its_own_numbers(whole: tuple[dict[str, list], str]) -> None:
    """Two cases of one test differ, and so do two calls within a test; a shared fixture is made once."""
    found, _ = whole
    (a,), (b,), (first,) = found["a"], found["b"], found["first"]
    assert a[0] == b[0]
    assert not set(a[1]) & set(b[1])
    assert not set(first[1]) & set(first[2])
    assert len(found["given"]) >= 5


@pytest.mark.slow
def test_a_test_draws_the_same_alone(whole: tuple[dict[str, list], str], tmp_path: Path) -> None:
    """Neither another order nor fewer tests change what one draws, by a shared fixture or by Hypothesis."""
    names = ["test_given", "test_cases[b]", "test_second", "test_first"]
    found, _ = draws(tmp_path, *(f"test_suite.py::{name}" for name in names))
    assert list(found) == ["given", "b", "second", "first"]
    assert found == {name: whole[0][name] for name in found}


@pytest.mark.slow
def test_a_seed_changes_every_draw_and_a_failure_tells_it(
    whole: tuple[dict[str, list], str], tmp_path: Path
) -> None:
    """``--seed`` replaces all of them; the report of a failure has the seed."""
    assert "\nseed: a hash of the name of each test, or --seed N\n" in whole[1]
    found, told = draws(tmp_path, "--seed", "7")
    assert found.keys() == whole[0].keys()
    assert all(found[name] != whole[0][name] for name in found)
    assert "\nseed: 7\n" in told
    assert " seed ---" in told
    assert "\nrandom, numpy and torch: 7\n" in told
