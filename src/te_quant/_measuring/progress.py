"""Progress of long measurements, on standard error: a bar of tqdm where it is installed, plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from te_quant._checks import require_int, require_type

__all__ = ["progress"]

_Item = TypeVar("_Item")
# Plain lines for one loop, at most, besides the announcement.
_LINES = 10


def progress(
    iterable: Iterable[_Item],
    *,
    total: int,
    description: str,
    show: bool | None = None,
    unit: str = "passes",
) -> Iterator[_Item]:
    """Return the items one by one, after announcing how many there will be.

    Args:
        iterable: any; the loop body is what takes time.
        total: number of items.
        description: what runs, such as the name of the function that the user called.
        show: False for silence, True for progress, None for progress if standard error is a terminal.
        unit: what one item is, in the plural.

    Raises:
        TypeError: ``show`` is neither a bool nor None, or ``total`` is no integer.
        ValueError: ``total`` is negative.

    Example:
        >>> list(progress("abc", total=3, description="letters", show=False))
        ['a', 'b', 'c']
    """
    total = require_int("total", total, 0)
    if show is not None:
        require_type("progress", show, bool, "True, False or None")
    if not (sys.stderr.isatty() if show is None else show):
        return iter(iterable)
    sys.stderr.write(f"{description}: {total:,} {unit}\n")
    try:
        from tqdm import tqdm
    except ImportError:
        return _lines(iterable, total, description, unit)
    return iter(tqdm(iterable, desc=description, total=total, unit=f" {unit}", file=sys.stderr))


def _lines(iterable: Iterable[_Item], total: int, description: str, unit: str) -> Iterator[_Item]:
    """Write a line whenever another tenth of the items is done."""
    written = 0
    for done, item in enumerate(iterable, 1):
        yield item
        tenths = done * _LINES // max(total, 1)
        if tenths > written:
            written = tenths
            sys.stderr.write(f"{description}: {done:,} of {total:,} {unit}\n")
