"""Stage 2: what a step minimizes; and a run that stops and goes on bit for bit, and refuses to mix two.

Shape letters: B batch, T tokens, h w token grid.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.te_vqgan.data.caption_tokens import CaptionTokenizer
from examples.te_vqgan.data.captions import Grammar
from examples.te_vqgan.data.pairs import CaptionedImages
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs.checkpoint import load_checkpoint
from examples.te_vqgan.runs.running import CHECKPOINT, Interrupted
from examples.te_vqgan.stage1.presets import to_dict
from examples.te_vqgan.stage2 import train as stage2
from examples.te_vqgan.stage2.settings import DIRECTIONS, STAGE2, Stage2Settings, stage2_settings_for
from examples.te_vqgan.stage2.token_cache import cached_tokens, encode_dataset
from examples.te_vqgan.stage2.train import is_finished, load_tokenizer, stage2_folder, train_stage2
from examples.te_vqgan.stage2.trainer import Stage2Trainer, gpt_config
from examples.te_vqgan.stage2.transformers import load_transformer
from te_quant import GPT, VQAutoencoder
from tests.example.tiny_runs import NAMES, finished_tokenizer, random_source, stage1_settings
from tests.helpers import numpy_generator

CPU = torch.device("cpu")
SMOKE = stage2_settings_for("smoke")
TEXT = CaptionTokenizer(Grammar(NAMES, "terse"))
CODES, SIDE = 16, 3
# As the preset `paper` trains, in small.
DALLE = {
    "architecture": "dalle",
    "caption_style": "numerals",
    "head_width": 4,
    "optimizer": "adam",
    "directions": ("image_to_text", "text_to_image"),
    "updates_per_batch": 2,
    "cosine_cycles": 2,
}


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """Digits."""
    return random_source()


@pytest.fixture(autouse=True)
def few_validation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time would go into them."""
    monkeypatch.setattr(stage2, "_VALIDATION_IMAGES", 8)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """The folder of a finished Stage 1 run."""
    return finished_tokenizer(tmp_path / "once")


def _settings(**changes: Any) -> Stage2Settings:
    return dataclasses.replace(SMOKE, **{"train_images": 20, **changes})


def _train(settings: Stage2Settings, tokenizer: Path, source: DigitSource, **options: Any) -> bool:
    return train_stage2(settings, tokenizer, source, progress=False, **options)


def _trainer(**changes: Any) -> Stage2Trainer:
    settings = _settings(**changes)
    return Stage2Trainer(settings, gpt_config(settings, TEXT, CODES, (SIDE, SIDE)), CPU)


def test_a_checkpoint_of_older_code_is_resumed_from() -> None:
    """The layers of the MLP had other names; weights and moments of the optimizers arrive all the same."""
    whole, resumed = (_trainer(optimizer="muon") for _ in range(2))
    batch = _batch()
    whole.train_step(*batch)
    old = {
        name.replace(".up.", ".expand.").replace(".down.", ".contract."): tensor.clone()
        for name, tensor in whole.tensors().items()
    }
    assert any(".contract.weight/" in name for name in old)
    resumed.load(old, {"step": 1})
    expected = whole.tensors()
    assert resumed.tensors().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.tensors().items())


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
def test_a_compiler_changes_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, as eager steps train them: traced with its gradients, and run by torch's own kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = _settings()
    config = gpt_config(settings, TEXT, CODES, (SIDE, SIDE))
    plain, other = (Stage2Trainer(settings, config, CPU, compiled=compiled) for compiled in (False, True))
    for number in range(2):
        batch = _batch()
        wanted, found = plain.train_step(*batch), other.train_step(*batch)
        assert found.keys() == wanted.keys(), number
        for name, value in wanted.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-3), (number, name)


def _batch(size: int = 4) -> tuple[Tensor, Tensor]:
    """(B, T) captions of different lengths and (B, h, w) tokens."""
    rng = numpy_generator()
    clauses = [f"{color} {name} upper left" for color in ("red", "blue") for name in NAMES]
    captions = [", ".join(rng.choice(clauses, 1 + number % 3)) for number in range(size)]
    return TEXT.encode(captions), torch.randint(CODES, (size, SIDE, SIDE))


