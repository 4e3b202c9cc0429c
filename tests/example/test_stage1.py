"""The Stage 1 trainer: stops and goes on bit for bit, refuses what would mix two runs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.te_vqgan.cli.plans import PLANS
from examples.te_vqgan.data.sources import DigitSource, DigitSplit
from examples.te_vqgan.reports.findings import findings
from examples.te_vqgan.reports.results import collect
from examples.te_vqgan.runs import running
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.differences import differing
from examples.te_vqgan.runs.running import only_process_in
from examples.te_vqgan.runs.schedule import rate_factor
from examples.te_vqgan.stage1.exactness import finished_settings
from examples.te_vqgan.stage1.presets import (
    ARMS,
    DEFAULT_ARMS,
    PRESETS,
    Arm,
    Stage1Settings,
    from_dict,
    settings_for,
    to_dict,
)
from examples.te_vqgan.stage1.train import CHECKPOINT, Interrupted, train_stage1
from examples.te_vqgan.stage1.trainer import Stage1Trainer
from te_quant import VQAutoencoder
from tests.helpers import numpy_generator

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """Random pictures: nothing here depends on what they show."""
    rng = numpy_generator()

    def split(count: int) -> DigitSplit:
        return DigitSplit(rng.integers(0, 256, (count, 7, 7), dtype=np.uint8), np.arange(count) % 10)

    return DigitSource("random", tuple("0123456789"), split(40), split(20), split(20))


def _settings(**changes: Any) -> Stage1Settings:
    small = {"train_images": 64, "eval_images": 4, "eval_sprites": 2}
    return dataclasses.replace(SMOKE, **{**small, **changes})


def _train(settings: Stage1Settings, folder: Path, source: DigitSource, **options: Any) -> bool:
    return train_stage1(settings, folder, source, progress=False, **options)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors, _ = load_checkpoint(folder / CHECKPOINT)
    return tensors


def _assert_same_model(first: Path, second: Path) -> None:
    # Not the files' bytes: some versions of safetensors write the header's entries in random order.
    models = [VQAutoencoder.from_pretrained(folder / "model").state_dict() for folder in (first, second)]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


ADVERSARIAL = {"adversarial_weight": 0.5, "adversarial_start": 2}
# Dropout draws from torch's own generator, so its state must be in the checkpoint too.
DROPOUT = {"model": dataclasses.replace(SMOKE.model, dropout=0.2)}


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        pytest.param({}, (2,), id="plain", marks=pytest.mark.slow),
        pytest.param(ADVERSARIAL, (1, 3), id="adversarial"),
        pytest.param(DROPOUT, (3, 5), id="dropout", marks=pytest.mark.slow),
        pytest.param({"codebook_init": "kmeans", "bf16": True}, (4,), id="kmeans-bf16", marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, source: DigitSource, changes: dict[str, Any], stops: tuple[int, ...]
) -> None:
    """Weights, moments, generator states, log, numbers and pictures are equal bit for bit."""
    settings = _settings(**changes)
    once, often = tmp_path / "once", tmp_path / "often"
    assert _train(settings, once, source)
    for stop in stops:
        with pytest.raises(Interrupted, match=f"stopped at step {stop} of 6; --resume goes on from there"):
            _train(settings, often, source, resume=True, stop=lambda done, stop=stop: done == stop)
        torch.manual_seed(99)  # whatever another program left behind
    assert _train(settings, often, source, resume=True)
    first, second = _weights(once), _weights(often)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for name in ("log.jsonl", "evaluation.json", "samples.safetensors", "settings.json"):
        assert (once / name).read_bytes() == (often / name).read_bytes(), name
    _assert_same_model(once, often)


@pytest.mark.slow
def test_another_seed_or_lambda_gives_other_weights(tmp_path: Path, source: DigitSource) -> None:
    """The negative control of the test above: equality of bits is not for free."""
    for name, settings in {
        "base": _settings(),
        "seed": _settings(seed=1),
        "reg": _settings(model=dataclasses.replace(SMOKE.model, orthogonal_reg=10.0)),
    }.items():
        _train(settings, tmp_path / name, source)
    base = _weights(tmp_path / "base")["model.quantizer.codebook"]
    assert not torch.equal(base, _weights(tmp_path / "seed")["model.quantizer.codebook"])
    assert not torch.equal(base, _weights(tmp_path / "reg")["model.quantizer.codebook"])


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between two checkpoints loses the steps between them and nothing else."""
    settings = _settings()
    once, killed = tmp_path / "once", tmp_path / "killed"
    _train(settings, once, source)
    step = Stage1Trainer.train_step

    def crash(self: Stage1Trainer, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step == 5:
            raise RuntimeError("power cut")
        return step(self, images)

    monkeypatch.setattr(Stage1Trainer, "train_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        _train(settings, killed, source)
    monkeypatch.undo()
    assert load_checkpoint(killed / CHECKPOINT)[1]["step"] == 4
    assert len((killed / "log.jsonl").read_text().splitlines()) == 5
    _train(settings, killed, source, resume=True)
    assert (once / "log.jsonl").read_bytes() == (killed / "log.jsonl").read_bytes()
    _assert_same_model(once, killed)


def test_equal_seeds_give_two_arms_equal_starts(tmp_path: Path) -> None:
    """Only λ differs between the arms, so only the codes' gradient does; torch's own generator is left alone."""
    before = torch.get_rng_state()
    first, second = (Stage1Trainer(settings_for("smoke", arm), torch.device("cpu")) for arm in DEFAULT_ARMS)
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    one, two = first.train_step(images), second.train_step(images)
    assert one["l1"] == two["l1"]
    assert one["orthogonal_loss"] == 0 < two["orthogonal_loss"]


def _assert_alike(plain: Stage1Trainer, other: Stage1Trainer) -> None:
    """Three steps with the same numbers up to rounding, and the same names and shapes behind them."""
    for number in range(3):
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(number)) * 2 - 1
        wanted, found = plain.train_step(images), other.train_step(images)
        for name, value in wanted.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-6), (number, name)
    shapes = [{name: value.shape for name, value in trainer.tensors().items()} for trainer in (plain, other)]
    assert shapes[0] == shapes[1]


