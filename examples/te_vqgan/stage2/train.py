"""Stage 2: train one GPT over captions and the tokens of one finished Stage 1 run; stops anywhere and goes on.

The folder of a run lies in that of its tokenizer and holds what :mod:`~.runs.running` says, ``model/``
(for :func:`~.stage2.transformers.load_transformer`) and ``tokens.safetensors``, the encoded training images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.te_vqgan.data.pairs import CaptionedImages
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.differences import differing
from examples.te_vqgan.runs.files import sha256, write_text_atomically
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.runs.recorded import require_recorded
from examples.te_vqgan.runs.running import (
    WEIGHTS,
    Clock,
    begun_run,
    finished_run,
    provenance,
    require_finished,
    run_steps,
)
from examples.te_vqgan.stage1.presets import Stage1Settings, read_settings
from examples.te_vqgan.stage2.image_tokens import num_phases
from examples.te_vqgan.stage2.settings import DIRECTIONS, Stage2Settings, present_form
from examples.te_vqgan.stage2.token_cache import cached_tokens, encode_dataset
from examples.te_vqgan.stage2.trainer import Stage2Trainer, gpt_config
from te_quant import VQAutoencoder

__all__ = [
    "is_finished",
    "load_tokenizer",
    "plain_settings",
    "stage2_folder",
    "train_stage2",
]

TOKENS = "tokens.safetensors"
_VALIDATION_IMAGES = 256
# Every seed is measured on the same captions.
_VALIDATION_SEED = 0


def stage2_folder(tokenizer: Path, settings: Stage2Settings) -> Path:
    """Return where the run of ``settings`` on the tokenizer in folder ``tokenizer`` lies."""
    return tokenizer / f"stage2-{settings.train_images}"


def plain_settings(settings: Stage2Settings, tokenizer: Stage1Settings | dict[str, Any]) -> dict[str, Any]:
    """Return everything that decides the numbers of a run, as JSON gives it back."""
    from examples.te_vqgan.stage1.presets import to_dict

    return {**settings.to_dict(), "stage1": tokenizer if isinstance(tokenizer, dict) else to_dict(tokenizer)}


def is_finished(folder: Path, settings: Stage2Settings, tokenizer: Stage1Settings) -> bool:
    """Say whether ``folder`` holds the finished run of ``settings`` on that tokenizer.

    Raises:
        ValueError: it holds a run of other settings.
    """
    return finished_run(folder, plain_settings(settings, tokenizer), present_form)


def load_tokenizer(folder: Path, device: torch.device) -> tuple[VQAutoencoder, Stage1Settings]:
    """Return the model of a finished Stage 1 run, in evaluation mode, and the settings it was trained with.

    Raises:
        ValueError: ``folder`` holds no finished run, or the model of another one.
    """
    settings = _tokenizer_settings(folder)
    model = VQAutoencoder.from_pretrained(folder / "model")
    changes = differing(model.config.to_dict(), settings.model.to_dict(), "model.")
    require(not changes, "model", f"that of the settings in {folder}", "; ".join(changes))
    require_recorded(folder)
    return model.to(device), settings


def train_stage2(
    settings: Stage2Settings,
    tokenizer: Path,
    source: DigitSource,
    *,
    execution: Execution | None = None,
    resume: bool = False,
    stop: Callable[[int], bool] | None = None,
    progress: bool = True,
    command: str | None = None,
) -> bool:
    """Train and save one run in :func:`stage2_folder`.

    Args:
        settings: of the run.
        tokenizer: folder of the finished Stage 1 run.
        source: the digits that it was trained on.
        execution: where to compute.
        resume: go on from the checkpoint in the folder, if there is one.
        stop: asked after every step, given the steps done, whether to stop there.
        progress: show progress bars.
        command: what was typed, for the record.

    Returns:
        False if the run had been finished before and nothing was done.

    Raises:
        ValueError: Stage 1 is not finished, the folder holds a run of other settings or on another tokenizer, or
            an unfinished one and ``resume`` is not set.
        Interrupted: ``stop``, Ctrl-C or SIGTERM ended the training early.
        FloatingPointError: the loss is no longer finite.
    """
    where = execution or Execution()
    device = where.apply()
    stage1 = distributed.from_main(lambda: _tokenizer_settings(tokenizer))
    require(source.name == stage1.data, "data", f"that of the tokenizer, {stage1.data!r}", repr(source.name))
    folder = stage2_folder(tokenizer, settings)
    plain = plain_settings(settings, stage1)
    if finished_run(folder, plain, present_form):
        return False
    # A tokenizer that was trained again, on another machine say, has other tokens under the same settings.
    inputs = distributed.from_main(lambda: {"tokenizer": sha256(tokenizer / WEIGHTS)})
    with begun_run(folder, plain, resume=resume, present=present_form, inputs=inputs) as checkpoint:
        clock = Clock(None if checkpoint is None else checkpoint[1]["spent"])
        train = _pairs(settings, stage1, source, "train", settings.train_images, settings.seed)
        side = stage1.canvas_size // stage1.model.stride
        config = gpt_config(
            settings, train.tokenizer, stage1.model.num_codes, (side, side), num_phases(stage1.model)
        )
        held = _pairs(settings, stage1, source, "validation", _VALIDATION_IMAGES, _VALIDATION_SEED)

        def encode() -> tuple[Tensor, Tensor]:
            autoencoder, _ = load_tokenizer(tokenizer, device)
            facts = {"images": settings.train_images, "seed": settings.seed, "stage1": plain["stage1"]}
            facts["weights"] = inputs["tokenizer"]
            tokens = cached_tokens(folder / TOKENS, facts, lambda: _encoded(autoencoder, train, device, progress))
            return tokens, encode_dataset(autoencoder, held.dataset, device)

        # Before the trainer takes torch's generator, from which a new autoencoder draws the weights it then loads.
        tokens, held_tokens = distributed.from_main(encode)
        trainer = Stage2Trainer(settings, config, device, compiled=where.compiled)
        if checkpoint is None:
            trainer.initialize()
        else:
            trainer.load(*checkpoint)

        def advance() -> dict[str, Tensor]:
            batch = settings.batch(trainer.step)
            rows = train.rows(batch, settings.batch_size)
            text = distributed.share(train.caption_tokens(rows, batch))
            return trainer.train_step(text, tokens[torch.from_numpy(distributed.share(rows))].long())

        run_steps(
            trainer,
            settings,
            plain,
            folder,
            advance=advance,
            validate=lambda: _validate(trainer, held, held_tokens),
            clock=clock,
            stop=stop,
            progress=progress,
            inputs=inputs,
        )
        trained, processes = clock.spent(), distributed.size()

        def finish() -> None:
            trainer.model.save_pretrained(folder / "model")
            numbers = _validate(trainer, held, held_tokens)
            hashes = {"weights": sha256(folder / WEIGHTS), **inputs}
            facts = provenance(command, where, trained, clock.spent(), processes=processes, hashes=hashes)
            write_text_atomically(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
            write_text_atomically(folder / "evaluation.json", json.dumps(numbers, indent=2) + "\n")

        distributed.from_main(finish)
    return True


def _tokenizer_settings(folder: Path) -> Stage1Settings:
    arm, _, seed = folder.name.rpartition("-seed")
    require_finished(folder, "stage1", f"stage1 --arm {arm} --seed {seed}" if arm else "stage1")
    return read_settings(folder / "settings.json")


def _pairs(
    settings: Stage2Settings, stage1: Stage1Settings, source: DigitSource, split: str, size: int, seed: int
) -> CaptionedImages:
    return CaptionedImages(
        source, split, canvas_size=stage1.canvas_size, size=size, seed=seed, style=settings.caption_style
    )


def _encoded(model: VQAutoencoder, train: CaptionedImages, device: torch.device, progress: bool) -> Tensor:
    from tqdm import tqdm

    with tqdm(total=len(train.dataset), disable=not progress, desc="encoding", unit="image") as bar:
        return encode_dataset(model, train.dataset, device, progress=lambda done: bar.update(done - bar.n))


@torch.no_grad()
def _validate(trainer: Stage2Trainer, pairs: CaptionedImages, tokens: Tensor) -> dict[str, float]:
    """Return the loss of each segment in each direction, nats a token, over held-out combinations."""
    trainer.model.eval()
    text = pairs.tokenizer.encode(pairs.first_captions(0, len(tokens)))
    numbers: dict[str, float] = {}
    for direction in DIRECTIONS:
        losses = trainer.losses(text, tokens.long(), direction)
        numbers |= {f"validation_{direction}_{name}": float(value) for name, value in losses.items()}
    return numbers
