"""Images in [0, 1], in [-1, 1] and from 0 to 255: one measurement, and a word where the range is another.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from te_quant import EquivarianceReport, measure_equivariance
from te_quant.equivariance import comparison_table, foreground_tokens, place_sprites, placement_agreement
from te_quant.shifts import canvas
from te_quant.testing import assert_shift_equivariant
from tests.helpers import exactly

RANGES = [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (-3.0, 5.0)]


def moved(images: Tensor, data_range: tuple[float, float]) -> Tensor:
    """Images in [-1, 1], brought to another range."""
    low, high = data_range
    return low + (images + 1) * ((high - low) / 2)


def sprites() -> Tensor:
    """(6, 1, 8, 8) in [-1, 1]: random strokes on ground -1, exact in every range above."""
    ink = torch.randint(0, 17, (6, 1, 8, 8)) / 8 - 1.0
    return torch.where(torch.rand(6, 1, 8, 8) < 0.5, ink, -1.0)


def measure(images: Tensor, data_range: tuple[float, float], **options: Any) -> EquivarianceReport:
    """Measure a tokenizer and a decoder that see only where an image lies within its range."""

    def tokenize(x: Tensor) -> Tensor:
        return (moved_back(x)[:, 0, ::2, ::2] > 0).long()

    def moved_back(x: Tensor) -> Tensor:
        low, high = data_range
        return (x - low) * (2 / (high - low)) - 1

    def reconstruct(x: Tensor) -> Tensor:
        return moved((moved_back(x) * 0.75).round(decimals=1), data_range)

    return measure_equivariance(
        tokenize, images, stride=2, num_codes=2, reconstruct=reconstruct, data_range=data_range, **options
    )


@pytest.mark.parametrize("protocol", ["canvas", "circular"])
@pytest.mark.parametrize("data_range", RANGES)
def test_the_range_changes_only_the_unit(data_range: tuple[float, float], protocol: Any) -> None:
    """Ground, foreground, agreements and PSNR are those of the same images in [-1, 1]; L1 is in their unit."""
    images = sprites()
    # A token of the ground in each, by which images that are no sprites have one.
    images[..., :2, :2] = -1.0
    expected = measure(images, (-1.0, 1.0), protocol=protocol)
    found = measure(moved(images, data_range), data_range, protocol=protocol)
    assert found.agreements() == expected.agreements()
    assert found.aligned_foreground.tokens < found.aligned.tokens
    assert found.reconstruction is not None
    assert expected.reconstruction is not None
    assert found.reconstruction.psnr == pytest.approx(expected.reconstruction.psnr, abs=1e-4)
    assert found.end_to_end.decibels == pytest.approx(expected.end_to_end.decibels, abs=1e-4)  # type: ignore[union-attr]
    unit = (data_range[1] - data_range[0]) / 2
    assert found.reconstruction.l1 == pytest.approx(unit * expected.reconstruction.l1, rel=1e-5)
    assert found.settings.ground == data_range[0]
    assert found.settings.data_range == data_range


def test_psnr_of_images_from_zero_to_one() -> None:
    """An error of 0.1 everywhere is 20 dB; with the peak of [-1, 1] it would be 26.02 dB."""
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    options: dict[str, Any] = {"stride": 2, "num_codes": 1, "protocol": "circular"}

    def tokenize(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 4, 4, dtype=torch.int64)

    report = measure_equivariance(tokenize, images, reconstruct=lambda x: x + 0.1, data_range=(0, 1), **options)
    assert report.reconstruction.psnr == pytest.approx(20.0, abs=1e-9)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=r"look as if their range was not data_range=\(-1, 1\)"):
        before = measure_equivariance(tokenize, images, reconstruct=lambda x: x + 0.1, **options)
    assert before.reconstruction.psnr == pytest.approx(26.0206, abs=1e-4)  # type: ignore[union-attr]


def test_a_sprite_lies_on_its_own_ground() -> None:
    """A tokenizer that compares neighbouring pixels sees a frame around sprites on a wrong ground."""
    images = (sprites() + 1) / 2

    def edges(x: Tensor) -> Tensor:
        return ((x - x.roll(1, -1)).abs()[:, 0, ::2, ::2] > 0.3).long()

    options: dict[str, Any] = {"stride": 2, "num_codes": 2}
    right = measure_equivariance(edges, images, data_range=(0, 1), **options)
    assert right.placement is not None
    assert right.placement == measure_equivariance(edges, images, ground=0, data_range=(0, 1), **options).placement
    with pytest.warns(UserWarning, match="The ground -1 on which images are pasted occurs in none of them"):
        wrong = measure_equivariance(edges, images, **options)
    assert wrong.placement != right.placement


@pytest.mark.parametrize(
    ("images", "data_range", "message"),
    [
        (torch.tensor([0.0, 255.0]), (-1, 1), "images must be in data_range=(-1, 1), got values from 0 to 255; pass data_range=(0, 255)."),  # noqa: E501
        (torch.tensor([-1.0, 1.0]), (0, 1), "images must be in data_range=(0, 1), got values from -1 to 1; pass data_range=(-1, 1)."),  # noqa: E501
        (torch.tensor([0.0, 1.0]), (-3, -1), "images must be in data_range=(-3, -1), got values from 0 to 1; pass data_range=(0, 1)."),  # noqa: E501
        (torch.tensor([-2.1, 2.6]), (-1, 1), "images must be in data_range=(-1, 1), got values from -2.1 to 2.6; pass data_range=(low, high) of your images, such as (0, 1)."),  # noqa: E501
        (torch.tensor([0.0, math.inf]), (0, 1), "images must be finite, got 64 NaN or infinite of 128 values."),
        (torch.tensor([0.0, math.nan]), (0, 1), "images must be finite, got 64 NaN or infinite of 128 values."),
    ],
)  # fmt: skip
def test_values_of_another_range_are_refused(
    images: Tensor, data_range: tuple[float, float], message: str
) -> None:
    """With the range that they seem to have, by every function that assumes one."""
    images = images.view(2, 1, 1, 1).expand(2, 1, 8, 8)

    def tokenize(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 8, 8, dtype=torch.int64)

    with pytest.raises(ValueError, match=exactly(message)):
        measure_equivariance(tokenize, images, stride=2, num_codes=1, data_range=data_range)
    with pytest.raises(ValueError, match=exactly(message)):
        foreground_tokens(images, stride=2, data_range=data_range)
    message = message.replace("images must", "sprites must")
    with pytest.raises(ValueError, match=exactly(message)):
        placement_agreement(tokenize, images, canvas_size=16, stride=2, num_codes=1, data_range=data_range)
    with pytest.raises(ValueError, match=exactly(message)):
        place_sprites(images, canvas_size=16, stride=2, data_range=data_range)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data_range": 1.0}, TypeError, "data_range must be a pair of numbers (low, high), got 1.0."),
        (
            {"data_range": (0, 1, 2)},
            ValueError,
            "data_range must be a pair of numbers (low, high), got (0, 1, 2).",
        ),
        ({"data_range": (1, 0)}, ValueError, "data_range must be (low, high) with low < high, got (1.0, 0.0)."),
        ({"data_range": (0, math.inf)}, ValueError, "data_range[1] must be a finite number, got inf."),
        ({"data_range": (False, 1)}, TypeError, "data_range[0] must be a finite number, got False."),
    ],
)
def test_what_is_no_range_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Two finite numbers in rising order are asked for."""
    with pytest.raises(error, match=exactly(message)):
        measure(sprites(), **change)


