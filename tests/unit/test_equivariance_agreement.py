"""Counting equal indices, Cohen's κ, and foreground cells."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_quant.equivariance import Agreement, PairCounts, count_pairs, foreground_tokens
from te_quant.equivariance.metrics.agreement import tokens_of
from te_quant.testing import image_sides
from te_quant.testing import images as drawn_images

quick = settings(deadline=None, max_examples=50)


def exact_agreement(first: list[int], second: list[int], num_codes: int) -> tuple[Fraction, Fraction]:
    """Rate and chance as exact fractions, by counting pair by pair."""
    n = len(first)
    rate = Fraction(sum(a == b for a, b in zip(first, second, strict=True)), n)
    chance = sum(
        (Fraction(first.count(c), n) * Fraction(second.count(c), n) for c in range(num_codes)), Fraction(0)
    )
    return rate, chance


@quick
@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_agreement_matches_exact_fractions(num_codes, length, symmetric, seed):
    """Rate, chance and κ equal those of an oracle in rational numbers."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, num_codes, (2, length), generator=generator)
    result = count_pairs(first, second, num_codes).agreement(symmetric=symmetric)
    a, b = first.tolist(), second.tolist()
    rate, chance = exact_agreement(a + b, b + a, num_codes) if symmetric else exact_agreement(a, b, num_codes)
    assert result.tokens == length
    assert result.rate == pytest.approx(float(rate), abs=1e-15)
    assert result.chance == pytest.approx(float(chance), abs=1e-14)
    assert result.kappa_defined == (chance != 1)
    if chance == 1:
        assert math.isnan(result.kappa)
    else:
        assert result.kappa == pytest.approx(float((rate - chance) / (1 - chance)), abs=1e-12)


def test_kappa_known_value():
    """Two raters, 50 items: the textbook table 20/5/10/15 gives κ = 0.4."""
    first = torch.tensor([0] * 25 + [1] * 25)
    second = torch.tensor([0] * 20 + [1] * 5 + [0] * 10 + [1] * 15)
    result = count_pairs(first, second, 2).agreement()
    assert result.rate == pytest.approx(0.7)
    assert result.chance == pytest.approx(0.5)
    assert result.kappa == pytest.approx(0.4)


def test_one_code_agrees_fully_and_kappa_says_it_means_nothing():
    """A collapsed codebook: rate 1, κ undefined and flagged."""
    collapsed = torch.full((4, 8, 8), 3)
    result = count_pairs(collapsed, collapsed, 16).agreement()
    assert result.rate == 1.0
    assert math.isnan(result.kappa)
    assert not result.kappa_defined


def test_one_deviating_token_in_a_million_still_defines_kappa():
    """Nearly collapsed is not collapsed: the flag falls only where 1 - P_e vanishes."""
    tokens = torch.zeros(1_000_000, dtype=torch.int64)
    tokens[5] = 1
    result = count_pairs(tokens, tokens, 2).agreement()
    assert result.kappa_defined
    assert result.kappa == pytest.approx(1.0)


def test_nothing_compared_is_not_a_number():
    """No token, no rate."""
    result = PairCounts.zero(4).agreement()
    assert result.tokens == 0
    assert math.isnan(result.rate)
    assert math.isnan(result.chance)
    assert not result.kappa_defined


def test_unrelated_tokens_have_kappa_near_zero():
    """Negative control: independent tokens agree by chance only, however uneven the codes."""
    generator = torch.Generator().manual_seed(int(torch.randint(0, 2**31, ())))
    weights = torch.tensor([0.7, 0.2, 0.1])
    first = torch.multinomial(weights, 100_000, replacement=True, generator=generator)
    second = torch.multinomial(weights, 100_000, replacement=True, generator=generator)
    result = count_pairs(first, second, 3).agreement()
    assert result.rate == pytest.approx(0.54, abs=0.01)
    assert abs(result.kappa) < 0.025


