"""What a stability report holds, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from te_quant._measuring.bootstrap import NO_INTERVAL, Interval
from te_quant._measuring.data_range import DEFAULT_RANGE, DataRange
from te_quant._measuring.text import with_interval
from te_quant.equivariance.metrics.agreement import Agreement
from te_quant.equivariance.report.values import ReconstructionError
from te_quant.tables import Table, Tabular
from te_quant.usage import CodebookUsageReport

__all__ = ["CycleStability", "ImageShare", "StabilitySettings", "StabilityValues", "TransformStability"]


@dataclass(frozen=True)
class ImageShare(Tabular):
    """A share of images.

    Attributes:
        share: in [0, 1].
        images: how many there were.
        interval: 95 % confidence interval (low, high), by percentile bootstrap over images; NaN without one.
    """

    share: float
    images: int
    interval: Interval = NO_INTERVAL

    def text(self) -> str:
        """Write the share with its interval."""
        return with_interval(self.share, self.interval)

    def summary(self) -> Table:
        """Return the share and the number of images."""
        return Table(["share of images", "images"], [[self.text(), f"{self.images:,}"]], "rr")


@dataclass(frozen=True)
class CycleStability(Tabular):
    """How many tokens come back after one or more cycles of decoding, transform and encoding.

    Attributes:
        match: agreement with the first tokens, moved as the transform moves them, over all tokens that count.
        foreground: the same over tokens that show more than ground; None where the images have no ground.
        whole: share of images of which every token that counts came back.
        step: agreement with the tokens of the cycle before, moved once; in the first cycle that is ``match``.
    """

    match: Agreement
    foreground: Agreement | None
    whole: ImageShare
    step: Agreement

    def without_foreground(self) -> CycleStability:
        """Return the same without the foreground."""
        return replace(self, foreground=None)

    def summary(self) -> Table:
        """Return the three shares."""
        rows = [["token match", self.match.rate_text(), self.match.kappa_text()]]
        if self.foreground is not None:
            rows.append(["token match, foreground", self.foreground.rate_text(), self.foreground.kappa_text()])
        rows.append(["images whole", self.whole.text(), ""])
        return Table(["measured", "share", "κ"], rows)


@dataclass(frozen=True)
class TransformStability(Tabular):
    """Token stability under one transform.

    Attributes:
        cycles: one entry per cycle, the first one first.
    """

    cycles: tuple[CycleStability, ...]

    @property
    def match(self) -> Agreement:
        """Token match after one cycle."""
        return self.cycles[0].match

    @property
    def foreground(self) -> Agreement | None:
        """Token match after one cycle, over foreground tokens only; None where the images have no ground."""
        return self.cycles[0].foreground

    @property
    def whole(self) -> ImageShare:
        """Share of images that return whole after one cycle."""
        return self.cycles[0].whole

    def summary(self) -> Table:
        """Return one row per cycle."""
        rows = [
            [str(number), one.match.rate_text(), one.match.kappa_text(), one.whole.text(), one.step.rate_text()]
            for number, one in enumerate(self.cycles, 1)
        ]
        return Table(["cycle", "token match", "κ", "images whole", "match with the cycle before"], rows, "rrrrr")


@dataclass(frozen=True)
class StabilitySettings:
    """The conditions of a measurement.

    Attributes:
        image_size: (H, W), pixels.
        grid: (h, w), tokens.
        num_codes: number of codes, K; None where it was not given.
        num_images: images, or grids of given tokens.
        tokens_from: ``images``, or ``given tokens``.
        cycles: how often decoding, transform and encoding were repeated.
        data_range: (low, high) of the pixel values.
        ground: value of the background; None where the images have none.
        tau: τ; a token is foreground where a pixel of its cell differs from the ground by more.
        resamples: how often the images were resampled for the intervals.
        seed: of the resampling.
    """

    image_size: tuple[int, int]
    grid: tuple[int, int]
    num_codes: int | None
    num_images: int
    tokens_from: str
    cycles: int
    ground: float | None
    tau: float
    resamples: int
    seed: int
    data_range: DataRange = DEFAULT_RANGE


@dataclass(frozen=True)
class StabilityValues:
    """The values of a report, without its table, picture and files.

    :class:`te_quant.stability.StabilityReport` adds those and documents every field.
    """

    transforms: Mapping[str, TransformStability]
    code_use: CodebookUsageReport
    reconstruction: ReconstructionError | None
    settings: StabilitySettings
