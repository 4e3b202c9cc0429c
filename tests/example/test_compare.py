"""The comparison of arms: table, picture and counts are functions of results.json."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

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
