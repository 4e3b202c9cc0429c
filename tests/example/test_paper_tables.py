"""The paper's tables and the sentences about them, from made-up results whose every cell is known."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.te_vqgan import __main__ as command_line
from examples.te_vqgan.data.recipes import LAYOUTS
from examples.te_vqgan.reports.document import Paragraph, Picture, Table
from examples.te_vqgan.reports.generation.figures import (
    Point,
    draw_captions,
    draw_confusions,
    draw_generated,
    draw_tradeoff,
)
from examples.te_vqgan.reports.generation.findings import generation_findings
from examples.te_vqgan.reports.generation.paper import TABLE1, TABLE2, TABLE3
from examples.te_vqgan.reports.generation.report import generation_blocks, generation_figures, generation_tables
from examples.te_vqgan.reports.generation.tables import (
    accuracies,
    full_size,
    generations,
    rules_table,
    shown_rule,
    table1,
    table2,
    table3,
)
from examples.te_vqgan.reports.results import read_results
from examples.te_vqgan.stage1.presets import ARMS
from examples.te_vqgan.stage2.rules import rule_title
from te_quant import EquivarianceReport
from tests.helpers import numpy_generator
from tests.published import published

TASKS = ("text_to_image", "image_to_text")
LARGE, SMALL = 300, 100


def _cases(rng: np.random.Generator, **accuracy: float | None) -> dict[str, Any]:
    cases = {}
    for case in LAYOUTS:
        rate = accuracy.get(case, float(rng.uniform(0.1, 0.9)))
        digits = int(rng.integers(100, 200))
        right = 0 if rate is None else round(rate * digits)
        cases[case] = {"digits": digits, "digits_right": right, "digit_accuracy": rate}
    return cases


def _generation(rng: np.random.Generator, **accuracy: float | None) -> dict[str, Any]:
    confusion = rng.integers(0, 50, (10, 11)).tolist()
    return {
        split: {task: {"cases": _cases(rng, **accuracy), "confusion": confusion} for task in TASKS}
        for split in ("held_out", "seen")
    }


def _run(arm: str, seed: int, sizes: tuple[int, ...] = (LARGE,), **changes: Any) -> dict[str, Any]:
    """One run with random numbers; ``quad1`` fixes that accuracy in both tasks, ``data`` the digits."""
    rng = numpy_generator()
    accuracy = {name: changes[name] for name in ("quad1",) if name in changes}
    test = {
        "used_codes": int(rng.integers(1, 256)),
        "frequent_codes": int(rng.integers(1, 99)),
        "l1": float(rng.uniform(0.01, 0.1)),
    }
    return {
        "arm": arm,
        "title": ARMS[arm].title,
        "seed": seed,
        "settings": {
            "data": changes.get("data", "mnist"),
            "model": {"downsample": ARMS[arm].model.get("downsample", "strided_conv")},
        },
        "evaluation": {"test": test},
        "reading": {
            "original": {"cases": _cases(rng)},
            "reconstruction": {"cases": _cases(rng)},
            "feature_distance": float(rng.uniform(0, 4)),
        },
        "stage2": {str(size): {"rules": {"paper": _generation(rng, **accuracy)}} for size in sizes},
    }


def test_table_3_has_lpips_where_it_was_measured() -> None:
    """As older readings have it and as newer ones do; seeds without it, or with another distance, do not count."""
    runs = [_run("vqgan", seed) for seed in range(4)]
    runs[0]["reading"] |= {"perceptual": "lpips", "perceptual_distance": 0.25}
    runs[1]["reading"] |= {"perceptual_distances": {"lpips": 0.75, "st-lpips": 8.0}}
    runs[2]["reading"] |= {"perceptual": "other", "perceptual_distance": 9.0}
    row = _row(table3({"runs": runs}), f"mnist, {ARMS['vqgan'].title}")
    assert row["LPIPS"].startswith("0.5000 (0.3536) / ")


def test_table_3_has_a_column_for_each_distance_that_was_measured() -> None:
    """Named for what it is, without a number of the paper; of arms that the table leaves out it needs none."""
    runs = [_run(arm, seed) for arm in ("vqgan", "te_vqgan", "k16") for seed in range(3)]
    runs[-1]["reading"]["perceptual_distances"] = {"st-lpips": 9.0}
    assert "ST-LPIPS" not in table3({"runs": runs}).header
    for run, value in zip(runs[:2], (0.25, 0.75), strict=True):
        run["reading"]["perceptual_distances"] = {"st-lpips": value}
    table = table3({"runs": runs})
    rows = [_row(table, f"mnist, {ARMS[arm].title}") for arm in ("vqgan", "te_vqgan")]
    assert [row["ST-LPIPS"] for row in rows] == ["0.5000 (0.3536)", "–"]
    assert all(row["LPIPS"].startswith("– / ") for row in rows)


def _row(table: Table, name: str) -> dict[str, str]:
    (row,) = (row for row in table.rows if row[0] == name)
    return dict(zip(table.header, row, strict=True))


def _text(values: list[float], pattern: str = ".3f") -> str:
    """Mean and sample standard deviation, by their formulas."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return format(mean, pattern)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:{pattern}} ({deviation:{pattern}})"


