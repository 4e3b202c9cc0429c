"""Files are written as a whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from te_quant._pretrained import write_atomically


def test_content_arrives_in_folders_that_did_not_exist(tmp_path: Path) -> None:
    """Parents are made, and nothing but the file is left."""
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, lambda beside: beside.write_text("new"))
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_old_content_is_replaced_and_strings_are_paths(tmp_path: Path) -> None:
    """What the writer gets is another file in the same folder, with the same suffix."""
    path = tmp_path / "file.npz"
    path.write_text("old")
    seen = []

    def writer(beside: Path) -> None:
        seen.append(beside)
        beside.write_text("new")
        assert path.read_text() == "old"

    write_atomically(str(path), writer)
    assert path.read_text() == "new"
    assert seen[0].parent == tmp_path
    assert seen[0] != path
    assert seen[0].name.endswith("file.npz")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_writing_leaves_the_old_file_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    """Half of a new file never shows, whatever stops the writer."""
    path = tmp_path / "file.txt"
    path.write_text("old")

    def writer(beside: Path) -> None:
        beside.write_text("ne")
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        write_atomically(path, writer)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failing_rename_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step can fail too."""
    path = tmp_path / "file.txt"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no rename today")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no rename today"):
        write_atomically(path, lambda beside: beside.write_text("new"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    """Otherwise the old file would pass for the new one."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(
        FileNotFoundError, match=r"writer must create the file it is given, got none for .*file\.txt"
    ):
        write_atomically(path, lambda beside: None)
    assert path.read_text() == "old"


def test_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    """Before the writer works for nothing."""
    with pytest.raises(IsADirectoryError, match="path must be a file, got the folder"):
        write_atomically(tmp_path, lambda beside: pytest.fail("called"))


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    """Not those of a private temporary file: others may want to read the weights."""
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("x")
    write_atomically(atomic, lambda beside: beside.write_text("x"))
    assert stat.S_IMODE(atomic.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_writer_that_hides_its_file_from_others_does_not_decide(tmp_path: Path) -> None:
    """Safetensors makes files that only their owner may read; the mode is that of a file that Python opens."""

    def hidden(beside: Path) -> None:
        beside.write_text("x")
        beside.chmod(0o600)

    (tmp_path / "plain").write_text("x")
    write_atomically(tmp_path / "atomic", hidden)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
