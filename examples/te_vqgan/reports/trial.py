"""Tell runs that only try the pipeline out from runs whose numbers mean something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["trial_size"]

# Far below every preset that compares anything: after so few steps the weights are still close to the
# initialization, and over so few images an error or a rate is mostly chance.
_LEAST_STEPS = 100
_LEAST_IMAGES = 100


def trial_size(settings: Iterable[Mapping[str, Any]]) -> str | None:
    """Return how small the trainings are, such as "6 optimizer steps and 8 test images"; ``None`` if large enough.

    Args:
        settings: of each training, of Stage 1 or of Stage 2; ``steps`` and ``eval_images`` are read.

    Returns:
        The sizes of the shortest training and the smallest test set, if one of them is too small.
    """
    every = list(settings)
    steps = min(one["steps"] for one in every)
    images = min(one["eval_images"] for one in every)
    if steps >= _LEAST_STEPS and images >= _LEAST_IMAGES:
        return None
    return f"{_counted(steps, 'optimizer step')} and {_counted(images, 'test image')}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
