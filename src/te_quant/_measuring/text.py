"""How figures are written in tables."""

from __future__ import annotations

import math

__all__ = ["NOT_MEASURED", "UNDEFINED", "with_interval"]

UNDEFINED = "undefined"
NOT_MEASURED = "not measured"


def with_interval(value: float, interval: tuple[float, float], pattern: str = ".3f") -> str:
    """Write a figure and its confidence interval in brackets; without brackets if there is no interval.

    Args:
        value: the figure.
        interval: (low, high); NaN where there is none.
        pattern: a format of all three numbers.
    """
    low, high = interval
    bracket = "" if math.isnan(low) else f" [{low:{pattern}}, {high:{pattern}}]"
    return f"{value:{pattern}}{bracket}"
