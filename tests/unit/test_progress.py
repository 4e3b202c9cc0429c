"""Progress on standard error: announced, silent on request, with and without tqdm."""

from __future__ import annotations

import sys

import pytest

from te_quant._measuring.progress import progress


@pytest.fixture(params=["tqdm", "plain lines"])
def display(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With tqdm, and as if it was not installed."""
    if request.param == "tqdm":
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    return str(request.param)


def test_the_number_of_passes_comes_before_the_first(display: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever starts a measurement learns how long it is before it runs."""
    items = progress(range(20), total=20, description="measuring", show=True)
    assert capsys.readouterr().err.startswith("measuring: 20 passes\n")
    assert list(items) == list(range(20))
    assert ("20/20" if display == "tqdm" else "measuring: 20 of 20 passes\n") in capsys.readouterr().err


def test_plain_lines_are_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per tenth, however many passes there are."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(list(progress(range(1000), total=1000, description="measuring", show=True, unit="images"))) == 1000
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[1] == "measuring: 100 of 1,000 images"


@pytest.mark.parametrize(("show", "terminal"), [(False, True), (None, False)])
def test_nothing_is_written_unless_wanted(
    show: bool | None, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent when asked, and by default where standard error is no terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(progress("abc", total=3, description="measuring", show=show)) == list("abc")
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_progress_by_default(
    display: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The negative control of the silence above."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress("abc", total=3, description="measuring")) == list("abc")
    assert "measuring: 3 passes" in capsys.readouterr().err


def test_other_values_of_show_are_refused() -> None:
    """A number that looks true would hide a mistake."""
    with pytest.raises(TypeError, match="progress must be True, False or None, got 1"):
        progress([], total=0, description="measuring", show=1)  # type: ignore[arg-type]
