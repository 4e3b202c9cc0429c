"""What was fixed before the confirmatory runs: arms, seeds, rules and comparisons.

Source: docs/preregistration.md. Nothing here may change while that page stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "COMPARISONS",
    "FULL",
    "LEAST_CLASSIFIER",
    "RULES",
    "STATEMENTS",
    "TASKS",
    "THIRD",
    "Comparison",
    "Group",
    "planned_groups",
]

FULL, THIRD = 40_000, 13_333
"""Training images of Stage 2."""

LEAST_CLASSIFIER = 0.995
"""Share of the test digits that the classifier must read."""

RULES: Mapping[str, str] = {"paper": "primary", "2": "secondary"}
"""Decoding rules, each with its own correction."""

TASKS: Mapping[str, str] = {"text_to_image": "text to image", "image_to_text": "image to text"}
"""Names of the tasks in results and in text."""

_FIVE, _THREE = (2, 3, 4, 5, 6), (2, 3, 4)


class Group(NamedTuple):
    """Runs that differ only in their seed.

    Attributes:
        arm: the tokenizer.
        images: training images of Stage 2.
    """

    arm: str
    images: int = FULL


class Comparison(NamedTuple):
    """One difference of outcomes that is tested.

    Attributes:
        hypothesis: the name of the one that it belongs to.
        terms: groups with the sign that they have in the difference.
        sign: the stated sign of the difference, 1 or -1.
        task: ``"text_to_image"`` or ``"image_to_text"``.
        seeds: the planned ones.
    """

    hypothesis: str
    terms: Sequence[tuple[int, Group]]
    sign: int
    task: str
    seeds: tuple[int, ...]


def _difference(first: str, second: str) -> Sequence[tuple[int, Group]]:
    return (1, Group(first)), (-1, Group(second))


_LOSS_OF_LOSSES = (
    (1, Group("vqgan")),
    (-1, Group("vqgan", THIRD)),
    (-1, Group("te_vqgan")),
    (1, Group("te_vqgan", THIRD)),
)

STATEMENTS: Mapping[str, str] = {
    "H1": "λ = 10 beats VQGAN",
    "H2": "λ = 10 beats K = 16 without penalty",
    "H3": "stride-exact beats VQGAN and K = 16",
    "H4": "TE-VQGAN and K = 16 lose against VQGAN",
    "H5": "with a third of the images TE-VQGAN loses less than VQGAN",
}

COMPARISONS: tuple[Comparison, ...] = (
    Comparison("H1", _difference("te_vqgan", "vqgan"), 1, "text_to_image", _FIVE),
    Comparison("H2", _difference("te_vqgan", "k16"), 1, "text_to_image", _FIVE),
    Comparison("H3", _difference("stride_exact", "vqgan"), 1, "text_to_image", _THREE),
    Comparison("H3", _difference("stride_exact", "k16"), 1, "text_to_image", _THREE),
    Comparison("H4", _difference("te_vqgan", "vqgan"), -1, "image_to_text", _FIVE),
    Comparison("H4", _difference("k16", "vqgan"), -1, "image_to_text", _FIVE),
    Comparison("H5", _LOSS_OF_LOSSES, 1, "text_to_image", _THREE),
)


def planned_groups() -> dict[Group, tuple[int, ...]]:
    """Return all groups with their seeds, those of the full training set first."""
    seeds: dict[Group, tuple[int, ...]] = dict.fromkeys(
        map(Group, ("vqgan", "te_vqgan", "k16", "stride_exact")), ()
    )
    for comparison in COMPARISONS:
        for _, group in comparison.terms:
            seeds[group] = max(seeds.get(group, ()), comparison.seeds, key=len)
    return seeds
