"""Files that a command writes: never over a file that it was not told to replace."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from te_quant._checks import require
from te_quant._pretrained import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["require_new", "require_plot", "write_plot"]

_PLOTS = (".pdf", ".png", ".svg")


def require_new(paths: Iterable[Path], *, overwrite: bool, name: str = "output") -> None:
    """Refuse files that exist.

    Args:
        paths: the files that the command will write.
        overwrite: whether it may replace them.
        name: what an error calls them.

    Raises:
        ValueError: one exists, and ``overwrite`` is False.
    """
    for path in paths:
        new = overwrite or not path.exists()
        require(new, name, "a new file", f"{path}, which exists; pass --overwrite to replace it")


def require_plot(path: Path | None, *, overwrite: bool) -> None:
    """Refuse, before anything is measured, a file that exists or whose ending no plot can have.

    Raises:
        ValueError: the ending is another one, or the file exists and ``overwrite`` is False.
    """
    if path is None:
        return
    require(path.suffix.lower() in _PLOTS, "--plot", f"a file that ends in one of {', '.join(_PLOTS)}", path)
    require_new([path], overwrite=overwrite, name="--plot")


def write_plot(figure: Figure, path: Path) -> None:
    """Write a figure, completely or not at all, in the format of the file's ending."""
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=150, bbox_inches="tight"))
