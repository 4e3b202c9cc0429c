"""Two versions of the library, timed in turns."""

from __future__ import annotations

import json
import math
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from benchmarks import copies as copies_benchmark
from benchmarks import paired
from benchmarks.problem import Size
from te_quant import VectorQuantizer
from te_quant.quantizers._rows import Layout

ROOT = Path(__file__).parents[2]


class Stub:
    """A worker whose calls take a known time."""

    def __init__(self, seconds: float, order: list[float], built: list[float]) -> None:
        self.seconds = seconds
        self.order = order
        self.built = built

    def ask(self, **question: object) -> Any:
        """Answer as :class:`benchmarks.paired.Worker` does."""
        (self.order if "calls" in question else self.built).append(self.seconds)
        return self.seconds


def test_versions_take_turns_and_the_ratio_is_after_by_before() -> None:
    """Each goes first in half of the pairs."""
    order: list[float] = []
    built: list[float] = []
    pair: list[Any] = [Stub(0.2, order, built), Stub(0.3, order, built)]
    cell = paired.compare(pair, "ema", Size(4, 3, 2), budget=0.0, min_pairs=4)
    assert order == [0.2, 0.3, 0.3, 0.2, 0.2, 0.3, 0.3, 0.2]
    assert cell["pairs"] == 4
    assert built == [0.2, 0.3]
    paired.compare(pair, "ema", Size(4, 3, 2), budget=0.0, min_pairs=4, first=1)
    assert built == [0.2, 0.3, 0.3, 0.2]
    assert cell["ratio"] == pytest.approx({"low": 1.5, "mean": 1.5, "high": 1.5})
    measured = [
        {**cell, "mode": mode, "first": first}
        for first in (0, 1, 0, 1)
        for mode in ("eval", "ema", "ema, revival")
    ]
    rows, sizes = paired.pooled(measured), paired.by_size(measured)
    assert [row["processes"] for row in rows] == [4] * 3
    ratio = " | 1.500 [1.500, 1.500]" * 4
    assert f"| 4 | 3 | 2 | 200{ratio} |" in paired.table(rows, sizes)


def test_the_modes_of_a_size_are_pooled_by_process() -> None:
    """What one process takes longer in all modes is one deviation, not three; revival is none of the modes."""
    size = Size(4, 3, 2)._asdict()
    modes = {"eval": 1.0, "gradient": 1.1, "ema": 1.21, "ema, revival": 9.0}
    drift = [1.0, 1.02, 1.01, 1.03]
    measured = [
        {"mode": mode, **size, "ratio": {"mean": ratio * factor}, "first": number % 2}
        for number, factor in enumerate(drift)
        for mode, ratio in modes.items()
    ]
    [row] = paired.by_size(measured)
    expected = paired.interval_of_processes([1.1 * factor for factor in drift], [0, 1, 0, 1])
    assert row["processes"] == 4
    assert list(row["ratio"].values()) == pytest.approx(list(expected))


def test_a_call_that_is_disturbed_does_not_count() -> None:
    """The median of the pairs stays where a mean would follow."""
    assert paired.interval([1.02] * 9 + [30.0]).mean == pytest.approx(1.02)


