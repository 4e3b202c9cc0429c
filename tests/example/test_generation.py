"""The paper's two tasks: what is asked of the GPT, where its tokens go, how they are read; and ``evaluate``.

Shape letters: B images, P = 5 places, S canvas side, h w token grid, T caption tokens.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.classifier.model import CellClassifier, crop_places, feature_distance, load_classifier
from examples.te_vqgan.classifier.trainer import CLASSIFIERS
from examples.te_vqgan.data import sources
from examples.te_vqgan.data.caption_parser import parse
from examples.te_vqgan.data.heldout import allowed
from examples.te_vqgan.data.pairs import CaptionedImages
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.recipes import EMPTY, LAYOUTS
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs.checkpoint import load_checkpoint
from examples.te_vqgan.runs.files import sha256
from examples.te_vqgan.runs.running import Interrupted
from examples.te_vqgan.stage1.evaluation import dataset
from examples.te_vqgan.stage2 import evaluate, generation
from examples.te_vqgan.stage2 import train as stage2
from examples.te_vqgan.stage2.evaluate import evaluate_gpt, evaluate_tokenizer
from examples.te_vqgan.stage2.generation import (
    draw_images,
    evaluate_pairs,
    read_places,
    read_tokenizer,
    write_captions,
)
from examples.te_vqgan.stage2.rules import Rule, rule_named
from examples.te_vqgan.stage2.settings import DIRECTIONS, Stage2Settings, stage2_settings_for
from examples.te_vqgan.stage2.train import load_tokenizer, stage2_folder, train_stage2
from examples.te_vqgan.stage2.trainer import Stage2Trainer, gpt_config
from te_quant import GPT
from tests.example.tiny_runs import NAMES, PerfectReader, finished_classifier, finished_tokenizer, random_source
from tests.helpers import numpy_generator

CPU = torch.device("cpu")
GREEDY = Rule("greedy", 1, 1)
CANVAS, CODES, GRID = 32, 16, (3, 4)
TASKS = tuple(DIRECTIONS)


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """Digits."""
    return random_source()


@pytest.fixture(scope="module")
def pairs(source: DigitSource) -> CaptionedImages:
    """Every case occurs among them."""
    return CaptionedImages(source, "test", canvas_size=CANVAS, size=60, style="terse")


@pytest.fixture(scope="module")
def reader(source: DigitSource) -> PerfectReader:
    """Reads the test split without a mistake."""
    return PerfectReader(source.test, CANVAS)


def _settings(**changes: Any) -> Stage2Settings:
    return stage2_settings_for("smoke", changes)


def _gpt(pairs: CaptionedImages, **changes: Any) -> GPT:
    settings = _settings(**changes)
    return Stage2Trainer(settings, gpt_config(settings, pairs.tokenizer, CODES, GRID), CPU).model.eval()


# Of an image tokenizer that chooses no phase, as far as it is read.
PLAIN = {"widths": (8,), "downsample": "none"}


class _Codes:
    """Decodes a token into its number, everywhere in its cell."""

    config = SimpleNamespace(**PLAIN)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """(B, h, w) to (B, 1, h, w)."""
        return indices[:, None].float()


def test_a_learnt_pair_is_drawn_and_told_as_it_was(pairs: CaptionedImages) -> None:
    """A GPT that knows one pair by heart puts each token in its place of the grid, and ends the caption."""
    settings = _settings(steps=80, optimizer="adam", learning_rate=0.03, train_images=1)
    trainer = Stage2Trainer(settings, gpt_config(settings, pairs.tokenizer, CODES, GRID), CPU)
    captions = [str(numpy_generator().choice(pairs.first_captions(0, 60)))]
    text = pairs.tokenizer.encode(captions)
    tokens = torch.randperm(CODES)[: GRID[0] * GRID[1]].reshape(1, *GRID)
    for _ in range(80):
        trainer.train_step(text, tokens)
    gpt = trainer.model.eval()
    drawn = draw_images(gpt, _Codes(), text, GREEDY, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert torch.equal(drawn[:, 0].long(), tokens)
    assert not torch.equal(drawn[:, 0].long(), tokens.flip(2))
    assert write_captions(gpt, pairs, tokens.flatten(1), GREEDY, torch.Generator()) == captions
    # The negative control: a GPT that has learnt nothing.
    fresh = _gpt(pairs)
    drawn = draw_images(fresh, _Codes(), text, GREEDY, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert not torch.equal(drawn[:, 0].long(), tokens)
    assert write_captions(fresh, pairs, tokens.flatten(1), GREEDY, torch.Generator()) != captions


def test_chance_comes_from_the_generator_alone(pairs: CaptionedImages) -> None:
    """The same seed draws the same images whatever torch's own generator holds; another draws others."""
    gpt, free = _gpt(pairs), Rule("all", CODES, 1)
    text = pairs.tokenizer.encode(pairs.first_captions(0, 5))

    def draw(seed: int, rule: Rule = free) -> Tensor:
        return draw_images(gpt, _Codes(), text, rule, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]

    state = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(first, draw(3))
    assert not torch.equal(first, draw(4))
    assert first.shape == (5, 1, *GRID)
    # Of the likeliest code alone there is nothing to choose.
    assert torch.equal(draw(3, GREEDY), draw(4, GREEDY))


