"""The preregistered analysis on made-up results: plan, differences, verdicts, tables, figures and refusals."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.reports.hypotheses.analysis import Result, compared, outcomes, verdict
from examples.te_vqgan.reports.hypotheses.document import label
from examples.te_vqgan.reports.hypotheses.figures import draw_candidates, draw_effects
from examples.te_vqgan.reports.hypotheses.plan import COMPARISONS, FULL, RULES, THIRD, Group, planned_groups
from examples.te_vqgan.reports.inference import TTest, holm, paired_t
from tests.helpers import exactly, numpy_generator

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "preregistration.md").read_text(encoding="utf-8")
DIGITS = {"quad1": 300, "quad2": 600, "quad3": 900, "quad4": 1200, "centre": 300}
QUADRANTS = ("quad1", "quad2", "quad3", "quad4")
TASKS = ("text_to_image", "image_to_text")


def _run(arm: str, seed: int) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "settings": {"model": {}}, "stage2": {}}


def _results(
    levels: Mapping[str, float] | None = None, rules: tuple[str, ...] = ("paper", "2"), spread: float = 0.02
) -> dict[str, Any]:
    """All planned runs; ``levels`` are accuracies by arm, in both tasks, around which seeds spread."""
    generator = numpy_generator()
    runs: dict[tuple[str, int], dict[str, Any]] = {}

    def generation(level: float) -> dict[str, Any]:
        tasks = {}
        for task in TASKS:
            rates = generator.normal(level, spread, len(DIGITS)).clip(0, 1)
            cases = {
                case: {"digits": digits, "digits_right": round(rate * digits)}
                for (case, digits), rate in zip(DIGITS.items(), rates, strict=True)
            }
            tasks[task] = {"cases": cases}
        return {"held_out": tasks}

    for group, seeds in planned_groups().items():
        for seed in seeds:
            run = runs.setdefault((group.arm, seed), _run(group.arm, seed))
            level = (levels or {}).get(group.arm, 0.8)
            measured = {rule: generation(level) for rule in rules}
            run["stage2"][str(group.images)] = {"settings": {}, "rules": measured}
    classifier = {"evaluation": {"test": {"digit_accuracy": 0.9961}}}
    return {"runs": list(runs.values()), "classifier": classifier}


def _written(folder: Path, results: Mapping[str, Any]) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return ["hypotheses", "--results", str(folder)]


def _share(results: Mapping[str, Any], arm: str, seed: int, images: int, rule: str, task: str) -> float:
    (run,) = (run for run in results["runs"] if (run["arm"], run["seed"]) == (arm, seed))
    cases = run["stage2"][str(images)]["rules"][rule]["held_out"][task]["cases"]
    return sum(cases[case]["digits_right"] for case in QUADRANTS) / 3000


def test_the_plan_is_that_of_the_page() -> None:
    """Arms and seeds of its first table, comparisons and tasks of its third, in order."""
    arms = dict(re.findall(r"^\| `(\w+)` \| .*? \| ([\d, ]+) \|$", PAGE, re.MULTILINE))
    seeds = {arm: tuple(map(int, text.split(", "))) for arm, text in arms.items()}
    groups = planned_groups()
    assert {group.arm: found for group, found in groups.items() if group.images == FULL} == seeds
    assert {group.arm: found for group, found in groups.items() if group.images == THIRD} == {
        "vqgan": (2, 3, 4),
        "te_vqgan": (2, 3, 4),
    }
    assert f"{FULL:,} images" in PAGE
    assert f"{THIRD:,} images" in PAGE
    stated = []
    for name, cell, task in re.findall(r"^\| (H\d) \| .*? \| (.*?) \| (\w+ to \w+) \|", PAGE, re.MULTILINE):
        stated += [(name, one, task.replace(" ", "_")) for one in cell.split("; ")]
    assert len(stated) == len(COMPARISONS) == 7
    for (name, formula, task), comparison in zip(stated, COMPARISONS, strict=True):
        assert (comparison.hypothesis, comparison.task) == (name, task)
        assert formula.endswith("> 0" if comparison.sign > 0 else "< 0")
        words = re.findall(r"`(\w+)`( third)?", formula)
        assert [(group.arm, group.images) for _, group in comparison.terms] == [
            (arm, THIRD if third else FULL) for arm, third in words
        ]
    assert set(RULES) == {"paper", "2"}


def test_differences_are_those_of_pooled_shares() -> None:
    """By the formulas of the page, centred digits left out; five seeds for two arms, three for H3 and H5."""
    results = _results()
    for comparison in COMPARISONS:
        task = comparison.task
        for rule in RULES:
            found = outcomes(results, rule, task).differences(comparison)
            expected = {}
            for seed in comparison.seeds:

                def share(arm: str, images: int = FULL, *, s: int = seed, r: str = rule, t: str = task) -> float:
                    return _share(results, arm, s, images, r, t)

                if comparison.hypothesis == "H5":
                    ours = share("te_vqgan") - share("te_vqgan", THIRD)
                    expected[seed] = share("vqgan") - share("vqgan", THIRD) - ours
                else:
                    (_, first), (_, second) = comparison.terms
                    expected[seed] = share(first.arm) - share(second.arm)
            assert found == pytest.approx(expected)
            assert tuple(found) == comparison.seeds


def test_p_values_are_corrected_within_a_rule() -> None:
    """Seven of each; the other rule does not count."""
    results = _results({"te_vqgan": 0.83, "k16": 0.75})
    for rule in RULES:
        found = compared(results, rule)
        raw = [one.test.p for one in found]
        assert raw == [paired_t(list(one.differences.values())).p for one in found]
        assert [one.corrected for one in found] == holm(raw)


def _result(sign: int, mean: float, corrected: float) -> Result:
    comparison = next(one for one in COMPARISONS if one.sign == sign)
    return Result(comparison, {2: mean, 3: mean}, TTest(mean, 0.01, 1, corrected, (mean, mean)), corrected)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(1, 0.1, 0.049)], "confirmed"),
        ([(-1, -0.1, 0.049)], "confirmed"),
        ([(1, 0.1, 0.05)], "not resolved"),
        ([(1, -0.1, 0.049)], "contradicted"),
        ([(-1, 0.1, 0.049)], "contradicted"),
        ([(1, -0.1, 0.05)], "not resolved"),
        ([(1, 0.1, 0.01), (1, 0.1, 0.01)], "confirmed"),
        ([(1, 0.1, 0.01), (1, 0.1, 0.2)], "not resolved"),
        ([(1, 0.1, 0.01), (1, -0.1, 0.2)], "not resolved"),
        ([(1, 0.1, 0.01), (1, -0.1, 0.01)], "contradicted"),
        ([(1, 0.1, 0.2), (1, -0.1, 0.01)], "contradicted"),
        ([(1, 0.0, 1.0)], "not resolved"),
    ],
)
def test_verdicts(parts: list[tuple[int, float, float]], expected: str) -> None:
    """All of a hypothesis' comparisons must agree to confirm it; one certain opposite contradicts it."""
    assert verdict([_result(*part) for part in parts]) == expected


