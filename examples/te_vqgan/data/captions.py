"""Captions of the quadrant images: one clause for each digit, in the syntactic variety of the paper's examples.

All that a grammar can say about one digit is listed when it is made. Writing is then a choice from lists, and
the vocabulary and the longest caption are facts, not estimates.

Shape letters: N captions, P = 5 places, L classes, Q = 4 colours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.recipes import COLORS, EMPTY, PLACES
from examples.te_vqgan.runs.checks import require, require_choice

__all__ = ["STYLES", "Grammar", "class_spellings", "split_words"]

STYLES = ("full", "terse", "numerals")
"""The paper's kind of sentences; a telegram of at most five tokens per digit for small budgets; and sentences with
only the words of the authors' tokenizer: digits as numerals, and no word for the centre."""

_TEMPLATES = {
    "full": (
        "the {place} is {color} {name}",
        "the {color} {name} is {at} the {place}",
        "this {color} {name} is {at} the {place}",
        "this is the {color} {name} {at} the {place}",
        "the {color} {noun} {name} is {at} the {place}",
        "the {noun} {at} the {place} is {color} {name}",
        "the {noun} {name} {at} the {place} is {color}",
        "{at} the {place} is the {color} {noun} {name}",
    ),
    "terse": (
        "{color} {name} {place}",
        "{name} {color} {place}",
        "{place} {color} {name}",
        "{place} {name} {color}",
    ),
}
_TEMPLATES["numerals"] = _TEMPLATES["full"]
# A clause that names no place is about the centre.
_CENTRE_TEMPLATES = (
    "this is {color} {name}",
    "this is the {color} {name}",
    "this is the {color} {noun} {name}",
    "this {color} {noun} is {name}",
    "this {noun} is {color} {name}",
    "the {noun} is {color} {name}",
    "the {noun} {name} is {color}",
    "this {noun} {name} is {color}",
)
# The authors' parser separates clauses at commas only.
_JOINERS = {"full": (", ", " and ", ", and "), "terse": (", ",), "numerals": (", ", ", and ")}
_ENDINGS = {"full": ("", "."), "terse": ("",), "numerals": ("", ".")}
_PLACE_NAMES = (
    ("upper left", "top left"),
    ("upper right", "top right"),
    ("lower left", "bottom left"),
    ("lower right", "bottom right"),
    ("centre", "middle"),
)
_PREPOSITIONS = (("on", "to"),) * 4 + (("in", "at"),)
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBERS = dict(zip("0123456789", _NUMBER_WORDS, strict=True))
_NOUNS = ("number", "item")
_CENTRE = PLACES.index("centre")
_NAME = re.compile(r"[a-z0-9-]+( [a-z0-9-]+)*")
_WORD = re.compile(r"[^\s,.]+|[,.]")
_OWN_TEXTS = [
    *(re.sub(r"{\w+}", "", template) for templates in _TEMPLATES.values() for template in templates),
    *(text for texts in (*_JOINERS.values(), *_PLACE_NAMES, *_PREPOSITIONS, COLORS, _NOUNS) for text in texts),
]
_OWN_WORDS = frozenset(_WORD.findall(" ".join(_OWN_TEXTS)))
# A four-digit caption has about 2**34 forms, so that taking them by remainder from 63 bits is uniform to 2**-28.
_KEYS = 2**63


def split_words(text: str) -> list[str]:
    """The words of ``text``; commas and full stops are words of their own."""
    return _WORD.findall(text)


