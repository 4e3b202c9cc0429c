"""The report of token stability: typed values, a table, a picture, and strict JSON both ways."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from te_quant._checks import require
from te_quant._measuring.data_range import DEFAULT_RANGE
from te_quant._measuring.json import (
    checked_fields,
    interval,
    plain,
    read,
    read_all,
    read_report,
    refuse_another_kind,
    write_report,
)
from te_quant.equivariance.metrics.agreement import Agreement
from te_quant.equivariance.report.values import ReconstructionError
from te_quant.stability.plot import plot_stability
from te_quant.stability.tables import report_table, summary_table
from te_quant.stability.values import (
    CycleStability,
    ImageShare,
    StabilitySettings,
    StabilityValues,
    TransformStability,
)
from te_quant.tables import Table, Tabular
from te_quant.usage import CodebookUsageReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StabilityReport"]

FORMAT = 1


@dataclass(frozen=True)
class StabilityReport(StabilityValues, Tabular):
    """How many tokens survive decoding and encoding; made by :func:`measure_stability`.

    A token match is never shown without κ, the code use and the reconstruction error, because a tokenizer that has
    collapsed to one code returns all its tokens.

    Attributes:
        transforms: the results by name of the transform, in the order of the measurement.
        code_use: use of the codebook by the first tokens.
        reconstruction: error of the decoded images against the given ones; None where tokens were given.
        settings: the conditions.
    """

    def summary(self) -> Table:
        """Return the short table that ``print`` and notebooks show."""
        return summary_table(self)

    def to_markdown(self) -> str:
        """Return the table with all intervals, and one row per cycle if there are several."""
        return report_table(self)

    def plot(self) -> Figure:
        """Draw token match, foreground and whole images by transform, with their intervals.

        Returns a figure that belongs to no window; use its ``savefig``.

        Raises:
            ImportError: matplotlib is not installed (``te_quant[plot]``).
        """
        return plot_stability({"measured": self})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for strict JSON: NaN and infinities become the strings that ``float`` reads."""
        return {"format": FORMAT, **plain(asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StabilityReport:
        """Rebuild a report from :meth:`to_dict`, before or after JSON.

        Raises:
            ValueError: another kind of report, another format, or missing or unknown fields.
        """
        refuse_another_kind(data, "StabilityReport")
        known = data.get("format") == FORMAT
        require(
            known, "format", f"{FORMAT} (measure again: another format lacks fields)", repr(data.get("format"))
        )
        names = {field.name for field in fields(cls)}
        require(set(data) == names | {"format"}, "report fields", f"{sorted(names | {'format'})}", sorted(data))
        settings = checked_fields(StabilitySettings, data["settings"])
        for name in ("image_size", "grid"):
            settings[name] = (int(settings[name][0]), int(settings[name][1]))
        settings["data_range"] = interval(settings.get("data_range", DEFAULT_RANGE))
        error = data["reconstruction"]
        return cls(
            transforms=read_all("transforms", data["transforms"], _transform),
            code_use=read(CodebookUsageReport, data["code_use"]),
            reconstruction=None if error is None else read(ReconstructionError, error),
            settings=StabilitySettings(**settings),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON; :meth:`load` reads it."""
        write_report(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StabilityReport:
        """Read what :meth:`save` has written.

        Raises:
            ValueError: the file holds no report of this format.
        """
        return cls.from_dict(read_report(path))


def _transform(data: Mapping[str, Any]) -> TransformStability:
    return TransformStability(tuple(_cycle(one) for one in checked_fields(TransformStability, data)["cycles"]))


def _cycle(data: Mapping[str, Any]) -> CycleStability:
    data = checked_fields(CycleStability, data)
    foreground = data["foreground"]
    return CycleStability(
        match=read(Agreement, data["match"]),
        foreground=None if foreground is None else read(Agreement, foreground),
        whole=read(ImageShare, data["whole"]),
        step=read(Agreement, data["step"]),
    )
