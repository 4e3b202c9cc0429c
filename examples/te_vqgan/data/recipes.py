"""What an image of the paper shows, as a few small integers: which digit, where, in which colour.

A data set of 300,000 images is 7.5 MB of recipes; pixels exist only for the batch that is being used
(:mod:`~.data.quadrants`), and captions can be written from the same recipes.

Shape letters: N recipes, P = 5 places, L classes, Q = 4 colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.runs.checks import require_int

__all__ = [
    "COLORS",
    "COLOR_RGB",
    "EMPTY",
    "LAYOUTS",
    "PLACES",
    "QUADRANT_LAYOUTS",
    "QuadrantRecipe",
    "sample_recipes",
]

PLACES = ("upper left", "upper right", "lower left", "lower right", "centre")
"""Names of the columns of a recipe: the four quadrants row by row, then the fifth layout's place."""

COLORS = ("white", "red", "green", "blue")
COLOR_RGB: NDArray[np.uint8] = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.uint8)
"""Which channels each of :data:`COLORS` lights, 0 or 1; shape (Q, 3)."""

QUADRANT_LAYOUTS = ("quad1", "quad2", "quad3", "quad4")
"""The paper's cases: one to four digits in distinct quadrants."""

LAYOUTS = (*QUADRANT_LAYOUTS, "centre")
"""All cases; the paper's code adds one digit at the centre, a quarter of the side from each border."""

EMPTY = -1
"""The entry of a recipe where nothing is drawn."""

_QUADRANTS = 4


@dataclass(frozen=True, eq=False)
class QuadrantRecipe:
    """The content of N images.

    Args:
        digits: index of the digit within its split's images, or :data:`EMPTY`.
        colors: index into :data:`COLORS`, or :data:`EMPTY`, empty in the same places as ``digits``.

    Shape:
        digits, colors: (N, P), integers; columns as in :data:`PLACES`.

    Raises:
        ValueError: shapes differ, an entry is out of range, one is empty where the other is not, or an
            image has a digit at the centre and in a quadrant (they would overlap).

    ``recipe[a:b]``, ``recipe[array]`` give recipes, never views of a single row.
    """

    digits: NDArray[np.int32]
    colors: NDArray[np.int8]

    def __post_init__(self) -> None:
        shape = f"digits {self.digits.shape}, colors {self.colors.shape}"
        if self.digits.ndim != 2 or self.digits.shape[1] != len(PLACES) or self.colors.shape != self.digits.shape:
            raise ValueError(f"digits and colors must both be (N, {len(PLACES)}), got {shape}.")
        for name in ("digits", "colors"):
            if getattr(self, name).dtype.kind != "i":
                raise TypeError(f"{name} must be signed integers, got {getattr(self, name).dtype}.")
        if ((self.digits < 0) != (self.colors < 0)).any():
            raise ValueError("digits and colors must be empty in the same places, got a digit without colour.")
        if min(self.digits.min(initial=0), self.colors.min(initial=0)) < EMPTY:
            raise ValueError(f"digits and colors must be >= {EMPTY}, got a smaller entry.")
        if self.colors.max(initial=0) >= len(COLORS):
            raise ValueError(f"colors must be < {len(COLORS)}, got {self.colors.max()}.")
        if (self.filled[:, _QUADRANTS] & self.filled[:, :_QUADRANTS].any(axis=1)).any():
            raise ValueError("an image must have its digits in quadrants or at the centre, got both.")

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[Any]) -> QuadrantRecipe:
        if isinstance(rows, int | np.integer):
            raise TypeError(f"rows must be a slice or an array, got {rows!r}; recipe[i : i + 1] is one image.")
        return QuadrantRecipe(self.digits[rows], self.colors[rows])

    @property
    def filled(self) -> NDArray[np.bool_]:
        """Where there is a digit; (N, P)."""
        return self.digits >= 0

    @property
    def num_digits(self) -> NDArray[np.int64]:
        """Digits in each image; (N,)."""
        counts: NDArray[np.int64] = self.filled.sum(axis=1)
        return counts