def test_channels_last_changes_rounding_alone(tmp_path: Path) -> None:
    """And the training goes on from its checkpoint with the same bits, those of the discriminator too.

    Two more steps: only the weights after the first one show whether Adam's moments came back.
    """
    judged = _settings(**ADVERSARIAL | {"adversarial_start": 0})
    plain, other, again = (
        Stage1Trainer(judged, torch.device("cpu"), channels_last=last) for last in (False, True, True)
    )
    _assert_alike(plain, other)
    assert other.model.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "checkpoint.safetensors", other.tensors(), {"step": 3})
    again.load(*load_checkpoint(tmp_path / "checkpoint.safetensors"))
    for _ in range(2):
        images = torch.rand(4, 3, 32, 32) * 2 - 1
        wanted, found = other.train_step(images), again.train_step(images)
        assert {name: value.item() for name, value in wanted.items()} == {n: v.item() for n, v in found.items()}
    states = other.tensors(), again.tensors()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
def test_a_compiler_changes_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with its gradients, and run by torch's own kernels; parts of the network test the compiler's.

    With the padding of the paper's encoder, replicate, and channels last.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = _settings(model=dataclasses.replace(SMOKE.model, channel_multipliers=(1, 2)))
    assert settings.model.encoder_padding == "replicate"
    plain = Stage1Trainer(settings, torch.device("cpu"))
    _assert_alike(plain, Stage1Trainer(settings, torch.device("cpu"), channels_last=True, compiled=True))


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*", r"ignore::FutureWarning:torch\..*")
def test_a_compiled_training_meets_the_discriminator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adaptive weight needs the gradients twice, from a graph that was compiled in the steps without it."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = dataclasses.replace(SMOKE.model, channel_multipliers=(1,))
    settings = _settings(model=model, **ADVERSARIAL)
    assert settings.adversarial_adaptive
    assert settings.adversarial_start == 2
    plain = Stage1Trainer(settings, torch.device("cpu"))
    # Torch's default, whatever trained here before; and what it was afterwards.
    with torch._functorch.config.patch(donated_buffer=True):
        _assert_alike(plain, Stage1Trainer(settings, torch.device("cpu"), channels_last=True, compiled=True))
    assert torch._functorch.config.donated_buffer


def test_the_first_step_of_adam_moves_the_codes_by_the_faster_rate() -> None:
    """Adam's first step is the rate times the sign of the gradient: codes move ten times as far as weights."""
    settings = _settings(learning_rate=1e-3, warmup_steps=4)
    trainer = Stage1Trainer(settings, torch.device("cpu"))
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    numbers = trainer.train_step(torch.rand(4, 3, 32, 32) * 2 - 1)
    moved = {
        name: (tensor - start[name]).abs().max().item() for name, tensor in trainer.model.state_dict().items()
    }
    rate = 1e-3 / 4
    assert numbers["learning_rate"].item() == pytest.approx(rate)
    assert moved["quantizer.codebook"] == pytest.approx(10 * rate, rel=1e-2)
    others = [value for name, value in moved.items() if name.startswith(("encoder", "decoder"))]
    assert max(others) == pytest.approx(rate, rel=1e-2)


