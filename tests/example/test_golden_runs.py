"""Run folders that earlier code left are found finished, reported, measured again and resumed."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.cli import run as run_command
from examples.te_vqgan.data.sources import DigitSource, load_digits
from examples.te_vqgan.reports import report
from examples.te_vqgan.runs.checkpoint import load_checkpoint, under
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.runs.running import CHECKPOINT
from examples.te_vqgan.stage1.evaluation import evaluate
from examples.te_vqgan.stage1.presets import from_dict
from examples.te_vqgan.stage1.train import train_stage1
from examples.te_vqgan.stage2.evaluate import evaluate_gpt, evaluate_tokenizer
from examples.te_vqgan.stage2.settings import from_dict as stage2_from_dict
from te_quant import VQAutoencoder
from tests.golden_files import differing, differing_numbers, unpacked

# Who measured, when and with what.
_FACTS = ("command", "commit", "versions", "classifier", "spent")
_SMOKE = ("--preset", "smoke", "--data", "digits", "--threads", "1")


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """The digits of the golden runs."""
    return load_digits("digits", None)


@pytest.fixture
def smoke(tmp_path: Path) -> Path:
    """A finished run of the preset, without weights."""
    return unpacked("smoke", tmp_path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Runs ``finished`` and ``stopped`` of a tiny model, with their weights, and what the second ended as."""
    return unpacked("tiny", tmp_path)


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: part for name, part in value.items() if name not in _FACTS}


def _contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _cells(path: Path) -> list[list[str]]:
    """The cells of all tables in a Markdown file, without headers, labels of rows, and the seconds of each run."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for line, below in pairwise([*lines, ""]):
        if line.startswith("|") and not re.match(r"\| :?--", line) and not re.match(r"\| :?--", below):
            label, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
            if not re.search(r", seed \d+$", label):
                rows.append(cells)
    return rows


def test_a_finished_run_is_skipped(
    smoke: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings of then are those of the preset now, so ``run`` starts no training and touches no run."""
    monkeypatch.setattr(report, "rendered", lambda results, stored: {})
    jobs: list[str] = []
    monkeypatch.setattr(run_command, "run_jobs", lambda found, **_: jobs.extend(job.arguments[0] for job in found))
    before = _contents(smoke / "classifier", smoke / "te_vqgan-seed0")
    assert main(["run", *_SMOKE, "--out", str(smoke), "--arms", "te_vqgan"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("was finished before, skipped") == 2
    # Under the rules of decoding of now it was not measured yet.
    assert jobs == ["evaluate"]
    assert _contents(smoke / "classifier", smoke / "te_vqgan-seed0") == before


def test_a_finished_run_of_other_settings_is_refused(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control of the test above."""
    assert main(["run", *_SMOKE, "--out", str(smoke), "--arms", "te_vqgan", "--steps", "7"]) == 1
    assert "steps was 6, now 7" in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_of_the_run_has_the_numbers_it_had(smoke: Path, tmp_path: Path) -> None:
    """Every cell of every table, from the folder of the run alone."""
    old = tmp_path / "old"
    shutil.move(smoke / "report", old)
    assert main(["report", *_SMOKE[:4], "--out", str(smoke)]) == 0
    for path in sorted(old.glob("*.md")):
        cells = _cells(path)
        assert cells
        assert _cells(smoke / "report" / path.name) == cells, path.name


def test_a_tokenizer_is_measured_as_it_was(tiny: Path, source: DigitSource) -> None:
    """Reconstruction, code use and equivariance, and what the classifier of then reads in the reconstructions."""
    folder = tiny / "finished"
    settings = from_dict(_read(folder / "settings.json"))
    model = VQAutoencoder.from_pretrained(folder / "model")
    numbers, _ = evaluate(model, settings, source, torch.device("cpu"))
    found = json.loads(json.dumps(numbers))
    assert list(differing_numbers(found, _read(folder / "evaluation.json"))) == []
    reading = _read(folder / "reading.json")
    (folder / "reading.json").unlink()
    assert evaluate_tokenizer(folder, tiny / "classifier", source, execution=Execution(threads=1))
    assert list(differing_numbers(_read(folder / "reading.json"), reading)) == []


def test_a_changed_tokenizer_is_measured_otherwise(tiny: Path, source: DigitSource) -> None:
    """The negative control of the test above: the last layer, 5 % larger."""
    folder = tiny / "finished"
    settings = from_dict(_read(folder / "settings.json"))
    model = VQAutoencoder.from_pretrained(folder / "model")
    with torch.no_grad():
        model.decoder.get_submodule("conv_out").weight.mul_(1.05)
    numbers, _ = evaluate(model, settings, source, torch.device("cpu"))
    different = list(differing_numbers(json.loads(json.dumps(numbers)), _read(folder / "evaluation.json")))
    assert any(line.startswith("test.l1: ") for line in different)


def test_a_gpt_is_measured_as_it_was(tiny: Path, source: DigitSource) -> None:
    """What it draws and writes for the captions and images of the test set, with the draws of then."""
    folder = tiny / "finished"
    inner = folder / "stage2-32"
    settings = stage2_from_dict(_read(inner / "settings.json"))
    expected = _read(inner / "generation.json")["held_out"]
    models = folder, tiny / "classifier", source
    # The rule of then had no name yet.
    assert evaluate_gpt(settings, *models, rule="tenth", execution=Execution(threads=1), progress=False)
    assert list(differing_numbers(_read(inner / "rule-tenth.json")["held_out"], expected)) == []


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(tiny: Path, source: DigitSource) -> None:
    """From its checkpoint at step 3 of 6, Adam's moments included: the weights and the log of the old code."""
    stopped, ended = tiny / "stopped", tiny / "ended"
    settings = from_dict(_read(stopped / "settings.json"))
    assert len(_lines(stopped / "log.jsonl")) == 3
    where = Execution(threads=1)
    assert train_stage1(settings, stopped, source, execution=where, resume=True, progress=False)
    found, expected = (VQAutoencoder.from_pretrained(folder / "model") for folder in (stopped, ended))
    assert differing(found.state_dict(), expected.state_dict()) == []
    assert list(differing_numbers(_lines(stopped / "log.jsonl"), _lines(ended / "log.jsonl"))) == []


def test_the_weights_at_the_stop_are_not_those_at_the_end(tiny: Path) -> None:
    """The negative control of the test above: the tolerance sees three steps of nearly every tensor."""
    tensors, _ = load_checkpoint(tiny / "stopped" / CHECKPOINT)
    ended = VQAutoencoder.from_pretrained(tiny / "ended" / "model").state_dict()
    networks = {name: value for name, value in ended.items() if name.startswith(("encoder.", "decoder."))}
    assert len(differing(under("model", tensors), networks)) > 0.9 * len(networks)
