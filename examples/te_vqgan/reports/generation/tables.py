"""The paper's tables from our results, each cell ours beside the paper's.

Ours are means over seeds, the standard deviation between seeds in brackets where there are several.
"""

from __future__ import annotations

import statistics
from collections import Counter
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
_DASH = "–"


def shown_rule(results: Mapping[str, Any]) -> str:
    """Return the rule of decoding of tables that show one: that of most runs, of several the first in order."""
    images = str(_full(results))
    counts: Counter[str] = Counter(
        rule for run in results["runs"] for rule in run.get("stage2", {}).get(images, {}).get("rules", {})
    )
    return min(counts, key=lambda rule: (-counts[rule], _place(rule)))


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
    """Return the size of the GPT's training set that most arms were measured with, ``None`` if none was.

    Of equally common sizes the largest: the smaller one is that of Table 2.
    """
    pairs = {(run["arm"], size) for run in results["runs"] for size in _sizes(run)}
    counts = Counter(size for _, size in pairs)
    return max(counts, key=lambda size: (counts[size], size), default=None)


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
    """Quad1 of text to image, largest and smallest training set; ``None`` if only one size was measured.

    Where an arm has both sizes, of the seeds that have both, so that the difference is paired. An arm without
    either has no column.
    """
    rule, arms = shown_rule(results), ("vqgan", "te_vqgan")
    found = {
        size: {arm: generations(results, size, rule).get(arm, []) for arm in arms}
        for size in {size for run in results["runs"] if run["arm"] in arms for size in _sizes(run)}
    }
    ends = max(found, default=0), min(found, default=0)
    if len(found) < 2 or not any(found[ends[1]].values()):
        return None
    titles, columns = [], []
    for arm in arms:
        if not any(found[size][arm] for size in ends):
            continue
        both = dict(zip(ends, _with_both(*(found[size][arm] for size in ends)), strict=True))
        values = [accuracies(runs, size, rule, "text_to_image", "quad1") for size, runs in both.items()]
        printed = [TABLE2[size][arm] for size in TABLE2]
        ours = f"{statistics.fmean(values[0]) - statistics.fmean(values[1]):.3f}" if all(values) else _DASH
        difference = f"{ours} / {printed[0].mean - printed[1].mean:.3f}"
        columns.append([*map(_beside, values, printed), difference])
        titles.append(f"{ARMS[arm].title}{counted(max(both.values(), key=len))}")
    names = [f"{size:,} (paper: {paper:,})" for size, paper in zip(ends, TABLE2, strict=True)]
    rows = [list(row) for row in zip([*names, "difference"], *columns, strict=True)]
    return Table(["training images", *titles], rows)


def _with_both(large: Sequence[Run], small: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Leave the runs of seeds that are in both, or all if either is empty."""
    if not (large and small):
        return list(large), list(small)
    seeds = {run["seed"] for run in large} & {run["seed"] for run in small}
    return [run for run in large if run["seed"] in seeds], [run for run in small if run["seed"] in seeds]


def rules_table(results: Mapping[str, Any], task: str, cases: Sequence[str] = _CASES) -> Table | None:
    """Digit accuracy by rule of decoding, over all held-out digits of ``cases``, by default all in quadrants.

    ``None`` if there are not two rules under which the task was measured.
    """
    images = _full(results)
    arms: dict[str, list[Run]] = {}
    for arm in _ORDER:
        runs = [run for run in results["runs"] if run["arm"] == arm and images in _sizes(run)]
        if runs:
            arms[arm] = runs
    measured = {arm: [run["stage2"][str(images)]["rules"] for run in runs] for arm, runs in arms.items()}
    found = {
        name for runs in measured.values() for rules in runs for name in rules if task in rules[name]["held_out"]
    }
    if len(found) < 2:
        return None
    names = sorted(found, key=_place)
    rows = []
    for arm, runs in arms.items():
        held = {name: [rules[name]["held_out"] for rules in measured[arm] if name in rules] for name in names}
        cells = [
            mean([share(part[task]["cases"][case] for case in cases) for part in held[name] if task in part])
            for name in names
        ]
        rows.append([_row_name(arm, runs), *cells])
    return Table(["tokenizer", *(rule_title(name, task) for name in names)], rows)


def _row_name(arm: str, runs: Sequence[Run]) -> str:
    # The authors' code does not pad its pooling; the presets of small models do.
    padded = any(run["settings"]["model"]["downsample"] == "max_blur_pool" for run in runs)
    return f"{ARMS[arm].title}{' (padded)' if padded else ''}{counted(runs)}"


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


def _sizes(run: Run) -> set[int]:
    return {int(size) for size, part in run.get("stage2", {}).items() if part.get("rules")}


def _full(results: Mapping[str, Any]) -> int:
    images = full_size(results)
    if images is None:
        raise ValueError("results must hold a measured Stage 2, got none.")
    return images


def counted(runs: Sequence[Run]) -> str:
    """Name the number of seeds where it is smaller than the three that are meant to be."""
    return "" if len(runs) >= 3 else f", {len(runs)} seed{'' if len(runs) == 1 else 's'}"


def _beside(values: Sequence[float], printed: Printed | None) -> str:
    paper = _DASH if printed is None else f"{printed.mean:.3f} ({printed.deviation:.3f})"
    return f"{mean(values)} / {paper}"


def mean(values: Sequence[float], pattern: str = ".3f") -> str:
    """Write the mean over seeds, with the standard deviation in brackets if they are several."""
    if not values:
        return _DASH
    text = format(statistics.fmean(values), pattern)
    return text if len(values) == 1 else f"{text} ({format(statistics.stdev(values), pattern)})"
