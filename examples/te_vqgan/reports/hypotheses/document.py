"""The confirmatory analysis as ``hypotheses.json``, two pages of tables and two figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.te_vqgan.reports.document import Block, Paragraph, Table, to_markdown
from examples.te_vqgan.reports.generation.tables import mean
from examples.te_vqgan.reports.hypotheses.analysis import (
    Outcomes,
    Result,
    classifier_accuracy,
    compared,
    missing_runs,
    outcomes,
    verdicts,
)
from examples.te_vqgan.reports.hypotheses.figures import draw_candidates, draw_effects
from examples.te_vqgan.reports.hypotheses.plan import (
    COMPARISONS,
    FULL,
    RULES,
    STATEMENTS,
    TASKS,
    Comparison,
    Group,
    planned_groups,
)
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.reports.results import read_results
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import write_bytes_atomically, write_text_atomically
from examples.te_vqgan.stage1.presets import ARMS
from examples.te_vqgan.stage2.rules import HEADLINE, rule_title

__all__ = ["interim", "label", "write_hypotheses"]

CANDIDATES = ("2", "16", "38", "all")
"""Rules that keep a fixed number of logits, in the order of the figure."""


def write_hypotheses(folder: Path, into: Path, *, command: str) -> None:
    """Test the hypotheses on the results in ``folder`` and write the analysis.

    Args:
        folder: with ``results.json``.
        into: folder of the files, made if missing.
        command: what was typed, for the record.

    Raises:
        ValueError: there is no ``results.json``, a planned run is missing, or the classifier reads too few digits.
    """
    results = _read(folder)
    found = {rule: compared(results, rule) for rule in RULES}
    figures = {
        "hypotheses.png": draw_effects(_effects(found)),
        "candidates.png": draw_candidates(_curves(results)),
    }
    write_text_atomically(into / "hypotheses.json", json.dumps(_plain(results, found, command), indent=1) + "\n")
    write_text_atomically(into / "hypotheses.md", to_markdown(_blocks(results, found)))
    write_text_atomically(into / "verdicts.md", to_markdown([_verdict_table(found)]))
    for name, figure in figures.items():
        write_bytes_atomically(into / name, encode_png(figure, dpi=110))


def interim(folder: Path) -> str:
    """Return means and differences of the runs that are there in Markdown, without any test.

    Raises:
        ValueError: there is no ``results.json``.
    """
    results = _read(folder)
    missing = missing_runs(results)
    blocks: list[Block] = [Paragraph(f"Interim, nothing is tested. Missing runs: {'; '.join(missing) or 'none'}.")]
    for rule in RULES:
        blocks += [Paragraph(f"Rule `{rule}` ({RULES[rule]})."), _outcome_table(results, rule)]
        header = ["hypothesis", "comparison", "task", "mean difference", "differences by seed"]
        rows = []
        for one in COMPARISONS:
            differences = outcomes(results, rule, one.task).differences(one)
            average = _signed(statistics.fmean(differences.values())) if differences else "–"
            rows.append([one.hypothesis, label(one), TASKS[one.task], average, _by_seed(differences)])
        blocks.append(Table(header, rows))
    return to_markdown(blocks)


def label(comparison: Comparison) -> str:
    """Write the difference of a comparison, such as "TE-VQGAN - VQGAN"."""
    full = [_name(group) for _, group in comparison.terms if group.images == FULL]
    same = len(full) == len(comparison.terms)
    # Each group is compared with itself on the smaller training set.
    return " - ".join(full if same else [f"loss of {name}" for name in full])


def _name(group: Group) -> str:
    title = ARMS[group.arm].title.partition(" (")[0]
    short = {"k16": "K = 16", "stride_exact": "stride-exact"}.get(group.arm, title)
    return short if group.images == FULL else f"{short}, a third of the images"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    require(path.is_file(), "results", "a folder with results.json", str(folder))
    return read_results(path)


def _blocks(results: Mapping[str, Any], found: Mapping[str, Sequence[Result]]) -> list[Block]:
    read = classifier_accuracy(results) or 0.0
    blocks: list[Block] = [
        Paragraph(
            "Digit accuracy on held-out combinations, all digits in quadrants pooled. Two-sided paired t tests on "
            "the differences by seed; Holm's correction over the seven comparisons of a rule; 95 % intervals are "
            f"uncorrected. The classifier reads {100 * read:.2f} % of the test digits."
        )
    ]
    header = [
        "hypothesis",
        "comparison",
        "stated",
        "task",
        "mean difference",
        "95 % interval",
        "p",
        "p, Holm",
        "differences by seed",
        "verdict",
    ]
    for rule, results_of_rule in found.items():
        judged = verdicts(results_of_rule)
        rows = []
        for comparison, differences, test, corrected in results_of_rule:
            low, high = test.interval
            rows.append(
                [
                    f"{comparison.hypothesis}: {STATEMENTS[comparison.hypothesis]}",
                    label(comparison),
                    "> 0" if comparison.sign > 0 else "< 0",
                    TASKS[comparison.task],
                    _signed(test.mean),
                    f"{_signed(low)} to {_signed(high)}",
                    _probability(test.p),
                    _probability(corrected),
                    _by_seed(differences),
                    judged[comparison.hypothesis],
                ]
            )
        blocks += [
            Paragraph(f"Rule `{rule}` ({rule_title(rule)}), {RULES[rule]} family:"),
            Table(header, rows),
            Paragraph("Outcomes, mean (standard deviation between seeds):"),
            _outcome_table(results, rule),
        ]
    return blocks


def _verdict_table(found: Mapping[str, Sequence[Result]]) -> Table:
    """Return a row for each hypothesis, with its comparisons and its verdict under each rule."""
    header = ["hypothesis", "task"]
    for rule in found:
        header += [f"{_decoding(rule)}: mean (95 % interval), corrected p", "verdict"]
    rows = []
    for name, statement in STATEMENTS.items():
        chosen = {
            rule: [one for one in results if one.comparison.hypothesis == name] for rule, results in found.items()
        }
        tasks = dict.fromkeys(TASKS[one.comparison.task] for results in chosen.values() for one in results)
        row = [f"{name}: {statement}", ", ".join(tasks)]
        for rule, results in chosen.items():
            cells = [f"{label(one.comparison)}: {_tested(one)}" for one in results]
            row += [". ".join(cells), verdicts(found[rule])[name]]
        rows.append(row)
    return Table(header, rows)


def _decoding(rule: str) -> str:
    title = "decoding of the released code" if rule == HEADLINE else rule_title(rule)
    return f"{title} ({RULES[rule]})"


def _tested(result: Result) -> str:
    low, high = result.test.interval
    p = _probability(result.corrected)
    interval = f"{_signed(low)} to {_signed(high)}"
    return f"{_signed(result.test.mean)} ({interval}), p {p if p.startswith('<') else f'= {p}'}"


def _outcome_table(results: Mapping[str, Any], rule: str) -> Table:
    by_task: dict[str, Outcomes] = {task: outcomes(results, rule, task) for task in TASKS}
    rows = []
    for group, planned in planned_groups().items():
        values = [list(one.values.get(group, {}).values()) for one in by_task.values()]
        rows.append([_name(group), f"{len(values[0])} of {len(planned)}", *map(mean, values)])
    return Table(["tokenizer", "seeds", *TASKS.values()], rows)


def _effects(found: Mapping[str, Sequence[Result]]) -> dict[str, list[tuple[str, Result, str]]]:
    """A panel a rule, a row a comparison: its text, the result, the verdict of its hypothesis."""
    panels = {}
    for rule, results in found.items():
        judged = verdicts(results)
        panels[_decoding(rule)] = [
            (
                f"{one.comparison.hypothesis}  {label(one.comparison)}\n{TASKS[one.comparison.task]}",
                one,
                judged[one.comparison.hypothesis],
            )
            for one in results
        ]
    return panels


def _curves(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By task, then tokenizer, then number of candidates: the outcomes of its seeds."""
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    for task, words in TASKS.items():
        arms: dict[str, dict[str, list[float]]] = {}
        for rule in CANDIDATES:
            for group, values in outcomes(results, rule, task).values.items():
                if group.images == FULL:
                    arms.setdefault(_name(group), {})[rule] = list(values.values())
        curves[words] = arms
    return curves


