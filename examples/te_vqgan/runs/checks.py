"""Refuse a wrong option with one clear sentence: ``NAME must be EXPECTED, got ACTUAL.``."""

from __future__ import annotations

import math
from collections.abc import Collection

__all__ = ["require", "require_choice", "require_int", "require_number"]


def require(condition: bool, name: str, expected: str, actual: object) -> None:
    """Raise ``ValueError`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {actual}.")


def require_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Refuse a value that is not one of ``choices``."""
    require(value in choices, name, "one of " + ", ".join(map(repr, choices)), repr(value))


def require_int(name: str, value: object, minimum: int) -> None:
    """Refuse anything but an ``int`` of at least ``minimum``; ``bool`` is not one."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(good, name, f"an int >= {minimum}", repr(value))


def require_number(name: str, value: object, minimum: float, maximum: float = math.inf) -> None:
    """Refuse anything but a finite number in ``[minimum, maximum]``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    good = number and math.isfinite(value) and minimum <= value <= maximum  # type: ignore[arg-type, operator]
    expected = f"a finite number >= {minimum:g}" + ("" if maximum == math.inf else f" and <= {maximum:g}")
    require(good, name, expected, repr(value))