@pytest.mark.parametrize("task", TASKS)
def test_cells_of_table_1_are_means_and_deviations_beside_the_papers(task: str) -> None:
    """Every case of both splits; arms that the paper lacks have a dash beside them."""
    runs = [_run(arm, seed) for arm in ("vqgan", "k16", "mb") for seed in range(3)]
    table = table1({"runs": runs}, task)
    # The paper's order, then the rest.
    names = {arm: ARMS[arm].title for arm in ("vqgan", "k16")} | {"mb": "MB (padded)"}
    assert [row[0] for row in table.rows] == [names[arm] for arm in ("mb", "vqgan", "k16")]
    for arm in ("mb", "vqgan", "k16"):
        own = [run for run in runs if run["arm"] == arm]
        row = _row(table, names[arm])

        def values(case: str, split: str, own: list[dict[str, Any]] = own) -> list[float]:
            measured = [run["stage2"][str(LARGE)]["rules"]["paper"][split][task]["cases"][case] for run in own]
            return [case["digit_accuracy"] for case in measured]

        for number in range(4):
            printed = "–"
            if arm in TABLE1:
                cell = TABLE1[arm][task][number]
                printed = f"{cell.mean:.3f} ({cell.deviation:.3f})"
            assert row[f"Quad{number + 1}"] == f"{_text(values(f'quad{number + 1}', 'held_out'))} / {printed}"
        assert row["centre"] == _text(values("centre", "held_out"))
        assert row["seen, Quad1"] == _text(values("quad1", "seen"))
        assert row["seen, Quad4"] == _text(values("quad4", "seen"))
        if task == "text_to_image":
            shares = []
            for run in own:
                cases = run["reading"]["reconstruction"]["cases"].values()
                shares.append(sum(c["digits_right"] for c in cases) / sum(c["digits"] for c in cases))
            assert row["read in reconstructions"] == _text(shares)
        else:
            assert "read in reconstructions" not in table.header


def test_few_seeds_are_counted_in_the_rows_name() -> None:
    """One has no deviation; nothing is claimed of three."""
    table = table1({"runs": [_run("vqgan", 0, quad1=0.25), _run("k16", 0), _run("k16", 1)]}, "text_to_image")
    assert [row[0] for row in table.rows] == ["VQGAN, 1 seed", "SC, K = 16, 2 seeds"]
    assert _row(table, "VQGAN, 1 seed")["Quad1"] == "0.250 / 0.812 (0.032)"


def test_a_case_without_digits_and_a_run_without_a_reading_are_dashes() -> None:
    """Nothing is made up for them."""
    empty = _run("vqgan", 0, quad1=None)
    del empty["reading"]
    row = _row(table1({"runs": [empty]}, "text_to_image"), "VQGAN, 1 seed")
    assert row["Quad1"] == "– / 0.812 (0.032)"
    assert row["seen, Quad1"] == row["read in reconstructions"] == "–"
    row = _row(table3({"runs": [empty]}), "mnist, VQGAN, 1 seed")
    assert row["feature distance"] == "–"
    assert generation_findings({"runs": [empty]}) == []


