"""FSQ against enumeration, at its bounds, and beside another library's.

Shape letters: N latent vectors, C channels, L levels of a channel, K = Π L codes.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import FSQ, CodebookUsage
from tests.helpers import exactly, not_finite

LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=4)


def bounded(value: float, size: int) -> float:
    """The bounding function of one channel, in Python floats: a range of L - 1 with zero kept at zero."""
    half, offset = (size - 1) / 2, 0.5 if size % 2 == 0 else 0.0
    shift = math.atanh(offset / half) if size > 2 else 0.0
    return math.tanh(value + shift) * half - offset


def all_codes(levels: list[int]) -> list[tuple[float, ...]]:
    """Every code in the order of its index: the first channel changes fastest."""
    values = [[(digit - size // 2) / (size // 2) for digit in range(size)] for size in levels]
    return [tuple(reversed(code)) for code in itertools.product(*reversed(values))]


@given(LEVELS, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_indices_are_those_of_the_nearest_levels(levels: list[int], seed: int) -> None:
    """Channel by channel the nearest of all levels to the bounded value; the index by enumeration of all codes."""
    quantizer = FSQ(levels).double()
    latents = torch.randn(30, len(levels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    output = quantizer(latents)
    codes = all_codes(levels)
    assert quantizer.num_codes == len(codes)
    for row, index, code in zip(latents.tolist(), output.indices.tolist(), output.codes.tolist(), strict=True):
        wanted = []
        for value, size in zip(row, levels, strict=True):
            place = bounded(value, size)
            wanted.append(
                min(range(-(size // 2), (size + 1) // 2), key=lambda level: abs(level - place)) / (size // 2)
            )
        assert code == wanted
        assert codes.index(tuple(wanted)) == index


@given(LEVELS)
@settings(deadline=None, max_examples=40)
def test_decoding_lists_the_codes_in_order(levels: list[int]) -> None:
    """All of them, all different, exactly the quotients in every dtype, and encoding finds each again."""
    quantizer = FSQ(levels).double()
    wanted = torch.tensor(all_codes(levels), dtype=torch.float64)
    codes = quantizer.decode(torch.arange(quantizer.num_codes))
    assert torch.equal(codes, wanted)
    assert len(codes.unique(dim=0)) == quantizer.num_codes
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        # By way of half precision: nothing is lost for good.
        assert torch.equal(quantizer.half().to(dtype).decode(torch.arange(len(wanted))), wanted.to(dtype))
    # Undo the bounding of every level that is no end; the ends are far out.
    latents = torch.empty_like(wanted)
    for channel, size in enumerate(levels):
        half, offset = (size - 1) / 2, (size % 2 == 0) / 2
        shift = math.atanh(offset / half) if size > 2 else 0.0
        latents[:, channel] = ((wanted[:, channel] * (size // 2) + offset) / half).clamp(-1, 1).atanh() - shift
    latents = latents.clamp(-50, 50)
    assert torch.equal(quantizer.encode(latents), torch.arange(quantizer.num_codes))


def test_zero_is_a_code_and_two_levels_part_at_zero() -> None:
    """Latent zero gives the code 0 for every L above 2; for L = 2 the sign decides."""
    levels = list(range(3, 12))
    assert FSQ(levels)(torch.zeros(1, len(levels))).codes.eq(0).all()
    two = FSQ([2])
    assert two(torch.tensor([[-1e-3], [1e-3]])).codes.flatten().tolist() == [-1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (8, 8, 8), (255, 256), (4096, 4097), (100_000, 7)])
def test_no_latent_leaves_the_levels(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """The largest finite latents get the outermost levels, all others something between, in every precision."""
    quantizer = FSQ(sizes).to(dtype)
    huge = torch.finfo(dtype).max
    ends = torch.tensor([[-huge], [huge]], dtype=dtype).expand(2, len(sizes))
    assert quantizer(ends).indices.tolist() == [0, quantizer.num_codes - 1]
    latents = torch.linspace(-12, 12, 4001).to(dtype)[:, None].expand(-1, len(sizes))
    output = quantizer(latents)
    assert output.indices.min() >= 0
    assert output.indices.max() < quantizer.num_codes
    assert torch.equal(quantizer.decode(output.indices), output.codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = FSQ(sizes)(latents.to(torch.bfloat16))
    assert wide.codes.dtype == torch.float32
    assert wide.indices.max() < quantizer.num_codes
    # The control: a range made wider by a thousandth, as elsewhere, is left where L is large.
    widened = round(math.tanh(12) * (max(sizes) - 1) * 1.001 / 2 - (max(sizes) % 2 == 0) / 2)
    assert (widened > (max(sizes) + 1) // 2 - 1) == (max(sizes) > 1000)


def test_the_gradient_is_that_of_the_bounding_function() -> None:
    """Rounding passes it unchanged; there is no loss, but something to call backward on."""
    levels = [4, 5, 2]
    quantizer = FSQ(levels).double()
    latents = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(20, 3, dtype=torch.float64)
    output = quantizer(latents)
    (gradient,) = torch.autograd.grad((output.quantized * weights).sum(), latents, retain_graph=True)
    step = 1e-6
    for row, values in enumerate(latents.tolist()):
        for channel, (value, size) in enumerate(zip(values, levels, strict=True)):
            slope = (bounded(value + step, size) - bounded(value - step, size)) / (2 * step) / (size // 2)
            assert gradient[row, channel].item() == pytest.approx(slope * weights[row, channel].item(), abs=1e-8)
    assert all(value == 0 for value in output[2:6])
    (nothing,) = torch.autograd.grad(output.loss, latents)
    assert nothing.eq(0).all()


def test_nothing_is_remembered() -> None:
    """No state to save and none to change; use is counted outside."""
    quantizer = FSQ((3, 3))
    assert not quantizer.state_dict()
    assert not list(quantizer.parameters())
    usage = CodebookUsage(quantizer.num_codes)
    usage.update(quantizer(torch.randn(2, 2, 20, 20) * 3).indices)
    assert usage.compute().used_codes == 9


def test_what_is_not_finite() -> None:
    """Infinite latents are refused, skipped as zero without gradient, or, unseen, still some code."""
    latents = torch.tensor([[math.nan, 1.0], [math.inf, -math.inf], [0.3, 0.1]], requires_grad=True)
    with pytest.raises(ValueError, match=exactly(not_finite(3, 6))):
        FSQ((5, 4))(latents)
    skipped = FSQ((5, 4), nonfinite="skip")(latents)
    zero = FSQ((5, 4)).encode(torch.zeros(1, 2)).item()
    assert skipped.indices[:2].tolist() == [zero, zero]
    (gradient,) = torch.autograd.grad(skipped.quantized.sum(), latents)
    assert gradient[:2].eq(0).all()
    assert gradient[2].ne(0).all()
    unseen = FSQ((5, 4), nonfinite="off")
    output = unseen(latents)
    assert output.indices[0].item() % 5 == 0
    assert output.indices[1].item() == 4
    assert torch.equal(unseen.decode(output.indices), output.codes)


@pytest.mark.parametrize(
    ("levels", "options", "error", "message"),
    [
        (5, {}, TypeError, "levels must be a sequence of int, got 5."),
        ("55", {}, TypeError, "levels must be a sequence of int, got '55'."),
        ([], {}, ValueError, "levels must be at least one int, got none."),
        ([5, 1], {}, ValueError, "levels[1] must be an int >= 2, got 1."),
        ([5.0], {}, TypeError, "levels[0] must be an int >= 2, got 5.0."),
        ([True], {}, TypeError, "levels[0] must be an int >= 2, got True."),
        ([2**32, 2**31], {}, ValueError, f"levels must be of a product below 2^63, got {2**63}."),
        ([5], {"channel_dim": 2}, ValueError, "channel_dim must be one of 1, -1, got 2."),
        ([5], {"channel_dim": "1"}, TypeError, "channel_dim must be an int, got '1'."),
        (
            [5],
            {"nonfinite": "drop"},
            ValueError,
            "nonfinite must be one of None, 'raise', 'skip', 'off', got 'drop'.",
        ),
    ],
)
def test_refuses_bad_options(levels: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """One sentence that names the option, what is wanted and what came."""
    with pytest.raises(error, match=exactly(message)):
        FSQ(levels, **options)


def test_shows_its_levels() -> None:
    """In print."""
    assert repr(FSQ([3, 4])) == "FSQ(levels=(3, 4))"


@pytest.mark.parametrize("levels", [[5, 5, 5], [8, 6, 4], [8, 5, 5, 5], [7, 3]])
def test_beside_vector_quantize_pytorch(levels: list[int]) -> None:
    """Same codes in the same order, and the same assignment but in a thin layer at the boundaries.

    The other library widens the range by 10⁻³ on purpose, which moves every boundary a little.
    """
    peers = pytest.importorskip("vector_quantize_pytorch")
    ours, theirs = FSQ(levels, channel_dim=-1).double(), peers.FSQ(levels).double()
    latents = torch.randn(1, 4000, len(levels), dtype=torch.float64) * 2
    wanted, indices = theirs(latents)
    output = ours(latents)
    torch.testing.assert_close(ours.decode(torch.arange(ours.num_codes)), theirs.implicit_codebook.double())
    clear = torch.ones(4000, dtype=torch.bool)
    for row, values in enumerate(latents[0].tolist()):
        for value, size in zip(values, levels, strict=True):
            place = bounded(value, size)
            clear[row] &= abs(abs(place - math.floor(place)) - 0.5) > 0.01
    assert clear.sum() > 3000
    assert torch.equal(output.indices[0, clear], indices[0, clear].long())
    torch.testing.assert_close(output.codes[0, clear], wanted[0, clear].detach())


def columns(latents: Tensor) -> list[Tensor]:
    """The channels of rows."""
    return list(latents.unbind(1))


def test_channels_do_not_see_one_another() -> None:
    """A quantizer of several channels is one of each beside the others."""
    levels = [3, 8, 5]
    latents = torch.randn(50, 3)
    codes = FSQ(levels)(latents).codes
    for size, column, code in zip(levels, columns(latents), columns(codes), strict=True):
        assert torch.equal(FSQ([size])(column[:, None]).codes[:, 0], code)
