"""From the results of the confirmatory runs to tests and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    for group, seed, measured in _measured(results, rule):
        # A rule may have been measured in one task only.
        if task in measured["held_out"]:
            cases = measured["held_out"][task]["cases"]
            digits.setdefault(tuple(cases[case]["digits"] for case in _CASES), _name(group, seed))
            values.setdefault(group, {})[seed] = quadrants(measured, task)
    _require_one("digits", digits)
    return Outcomes(values)


def missing_runs(results: Mapping[str, Any]) -> list[str]:
    """Name each planned run that is not there, or not measured under a rule in both tasks."""
    found = {rule: [outcomes(results, rule, task).values for task in TASKS] for rule in RULES}
    missing = []
    for group, planned in planned_groups().items():
        seeds: dict[str, list[int]] = {}
        for seed in planned:
            rules = [rule for rule in RULES if any(seed not in one.get(group, {}) for one in found[rule])]
            if rules:
                seeds.setdefault(" and ".join(rules), []).append(seed)
        missing += [f"{_name(group, *some)} (rule {rules})" for rules, some in seeds.items()]
    return missing


def compared(results: Mapping[str, Any], rule: str) -> list[Result]:
    """Test every comparison under ``rule`` and correct the p values for their number.

    Raises:
        ValueError: a planned run is missing, the classifier reads too few digits, or there were several.
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
    # By the hash of its weights, where an evaluation has recorded it.
    runs = (
        (group, seed, measured.get("classifier"))
        for one in RULES
        for group, seed, measured in _measured(results, one)
    )
    _require_one("classifier", {hashed: _name(group, seed) for group, seed, hashed in runs})
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


def _measured(results: Mapping[str, Any], rule: str) -> Iterator[tuple[Group, int, Mapping[str, Any]]]:
    """Give what was measured of each planned run under ``rule``, if it was."""
    for group, seeds in planned_groups().items():
        for run in results["runs"]:
            rules = run.get("stage2", {}).get(str(group.images), {}).get("rules", {})
            if run["arm"] == group.arm and run["seed"] in seeds and rule in rules:
                yield group, run["seed"], rules[rule]


def _require_one(name: str, found: Mapping[Any, str]) -> None:
    different = " and ".join(f"{value} in {run}" for value, run in found.items())
    require(len(found) < 2, name, "the same for every run", different)


def _name(group: Group, *seeds: int) -> str:
    numbers = ", ".join(map(str, seeds))
    return f"{group.arm} seed{'s' if len(seeds) > 1 else ''} {numbers} with {group.images:,} images"