def test_numpy_numbers_and_overshoot_are_accepted() -> None:
    """As from ``images.min()``; filters for resampling leave the range by some percent."""
    images = (sprites() + 1) / 2
    images[:, :, 2, 2] = 1.15
    images[:, :, 2, 3] = -0.15
    report = measure(images, (np.float32(0), np.int64(1)))  # type: ignore[arg-type]
    assert report.settings.data_range == (0.0, 1.0)
    assert type(report.settings.data_range[1]) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {},
            "The ground -1 on which images are pasted occurs in none of them: they have values from 0 to 1. "
            "Pass data_range=(0, 1), or the value of their own ground as ground=.",
        ),
        (
            {"data_range": (0, 1), "ground": -0.5},
            "The ground -0.5 on which images are pasted occurs in none of them: they have values from 0 to 1. "
            "Pass the value of their own ground as ground=.",
        ),
        (
            {"protocol": "circular"},
            "The images look as if their range was not data_range=(-1, 1): they have values from 0 to 1. "
            "Pass data_range=(0, 1) if that is their range; PSNR and the foreground depend on it.",
        ),
        (
            {"data_range": (0, 255)},
            "The images look as if their range was not data_range=(0, 255): they have values from 0 to 1. "
            "Pass data_range=(0, 1) if that is their range; PSNR and the foreground depend on it.",
        ),
    ],
)
def test_doubtful_ranges_are_mentioned(change: dict[str, Any], message: str) -> None:
    """A warning that points to the line of the call."""
    images = (sprites() + 1) / 2
    images[0, 0, :2, 0] = torch.tensor([0.0, 1.0])

    def tokenize(x: Tensor) -> Tensor:
        return torch.zeros(len(x), x.shape[-2] // 2, x.shape[-1] // 2, dtype=torch.int64)

    with pytest.warns(UserWarning, match=exactly(message)) as caught:
        measure_equivariance(tokenize, images, stride=2, num_codes=1, **change)
    assert [warning.filename for warning in caught] == [__file__]


def test_placements_warn_of_their_ground() -> None:
    """The function for the paper's metric makes the same assumption."""
    images = (sprites() + 1) / 2 + 0.01

    def tokenize(x: Tensor) -> Tensor:
        return (x[:, 0, ::2, ::2] > 0.5).long()

    options: dict[str, Any] = {"canvas_size": 16, "stride": 2, "num_codes": 2}
    with pytest.warns(UserWarning, match="The ground -1 on which sprites are pasted occurs in none") as caught:
        placement_agreement(tokenize, images, **options)
    assert [warning.filename for warning in caught] == [__file__]
    assert placement_agreement(tokenize, images, data_range=(0, 1), **options).rate == 1


def test_building_blocks_follow_the_range() -> None:
    """Placed sprites and the foreground, with the defaults of a range."""
    images = (sprites() + 1) / 2
    placed = place_sprites(images, canvas_size=16, stride=2, data_range=(0, 1))
    assert torch.equal(2 * placed - 1, place_sprites(2 * images - 1, canvas_size=16, stride=2))
    marked = foreground_tokens(images, stride=2, data_range=(0, 1))
    assert torch.equal(marked, foreground_tokens(2 * images - 1, stride=2))
    assert not torch.equal(marked, foreground_tokens(images, stride=2))


def test_reports_keep_the_range() -> None:
    """JSON and tables name it where it is not [-1, 1], and former reports, which lack it, have that one."""
    usual, other = measure(sprites(), (-1.0, 1.0)), measure((sprites() + 1) / 2, (0.0, 1.0))
    data = json.loads(json.dumps(other.to_dict()))
    assert data["settings"]["data_range"] == [0.0, 1.0]
    assert EquivarianceReport.from_dict(data).to_dict() == other.to_dict()
    former = json.loads(json.dumps(usual.to_dict()))
    assert "data_range" not in former["settings"]
    assert EquivarianceReport.from_dict(former).settings == usual.settings
    assert "6 images, values in [0, 1], 16x16 pixels" in other.to_markdown()
    assert "6 images, 16x16 pixels" in usual.to_markdown()
    rows = comparison_table({"usual": usual, "other": other}).to_markdown()
    assert "| data range | [-1, 1] | [0, 1] |" in rows


def test_shifts_on_a_canvas_name_the_ground() -> None:
    """The assertion and the shift know no range: they refuse a ground that the images do not have."""
    images = torch.zeros(1, 1, 8, 8)
    images[..., 3:5, 3:5] = 0.5
    options: dict[str, Any] = {"shifts": [(2, -2)], "stride": 2, "protocol": "canvas"}
    assert_shift_equivariant(lambda x: x[..., ::2, ::2], images, fill=0.0, **options)
    message = exactly("fill must be the value of the ground of images, got -1, which no pixel has.")
    with pytest.raises(ValueError, match=message):
        assert_shift_equivariant(lambda x: x[..., ::2, ::2], images, **options)
    with pytest.raises(ValueError, match=message):
        canvas(images, (1, 0), fill=-1)
    assert torch.equal(canvas(images, (0, 0), fill=-1), images)
