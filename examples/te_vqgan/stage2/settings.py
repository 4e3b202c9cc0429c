"""What decides the numbers of Stage 2: the GPT over captions and image tokens, and how it is trained.

Everything here is data, as in :mod:`~.stage1.presets`: a preset is a few changes to the defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from examples.te_vqgan.data.captions import STYLES
from examples.te_vqgan.runs.checks import require, require_choice, require_int, require_number
from examples.te_vqgan.stage1.presets import present_form as stage1_form

__all__ = [
    "DIRECTIONS",
    "OPTIMIZERS",
    "STAGE2",
    "Stage2Settings",
    "from_dict",
    "present_form",
    "stage2_settings_for",
]

DIRECTIONS: Mapping[str, tuple[str, str]] = {
    "text_to_image": ("text", "image"),
    "image_to_text": ("image", "text"),
}
"""The order of the two segments by direction; what comes second is the target."""

OPTIMIZERS = ("adam", "muon")

_DECODING = ("top_fraction", "temperature")


@dataclasses.dataclass(frozen=True)
class Stage2Settings:
    """Everything that decides the numbers of a Stage 2 run beyond its tokenizer, and nothing else.

    Args:
        width: of the transformer.
        depth: blocks.
        num_heads: heads of attention, a divisor of ``width``.
        dropout: in [0, 1).
        caption_style: of the grammar, ``"full"`` or ``"terse"``.
        train_images: size of the training set; 300,000 in the paper.
        eval_images: captions and images of the test set, and half as many of seen combinations.
        seed: of the weights, and of what training and sampling draw.
        steps: optimiser steps, at least 1.
        batch_size: pairs a step.
        directions: names out of :data:`DIRECTIONS`, trained in turn.
        first_alone: for so many steps only the first direction is trained.
        target_weight: of the loss of the second segment, where the first has weight 1; the sum is divided by
            ``target_weight`` + 1.
        optimizer: ``"adam"``, or ``"muon"`` for the matrices within the blocks (and Adam for the rest).
        learning_rate: Adam's peak rate.
        muon_learning_rate: Muon's peak rate; without meaning for ``"adam"``.
        warmup_steps: both rates rise linearly for so many steps.
        final_lr_share: ...and then fall on half a cosine to this share of their peak, in [0, 1].
        clip_norm: the gradient is scaled down to at most this norm; 0 leaves it alone.
        bf16: compute the transformer in bfloat16 while training.
        log_every: a line in the log after so many steps.
        validate_every: validation numbers in that line after so many steps; a multiple of ``log_every``.
        checkpoint_every: a checkpoint after so many steps.

    Raises:
        ValueError: a setting is out of range.

    Source: Shin et al. 2021, arXiv:2112.00384, section 4, and its published Stage 2: width 256, depth 8, 8 heads,
        both orders for each batch, loss (other + 7 target) / 8, Adam at 1e-3, clip 1.
    """

    width: int = 256
    depth: int = 8
    num_heads: int = 8
    dropout: float = 0.0
    caption_style: str = "full"
    train_images: int = 300_000
    eval_images: int = 3_000
    seed: int = 0
    steps: int = 30_000
    batch_size: int = 200
    directions: tuple[str, ...] = ("text_to_image", "image_to_text")
    first_alone: int = 0
    target_weight: float = 7.0
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    warmup_steps: int = 500
    final_lr_share: float = 0.0
    clip_norm: float = 1.0
    bf16: bool = False
    log_every: int = 10
    validate_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "train_images", "steps", "batch_size"):
            require_int(name, getattr(self, name), 1)
        for name in ("log_every", "validate_every", "checkpoint_every"):
            require_int(name, getattr(self, name), 1)
        require_int("eval_images", self.eval_images, 2)
        require_int("seed", self.seed, 0)
        for name in ("warmup_steps", "first_alone"):
            require_int(name, getattr(self, name), 0)
        # A list, as JSON gives it, would make the settings unhashable and unequal to their own copy.
        object.__setattr__(self, "directions", tuple(self.directions))
        require(len(self.directions) > 0, "directions", "at least one name", "none")
        for name in self.directions:
            require_choice("directions entry", name, tuple(DIRECTIONS))
        require_choice("caption_style", self.caption_style, STYLES)
        require_choice("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("learning_rate", "muon_learning_rate", "clip_norm", "target_weight"):
            require_number(name, getattr(self, name), 0.0)
        require_number("final_lr_share", self.final_lr_share, 0.0, 1.0)
        require(self.width % self.num_heads == 0, "num_heads", f"a divisor of width={self.width}", self.num_heads)
        require_number("dropout", self.dropout, 0.0, 1.0)
        require(self.dropout < 1, "dropout", "below 1", self.dropout)
        alone = 0 if len(self.directions) == 1 else self.first_alone
        require(alone < self.steps, "steps", f"above first_alone={alone}, or directions a single one", self.steps)
        require(
            self.validate_every % self.log_every == 0,
            "validate_every",
            f"a multiple of log_every={self.log_every}",
            self.validate_every,
        )

    def direction(self, step: int) -> str:
        """Return the direction that ``step``, counted from 0, trains."""
        return self.directions[max(0, step - self.first_alone) % len(self.directions)]

    def to_dict(self) -> dict[str, Any]:
        """All settings in the form in which JSON gives them back."""
        return {**dataclasses.asdict(self), "directions": list(self.directions)}


def present_form(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that an older version wrote as this one writes them.

    What it did not have yet takes its default, under which a training is what it was. How an evaluation decodes is
    no longer among them.

    Args:
        stored: settings, with those of the tokenizer as ``stage1`` or without.
    """
    kept = {name: value for name, value in stored.items() if name not in _DECODING}
    if "stage1" in kept:
        kept["stage1"] = stage1_form(kept["stage1"])
    return {**Stage2Settings().to_dict(), **kept}


def from_dict(plain: Mapping[str, Any]) -> Stage2Settings:
    """Return the settings in a run's ``settings.json``, of older versions too."""
    known = present_form(plain)
    known.pop("stage1", None)
    return Stage2Settings(**known)


STAGE2: dict[str, Stage2Settings | None] = {
    "smoke": Stage2Settings(
        width=16,
        depth=1,
        num_heads=2,
        caption_style="terse",
        train_images=32,
        eval_images=10,
        steps=6,
        batch_size=4,
        optimizer="muon",
        warmup_steps=2,
        log_every=1,
        validate_every=3,
        checkpoint_every=2,
    ),
    # The demo compares tokenizers alone.
    "quick": None,
    "small": Stage2Settings(
        width=128,
        depth=4,
        num_heads=4,
        caption_style="terse",
        train_images=40_000,
        eval_images=1_500,
        steps=2_400,
        batch_size=32,
        first_alone=1_000,
        optimizer="muon",
        warmup_steps=50,
        bf16=True,
        validate_every=100,
        checkpoint_every=250,
    ),
    "paper": Stage2Settings(bf16=True),
}
"""By preset; ``None`` where it ends with Stage 1."""
STAGE2 |= {"small-long": STAGE2["small"], "small-fine": STAGE2["small"]}


def stage2_settings_for(preset: str, changes: Mapping[str, Any] | None = None) -> Stage2Settings:
    """Return the settings of ``preset``.

    Args:
        preset: a key of :data:`STAGE2`.
        changes: overrides; ``None`` values are ignored.

    Raises:
        ValueError: the preset has no Stage 2, or a setting is out of range.
    """
    require_choice("preset", preset, tuple(name for name, settings in STAGE2.items() if settings is not None))
    base = STAGE2[preset]
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    return dataclasses.replace(base or Stage2Settings(), **given)
