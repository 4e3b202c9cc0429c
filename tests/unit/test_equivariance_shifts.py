"""Which shifts are measured: draws below a token, windows over photographs and fractions; the error end to end."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from te_quant.equivariance import (
    EquivarianceReport,
    comparison_table,
    measure_equivariance,
    place_sprites,
    plot_reports,
)
from te_quant.equivariance._draw import (
    all_sub_stride_shifts,
    draw_fractional_shifts,
    draw_sub_stride_shifts,
)


def tokens(stride: int) -> Callable[[Tensor], Tensor]:
    """The top left pixel of each cell, in 8 levels."""
    return lambda images: ((images[:, 0, ::stride, ::stride] + 1) * 3.99).long().clamp(0, 7)


def measure(images: Tensor, stride: int, **options: Any) -> EquivarianceReport:
    """Without intervals and variants, which take time."""
    defaults: dict[str, Any] = {"num_codes": 8, "resamples": 0, "variants": {}}
    return measure_equivariance(tokens(stride), images, stride=stride, **(defaults | options))


def noise(*shape: int) -> Tensor:
    """White noise in [-1, 1], float64."""
    return torch.rand(*shape, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("stride", "count"), [(16, 64), (16, 16), (16, 4), (8, 16), (12, 9), (5, 7), (3, 8)])
def test_draws_are_spread_over_all_shifts(stride: int, count: int) -> None:
    """No shift twice, none that is not there, and as many in each quarter as its size asks for."""
    drawn = draw_sub_stride_shifts(stride, count, seed=3)
    assert len(drawn) == len(set(drawn)) == count
    assert set(drawn) <= set(all_sub_stride_shifts(stride))
    assert draw_sub_stride_shifts(stride, count, seed=3) == drawn
    if count in (4, 16, 64):
        side = math.isqrt(count)
        assert set(Counter((dy * side // stride, dx * side // stride) for dy, dx in drawn).values()) == {1}


def test_draws_depend_on_the_seed_alone() -> None:
    """The global random state is neither read nor changed."""
    state = torch.get_rng_state()
    first = draw_sub_stride_shifts(16, 20, seed=0), draw_fractional_shifts(16, 20, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert (draw_sub_stride_shifts(16, 20, seed=0), draw_fractional_shifts(16, 20, seed=0)) == first
    assert draw_sub_stride_shifts(16, 20, seed=1) != first[0]
    assert draw_fractional_shifts(16, 20, seed=1) != first[1]


def test_fractional_draws_are_spread_too() -> None:
    """One in each of sixteen squares, below the stride."""
    drawn = draw_fractional_shifts(8, 16, seed=0)
    assert Counter((int(dy // 2), int(dx // 2)) for dy, dx in drawn) == Counter(
        (y, x) for y in range(4) for x in range(4)
    )


@pytest.mark.parametrize(
    ("stride", "asked", "measured"),
    [(8, None, 63), (8, "all", 63), (9, None, 64), (9, "all", 80), (4, 5, 5), (4, 15, 15), (4, 99, 15)],
)
def test_a_budget_is_kept_and_stated(stride: int, asked: Any, measured: int) -> None:
    """All up to a stride of 8, a draw above, the full set and any number on request; in text, JSON and tables."""
    report = measure(noise(1, 1, stride, stride), stride, protocol="circular", sub_stride_shifts=asked)
    every = stride**2 - 1
    assert len(report.settings.sub_stride_shifts) == len(report.sub_stride_by_shift) == measured
    assert report.settings.sub_stride_drawn == (measured < every)
    text = f"{measured} of {every} (stratified draw, seed 0)"
    shown = text if measured < every else str(measured)
    for form in (str(report), report.to_markdown()):
        assert f"whole-token and {shown} sub-stride shifts;" in " ".join(form.split())
    again = EquivarianceReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.settings == report.settings
    assert ("sub_stride_drawn" in report.to_dict()["settings"]) == (measured < every)


def test_comparisons_and_pictures_say_what_was_drawn() -> None:
    """A row of the table, and the title of the map."""
    drawn = measure(noise(1, 1, 8, 8), 4, protocol="circular", sub_stride_shifts=6)
    whole = measure(noise(1, 1, 8, 8), 4, protocol="circular")
    table = comparison_table({"drawn": drawn, "whole": whole}).to_markdown()
    row = next(line for line in table.splitlines() if line.startswith("| sub stride shifts |"))
    assert row.startswith("| sub stride shifts | 6 of 15 (stratified draw, seed 0) | (0,1) (0,2)")
    assert "sub stride drawn" not in table
    assert "equal indices by sub-stride shift, 6 drawn\n" in plot_reports({"a": drawn}).axes[-1].get_title()
    assert "equal indices by sub-stride shift\n" in plot_reports({"a": whole}).axes[-1].get_title()


def test_progress_announces_the_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """One of each batch for the reference, the places, the shifts and the variants, and one more of the first."""
    calls = 0

    def counted(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return tokens(2)(images)

    options: dict[str, Any] = {"stride": 2, "num_codes": 8, "batch_size": 2, "fractional_shifts": 4}
    variants = {"again": counted}
    measure_equivariance(counted, noise(3, 1, 8, 8), variants=variants, progress=True, **options)
    # Two batches: the reference, 5 places, 24 whole shifts, 3 below a token, 4 fractions, 1 variant.
    assert capsys.readouterr().err.startswith("measure_equivariance: 77 passes\n")
    assert calls == 77
    measure_equivariance(counted, noise(3, 1, 8, 8), variants={}, **options)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("sides", "stride", "window"), [((50, 41), 4, (36, 28)), ((320, 300), 16, (272, 256)), ((14, 99), 2, (6, 90))]
)
def test_photographs_choose_their_window(sides: tuple[int, int], stride: int, window: tuple[int, int]) -> None:
    """The largest that moves by a token each way; the same figures as with the window by hand."""
    images, options = noise(1, 1, *sides), {"protocol": "crop", "sub_stride_shifts": 2, "shifts": [(stride, 0)]}
    report = measure(images, stride, fractional_shifts=2, **options)
    assert report.settings.image_size == window
    assert repr(measure(images, stride, fractional_shifts=2, canvas_size=window, **options)) == repr(report)
    assert report.aligned.tokens == (window[0] // stride - 1) * (window[1] // stride)
    assert report.aligned.rate == 1.0


@pytest.mark.parametrize(
    ("images", "shifts", "told"),
    [
        (1, 1, "`circular`, 1 image, 8x8 pixels, stride 2, K = 8; 2 whole-token and 1 sub-stride shift, 1 frac"),
        (2, 2, "`circular`, 2 images, 8x8 pixels, stride 2, K = 8; 2 whole-token and 2 sub-stride shifts, 2 frac"),
    ],
)
def test_one_shift_is_singular(images: int, shifts: int, told: str) -> None:
    """As everything that a report counts."""
    below = [(0, 1), (1, 0)][:shifts]
    options: dict[str, Any] = {"sub_stride_shifts": below, "fractional_shifts": shifts, "protocol": "circular"}
    report = measure(noise(images, 1, 8, 8), 2, shifts=[(2, 0), (0, 2)], **options)
    text = " ".join(str(report).split())
    assert told in text
    assert f" fractional shift{'s' * (shifts - 1)};" in text


@pytest.mark.parametrize("protocol", ["crop", "circular"])
def test_photographs_have_no_foreground(protocol: Any) -> None:
    """Unless their ground is given: no figures, no rows, and a note that says why."""
    photographs = noise(2, 1, 40, 40)
    report = measure(photographs, 4, protocol=protocol)
    assert report.settings.ground is None
    assert report.aligned_foreground is report.sub_stride_foreground is None
    text = " ".join(report.to_markdown().split())
    assert "foreground |" not in text
    assert "no ground given, hence no foreground" in text
    assert repr(EquivarianceReport.from_dict(json.loads(json.dumps(report.to_dict())))) == repr(report)
    given = measure(photographs, 4, protocol=protocol, ground=-1.0, tau=0.5)
    assert given.aligned.rate == report.aligned.rate
    assert given.aligned_foreground is not None
    assert "foreground: more than 0.5 from -1" in " ".join(str(given).split())
    both = comparison_table({"a": report, "b": given}).to_markdown()
    assert "| ground | none | -1.0 |" in both


def test_a_ground_that_all_images_show_is_found() -> None:
    """A dark token in each of them is one; without it in one image there is none, whatever the batches."""
    images = noise(3, 1, 40, 40)
    images[:, :, :8, :8] = -1.0
    report = measure(images, 4, protocol="circular", batch_size=2)
    assert report.settings.ground == -1.0
    assert report.aligned_foreground is not None
    assert report.aligned_foreground.tokens < report.aligned.tokens
    # Under "crop" the window counts, in which the corner is not.
    assert measure(images, 4, protocol="crop").settings.ground is None
    images[2] = 0.5
    assert measure(images, 4, protocol="circular", batch_size=2).settings.ground is None


MNIST = torch.full((1, 1, 28, 28), -1.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: measure(MNIST, 4),
            r"canvas_size must be a multiple of 4 \* stride = 16, got 56; pad the images to 32 pixels of ground, "
            r"or pass protocol='circular'\.",
        ),
        (
            lambda: measure(MNIST, 8),
            r"canvas_size must be a multiple of 4 \* stride = 32, got 56; pad the images to 32 pixels of ground\.",
        ),
        (
            lambda: measure(MNIST, 8, protocol="circular"),
            r"images sides must be multiples of stride=8, got \(28, 28\); pad the images to 32 or crop them\.",
        ),
        (
            lambda: measure(MNIST, 4, protocol="crop", canvas_size=26),
            r"canvas_size must be multiples of stride=4, got \(26, 26\); pass canvas_size=\(24, 24\)\.",
        ),
        (
            lambda: place_sprites(MNIST, canvas_size=56, stride=4),
            r"a multiple of 4 \* stride = 16, got 56; pad the sprites to 32 pixels of ground\.",
        ),
    ],
    ids=["canvas", "canvas, stride 8", "circular", "crop", "placement"],
)
def test_sides_that_do_not_fit_are_refused_with_the_cure(call: Callable[[], object], match: str) -> None:
    """28 pixels, as MNIST has."""
    with pytest.raises(ValueError, match=match):
        call()


def eq_t(reconstruct: Callable[[Tensor], Tensor], view: Callable[..., Tensor], shifts: Any, wraps: bool) -> float:
    """StyleGAN3's EQ-T in NumPy: translate the output, mask what is not valid in both, pool, peak 2."""
    squared = valid = 0.0
    reference = reconstruct(view((0, 0))).numpy()
    for dy, dx in shifts:
        moved = reconstruct(view((dy, dx))).numpy()
        expected = np.roll(reference, (dy, dx), (2, 3))
        mask = np.ones_like(reference)
        if not wraps:
            rows, columns = np.arange(mask.shape[2]) - dy, np.arange(mask.shape[3]) - dx
            inside = ((rows >= 0) & (rows < len(rows)))[:, None] & ((columns >= 0) & (columns < len(columns)))
            mask = mask * inside
        squared += (((moved - expected) ** 2) * mask).sum()
        valid += mask.sum()
    return float(20 * np.log10(2) - 10 * np.log10(squared / valid))


