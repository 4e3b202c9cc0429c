"""Counting what was read right, against counting by hand.

Shape letters: B images, P = 5 places, L classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from examples.te_vqgan.data.recipes import COLORS, EMPTY, LAYOUTS, sample_recipes
from examples.te_vqgan.stage2.scores import Scores
from tests.helpers import numpy_generator

L = 6
Scene = tuple[NDArray[Any], NDArray[Any]]


def _scenes(rng: np.random.Generator, count: int) -> tuple[Scene, Scene]:
    """Random images, and readings of them of which some are right, some wrong and some missing."""
    labels = np.arange(3 * L) % L
    recipe = sample_recipes(labels, count, rng, num_classes=L, layouts=LAYOUTS)
    classes = np.where(recipe.filled, labels[recipe.digits], EMPTY)
    found = []
    for truth, bound in ((classes, L), (recipe.colors, len(COLORS))):
        wild = rng.integers(EMPTY, bound, truth.shape)
        found.append(np.where(rng.random(truth.shape) < 0.6, truth, wild))
    return (classes, recipe.colors), (found[0], found[1])


def _by_hand(truth: Scene, found: Scene) -> dict[str, Any]:
    """One digit at a time, in plain Python."""
    cases = {name: dict.fromkeys(("digits", "right", "colors", "both", "images", "whole"), 0) for name in LAYOUTS}
    confusion = [[0] * (L + 1) for _ in range(L)]
    for classes, colors, read, hues in zip(*(part.tolist() for part in (*truth, *found)), strict=True):
        places = [place for place in range(5) if classes[place] != EMPTY]
        case = cases["centre" if places == [4] else f"quad{len(places)}"]
        case["images"] += 1
        case["whole"] += all(read[place] == classes[place] for place in places)
        for place in places:
            case["digits"] += 1
            case["right"] += read[place] == classes[place]
            case["colors"] += hues[place] == colors[place]
            case["both"] += read[place] == classes[place] and hues[place] == colors[place]
            confusion[classes[place]][L if read[place] == EMPTY else read[place]] += 1
    return {
        "cases": {
            name: {
                "digits": case["digits"],
                "digits_right": case["right"],
                "colors_right": case["colors"],
                "both_right": case["both"],
                "images": case["images"],
                "images_right": case["whole"],
                "digit_accuracy": case["right"] / case["digits"] if case["digits"] else None,
                "color_accuracy": case["colors"] / case["digits"] if case["digits"] else None,
                "both_accuracy": case["both"] / case["digits"] if case["digits"] else None,
                "image_accuracy": case["whole"] / case["images"] if case["images"] else None,
            }
            for name, case in cases.items()
        },
        "confusion": confusion,
    }


def _scored(truth: Scene, found: Scene) -> dict[str, Any]:
    scores = Scores(L)
    scores.update(truth, found)
    return scores.to_dict()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), cut=st.integers(0, 40))
def test_scores_are_those_counted_by_hand(seed: int, count: int, cut: int) -> None:
    """Every count and rate, in one batch or in two; few images leave cases without any."""
    truth, found = _scenes(np.random.default_rng(seed), count)
    expected = _by_hand(truth, found)
    assert _scored(truth, found) == expected
    halves = Scores(L)
    for part in (slice(None, cut), slice(cut, None)):
        halves.update((truth[0][part], truth[1][part]), (found[0][part], found[1][part]))
    assert halves.to_dict() == expected


def test_every_wrong_answer_costs_what_it_should() -> None:
    """From all right: one digit, one colour, one missing answer; nothing for what is read where nothing stands."""
    rng = numpy_generator()
    truth, _ = _scenes(rng, 50)
    right = _scored(truth, truth)
    for case in right["cases"].values():
        assert {case[f"{name}_accuracy"] for name in ("digit", "color", "both", "image")} <= {1.0, None}
    rows, places = np.nonzero(truth[0] != EMPTY)
    chosen = rng.integers(len(rows))
    at = rows[chosen], places[chosen]
    label = int(truth[0][at])
    name = "centre" if at[1] == 4 else f"quad{(truth[0][at[0]] != EMPTY).sum()}"

    for wrong, column in (((label + 1) % L, (label + 1) % L), (EMPTY, L)):
        classes = truth[0].copy()
        classes[at] = wrong
        scores = _scored(truth, (classes, truth[1]))
        lost = {key: right["cases"][name][key] - scores["cases"][name][key] for key in scores["cases"][name]}
        assert [lost[f"{key}_right"] for key in ("digits", "colors", "both", "images")] == [1, 0, 1, 1]
        assert scores["confusion"][label][column] == right["confusion"][label][column] + 1
        assert scores["confusion"][label][label] == right["confusion"][label][label] - 1
        assert all(scores["cases"][other] == right["cases"][other] for other in LAYOUTS if other != name)

    colors = truth[1].copy()
    colors[at] = (colors[at] + 1) % len(COLORS)
    scores = _scored(truth, (truth[0], colors))
    lost = {key: right["cases"][name][key] - scores["cases"][name][key] for key in scores["cases"][name]}
    assert [lost[f"{key}_right"] for key in ("digits", "colors", "both", "images")] == [0, 1, 1, 0]
    assert scores["confusion"] == right["confusion"]

    invented = np.where(truth[0] == EMPTY, 0, truth[0]), np.where(truth[1] == EMPTY, 0, truth[1])
    assert _scored(truth, invented) == right
    # Exchanged, it is no longer what should be there that counts.
    assert _scored(invented, truth) != right


def test_shapes_that_differ_are_refused() -> None:
    """Broadcasting one image over many would count wrongly without a word."""
    truth, found = _scenes(numpy_generator(), 4)
    scores = Scores(L)
    message = r"truth and found must be of one shape, got \[\(1, 5\), \(4, 5\)\]"
    with pytest.raises(ValueError, match=message):
        scores.update(truth, (found[0][:1], found[1]))
    assert scores.to_dict() == Scores(L).to_dict()
