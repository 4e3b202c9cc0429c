"""The log of a run: one JSON object a line, and the same numbers for TensorBoard.

The log holds nothing that differs between two computations of the same run (no clock times), so that an
interrupted and resumed run has the log of an uninterrupted one, byte for byte.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from examples.te_vqgan.runs.files import write_bytes_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunLog", "last_step", "read_log"]

# Longer than any two lines.
_TAIL_BYTES = 8192


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; an unfinished last line is left out.

    Raises:
        ValueError: another line is damaged; the message names it.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_numbers(f"{path} line {number}", line) for number, line in enumerate(lines[:-1], 1)]


def _numbers(where: str, line: str) -> dict[str, Any]:
    try:
        numbers: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be JSON, got a damaged one ({error}); delete this line.") from error
    return numbers


def last_step(path: Path) -> int:
    """Return the step of the last whole line, 0 if there is none; reads the end of the file alone."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    # The first piece may be half a line, the last one is unfinished or empty.
    whole = lines[:-1] if path.stat().st_size <= _TAIL_BYTES else lines[1:-1]
    return int(json.loads(whole[-1])["step"]) if whole else 0


class RunLog:
    """Append to ``path``, from step ``start`` on.

    Args:
        path: the file; its folder exists.
        start: steps already done. Later lines, which an interrupted run wrote after its last checkpoint, are
            cut off.
        tensorboard: folder for TensorBoard's events, or ``None``.
    """

    def __init__(self, path: Path, start: int = 0, tensorboard: Path | None = None) -> None:
        kept = [line for line in read_log(path) if line["step"] <= start]
        write_bytes_atomically(path, "".join(map(_line, kept)).encode())
        self._file = path.open("ab", buffering=0)
        self._writer = _tensorboard(tensorboard, start)

    def write(self, **numbers: float) -> None:
        """Add one line; ``step`` is among the ``numbers``."""
        # One unbuffered write a line, so that a reader or a crash never sees two halves mixed.
        self._file.write(_line(numbers).encode())
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, int(numbers["step"]))

    def close(self) -> None:
        """Close both logs."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> RunLog:
        """Return the log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both logs."""
        self.close()


def _line(numbers: dict[str, Any]) -> str:
    return json.dumps(numbers) + "\n"


def _tensorboard(folder: Path | None, start: int) -> SummaryWriter | None:
    if folder is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(folder), purge_step=start + 1)
