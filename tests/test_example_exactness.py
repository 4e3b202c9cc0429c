"""Counting indices that differ after shifts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from examples.te_vqgan.exactness import count_differences, moved, numerical_check
from examples.te_vqgan.presets import settings_for
from examples.te_vqgan.sources import load_digits
from te_quant import VQAutoencoder


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


def test_each_grid_rolls_by_its_own_shift() -> None:
    """Against torch.roll, image by image, negative and large shifts included."""
    tokens = torch.randint(0, 99, (6, 4, 5))
    by = torch.randint(-20, 20, (6, 2))
    expected = torch.stack(
        [grid.roll(tuple(shift), (0, 1)) for grid, shift in zip(tokens, by.tolist(), strict=True)]
    )
    assert torch.equal(moved(tokens, by), expected)


@pytest.mark.parametrize(("arm", "multiple"), [("integer_exact", 1), ("stride_exact", 4)])
def test_exact_arms_differ_nowhere(arm: str, multiple: int) -> None:
    """No index differs, on more codes than one; at least as many are compared as were asked for."""
    model = _model(arm)
    counts = count_differences(model, _images, 1000, multiple=multiple)
    assert counts["compared"] >= 1000
    assert counts["differing"] == counts["unaligned"] == 0
    assert len(model.encode_to_indices(_images(1)).unique()) > 3


@pytest.mark.parametrize(("arm", "multiple"), [("stride_exact", 1), ("vqgan", 4)])
def test_other_shifts_and_other_arms_differ(arm: str, multiple: int) -> None:
    """The count sees what is not exact: single pixels under a stride, and a border."""
    counts = count_differences(_model(arm), _images, 1000, multiple=multiple)
    assert counts["differing"] > 0


def test_an_arm_without_a_promise_is_refused() -> None:
    """A replicate-padded encoder with group norm promises nothing to count."""
    settings = settings_for("smoke", "vqgan")
    with pytest.raises(ValueError, match="arm must be one with an exact encoder, got the group 'none'"):
        numerical_check(VQAutoencoder(settings.model), settings, load_digits("digits"), tokens=10)


def test_check_counts_in_three_precisions() -> None:
    """float64, float32 and bfloat16, each with its own number of comparisons."""
    settings = dataclasses.replace(settings_for("smoke", "integer_exact"), eval_images=64)
    seen: list[int] = []
    found = numerical_check(
        VQAutoencoder(settings.model), settings, load_digits("digits"), tokens=4096, progress=seen.append
    )
    assert found["group"] == "integer"
    assert set(found["counts"]) == {"float64", "float32", "bfloat16"}
    assert found["counts"]["float64"]["differing"] == 0
    assert max(seen) >= 4096
