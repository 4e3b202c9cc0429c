"""What transforms do to pixels, and where they say that tokens go."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from te_quant.stability import (
    JPEG,
    CropAndPlace,
    EightBit,
    Flip,
    Identity,
    Resize,
    ShiftPixels,
    ShiftTokens,
    Transform,
    default_transforms,
)
from tests.helpers import exactly

RANGE = (-1.0, 3.0)


def images(channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """(2, C, 16, 24) smooth values in RANGE, which leave it a little."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, channels, 4, 6, generator=generator, dtype=torch.float64) * 4.2 - 1.1
    return torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear").to(dtype)


def changed(transform: Transform, pixels: Tensor) -> Tensor:
    """Apply it at a stride of four pixels."""
    return transform.transform_images(pixels, stride=4, data_range=RANGE)


def test_eight_bits_are_those_of_numpy() -> None:
    """256 levels over the data range, what leaves it clamped; rounding again changes nothing."""
    pixels = images(dtype=torch.float64)
    rounded = changed(EightBit(), pixels)
    expected = np.clip(np.round((pixels.numpy() + 1) / 4 * 255), 0, 255) / 255 * 4 - 1
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=0, atol=1e-12)
    assert torch.equal(changed(EightBit(), rounded), rounded)
    assert len(rounded.unique()) <= 256
    assert rounded.min() >= -1
    assert rounded.max() <= 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 90])
