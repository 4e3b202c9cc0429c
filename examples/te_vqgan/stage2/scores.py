"""Accuracy by digit, as in the paper's Table 1: each digit that should be there counts once, by case.

Shape letters: B images, P = 5 places, L classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.recipes import EMPTY, LAYOUTS, PLACES
from examples.te_vqgan.runs.checks import require

__all__ = ["Scores"]

Scene = tuple[NDArray[Any], NDArray[Any]]
"""Classes and colours, both (B, P) integers, ``EMPTY`` where there is nothing (or nothing was read)."""

_CENTRE = PLACES.index("centre")


class Scores:
    """Counts of what was right, over any number of batches.

    An image of n digits in quadrants is of case ``quadn``, one of a digit at the centre of case ``centre``. Of
    each case are counted the digits that should be there, those read right, those whose colour was read right, and
    those with both right; and images with every digit right. What is read at a place where nothing should be does
    not count, as in the paper.

    Args:
        num_classes: L.

    Source: Shin et al. 2021, sections 4.1 and 4.2.
    """

    def __init__(self, num_classes: int) -> None:
        self._counts = {case: np.zeros(6, np.int64) for case in LAYOUTS}
        self._confusion = np.zeros((num_classes, num_classes + 1), np.int64)

    def update(self, truth: Scene, found: Scene) -> None:
        """Count a batch.

        Args:
            truth: what the images should show.
            found: what was read in them.

        Raises:
            ValueError: the four arrays differ in shape.
        """
        shapes = {array.shape for array in (*truth, *found)}
        require(len(shapes) == 1, "truth and found", "of one shape", sorted(shapes))
        there = truth[0] != EMPTY
        digit, color = there & (truth[0] == found[0]), there & (truth[1] == found[1])
        cases = np.where(there[:, _CENTRE], LAYOUTS.index("centre"), there.sum(1) - 1)
        for number, case in enumerate(LAYOUTS):
            rows = cases == number
            whole = (digit | ~there)[rows].all(1)
            parts = (there, digit, color, digit & color)
            sums = [int(part[rows].sum()) for part in parts]
            self._counts[case] += np.array([*sums, int(whole.sum()), int(rows.sum())])
        # What was not read, EMPTY, goes to the last column.
        np.add.at(self._confusion, (truth[0][there], found[0][there]), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and rates for JSON.

        Returns:
            ``cases``: by name of the case ``digits``, ``digits_right``, ``colors_right``, ``both_right``,
            ``images``, ``images_right`` and the rates ``digit_accuracy``, ``color_accuracy``, ``both_accuracy``
            and ``image_accuracy`` (``None`` for a case without images); ``confusion``: L rows, true classes, of
            L + 1 counts, read classes and "nothing read".
        """
        cases = {}
        for case, counts in self._counts.items():
            digits, right, colors, both, whole, images = (int(count) for count in counts)
            cases[case] = {
                "digits": digits,
                "digits_right": right,
                "colors_right": colors,
                "both_right": both,
                "images": images,
                "images_right": whole,
                "digit_accuracy": _rate(right, digits),
                "color_accuracy": _rate(colors, digits),
                "both_accuracy": _rate(both, digits),
                "image_accuracy": _rate(whole, images),
            }
        return {"cases": cases, "confusion": self._confusion.tolist()}


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None
