"""Reports as values for strict JSON, which knows neither tuples nor infinities, as files, and back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from te_quant._checks import require
from te_quant._pretrained import write_atomically

__all__ = [
    "checked_fields",
    "interval",
    "numbers",
    "plain",
    "read",
    "read_all",
    "read_report",
    "refuse_another_kind",
    "write_report",
]

_Values = TypeVar("_Values")
# A field that only this kind of report has.
_KINDS = {"aligned": "EquivarianceReport", "transforms": "StabilityReport", "rows": "AuditReport"}


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


def checked_fields(kind: type[Any], data: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as they were stored.

    Raises:
        ValueError: unknown ones, missing ones that have no default, or no object at all.
    """
    require(isinstance(data, Mapping), kind.__name__, "an object in JSON", type(data).__name__)
    names = {field.name for field in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    fits = needed <= set(data) <= names
    require(fits, f"{kind.__name__} fields", str(sorted(names)), sorted(data))
    return dict(data)


def read(kind: type[_Values], data: Any) -> _Values:
    """Build a dataclass of numbers and intervals."""
    return kind(**numbers(checked_fields(kind, data)))


def read_all(name: str, data: Any, build: Callable[[Any], _Values]) -> dict[str, _Values]:
    """Build what is stored under each name of an object in JSON."""
    require(isinstance(data, Mapping), name, "an object in JSON", type(data).__name__)
    return {key: build(value) for key, value in data.items()}


def interval(values: Any) -> tuple[float, float]:
    """Read a pair of numbers."""
    return float(values[0]), float(values[1])


def write_report(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write what the ``to_dict`` of a report returns, completely or not at all."""
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_report` has written, for the ``from_dict`` of a report.

    Raises:
        ValueError: the file holds no object in JSON.
    """
    expected = "a report in JSON"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} must be {expected}, got another file ({error}).") from error
    require(isinstance(data, dict), os.fspath(path), expected, type(data).__name__)
    return dict(data)


def refuse_another_kind(data: Mapping[str, Any], kind: str) -> None:
    """Refuse the values of a report of another class than ``kind``, and name that class."""
    for field, other in _KINDS.items():
        right = field not in data or other == kind
        require(right, "report", f"of class {kind}", f"one of class {other}; use {other}.load or .from_dict")
    require("format" in data, "report", f"the values of a saved {kind}", f"no report: {_shown(data)}")


def _shown(data: Mapping[str, Any]) -> str:
    names = ", ".join(repr(name) for name in list(data)[:3])
    return f"an object with {names}{', ...' if len(data) > 3 else ''}" if data else "an empty object"


def _number(value: Any) -> Any:
    if isinstance(value, str):
        return float(value)
    return interval(value) if isinstance(value, list | tuple) else value
