"""Files that a command writes: never over a file that it was not told to replace."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from te_quant._checks import require
from te_quant._pretrained import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["require_new", "require_plot", "require_writable", "write_plot"]

_PLOTS = (".pdf", ".png", ".svg")


def require_new(paths: Iterable[Path], *, overwrite: bool, name: str = "output") -> None:
    """Refuse files that exist, and paths where no file can be.

    Args:
        paths: the files that the command will write.
        overwrite: whether it may replace them.
        name: what an error calls them.

    Raises:
        ValueError: one exists, and ``overwrite`` is False; or as :func:`require_writable`.
    """
    for path in paths:
        require_writable(path, name)
        new = overwrite or not path.exists()
        require(new, name, "a new file", f"{path}, which exists; pass --overwrite to replace it")


def require_writable(path: Path, name: str) -> None:
    """Refuse, before the command does its work, a path where no file can be.

    Args:
        path: the file that the command will write.
        name: what an error calls it.

    Raises:
        ValueError: the path is a folder, or leads through a file.
    """
    require(not path.is_dir(), name, "a file", f"the folder {path}; choose another name")
    # Missing folders are made.
    above = next((folder for folder in path.parents if folder.exists()), Path())
    require(above.is_dir(), name, "in a folder", f"{path}, where {above} is a file; choose another name")


def require_plot(path: Path | None, *, overwrite: bool) -> None:
    """Refuse, before anything is measured, a file that exists or whose ending no plot can have.

    Raises:
        ValueError: the ending is another one; or as :func:`require_new`.
    """
    if path is None:
        return
    require(path.suffix.lower() in _PLOTS, "--plot", f"a file that ends in one of {', '.join(_PLOTS)}", path)
    require_new([path], overwrite=overwrite, name="--plot")


def write_plot(figure: Figure, path: Path) -> None:
    """Write a figure, completely or not at all, in the format of the file's ending."""
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=150, bbox_inches="tight"))
