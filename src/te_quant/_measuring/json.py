"""Reports as values for strict JSON, which knows neither tuples nor infinities, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["interval", "numbers", "plain"]


def plain(value: Any) -> Any:
    """Return nested values for JSON: tuples become lists, NaN and infinities strings that ``float`` reads."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read fields that :func:`plain` has written: strings are NaN or infinities, lists are intervals."""
    return {name: _number(value) for name, value in data.items()}


def interval(values: Any) -> tuple[float, float]:
    """Read a pair of numbers."""
    return float(values[0]), float(values[1])


def _number(value: Any) -> Any:
    if isinstance(value, str):
        return float(value)
    return interval(value) if isinstance(value, list | tuple) else value
