"""The sections of the benchmarks, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import (
    blur,
    floor,
    generation,
    growth,
    memory,
    quantizers,
    rendering,
    search,
    share,
    stage1,
    training,
)
from benchmarks.contest import Cell, Context

__all__ = ["SECTIONS"]

SECTIONS: dict[str, Callable[[Context], list[Cell]]] = {
    "floor": floor.cells,
    "search": search.cells,
    "quantizer": quantizers.cells,
    "share": share.cells,
    "memory": memory.cells,
    "growth": growth.cells,
    "blur": blur.cells,
    "generation": generation.cells,
    "stage1": stage1.cells,
    "rendering": rendering.cells,
    "training": training.cells,
}
"""By name: what it measures, a list of cells for a context."""
