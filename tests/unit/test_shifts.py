"""Exact shifts: moved content, valid regions, and the fractional shift of latents."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_quant import shifts, testing
from te_quant.shifts import align, canvas, crop, fourier_shift, lanczos_shift, place, roll, valid_tokens

quick = settings(deadline=None, max_examples=30)
sides = testing.image_sides(1, largest=7)
small_shifts = testing.shifts(9, identity=True)


def moved_by_loops(image: np.ndarray, shift: tuple[int, int], *, wrap: bool, fill: float = 0.0) -> np.ndarray:
    """Move every pixel one by one."""
    height, width = image.shape
    out = np.full_like(image, fill)
    for y in range(height):
        for x in range(width):
            ty, tx = y + shift[0], x + shift[1]
            if wrap:
                out[ty % height, tx % width] = image[y, x]
            elif 0 <= ty < height and 0 <= tx < width:
                out[ty, tx] = image[y, x]
    return out


@quick
@given(sides, small_shifts)
def test_roll_moves_content_down_and_right(size, shift):
    """Every pixel lands where a loop puts it, around the edges."""
    image = torch.randn(*size, dtype=torch.float64)
    assert np.array_equal(roll(image, shift).numpy(), moved_by_loops(image.numpy(), shift, wrap=True))


@quick
@given(sides, small_shifts, st.integers(0, 2**31))
def test_canvas_moves_content_or_refuses_to_cut_it(size, shift, seed):
    """The result is the loop's; where the loop loses ink, the call is refused."""
    generator = torch.Generator().manual_seed(seed)
    ink = torch.rand(*size, generator=generator) < 0.1
    image = torch.where(ink, torch.rand(*size, generator=generator), torch.tensor(-1.0))
    expected = moved_by_loops(image.numpy(), shift, wrap=False, fill=-1.0)
    if (expected != -1).sum() == (image != -1).sum():
        assert np.array_equal(canvas(image, shift, fill=-1.0).numpy(), expected)
    else:
        with pytest.raises(ValueError, match="shift must be one that keeps all content on the canvas"):
            canvas(image, shift, fill=-1.0)


def test_canvas_moves_tokens_and_leaves_its_input_alone():
    """Integer grids work too, in their own dtype, and the input is not written to."""
    tokens = torch.tensor([[0, 0, 0], [0, 7, 0], [0, 0, 0]])
    before = tokens.clone()
    moved = canvas(tokens, (1, -1), fill=0)
    assert moved.dtype == torch.int64
    assert moved.tolist() == [[0, 0, 0], [0, 0, 0], [7, 0, 0]]
    assert torch.equal(tokens, before)


