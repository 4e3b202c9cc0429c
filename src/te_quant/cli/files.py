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


def require_new(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse files that exist.

    Raises:
        ValueError: one does, and ``overwrite`` is False.
    """
    for path in paths:
        new = overwrite or not path.exists()
        require(new, "output", "a new file", f"{path}, which exists; pass --overwrite to replace it")


def require_plot(path: Path | None) -> None:
    """Refuse a file whose ending no plot can have, before anything is measured."""
    fits = path is None or path.suffix.lower() in _PLOTS
    require(fits, "--plot", f"a file that ends in one of {', '.join(_PLOTS)}", path)


def write_plot(figure: Figure, path: Path) -> None:
    """Write a figure, completely or not at all, in the format of the file's ending."""
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=150, bbox_inches="tight"))
