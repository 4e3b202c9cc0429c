"""Errors in decibels, of latents and end to end, against loops in float64."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from te_quant.equivariance import measure_equivariance

STRIDE = 2
KINDS = ["canvas", "circular", "crop"]


def view(source: np.ndarray, shift: tuple[int, int], protocol: str, size: int) -> np.ndarray:
    """Paste, roll or crop (C, H, W) content, pixel by pixel."""
    out = np.full((len(source), size, size), -1.0)
    corner = {"canvas": size // 4, "circular": 0, "crop": (size - source.shape[1]) // 2}[protocol]
    for y, x in product(range(source.shape[1]), repeat=2):
        ty, tx = y + corner + shift[0], x + corner + shift[1]
        if protocol == "circular":
            ty, tx = ty % size, tx % size
        if 0 <= ty < size and 0 <= tx < size:
            out[:, ty, tx] = source[:, y, x]
    return out


def dft_shift(signal: np.ndarray, amount: float, axis: int) -> np.ndarray:
    """Shift along one axis by a matrix of explicit DFT sums; Nyquist left out of fractional shifts."""
    side = signal.shape[axis]
    if float(amount).is_integer():
        return np.roll(signal, int(amount), axis)
    k = np.arange(-((side - 1) // 2), (side - 1) // 2 + 1)
    n = np.arange(side)
    matrix = np.exp(2j * np.pi * k * (n[:, None, None] - n[None, :, None] - amount) / side).sum(-1).real / side
    return np.moveaxis(np.tensordot(matrix, signal, (1, axis)), 0, axis)


def pairs_of(protocol: str, side: int, shift: tuple[int, int]):
    """List the positions u and u + shift that are valid in both."""
    for v, w in product(range(side), repeat=2):
        tv, tw = v + shift[0], w + shift[1]
        if protocol == "circular":
            yield (v, w), (tv % side, tw % side)
        elif 0 <= tv < side and 0 <= tw < side:
            yield (v, w), (tv, tw)


def encode(images: torch.Tensor) -> torch.Tensor:
    """Two latent channels of 2x2 cells, with a large mean and a part that depends on the position."""
    cells = images.unfold(2, STRIDE, STRIDE).unfold(3, STRIDE, STRIDE).flatten(4)
    rows, columns = (torch.arange(side, dtype=images.dtype) for side in cells.shape[2:4])
    return torch.cat(
        [cells.mean(-1) + 50 + 0.1 * rows[:, None] + 0.2 * columns, cells[..., 0] * cells[..., 3] - 7], dim=1
    )


def decode(images: torch.Tensor) -> torch.Tensor:
    """Blur, and darken up and to the left: not equivariant."""
    blurred = (images + images.roll(1, -2) + images.roll(1, -1)) / 3
    ramp = torch.linspace(0.5, 1, images.shape[-1], dtype=images.dtype)
    return blurred * ramp * ramp[:, None] ** 2


def signal_to_error(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """10·log10(Σ‖z - z̄‖² / Σ‖z' - z‖²) of listed pairs of vectors."""
    z = np.array([pair[0] for pair in pairs])
    moved = np.array([pair[1] for pair in pairs])
    return 10 * math.log10(((z - z.mean(0)) ** 2).sum() / ((moved - z) ** 2).sum())


@pytest.mark.parametrize("protocol", KINDS)
def test_errors_match_loops_over_positions(protocol):
    """Features and decoded images, whole-token and sub-stride shifts, pooled and by shift."""
    size, count = 8, 3
    side = {"canvas": 4, "circular": 8, "crop": 14}[protocol]
    images = torch.rand(count, 1, side, side, dtype=torch.float64) * 2 - 1
    shifts = [(2, 0), (-2, 2), (0, -2)]
    report = measure_equivariance(
        lambda x: (encode(x)[:, 0] * 10).long() % 7,
        images,
        stride=STRIDE,
        num_codes=7,
        protocol=protocol,
        canvas_size=size if protocol != "circular" else None,
        shifts=shifts,
        latents=encode,
        reconstruct=decode,
        batch_size=2,
    )
    features: dict[tuple[int, int], list] = {}
    pixels: dict[tuple[int, int], list] = {}
    below = [(0, 1), (1, 0), (1, 1)]
    first = 0 if protocol == "circular" else 1
    for shift, n in product(shifts + below, range(count)):
        x = view(images[n].numpy(), (0, 0), protocol, size)
        moved = view(images[n].numpy(), shift, protocol, size)
        z, z_moved = (encode(torch.from_numpy(i)[None])[0].numpy() for i in (x, moved))
        y, y_moved = (decode(torch.from_numpy(i)[None])[0].numpy() for i in (x, moved))
        listed = features.setdefault(shift, [])
        if shift in shifts:
            k = (shift[0] // STRIDE, shift[1] // STRIDE)
            listed += [(z[:, a, b], z_moved[:, c, d]) for (a, b), (c, d) in pairs_of(protocol, size // STRIDE, k)]
        else:
            fraction = dft_shift(dft_shift(z, shift[0] / STRIDE, 1), shift[1] / STRIDE, 2)
            positions = product(range(first, size // STRIDE), repeat=2)
            listed += [(fraction[:, a, b], z_moved[:, a, b]) for a, b in positions]
        pixels.setdefault(shift, []).extend(
            float(y[0, a, b] - y_moved[0, c, d]) for (a, b), (c, d) in pairs_of(protocol, size, shift)
        )
    for suffix, group in (("", shifts), ("_sub_stride", below)):
        pooled = [pair for shift in group for pair in features[shift]]
        error = getattr(report, "feature_error" + suffix)
        assert error.decibels == pytest.approx(signal_to_error(pooled), abs=1e-8)
        assert error.mean_square == pytest.approx(np.mean([((b - a) ** 2).sum() for a, b in pooled]), rel=1e-9)
        assert error.interval[0] - 1e-9 <= error.decibels <= error.interval[1] + 1e-9
        differences = np.array([d for shift in group for d in pixels[shift]])
        end = getattr(report, "end_to_end" + suffix)
        assert end.decibels == pytest.approx(10 * math.log10(4 / (differences**2).mean()), abs=1e-9)
        assert end.mean_square == pytest.approx((differences**2).mean(), rel=1e-9)
        assert end.interval[0] - 1e-9 <= end.decibels <= end.interval[1] + 1e-9
    for entry in (*report.aligned_by_shift, *report.sub_stride_by_shift):
        assert entry.feature_error == pytest.approx(signal_to_error(features[entry.shift]), abs=1e-8)
        expected = 10 * math.log10(4 / np.mean(np.square(pixels[entry.shift])))
        assert entry.end_to_end == pytest.approx(expected, abs=1e-9)


def test_error_intervals_match_numpy():
    """Resampled images, the mean z̄ formed anew in each resample; reconstruction too."""
    images = torch.rand(5, 1, 4, 4, dtype=torch.float64) * 2 - 1
    report = measure_equivariance(
        lambda x: torch.zeros(len(x), 2, 2).long(),
        images,
        stride=2,
        num_codes=2,
        protocol="circular",
        shifts=[(0, 2)],
        sub_stride_shifts=[],
        latents=encode,
        reconstruct=decode,
        resamples=100,
        seed=4,
    )
    drawn = torch.randint(0, 5, (100, 5), generator=torch.Generator().manual_seed(4))
    z = encode(images)
    back = encode(images.roll(2, -1)).roll(-1, -1)
    flat, flat_back = (t.movedim(1, -1).reshape(5, 4, 2).numpy() for t in (z, back))
    decibels = [
        signal_to_error(list(zip(flat[rows].reshape(-1, 2), flat_back[rows].reshape(-1, 2), strict=True)))
        for rows in drawn.numpy()
    ]
    error = (decode(images) - images).numpy().reshape(5, -1)
    l1 = [np.abs(error[rows]).mean() for rows in drawn.numpy()]
    psnr = [10 * math.log10(4 / (error[rows] ** 2).mean()) for rows in drawn.numpy()]
    mse = [(error[rows] ** 2).mean() for rows in drawn.numpy()]
    for found, values in [
        (report.feature_error.interval, decibels),
        (report.reconstruction.l1_interval, l1),
        (report.reconstruction.mse_interval, mse),
        (report.reconstruction.psnr_interval, psnr),
    ]:
        expected = [np.percentile(values, 2.5, method="lower"), np.percentile(values, 97.5, method="higher")]
        assert found == pytest.approx(expected, rel=1e-8)
    assert report.feature_error_sub_stride is None
    assert report.end_to_end_sub_stride is None


def test_exact_latents_and_decoders_have_infinite_decibels():
    """Sampling commutes with whole tokens; pixelwise maps with all shifts. One part that does not: finite."""
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    options = {"stride": 2, "num_codes": 2, "protocol": "circular"}

    def measure(latents, reconstruct):
        return measure_equivariance(
            lambda x: (x[:, 0, ::2, ::2] > 0).long(), images, latents=latents, reconstruct=reconstruct, **options
        )

    exact = measure(lambda x: x[:, :, ::2, ::2], lambda x: x**3)
    assert exact.feature_error.decibels == exact.end_to_end.decibels == math.inf
    assert exact.end_to_end_sub_stride.decibels == math.inf
    assert exact.feature_error.interval == (math.inf, math.inf)
    assert exact.feature_error_sub_stride.decibels < 5
    assert exact.sub_stride_fourier is None
    ramp = torch.linspace(0, 1, 8)
    broken = measure(lambda x: x[:, :, ::2, ::2] + ramp[::2], lambda x: x**3 + 0.1 * ramp)
    assert broken.feature_error.decibels < 10
    assert math.isfinite(broken.end_to_end.decibels)


def test_constant_latents_have_no_signal():
    """Nothing varies and nothing errs: undefined, not perfect."""
    report = measure_equivariance(
        lambda x: torch.zeros(len(x), 4, 4).long(),
        torch.rand(2, 1, 8, 8) * 2 - 1,
        stride=2,
        num_codes=1,
        protocol="circular",
        latents=lambda x: torch.ones(len(x), 3, 4, 4),
    )
    assert math.isnan(report.feature_error.decibels)
    assert report.feature_error.mean_square == 0
    assert "undefined" in report.to_markdown()


def test_half_precision_latents_are_summed_in_float64():
    """A large mean does not swallow the error."""
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64) * 2 - 1
    report = measure_equivariance(
        lambda x: torch.zeros(len(x), 4, 4).long(),
        images,
        stride=2,
        num_codes=1,
        protocol="circular",
        shifts=[(2, 0)],
        latents=lambda x: (x[:, :, ::2, ::2] + torch.arange(4)[:, None] / 8 + 64).bfloat16(),
    )
    z = (images[:, :, ::2, ::2] + torch.arange(4)[:, None] / 8 + 64).bfloat16().double()
    moved = (
        (images.roll(2, -2)[:, :, ::2, ::2] + torch.arange(4)[:, None] / 8 + 64).bfloat16().double().roll(-1, -2)
    )
    if float((moved - z).abs().max()) > 0:
        expected = 10 * math.log10(float(((z - z.mean()) ** 2).sum() / ((moved - z) ** 2).sum()))
        assert report.feature_error.decibels == pytest.approx(expected, abs=1e-9)