@quick
@given(sides, testing.shifts(3, identity=True), st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_crop_moves_content_like_a_roll_seen_through_the_window(size, shift, spare):
    """A window that moves against the shift shows what a fixed window shows of rolled content."""
    play = (abs(shift[0]) + spare[0], abs(shift[1]) + spare[1])
    images = torch.randn(2, size[0] + 2 * play[0], size[1] + 2 * play[1])
    window = (slice(play[0], play[0] + size[0]), slice(play[1], play[1] + size[1]))
    assert torch.equal(crop(images, shift, size=size), roll(images, shift)[:, window[0], window[1]])


def test_place_pastes_at_the_offset_only():
    """The sprite lies where asked; all else is ground."""
    sprite = torch.rand(2, 3, 2, 3)
    placed = place(sprite, (1, 4), size=(5, 8), fill=-1.0)
    assert torch.equal(placed[:, :, 1:3, 4:7], sprite)
    assert int((placed == -1).sum()) == 2 * 3 * (5 * 8 - 2 * 3)


@quick
@given(sides, small_shifts)
def test_valid_tokens_are_exactly_the_positions_that_exist_in_both(grid, shift):
    """Without wrapping, u is valid when u + shift lies on the grid; alignment pairs the two."""
    tokens = torch.arange(grid[0] * grid[1]).reshape(grid)
    moved = torch.from_numpy(moved_by_loops(tokens.numpy(), shift, wrap=False, fill=-1))
    expected = [
        int(tokens[y, x])
        for y in range(grid[0])
        for x in range(grid[1])
        if 0 <= y + shift[0] < grid[0] and 0 <= x + shift[1] < grid[1]
    ]
    for protocol in ("canvas", "crop"):
        first, second = align(tokens, moved, shift, protocol=protocol)
        assert first.flatten().tolist() == expected
        assert torch.equal(first, second)
        regions = valid_tokens(grid, shift, protocol)
        assert torch.equal(tokens[regions[0]], first)
        assert torch.equal(moved[regions[1]], second)


@quick
@given(sides, small_shifts)
def test_circular_alignment_undoes_the_roll_everywhere(grid, shift):
    """Under circular shifts all tokens are valid, and align inverts roll."""
    tokens = torch.randint(0, 99, grid)
    first, second = align(tokens, roll(tokens, shift), shift, protocol="circular")
    assert torch.equal(first, tokens)
    assert torch.equal(second, tokens)
    whole = (slice(0, grid[0]), slice(0, grid[1]))
    assert valid_tokens(grid, shift, "circular") == (whole, whole)


def dft_shift(signal: np.ndarray, amount: float) -> np.ndarray:
    """Shift columns (axis 0) by explicit DFT sums, the Nyquist frequency left out."""
    side = len(signal)
    out = np.zeros_like(signal)
    for n in range(side):
        for k in range(-((side - 1) // 2), (side - 1) // 2 + 1):
            for m in range(side):
                out[n] += (np.exp(2j * np.pi * k * (n - m - amount) / side) * signal[m]).real / side
    return out


@quick
@given(
    sides,
    st.tuples(st.floats(-3, 3), st.floats(-3, 3)).filter(lambda t: not any(a.is_integer() for a in t)),
)
def test_fourier_shift_matches_explicit_sums(size, shift):
    """Against a triple loop over the DFT, for even and odd sides, in float64."""
    latents = torch.randn(*size, dtype=torch.float64)
    expected = dft_shift(dft_shift(latents.numpy(), shift[0]).T, shift[1]).T
    np.testing.assert_allclose(fourier_shift(latents, shift).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("side", [7, 8])
def test_fourier_shift_moves_band_limited_signals_exactly(side):
    """A cosine below Nyquist is the same cosine, later."""
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64),) * 2, indexing="ij")

    def wave(dy: float, dx: float) -> torch.Tensor:
        turn = 2 * torch.pi / side
        return torch.cos(turn * 2 * (y - dy) + 0.3) * torch.sin(turn * 3 * (x - dx)) + torch.cos(turn * (x - dx))

    for shift in [(0.25, -1.75), (2.0, 0.5), (3.0, -4.0)]:
        torch.testing.assert_close(fourier_shift(wave(0, 0), shift), wave(*shift), rtol=0, atol=1e-12)


@quick
@given(sides, small_shifts)
def test_fourier_shift_by_integers_is_a_roll_bit_by_bit(size, shift):
    """Also with content at Nyquist, and in half precision."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        latents = torch.randn(2, 3, *size).to(dtype)
        amounts = (float(shift[0]), float(shift[1]))
        assert torch.equal(fourier_shift(latents, amounts), roll(latents, shift))


@pytest.mark.parametrize("turns", [10_000, -3])
def test_fourier_shift_counts_whole_turns_as_none(turns):
    """In float32 too, which cannot hold the phase of a large shift."""
    latents = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0))
    moved = fourier_shift(latents, (0.5 + 8 * turns, -0.25 + 10 * turns))
    torch.testing.assert_close(moved, fourier_shift(latents, (0.5, -0.25)), rtol=0, atol=1e-5)


def test_fourier_shift_drops_nyquist_along_the_moved_axis_only():
    """An alternating signal vanishes under half a token, and stays where its axis does not move."""
    rows = torch.tensor([1.0, -1.0]).repeat(4).reshape(8, 1).expand(8, 6).contiguous()
    assert float(fourier_shift(rows, (0.5, 0.0)).abs().max()) < 1e-6
    torch.testing.assert_close(fourier_shift(rows, (0.0, 0.5)), rows, rtol=0, atol=1e-6)


def lanczos_by_loops(signal: np.ndarray, amount: float, radius: int) -> tuple[list[int], list[float]]:
    """One output at a time, from Lanczos' formula; only those whose whole window lies on the signal."""

    def kernel(t: float) -> float:
        return float(np.sinc(t) * np.sinc(t / radius)) if abs(t) < radius else 0.0

    places, values = [], []
    for q in range(len(signal)):
        window = range(math.floor(q - amount) - radius - 1, math.ceil(q - amount) + radius + 2)
        weights = {i: kernel(q - amount - i) for i in window if abs(kernel(q - amount - i)) > 1e-15}
        if all(0 <= i < len(signal) for i in weights):
            places.append(q)
            values.append(sum(w * signal[i] for i, w in weights.items()) / sum(weights.values()))
    return places, values


@settings(deadline=None, max_examples=12)
@given(st.integers(-16, 16), st.integers(-16, 16), st.integers(1, 3))
def test_lanczos_shift_matches_its_formula(dy, dx, radius):
    """Values and region, along both axes by quarters of a pixel, against loops in float64."""
    dy, dx = dy / 4, dx / 4
    images = torch.rand(1, 12, 11, dtype=torch.float64)
    moved, (rows, columns) = lanczos_shift(images, (dy, dx), radius=radius)
    for image, found in zip(images.numpy(), moved.numpy(), strict=True):
        half = [lanczos_by_loops(column, dy, radius) for column in image.T]
        assert list(range(12))[rows] == half[0][0]
        shifted = np.array([values for _, values in half]).T
        whole = [lanczos_by_loops(row, dx, radius) for row in shifted]
        assert list(range(11))[columns] == whole[0][0]
        np.testing.assert_allclose(found, [values for _, values in whole], atol=1e-12)


def test_lanczos_shift_keeps_constants_and_moves_smooth_waves():
    """The taps sum to one; a slow wave lands where it should, a whole shift takes no window."""
    flat = torch.full((1, 3, 9, 9), -1.0)
    torch.testing.assert_close(lanczos_shift(flat, (0.3, 0.7))[0], flat[..., :4, :4], rtol=0, atol=1e-6)
    x = torch.arange(40, dtype=torch.float64)
    wave = torch.cos(x / 5).expand(8, 40)
    moved, (rows, columns) = lanczos_shift(wave, (2, -1.25))
    assert (rows, columns) == (slice(2, 8), slice(1, 36))
    torch.testing.assert_close(moved, torch.cos((x[columns] + 1.25) / 5).expand(6, 35), rtol=0, atol=1e-2)
    whole, (rows, columns) = lanczos_shift(wave, (0, 3.0))
    assert torch.equal(whole, wave[:, :37])
    assert (rows, columns) == (slice(0, 8), slice(3, 40))
    assert lanczos_shift(flat.bfloat16(), (0.5, 0))[0].dtype == torch.bfloat16
    torch.testing.assert_close(lanczos_shift(wave, (0, -1e-300))[0], wave)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: roll([[1]], (0, 0)), TypeError, "images must be a tensor, got list"),
        (lambda: roll(torch.zeros(3), (0, 0)), ValueError, r"images must be of shape \(\.\.\., H, W\)"),
        (lambda: roll(torch.zeros(3, 3), 1), TypeError, "shift must be a pair of ints, got 1"),
        (lambda: roll(torch.zeros(3, 3), (1, 2, 3)), ValueError, "shift must be a pair of ints"),
        (lambda: roll(torch.zeros(3, 3), (1, 0.5)), TypeError, r"shift\[1\] must be an int, got 0.5"),
        (lambda: canvas(torch.zeros(3, 3), (0, 0), fill=float("nan")), ValueError, "fill must be a finite number"),
        (
            lambda: canvas(torch.zeros(3, 3, dtype=torch.uint8), (0, 0), fill=-1.0),
            ValueError,
            r"fill must be an integer in \[0, 255\] for torch.uint8, got -1.0",
        ),
        (
            lambda: canvas(torch.zeros(3, 3).long(), (0, 0), fill=0.5),
            ValueError,
            r"fill must be an integer in \[-9223372036854775808, 9223372036854775807\] for torch.int64, got 0.5",
        ),
        (
            lambda: crop(torch.zeros(4, 4), (0, 0), size=(0, 2)),
            ValueError,
            "size must be at least 1 pixel each way",
        ),
        (
            lambda: crop(torch.zeros(4, 4), (2, 0), size=(2, 2)),
            ValueError,
            r"shift must be one that keeps a 2x2 window inside \(4, 4\), got \(2, 0\); pass larger images",
        ),
        (lambda: crop(torch.zeros(4, 4), (0, -2), size=(2, 2)), ValueError, "shift must be one that keeps a 2x2"),
        (
            lambda: place(torch.zeros(2, 2), (3, 0), size=(4, 4), fill=0.0),
            ValueError,
            r"offset must be one that keeps a \(2, 2\) sprite inside \(4, 4\), got \(3, 0\)",
        ),
        (lambda: place(torch.zeros(2, 2), (0, -1), size=(4, 4), fill=0.0), ValueError, "offset must be one"),
        (
            lambda: place(torch.zeros(2, 2), (0, 0), size=(4, 4), fill="0"),
            TypeError,
            "fill must be a finite number",
        ),
        (
            lambda: valid_tokens((2, 2), (0, 0), "mirror"),
            ValueError,
            "protocol must be one of 'circular', 'canvas'",
        ),
        (
            lambda: align(torch.zeros(2, 2), torch.zeros(2, 3), (0, 0), protocol="crop"),
            ValueError,
            r"shifted must be of shape \(2, 2\), got \(2, 3\)",
        ),
        (lambda: fourier_shift(torch.zeros(2, 2).long(), (0.5, 0)), TypeError, "latents must be floating point"),
        (lambda: fourier_shift(torch.zeros(2, 2), (0.5,)), ValueError, r"shift must be a pair \(dy, dx\)"),
        (lambda: lanczos_shift(torch.zeros(9, 9).long(), (0.5, 0)), TypeError, "images must be floating point"),
        (lambda: lanczos_shift(torch.zeros(9, 9), 0.5), TypeError, "shift must be a pair of numbers, got 0.5"),
        (lambda: lanczos_shift(torch.zeros(9, 9), (0, 0.5), radius=0), ValueError, "radius must be an int >= 1"),
        (
            lambda: lanczos_shift(torch.zeros(9, 5), (0, 0.5)),
            ValueError,
            r"one that leaves pixels of images of 9x5, whose window is 6 pixels wide, got \(0, 0.5\)",
        ),
        (
            lambda: fourier_shift(torch.zeros(2, 2), (0.5, float("inf"))),
            ValueError,
            r"shift\[1\] must be a finite",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, match):
    """One clear error for each."""
    with pytest.raises(error, match=match):
        call()


def test_every_public_name_exists():
    """``__all__`` lists what is there."""
    for name in shifts.__all__:
        assert hasattr(shifts, name)
