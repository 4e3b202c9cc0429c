"""The quadrant images of the example: recipes, rendering, batches.

Shape letters: N recipes, P = 5 places, S canvas side.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.te_vqgan.data.quadrants import PAPER_SIZES, QuadrantDataset, QuadrantImages, resize_digits
from examples.te_vqgan.data.recipes import (
    COLORS,
    EMPTY,
    LAYOUTS,
    PLACES,
    QUADRANT_LAYOUTS,
    QuadrantRecipe,
    sample_recipes,
)
from examples.te_vqgan.data.sources import SPLITS, DigitSource, DigitSplit
from tests.helpers import numpy_generator

SEEDS = st.integers(0, 2**63)
CHANNELS = {"white": (0, 1, 2), "red": (0,), "green": (1,), "blue": (2,)}


def random_split(rng: np.random.Generator, count: int, side: int = 28) -> DigitSplit:
    """Noise instead of digits, every class present."""
    labels = np.concatenate([np.arange(10), rng.integers(0, 10, max(0, count - 10))])
    return DigitSplit(rng.integers(0, 256, (len(labels), side, side), np.uint8), labels.astype(np.int64))


@pytest.fixture
def source() -> DigitSource:
    """Three splits of fresh noise, 20 pictures each."""
    rng = numpy_generator()
    return DigitSource("noise", tuple("0123456789"), *(random_split(rng, 20) for _ in SPLITS))


def slow_resize(picture: np.ndarray, side: int) -> list[list[int]]:
    """One picture by explicit loops over exact fractions: box mean down, bilinear up, rounding half up."""
    n = len(picture)
    f = n // side
    result = []
    for i, j in product(range(side), repeat=2):
        total = Fraction(0)
        if side <= n:
            for a, b in product(range(f), repeat=2):
                total += Fraction(int(picture[i * f + a][j * f + b]), f * f)
        else:
            places = [Fraction((2 * k + 1) * n, 2 * side) - Fraction(1, 2) for k in (i, j)]
            y, x = (min(max(place, Fraction(0)), Fraction(n - 1)) for place in places)
            for a, b in product((a for a in range(n) if abs(y - a) < 1), (b for b in range(n) if abs(x - b) < 1)):
                total += (1 - abs(y - a)) * (1 - abs(x - b)) * int(picture[a][b])
        result.append(int(total + Fraction(1, 2)))
    return [result[row * side : (row + 1) * side] for row in range(side)]


def slow_render(cells: np.ndarray, recipe: QuadrantRecipe, side: int) -> np.ndarray:
    """The canvas pixel by pixel in float64, from padded cells."""
    c = side // 2
    corners = {
        "upper left": (0, 0),
        "upper right": (0, c),
        "lower left": (c, 0),
        "lower right": (c, c),
        "centre": (side // 4, side // 4),
    }
    images = np.full((len(recipe), 3, side, side), -1.0)
    for image in range(len(recipe)):
        for place, name in enumerate(PLACES):
            if recipe.digits[image, place] == EMPTY:
                continue
            top, left = corners[name]
            cell = cells[recipe.digits[image, place]]
            for channel in CHANNELS[COLORS[recipe.colors[image, place]]]:
                for y, x in product(range(c), repeat=2):
                    images[image, channel, top + y, left + x] = -1 + 2 * int(cell[y][x]) / 255
    return images


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal shares."""
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


# recipes ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, count=st.integers(0, 60), layouts=st.sets(st.sampled_from(LAYOUTS), min_size=1))
def test_recipes_are_what_the_layouts_say(seed: int, count: int, layouts: set[str]) -> None:
    """Each image has the digits of one of its layouts, in distinct quadrants or at the centre, never both."""
    labels = np.random.default_rng(seed).integers(0, 10, 30)
    recipe = sample_recipes(labels, count, np.random.default_rng(seed), layouts=sorted(layouts))
    assert len(recipe) == count
    assert recipe.digits.shape == recipe.colors.shape == (count, len(PLACES))
    for digits, colors in zip(recipe.digits, recipe.colors, strict=True):
        filled = {PLACES[p] for p in range(len(PLACES)) if digits[p] != EMPTY}
        name = "centre" if filled == {"centre"} else f"quad{len(filled)}"
        assert name in layouts
        assert "centre" not in filled or len(filled) == 1
        assert all((0 <= d < 30 and 0 <= c < 4) or (d == c == EMPTY) for d, c in zip(digits, colors, strict=True))


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, start=st.integers(0, 12), stop=st.integers(0, 12))
def test_slicing_recipes_slices_their_images(seed: int, start: int, stop: int) -> None:
    """Rendering a slice gives the slice of the rendering."""
    rng = np.random.default_rng(seed)
    split = random_split(rng, 10)
    images = QuadrantImages(split.images, 32)
    recipe = sample_recipes(split.labels, 12, rng, layouts=LAYOUTS)
    assert torch.equal(images.render(recipe[start:stop]), images.render(recipe)[start:stop])


