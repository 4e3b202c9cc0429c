"""Counting indices that differ after shifts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.te_vqgan.data.sources import load_digits
from examples.te_vqgan.stage1.exactness import (
    count_differences,
    distinct,
    draw_shifts,
    finished_settings,
    moved,
    numerical_check,
)
from examples.te_vqgan.stage1.presets import settings_for, to_dict
from te_quant import VQAutoencoder
from te_quant.testing import image_sides


def _model(arm: str) -> VQAutoencoder:
    torch.manual_seed(0)
    model = VQAutoencoder(settings_for("smoke", arm).model).double().eval()
    with torch.no_grad():
        # Fresh codes are so small that one would take every latent.
        model.quantizer.kmeans_init(model.encode(_images(0)))
    return model


def _images(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.rand(4, 3, 16, 24, generator=generator, dtype=torch.float64) * 2 - 1


def _batches(count: int = 20) -> Iterator[Tensor]:
    return (_images(number) for number in range(count))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class _Spy:
    """A tokenizer that remembers which images it was shown, and is exact: its tokens are its pixels."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.config = dataclasses.replace(settings_for("smoke", "stride_exact").model, channel_multipliers=(1,))
        self.quantizer = self

    def encode_with_phases(self, images: Tensor) -> _Spy:
        """Latents are the images."""
        self.seen.append(images)
        self.latents, self.offsets = images, torch.zeros(len(images), 2, dtype=torch.int64)
        return self

    def encode(self, latents: Tensor) -> Tensor:
        """Tokens are pixels."""
        return (latents[:, 0] * 1000).long()


def test_each_grid_rolls_by_its_own_shift() -> None:
    """Against torch.roll, image by image, negative and large shifts included."""
    tokens = torch.randint(0, 99, (6, 4, 5))
    by = torch.randint(-20, 20, (6, 2))
    expected = torch.stack(
        [grid.roll(tuple(shift), (0, 1)) for grid, shift in zip(tokens, by.tolist(), strict=True)]
    )
    assert torch.equal(moved(tokens, by), expected)


@given(st.integers(1, 4), st.integers(0, 70), st.data())
@settings(deadline=None)
def test_shifts_are_drawn_without_replacement(multiple: int, count: int, data: st.DataObject) -> None:
    """Multiples within the image, none twice, never the identity; all there are if as many are asked for."""
    sides = data.draw(image_sides(multiple, largest=8 * multiple))
    others = {
        (dy, dx)
        for dy in range(0, sides[0], multiple)
        for dx in range(0, sides[1], multiple)
        if (dy, dx) != (0, 0)
    }
    drawn = draw_shifts(sides, multiple, count, _generator())
    assert len(drawn) == len(set(drawn)) == min(count, len(others))
    assert set(drawn) <= others


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=6), st.integers(1, 4))
@settings(deadline=None)
def test_images_come_once(numbers: list[list[int]], size: int) -> None:
    """Every image the first time that it comes, in order, in batches of equal size but the last."""
    image = {number: torch.full((1, 2, 2), float(number)) for number in range(6)}
    found = list(distinct((torch.stack([image[n] for n in row]) for row in numbers if row), size))
    once = list(dict.fromkeys(n for row in numbers for n in row))
    assert [int(i[0, 0, 0]) for batch in found for i in batch] == once
    assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
    assert not found or 1 <= len(found[-1]) <= size


def test_no_comparison_is_made_twice() -> None:
    """What the tokenizer is shown: no image twice, and after it 16 shifts of it, all different from it."""
    spy = _Spy()
    repeats = (images for images in _batches(60) for _ in range(2))
    counts = count_differences(spy, repeats, 500_000)
    pairs = set()
    for start in range(0, len(spy.seen), 17):
        reference, *shifted = spy.seen[start : start + 17]
        assert len(shifted) == 16
        for images in shifted:
            for before, after in zip(reference, images, strict=True):
                assert not torch.equal(before, after)
                pairs.add((before.numpy().tobytes(), after.numpy().tobytes()))
    shown = {before for before, _ in pairs}
    assert counts == {
        "compared": len(pairs) * 16 * 24,
        "differing": 0,
        "distinct_images": len(shown),
        "distinct_pairs": len(pairs),
        "unaligned": 0,
    }
    assert len(shown) * 16 == len(pairs)


