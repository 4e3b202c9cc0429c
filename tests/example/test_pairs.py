"""Pairs of image and caption: pure functions of the arguments, the row and the step.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from examples.te_vqgan.data.caption_parser import parse
from examples.te_vqgan.data.heldout import allowed, held_out
from examples.te_vqgan.data.pairs import CaptionedImages
from examples.te_vqgan.data.quadrants import PAPER_SIZES
from examples.te_vqgan.data.recipes import EMPTY, LAYOUTS
from examples.te_vqgan.data.sources import SPLITS, DigitSource, DigitSplit
from tests.helpers import numpy_generator

NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """Three splits of fresh noise, 30 pictures each, every class present."""
    rng = numpy_generator()

    def split() -> DigitSplit:
        labels = rng.permutation(np.arange(30) % 10)
        return DigitSplit(rng.integers(0, 256, (30, 28, 28), np.uint8), labels)

    return DigitSource("noise", NAMES, split(), split(), split())


def make(source: DigitSource, split: str = "train", **options: object) -> CaptionedImages:
    """A small data set."""
    return CaptionedImages(source, split, **{"canvas_size": 32, "size": 60, **options})


@pytest.mark.parametrize("style", ["full", "terse"])
@pytest.mark.parametrize("split", SPLITS)
def test_captions_say_what_the_images_show(source: DigitSource, split: str, style: str) -> None:
    """Every caption of every row is read as the row's labels, and tokens and images belong together."""
    pairs = make(source, split, style=style)
    rows = np.arange(len(pairs))
    classes, colors = pairs.classes_colors(rows)
    assert (classes == pairs.dataset.classes(pairs.dataset.recipes)).all()
    assert (colors == pairs.dataset.recipes.colors).all()
    for number in range(pairs.captions_per_image):
        read_classes, read_colors = parse(pairs.captions(rows, number), NAMES)
        assert (read_classes == classes).all()
        assert (read_colors == colors).all()
        # A negative control: the captions of the rows in another order are other rows'.
        assert (parse(pairs.captions(rows[::-1], number), NAMES)[0] != classes).any()

    for step in (0, 3):
        images, tokens = pairs.batch(step, 16)
        batch_rows = pairs.rows(step, 16)
        assert torch.equal(images, pairs.dataset.batch(step, 16))
        assert torch.equal(tokens, pairs.caption_tokens(batch_rows, step))
        seen = parse(pairs.tokenizer.decode(tokens), NAMES)
        assert (seen[0] == pairs.classes_colors(batch_rows)[0]).all()
        assert (seen[1] == pairs.classes_colors(batch_rows)[1]).all()


def test_rows_are_those_of_the_images(source: DigitSource) -> None:
    """A training on cached tokens sees the rows that a training on pixels would, each once an epoch."""
    pairs = make(source)
    for step in range(8):
        rows = pairs.rows(step, 16)
        assert (pairs.dataset.recipes[rows].digits == pairs.dataset.recipe_batch(step, 16).digits).all()
        assert (pairs.dataset.row_batch(step, 16) == rows).all()
    stream = np.concatenate([pairs.rows(step, 16) for step in range(15)])
    assert (np.sort(stream.reshape(4, 60)) == np.arange(60)).all()


def test_images_keep_the_held_out_combinations_apart(source: DigitSource) -> None:
    """Training never shows one, validation and test show nothing else; all five layouts occur."""
    for split in SPLITS:
        pairs = make(source, split, size=3_000)
        classes, colors = pairs.classes_colors(np.arange(3_000))
        image, place = np.nonzero(classes != EMPTY)
        assert (held_out()[classes[image, place], place, colors[image, place]] == (split != "train")).all()
        filled = classes != EMPTY
        assert len(np.unique(np.where(filled[:, 4], 5, filled.sum(axis=1)))) == len(LAYOUTS)
        assert make(source, split, size=None).dataset.size == PAPER_SIZES[split]


def test_another_table_replaces_the_splits(source: DigitSource) -> None:
    """The test's own digits can be shown in the combinations of training, to tell novelty from difficulty."""
    pairs = make(source, "test", size=3_000, allowed=allowed("train"))
    classes, colors = pairs.classes_colors(np.arange(3_000))
    image, place = np.nonzero(classes != EMPTY)
    assert not held_out()[classes[image, place], place, colors[image, place]].any()
    assert (pairs.dataset.labels == source.test.labels).all()
    assert (parse(pairs.first_captions(0, 3_000), NAMES)[0] == classes).all()


