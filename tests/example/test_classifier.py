"""The classifier that reads generated images: its network, the crops, the distance in its features, its training.

Shape letters: B cells, S canvas side, c = S/2.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.classifier import trainer
from examples.te_vqgan.classifier.cells import CellDataset
from examples.te_vqgan.classifier.model import (
    CellClassifier,
    ClassifierSettings,
    crop_places,
    feature_distance,
    load_classifier,
    save_classifier,
)
from examples.te_vqgan.classifier.trainer import CLASSIFIERS, ClassifierTrainer, accuracy, train_classifier
from examples.te_vqgan.data.quadrants import QuadrantImages
from examples.te_vqgan.data.recipes import EMPTY, PLACES, QuadrantRecipe
from examples.te_vqgan.data.sources import SOURCES, DigitSource, DigitSplit
from examples.te_vqgan.runs import running
from examples.te_vqgan.runs.checkpoint import load_checkpoint
from examples.te_vqgan.runs.running import CHECKPOINT, Interrupted
from tests.helpers import numpy_generator
from tests.published import published

SMOKE = CLASSIFIERS["smoke"]
CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**32 - 1)
NUMERALS = tuple("0123456789")


def _split(count: int) -> DigitSplit:
    pictures = numpy_generator().integers(0, 256, (count, 7, 7), dtype=np.uint8)
    return DigitSplit(pictures, np.arange(count, dtype=np.int64) % 10)


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """Random pictures: what they show matters in one test alone, which makes its own."""
    return DigitSource("random", NUMERALS, _split(40), _split(20), _split(30))


def _settings(**changes: Any) -> ClassifierSettings:
    return dataclasses.replace(SMOKE, **changes)


def _train(options: ClassifierSettings, folder: Path, source: DigitSource, **others: Any) -> bool:
    return train_classifier(options, folder, source, progress=False, **others)


def _classifier(**options: Any) -> CellClassifier:
    """A float64 classifier in evaluation mode in which every parameter and every statistic matters."""
    model = CellClassifier(**options).double().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "weight")) and tensor.ndim == 1:
            tensor.uniform_(0.5, 2.0)
        elif tensor.ndim == 1:  # so little below 0 that channels stay alive
            tensor.uniform_(-0.1, 0.4)
    return model


def _images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, dtype=torch.float64) * 2 - 1


# the network -----------------------------------------------------------------------------------------------


def _slow_features(model: CellClassifier, images: Tensor) -> list[Tensor]:
    """The network written out over its weights by their names."""
    state, stem_stride = model.state_dict(), model.config["stem_stride"]

    def normalized(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{entry}"].reshape(1, -1, 1, 1)
            for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5) ** 0.5 * weight + bias

    def convolved(x: Tensor, name: str, stride: int) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    light = images / 2 + 0.5
    brightest = torch.maximum(torch.maximum(light[:, :1], light[:, 1:2]), light[:, 2:])
    x = normalized(convolved(torch.cat([light, brightest], 1), "stem.0", stem_stride), "stem.1").clamp(min=0)
    found = []
    for stage in range(len(model.config["widths"])):
        for block in range(model.config["blocks"]):
            name, stride = f"stages.{stage}.{block}", 2 if stage > 0 and block == 0 else 1
            inner = normalized(convolved(x, f"{name}.conv1", stride), f"{name}.norm1").clamp(min=0)
            inner = normalized(convolved(inner, f"{name}.conv2", 1), f"{name}.norm2")
            if f"{name}.shortcut.0.weight" in state:
                x = normalized(convolved(x, f"{name}.shortcut.0", stride), f"{name}.shortcut.1")
            x = (inner + x).clamp(min=0)
        found.append(x)
    return found


@pytest.mark.parametrize(
    ("widths", "blocks", "stem_stride"), [((4,), 1, 1), ((4, 6), 2, 1), ((4, 4, 5), 1, 2), ((5, 4), 2, 4)]
)
def test_features_and_logits_are_those_of_the_network_written_out(
    widths: tuple[int, ...], blocks: int, stem_stride: int
) -> None:
    """In float64, every stage and both heads; another input gives other values."""
    options: dict[str, Any] = {"widths": widths, "blocks": blocks, "stem_stride": stem_stride}
    model = _classifier(num_classes=7, num_colors=3, **options)
    cells = _images(3, 16)
    expected = _slow_features(model, cells)
    found = model.features(cells)
    assert len(found) == len(widths)
    for number, (one, two) in enumerate(zip(found, expected, strict=True)):
        side = 16 // stem_stride // 2**number
        assert one.shape == (3, widths[number], side, side)
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-9)
    pooled = expected[-1].flatten(2).sum(-1) / (expected[-1].shape[2] * expected[-1].shape[3])
    output = model(cells)
    for logits, head in ((output.digit_logits, model.digit_head), (output.color_logits, model.color_head)):
        assert torch.allclose(logits, pooled @ head.weight.T + head.bias, rtol=1e-9, atol=1e-9)
    assert output.digit_logits.shape == (3, 7)
    assert output.color_logits.shape == (3, 3)
    assert not torch.allclose(model(_images(3, 16)).digit_logits, output.digit_logits)


def test_the_papers_preset_is_a_resnet_18() -> None:
    """11,173,962 parameters with 3 input channels and 10 classes; ours has a fourth channel and a second head."""
    paper = CLASSIFIERS["paper"]
    with torch.device("meta"):
        model = CellClassifier(widths=paper.widths, blocks=paper.blocks, stem_stride=paper.stem_stride)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 11_173_962 + 64 * 3 * 3 + (512 + 1) * 4
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert sum(module.kernel_size == (3, 3) for module in convolutions) == 17


def test_a_margin_is_not_looked_at() -> None:
    """The answers are those about the inner crop, 28 pixels of 32 in the preset of the paper."""
    assert CLASSIFIERS["paper"].margin == CLASSIFIERS["narrow"].margin == 2
    plain = _classifier(widths=(4, 8), blocks=1)
    model = CellClassifier(widths=(4, 8), blocks=1, margin=2).double().eval()
    model.load_state_dict(plain.state_dict())
    cells = _images(3, 32)
    inner = plain(cells[:, :, 2:30, 2:30])
    changed = cells.clone()
    changed[:, :, :2], changed[:, :, 30:] = 0.3, 0.3
    changed[:, :, :, :2], changed[:, :, :, 30:] = 0.3, 0.3
    for found in (model(cells), model(changed)):
        assert all(torch.equal(one, two) for one, two in zip(found, inner, strict=True))
    assert not torch.equal(plain(changed).digit_logits, plain(cells).digit_logits)
    assert model.config["margin"] == 2
    assert "margin" not in plain.config
    with pytest.raises(ValueError, match="cells must be wider than 4 pixels"):
        model(_images(1, 4))


def test_a_saved_margin_is_loaded(tmp_path: Path) -> None:
    """A classifier reads cells as it did when it was trained."""
    save_classifier(CellClassifier(widths=(8,), blocks=1, margin=3), tmp_path)
    assert load_classifier(tmp_path).margin == 3


def test_the_stem_sees_no_border_of_a_cell() -> None:
    """Its padding looks like ground; grey, whose value the padding lacks, is the negative control."""
    model = _classifier(widths=(4,))

    def seen(ground: float) -> tuple[Tensor, Tensor]:
        def stem(images: Tensor) -> Tensor:
            found: list[Tensor] = []
            handle = model.stem.register_forward_hook(lambda _module, _inputs, output: found.append(output))
            model(images)
            handle.remove()
            return found[0]

        cell = _images(1, 8)
        return stem(cell), stem(F.pad(cell, (3, 3, 3, 3), value=ground))[:, :, 3:-3, 3:-3]

    assert torch.allclose(*seen(-1.0), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(*seen(0.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an int >= 1, got 0"),
        ({"num_colors": 0}, "num_colors must be an int >= 1, got 0"),
        ({"blocks": 0}, "blocks must be an int >= 1, got 0"),
        ({"stem_stride": 0}, "stem_stride must be an int >= 1, got 0"),
        ({"widths": ()}, r"widths must be a tuple of one or more ints, got \(\)"),
        ({"widths": (8, 0)}, "widths must be an int >= 1, got 0"),
    ],
)
def test_bad_networks_are_refused(options: dict[str, Any], message: str) -> None:
    """Each option by name, with what came."""
    with pytest.raises(ValueError, match=message):
        CellClassifier(**options)


def test_a_saved_classifier_comes_back(tmp_path: Path) -> None:
    """From its own folder and from the run's around it, ready to read; from no other."""
    model = _classifier(num_classes=5, widths=(3, 4), blocks=1, stem_stride=2).float()
    save_classifier(model, tmp_path / "run" / "model")
    cells = _images(4, 16).float()
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded = load_classifier(folder)
        assert not loaded.training
        assert loaded.config == model.config
        assert torch.equal(loaded(cells).digit_logits, model(cells).digit_logits)
    with pytest.raises(ValueError, match="folder must be one with a trained classifier, got"):
        load_classifier(tmp_path)


