"""A rule-based reader of captions, for the rule-based scores of the paper's Table 1.

It knows the words for places, colours and classes and what separates clauses, but no template, so it reads what a
model makes up as it reads what the grammar wrote.

Shape letters: N captions, P = 5 places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.captions import class_spellings, split_words
from examples.te_vqgan.data.recipes import COLORS, EMPTY, PLACES
from examples.te_vqgan.runs.checks import require

__all__ = ["parse"]

_SEPARATORS = frozenset((",", ".", "and"))
_VERTICAL = {"upper": "upper", "top": "upper", "lower": "lower", "bottom": "lower"}
_HORIZONTAL = {"left": "left", "right": "right"}
_CENTRE = frozenset(("centre", "middle"))

_Names = Mapping[tuple[str, ...], int]


def parse(
    captions: Sequence[str], class_names: Sequence[str], *, default_place: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Read what captions say of each place.

    A clause ends at a comma, a full stop or "and". In each clause the first place, the first colour and the first
    class count, in whatever order they come. A clause without a place is about ``default_place``, or not read if
    there is none. One without a colour, or without a class, leaves that one ``EMPTY``, so that a right class still
    counts where no colour is named. If several clauses tell something of a place, the first of them counts.

    Args:
        captions: any texts at all; what cannot be read is ``EMPTY``. Case does not matter.
        class_names: of classes 0, 1, ...; numerals are also read as words.
        default_place: index into ``PLACES``, as :class:`~examples.te_vqgan.data.captions.Grammar` states it.

    Shape:
        captions: N of them. result: classes (N, P) int64 and colours (N, P) int8, columns as in ``PLACES``.

    Raises:
        ValueError: names that :func:`~examples.te_vqgan.data.captions.class_spellings` refuses.
    """
    require(not isinstance(captions, str), "captions", "a sequence of texts", repr(captions))
    names = {
        tuple(spelling.split()): label
        for label, spellings in enumerate(class_spellings(class_names))
        for spelling in spellings
    }
    classes = np.full((len(captions), len(PLACES)), EMPTY, np.int64)
    colors = np.full((len(captions), len(PLACES)), EMPTY, np.int8)
    for row, caption in enumerate(captions):
        for clause in _split_clauses(caption):
            place, color, label = _find_place(clause), _find_color(clause), _find_class(clause, names)
            place = default_place if place is None else place
            if place is not None and classes[row, place] == colors[row, place] == EMPTY:
                classes[row, place], colors[row, place] = label, color
    return classes, colors


def _split_clauses(caption: str) -> list[list[str]]:
    clauses: list[list[str]] = [[]]
    for word in split_words(caption.lower()):
        if word in _SEPARATORS:
            clauses.append([])
        else:
            clauses[-1].append(word)
    return clauses


def _find_place(clause: list[str]) -> int | None:
    vertical = horizontal = None
    for word in clause:
        if word in _CENTRE:
            return PLACES.index("centre")
        vertical = vertical or _VERTICAL.get(word)
        horizontal = horizontal or _HORIZONTAL.get(word)
        if vertical and horizontal:
            return PLACES.index(f"{vertical} {horizontal}")
    return None


def _find_color(clause: list[str]) -> int:
    return next((COLORS.index(word) for word in clause if word in COLORS), EMPTY)


def _find_class(clause: list[str], names: _Names) -> int:
    longest = max(map(len, names))
    for start in range(len(clause)):
        # The longest name first: "boot" must not hide "boot lace".
        for stop in range(start + longest, start, -1):
            label = names.get(tuple(clause[start:stop]))
            if label is not None:
                return label
    return EMPTY