def test_captions_depend_on_the_arguments_alone(source: DigitSource) -> None:
    """A fresh data set asked for one late step, or for rows in any order, gives what the first gave."""
    pairs = make(source, seed=4)
    history = [pairs.caption_tokens(pairs.rows(step, 16), step) for step in range(9)]
    for step in (8, 2, 5):
        resumed = make(source, seed=4)
        assert torch.equal(resumed.caption_tokens(resumed.rows(step, 16), step), history[step])
    rows = numpy_generator().permutation(60)
    numbers = numpy_generator().integers(5, size=60)
    together = pairs.captions(rows, numbers)
    alone = [make(source, seed=4).captions(rows[i : i + 1], numbers[i : i + 1])[0] for i in (0, 31, 59)]
    assert alone == [together[i] for i in (0, 31, 59)]
    # Another seed writes other captions, even of the same scene.
    other = make(source, seed=5)
    classes, colors = pairs.classes_colors(rows)
    assert other.grammar.write_numbered(classes, colors, other._numbers[rows, numbers]) != together
    assert pairs.first_captions(0, 60) != other.first_captions(0, 60)


def test_an_image_has_several_captions(source: DigitSource) -> None:
    """Its captions differ, training draws all of them equally often, a row's draw changes with the step."""
    pairs = make(source, captions_per_image=4)
    rows = np.arange(60)
    every = np.array([pairs.captions(rows, number) for number in range(4)])
    distinct = np.array([len(set(texts)) == 4 for texts in every.T])
    assert distinct.mean() > 0.7
    counts = np.zeros(4)
    for step in range(200):
        drawn = np.array(pairs.tokenizer.decode(pairs.caption_tokens(rows, step)))
        matches = drawn == every
        assert matches.any(axis=0).all()
        counts += matches[:, distinct].sum(axis=1)
    # About 12,000 draws: three degrees of freedom, 1 - 1e-7 quantile below 40.
    expected = counts.sum() / 4
    assert ((counts - expected) ** 2 / expected).sum() < 40
    single = make(source, captions_per_image=1)
    assert torch.equal(single.caption_tokens(rows, 0), single.caption_tokens(rows, 7))
    assert not torch.equal(pairs.caption_tokens(rows, 0), pairs.caption_tokens(rows, 7))


def test_evaluation_uses_the_first_captions(source: DigitSource) -> None:
    """They follow the table in order, whatever the parts are."""
    pairs = make(source, "test")
    parts = [text for start in (0, 25, 50) for text in pairs.first_captions(start, start + 25)]
    assert len(parts) == len(pairs) == 60
    assert parts == pairs.captions(np.arange(60), np.zeros(60, np.int64))
    assert parts != pairs.captions(np.arange(60), 1)
    assert pairs.first_captions(60, 70) == []


def test_splits_share_their_tokens_and_nothing_else(source: DigitSource) -> None:
    """The vocabulary is the grammar's, so a trained model can read test captions; random numbers differ."""
    train, test = make(source, size=40), make(source, "test", size=50)
    assert train.tokenizer.vocab == test.tokenizer.vocab
    assert train.tokenizer.length == test.tokenizer.length
    assert (train._numbers[:40] != test._numbers[:40]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions_per_image": 0}, "captions_per_image must be an int >= 1, got 0"),
        ({"style": "long"}, "style must be one of 'full', 'terse', 'numerals', got 'long'"),
        ({"split": "all"}, "split must be one of 'train', 'validation', 'test', got 'all'"),
        ({"size": 0}, "size must be an int >= 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(source: DigitSource, options: dict[str, object], message: str) -> None:
    """By name."""
    with pytest.raises(ValueError, match=message):
        make(source, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pairs: pairs.classes_colors(np.array([3, 60])), r"rows must be in \[0, 60\), got 60"),
        (lambda pairs: pairs.captions(np.array([-1]), 0), r"rows must be in \[0, 60\), got -1"),
        (lambda pairs: pairs.captions(np.array([1.0]), 0), "rows must be signed integers, got float64"),
        (lambda pairs: pairs.captions(np.arange(3), 5), r"numbers must be in \[0, 5\), got 5"),
        (
            lambda pairs: pairs.captions(np.arange(3), np.array([0, 1, -1])),
            r"numbers must be in \[0, 5\), got -1",
        ),
        (lambda pairs: pairs.caption_tokens(np.arange(3), -1), "step must be an int >= 0, got -1"),
    ],
    ids=["high row", "low row", "float row", "high number", "low number", "step"],
)
def test_rows_out_of_range_are_refused(
    source: DigitSource, call: Callable[[CaptionedImages], object], message: str
) -> None:
    """Rows, numbers and steps, by name."""
    pairs = make(source)
    with pytest.raises(ValueError, match=message):
        call(pairs)
