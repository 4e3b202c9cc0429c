"""Interleaved timing: each contender has its turn in every round, so that what disturbs the machine hits all.

A sample is as many calls in a row as take a few milliseconds. Reported are the median and the quartiles of the
samples; garbage collection is off while they are taken.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

__all__ = [
    "Call",
    "Clock",
    "Failure",
    "Limits",
    "Spread",
    "clock_of",
    "cpu_clock",
    "cuda_clock",
    "measure",
    "spread",
]

Call = Callable[[int], object]
"""What is timed; the argument counts its calls, so that it can take turns among several inputs."""

Clock = Callable[[Call, int, int], float]
"""(call, first, count) -> seconds that ``call(first)``, ``call(first + 1)``, ... took, ``count`` of them."""


class Spread(NamedTuple):
    """Seconds a call.

    Attributes:
        median: of the samples.
        low: their first quartile.
        high: their third quartile.
        rounds: number of samples.
        calls: in each sample.
    """

    median: float
    low: float
    high: float
    rounds: int
    calls: int


class Failure(NamedTuple):
    """Why a contender has no time: ``failed`` by an exception, or ``skipped`` as too slow."""

    status: str
    reason: str


class Limits(NamedTuple):
    """How long to measure.

    Attributes:
        budget: seconds for all contenders together; fewer rounds are made of slow ones.
        min_rounds: even if that takes longer.
        max_rounds: even if there is time left.
        sample: seconds that a sample should take at least.
        call: seconds; a contender whose first call takes longer gets no second.
    """

    budget: float = 3.0
    min_rounds: int = 3
    max_rounds: int = 25
    sample: float = 0.004
    call: float = 15.0


# Above this a second warm-up call would cost more than it helps.
_SLOW = 1.0
_MAX_CALLS = 1000
_MAX_REASON = 300


def cpu_clock(call: Call, first: int, count: int) -> float:
    """Wall-clock time."""
    begin = time.perf_counter()
    for number in range(first, first + count):
        call(number)
    return time.perf_counter() - begin


def cuda_clock(call: Call, first: int, count: int) -> float:
    """Time on the device, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for number in range(first, first + count):
        call(number)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock that suits ``device``."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def measure(calls: Mapping[str, Call], clock: Clock, limits: Limits) -> dict[str, Spread | Failure]:
    """Time all ``calls`` in turns; those that raise, or take too long at once, drop out."""
    results: dict[str, Spread | Failure] = {}
    durations: dict[str, float] = {}
    for name, call in calls.items():
        first = _try(call, clock, limits)
        if isinstance(first, Failure):
            results[name] = first
        else:
            durations[name] = first
    counts = {
        name: max(1, min(_MAX_CALLS, round(limits.sample / max(duration, 1e-9))))
        for name, duration in durations.items()
    }
    total = sum(durations[name] * counts[name] for name in durations)
    rounds = max(limits.min_rounds, min(limits.max_rounds, int(limits.budget / max(total, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in durations}
    names = list(durations)
    with _no_collection():
        for number in range(rounds):
            # Another order in each round, so that none always follows the same one.
            for name in random.Random(number).sample(names, len(names)):
                count = counts[name]
                samples[name].append(clock(calls[name], number * count, count) / count)
    results |= {name: spread(samples[name], counts[name]) for name in names}
    return {name: results[name] for name in calls}


def spread(samples: Sequence[float], calls: int = 1) -> Spread:
    """Median and quartiles, by linear interpolation."""
    low, median, high = (float(value) for value in np.percentile(samples, (25, 50, 75)))
    return Spread(median, low, high, len(samples), calls)


def describe(error: BaseException) -> str:
    """One line about an exception."""
    text = f"{type(error).__name__}: " + " ".join(str(error).split())
    return text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 4] + " ..."


def _try(call: Call, clock: Clock, limits: Limits) -> float | Failure:
    """Seconds of a call after one or two to warm up."""
    try:
        duration = clock(call, 0, 1)
        if duration > limits.call:
            return Failure("skipped", f"a call took {duration:.1f} s, more than {limits.call:g} s")
        if duration < _SLOW:
            # The median of three: a single one may have been disturbed, and decides how many calls make a sample.
            duration = sorted(clock(call, number, 1) for number in range(3))[1]
    except Exception as error:
        return Failure("failed", describe(error))
    return duration


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