@pytest.mark.parametrize("protocol", ["circular", "canvas", "crop"])
def test_end_to_end_is_eq_t_in_every_protocol(protocol: Any) -> None:
    """A decoder that adds a pattern which does not move, against the definition written once more."""
    images = noise(2, 1, *{"circular": (12, 12), "canvas": (8, 8), "crop": (20, 22)}[protocol])
    size = {"circular": 12, "canvas": 16, "crop": 12}[protocol]
    pattern = noise(1, 1, size, size) * torch.linspace(0, 1, size, dtype=torch.float64)

    def view(shift: tuple[int, int]) -> Tensor:
        dy, dx = shift
        if protocol == "circular":
            return images.roll((dy, dx), (2, 3))
        if protocol == "crop":
            return images[..., 4 - dy : 16 - dy, 5 - dx : 17 - dx]
        canvas = torch.full((2, 1, 16, 16), -1.0, dtype=torch.float64)
        canvas[..., 4 + dy : 12 + dy, 4 + dx : 12 + dx] = images
        return canvas

    shifts, below = [(2, -2), (0, 2), (-2, 0)], [(0, 1), (1, 1)]
    report = measure(
        images,
        2,
        protocol=protocol,
        canvas_size=size,
        reconstruct=lambda x: x + pattern,
        shifts=shifts,
        sub_stride_shifts=below,
    )
    wraps = protocol == "circular"
    assert report.end_to_end is not None
    assert report.end_to_end_sub_stride is not None
    assert report.end_to_end.decibels == pytest.approx(eq_t(lambda x: x + pattern, view, shifts, wraps))
    assert report.end_to_end_sub_stride.decibels == pytest.approx(eq_t(lambda x: x + pattern, view, below, wraps))