def test_equal_generators_give_equal_recipes() -> None:
    """The generator is the only source of chance."""
    labels = np.arange(10)
    one, two, other = (sample_recipes(labels, 50, np.random.default_rng(s)) for s in (7, 7, 8))
    assert (one.digits == two.digits).all()
    assert (one.colors == two.colors).all()
    assert (one.digits != other.digits).any()


def test_draws_are_uniform() -> None:
    """Layouts, places of a single digit, classes and colours are equally likely, even with uneven labels."""
    labels = np.repeat(np.arange(10), [1, 2, 3, 4, 5, 6, 7, 8, 9, 55])
    recipe = sample_recipes(labels, 20_000, numpy_generator(), layouts=LAYOUTS)
    filled = recipe.filled
    layout = np.where(filled[:, 4], 5, recipe.num_digits)
    single = filled[layout == 1, :4].argmax(axis=1)
    pair_codes = filled[layout == 2, :4] @ np.array([1, 2, 4, 8])
    pairs = np.unique(pair_codes, return_counts=True)[1]
    assert len(pairs) == 6
    # The 1 - 1e-7 quantiles for 9 degrees of freedom or fewer lie below 50.
    assert chi_square(np.bincount(layout)[1:]) < 50
    assert chi_square(np.bincount(single, minlength=4)) < 50
    assert chi_square(pairs) < 50
    assert chi_square(np.bincount(labels[recipe.digits[filled]])) < 50
    assert chi_square(np.bincount(recipe.colors[filled])) < 50
    # A negative control: the digits themselves are uniform within a class only.
    assert chi_square(np.bincount(recipe.digits[filled], minlength=100)) > 1_000


def test_held_out_combinations_never_occur() -> None:
    """With a table of allowed combinations exactly these occur, all of them, and its complement never."""
    rng = numpy_generator()
    labels = rng.integers(0, 10, 200)
    held_out = np.zeros((10, len(PLACES), len(COLORS)), bool)
    for classes, place in (((0, 1, 2), 0), ((3, 4), 1), ((5, 6), 2), ((7, 8, 9), 3)):
        held_out[list(classes), place, place] = True

    def combinations(allowed: np.ndarray) -> np.ndarray:
        recipe = sample_recipes(labels, 5_000, rng, allowed=allowed)
        seen = np.zeros_like(held_out)
        image, place = np.nonzero(recipe.filled)
        seen[labels[recipe.digits[image, place]], place, recipe.colors[image, place]] = True
        return seen

    quadrants = np.arange(len(PLACES))[None, :, None] < 4
    assert (combinations(held_out) == held_out).all()
    assert (combinations(~held_out) == (~held_out & quadrants)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layouts": ("quad5",)}, "layouts must be one or more distinct names"),
        ({"layouts": ()}, "layouts must be one or more distinct names"),
        ({"layouts": "quad1"}, "layouts must be one or more distinct names"),
        ({"layouts": ("quad1", "quad1")}, "layouts must be one or more distinct names"),
        ({"count": -1}, "count must be an int >= 0, got -1"),
        ({"count": True}, "count must be an int >= 0, got True"),
        ({"labels": np.array([[1]])}, r"labels must be \(M,\) in \[0, 10\)"),
        ({"labels": np.array([10])}, r"labels must be \(M,\) in \[0, 10\)"),
        ({"labels": np.array([-1])}, r"labels must be \(M,\) in \[0, 10\)"),
        ({"allowed": np.ones((10, 4, 4), bool)}, r"allowed must be bool of shape \(10, 5, 4\)"),
        ({"allowed": np.ones((10, 5, 4))}, r"allowed must be bool .* got float64"),
        ({"allowed": np.zeros((10, 5, 4), bool)}, "allowed must leave a digit to draw at 'upper left'"),
        ({"labels": np.array([], np.int64)}, "allowed must leave a digit to draw at 'upper left'"),
    ],
)
def test_sampling_refuses(options: dict, message: str) -> None:
    """Every argument out of range is refused by name."""
    arguments = {"labels": np.arange(10), "count": 3, "rng": numpy_generator(), **options}
    with pytest.raises(ValueError, match=message):
        sample_recipes(**arguments)