def test_captions_are_drawn_from_their_generator_alone(pairs: CaptionedImages) -> None:
    """As images; and of one candidate there is nothing to choose."""
    gpt, free = _gpt(pairs), Rule("all", 1, pairs.tokenizer.vocab_size)
    tokens = torch.randint(CODES, (5, GRID[0] * GRID[1]))

    def write(seed: int, rule: Rule = free) -> list[str]:
        return write_captions(gpt, pairs, tokens, rule, torch.Generator().manual_seed(seed))

    assert write(3) == write(3) != write(4)
    assert write(3, GREEDY) == write(4, GREEDY)


class _Told:
    """Stands for a GPT: notes what it is asked, and answers with given tokens."""

    def __init__(self, config: Any, answer: Tensor) -> None:
        self.config, self.answer = config, answer
        self.asked: dict[str, Any] = {}

    def generate(self, prompt: Tensor, **options: Any) -> Tensor:
        """The prompt, then the answer."""
        self.asked = {"prompt": prompt, **options}
        return torch.cat([prompt, self.answer], 1)


def test_captions_end_at_the_end_token(pairs: CaptionedImages) -> None:
    """What comes after it is not told; without it everything is; decoding is told the rule and where to stop."""
    tokenizer = pairs.tokenizer
    captions = pairs.first_captions(0, 3)
    answer = tokenizer.encode(captions)
    for row, (words, other) in enumerate(zip(answer, answer.roll(1, 0), strict=True)):
        end = int((words == tokenizer.end_token).nonzero()[0, 0])
        answer[row, end + 1 :] = other[: len(words) - end - 1]
    told = _Told(_gpt(pairs).config, answer)
    tokens = torch.randint(CODES, (3, GRID[0] * GRID[1]))
    rule, generator = Rule("some", 3, 5), torch.Generator()
    assert write_captions(told, pairs, tokens, rule, generator) == captions  # type: ignore[arg-type]
    assert torch.equal(told.asked["prompt"], tokens)
    assert told.asked["order"] == ("image", "text")
    assert (told.asked["top_k"], told.asked["generator"]) == (5, generator)
    assert told.asked["stop_token"] == tokenizer.end_token
    endless = _Told(told.config, answer.masked_fill(answer == tokenizer.end_token, answer[0, 0]))
    assert write_captions(endless, pairs, tokens, rule, generator) != captions  # type: ignore[arg-type]


def test_images_are_asked_for_as_the_rule_says(pairs: CaptionedImages) -> None:
    """The caption is the prompt; the number of codes is that of the rule."""
    answer = torch.randint(CODES, (2, GRID[0] * GRID[1]))
    told = _Told(_gpt(pairs).config, answer)
    text = pairs.tokenizer.encode(pairs.first_captions(0, 2))
    generator = torch.Generator()
    drawn = draw_images(told, _Codes(), text, Rule("some", 3, 5), generator)  # type: ignore[arg-type]
    assert torch.equal(drawn[:, 0].long(), answer.reshape(2, *GRID))
    prompt = told.asked.pop("prompt")
    assert torch.equal(prompt, text)
    assert told.asked == {"order": ("text", "image"), "top_k": 3, "generator": generator}


