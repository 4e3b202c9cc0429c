"""t tests against their formulas with integrated densities, Holm's correction against examples by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from examples.te_vqgan.reports.inference import holm, paired_t, welch
from tests.helpers import exactly, numpy_generator


def _tail(statistic: float, degrees: float) -> float:
    """The two-sided p value: twice the area of the t density beyond ``statistic``.

    With t = √ν tan θ the density becomes a constant times cos^(ν - 1) θ, whose integral Gauss and Legendre give.
    """
    low, high = math.atan(statistic / math.sqrt(degrees)), math.pi / 2
    nodes, weights = np.polynomial.legendre.leggauss(200)
    angles = (high - low) / 2 * nodes + (high + low) / 2
    area = (high - low) / 2 * np.sum(weights * np.cos(angles) ** (degrees - 1))
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2
    return 2 * float(area) * math.exp(scale)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_a_paired_test_follows_its_formulas(n: int) -> None:
    """Mean, standard error, p value and interval; at the ends of the interval p would be .05."""
    values = numpy_generator().normal(0.3, 1.0, n).tolist()
    mean = sum(values) / n
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    test = paired_t(values)
    assert test.degrees == n - 1
    assert test.mean == pytest.approx(mean, rel=1e-12)
    assert test.error == pytest.approx(error, rel=1e-12)
    assert test.statistic == pytest.approx(mean / error, rel=1e-12)
    assert test.p == pytest.approx(_tail(abs(mean) / error, n - 1), rel=1e-9)
    assert sum(test.interval) / 2 == pytest.approx(mean, rel=1e-9)
    assert _tail((test.interval[1] - mean) / error, n - 1) == pytest.approx(0.05, rel=1e-9)


def test_known_tails() -> None:
    """One degree of freedom has the arctangent, two a root: p = 1 - t / √(2 + t²)."""
    assert paired_t([0.0, 2.0]).p == pytest.approx(1 - 2 / math.pi * math.atan(1.0))
    statistic = paired_t([1.0, 2.0, 4.0]).statistic
    assert paired_t([1.0, 2.0, 4.0]).p == pytest.approx(1 - statistic / math.sqrt(2 + statistic**2))


def test_the_sign_of_differences_changes_no_p_value() -> None:
    """Two-sided."""
    values = [0.1, 0.3, -0.05, 0.2]
    assert paired_t(values).p == paired_t([-value for value in values]).p


@pytest.mark.parametrize("sizes", [(3, 3), (2, 5)])
def test_welch_follows_its_formulas(sizes: tuple[int, int]) -> None:
    """Unequal variances and sizes; the degrees are those of Welch and Satterthwaite.

    Of degrees that are no whole number the oracle's integral is known to fewer digits.
    """
    generator = numpy_generator()
    first = generator.normal(0.0, 1.0, sizes[0]).tolist()
    second = generator.normal(0.5, 0.2, sizes[1]).tolist()
    shares = [float(np.var(values, ddof=1)) / len(values) for values in (first, second)]
    error = math.sqrt(sum(shares))
    degrees = sum(shares) ** 2 / sum(share**2 / (n - 1) for share, n in zip(shares, sizes, strict=True))
    test = welch(first, second)
    mean = float(np.mean(first) - np.mean(second))
    assert test.mean == pytest.approx(mean, rel=1e-12)
    assert test.error == pytest.approx(error, rel=1e-12)
    assert test.degrees == pytest.approx(degrees, rel=1e-12)
    assert test.p == pytest.approx(_tail(abs(mean) / error, degrees), rel=1e-6)


def test_values_that_do_not_vary_are_certain() -> None:
    """No spread leaves no doubt, and no difference leaves no effect."""
    assert paired_t([0.0, 0.0]).p == 1
    assert paired_t([0.25, 0.25]) == (0.25, 0.0, 1, 0.0, (0.25, 0.25))
    assert paired_t([-0.25, -0.25]).statistic == -math.inf
    assert welch([1.0, 1.0], [1.0, 1.0]).p == 1


def test_one_value_is_refused() -> None:
    """It has no spread."""
    with pytest.raises(ValueError, match=exactly("values must be at least two, one per seed, got 1.")):
        paired_t([0.5])
    with pytest.raises(ValueError, match=exactly("values must be at least two, one per seed, got 1.")):
        welch([0.5, 0.6], [0.5])


@pytest.mark.parametrize(
    ("raw", "corrected"),
    [
        # 4 x .005, 3 x .01, 2 x .03, 1 x .04: the last may not fall below the one before.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.01, 0.01], [0.03, 0.03, 0.03]),
        ([0.6, 0.4], [0.8, 0.8]),
        ([0.2], [0.2]),
        ([0.5, 0.9, 0.7], [1.0, 1.0, 1.0]),
        ([], []),
    ],
)
def test_holm_by_hand(raw: list[float], corrected: list[float]) -> None:
    """In the order of the input."""
    assert holm(raw) == pytest.approx(corrected)


def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni() -> None:
    """Monotone, at least raw, at most n times raw, invariant to the order of its input."""
    generator = numpy_generator()
    for _ in range(50):
        raw = generator.uniform(0, 1, 7) ** 3
        corrected = np.array(holm(raw.tolist()))
        assert (raw <= corrected).all()
        assert (corrected <= np.minimum(1, 7 * raw) + 1e-12).all()
        assert all(first <= second for first, second in pairwise(corrected[np.argsort(raw)]))
        assert corrected.min() == pytest.approx(min(1.0, 7 * raw.min()))
        order = generator.permutation(7)
        assert holm(raw[order].tolist()) == pytest.approx(corrected[order].tolist())


def test_holm_rejects_what_its_procedure_rejects() -> None:
    """Step down: compare the smallest with α / n, the next with α / (n - 1), and stop at the first that fails."""
    generator = numpy_generator()
    for _ in range(50):
        raw = generator.uniform(0, 0.1, 7).tolist()
        rejected = set()
        for rank, place in enumerate(np.argsort(raw)):
            if raw[place] >= 0.05 / (7 - rank):
                break
            rejected.add(int(place))
        assert {place for place, value in enumerate(holm(raw)) if value < 0.05} == rejected
