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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.te_vqgan import __main__
from examples.te_vqgan.__main__ import main
from examples.te_vqgan.classifier.model import load_classifier
from examples.te_vqgan.cli import run as run_command
from examples.te_vqgan.cli.options import execution
from examples.te_vqgan.reports import report
from examples.te_vqgan.reports.results import collect, run_folder
from examples.te_vqgan.runs.pipeline import STOPPED, Job, JobFailed, run_jobs
from te_quant import GPT, VQAutoencoder
from tests.helpers import numpy_generator

PICTURES = (
    *("token_grids", "token_shifts", "reconstructions", "loss_curves", "equivariance"),
    *("captions", "generated", "confusions", "tradeoff"),
)
RULES = ("rules-text-to-image", "rules-text-to-image-quad1", "rules-image-to-text")
TABLES = ("table1-text-to-image", "table1-image-to-text", "table2", "table3", *RULES)
# Seconds. Tells a process that hangs from a slow machine, no more.
_PATIENCE = 600
# The example as ``python -m`` runs it; Ctrl-C reaches it even where the tests themselves ignore it, as what a
# shell runs in the background does.
_LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("examples.te_vqgan", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``run`` leaves behind, both arms at once; the only whole run of all tests."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["run", "--preset", "smoke", "--out", str(folder), "--threads", "2"]) == 0
    return folder


@pytest.mark.slow
def test_run_writes_everything(out: Path) -> None:
    """Data, classifier, a tokenizer and two GPTs an arm that load as models, and the report with its pictures."""
    assert (out / "data" / "samples.png").exists()
    assert load_classifier(out / "classifier").config["num_classes"] == 10
    for arm, weight in (("vqgan", 0.0), ("te_vqgan", 10.0)):
        folder = run_folder(out, arm, 0)
        assert VQAutoencoder.from_pretrained(folder / "model").config.orthogonal_reg == weight
        facts = json.loads((folder / "provenance.json").read_text())
        assert f"--arm {arm}" in facts["command"]
        assert facts["threads"] == 1
        assert facts["training"]["cpu_seconds"] > 0
        assert facts["versions"]["torch"]
        assert len((folder / "log.jsonl").read_text().splitlines()) == 6
        for images in (32, 16):
            inner = folder / f"stage2-{images}"
            assert GPT.from_pretrained(inner / "model").config.width == 16
            assert len((inner / "log.jsonl").read_text().splitlines()) == 6
            facts = json.loads((inner / "provenance.json").read_text())
            assert f"stage2 --preset smoke --data digits --out {out} --arm {arm}" in facts["command"]
            measured = json.loads((inner / "rule-paper.json").read_text())
            assert f"evaluate --preset smoke --data digits --out {out} --arm {arm}" in measured["command"]
    for name in PICTURES:
        content = (out / "report" / f"{name}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert min(width, height) > 300
        # A palette in diagrams, true colours where images are shown.
        assert content[25] == (6 if name in ("captions", "generated", "reconstructions") else 3)


@pytest.mark.slow
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
    assert f"Command: `python -m examples.te_vqgan run --preset smoke --out {out} --threads 2` (" in text
    for name in PICTURES:
        assert f"]({name}.png)" in text


@pytest.mark.slow
def test_report_has_the_papers_tables(out: Path) -> None:
    """Each stands in the report as in a file of its own, with the numbers of the measurements."""
    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    for name in TABLES:
        assert (out / "report" / f"{name}.md").read_text(encoding="utf-8").strip() in text
    for arm, title in (("vqgan", "VQGAN"), ("te_vqgan", "TE-VQGAN (λ = 10)")):
        measured = json.loads((run_folder(out, arm, 0) / "stage2-32" / "rule-paper.json").read_text())
        for task in ("text_to_image", "image_to_text"):
            accuracy = measured["held_out"][task]["cases"]["quad1"]["digit_accuracy"]
            assert f"| {title}, 1 seed | {accuracy:.3f} / " in text
    digits = json.loads((out / "classifier" / "evaluation.json").read_text())["test"]
    assert (
        f"The classifier reads {100 * digits['digit_accuracy']:.2f} % of the {digits['cells']} test digits" in text
    )


@pytest.mark.slow
def test_report_of_a_trial_says_that_its_numbers_mean_nothing(out: Path) -> None:
    """It is the first sentence below the title; neither stage draws a finding."""
    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    first = text.split("\n\n")[1]
    assert first.startswith(
        "The numbers in this report mean nothing: it is a trial of 6 optimizer steps and 8 test"
    )
    assert "No findings are drawn from a trial of 6 optimizer steps and 8 test images" in text
    for finding in ("has a higher", "has a lower", "told apart", "the penalty (TE-VQGAN)", "Best arm"):
        assert finding not in text


@pytest.mark.slow
def test_html_needs_no_other_file(out: Path) -> None:
    """Every picture is a data URI, nothing is fetched, and every table of the Markdown is there."""
    text = (out / "report" / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", text)
    assert len(sources) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", text)
    assert text.count("<img alt=") == len(PICTURES)
    # All metrics, all runs, and the paper's.
    assert text.count("<table>") == 2 + len(TABLES)


@pytest.mark.slow
def test_report_is_written_anew_from_its_json_alone(out: Path, tmp_path: Path) -> None:
    """A copy of results.json and samples/ gives every file of the report again, byte for byte."""
    for name in ("results.json", "samples"):
        source = out / "report" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    assert main(["report", "--results", str(tmp_path)]) == 0
    for path in (out / "report").rglob("*.*"):
        assert (tmp_path / path.relative_to(out / "report")).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_a_report_is_added_to_another(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into an empty folder it is the report itself, but for what was typed; into it again it changes nothing."""
    # The other files follow from these, as the test above says.
    monkeypatch.setattr(report, "rendered", lambda results, stored: {})
    told: list[Path] = []
    monkeypatch.setattr(__main__, "announce", told.append)
    arguments = ["report", "--preset", "smoke", "--out", str(out), "--into", str(tmp_path)]
    assert main(arguments) == 0
    once = _files(tmp_path)
    for path in once.keys() - {"results.json"}:
        assert once[path] == (out / "report" / path).read_bytes(), path
    results, expected = json.loads(once["results.json"]), json.loads((out / "report" / "results.json").read_text())
    assert results.pop("commands") == [f"python -m examples.te_vqgan {' '.join(arguments)}"]
    expected.pop("commands")
    assert results == {**expected, "wall_seconds": None}
    assert main(arguments) == 0
    assert _files(tmp_path) == once
    assert told == [tmp_path, tmp_path]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_refuses_other_settings(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished is skipped; other steps in the same folder are refused by name."""
    monkeypatch.setattr(report, "rendered", lambda results, stored: {})
    folders = [out / "classifier", *out.glob("*-seed0")]
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    arguments = ["run", "--preset", "smoke", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    # Two tokenizers, and two GPTs on each.
    assert printed.count("was finished before, skipped") == 6
    assert {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")} == before
    for option in ("--steps", "--stage2-steps"):
        assert main([*arguments, option, "7"]) == 1
        assert "steps was 6, now 7" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_say_when_there_is_nothing_to_do(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each step of the run again, by its own command."""
    arm = ["--arm", "te_vqgan"]
    for words in (["classifier"], ["stage1", *arm], ["stage2", *arm], ["evaluate", *arm]):
        assert main([*words, "--preset", "smoke", "--out", str(out)]) == 0
        assert "was finished before, nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "out must be a folder with finished runs"),
        (["report", "--results", "."], "results must be a folder with results.json"),
        (["prepare", "--data", "digits", "--data-dir", "."], "data_dir must be None"),
        (["stage1", "--arm", "vqgan", "--steps", "0"], "steps must be an int >= 1, got 0"),
        (
            ["stage1", "--arm", "vqgan", "--device", "gpu0"],
            "device must be one that torch knows, such as 'cpu' or 'cuda', got 'gpu0'.",
        ),
        (["run", "--device", "gpu0"], "device must be one that torch knows, such as 'cpu' or 'cuda', got 'gpu0'."),
        (["stage1", "--arm", "vqgan", "--device", "meta"], "device must be 'cpu', as torch finds no meta here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_refusals_are_one_line_and_status_1(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No traceback for a user's mistake."""
    monkeypatch.chdir(tmp_path)
    where = [] if "--results" in arguments else ["--out", "."]
    assert main([*arguments, *where]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "words",
    [
        "report --out FILE",
        "report --out FILE/folder",
        "report --out . --into FILE",
        "report --into FILE/folder",
        "run --out FILE",
        "compare --into FILE --arms vqgan --results .",
        "family --into FILE",
        "audit --out FILE",
        "photographs --into FILE",
        "stability --into FILE",
        "round-trips --into FILE",
    ],
)
def test_a_file_in_the_place_of_a_folder_is_refused(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name of the option."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    assert main(words.split()) == 1
    option, value = re.search(r"--(\w+) (FILE\S*)", words).groups()
    got = "the file FILE" if value == "FILE" else f"{value}, where FILE is a file"
    assert capsys.readouterr().err == f"error: {option} must be a folder, got {got}.\n"


@pytest.mark.parametrize("arm", [[], ["--arm", "vqgan"]])
def test_unknown_rules_are_refused_before_anything_is_measured(
    arm: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also behind rules that exist; there are no runs, which would be the next complaint."""
    words = ["evaluate", "--preset", "smoke", "--out", str(tmp_path), *arm, "--rules", "2"]
    assert main([*words, "nonsense"]) == 1
    assert "error: rules must be 'paper', 'tenth'," in capsys.readouterr().err
    assert main(words) == 1
    assert "error: out must be a folder with" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seed", "--seeds", "--steps", "--quantizers", "--data-dir"])
def test_a_family_that_is_written_again_is_not_trained(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["family", "--results", str(tmp_path), option, "1"]) == 1
    name = option.removeprefix("--").replace("-", "_")
    assert f"error: {name} must be unset with --results, got" in capsys.readouterr().err


def test_a_comparison_of_a_file_names_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.touch()
    assert main(["compare", "--results", str(path)]) == 1
    assert capsys.readouterr().err == f"error: results must be a folder, got the file {path}.\n"


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of regimes is one file."""
    assert main(["regimes", "--results", str(tmp_path), "--into", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: into must be a Markdown file to write, got the folder {tmp_path}.\n"


@pytest.mark.parametrize("command", ["report", "compare", "family"])
@pytest.mark.parametrize("option", ["into", "out", "data"])
def test_what_is_written_again_takes_no_other_options(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would have no effect."""
    words = [command, "--results", str(tmp_path), f"--{option}", "mnist"]
    assert main(words) == 1
    error = capsys.readouterr().err
    if (command, option) == ("compare", "into"):
        assert "arms must be given together with --into" in error
    else:
        assert error == f"error: {option} must be unset with --results, got mnist.\n"


@pytest.mark.parametrize("words", ["stage1 --arm vqgan --threads", "run --threads", "run --workers"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two"])
def test_numbers_of_threads_and_workers_are_positive(
    words: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default is all cores; 0 is no other name for it."""
    with pytest.raises(SystemExit, match="2"):
        main([*words.split(), value])
    option = words.split()[-1]
    assert f"argument {option}: must be an int >= 1, got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["stage1 --arm vqgan", "run", "classifier", "stage2 --arm vqgan"])
def test_cuda_without_a_gpu_is_one_line_that_names_the_option(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read or trained."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*command.split(), "--device", "cuda", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "error: device must be 'cpu', as torch finds no cuda here, got 'cuda'."


def test_a_gpu_with_a_number_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["stage1", "--arm", "vqgan", "--device", "cuda:2", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "error: device must be numbered below 2, the GPUs of the host, got 'cuda:2'."


def test_unknown_choices_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """As argparse ends."""
    with pytest.raises(SystemExit, match="2"):
        main(["stage1", "--arm", "unknown"])
    assert "invalid choice" in capsys.readouterr().err


_TRAINING = {"--steps": "3", "--perceptual": "none", "--bf16": None, "--device": "cpu"}


_UNUSED = [
    (["prepare"], [*_TRAINING, "--threads"]),
    (["exactness", "--arm", "integer_exact"], list(_TRAINING)),
    (["classifier"], ["--perceptual", "--arm"]),
    (["stage2", "--arm", "vqgan"], ["--perceptual"]),
    (["evaluate", "--arm", "vqgan"], ["--steps", "--compile"]),
    (
        ["publish", "--arm", "vqgan", "--into", "unused"],
        [*_TRAINING, "--threads", "--data-dir"],
    ),
    (["report"], [*_TRAINING, "--threads", "--seed", "--data-dir"]),
    (["pack", "--into", "unused.tar"], [*_TRAINING, "--threads", "--seed", "--data-dir"]),
    (["compare"], [*_TRAINING, "--threads", "--seed", "--data-dir"]),
    (["audit"], [*_TRAINING, "--preset", "--data", "--data-dir"]),
]
_VALUES = {
    **_TRAINING,
    "--threads": "1",
    "--seed": "1",
    "--data-dir": ".",
    "--preset": "smoke",
    "--data": "digits",
}


@pytest.mark.parametrize(
    ("command", "option"),
    [pytest.param(words, option, id=words[0] + option) for words, options in _UNUSED for option in options],
)
def test_options_that_a_command_does_not_use_are_refused(
    command: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not taken and ignored, and not taken for the beginning of another option."""
    value = {**_VALUES, "--arm": "vqgan", "--compile": None}[option]
    words = [option] if value is None else [option, value]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--out", str(tmp_path), *words])
    assert f"unrecognized arguments: {' '.join(words)}" in capsys.readouterr().err


def test_training_takes_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control: what is refused here is a folder for digits that need none, after all options were taken."""
    words = [word for pair in _VALUES.items() for word in pair if word is not None]
    assert main(["stage1", "--arm", "vqgan", "--out", str(tmp_path), *words]) == 1
    assert "data_dir must be None" in capsys.readouterr().err


def test_a_failing_process_shows_the_end_of_its_output(tmp_path: Path) -> None:
    """The reason must not be buried in a file nobody knows of."""
    job = Job("broken", ["stage1", "--preset", "smoke", "--arm", "vqgan", "--steps", "0"], tmp_path / "run", 6)
    with pytest.raises(JobFailed, match=r"broken ended with code 1(.|\n)*steps must be an int >= 1, got 0"):
        run_jobs([job], workers=1, threads=1)


@pytest.mark.slow
def test_real_mnist_goes_through_the_same_steps(mnist_folder: Path, tmp_path: Path) -> None:
    """From the IDX files to a report of one arm."""
    shared = ["--preset", "smoke", "--data", "mnist", "--out", str(tmp_path)]
    data = ["--data-dir", str(mnist_folder)]
    assert main(["stage1", *shared, *data, "--arm", "te_vqgan", "--steps", "1"]) == 0
    assert main(["report", *shared]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "# TE-VQGAN (λ = 10) on mnist" in text
    assert "The numbers in this report mean nothing: it is a trial of 1 optimizer step" in text


def _start(out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = ["run", "--preset", "smoke", "--out", str(out), "--arms", "vqgan", "--threads", "1", *words]
    return subprocess.Popen(
        [sys.executable, "-c", _LISTENING, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_keeps_its_checkpoint(out: Path, tmp_path: Path, number: int) -> None:
    """After Ctrl-C, and after a kill that cannot be handled, the training process saves, stops and goes away."""
    shutil.copytree(out / "classifier", tmp_path / "classifier")
    process = _start(tmp_path, "--steps", "100000")
    folder = run_folder(tmp_path, "vqgan", 0)
    _wait(lambda: (folder / "checkpoint.safetensors").exists() or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=_PATIENCE)
    if number == signal.SIGINT:
        assert process.returncode == STOPPED
        assert b"Give the same command again" in errors
    _wait(lambda: "resume goes on from there" in (folder / "console.txt").read_text())
    fcntl = pytest.importorskip("fcntl")
    with (folder / ".lock").open("w") as file:
        _wait(lambda: _free(fcntl, file))


def _points(folder: Path) -> list[Callable[[], bool]]:
    """What a run of one arm brings about, one after the other: each line of both logs, and files."""

    def there(path: Path, lines: int = 0) -> Callable[[], bool]:
        return lambda: path.exists() and path.read_bytes().count(b"\n") >= lines

    inner = folder / "stage2-32"
    return [
        *(there(folder / "log.jsonl", lines) for lines in range(1, 7)),
        there(folder / "evaluation.json"),
        there(inner / "tokens.safetensors"),
        *(there(inner / "log.jsonl", lines) for lines in range(1, 7)),
        there(inner / "evaluation.json"),
        there(folder / "reading.json"),
    ]


@pytest.mark.long
@pytest.mark.parametrize("case", range(6))
def test_a_run_killed_at_random_points_ends_like_one_that_was_not(
    case: int, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL and SIGTERM somewhere in it: models, moments, logs and numbers are those of ``out``, bit for bit.

    Every case is seeded by its name, so each kills other points.
    """
    shutil.copytree(out / "classifier", tmp_path / "classifier")
    folder = run_folder(tmp_path, "vqgan", 0)
    points = _points(folder)
    rng = numpy_generator()
    chosen = np.sort(rng.choice(len(points), 2, replace=False)).tolist()
    numbers = rng.permutation([signal.SIGKILL, signal.SIGTERM]).tolist()
    delays = rng.uniform(0, 0.3, 2).tolist()
    told = f"points {chosen}, signals {numbers}, delays {delays}"
    for point, number, delay in zip(chosen, numbers, delays, strict=True):
        process = _start(tmp_path)
        _wait(lambda point=point, process=process: points[point]() or process.poll() is not None)
        assert process.poll() is None, told
        time.sleep(delay)
        process.send_signal(number)
        process.communicate(timeout=_PATIENCE)
    monkeypatch.setattr(report, "rendered", lambda results, stored: {})
    monkeypatch.setattr(run_command, "announce", lambda folder: None)
    arguments = ["--preset", "smoke", "--out", str(tmp_path), "--arms", "vqgan", "--threads", "1"]
    assert main(["run", *arguments]) == 0

    expected = run_folder(out, "vqgan", 0)
    for part in (".", "stage2-32"):
        for name in ("log.jsonl", "settings.json", "evaluation.json"):
            assert (folder / part / name).read_bytes() == (expected / part / name).read_bytes(), (name, told)
        for path in [*(expected / part).glob("*.safetensors"), *(expected / part / "model").glob("*.safetensors")]:
            # Not the bytes: some versions of safetensors write the header's entries in random order.
            tensors, again = load_file(path), load_file(folder / path.relative_to(expected))
            assert tensors.keys() == again.keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, again[name]), (path.name, name, told)
    runs = {run["arm"]: _numbers(run) for run in collect(out, command="")["runs"]}
    del runs["vqgan"]["stage2"]["16"]
    (run,) = collect(tmp_path, command="")["runs"]
    assert _numbers(run) == runs["vqgan"], told
    assert _numbers(run)["evaluation"] != runs["te_vqgan"]["evaluation"]


def _numbers(value: Any) -> Any:
    """All but when, where and by which words it was computed."""
    if not isinstance(value, dict):
        return value
    facts = ("provenance", "command", "commit", "versions", "spent")
    return {name: _numbers(part) for name, part in value.items() if name not in facts}


def _free(fcntl: object, file: object) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "torch"), ({"TE_QUANT_SEARCH": "auto"}, "auto"), ({"TE_QUANT_FUSED_SEARCH": "1"}, None)],
)
def test_commands_search_by_torch_unless_the_user_chose(
    chosen: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published numbers may not depend on whether faiss is installed; nothing stays changed afterwards."""
    for name in __main__.ENGINES:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    seen: list[str | None] = []

    def status(_: object) -> int:
        seen.append(os.environ.get("TE_QUANT_SEARCH"))
        return 0

    monkeypatch.setattr(__main__, "_status", status)
    assert main(["report"]) == 0
    assert seen == [expected]
    assert os.environ.get("TE_QUANT_SEARCH") == chosen.get("TE_QUANT_SEARCH")


def test_help_names_every_command() -> None:
    """As a module, from the repository's root."""
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "examples.te_vqgan", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    shown = re.findall(r"^    (\w+)\s+\w", text, re.MULTILINE)
    steps = ["prepare", "stage1", "classifier", "stage2", "evaluate", "publish", "exactness"]
    reports = ["report", "compare", "regimes", "family", "pack", "photographs", "hypotheses", "numbers"]
    reports += ["stability", "audit"]
    assert shown == [*steps, *reports, "run"]


def test_paper_is_compiled_and_the_others_if_asked() -> None:
    """And a plan hands on what was asked for, to the steps that train."""
    for words, expected in (
        (["--preset", "paper"], (True, True)),
        (["--preset", "paper", "--no-compile"], (True, False)),
        (["--preset", "small"], (False, False)),
        (["--preset", "small", "--compile", "--channels-last"], (True, True)),
    ):
        found = execution(__main__._parse(["stage1", "--arm", "vqgan", *words]))
        assert (found.channels_last, found.compiled) == expected
    assert execution(__main__._parse(["stage2", "--arm", "vqgan", "--preset", "paper"])).compiled


def test_a_plan_hands_on_how_to_compute(tmp_path: Path) -> None:
    """To the steps that train, in the words that were given."""
    words = ["run", "--preset", "smoke", "--out", str(tmp_path), "--compile", "--no-channels-last"]
    given = {job.arguments[0]: set(job.arguments) for job in run_command.plan_jobs(__main__._parse(words))}
    assert {"--compile", "--no-channels-last"} <= given["stage1"]
    assert "--compile" in given["stage2"]
    assert not {"--compile", "--channels-last", "--no-channels-last"} & (given["evaluate"] | given["classifier"])