def _by_hand(model: GPT, text: Tensor, image: Tensor, direction: str, padding: bool = False) -> dict[str, float]:
    """Mean cross entropies from the logits in float64, one token after the other."""
    parts = {"text": text, "image": image.flatten(1)}
    first, second = DIRECTIONS[direction]
    logits = copy.deepcopy(model).double()(torch.cat([parts[first], parts[second]], 1), (first, second))
    columns = dict(
        zip((first, second), logits.split([parts[first].shape[1], parts[second].shape[1]], 1), strict=True)
    )
    means = {}
    for name, tokens in parts.items():
        costs = [
            (torch.logsumexp(scores, 0) - scores[token]).item()
            for row, wanted in zip(columns[name], tokens.tolist(), strict=True)
            for scores, token in zip(row, wanted, strict=True)
            if padding or name == "image" or token != TEXT.pad_token
        ]
        means[name] = sum(costs) / len(costs)
    return means


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_losses_are_cross_entropies_without_the_padding(direction: str) -> None:
    """Against float64 logits; with the padding counted, the text's mean is another."""
    trainer = _trainer()
    text, image = _batch()
    assert (text == TEXT.pad_token).any()
    losses = trainer.losses(text, image, direction)
    assert tuple(losses) == DIRECTIONS[direction]
    expected = _by_hand(trainer.model, text, image, direction)
    counted = _by_hand(trainer.model, text, image, direction, padding=True)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5)
    assert losses["text"].item() != pytest.approx(counted["text"], rel=1e-5)


@pytest.mark.parametrize("weight", [7.0, 0.0, 2.5])
def test_a_step_minimises_the_weighted_sum_in_the_direction_whose_turn_it_is(weight: float) -> None:
    """(other + w target) / (1 + w), text to image first, then image to text; the weights follow its gradient."""
    trainer = _trainer(target_weight=weight, clip_norm=0.0)
    for step, direction in enumerate(("text_to_image", "image_to_text", "text_to_image")):
        text, image = _batch()
        other, target = DIRECTIONS[direction]
        model = copy.deepcopy(trainer.model)
        expected = _by_hand(model, text, image, direction)
        sequence = torch.cat([{"text": text, "image": image.flatten(1)}[name] for name in (other, target)], 1)
        targets = sequence.masked_fill(_is_padding(text, image, direction), -100)
        losses = model.losses(sequence, (other, target), targets=targets)
        ((losses[other] + weight * losses[target]) / (1 + weight)).backward()
        numbers = trainer.train_step(text, image)
        assert numbers["loss"].item() == pytest.approx(
            (expected[other] + weight * expected[target]) / (1 + weight), rel=1e-5
        )
        assert numbers[f"{direction}_loss"].item() == pytest.approx(expected[target], rel=1e-5)
        assert trainer.step == step + 1
        for (name, mine), its in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
            assert torch.allclose(mine.grad, its.grad, rtol=1e-4, atol=1e-7), name


def _is_padding(text: Tensor, image: Tensor, direction: str) -> Tensor:
    parts = {"text": text == TEXT.pad_token, "image": torch.zeros_like(image, dtype=torch.bool).flatten(1)}
    return torch.cat([parts[name] for name in DIRECTIONS[direction]], 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"directions": ("image_to_text",)}, ["image_to_text"] * 3),
        (
            {"directions": ("text_to_image", "image_to_text", "image_to_text")},
            ["text_to_image", "image_to_text", "image_to_text"],
        ),
        ({"directions": ("image_to_text", "text_to_image")}, ["image_to_text", "text_to_image", "image_to_text"]),
        ({"first_alone": 2}, ["text_to_image"] * 3 + ["image_to_text", "text_to_image", "image_to_text"]),
    ],
)
def test_directions_take_turns_as_the_settings_say(changes: dict[str, Any], expected: list[str]) -> None:
    """One alone, the other one first, or the first for some steps and then in turn."""
    trainer = _trainer(**changes)
    for direction in expected:
        numbers = trainer.train_step(*_batch())
        assert [name for name in numbers if name.endswith("_loss")] == [f"{direction}_loss"]


