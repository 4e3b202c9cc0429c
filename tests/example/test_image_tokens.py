"""Images as sequences: the grid, and one token for the phase where the tokenizer chooses one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from examples.te_vqgan.data.caption_tokens import CaptionTokenizer
from examples.te_vqgan.data.captions import Grammar
from examples.te_vqgan.stage1.presets import ARMS, settings_for
from examples.te_vqgan.stage2 import train as stage2
from examples.te_vqgan.stage2.evaluate import evaluate_gpt
from examples.te_vqgan.stage2.image_tokens import (
    PHASE,
    decode_images,
    encode_images,
    num_phases,
    sequence_order,
)
from examples.te_vqgan.stage2.settings import DIRECTIONS, stage2_settings_for
from examples.te_vqgan.stage2.train import stage2_folder, train_stage2
from examples.te_vqgan.stage2.trainer import Stage2Trainer, gpt_config
from te_quant import GPT, VQAutoencoder
from tests.example.tiny_runs import NAMES, finished_classifier, finished_tokenizer, random_source

CPU = torch.device("cpu")
GRID, CODES, PHASES = (4, 4), 16, 16
TEXT = CaptionTokenizer(Grammar(NAMES, "terse"))


def _model(arm: str) -> VQAutoencoder:
    model = VQAutoencoder(settings_for("smoke", arm).model).eval()
    model.quantizer.kmeans_init(model.encode(torch.rand(32, 3, 32, 32) * 2 - 1).detach())  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize("arm", ["vqgan", "integer_exact"])
def test_images_come_back_as_the_tokenizer_gives_them_back(arm: str) -> None:
    """Wherever they lie in a cell; without the phase some would lie elsewhere."""
    model = _model(arm)
    base = torch.rand(6, 3, 32, 32) * 2 - 1
    images = torch.cat([base.roll((shift, 2 * shift), (2, 3)) for shift in range(4)])
    tokens = encode_images(model, images)
    side = 32 // model.config.stride
    with torch.no_grad():
        expected = model(images)
    decoded = decode_images(model, tokens, (side, side))
    torch.testing.assert_close(decoded, expected.reconstruction)
    assert torch.equal(tokens[:, -side * side :], expected.indices.flatten(1))
    if arm == "vqgan":
        assert num_phases(model.config) == 0
        assert tokens.shape == (24, side * side)
        return
    assert num_phases(model.config) == PHASES
    assert tokens.shape == (24, 1 + side * side)
    assert 3 < len(tokens[:, 0].unique()) <= PHASES
    assert int(tokens[:, 0].max()) < PHASES
    # The negative control: another phase is another place.
    other = torch.cat([(tokens[:, :1] + 1) % PHASES, tokens[:, 1:]], 1)
    assert not torch.allclose(decode_images(model, other, (side, side)), decoded, atol=1e-2)


def test_without_downsampling_there_is_no_phase() -> None:
    """Nor where a downsampling does not choose."""
    config = settings_for("smoke", "integer_exact").model
    single = dataclasses.replace(config, channel_multipliers=(1,), attention_levels=())
    assert num_phases(single) == 0
    assert [arm for arm in ARMS if num_phases(settings_for("small-fine", arm).model)] == ["integer_exact"]
    assert num_phases(settings_for("small-fine", "integer_exact").model) == 4


def _trainer(phases: int) -> Stage2Trainer:
    settings = stage2_settings_for("smoke")
    return Stage2Trainer(settings, gpt_config(settings, TEXT, CODES, GRID, phases), CPU)


@pytest.mark.parametrize("direction", [*DIRECTIONS])
def test_the_phase_stands_before_its_grid_and_counts_as_a_token_of_the_image(direction: str) -> None:
    """Its loss is one of M; without a phase nothing changes."""
    trainer = _trainer(PHASES)
    model = trainer.model
    assert isinstance(model, GPT)
    assert sequence_order("text_to_image", model.config.segments) == ("text", PHASE, "image")
    assert sequence_order("image_to_text", model.config.segments) == (PHASE, "image", "text")
    assert sequence_order(direction, _trainer(0).model.config.segments) == DIRECTIONS[direction]
    text = TEXT.encode(["1 red upper left"] * 3)
    image = torch.cat([torch.randint(PHASES, (3, 1)), torch.randint(CODES, (3, 16))], 1)
    losses = trainer.losses(text, image, direction)
    order = sequence_order(direction, model.config.segments)
    parts = {"text": text, PHASE: image[:, :1], "image": image[:, 1:]}
    logits = torch.cat([parts[name] for name in order], 1)
    alone = model.losses(logits, order=order)
    torch.testing.assert_close(losses["image"], (alone[PHASE] + 16 * alone["image"]) / 17)
    assert losses.keys() == {"text", "image"}


def test_the_transformer_of_the_authors_has_no_phase() -> None:
    """It is refused, not left out."""
    settings = stage2_settings_for("paper")
    numerals = CaptionTokenizer(Grammar(NAMES, settings.caption_style))
    with pytest.raises(ValueError, match="phases must be 0 for architecture='dalle', got 4"):
        gpt_config(settings, numerals, CODES, GRID, 4)


def test_an_exact_tokenizer_goes_through_both_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and measurement know of the phase."""
    monkeypatch.setattr(stage2, "_VALIDATION_IMAGES", 4)
    model = settings_for("smoke", "integer_exact").model
    tokenizer = finished_tokenizer(tmp_path / "integer_exact-seed0", model=model)
    classifier = finished_classifier(tmp_path / "classifier")
    source = random_source()
    settings = dataclasses.replace(stage2_settings_for("smoke"), steps=2, train_images=8, eval_images=7)
    assert train_stage2(settings, tokenizer, source, progress=False)
    folder = stage2_folder(tokenizer, settings)
    assert [part.name for part in GPT.from_pretrained(folder / "model").config.segments] == [
        "text",
        PHASE,
        "image",
    ]
    assert evaluate_gpt(settings, tokenizer, classifier, source, rule="2", progress=False)
    numbers = json.loads((folder / "rule-2.json").read_text())
    assert sum(case["images"] for case in numbers["held_out"]["text_to_image"]["cases"].values()) == 7
