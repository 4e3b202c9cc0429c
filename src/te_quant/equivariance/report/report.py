"""The report of a measurement: typed values, a table, a picture, and strict JSON both ways.

An agreement is never shown without κ, the code use and the reconstruction error, because a tokenizer that has
collapsed to one code agrees perfectly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from te_quant._checks import require
from te_quant._measuring.data_range import DEFAULT_RANGE
from te_quant._measuring.json import (
    checked_fields,
    interval,
    numbers,
    plain,
    read,
    read_all,
    read_report,
    refuse_another_kind,
    write_report,
)
from te_quant.equivariance.metrics.agreement import Agreement
from te_quant.equivariance.metrics.margin import Margin, Spread
from te_quant.equivariance.metrics.shift_error import ShiftError
from te_quant.equivariance.report.plot import plot_reports
from te_quant.equivariance.report.tables import report_table, summary_table
from te_quant.equivariance.report.values import (
    AGREEMENT_LABELS,
    ERROR_LABELS,
    EquivarianceSettings,
    EquivarianceValues,
    ReconstructionError,
    ShiftAgreement,
)
from te_quant.shifts import Shift
from te_quant.tables import Table, Tabular
from te_quant.usage import CodebookUsageReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EquivarianceReport"]

FORMAT = 3
# Lacks the intervals of the medians of margins; they read as not measured.
_FORMER = 2
# What reports without fractional shifts lack.
_FRACTIONAL = ("fractional", "feature_error_fractional", "end_to_end_fractional")
# The share above which CodebookUsage calls a code frequent by default.
_FREQUENT_SHARE = 1e-3


@dataclass(frozen=True)
class EquivarianceReport(EquivarianceValues, Tabular):
    """How equivariant a tokenizer's indices are; made by :func:`measure_equivariance`.

    Attributes:
        placement: the paper's metric (five places, ten pairs); None where no sprites were given.
        placement_foreground: the same over tokens that show ink.
        aligned: agreement after shifts by whole tokens.
        aligned_foreground: the same over tokens that show ink; None where the images have no ground.
        sub_stride: agreement after shifts below one token, at the best token shift in {0, 1}² of each image.
        sub_stride_foreground: the same over tokens that show ink; None where the images have no ground.
        sub_stride_fourier: agreement with the quantized Fourier-shifted latents; None without ``latents``.
        sub_stride_fourier_foreground: the same over tokens that show ink.
        feature_error: how far latents after a shift by whole tokens are from the shifted latents, in dB; None
            without ``latents``.
        feature_error_sub_stride: the same for shifts below one token, against the Fourier-shifted latents.
        end_to_end: PSNR of decode(encode(T_t x)) against T_t decode(encode(x)) over the pixels valid in both, for
            shifts by whole tokens; None without ``reconstruct``. StyleGAN3's EQ-T, with the width of
            ``data_range`` as peak, over encoded images and these shifts.
        end_to_end_sub_stride: the same for shifts below one token.
        margin: how far tokens are from another code, beside how far shifts by whole tokens move them; None
            without ``codebook``.
        numerical_floor: agreement of the unshifted images with themselves when only the arithmetic differs, by
            name of the variant; see :func:`numerical_floor`.
        code_use: use of the codebook over the reference images.
        reconstruction: error over the reference images; None without ``reconstruct``.
        aligned_by_shift: agreement and errors for each shift by whole tokens.
        sub_stride_by_shift: agreement and errors for each shift below one token.
        settings: the conditions.
        fractional: agreement after shifts by fractions of a pixel, at the best token shift in {0, 1}² of each
            image; None without ``fractional_shifts``.
        feature_error_fractional: the error of the latents after these, against the Fourier-shifted latents.
        end_to_end_fractional: the PSNR after these, over the pixels that the interpolation of the decoded image
            determines: StyleGAN3's EQ-T_frac.
    """

    def summary(self) -> Table:
        """Return the short table that ``print`` and notebooks show."""
        return summary_table(self)

    def to_markdown(self) -> str:
        """Return tables of every agreement with κ, of the errors, the code use and the reconstruction error."""
        return report_table(self)

    def plot(self) -> Figure:
        """Draw rates, κ and errors by metric with their intervals, and the maps over shifts.

        Returns a figure that belongs to no window; use its ``savefig``.

        Raises:
            ImportError: matplotlib is not installed (``te_quant[plot]``).
        """
        # The panel then says what it shows, as there is nothing to tell apart.
        return plot_reports({"": self})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for strict JSON: NaN and infinities become the strings that ``float`` reads."""
        values: dict[str, Any] = plain(asdict(self))
        # These two follow from the settings and from how the code use is counted.
        for name in ("num_codes", "frequent_share"):
            del values["code_use"][name]
        # Reports of images in [-1, 1] stay as they were before the range was an option.
        if self.settings.data_range == DEFAULT_RANGE:
            del values["settings"]["data_range"]
        # And reports of all whole shifts as before the others could be measured.
        if not self.settings.sub_stride_drawn:
            del values["settings"]["sub_stride_drawn"]
        if not self.settings.fractional_shifts:
            for name in _FRACTIONAL:
                del values[name]
            del values["settings"]["fractional_shifts"]
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EquivarianceReport:
        """Rebuild a report from :meth:`to_dict`, before or after JSON, of this format or of the one before it.

        Raises:
            ValueError: another kind of report, another format, or missing or unknown fields.
        """
        refuse_another_kind(data, "EquivarianceReport")
        known = data.get("format") in (_FORMER, FORMAT)
        expected = f"{_FORMER} or {FORMAT} (measure again: another format lacks fields)"
        require(known, "format", expected, repr(data.get("format")))
        names = {field.name for field in fields(cls)} - {n for n in _FRACTIONAL if n not in data}
        require(set(data) == names | {"format"}, "report fields", f"{sorted(names | {'format'})}", sorted(data))
        settings = checked_fields(EquivarianceSettings, data["settings"])
        for name in ("shifts", "sub_stride_shifts"):
            settings[name] = tuple(_shift(shift) for shift in settings[name])
        fractions = settings.get("fractional_shifts", ())
        settings["fractional_shifts"] = tuple(interval(shift) for shift in fractions)
        settings["image_size"] = _shift(settings["image_size"])
        settings["data_range"] = interval(settings.get("data_range", DEFAULT_RANGE))
        error, margin = data["reconstruction"], data["margin"]
        use = {"num_codes": settings["num_codes"], "frequent_share": _FREQUENT_SHARE}
        stored_use = read_all("code_use", data["code_use"], lambda value: value)
        values: dict[str, Any] = {
            "code_use": read(CodebookUsageReport, stored_use | use),
            "reconstruction": None if error is None else read(ReconstructionError, error),
            "margin": None if margin is None else _margin(margin),
            "numerical_floor": read_all("numerical_floor", data["numerical_floor"], partial(read, Agreement)),
            "settings": EquivarianceSettings(**settings),
        }
        for kind, labels in ((Agreement, AGREEMENT_LABELS), (ShiftError, ERROR_LABELS)):
            for name in labels:
                values[name] = None if data.get(name) is None else read(kind, data[name])
        for name in ("aligned_by_shift", "sub_stride_by_shift"):
            values[name] = tuple(_shift_agreement(entry) for entry in data[name])
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON; :meth:`load` reads it."""
        write_report(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EquivarianceReport:
        """Read what :meth:`save` has written.

        Raises:
            ValueError: the file holds no report of this format.
        """
        return cls.from_dict(read_report(path))


def _margin(data: Mapping[str, Any]) -> Margin:
    data = checked_fields(Margin, data)
    spreads = {name: read(Spread, data[name]) for name in ("margin", "movement", "ratio")}
    return Margin(**{**numbers({k: v for k, v in data.items() if k not in spreads}), **spreads})


def _shift_agreement(data: Mapping[str, Any]) -> ShiftAgreement:
    data = checked_fields(ShiftAgreement, data)
    values = numbers({k: v for k, v in data.items() if k not in ("shift", "agreement")})
    return ShiftAgreement(_shift(data["shift"]), read(Agreement, data["agreement"]), **values)


def _shift(values: Any) -> Shift:
    return int(values[0]), int(values[1])