def test_both_directions_train_on_the_pairs_of_each_batch(
    tokenizer: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates have the same captions and images, the next two others; the negative control has others each."""
    seen: list[tuple[Tensor, Tensor]] = []
    step = Stage2Trainer.train_step

    def watched(self: Stage2Trainer, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        seen.append((text, image))
        return step(self, text, image)

    monkeypatch.setattr(Stage2Trainer, "train_step", watched)
    for train_images, count in ((20, 2), (21, 1)):
        seen.clear()
        settings = _settings(**{**DALLE, "train_images": train_images, "updates_per_batch": count})
        _train(settings, tokenizer, source)
        alike = [all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) for one, two in pairwise(seen)]
        assert alike == [count == 2, False, count == 2, False, count == 2]
        log = (stage2_folder(tokenizer, settings) / "log.jsonl").read_text().splitlines()
        turns = [next(name for name in json.loads(line) if name.endswith("_loss")) for line in log]
        assert turns == ["image_to_text_loss", "text_to_image_loss"] * 3


def test_the_papers_rate_restarts_five_times() -> None:
    """By hand: 30,000 batches, the first 1,500 warm up, then six cycles of 4,750; two updates share a rate."""
    settings = stage2_settings_for("paper")
    by_batch = {0: 1 / 1500, 749: 0.5, 1499: 1.0, 1500: 1.0}
    for cycle in range(6):
        start = 1500 + cycle * 4750
        # cos(pi/4)² and cos(pi/2 * 4749/4750)² of half-cosines.
        by_batch |= {start: 1.0, start + 2375: 0.5, start + 4749: math.sin(math.pi / 9500) ** 2}
    for batch, expected in by_batch.items():
        for update in (2 * batch, 2 * batch + 1):
            assert settings.rate_factor(update) == pytest.approx(expected, rel=1e-9), batch
            assert settings.batch(update) == batch
    assert settings.rate_factor(59_999) < 2e-7
    assert [settings.direction(update) for update in range(3)] == [
        "image_to_text",
        "text_to_image",
        "image_to_text",
    ]
    once = dataclasses.replace(settings, cosine_cycles=1)
    assert once.rate_factor(2 * (1500 + 4750)) == pytest.approx(math.cos(math.pi / 12) ** 2)


def test_the_authors_transformer_needs_a_start_token() -> None:
    """Captions of another style are refused."""
    message = r"tokenizer must be of captions in the style 'numerals', got one without a start token\."
    with pytest.raises(ValueError, match=message):
        _trainer(**DALLE)


def test_muon_has_the_matrices_of_the_blocks_and_adam_the_rest() -> None:
    """Every weight is in one optimizer; with Adam alone it has all of them."""
    trainer = _trainer(optimizer="muon")
    adam, muon = ([id(p) for group in o.param_groups for p in group["params"]] for o in trainer.optimizers)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert sorted([*adam, *muon]) == sorted(names)
    assert all(names[key].startswith("blocks.") for key in muon)
    matrices = [id(p) for p in trainer.model.blocks.parameters() if p.ndim == 2]
    assert sorted(muon) == sorted(matrices)
    (alone,) = _trainer(optimizer="adam").optimizers
    assert sum(len(group["params"]) for group in alone.param_groups) == len(names)


def test_both_rates_rise_and_fall_together() -> None:
    """Linearly up to their peaks, then on half a cosine to the final share."""
    trainer = _trainer(optimizer="muon", warmup_steps=2, steps=4, final_lr_share=0.5)
    factors = []
    for _ in range(4):
        trainer.train_step(*_batch())
        rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
        assert rates[0] / trainer.settings.learning_rate == pytest.approx(
            rates[1] / trainer.settings.muon_learning_rate
        )
        factors.append(rates[0] / trainer.settings.learning_rate)
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.75])


def test_gradient_is_clipped_to_the_stated_norm() -> None:
    """The norm before clipping is reported; 0 clips nothing."""
    text, image = _batch()
    norms = {}
    for limit in (0.01, 0.0):
        trainer = _trainer(clip_norm=limit)
        reported = trainer.train_step(text, image)["grad_norm"].item()
        left = torch.stack([p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None])
        norms[limit] = (reported, left.sum().sqrt().item())
    assert norms[0.01] == pytest.approx((norms[0.0][0], 0.01), rel=1e-3)
    assert norms[0.0][1] == pytest.approx(norms[0.0][0], rel=1e-5)


def test_bfloat16_is_near_and_not_the_same() -> None:
    """The same weights and batch: losses agree to about three digits, and are float32."""
    text, image = _batch()
    exact, rough = (_trainer(bf16=bf16).losses(text, image, "text_to_image") for bf16 in (False, True))
    for name, value in rough.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=2e-2)
        assert value.item() != exact[name].item()


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Whatever torch's generator holds, which is left as it was."""
    torch.manual_seed(int(torch.randint(2**31, ())))
    before = torch.get_rng_state()
    first, again, other = _trainer().model, _trainer(steps=9).model, _trainer(seed=1).model
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.start, other.start)


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors, _ = load_checkpoint(folder / CHECKPOINT)
    return tensors


