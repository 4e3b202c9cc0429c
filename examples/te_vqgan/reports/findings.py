"""What a comparison showed, in sentences made from its numbers and from nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from examples.te_vqgan.reports.inference import welch
from examples.te_vqgan.reports.results import METRICS, Metric, by_arm, values_of
from te_quant import EquivarianceReport

__all__ = ["findings"]

Runs = Sequence[Mapping[str, Any]]


def findings(results: Mapping[str, Any]) -> list[str]:
    """Compare every arm with the first one.

    Two agreements of single trainings whose 95 % intervals overlap are not told apart.
    """
    groups = by_arm(results["runs"])
    (base, base_runs), *others = groups.items()
    sentences = [sentence for title, runs in others for sentence in _compare(title, runs, base, base_runs)]
    fewest = min(len(runs) for runs in groups.values())
    if not others:
        sentences.append(f"Only {base} is finished, so nothing is compared.")
    elif fewest == 1:
        sentences.append("At least one arm has a single seed, so its spread between seeds is not known.")
    else:
        sentences.append(
            f"Means over at least {fewest} seeds per arm; ± is the standard deviation between seeds, behind a "
            "difference its standard error."
        )
    return sentences


def _compare(title: str, runs: Runs, base: str, base_runs: Runs) -> list[str]:
    sentences = [
        f"{_versus('l1', title, runs, base, base_runs)}; PSNR {_pair('psnr', runs, base_runs)} dB.",
        f"{title}: codes used at least once {_pair('used', runs, base_runs)}; above 0.1 % of use "
        f"{_pair('frequent', runs, base_runs)}; perplexity {_pair('perplexity', runs, base_runs)} "
        f"(over {runs[0]['evaluation']['test']['images']:,} test images); "
        f"mean |cosine| of two used codes {_pair('cosine', runs, base_runs)}.",
    ]
    gains: dict[str, float] = {}
    for name in ("placement", "sub_stride"):
        overlap = _overlap(name, runs, base_runs)
        if overlap is not None:
            sentences.append(
                f"{title} and {base} cannot be told apart by their {_NOUNS[name]}: the 95 % intervals over test "
                f"digits overlap ({overlap}); {_kappa(METRICS[name], runs, base_runs)}."
            )
            continue
        sentences.append(
            f"{_versus(name, title, runs, base, base_runs)}; {_kappa(METRICS[name], runs, base_runs)}."
        )
        gains[name] = _difference(METRICS[name].kappa, runs, base_runs)
    fewer = _mean("perplexity", runs) < _mean("perplexity", base_runs)
    more_equal = [name for name in gains if _mean(name, runs) > _mean(name, base_runs)]
    if fewer and more_equal:
        corrected = [name for name in more_equal if gains[name] > 0]
        words = " and ".join(_WORDS[name] for name in more_equal)
        verdict = (
            "stays higher" if len(corrected) == len(more_equal)
            else "is higher only for " + _WORDS[corrected[0]] if corrected
            else "is not higher"
        )  # fmt: skip
        sentences.append(
            f"{title} agrees more often in {words} but with fewer effective codes, which alone makes tokens agree "
            f"more often; corrected for chance (κ), its agreement {verdict}. Whether the smaller effective "
            "codebook or the other differences (listed below) are the cause, this comparison cannot say."
        )
    return sentences


def _overlap(name: str, runs: Runs, base_runs: Runs) -> str | None:
    """Write both rates with their intervals if these overlap; ``None`` if not, or if both arms have several seeds.

    Without a second seed the spread over test digits is the only noise that is known, and it is a lower bound.
    """
    if len(runs) > 1 and len(base_runs) > 1:
        return None
    reports = [EquivarianceReport.from_dict(group[0]["evaluation"]["equivariance"]) for group in (runs, base_runs)]
    ours, theirs = (report.agreements()[name] for report in reports)
    (low, high), (base_low, base_high) = ours.rate_interval, theirs.rate_interval
    if ours.rate == theirs.rate or not (low <= base_high and base_low <= high):
        return None
    return " against ".join(
        f"{agreement.rate:.3f} [{agreement.rate_interval[0]:.3f}, {agreement.rate_interval[1]:.3f}]"
        for agreement in (ours, theirs)
    )


_WORDS = {"placement": "placement", "sub_stride": "shifts below a token"}
_NOUNS = {
    "l1": "reconstruction error (L1)",
    "placement": "placement agreement",
    "sub_stride": "agreement after shifts below a token",
}


def _mean(name: str, runs: Runs) -> float:
    return statistics.fmean(values_of(METRICS[name], runs))


def _versus(name: str, title: str, runs: Runs, base: str, base_runs: Runs) -> str:
    pattern = METRICS[name].format
    ours, theirs = _mean(name, runs), _mean(name, base_runs)
    numbers = f"{format(ours, pattern)} against {format(theirs, pattern)}"
    gap = format(abs(ours - theirs), pattern)
    if math.isnan(ours) or math.isnan(theirs) or float(gap) == 0:
        return f"{title} and {base} have the same {_NOUNS[name]} to the digits shown ({numbers})"
    direction = "higher" if ours > theirs else "lower"
    if len(runs) > 1 and len(base_runs) > 1:
        error = welch(values_of(METRICS[name], runs), values_of(METRICS[name], base_runs)).error
        gap += f" ± {format(error, pattern)}"
    return f"{title} has a {direction} {_NOUNS[name]} than {base}, by {gap} ({numbers})"


def _pair(name: str, runs: Runs, base_runs: Runs) -> str:
    pattern = METRICS[name].format
    return f"{format(_mean(name, runs), pattern)} against {format(_mean(name, base_runs), pattern)}"


def _kappa(metric: Metric, runs: Runs, base_runs: Runs) -> str:
    ours, theirs = (_kappa_mean(metric.kappa, group) for group in (runs, base_runs))
    return f"κ {_number(ours)} against {_number(theirs)}"


def _kappa_mean(read: Any, runs: Runs) -> float:
    return statistics.fmean(read(run["evaluation"]) for run in runs)


def _difference(read: Any, runs: Runs, base_runs: Runs) -> float:
    return _kappa_mean(read, runs) - _kappa_mean(read, base_runs)


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"