# crops -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, side=st.sampled_from([32, 64]))
def test_crops_are_the_cells_that_were_drawn(seed: int, side: int) -> None:
    """At each place, in the order asked for; what is drawn elsewhere is not in the crop."""
    rng = np.random.default_rng(seed)
    images = QuadrantImages(rng.integers(1, 256, (4, 7, 7), dtype=np.uint8), side)
    places = [int(place) for place in rng.integers(0, len(PLACES), 3)]
    for drawn in range(len(PLACES)):
        digits = np.full((2, len(PLACES)), EMPTY, np.int32)
        digits[:, drawn] = rng.integers(0, 4, 2)
        colors = np.where(digits >= 0, 0, EMPTY).astype(np.int8)
        rendered = images.render(QuadrantRecipe(digits, colors))
        crops = crop_places(rendered)
        assert crops.shape == (2, len(PLACES), 3, side // 2, side // 2)
        white = torch.from_numpy(images.cells[digits[:, drawn]]).float()[:, None].expand(-1, 3, -1, -1)
        assert torch.equal(crops[:, drawn], white / 127.5 - 1)
        same = [place for place in range(len(PLACES)) if torch.equal(crops[:, place], crops[:, drawn])]
        assert same == [drawn]
        assert torch.equal(crop_places(rendered, places), crops[:, places])


@pytest.mark.parametrize(
    ("shape", "places", "message"),
    [
        ((2, 3, 8, 12), None, r"images must be \(B, 3, S, S\) with S a multiple of 4, got \(2, 3, 8, 12\)"),
        ((2, 1, 8, 8), None, r"images must be \(B, 3, S, S\) with S a multiple of 4, got \(2, 1, 8, 8\)"),
        ((2, 3, 6, 6), None, r"images must be .*, got \(2, 3, 6, 6\)"),
        ((3, 8, 8), None, r"images must be .*, got \(3, 8, 8\)"),
        ((2, 3, 8, 8), [0, 5], r"places must be one or more indices in \[0, 5\), got \[0, 5\]"),
        ((2, 3, 8, 8), [-1], r"places must be one or more indices in \[0, 5\), got \[-1\]"),
        ((2, 3, 8, 8), [], r"places must be one or more indices in \[0, 5\), got \[\]"),
    ],
)
def test_bad_crops_are_refused(shape: tuple[int, ...], places: list[int] | None, message: str) -> None:
    """Each by name, with what came."""
    with pytest.raises(ValueError, match=message):
        crop_places(torch.zeros(shape), places)


def test_features_of_other_images_are_refused() -> None:
    """The network takes colour images alone."""
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(2, 1, 8, 8\)"):
        CellClassifier()(torch.zeros(2, 1, 8, 8))


# the distance ----------------------------------------------------------------------------------------------


def _slow_distance(model: CellClassifier, first: Tensor, second: Tensor) -> list[float]:
    pairs = zip(_slow_features(model, first), _slow_features(model, second), strict=True)
    stages = [(one.detach().numpy(), two.detach().numpy()) for one, two in pairs]
    result = []
    for image in range(len(first)):
        total = 0.0
        for one, two in stages:
            _, _, height, width = one.shape
            for y in range(height):
                for x in range(width):
                    a, b = one[image, :, y, x], two[image, :, y, x]
                    a = a / np.sqrt((a * a).sum()) if a.any() else a
                    b = b / np.sqrt((b * b).sum()) if b.any() else b
                    total += ((a - b) ** 2).sum() / (height * width)
        result.append(total)
    return result


def test_feature_distance_is_the_formula() -> None:
    """Against explicit loops; 0 for equal images, symmetric, at most 2 a stage, and whole images do as well."""
    model = _classifier(widths=(4, 5, 3), blocks=1)
    for side in (8, 16):
        first, second = _images(3, side), _images(3, side)
        second[2] = first[2]
        found = feature_distance(model, first, second)
        assert found.shape == (3,)
        assert np.allclose(found.detach().numpy(), _slow_distance(model, first, second), rtol=1e-6, atol=1e-9)
        assert torch.equal(found, feature_distance(model, second, first))
        assert found[2] == 0
        assert (found[:2] > 0).all()
        assert (found <= 6).all()


def test_feature_distance_grows_with_the_noise() -> None:
    """On average; this is what it is for."""
    model = _classifier(widths=(8, 8))
    images, noise = _images(16, 16), torch.randn(16, 3, 16, 16, dtype=torch.float64)
    noisy = [images + size * noise for size in (0.01, 0.1, 0.5)]
    means = [feature_distance(model, images, other).mean().item() for other in noisy]
    assert means == sorted(means)
    assert means[0] < means[2] / 2


def test_feature_distance_refuses_other_shapes() -> None:
    """Images are compared one by one."""
    images = _images(2, 8)
    with pytest.raises(ValueError, match=r"second must be as first, \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"):
        feature_distance(_classifier(widths=(4,)), images, images[:1])


def test_feature_distance_refuses_training_mode() -> None:
    """In which images change each other's features."""
    images = _images(2, 8)
    with pytest.raises(ValueError, match="classifier must be in evaluation mode, got training mode"):
        feature_distance(_classifier(widths=(4,)).train(), images, images)


# training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "stops"),
    [({}, (2,)), ({"bf16": True, "canvas_size": 64}, (1, 3)), ({"widths": (4, 8, 8), "blocks": 2}, (5,))],
    ids=["plain", "bf16-64", "deep"],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, source: DigitSource, changes: dict[str, Any], stops: tuple[int, ...]
) -> None:
    """Weights, statistics, moments, log and numbers are equal bit for bit."""
    options = _settings(**changes)
    once, often = tmp_path / "once", tmp_path / "often"
    assert _train(options, once, source)
    for stop in stops:
        with pytest.raises(Interrupted, match=f"stopped at step {stop} of 6; --resume goes on from there"):
            _train(options, often, source, resume=True, stop=lambda done, stop=stop: done == stop)
        torch.manual_seed(99)  # whatever another program left behind
    assert _train(options, often, source, resume=True)
    first, second = (load_checkpoint(folder / CHECKPOINT)[0] for folder in (once, often))
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in first} == {"model", "adam"}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for name in ("log.jsonl", "evaluation.json", "settings.json", "model/config.json"):
        assert (once / name).read_bytes() == (often / name).read_bytes(), name
    loaded = load_classifier(often).state_dict()
    assert all(torch.equal(tensor, first[f"model.{name}"]) for name, tensor in loaded.items())