def test_runs_without_a_measured_gpt_stay_out() -> None:
    """Trained alone, of another size, or a tokenizer alone; with none at all there is no table."""
    trained = _run("mb", 0)
    del trained["stage2"][str(LARGE)]["rules"]["paper"]
    alone = _run("mp", 0)
    del alone["stage2"]
    results = {"runs": [trained, alone, _run("cb", 0, (SMALL,)), _run("vqgan", 0)]}
    assert full_size(results) == LARGE
    assert list(generations(results, LARGE, "paper")) == ["vqgan"]
    assert generations(results, LARGE, "tenth") == {}
    assert list(generations(results, SMALL, "paper")) == ["cb"]
    assert len(accuracies([results["runs"][3]], LARGE, "paper", TASKS[0], "quad1")) == 1
    nothing = {"runs": [trained, alone]}
    assert full_size(nothing) is None
    assert generation_findings(nothing) == generation_blocks(nothing) == []
    assert generation_figures(nothing, {}) == {}
    with pytest.raises(ValueError, match="results must hold a measured Stage 2, got none"):
        table1(nothing, "text_to_image")


def test_table_2_compares_the_two_sizes() -> None:
    """Means beside the paper's, and the difference of the means; other arms are not in it."""
    values = {"vqgan": ([0.5, 0.7], [0.3, 0.2]), "te_vqgan": ([0.9, 0.8], [0.88, 0.78])}
    runs = []
    for arm, sizes in values.items():
        for seed in range(2):
            run = _run(arm, seed, (LARGE, SMALL))
            for size, accuracy in zip((LARGE, SMALL), sizes, strict=True):
                run["stage2"][str(size)]["rules"]["paper"] = _generation(numpy_generator(), quad1=accuracy[seed])
            runs.append(run)
    table = table2({"runs": [*runs, _run("mb", 0, (LARGE, SMALL))]})
    assert table is not None
    assert table.header == ["training images", "VQGAN, 2 seeds", "TE-VQGAN (λ = 10), 2 seeds"]
    paper = [
        [f"{TABLE2[size][arm].mean:.3f} ({TABLE2[size][arm].deviation:.3f})" for arm in values] for size in TABLE2
    ]
    ours = [[_text(values[arm][number]) for arm in values] for number in range(2)]
    assert table.rows == [
        ["300 (paper: 300,000)", *(f"{a} / {b}" for a, b in zip(ours[0], paper[0], strict=True))],
        ["100 (paper: 100,000)", *(f"{a} / {b}" for a, b in zip(ours[1], paper[1], strict=True))],
        ["difference", "0.350 / 0.073", "0.020 / 0.012"],
    ]


def test_table_2_compares_the_seeds_that_have_both_sizes() -> None:
    """More seeds of one size change neither its row nor the difference; without any in common there is neither."""

    def runs(large: tuple[int, ...], small: tuple[int, ...]) -> list[dict[str, Any]]:
        found = []
        for arm in ("vqgan", "te_vqgan"):
            for seed in sorted({*large, *small}):
                sizes = [size for size, seeds in ((LARGE, large), (SMALL, small)) if seed in seeds]
                # A seed is as good with either size.
                found.append(_run(arm, seed, tuple(sizes), quad1=0.9 if seed < 3 else 0.5))
        return found

    paired = table2({"runs": runs((0, 1, 2), (0, 1, 2))})
    assert paired is not None
    assert paired.header[1:] == ["VQGAN", "TE-VQGAN (λ = 10)"]
    assert [cell.split(" / ")[0] for cell in paired.rows[2][1:]] == ["0.000", "0.000"]
    assert table2({"runs": runs((0, 1, 2, 3, 4), (0, 1, 2))}) == paired
    assert table2({"runs": runs((0, 1, 2), (0, 1, 2, 3))}) == paired
    apart = table2({"runs": runs((0, 1), (3, 4, 5))})
    assert apart is not None
    assert [row[1].split(" / ")[0] for row in apart.rows] == ["–", "–", "–"]


