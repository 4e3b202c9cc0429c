"""How figures are written in tables."""

from __future__ import annotations

import math

__all__ = ["NOT_MEASURED", "UNDEFINED", "counted", "name_end", "with_interval"]

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


def name_end(name: str, width: int) -> str:
    """Return a name in at most ``width`` characters: of a longer one the end, which tells similar paths apart.

    Example:
        >>> name_end("encoder.levels.1.block0.conv2", 16)
        '….1.block0.conv2'
    """
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1.

    Example:
        >>> counted(1, "shift"), counted(1200, "shift")
        ('1 shift', '1,200 shifts')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
