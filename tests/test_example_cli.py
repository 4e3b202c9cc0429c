"""The example from its command line to its report, on the preset that takes seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.pipeline import STOPPED, Job, JobFailed, run_jobs
from examples.te_vqgan.results import run_folder
from te_quant import VQAutoencoder

PICTURES = ("token_grids", "token_shifts", "reconstructions", "loss_curves", "equivariance")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``run`` leaves behind, both arms at once."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["run", "--preset", "smoke", "--out", str(folder), "--threads", "2"]) == 0
    return folder


def test_run_writes_everything(out: Path) -> None:
    """Data, a finished run an arm that loads as a model, and the report with all its pictures."""
    assert (out / "data" / "samples.png").exists()
    for arm, weight in (("vqgan", 0.0), ("te_vqgan", 10.0)):
        folder = run_folder(out, arm, 0)
        assert VQAutoencoder.from_pretrained(folder / "model").config.orthogonal_reg == weight
        facts = json.loads((folder / "provenance.json").read_text())
        assert f"--arm {arm}" in facts["command"]
        assert facts["threads"] == 1
        assert facts["training"]["cpu_seconds"] > 0
        assert facts["versions"]["torch"]
        assert len((folder / "log.jsonl").read_text().splitlines()) == 6
    for name in PICTURES:
        content = (out / "report" / f"{name}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert min(width, height) > 300


def test_report_shows_both_arms_with_kappa_beside_every_agreement(out: Path) -> None:
    """Every row has two cells; every agreement has κ in brackets; numbers are those of the evaluations."""
    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    table = re.findall(r"^\|(.+)\|$", text, re.MULTILINE)
    rows = {
        cells[0]: cells[1:]
        for line in table
        if len(cells := [c.strip() for c in re.split(r"(?<!\\)\|", line)]) == 3
    }
    assert rows[""] == ["VQGAN", "TE-VQGAN (λ = 10)"]
    agreements = {label: cells for label, cells in rows.items() if label.endswith("(κ)")}
    assert len(agreements) == 7
    for label, cells in agreements.items():
        for cell in cells:
            assert re.fullmatch(r"\d\.\d{3} \((-?\d\.\d{3}|undefined)\)", cell), (label, cell)
    for column, arm in enumerate(("vqgan", "te_vqgan")):
        evaluation = json.loads((run_folder(out, arm, 0) / "evaluation.json").read_text())
        assert rows["reconstruction L1, images in [-1, 1]"][column] == f"{evaluation['test']['l1']:.4f}"
        placement = evaluation["equivariance"]["placement"]
        shown = rows["placement agreement, as the paper measures (κ)"][column]
        assert shown.startswith(f"{placement['rate']:.3f} (")
    assert "--preset smoke" in text
    for name in PICTURES:
        assert f"]({name}.png)" in text


def test_html_needs_no_other_file(out: Path) -> None:
    """Every picture is a data URI, nothing is fetched, and every table of the Markdown is there."""
    text = (out / "report" / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", text)
    assert len(sources) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", text)
    assert text.count("<img alt=") == len(PICTURES)
    assert text.count("<table>") == 2


def test_report_is_written_anew_from_its_json_alone(out: Path, tmp_path: Path) -> None:
    """A copy of results.json and samples/ gives every file of the report again, byte for byte."""
    for name in ("results.json", "samples"):
        source = out / "report" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    assert main(["report", "--results", str(tmp_path)]) == 0
    for path in (out / "report").rglob("*.*"):
        assert (tmp_path / path.relative_to(out / "report")).read_bytes() == path.read_bytes(), path.name


def test_a_second_run_trains_nothing_and_refuses_other_settings(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished arms are skipped; --steps 7 in the same folder names the setting that differs."""
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-seed0/*")}
    arguments = ["run", "--preset", "smoke", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("was finished before, skipped") == 2
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-seed0/*")} == before
    assert main([*arguments, "--steps", "7"]) == 1
    assert "steps was 6, now 7" in capsys.readouterr().err


def test_stage1_says_when_there_is_nothing_to_do(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same run again, by its own command."""
    assert main(["stage1", "--preset", "smoke", "--arm", "vqgan", "--out", str(out)]) == 0
    assert "was finished before, nothing to do" in capsys.readouterr().out


def test_refusals_are_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback for a user's mistake."""
    cases = {
        ("report", "--out", str(tmp_path)): "out must be a folder with finished runs",
        ("report", "--results", str(tmp_path)): "results must be a folder with results.json",
        (
            "prepare",
            "--data",
            "digits",
            "--data-dir",
            str(tmp_path),
            "--out",
            str(tmp_path),
        ): "data_dir must be None",
        ("stage1", "--arm", "vqgan", "--steps", "0", "--out", str(tmp_path)): "steps must be an int >= 1, got 0",
    }
    for arguments, message in cases.items():
        assert main(list(arguments)) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]
    with pytest.raises(SystemExit, match="2"):
        main(["stage1", "--arm", "unknown"])
    assert "invalid choice" in capsys.readouterr().err


_TRAINING = {"--steps": "3", "--perceptual": "none", "--bf16": None, "--device": "cpu"}


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        (["prepare"], [*_TRAINING, "--threads"]),
        (["exactness", "--arm", "integer_exact"], list(_TRAINING)),
        (["report"], [*_TRAINING, "--threads", "--seed", "--data-dir"]),
        (["compare"], [*_TRAINING, "--threads", "--seed", "--data-dir"]),
        (["audit"], [*_TRAINING, "--preset", "--data", "--data-dir"]),
    ],
    ids=lambda value: value[0],
)
def test_options_that_a_command_does_not_use_are_refused(
    command: list[str], unused: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not taken and ignored, and not taken for the beginning of another option; training takes them all."""
    values = {**_TRAINING, "--threads": "1", "--seed": "1", "--data-dir": str(tmp_path)}
    values |= {"--preset": "smoke", "--data": "digits"}
    for option in unused:
        words = [option] if values[option] is None else [option, values[option]]
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--out", str(tmp_path), *words])
        assert f"unrecognized arguments: {' '.join(words)}" in capsys.readouterr().err
    words = [word for pair in values.items() for word in pair if word is not None]
    stage1 = ["stage1", "--arm", "vqgan", "--out", str(tmp_path), *words]
    assert main([*stage1, "--data-dir", str(tmp_path)]) == 1
    assert "data_dir must be None" in capsys.readouterr().err


def test_a_failing_process_shows_the_end_of_its_output(tmp_path: Path) -> None:
    """The reason must not be buried in a file nobody knows of."""
    job = Job("broken", ["stage1", "--preset", "smoke", "--arm", "vqgan", "--steps", "0"], tmp_path / "run", 6)
    with pytest.raises(JobFailed, match=r"broken ended with code 1(.|\n)*steps must be an int >= 1, got 0"):
        run_jobs([job], workers=1, threads=1)


def test_real_mnist_goes_through_the_same_steps(mnist_folder: Path, tmp_path: Path) -> None:
    """From the IDX files to a report of one arm."""
    shared = ["--preset", "smoke", "--data", "mnist", "--out", str(tmp_path)]
    data = ["--data-dir", str(mnist_folder)]
    assert main(["stage1", *shared, *data, "--arm", "te_vqgan", "--steps", "1"]) == 0
    assert main(["report", *shared]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "# TE-VQGAN (λ = 10) on mnist" in text
    assert "alone is finished, so nothing is compared" in text


def _start(out: Path, steps: int) -> subprocess.Popen[bytes]:
    command = ["run", "--preset", "smoke", "--out", str(out), "--arms", "vqgan", "--steps", str(steps)]
    return subprocess.Popen(
        [sys.executable, "-m", "examples.te_vqgan", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_keeps_its_checkpoint(tmp_path: Path, number: int) -> None:
    """After Ctrl-C, and after a kill that cannot be handled, the training process saves, stops and goes away."""
    process = _start(tmp_path, 100_000)
    folder = run_folder(tmp_path, "vqgan", 0)
    _wait(lambda: (folder / "checkpoint.safetensors").exists() or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == STOPPED
        assert b"Give the same command again" in errors
    _wait(lambda: "resume goes on from there" in (folder / "console.txt").read_text())
    fcntl = pytest.importorskip("fcntl")
    with (folder / ".lock").open("w") as file:
        _wait(lambda: _free(fcntl, file))


def _free(fcntl: object, file: object) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


def _wait(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_help_names_every_command() -> None:
    """As a module, from the repository's root."""
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "examples.te_vqgan", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for name in ("prepare", "stage1", "exactness", "report", "compare", "audit", "run"):
        assert re.search(rf"^\s+{name}\s+\w", text, re.MULTILINE)
