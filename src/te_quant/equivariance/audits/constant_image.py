"""The constant-image probe: an equivariant decoder gives a constant image, others show their grid.

Shape letters: B batch, C channels of the input, I channels of the output, H W its sides, s stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from te_quant._checks import require, require_floating, require_int, require_rank
from te_quant.equivariance._border import border_distances
from te_quant.equivariance.audits.plot import plot_constant_image
from te_quant.tables import Table, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ConstantImageReport", "constant_image_probe"]


@dataclass(frozen=True, eq=False)
class ConstantImageReport(Tabular):
    """How far the output for a constant input is from constant, in units of the output.

    Attributes:
        grid_error: root mean square of ``phases``: the checkerboard of period s, away from the border.
        border_error: RMS, closer to the border than ``margin``, of the deviation from the checkerboard.
        rest: RMS of the same in the interior: what has neither the period s nor keeps to the border.
        phases: (I, s, s), mean of the interior at each position modulo s, less the mean of the interior.
        profile: RMS of the deviation from the checkerboard at each distance from the border, in pixels.
        deviation: (B, I, H, W), the output less the mean of its interior for each channel.
        stride: s, the period looked for.
        margin: width of the border, pixels.
    """

    grid_error: float
    border_error: float
    rest: float
    phases: Tensor = field(repr=False)
    profile: tuple[float, ...] = field(repr=False)
    deviation: Tensor = field(repr=False)
    stride: int
    margin: int

    def summary(self) -> Table:
        """Return the three errors as a table."""
        rows = (
            (f"grid: period {self.stride}, away from the border", self.grid_error),
            (f"border: closer than {self.margin} pixels", self.border_error),
            ("rest: away from the border, not periodic", self.rest),
        )
        cells = [[label, f"{value:.3g}"] for label, value in rows]
        return Table(["deviation from a constant", "RMS"], cells)

    def to_markdown(self) -> str:
        """Return the three errors as a table in Markdown."""
        return self.summary().to_markdown()

    def plot(self) -> Figure:
        """Draw the deviation, enlarged, by phase and by distance from the border.

        Returns a figure that belongs to no window; use its ``savefig``.

        Raises:
            ImportError: matplotlib is not installed (``te_quant[plot]``).
        """
        return plot_constant_image(
            self.deviation,
            self.phases,
            self.profile,
            grid_error=self.grid_error,
            border_error=self.border_error,
            margin=self.margin,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the picture."""
        return {
            "grid_error": self.grid_error,
            "border_error": self.border_error,
            "rest": self.rest,
            "phases": self.phases.tolist(),
            "profile": list(self.profile),
            "stride": self.stride,
            "margin": self.margin,
        }


@torch.no_grad()
def constant_image_probe(
    function: Callable[[Tensor], Tensor], constant: Tensor, *, stride: int, margin: int | None = None
) -> ConstantImageReport:
    """Give a constant to a decoder (codes) or an autoencoder (images) and measure how the output varies.

    A map that commutes with all shifts sends constants to constants. One that commutes with multiples of s alone
    may show a pattern of period s; what padding adds stays near the border, as far as its influence reaches, and
    shows as a ring; attention and statistics can spread it. Put your model in evaluation mode first.

    Example:
        >>> decoder = torch.nn.Sequential(
        ...     torch.nn.Upsample(scale_factor=4), torch.nn.Conv2d(8, 3, 3, padding=1, padding_mode="circular")
        ... )
        >>> code = torch.ones(1, 8, 16, 16)
        >>> report = constant_image_probe(decoder, code, stride=4)
        >>> report.grid_error < 1e-6, report.border_error < 1e-6
        (True, True)

    Args:
        function: codes or images -> images.
        constant: the same at all places; it may differ between channels and between images.
        stride: s, the period to look for, in pixels of the output.
        margin: width in pixels of what counts as border; at least two periods must remain within. None: the
            greatest multiple of s within a quarter of the smaller side.

    Shape:
        constant: (B, C, h, w). function: -> (B, I, H, W), H and W divisible by s.

    Raises:
        ValueError: ``constant`` is not constant, or sizes do not fit stride and margin.
        TypeError: a tensor is not floating point.
    """
    require_rank("constant", constant, (4,), "(B, C, h, w)")
    require_floating("constant", constant)
    stride = require_int("stride", stride, 1)
    same = bool((constant == constant[..., :1, :1]).all())
    require(same, "constant", "the same at all places of a channel", "one that is not")
    output = function(constant)
    require_rank("function(constant)", output, (4,), "(B, I, H, W)")
    require_floating("function(constant)", output)
    height, width = output.shape[2:]
    fits = height % stride == 0 and width % stride == 0
    require(fits, "function(constant) sides", f"divisible by the stride {stride}", (height, width))
    if margin is None:
        margin = min(height, width) // 4 // stride * stride
    margin = require_int("margin", margin, 0)
    room = min(height, width) - 2 * margin >= 2 * stride
    require(room, "margin", f"one that leaves two periods of {stride} within {(height, width)}", margin)
    return _measure(output.cpu().double(), stride, margin)


def _measure(output: Tensor, stride: int, margin: int) -> ConstantImageReport:
    height, width = output.shape[2:]
    # A whole number of periods, so that every phase has the same weight in the mean.
    rows, columns = (slice(margin, margin + (side - 2 * margin) // stride * stride) for side in (height, width))
    inner = output[:, :, rows, columns]
    means = inner.mean((2, 3), keepdim=True)
    deviation = output - means
    cells = rearrange(deviation[:, :, rows, columns], "b i (u p) (v q) -> b i p q (u v)", p=stride, q=stride)
    # The interior starts at `margin`, the phases are counted from the corner of the image.
    phases = cells.mean(-1).roll((margin % stride, margin % stride), (-2, -1))
    residue = deviation - phases.repeat(1, 1, height // stride, width // stride)
    from_top, from_left = border_distances((height, width))
    distance = torch.minimum(from_top[:, None], from_left[None, :])
    ring = distance < margin
    profile = tuple(_rms(residue[..., distance == d]) for d in range(int(distance.max()) + 1))
    return ConstantImageReport(
        grid_error=_rms(phases),
        border_error=_rms(residue[..., ring]) if margin else 0.0,
        rest=_rms(residue[..., ~ring]),
        phases=phases.mean(0),
        profile=profile,
        deviation=deviation,
        stride=stride,
        margin=margin,
    )


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.square().mean()))
