"""Sentences, tables and colours of the report follow from the numbers."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

from examples.te_vqgan.reports.document import Bullets, Heading, Paragraph, Picture, Table, to_html, to_markdown
from examples.te_vqgan.reports.figures import code_colors, draw_placements, draw_shifts, most_alike
from examples.te_vqgan.reports.findings import findings
from examples.te_vqgan.reports.report import _provenance, _title
from examples.te_vqgan.reports.results import METRICS, cell
from examples.te_vqgan.reports.trial import trial_size
from examples.te_vqgan.runs.provenance import Execution, git_commit, versions
from examples.te_vqgan.stage1.evaluation import psnr
from examples.te_vqgan.stage1.presets import PRESETS
from examples.te_vqgan.stage2.settings import STAGE2
from te_quant.equivariance import measure_equivariance


def _run(title: str, seed: int, **changes: float) -> dict[str, Any]:
    """One run with a real equivariance report, some of its numbers replaced."""
    report = measure_equivariance(
        lambda x: (x[:, 0, ::4, ::4] > 0).long(), torch.rand(2, 1, 16, 16) * 2 - 1, stride=4, num_codes=16
    ).to_dict()
    values = {"l1": 0.03, "psnr": 28.0, "used": 50, "perplexity": 20.0, "placement": 0.7, "placement_kappa": 0.6}
    values |= {"sub_stride": 0.6, "sub_stride_kappa": 0.4, **changes}
    for name in ("placement", "sub_stride"):
        interval = [values[name] - 0.01, values[name] + 0.01]
        numbers = {"rate": values[name], "kappa": values[name + "_kappa"], "rate_interval": interval}
        report[name] = {**report[name], **numbers}
    quality = {
        "images": 100,
        "tokens": 6400,
        "l1": values["l1"],
        "l2": 0.01,
        "psnr": values["psnr"],
        "used_codes": values["used"],
        "frequent_codes": values["used"] - 3,
        "perplexity": values["perplexity"],
    }
    codebook = {"orthogonality": 0.01, "mean_abs_cosine_used": 0.1}
    evaluation = {"test": quality, "codebook": codebook, "equivariance": report}
    return {"title": title, "seed": seed, "evaluation": evaluation}


def _text(*runs: dict[str, Any]) -> str:
    return "\n".join(findings({"runs": list(runs)}))


def test_findings_say_which_way_the_numbers_go() -> None:
    """Exchanging two arms exchanges higher and lower; equal numbers are neither."""
    low, high = {"l1": 0.02, "placement": 0.5}, {"l1": 0.05, "placement": 0.8}
    upward = _text(_run("A", 0, **low), _run("B", 0, **high))
    assert "B has a higher reconstruction error (L1) than A, by 0.0300 (0.0500 against 0.0200)" in upward
    assert "B has a higher placement agreement than A, by 0.300 (0.800 against 0.500)" in upward
    downward = _text(_run("A", 0, **high), _run("B", 0, **low))
    assert "B has a lower reconstruction error (L1) than A, by 0.0300 (0.0200 against 0.0500)" in downward
    assert "B has a lower placement agreement than A, by 0.300 (0.500 against 0.800)" in downward
    same = _text(_run("A", 0), _run("B", 0))
    assert "higher" not in same
    assert "lower" not in same
    assert "B and A have the same placement agreement to the digits shown (0.700 against 0.700)" in same


def test_findings_give_differences_of_several_seeds_their_standard_error() -> None:
    """The one of Welch's test, in the digits of the metric; single seeds have none."""
    ours, theirs = [0.03, 0.05, 0.07], [0.02, 0.03]
    error = math.sqrt(statistics.variance(ours) / 3 + statistics.variance(theirs) / 2)
    runs = [_run(arm, seed, l1=l1) for arm, group in (("A", theirs), ("B", ours)) for seed, l1 in enumerate(group)]
    text = _text(*runs)
    assert f"than A, by 0.0250 ± {error:.4f} (0.0500 against 0.0250)" in text
    assert "± is the standard deviation between seeds, behind a difference its standard error." in text
    assert "than A, by 0.0300 (0.0500 against 0.0200)" in _text(runs[0], *runs[2:])


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"placement_kappa": 0.7, "sub_stride_kappa": 0.5}, "its agreement stays higher"),
        ({"placement_kappa": 0.5, "sub_stride_kappa": 0.5}, "is higher only for shifts below a token"),
        ({"placement_kappa": 0.5, "sub_stride_kappa": 0.3}, "its agreement is not higher"),
    ],
)
def test_findings_warn_where_fewer_codes_may_be_the_reason(changes: dict[str, float], verdict: str) -> None:
    """More agreement with fewer effective codes is never told without κ; with as many there is no warning."""
    better = {"placement": 0.8, "sub_stride": 0.7, **changes}
    warned = _text(_run("A", 0), _run("B", 0, perplexity=8.0, **better))
    assert "with fewer effective codes" in warned
    assert verdict in warned
    assert "smaller effective codebook or the other differences" in warned
    assert "fewer effective codes" not in _text(_run("A", 0), _run("B", 0, perplexity=21.0, **better))