def test_the_interval_holds_the_mean_of_noisy_ratios() -> None:
    """In about 95 of 100 experiments; never is a band of no width taken for one."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        found = paired.interval(list(np.exp(generator.normal(0.1, 0.2, size=30))))
        assert found.low < found.mean < found.high
        held += found.low < math.exp(0.1) < found.high
    assert 85 <= held <= 100


def test_intervals_over_processes_hold_what_pairs_of_calls_cannot_see() -> None:
    """Processes of the same code differ by 2 %: their t interval holds 1, the bootstrap of one does not."""
    generator = np.random.default_rng(0)
    held = {"processes": 0, "calls": 0}
    for _ in range(200):
        offsets = generator.normal(0, 0.02, size=6)
        calls = np.exp(generator.normal(offsets, 0.01, size=(20, 6)))
        found = paired.interval_of_processes(list(np.exp(np.log(calls).mean(0))), [0, 1] * 3)
        held["processes"] += found.low < 1 < found.high
        one = paired.interval(list(calls[:, 0]))
        held["calls"] += one.low < 1 < one.high
    assert held["processes"] >= 180
    assert held["calls"] < 60


def test_what_the_order_of_building_does_is_neither_effect_nor_noise() -> None:
    """A version that is 10 % slower when built first: the two orders cancel, and the interval stays narrow."""
    noise = [0.001, -0.001, 0.002, -0.002, 0.0, 0.0]
    first = [0, 1, 0, 1, 0, 1]
    ratios = [math.exp((0.1 if order == 0 else -0.1) + value) for order, value in zip(first, noise, strict=True)]
    found = paired.interval_of_processes(ratios, first)
    assert found.mean == pytest.approx(1.0, abs=1e-3)
    assert found.high - found.low < 0.01
    # One order only, or too few: no interval.
    assert math.isnan(paired.interval_of_processes(ratios[::2], first[::2]).low)
    assert math.isnan(paired.interval_of_processes(ratios[:2], first[:2]).low)


def test_the_interval_over_processes_is_that_of_a_linear_model() -> None:
    """In logarithms: the intercept of a regression on the order, coded -1 and 1."""
    first = [0, 0, 0, 1, 1]
    logs = np.log([1.01, 0.98, 1.05, 1.0, 0.97])
    design = np.stack([np.ones(5), 2 * np.array(first) - 1.0], 1)
    coefficients, residual, *_ = np.linalg.lstsq(design, logs, rcond=None)
    error = math.sqrt(residual[0] / 3 * np.linalg.inv(design.T @ design)[0, 0])
    half = scipy.stats.t.ppf(0.975, 3) * error
    found = paired.interval_of_processes(list(np.exp(logs)), first)
    expected = [coefficients[0] - half, coefficients[0], coefficients[0] + half]
    np.testing.assert_allclose(np.log([found.low, found.mean, found.high]), expected)


def test_only_wide_intervals_are_measured_again() -> None:
    """By their width, wherever they lie; where there are too few processes for one, too."""
    narrow, wide, short = Size(1, 2, 3), Size(4, 5, 6), Size(7, 8, 9)
    ratios = {narrow: (1.2, 1.2, 1.201, 1.201), wide: (1.0, 1.0, 1.1, 1.1), short: (1.0,)}
    measured = [
        {"mode": mode, **size._asdict(), "ratio": {"mean": ratio}, "first": number % 2}
        for size, values in ratios.items()
        for mode in ("eval", "gradient", "ema")
        for number, ratio in enumerate(values)
    ]
    assert paired._wide(measured, 0.03) == {wide, short}


def test_a_missing_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """And an exit status."""
    assert paired.main([]) == 2
    assert capsys.readouterr().err == "error: --before must be the folder with the other te_quant, got none.\n"


@pytest.mark.slow
def test_both_versions_compute_with_their_own_operators(tmp_path: Path) -> None:
    """An error in one's search is not the other's, although both are in one process."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    search = tmp_path / "src" / "te_quant" / "_search" / "operators.py"
    text = search.read_text(encoding="utf-8")
    raising = "def _search(*arguments: Any) -> Tensor:\n    raise ArithmeticError\n\n\ndef _unused("
    marked = text.replace("def _search(", raising)
    assert marked != text
    search.write_text(marked, encoding="utf-8")
    question = {"mode": "eval", "size": [8, 4, 2]}
    good, bad = ROOT / "src", tmp_path / "src"
    for sources, fails in (((bad, good), 0), ((good, bad), 1)):
        with closing(paired.Worker(sources, 1)) as worker:
            assert paired.Version(worker, paired.PACKAGES[1 - fails]).ask(**question) > 0
            with pytest.raises(RuntimeError, match="a worker must answer"):
                paired.Version(worker, paired.PACKAGES[fails]).ask(**question)


