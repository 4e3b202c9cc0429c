"""A contest: contenders that claim to compute the same are checked, then timed in turns.

A contender that is not installed, does not fit the machine, fails, or computes something else is not left out: its
entry says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks.timing import Call, Failure, Limits, clock_of, describe, measure

__all__ = ["OURS", "Cell", "Contender", "Context", "Unavailable", "compete", "optional_module"]

OURS = "te_quant"
"""The contender that all others are compared with."""


class Unavailable(Exception):  # noqa: N818
    """Why a contender takes no part.

    No fault of anybody, hence no error by name.

    Args:
        status: ``not installed`` or ``skipped``.
        reason: one sentence.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Contender(NamedTuple):
    """What is timed, and what is wrong with it.

    Attributes:
        call: does the work.
        check: returns ``None``, or how its result differs from what was asked for.
    """

    call: Call
    check: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Context:
    """What every measurement has to know.

    Args:
        device: where to compute.
        threads: of torch's CPU kernels.
        grid: ``quick`` or ``full``.
        limits: how long to measure.
        finished: the cells that are there already, by key.
    """

    device: torch.device
    threads: int
    grid: str
    limits: Limits
    finished: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One measurement of a section.

    Args:
        key: its name in the results, ``section/...``.
        settings: the columns of its table that say what was measured.
        run: measures; returns ``contenders`` and, as it likes, ``facts``.
    """

    key: str
    settings: Mapping[str, Any]
    run: Callable[[Context], dict[str, Any]]


def optional_module(module: str, package: str) -> Any:
    """Import ``module``.

    Raises:
        Unavailable: ``package``, which brings it, is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable("not installed", f"{package}: {describe(error)}") from error


def compete(
    builders: Mapping[str, Callable[[], Contender]], context: Context, limits: Limits | None = None
) -> dict[str, dict[str, Any]]:
    """Build, check and time all contenders; the entry of each, in their order."""
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name, build in builders.items():
        admitted = _admit(build)
        if isinstance(admitted, Failure):
            entries[name] = admitted._asdict()
        else:
            calls[name] = admitted
    for name, result in measure(calls, clock_of(context.device), limits or context.limits).items():
        if isinstance(result, Failure):
            entries[name] = result._asdict()
        else:
            times = {key: _rounded(getattr(result, key)) for key in ("median", "low", "high")}
            entries[name] = {"status": "ok", **times, "rounds": result.rounds, "calls": result.calls}
    return {name: entries[name] for name in builders}


def _admit(build: Callable[[], Contender]) -> Call | Failure:
    try:
        contender = build()
        problem = contender.check()
    except Unavailable as absence:
        return Failure(absence.status, str(absence))
    except Exception as error:
        return Failure("failed", describe(error))
    return contender.call if problem is None else Failure("refused", problem)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