def test_one_longer_training_leaves_the_tables_as_they_were() -> None:
    """An arm that is trained on more images too is shown with the size of the others, in every table."""
    arms = ("vqgan", "te_vqgan", "stride_exact")
    runs = [_run(arm, seed, (LARGE, SMALL)) for arm in arms for seed in range(2)]
    longer = copy.deepcopy(runs)
    longer[-1]["stage2"]["900"] = {"rules": {"paper": _generation(numpy_generator())}}
    assert full_size({"runs": longer}) == full_size({"runs": runs}) == LARGE
    for name, table in generation_tables({"runs": runs}).items():
        assert generation_tables({"runs": longer})[name] == table, name
    # Once every arm has it, it is the usual one.
    for run in longer:
        run["stage2"]["900"] = {"rules": {"paper": _generation(numpy_generator())}}
    assert full_size({"runs": longer}) == 900


def test_pooling_that_is_not_padded_is_not_called_padded() -> None:
    """The authors' layer is in the preset of their sizes, ours in the small ones."""
    run = _run("mb", 0)
    assert run["settings"]["model"]["downsample"] == "max_blur_pool"
    for table in (table1, lambda results, _: rules_table(results, TASKS[0])):
        run["stage2"][str(LARGE)]["rules"]["2"] = run["stage2"][str(LARGE)]["rules"]["paper"]
        for downsample, name in (
            ("max_blur_pool", "MB (padded), 1 seed"),
            ("unpadded_max_blur_pool", "MB, 1 seed"),
        ):
            run["settings"]["model"]["downsample"] = downsample
            shown = table({"runs": [run]}, TASKS[0])
            assert shown is not None
            assert [row[0] for row in shown.rows] == [name]


def test_table_2_misses_what_is_not_measured() -> None:
    """No table of one size; no column of no runs; a dash for an arm without the other size."""
    both, one = (LARGE, SMALL), _run("vqgan", 0, (LARGE,))
    assert table2({"runs": [one]}) is None
    assert "table2" not in generation_tables({"runs": [one]})
    assert table2({"runs": [one, _run("mb", 0, both)]}) is None
    half = table2({"runs": [one, _run("te_vqgan", 0, both)]})
    assert half is not None
    assert [row[1].split(" / ")[0] == "–" for row in half.rows] == [False, True, True]
    assert all(not row[2].startswith("–") for row in half.rows)
    alone = table2({"runs": [_run("vqgan", 0, both)]})
    assert alone is not None
    assert alone.header == ["training images", "VQGAN, 1 seed"]
    assert {len(row) for row in alone.rows} == {2}
    trained = copy.deepcopy(one)
    trained["stage2"]["900"] = {"settings": {}}
    unchanged = table2({"runs": [trained, _run("te_vqgan", 0, both)]})
    assert unchanged is not None
    assert [row[0] for row in unchanged.rows] == ["300 (paper: 300,000)", "100 (paper: 100,000)", "difference"]
    first = _run("vqgan", 0, (SMALL,))
    first["stage2"][str(LARGE)] = {"settings": {}}
    assert table2({"runs": [first]}) is None


def test_table_3_has_both_data_sets_beside_the_papers() -> None:
    """Codes, errors and distances; other arms and arms that are not there have no row."""
    main = [_run(arm, seed) for arm in ("vqgan", "te_vqgan", "mb") for seed in range(3)]
    other = [_run("vqgan", seed, data="fashion-mnist") for seed in range(2)]
    table = table3({"runs": main, "other": {"fashion-mnist": {"runs": other}}})
    names = ["mnist, VQGAN", "mnist, TE-VQGAN (λ = 10)", "fashion-mnist, VQGAN, 2 seeds"]
    assert [row[0] for row in table.rows] == names
    groups = {names[0]: main[:3], names[1]: main[3:6], names[2]: other}
    for name, runs in groups.items():
        printed = TABLE3[name.split(",")[0]]["te_vqgan" if "TE-VQGAN" in name else "vqgan"]
        row = _row(table, name)
        tests = [run["evaluation"]["test"] for run in runs]
        assert row["codes used"] == f"{_text([t['used_codes'] for t in tests], '.0f')} / {printed.codes}"
        assert row["codes > 0.1 %"] == _text([t["frequent_codes"] for t in tests], ".0f")
        assert row["reconstruction L1"] == f"{_text([t['l1'] for t in tests], '.4f')} / {printed.reconstruction}"
        assert row["feature distance"] == _text([run["reading"]["feature_distance"] for run in runs], ".4f")
        assert row["LPIPS"] == f"– / {printed.perceptual}"
    # Digits that the paper does not have.
    (row,) = table3({"runs": [_run("vqgan", 0, data="digits")]}).rows
    assert row[1].endswith(" / –")
    assert row[-1] == "– / –"