def test_jpeg_is_that_of_pillow(channels: int, quality: int) -> None:
    """The bytes go through a file, image by image."""
    pillow = pytest.importorskip("PIL.Image")
    pixels = images(channels)
    result = changed(JPEG(quality), pixels)
    for image, found in zip(pixels.double().numpy(), result, strict=True):
        levels = np.clip(np.round((image + 1) / 4 * 255), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        pillow.fromarray(levels[0] if channels == 1 else levels.transpose(1, 2, 0)).save(
            file, "JPEG", quality=quality
        )
        decoded = np.asarray(pillow.open(file), dtype=np.float64).reshape(16, 24, channels).transpose(2, 0, 1)
        np.testing.assert_allclose(found.numpy(), decoded / 255 * 4 - 1, atol=1e-5)


def test_lower_quality_changes_more() -> None:
    """Negative control: the quality reaches the encoder."""
    pytest.importorskip("PIL")
    errors = [float((changed(JPEG(quality), images()) - images()).square().mean()) for quality in (95, 50, 5)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 3


@pytest.mark.parametrize("amount", [-9, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 7, 25])
def test_tokens_move_by_the_nearest_whole_number(amount: int) -> None:
    """From halfway towards zero."""
    tokens = torch.arange(4 * 6).view(1, 4, 6)
    whole = min(range(-8, 9), key=lambda k: (abs(4 * k - amount), abs(k)))
    result = ShiftPixels((0, amount)).move_tokens(tokens, stride=4)
    assert torch.equal(result, torch.roll(tokens, whole, -1))


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-3, 5), (8, -4), (0, 11)])
def test_a_replicated_border_repeats_the_edge(shift: tuple[int, int]) -> None:
    """Pixel by pixel; and a token counts exactly where all of its pixels are moved content and it has a source."""
    pixels = images()
    result = changed(ShiftPixels(shift, border="replicate"), pixels)
    real = np.zeros((16, 24), dtype=bool)
    for row in range(16):
        for column in range(24):
            source = (row - shift[0], column - shift[1])
            real[row, column] = 0 <= source[0] < 16 and 0 <= source[1] < 24
            clamped = (min(max(source[0], 0), 15), min(max(source[1], 0), 23))
            assert torch.equal(result[:, :, row, column], pixels[:, :, clamped[0], clamped[1]])
    mask = ShiftPixels(shift, border="replicate").valid_tokens((4, 6), stride=4).numpy()
    whole = real.reshape(4, 4, 6, 4).all(axis=(1, 3))
    assert not (mask & ~whole).any()
    if all(amount % 4 == 0 for amount in shift):
        assert (mask == whole).all()
        tokens = ShiftTokens((shift[0] // 4, shift[1] // 4), border="replicate")
        assert torch.equal(changed(tokens, pixels), result)
        assert (tokens.valid_tokens((4, 6), stride=4).numpy() == mask).all()


def test_a_circular_shift_is_a_roll() -> None:
    """Of the pixels, and all tokens count."""
    assert torch.equal(changed(ShiftPixels((3, -5)), images()), torch.roll(images(), (3, -5), (-2, -1)))
    assert torch.equal(changed(ShiftTokens((1, -2)), images()), torch.roll(images(), (4, -8), (-2, -1)))
    assert ShiftPixels((3, -5)).valid_tokens((4, 6), stride=4).all()


@pytest.mark.parametrize(("keep", "rows", "columns"), [(1.0, (0, 16), (0, 24)), (0.5, (4, 12), (6, 18))])
def test_the_middle_stays(keep: float, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Everything else has one colour, by default the low end of the range."""
    inside = torch.zeros(16, 24, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    for fill, colour in ((None, -1.0), (0.25, 0.25)):
        result = changed(CropAndPlace(keep, fill), images())
        assert torch.equal(result, torch.where(inside, images(), torch.tensor(colour)))
    mask = CropAndPlace(keep).valid_tokens((4, 6), stride=4)
    assert torch.equal(mask, inside.view(4, 4, 6, 4).all(3).all(1))


def test_flips_mirror_pixels_and_tokens_alike() -> None:
    """Twice is the identity."""
    for direction, axis in (("horizontal", -1), ("vertical", -2)):
        transform = Flip(direction)  # type: ignore[arg-type]
        assert torch.equal(changed(transform, images()), images().flip(axis))
        tokens = torch.arange(24).view(4, 6)
        assert torch.equal(transform.move_tokens(tokens, stride=4), tokens.flip(axis))


def test_resizing_goes_there_and_back() -> None:
    """A constant image stays, another one loses detail, and the sides return although they do not divide."""
    constant = torch.full((1, 3, 16, 24), 0.7)
    assert (changed(Resize(0.3), constant) - constant).abs().max() < 1e-6
    result = changed(Resize(0.3), images())
    assert result.shape == images().shape
    assert result.var() < images().var()
    smaller = torch.nn.functional.interpolate(images(), (5, 7), mode="bilinear", antialias=True)
    expected = torch.nn.functional.interpolate(smaller, (16, 24), mode="bilinear", antialias=True)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_decoder_stays(dtype: torch.dtype) -> None:
    """Whatever it is computed in."""
    pytest.importorskip("PIL")
    for transform in default_transforms():
        result = changed(transform, images(dtype=dtype))
        assert result.dtype == dtype
        assert result.shape == (2, 3, 16, 24)


def test_names_tell_transforms_apart() -> None:
    """They are the rows of every table."""
    pytest.importorskip("PIL")
    names = [transform.name for transform in default_transforms()]
    assert names == [
        "identity", "8-bit", "JPEG 90", "JPEG 75", "JPEG 50", "shift (1, 1) tokens", "shift (1, 1) px",
        "crop 0.75 and place back", "flip horizontal", "flip vertical", "resize 0.5 and back",
    ]  # fmt: skip
    assert CropAndPlace(fill=0).name == "crop 0.75 and place back, fill 0"
    assert ShiftTokens((1, 0), "replicate").name == "shift (1, 0) tokens, replicate"
    assert Identity() == Identity()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: JPEG(0), ValueError, "quality must be an int >= 1 and <= 100, got 0."),
        (lambda: JPEG(75.0), TypeError, "quality must be an int >= 1 and <= 100, got 75.0."),  # type: ignore[arg-type]
        (lambda: ShiftPixels((1, 0.5)), TypeError, "shift[1] must be an int, got 0.5."),  # type: ignore[arg-type]
        (lambda: ShiftTokens(1), TypeError, "shift must be a pair of ints, got 1."),  # type: ignore[arg-type]
        (lambda: ShiftTokens((1, 2, 3)), ValueError, "shift must be a pair (dy, dx), got (1, 2, 3)."),  # type: ignore[arg-type]
        (lambda: ShiftTokens((1, 2), "zeros"), ValueError, "border must be one of 'circular', 'replicate', got 'zeros'."),  # type: ignore[arg-type]  # noqa: E501
        (lambda: CropAndPlace(0), ValueError, "keep must be above 0, got 0.0."),
        (lambda: CropAndPlace(1.5), ValueError, "keep must be a finite number >= 0 and <= 1, got 1.5."),
        (lambda: Resize(0), ValueError, "scale must be above 0, got 0.0."),
        (lambda: Flip("both"), ValueError, "direction must be one of 'horizontal', 'vertical', got 'both'."),  # type: ignore[arg-type]
        (lambda: changed(JPEG(), images(4)), ValueError, "images axis 1 must be 1 or 3 channels for JPEG, got 4."),
    ],
)  # fmt: skip
def test_refusals(build: Any, error: type[Exception], message: str) -> None:
    """Each has its own sentence."""
    pytest.importorskip("PIL")
    with pytest.raises(error, match=exactly(message)):
        build()


def test_jpeg_needs_pillow_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the middle of a measurement, and not at import."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"^Pillow must be installed for JPEG: pip install 'te_quant\[jpeg\]'"):
        JPEG(75)


def test_a_transform_without_pixels_says_so() -> None:
    """The one method that has no default."""
    with pytest.raises(NotImplementedError, match=exactly("Transform must define transform_images.")):
        changed(Transform(), images())
    assert Transform().name == "Transform"