def sample_recipes(
    labels: NDArray[Any],
    count: int,
    rng: np.random.Generator,
    *,
    num_classes: int = 10,
    layouts: Sequence[str] = QUADRANT_LAYOUTS,
    allowed: NDArray[np.bool_] | None = None,
) -> QuadrantRecipe:
    """Draw recipes: the layout uniformly, then its quadrants, then class and colour of each, then the digit.

    Args:
        labels: class of each digit that may be drawn.
        count: N, at least 0.
        rng: the only source of chance; the same state gives the same recipes.
        num_classes: L.
        layouts: names out of :data:`LAYOUTS`, each as likely as the others.
        allowed: which (class, place, colour) may occur, to hold combinations out; everything by default.
            At each place the allowed (class, colour) pairs are equally likely.

    Shape:
        labels: (M,) integers in [0, L). allowed: (L, P, Q) bool.

    Raises:
        ValueError: an unknown layout, a wrong shape, a label out of range, or a place that a layout uses
            while no allowed pair has a digit to draw.

    Source: Shin et al. 2021, "Data Construction". The paper leaves open how numbers and classes are drawn;
        its test cases are of about equal size, so the layout is uniform.
    """
    _check_layouts(layouts)
    require_int("count", count, 0)
    table = np.ones((num_classes, len(PLACES), len(COLORS)), bool) if allowed is None else np.asarray(allowed)
    if table.shape != (num_classes, len(PLACES), len(COLORS)) or table.dtype != bool:
        expected = (num_classes, len(PLACES), len(COLORS))
        raise ValueError(f"allowed must be bool of shape {expected}, got {table.dtype} of {table.shape}.")
    if labels.ndim != 1 or labels.min(initial=0) < 0 or labels.max(initial=0) >= num_classes:
        raise ValueError(f"labels must be (M,) in [0, {num_classes}), got shape {labels.shape}.")

    filled = _sample_places(count, rng, layouts)
    by_class = np.argsort(labels, kind="stable")
    per_class = np.bincount(labels, minlength=num_classes)
    starts = np.cumsum(per_class) - per_class
    digits = np.full((count, len(PLACES)), EMPTY, np.int32)
    colors = np.full((count, len(PLACES)), EMPTY, np.int8)
    for place in _places_of(layouts):
        pairs = np.argwhere(table[:, place] & (per_class > 0)[:, None])
        if len(pairs) == 0:
            raise ValueError(f"allowed must leave a digit to draw at {PLACES[place]!r}, got none.")
        rows = np.flatnonzero(filled[:, place])
        classes, hues = pairs[rng.integers(len(pairs), size=len(rows))].T
        digits[rows, place] = by_class[starts[classes] + rng.integers(per_class[classes])]
        colors[rows, place] = hues
    return QuadrantRecipe(digits, colors)


def _sample_places(count: int, rng: np.random.Generator, layouts: Sequence[str]) -> NDArray[np.bool_]:
    drawn = np.array([LAYOUTS.index(name) for name in layouts])[rng.integers(len(layouts), size=count)]
    order = rng.permuted(np.tile(np.arange(_QUADRANTS), (count, 1)), axis=1)
    centre = drawn == _QUADRANTS
    # LAYOUTS lists the cases by number of digits, so that "quadN" is index N - 1.
    quadrants = (order <= drawn[:, None]) & ~centre[:, None]
    return np.concatenate([quadrants, centre[:, None]], axis=1)


def _places_of(layouts: Sequence[str]) -> list[int]:
    quadrants = list(range(_QUADRANTS)) if set(layouts) & set(QUADRANT_LAYOUTS) else []
    return quadrants + ([_QUADRANTS] if "centre" in layouts else [])


def _check_layouts(layouts: Sequence[str]) -> None:
    known = all(name in LAYOUTS for name in layouts)
    if isinstance(layouts, str) or not layouts or not known or len(set(layouts)) < len(layouts):
        names = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"layouts must be one or more distinct names out of {names}, got {layouts!r}.")
