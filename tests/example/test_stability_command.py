"""The command ``stability``: what it finds, how results are merged, and what is published of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.reports import stability
from examples.te_vqgan.reports.stability import find_tokenizer, render, write_stability
from examples.te_vqgan.stage1.exactness import finished_settings
from examples.te_vqgan.stage2 import train as stage2
from examples.te_vqgan.stage2.publish import publish
from examples.te_vqgan.stage2.settings import stage2_settings_for
from examples.te_vqgan.stage2.train import train_stage2
from te_quant import StabilityReport, measure_stability
from te_quant.stability import EightBit, Identity
from tests.example.tiny_runs import finished_classifier, finished_tokenizer, random_source
from tests.published import RESULTS, published
from tests.unit.stability_cases import K, cell_images, decode, encode, spoilt, tokens_of

FILES = ("stability.json", "stability.md", "tokenizers.md", "stability.png")


def report(*, exact: bool) -> StabilityReport:
    """A tiny one."""
    return measure_stability(
        encode if exact else spoilt,
        decode,
        cell_images(tokens_of(3)),
        transforms=[Identity(), EightBit()],
        cycles=2,
        num_codes=K,
        resamples=10,
    )


def test_published_weights_are_found() -> None:
    """Their settings follow from the command that made them."""
    published("small/weights/about.json")
    found = find_tokenizer(RESULTS / "small" / "weights")
    assert found.name == "small-mnist/stride_exact-seed0"
    assert found.title == "circular (stride-exact), seed 0"
    assert (found.settings.data, found.settings.canvas_size) == ("mnist", 32)
    assert (found.weights / "model.safetensors").is_file()


def test_published_weights_say_what_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what the preset says; so they are found whatever was typed, and without reading the command."""
    monkeypatch.setattr(stage2, "_VALIDATION_IMAGES", 4)
    settings = dataclasses.replace(stage2_settings_for("smoke"), train_images=8, eval_images=4, steps=3)
    out = tmp_path / "my runs"
    tokenizer = finished_tokenizer(out / "vqgan-seed0", learning_rate=0.125)
    train_stage2(settings, tokenizer, random_source(), progress=False)
    preset = dataclasses.replace(settings, steps=6)
    publish(preset, tokenizer, finished_classifier(tmp_path / "classifier"), tmp_path / "w", command="as typed")
    about = json.loads((tmp_path / "w" / "about.json").read_text())
    assert about["stage2"] == settings.to_dict()
    found = find_tokenizer(tmp_path / "w")
    assert found.name == "my runs/vqgan-seed0"
    assert found.settings == finished_settings(tokenizer)
    assert found.settings.learning_rate == 0.125


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, with a status."""
    words = ["stability", "--tokenizers", str(tmp_path), "--into", str(tmp_path / "results")]
    assert main(words) == 1
    assert "folder must be that of a finished stage1 run" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^into must be a folder with stability\.json, got"):
        render(tmp_path)


@pytest.mark.slow
def test_results_are_merged_by_name(tmp_path: Path) -> None:
    """A later tokenizer joins, and one of the same name replaces the former."""
    pytest.importorskip("matplotlib")
    write_stability(tmp_path, {"out/b": ("B", report(exact=False))}, command="first")
    write_stability(tmp_path, {"out/a": ("A", report(exact=False))}, command="second")
    write_stability(tmp_path, {"out/b": ("B", report(exact=True))}, command="third")
    found = json.loads((tmp_path / "stability.json").read_text())["tokenizers"]
    assert {name: entry["command"] for name, entry in found.items()} == {"out/a": "second", "out/b": "third"}
    rows = [line for line in (tmp_path / "stability.md").read_text().splitlines() if line.startswith("| B")]
    assert "| 1.000 | 1.000 |" in rows[0]
    assert "16 of 16" in rows[2]
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    assert main(["stability", "--into", str(tmp_path)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before


@pytest.mark.slow
def test_a_published_tokenizer_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other digits than it was trained on, which come with scikit-learn."""
    published("small/weights/about.json")
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    monkeypatch.setattr(stability, "_CYCLES", 1)
    tokenizer = find_tokenizer(RESULTS / "small" / "weights")
    from examples.te_vqgan.data.sources import load_digits

    digits = tokenizer._replace(settings=stability.settings_for("small", "stride_exact", {"data": "digits"}))
    found = stability.measure_tokenizer(digits, load_digits("digits"), count=4, progress=False)
    match = {name: result.match for name, result in found.transforms.items()}
    # Exact under shifts by whole tokens: they cost nothing more than decoding and encoding.
    assert match["shift (1, 1) tokens"].rate == match["identity"].rate
    assert match["shift (1, 1) px"].rate < match["identity"].rate < 1
    assert torch.isfinite(torch.tensor(found.transforms["8-bit"].match.kappa))
    with pytest.raises(ValueError, match=r"^images must be at most the 1,500 test images, got 1501\.$"):
        stability.first_images(digits.settings, load_digits("digits"), 1501)


def test_published_tables_follow_from_the_data(tmp_path: Path) -> None:
    """Tables only: a picture may differ with the version of matplotlib."""
    source = published("stability/stability.json")
    (tmp_path / "stability.json").write_bytes(source.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stability, "write_bytes_atomically", lambda *_: None)
        patch.setattr(stability, "encode_png", lambda *_, **__: b"")
        render(tmp_path)
    for name in ("stability.md", "tokenizers.md"):
        assert (tmp_path / name).read_text() == published(f"stability/{name}").read_text()
