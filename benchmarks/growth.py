"""How time and memory grow with N and with K.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from benchmarks.contest import OURS, Cell, Context
from benchmarks.memory import measure_apart
from benchmarks.problem import Size
from benchmarks.quantizers import contest
from benchmarks.sizes import growth_sizes

__all__ = ["NAMES", "cells"]

NAMES = (OURS, "vector-quantize-pytorch", "cdist", "expanded")
"""Quantizers whose curves are drawn; diffusers' is that of cdist."""

_SHARE = 0.5


def cells(context: Context) -> list[Cell]:
    """Time and memory of the forward pass in evaluation, one each a size."""
    result = []
    for axis, sizes in growth_sizes(context.grid).items():
        for size in sizes:
            for what, run in (("time", _time), ("memory", _memory)):
                settings = {"what": what, "along": axis, **size._asdict()}
                result.append(Cell(f"growth/{what}-{axis}-{size.label}", settings, partial(run, size=size)))
    return result


def _time(context: Context, size: Size) -> dict[str, Any]:
    limits = context.limits._replace(budget=_SHARE * context.limits.budget)
    return {"contenders": contest(dataclasses.replace(context, limits=limits), size, "eval", NAMES)}


def _memory(context: Context, size: Size) -> dict[str, Any]:
    return {"contenders": {name: measure_apart(name, "eval", size, context) for name in NAMES}}
