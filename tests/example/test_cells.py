"""The cells that the classifier learns from: what they show, how far they are distorted, in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.te_vqgan.classifier.cells import CellDataset, Distortion
from examples.te_vqgan.data.quadrants import QuadrantImages
from examples.te_vqgan.data.recipes import COLORS
from examples.te_vqgan.data.sources import SPLITS, DigitSource, DigitSplit

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.sampled_from([32, 64, 96])
CLEAN = Distortion()
CHANNELS = {"white": (0, 1, 2), "red": (0,), "green": (1,), "blue": (2,)}


def _source(pictures: np.ndarray) -> DigitSource:
    split = DigitSplit(pictures.astype(np.uint8), np.arange(len(pictures), dtype=np.int64) % 10)
    return DigitSource("made", tuple("0123456789"), split, split, split)


def _noise(seed: int, count: int = 12, side: int = 28) -> DigitSource:
    return _source(np.random.default_rng(seed).integers(0, 256, (count, side, side)))


def _ink(cells: Tensor) -> np.ndarray:
    """Intensity of the brightest channel, 0 to 1, (B, c, c) in float64."""
    return (cells.double().amax(dim=1).numpy() + 1) / 2


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, side=SIDES, split=st.sampled_from(SPLITS))
def test_fixed_cells_are_those_of_the_quadrant_images(seed: int, side: int, split: str) -> None:
    """The digit lights the channels of its colour as the images do, and no other; labels are the split's."""
    source = _noise(seed, side=7)
    cells = CellDataset(source, split, canvas_size=side, seed=seed)
    batch = cells.fixed(2, 9)
    ink = QuadrantImages(source.split(split).images, side).cells[2:9] / 255
    assert batch.cells.shape == (7, 3, side // 2, side // 2)
    assert batch.cells.dtype == torch.float32
    assert batch.digits.tolist() == source.split(split).labels[2:9].tolist()
    for row in range(7):
        lit = CHANNELS[COLORS[int(batch.colors[row])]]
        for channel in range(3):
            expected = 2 * ink[row] - 1 if channel in lit else np.full_like(ink[row], -1)
            assert np.allclose(batch.cells[row, channel].numpy(), expected, atol=1e-6)
    assert all(torch.equal(one, two) for one, two in zip(batch, cells.fixed(2, 9), strict=True))


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, side=SIDES, step=st.integers(0, 1000))
def test_a_batch_is_a_pure_function_of_seed_and_step(seed: int, side: int, step: int) -> None:
    """Whatever was drawn before; another seed, step or split gives other cells."""
    source = _noise(seed, side=7)
    distortion = Distortion(0.1, 20.0, 0.1, 0.1, 0.5)
    first, second = (CellDataset(source, "train", canvas_size=side, seed=seed) for _ in range(2))
    second.batch(step + 1, 5, distortion)
    torch.manual_seed(seed)
    batch = first.batch(step, 5, distortion)
    assert all(torch.equal(one, two) for one, two in zip(batch, second.batch(step, 5, distortion), strict=True))
    others = {
        "step": first.batch(step + 1, 5, distortion),
        "seed": CellDataset(source, "train", canvas_size=side, seed=seed + 1).batch(step, 5, distortion),
        "split": CellDataset(source, "test", canvas_size=side, seed=seed).batch(step, 5, distortion),
    }
    for name, other in others.items():
        assert not torch.equal(batch.cells, other.cells), name


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, count=st.integers(3, 20), size=st.integers(1, 9))
def test_every_epoch_shows_every_digit_once(seed: int, count: int, size: int) -> None:
    """Batches cross the end of an epoch without a gap; two epochs differ in order."""
    # Digit i is a flat square of intensity 10 (i + 1), so that its cells tell which it is.
    pictures = np.broadcast_to(10 * (1 + np.arange(count))[:, None, None], (count, 28, 28))
    cells = CellDataset(_source(pictures), "train", canvas_size=32, seed=seed)
    rows: list[int] = []
    for step in range(-(-2 * count // size)):
        batch = cells.batch(step, size, CLEAN)
        found = np.rint(_ink(batch.cells).max(axis=(1, 2)) * 25.5).astype(int) - 1
        assert (batch.digits.numpy() == found % 10).all()
        rows += found.tolist()
    assert sorted(rows[:count]) == sorted(rows[count : 2 * count]) == list(range(count))
    if count > 9:  # equal orders have a chance of 1 in 10! and less
        assert rows[:count] != rows[count : 2 * count]


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, side=SIDES)
def test_without_distortion_training_cells_are_the_fixed_ones(seed: int, side: int) -> None:
    """But for their colours, and to half a grey value, as small cells are averaged without rounding."""
    cells = CellDataset(_noise(seed, count=1), "train", canvas_size=side, seed=seed)
    expected = _ink(cells.fixed(0, 1).cells)
    difference = np.abs(_ink(cells.batch(3, 4, CLEAN).cells) - expected)
    assert difference.max() <= 0.501 / 255
    for changed in (
        Distortion(shift=0.1),
        Distortion(rotation=45.0),
        Distortion(scale=0.3),
        Distortion(shear=0.3),
    ):
        assert np.abs(_ink(cells.batch(3, 4, changed).cells) - expected).max() > 0.02


def _dot(y: float, x: float) -> DigitSource:
    """One smooth dot, (y, x) pixels from the middle of a 28-pixel picture."""
    at = np.arange(28) - 13.5
    return _source(np.rint(250 * np.exp(-((at[:, None] - y) ** 2 + (at - x) ** 2) / 4))[None])


def _centres(source: DigitSource, distortion: Distortion, side: int) -> np.ndarray:
    """Where the dot is in 400 cells, (y, x) from the middle in pixels of a 28-pixel digit; (400, 2)."""
    ink = _ink(CellDataset(source, "train", canvas_size=side, seed=1).batch(0, 400, distortion).cells)
    at = (np.arange(side // 2) - (side // 2 - 1) / 2) * 64 / side
    total = ink.sum(axis=(1, 2))
    return np.stack([(ink.sum(axis=2) * at).sum(1) / total, (ink.sum(axis=1) * at).sum(1) / total], axis=1)


@pytest.mark.parametrize("side", [32, 64])
def test_distortions_reach_their_limits_and_keep_them(side: int) -> None:
    """Shifts, turns, scales and shears of one dot, each alone."""
    close = 0.15  # pixels; resampling a dot moves its centre by less
    limit = 2.0
    moved = _centres(_dot(0, 0), Distortion(shift=limit / 32), side)
    for axis in range(2):
        assert -limit - close < moved[:, axis].min() < -0.9 * limit
        assert 0.9 * limit < moved[:, axis].max() < limit + close
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.25

    turned = _centres(_dot(0, 6), Distortion(rotation=30.0), side)
    assert np.abs(np.hypot(*turned.T) - 6).max() < close
    angles = np.degrees(np.arctan2(turned[:, 0], turned[:, 1]))
    assert -31.5 < angles.min() < -27
    assert 27 < angles.max() < 31.5

    scaled = _centres(_dot(5, -5), Distortion(scale=0.2), side) / np.array([5, -5])
    for axis in range(2):
        assert 0.8 - close / 5 < scaled[:, axis].min() < 0.83
        assert 1.17 < scaled[:, axis].max() < 1.2 + close / 5
    assert abs(np.corrcoef(scaled.T)[0, 1]) < 0.25

    sheared = _centres(_dot(6, 0), Distortion(shear=0.3), side)
    assert np.abs(sheared[:, 0] - 6).max() < close
    assert -1.8 - close < sheared[:, 1].min() < -1.6
    assert 1.6 < sheared[:, 1].max() < 1.8 + close


def test_flaws_hit_the_stated_share_of_the_cells() -> None:
    """None, some or all; pixels stay in range, and noise is on the ground too."""
    cells = CellDataset(_noise(3, count=1), "train", canvas_size=32)
    clean = _ink(cells.fixed(0, 1).cells)
    for share in (0.0, 0.3, 1.0):
        batch = cells.batch(0, 1000, Distortion(flaws=share))
        assert batch.cells.abs().max() <= 1
        flawed = np.abs(_ink(batch.cells) - clean).max(axis=(1, 2)) > 1 / 255
        assert abs(flawed.mean() - share) <= 6 * (share * (1 - share) / 1000) ** 0.5
        # Corners are ground in every clean cell.
        assert ((batch.cells[:, :, 0, 0] > -1).any(dim=1).numpy() <= flawed).all()


def test_flaws_dim_blur_and_cut() -> None:
    """A flat square is dimmed by at most 40 %, its edge softens, and half of the cells lose a part."""
    flat = _source(np.full((1, 28, 28), 255))
    ink = _ink(CellDataset(flat, "train", canvas_size=64).batch(0, 600, Distortion(flaws=1.0)).cells)
    inner, edge = ink[:, 6:-6, 6:-6], ink[:, 2, 6:-6]
    level = np.median(inner, axis=(1, 2))
    assert 0.55 < level.min() < 0.65
    assert level.max() > 0.97
    # Blurred by a random share: the outermost row of ink has 3/4 to all of it.
    softness = np.median(edge, axis=1) / level
    assert 0.65 < softness.min() < 0.85  # noise moves the median
    assert softness.max() > 0.95
    cut = np.array([(cell < 0.5 * mid).sum() for cell, mid in zip(inner, level, strict=True)]) > 8
    # A square of 6 of 32 pixels at a random corner touches the inner 20 nearly always.
    assert 0.3 < cut.mean() < 0.6


def test_colours_are_equally_likely_and_change_every_epoch() -> None:
    """In batches and in fixed cells; the four do not follow the digit."""
    cells = CellDataset(_noise(5, count=2000, side=7), "train", canvas_size=32, seed=7)
    first, second, fixed = cells.batch(0, 2000, CLEAN), cells.batch(1, 2000, CLEAN), cells.fixed(0, 2000)
    for batch in (first, second, fixed):
        counts = np.bincount(batch.colors.numpy(), minlength=4)
        assert ((counts - 500) ** 2 / 500).sum() < 30  # 3 degrees of freedom: chance 1e-6
        table = np.zeros((10, 4))
        np.add.at(table, (batch.digits.numpy(), batch.colors.numpy()), 1)
        assert ((table - 50) ** 2 / 50).sum() < 100  # 39 degrees of freedom: chance 1e-6
    assert (first.colors == second.colors).float().mean() < 0.35
    lit = (fixed.cells > -1).any(dim=3).any(dim=2)
    names = [name for name, channels in CHANNELS.items()]
    for row in range(2000):
        assert tuple(lit[row].nonzero()[:, 0].tolist()) == CHANNELS[names[int(fixed.colors[row])]]


@pytest.mark.parametrize(
    ("split", "options", "match"),
    [
        ("all", {"canvas_size": 32}, "split must be one of 'train', 'validation', 'test', got 'all'"),
        ("train", {"canvas_size": 32, "seed": -1}, "seed must be an int >= 0, got -1"),
        ("train", {"canvas_size": 40}, "canvas_size must be a multiple of 32, got 40"),
    ],
)
def test_bad_data_sets_are_refused(split: str, options: dict[str, int], match: str) -> None:
    """Each argument by name, with what came."""
    with pytest.raises(ValueError, match=match):
        CellDataset(_noise(0), split, **options)


@pytest.mark.parametrize(
    ("step", "batch_size", "match"),
    [(-1, 4, "step must be an int >= 0, got -1"), (0, 0, "batch_size must be an int >= 1, got 0")],
)
def test_bad_batches_are_refused(step: int, batch_size: int, match: str) -> None:
    """Each argument by name, with what came."""
    cells = CellDataset(_noise(0), "train", canvas_size=32)
    assert len(cells) == 12
    with pytest.raises(ValueError, match=match):
        cells.batch(step, batch_size, CLEAN)


@pytest.mark.parametrize("name", Distortion._fields)
def test_negative_distortions_are_refused(name: str) -> None:
    """None is accepted."""
    CLEAN.check()
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
        CLEAN._replace(**{name: -0.5}).check()


def test_splits_do_not_mix() -> None:
    """Each split's cells show its own digits."""
    parts = [DigitSplit(np.full((5, 28, 28), 60 * (k + 1), np.uint8), np.arange(5)) for k in range(3)]
    source = DigitSource("levels", tuple("0123456789"), *parts)
    for number, split in enumerate(SPLITS):
        cells = CellDataset(source, split, canvas_size=32)
        for batch in (cells.fixed(0, 5), cells.batch(0, 5, CLEAN)):
            assert np.allclose(_ink(batch.cells).max(axis=(1, 2)), 60 * (number + 1) / 255, atol=1e-3)
