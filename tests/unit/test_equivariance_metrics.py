"""``measure_equivariance`` against loops, against tokenizers whose equivariance is known, and its refusals."""

import math
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_quant import testing
from te_quant.equivariance import best_token_shift, measure_equivariance, placement_agreement
from te_quant.equivariance.metrics.sub_stride import sub_stride_pairs
from te_quant.shifts import roll

STRIDE, NUM_CODES = 2, 5


def cell_hash(images: torch.Tensor, stride: int = STRIDE, num_codes: int = NUM_CODES) -> torch.Tensor:
    """Name each cell by its content alone: equivariant at every multiple of the stride."""
    cells = images.unfold(2, stride, stride).unfold(3, stride, stride)
    cells = ((cells + 1) * 1000).round().long().permute(0, 2, 3, 1, 4, 5).flatten(3)
    return (cells * torch.arange(1, cells.shape[-1] + 1)).sum(-1) % num_codes


def corner_pixel(images: torch.Tensor, stride: int = STRIDE) -> torch.Tensor:
    """Read the top left pixel of each cell in 16 levels: the worst aliasing there is."""
    return ((images[:, 0, ::stride, ::stride] + 1) * 7.99).long()


def ink_sprites(count: int, side: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random ink on about half of the pixels, the ground -1 elsewhere."""
    ink = torch.rand(count, 1, side, side, generator=generator)
    return torch.where(ink > 0.5, ink, torch.tensor(-1.0))


class Loops:
    """The metrics once more: one image, one position, one Python number at a time."""

    def __init__(self, tokenize, images: np.ndarray, size: int, protocol: str, tau: float) -> None:
        self.tokenize, self.images, self.size, self.protocol, self.tau = tokenize, images, size, protocol, tau
        self.grid = size // STRIDE

    def view(self, n: int, shift: tuple[int, int]) -> np.ndarray:
        """Paste, roll or crop image n, pixel by pixel."""
        source = self.images[n, 0]
        out = np.full((self.size, self.size), -1.0, dtype=source.dtype)
        corner = {"canvas": self.size // 4, "circular": (self.size - len(source)) // 2, "crop": 0}[self.protocol]
        play = (len(source) - self.size) // 2 if self.protocol == "crop" else 0
        for y, x in product(range(len(source)), repeat=2):
            ty, tx = y + corner + shift[0] - play, x + corner + shift[1] - play
            if self.protocol == "circular":
                ty, tx = ty % self.size, tx % self.size
            if 0 <= ty < self.size and 0 <= tx < self.size:
                out[ty, tx] = source[y, x]
        return out

    def tokens(self, image: np.ndarray) -> list[list[int]]:
        """Tokenize one image."""
        return self.tokenize(torch.from_numpy(image)[None, None])[0].tolist()

    def inked(self, image: np.ndarray, v: int, w: int) -> bool:
        """Look at every pixel of a cell."""
        cells = image[v * STRIDE : (v + 1) * STRIDE, w * STRIDE : (w + 1) * STRIDE]
        return any(abs(pixel + 1) > self.tau for pixel in cells.ravel())

    def aligned(self, shifts, foreground: bool) -> list[tuple[int, int]]:
        """List the pairs of whole-token shifts."""
        pairs = []
        for n, (dy, dx) in product(range(len(self.images)), shifts):
            base, moved = self.view(n, (0, 0)), self.view(n, (dy, dx))
            a, b = self.tokens(base), self.tokens(moved)
            for v, w in product(range(self.grid), repeat=2):
                tv, tw = v + dy // STRIDE, w + dx // STRIDE
                if self.protocol == "circular":
                    tv, tw = tv % self.grid, tw % self.grid
                inside = 0 <= tv < self.grid and 0 <= tw < self.grid
                if inside and (not foreground or self.inked(base, v, w)):
                    pairs.append((a[v][w], b[tv][tw]))
        return pairs

    def sub_stride(self, shifts, foreground: bool) -> list[tuple[int, int]]:
        """List the pairs of sub-stride shifts at the best of four token shifts."""
        pairs = []
        first = 0 if self.protocol == "circular" else 1
        for n, shift in product(range(len(self.images)), shifts):
            moved = self.view(n, shift)
            a, b = self.tokens(self.view(n, (0, 0))), self.tokens(moved)
            best: list[tuple[int, int]] = []
            best_equal = -1
            for ky, kx in product((0, 1), repeat=2):
                candidate = [
                    (a[(v - ky) % self.grid][(w - kx) % self.grid], b[v][w])
                    for v, w in product(range(first, self.grid), repeat=2)
                    if not foreground or self.inked(moved, v, w)
                ]
                equal = sum(p == q for p, q in candidate)
                if equal > best_equal:
                    best, best_equal = candidate, equal
            pairs += best
        return pairs


def assert_agrees(result, pairs: list[tuple[int, int]]) -> None:
    """Compare an agreement with pairs listed one by one."""
    assert result.tokens == len(pairs)
    if not pairs:
        assert math.isnan(result.rate)
        return
    rate = sum(a == b for a, b in pairs) / len(pairs)
    share = [[sum(pair[side] == c for pair in pairs) / len(pairs) for c in range(NUM_CODES)] for side in (0, 1)]
    chance = math.fsum(p * q for p, q in zip(*share, strict=True))
    assert result.rate == pytest.approx(rate, abs=1e-14)
    assert result.chance == pytest.approx(chance, abs=1e-13)
    assert result.kappa_defined == (chance < 1 - 1e-12)
    if result.kappa_defined:
        assert result.kappa == pytest.approx((rate - chance) / (1 - chance), abs=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["canvas", "circular", "sprites", "crop"]), st.data(), st.integers(0, 2**31))
def test_every_agreement_matches_loops_over_positions(kind, data, seed):
    """Aligned, sub-stride and foreground, for a tokenizer that depends on content and position."""
    generator = torch.Generator().manual_seed(seed)
    protocol = "circular" if kind == "sprites" else kind
    size = 8
    images = ink_sprites(2, {"canvas": 4, "sprites": 4, "circular": 8, "crop": 13}[kind], generator)
    noise = (torch.rand(4, 4, generator=generator) < 0.3).long()

    def tokenize(x):
        return (cell_hash(x) + noise) % NUM_CODES

    most = 7 if protocol == "circular" else 2
    steps = testing.shifts(most // 2 * STRIDE, multiple_of=STRIDE)
    shifts = data.draw(st.lists(steps, min_size=1, max_size=3, unique=True))
    report = measure_equivariance(
        tokenize,
        images,
        stride=STRIDE,
        num_codes=NUM_CODES,
        canvas_size=size,
        protocol=protocol,
        shifts=shifts,
        ground=-1.0,
    )
    loops = Loops(tokenize, images.numpy(), size, protocol, 0.1)
    below = [(0, 1), (1, 0), (1, 1)]
    assert report.settings.shifts == tuple(shifts)
    assert report.settings.sub_stride_shifts == tuple(below)
    for foreground, suffix in ((False, ""), (True, "_foreground")):
        assert_agrees(getattr(report, "aligned" + suffix), loops.aligned(shifts, foreground))
        assert_agrees(getattr(report, "sub_stride" + suffix), loops.sub_stride(below, foreground))
    assert [entry.shift for entry in report.aligned_by_shift] == shifts
    for entry in report.aligned_by_shift:
        assert_agrees(entry.agreement, loops.aligned([entry.shift], False))
    assert [entry.shift for entry in report.sub_stride_by_shift] == below
    for entry in report.sub_stride_by_shift:
        assert_agrees(entry.agreement, loops.sub_stride([entry.shift], False))
    if kind in ("canvas", "sprites"):
        options = {"canvas_size": size, "stride": STRIDE, "num_codes": NUM_CODES}
        assert report.placement == placement_agreement(tokenize, images, **options)
        assert_same(report.placement_foreground, placement_agreement(tokenize, images, tau=0.1, **options))
    else:
        assert report.placement is None
        assert report.placement_foreground is None


def assert_same(first, second) -> None:
    """Equal, where NaN equals NaN."""
    assert repr(first) == repr(second)


@pytest.mark.parametrize("protocol", ["canvas", "circular", "crop"])
def test_content_alone_is_exactly_equivariant_at_stride_multiples(protocol):
    """A hash of the cell: 1.0 exactly, all over and over ink; position makes it fail (negative control)."""
    images = ink_sprites(4, {"canvas": 8, "circular": 16, "crop": 24}[protocol])
    options = {"stride": 2, "num_codes": 64, "canvas_size": 16, "protocol": protocol, "ground": -1.0}
    report = measure_equivariance(lambda x: cell_hash(x, 2, 64), images, **options)
    assert report.aligned.rate == report.aligned_foreground.rate == 1.0
    assert report.aligned.kappa == report.aligned_foreground.kappa == 1.0
    rows = torch.arange(8)[:, None]
    broken = measure_equivariance(lambda x: (cell_hash(x, 2, 64) + rows) % 64, images, **options)
    assert broken.aligned.rate < 0.6
    assert broken.aligned_foreground.kappa < 0.6


def test_circular_wraps_where_canvas_leaves_out():
    """A tokenizer that is wrong on the border row only: circular counts it, canvas only where it is valid."""
    border = torch.zeros(4, 4, dtype=torch.int64)
    border[0] = 1
    options = {"stride": 2, "num_codes": 2, "canvas_size": 8, "shifts": [(-2, 0)]}
    rates = {
        protocol: measure_equivariance(
            lambda x: border.expand(len(x), 4, 4), ink_sprites(2, 4), protocol=protocol, **options
        ).aligned
        for protocol in ("canvas", "circular")
    }
    assert rates["circular"].rate == 0.5
    assert rates["canvas"].rate == pytest.approx(2 / 3)
    assert (rates["circular"].tokens, rates["canvas"].tokens) == (32, 24)


def test_reading_one_pixel_is_whole_on_blocky_images_and_broken_on_fine_ones():
    """Sub-stride: a one-pixel reader lands on a whole-token shift if cells are constant, else aliases."""
    blocks = torch.rand(4, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    noise = torch.rand(4, 1, 32, 32) * 2 - 1
    options = {"stride": 4, "num_codes": 16, "protocol": "circular"}
    whole = measure_equivariance(lambda x: corner_pixel(x, 4), blocks, **options)
    assert whole.sub_stride.rate == whole.sub_stride.kappa == 1.0
    broken = measure_equivariance(lambda x: corner_pixel(x, 4), noise, **options)
    assert broken.aligned.rate == 1.0
    assert broken.sub_stride.kappa < 0.15


def test_shift_invariant_tokens_survive_sub_stride_shifts():
    """One token from the mean of the image: unchanged under every circular shift, with a defined κ."""
    images = torch.linspace(-0.9, 0.9, 8)[:, None, None, None] + torch.rand(8, 1, 8, 8) * 0.01
    report = measure_equivariance(
        lambda x: ((x.double().mean((1, 2, 3)) + 1) * 7).long()[:, None, None].expand(-1, 2, 2),
        images,
        stride=4,
        num_codes=16,
        protocol="circular",
    )
    assert report.sub_stride.rate == 1.0
    assert report.sub_stride.kappa == 1.0


def test_one_code_scores_one_and_is_flagged_everywhere():
    """Collapse: every rate is 1, every κ undefined, one code used."""
    report = measure_equivariance(
        lambda x: torch.full((len(x), 8, 8), 2), ink_sprites(3, 8), stride=2, num_codes=4, canvas_size=16
    )
    assert len(report.agreements()) == 6
    for agreement in report.agreements().values():
        assert agreement.rate == 1.0
        assert math.isnan(agreement.kappa)
        assert not agreement.kappa_defined
    assert report.code_use.used_codes == report.code_use.frequent_codes == 1
    assert report.code_use.perplexity == pytest.approx(1.0)


def test_random_tokens_have_kappa_near_zero():
    """Negative control: tokens drawn anew for each view; the best of four token shifts adds only a little."""

    def tokenize(images):
        seeds = [zlib.crc32(image.numpy().tobytes()) for image in images]
        drawn = [torch.randint(0, 8, (16, 16), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn)

    report = measure_equivariance(tokenize, ink_sprites(16, 32), stride=4, num_codes=8, canvas_size=64)
    for name in ("placement", "placement_foreground", "aligned", "aligned_foreground"):
        assert abs(report.agreements()[name].kappa) < 0.03
    assert 0 < report.sub_stride.kappa < 0.06
    assert report.code_use.perplexity == pytest.approx(8, abs=0.1)


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 6))
def test_nothing_depends_on_the_batch_split(batch_size):
    """Counts are equal to the last bit, sums of errors up to rounding.

    In float64: with several threads a Fourier transform of one image is rounded otherwise than that of many.
    """
    generator = torch.Generator().manual_seed(3)
    sprites = ink_sprites(5, 8, generator).double()

    def measure(size):
        return measure_equivariance(
            lambda x: corner_pixel(x, 2),
            sprites,
            stride=2,
            num_codes=16,
            canvas_size=16,
            reconstruct=lambda x: x * 0.9,
            latents=lambda x: x[:, :, ::2, ::2],
            quantize=lambda z: ((z[:, 0].clamp(-1, 1) + 1) * 7.99).long(),
            batch_size=size,
        )

    whole, split = measure(64), measure(batch_size)
    assert split.agreements() == whole.agreements()
    for name in ("aligned_by_shift", "sub_stride_by_shift"):
        for one, other in zip(getattr(whole, name), getattr(split, name), strict=True):
            assert other.shift == one.shift
            assert other.agreement == one.agreement
            assert other.feature_error == pytest.approx(one.feature_error, rel=1e-10)
            assert other.end_to_end == pytest.approx(one.end_to_end, rel=1e-10)
    assert list(split.errors()) == list(whole.errors()) != []
    for name, error in whole.errors().items():
        assert split.errors()[name].decibels == pytest.approx(error.decibels, rel=1e-10)
        assert split.errors()[name].interval == pytest.approx(error.interval, rel=1e-10)
    assert split.reconstruction.l1_interval == pytest.approx(whole.reconstruction.l1_interval, rel=1e-10)
    # Batches of one differ from others, not from themselves.
    assert split.numerical_floor == (whole.numerical_floor if batch_size > 1 else {})
    assert split.code_use == whole.code_use
    assert split.reconstruction.l1 == pytest.approx(whole.reconstruction.l1, rel=1e-12)
    assert split.reconstruction.psnr == pytest.approx(whole.reconstruction.psnr, rel=1e-12)


def test_code_use_and_reconstruction_are_taken_over_the_five_placements():
    """Used codes, share above 0.1 %, perplexity and errors equal those computed over the placed images."""
    sprites = torch.rand(3, 1, 8, 8) * 2 - 1
    placed = torch.full((5, 3, 1, 16, 16), -1.0)
    for n, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]):
        placed[n, :, :, top : top + 8, left : left + 8] = sprites
    report = measure_equivariance(
        cell_hash, sprites, stride=2, num_codes=NUM_CODES, canvas_size=16, reconstruct=lambda x: x + 0.5 * (x > 0)
    )
    counts = np.bincount(cell_hash(placed.flatten(0, 1)).flatten().numpy(), minlength=NUM_CODES)
    share = counts[counts > 0] / counts.sum()
    assert report.code_use.tokens == 5 * 3 * 64
    assert report.code_use.used_codes == (counts > 0).sum()
    assert report.code_use.frequent_codes == (counts > counts.sum() / 1000).sum()
    assert report.code_use.perplexity == pytest.approx(math.exp(-(share * np.log(share)).sum()))
    positive = float((placed > 0).double().mean())
    assert report.reconstruction.l1 == pytest.approx(0.5 * positive, rel=1e-6)
    assert report.reconstruction.mse == pytest.approx(0.25 * positive, rel=1e-6)
    assert report.reconstruction.psnr == pytest.approx(20 * math.log10(2) - 10 * math.log10(0.25 * positive))
    assert report.settings.reference_images == "3 sprites at five places each"


def test_perfect_reconstruction_has_infinite_psnr():
    """No error: PSNR is inf, over the unshifted images when these are no sprites."""
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    report = measure_equivariance(
        cell_hash, images, stride=2, num_codes=NUM_CODES, protocol="circular", reconstruct=lambda x: x
    )
    assert report.reconstruction.l1 == report.reconstruction.mse == 0
    assert report.reconstruction.psnr == math.inf
    assert report.code_use.tokens == 2 * 4 * 6
    assert report.settings.image_size == (8, 12)
    assert report.settings.reference_images == "2 unshifted images"


def test_fourier_form_follows_band_limited_images_and_not_noise():
    """Sampling a band-limited image commutes with fractional shifts; white noise aliases."""
    y, x = torch.meshgrid(*(torch.arange(32, dtype=torch.float64) * torch.pi / 16,) * 2, indexing="ij")
    waves = [torch.cos(a * y + b * x + p) for a, b, p in [(1, 2, 0.1), (3, -1, 0.7), (2, 3, 0.4), (0, 1, 0.2)]]
    smooth = torch.stack([waves[0] + waves[1], waves[2] - waves[3]])[:, None] / 2
    options = {
        "stride": 4,
        "num_codes": 16,
        "protocol": "circular",
        "ground": -1.0,
        "latents": lambda x: x[:, :, ::4, ::4],
        "quantize": lambda z: ((z[:, 0].clamp(-1, 1) + 1 + 1e-9) * 7.9).long(),
    }

    def tokenize(images):
        return options["quantize"](options["latents"](images))

    report = measure_equivariance(tokenize, smooth, **options)
    assert report.sub_stride_fourier.rate == report.sub_stride_fourier.kappa == 1.0
    assert report.sub_stride_fourier_foreground.rate == 1.0
    assert report.sub_stride.rate < 0.5
    noise = torch.rand(2, 1, 32, 32, dtype=torch.float64) * 2 - 1
    assert measure_equivariance(tokenize, noise, **options).sub_stride_fourier.kappa < 0.3


def test_best_token_shift_is_chosen_for_each_image():
    """Images that moved by different token shifts are each followed; equal scores take the first."""
    reference = torch.randint(0, 1000, (4, 6, 6))
    moved = torch.stack([roll(r, k) for r, k in zip(reference, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True)])
    for protocol in ("circular", "canvas"):
        assert torch.equal(best_token_shift(reference, moved, protocol=protocol), moved)
        first, second, _ = sub_stride_pairs(reference, moved, protocol=protocol)
        assert torch.equal(first, second)
    unrelated = torch.full_like(reference, 1001)
    assert torch.equal(best_token_shift(reference, unrelated, protocol="circular"), reference)


def polyphase(images: torch.Tensor, stride: int, *, adaptive: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive polyphase sampling: the phase (top, left) of largest energy, image by image, then a hash of it."""
    energy = torch.stack(
        [(images[:, 0, a::stride, b::stride] ** 2).sum((1, 2)) for a, b in product(range(stride), repeat=2)]
    )
    best = energy.argmax(0) if adaptive else torch.zeros(len(images), dtype=torch.int64)
    picked = [
        x[0, p // stride :: stride, p % stride :: stride] for x, p in zip(images, best.tolist(), strict=True)
    ]
    return (torch.stack(picked) * 9973).round().long() % 101, best


@pytest.mark.parametrize("stride", [2, 4])
def test_two_token_shifts_an_axis_are_enough_for_adaptive_polyphase_sampling(stride):
    """The law i(T_t x) = R_k i(x), k = (t + o - o')/s, holds exactly with k in {0, 1}², for all of s² shifts."""
    images = torch.rand(24, 1, 12, 16, dtype=torch.float64) * 2 - 1
    options = {"stride": stride, "num_codes": 101, "protocol": "circular", "ground": -1.0}
    report = measure_equivariance(lambda x: polyphase(x, stride)[0], images, **options)
    assert len(report.sub_stride_by_shift) == stride**2 - 1
    assert report.sub_stride.rate == report.aligned.rate == 1.0
    assert report.sub_stride.kappa == report.sub_stride_foreground.kappa == 1.0
    assert report.sub_stride.differing == 0
    found = set()
    for shift in report.settings.sub_stride_shifts:
        o, o_moved = polyphase(images, stride)[1], polyphase(roll(images, shift), stride)[1]
        for axis, part in enumerate((lambda p: p // stride, lambda p: p % stride)):
            steps = shift[axis] + part(o) - part(o_moved)
            assert torch.all(steps % stride == 0)
            found |= set((steps // stride).tolist())
    assert found == {0, 1}
    fixed = measure_equivariance(lambda x: polyphase(x, stride, adaptive=False)[0], images, **options)
    assert fixed.aligned.rate == 1.0
    assert fixed.sub_stride.kappa < 0.1


def test_default_shifts_are_the_smallest_and_the_largest():
    """None twice, no identity, and a number that does not grow with the grid."""

    def shifts(protocol, images, **options):
        report = measure_equivariance(
            lambda x: torch.zeros(len(x), x.shape[2] // 4, x.shape[3] // 4, dtype=torch.int64),
            images,
            stride=4,
            num_codes=1,
            protocol=protocol,
            sub_stride_shifts=[],
            **options,
        )
        assert report.sub_stride.tokens == 0
        return report.settings.shifts

    def pairs(steps):
        return {(dy, dx) for dy in steps for dx in steps} - {(0, 0)}

    sprites = -torch.ones(1, 1, 32, 32)
    for chosen, steps in [
        (shifts("canvas", sprites), (-16, -4, 0, 4, 16)),
        (shifts("canvas", -torch.ones(1, 1, 8, 8)), (-4, 0, 4)),
        (shifts("circular", sprites), (0, 4, 16, 28)),
        (shifts("circular", -torch.ones(1, 1, 8, 8)), (0, 4)),
        (shifts("circular", -torch.ones(1, 1, 4, 4)), (0,)),
        (shifts("crop", -torch.ones(1, 1, 57, 57), canvas_size=32), (-12, -4, 0, 4, 12)),
        (shifts("crop", sprites, canvas_size=28, shifts=[]), (0,)),
        (shifts("crop", sprites, canvas_size=24), (-4, 0, 4)),
        (shifts("crop", sprites, canvas_size=8), (-4, 0, 4)),
    ]:
        assert len(chosen) == len(set(chosen))
        assert set(chosen) == pairs(steps)


SPRITES = -torch.ones(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"images": torch.zeros(1, 8, 8)}, ValueError, r"images must be of shape \(B, C, H, W\)"),
        ({"images": SPRITES.long()}, TypeError, "images must be floating point"),
        ({"images": SPRITES[:0]}, ValueError, "images must be at least one, got shape"),
        ({"protocol": "mirror"}, ValueError, "protocol must be one of 'circular', 'canvas', 'crop', got 'mirror'"),
        ({"stride": 0}, ValueError, "stride must be an int >= 1"),
        ({"stride": 3}, ValueError, r"canvas_size must be a multiple of 4 \* stride = 12, got 16"),
        ({"num_codes": 0}, ValueError, "num_codes must be an int >= 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1"),
        ({"tau": -0.1}, ValueError, "tau must be a finite number >= 0"),
        ({"ground": math.nan}, ValueError, "ground must be a finite number"),
        ({"canvas_size": 16.0}, TypeError, "canvas_size must be an int"),
        ({"canvas_size": 32}, ValueError, r"images sides must be half of canvas_size=32, got \(8, 8\)"),
        ({"canvas_size": 8}, ValueError, "images sides must be half of canvas_size=8 under 'canvas'"),
        (
            {"protocol": "crop"},
            ValueError,
            r"images sides must be larger than 11 pixels under 'crop', .* moves by a token, got \(8, 8\)",
        ),
        (
            {"protocol": "crop", "canvas_size": 6},
            ValueError,
            r"canvas_size must be a window of two tokens or more that can move by a token of 2 pixels, got 6x6 "
            r"with \(1, 1\) pixels of room; pass images of at least 10x10 pixels, canvas_size=\(4, 4\), or sh",
        ),
        (
            {"protocol": "crop", "canvas_size": 2},
            ValueError,
            r"got 2x2 with \(3, 3\) pixels of room; pass images of at least 8x8 pixels, canvas_size=\(4, 4\), or",
        ),
        (
            {"protocol": "crop", "canvas_size": 4, "images": SPRITES[..., :6, :6]},
            ValueError,
            r"got 4x4 with \(1, 1\) pixels of room; pass images of at least 8x8 pixels, or shifts=\[\] to measure "
            "no whole tokens",
        ),
        (
            {"protocol": "crop", "canvas_size": 9},
            ValueError,
            r"at most the images' sides \(8, 8\)",
        ),
        (
            {"protocol": "crop", "canvas_size": (5, 6)},
            ValueError,
            r"canvas_size must be multiples of stride=2, got \(5, 6\); pass canvas_size=\(4, 6\)",
        ),
        ({"canvas_size": (16, 16, 16)}, ValueError, r"canvas_size must be a side or a pair \(height, width\)"),
        ({"canvas_size": (16, 0)}, ValueError, r"canvas_size\[1\] must be an int >= 1"),
        (
            {"images": SPRITES[..., :4]},
            ValueError,
            r"images sides must be equal, .* in the quadrants of a square, got \(8, 4\); pad the images to 8x8",
        ),
        (
            {"tau": 0.1, "protocol": "circular", "images": -SPRITES},
            ValueError,
            "ground must be given with tau, as not every image shows a token of the ground -1, got None",
        ),
        ({"sub_stride_shifts": "some"}, ValueError, r"sub_stride_shifts must be pairs .*, or 'all', got 'some'"),
        ({"sub_stride_shifts": 0}, ValueError, "sub_stride_shifts must be an int >= 1, got 0"),
        ({"sub_stride_shifts": True}, TypeError, "sub_stride_shifts must be an int >= 1, got True"),
        ({"fractional_shifts": 0}, ValueError, "fractional_shifts must be an int >= 1, got 0"),
        (
            {"fractional_shifts": [0.5]},
            TypeError,
            r"fractional_shifts must be pairs \(dy, dx\) of numbers, got 0.5",
        ),
        ({"fractional_shifts": [(0.5, 2.0)]}, ValueError, "fractional_shifts values must be .* < 2, got 2.0"),
        ({"fractional_shifts": [(1, 0.0)]}, ValueError, "pairs of which one number at least is not whole"),
        (
            {"protocol": "crop", "canvas_size": 4, "fractional_shifts": 1},
            ValueError,
            r"fractional_shifts of up to 4 pixels must leave a window of 4x4 inside the images, got \(2, 2\)",
        ),
        ({"progress": 1}, TypeError, "progress must be True, False or None, got 1"),
        ({"protocol": "circular", "images": torch.zeros(1, 1, 8, 9)}, ValueError, "multiples of stride=2"),
        (
            {"protocol": "crop", "canvas_size": 8},
            ValueError,
            r"sub_stride_shifts of up to 1 pixels must leave a window of 8x8 inside the images, got \(0, 0\) "
            "pixels of room; pass images of at least 10x10 pixels, a smaller canvas_size, or sub_stride_shifts",
        ),
        ({"shifts": [(0, 0)]}, ValueError, r"shifts must be without the identity, got \(0, 0\)"),
        (
            {"shifts": [(16, -16)], "protocol": "circular", "canvas_size": 16},
            ValueError,
            r"shifts must be without the identity, got \(16, -16\)",
        ),
        ({"shifts": [(2, 1)]}, ValueError, r"shifts must be multiples of stride=2, got \(2, 1\)"),
        ({"shifts": [(6, 0)]}, ValueError, r"shifts must be at most \(4, 4\) pixels under 'canvas', got \(6, 0\)"),
        ({"shifts": [(2, 0), (2, 0)]}, ValueError, "shifts must be without repetition"),
        (
            {"shifts": [(2, 0), (-14, 0)], "protocol": "circular", "canvas_size": 16},
            ValueError,
            r"shifts must be without repetition, got \[\(2, 0\), \(-14, 0\)\]",
        ),
        ({"shifts": [2]}, TypeError, r"shifts must be pairs \(dy, dx\) of ints, got 2"),
        ({"shifts": [(2.0, 0)]}, TypeError, "shifts values must be an int, got 2.0"),
        ({"sub_stride_shifts": [(0, 0)]}, ValueError, "sub_stride_shifts must be without the identity"),
        ({"sub_stride_shifts": [(2, 0)]}, ValueError, "sub_stride_shifts must be pairs from 0 to stride - 1 = 1"),
        ({"sub_stride_shifts": [(0, -1)]}, ValueError, "sub_stride_shifts must be pairs from 0"),
        ({"quantize": lambda x: x}, ValueError, "quantize must be given with latents, got quantize without"),
        ({"codebook": torch.zeros(5, 1)}, ValueError, "codebook must be given with latents, got codebook without"),
        ({"latents": lambda x: x, "codebook": torch.zeros(5)}, ValueError, r"codebook must be of shape \(K, C\)"),
        (
            {"latents": lambda x: x, "codebook": torch.zeros(5, 1).long()},
            TypeError,
            "codebook must be floating point",
        ),
        (
            {"latents": lambda x: x, "codebook": torch.zeros(4, 1)},
            ValueError,
            "codebook axis 0 must be num_codes=5",
        ),
        (
            {"latents": lambda x: x, "codebook": torch.full((5, 1), math.nan)},
            ValueError,
            "codebook must be finite",
        ),
        (
            {"latents": lambda x: x[:, :, ::2, ::2], "codebook": torch.zeros(5, 2)},
            ValueError,
            r"latents\(images\) axis 1 must be codebook axis 1=2, got 1",
        ),
        (
            {"latents": lambda x: x[:, :, ::2, ::2] * math.nan},
            ValueError,
            r"latents\(images\) must be finite, got 128 NaN",
        ),
        ({"latents": lambda x: x[:, :, ::2, ::2].long()}, TypeError, r"latents\(images\) must be floating point"),
        ({"resamples": -1}, ValueError, "resamples must be an int >= 0"),
        ({"seed": -1}, ValueError, "seed must be an int >= 0"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"variants": {"half": "bfloat16"}}, TypeError, r"variants\['half'\] must be an int >= 1, got 'bfloat16'"),
        ({"tokenize": lambda x: torch.zeros(len(x), 8, 8)}, TypeError, r"tokenize\(images\) must be an integer"),
        (
            {"tokenize": lambda x: torch.zeros(len(x), 4, 4).long()},
            ValueError,
            r"tokenize\(images\) must be of shape \(2, 8, 8\), got shape \(2, 4, 4\)",
        ),
        (
            {"reconstruct": lambda x: x[:, :, 1:]},
            ValueError,
            r"reconstruct\(images\) must be of shape \(2, 1, 16, 16\), got shape \(2, 1, 15, 16\)",
        ),
        ({"reconstruct": lambda x: x.long()}, TypeError, r"reconstruct\(images\) must be floating point"),
        (
            {"latents": lambda x: x, "quantize": lambda z: z},
            ValueError,
            r"latents\(images\) must be of grid \(8, 8\), got shape \(2, 1, 16, 16\)",
        ),
        (
            {"latents": lambda x: x[:, :, ::2, ::2], "quantize": lambda z: z[:, 0]},
            TypeError,
            r"quantize\(latents\) must be an integer tensor",
        ),
    ],
)
def test_wrong_arguments_are_refused(change, error, match):
    """One clear error for each."""
    options = {"tokenize": cell_hash, "images": SPRITES, "stride": 2, "num_codes": NUM_CODES} | change
    with pytest.raises(error, match=match):
        measure_equivariance(options.pop("tokenize"), options.pop("images"), **options)


@pytest.mark.parametrize(
    ("reference", "shifted", "protocol", "match"),
    [
        ((2, 2), (2, 2), "canvas", r"reference must be of shape \(B, h, w\)"),
        ((1, 2, 2), (1, 2, 1), "canvas", r"shifted must be of shape \(1, 2, 2\), got \(1, 2, 1\)"),
        ((1, 2, 2), (1, 2, 2), "mirror", "protocol must be one of"),
    ],
)
def test_best_token_shift_refuses_other_shapes(reference, shifted, protocol, match):
    """Rank and shape are checked, and the protocol."""
    with pytest.raises(ValueError, match=match):
        best_token_shift(torch.zeros(reference).long(), torch.zeros(shifted).long(), protocol=protocol)


@pytest.mark.parametrize(
    ("reference", "mask", "error", "match"),
    [
        (torch.zeros(1, 2, 2), None, TypeError, "reference must be an integer tensor, got torch.float32"),
        (torch.zeros(1, 2, 2).long(), torch.ones(1, 2, 2).long(), TypeError, "mask must be bool, got torch.int64"),
        (
            torch.zeros(1, 2, 2).long(),
            torch.ones(2, 2, dtype=torch.bool),
            ValueError,
            r"mask must be of shape \(1, 2, 2\) as the reference, got shape \(2, 2\)",
        ),
    ],
)
def test_best_token_shift_counts_tokens_only(reference, mask, error, match):
    """An integer mask would count a token as often as its value says."""
    with pytest.raises(error, match=match):
        best_token_shift(reference, torch.zeros(1, 2, 2).long(), protocol="circular", mask=mask)
