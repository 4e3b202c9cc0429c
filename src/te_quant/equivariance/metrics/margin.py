"""Why indices survive a shift: how far latents are from the next code, and how far they move.

A latent vector keeps its code as long as it moves by less than its margin r, the distance to the nearest wall of
the code's Voronoi cell. So the share of tokens that move by δ < r is certified to keep its index, whatever the
direction, and bounds the aligned agreement from below.

Shape letters: B batch, N latent vectors, C latent channels, K codes, h w token grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from te_quant._checks import (
    require,
    require_axis,
    require_device,
    require_floating,
    require_integer_tensor,
    require_rank,
)
from te_quant._measuring.bootstrap import (
    NO_INTERVAL,
    ImageSums,
    Interval,
    Resamples,
    percentile_place,
)
from te_quant._measuring.float64 import float64
from te_quant._measuring.text import with_interval
from te_quant._values import require_in_range
from te_quant.tables import Table, Tabular

__all__ = ["MARGIN_LABELS", "Margin", "MarginTally", "Spread", "code_margins"]

# Elements of the largest temporary beside a copy of the codebook: 32 MiB of float64.
_MOST_ELEMENTS = 2**22
# Rounding moves a few near-ties; another codebook or another metric moves far more.
_MOST_MISPLACED = 0.05


# Share of the largest squared norm below which the squared distance of two codes is not taken from products;
# above, float64 leaves it nine correct digits.
_CLOSE = 1e-6


@dataclass(frozen=True)
class Spread(Tabular):
    """Percentiles of a quantity over tokens; order statistics, so inf may be among them.

    Attributes:
        low: 5 %.
        median: 50 %.
        high: 95 %.
        median_interval: 95 % confidence interval of the median, by percentile bootstrap over images; NaN for fewer
            than two images, without resamples, and in reports from before it was measured.
    """

    low: float
    median: float
    high: float
    median_interval: Interval = NO_INTERVAL

    @classmethod
    def of(cls, values: Tensor, resamples: Resamples | None = None) -> Spread:
        """Take the percentiles of any number of values; NaN without any.

        Args:
            values: of any shape; one row an image where there are ``resamples``.
            resamples: for the interval of the median.
        """
        if values.numel() == 0:
            return cls(math.nan, math.nan, math.nan)
        ordered = values.flatten().sort().values
        low, median, high = (float(ordered[percentile_place(s, len(ordered))]) for s in (0.05, 0.5, 0.95))
        return cls(low, median, high, NO_INTERVAL if resamples is None else resamples.interval_of_median(values))

    def text(self) -> str:
        """Write the median with its interval, and the outer percentiles in parentheses."""
        return f"{with_interval(self.median, self.median_interval, '.3g')} ({self.low:.3g} to {self.high:.3g})"

    def summary(self) -> Table:
        """Return the three percentiles."""
        median = with_interval(self.median, self.median_interval, ".3g")
        return Table(["5 %", "median", "95 %"], [[f"{self.low:.3g}", median, f"{self.high:.3g}"]], "rrr")


MARGIN_LABELS = (
    "certified rate (moves less than its margin)",
    "margin, median (5 % to 95 %)",
    "movement under whole-token shifts, median (5 % to 95 %)",
    "movement / margin, median (5 % to 95 %)",
)


@dataclass(frozen=True)
class Margin(Tabular):
    """How far tokens are from another code, and how far a shift by whole tokens moves them.

    Attributes:
        certified_rate: C, share of token pairs with δ < r; never above the aligned agreement of the same pairs.
        certified_interval: its 95 % confidence interval, by percentile bootstrap over images.
        margin: r of the tokens of the reference images, in the unit of the latents.
        movement: δ of all pairs, in the same unit.
        ratio: δ / r of all pairs; below 1 is certified.
        contradictions: certified pairs whose indices differ all the same: 0, unless ``tokenize`` and ``latents``
            disagree by rounding about where a token lies.
        tokens: number of pairs.
    """

    certified_rate: float
    certified_interval: Interval
    margin: Spread
    movement: Spread
    ratio: Spread
    contradictions: int
    tokens: int

    def texts(self) -> dict[str, str]:
        """Write the certified rate and the three spreads, by their labels in tables."""
        return dict(zip(MARGIN_LABELS, (self.certified_text(), *map(Spread.text, self._spreads())), strict=True))

    def certified_text(self) -> str:
        """Write the certified rate with its interval."""
        return with_interval(self.certified_rate, self.certified_interval)

    def summary(self) -> Table:
        """Return the certified rate, the three spreads, and the contradictions if there are any."""
        rows = [[label, text] for label, text in self.texts().items()]
        if self.contradictions:
            rows.append(["certified, yet the indices differ (rounding)", f"{self.contradictions:,}"])
        return Table(["margin", "value"], rows)

    def _spreads(self) -> tuple[Spread, Spread, Spread]:
        return self.margin, self.movement, self.ratio


def code_margins(latents: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """Distance of each latent vector from the nearest wall of the Voronoi cell of its code.

    Computes min over j ≠ c of (‖z - e_j‖² - ‖z - e_c‖²) / (2‖e_j - e_c‖) in float64, in blocks, so that neither an
    N x K x C nor an N x K tensor is built; close codes lose no accuracy.

    Args:
        latents: z, before quantization.
        codebook: all codes. For cosine similarity normalize both first.
        indices: c of each vector, its nearest code in L2.

    Shape:
        latents: (N, C). codebook: (K, C). indices: (N,). Returns (N,) float64, on the CPU if the device of the
        latents has none: negative where another code is nearer than c, inf where there is no other.

    Note:
        Exact copies of code c form no wall: whichever of them is chosen by the same rule every time (the lowest
        index, in this library), it is chosen for all latents of their common cell. They are left out.

    Example:
        >>> code_margins(torch.tensor([[0.25]]), torch.tensor([[0.0], [2.0]]), torch.tensor([0]))
        tensor([0.7500], dtype=torch.float64)

    Raises:
        ValueError: a shape or device does not fit, or an index lies outside [0, K).
        TypeError: latents or codebook are not floating point, or indices not integer.

    Source: the distance of a point from the bisector of two others.
    """
    for name, tensor in (("latents", latents), ("codebook", codebook)):
        require_rank(name, tensor, (2,), "(N, C)" if name == "latents" else "(K, C)")
        require_floating(name, tensor)
    require_axis("latents", latents, 1, codebook.shape[1], "codebook axis 1")
    require_integer_tensor("indices", indices)
    require_rank("indices", indices, (1,), "(N,)")
    require_axis("indices", indices, 0, latents.shape[0], "N")
    for name, tensor in (("latents", latents), ("indices", indices)):
        require_device(name, tensor, codebook.device, "codebook")
    indices = require_in_range("indices", indices.long(), codebook.shape[0], "K")
    # Around the centre of the codes the products below cancel least.
    exact = float64(codebook)
    latents, indices = latents.to(exact.device), indices.to(exact.device)
    centre = exact.mean(dim=0)
    codes = exact - centre
    norms = codes.square().sum(dim=1)
    margins = torch.full((len(latents),), math.inf, dtype=torch.float64, device=latents.device)
    # In the order of the codes, a block of latents needs the distances of few codes.
    for rows in torch.split(indices.argsort(), max(1, _MOST_ELEMENTS // len(codes))):
        z, (used, own) = latents[rows].double() - centre, torch.unique(indices[rows], return_inverse=True)
        squares = norms[used].unsqueeze(1) + norms - 2 * codes[used] @ codes.T
        # Code c itself is among them.
        close = squares <= _CLOSE * norms.max()
        walls = norms - 2 * z @ codes.T
        walls = walls - walls.gather(1, used[own].unsqueeze(1))
        walls = walls / (2 * squares.clamp_min(0).sqrt())[own]
        margins[rows] = walls.masked_fill_(close[own], math.inf).amin(dim=1)
        for position in (close.sum(dim=1) > 1).nonzero().flatten().tolist():
            members = rows[own == position]
            c = exact[used[position]]
            near = _close_walls(latents[members].double() - c, exact[close[position]] - c)
            margins[members] = torch.minimum(margins[members], near)
    return margins


def _close_walls(away: Tensor, to_others: Tensor) -> Tensor:
    """The same by differences, which codes close to each other need.

    Shape:
        away: z - e_c, (N, C). to_others: e_j - e_c, (J, C), zero for copies. Returns (N,).
    """
    distance = to_others.norm(dim=1)
    others = distance > 0
    if not others.any():
        return torch.full_like(away[:, 0], math.inf)
    to_others, distance = to_others[others], distance[others]
    # With y = z - e_c and d = e_j - e_c the definition is ‖d‖/2 - y·d/‖d‖.
    walls: Tensor = distance / 2 - away @ (to_others / distance.unsqueeze(1)).T
    return walls.amin(dim=1)


class MarginTally:
    """Margins and movements over all images.

    Keeps two float32 for every pair, for the percentiles; each list has an entry a batch, (B, ·).

    Args:
        codebook: all codes.

    Shape:
        codebook: (K, C).
    """

    def __init__(self, codebook: Tensor) -> None:
        self._codebook = codebook
        self._sums = ImageSums()
        self._margins: list[Tensor] = []
        self._movements: list[Tensor] = []
        self._ratios: list[Tensor] = []
        # Those of the batch under way, (B, ·) a shift.
        self._moved: list[tuple[Tensor, Tensor]] = []

    def margins(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Return r of the reference images.

        Shape:
            latents: (B, C, h, w). tokens: (B, h, w). Returns (B, h, w) float64.

        Raises:
            ValueError: ``tokens`` are not the nearest codes.
        """
        require_axis("latents(images)", latents, 1, self._codebook.shape[1], "codebook axis 1")
        vectors = latents.movedim(1, -1)
        codebook = self._codebook.to(latents.device)
        margins = code_margins(vectors.flatten(0, 2), codebook, tokens.flatten()).reshape(tokens.shape)
        misplaced = float((margins < 0).double().mean())
        require(
            misplaced <= _MOST_MISPLACED,
            "codebook",
            "such that tokenize(images) is the code nearest to latents(images) in L2",
            f"another code at {misplaced:.1%} of the tokens",
        )
        self._margins.append(margins.float().cpu().flatten(1))
        return margins

    def add(self, margins: Tensor, movement: Tensor, kept: Tensor) -> None:
        """Take in one shift of the images of this batch.

        Args:
            margins: r where both are valid.
            movement: shifted back minus reference latents, there.
            kept: equal indices, there.

        Shape:
            margins, kept: (B, h, w). movement: (B, C, h, w).
        """
        delta = float64(movement).norm(dim=1)
        certified, kept = delta < margins, kept.to(margins.device)
        self._sums.add(
            certified.flatten(1).sum(1),
            (certified & ~kept).flatten(1).sum(1),
            torch.full((len(margins),), margins[0].numel(), device=margins.device),
        )
        # A vector on a wall, or beyond it, has nothing left to lose.
        ratio = torch.where(margins > 0, delta / margins, torch.inf)
        self._moved.append((delta.float().cpu().flatten(1), ratio.float().cpu().flatten(1)))

    def close(self) -> None:
        """End the batch; what is added next belongs to other images."""
        self._sums.close()
        if self._moved:
            movements, ratios = zip(*self._moved, strict=True)
            self._movements.append(torch.cat(movements, dim=1))
            self._ratios.append(torch.cat(ratios, dim=1))
            self._moved = []

    def margin(self, resamples: Resamples) -> Margin:
        """Return the percentiles and the certified rate, with intervals."""
        certified, contradictions, tokens = (float(value) for value in self._sums.total[0])
        return Margin(
            certified_rate=certified / tokens if tokens else math.nan,
            certified_interval=resamples.interval_of_sums(self._sums.rows, lambda sums: sums[:, 0] / sums[:, 2]),
            margin=Spread.of(torch.cat(self._margins), resamples),
            movement=Spread.of(torch.cat(self._movements), resamples),
            ratio=Spread.of(torch.cat(self._ratios), resamples),
            contradictions=int(contradictions),
            tokens=int(tokens),
        )
