"""What was measured, as a value: typed fields, a table, a picture, and strict JSON both ways.

An agreement is never shown alone: κ, the use of the codebook and the reconstruction error stand beside it,
because a tokenizer that has collapsed to one code agrees perfectly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from te_quant._checks import require
from te_quant.equivariance.agreement import Agreement
from te_quant.shifts import Protocol, Shift
from te_quant.usage import CodebookUsageReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "CodeUse",
    "EquivarianceReport",
    "EquivarianceSettings",
    "ReconstructionError",
    "ShiftAgreement",
]

FORMAT = 1


@dataclass(frozen=True)
class ShiftAgreement:
    """The agreement at one pixel shift (dy, dx)."""

    shift: Shift
    agreement: Agreement


@dataclass(frozen=True)
class CodeUse:
    """How the codebook was used over a stated number of tokens.

    Attributes:
        used_codes: codes that occur at least once; grows with the number of tokens.
        frequent_codes: codes that make up more than 0.1 % of the tokens; does not.
        perplexity: exp of the entropy of the code frequencies, in [1, K].
        tokens: how many tokens were counted.
    """

    used_codes: int
    frequent_codes: int
    perplexity: float
    tokens: int

    @classmethod
    def of(cls, usage: CodebookUsageReport) -> CodeUse:
        """Keep the figures of a :class:`~te_quant.CodebookUsage`, without its histogram."""
        return cls(usage.used_codes, usage.frequent_codes, usage.perplexity, usage.tokens)


@dataclass(frozen=True)
class ReconstructionError:
    """How far decoded images are from the originals, over all pixels of the reference images.

    Attributes:
        l1: mean absolute error, images in [-1, 1].
        mse: mean squared error.
        psnr: 10·log10(2² / mse) in dB, peak-to-peak range 2; inf for a perfect copy.
    """

    l1: float
    mse: float
    psnr: float


@dataclass(frozen=True)
class EquivarianceSettings:
    """Under which conditions a report was measured.

    Attributes:
        protocol: ``canvas``, ``circular`` or ``crop``.
        image_size: (H, W) of what the tokenizer saw, in pixels.
        stride: s, pixels a token.
        num_codes: K.
        num_images: images (or sprites) given.
        ground: value of the ground.
        tau: τ of the foreground.
        shifts: pixel shifts of the aligned agreement, multiples of s.
        sub_stride_shifts: pixel shifts of the sub-stride agreement.
        reference_images: the images over which code use and reconstruction error were taken, in words.
    """

    protocol: Protocol
    image_size: tuple[int, int]
    stride: int
    num_codes: int
    num_images: int
    ground: float
    tau: float
    shifts: tuple[Shift, ...]
    sub_stride_shifts: tuple[Shift, ...]
    reference_images: str


@dataclass(frozen=True)
class EquivarianceReport:
    """How equivariant a tokenizer's indices are; made by :func:`measure_equivariance`.

    Attributes:
        placement: the paper's metric (five places, ten pairs); None where no sprites were given.
        placement_foreground: the same over tokens that show ink.
        aligned: agreement after shifts by whole tokens.
        aligned_foreground: the same over tokens that show ink.
        sub_stride: agreement after shifts below one token, at the best token shift in {0, 1}² of each image.
        sub_stride_foreground: the same over tokens that show ink.
        sub_stride_fourier: agreement with the quantized Fourier-shifted latents; None without ``latents``.
        sub_stride_fourier_foreground: the same over tokens that show ink.
        code_use: use of the codebook over the reference images.
        reconstruction: error over the reference images; None without ``reconstruct``.
        aligned_by_shift: the aligned agreement for each shift.
        sub_stride_by_shift: the sub-stride agreement for each shift.
        settings: the conditions.
    """

    placement: Agreement | None
    placement_foreground: Agreement | None
    aligned: Agreement
    aligned_foreground: Agreement
    sub_stride: Agreement
    sub_stride_foreground: Agreement
    sub_stride_fourier: Agreement | None
    sub_stride_fourier_foreground: Agreement | None
    code_use: CodeUse
    reconstruction: ReconstructionError | None
    aligned_by_shift: tuple[ShiftAgreement, ...]
    sub_stride_by_shift: tuple[ShiftAgreement, ...]
    settings: EquivarianceSettings

    def agreements(self) -> dict[str, Agreement]:
        """Return the measured agreements by field name, in the order of the table."""
        values = {name: getattr(self, name) for name in AGREEMENT_LABELS}
        return {name: value for name, value in values.items() if value is not None}

    def to_markdown(self) -> str:
        """Return a table of every agreement with κ, and under it code use and reconstruction error."""
        from te_quant.equivariance.tables import report_table

        return report_table(self)

    def plot(self) -> Figure:
        """Draw rates and κ by metric, with what chance gives, and the map over sub-stride shifts.

        Needs matplotlib. Returns a figure that belongs to no window; use its ``savefig``.
        """
        from te_quant.equivariance.plot import plot_reports

        return plot_reports({"measured": self})

    @staticmethod
    def table(reports: Mapping[str, EquivarianceReport]) -> str:
        """Return several reports side by side as a Markdown table; see :func:`comparison_table`."""
        from te_quant.equivariance.tables import comparison_table

        return comparison_table(reports)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for strict JSON: NaN and infinities become the strings that ``float`` reads."""
        plain: dict[str, Any] = _plain(asdict(self))
        return {"format": FORMAT, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EquivarianceReport:
        """Rebuild a report from :meth:`to_dict`, before or after JSON.

        Raises:
            ValueError: another format, or missing or unknown fields.
        """
        require(data.get("format") == FORMAT, "format", f"{FORMAT}", repr(data.get("format")))
        names = {field.name for field in fields(cls)} | {"format"}
        require(set(data) == names, "report fields", f"{sorted(names)}", sorted(data))
        values: dict[str, Any] = {
            name: None if data[name] is None else _agreement(data[name]) for name in AGREEMENT_LABELS
        }
        for name in ("aligned_by_shift", "sub_stride_by_shift"):
            values[name] = tuple(
                ShiftAgreement(_shift(entry["shift"]), _agreement(entry["agreement"])) for entry in data[name]
            )
        use, error, settings = data["code_use"], data["reconstruction"], dict(data["settings"])
        for name in ("shifts", "sub_stride_shifts"):
            settings[name] = tuple(_shift(shift) for shift in settings[name])
        settings["image_size"] = _shift(settings["image_size"])
        return cls(
            code_use=CodeUse(**{**use, "perplexity": float(use["perplexity"])}),
            reconstruction=None
            if error is None
            else ReconstructionError(**{k: float(v) for k, v in error.items()}),
            settings=EquivarianceSettings(**settings),
            **values,
        )


AGREEMENT_LABELS: dict[str, str] = {
    "placement": "placement (paper: 5 places, 10 pairs)",
    "placement_foreground": "placement, foreground",
    "aligned": "aligned (whole tokens)",
    "aligned_foreground": "aligned, foreground",
    "sub_stride": "sub-stride (best token shift)",
    "sub_stride_foreground": "sub-stride, foreground",
    "sub_stride_fourier": "sub-stride (Fourier)",
    "sub_stride_fourier_foreground": "sub-stride (Fourier), foreground",
}


def _agreement(data: Mapping[str, Any]) -> Agreement:
    read: dict[str, Callable[[Any], Any]] = {"rate": float, "kappa": float, "chance": float}
    return Agreement(**{name: read.get(name, lambda x: x)(value) for name, value in data.items()})


def _shift(values: Any) -> Shift:
    return int(values[0]), int(values[1])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