def test_the_command_writes_tables_data_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large effects are confirmed, the reverse of a stated one is contradicted, equal arms are not resolved."""
    monkeypatch.setattr("examples.te_vqgan.reports.hypotheses.document.encode_png", lambda _, dpi: b"png")
    levels = {"te_vqgan": 0.95, "vqgan": 0.7, "k16": 0.95, "stride_exact": 0.7}
    results = _results(levels, rules=("paper", "2", "16", "38", "all"), spread=0.004)
    words = _written(tmp_path / "runs", results)
    assert main([*words, "--into", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "hypotheses.md").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "hypotheses.json",
        "hypotheses.md",
        "verdicts.md",
        "hypotheses.png",
        "candidates.png",
    }
    data = json.loads((tmp_path / "report" / "hypotheses.json").read_text())
    for rule in ("paper", "2"):
        part = data["rules"][rule]
        assert part["verdicts"] == {
            "H1": "confirmed",
            "H2": "not resolved",
            "H3": "contradicted",
            "H4": "contradicted",
            "H5": "not resolved",
        }
        assert len(part["comparisons"]) == 7
        first = part["comparisons"][0]
        shares = [
            _share(results, "te_vqgan", seed, FULL, rule, TASKS[0])
            - _share(results, "vqgan", seed, FULL, rule, TASKS[0])
            for seed in range(2, 7)
        ]
        assert list(first["by_seed"].values()) == pytest.approx(shares)
        assert first["mean"] == pytest.approx(statistics.fmean(shares))
        assert first["standard_error"] == pytest.approx(statistics.stdev(shares) / math.sqrt(5))
        assert first["p"] <= first["p_holm"]
        assert f"{statistics.fmean(shares):+.3f}" in text
    assert "reads 99.61 % of the test digits" in text
    lines = (tmp_path / "report" / "verdicts.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    assert [row[0][:2] for row in rows] == list(data["rules"]["paper"]["verdicts"])

    def signed(value: float) -> str:
        return f"{value:+.3f}".replace("+0.000", "0.000").replace("-0.000", "0.000")

    for name, _, *cells in rows:
        for rule, cell, judged in (("paper", *cells[:2]), ("2", *cells[2:])):
            assert judged == data["rules"][rule]["verdicts"][name[:2]]
            parts = [one for one in data["rules"][rule]["comparisons"] if one["hypothesis"] == name[:2]]
            for one in parts:
                low, high = map(signed, one["interval"])
                assert f"{one['difference']}: {signed(one['mean'])} ({low} to {high}), p " in cell
    # Negative results stand in the same table.
    assert text.count("contradicted") == 2 * 4
    assert data["command"].startswith("python -m examples.te_vqgan hypotheses")


def test_interim_numbers_are_means_without_p_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is tested or written while a run is missing."""
    results = _results()
    results["runs"] = [run for run in results["runs"] if (run["arm"], run["seed"]) != ("k16", 4)]
    words = _written(tmp_path, results)
    assert main([*words, "--interim"]) == 0
    text = capsys.readouterr().out
    assert "Missing runs: k16 seed 4 with 40,000 images (rule paper and 2)." in text
    assert "| K = 16 | 4 of 5 |" in text
    assert not re.search(r"\bp\b|interval|confirmed|resolved", text)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert main([*words, "--interim", "--into", str(tmp_path)]) == 1
    assert "into must be unset with --interim, which writes no file" in capsys.readouterr().err


