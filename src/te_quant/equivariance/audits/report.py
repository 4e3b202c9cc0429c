"""What an audit found, as a value: one row for each module in the order of execution.

All errors are *relative*: Σ‖error‖² / Σ‖z - z̄‖², z the module's output on the unshifted images and z̄ its mean
for each channel. In decibels, -10·log10 of it: more is better, 0 dB is an error as large as the signal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from te_quant._checks import require, require_choice
from te_quant.shifts import Shift

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PARTS", "AuditReport", "AuditRow", "Part", "SkippedModule", "decibels"]

Part = Literal["border", "global", "aliasing"]
PARTS: tuple[Part, ...] = get_args(Part)
FORMAT = 1


def decibels(error: float) -> float:
    """-10·log10 of a relative error: inf for none, 0 for one as large as the signal, NaN for NaN."""
    if error == 0:
        return math.inf
    return -math.inf if math.isinf(error) else -10 * math.log10(error)


@dataclass(frozen=True)
class AuditRow:
    """One call of one module. Errors are relative, see the head of this file; :func:`decibels` converts.

    Attributes:
        name: path of the module, with ``#2`` and so on from its second call.
        kind: its class.
        padding: how it pads, in words, as far as its attributes say; empty otherwise.
        stride: pixels from one position of its output to the next; below 1 where the output is larger.
        grid: (h, w) of its output.
        whole_error: error of its output after shifts by whole strides of the model; all that came before counts.
        sub_stride_error: the same after shifts below the stride; None where there is no such shift.
        border_error: what the module itself adds beside borders.
        global_error: what the module itself adds away from borders, see :func:`~te_quant.equivariance.audit`.
        aliasing_error: what the module itself adds at shifts below its own stride; None without one.
        floor: a part below it is rounding.
        unaudited: modules inside which could not be audited alone, so that this row answers for them.
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
        """What the module adds to one part; 0 where that is rounding or cannot occur."""
        require_choice("part", part, PARTS)
        error = {
            "border": self.border_error,
            "global": self.global_error,
            "aliasing": self.aliasing_error or 0.0,
        }[part]
        return error if error > self.floor else 0.0


@dataclass(frozen=True)
class SkippedModule:
    """A module that was called but not audited, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class AuditReport:
    """Where a model loses equivariance; made by :func:`~te_quant.equivariance.audit`.

    Attributes:
        rows: the audited modules, in the order in which they finished.
        skipped: the modules that were called but not audited alone.
        stride: the largest stride in the model (least common multiple), pixels.
        image_size: (H, W).
        num_images: how many images were shown.
        shifts: the whole shifts, pixels.
        sub_stride_shifts: the shifts below the stride, pixels.
    """

    rows: tuple[AuditRow, ...]
    skipped: tuple[SkippedModule, ...]
    stride: int
    image_size: tuple[int, int]
    num_images: int
    shifts: tuple[Shift, ...]
    sub_stride_shifts: tuple[Shift, ...]

    def worst(self, part: Part) -> AuditRow | None:
        """The module that adds most to one part (the first of equals); None if none adds more than rounding."""
        require_choice("part", part, PARTS)
        worst = max(self.rows, key=lambda row: row.part(part), default=None)
        return worst if worst is not None and worst.part(part) > 0 else None

    def culprits(self) -> dict[Part, AuditRow | None]:
        """The worst module for each part."""
        return {part: self.worst(part) for part in PARTS}

    def to_markdown(self, *, losses_only: bool = False) -> str:
        """Name the culprits, then give the rows in dB (more is better; ``exact``: below rounding).

        Args:
            losses_only: leave out modules that add nothing.
        """
        rows = [row for row in self.rows if not losses_only or any(row.part(part) for part in PARTS)]
        header = ["module", "kind", "stride", "whole shifts", "sub-stride shifts", *(f"adds: {p}" for p in PARTS)]
        lines = [header, ["---", "---", *("---:" for _ in header[2:])]]
        lines += [
            [
                row.name or "(the model)",
                row.kind + (f", {row.padding}" if row.padding else ""),
                f"{row.stride:g}",
                _cell(row, row.whole_error),
                _cell(row, row.sub_stride_error),
                _cell(row, row.border_error),
                _cell(row, row.global_error),
                _cell(row, row.aliasing_error),
            ]
            for row in rows
        ]
        table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
        found = "".join(f"- {part}: {_culprit(part, row)}\n" for part, row in self.culprits().items())
        height, width = self.image_size
        left_out = f" {len(self.skipped)} modules were not audited alone." if self.skipped else ""
        return (
            f"{found}\n{table}\nIn dB, more is better. {self.num_images} images of {height}x{width} pixels, "
            f"circular shifts; stride {self.stride}; whole shifts {_shifts(self.shifts)}, sub-stride shifts "
            f"{_shifts(self.sub_stride_shifts)}.{left_out}\n"
        )

    def plot(self) -> Figure:
        """Draw the error after each module, and under it what each module adds, by part.

        Needs matplotlib. Returns a figure that belongs to no window; use its ``savefig``.
        """
        from te_quant.equivariance.audits.plot import plot_audit

        return plot_audit(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON: NaN and infinities become the strings that ``float`` reads."""
        plain: dict[str, Any] = _plain(asdict(self))
        return {"format": FORMAT, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AuditReport:
        """Rebuild a report from :meth:`to_dict`, before or after JSON.

        Raises:
            ValueError: another format, or missing or unknown fields.
        """
        require(data.get("format") == FORMAT, "format", str(FORMAT), repr(data.get("format")))
        values = _fields(cls, {name: value for name, value in data.items() if name != "format"})
        values["rows"] = tuple(AuditRow(**_fields(AuditRow, row)) for row in data["rows"])
        values["skipped"] = tuple(SkippedModule(**_fields(SkippedModule, row)) for row in data["skipped"])
        return cls(**values)


def _cell(row: AuditRow, error: float | None) -> str:
    if error is None:
        return ""
    return "exact" if error <= row.floor else f"{decibels(error):.1f}"


def _culprit(part: Part, row: AuditRow | None) -> str:
    if row is None:
        return "none adds more than rounding"
    padding = f", {row.padding}" if row.padding else ""
    return f"`{row.name or '(the model)'}` ({row.kind}{padding}) at {decibels(row.part(part)):.1f} dB"


def _shifts(shifts: tuple[Shift, ...]) -> str:
    return " ".join(f"({dy},{dx})" for dy, dx in shifts) or "none"


_TEXTS = ("name", "kind", "padding", "reason", "unaudited")


def _fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`_plain` for the fields of ``kind``: lists were tuples, strings in place of numbers floats."""
    names = {field.name for field in fields(kind)}
    require(set(data) == names, f"{kind.__name__} fields", str(sorted(names)), sorted(data))
    values = {name: _tuples(value) for name, value in data.items()}
    return {name: float(v) if isinstance(v, str) and name not in _TEXTS else v for name, v in values.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
