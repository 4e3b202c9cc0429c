"""What ``run`` does for a preset: which arms and seeds go through which steps.

The settings of each step stand beside the step: :mod:`~.stage1.presets`, :mod:`~.classifier.trainer`,
:mod:`~.stage2.settings`.
"""

from __future__ import annotations

import dataclasses

from examples.te_vqgan.stage1.presets import ARMS, DEFAULT_ARMS

__all__ = ["PLANS", "Plan"]

# Where the tokenizer chooses a phase image by image, tokens alone do not say where in its cell an image lies.
_WITHOUT_STAGE2 = ("integer_exact",)
_ALIVE = (
    "ema",
    "ema_revival",
    "te_revival",
    "orthogonal",
    "margin",
    "shifted",
    "shift_loss",
    "shift_loss_light",
    "shift_loss_revival",
)
# Trained for accuracy, not compared with the others.
_BEST = ("stride_exact_k80",)
_ALL = tuple(arm for arm in ARMS if arm not in (*_ALIVE, *_BEST))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a preset.

    Args:
        arms: that are trained, in this order within a seed.
        seeds: of all of them.
        without_stage2: arms of which only the tokenizer is compared.
        smaller_images: size of the smaller training set of the paper's Table 2; ``None`` skips it.
        smaller_arms: those that are trained on it too.
        other_data: data set whose tokenizers complete the paper's Table 3; ``None`` skips it.
        other_arms: those that are trained on it.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0,)
    without_stage2: tuple[str, ...] = _WITHOUT_STAGE2
    smaller_images: int | None = None
    smaller_arms: tuple[str, ...] = DEFAULT_ARMS
    other_data: str | None = None
    other_arms: tuple[str, ...] = DEFAULT_ARMS


PLANS: dict[str, Plan] = {
    "smoke": Plan(smaller_images=16),
    "quick": Plan(),
    # A third, as in the paper (100,000 of 300,000).
    "small": Plan(_ALL, (0, 1, 2), smaller_images=13_333, other_data="fashion-mnist"),
    "small-best": Plan(_BEST),
    "small-captions": Plan(_BEST),
    # The phase is one extra token there.
    "small-fine": Plan(without_stage2=()),
    "narrow": Plan(("vqgan", "te_vqgan", "k16"), (0, 1)),
    "small-alive": Plan(_ALIVE, (0, 1, 2)),
    "photos": Plan(("vqgan", "te_vqgan", "stride_exact", "integer_exact")),
    "paper": Plan(_ALL, (0, 1, 2), smaller_images=100_000, other_data="fashion-mnist"),
}