@pytest.mark.parametrize(
    ("digits", "colors", "message"),
    [
        ([[1, 1, 1, 1]], [[1, 1, 1, 1]], r"must both be \(N, 5\)"),
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], r"must both be \(N, 5\)"),
        ([[1, -1, -1, -1, -1]], [[1, 1, -1, -1, -1]], "empty in the same places"),
        ([[1, -2, -1, -1, -1]], [[1, -1, -1, -1, -1]], "must be >= -1"),
        ([[1, -1, -1, -1, -1]], [[4, -1, -1, -1, -1]], "colors must be < 4, got 4"),
        ([[1, -1, -1, -1, 1]], [[1, -1, -1, -1, 1]], "in quadrants or at the centre, got both"),
    ],
)
def test_recipes_refuse_what_cannot_be_drawn(digits: list, colors: list, message: str) -> None:
    """A recipe that exists can be drawn."""
    with pytest.raises(ValueError, match=message):
        QuadrantRecipe(np.array(digits, np.int32), np.array(colors, np.int8))


def test_recipes_refuse_unsigned_integers() -> None:
    """They have no place for empty."""
    recipe = sample_recipes(np.arange(10), 2, numpy_generator())
    with pytest.raises(TypeError, match="colors must be signed integers, got uint8"):
        QuadrantRecipe(recipe.digits, recipe.colors.astype(np.uint8))


def test_one_row_is_no_recipe() -> None:
    """A slice of one is."""
    recipe = sample_recipes(np.arange(10), 2, numpy_generator())
    with pytest.raises(TypeError, match="rows must be a slice or an array, got 0"):
        recipe[0]