def test_gradient_is_clipped_to_the_stated_norm() -> None:
    """The norm before clipping is reported; what reaches Adam has at most the limit. 0 clips nothing."""
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    norms = {}
    for limit in (0.01, 0.0):
        trainer = Stage1Trainer(_settings(clip_norm=limit), torch.device("cpu"))
        reported = trainer.train_step(images)["grad_norm"].item()
        squares = [
            parameter.grad.square().sum() for parameter in trainer.model.parameters() if parameter.grad is not None
        ]
        norms[limit] = (reported, torch.stack(squares).sum().sqrt().item())
    assert norms[0.01][0] == pytest.approx(norms[0.0][0])
    assert norms[0.01][1] == pytest.approx(0.01, rel=1e-3)
    assert norms[0.0][1] == pytest.approx(norms[0.0][0], rel=1e-5)


def test_the_discriminator_joins_at_its_step() -> None:
    """Before it, neither its loss is computed nor its weights move."""
    trainer = Stage1Trainer(_settings(**ADVERSARIAL), torch.device("cpu"))
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    start = [parameter.detach().clone() for parameter in trainer.discriminator.parameters()]
    for step in range(3):
        numbers = trainer.train_step(images)
        same = all(torch.equal(a, b) for a, b in zip(start, trainer.discriminator.parameters(), strict=True))
        assert ("adversarial_loss" in numbers) is (step >= 2)
        assert same is (step < 2)


def test_a_finished_run_is_skipped(tmp_path: Path, source: DigitSource) -> None:
    """Nothing is written again."""
    settings = _settings(steps=2)
    assert _train(settings, tmp_path, source)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert not _train(settings, tmp_path, source)
    assert not _train(settings, tmp_path, source, resume=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_settings_are_refused_by_name(tmp_path: Path, source: DigitSource) -> None:
    """Finished or not, a folder never mixes two runs; the differing settings are named with both values."""
    with pytest.raises(Interrupted, match="stopped at step"):
        _train(_settings(), tmp_path, source, stop=lambda done: done == 2)
    changed = _settings(learning_rate=1e-3, model=dataclasses.replace(SMOKE.model, orthogonal_reg=10.0))
    differences = r"learning_rate was 0.0005, now 0.001; model.orthogonal_reg was 0.0, now 10.0"
    message = rf"^settings must be those of the run in .*, got others: {differences}; use another --out\.$"
    with pytest.raises(ValueError, match=message):
        _train(changed, tmp_path, source, resume=True)
    with pytest.raises(ValueError, match=r"resume must be set, as .* holds an unfinished run, got False"):
        _train(_settings(), tmp_path, source)


def test_a_checkpoint_carried_over_without_its_settings_is_compared_by_those_inside(
    tmp_path: Path, source: DigitSource
) -> None:
    """Another model or seed is refused with both values and nothing is written; the same one goes on."""
    origin, folder = tmp_path / "origin", tmp_path / "carried"
    with pytest.raises(Interrupted, match="stopped at step"):
        _train(_settings(), origin, source, stop=lambda done: done == 2)
    folder.mkdir()
    shutil.copy(origin / CHECKPOINT, folder)
    changed = _settings(seed=7, model=dataclasses.replace(SMOKE.model, orthogonal_reg=10.0))
    differences = r"model.orthogonal_reg was 0.0, now 10.0; seed was 0, now 7"
    cure = r"delete .*checkpoint\.safetensors to train from the beginning, or use another --out"
    message = rf"^settings must be those of the checkpoint in .*carried, got others: {differences}; {cure}\.$"
    with pytest.raises(ValueError, match=message):
        _train(changed, folder, source, resume=True)
    assert not (folder / "settings.json").exists()
    assert _train(_settings(), folder, source, resume=True)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[]"], ids=repr)
def test_damaged_settings_are_refused_by_the_name_of_the_file(
    tmp_path: Path, source: DigitSource, content: bytes
) -> None:
    """Cut short, empty, no text, or no object."""
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))} must (be a JSON file|hold a JSON object), got "
    ):
        _train(_settings(), tmp_path, source, resume=True)


@pytest.mark.parametrize("content", ["{}", "{", '{"model": {"paint": 1}}'])
def test_settings_of_a_finished_run_that_say_something_else_are_refused_by_the_name_of_the_file(
    tmp_path: Path, content: str
) -> None:
    """Later steps read them too."""
    (tmp_path / "evaluation.json").write_text("{}")
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} must "):
        finished_settings(tmp_path)


