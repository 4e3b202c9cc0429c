"""What is trained: the settings of Stage 1, the arms that are compared, and named presets.

Everything here is data. An arm is a title and a few changes to the model's settings, a preset a few changes to
the defaults, so a new experiment is one more line. Arms have a codebook: ``family`` trains the other quantizers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from examples.te_vqgan.data.sources import PICTURES, is_pictures
from examples.te_vqgan.runs.checks import require, require_choice, require_int, require_number
from examples.te_vqgan.runs.files import read_json_object
from examples.te_vqgan.stage1.discriminator import DISCRIMINATOR_NORMS
from te_quant import AutoencoderConfig

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "PERCEPTUAL",
    "PRESETS",
    "Arm",
    "Stage1Settings",
    "from_dict",
    "present_form",
    "read_settings",
    "settings_for",
    "to_dict",
]

PERCEPTUAL = ("none", "lpips", "st-lpips")
"""Names of the perceptual distances that a loss may have; "none" is none of them."""

# Weights of losses that want latents nearer to some codes than to others.
_CODE_WEIGHTS = ("round_trip_weight", "shift_weight", "margin_weight")


@dataclasses.dataclass(frozen=True)
class Stage1Settings:
    """Everything that decides the numbers of a Stage 1 run, and nothing else.

    Where a run is computed (device, threads) is not in it: see :class:`~.runs.provenance.Execution`.

    Args:
        model: the autoencoder, codebook included.
        data: name of the digits, as ``prepare`` takes it; ``images:DIGEST`` for pictures of a folder, where DIGEST
            follows from their contents.
        canvas_size: side of the square images, pixels.
        held_out: keep the combinations of :mod:`~.data.heldout` out of training; validate and test only on them.
        train_images: size of the training set; 300,000 in the paper.
        seed: of the initial weights and of the images drawn; equal seeds give two arms the same both.
        steps: optimizer steps, at least 1.
        batch_size: images per step.
        learning_rate: peak rate of Adam for everything but the codebook.
        codebook_lr_factor: the codebook's rate is this many times ``learning_rate``.
        warmup_steps: the rate rises linearly for so many steps.
        final_lr_share: ...and then falls on half a cosine to this share of its peak, in [0, 1].
        clip_norm: the gradient is scaled down to at most this norm; 0 leaves it alone.
        l1_weight: of the mean absolute reconstruction error.
        l2_weight: of the mean squared reconstruction error.
        perceptual: name of the perceptual distance, out of :data:`PERCEPTUAL`.
        perceptual_weight: its weight; above 0 exactly if there is one.
        adversarial_weight: of the patch discriminator's verdict; 0 trains none.
        adversarial_start: the first step with a discriminator.
        adversarial_adaptive: scale that weight by the ratio of the two gradients at the last layer.
        adversarial_delta: added to the denominator of that ratio, above 0.
        discriminator_channels: width of its first layer, a multiple of 4.
        discriminator_layers: how many of its layers halve the sides, at least 1.
        discriminator_norm: ``"group"`` or ``"batch"``.
        round_trip_weight: of the loss that lets pictures be read back, :func:`~.wanted_codes.wanted_code_loss`.
        round_trip_margin: its margin, in [0, 1].
        round_trip_phase_weight: of the loss of the phases, as a share of ``round_trip_weight``; without effect
            unless the encoder chooses phases.
        round_trip_start: both begin after this share of the steps, and grow to their weights over a tenth of all.
        shift_weight: of the loss that keeps tokens where their pixels move, :func:`~.shift_loss.shift_loss`.
        shift_margin: its margin, in [0, 1].
        margin_weight: of the loss that keeps latents away from the boundaries between codes: they want their own.
        shift_images: train on images that are rolled by offsets drawn as those of that loss.
        orthogonal_codes: start from orthogonal codes and make them orthogonal again after every step.
        codebook_init: ``"uniform"`` (the paper's) or ``"kmeans"``, on the latents of the first batches.
        bf16: compute encoder and decoder in bfloat16 (quantizer and losses stay in float32).
        log_every: a line in the log after so many steps.
        validate_every: validation numbers in that line after so many steps; a multiple of ``log_every``.
        checkpoint_every: a checkpoint after so many steps.
        eval_images: images of validation and of test on which the finished model is measured.
        eval_sprites: test digits, or windows of test pictures, for the equivariance report.
        max_reduction: crops come from the picture reduced 1, 2, 4, ... times, up to this; 1 for digits.
    """

    model: AutoencoderConfig
    data: str = "digits"
    canvas_size: int = 32
    held_out: bool = False
    train_images: int = 300_000
    seed: int = 0
    steps: int = 1200
    batch_size: int = 16
    learning_rate: float = 5e-4
    codebook_lr_factor: float = 10.0
    warmup_steps: int = 50
    final_lr_share: float = 0.02
    clip_norm: float = 1.0
    l1_weight: float = 1.0
    l2_weight: float = 4.0
    perceptual: str = "none"
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    adversarial_adaptive: bool = True
    adversarial_delta: float = 1e-6
    discriminator_channels: int = 32
    discriminator_layers: int = 2
    discriminator_norm: str = "group"
    round_trip_weight: float = 0.0
    round_trip_margin: float = 0.05
    round_trip_phase_weight: float = 0.3
    round_trip_start: float = 0.4
    shift_weight: float = 0.0
    shift_margin: float = 0.8
    margin_weight: float = 0.0
    shift_images: bool = False
    orthogonal_codes: bool = False
    codebook_init: str = "uniform"
    bf16: bool = False
    log_every: int = 5
    validate_every: int = 50
    checkpoint_every: int = 100
    eval_images: int = 1024
    eval_sprites: int = 128
    max_reduction: int = 1

    def __post_init__(self) -> None:
        for name in ("canvas_size", "steps", "batch_size", "log_every", "validate_every", "checkpoint_every"):
            require_int(name, getattr(self, name), 1)
        for name in ("train_images", "eval_images", "eval_sprites"):
            require_int(name, getattr(self, name), 1)
        for name in ("seed", "warmup_steps", "adversarial_start"):
            require_int(name, getattr(self, name), 0)
        for name in ("learning_rate", "codebook_lr_factor", "clip_norm", "perceptual_weight"):
            require_number(name, getattr(self, name), 0.0)
        for name in ("l1_weight", "l2_weight", "adversarial_weight", "adversarial_delta"):
            require_number(name, getattr(self, name), 0.0)
        for name in _CODE_WEIGHTS:
            require_number(name, getattr(self, name), 0.0)
        require(self.adversarial_delta > 0, "adversarial_delta", "above 0", self.adversarial_delta)
        require_int("discriminator_channels", self.discriminator_channels, 4)
        require(
            self.discriminator_channels % 4 == 0,
            "discriminator_channels",
            "a multiple of 4",
            self.discriminator_channels,
        )
        require_int("discriminator_layers", self.discriminator_layers, 1)
        require_choice("discriminator_norm", self.discriminator_norm, DISCRIMINATOR_NORMS)
        require_number("final_lr_share", self.final_lr_share, 0.0, 1.0)
        for name in ("round_trip_margin", "round_trip_start", "shift_margin"):
            require_number(name, getattr(self, name), 0.0, 1.0)
        require_number("round_trip_phase_weight", self.round_trip_phase_weight, 0.0)
        require_choice("perceptual", self.perceptual, PERCEPTUAL)
        require_choice("codebook_init", self.codebook_init, ("uniform", "kmeans"))
        require(
            self.l1_weight + self.l2_weight + self.perceptual_weight > 0,
            "l1_weight, l2_weight and perceptual_weight",
            "above 0 in sum",
            "0",
        )
        require(
            (self.perceptual == "none") == (self.perceptual_weight == 0),
            "perceptual_weight",
            "0 without a perceptual distance and above 0 with one",
            f"{self.perceptual_weight} with perceptual={self.perceptual!r}",
        )
        require(
            self.validate_every % self.log_every == 0,
            "validate_every",
            f"a multiple of log_every={self.log_every}",
            self.validate_every,
        )
        for name in _CODE_WEIGHTS:
            euclidean = getattr(self, name) == 0 or self.model.metric == "l2"
            require(euclidean, "model.metric", f"'l2' with a {name}", repr(self.model.metric))
        stride = self.model.stride
        moves = stride > 1 or not (self.shift_weight or self.shift_images)
        require(moves, "model.stride", "at least 2 with shift_weight or shift_images", stride)
        if self.orthogonal_codes:
            K, C, update = self.model.num_codes, self.model.code_dim, self.model.codebook_update
            require(K <= C, "model.num_codes", f"at most code_dim={C} with orthogonal_codes", K)
            require(
                update == "gradient", "model.codebook_update", "'gradient' with orthogonal_codes", repr(update)
            )
            first = self.codebook_init
            require(first == "uniform", "codebook_init", "'uniform' with orthogonal_codes", repr(first))
        divisor = self.model.divisor
        require(self.canvas_size % divisor == 0, "canvas_size", f"a multiple of {divisor}", self.canvas_size)
        self._check_pictures()

    def _check_pictures(self) -> None:
        require_int("max_reduction", self.max_reduction, 1)
        power = self.max_reduction & (self.max_reduction - 1) == 0
        require(power, "max_reduction", "a power of two", self.max_reduction)
        if not is_pictures(self.data):
            one = self.max_reduction == 1
            expected = f"1 for the digits of {self.data!r}, as only pictures (--data images:FOLDER) are reduced"
            require(one, "max_reduction", expected, self.max_reduction)
            return
        expected = "False for pictures, which have no digits to hold out; presets 'photos' and 'quick' fit them"
        require(not self.held_out, "held_out", expected, self.held_out)
        expected = "0 for pictures, where no token keeps its pixels when they move by less than a token"
        require(self.shift_weight == 0, "shift_weight", expected, self.shift_weight)
        quarters = 4 * self.model.stride
        fits = self.canvas_size % quarters == 0
        require(fits, "canvas_size", f"a multiple of {quarters} for pictures", self.canvas_size)


class Arm(NamedTuple):
    """One side of a comparison.

    Attributes:
        title: how figures and tables call it.
        model: changes to the preset's :class:`~te_quant.AutoencoderConfig`.
        settings: changes to the preset's other :class:`Stage1Settings`.
    """

    title: str
    model: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}


_CIRCULAR = {"encoder_padding": "circular", "decoder_padding": "circular"}
_POLYPHASE = {**_CIRCULAR, "downsample": "polyphase", "upsample": "polyphase"}
_EMA = {"downsample": "strided_conv", "codebook_update": "ema", "decay": 0.9}
_REVIVAL = {**_EMA, "revival_threshold": 0.01}

# λ = 10 is the paper's (section 4.1); strided convolution is its "SC" downsampling.
ARMS: dict[str, Arm] = {
    "vqgan": Arm("VQGAN", {"downsample": "strided_conv"}),
    "te_vqgan": Arm("TE-VQGAN (λ = 10)", {"downsample": "strided_conv", "orthogonal_reg": 10.0}),
    # The paper's other downsamplings.
    "cb": Arm("CB", {"downsample": "conv_blur_pool"}),
    "mb": Arm("MB", {"downsample": "max_blur_pool"}),
    "mp": Arm("MP", {"downsample": "max_pool"}),
    # Controls that the paper lacks: is it the penalty, or the smaller number of codes in use?
    "k16": Arm("SC, K = 16", {"downsample": "strided_conv", "num_codes": 16}),
    # Exact by construction: for multiples of the stride, and for every integer shift.
    "stride_exact": Arm("circular (stride-exact)", {"downsample": "strided_conv", **_CIRCULAR}),
    "stride_exact_te": Arm(
        "circular (stride-exact), λ = 10", {"downsample": "strided_conv", **_CIRCULAR, "orthogonal_reg": 10.0}
    ),
    "integer_exact": Arm("polyphase (integer-exact)", _POLYPHASE),
    # Ways to have both, agreement of indices and many codes, with VQGAN's encoder.
    "ema": Arm("EMA", _EMA),
    "ema_revival": Arm("EMA, revival", _REVIVAL),
    "te_revival": Arm("EMA, revival, λ = 10", {**_REVIVAL, "orthogonal_reg": 10.0}),
    "orthogonal": Arm("codes kept orthogonal", {"downsample": "strided_conv"}, {"orthogonal_codes": True}),
    "margin": Arm("EMA, margin", _EMA, {"margin_weight": 0.1}),
    "shifted": Arm("EMA, shifted images", _EMA, {"shift_images": True}),
    "shift_loss": Arm("EMA, shift loss 0.2", _EMA, {"shift_weight": 0.2}),
    "shift_loss_light": Arm("EMA, shift loss 0.1", _EMA, {"shift_weight": 0.1}),
    "shift_loss_revival": Arm("EMA, revival, shift loss 0.2", _REVIVAL, {"shift_weight": 0.2}),
    # Stride-exact with 80 codes, of which the rule of the released code keeps 20.
    "stride_exact_k80": Arm("circular, EMA, revival, K = 80", {**_REVIVAL, **_CIRCULAR, "num_codes": 80}),
}
# What `run` trains if it is not told which.
DEFAULT_ARMS = ("vqgan", "te_vqgan")

# The paper's quantizer, which is not the library's default.
_PAPERS_MODEL = AutoencoderConfig(
    codebook_update="gradient", commitment_weight=0.25, decay=0.99, revival_threshold=0.0
)
# C >= K lets the penalty reach zero; multipliers 1-2-2 give the paper's stride of 4.
_SMALL_MODEL = dataclasses.replace(
    _PAPERS_MODEL,
    base_channels=16,
    channel_multipliers=(1, 2, 2),
    norm_groups=8,
    attention_levels=(2,),
    num_codes=256,
    code_dim=256,
)
_TINY_MODEL = dataclasses.replace(_SMALL_MODEL, base_channels=8, num_codes=16, code_dim=16, attention_levels=())

PRESETS: dict[str, Stage1Settings] = {
    "smoke": Stage1Settings(
        _TINY_MODEL,
        steps=6,
        batch_size=4,
        warmup_steps=2,
        log_every=1,
        validate_every=3,
        checkpoint_every=2,
        eval_images=8,
        eval_sprites=4,
    ),
    "quick": Stage1Settings(_SMALL_MODEL),
    # The whole paper on two CPU cores: half the canvas, an eighth of the width.
    "small": Stage1Settings(
        _SMALL_MODEL,
        data="mnist",
        held_out=True,
        steps=2_400,
        learning_rate=1e-3,
        bf16=True,
        validate_every=100,
        checkpoint_every=250,
        eval_images=1_500,
    ),
    # As its authors ran it: 40 epochs in batches of 192, Adam at 8e-6 times the batch, no schedule, no clipping;
    # the discriminator joins at step 30,001, counted from 0.
    "paper": Stage1Settings(
        _PAPERS_MODEL,
        data="mnist",
        canvas_size=64,
        held_out=True,
        steps=62_500,
        batch_size=192,
        learning_rate=8e-6 * 192,
        codebook_lr_factor=1.0,
        warmup_steps=0,
        final_lr_share=1.0,
        clip_norm=0.0,
        l2_weight=0.0,
        perceptual="lpips",
        perceptual_weight=1.0,
        adversarial_weight=0.8,
        adversarial_start=30_001,
        adversarial_adaptive=True,
        adversarial_delta=1e-4,
        discriminator_channels=64,
        discriminator_layers=3,
        discriminator_norm="batch",
        log_every=50,
        validate_every=500,
        checkpoint_every=500,
        eval_images=3_000,
        eval_sprites=1_000,
    ),
}

# Crops of photographs, at the resolution and with the tokens of the paper.
PRESETS["photos"] = Stage1Settings(
    _SMALL_MODEL,
    data=PICTURES,
    canvas_size=64,
    train_images=100_000,
    steps=1_500,
    batch_size=8,
    learning_rate=1e-3,
    codebook_init="kmeans",
    bf16=True,
    validate_every=250,
    eval_images=256,
    eval_sprites=32,
    max_reduction=4,
)

# The paper's geometry on one CPU core: `small` on the whole canvas. A discriminator would cost more than the
# autoencoder.
PRESETS["narrow"] = dataclasses.replace(
    PRESETS["small"], canvas_size=64, steps=2_000, perceptual="st-lpips", perceptual_weight=1.0
)

# For one arm that is to be as accurate as can be: longer trainings of the tokenizer and of a wider GPT.
PRESETS["small-best"] = dataclasses.replace(PRESETS["small"], steps=3 * PRESETS["small"].steps)
PRESETS["small-captions"] = PRESETS["small-best"]

# A token spans a seventh of a digit's side, as in the paper; in `small` two sevenths.
PRESETS["small-fine"] = dataclasses.replace(
    PRESETS["small"],
    model=dataclasses.replace(_SMALL_MODEL, channel_multipliers=(1, 2), attention_levels=(1,)),
)

# `small` without Stage 2, for the arms that want both, agreement of indices and many codes.
PRESETS["small-alive"] = PRESETS["small"]

# Where a preset is to be what the authors ran, an arm has their layer.
_AUTHORS_LAYERS: dict[str, dict[str, Any]] = {"mb": {"downsample": "unpadded_max_blur_pool"}}
_AUTHORS_PRESETS = ("paper", "narrow")


def settings_for(preset: str, arm: str, changes: Mapping[str, Any] | None = None) -> Stage1Settings:
    """Return the settings of ``arm`` under ``preset``.

    Args:
        preset: a key of :data:`PRESETS`.
        arm: a key of :data:`ARMS`.
        changes: overrides, the same for every arm; ``None`` values are ignored. A perceptual distance without a
            weight has that of the preset, 1 if the preset has none; "none" has weight 0.

    Raises:
        ValueError: a name is unknown or a setting out of range.
    """
    require_choice("preset", preset, tuple(PRESETS))
    require_choice("arm", arm, tuple(ARMS))
    for part, changed in (("model", AutoencoderConfig), ("settings", Stage1Settings)):
        known = tuple(field.name for field in dataclasses.fields(changed))
        for name in getattr(ARMS[arm], part):
            require_choice(f"a name in ARMS[{arm!r}].{part}", name, known)
    # Before the config, which would name every field of the preset's quantizer that another one has not.
    kind = (ARMS[arm].model.get("quantizer") or {}).get("name", "VectorQuantizer")
    expected = "a VectorQuantizer, whose codebook is measured (the command `family` trains the other quantizers)"
    require(kind == "VectorQuantizer", f"ARMS[{arm!r}].model['quantizer']", expected, kind)
    base = PRESETS[preset]
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    if "perceptual" in given:
        weight = 0.0 if given["perceptual"] == "none" else base.perceptual_weight or 1.0
        given = {"perceptual_weight": weight, **given}
    layers = _AUTHORS_LAYERS.get(arm, {}) if preset in _AUTHORS_PRESETS else {}
    model = dataclasses.replace(base.model, **{**ARMS[arm].model, **layers})
    return dataclasses.replace(base, **{"model": model, **ARMS[arm].settings, **given})


def to_dict(settings: Stage1Settings) -> dict[str, Any]:
    """Return ``settings`` in the form in which JSON gives them back."""
    others = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {**others, "model": settings.model.to_dict()}


def present_form(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that an older version wrote as this one writes them.

    What it did not have yet takes its default, under which a training is what it was.
    """
    default = to_dict(Stage1Settings(_PAPERS_MODEL))
    return {**default, **stored, "model": {**default["model"], **stored["model"]}}


def from_dict(plain: Mapping[str, Any]) -> Stage1Settings:
    """Undo :func:`to_dict`, of older versions too."""
    plain = present_form(plain)
    return Stage1Settings(**{**plain, "model": AutoencoderConfig.from_dict(plain["model"])})


def read_settings(path: Path) -> Stage1Settings:
    """Return the settings in a run's ``settings.json``.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    plain = read_json_object(path)
    try:
        return from_dict(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold the settings of a stage1 run, got others ({error}).") from error
