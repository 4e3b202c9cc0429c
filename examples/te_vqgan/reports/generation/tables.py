"""The paper's tables from our results, each cell ours beside the paper's.

Ours are means over seeds, the standard deviation between seeds in brackets where there are several.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.te_vqgan.reports.document import Table
from examples.te_vqgan.reports.generation.paper import TABLE1, TABLE2, TABLE3, Printed
from examples.te_vqgan.stage1.perceptual import TITLES, measured_distances
from examples.te_vqgan.stage1.presets import ARMS
from examples.te_vqgan.stage2.rules import RULES, rule_title

__all__ = [
    "accuracies",
    "counted",
    "full_size",
    "generations",
    "mean",
    "quadrants",
    "read_right",
    "rules_table",
    "share",
    "shown_rule",
    "table1",
    "table2",
    "table3",
]

Run = Mapping[str, Any]

_CASES = ("quad1", "quad2", "quad3", "quad4")
# The paper's order, then what it lacks.
_ORDER = ("mb", "mp", "cb", "vqgan", "te_vqgan", *(arm for arm in ARMS if arm not in TABLE1))
# Our MB pads its pooling, the authors' code does not.
_ROW_NAMES = {"mb": "MB (padded)"}
_DASH = "–"


def shown_rule(results: Mapping[str, Any]) -> str:
    """Return the rule of decoding of tables that show one: that of most runs, of several the first in order."""
    images = _full(results)
    parts = [run["stage2"][str(images)] for run in results["runs"] if str(images) in run.get("stage2", {})]
    return max(RULES, key=lambda rule: sum(rule in part.get("rules", {}) for part in parts))


def generations(results: Mapping[str, Any], images: int, rule: str) -> dict[str, list[Run]]:
    """Return the runs of each arm, in the tables' order, whose GPT of that training size was measured so."""
    found = {
        arm: [
            run
            for run in results["runs"]
            if run["arm"] == arm and rule in run.get("stage2", {}).get(str(images), {}).get("rules", {})
        ]
        for arm in _ORDER
    }
    return {arm: runs for arm, runs in found.items() if runs}


def accuracies(
    runs: Iterable[Run], images: int, rule: str, task: str, case: str, split: str = "held_out"
) -> list[float]:
    """Return the digit accuracy of one case, a value a seed; none where the split or the task was not measured."""
    parts = (run["stage2"][str(images)]["rules"][rule].get(split, {}).get(task) for run in runs)
    rates = (part["cases"][case]["digit_accuracy"] for part in parts if part is not None)
    return [rate for rate in rates if rate is not None]


def full_size(results: Mapping[str, Any]) -> int | None:
    """Return the largest training set of a measured Stage 2, ``None`` if no GPT was measured."""
    return max(_sizes(results), default=None)


def table1(results: Mapping[str, Any], task: str) -> Table:
    """Digit accuracy by number of digits, over held-out combinations; and what bounds it.

    Args:
        results: as ``collect`` gives them, with a Stage 2.
        task: ``"text_to_image"`` or ``"image_to_text"``.
    """
    images, rule = _full(results), shown_rule(results)
    header = ["tokenizer", *(f"Quad{number}" for number in range(1, 5)), "centre", "seen, Quad1", "seen, Quad4"]
    if task == "text_to_image":
        header.append("read in reconstructions")
    rows = []
    for arm, runs in generations(results, images, rule).items():
        printed = TABLE1.get(arm, {}).get(task)
        cells = [
            _beside(accuracies(runs, images, rule, task, case), None if printed is None else printed[number])
            for number, case in enumerate(_CASES)
        ]
        cells.append(mean(accuracies(runs, images, rule, task, "centre")))
        cells += [mean(accuracies(runs, images, rule, task, case, "seen")) for case in ("quad1", "quad4")]
        if task == "text_to_image":
            cells.append(mean([read_right(run, "reconstruction") for run in runs if "reading" in run]))
        rows.append([_row_name(arm, runs), *cells])
    return Table(header, rows)


def table2(results: Mapping[str, Any]) -> Table | None:
    """Quad1 of text to image, largest and smallest training set; ``None`` if only one size was measured."""
    sizes, rule = sorted(_sizes(results), reverse=True), shown_rule(results)
    arms = ("vqgan", "te_vqgan")
    values = {
        (size, arm): accuracies(
            generations(results, size, rule).get(arm, []), size, rule, "text_to_image", "quad1"
        )
        for size in sizes
        for arm in arms
    }
    if len(sizes) < 2 or not any(values[sizes[-1], arm] for arm in arms):
        return None
    ends = sizes[0], sizes[-1]
    rows = []
    for size, printed_size in zip(ends, TABLE2, strict=True):
        printed = TABLE2[printed_size]
        cells = [_beside(values[size, arm], printed[arm]) for arm in arms]
        rows.append([f"{size:,} (paper: {printed_size:,})", *cells])
    differences = []
    for arm in arms:
        large, small = (values[size, arm] for size in ends)
        ours = _DASH if not large or not small else f"{statistics.fmean(large) - statistics.fmean(small):.3f}"
        largest, smallest = (printed[arm].mean for printed in TABLE2.values())
        differences.append(f"{ours} / {largest - smallest:.3f}")
    return Table(["training images", *(ARMS[arm].title for arm in arms)], [*rows, ["difference", *differences]])


