"""Which combinations of class, place and colour are kept out of training, and are all that the test shows.

A model that draws them has put together what it saw only apart: every class is trained in every colour and at
every place, only never in its held-out colour at its held-out place.

Shape letters: P = 5 places, L classes, Q = 4 colours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.recipes import COLORS, PLACES
from examples.te_vqgan.data.sources import SPLITS
from examples.te_vqgan.runs.checks import require, require_choice, require_int

__all__ = ["allowed", "held_out"]

_HELD_OUT = (
    ((0, 1, 2), "upper left", "white"),
    ((3, 4), "upper right", "red"),
    ((5, 6), "lower left", "green"),
    ((7, 8, 9), "lower right", "blue"),
)
_NUM_CLASSES = 10
_CENTRE = PLACES.index("centre")


def held_out(num_classes: int = _NUM_CLASSES) -> NDArray[np.bool_]:
    """The combinations that training never shows.

    Args:
        num_classes: L, 1 to 10; with fewer than ten the last ones are left out.

    Shape:
        result: (L, P, Q) bool; axes as in :func:`~examples.te_vqgan.data.recipes.sample_recipes`.

    Raises:
        ValueError: more than the ten classes of the table.

    Source: Shin et al. 2021, "Data Construction" and Fig. 2b. The table is a picture there; the text and its
        example caption fix the entries of 0, 2 and 9, and the groups are our reading. The centre is ours: it is
        no quadrant, so the table says nothing of the fifth layout, and without an entry of its own every image
        that the test shows there would have been trained on. Each class's colour is held out there too.
    """
    require_int("num_classes", num_classes, 1)
    require(num_classes <= _NUM_CLASSES, "num_classes", f"<= {_NUM_CLASSES}, the table's classes", num_classes)
    table = np.zeros((_NUM_CLASSES, len(PLACES), len(COLORS)), bool)
    for classes, place, color in _HELD_OUT:
        for where in (PLACES.index(place), _CENTRE):
            table[list(classes), where, COLORS.index(color)] = True
    return table[:num_classes]


def allowed(split: str, num_classes: int = _NUM_CLASSES) -> NDArray[np.bool_]:
    """What the images of ``split`` may show: only the held-out combinations, in training all others.

    The paper states the constraint for the training and the test set. Which of them its validation set follows is
    not known; here it is the test set, so that a choice made on it is a choice for the task that is reported.

    Args:
        split: "train", "validation" or "test".
        num_classes: as for :func:`held_out`.

    Shape:
        result: (L, P, Q) bool, for ``QuadrantDataset(allowed=...)``.

    Raises:
        ValueError: an unknown split, or what :func:`held_out` refuses.
    """
    require_choice("split", split, SPLITS)
    table = held_out(num_classes)
    return ~table if split == "train" else table
