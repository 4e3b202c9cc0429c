"""The archive of a release: complete, small, the same every time, and checked by what lies in it."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import pytest
import torch

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.classifier.model import load_classifier
from examples.te_vqgan.runs.archive import MANIFEST, WEIGHTS, pack
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
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


def test_an_archive_within_the_folder_does_not_hold_itself(out: Path) -> None:
    """Packed a second time, it is as it was."""
    target = out / "release.tar"
    pack(out, target)
    once = target.read_bytes()
    pack(out, target)
    assert target.read_bytes() == once


def test_unfinished_runs_are_refused_by_name(out: Path, tmp_path: Path) -> None:
    """Unless they are wanted: then the weights of their checkpoints go in. The old archive stays where it is."""
    target = tmp_path / "release.tar"
    target.write_text("the last one")
    (out / "family" / "fsq-seed0" / "evaluation.json").unlink()
    (out / "vqgan-seed0" / "stage2-8" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"got one with unfinished family/fsq-seed0, vqgan-seed0/stage2-8\.$"):
        pack(out, target)
    assert target.read_text() == "the last one"
    pack(out, target, unfinished=True)
    assert f"family/fsq-seed0/{WEIGHTS}" in _files(_unpacked(target, tmp_path / "unpacked"))


def test_a_failed_write_leaves_the_old_archive(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no half of a new one."""
    target = tmp_path / "release.tar.gz"
    target.write_text("the last one")

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", broken)
    with pytest.raises(OSError, match="No space left"):
        pack(out, target)
    assert target.read_text() == "the last one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release.tar.gz", "small-mnist"]


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
    (out / "classifier" / "evaluation.json").unlink()
    assert main(words) == 1
    assert "got one with unfinished classifier." in capsys.readouterr().err
    assert main([*words, "--unfinished"]) == 0
