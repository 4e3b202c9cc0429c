"""The archive of a release: complete, small, the same every time, and checked by what lies in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.classifier.model import load_classifier
from examples.te_vqgan.runs.archive import MANIFEST, WEIGHTS, pack
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.files import sha256
from examples.te_vqgan.runs.running import WEIGHTS as MODEL
from examples.te_vqgan.stage2.train import load_tokenizer
from tests.example.tiny_runs import finished_classifier, finished_tokenizer

LEFT_OUT = (
    "vqgan-seed0/checkpoint.safetensors",
    "vqgan-seed0/.lock",
    "vqgan-seed0/tensorboard/events.out",
    "vqgan-seed0/stage2-8/tokens.safetensors",
    "vqgan-seed0/stage2-8/checkpoint.safetensors",
    "family/fsq-seed0/checkpoint.safetensors",
)


def _write(path: Path, content: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder of results with runs of every kind, all finished."""
    out = tmp_path / "small-mnist"
    tokenizer = finished_tokenizer(out / "vqgan-seed0")
    classifier = finished_classifier(out / "classifier")
    gpt, member = tokenizer / "stage2-8", out / "family" / "fsq-seed0"
    for folder in (classifier, gpt, member):
        _write(folder / "settings.json", "{}")
        _write(folder / "evaluation.json", "{}")
    for folder in (tokenizer, gpt, member):
        _write(folder / "log.jsonl", '{"step": 1}\n')
        tensors = {"model.weight": torch.rand(2), "adam.weight/exp_avg": torch.rand(2), "rng.cpu": torch.rand(1)}
        save_checkpoint(folder / "checkpoint.safetensors", tensors, {"step": 1, "settings": {}})
    (gpt / "model").mkdir()
    _write(gpt / "model" / "config.json")
    save_checkpoint(tokenizer / "samples.safetensors", {"images": torch.rand(3)}, {})
    save_checkpoint(gpt / "tokens.safetensors", {"tokens": torch.rand(3)}, {})
    _write(tokenizer / "tensorboard" / "events.out")
    _write(tokenizer / ".lock")
    _write(out / "report" / "results.json")
    _write(out / "data" / "samples.png")
    return out


def _unpacked(archive: Path, into: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(into, filter="data")
    (folder,) = into.iterdir()
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_everything_but_what_resumes_comes_back(out: Path, tmp_path: Path, suffix: str) -> None:
    """Byte for byte, below the folder's name; the manifest has the hash of every file."""
    target = tmp_path / f"release{suffix}"
    packed = pack(out, target)
    folder = _unpacked(target, tmp_path / "unpacked")
    assert folder.name == "small-mnist"
    before, after = _files(out), _files(folder)
    manifest = after.pop(MANIFEST).decode()
    weights = f"family/fsq-seed0/{WEIGHTS}"
    assert before.keys() - after.keys() == set(LEFT_OUT)
    assert after.keys() - before.keys() == {weights}
    assert all(after[name] == before[name] for name in after if name != weights)
    sums = dict(reversed(line.split("  ")) for line in manifest.splitlines())
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in after.items()}
    assert list(sums) == sorted(sums)
    assert packed == (4, len(after), target.stat().st_size)


def test_what_comes_back_is_used_as_before(out: Path, tmp_path: Path) -> None:
    """A tokenizer and a classifier load; of a run without a model folder the weights are there, no moments."""
    from safetensors.torch import load_file

    pack(out, tmp_path / "release.tar.gz")
    folder = _unpacked(tmp_path / "release.tar.gz", tmp_path / "unpacked")
    model, _ = load_tokenizer(folder / "vqgan-seed0", torch.device("cpu"))
    expected, _ = load_tokenizer(out / "vqgan-seed0", torch.device("cpu"))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    load_classifier(folder / "classifier")
    member = Path("family", "fsq-seed0")
    weights = load_file(folder / member / WEIGHTS)
    assert weights.keys() == {"weight"}
    kept, _ = load_checkpoint(out / member / "checkpoint.safetensors")
    assert torch.equal(weights["weight"], kept["model.weight"])


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_equal_contents_give_equal_archives(out: Path, tmp_path: Path, suffix: str) -> None:
    """Whenever and by whomever the files were written; another content gives another archive."""
    first, second, third = (tmp_path / f"{number}{suffix}" for number in range(3))
    pack(out, first)
    for path in out.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    pack(out, second)
    assert first.read_bytes() == second.read_bytes()
    _write(out / "report" / "results.json", "other")
    pack(out, third)
    assert third.read_bytes() != second.read_bytes()


def test_archives_within_the_folder_are_not_packed(out: Path) -> None:
    """Packed a second time, the folder gives the same archive."""
    first, second = out / "release.tar", out / "again.tar"
    pack(out, first)
    pack(out, second)
    assert first.read_bytes() == second.read_bytes()