def _assert_same_run(first: Path, second: Path) -> None:
    one, two = _tensors(first), _tensors(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    for name in ("log.jsonl", "evaluation.json", "settings.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    models = [load_transformer(folder / "model").state_dict() for folder in (first, second)]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name
        assert torch.equal(tensor, one[f"model.{name}"]), name


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({"optimizer": "adam"}, (2,)),
        # 3 lies between two checkpoints. Dropout draws from torch's generator, whose state must be kept too.
        ({"optimizer": "muon", "dropout": 0.2}, (1, 3)),
        ({"optimizer": "muon", "bf16": True, "first_alone": 3}, (4, 5)),
        # 1 and 3 lie between the two updates of a batch.
        (DALLE, (1, 3)),
    ],
    ids=["adam", "muon-dropout", "bf16-first-alone", "dalle-pairs-of-updates"],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tokenizer: Path, tmp_path: Path, source: DigitSource, changes: dict[str, Any], stops: tuple[int, ...]
) -> None:
    """Weights, moments, generator states, log and numbers are equal bit for bit; the images are encoded once."""
    settings = _settings(**changes)
    again = shutil.copytree(tokenizer, tmp_path / "often")
    assert _train(settings, tokenizer, source)
    once, often = stage2_folder(tokenizer, settings), stage2_folder(again, settings)
    for stop in stops:
        with pytest.raises(Interrupted, match=f"stopped at step {stop} of 6; --resume goes on from there"):
            _train(settings, again, source, resume=True, stop=lambda done, stop=stop: done == stop)
        torch.manual_seed(99)  # whatever another program left behind
        tokens = (often / stage2.TOKENS).stat().st_mtime_ns
    assert _train(settings, again, source, resume=True)
    _assert_same_run(once, often)
    assert (often / stage2.TOKENS).stat().st_mtime_ns == tokens
    log = [json.loads(line) for line in (once / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    last = json.loads((once / "evaluation.json").read_text())
    assert last.items() <= log[-1].items()
    assert len(last) == 4
    facts = json.loads((often / "provenance.json").read_text())
    assert facts["training"]["wall_seconds"] > 0
    assert is_finished(often, settings, stage1_settings())


@pytest.mark.parametrize("lost", ["optimizer1.", "optimizer0.", "rng.cpu"])
def test_each_part_of_the_checkpoint_is_needed(lost: str) -> None:
    """The negative control of the test above: without one of them the next steps are others."""
    batches = [_batch() for _ in range(3)]
    whole, resumed, broken = (_trainer(optimizer="muon", dropout=0.2) for _ in range(3))
    whole.initialize()
    whole.train_step(*batches[0])
    state = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    expected = _after(whole, batches)
    resumed.load(state, {"step": 1})
    assert all(torch.equal(value, expected[name]) for name, value in _after(resumed, batches).items())
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(lost)}
    assert len(kept) < len(state)
    torch.manual_seed(99)
    broken.load({"rng.cpu": torch.get_rng_state(), **kept}, {"step": 1})
    assert not all(torch.equal(value, expected[name]) for name, value in _after(broken, batches).items())


def _after(trainer: Stage2Trainer, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    for batch in batches[1:]:
        trainer.train_step(*batch)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_a_power_cut_at_any_file_loses_nothing(
    tokenizer: Path, tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before or after a random one of the renames that put every file in its place, then resumed."""
    settings = _settings(optimizer="muon")
    replace = Path.replace
    renames = 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        return replace(self, target)

    again = shutil.copytree(tokenizer, tmp_path / "cut")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", counted)
        assert _train(settings, tokenizer, source)
    # Settings, tokens, log, three checkpoints, two files of the model, provenance, evaluation.
    assert renames == 10
    fatal, after = int(numpy_generator().integers(1, renames + 1)), bool(numpy_generator().integers(2))
    done = 0

    def cut(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == fatal:
            if after:
                replace(self, target)
            raise RuntimeError("power cut")
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            _train(settings, again, source)
    assert _train(settings, again, source, resume=True) is not (fatal == renames and after), (fatal, after)
    _assert_same_run(stage2_folder(tokenizer, settings), stage2_folder(again, settings))


def test_another_seed_or_rate_gives_other_weights(tokenizer: Path, source: DigitSource) -> None:
    """The negative control of the equalities above; and tokens that another seed left behind are not taken."""
    weights, tokens = [], []
    for settings in (_settings(), _settings(seed=1), _settings(muon_learning_rate=0.01)):
        _train(settings, tokenizer, source)
        folder = stage2_folder(tokenizer, settings)
        weights.append(GPT.from_pretrained(folder / "model").state_dict()["norm.weight"])
        tokens.append(load_checkpoint(folder / stage2.TOKENS)[0]["tokens"])
        shutil.rmtree(folder / "model")
        for path in folder.glob("*.json*"):
            path.unlink()
        (folder / CHECKPOINT).unlink()
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_a_finished_run_is_skipped(tokenizer: Path, source: DigitSource) -> None:
    """Nothing is written again; another size of the training set is another run beside it."""
    settings = _settings(steps=1)
    assert _train(settings, tokenizer, source)
    before = {path: path.stat().st_mtime_ns for path in tokenizer.rglob("*") if path.is_file()}
    assert not _train(settings, tokenizer, source)
    assert not _train(settings, tokenizer, source, resume=True)
    assert {path: path.stat().st_mtime_ns for path in tokenizer.rglob("*") if path.is_file()} == before
    assert not is_finished(stage2_folder(tokenizer, _settings(train_images=21)), settings, stage1_settings())


def test_what_would_mix_two_runs_is_refused(tokenizer: Path, source: DigitSource, tmp_path: Path) -> None:
    """Other settings, another tokenizer underneath, other digits, no tokenizer, or going on unasked."""
    settings = _settings()
    with pytest.raises(Interrupted, match="stopped at step"):
        _train(settings, tokenizer, source, stop=lambda done: done == 3)
    folder = stage2_folder(tokenizer, settings)
    with pytest.raises(ValueError, match=r"resume must be set, as .*stage2-20 holds an unfinished run, got False"):
        _train(settings, tokenizer, source)
    message = r"those of the run in .*-20, got others: optimizer was 'muon', now 'adam'; seed was 0, now 1; "
    with pytest.raises(ValueError, match=message):
        _train(_settings(seed=1, optimizer="adam"), tokenizer, source, resume=True)
    with pytest.raises(ValueError, match="data must be that of the tokenizer, 'random', got 'other'"):
        _train(settings, tokenizer, random_source("other"), resume=True)

    other = stage1_settings(seed=5, model=dataclasses.replace(stage1_settings().model, orthogonal_reg=10.0))
    (tokenizer / "settings.json").write_text(json.dumps(to_dict(other)))
    message = r"got others: stage1.model.orthogonal_reg was 0.0, now 10.0; stage1.seed was 0, now 5; "
    with pytest.raises(ValueError, match=message):
        _train(settings, tokenizer, source, resume=True)
    with pytest.raises(ValueError, match=message):
        is_finished(folder, settings, other)
    assert not (folder / "evaluation.json").exists()

    told = "out must be a folder with a finished stage1 run, got "
    with pytest.raises(ValueError, match=rf"^{told}.*mb-seed3; stage1 --arm mb --seed 3 trains it\.$"):
        load_tokenizer(tmp_path / "mb-seed3", CPU)
    begun = tmp_path / "mb-seed4"
    begun.mkdir()
    (begun / "checkpoint.safetensors").touch()
    cure = "which is unfinished; stage1 --arm mb --seed 4 --resume finishes it"
    with pytest.raises(ValueError, match=rf"^{told}.*mb-seed4, {cure}\.$"):
        load_tokenizer(begun, CPU)
    with pytest.raises(ValueError, match=rf"^{told}.*missing; stage1 trains it\.$"):
        _train(settings, tmp_path / "missing", source)
    (tokenizer / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"out must be a folder with a finished stage1 run, got .*once"):
        load_tokenizer(tokenizer, CPU)


def test_a_loss_that_is_not_finite_stops_the_run(
    tokenizer: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than fill the log with NaN."""
    step = Stage2Trainer.train_step

    def broken(self: Stage2Trainer, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        return {**step(self, text, image), "loss": torch.tensor(float("nan"))}

    monkeypatch.setattr(Stage2Trainer, "train_step", broken)
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan at step 1"):
        _train(_settings(), tokenizer, source)


def test_training_sees_the_captions_of_its_images(
    tokenizer: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step: the pairs' own captions beside the tokens of the same rows; one row off is seen."""
    steps: list[tuple[Tensor, Tensor]] = []
    step = Stage2Trainer.train_step

    def noted(self: Stage2Trainer, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        steps.append((text, image))
        return step(self, text, image)

    monkeypatch.setattr(Stage2Trainer, "train_step", noted)
    settings = _settings(seed=3)
    _train(settings, tokenizer, source)
    pairs = CaptionedImages(source, "train", canvas_size=32, size=20, seed=3, style="terse")
    model, _ = load_tokenizer(tokenizer, CPU)
    assert len(steps) == 6
    for number, (text, tokens) in enumerate(steps):
        images, captions = pairs.batch(number, settings.batch_size)
        assert torch.equal(text, captions)
        assert torch.equal(tokens, model.encode_to_indices(images).flatten(1))
        assert not torch.equal(tokens, model.encode_to_indices(images.roll(1, 0)).flatten(1))


def test_images_are_encoded_in_the_order_of_the_table(tokenizer: Path, source: DigitSource) -> None:
    """Whatever the batches are: small integers that say what the model says of each image."""
    model, settings = load_tokenizer(tokenizer, CPU)
    assert settings == stage1_settings()
    assert not model.training
    images = QuadrantDataset(source, "train", canvas_size=32, size=131)
    told: list[int] = []
    tokens = encode_dataset(model, images, CPU, progress=told.append)
    assert tokens.dtype == torch.int16
    assert tokens.shape == (131, 64)
    assert told[-1] == 131
    for row in (0, 127, 128, 130):
        assert torch.equal(tokens[row].long(), model.encode_to_indices(images.fixed(row, row + 1)).flatten())
    assert len(torch.unique(tokens)) > 1
    wide = dataclasses.replace(settings.model, num_codes=2**15 + 1)
    with pytest.raises(ValueError, match=r"num_codes must be at most 32,768, got 32769"):
        encode_dataset(VQAutoencoder(wide), images, CPU)


def test_tokens_are_kept_for_equal_facts_alone(tmp_path: Path) -> None:
    """Made once, read for the same facts, made anew for others, even after a failure in between."""
    path = tmp_path / "tokens.safetensors"
    made = []

    def make() -> Tensor:
        made.append(torch.randint(2**15, (5, 2, 2), dtype=torch.int16))
        return made[-1]

    def fail() -> Tensor:
        raise RuntimeError("power cut")

    facts = {"images": 5, "stage1": {"seed": 0, "widths": [1, 2]}}
    for _ in range(2):
        assert torch.equal(cached_tokens(path, facts, make), made[0])
    assert len(made) == 1
    for changed in ({**facts, "images": 6}, {**facts, "stage1": {"seed": 1, "widths": [1, 2]}}):
        with pytest.raises(RuntimeError, match="power cut"):
            cached_tokens(path, changed, fail)
        assert torch.equal(cached_tokens(path, changed, make), made[-1])
    assert len(made) == 3
    cached_tokens(path, facts, make)
    assert len(made) == 4


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_damaged_tokens_are_made_again(kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost by it, and one line says so."""
    path = tmp_path / "tokens.safetensors"
    tokens = torch.randint(2**15, (5, 2, 2), dtype=torch.int16)
    cached_tokens(path, {"images": 5}, lambda: tokens)
    path.write_bytes(path.read_bytes()[:kept])
    assert torch.equal(cached_tokens(path, {"images": 5}, lambda: tokens), tokens)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} must be a file that this example wrote, got a damaged one (")
    assert line.endswith("; the tokens are made again.")
    assert torch.equal(cached_tokens(path, {"images": 5}, lambda: pytest.fail("made again")), tokens)
    assert capsys.readouterr().err == ""


def test_settings_survive_json_and_presets_end_where_they_say() -> None:
    """What is written is what was; None changes nothing; the demo has no Stage 2."""
    for preset, base in STAGE2.items():
        if base is None:
            known = "'smoke', 'small', 'paper', 'small-fine', 'small-best', 'small-captions', 'narrow'"
            with pytest.raises(ValueError, match=f"preset must be one of {known}, got '{preset}'"):
                stage2_settings_for(preset)
            continue
        settings = stage2_settings_for(preset, {"seed": 3, "steps": None})
        assert Stage2Settings(**json.loads(json.dumps(settings.to_dict()))) == settings
        assert settings == dataclasses.replace(base, seed=3)
    assert [name for name, base in STAGE2.items() if base is None] == ["quick", "photos", "small-alive"]
    paper = stage2_settings_for("paper")
    assert (paper.width, paper.depth, paper.num_heads, paper.target_weight) == (256, 8, 8, 7.0)
    assert (paper.learning_rate, paper.clip_norm, paper.batch_size) == (1e-3, 1.0, 200)
    assert (paper.architecture, paper.head_width, paper.caption_style) == ("dalle", 64, "numerals")
    assert (paper.optimizer, paper.adam_beta2, paper.bf16) == ("adam", 0.999, False)
    assert paper.steps == 20 * 1_500 * paper.updates_per_batch == 60_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"eval_images": 1}, "eval_images must be an int >= 2, got 1"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"first_alone": -1}, "first_alone must be an int >= 0, got -1"),
        ({"first_alone": 6}, "steps must be above first_alone=6, or directions a single one, got 6"),
        ({"num_heads": 3}, "num_heads must be a divisor of width=16, got 3"),
        ({"dropout": 1.0}, r"dropout must be below 1, got 1\.0"),
        ({"dropout": -0.1}, "dropout must be a finite number >= 0 and <= 1, got -0.1"),
        ({"caption_style": "long"}, "caption_style must be one of 'full', 'terse', 'numerals', got 'long'"),
        ({"architecture": "rnn"}, "architecture must be one of 'te_quant', 'dalle', got 'rnn'"),
        ({"architecture": "dalle"}, "caption_style must be 'numerals' for architecture='dalle', got 'terse'"),
        (
            {"architecture": "dalle", "caption_style": "numerals", "dropout": 0.1},
            "dropout must be 0 for architecture='dalle', got 0.1",
        ),
        ({"head_width": 64}, "head_width must be None for architecture='te_quant', got 64"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be below 1, got 1\.0"),
        ({"cosine_cycles": 0}, "cosine_cycles must be an int >= 1, got 0"),
        ({"updates_per_batch": 3}, "updates_per_batch must be 1 or 2, the number of directions, got 3"),
        ({"updates_per_batch": 2, "steps": 7}, "steps must be a multiple of updates_per_batch=2, got 7"),
        ({"updates_per_batch": 2, "warmup_steps": 1}, "warmup_steps must be a multiple of updates_per_batch=2"),
        ({"updates_per_batch": 2, "first_alone": 2}, "first_alone must be 0 for updates_per_batch=2, got 2"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'adam', 'muon', got 'sgd'"),
        ({"directions": ()}, "directions must be at least one name, got none"),
        ({"directions": ("up",)}, "directions entry must be one of 'text_to_image', 'image_to_text', got 'up'"),
        ({"final_lr_share": 1.5}, "final_lr_share must be a finite number >= 0 and <= 1, got 1.5"),
        ({"log_every": 2, "validate_every": 3}, "validate_every must be a multiple of log_every=2, got 3"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each by name, with what came."""
    with pytest.raises(ValueError, match=message):
        _settings(**changes)