@pytest.mark.slow
def test_a_version_against_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real processes answer, and a second call measures only what is missing."""
    monkeypatch.setitem(paired.SIZES, "quick", (Size(64, 8, 4),))
    arguments = ["--before", str(ROOT / "src"), "--grid", "quick", "--budget", "0", "--min-pairs", "2"]
    arguments += ["--out", str(tmp_path), "--most", "0", "--processes"]
    assert paired.main([*arguments, "1"]) == 0
    arguments.append("2")
    assert paired.main(arguments) == 0
    first = json.loads((tmp_path / "paired.json").read_text(encoding="utf-8"))
    assert [cell["mode"] for cell in first["cells"]] == ["eval", "gradient", "ema", "ema, revival"]
    assert [cell["processes"] for cell in first["cells"]] == [2] * 4
    assert [cell["first"] for cell in first["measured"]] == [0] * 4 + [1] * 4
    assert all(cell["ratio"]["mean"] > 0 for cell in first["cells"])
    assert paired.main(arguments) == 0
    assert json.loads((tmp_path / "paired.json").read_text(encoding="utf-8"))["measured"] == first["measured"]


def _benchmarks_page() -> str:
    """Its words, without the markers of numbers."""
    page = (ROOT / "docs/reference/results/benchmarks.md").read_text(encoding="utf-8")
    return " ".join(re.sub(r"<!--.*?-->", "", page).split())


def test_the_published_sentences_follow_from_the_published_times() -> None:
    """All intervals lie below the aim; what is said of the size whose processes differ most; the table."""
    content = json.loads((ROOT / "benchmarks/results/paired/paired.json").read_text(encoding="utf-8"))
    cells, sizes, measured = (content[name] for name in ("cells", "sizes", "measured"))
    assert (cells, sizes) == (paired.pooled(measured), paired.by_size(measured))
    assert max(size["ratio"]["high"] for size in sizes) < 1.05
    text = _benchmarks_page()
    assert f"all {len(sizes)} intervals lie below that" in text
    most = max(sizes, key=lambda size: size["processes"])
    assert [most[name] for name in "NKC"] == [8192, 16384, 8]
    assert f"that size took {most['processes']} processes" in text
    ratios = [cell["ratio"]["mean"] for cell in measured if cell["K"] == 16384 and cell["mode"] in paired.MODES]
    assert min(ratios) < 1 / 1.1
    assert max(ratios) > 1.1
    assert min(size["processes"] for size in sizes) == 6
    assert paired.table(cells, sizes) == (ROOT / "benchmarks/results/paired/paired.md").read_text(encoding="utf-8")


def test_the_copy_is_what_differs_between_the_two_forward_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One returns a view, the other a contiguous tensor; the layout is itself again afterwards."""
    formats = []
    original = Layout.arrange

    def spy(*arguments: Any) -> Any:
        return formats.append(VectorQuantizer.forward(*arguments).quantized.is_contiguous())

    for copies in (False, True):
        timer = copies_benchmark.ForwardPass(copies)
        assert timer.ask(size=(1024, 4, 3)) > 0
        with monkeypatch.context() as patch:
            patch.setattr(timer.quantizer, "forward", lambda latents, timer=timer: spy(timer.quantizer, latents))
            timer.ask(calls=2)
    assert formats == [False, False, True, True]
    assert Layout.arrange is original
    monkeypatch.setattr(copies_benchmark, "SIZES", (Size(1024, 4, 3),))
    assert copies_benchmark.main(["--budget", "0", "--min-pairs", "2", "--out", str(tmp_path)]) == 0
    [cell] = json.loads((tmp_path / "copies.json").read_text(encoding="utf-8"))["cells"]
    assert (cell["K"], cell["C"], cell["pairs"]) == (4, 3, 2)


def test_the_published_cost_of_the_copy_follows_from_the_published_times() -> None:
    """The table, and the sentence above it."""
    folder = ROOT / "benchmarks/results/copies"
    cells = json.loads((folder / "copies.json").read_text(encoding="utf-8"))["cells"]
    assert copies_benchmark.table(cells) == (folder / "copies.md").read_text(encoding="utf-8")
    worst = [max(100 * (cell["ratio"]["mean"] - 1) for cell in cells if cell["K"] == K) for K in (1024, 8192)]
    text = _benchmarks_page()
    assert "costs at most {:.1f} % of a forward pass at K = 1,024 and {:.1f} % at K = 8,192".format(*worst) in text