def test_findings_say_how_many_seeds_there_are() -> None:
    """One seed says nothing of the spread; one arm compares nothing."""
    assert "At least one arm has a single seed" in _text(_run("A", 0), _run("B", 0))
    assert "at least 2 seeds" in _text(_run("A", 0), _run("A", 1), _run("B", 0), _run("B", 1))
    assert "Only A is finished" in _text(_run("A", 0))


def test_every_finding_about_an_arm_names_it() -> None:
    """Of nine arms a sentence without a name belongs to none."""
    arms = [_run(title, 0, perplexity=8.0, placement=0.8) for title in ("B", "C")]
    *about, last = findings({"runs": [_run("A", 0), *arms]})
    assert "single seed" in last
    assert [sentence.split()[0].rstrip(":") for sentence in about] == ["B"] * 5 + ["C"] * 5


def test_findings_of_single_seeds_tell_no_differences_within_the_noise() -> None:
    """Intervals of ±0.01 tell a difference if they do not overlap; with a second seed they are not looked at."""
    near, far = _run("B", 0, sub_stride=0.615, perplexity=8.0), _run("B", 0, sub_stride=0.625, perplexity=8.0)
    text = _text(_run("A", 0), near)
    assert (
        "B and A cannot be told apart by their agreement after shifts below a token: the 95 % intervals over test "
        "digits overlap (0.615 [0.605, 0.625] against 0.600 [0.590, 0.610])"
    ) in text
    assert "agrees more often" not in text
    assert "B has a higher agreement after shifts below a token than A" in _text(_run("A", 0), far)
    seeds = [_run("A", 0), _run("A", 1), near, _run("B", 1, sub_stride=0.615)]
    assert "B has a higher agreement after shifts below a token than A" in _text(*seeds)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(100, 100)], None),
        ([(99, 1_000)], "99 optimizer steps and 1,000 test images"),
        ([(1_000, 99)], "1,000 optimizer steps and 99 test images"),
        ([(2_400, 1_500), (1, 1)], "1 optimizer step and 1 test image"),
    ],
)
def test_a_trial_is_a_training_that_is_too_short_or_a_test_set_that_is_too_small(
    sizes: list[tuple[int, int]], expected: str | None
) -> None:
    """One of them among the runs makes the whole comparison one."""
    assert trial_size([{"steps": steps, "eval_images": images} for steps, images in sizes]) == expected


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_smoke_is_the_only_preset_that_is_a_trial(preset: str) -> None:
    """Every other one trains for long enough to compare."""
    sizes = [PRESETS[preset], *([STAGE2[preset]] if STAGE2[preset] else [])]
    assert (trial_size(dataclasses.asdict(one) for one in sizes) is not None) == (preset == "smoke")


def test_title_names_a_few_arms_and_counts_many() -> None:
    """Nine names make no title."""
    runs = [{**_run(title, 0), "settings": {"data": "mnist"}} for title in "ABCDE"]
    assert _title({"runs": runs[:2]}) == "A and B on mnist"
    assert _title({"runs": runs[:4]}) == "A; B; C; D on mnist"
    assert _title({"runs": runs}) == "5 tokenizers on mnist"


def test_findings_write_an_undefined_kappa_as_such() -> None:
    """A collapsed codebook has no κ."""
    text = _text(_run("A", 0), _run("B", 0, placement=1.0, placement_kappa=math.nan))
    assert "κ undefined against 0.600" in text


def test_cells_give_mean_and_sample_deviation_over_seeds() -> None:
    """One run has no ±; κ stands in brackets; NaN is undefined."""
    values = [0.02, 0.03, 0.07]
    runs = [_run("A", seed, l1=value) for seed, value in enumerate(values)]
    mean, deviation = sum(values) / 3, statistics.stdev(values)
    assert cell(METRICS["l1"], runs) == f"{mean:.4f} ± {deviation:.4f}"
    assert cell(METRICS["l1"], runs[:1]) == "0.0200"
    assert cell(METRICS["placement"], runs[:1]) == "0.700 (0.600)"
    undefined = copy.deepcopy(runs[0])
    undefined["evaluation"]["equivariance"]["placement"]["kappa"] = "nan"
    assert cell(METRICS["placement"], [undefined]) == "0.700 (undefined)"


def test_psnr_has_peak_to_peak_range_two() -> None:
    """An error of the whole range is 0 dB, a tenth of it 20 dB, none is infinite."""
    assert psnr(4.0) == 0.0
    assert psnr(0.04) == pytest.approx(20.0)
    assert psnr(0.0) == math.inf


def test_code_colors_are_distinct_and_grey_marks_the_commonest() -> None:
    """Forty codes, forty colours; the ground's code does not shout."""
    grids = np.concatenate([np.full(50, 7), np.arange(40)])
    colors = code_colors(grids)
    assert set(colors) == set(range(40))
    assert len({tuple(round(part, 4) for part in color) for color in colors.values()}) == 40
    assert len(set(colors[7])) == 1
    assert all(len(set(color)) > 1 for code, color in colors.items() if code != 7)


