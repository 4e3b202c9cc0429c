"""The parts of the GPU check, and how one of them runs: cell by cell, each stored when it is done.

A part starts no cell after its deadline. The next call of the same command measures the cells that are left.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.contest import Cell, Context
from benchmarks.gpu import fast, right, tuned
from benchmarks.results import Store, three_digits
from benchmarks.timing import describe

__all__ = ["PARTS", "Part", "chosen", "run_cells"]


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        seconds: how long it may take, the start of its process included.
        rehearsal_seconds: the same in a rehearsal, which may share its machine with other work.
        cells: what it measures, most important first.
    """

    seconds: float
    rehearsal_seconds: float
    cells: Callable[[Context], list[Cell]]


PARTS: dict[str, Part] = {
    "right": Part(130, 600, right.cells),
    "fast": Part(225, 600, fast.cells),
    "tuned": Part(70, 600, tuned.cells),
}
"""In the order in which they run. Together they take less than eight minutes."""


def chosen(key: str, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Say whether a cell, or a part, is to run: names of parts and beginnings of ``part/cell`` choose or skip."""

    def named(beginnings: Sequence[str]) -> bool:
        return any(key.startswith(name) if "/" in name else key.partition("/")[0] == name for name in beginnings)

    return (not only or named(only)) and not named(skip)


def run_cells(
    store: Store, cells: Sequence[Cell], context: Context, deadline: float, log: Callable[[str], object]
) -> bool:
    """Run the cells that the store lacks until the deadline; False if the device can no longer be used.

    Args:
        store: written after each cell.
        cells: in order.
        context: what they need to know.
        deadline: by :func:`time.time`; no cell starts after it.
        log: takes a line.
    """
    for cell in cells:
        if store.finished(cell.key):
            continue
        begin = time.time()
        if begin > deadline:
            log(f"{cell.key}: no time left")
            continue
        log(f"{cell.key} ...")
        try:
            result = cell.run(context)
        except Exception as error:
            log(traceback.format_exc())
            result = {"status": "failed", "reason": describe(error)}
        store.put(cell.key, {"settings": dict(cell.settings), **result}, time.time() - begin)
        log(f"{cell.key}: {_summary(result)}, {time.time() - begin:.1f} s")
        if context.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                # Stale blocks of one cell would leave too little memory for the next.
                torch.cuda.empty_cache()
            except RuntimeError:
                # An illegal access stays with the process: the next one goes on after this cell.
                log(traceback.format_exc())
                return False
    return True


def _summary(result: dict[str, Any]) -> str:
    if "contenders" not in result:
        reason = result.get("reason")
        return str(result["status"]) + (f" ({reason})" if reason else "")
    parts = []
    for name, entry in result["contenders"].items():
        ok = entry["status"] == "ok"
        parts.append(f"{name} {three_digits(1000 * entry['median'])} ms" if ok else f"{name} {entry['status']}")
    return ", ".join(parts)
