"""The examples of the docstrings and of the documentation print what they say.

A docstring's example starts from the names of its module. In Markdown the fenced ``pycon`` blocks of a page are
one session. An example that needs an extra which is not installed is skipped. Pages that need the extra
``integrations``, or a compiler, are slow.
"""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import te_quant
from te_quant.layers import DOWNSAMPLERS, UPSAMPLERS

ROOT = Path(__file__).parents[2]
PACKAGE = Path(te_quant.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# page -> the packages that it needs, whose own warnings are not ours
SLOW_PAGES = {
    "accelerate.md": ("accelerate",),
    "compile.md": (),
    "lightning.md": ("lightning", "torchmetrics"),
    "transformers.md": ("transformers", "safetensors"),
}
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.FAIL_FAST


def sources(paths: list[Path], mark: str) -> list[Path]:
    """The files that hold an example."""
    return [path for path in paths if mark in path.read_text(encoding="utf-8")]


def name_of(path: Path) -> str:
    """The module's name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Runner(doctest.DocTestRunner):
    """Skips the test where an extra is missing; a name that te_quant does not have is no missing extra."""

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        """Report, or skip."""
        error = exc_info[1]
        if isinstance(error, ImportError) and (error.name or "").split(".")[0] != "te_quant":
            pytest.skip(str(error))
        super().report_unexpected_exception(out, test, example, exc_info)


def check(test: doctest.DocTest) -> None:
    """Run one session; fail with what was expected and what came."""
    told: list[str] = []
    if Runner(optionflags=OPTIONS).run(test, out=told.append).failed:
        pytest.fail("".join(told), pytrace=False)


def session(path: Path) -> doctest.DocTest:
    """The ``pycon`` blocks of a page, with blanks for all else, so that errors name the right line."""
    text = path.read_text(encoding="utf-8")
    inside = [match.span(1) for match in re.finditer(r"^```pycon\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    kept = "".join(
        letter if letter == "\n" or any(start <= place < stop for start, stop in inside) else " "
        for place, letter in enumerate(text)
    )
    return doctest.DocTestParser().get_doctest(kept, {}, path.name, str(path), 0)


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples may write files, and print tensors in torch's default format."""
    monkeypatch.chdir(tmp_path)
    torch.set_printoptions(profile="default")


@pytest.fixture(autouse=True)
def registries_as_they_were() -> Iterator[None]:
    """Examples may add layers of their own to the public dicts."""
    with patch.dict(DOWNSAMPLERS), patch.dict(UPSAMPLERS):
        yield


@pytest.mark.parametrize("path", sources(sorted(PACKAGE.rglob("*.py")), ">>> "), ids=name_of)
def test_docstrings(path: Path) -> None:
    """Every example of the module."""
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name_of(path)))
    tests = [test for test in tests if test.examples]
    assert tests
    for test in tests:
        check(test)


# DDP says so, once in a process, of gradients of 1x1 convolutions: strides along axes of size 1 mean nothing.
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.parametrize(
    "path",
    [path for path in sources(PAGES, "```pycon\n") if path.name not in SLOW_PAGES],
    ids=lambda path: path.name,
)
def test_pages(path: Path) -> None:
    """Every example of the page, one after the other."""
    check(session(path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SLOW_PAGES)
def test_slow_pages(name: str) -> None:
    """As above."""
    for package in SLOW_PAGES[name]:
        pytest.importorskip(package)
    check(session(ROOT / "docs" / "integrations" / name))


def test_the_published_gpt_draws_from_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the page, in the root of a clone; the list of words has those of the captions."""
    if not (ROOT / "examples" / "te_vqgan" / "results" / "best" / "weights").exists():
        pytest.skip("the published weights are not here")
    pytest.importorskip("safetensors")
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "guides" / "gpt.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "results/best/weights" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["images"].shape == (2, 3, 32, 32)
    assert names["images"].isfinite().all()
    assert {"upper", "left", "blue", "3", ","} <= set(names["words"].vocab)
    with pytest.raises(ValueError, match="purple"):
        names["words"].encode(["purple 7 centre"])


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (">>> 1 + 1\n3\n", "Expected:\n    3\nGot:\n    2\n"),
        (">>> from te_quant import no_such\n", "cannot import"),
    ],
)
def test_a_wrong_example_fails(tmp_path: Path, code: str, told: str) -> None:
    """Negative control: another value, and a name that te_quant does not have."""
    page = tmp_path / "page.md"
    page.write_text(f"Not code:\n>>> 1 + 1\n4\n\n```pycon\n{code}```\n")
    with pytest.raises(pytest.fail.Exception, match=re.escape(told)):
        check(session(page))


def test_an_example_without_its_extra_is_skipped(tmp_path: Path) -> None:
    """And says which module is missing."""
    page = tmp_path / "page.md"
    page.write_text("```pycon\n>>> import no_such_extra\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(pytest.skip.Exception, match="No module named 'no_such_extra'"):
        check(session(page))
