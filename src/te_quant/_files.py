"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Let ``writer`` fill a file beside ``path``, then rename it over ``path``.

    Whatever interrupts the writer, ``path`` keeps its old content and no other file stays behind. Missing
    parent folders are made.

    Args:
        path: the file to write. A symbolic link is replaced by a file, not followed.
        writer: receives the path it must create; it ends like ``path`` (``.safetensors``, ``.png``), because
            some libraries choose the format by that.

    Raises:
        FileNotFoundError: the writer returned without creating its file.
        IsADirectoryError: ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file, got the folder {target}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and the rename would keep that.
    beside = target.with_name(f".tmp-{secrets.token_hex(6)}-{target.name}")
    try:
        writer(beside)
        if not beside.is_file():
            raise FileNotFoundError(f"writer must create the file it is given, got none for {target}.")
        _flush(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    # Without it a power cut after the rename can leave an empty file under the final name.
    with path.open("rb+") as file:
        os.fsync(file.fileno())
