"""What was trained in one folder does not go on in another: swapped checkpoints, tokenizers and models.

The settings.json of a folder stays right in all of this; what was swapped has to give itself away.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.te_vqgan.classifier.trainer import CLASSIFIERS, train_classifier
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.family.train import train_family
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.running import CHECKPOINT, WEIGHTS, Interrupted
from examples.te_vqgan.stage1.train import train_stage1
from examples.te_vqgan.stage1.trainer import Stage1Trainer
from examples.te_vqgan.stage2 import publish as publishing
from examples.te_vqgan.stage2 import train as stage2
from examples.te_vqgan.stage2.evaluate import evaluate_gpt, evaluate_tokenizer
from examples.te_vqgan.stage2.publish import publish
from examples.te_vqgan.stage2.settings import stage2_settings_for
from examples.te_vqgan.stage2.train import load_tokenizer, stage2_folder, train_stage2
from te_quant import VQAutoencoder
from tests.example.tiny_runs import finished_classifier, finished_tokenizer, random_source, stage1_settings

GPT_SETTINGS = dataclasses.replace(stage2_settings_for("smoke"), train_images=8, eval_images=4)
CLASSIFIER = CLASSIFIERS["smoke"]
TWO_MODELS = dataclasses.replace(stage1_settings().model, orthogonal_reg=10.0)

Resume = Callable[[], object]


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """Random pictures: nothing here depends on what they show."""
    return random_source()


@pytest.fixture(autouse=True)
def few_validation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time would go into them."""
    monkeypatch.setattr(stage2, "_VALIDATION_IMAGES", 4)


def _swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def _stopped(train: Callable[..., object]) -> None:
    with pytest.raises(Interrupted, match="stopped at step 2"):
        train(stop=lambda done: done == 2)


def _two_stage1(tmp_path: Path, source: DigitSource) -> tuple[list[Path], list[Resume], str]:
    folders, resume = [], []
    for number, settings in enumerate((stage1_settings(), stage1_settings(seed=1, model=TWO_MODELS))):
        folder = tmp_path / f"run-{number}"

        def train(settings: object = settings, folder: Path = folder, **options: object) -> object:
            return train_stage1(settings, folder, source, resume=True, progress=False, **options)  # type: ignore[arg-type]

        _stopped(train)
        folders.append(folder)
        resume.append(train)
    return folders, resume, r"model.orthogonal_reg was 10.0, now 0.0; seed was 1, now 0"


def _two_stage2(tmp_path: Path, source: DigitSource) -> tuple[list[Path], list[Resume], str]:
    folders, resume = [], []
    for seed in (0, 1):
        tokenizer = finished_tokenizer(tmp_path / f"vqgan-seed{seed}", seed=seed)

        def train(tokenizer: Path = tokenizer, **options: object) -> object:
            return train_stage2(GPT_SETTINGS, tokenizer, source, resume=True, progress=False, **options)  # type: ignore[arg-type]

        _stopped(train)
        folders.append(stage2_folder(tokenizer, GPT_SETTINGS))
        resume.append(train)
    return folders, resume, r"stage1.seed was 1, now 0"


def _two_classifiers(tmp_path: Path, source: DigitSource) -> tuple[list[Path], list[Resume], str]:
    folders, resume = [], []
    for data in ("mnist", "fashion-mnist"):
        settings = dataclasses.replace(CLASSIFIER, data=data)
        folder = tmp_path / data

        def train(settings: object = settings, folder: Path = folder, **options: object) -> object:
            return train_classifier(settings, folder, source, resume=True, progress=False, **options)  # type: ignore[arg-type]

        _stopped(train)
        folders.append(folder)
        resume.append(train)
    return folders, resume, r"data was 'fashion-mnist', now 'mnist'"