def _findings(**accuracy: list[float]) -> str:
    runs = [_run(arm, seed, quad1=value) for arm, values in accuracy.items() for seed, value in enumerate(values)]
    return "\n".join(generation_findings({"runs": runs}))


def test_findings_tell_gains_from_losses() -> None:
    """Exchanging the values exchanges the words; equal values are neither."""
    better = _findings(vqgan=[0.5], te_vqgan=[0.625])
    assert "Text to image: the penalty (TE-VQGAN) gains 0.125 (0.625 against 0.500 at Quad1)." in better
    assert "Image to text: the penalty (TE-VQGAN) gains 0.125 (0.625 against 0.500 at Quad1)." in better
    worse = _findings(vqgan=[0.625], te_vqgan=[0.5])
    assert "Text to image: the penalty (TE-VQGAN) loses 0.125 (0.500 against 0.625 at Quad1)." in worse
    assert " gains " not in worse
    same = _findings(vqgan=[0.5], te_vqgan=[0.5001])
    assert "makes no difference to digit accuracy (0.500 against 0.500 at Quad1)." in same
    assert " gains " not in same
    assert " loses " not in same


def test_findings_say_whether_seeds_differ_as_much() -> None:
    """The gap in standard errors of the difference of means, with several seeds of both alone."""
    base, near, far = [0.4, 0.5, 0.6], [0.59, 0.6, 0.61], [0.9, 0.92, 0.91]
    error = math.sqrt(statistics.variance(base) / 3 + statistics.variance(near) / 3)
    text = _findings(vqgan=base, te_vqgan=near)
    assert error < 0.1 < 2 * error
    assert f"gains 0.100 (0.600 against 0.500 at Quad1), less than twice the standard error of {error:.3f}" in text
    text = _findings(vqgan=base, te_vqgan=far)
    assert "gains 0.410 (0.910 against 0.500 at Quad1), more than twice the standard error" in text
    assert "single seed" not in text
    text = _findings(vqgan=base, te_vqgan=[0.9])
    assert "standard error" not in text
    assert "At least one arm has a single seed" in text


def test_findings_name_the_best_arm_beside_the_papers() -> None:
    """Above or not above its TE-VQGAN; without the strided VQGAN there is nothing to compare with."""
    text = _findings(mb=[0.2], k16=[0.95])
    named = "Best arm at Quad1, text to image (rule: the released code's): SC, K = 16 with 0.950"
    assert f"{named}, above the paper's 0.931 (another canvas and training, see below)." in text
    assert " gains " not in text
    text = _findings(vqgan=[0.3], k16=[0.2], stride_exact=[0.1], stride_exact_te=[0.7])
    assert "circular (stride-exact), λ = 10 with 0.700, not above the paper's 0.825" in text
    for question in ("16 codes without penalty loses", "encoder loses", "encoder with the penalty gains"):
        assert text.count(question) == 2


def test_findings_under_another_rule_are_not_compared_with_the_papers() -> None:
    run = _run("vqgan", 0, quad1=0.95)
    rules = run["stage2"][str(LARGE)]["rules"]
    rules["tenth"] = rules.pop("paper")
    text = "\n".join(generation_findings({"runs": [run]}))
    assert "text to image (rule: a tenth of K): VQGAN with 0.950; the paper's 0.931 follows another rule." in text
    assert "image to text (rule: greedy): VQGAN with 0.950; the paper's 0.825 follows another rule." in text


