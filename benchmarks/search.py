"""The nearest code alone, against two plain ways to find it and against its floor.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import OURS, Cell, Contender, Context, compete
from benchmarks.floor import necessary_bytes, tiled_product, tune_tiles, whole_product
from benchmarks.peers import nearest_by_cdist, nearest_expanded, require_pairs
from benchmarks.problem import Problem, Size
from benchmarks.sizes import SIZES
from te_quant.functional import nearest_code

__all__ = ["FUSED", "VARIABLE", "build_search", "cells", "search_contender", "searches"]

FUSED = "te_quant fused"
"""Ours in one kernel, for CUDA devices."""
VARIABLE = "TE_QUANT_FUSED_SEARCH"
"""The environment variable that chooses it."""


def _nearest_fused(latents: Tensor, codebook: Tensor) -> Tensor:
    os.environ[VARIABLE] = "1"
    try:
        return nearest_code(latents, codebook)
    finally:
        # So that the tiled search beside it is the tiled one.
        os.environ[VARIABLE] = "0"


_SEARCHES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    OURS: nearest_code,
    FUSED: _nearest_fused,
    "cdist": nearest_by_cdist,
    "expanded": nearest_expanded,
}


def searches(device: torch.device) -> list[str]:
    """Names of what searches on ``device``: (N, C) latents and (K, C) codes to (N,) indices."""
    return [name for name in _SEARCHES if name != FUSED or device.type == "cuda"]


def build_search(name: str, problem: Problem) -> Callable[[int], Tensor]:
    """A call that searches.

    Raises:
        Unavailable: it would not fit into memory.
    """
    require_pairs(name, "search", problem.size)
    search = _SEARCHES[name]

    @torch.no_grad()
    def call(number: int) -> Tensor:
        return search(problem.latents[number % problem.sets], problem.codebook)

    return call


def search_contender(name: str, problem: Problem) -> Contender:
    """As :func:`build_search`, with a check of the indices."""
    call = build_search(name, problem)
    return Contender(call, lambda: problem.verdict(call(0)))


def cells(context: Context) -> list[Cell]:
    """One a size."""
    return [Cell(f"search/{size.label}", size._asdict(), partial(_run, size=size)) for size in SIZES[context.grid]]


def _run(context: Context, size: Size) -> dict[str, Any]:
    problem = Problem(size, context.device, sets=1 if context.device.type == "cpu" else 3)
    tiles = tune_tiles(problem)
    builders: dict[str, Callable[[], Contender]] = {
        name: partial(search_contender, name, problem) for name in searches(context.device)
    }
    builders["tiled product"] = lambda: Contender(tiled_product(problem, tiles))
    builders["product"] = lambda: whole_product(problem)
    facts = {"bytes": necessary_bytes(size, forward=False), "tiles": tiles._asdict()}
    return {"contenders": compete(builders, context), "facts": facts}