def rules_table(results: Mapping[str, Any], task: str, cases: Sequence[str] = _CASES) -> Table | None:
    """Digit accuracy by rule of decoding, over all held-out digits of ``cases``, by default all in quadrants.

    ``None`` if there are not two rules under which the task was measured.
    """
    images = _full(results)
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for arm in _ORDER:
        parts = [run.get("stage2", {}).get(str(images), {}) for run in results["runs"] if run["arm"] == arm]
        measured = [part["rules"] for part in parts if part.get("rules")]
        if measured:
            arms[arm] = measured
    found = {name for runs in arms.values() for rules in runs for name in rules if task in rules[name]["held_out"]}
    if len(found) < 2:
        return None
    names = sorted(found, key=_place)
    rows = []
    for arm, runs in arms.items():
        held = {name: [rules[name]["held_out"] for rules in runs if name in rules] for name in names}
        cells = [
            mean([share(part[task]["cases"][case] for case in cases) for part in held[name] if task in part])
            for name in names
        ]
        rows.append([_row_name(arm, runs), *cells])
    return Table(["tokenizer", *(rule_title(name, task) for name in names)], rows)


def _row_name(arm: str, runs: Sequence[Any]) -> str:
    return f"{_ROW_NAMES.get(arm, ARMS[arm].title)}{counted(runs)}"


def _place(rule: str) -> tuple[int, int]:
    """Named rules in their order, numbers in theirs, all of the codes last."""
    if rule.isdigit():
        return 1, int(rule)
    return (2, 0) if rule == "all" else (0, RULES.index(rule))


def quadrants(generation: Mapping[str, Any], task: str) -> float:
    """Return the share of the held-out digits in quadrants that are right."""
    return share(generation["held_out"][task]["cases"][case] for case in _CASES)


def read_right(run: Run, what: str) -> float:
    """Return the share of the digits in all test images, or reconstructions, that the classifier reads right."""
    return share(run["reading"][what]["cases"].values())


def share(cases: Iterable[Mapping[str, Any]]) -> float:
    """Return the share of all digits of several cases that are right."""
    counts = [(int(case["digits_right"]), int(case["digits"])) for case in cases]
    return sum(right for right, _ in counts) / sum(digits for _, digits in counts)


def table3(results: Mapping[str, Any]) -> Table:
    """Code usage, reconstruction error and perceptual distances, by data set; a column for each distance.

    LPIPS always has its column, for the numbers of the paper; other distances have one where they were measured.
    """
    main = results["runs"][0]["settings"]["data"]
    groups = {main: results["runs"], **{name: part["runs"] for name, part in results.get("other", {}).items()}}
    arms = ("vqgan", "te_vqgan")
    shown = [run for runs in groups.values() for run in runs if run["arm"] in arms]
    others = [name for name in TITLES if name != "lpips" and _perceived(shown, name)]
    header = ["data, tokenizer", "codes used", "codes > 0.1 %", "reconstruction L1", "feature distance", "LPIPS"]
    header += [TITLES[name] for name in others]
    rows = []
    for data, runs in groups.items():
        for arm in arms:
            chosen = [run for run in runs if run["arm"] == arm]
            if not chosen:
                continue
            printed = TABLE3.get(data, {}).get(arm)
            codes, error, perceptual = printed or (_DASH, _DASH, _DASH)
            tests = [run["evaluation"]["test"] for run in chosen]
            readings = [run["reading"] for run in chosen if "reading" in run]
            cells = [
                f"{mean([test['used_codes'] for test in tests], '.0f')} / {codes}",
                mean([test["frequent_codes"] for test in tests], ".0f"),
                f"{mean([test['l1'] for test in tests], '.4f')} / {error}",
                mean([one["feature_distance"] for one in readings], ".4f"),
                f"{mean(_perceived(chosen, 'lpips'), '.4f')} / {perceptual}",
                *(mean(_perceived(chosen, name), ".4f") for name in others),
            ]
            rows.append([f"{data}, {ARMS[arm].title}{counted(chosen)}", *cells])
    return Table(header, rows)


def _perceived(runs: Sequence[Run], name: str) -> list[float]:
    """Return the perceptual distance called ``name`` of each run in which it was measured."""
    measured = [measured_distances(run["reading"]) for run in runs if "reading" in run]
    return [distances[name] for distances in measured if name in distances]


def _sizes(results: Mapping[str, Any]) -> set[int]:
    parts = (item for run in results["runs"] for item in run.get("stage2", {}).items())
    return {int(size) for size, part in parts if part.get("rules")}


def _full(results: Mapping[str, Any]) -> int:
    images = full_size(results)
    if images is None:
        raise ValueError("results must hold a measured Stage 2, got none.")
    return images


def counted(runs: Sequence[Run]) -> str:
    """Name the number of seeds where it is smaller than the three that are meant to be."""
    return "" if len(runs) >= 3 else f", {len(runs)} seed{'s' if len(runs) > 1 else ''}"


def _beside(values: Sequence[float], printed: Printed | None) -> str:
    paper = _DASH if printed is None else f"{printed.mean:.3f} ({printed.deviation:.3f})"
    return f"{mean(values)} / {paper}"


def mean(values: Sequence[float], pattern: str = ".3f") -> str:
    """Write the mean over seeds, with the standard deviation in brackets if they are several."""
    if not values:
        return _DASH
    text = format(statistics.fmean(values), pattern)
    return text if len(values) == 1 else f"{text} ({format(statistics.stdev(values), pattern)})"