def test_figures_show_what_they_are_given() -> None:
    """Captions above their images, shares of each row, a point a run, an arm a row; names of garments."""
    rng = numpy_generator()
    images = rng.integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    captions = [f"caption {number}" for number in range(5)]
    figure = draw_captions(images, captions)
    assert [axis.get_title() for axis in figure.axes if axis.images] == captions
    assert all(
        (a.images[0].get_array() == i.transpose(1, 2, 0)).all() for a, i in zip(figure.axes, images, strict=False)
    )

    figure = draw_generated(captions, images, {"one": images[::-1], "two": images})
    assert [axis.get_ylabel() for axis in figure.axes[::5]] == ["the caption's image", "one", "two"]
    assert (figure.axes[5].images[0].get_array() == images[-1].transpose(1, 2, 0)).all()

    # A class that was never asked for has an empty row; what was not read is in no column, yet in the sum.
    counts = np.array([[3, 0, 1], [0, 0, 0]])
    figure = draw_confusions({"arm": counts}, ["t-shirt", "ankle boot"])
    assert (figure.axes[0].images[0].get_array() == [[0.75, 0], [0, 0]]).all()
    assert [text.get_text() for text in figure.axes[0].texts] == ["75"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["t-shirt", "ankle boot"]

    points = [Point("a", 0.5, 20.0, 0.9), Point("a", 0.25, 30.0, 0.5), Point("b", 0.1, 5.0, 0.1)]
    left, right = draw_tradeoff(points).axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[0.5, 0.9], [0.25, 0.5]], [[0.1, 0.1]]]
    assert [line.get_xydata().tolist() for line in right.lines] == [[[20.0, 0.9], [30.0, 0.5]], [[5.0, 0.1]]]


def test_rules_are_compared_over_all_quadrant_digits() -> None:
    """Pooled over the four cases, the centre left out; in order; no table of a single rule."""
    runs = [_run("vqgan", 0), _run("k16", 0), _run("k16", 1), _run("te_vqgan", 0)]
    assert rules_table({"runs": runs}, "text_to_image") is None
    rng = numpy_generator()
    for run in runs[:3]:
        run["stage2"][str(LARGE)]["rules"] |= {rule: _generation(rng) for rule in ("all", "16", "2", "tenth")}
    del runs[0]["stage2"][str(LARGE)]["rules"]["16"]
    # As results of before captions could be drawn.
    for run in runs[:3]:
        del run["stage2"][str(LARGE)]["rules"]["2"]["held_out"]["image_to_text"]

    def pooled(rules: dict[str, Any], rule: str, task: str, numbers: tuple[int, ...] = (1, 2, 3, 4)) -> float:
        cases = rules[rule]["held_out"][task]["cases"]
        chosen = [cases[f"quad{number}"] for number in numbers]
        return sum(c["digits_right"] for c in chosen) / sum(c["digits"] for c in chosen)

    for task in TASKS:
        titles = {rule: rule_title(rule, task) for rule in ("paper", "tenth", "2", "16", "all")}
        table = rules_table({"runs": runs}, task)
        assert table is not None
        columns = [title for rule, title in titles.items() if (rule, task) != ("2", "image_to_text")]
        assert table.header == ["tokenizer", *columns]
        row = _row(table, f"{ARMS['k16'].title}, 2 seeds")
        parts = [run["stage2"][str(LARGE)]["rules"] for run in runs[1:3]]
        for rule, title in titles.items():
            if title in columns:
                assert row[title] == _text([pooled(part, rule, task) for part in parts])
        assert _row(table, f"{ARMS['vqgan'].title}, 1 seed")[titles["16"]] == "–"
        assert _row(table, f"{ARMS['te_vqgan'].title}, 1 seed")[titles["tenth"]] == "–"
    table = rules_table({"runs": runs}, "text_to_image", ("quad1",))
    assert table is not None
    expected = _text([pooled(part, "all", "text_to_image", (1,)) for part in parts])
    assert _row(table, f"{ARMS['k16'].title}, 2 seeds")["all"] == expected


def test_tables_show_the_rule_of_most_runs() -> None:
    """Of two that are equally common the first in order."""
    runs = [_run("vqgan", 0), _run("k16", 0)]
    assert shown_rule({"runs": runs}) == "paper"
    rules = [run["stage2"][str(LARGE)]["rules"] for run in runs]
    rules[0]["tenth"] = rules[0].pop("paper")
    assert shown_rule({"runs": runs}) == "paper"
    rules[1]["tenth"] = rules[1]["paper"]
    assert shown_rule({"runs": runs}) == "tenth"
    for name in rules:
        name["50"] = name.pop("tenth")
    assert shown_rule({"runs": runs}) == "50"