@pytest.mark.parametrize("protocol", ["circular", "canvas", "crop"])
def test_fractional_shifts_are_exact_for_copies(protocol: Any) -> None:
    """A decoder that copies moves exactly with the interpolated images; one that rounds does not (control)."""
    images = noise(2, 1, *{"circular": (8, 12), "canvas": (8, 8), "crop": (24, 26)}[protocol])
    report = measure(images, 2, protocol=protocol, reconstruct=lambda x: x, fractional_shifts=5)
    assert report.end_to_end_fractional is not None
    assert report.end_to_end_fractional.decibels == math.inf
    rounded = measure(images, 2, protocol=protocol, reconstruct=lambda x: x.round(), fractional_shifts=5)
    assert rounded.end_to_end_fractional is not None
    assert 0 < rounded.end_to_end_fractional.decibels < 30


def lanczos_row(signal: np.ndarray, amount: float) -> np.ndarray:
    """EQ-T_frac's filter along one axis, NaN where its window leaves the signal."""
    whole, out = math.floor(amount), np.full_like(signal, np.nan)
    taps = np.arange(-2, 4)
    weights = np.sinc(taps - amount + whole) * np.sinc((taps - amount + whole) / 3)
    for q in range(len(signal)):
        places = q - whole - taps
        if places.min() >= 0 and places.max() < len(signal):
            out[q] = weights @ signal[places] / weights.sum()
    return out