def _two_members(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Path], list[Resume], str]:
    step = Stage1Trainer.train_step

    def cut(self: Stage1Trainer, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step == 2:
            raise RuntimeError("power cut")
        return step(self, images)

    settings = stage1_settings()
    resume: list[Resume] = []
    names = ("vq", "vq_orthogonal")
    for name in names:
        with monkeypatch.context() as patched:
            patched.setattr(Stage1Trainer, "train_step", cut)
            with pytest.raises(RuntimeError, match="power cut"):
                train_family(settings, tmp_path, source, names=[name], progress=False)
        resume.append(lambda name=name: train_family(settings, tmp_path, source, names=[name], progress=False))  # type: ignore[misc]
    return [tmp_path / f"{name}-seed0" for name in names], resume, r"quantizer.orthogonal_reg was 10.0, now None"


@pytest.mark.parametrize("kind", ["stage1", "stage2", "classifier", "family"])
def test_swapped_checkpoints_are_refused(
    kind: str, tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the settings that differ; nothing is trained or written. Swapped back, both runs go on."""
    if kind == "family":
        folders, resume, differences = _two_members(tmp_path, source, monkeypatch)
    else:
        two = {"stage1": _two_stage1, "stage2": _two_stage2, "classifier": _two_classifiers}[kind]
        folders, resume, differences = two(tmp_path, source)
    checkpoints = [folder / CHECKPOINT for folder in folders]
    _swap(*checkpoints)
    before = [path.read_bytes() for path in checkpoints]
    with pytest.raises(
        ValueError, match=rf"settings must be those of the checkpoint in .*, got others: {differences}"
    ):
        resume[0]()
    with pytest.raises(ValueError, match="settings must be those of the checkpoint in"):
        resume[1]()
    assert [path.read_bytes() for path in checkpoints] == before
    assert not any((folder / "evaluation.json").exists() for folder in folders)
    _swap(*checkpoints)
    for go_on in resume:
        go_on()
    assert all((folder / "evaluation.json").exists() for folder in folders)


def test_a_file_that_is_no_checkpoint_of_a_training_is_refused(tmp_path: Path, source: DigitSource) -> None:
    """The samples of a run have the same format, and no settings."""
    with pytest.raises(Interrupted, match="stopped at step"):
        train_classifier(CLASSIFIER, tmp_path, source, progress=False, stop=lambda done: done == 2)
    tensors, _ = load_checkpoint(tmp_path / CHECKPOINT)
    save_checkpoint(tmp_path / CHECKPOINT, tensors, {"step": 2})
    message = r"checkpoint.safetensors must be the checkpoint of a training, got one without settings in"
    with pytest.raises(ValueError, match=message):
        train_classifier(CLASSIFIER, tmp_path, source, progress=False, resume=True)


def test_a_checkpoint_of_before_goes_on(tmp_path: Path, source: DigitSource) -> None:
    """It does not say on which tokenizer it stands."""
    tokenizer = finished_tokenizer(tmp_path / "vqgan-seed0")
    with pytest.raises(Interrupted, match="stopped at step"):
        train_stage2(GPT_SETTINGS, tokenizer, source, progress=False, stop=lambda done: done == 2)
    path = stage2_folder(tokenizer, GPT_SETTINGS) / CHECKPOINT
    tensors, facts = load_checkpoint(path)
    assert set(facts.pop("inputs")) == {"tokenizer"}
    save_checkpoint(path, tensors, facts)
    assert train_stage2(GPT_SETTINGS, tokenizer, source, progress=False, resume=True)


def _retrained(tokenizer: Path) -> None:
    """Replace the weights by others of the same settings, as another machine would train them."""
    model = VQAutoencoder.from_pretrained(tokenizer / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tokenizer / "model")


def test_a_gpt_goes_on_only_with_the_tokenizer_it_began_with(tmp_path: Path, source: DigitSource) -> None:
    """Equal settings are not enough: other weights have other tokens."""
    tokenizer = finished_tokenizer(tmp_path / "vqgan-seed0")
    kept = shutil.copytree(tokenizer / "model", tmp_path / "kept")
    with pytest.raises(Interrupted, match="stopped at step"):
        train_stage2(GPT_SETTINGS, tokenizer, source, progress=False, stop=lambda done: done == 2)
    _retrained(tokenizer)
    message = r"tokenizer must be the one that the checkpoint in .* was trained with, got other weights"
    with pytest.raises(ValueError, match=message):
        train_stage2(GPT_SETTINGS, tokenizer, source, progress=False, resume=True)
    shutil.rmtree(tokenizer / "model")
    kept.rename(tokenizer / "model")
    assert train_stage2(GPT_SETTINGS, tokenizer, source, progress=False, resume=True)


def test_a_gpt_is_measured_and_published_only_with_its_tokenizer(tmp_path: Path, source: DigitSource) -> None:
    """Otherwise its tokens would be decoded by weights that they were not made with."""
    tokenizer = finished_tokenizer(tmp_path / "vqgan-seed0")
    classifier = finished_classifier(tmp_path / "classifier")
    train_stage2(GPT_SETTINGS, tokenizer, source, progress=False)
    kept = shutil.copytree(tokenizer / "model", tmp_path / "kept")
    _retrained(tokenizer)
    message = r"tokenizer must be the one that the run in .*stage2-8 was trained with, got other weights"
    with pytest.raises(ValueError, match=message):
        evaluate_gpt(GPT_SETTINGS, tokenizer, classifier, source, rule="2", progress=False)
    with pytest.raises(ValueError, match=message):
        publish(GPT_SETTINGS, tokenizer, classifier, tmp_path / "published")
    shutil.rmtree(tokenizer / "model")
    kept.rename(tokenizer / "model")
    assert evaluate_gpt(GPT_SETTINGS, tokenizer, classifier, source, rule="2", progress=False)
    assert publish(GPT_SETTINGS, tokenizer, classifier, tmp_path / "published") > 0
    weights = stage2_folder(tokenizer, GPT_SETTINGS) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    message = r"model must be the one that the run in .*stage2-8 ended with, got other weights; restore"
    with pytest.raises(ValueError, match=message):
        evaluate_gpt(GPT_SETTINGS, tokenizer, classifier, source, rule="16", progress=False)
    with pytest.raises(ValueError, match=message):
        publish(GPT_SETTINGS, tokenizer, classifier, tmp_path / "others")
    assert not (tmp_path / "others").exists()


def test_published_weights_are_not_replaced(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by those of another arm, and a write that fails leaves nothing."""
    tokenizer = finished_tokenizer(tmp_path / "vqgan-seed0")
    classifier = finished_classifier(tmp_path / "classifier")
    train_stage2(GPT_SETTINGS, tokenizer, source, progress=False)
    target = tmp_path / "published" / "weights"

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "save_classifier", broken)
        with pytest.raises(OSError, match="No space left"):
            publish(GPT_SETTINGS, tokenizer, classifier, target)
    assert list(target.parent.iterdir()) == []
    publish(GPT_SETTINGS, tokenizer, classifier, target)
    assert [path.name for path in target.parent.iterdir()] == ["weights"]
    assert sorted(path.name for path in target.iterdir()) == ["about.json", "classifier", "gpt", "tokenizer"]
    before = {path: path.read_bytes() for path in target.rglob("*.*")}
    message = r"into must be a new folder, got .*weights, which exists; choose another, or delete it\."
    with pytest.raises(ValueError, match=message):
        publish(GPT_SETTINGS, tokenizer, classifier, target)
    assert {path: path.read_bytes() for path in target.rglob("*.*")} == before


def test_swapped_models_of_two_arms_are_refused(tmp_path: Path, source: DigitSource) -> None:
    """By the settings of the model, in whatever reads a finished tokenizer."""
    plain = finished_tokenizer(tmp_path / "vqgan-seed0")
    penalized = finished_tokenizer(tmp_path / "te_vqgan-seed0", model=TWO_MODELS)
    classifier = finished_classifier(tmp_path / "classifier")
    _swap(plain / "model", penalized / "model")
    message = r"model must be that of the settings in .*, got model.orthogonal_reg was 10.0, now 0.0\."
    with pytest.raises(ValueError, match=message):
        evaluate_tokenizer(plain, classifier, source)
    with pytest.raises(ValueError, match=message):
        train_stage2(GPT_SETTINGS, plain, source, progress=False)
    _swap(plain / "model", penalized / "model")
    assert evaluate_tokenizer(plain, classifier, source)


@pytest.mark.slow
def test_swapped_models_of_two_seeds_are_refused(tmp_path: Path, source: DigitSource) -> None:
    """By the hash in the provenance, where settings are the same; runs without one load as before."""
    folders = [tmp_path / f"vqgan-seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        train_stage1(stage1_settings(steps=1, seed=seed), folder, source, progress=False)
    _swap(folders[0] / "model", folders[1] / "model")
    with pytest.raises(
        ValueError, match=r"model must be the one that the run in .* ended with, got other weights"
    ):
        load_tokenizer(folders[0], torch.device("cpu"))
    path = folders[0] / "provenance.json"
    facts = json.loads(path.read_text())
    del facts["hashes"]
    path.write_text(json.dumps(facts))
    load_tokenizer(folders[0], torch.device("cpu"))
    _swap(folders[0] / "model", folders[1] / "model")
    load_tokenizer(folders[1], torch.device("cpu"))
