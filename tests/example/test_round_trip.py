"""The loss that lets a tokenizer read its own pictures back, and the measurement of how far it does."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.te_vqgan.stage1.presets import settings_for
from examples.te_vqgan.stage1.round_trip import encode_at, growth, measure_round_trips, rounded
from examples.te_vqgan.stage1.trainer import Stage1Trainer

CPU = torch.device("cpu")


def test_rounding_gives_eight_bits_and_passes_the_gradient() -> None:
    """Values beyond the range are clipped, and only they have no gradient."""
    images = torch.tensor([-3.0, -1.0, -0.5, 0.0039, 0.9999, 1.5], requires_grad=True)
    levels = (rounded(images).detach() + 1) * 127.5
    torch.testing.assert_close(levels, torch.tensor([0.0, 0.0, 64.0, 128.0, 255.0, 255.0]))
    rounded(images).sum().backward()
    assert images.grad is not None
    assert images.grad[[0, 2, 3, 4, 5]].tolist() == [0, 1, 1, 1, 0]


class Grey:
    """Rows of images whose three channels have one of 16 levels."""

    def __init__(self, count: int) -> None:
        levels = torch.randint(16, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0))
        levels[:, :, 0, 0] = 0
        self.images = (2 * levels / 15 - 1).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def fixed(self, start: int, stop: int) -> Tensor:
        """Return images by their places."""
        return self.images[start:stop]


class Levels:
    """A tokenizer of grey levels whose decoder raises the level where ``wrong`` says so, and never again."""

    training = False
    config = types.SimpleNamespace(stride=1, num_codes=16)

    def __init__(self, wrong: Tensor | None = None, turned: bool = False) -> None:
        self.wrong, self.turned = wrong, turned

    def eval(self) -> None:
        """Nothing differs."""

    def train(self, mode: bool) -> None:
        """Nothing differs."""

    def quantizer(self, latents: Tensor) -> Any:
        """One code for each level."""
        return types.SimpleNamespace(indices=((latents[:, 0] + 1) * 7.5).round().long())

    def encode_with_phases(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and a phase."""
        turned = self.turned and bool((images[:, 0, 0, 0] > -1).all())
        return images, torch.full((len(images), 1, 2), int(turned))

    def decode_indices(self, indices: Tensor, phases: Tensor) -> Tensor:
        """Grey images, once with errors."""
        assert phases.shape == (len(indices), 1, 2)
        if self.wrong is not None:
            indices, self.wrong = (indices + self.wrong) % 16, None
        return (2 * indices / 15 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def _measured(model: Levels) -> dict[str, Any]:
    return measure_round_trips(model, Grey(8), 8, CPU)  # type: ignore[arg-type]


def test_a_tokenizer_that_reads_itself_back_keeps_everything() -> None:
    """Eight bits hold sixteen levels."""
    found = _measured(Levels())
    assert min(found.pop("psnr")) > 100
    assert (found.pop("used_codes"), found.pop("perplexity")) == (16, pytest.approx(14.4, abs=0.1))
    assert found == {"images": 8, "match": [1.0] * 3, "ink": 1.0, "whole": 1.0, "phases": 1.0}


def test_planted_errors_are_counted_where_they_are() -> None:
    """Two of 16 tokens in each of two images, one on the ground; what has changed once comes back afterwards."""
    wrong = torch.zeros(8, 4, 4, dtype=torch.int64)
    wrong[:2, 0, 0] = wrong[:2, 1, 1] = 1
    found = _measured(Levels(wrong))
    marked = int((Grey(8).images[:, 0] > -1).sum())
    on_ink = int((Grey(8).images[:2, 0, 1, 1] > -1).sum())
    levels = ((Grey(8).images[:, 0] + 1) * 7.5).round()
    squared = float((((levels + wrong) % 16 - levels) * 2 / 15).square().mean())
    assert found["psnr"] == pytest.approx([10 * math.log10(4 / squared)] * 3)
    assert found["match"] == [1 - 4 / 128, 1.0, 1.0]
    assert found["ink"] == pytest.approx(1 - on_ink / marked)
    assert (found["whole"], found["phases"]) == (0.75, 1.0)


def test_an_image_with_another_phase_is_not_whole() -> None:
    """Even where all of its tokens are the same."""
    wrong = torch.zeros(8, 4, 4, dtype=torch.int64)
    wrong[:, 0, 0] = 1
    assert _measured(Levels(wrong))["phases"] == 1
    found = _measured(Levels(wrong, turned=True))
    assert (found["phases"], found["whole"]) == (0.0, 0.0)


def test_training_with_the_loss_reaches_the_decoder() -> None:
    """And without it the step is another one; both log what they minimize."""
    steps = {}
    for weight in (0.0, 1.0):
        settings = settings_for("smoke", "integer_exact", {"round_trip_weight": weight, "round_trip_start": 0.0})
        trainer = Stage1Trainer(settings, CPU)
        trainer.initialize(lambda _: torch.zeros(4, 3, 32, 32))
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        numbers = trainer.train_step(images)
        assert ("round_trip_loss" in numbers) == (weight > 0)
        steps[weight] = (float(numbers["loss"]), [p.grad.clone() for p in trainer.model.decoder.parameters()])
    assert steps[1.0][0] > steps[0.0][0]
    assert not all(torch.equal(*pair) for pair in zip(steps[0.0][1], steps[1.0][1], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round_trip_weight": -1.0}, "round_trip_weight must be a finite number >= 0"),
        ({"round_trip_margin": 1.5}, "round_trip_margin must be a finite number >= 0 and <= 1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    """By name."""
    with pytest.raises(ValueError, match=message):
        settings_for("smoke", "vqgan", changes)


def test_the_loss_begins_where_its_setting_says() -> None:
    """And grows over a tenth of the steps."""
    assert [growth(step, 100, 0.4) for step in (0, 39, 40, 44, 49, 99)] == [0.0, 0.0, 0.1, 0.5, 1.0, 1.0]
    assert growth(0, 100, 0.0) == pytest.approx(0.1)


def test_an_encoder_that_is_told_its_own_phases_says_the_same() -> None:
    """Latents bit for bit; told others, it takes those, and the loss says how far it is from them."""
    model = Stage1Trainer(settings_for("smoke", "integer_exact"), CPU).model.eval()
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, phases = model.encode_with_phases(images)
    told, loss = encode_at(model, images, phases)
    assert torch.equal(told, latents)
    other = phases.clone()
    other[:, 0] = (other[:, 0] + 1) % 2
    elsewhere, larger = encode_at(model, images, other)
    assert not torch.equal(elsewhere, latents)
    assert float(loss.detach()) <= 2
    assert float(larger.detach()) > float(loss.detach())
    # The hooks are gone.
    assert torch.equal(model.encode(images), latents)


def test_the_phase_loss_moves_an_image_to_the_phase_that_is_wanted() -> None:
    """Steps down its gradient; without it the encoder stays where it was."""
    torch.manual_seed(0)
    model = Stage1Trainer(settings_for("smoke", "integer_exact"), CPU).model.eval()
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    _, phases = model.encode_with_phases(images)
    wanted = (phases + 1) % 2
    optimizer = torch.optim.Adam([images], 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        _, loss = encode_at(model, images, wanted)
        loss.backward()
        optimizer.step()
    assert not torch.equal(phases, wanted)
    assert torch.equal(model.encode_with_phases(images)[1], wanted)
