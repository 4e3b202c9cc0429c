"""From the results of the confirmatory runs to tests and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from examples.te_vqgan.reports.generation.tables import quadrants
from examples.te_vqgan.reports.hypotheses.plan import (
    COMPARISONS,
    LEAST_CLASSIFIER,
    RULES,
    STATEMENTS,
    TASKS,
    Comparison,
    Group,
    planned_groups,
)
from examples.te_vqgan.reports.inference import TTest, holm, paired_t
from examples.te_vqgan.runs.checks import require

__all__ = [
    "LEVEL",
    "Outcomes",
    "Result",
    "classifier_accuracy",
    "compared",
    "missing_runs",
    "outcomes",
    "verdict",
    "verdicts",
]

LEVEL = 0.05
"""A corrected p value below this decides."""

_CASES = ("quad1", "quad2", "quad3", "quad4")


class Outcomes(NamedTuple):
    """Digit accuracy over all quadrants under one rule, in one task.

    Attributes:
        values: by group, then by seed.
    """

    values: Mapping[Group, Mapping[int, float]]

    def differences(self, comparison: Comparison) -> dict[int, float]:
        """Return the difference of each planned seed whose runs are all there."""
        groups = [self.values.get(group, {}) for _, group in comparison.terms]
        found: dict[int, float] = {}
        for seed in comparison.seeds:
            if all(seed in group for group in groups):
                signs = (sign for sign, _ in comparison.terms)
                found[seed] = sum(sign * group[seed] for sign, group in zip(signs, groups, strict=True))
        return found


class Result(NamedTuple):
    """A comparison with its test.

    Attributes:
        comparison: what was compared.
        differences: by seed.
        test: two-sided paired t test of the differences.
        corrected: its p value after Holm's correction over the rule's comparisons.
    """

    comparison: Comparison
    differences: Mapping[int, float]
    test: TTest
    corrected: float


def outcomes(results: Mapping[str, Any], rule: str, task: str) -> Outcomes:
    """Read the outcome of every planned run that was measured under ``rule``.

    Args:
        results: as in ``results.json``.
        rule: name of a decoding rule.
        task: ``"text_to_image"`` or ``"image_to_text"``.

    Raises:
        ValueError: two runs were measured on different numbers of digits.
    """
    values: dict[Group, dict[int, float]] = {}
    digits: dict[tuple[int, ...], str] = {}
    for group, seeds in planned_groups().items():
        for run in results["runs"]:
            rules = run.get("stage2", {}).get(str(group.images), {}).get("rules", {})
            # A rule may have been measured in one task only.
            held_out = rules.get(rule, {}).get("held_out", {})
            if run["arm"] != group.arm or run["seed"] not in seeds or task not in held_out:
                continue
            cases = held_out[task]["cases"]
            digits.setdefault(tuple(cases[case]["digits"] for case in _CASES), _name(group, run["seed"]))
            values.setdefault(group, {})[run["seed"]] = quadrants(rules[rule], task)
    require(
        len(digits) < 2, "digits", "the same for every run", " and ".join(f"{n} in {r}" for n, r in digits.items())
    )
    return Outcomes(values)


def missing_runs(results: Mapping[str, Any]) -> list[str]:
    """Name each planned run that is not there, or not measured under a rule in both tasks."""
    found = {rule: [outcomes(results, rule, task).values for task in TASKS] for rule in RULES}
    missing = []
    for group, seeds in planned_groups().items():
        for seed in seeds:
            rules = [rule for rule in RULES if any(seed not in one.get(group, {}) for one in found[rule])]
            if rules:
                missing.append(f"{_name(group, seed)} (rule {' and '.join(rules)})")
    return missing


def compared(results: Mapping[str, Any], rule: str) -> list[Result]:
    """Test every comparison under ``rule`` and correct the p values for their number.

    Raises:
        ValueError: a planned run is missing, or the classifier reads too few digits.
    """
    missing = missing_runs(results)
    require(not missing, "results", "those of every planned run", f"none of {'; '.join(missing)}")
    read = classifier_accuracy(results)
    require(
        read is not None and read >= LEAST_CLASSIFIER,
        "classifier",
        f"one that reads at least {100 * LEAST_CLASSIFIER:g} % of the test digits",
        "none" if read is None else f"{100 * read:.2f} %",
    )
    differences = [outcomes(results, rule, one.task).differences(one) for one in COMPARISONS]
    tests = [paired_t(list(one.values())) for one in differences]
    corrected = holm([test.p for test in tests])
    return [Result(*parts) for parts in zip(COMPARISONS, differences, tests, corrected, strict=True)]


def verdict(results: Sequence[Result]) -> str:
    """Judge a hypothesis by all of its comparisons: ``"confirmed"``, ``"contradicted"`` or ``"not resolved"``."""
    certain = [one.corrected < LEVEL for one in results]
    stated = [one.comparison.sign * one.test.mean > 0 for one in results]
    opposite = [one.comparison.sign * one.test.mean < 0 for one in results]
    if all(sure and right for sure, right in zip(certain, stated, strict=True)):
        return "confirmed"
    if any(sure and wrong for sure, wrong in zip(certain, opposite, strict=True)):
        return "contradicted"
    return "not resolved"


def verdicts(results: Sequence[Result]) -> dict[str, str]:
    """Judge every hypothesis."""
    return {name: verdict([one for one in results if one.comparison.hypothesis == name]) for name in STATEMENTS}


def classifier_accuracy(results: Mapping[str, Any]) -> float | None:
    """Return the share of test digits that the classifier reads, if that is known."""
    evaluation = results.get("classifier", {}).get("evaluation")
    return None if evaluation is None else float(evaluation["test"]["digit_accuracy"])


def _name(group: Group, seed: int) -> str:
    return f"{group.arm} seed {seed} with {group.images:,} images"
