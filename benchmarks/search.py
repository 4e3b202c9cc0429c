"""The nearest code alone, against two plain ways to find it, three libraries, and the limit of the machine.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import OURS, Cell, Contender, Context, Unavailable, compete
from benchmarks.floor import necessary_bytes, tiled_product, tune_tiles, whole_product
from benchmarks.peers import (
    Search,
    nearest_by_cdist,
    nearest_by_faiss,
    nearest_by_scikit_learn,
    nearest_by_scipy,
    nearest_expanded,
    require_pairs,
)
from benchmarks.problem import Problem, Size
from benchmarks.sizes import ONE_THREAD, SEARCH_SIZES
from benchmarks.threads import limited_module, use_threads
from te_quant.functional import nearest_code

__all__ = [
    "ENGINE",
    "FUSED",
    "VARIABLE",
    "WITHOUT_FAISS",
    "build_search",
    "cells",
    "search_contender",
    "searches",
]

FUSED = "te_quant fused"
"""Ours in one kernel, for CUDA devices."""
VARIABLE = "TE_QUANT_FUSED_SEARCH"
"""The environment variable that chooses it."""
WITHOUT_FAISS = "te_quant without faiss"
"""Ours as it is where faiss is not installed."""
ENGINE = "TE_QUANT_SEARCH"
"""The environment variable that chooses that."""

# A search that would take longer is not timed; seconds. A part of the latents tells, one in so many of them, and
# then a larger one, because the first call may load something and some searches are slow for few latents.
_LONGEST = 5.0
_PARTS = (32, 8)


def _nearest_fused(latents: Tensor, codebook: Tensor) -> Tensor:
    os.environ[VARIABLE] = "1"
    try:
        return nearest_code(latents, codebook)
    finally:
        # So that the tiled search beside it is the tiled one.
        os.environ[VARIABLE] = "0"


def _without_faiss() -> Search:
    # Where it is not installed, this is ours once more.
    limited_module("faiss", "faiss-cpu")

    def search(latents: Tensor, codebook: Tensor) -> Tensor:
        before = os.environ.get(ENGINE, "auto")
        os.environ[ENGINE] = "torch"
        try:
            return nearest_code(latents, codebook)
        finally:
            os.environ[ENGINE] = before

    return search


_SEARCHES: dict[str, Callable[[], Search]] = {
    OURS: lambda: nearest_code,
    FUSED: lambda: _nearest_fused,
    WITHOUT_FAISS: _without_faiss,
    "cdist": lambda: nearest_by_cdist,
    "expanded": lambda: nearest_expanded,
    "faiss": nearest_by_faiss,
    "scikit-learn": nearest_by_scikit_learn,
    "scipy": nearest_by_scipy,
}
_ELSEWHERE = {FUSED: "cuda", WITHOUT_FAISS: "cpu", "faiss": "cpu", "scikit-learn": "cpu", "scipy": "cpu"}


def searches(device: torch.device) -> list[str]:
    """Names of what searches on ``device``: (N, C) latents and (K, C) codes to (N,) indices."""
    return [name for name in _SEARCHES if _ELSEWHERE.get(name, device.type) == device.type]


def build_search(name: str, problem: Problem) -> Callable[[int], Tensor]:
    """A call that searches.

    Raises:
        Unavailable: it is not installed, or would not fit into memory.
    """
    return _call(_admitted(name, problem), problem)


def _admitted(name: str, problem: Problem) -> Search:
    require_pairs(name, "search", problem.size)
    return _SEARCHES[name]()


def _call(search: Search, problem: Problem) -> Callable[[int], Tensor]:

    @torch.no_grad()
    def call(number: int) -> Tensor:
        return search(problem.latents[number % problem.sets], problem.codebook)

    return call


def search_contender(name: str, problem: Problem, longest: float = _LONGEST) -> Contender:
    """As :func:`build_search`, with a check of the indices.

    The check skips a search that would take more than ``longest`` seconds, by the time that it takes for a part of
    the latents.
    """
    search = _admitted(name, problem)
    call = _call(search, problem)

    @torch.no_grad()
    def takes_too_long(share: int) -> bool:
        part = problem.latents[0][: max(1, problem.size.N // share)]
        begin = time.perf_counter()
        search(part, problem.codebook)
        return (time.perf_counter() - begin) * problem.size.N / len(part) > longest

    def check() -> str | None:
        if all(map(takes_too_long, _PARTS)):
            raise Unavailable("skipped", f"a call would take more than {longest:g} s")
        return problem.verdict(call(0))

    return Contender(call, check)


def cells(context: Context) -> list[Cell]:
    """One per size, and some with one thread."""
    found = [_cell(size, context.threads) for size in SEARCH_SIZES[context.grid]]
    if context.device.type == "cpu" and context.threads > 1:
        found += [_cell(size, 1, "-T1") for size in ONE_THREAD[context.grid]]
    return found


def _cell(size: Size, threads: int, suffix: str = "") -> Cell:
    settings = {**size._asdict(), "threads": threads}
    return Cell(f"search/{size.label}{suffix}", settings, partial(_run, size=size, threads=threads))


def _run(context: Context, size: Size, threads: int) -> dict[str, Any]:
    problem = Problem(size, context.device, sets=1 if context.device.type == "cpu" else 3)
    names = searches(context.device)
    for name in names:
        # Loaded before the number of threads is set, which reaches no library that is loaded later.
        with suppress(Unavailable):
            _SEARCHES[name]()
    with use_threads(threads):
        tiles = tune_tiles(problem)
        builders: dict[str, Callable[[], Contender]] = {
            name: partial(search_contender, name, problem) for name in names
        }
        builders["tiled product"] = lambda: Contender(tiled_product(problem, tiles))
        builders["product"] = lambda: whole_product(problem)
        entries = compete(builders, context)
    return {
        "contenders": entries,
        "facts": {"bytes": necessary_bytes(size, forward=False), "tiles": tiles._asdict()},
    }
