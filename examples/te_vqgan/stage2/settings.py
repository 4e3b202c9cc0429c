"""What decides the numbers of Stage 2: the GPT over captions and image tokens, and how it is trained.

Everything here is data, as in :mod:`~.stage1.presets`: a preset is a few changes to the defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from examples.te_vqgan.data.captions import STYLES
from examples.te_vqgan.runs.checks import require, require_choice, require_int, require_number
from examples.te_vqgan.runs.schedule import rate_factor
from examples.te_vqgan.stage1.presets import present_form as stage1_form

__all__ = [
    "ARCHITECTURES",
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
ARCHITECTURES = ("te_quant", "dalle")
"""The library's GPT, and the transformer of the paper's authors (:mod:`~.stage2.dalle`)."""

_DECODING = ("top_fraction", "temperature")


@dataclasses.dataclass(frozen=True)
class Stage2Settings:
    """Everything that decides the numbers of a Stage 2 run beyond its tokenizer, and nothing else.

    Args:
        architecture: one of :data:`ARCHITECTURES`.
        width: of the transformer.
        depth: blocks.
        num_heads: heads of attention, a divisor of ``width``.
        head_width: of each head; ``None`` divides ``width`` among them. Another is for ``"dalle"`` only.
        dropout: in [0, 1); 0 for ``"dalle"``.
        caption_style: of the grammar, ``"full"``, ``"terse"`` or ``"numerals"``; ``"dalle"`` needs the last.
        train_images: size of the training set; 300,000 in the paper.
        eval_images: captions and images of the test set, and half as many of seen combinations.
        seed: of the weights, and of what training and sampling draw.
        steps: optimizer steps, at least 1.
        batch_size: pairs per step.
        directions: names out of :data:`DIRECTIONS`, trained in turn; one listed twice has twice the turns.
        updates_per_batch: 1; or the number of directions, which then take one step each on the same pairs, at the
            same rate. ``steps`` and ``warmup_steps`` count single steps all the same, and are multiples of it.
        first_alone: for so many steps only the first direction is trained.
        target_weight: of the loss of the second segment, where the first has weight 1; the sum is divided by
            ``target_weight`` + 1.
        optimizer: ``"adam"``, or ``"muon"`` for the matrices within the blocks (and Adam for the rest).
        learning_rate: Adam's peak rate.
        adam_beta2: decay rate of Adam's second moment, in [0, 1); the first has 0.9.
        muon_learning_rate: Muon's peak rate; without meaning for ``"adam"``.
        warmup_steps: both rates rise linearly for so many steps.
        final_lr_share: ...and then fall on half a cosine to this share of their peak, in [0, 1].
        cosine_cycles: how often they do so, each time from the peak.
        clip_norm: the gradient is scaled down to at most this norm; 0 leaves it alone.
        bf16: compute the transformer in bfloat16 while training.
        log_every: a line in the log after so many steps.
        validate_every: validation numbers in that line after so many steps; a multiple of ``log_every``.
        checkpoint_every: a checkpoint after so many steps.

    Raises:
        ValueError: a setting is out of range.

    Source: Shin et al. 2021, arXiv:2112.00384, section 4, and its published Stage 2: width 256, depth 8, 8 heads,
        both orders for each batch, loss (other + 7 target) / 8, Adam at 1e-3, clip 1. All of it is in the preset
        ``paper``.
    """

    architecture: str = "te_quant"
    width: int = 256
    depth: int = 8
    num_heads: int = 8
    head_width: int | None = None
    dropout: float = 0.0
    caption_style: str = "full"
    train_images: int = 300_000
    eval_images: int = 3_000
    seed: int = 0
    steps: int = 30_000
    batch_size: int = 200
    directions: tuple[str, ...] = ("text_to_image", "image_to_text")
    updates_per_batch: int = 1
    first_alone: int = 0
    target_weight: float = 7.0
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    # 0.999 would forget the first steps too slowly for short runs.
    adam_beta2: float = 0.98
    muon_learning_rate: float = 0.02
    warmup_steps: int = 500
    final_lr_share: float = 0.0
    cosine_cycles: int = 1
    clip_norm: float = 1.0
    bf16: bool = False
    log_every: int = 10
    validate_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "train_images", "steps", "batch_size", "cosine_cycles"):
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
        require_number("adam_beta2", self.adam_beta2, 0.0, 1.0)
        require(self.adam_beta2 < 1, "adam_beta2", "below 1", self.adam_beta2)
        self._check_architecture()
        self._check_updates()
        alone = 0 if len(self.directions) == 1 else self.first_alone
        require(alone < self.steps, "steps", f"above first_alone={alone}, or directions a single one", self.steps)
        require(
            self.validate_every % self.log_every == 0,
            "validate_every",
            f"a multiple of log_every={self.log_every}",
            self.validate_every,
        )

    def _check_architecture(self) -> None:
        require_choice("architecture", self.architecture, ARCHITECTURES)
        require_number("dropout", self.dropout, 0.0, 1.0)
        require(self.dropout < 1, "dropout", "below 1", self.dropout)
        if self.head_width is None:
            divides = self.width % self.num_heads == 0
            require(divides, "num_heads", f"a divisor of width={self.width}", self.num_heads)
        else:
            require_int("head_width", self.head_width, 1)
        if self.architecture == "te_quant":
            require(self.head_width is None, "head_width", "None for architecture='te_quant'", self.head_width)
            return
        require(self.dropout == 0, "dropout", "0 for architecture='dalle'", self.dropout)
        numerals = self.caption_style == "numerals"
        require(numerals, "caption_style", "'numerals' for architecture='dalle'", repr(self.caption_style))

    def _check_updates(self) -> None:
        count, both = self.updates_per_batch, len(self.directions)
        require(count in (1, both), "updates_per_batch", f"1 or {both}, the number of directions", repr(count))
        for name in ("steps", "warmup_steps"):
            whole = getattr(self, name) % count == 0
            require(whole, name, f"a multiple of updates_per_batch={count}", getattr(self, name))
        alone = self.first_alone == 0 or count == 1
        require(alone, "first_alone", f"0 for updates_per_batch={count}", self.first_alone)

    def batch(self, step: int) -> int:
        """Return the number of the batch, counted from 0, that ``step``, counted from 0, trains on."""
        return step // self.updates_per_batch

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak rates that ``step``, counted from 0, takes."""
        return rate_factor(
            self.batch(step),
            steps=self.batch(self.steps),
            warmup_steps=self.batch(self.warmup_steps),
            final_share=self.final_lr_share,
            cycles=self.cosine_cycles,
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


_SMALL = Stage2Settings(
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
)

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
    # The demo, and photographs, which have no captions, compare only tokenizers.
    "quick": None,
    "photos": None,
    "small": _SMALL,
    # 20 epochs of 1,500 batches, each of which trains both directions; the first epoch warms up.
    "paper": Stage2Settings(
        architecture="dalle",
        head_width=64,
        caption_style="numerals",
        steps=60_000,
        directions=("image_to_text", "text_to_image"),
        updates_per_batch=2,
        adam_beta2=0.999,
        warmup_steps=3_000,
        cosine_cycles=6,
    ),
}
"""By preset; ``None`` where it ends with Stage 1."""
STAGE2 |= {"small-fine": STAGE2["small"], "small-alive": None}
# Ten times the steps and twice the parameters, on as many images as the paper's.
_BEST = dataclasses.replace(
    _SMALL, width=192, num_heads=6, train_images=300_000, steps=24_000, warmup_steps=100, validate_every=500
)
STAGE2["small-best"] = _BEST
# Two of three steps train captions.
STAGE2["small-captions"] = dataclasses.replace(
    _BEST, steps=36_000, directions=("text_to_image", "image_to_text", "image_to_text")
)
# The authors' transformer at half the width and depth, on one CPU core; optimizer and directions as in `small`.
STAGE2["narrow"] = Stage2Settings(
    architecture="dalle",
    width=128,
    depth=4,
    num_heads=4,
    head_width=64,
    caption_style="numerals",
    train_images=40_000,
    eval_images=1_500,
    steps=3_200,
    batch_size=32,
    first_alone=1_400,
    optimizer="muon",
    warmup_steps=50,
    bf16=True,
    validate_every=100,
    checkpoint_every=250,
)


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