def test_a_folder_in_use_is_refused(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes in one folder would mix their logs. That it waits is said at once, and once."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(running, "_LOCK_SECONDS", 0.1)
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cure = "wait, or choose another --out"
        with pytest.raises(ValueError, match=f"must not be in use, but another process works there; {cure}\\.$"):
            _train(_settings(), tmp_path, source)
    assert capsys.readouterr().err == f"waiting for the process that works in {tmp_path}\n"


def test_waiting_for_a_folder_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C says what was stopped, as there is nothing to resume."""
    fcntl = pytest.importorskip("fcntl")

    def press(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running.time, "sleep", press)
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = f"^{re.escape(str(tmp_path))}: stopped waiting for the process that works there\\.$"
        with pytest.raises(Interrupted, match=message), only_process_in(tmp_path):
            pytest.fail("the folder was taken")


def test_a_free_folder_is_taken_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The usual case."""
    with only_process_in(tmp_path):
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """At once, and not as if another process were there. Other errors are what they are."""
    fcntl = pytest.importorskip("fcntl")

    def without(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without)
    monkeypatch.setattr(running.time, "sleep", lambda _: pytest.fail("waited"))
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)), only_process_in(tmp_path):
            pass
        return
    with only_process_in(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than fill the log with NaN."""
    step = Stage1Trainer.train_step

    def broken(self: Stage1Trainer, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**step(self, images), "loss": torch.tensor(float("nan"))}

    monkeypatch.setattr(Stage1Trainer, "train_step", broken)
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan at step 1"):
        _train(_settings(), tmp_path, source)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_writes_a_checkpoint(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Sent in the middle of a step, it takes effect after it; the old handlers come back."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    step = Stage1Trainer.train_step

    def signalled(self: Stage1Trainer, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step == 2:
            os.kill(os.getpid(), number)
        return step(self, images)

    monkeypatch.setattr(Stage1Trainer, "train_step", signalled)
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        _train(_settings(), tmp_path, source)
    assert load_checkpoint(tmp_path / CHECKPOINT)[1]["step"] == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_settings_survive_json_and_name_their_differences() -> None:
    """Every preset and arm that goes with it, tuples and all."""
    for preset in PRESETS:
        for arm in PLANS["photos"].arms if preset == "photos" else ARMS:
            settings = settings_for(preset, arm, {"seed": 3, "steps": None})
            assert from_dict(json.loads(json.dumps(to_dict(settings)))) == settings
            assert settings.seed == 3
    first, second = (to_dict(settings_for("quick", arm)) for arm in ("vqgan", "te_vqgan"))
    assert differing(first, second) == ["model.orthogonal_reg was 0.0, now 10.0"]


def test_the_papers_settings_are_those_of_its_authors() -> None:
    """What the authors' code has, number by number."""
    paper = settings_for("paper", "vqgan")
    model = paper.model
    assert (model.base_channels, model.channel_multipliers, model.num_res_blocks) == (128, (1, 2, 2), 1)
    assert (model.encoder_padding, model.decoder_padding) == ("replicate", "zeros")
    assert (model.norm_groups, model.attention_levels, model.dropout) == (32, (2,), 0.0)
    assert paper.canvas_size // 2 ** model.attention_levels[0] == 16
    assert (model.num_codes, model.code_dim, model.commitment_weight) == (256, 256, 0.25)
    assert (model.codebook_update, paper.codebook_init, paper.codebook_lr_factor) == ("gradient", "uniform", 1.0)
    assert (paper.batch_size, paper.steps * paper.batch_size) == (192, 40 * 300_000)
    assert paper.learning_rate == pytest.approx(1.536e-3)
    schedule = {"steps": paper.steps, "warmup_steps": paper.warmup_steps, "final_share": paper.final_lr_share}
    assert [rate_factor(step, **schedule) for step in (0, 1, 40_000, 62_499)] == [1.0] * 4
    assert (paper.clip_norm, paper.bf16) == (0.0, False)
    assert (paper.l1_weight, paper.l2_weight, paper.perceptual, paper.perceptual_weight) == (
        1.0,
        0.0,
        "lpips",
        1.0,
    )
    assert (paper.adversarial_weight, paper.adversarial_start, paper.adversarial_delta) == (0.8, 30_001, 1e-4)
    assert (paper.discriminator_channels, paper.discriminator_layers) == (64, 3)
    assert paper.discriminator_norm == "batch"
    assert settings_for("paper", "te_vqgan").model.orthogonal_reg == 10.0
    trainer = Stage1Trainer(_settings(), torch.device("cpu"))
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.5, 0.9)}
    assert {group["betas"] for group in trainer.judge_optimizer.param_groups} == {(0.5, 0.9)}