def _plain(results: Mapping[str, Any], found: Mapping[str, Sequence[Result]], command: str) -> dict[str, Any]:
    """Everything that was computed, for JSON."""
    rules: dict[str, Any] = {}
    for rule, results_of_rule in found.items():
        rules[rule] = {
            "family": RULES[rule],
            "verdicts": verdicts(results_of_rule),
            "comparisons": [
                {
                    "hypothesis": one.comparison.hypothesis,
                    "difference": label(one.comparison),
                    "task": one.comparison.task,
                    "stated_sign": one.comparison.sign,
                    "by_seed": {str(seed): value for seed, value in one.differences.items()},
                    "mean": one.test.mean,
                    "interval": list(one.test.interval),
                    "standard_error": one.test.error,
                    "degrees_of_freedom": one.test.degrees,
                    "p": one.test.p,
                    "p_holm": one.corrected,
                }
                for one in results_of_rule
            ],
            "outcomes": [
                {
                    "arm": group.arm,
                    "train_images": group.images,
                    "task": task,
                    "by_seed": {str(seed): value for seed, value in values.items()},
                }
                for task in TASKS
                for group, values in outcomes(results, rule, task).values.items()
            ],
        }
    return {
        "preregistration": "docs/preregistration.md",
        "command": command,
        "classifier_accuracy": classifier_accuracy(results),
        "rules": rules,
    }


def _by_seed(differences: Mapping[int, float]) -> str:
    return ", ".join(map(_signed, differences.values())) or "–"


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text


def _probability(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