def test_unfinished_runs_are_refused_by_name(out: Path, tmp_path: Path) -> None:
    """Unless they are wanted: then the weights of their checkpoints go in."""
    target = tmp_path / "release.tar"
    (out / "family" / "fsq-seed0" / "evaluation.json").unlink()
    (out / "vqgan-seed0" / "stage2-8" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"got one with unfinished family/fsq-seed0, vqgan-seed0/stage2-8\.$"):
        pack(out, target)
    assert not target.exists()
    pack(out, target, unfinished=True)
    assert f"family/fsq-seed0/{WEIGHTS}" in _files(_unpacked(target, tmp_path / "unpacked"))


def test_an_archive_that_exists_is_not_replaced(out: Path, tmp_path: Path) -> None:
    """It may be the only one of other runs."""
    target = tmp_path / "release.tar.gz"
    target.write_text("the last one")
    message = r"into must be a new file, got .*release.tar.gz, which exists; choose another, or delete it\."
    with pytest.raises(ValueError, match=message):
        pack(out, target)
    assert target.read_text() == "the last one"


def _recorded(out: Path) -> tuple[Path, Path]:
    """Give the tokenizer and the GPT of ``out`` weights of their own and provenance that knows them."""
    tokenizer = out / "vqgan-seed0"
    gpt = tokenizer / "stage2-8"
    save_checkpoint(gpt / MODEL, {"weight": torch.rand(2)}, {})
    hashes = {"weights": sha256(tokenizer / MODEL)}
    _write(tokenizer / "provenance.json", json.dumps({"hashes": hashes}))
    hashes = {"weights": sha256(gpt / MODEL), "tokenizer": hashes["weights"]}
    _write(gpt / "provenance.json", json.dumps({"hashes": hashes}))
    return tokenizer, gpt


def test_weights_of_another_run_are_refused(out: Path, tmp_path: Path) -> None:
    """By the hashes in the provenance: a model that is damaged or foreign, and a GPT of another tokenizer."""
    tokenizer, gpt = _recorded(out)
    pack(out, tmp_path / "whole.tar")
    target, others = tmp_path / "release.tar", finished_tokenizer(out.with_name("others"))
    for run in (tokenizer, gpt):
        kept = (run / MODEL).read_bytes()
        for content in (kept[:-1], (others / MODEL).read_bytes()):
            (run / MODEL).write_bytes(content)
            with pytest.raises(ValueError, match=rf"model must be the one that the run in .*{run.name} ended"):
                pack(out, target)
        (run / MODEL).write_bytes(kept)
    shutil.copy(others / MODEL, tokenizer / MODEL)
    _write(tokenizer / "provenance.json", json.dumps({"hashes": {"weights": sha256(tokenizer / MODEL)}}))
    message = r"tokenizer must be the one that the run in .*stage2-8 was trained with, got other weights; restore"
    with pytest.raises(ValueError, match=message):
        pack(out, target)
    assert not target.exists()


@pytest.mark.parametrize("name", ["model/model.safetensors", "samples.safetensors"])
def test_tensors_that_were_cut_short_are_refused(out: Path, tmp_path: Path, name: str) -> None:
    """Also in runs that recorded no hashes; and no half of an archive stays."""
    path = out / "vqgan-seed0" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"vqgan-seed0/{name} must hold tensors, got .*; restore it"):
        pack(out, tmp_path / "release.tar")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_failed_write_leaves_no_archive(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no half of one."""
    target = tmp_path / "release.tar.gz"

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", broken)
    with pytest.raises(OSError, match="No space left"):
        pack(out, target)
    assert [path.name for path in tmp_path.iterdir()] == ["small-mnist"]


@pytest.mark.parametrize(
    ("folder", "name", "message"),
    [
        ("small-mnist", "release.zip", r"into must be FILE.tar or FILE.tar.gz, got .*release.zip"),
        ("nothing", "release.tar", r"out must be a folder with runs, got .*nothing"),
    ],
)
def test_what_cannot_be_packed_is_refused(out: Path, tmp_path: Path, folder: str, name: str, message: str) -> None:
    """By the name of the option."""
    with pytest.raises(ValueError, match=message):
        pack(out.with_name(folder), tmp_path / name)


def test_the_command_says_what_it_packed(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And refuses what the function refuses."""
    words = ["pack", "--out", str(out), "--into", str(tmp_path / "release.tar.gz")]
    assert main(words) == 0
    assert " files of 4 runs, " in capsys.readouterr().out
    assert main(words) == 1
    assert "release.tar.gz, which exists; choose another, or delete it." in capsys.readouterr().err
    (tmp_path / "release.tar.gz").unlink()
    (out / "classifier" / "evaluation.json").unlink()
    assert main(words) == 1
    assert "got one with unfinished classifier." in capsys.readouterr().err
    assert main([*words, "--unfinished"]) == 0
