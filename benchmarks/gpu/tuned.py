"""Which tiling of the kernel is fastest? A prepared list, most promising first by the compiler's report.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Cell, Contender, Context, compete
from benchmarks.gpu import searches
from benchmarks.gpu.right import search_errors
from benchmarks.gpu.searches import Tiling
from benchmarks.problem import Problem, Size

__all__ = ["SIZES", "TILINGS", "cells", "label"]

SIZES: dict[str, tuple[Size, ...]] = {
    "quick": (Size(70, 140, 20),),
    "full": (Size(16384, 8192, 64), Size(16384, 1024, 256), Size(262144, 1024, 64), Size(262144, 8192, 8)),
}
"""By grid: few and many latents, short and long codes."""

TILINGS: tuple[Tiling, ...] = (
    # The defaults come first, so that the others have something to be compared with.
    Tiling("ieee", 128, 128, 16, 8, 3),
    Tiling("tf32x3", 128, 128, 32, 8, 2),
    Tiling("tf32", 128, 128, 64, 8, 2),
    Tiling("tf32", 128, 128, 32, 8, 3),
    Tiling("bf16", 128, 128, 64, 8, 3),
    # Float32 in fewer or more products at once, and in smaller tiles of which two fit.
    Tiling("ieee", 128, 128, 32, 8, 2),
    Tiling("tf32x3", 128, 128, 32, 8, 3),
    Tiling("tf32x3", 128, 64, 32, 4, 3),
    Tiling("ieee", 128, 64, 16, 4, 3),
    Tiling("tf32x3", 128, 128, 64, 8, 2),
    Tiling("ieee", 64, 128, 16, 4, 3),
    Tiling("tf32x3", 128, 64, 64, 8, 2),
    Tiling("bf16", 128, 256, 64, 8, 3),
    Tiling("ieee", 128, 128, 16, 8, 4),
    Tiling("bf16", 128, 128, 64, 8, 2),
    Tiling("tf32", 128, 64, 64, 4, 3),
    Tiling("bf16", 128, 64, 64, 4, 3),
    Tiling("ieee", 256, 64, 16, 8, 3),
    Tiling("tf32x3", 64, 128, 32, 4, 2),
    Tiling("ieee", 64, 64, 16, 4, 3),
    Tiling("tf32x3", 256, 64, 32, 8, 2),
)
"""In the order in which they are tried."""

_TOLERANCES = {"ieee": "float32", "tf32x3": "float32", "tf32": "TF32", "bf16": "bf16"}
_REHEARSED = 4


def label(tiling: Tiling) -> str:
    """A name for a key."""
    shape = f"{tiling.rows}x{tiling.codes}x{tiling.channels}"
    return f"{tiling.precision}-{shape}-w{tiling.warps}-s{tiling.stages}"


def cells(context: Context) -> list[Cell]:
    """One per tiling."""
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    rehearsed = [tiling for tiling in TILINGS if tiling.precision != "bf16"][:_REHEARSED]
    tilings = TILINGS if context.grid == "full" else rehearsed
    return [Cell(f"tuned/{label(tiling)}", tiling._asdict(), partial(_run, tiling)) for tiling in tilings]


def _run(tiling: Tiling, context: Context) -> dict[str, Any]:
    builders: dict[str, Callable[[], Contender]] = {
        size.label: partial(_contender, tiling, size, context) for size in SIZES[context.grid]
    }
    return {"contenders": compete(builders, context, context.limits._replace(max_rounds=7))}


def _contender(tiling: Tiling, size: Size, context: Context) -> Contender:
    problem = Problem(size, context.device, sets=2)
    search = searches.fused_with(tiling)

    @torch.no_grad()
    def call(number: int) -> Tensor:
        return search(problem.latents[number % problem.sets], problem.codebook)

    def check() -> str | None:
        differing, worst = search_errors(call(0), problem.latents[0], problem.codebook)
        limit = searches.TOLERANCES[_TOLERANCES[tiling.precision]]
        return None if worst <= limit else f"{differing} indices differ from float64's, the worst by {worst:.1e}"

    return Contender(call, check)
