"""The presets with the paper's protocol from end to end: every step of `run`, on very small networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.classifier.trainer import CLASSIFIERS
from examples.te_vqgan.reports.results import run_folder
from examples.te_vqgan.stage1.presets import PRESETS
from examples.te_vqgan.stage2 import train as stage2
from examples.te_vqgan.stage2.dalle import DalleTransformer
from examples.te_vqgan.stage2.evaluate import rule_file
from examples.te_vqgan.stage2.settings import STAGE2
from examples.te_vqgan.stage2.transformers import load_transformer


def _shrink(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave everything as it is except widths, lengths and numbers of images."""
    first, second = PRESETS[preset], STAGE2[preset]
    assert second is not None
    often = {"log_every": 1, "validate_every": 2, "checkpoint_every": 2}
    small = dataclasses.replace(first.model, base_channels=8, norm_groups=8, code_dim=16)
    start = min(first.adversarial_start, 1)
    monkeypatch.setitem(
        PRESETS,
        preset,
        dataclasses.replace(
            first,
            model=small,
            steps=3,
            batch_size=2,
            train_images=20,
            eval_images=5,
            eval_sprites=2,
            adversarial_start=start,
            discriminator_channels=8,
            **often,
        ),
    )
    monkeypatch.setitem(
        STAGE2,
        preset,
        dataclasses.replace(
            second,
            width=16,
            num_heads=2,
            head_width=8,
            steps=4,
            first_alone=min(second.first_alone, 2),
            warmup_steps=2,
            batch_size=2,
            train_images=20,
            eval_images=4,
            **often,
        ),
    )
    monkeypatch.setitem(
        CLASSIFIERS,
        preset,
        dataclasses.replace(
            CLASSIFIERS[preset], steps=2, batch_size=4, widths=(8, 8), validation_cells=4, **often
        ),
    )
    monkeypatch.setattr(stage2, "_VALIDATION_IMAGES", 4)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", pytest.param("narrow", marks=pytest.mark.long)])
def test_every_step_of_the_preset_works(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, evaluation and publication, without LPIPS; the arm has the authors' own pooling."""
    _shrink(preset, monkeypatch)
    shared = ["--preset", preset, "--data", "digits", "--out", str(tmp_path), "--threads", "1"]
    arm = ["--arm", "mb"]
    steps = [
        ["classifier", *shared],
        ["stage1", *shared, *arm, "--perceptual", "none", "--no-compile"],
        ["stage2", *shared, *arm, "--no-compile"],
        ["evaluate", *shared, *arm],
        ["publish", *shared[:-2], *arm, "--into", str(tmp_path / "weights")],
    ]
    for words in steps:
        assert main(words) == 0, words
    folder = run_folder(tmp_path, "mb", 0)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["model"]["downsample"] == "unpadded_max_blur_pool"
    assert (settings["canvas_size"], settings["perceptual"], settings["perceptual_weight"]) == (64, "none", 0.0)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert ("discriminator_loss" in log[-1]) is (preset == "paper")
    gpt = load_transformer(folder / "stage2-20" / "model")
    assert isinstance(gpt, DalleTransformer)
    assert (gpt.config.text_length, gpt.config.vocab_size, gpt.config.grid) == (50, 78, (16, 16))
    assert len(gpt.blocks) == {"paper": 8, "narrow": 4}[preset]
    numbers = json.loads((folder / "stage2-20" / rule_file("paper")).read_text())
    assert numbers["held_out"].keys() >= {"text_to_image", "image_to_text"}
    published = load_transformer(tmp_path / "weights" / "gpt").float()
    assert all(
        torch.allclose(one, two, rtol=1e-3, atol=1e-6)
        for one, two in zip(published.parameters(), gpt.parameters(), strict=True)
    )
    assert load_file(tmp_path / "weights" / "gpt" / "model.safetensors")["norm.weight"].dtype == torch.float16