def class_spellings(class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The ways to write each class: its name and, where that is a numeral, the number word.

    Raises:
        ValueError: no name, or one that is not lower-case words, that contains a word of the captions, or that is
            there twice; a reader could not tell what such a caption says.
    """
    require(
        not isinstance(class_names, str) and len(class_names) > 0,
        "class_names",
        "one or more names",
        repr(class_names),
    )
    for name in class_names:
        require(_NAME.fullmatch(name) is not None, "class_names", "lower-case words", repr(name))
        taken = sorted(_OWN_WORDS.intersection(name.split()))
        require(not taken, "class_names", "free of the captions' own words", repr(name))
    result = tuple((name, _NUMBERS[name]) if name in _NUMBERS else (name,) for name in class_names)
    every = [spelling for spellings in result for spelling in spellings]
    require(len(set(every)) == len(every), "class_names", "distinct in all spellings", tuple(class_names))
    return result


class Grammar:
    """Writes captions.

    Each digit's clause draws its template, the word for its place, its preposition and its spelling; the caption
    draws the order of its clauses, what joins each two, and whether a full stop ends it. All are independent and
    uniform.

    Args:
        class_names: of classes 0, 1, ...; numerals are also written as words, except in the style ``numerals``.
        style: one of :data:`STYLES`.

    Attributes:
        default_place: index into ``PLACES`` of the place that a clause without a place is about, or ``None``.

    Raises:
        ValueError: an unknown style, or names that :func:`class_spellings` refuses.

    Source: Shin et al. 2021, Section 4, of which the templates 1 and 2 are the examples. The other templates
        are ours, over about the same words. The style ``numerals`` has only words of the tokenizer in the authors'
        Stage 2.
    """

    class_names: tuple[str, ...]
    style: str
    default_place: int | None
    joiners: tuple[str, ...]
    endings: tuple[str, ...]

    def __init__(self, class_names: Sequence[str], style: str = "full") -> None:
        require_choice("style", style, STYLES)
        spellings = class_spellings(class_names)
        self.class_names, self.style = tuple(class_names), style
        self.default_place = _CENTRE if style == "numerals" else None
        if style == "numerals":
            spellings = tuple(names[:1] for names in spellings)
        self.joiners, self.endings = _JOINERS[style], _ENDINGS[style]
        noun = _NOUNS[0] if set(class_names) <= _NUMBERS.keys() else _NOUNS[1]
        self._clauses = [
            [[self._all_clauses(names, place, color, noun) for color in COLORS] for place in range(len(PLACES))]
            for names in spellings
        ]

    @property
    def templates(self) -> tuple[str, ...]:
        """The forms of a clause that names a place."""
        return _TEMPLATES[self.style]

    @property
    def words(self) -> tuple[str, ...]:
        """Every word that a caption can contain, in alphabetical order."""
        texts = [text for by_place in self._clauses for by_color in by_place for c in by_color for text in c]
        return tuple(sorted(set(split_words(" ".join([*texts, *self.joiners, *self.endings])))))

    @property
    def max_words(self) -> int:
        """Words of the longest caption: it has a digit in every quadrant, for the centre allows only one."""

        def longest(texts: Sequence[str]) -> int:
            return max(len(split_words(text)) for text in texts)

        clauses = [
            max(longest(texts) for by_place in self._clauses for texts in by_place[place])
            for place in range(len(PLACES))
        ]
        quadrants = sum(clauses[:_CENTRE]) + (_CENTRE - 1) * longest(self.joiners)
        return max(quadrants, clauses[_CENTRE]) + longest(self.endings)

    def clauses(self, label: int, place: int, color: int) -> tuple[str, ...]:
        """All clauses for one digit, equally likely: as many for each template, in the order of ``templates``.

        Where a template leaves out a word that has synonyms, its clauses occur more than once.
        """
        return self._clauses[label][place][color]

    def write(self, classes: NDArray[Any], colors: NDArray[Any], rng: np.random.Generator) -> list[str]:
        """Write a caption for each scene.

        Args:
            classes: in [0, L), or ``EMPTY``; as from ``QuadrantDataset.classes``.
            colors: index into ``COLORS``, empty in the same places; as in a recipe.
            rng: the only source of chance; one integer for each caption.

        Shape:
            classes, colors: (N, P) integers. result: N captions, "" for a scene without digits.

        Raises:
            ValueError: what :meth:`write_numbered` refuses.
        """
        return self.write_numbered(classes, colors, rng.integers(_KEYS, size=len(classes)))

    def write_numbered(self, classes: NDArray[Any], colors: NDArray[Any], numbers: NDArray[np.int64]) -> list[str]:
        """Write for each scene the caption with the given number, without chance.

        Args:
            classes: as for :meth:`write`.
            colors: as for :meth:`write`.
            numbers: >= 0; uniform ones below 2**63 give each possible caption equally often.

        Shape:
            classes, colors: (N, P) integers. numbers: (N,). result: N captions.

        Raises:
            ValueError: wrong shapes, an entry out of range, a class without colour or the reverse, or digits at
                the centre and in quadrants at once.
        """
        self._check(classes, colors, numbers)
        scenes = zip(classes.tolist(), colors.tolist(), numbers.tolist(), strict=True)
        return [self._caption(*scene) for scene in scenes]

    def _caption(self, classes: list[int], colors: list[int], number: int) -> str:
        clauses = []
        for place, (label, color) in enumerate(zip(classes, colors, strict=True)):
            if label != EMPTY:
                choices = self._clauses[label][place][color]
                number, choice = divmod(number, len(choices))
                clauses.append(choices[choice])
        if not clauses:
            return ""
        for last in range(len(clauses) - 1, 0, -1):  # Fisher and Yates's shuffle
            number, other = divmod(number, last + 1)
            clauses[last], clauses[other] = clauses[other], clauses[last]
        caption = clauses[0]
        for clause in clauses[1:]:
            number, choice = divmod(number, len(self.joiners))
            caption += self.joiners[choice] + clause
        return caption + self.endings[number % len(self.endings)]

    def _all_clauses(self, names: tuple[str, ...], place: int, color: str, noun: str) -> tuple[str, ...]:
        if place == self.default_place:
            return tuple(
                template.format(name=name, color=color, noun=noun)
                for template, name in product(_CENTRE_TEMPLATES, names)
            )
        slots = product(self.templates, _PLACE_NAMES[place], _PREPOSITIONS[place], names)
        return tuple(
            template.format(place=where, at=at, name=name, color=color, noun=noun)
            for template, where, at, name in slots
        )

    def _check(self, classes: NDArray[Any], colors: NDArray[Any], numbers: NDArray[np.int64]) -> None:
        shapes = f"{classes.shape} and {colors.shape}"
        same = classes.ndim == 2 and classes.shape[1] == len(PLACES) and colors.shape == classes.shape
        require(same, "classes and colors", f"both (N, {len(PLACES)})", shapes)
        require(numbers.shape == classes.shape[:1], "numbers", f"of shape {classes.shape[:1]}", numbers.shape)
        require(numbers.dtype.kind == "i", "numbers", "signed integers", numbers.dtype)
        require(numbers.min(initial=0) >= 0, "numbers", ">= 0", numbers.min(initial=0))
        for name, values, bound in (("classes", classes, len(self.class_names)), ("colors", colors, len(COLORS))):
            require(values.dtype.kind == "i", name, "signed integers", values.dtype)
            low, high = values.min(initial=0), values.max(initial=0)
            require(low >= EMPTY and high < bound, name, f"in [{EMPTY}, {bound})", f"{low} to {high}")
        filled = classes != EMPTY
        alike = bool((filled == (colors != EMPTY)).all())
        require(alike, "classes and colors", "empty in the same places", "one without the other")
        both = bool((filled[:, _CENTRE] & filled[:, :_CENTRE].any(axis=1)).any())
        require(not both, "classes", "in quadrants or at the centre", "both in one scene")