def test_digits_are_read_where_they_were_drawn(source: DigitSource, reader: PerfectReader) -> None:
    """In all five layouts; in a mirrored image, or of other images, they are not."""
    data = QuadrantDataset(source, "test", canvas_size=CANVAS, size=100, layouts=LAYOUTS)
    images, there = data.fixed(0, 100), data.recipes.filled
    classes, colors = read_places(reader, images)
    assert classes.shape == colors.shape == (100, 5)
    assert (classes == data.classes(data.recipes))[there].all()
    assert (colors == data.recipes.colors)[there].all()
    for wrong in (images.flip(3), images.roll(1, 0), images.roll(4, 2)):
        assert (read_places(reader, wrong)[0] != classes)[there].mean() > 0.3
    assert torch.equal(crop_places(images)[:, 4], images[:, :, 8:24, 8:24])


def test_what_is_read_lies_in_the_range_of_images(source: DigitSource, reader: PerfectReader) -> None:
    """A decoder may leave [-1, 1]; a display would not."""
    images = QuadrantDataset(source, "test", canvas_size=CANVAS, size=4).fixed(0, 4)
    reader.seen.clear()
    bright = read_places(reader, images * 3)
    assert reader.seen[0].abs().max() == 1
    assert all((a == b).all() for a, b in zip(bright, read_places(reader, (images * 3).clamp(-1, 1)), strict=True))


class _Decoder:
    """Stands for a tokenizer: some function of the images."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, images: Tensor) -> Any:
        """What an autoencoder returns, as far as it is used."""
        return SimpleNamespace(reconstruction=self.function(images))


def test_a_lossless_tokenizer_reads_like_the_images(
    pairs: CaptionedImages, reader: PerfectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All right, at distance 0; one that mirrors loses, and its distance is the mean over all images."""
    monkeypatch.setattr(generation, "_BATCH", 25)

    def read(function: Any) -> dict[str, Any]:
        return read_tokenizer(_Decoder(function), reader, pairs.dataset, 10, device=CPU)  # type: ignore[arg-type]

    same = read(lambda images: images)
    assert same["original"] == same["reconstruction"]
    assert same["feature_distance"] == 0
    cases = same["original"]["cases"]
    assert sum(case["images"] for case in cases.values()) == 60
    assert sum(case["digits"] for case in cases.values()) == pairs.dataset.recipes.filled.sum()
    assert all(case["both_accuracy"] == 1 for case in cases.values())
    mirrored = read(lambda images: images.flip(3) * 1.5)
    assert mirrored["original"] == same["original"]
    assert mirrored["reconstruction"]["cases"]["quad4"]["digit_accuracy"] < 1
    images = pairs.dataset.fixed(0, 60)
    expected = feature_distance(reader, (images.flip(3) * 1.5).clamp(-1, 1), images).double().mean()
    assert mirrored["feature_distance"] == pytest.approx(expected.item(), rel=1e-5)


class _World:
    """A tokenizer and a GPT that know the pairs: an image's tokens are its number, a caption's image is drawn."""

    def __init__(self, pairs: CaptionedImages, shift: int = 0) -> None:
        self.config = SimpleNamespace(segments=_gpt(pairs).config.segments, **PLAIN)
        self.images = pairs.dataset.fixed(0, len(pairs))
        captions = pairs.first_captions(0, len(pairs))
        self.text = pairs.tokenizer.encode(captions).roll(-shift, 0)
        self.numbers = {text: (row + shift) % len(pairs) for row, text in enumerate(captions)}
        self.decode = pairs.tokenizer.decode
        self.seen = 0

    def encode_to_indices(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, h, w); two images may be alike, so it counts them as they come."""
        rows = torch.arange(self.seen, self.seen + len(images))
        assert torch.equal(images, self.images[rows])
        self.seen += len(images)
        return rows[:, None, None].expand(-1, *GRID)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Undo it."""
        return self.images[indices[:, 0, 0]]

    def generate(self, prompt: Tensor, *, order: tuple[str, str], **options: Any) -> Tensor:
        """Answer a caption by the tokens of its image, and an image by its caption."""
        if order == ("text", "image"):
            rows = torch.tensor([self.numbers[text] for text in self.decode(prompt)])
            return torch.cat([prompt, rows[:, None].expand(-1, GRID[0] * GRID[1])], 1)
        return torch.cat([prompt, self.text[prompt[:, 0]]], 1)


def _measure(world: _World, pairs: CaptionedImages, reader: CellClassifier, told: list[int]) -> Any:
    models: Any = (world, world, reader)
    return evaluate_pairs(*models, pairs, GREEDY, seed=0, device=CPU, progress=told.append)