def test_interim_of_nothing_is_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first run."""
    assert main([*_written(tmp_path, {"runs": []}), "--interim"]) == 0
    assert "| H1 | TE-VQGAN - VQGAN | text to image | – | – |" in capsys.readouterr().out


def test_a_missing_run_is_named_and_nothing_is_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One not trained, not measured under a rule or in a task, or not trained on the smaller set."""
    results = _results()
    runs = {(run["arm"], run["seed"]): run for run in results["runs"]}
    del runs["vqgan", 3]["stage2"][str(FULL)]["rules"]["2"]
    del runs["k16", 6]["stage2"][str(FULL)]["rules"]["paper"]["held_out"]["image_to_text"]
    del runs["te_vqgan", 2]["stage2"][str(THIRD)]
    results["runs"] = [run for run in results["runs"] if run["arm"] != "stride_exact" or run["seed"] == 2]
    assert main(_written(tmp_path, results)) == 1
    error = capsys.readouterr().err
    assert "results must be those of every planned run, got none of " in error
    for name in (
        "vqgan seed 3 with 40,000 images (rule 2)",
        "k16 seed 6 with 40,000 images (rule paper)",
        "te_vqgan seed 2 with 13,333 images (rule paper and 2)",
        "stride_exact seeds 3, 4 with 40,000 images (rule paper and 2)",
    ):
        assert name in error
    assert not (tmp_path / "hypotheses.md").exists()


@pytest.mark.parametrize(("read", "told"), [(0.9935, "99.35 %"), (None, "none")])
def test_a_classifier_that_reads_too_little_is_refused(read: float | None, told: str) -> None:
    """As the page fixes it."""
    results = _results()
    results["classifier"] = {} if read is None else {"evaluation": {"test": {"digit_accuracy": read}}}
    message = f"classifier must be one that reads at least 99.5 % of the test digits, got {told}."
    with pytest.raises(ValueError, match=exactly(message)):
        compared(results, "paper")


def test_runs_on_other_pairs_are_refused() -> None:
    """The outcome is of the same pairs for every run."""
    results = _results()
    cases = results["runs"][3]["stage2"][str(FULL)]["rules"]["paper"]["held_out"]["text_to_image"]["cases"]
    cases["quad4"]["digits"] -= 4
    with pytest.raises(
        ValueError, match=r"^digits must be the same for every run, got \(300, 600, 900, 1200\) in "
    ):
        outcomes(results, "paper", "text_to_image")


def test_runs_that_two_classifiers_read_are_refused() -> None:
    """One reads the images of all runs, under both rules."""
    results = _results()
    for run in results["runs"]:
        for part in run["stage2"].values():
            for measured in part["rules"].values():
                measured["classifier"] = "one"
    assert len(compared(results, "paper")) == 7
    results["runs"][4]["stage2"][str(FULL)]["rules"]["2"]["classifier"] = "other"
    with pytest.raises(
        ValueError, match=r"^classifier must be the same for every run, got one in .* and other in "
    ):
        compared(results, "paper")


def test_exploratory_seeds_take_no_part() -> None:
    """Seeds 0 and 1 may lie in the same file."""
    results = _results()
    before = outcomes(results, "paper", "text_to_image")
    extra = [{**run, "seed": seed} for seed, run in enumerate(results["runs"][:2])]
    assert outcomes({**results, "runs": [*results["runs"], *extra]}, "paper", "text_to_image") == before