def test_placement_figure_counts_the_tokens_that_equal_the_centres() -> None:
    """Blocks copied from the centre score 16 of 16, one changed token 15, others 0."""
    tokens = np.zeros((5, 8, 8), np.int64)
    block = np.arange(1, 17).reshape(4, 4)
    tokens[4, 2:6, 2:6] = tokens[0, :4, :4] = tokens[1, :4, 4:] = block
    tokens[1, 0, 4] = 99
    tokens[3, 4:, 4:] = block
    images = np.zeros((5, 3, 32, 32), np.uint8)
    samples = {"A": {"placed_tokens": tokens, "shifted_tokens": tokens, "placed_images": images}}
    labels = [axis.get_xlabel() for axis in draw_placements(samples).axes[5:]]
    counts = [label.split(" of ")[0] for label in labels]
    assert counts == ["reference block", "16", "15", "0", "16"]


def test_document_renders_the_same_content_twice() -> None:
    """Text is escaped in HTML and bars in Markdown; pictures are data URIs or links."""
    blocks = [
        Heading(1, "A & B"),
        Paragraph("see `a < b`"),
        Bullets(["one", "two"]),
        Table(["", "x"], [["|y|", "1 ± 2 (3 ± 4) / 5 (6)"]]),
        Picture("a_b.png", 'the "picture"'),
    ]
    markdown = to_markdown(blocks)
    assert "# A & B" in markdown
    assert "- one\n- two" in markdown
    assert "| \\|y\\| | 1 ± 2 (3 ± 4) / 5 (6) |" in markdown
    assert '![a b](a_b.png)\n\n*the "picture"*' in markdown
    html = to_html(blocks, {"a_b.png": b"123"}, "T<")
    assert "<h1>A &amp; B</h1>" in html
    assert "<code>a &lt; b</code>" in html
    assert "<td>1&nbsp;±&nbsp;2 (3&nbsp;±&nbsp;4)&nbsp;/ 5&nbsp;(6)</td>" in html
    assert "<title>T&lt;</title>" in html
    assert '<img alt="a b" src="data:image/png;base64,MTIz">' in html
    assert "<figcaption>the &quot;picture&quot;</figcaption>" in html


def test_columns_of_text_are_aligned_left_in_markdown() -> None:
    """Numbers with signs, bounds, deviations or without a value stay right; the first column names the rows."""
    header = ["run", "limit", "error", "device", "missing"]
    rows = [
        ["1", "≤ 1.2 x", "0.5 ± 0.1", "cpu, 2 threads", "–"],
        ["2", "–", "skipped", "cuda", "–"],
        ["3", "≥ 4 x", "-0.2 (0.1)", "16 cores", "–"],
    ]
    assert to_markdown([Table(header, rows)]).splitlines()[1] == "| --- | ---: | ---: | --- | ---: |"


def test_provenance_knows_versions_and_survives_without_git(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside a repository, or without git, there is no commit and no error."""
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_reports_name_every_commit_and_every_version() -> None:
    """Of both stages of all runs, each once: not those of the first run for all."""

    def part(commit: str | None, torch_version: str = "2.13") -> dict[str, Any]:
        return {"provenance": {"commit": commit, "versions": {"torch": torch_version, "other": None}}}

    one = {**part("a"), "stage2": {"8": part("b"), "16": part("a")}}
    assert _provenance([part("a"), part("a")]) == "Versions: torch 2.13; commit `a`."
    assert _provenance([part("a"), one]) == "Versions: torch 2.13; commit `a`, commit `b`."
    assert _provenance([part(None, "2.9"), one]) == (
        "Versions: torch 2.9; or torch 2.13; no git commit known, commit `a`, commit `b`."
    )


def test_execution_sets_the_threads_and_gives_the_device() -> None:
    """0 leaves torch's number alone."""
    before = torch.get_num_threads()
    try:
        assert Execution("cpu", 2).apply() == torch.device("cpu")
        assert torch.get_num_threads() == 2
        Execution("cpu", 0).apply()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tokens_that_move_early_are_compared_where_they_went() -> None:
    """An exact tokenizer may move its tokens at the first pixel; at the unmoved place it would look broken."""
    grid = np.arange(64).reshape(8, 8)
    block, rolled = grid[2:6, 2:6], np.roll(grid, 1, axis=1)
    assert most_alike(rolled, block, [(2, 2), (2, 3)]) == ((2, 3), 16)
    assert most_alike(rolled, block, [(2, 2)]) == ((2, 2), 0)
    assert most_alike(grid, block, [(2, 2), (2, 3)]) == ((2, 2), 16)
    tokens = np.stack([grid, rolled, rolled, rolled, rolled])
    pictures = np.zeros((5, 3, 32, 32), np.uint8)
    arm = {"shifted_tokens": tokens, "placed_tokens": tokens, "shifted_images": pictures}
    labels = [axis.get_xlabel() for axis in draw_shifts({"exact": arm}).axes]
    assert labels.count("16 of 16 tokens like the first") == 4
