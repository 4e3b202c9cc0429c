"""The findings of an audit about one module, as values.

All errors are *relative*: Σ‖error‖² / Σ‖z - z̄‖², where z is the module's output on the unshifted images and z̄ its
mean for each channel. In decibels they are -10·log10 of it: more is better, and 0 dB is an error as large as the
signal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from te_quant._checks import require_choice

__all__ = ["PARTS", "AuditRow", "Part", "SkippedModule", "decibels", "worst_row"]

Part = Literal["border", "global", "aliasing"]
PARTS: tuple[Part, ...] = get_args(Part)


def decibels(error: float) -> float:
    """Return -10·log10 of a relative error: inf for no error, 0 for one as large as the signal, NaN for NaN.

    Args:
        error: a relative error, at least 0.

    Example:
        >>> decibels(0.01)
        20.0
    """
    if error == 0:
        return math.inf
    return -math.inf if math.isinf(error) else -10 * math.log10(error)


@dataclass(frozen=True)
class AuditRow:
    """One call of one module. Errors are relative to the power of its output; :func:`decibels` converts them.

    Attributes:
        name: path of the module, with ``#2`` and so on from its second call.
        kind: its class.
        padding: how it pads, in words, as far as its attributes tell; empty otherwise.
        stride: pixels from one position of its output to the next; below 1 where the output is larger.
        grid: (h, w) of its output.
        whole_error: error of its output after shifts by whole strides of the model; all that came before counts.
        sub_stride_error: the same after shifts below the stride; None where there is no such shift.
        border_error: the error that the module itself adds near borders.
        global_error: the error that it adds away from borders, by statistics, attention or absolute positions.
        aliasing_error: the error that it adds at shifts below its own stride; None if it has none.
        floor: a part below it is rounding.
        unaudited: modules inside which could not be audited on their own, so that this row answers for them.
    """

    name: str
    kind: str
    padding: str
    stride: float
    grid: tuple[int, int]
    whole_error: float
    sub_stride_error: float | None
    border_error: float
    global_error: float
    aliasing_error: float | None
    floor: float
    unaudited: tuple[str, ...] = ()

    def part(self, part: Part) -> float:
        """Return the error that the module adds to one part; 0 where that is rounding or cannot occur."""
        require_choice("part", part, PARTS)
        error = {
            "border": self.border_error,
            "global": self.global_error,
            "aliasing": self.aliasing_error or 0.0,
        }[part]
        return error if error > self.floor else 0.0

    def text(self, error: float | None) -> str:
        """Write one of the errors in decibels; ``exact`` for rounding, nothing for what was not measured."""
        if error is None:
            return ""
        return "exact" if error <= self.floor else f"{decibels(error):.1f}"

    def title(self) -> str:
        """Return the path of the module, or that it is the whole model."""
        return self.name or "(the model)"

    def description(self) -> str:
        """Return the class of the module and how it pads."""
        return self.kind + (f", {self.padding}" if self.padding else "")


@dataclass(frozen=True)
class SkippedModule:
    """A module that was called but not audited, and why.

    Attributes:
        name: path of the module, with ``#2`` and so on from its second call.
        kind: its class.
        reason: why it could not be audited.
        missed: whether it maps positions to positions and is in no module that has a row, so that no row contains
            what it loses.
    """

    name: str
    kind: str
    reason: str
    missed: bool = False

    def title(self) -> str:
        """Return the path of the module, or that it is the whole model."""
        return self.name or "(the model)"


def worst_row(rows: Sequence[AuditRow], part: Part) -> AuditRow | None:
    """Return the row of the module that adds most to one part, the first of equals; None if none adds anything."""
    require_choice("part", part, PARTS)
    worst = max(rows, key=lambda row: row.part(part), default=None)
    return worst if worst is not None and worst.part(part) > 0 else None
