"""The values that an expression of a marker goes through: samples over seeds, spreads and places in data."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from examples.te_vqgan.reports.inference import paired_t, welch
from examples.te_vqgan.runs.checks import require, require_choice

__all__ = ["FUNCTIONS", "OPERATORS", "Json", "Place", "Sample", "Spread", "Value", "mean"]


class Place:
    """A place in the data: an expression goes on from it by ``.name``, ``[key]`` or ``(options)``."""

    def get(self, name: str) -> Value:
        """Return what ``.name`` is here."""
        raise ValueError(f"name must be none, as this place has no names, got {name!r}.")

    def at(self, key: int | str) -> Value:
        """Return what ``[key]`` is here."""
        raise ValueError(f"key must be none, as this place has no keys, got {key!r}.")

    def select(self, **options: int | float | str) -> Value:
        """Return what ``(options)`` is here."""
        raise ValueError(f"options must be none, as this place takes none, got {', '.join(options)}.")


class Sample(Place):
    """One value per seed, at least one.

    Arithmetic of two samples pairs them by seed, so both must have the same seeds.

    Args:
        values: by seed.
    """

    def __init__(self, values: Mapping[int, float]) -> None:
        require(bool(values), "sample", "the values of at least one seed", "none")
        self.values = dict(sorted(values.items()))

    def at(self, key: int | str) -> float:
        """Return the value of a seed."""
        require(key in self.values, "seed", "one of " + ", ".join(map(str, self.values)), repr(key))
        return self.values[int(key)]

    def map(self, function: Callable[[float], float]) -> Sample:
        """Apply ``function`` to every value."""
        return Sample({seed: function(value) for seed, value in self.values.items()})

    def paired(self, other: Sample, function: Callable[[float, float], float]) -> Sample:
        """Apply ``function`` to the two values of every seed."""
        seeds = [", ".join(map(str, one.values)) for one in (self, other)]
        require(seeds[0] == seeds[1], "seeds", "the same in both samples", " and ".join(seeds))
        return Sample({seed: function(value, other.values[seed]) for seed, value in self.values.items()})


class Spread(Place):
    """A mean and what stands behind its ±.

    Args:
        mean: the number before the sign.
        spread: the number behind it.
    """

    def __init__(self, mean: float, spread: float) -> None:
        self.mean = mean
        self.spread = spread


class Json(Place):
    """A part of a JSON file.

    Args:
        content: an object or a list.
    """

    def __init__(self, content: Mapping[str, Any] | Sequence[Any]) -> None:
        self.content = content

    def get(self, name: str) -> Value:
        """Return the member of an object."""
        return self.at(name)

    def at(self, key: int | str) -> Value:
        """Return a member of an object, or an entry of a list."""
        if isinstance(self.content, Mapping):
            require_choice("key", key, tuple(self.content))
            return of_json(self.content[str(key)])
        count = len(self.content)
        good = isinstance(key, int) and 0 <= key < count
        require(good, "key", f"an index below {count}", repr(key))
        return of_json(self.content[int(key)])


def of_json(found: Any) -> Value:
    """Return a number of a JSON file as it is, and anything else as a place."""
    if isinstance(found, bool) or found is None or isinstance(found, str):
        raise ValueError(f"entry must be a number, an object or a list, got {found!r}.")
    return float(found) if isinstance(found, int | float) else Json(found)


Value: TypeAlias = float | Place

OPERATORS: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def mean(value: Value) -> float:
    """Return the number that stands for ``value``: the mean of a sample or of a spread."""
    match value:
        case Sample():
            return statistics.fmean(value.values.values())
        case Spread():
            return value.mean
        case Place():
            raise ValueError("expression must end in a number or in a sample over seeds, got a place in the data.")
    return float(value)


def _list(value: Value) -> list[float]:
    if not isinstance(value, Sample):
        raise ValueError(f"argument must be a sample over seeds, got {_kind(value)}.")  # noqa: TRY004
    return list(value.values.values())


def _kind(value: Value) -> str:
    return type(value).__name__.lower() if isinstance(value, Place) else "a number"


def _sd(value: Value) -> float:
    values = _list(value)
    require(len(values) > 1, "argument", "a sample over at least two seeds", "one seed")
    return statistics.stdev(values)


def _se(value: Value) -> float:
    return _sd(value) / math.sqrt(len(_list(value)))


def _over(choose: Callable[[list[float]], float]) -> Callable[..., float]:
    """Take a sample, or several values."""

    def chosen(*values: Value) -> float:
        return choose(_list(values[0]) if len(values) == 1 else [mean(value) for value in values])

    return chosen


FUNCTIONS: Mapping[str, Callable[..., Value]] = {
    "mean": mean,
    "sd": _sd,
    "se": _se,
    "count": lambda value: float(len(_list(value))),
    "min": _over(min),
    "max": _over(max),
    "abs": lambda value: abs(mean(value)),
    "geometric_mean": _over(statistics.geometric_mean),
    "with_se": lambda value: Spread(mean(value), _se(value)),
    "paired_t": lambda value: paired_t(_list(value)).statistic,
    "paired_p": lambda value: paired_t(_list(value)).p,
    "welch_t": lambda first, second: welch(_list(first), _list(second)).statistic,
    "welch_p": lambda first, second: welch(_list(first), _list(second)).p,
    "welch_se": lambda first, second: welch(_list(first), _list(second)).error,
    "welch_with_se": lambda first, second: Spread(*welch(_list(first), _list(second))[:2]),
}
"""What an expression may call; samples are over seeds, and errors and p values are between them."""