# rendering -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source_side", "canvas"), [(28, 64), (28, 32), (8, 32), (8, 64)])
def test_rendering_equals_the_slow_one(source_side: int, canvas: int) -> None:
    """Every pixel equals the one of explicit loops over exact fractions, rounded once to float32."""
    rng = numpy_generator()
    split = random_split(rng, 10, source_side)
    recipe = sample_recipes(split.labels, 12, rng, layouts=LAYOUTS)
    assert (recipe.num_digits > 0).all()
    content = np.array([slow_resize(picture, canvas * 7 // 16) for picture in split.images])
    margin = canvas // 32
    cells = np.zeros((len(content), canvas // 2, canvas // 2), int)
    cells[:, margin:-margin, margin:-margin] = content
    expected = slow_render(cells, recipe, canvas)

    images = QuadrantImages(split.images, canvas)
    actual = images.render(recipe)
    assert actual.dtype == torch.float32
    assert actual.shape == (12, 3, canvas, canvas)
    # Pixels are 8-bit intensities: half a grey step would be 4e-3, and 0 and 255 must be hit exactly.
    assert (images.cells == cells).all()
    assert np.abs(actual.numpy() - expected).max() < 1.2e-7
    assert ((actual.numpy() == -1) == (expected == -1)).all()
    # A negative control: quadrants exchanged, or a red digit drawn blue, is seen.
    moved = QuadrantRecipe(recipe.digits[:, [1, 0, 2, 3, 4]], recipe.colors[:, [1, 0, 2, 3, 4]])
    assert np.abs(images.render(moved).numpy() - expected).max() > 0.1


def test_full_ink_is_one_and_ground_minus_one() -> None:
    """The ends of the range are exact, and the padding is ground."""
    images = QuadrantImages(np.full((1, 28, 28), 255, np.uint8), 64)
    recipe = QuadrantRecipe(np.array([[0, -1, -1, -1, -1]], np.int32), np.array([[1, -1, -1, -1, -1]], np.int8))
    (image,) = images.render(recipe)
    assert image.unique().tolist() == [-1.0, 1.0]
    assert (image[0] == 1).sum() == 28 * 28
    assert (image[0, 2:30, 2:30] == 1).all()
    assert (image[1:] == -1).all()


def test_no_image_is_an_empty_batch() -> None:
    """A recipe of no image gives a tensor of no image."""
    images = QuadrantImages(np.zeros((1, 28, 28), np.uint8), 32)
    nothing = QuadrantRecipe(np.zeros((0, 5), np.int32), np.zeros((0, 5), np.int8))
    assert images.render(nothing).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("digits", "canvas", "message"),
    [
        (np.zeros((1, 28, 28), np.uint8), 48, "canvas_size must be a multiple of 32, got 48"),
        (np.zeros((1, 28, 28), np.uint8), 0, "canvas_size must be an int >= 32, got 0"),
        (np.zeros((1, 28, 28), np.uint8), 64.0, "canvas_size must be an int >= 32, got 64.0"),
        (np.zeros((1, 30, 30), np.uint8), 64, "a side that 28 divides or exceeds, got 30"),
        (np.zeros((1, 28, 27), np.uint8), 64, r"digits must be \(N, n, n\) uint8"),
        (np.zeros((28, 28), np.uint8), 64, r"digits must be \(N, n, n\) uint8"),
        (np.zeros((1, 28, 28), np.float32), 64, r"digits must be \(N, n, n\) uint8, got float32"),
        (np.zeros((0, 28, 28), np.uint8), 64, "digits must be at least one picture, got none"),
    ],
)
def test_rendering_refuses(digits: np.ndarray, canvas: int, message: str) -> None:
    """What cannot be drawn faithfully is refused."""
    with pytest.raises(ValueError, match=message):
        QuadrantImages(digits, canvas)


def test_rendering_refuses_a_digit_that_is_not_there() -> None:
    """A recipe for another split's digits is found out where it can be."""
    images = QuadrantImages(np.zeros((3, 28, 28), np.uint8), 32)
    recipe = QuadrantRecipe(np.array([[3, -1, -1, -1, -1]], np.int32), np.array([[0, -1, -1, -1, -1]], np.int8))
    with pytest.raises(ValueError, match=r"recipe.digits must be < 3, the digits held, got 3"):
        images.render(recipe)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, sides=st.sampled_from([(8, 14), (8, 28), (28, 14), (28, 7), (5, 5), (1, 4), (28, 56)]))
def test_resizing_equals_the_slow_one(seed: int, sides: tuple[int, int]) -> None:
    """Integer weights give the exactly rounded picture."""
    picture = np.random.default_rng(seed).integers(0, 256, (1, sides[0], sides[0]), np.uint8)
    if sides == (28, 56):
        picture = picture[:, :6, :6]
        assert resize_digits(picture, 12).tolist() == [slow_resize(picture[0], 12)]
    else:
        assert resize_digits(picture, sides[1]).tolist() == [slow_resize(picture[0], sides[1])]


# data sets -------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_split_and_step_alone(source: DigitSource) -> None:
    """A fresh data set asked for one late step gives what one that ran through all steps gave."""
    options = {"canvas_size": 32, "size": 50, "layouts": LAYOUTS}
    dataset = QuadrantDataset(source, "train", seed=3, **options)
    history = [dataset.batch(step, 16) for step in range(9)]
    for step in (8, 2, 5):
        resumed = QuadrantDataset(source, "train", seed=3, **options)
        assert torch.equal(resumed.batch(step, 16), history[step])
    assert not torch.equal(history[0], history[1])
    assert not torch.equal(QuadrantDataset(source, "train", seed=4, **options).batch(0, 16), history[0])
    # Not only other digits in the same places: the places are drawn anew for each split.
    other = QuadrantDataset(source, "test", seed=3, **options)
    assert (other.recipes.filled != dataset.recipes.filled).any()


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 23), batch_size=st.integers(1, 50), seed=st.integers(0, 1000))
def test_every_epoch_shows_every_image_once(size: int, batch_size: int, seed: int) -> None:
    """The stream of batches, cut into epochs, is a permutation of the table each time."""
    labels = np.arange(40) % 10
    picture = np.zeros((40, 28, 28), np.uint8)
    split = DigitSplit(picture, labels)
    dataset = QuadrantDataset(
        DigitSource("x", tuple("0123456789"), split, split, split), "train", canvas_size=32, size=size, seed=seed
    )
    steps = -(-3 * size // batch_size)
    stream = np.concatenate([dataset.recipe_batch(step, batch_size).digits for step in range(steps)])
    table = sorted(map(tuple, dataset.recipes.digits.tolist()))
    for epoch in range(3):
        part = stream[epoch * size : (epoch + 1) * size]
        assert sorted(map(tuple, part.tolist())) == table


def test_epochs_differ_in_order(source: DigitSource) -> None:
    """The second pass is no repetition of the first."""
    dataset = QuadrantDataset(source, "train", canvas_size=32, size=64)
    assert (dataset.recipe_batch(0, 64).digits != dataset.recipe_batch(1, 64).digits).any()


def test_fixed_images_follow_the_table(source: DigitSource) -> None:
    """Evaluation sees the table from its beginning, in order, whatever the batches are."""
    dataset = QuadrantDataset(source, "test", canvas_size=32, size=10)
    parts = torch.cat([dataset.fixed(start, start + 4) for start in (0, 4, 8)])
    assert len(dataset) == len(parts) == 10
    assert torch.equal(parts, dataset.images.render(dataset.recipes))


def test_each_split_draws_its_own_digits(source: DigitSource) -> None:
    """Every drawn cell of a split is one of that split's pictures and none of the others'."""
    own = {name: {picture.tobytes() for picture in source.split(name).images} for name in SPLITS}
    for name in SPLITS:
        dataset = QuadrantDataset(source, name, canvas_size=64, size=100)
        pixels = ((dataset.fixed(0, 100) + 1) * 127.5).round().to(torch.uint8)
        image, place = np.nonzero(dataset.recipes.filled)
        for i, p in zip(image, place, strict=True):
            top, left = (p // 2) * 32 + 2, (p % 2) * 32 + 2
            cell = pixels[i, :, top : top + 28, left : left + 28].amax(dim=0).numpy().tobytes()
            assert [other for other in SPLITS if cell in own[other]] == [name]


def test_classes_are_the_labels_of_the_digits(source: DigitSource) -> None:
    """Captions can be written from recipes: empty places stay empty."""
    dataset = QuadrantDataset(source, "validation", canvas_size=32, size=30, layouts=LAYOUTS)
    recipe = dataset.recipe_batch(0, 30)
    classes = dataset.classes(recipe)
    for i, p in product(range(30), range(len(PLACES))):
        digit = recipe.digits[i, p]
        assert classes[i, p] == (EMPTY if digit == EMPTY else source.validation.labels[digit])


def test_sprites_are_single_coloured_digits(source: DigitSource) -> None:
    """A sprite is a padded picture of the split in one colour, reproducible, and fills its half canvas."""
    dataset = QuadrantDataset(source, "test", canvas_size=64, size=1, seed=5)
    sprites = dataset.sprites(40)
    own = {picture.tobytes() for picture in source.test.images}
    assert sprites.shape == (40, 3, 32, 32)
    seen = set()
    for sprite in sprites:
        ink = ((sprite + 1) * 127.5).round().to(torch.uint8)
        assert ink.amax(dim=0)[2:-2, 2:-2].numpy().tobytes() in own
        lit = tuple(channel for channel in range(3) if ink[channel].any())
        seen.add(lit)
    assert seen == set(CHANNELS.values())
    assert torch.equal(dataset.sprites(40), sprites)
    assert not torch.equal(dataset.sprites(40, seed=6), sprites)
    red = dataset.sprites(10, color="red")
    assert (red[:, 0] > -1).any()
    assert (red[:, 1:] == -1).all()
    assert dataset.sprites(0).shape == (0, 3, 32, 32)


def test_sizes_are_the_papers_unless_given(source: DigitSource) -> None:
    """300,000 images cost recipes, not pixels."""
    dataset = QuadrantDataset(source, "train", canvas_size=32)
    assert len(dataset) == len(dataset.recipes) == PAPER_SIZES["train"] == 300_000
    assert dataset.recipes.digits.nbytes + dataset.recipes.colors.nbytes < 8_000_000
    assert set(np.unique(dataset.recipes.num_digits)) == {1, 2, 3, 4}
    assert LAYOUTS[:4] == QUADRANT_LAYOUTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "holdout"}, "split must be one of 'train', 'validation', 'test', got 'holdout'"),
        ({"size": 0}, "size must be an int >= 1, got 0"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
    ],
)
def test_data_sets_refuse(source: DigitSource, options: dict, message: str) -> None:
    """Arguments out of range are refused by name."""
    with pytest.raises(ValueError, match=message):
        QuadrantDataset(source, **{"split": "train", "canvas_size": 32, **options})


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda dataset: dataset.batch(-1, 2), "step must be an int >= 0, got -1"),
        (lambda dataset: dataset.batch(0, 0), "batch_size must be an int >= 1, got 0"),
        (lambda dataset: dataset.sprites(2, color="pink"), r"color must be one of .*, got 'pink'"),
        (lambda dataset: dataset.sprites(2, seed=-3), "seed must be an int >= 0, got -3"),
        (lambda dataset: dataset.sprites(-2), "count must be an int >= 0, got -2"),
    ],
    ids=["step", "batch_size", "color", "seed", "count"],
)
def test_batches_and_sprites_refuse(
    source: DigitSource, call: Callable[[QuadrantDataset], object], match: str
) -> None:
    """Steps, sizes, colours and seeds out of range are refused by name."""
    dataset = QuadrantDataset(source, "train", canvas_size=32, size=4)
    with pytest.raises(ValueError, match=match):
        call(dataset)