def test_other_settings_give_other_weights(tmp_path: Path, source: DigitSource) -> None:
    """The negative control of the test above: every one of these decides the numbers."""
    weights = {}
    variants: dict[str, dict[str, Any]] = {
        "base": {},
        "seed": {"seed": 1},
        "smoothing": {"label_smoothing": 0.1},
        "decay": {"weight_decay": 1.0},
        "rotation": {"rotation": 40.0},
        "flaws": {"flaws": 1.0},
    }
    for name, changes in variants.items():
        _train(_settings(steps=2, validation_cells=1, **changes), tmp_path / name, source)
        weights[name] = load_classifier(tmp_path / name).state_dict()["stem.0.weight"]
    names = list(weights)
    for number, one in enumerate(names):
        for two in names[:number]:
            assert not torch.equal(weights[one], weights[two]), (one, two)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between two checkpoints loses the steps between them and nothing else."""
    once, killed = tmp_path / "once", tmp_path / "killed"
    _train(SMOKE, once, source)
    step = ClassifierTrainer.train_step

    def crash(self: ClassifierTrainer, batch: Any) -> dict[str, Tensor]:
        if self.step == 5:
            raise RuntimeError("power cut")
        return step(self, batch)

    monkeypatch.setattr(ClassifierTrainer, "train_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        _train(SMOKE, killed, source)
    monkeypatch.undo()
    assert load_checkpoint(killed / CHECKPOINT)[1]["step"] == 4
    assert not (killed / "evaluation.json").exists()
    _train(SMOKE, killed, source, resume=True)
    assert (once / "log.jsonl").read_bytes() == (killed / "log.jsonl").read_bytes()


def test_a_finished_run_is_skipped_and_others_are_refused(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written again; a folder never mixes two runs; two processes never share it."""
    options = _settings(steps=2)
    with pytest.raises(Interrupted, match="stopped at step"):
        _train(options, tmp_path, source, stop=lambda done: done == 1)
    with pytest.raises(ValueError, match=r"resume must be set, as .* holds an unfinished run, got False"):
        _train(options, tmp_path, source)
    with (tmp_path / ".lock").open("w") as file:
        fcntl = pytest.importorskip("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(running, "_LOCK_SECONDS", 0.1)
        with pytest.raises(ValueError, match="must not be in use, but another process works there"):
            _train(options, tmp_path, source, resume=True)
    assert _train(options, tmp_path, source, resume=True, command="typed")
    assert json.loads((tmp_path / "provenance.json").read_text())["command"] == "typed"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert not _train(options, tmp_path, source)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    message = r"widths was \[8, 16\], now \[8\]"
    with pytest.raises(ValueError, match=message):
        _train(dataclasses.replace(options, widths=(8,)), tmp_path, source)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Torch's own generator is neither used nor moved."""
    starts = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        trainer = ClassifierTrainer(_settings(seed=seed), 10, CPU)
        assert torch.equal(before, torch.get_rng_state())
        starts.append(trainer.model.state_dict()["stem.0.weight"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_step_is_adamw_on_the_sum_of_both_losses(source: DigitSource) -> None:
    """The losses against float64 sums of logarithms; the first update is rate x sign, decay for matrices alone."""
    options = _settings(learning_rate=1e-2, warmup_steps=4, weight_decay=0.5, label_smoothing=0.2)
    trainer = ClassifierTrainer(options, 10, CPU)
    batch = CellDataset(source, "train", canvas_size=32).batch(0, 16, options.distortion)
    start = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    logits = [output.detach().double().numpy() for output in trainer.model.train()(batch.cells)]
    numbers = trainer.train_step(batch)

    logs = [output - np.log(np.exp(output).sum(axis=1, keepdims=True)) for output in logits]
    target = np.full((16, 10), 0.2 / 10)
    target[np.arange(16), batch.digits.numpy()] += 0.8
    expected = [-(target * logs[0]).sum(1).mean(), -logs[1][np.arange(16), batch.colors.numpy()].mean()]
    assert numbers["digit_loss"].item() == pytest.approx(expected[0], rel=1e-5)
    assert numbers["color_loss"].item() == pytest.approx(expected[1], rel=1e-5)
    assert numbers["loss"].item() == pytest.approx(sum(expected), rel=1e-5)
    right = (logits[0].argmax(1) == batch.digits.numpy()).mean()
    assert numbers["digit_accuracy"].item() == pytest.approx(right)
    assert numbers["color_accuracy"].item() == pytest.approx((logits[1].argmax(1) == batch.colors.numpy()).mean())

    rate = 1e-2 / 4
    assert numbers["learning_rate"].item() == pytest.approx(rate)
    squares = 0.0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None
        squares += float(parameter.grad.double().square().sum())
        kept = 1 - rate * 0.5 * (parameter.ndim > 1)
        large = parameter.grad.abs() > 1e-5  # where Adam's epsilon does not matter
        moved = (parameter.detach() - start[name] * kept)[large]
        assert torch.allclose(moved, -rate * parameter.grad.sign()[large], rtol=5e-3, atol=1e-7), name
    assert numbers["grad_norm"].item() == pytest.approx(squares**0.5, rel=1e-5)


def _patterns(shuffle: bool) -> DigitSource:
    """Ten random pictures with a little noise; with labels that say nothing if they are to be shuffled."""
    # Some sets of ten are harder to tell apart than a hundred steps can learn.
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (10, 7, 7)) * 200

    def split(count: int) -> DigitSplit:
        labels = np.arange(count, dtype=np.int64) % 10
        pictures = (base[labels] + rng.integers(0, 40, (count, 7, 7))).astype(np.uint8)
        return DigitSplit(pictures, rng.permutation(labels) if shuffle else labels)

    return DigitSource("patterns", NUMERALS, split(400), split(200), split(200))


@pytest.mark.slow
def test_it_learns_what_there_is_to_learn(tmp_path: Path) -> None:
    """Patterns and their colours within seconds; nothing but the colours where labels are shuffled."""
    options = _settings(steps=150, batch_size=64, learning_rate=5e-3, warmup_steps=10, widths=(16, 32))
    options = dataclasses.replace(options, stem_stride=2, shift=0.0, rotation=0.0, scale=0.0, shear=0.0, flaws=0.0)
    for shuffle in (False, True):
        folder = tmp_path / str(shuffle)
        _train(options, folder, _patterns(shuffle))
        numbers = json.loads((folder / "evaluation.json").read_text())
        assert set(numbers) == {"validation", "test"}
        for split in ("validation", "test"):
            assert numbers[split]["cells"] == 200
            assert numbers[split]["color_accuracy"] > 0.95
            assert (numbers[split]["digit_accuracy"] > 0.95) is not shuffle
            assert numbers[split]["digit_accuracy"] > 0.95 or numbers[split]["digit_accuracy"] < 0.3


# measuring -------------------------------------------------------------------------------------------------


def test_accuracy_counts_every_cell_once() -> None:
    """Against cells read one at a time; a class without cells has no accuracy; the mode stays what it was."""
    labels = np.concatenate([np.arange(9), numpy_generator().integers(0, 9, 600)]).astype(np.int64)
    pictures = numpy_generator().integers(0, 256, (len(labels), 7, 7), dtype=np.uint8)
    split = DigitSplit(pictures, labels)
    cells = CellDataset(DigitSource("x", NUMERALS, split, split, split), "test", canvas_size=32)
    model = _classifier(widths=(4, 6)).float()
    for module in model.modules():  # so that answers differ from cell to cell
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(50)
            module.bias.data.zero_()
    for count in (None, 37):
        expected = len(labels) if count is None else count
        confusion, colors, both = np.zeros((10, 10), int), 0, 0
        for row in range(expected):
            batch = cells.fixed(row, row + 1)
            output = model(batch.cells)
            answer, color = int(output.digit_logits[0].argmax()), int(output.color_logits[0].argmax())
            confusion[labels[row], answer] += 1
            colors += color == int(batch.colors[0])
            both += color == int(batch.colors[0]) and answer == labels[row]
        model.train(count is None)
        found = accuracy(model, cells, count)
        assert model.training is (count is None)
        model.eval()
        assert found["cells"] == expected
        # Cells that lie between two answers may fall either way in another batch.
        assert np.abs(np.array(found["confusion"]) - confusion).sum() <= 2
        assert found["digit_accuracy"] == pytest.approx(np.trace(confusion) / expected, abs=2 / expected)
        assert found["color_accuracy"] == pytest.approx(colors / expected, abs=2 / expected)
        assert found["accuracy"] == pytest.approx(both / expected, abs=2 / expected)
        assert found["class_accuracy"][9] is None
        for label in range(9):
            row_sum = sum(found["confusion"][label])
            assert row_sum == (labels[:expected] == label).sum()
            assert found["class_accuracy"][label] == found["confusion"][label][label] / row_sum


# settings --------------------------------------------------------------------------------------------------


def test_presets_survive_json_and_take_any_data() -> None:
    """Tuples and all."""
    assert {"smoke", "small", "paper"} <= set(CLASSIFIERS)
    for options in CLASSIFIERS.values():
        for data in SOURCES:
            changed = dataclasses.replace(options, data=data)
            assert ClassifierSettings.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    assert CLASSIFIERS["small"].canvas_size == 32
    assert CLASSIFIERS["paper"].canvas_size == 64


def test_the_reader_of_published_reports_has_a_name() -> None:
    """So that it can be trained again, whichever is the default."""
    stored = json.loads(published("small/results.json").read_text())["classifier"]["settings"]
    known = [dataclasses.replace(options, data=stored["data"]) for options in CLASSIFIERS.values()]
    assert ClassifierSettings.from_dict(stored) in known


def test_a_folder_of_before_is_found_finished_and_loads(tmp_path: Path, source: DigitSource) -> None:
    """Its settings lack what came later; other settings are still refused."""
    assert _train(SMOKE, tmp_path, source)
    path = tmp_path / "settings.json"
    stored = json.loads(path.read_text())
    for name in ("margin", "flaws"):
        del stored[name]
    path.write_text(json.dumps(stored))
    assert not _train(dataclasses.replace(SMOKE, flaws=ClassifierSettings().flaws), tmp_path, source)
    with pytest.raises(ValueError, match=r"flaws was 0.2, now 0.5"):
        _train(dataclasses.replace(SMOKE, flaws=0.5), tmp_path, source)
    load_classifier(tmp_path)


def test_settings_are_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the preset by default; an unknown name is refused with the known ones."""
    taken: list[ClassifierSettings] = []
    monkeypatch.setattr(trainer, "train_classifier", lambda settings, *_, **__: taken.append(settings))
    words = ["classifier", "--preset", "small", "--data", "digits", "--out", str(tmp_path)]
    assert main(words) == main([*words, "--settings", "small-strided", "--steps", "9"]) == 0
    names = ("small", "small-strided")
    expected = [dataclasses.replace(CLASSIFIERS[name], data="digits") for name in names]
    assert taken == [expected[0], dataclasses.replace(expected[1], steps=9)]
    assert main([*words, "--settings", "unknown"]) == 1
    assert "settings must be one of 'smoke', 'small'," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number >= 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number >= 0, got -1.0"),
        ({"label_smoothing": 1.5}, "label_smoothing must be a finite number >= 0 and <= 1, got 1.5"),
        ({"final_lr_share": 1.5}, "final_lr_share must be a finite number >= 0 and <= 1, got 1.5"),
        ({"canvas_size": 48}, "canvas_size must be a multiple of 32, got 48"),
        ({"widths": [8]}, r"widths must be a tuple of one or more ints, got \[8\]"),
        ({"stem_stride": 0}, "stem_stride must be an int >= 1, got 0"),
        ({"shift": 0.75}, "shift must be a finite number >= 0 and <= 0.5, got 0.75"),
        ({"rotation": 270.0}, "rotation must be a finite number >= 0 and <= 180, got 270.0"),
        ({"flaws": -0.1}, "flaws must be a finite number >= 0 and <= 1, got -0.1"),
        ({"log_every": 2, "validate_every": 3}, "validate_every must be a multiple of log_every=2, got 3"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each by name, with what came."""
    with pytest.raises(ValueError, match=message):
        _settings(**changes)
