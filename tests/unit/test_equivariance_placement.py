"""The paper's placement metric: five places, ten pairs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_quant.equivariance import place_sprites, placement_agreement, placement_offsets


def cell_hash(images: torch.Tensor, stride: int, num_codes: int) -> torch.Tensor:
    """Name each cell by its content alone: the perfectly equivariant tokenizer."""
    cells = images.unfold(2, stride, stride).unfold(3, stride, stride)
    cells = ((cells + 1) * 1000).round().long().permute(0, 2, 3, 1, 4, 5).flatten(3)
    return (cells * torch.arange(1, cells.shape[-1] + 1)).sum(-1) % num_codes


def test_offsets_are_those_of_the_paper():
    """64 pixels: quadrants at 0 and 32, the centre at 16."""
    assert set(placement_offsets(64)) == {(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)}


def test_sprites_lie_where_the_offsets_say():
    """Five canvases, the sprite in each, ground around it."""
    sprites = torch.rand(3, 2, 8, 8)
    placed = place_sprites(sprites, canvas_size=16, stride=2)
    assert placed.shape == (5, 3, 2, 16, 16)
    for canvases, (top, left) in zip(placed, placement_offsets(16), strict=True):
        assert torch.equal(canvases[:, :, top : top + 8, left : left + 8], sprites)
        assert int((canvases == -1).sum()) == 3 * 2 * (256 - 64)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.sampled_from([(8, 1), (8, 2), (16, 2), (16, 4)]), st.integers(0, 2**31))
def test_placement_agreement_matches_loops_over_pairs_and_positions(count, sizes, seed):
    """An arbitrary, position-dependent tokenizer: equal indices counted one by one in plain Python."""
    canvas_size, stride = sizes
    grid, block, num_codes = canvas_size // stride, canvas_size // stride // 2, 3
    generator = torch.Generator().manual_seed(seed)
    sprites = torch.rand(count, 1, canvas_size // 2, canvas_size // 2, generator=generator)
    sprites[..., 0] = -1
    noise = torch.randint(0, 2, (grid, grid), generator=generator)

    def tokenize(images):
        return (cell_hash(images, stride, num_codes) + noise) % num_codes

    half, quarter = canvas_size // 2, canvas_size // 4
    blocks = []
    for top, left in [(quarter, quarter), (0, 0), (0, half), (half, 0), (half, half)]:
        canvases = torch.full((count, 1, canvas_size, canvas_size), -1.0)
        canvases[:, :, top : top + half, left : left + half] = sprites
        row, column = top // stride, left // stride
        blocks.append(tokenize(canvases)[:, row : row + block, column : column + block].tolist())
    equal = total = 0
    seen = [0] * num_codes
    for a in range(5):
        for b in range(a):
            for n in range(count):
                for v in range(block):
                    for w in range(block):
                        equal += blocks[a][n][v][w] == blocks[b][n][v][w]
                        total += 1
                        seen[blocks[a][n][v][w]] += 1
                        seen[blocks[b][n][v][w]] += 1
    chance = math.fsum((c / (2 * total)) ** 2 for c in seen)
    result = placement_agreement(
        tokenize, sprites, canvas_size=canvas_size, stride=stride, num_codes=num_codes, batch_size=2
    )
    assert result.tokens == total == 10 * count * block * block
    assert result.rate == pytest.approx(equal / total, abs=1e-15)
    assert result.chance == pytest.approx(chance, abs=1e-14)
    if result.kappa_defined:
        assert result.kappa == pytest.approx((equal / total - chance) / (1 - chance), abs=1e-12)


def test_content_alone_agrees_fully_and_position_does_not():
    """A hash of the cell scores exactly 1; the same plus the row number scores below (negative control)."""
    sprites = torch.rand(6, 1, 16, 16)
    sprites[..., 0] = -1
    options = {"canvas_size": 32, "stride": 4, "num_codes": 64}
    assert placement_agreement(lambda x: cell_hash(x, 4, 64), sprites, **options).rate == 1.0
    rows = torch.arange(8)[:, None]
    result = placement_agreement(lambda x: (cell_hash(x, 4, 64) + rows) % 64, sprites, **options)
    assert result.rate < 0.3


def test_aliasing_is_invisible_here():
    """Reading one pixel a cell aliases badly, yet scores 1: all offsets are stride multiples."""
    sprites = torch.rand(6, 1, 16, 16)
    sprites[..., 0] = -1
    result = placement_agreement(
        lambda x: ((x[:, 0, ::4, ::4] + 1) * 7).long(), sprites, canvas_size=32, stride=4, num_codes=16
    )
    assert result.rate == 1.0


def test_foreground_leaves_blank_cells_out():
    """A tokenizer that is right on blank cells only: high over all tokens, low over ink."""
    sprites = torch.full((8, 1, 16, 16), -1.0)
    sprites[:, :, 4:8, 4:12] = torch.rand(8, 1, 4, 8)
    rows = torch.arange(8)[:, None]

    def tokenize(images):
        ink = images.amax(1).unfold(1, 4, 4).unfold(2, 4, 4).amax((-1, -2)) > -0.9
        return torch.where(ink, 1 + rows, 0)

    options = {"canvas_size": 32, "stride": 4, "num_codes": 9}
    everywhere = placement_agreement(tokenize, sprites, **options)
    inked = placement_agreement(tokenize, sprites, tau=0.1, **options)
    # Equal rows: the pairs upper left/upper right and lower left/lower right, 2 of 10.
    assert inked.tokens == 10 * 8 * 2
    assert inked.rate == pytest.approx(0.2)
    assert everywhere.rate == pytest.approx((14 + 2 * 0.2) / 16)


def test_no_gradient_is_recorded():
    """Measuring builds no graph, whatever the tokenizer computes with."""
    weight = torch.nn.Parameter(torch.ones(()))
    grads = []

    def tokenize(images):
        grads.append((images * weight).requires_grad)
        return torch.zeros(len(images), 4, 4, dtype=torch.int64)

    placement_agreement(tokenize, -torch.ones(1, 1, 8, 8), canvas_size=16, stride=4, num_codes=1)
    # Five places, the first of them twice.
    assert grads == [False] * 6


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"canvas_size": 24}, ValueError, r"canvas_size must be a multiple of 4 \* stride = 16, got 24"),
        (
            {"canvas_size": 64},
            ValueError,
            r"sprites must be of shape \(B, C, 32, 32\), got shape \(2, 1, 16, 16\)",
        ),
        ({"canvas_size": 2}, ValueError, "canvas_size must be an int >= 4"),
        ({"stride": 0}, ValueError, "stride must be an int >= 1"),
        ({"num_codes": 0}, ValueError, "num_codes must be an int >= 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1"),
        ({"ground": "black"}, TypeError, "ground must be a finite number"),
        ({"sprites": torch.zeros(1, 16, 16)}, ValueError, r"sprites must be of shape \(B, C, S/2, S/2\)"),
        ({"sprites": torch.zeros(1, 1, 16, 16).int()}, TypeError, "sprites must be floating point"),
    ],
)
def test_wrong_arguments_are_refused(change, error, match):
    """One clear error for each."""
    options = {"sprites": torch.zeros(2, 1, 16, 16), "canvas_size": 32, "stride": 4, "num_codes": 4} | change
    with pytest.raises(error, match=match):
        placement_agreement(lambda x: torch.zeros(len(x), 8, 8).long(), **options)