def test_who_knows_the_pairs_makes_no_mistake(
    pairs: CaptionedImages, reader: PerfectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tasks, all cases, with the first captions; who answers for the next pair does."""
    monkeypatch.setattr(generation, "_BATCH", 25)
    told: list[int] = []
    numbers, shown = _measure(_World(pairs), pairs, reader, told)
    assert told == [25, 50, 60]
    filled = pairs.dataset.recipes.filled
    for task in TASKS:
        cases = numbers[task]["cases"]
        assert all(case["both_accuracy"] == case["image_accuracy"] == 1 for case in cases.values())
        assert sum(case["digits"] for case in cases.values()) == filled.sum()
        assert np.trace(numbers[task]["confusion"]) == filled.sum()
    assert shown["captions"] == shown["written"] == pairs.first_captions(0, 16)
    expected = ((pairs.dataset.fixed(0, 16) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(shown["images"], expected)
    assert shown["generated"].shape == (16, 3, CANVAS, CANVAS)
    assert shown["generated"].dtype == torch.uint8

    wrong, shown = _measure(_World(pairs, shift=1), pairs, reader, [])
    for task in TASKS:
        assert wrong[task]["cases"]["quad1"]["digit_accuracy"] < 1
    assert shown["written"] == pairs.first_captions(1, 17)
    # Of what is told of the next image, right is what the reader of captions finds in both.
    read = parse(pairs.first_captions(1, 60) + pairs.first_captions(0, 1), NAMES)
    truth = pairs.classes_colors(np.arange(60))
    alike = ((read[0] == truth[0]) & (truth[0] != EMPTY)).sum()
    assert sum(case["digits_right"] for case in wrong["image_to_text"]["cases"].values()) == alike


@pytest.fixture
def chain(source: DigitSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of a tokenizer with a trained GPT, and of a classifier."""
    monkeypatch.setattr(stage2, "_VALIDATION_IMAGES", 4)
    tokenizer = finished_tokenizer(tmp_path / "vqgan-seed0")
    return tokenizer, finished_classifier(tmp_path / "classifier")


GPT_SETTINGS = dataclasses.replace(stage2_settings_for("smoke"), steps=2, train_images=8, eval_images=7)


def test_rules_are_measurements_of_their_own(
    chain: tuple[Path, Path], source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws from as many as it says and has a file; only that of the tables has pictures and seen pairs."""
    tokenizer, classifier = chain
    settings = dataclasses.replace(GPT_SETTINGS, train_images=9)
    folder = stage2_folder(tokenizer, settings)
    train_stage2(settings, tokenizer, source, progress=False)
    num_codes = load_tokenizer(tokenizer, torch.device("cpu"))[1].model.num_codes
    asked = []

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments[-1])
        return evaluate_pairs(*arguments, **options)

    monkeypatch.setattr(evaluate, "evaluate_pairs", spy)
    numbers = {}
    for rule in ("all", str(num_codes), "greedy", "1", "paper"):
        assert evaluate_gpt(settings, tokenizer, classifier, source, rule=rule, progress=False)
        assert not evaluate_gpt(settings, tokenizer, classifier, source, rule=rule, progress=False)
        numbers[rule] = json.loads((folder / f"rule-{rule}.json").read_text())
        assert numbers[rule]["rule"] == asked[-1]._asdict()
        assert (folder / evaluate.PICTURES).exists() == (rule == "paper")
    assert [rule.images for rule in asked] == [num_codes, num_codes, 1, 1, *[int(0.1 * (128 + num_codes))] * 2]
    assert numbers["greedy"]["held_out"] == numbers["1"]["held_out"]
    image = [numbers[rule]["held_out"]["text_to_image"] for rule in ("all", str(num_codes))]
    assert image[0] == image[1]
    assert ["seen" in numbers[rule] for rule in numbers] == [False, False, False, False, True]
    assert numbers["paper"]["spent"].keys() == {"wall_seconds", "cpu_seconds"}
    assert numbers["paper"]["classifier"] == sha256(classifier / "model" / "model.safetensors")


def test_every_finished_run_is_measured_at_once(
    chain: tuple[Path, Path],
    source: DigitSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the settings in its folder, under all rules; without an arm there is no seed to choose."""
    tokenizer, _ = chain
    settings = dataclasses.replace(GPT_SETTINGS, steps=3, train_images=9)
    train_stage2(settings, tokenizer, source, progress=False)
    other = finished_tokenizer(tmp_path / "te_vqgan-seed1", seed=1)
    (tmp_path / "mb-seed0").mkdir()
    shutil.copytree(tokenizer, tmp_path / "vqgan-seed0-old")
    (finished_tokenizer(tmp_path / "mp-seed0") / "evaluation.json").unlink()
    monkeypatch.setattr(sources, "load_digits", lambda *_: source)
    words = ["evaluate", "--preset", "smoke", "--out", str(tmp_path), "--rules", "2", "greedy"]
    assert main([*words, "--seed", "1"]) == 1
    assert "error: seed must be unset without an arm, got 1." in capsys.readouterr().err
    assert main(words) == 0
    printed = capsys.readouterr()
    assert f"{tokenizer}: finished." in printed.out
    assert "left out, unfinished: mp-seed0\n" in printed.err
    folder = stage2_folder(tokenizer, settings)
    assert sorted(path.name for path in folder.glob("rule-*")) == ["rule-2.json", "rule-greedy.json"]
    assert "--rules 2 greedy" in json.loads((folder / "rule-2.json").read_text())["command"]
    assert all((path / evaluate.READING).exists() for path in (tokenizer, other))
    assert main(words) == 0
    assert f"{tokenizer}: was finished before, nothing to do." in capsys.readouterr().out
    assert main([*words[:4], str(tmp_path / "mb-seed0")]) == 1
    assert "out must be a folder with finished runs, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "sizes", "kept"),
    [
        ("paper", (256, 70), (38, 38)),
        ("paper", (16, 70), (14, 14)),
        ("paper", (256, 21), (38, 21)),
        ("paper", (4, 21), (4, 13)),
        ("tenth", (256, 21), (25, 1)),
        ("tenth", (16, 21), (1, 1)),
        ("tenth", (70, 21), (7, 1)),
        ("greedy", (256, 21), (1, 1)),
        ("2", (256, 21), (2, 2)),
        ("38", (16, 21), (16, 21)),
        ("all", (256, 21), (256, 21)),
    ],
)
def test_rules_keep_what_they_say(name: str, sizes: tuple[int, int], kept: tuple[int, int]) -> None:
    """Of a codebook and a vocabulary; never more than there are."""
    assert rule_named(name, *sizes) == (name, *kept)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0", "rules must be 'paper', 'tenth', 'greedy', 'all' or whole numbers above 0, got '0'"),
        ("half", "rules must be 'paper', 'tenth', 'greedy', 'all' or whole numbers above 0, got 'half'"),
        ("-2", "rules must be .*, got '-2'"),
        ("²", "rules must be .*, got '²'"),
    ],
)
def test_other_rules_are_refused(name: str, message: str) -> None:
    """By what there is."""
    with pytest.raises(ValueError, match=message):
        rule_named(name, 16, 21)


