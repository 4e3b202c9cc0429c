"""What nothing can beat: the matrix product of that shape, and the bytes that have to move.

The nearest code needs the products of all latents with all codes. As one product they fill N x K floats, which go
to memory and back; taken tile by tile into a buffer that stays in cache they do not. The second is the floor of a
tiled search. Its tiles are chosen here by trying, both ways round, so that the floor is no straw man.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import Cell, Contender, Context, compete
from benchmarks.problem import Problem, Size, require_memory
from benchmarks.timing import Call, clock_of

__all__ = ["Tiles", "cells", "necessary_bytes", "tiled_product", "tune_tiles", "whole_product"]

_CPU_ELEMENTS = (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
_DEVICE_ELEMENTS = (1 << 22, 1 << 23, 1 << 24, 1 << 25)
_TILE_CODES = (256, 1024, 4096)
# Tiles are tried on so many multiplications at most, or tuning would cost more than measuring.
_TRIED = 1 << 30
_FLOAT = 4
_INDEX = 8


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


def cells(context: Context) -> list[Cell]:
    """How fast this machine copies and multiplies."""
    full = context.grid == "full"
    return [
        Cell("floor/copy", {"what": "copy"}, lambda given: _copy(given, (256 if full else 16) << 20)),
        Cell("floor/product", {"what": "product"}, lambda given: _product(given, 2048 if full else 256)),
    ]


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
