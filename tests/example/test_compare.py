"""The comparison of arms: table, picture and counts are functions of results.json."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.reports.compare import comparison, write_comparison
from tests.published import RESULTS, published


@pytest.mark.slow
def test_arms_of_a_run_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line: two arms, one counted; a row each, and the counts beside."""
    out = ["--preset", "smoke", "--out", str(tmp_path)]
    for arm in ("vqgan", "integer_exact"):
        assert main(["stage1", *out, "--arm", arm]) == 0
    assert main(["exactness", *out, "--arm", "integer_exact", "--tokens", "4096", "--threads", "1"]) == 0
    assert main(["exactness", *out, "--arm", "integer_exact", "--data", "mnist"]) == 1
    output = capsys.readouterr()
    assert "data must be 'digits' as in" in output.err
    printed = re.search(r"float64: 0 of ([\d,]+) indices differ", output.out)
    assert printed
    assert int(printed[1].replace(",", "")) >= 4096
    assert main(["report", *out]) == 0
    assert main(["compare", *out]) == 0
    folder = tmp_path / "report"
    table = (folder / "comparison.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 4
    assert "| polyphase (integer-exact) |" in table
    run = next(r for r in json.loads((folder / "results.json").read_text())["runs"] if r["arm"] == "vqgan")
    assert f"| {run['evaluation']['test']['l1']:.4f} |" in table
    assert "| VQGAN | polyphase (integer-exact) |" in (folder / "metrics.md").read_text()
    counts = (folder / "exactness.md").read_text()
    assert f"| float64 | {printed[1]} | 0 | 64 | 1,024 |" in counts
    assert "VQGAN" not in counts
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_unfinished_runs_are_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A count is of the run that the options name, or of none."""
    out = ["--preset", "smoke", "--out", str(tmp_path)]
    assert main(["exactness", *out, "--arm", "integer_exact", "--tokens", "1"]) == 1
    expected = "folder must be that of a finished stage1 run, got "
    assert expected in capsys.readouterr().err


def test_folder_without_results_is_refused(tmp_path: Path) -> None:
    """There is nothing to compare."""
    with pytest.raises(ValueError, match=r"results must be a folder with results\.json, got"):
        write_comparison(tmp_path)


def test_arms_come_before_seeds() -> None:
    """Means over the seeds of an arm, then every run with its interval; an arm of one seed is named."""
    first = json.loads(published("small/results.json").read_text())["runs"][0]
    second, alone = copy.deepcopy(first), copy.deepcopy(first)
    second["seed"], alone["title"] = 1, "alone"
    for run, l1, kappa in ((first, 0.25, 0.5), (second, 0.5, 0.625)):
        run["evaluation"]["test"]["l1"] = l1
        run["evaluation"]["equivariance"]["placement"] |= {"kappa": kappa, "rate": kappa}
    arms, seeds = comparison([first, second, alone]).split("Means over seeds")
    rows = [line.split(" | ") for line in arms.splitlines()[2:] if line]
    assert [row[0] for row in rows] == ["| VQGAN", "| alone, 1 of 2 seeds"]
    assert rows[0][1] == "0.562 ± 0.088 (0.562)"
    assert rows[0][7] == "0.3750 ± 0.1768"
    assert "[" in rows[1][1]
    assert [line.split(" | ")[0] for line in seeds.splitlines()[4:7]] == [
        "| VQGAN, seed 0",
        "| VQGAN, seed 1",
        "| alone, seed 0",
    ]
    assert "Means over seeds" not in comparison([first, alone])
    undefined = copy.deepcopy(first)
    undefined["evaluation"]["equivariance"]["placement"] |= {"kappa": float("nan"), "kappa_defined": False}
    assert "| undefined (0.500) |" in comparison([undefined, second])


def _small() -> dict[str, Any]:
    return dict(json.loads(published("small/results.json").read_text()))


def _folder(path: Path, runs: list[dict[str, Any]]) -> Path:
    path.mkdir()
    (path / "results.json").write_text(json.dumps({"commands": [f"made {path.name}"], "runs": runs}))
    return path


def test_tokenizers_of_several_reports_become_one_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: the arms that are named, in their order, without what is not compared."""
    runs = _small()["runs"]
    first = _folder(tmp_path / "first", [run for run in runs if run["arm"] in ("vqgan", "cb")])
    second = _folder(tmp_path / "second", [run for run in runs if run["arm"] == "k16"])
    into = tmp_path / "both"
    words = ["compare", "--results", str(first), str(second), "--into", str(into), "--arms", "k16", "vqgan"]
    assert main(words) == 0
    results = json.loads((into / "results.json").read_text())
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        (arm, seed) for arm in ("k16", "vqgan") for seed in (0, 1, 2)
    ]
    assert not {"stage2", "log", "reading", "exactness"} & set().union(*results["runs"])
    assert results["commands"][:2] == ["made first", "made second"]
    assert "compare --results" in results["commands"][2]
    published_rows = published("small/comparison.md").read_text().splitlines()
    lines = (into / "comparison.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| VQ", "| SC"))]
    assert len(rows) == 2 + 6
    assert set(rows) <= set(published_rows)
    assert capsys.readouterr().out.startswith(lines[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--results", "A", "B"], "into must be a folder where --results names several, got None"),
        (
            ["--results", "A", "--into", "C"],
            "arms must be given together with --into, or neither of them, got None",
        ),
        (["--results", "A", "--arms", "vqgan"], "arms must be given together with --into, or"),
        (["--results", "A", "--into", "C", "--arms", "mp"], r"arms must be some of \['vqgan'\], .* got 'mp'"),
        (
            ["--results", "A", "B", "--into", "C", "--arms", "vqgan", "k16"],
            "results must be runs under equal",
        ),
        (["--results", "A", "--into", "C", "--arms", "vqgan", "vqgan"], r"arms must be different ones, .*'vqgan'"),
        (["--results", "A", "F", "--into", "C", "--arms", "vqgan"], "results must be reports of arms.*F/results"),
        (["--results", "P", "--into", "C", "--arms", "k16"], "results must be a folder with results of digits"),
    ],
)
def test_folders_that_do_not_go_together_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """By name, and nothing is written."""
    runs = _small()["runs"]
    other = copy.deepcopy(next(run for run in runs if run["arm"] == "k16"))
    other["settings"]["steps"] += 1
    _folder(tmp_path / "A", [run for run in runs if run["arm"] == "vqgan"])
    _folder(tmp_path / "B", [other])
    _folder(tmp_path / "F", [{"name": "vq", "settings": {}}])
    pictures = copy.deepcopy(other)
    pictures["settings"] |= {"data": "images:0", "held_out": False}
    _folder(tmp_path / "P", [pictures])
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "C").exists()
    assert {path.name for path in (tmp_path / "A").iterdir()} == {"results.json"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/comparison.md")), ids=lambda path: path.parent.name)
def test_published_comparison_follows_from_its_data(path: Path, tmp_path: Path) -> None:
    """The committed tables are what the committed results.json gives."""
    (tmp_path / "results.json").write_bytes(published(f"{path.parent.name}/results.json").read_bytes())
    write_comparison(tmp_path)
    # Nothing was counted where there is no exact arm.
    names = [name for name in ("comparison.md", "metrics.md", "exactness.md") if (tmp_path / name).is_file()]
    assert names == [
        name for name in ("comparison.md", "metrics.md", "exactness.md") if (path.parent / name).is_file()
    ]
    for name in names:
        assert (tmp_path / name).read_text() == (path.parent / name).read_text()
