"""The report of an audit: one row per module, in the order of execution."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from te_quant._checks import require
from te_quant._measuring.json import checked_fields, plain, read_report, refuse_another_kind, write_report
from te_quant._measuring.text import counted
from te_quant.equivariance.audits.plot import plot_audit
from te_quant.equivariance.audits.rows import PARTS, AuditRow, Part, SkippedModule, decibels, worst_row
from te_quant.shifts import Shift
from te_quant.tables import Table, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AuditReport"]

FORMAT = 1
# Modules that the short table lists at most.
_MOST_LISTED = 12


@dataclass(frozen=True)
class AuditReport(Tabular):
    """Where a model loses equivariance; made by :func:`~te_quant.equivariance.audit`.

    Attributes:
        rows: the audited modules, in the order in which they finished.
        skipped: the modules that were called but not audited on their own; :meth:`missed` returns those that
            matter.
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

    def missed(self) -> tuple[SkippedModule, ...]:
        """Return the modules whose losses are in no row; with any, the worst row need not be the worst module."""
        return tuple(module for module in self.skipped if module.missed)

    def worst(self, part: Part) -> AuditRow | None:
        """Return the row of the module that adds most to one part, the first of equals.

        Args:
            part: ``border``, ``global`` or ``aliasing``.

        Returns:
            None if no audited module adds more than rounding.
        """
        return worst_row(self.rows, part)

    def culprits(self) -> dict[Part, AuditRow | None]:
        """Return the worst module for each part."""
        return {part: self.worst(part) for part in PARTS}

    def summary(self) -> Table:
        """Return the modules that lose most, with what they add in dB, and the error of the output below."""
        losing = [row for row in self.rows if any(row.part(part) for part in PARTS)]
        most = sorted(losing, key=lambda row: max(row.part(part) for part in PARTS), reverse=True)[:_MOST_LISTED]
        listed = [row for row in losing if row in most]
        header = ["module", "kind", *(f"adds: {part}" for part in PARTS)]
        cells = [[row.title(), row.kind, *["not audited"] * len(PARTS)] for row in self.missed()[:_MOST_LISTED]]
        cells += [
            [row.title(), row.description(), *(row.text(getattr(row, f"{part}_error")) for part in PARTS)]
            for row in listed
        ]
        return Table(header, cells, "ll" + "r" * len(PARTS), self._note(len(losing), len(listed)))

    def to_markdown(self, *, losses_only: bool = False) -> str:
        """Name missed modules and culprits, then give the rows in dB (more is better; ``exact``: below rounding).

        Args:
            losses_only: leave out modules that add nothing.
        """
        rows = [row for row in self.rows if not losses_only or any(row.part(part) for part in PARTS)]
        header = ["module", "kind", "stride", "whole shifts", "sub-stride shifts", *(f"adds: {p}" for p in PARTS)]
        errors = ("whole_error", "sub_stride_error", *(f"{part}_error" for part in PARTS))
        cells = [
            [
                row.title(),
                row.description(),
                f"{row.stride:g}",
                *(row.text(getattr(row, error)) for error in errors),
            ]
            for row in rows
        ]
        nothing = f"none {'of the audited modules ' if self.missed() else ''}adds more than rounding"
        found = "".join(f"- {part}: {_culprit(part, row) or nothing}\n" for part, row in self.culprits().items())
        if self.missed():
            found = f"**{self._headline()}**\n\n{found}"
        note = f"In dB, more is better. {self._conditions()}"
        return f"{found}\n{Table(header, cells, 'll' + 'r' * 6, note).to_markdown()}"

    def _note(self, losing: int, listed: int) -> str:
        last = self.rows[-1]
        output = f"whole shifts {last.text(last.whole_error)}"
        if last.sub_stride_error is not None:
            output += f", sub-stride shifts {last.text(last.sub_stride_error)}"
        left = f" {losing - listed} more add less." if losing > listed else ""
        headline = f"{self._headline()} " if self.missed() else ""
        return (
            f"{headline}In dB, more is better. {losing} of {len(self.rows)} modules add more than rounding.{left} "
            f"Error after the last module: {output}. {self._conditions()}"
        )

    def _headline(self) -> str:
        """Name the first missed module with its reason; empty where no module is missed."""
        missed = self.missed()
        if not missed:
            return ""
        first, more = missed[0], len(missed) - 1
        others = f", and {more} more {'modules' if more > 1 else 'module'}" if more else ""
        return f"Not audited, and in no row: `{first.title()}` ({first.kind}), as {first.reason}{others}."

    def _conditions(self) -> str:
        height, width = self.image_size
        skipped = len(self.skipped)
        verb = "was not audited on its own" if skipped == 1 else "were not audited on their own"
        left_out = f" {counted(skipped, 'module')} {verb}." if skipped else ""
        return (
            f"{counted(self.num_images, 'image')} of {height}x{width} pixels, circular shifts; "
            f"stride {self.stride}; whole shifts {_shifts(self.shifts)}, "
            f"sub-stride shifts {_shifts(self.sub_stride_shifts)}.{left_out}"
        )

    def plot(self) -> Figure:
        """Draw the error after each module, and next to it the error that each module adds, by part.

        Returns a figure that belongs to no window; use its ``savefig``.

        Raises:
            ImportError: matplotlib is not installed (``te_quant[plot]``).
        """
        return plot_audit(self.rows, headline=self._headline())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for strict JSON: NaN and infinities become the strings that ``float`` reads."""
        values: dict[str, Any] = plain(asdict(self))
        for module in values["skipped"]:
            # Files say it only where it holds, so that those of older versions stay the same.
            if not module["missed"]:
                del module["missed"]
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AuditReport:
        """Rebuild a report from :meth:`to_dict`, before or after JSON.

        Raises:
            ValueError: another kind of report, another format, or missing or unknown fields.
        """
        refuse_another_kind(data, "AuditReport")
        require(data.get("format") == FORMAT, "format", str(FORMAT), repr(data.get("format")))
        values = _fields(cls, {name: value for name, value in data.items() if name != "format"})
        values["rows"] = tuple(AuditRow(**_fields(AuditRow, row)) for row in data["rows"])
        skipped = ({"missed": False} | row for row in data["skipped"])
        values["skipped"] = tuple(SkippedModule(**_fields(SkippedModule, row)) for row in skipped)
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON; :meth:`load` reads it."""
        write_report(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AuditReport:
        """Read what :meth:`save` has written.

        Raises:
            ValueError: the file holds no report of this format.
        """
        return cls.from_dict(read_report(path))


def _culprit(part: Part, row: AuditRow | None) -> str:
    if row is None:
        return ""
    return f"`{row.title()}` ({row.description()}) at {decibels(row.part(part)):.1f} dB"


def _shifts(shifts: tuple[Shift, ...]) -> str:
    return " ".join(f"({dy},{dx})" for dy, dx in shifts) or "none"


_TEXTS = ("name", "kind", "padding", "reason", "unaudited")


def _fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`plain` for the fields of ``kind``: lists were tuples, strings in place of numbers floats."""
    values = {name: _tuples(value) for name, value in checked_fields(kind, data).items()}
    return {name: float(v) if isinstance(v, str) and name not in _TEXTS else v for name, v in values.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value