def test_reports_without_generated_images_say_how_to_get_them() -> None:
    """Of published runs without their pictures: the other figures and every table stay. And longer trainings."""
    results = read_results(published("small/results.json"))
    pictures = {block.name for block in generation_blocks(results) if isinstance(block, Picture)}
    assert pictures == {"captions.png", "generated.png", "confusions.png", "tradeoff.png"}
    without = {name: value for name, value in results.items() if name not in ("generated", "captions")}
    blocks = generation_blocks(without | {"generated": {}})
    assert {block.name for block in blocks if isinstance(block, Picture)} == {"confusions.png", "tradeoff.png"}
    texts = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert "No generated images are stored; `evaluate --rules paper` stores them." in texts
    assert generation_figures(without, {}).keys() == {"confusions.png", "tradeoff.png"}
    assert not any("not in the tables" in text for text in texts)
    last = results["runs"][0]["stage2"]
    last["900000"] = last[str(full_size(results))]
    said = [block.text for block in generation_blocks(results) if isinstance(block, Paragraph)]
    title = results["runs"][0]["title"]
    assert f"Measured too, but not in the tables below: {title} on 900,000 images." in said


def test_regimes_are_told_by_their_presets(tmp_path: Path) -> None:
    """From the published results: the table of two copies, one of them trained for longer and measured worse."""
    base = read_results(published("small/results.json"))
    base["runs"] = [run for run in base["runs"] if run["arm"] in ("vqgan", "te_vqgan") and run["seed"] == 0]
    longer = copy.deepcopy(base)
    images = str(full_size(base))
    for run in longer["runs"]:
        for case in run["stage2"][images]["rules"]["tenth"]["held_out"]["text_to_image"]["cases"].values():
            case["digits_right"] = 0
        del run["stage2"][images]["rules"]["2"]
    # A tokenizer whose GPT is not trained yet.
    alone = copy.deepcopy(longer["runs"][0])
    del alone["stage2"]
    untrained = {"runs": [alone, longer["runs"][1]]}
    folders = [tmp_path / "base", tmp_path / "longer", tmp_path / "untrained"]
    for folder, results in zip(folders, (base, longer, untrained), strict=True):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
    words = ["regimes", "--results", *map(str, folders), "--into", str(tmp_path / "regimes.md")]
    assert command_line.main(words) == 0
    lines = (tmp_path / "regimes.md").read_text().strip().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [row[0] for row in table[2:]] == [f"`{folder.name}`" for folder in folders for _ in range(2)]
    assert [row[1] for row in table[2:]] == [f"{ARMS[arm].title}, 1 seed" for arm in ("vqgan", "te_vqgan")] * 3
    assert table[6][5:] == [table[4][5], "–", "–", "–"]
    for row, run in zip(table[2:4], base["runs"], strict=True):
        part, test = run["stage2"][images], run["evaluation"]["test"]

        def share(cases: Any) -> str:
            return f"{sum(c['digits_right'] for c in cases) / sum(c['digits'] for c in cases):.3f}"

        def in_quadrants(generation: Any, task: str) -> str:
            cases = generation["held_out"][task]["cases"]
            return share([cases[f"quad{number}"] for number in (1, 2, 3, 4)])

        assert row[2:] == [
            "64",
            str(test["used_codes"]),
            f"{EquivarianceReport.from_dict(run['evaluation']['equivariance']).sub_stride.kappa:.3f}",
            share(run["reading"]["reconstruction"]["cases"].values()),
            in_quadrants(part["rules"]["tenth"], "text_to_image"),
            in_quadrants(part["rules"]["2"], "text_to_image"),
            in_quadrants(part["rules"]["tenth"], "image_to_text"),
        ]
    assert [row[6:8] for row in table[4:6]] == [["0.000", "–"]] * 2


def test_regimes_need_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without them, or without a GPT, is named."""
    words = ["regimes", "--results", str(tmp_path), "--into", str(tmp_path / "regimes.md")]
    assert command_line.main(words) == 1
    assert f"results must be folders with results.json, got {tmp_path}." in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"runs": []}')
    assert command_line.main(words) == 1
    assert "results must hold a measured Stage 2, got none." in capsys.readouterr().err
    assert not (tmp_path / "regimes.md").exists()