def test_fractional_error_follows_its_definition() -> None:
    """A window over photographs, against EQ-T_frac's filter in NumPy, images and decoded images moved by it."""
    images, shift = noise(2, 1, 30, 28), (1.25, 0.5)
    pattern = noise(12, 12)
    report = measure(
        images,
        4,
        protocol="crop",
        canvas_size=12,
        reconstruct=lambda x: x + pattern,
        fractional_shifts=[shift],
        sub_stride_shifts=[],
    )

    def moved(image: np.ndarray) -> np.ndarray:
        half = np.apply_along_axis(lanczos_row, 0, image, shift[0])
        return np.apply_along_axis(lanczos_row, 1, half, shift[1])

    errors = []
    for image in images[:, 0].numpy():
        expected = moved(image[9:21, 8:20] + pattern.numpy())
        actual = moved(image)[9:21, 8:20] + pattern.numpy()
        errors.append((actual - expected)[~np.isnan(expected)] ** 2)
    assert errors[0].size == 7 * 7
    assert report.end_to_end_fractional is not None
    expected_decibels = 20 * np.log10(2) - 10 * np.log10(np.mean(errors))
    assert report.end_to_end_fractional.decibels == pytest.approx(expected_decibels)


def test_fractional_latents_follow_band_limited_images_and_not_noise() -> None:
    """Sampling commutes with fractional shifts below its own band; tokens of one level never change."""
    y, x = torch.meshgrid(*(torch.arange(32, dtype=torch.float64) * torch.pi / 16,) * 2, indexing="ij")
    smooth = (torch.cos(y + 2 * x) + torch.cos(3 * y - x + 0.7))[None, None] / 2
    options: dict[str, Any] = {"protocol": "circular", "fractional_shifts": 4, "sub_stride_shifts": []}
    options["latents"] = lambda images: images[:, :, ::4, ::4]
    exact, aliased = measure(smooth, 4, **options), measure(noise(1, 1, 32, 32), 4, **options)
    assert exact.feature_error_fractional is not None
    assert aliased.feature_error_fractional is not None
    assert exact.feature_error_fractional.decibels > 200
    assert aliased.feature_error_fractional.decibels < 3
    assert aliased.fractional is not None
    assert aliased.fractional.kappa < 0.3
    flat = measure(smooth * 0.1, 4, **options)
    assert flat.fractional is not None
    assert flat.fractional.tokens == 4 * 64


def test_fractional_figures_are_in_every_form() -> None:
    """Text, Markdown, picture and strict JSON, which has none of their names where they were not measured."""
    options: dict[str, Any] = {"reconstruct": lambda x: x * 0.9, "latents": lambda x: x[:, :, ::4, ::4]}
    report = measure(noise(2, 1, 40, 40), 4, protocol="crop", fractional_shifts=3, **options)
    labels = ("fractional (best token shift)", "features, fractional (Fourier)", "end to end PSNR, fractional")
    for form in (str(report), report.to_markdown()):
        assert all(label in form for label in labels)
        assert "15 sub-stride shifts, 3 fractional shifts;" in " ".join(form.split())
    ticks = [t.get_text() for axes in report.plot().axes for t in axes.get_xticklabels()]
    assert sum("fractional" in tick for tick in ticks) == 4
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["settings"]["fractional_shifts"] == [list(shift) for shift in report.settings.fractional_shifts]
    assert repr(EquivarianceReport.from_dict(data)) == repr(report)
    without = measure(noise(2, 1, 40, 40), 4, protocol="crop", **options).to_dict()
    assert not any("fractional" in name for name in (*without, *without["settings"]))
    assert without["format"] == 3