def test_the_authors_pooling_is_that_of_their_presets_only() -> None:
    """Other presets keep the library's layer, whose numbers are published."""
    kinds = {preset: settings_for(preset, "mb").model.downsample for preset in PRESETS}
    assert {preset for preset, kind in kinds.items() if kind == "unpadded_max_blur_pool"} == {"paper", "narrow"}
    assert {kind for kind in kinds.values() if kind != "unpadded_max_blur_pool"} == {"max_blur_pool"}
    assert settings_for("paper", "vqgan").model.downsample == "strided_conv"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adversarial_delta": 0.0}, "adversarial_delta must be above 0, got 0.0"),
        ({"discriminator_channels": 6}, "discriminator_channels must be a multiple of 4, got 6"),
        ({"discriminator_layers": 0}, "discriminator_layers must be an int >= 1, got 0"),
        ({"discriminator_norm": "layer"}, "discriminator_norm must be one of 'group', 'batch', got 'layer'"),
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"steps": True}, "steps must be an int >= 1, got True"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number >= 0, got nan"),
        ({"final_lr_share": 1.5}, "final_lr_share must be a finite number >= 0 and <= 1, got 1.5"),
        ({"perceptual": "vgg"}, "perceptual must be one of 'none', 'lpips', 'st-lpips', got 'vgg'"),
        (
            {"perceptual": "lpips"},
            "perceptual_weight must be 0 without a perceptual distance and above 0 with one",
        ),
        ({"codebook_init": "zeros"}, "codebook_init must be one of 'uniform', 'kmeans', got 'zeros'"),
        ({"l1_weight": 0.0, "l2_weight": 0.0}, "above 0 in sum, got 0"),
        ({"log_every": 2, "validate_every": 3}, "validate_every must be a multiple of log_every=2, got 3"),
        ({"canvas_size": 34}, "canvas_size must be a multiple of 4, got 34"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each by name, with what came."""
    with pytest.raises(ValueError, match=message):
        _settings(**changes)


@pytest.mark.parametrize(
    ("preset", "arm", "match"),
    [
        ("huge", "vqgan", r"preset must be one of 'smoke', 'quick', .*, got 'huge'"),
        ("smoke", "x", r"arm must be one of 'vqgan', 'te_vqgan', .*, got 'x'"),
    ],
)
def test_unknown_presets_and_arms_are_refused(preset: str, arm: str, match: str) -> None:
    """With the list of those that exist."""
    with pytest.raises(ValueError, match=match):
        settings_for(preset, arm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"downsampel": "mp"}}, r"ARMS\['own'\].model must be one of 'image_channels', .*'downsampel'"),
        ({"settings": {"batch": 3}}, r"a name in ARMS\['own'\].settings must be one of 'model', .* got 'batch'"),
        ({"model": {"quantizer": {"name": "FSQ", "levels": [8, 5]}}}, "must be a VectorQuantizer, .* got FSQ"),
        (
            {"model": {"quantizer": {"name": "SimVQ"}}},
            "the command `family` trains the other quantizers.*got SimVQ",
        ),
    ],
)
def test_arms_that_cannot_be_trained_are_refused_before_training(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARMS, "own", Arm("Own", **changes))
    with pytest.raises(ValueError, match=message):
        settings_for("smoke", "own")


def test_an_arm_of_ones_own_is_trained_and_reported(
    tmp_path: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a codebook of another size, metric and update, as the guide adds one."""
    model = {"downsample": "max_pool", "codebook_update": "ema", "decay": 0.9, "num_codes": 8, "metric": "cosine"}
    monkeypatch.setitem(ARMS, "own", Arm("EMA, K = 8", model, {"batch_size": 2}))
    settings = settings_for("smoke", "own")
    assert (settings.batch_size, settings.model.num_codes, settings.model.metric) == (2, 8, "cosine")
    assert _train(settings, tmp_path / "own-seed0", source)
    (run,) = collect(tmp_path, command="-")["runs"]
    assert (run["arm"], run["title"], run["seed"]) == ("own", "EMA, K = 8", 0)
    assert "EMA, K = 8" in "\n".join(findings({"runs": [run]}))


def test_importing_the_command_line_is_quick() -> None:
    """--help must not wait for matplotlib or tensorboard."""
    heavy = ("matplotlib", "tensorboard", "sklearn")
    code = f"import sys, examples.te_vqgan.__main__; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
