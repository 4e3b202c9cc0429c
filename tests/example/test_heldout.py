"""What is kept out of training: the table, and that no image breaks it.

Shape letters: L = 10 classes, P = 5 places, Q = 4 colours.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from examples.te_vqgan.data.heldout import allowed, held_out
from examples.te_vqgan.data.quadrants import PAPER_SIZES, QuadrantDataset
from examples.te_vqgan.data.recipes import COLORS, EMPTY, LAYOUTS, PLACES, sample_recipes
from examples.te_vqgan.data.sources import SPLITS, DigitSource, DigitSplit
from tests.helpers import numpy_generator

# Written out once more, class by class, so that a slip in the module's grouping shows.
OWN = {
    0: ("upper left", "white"),
    1: ("upper left", "white"),
    2: ("upper left", "white"),
    3: ("upper right", "red"),
    4: ("upper right", "red"),
    5: ("lower left", "green"),
    6: ("lower left", "green"),
    7: ("lower right", "blue"),
    8: ("lower right", "blue"),
    9: ("lower right", "blue"),
}


def is_held_out(label: int, place: str, color: str) -> bool:
    """The rule in words: the class's own colour, in its own quadrant or at the centre."""
    own_place, own_color = OWN[label]
    return color == own_color and place in (own_place, "centre")


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """Three splits without a picture worth looking at, with uneven labels in random order."""
    rng = numpy_generator()

    def split() -> DigitSplit:
        labels = rng.permutation(np.concatenate([np.arange(10), rng.integers(0, 10, 50), np.full(40, 7)]))
        return DigitSplit(np.zeros((len(labels), 28, 28), np.uint8), labels)

    return DigitSource("blank", tuple("0123456789"), split(), split(), split())


def combinations(dataset: QuadrantDataset) -> set[tuple[int, str, str]]:
    """Every (class, place, colour) that the data set shows, one by one."""
    classes, colors = dataset.classes(dataset.recipes), dataset.recipes.colors
    unique = np.unique(
        np.stack([classes, np.broadcast_to(np.arange(len(PLACES)), classes.shape), colors], -1).reshape(-1, 3),
        axis=0,
    )
    return {(int(label), PLACES[p], COLORS[c]) for label, p, c in unique if label != EMPTY}


def test_the_table_is_the_rule_in_words() -> None:
    """One colour at one quadrant and at the centre for each class; the paper's own examples are in it."""
    table = held_out()
    assert table.shape == (10, len(PLACES), len(COLORS))
    assert table.dtype == bool
    for label, (p, place), (c, color) in product(range(10), enumerate(PLACES), enumerate(COLORS)):
        assert table[label, p, c] == is_held_out(label, place, color)
    assert table.sum() == 20
    for label, place, color in (
        (0, "upper left", "white"),
        (2, "upper left", "white"),
        (9, "lower right", "blue"),
    ):
        assert table[label, PLACES.index(place), COLORS.index(color)]


def test_training_and_test_are_complements() -> None:
    """Training may show what the test may not; validation is as the test."""
    assert (allowed("train") != allowed("test")).all()
    assert (allowed("validation") == allowed("test")).all()
    assert (allowed("test") == held_out()).all()
    assert (allowed("train", 4) == allowed("train")[:4]).all()
    # A new table each time: one who writes into his does not change the others'.
    held_out()[:] = False
    assert held_out().any()


def test_training_shows_every_pair_of_attributes() -> None:
    """Only the triple is new to a model: its class and place, class and colour, place and colour are not."""
    train = allowed("train")
    for axis in range(3):
        assert train.any(axis=axis).all()
    # A negative control: with a class's colour held out everywhere a pair would be missing.
    train[3, :, 1] = False
    assert not train.any(axis=1).all()


def test_no_training_image_shows_a_held_out_combination(source: DigitSource) -> None:
    """In 60,000 images of all five layouts all allowed combinations occur, and no other."""
    dataset = QuadrantDataset(
        source, "train", canvas_size=32, size=60_000, seed=fresh_seed(), layouts=LAYOUTS, allowed=allowed("train")
    )
    every = set(product(range(10), PLACES, COLORS))
    expected = {triple for triple in every if not is_held_out(*triple)}
    assert combinations(dataset) == expected
    assert len(expected) == 180
    # A negative control: without the table the held-out ones are there too.
    free = QuadrantDataset(source, "train", canvas_size=32, size=60_000, seed=fresh_seed(), layouts=LAYOUTS)
    assert combinations(free) == every


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_test_image_consists_of_held_out_combinations(source: DigitSource, split: str) -> None:
    """Each quadrant's digits are its own, and all twenty combinations occur, over many small data sets too."""
    expected = {triple for triple in product(range(10), PLACES, COLORS) if is_held_out(*triple)}
    options = {"canvas_size": 32, "layouts": LAYOUTS}
    dataset = QuadrantDataset(source, split, size=60_000, seed=fresh_seed(), allowed=allowed(split), **options)
    assert combinations(dataset) == expected
    for seed in range(20):
        small = QuadrantDataset(source, split, size=50, seed=seed, allowed=allowed(split), **options)
        assert combinations(small) <= expected
        assert not combinations(QuadrantDataset(source, split, size=50, seed=seed, **options)) <= expected


@pytest.mark.parametrize(("split", "layout"), list(product(SPLITS, LAYOUTS)))
def test_every_layout_has_something_to_draw(split: str, layout: str) -> None:
    """Each place of each layout is filled in each split, from one picture of each class."""
    recipe = sample_recipes(np.arange(10), 500, numpy_generator(), layouts=(layout,), allowed=allowed(split))
    places = {p for p in range(len(PLACES)) if recipe.filled[:, p].any()}
    assert places == ({4} if layout == "centre" else {0, 1, 2, 3})
    assert set(np.unique(recipe.digits)) - {EMPTY} == set(range(10))


def test_test_cases_are_of_about_equal_size(source: DigitSource) -> None:
    """The 3,000 test images fall into five cases of about 600."""
    dataset = QuadrantDataset(
        source, "test", canvas_size=32, seed=fresh_seed(), layouts=LAYOUTS, allowed=allowed("test")
    )
    assert len(dataset) == PAPER_SIZES["test"] == 3_000
    case = np.where(dataset.recipes.filled[:, 4], 5, dataset.recipes.num_digits)
    # The standard deviation of each count is 22.
    assert np.abs(np.bincount(case)[1:] - 600).max() < 6 * 22


def fresh_seed() -> int:
    """Another data set for each test."""
    return int(numpy_generator().integers(2**31))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: held_out(11), "num_classes must be <= 10, the table's classes, got 11"),
        (lambda: allowed("train", 0), "num_classes must be an int >= 1, got 0"),
        (lambda: allowed("eval"), "split must be one of 'train', 'validation', 'test', got 'eval'"),
    ],
    ids=["many", "none", "split"],
)
def test_tables_refuse(call: Callable[[], object], match: str) -> None:
    """Splits and class counts that the table does not know are refused by name."""
    with pytest.raises(ValueError, match=match):
        call()


def test_places_without_a_class_are_refused() -> None:
    """Too few classes leave places of the test without any; the sampling says so."""
    with pytest.raises(ValueError, match="allowed must leave a digit to draw at 'upper right'"):
        sample_recipes(np.arange(3), 5, numpy_generator(), num_classes=3, allowed=allowed("test", 3))