def test_blank_and_ink_codes_agree_between_different_images():
    """A two-code tokenizer (blank, ink) agrees at 82 % between *unrelated* images; κ is about zero.

    Where most cells are blank, a raw rate says little: in the paper's setting 70.5 % of the 4x4 cells are
    blank and two different digits agree at 83 %.
    """
    strokes = torch.where(torch.rand(2, 2000, 1, 16, 16) < 1 - 0.9 ** (1 / 16), 1.0, -1.0)
    first, second = (foreground_tokens(images, stride=4).long() for images in strokes)
    assert not torch.equal(strokes[0], strokes[1])
    result = count_pairs(first, second, 2).agreement()
    assert result.rate == pytest.approx(0.82, abs=0.02)
    assert abs(result.kappa) < 0.05


@quick
@given(st.integers(1, 30), st.integers(0, 2**31))
def test_counts_do_not_depend_on_the_split(length, seed):
    """Sums over parts are the sums over the whole, field by field, with and without a mask."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, 3, (2, length), generator=generator)
    mask = torch.rand(length, generator=generator) < 0.5
    cut = int(torch.randint(0, length + 1, (), generator=generator))
    for m in (None, mask):
        whole = count_pairs(first, second, 3, m)
        parts = PairCounts.zero(3)
        for part in (slice(0, cut), slice(cut, length)):
            parts = parts + count_pairs(first[part], second[part], 3, None if m is None else m[part])
        assert parts.equal == whole.equal
        assert torch.equal(parts.first, whole.first)
        assert torch.equal(parts.second, whole.second)


def test_mask_keeps_the_marked_tokens_only():
    """What the mask excludes enters neither rate nor chance."""
    first, second = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 0, 1])
    mask = torch.tensor([True, True, False, False])
    assert count_pairs(first, second, 3, mask).agreement() == Agreement(1.0, 1.0, True, 2, 0.5)


def test_masked_tokens_need_no_code():
    """Quantizers give -1 to masked tokens, which the mask keeps out of the counts."""
    tokens = torch.tensor([0, 2, -1])
    assert count_pairs(tokens, tokens, 3, tokens >= 0).agreement().tokens == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int32])
def test_tokens_of_any_integer_dtype_are_counted(dtype):
    """Files hold them as small and unsigned numbers; with those behind the codes refused."""
    first, second = torch.randint(0, 100, (2, 40)), torch.randint(0, 100, (2, 40))
    found = count_pairs(first.to(dtype), second.to(dtype), 100)
    expected = count_pairs(first, second, 100)
    assert (found.equal, found.first.tolist()) == (expected.equal, expected.first.tolist())
    with pytest.raises(ValueError, match=r"second must be in \[0, num_codes=100\), got 101"):
        count_pairs(first.to(dtype), torch.full_like(first, 101).to(dtype), 100)


@quick
@given(st.integers(1, 3), st.floats(0, 0.9), st.data())
def test_foreground_tokens_match_a_loop_over_pixels(stride, tau, data):
    """A cell counts when any pixel of any channel differs from the ground by more than τ."""
    noise = data.draw(drawn_images(image_sides(stride, largest=4 * stride)))
    pictures = ((noise + 1) / 2) ** 4 - 1
    height, width = pictures.shape[2] // stride, pictures.shape[3] // stride
    result = foreground_tokens(pictures, stride=stride, ground=-1.0, tau=tau)
    assert result.shape == (2, height, width)
    for b in range(2):
        for v in range(height):
            for w in range(width):
                pixels = [
                    float(pictures[b, c, v * stride + y, w * stride + x])
                    for c in range(3)
                    for y in range(stride)
                    for x in range(stride)
                ]
                assert bool(result[b, v, w]) == any(abs(pixel + 1.0) > tau for pixel in pixels)


def test_foreground_sees_darker_than_ground_too():
    """The difference counts in both directions."""
    images = torch.zeros(1, 1, 2, 4)
    images[0, 0, 1, 3] = -0.5
    assert foreground_tokens(images, stride=2, ground=0.0).tolist() == [[[False, True]]]


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (None, TypeError, r"tokenize\(images\) must be a tensor, got NoneType"),
        (torch.zeros(2, 3, 3), TypeError, r"tokenize\(images\) must be an integer tensor, got torch.float32"),
        (
            torch.zeros(18).long(),
            ValueError,
            r"tokenize\(images\) must be of shape \(2, 3, 3\), got shape \(18,\)",
        ),
        (torch.full((2, 3, 3), 4), ValueError, r"indices in \[0, num_codes=4\), got values from 4 to 4"),
        (torch.full((2, 3, 3), -1), ValueError, r"indices in \[0, num_codes=4\), got values from -1 to -1"),
    ],
)
def test_tokenizers_that_return_something_else_are_refused(returned, error, match):
    """Nothing but a grid of indices in range gets through."""
    with pytest.raises(error, match=match):
        tokens_of(lambda images: returned, torch.zeros(2, 1, 12, 12), grid=(3, 3), num_codes=4)


def test_tokenizers_may_return_small_integers():
    """Indices of any integer type come back as int64."""
    tokens = tokens_of(
        lambda x: torch.ones(len(x), 1, 1, dtype=torch.uint8), torch.zeros(2, 1), grid=(1, 1), num_codes=2
    )
    assert tokens.dtype == torch.int64
    empty = tokens_of(lambda x: torch.ones(len(x), 1, 1).int(), torch.zeros(0, 1), grid=(1, 1), num_codes=2)
    assert empty.shape == (0, 1, 1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: PairCounts.zero(0), ValueError, "num_codes must be an int >= 1, got 0"),
        (lambda: count_pairs(torch.zeros(2), torch.zeros(2), 1), TypeError, "first must be an integer tensor"),
        (lambda: count_pairs(torch.zeros(2).long(), torch.zeros(2), 1), TypeError, "second must be an integer"),
        (
            lambda: count_pairs(torch.zeros(2).long(), torch.zeros(3).long(), 1),
            ValueError,
            r"second must be of shape \(2,\), got \(3,\)",
        ),
        (
            lambda: count_pairs(torch.zeros(2).long(), torch.zeros(2).long(), 1, torch.ones(1, dtype=torch.bool)),
            ValueError,
            r"mask must be of shape \(2,\) as the first, got shape \(1,\)",
        ),
        (
            lambda: count_pairs(torch.zeros(2).long(), torch.zeros(2).long(), 1, torch.ones(2).long()),
            TypeError,
            "mask must be bool, got torch.int64",
        ),
        (
            lambda: count_pairs(torch.tensor([0, 3]), torch.zeros(2).long(), 3),
            ValueError,
            r"first must be in \[0, num_codes=3\), got 3",
        ),
        (
            lambda: count_pairs(torch.zeros(2).long(), torch.tensor([0, -1]), 3),
            ValueError,
            r"second must be in \[0, num_codes=3\), got -1",
        ),
        (lambda: count_pairs(torch.zeros(2).long(), torch.zeros(2).long(), 0), ValueError, "num_codes must be an"),
        (
            lambda: PairCounts.zero(1) + PairCounts.zero(4),
            ValueError,
            r"other must be of num_codes=1, got 4",
        ),
        (lambda: foreground_tokens(torch.zeros(1, 4, 4), stride=2), ValueError, r"images must be of shape \(B, C"),
        (lambda: foreground_tokens(torch.zeros(1, 1, 4, 4).int(), stride=2), TypeError, "images must be floating"),
        (lambda: foreground_tokens(torch.zeros(1, 1, 4, 4), stride=0), ValueError, "stride must be an int >= 1"),
        (
            lambda: foreground_tokens(torch.zeros(1, 1, 4, 6), stride=4),
            ValueError,
            r"images sides must be multiples of stride=4, got \(4, 6\)",
        ),
        (lambda: foreground_tokens(torch.zeros(1, 1, 4, 4), stride=2, tau=-1), ValueError, "tau must be a finite"),
        (
            lambda: foreground_tokens(torch.zeros(1, 1, 4, 4), stride=2, ground=math.nan),
            ValueError,
            "ground must be a finite number",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, match):
    """One clear error for each."""
    with pytest.raises(error, match=match):
        call()
