"""How figures are written in tables."""

from __future__ import annotations

import math

__all__ = ["NOT_MEASURED", "UNDEFINED", "counted", "name_end", "setting_text", "with_interval"]

UNDEFINED = "undefined"
NOT_MEASURED = "not measured"
# More shifts are counted, not listed.
_MOST_SHIFTS = 24


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


def setting_text(value: object) -> str:
    """Write one setting of a measurement: a pair of sides, an interval, shifts, or a plain value.

    Example:
        >>> setting_text((64, 48)), setting_text((-1.0, 1.0)), setting_text(((1, 0), (0, 1))), setting_text(None)
        ('64x48', '[-1, 1]', '(1,0) (0,1)', 'none')
    """
    if not isinstance(value, tuple):
        return "none" if value is None else str(value)
    if not value:
        return "none"
    if isinstance(value[0], tuple):
        if len(value) > _MOST_SHIFTS:
            return f"{len(value)} shifts"
        return " ".join(f"({dy},{dx})" for dy, dx in value)
    if isinstance(value[0], float):
        return f"[{value[0]:g}, {value[1]:g}]"
    return "x".join(str(side) for side in value)
