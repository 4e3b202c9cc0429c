"""t tests on values per seed, and Holm's correction of several p values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from examples.te_vqgan.runs.checks import require

__all__ = ["TTest", "holm", "paired_t", "welch"]


class TTest(NamedTuple):
    """A mean, or a difference of means, held against zero.

    Attributes:
        mean: the estimate.
        error: its standard error.
        degrees: degrees of freedom of the t distribution.
        p: two-sided; 1 for a mean of zero and 0 for any other where the values do not vary.
        interval: 95 % interval of the mean from the same t distribution.
    """

    mean: float
    error: float
    degrees: float
    p: float
    interval: tuple[float, float]

    @property
    def statistic(self) -> float:
        """How many standard errors the mean is from zero."""
        return self.mean / self.error if self.error else math.copysign(math.inf, self.mean) if self.mean else 0.0


def paired_t(differences: Sequence[float]) -> TTest:
    """Test whether the mean of paired differences is zero, with n - 1 degrees of freedom.

    Raises:
        ValueError: there are fewer than two differences.

    Source: Student 1908, "The probable error of a mean".
    """
    _require_two(differences)
    n = len(differences)
    return _test(statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n), n - 1)


def welch(first: Sequence[float], second: Sequence[float]) -> TTest:
    """Test whether two means differ, without pairs and without equal variances.

    Returns:
        The test of the mean of ``first`` less that of ``second``.

    Raises:
        ValueError: one of them has fewer than two values.

    Source: Welch 1947, "The generalization of Student's problem when several different population variances are
        involved".
    """
    shares = []
    for values in (first, second):
        _require_two(values)
        shares.append((statistics.variance(values) / len(values), len(values) - 1))
    squared = sum(share for share, _ in shares)
    # Of constants any number of degrees will do.
    degrees = squared**2 / sum(share**2 / less for share, less in shares) if squared else 1.0
    return _test(statistics.fmean(first) - statistics.fmean(second), math.sqrt(squared), degrees)


def holm(values: Sequence[float]) -> list[float]:
    """Correct p values for their number by Holm's step-down procedure.

    Returns:
        The corrected values in the order of ``values``; each is the smallest level at which Holm's procedure
        rejects its hypothesis, at most 1.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def _test(mean: float, error: float, degrees: float) -> TTest:
    from scipy import stats

    if error == 0:
        return TTest(mean, error, degrees, float(mean == 0), (mean, mean))
    p = 2 * float(stats.t.sf(abs(mean) / error, degrees))
    half = float(stats.t.ppf(0.975, degrees)) * error
    return TTest(mean, error, degrees, p, (mean - half, mean + half))


def _require_two(values: Sequence[float]) -> None:
    require(len(values) > 1, "values", "at least two, one per seed", len(values))