def test_lpips_is_measured_where_it_is_installed(
    chain: tuple[Path, Path], source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all test images, by a stand-in whose distance is known; without the package nothing is written."""
    tokenizer, classifier = chain
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="--perceptual lpips needs"):
        evaluate_tokenizer(tokenizer, classifier, source, perceptual="lpips")
    assert not (tokenizer / "reading.json").exists()

    class Squares(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert (net, verbose) == ("vgg", False)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return (first - second).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Squares))
    monkeypatch.setattr(generation, "_BATCH", 3)
    assert evaluate_tokenizer(tokenizer, classifier, source, perceptual="lpips")
    reading = json.loads((tokenizer / "reading.json").read_text())
    model, settings = load_tokenizer(tokenizer, torch.device("cpu"))
    images = dataset(settings, source, "test").fixed(0, settings.eval_images)
    with torch.no_grad():
        rebuilt = model(images).reconstruction.clamp(-1, 1)
    expected = (rebuilt - images).double().square().mean().item()
    assert reading["perceptual_distances"] == {"lpips": pytest.approx(expected, rel=1e-5)}


def _constant(value: float) -> Any:
    return lambda first, second: torch.full((len(first),), value)


def test_a_distance_is_added_to_a_reading(
    chain: tuple[Path, Path], source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for later it is measured, with those that were there; what is there is not measured again."""
    tokenizer, classifier = chain
    known = {"none": None, "lpips": _constant(0.5), "st-lpips": _constant(0.25)}
    monkeypatch.setattr(evaluate, "load_perceptual", lambda name, device: known[name])

    def measured(perceptual: str | None) -> bool:
        return evaluate_tokenizer(tokenizer, classifier, source, perceptual=perceptual)

    def distances() -> Any:
        return json.loads((tokenizer / "reading.json").read_text()).get("perceptual_distances")

    assert measured(None)
    assert distances() is None
    assert not measured("none")
    assert measured("st-lpips")
    assert distances() == {"st-lpips": 0.25}
    assert [measured(name) for name in (None, "none", "st-lpips")] == [False, False, False]
    assert measured("lpips")
    assert distances() == {"lpips": 0.5, "st-lpips": 0.25}


def test_a_distance_in_the_loss_is_measured_by_default(
    source: DigitSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is declined."""
    classifier = finished_classifier(tmp_path / "classifier")
    monkeypatch.setattr(evaluate, "load_perceptual", lambda name, device: {"st-lpips": _constant(0.25)}.get(name))
    for perceptual, expected in ((None, {"st-lpips": 0.25}), ("none", None)):
        tokenizer = tmp_path / str(perceptual)
        finished_tokenizer(tokenizer, perceptual="st-lpips", perceptual_weight=1.0)
        assert evaluate_tokenizer(tokenizer, classifier, source, perceptual=perceptual)
        reading = json.loads((tokenizer / "reading.json").read_text())
        assert reading.get("perceptual_distances") == expected


def test_evaluation_is_written_once(chain: tuple[Path, Path], source: DigitSource, tmp_path: Path) -> None:
    """Everything that the report asks for; what is there is not measured again; anew it is the same."""
    tokenizer, classifier = chain
    folder = stage2_folder(tokenizer, GPT_SETTINGS)
    train_stage2(GPT_SETTINGS, tokenizer, source, progress=False)
    assert evaluate_tokenizer(tokenizer, classifier, source, command="as typed")
    assert evaluate_gpt(
        GPT_SETTINGS, tokenizer, classifier, source, rule="paper", progress=False, command="as typed"
    )
    paths = [tokenizer / "reading.json", folder / "rule-paper.json", folder / "rule-paper.safetensors"]
    before = [path.stat().st_mtime_ns for path in paths]
    assert not evaluate_tokenizer(tokenizer, classifier, source)
    assert not evaluate_gpt(GPT_SETTINGS, tokenizer, classifier, source, rule="paper", progress=False)
    assert [path.stat().st_mtime_ns for path in paths] == before

    reading, numbers = (json.loads(path.read_text()) for path in paths[:2])
    facts = {"command", "commit", "versions"}
    assert {"original", "reconstruction", "feature_distance", "classifier", "spent", *facts} == reading.keys()
    assert {"held_out", "seen", "rule", "classifier", "spent", *facts} == numbers.keys()
    for measured in (reading, numbers):
        assert measured["spent"].keys() == {"wall_seconds", "cpu_seconds"}
        assert min(measured["spent"].values()) > 0
    assert reading["command"] == numbers["command"] == "as typed"
    tensors, texts = load_checkpoint(paths[2])
    for split, size, table in (("held_out", 7, None), ("seen", 3, allowed("train"))):
        shown = CaptionedImages(source, "test", canvas_size=32, size=size, style="terse", allowed=table)
        filled = shown.dataset.recipes.filled.sum()
        assert numbers[split].keys() == DIRECTIONS.keys()
        for task in TASKS:
            cases = numbers[split][task]["cases"]
            assert tuple(cases) == LAYOUTS
            assert sum(case["images"] for case in cases.values()) == size
            assert sum(case["digits"] for case in cases.values()) == filled
            assert np.sum(numbers[split][task]["confusion"]) == filled
        assert texts[split]["captions"] == shown.first_captions(0, size)
        assert len(texts[split]["written"]) == size
        expected = ((shown.dataset.fixed(0, size) + 1) * 127.5).round().to(torch.uint8)
        assert torch.equal(tensors[f"{split}.images"], expected)
        assert tensors[f"{split}.generated"].shape == expected.shape

    # Against the parts, called one by one.
    autoencoder, settings = load_tokenizer(tokenizer, CPU)
    test = QuadrantDataset(source, "test", canvas_size=32, size=settings.eval_images, layouts=LAYOUTS)
    direct = read_tokenizer(autoencoder, load_classifier(classifier), test, 10, device=CPU)
    assert {name: reading[name] for name in direct} == direct
    for path in paths[:2]:
        path.unlink()
    assert evaluate_tokenizer(tokenizer, classifier, source, command="as typed")
    assert evaluate_gpt(
        GPT_SETTINGS, tokenizer, classifier, source, rule="paper", progress=False, command="as typed"
    )
    again = [json.loads(path.read_text()) for path in paths[:2]]
    # All but how long it took.
    for found, before_it in zip(again, (reading, numbers), strict=True):
        assert found == {**before_it, "spent": found["spent"]}


@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_damaged_measurements_are_made_again(
    chain: tuple[Path, Path], source: DigitSource, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    """The reading, the numbers of a rule and its pictures; what is whole stays."""
    tokenizer, classifier = chain
    folder = stage2_folder(tokenizer, GPT_SETTINGS)
    train_stage2(GPT_SETTINGS, tokenizer, source, progress=False)

    def measure() -> dict[str, bool]:
        rules = {
            rule: evaluate_gpt(GPT_SETTINGS, tokenizer, classifier, source, rule=rule, progress=False)
            for rule in ("paper", "2")
        }
        return {"reading": evaluate_tokenizer(tokenizer, classifier, source), **rules}

    assert measure() == {"reading": True, "paper": True, "2": True}
    paths = {
        "reading": tokenizer / "reading.json",
        "2": folder / "rule-2.json",
        "paper": folder / evaluate.PICTURES,
    }
    assert capsys.readouterr().err == ""
    for name, path in paths.items():
        before = path.read_bytes()
        path.write_text(content)
        assert measure() == {"reading": False, "paper": False, "2": False, name: True}
        assert capsys.readouterr().err == f"{path}: damaged, is measured again.\n"
        if name == "paper":
            assert path.read_bytes() == before
        else:
            assert json.loads(path.read_text()).keys() == json.loads(before).keys()


def test_unfinished_runs_are_not_measured(chain: tuple[Path, Path], source: DigitSource, tmp_path: Path) -> None:
    """Neither GPT nor tokenizer nor classifier, nor a GPT of other settings; and nothing is written."""
    tokenizer, classifier = chain
    with pytest.raises(Interrupted, match="stopped at step"):
        train_stage2(GPT_SETTINGS, tokenizer, source, progress=False, stop=lambda done: done == 1)
    folder = stage2_folder(tokenizer, GPT_SETTINGS)

    def measure(settings: Stage2Settings = GPT_SETTINGS, classifier: Path = classifier) -> None:
        evaluate_gpt(settings, tokenizer, classifier, source, rule="paper", progress=False)

    with pytest.raises(ValueError, match=r"out must be a folder with a finished stage2 run, got .*stage2-8"):
        measure()
    train_stage2(GPT_SETTINGS, tokenizer, source, progress=False, resume=True)
    with pytest.raises(
        ValueError, match=r"settings must be those of the run in .*, got others: steps was 2, now 3"
    ):
        measure(dataclasses.replace(GPT_SETTINGS, steps=3))
    message = r"folder must be one with a trained classifier, got .*none"
    with pytest.raises(ValueError, match=message):
        measure(classifier=tmp_path / "none")
    with pytest.raises(ValueError, match=message):
        evaluate_tokenizer(tokenizer, tmp_path / "none", source)
    other = dataclasses.replace(CLASSIFIERS["smoke"], data="others", canvas_size=CANVAS)
    (classifier / "settings.json").write_text(json.dumps(other.to_dict()))
    for call in (measure, lambda: evaluate_tokenizer(tokenizer, classifier, source)):
        with pytest.raises(ValueError, match=r"classifier must be one of 'random' on 32 .*, got one of 'others'"):
            call()
    (tokenizer / "evaluation.json").unlink()
    for call in (measure, lambda: evaluate_tokenizer(tokenizer, classifier, source)):
        with pytest.raises(
            ValueError, match=r"out must be a folder with a finished stage1 run, got .*vqgan-seed0"
        ):
            call()
    assert not (tokenizer / evaluate.READING).exists()
    assert not (folder / evaluate.rule_file("paper")).exists()