def test_results_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In both modes."""
    for more in ([], ["--interim"]):
        assert main(["hypotheses", "--results", str(tmp_path), *more]) == 1
        assert f"results must be a folder with results.json, got {tmp_path}." in capsys.readouterr().err


def test_comparisons_are_named_by_their_terms() -> None:
    """Both kinds."""
    assert label(COMPARISONS[1]) == "TE-VQGAN - K = 16"
    assert label(COMPARISONS[3]) == "stride-exact - K = 16"
    assert label(COMPARISONS[6]) == "loss of VQGAN - loss of TE-VQGAN"
    assert Group("vqgan").images == FULL


def test_the_forest_plot_shows_means_intervals_and_seeds() -> None:
    """Each comparison of each rule in the colour of its own test, with the verdict of its hypothesis."""
    rows = [
        ("one", _result(1, 0.1, 0.01)._replace(differences={2: 0.05, 3: 0.15}), "confirmed"),
        ("two", _result(-1, 0.2, 0.5), "not resolved"),
    ]
    rows[0] = ("one", rows[0][1]._replace(test=TTest(0.1, 0.05, 1, 0.01, (-0.5, 0.7))), "confirmed")
    # One comparison of a hypothesis may be certain where another is not.
    rows.append(("three", _result(1, -0.1, 0.01), "not resolved"))
    figure = draw_effects({"left": rows, "right": rows})
    assert [axis.get_title() for axis in figure.axes] == ["left", "right"]
    for axis in figure.axes:
        lines = {
            name: [line for line in axis.lines if line.get_label() == name]
            for name in ("interval", "mean", "seeds")
        }
        assert [list(line.get_xdata()) for line in lines["interval"]] == [[-0.5, 0.7], [0.2, 0.2], [-0.1, -0.1]]
        assert [list(line.get_xdata()) for line in lines["mean"]] == [[0.1], [0.2], [-0.1]]
        assert [list(line.get_xdata()) for line in lines["seeds"]] == [[0.05, 0.15], [0.2, 0.2], [-0.1, -0.1]]
        assert [text.get_text() for text in axis.texts] == ["confirmed", "not resolved", "not resolved"]
        colors = [[line.get_color() for line in lines[name]] for name in ("mean", "interval")]
        assert colors[0] == colors[1]
        assert len(set(colors[0])) == 3
        low, high = axis.get_xlim()
        assert low == -high
        assert high > 0.7
        # The stated side: right of zero, then left of it.
        assert [bar.get_width() > 0 for bar in axis.patches] == [True, False, True]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["one", "two", "three"]


def test_differences_of_losses_have_a_scale_of_their_own() -> None:
    """Below the others, in both panels, which keep theirs."""
    plain = ("one", _result(1, 0.1, 0.5), "not resolved")
    wide = Result(COMPARISONS[6], {2: 0.1, 3: 0.9}, TTest(0.5, 0.4, 1, 0.5, (-4.0, 5.0)), 0.5)
    axes = draw_effects(
        {"left": [plain, ("losses", wide, "not resolved")], "right": [plain, ("losses", wide, "not resolved")]}
    ).axes
    assert [axis.get_title() for axis in axes] == ["left", "right", "", ""]
    assert [axis.get_xlim()[1] for axis in axes] == pytest.approx([0.105, 0.105, 5.25, 5.25])
    names = [[text.get_text() for text in axis.get_yticklabels()] for axis in axes[::2]]
    assert names == [["one"], ["losses"]]


def test_candidates_are_drawn_as_a_line_of_means_with_every_seed() -> None:
    """A tokenizer without some numbers has a shorter line."""
    tasks = {
        "text to image": {"a": {"2": [0.5, 0.7], "all": [0.25, 0.75]}, "b": {"2": [0.1]}},
        "image to text": {"a": {"2": [0.25, 0.75]}},
    }
    figure = draw_candidates(tasks)
    left, right = figure.axes
    assert [axis.get_title() for axis in figure.axes] == list(tasks)
    assert [text.get_text() for text in left.get_xticklabels()] == ["2", "all"]
    means = [line for line in left.lines if line.get_label() in ("a", "b")]
    assert [list(line.get_ydata()) for line in means] == [[pytest.approx(0.6), 0.5], [0.1]]
    drawn = [list(line.get_ydata()) for line in left.lines if line not in means]
    assert drawn == [[0.5, 0.7], [0.25, 0.75], [0.1]]
    assert list(right.lines[0].get_ydata()) == [0.5]