@pytest.mark.parametrize(("arm", "multiple"), [("integer_exact", 1), ("stride_exact", 4)])
def test_exact_arms_differ_nowhere(arm: str, multiple: int) -> None:
    """No index differs, on more codes than one; at least as many are compared as were asked for."""
    model = _model(arm)
    counts = count_differences(model, _batches(), 1000, multiple=multiple)
    assert counts["compared"] >= 1000
    assert counts["differing"] == counts["unaligned"] == 0
    assert len(model.encode_to_indices(_images(1)).unique()) > 3


@pytest.mark.parametrize(("arm", "multiple"), [("stride_exact", 1), ("vqgan", 4)])
def test_other_shifts_and_other_arms_differ(arm: str, multiple: int) -> None:
    """The count sees what is not exact: single pixels under a stride, and a border."""
    counts = count_differences(_model(arm), _batches(), 1000, multiple=multiple)
    assert counts["differing"] > 0


def test_too_few_images_are_refused() -> None:
    """Rather than counted twice: four images of 16x24 pixels have 16 shifts and 4x6 tokens each."""
    model = _model("stride_exact")
    repeats = (_images(0) for _ in range(50))
    expected = "tokens must be at most the 1,536 comparisons that 4 images give, got 1,537"
    with pytest.raises(ValueError, match=expected):
        count_differences(model, repeats, 1537, multiple=4)
    assert count_differences(model, [_images(0)], 1536, multiple=4)["compared"] == 1536
    with pytest.raises(ValueError, match="tokens must be an int >= 1, got 0"):
        count_differences(model, [_images(0)], 0)


def test_an_arm_without_a_promise_is_refused() -> None:
    """A replicate-padded encoder with group norm promises nothing to count."""
    chosen = settings_for("smoke", "vqgan")
    with pytest.raises(ValueError, match="arm must be one with an exact encoder, got the group 'none'"):
        numerical_check(VQAutoencoder(chosen.model), chosen, load_digits("digits"), tokens=10)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["integer_exact", "stride_exact"])
def test_check_counts_in_three_precisions(arm: str) -> None:
    """float64, float32 and bfloat16, each with its own number of comparisons; more images than the test set."""
    chosen = dataclasses.replace(settings_for("smoke", arm), eval_images=8)
    seen: list[int] = []
    found = numerical_check(
        VQAutoencoder(chosen.model), chosen, load_digits("digits"), tokens=100_000, progress=seen.append
    )
    assert found["group"] == arm.partition("_")[0]
    assert found["shifts"] == f"multiples of {1 if arm == 'integer_exact' else 4} px but 0, circular"
    assert set(found["counts"]) == {"float64", "float32", "bfloat16"}
    exact = found["counts"]["float64"]
    assert exact["differing"] == 0
    assert exact["distinct_images"] == 128
    assert exact["distinct_pairs"] == 128 * 16
    assert found["counts"]["bfloat16"]["distinct_images"] == 64
    assert max(seen) == exact["compared"] == 128 * 16 * 64


def test_settings_are_those_of_the_finished_run(tmp_path: Path) -> None:
    """Read from its folder, so that no option has to repeat them; an unfinished run has nothing to count."""
    chosen = settings_for("smoke", "integer_exact", {"steps": 3, "seed": 5})
    (tmp_path / "settings.json").write_text(json.dumps(to_dict(chosen)))
    with pytest.raises(ValueError, match="folder must be that of a finished stage1 run, got "):
        finished_settings(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    assert finished_settings(tmp_path) == chosen
