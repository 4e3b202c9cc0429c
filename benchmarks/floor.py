"""The limit that no search can beat, and two matrix products to compare searches with.

**The limit is a roofline.** A search multiplies and adds N·K·C times and compares N·K scores, or it waits for the
bytes that have to move. The rates of this machine for all three are measured in the same run, by the section
``floor``.

**The products are no limit.** The scores of all latents with all codes, taken as one matrix product, fill N x K
floats, which go to memory and back. Taken tile by tile into a buffer they stay in cache, but are written and read
all the same. A search that keeps scores in registers is faster. Tiles are chosen by trying, both ways round.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import Cell, Contender, Context, compete
from benchmarks.problem import Problem, Size, require_memory
from benchmarks.threads import use_threads
from benchmarks.timing import Call, clock_of

__all__ = [
    "Rates",
    "Tiles",
    "cells",
    "necessary_bytes",
    "rates_of",
    "search_limit",
    "tiled_product",
    "tune_tiles",
    "whole_product",
]

_CPU_ELEMENTS = (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
_DEVICE_ELEMENTS = (1 << 22, 1 << 23, 1 << 24, 1 << 25)
_TILE_CODES = (256, 1024, 4096)
# Tiles are tried on so many multiplications at most, or tuning would cost more than measuring.
_TRIED = 1 << 30
_FLOAT = 4
_INDEX = 8
# Sides of square products, and numbers of floats that are compared; the best of them is the rate of the machine.
_SIDES = {"quick": (256,), "full": (1024, 2048, 4096)}
_COMPARED = {"quick": (1 << 16,), "full": (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)}
_COPIED = {"quick": 16 << 20, "full": 256 << 20}
# Each column of floats is compared in so many rows.
_ROWS_COMPARED = 8


class Tiles(NamedTuple):
    """How a product is cut.

    Attributes:
        rows: latents in a tile.
        codes: codes in a tile.
        transposed: a tile is (codes, rows), not (rows, codes).
    """

    rows: int
    codes: int
    transposed: bool


def whole_product(problem: Problem) -> Contender:
    """One product of (N, C) with (C, K) into a buffer that is there already."""
    require_memory(problem.size, _FLOAT)
    out = torch.empty(problem.size.N, problem.size.K, device=problem.device)
    codes = problem.codebook.T
    return Contender(lambda number: torch.mm(problem.latents[number % problem.sets], codes, out=out))


def tiled_product(problem: Problem, tiles: Tiles) -> Call:
    """The same product tile by tile, each into the same buffer."""
    buffer = torch.empty(tiles.rows * tiles.codes, device=problem.device)

    def call(number: int) -> Tensor:
        latents = problem.latents[number % problem.sets]
        for row in range(0, len(latents), tiles.rows):
            some = latents[row : row + tiles.rows]
            for code in range(0, len(problem.codebook), tiles.codes):
                block = problem.codebook[code : code + tiles.codes]
                left, right = (block, some) if tiles.transposed else (some, block)
                out = buffer[: len(left) * len(right)].view(len(left), len(right))
                torch.mm(left, right.T, out=out)
        return buffer

    return call


def tune_tiles(problem: Problem) -> Tiles:
    """The fastest of some tiles, tried on the first rows."""
    N, K, C = problem.size
    rows = min(N, max(256, _TRIED // (K * C)))
    part = Problem(Size(rows, K, C), problem.device)
    clock = clock_of(problem.device)
    elements = _CPU_ELEMENTS if problem.device.type == "cpu" else _DEVICE_ELEMENTS
    candidates = {
        Tiles(max(1, min(rows, count // codes)), codes, transposed)
        for count in elements
        for codes in {min(K, choice) for choice in _TILE_CODES}
        for transposed in (False, True)
    }
    times: dict[Tiles, float] = {}
    for tiles in sorted(candidates):
        call = tiled_product(part, tiles)
        # The best of a few: whatever disturbs a call makes it slower.
        times[tiles] = min(clock(call, number, 1) for number in range(3))
    return min(times, key=times.__getitem__)


def necessary_bytes(size: Size, *, forward: bool) -> int:
    """Latents and codes read once, indices written once; for a quantizer its codes as well."""
    N, K, C = size
    return _FLOAT * C * (N + K) + _INDEX * N + (_FLOAT * C * N if forward else 0)


class Rates(NamedTuple):
    """What a machine does per second; NaN where that was not measured.

    Attributes:
        copied: bytes, read and written.
        operations: additions and multiplications of a matrix product.
        comparisons: numbers compared by a vectorized minimum.
    """

    copied: float
    operations: float
    comparisons: float


def rates_of(cells: Mapping[str, Any], threads: int | None = None) -> Rates:
    """Return the best rates among ``cells``: with ``threads`` threads, or with any number if ``None``."""
    return Rates(
        _best(cells, "floor/copy", "bytes", threads),
        _best(cells, "floor/product", "operations", threads),
        _best(cells, "floor/comparison", "comparisons", threads),
    )


def _best(cells: Mapping[str, Any], prefix: str, fact: str, threads: int | None) -> float:
    rates = [
        cell["facts"][fact] / entry["median"]
        for key, cell in cells.items()
        if key.startswith(prefix) and (threads is None or cell["settings"].get("threads") == threads)
        for entry in cell["contenders"].values()
        if entry["status"] == "ok"
    ]
    return max(rates, default=math.nan)


def search_limit(size: Size, rates: Rates) -> float:
    """Return the seconds below which no search can take: its arithmetic or its bytes, whichever takes longer."""
    N, K, C = size
    arithmetic = 2 * N * K * C / rates.operations + N * K / rates.comparisons
    return max(arithmetic, necessary_bytes(size, forward=False) / rates.copied)


def cells(context: Context) -> list[Cell]:
    """How fast this machine copies, multiplies and compares, with its threads and with one of them."""
    runs: dict[str, Callable[[Context], dict[str, Any]]] = {"copy": partial(_copy, size=_COPIED[context.grid])}
    runs |= {f"product-{side}": partial(_product, side=side) for side in _SIDES[context.grid]}
    runs |= {f"comparison-{count}": partial(_comparison, count=count) for count in _COMPARED[context.grid]}
    counts = {"": context.threads}
    if context.device.type == "cpu" and context.threads > 1:
        counts["-T1"] = 1
    return [
        Cell(f"floor/{name}{suffix}", {"what": name, "threads": count}, partial(_run, run=run, threads=count))
        for suffix, count in counts.items()
        for name, run in runs.items()
    ]


def _run(context: Context, run: Callable[[Context], dict[str, Any]], threads: int) -> dict[str, Any]:
    with use_threads(threads):
        return run(context)


def _copy(context: Context, size: int) -> dict[str, Any]:
    source = torch.ones(size // _FLOAT, device=context.device)
    target = torch.empty_like(source)
    entries = compete({"copy": lambda: Contender(lambda _: target.copy_(source))}, context)
    # Read once, written once.
    return {"contenders": entries, "facts": {"bytes": 2 * size}}


def _product(context: Context, side: int) -> dict[str, Any]:
    left = torch.ones(side, side, device=context.device)
    out = torch.empty_like(left)
    entries = compete({"product": lambda: Contender(lambda _: torch.mm(left, left, out=out))}, context)
    return {"contenders": entries, "facts": {"operations": 2 * side**3}}


def _comparison(context: Context, count: int) -> dict[str, Any]:
    numbers = torch.ones(_ROWS_COMPARED, count // _ROWS_COMPARED, device=context.device)
    out = torch.empty_like(numbers[0])
    entries = compete({"comparison": lambda: Contender(lambda _: torch.amin(numbers, 0, out=out))}, context)
    return {"contenders": entries, "facts": {"comparisons": count}}
