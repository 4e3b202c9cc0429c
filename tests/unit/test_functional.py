"""The pure functions against their formulas.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant.functional import nearest_code, orthogonality, perplexity, rotation_trick, straight_through
from tests.helpers import exactly
from tests.unit.quantizer_oracles import LargestTensor, orthogonality_oracle

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("latents", "codebook", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 4), ValueError, "latents must be of shape (N, C), got shape (3,)."),
        (torch.zeros(3, 4), torch.zeros(4), ValueError, "codebook must be of shape (K, C), got shape (4,)."),
        (torch.zeros(3, 4), torch.zeros(0, 4), ValueError, "codebook must be at least one code, got none."),
        (torch.zeros(3, 4).long(), torch.zeros(2, 4), TypeError, "latents must be floating point, got torch.int64."),  # noqa: E501
        (torch.zeros(3, 4), torch.zeros(2, 4).bool(), TypeError, "codebook must be floating point, got torch.bool."),  # noqa: E501
        (torch.zeros(3, 4), torch.zeros(2, 4).cfloat(), TypeError, "codebook must be floating point, got torch.complex64."),  # noqa: E501
        (torch.zeros(3, 5), torch.zeros(2, 4), ValueError, "latents axis 1 must be codebook axis 1=4, got 5 (latents shape (3, 5))."),  # noqa: E501
        (torch.zeros(3, 4, device="meta"), torch.zeros(2, 4), ValueError, "latents must be on cpu as the codebook, got meta."),  # noqa: E501
        (torch.zeros(3, 4).double(), torch.zeros(2, 4), TypeError, "latents must be torch.float32 as the codebook, got torch.float64."),  # noqa: E501
    ],
)  # fmt: skip
def test_nearest_code_refuses(latents: Tensor, codebook: Tensor, error: type[Exception], message: str) -> None:
    """Each misfit has its own sentence."""
    with pytest.raises(error, match=exactly(message)):
        nearest_code(latents, codebook)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_nearest_code_refuses_temperatures(temperature: float) -> None:
    """A temperature is finite and not negative."""
    with pytest.raises(ValueError, match=f"^temperature must be a finite number >= 0, got {temperature!r}.$"):
        nearest_code(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)


# straight_through and rotation_trick


@given(seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.floats(-6, 6))
@quick
def test_estimators_pass_the_codes_bit_for_bit(seed: int, dtype: torch.dtype, magnitude: float) -> None:
    """Whatever the latents' size, the forward value is the code itself; z + (e - z) is not."""
    latents, codes = normal(seed, 20, 4).to(dtype) * 10**magnitude, normal(seed + 1, 20, 4).to(dtype)
    assert torch.equal(straight_through(latents, codes), codes)
    assert torch.equal(rotation_trick(latents, codes), codes)


def test_the_usual_form_is_not_bit_equal() -> None:
    """Negative control: z + (e - z) loses bits, so the test above can fail."""
    latents, codes = normal(0, 100, 4).float() * 10, normal(1, 100, 4).float()
    assert not torch.equal(latents + (codes - latents), codes)


def test_straight_through_gradient_is_the_identity() -> None:
    """The upstream gradient reaches the latents unchanged and the codes not at all."""
    latents, codes = normal(0, 3, 4, 5).requires_grad_(), normal(1, 3, 4, 5).requires_grad_()
    upstream = normal(2, 3, 4, 5)
    straight_through(latents, codes).backward(upstream)
    assert latents.grad is not None
    assert torch.equal(latents.grad, upstream)
    assert codes.grad is None


def rotation_matrix(latent: np.ndarray, code: np.ndarray) -> np.ndarray:
    """|e|/|z| times the product of the two Householder reflections that turn z onto e."""
    z, e = latent / np.linalg.norm(latent), code / np.linalg.norm(code)
    identity = np.eye(len(z))
    bisector = (z + e) / np.linalg.norm(z + e)
    # First mirror z to -z's side along z itself, then across the bisector: together they map z onto e.
    turn = (identity - 2 * np.outer(bisector, bisector)) @ (identity - 2 * np.outer(z, z))
    return np.linalg.norm(code) / np.linalg.norm(latent) * turn


@given(seeds, st.integers(2, 7))
@quick
def test_rotation_trick_gradient_is_the_transposed_rotation(seed: int, c: int) -> None:
    """Backward multiplies by the transpose of the scaled rotation, built here as a matrix."""
    latents, codes = normal(seed, 6, c).requires_grad_(), normal(seed + 1, 6, c).requires_grad_()
    upstream = normal(seed + 2, 6, c)
    rotation_trick(latents, codes).backward(upstream)
    assert latents.grad is not None
    assert codes.grad is None
    for row in range(6):
        matrix = rotation_matrix(latents[row].detach().numpy(), codes[row].detach().numpy())
        np.testing.assert_allclose(matrix @ latents[row].detach().numpy(), codes[row].detach().numpy(), atol=1e-9)
        np.testing.assert_allclose(
            latents.grad[row].numpy(), matrix.T @ upstream[row].numpy(), rtol=1e-7, atol=1e-9
        )
        assert not np.allclose(latents.grad[row].numpy(), upstream[row].numpy())


def test_rotation_trick_falls_back_where_no_rotation_is_defined() -> None:
    """A zero latent, a zero code and opposite directions pass the gradient straight through."""
    latents = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [3.0, 1.0]], requires_grad=True)
    codes = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-2.0, -4.0], [1.0, 1.0]])
    upstream = normal(0, 4, 2).float()
    result = rotation_trick(latents, codes)
    assert torch.equal(result, codes)
    result.backward(upstream)
    assert latents.grad is not None
    assert torch.equal(latents.grad[:3], upstream[:3])
    assert not torch.equal(latents.grad[3], upstream[3])


# orthogonality


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans())
@quick
def test_orthogonality_is_the_sum_over_pairs(seed: int, k: int, c: int, zeros: bool, masked: bool) -> None:
    """For K <= C and K > C, with zero rows and with a mask, Eq. 5 over all pairs; never negative."""
    codebook = normal(seed, k, c)
    keep = torch.rand(k, generator=torch.Generator().manual_seed(seed)) < 0.6
    if zeros:
        codebook[~keep.roll(1)] = 0
    mask = keep if masked else None
    value = orthogonality(codebook, mask)
    assert value.shape == ()
    assert value.item() == pytest.approx(orthogonality_oracle(codebook, mask), rel=1e-10, abs=1e-12)
    assert value.item() >= 0


@pytest.mark.parametrize("scale", [1e-37, 1e-13, 1e19, 1e37])
@pytest.mark.parametrize("k", [3, 9])
def test_orthogonality_does_not_depend_on_the_scale(scale: float, k: int) -> None:
    """Each code may have its own; for K <= C and K > C."""
    codebook = normal(0, k, 5, dtype=torch.float32)
    lengths = torch.where(torch.arange(k) % 2 == 0, scale, 1.0).unsqueeze(1)
    expected = orthogonality_oracle(codebook.double(), None)
    assert orthogonality(codebook * lengths).item() == pytest.approx(expected, rel=1e-5)


def test_orthogonality_of_orthogonal_codes_is_zero() -> None:
    """Any lengths; for K <= C, and for few codes under a mask of many, where cancellation must not go below 0."""
    for seed in range(50):
        basis = torch.linalg.qr(normal(seed, 8, 8, dtype=torch.float32)).Q * torch.rand(8, 1).add(0.1)
        assert 0 <= orthogonality(basis).item() < 1e-12
        crowd = torch.cat([basis, normal(seed + 1, 4, 8, dtype=torch.float32)])
        assert 0 <= orthogonality(crowd, torch.arange(12) < 8).item() < 1e-6
        assert orthogonality(crowd).item() > 1e-3


def test_orthogonality_reaches_its_bound_on_a_tight_frame() -> None:
    """K > C codes cannot do better than 1/C - 1/K, and a union of bases attains it."""
    c = 5
    for bases in (2, 3):
        frame = torch.cat([torch.linalg.qr(normal(i, c, c)).Q for i in range(bases)])
        bound = 1 / c - 1 / (bases * c)
        assert orthogonality(frame).item() == pytest.approx(bound, rel=1e-12)
        assert orthogonality(normal(9, bases * c, c)).item() > 1.1 * bound
        assert orthogonality(torch.ones(bases * c, c)).item() == pytest.approx(1 - 1 / (bases * c))


def test_orthogonality_does_not_see_lengths() -> None:
    """Rescaled and mirrored codes score the same."""
    codebook = normal(0, 7, 4)
    scales = torch.tensor([1.0, -2.0, 3.0, 0.1, -5.0, 1e-3, 1e3], dtype=torch.float64).unsqueeze(1)
    assert orthogonality(codebook * scales).item() == pytest.approx(orthogonality(codebook).item(), rel=1e-12)


def test_orthogonality_of_nothing_is_zero() -> None:
    """An empty mask has no codes to be unlike each other; zero codes each miss their own 1."""
    assert orthogonality(normal(0, 7, 4), torch.zeros(7, dtype=torch.bool)).item() == 0
    assert orthogonality(normal(0, 3, 4), torch.zeros(3, dtype=torch.bool)).item() == 0
    assert orthogonality(torch.zeros(7, 4)).item() == pytest.approx(1 / 7)
    assert orthogonality(torch.zeros(3, 4)).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_orthogonality_of_half_precision(dtype: torch.dtype) -> None:
    """Computed in float32: K² does not overflow and zero rows are no NaN."""
    codebook = normal(0, 300, 8).to(dtype)
    codebook[5] = 0
    assert orthogonality(codebook).item() == pytest.approx(orthogonality(codebook.double()).item(), rel=1e-4)
    assert orthogonality(codebook).dtype == torch.float32


@pytest.mark.parametrize(("k", "c"), [(3, 5), (6, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_orthogonality_gradient(k: int, c: int, masked: bool) -> None:
    """Autograd agrees with finite differences."""
    mask = torch.arange(k) != 1 if masked else None
    codebook = normal(0, k, c).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: orthogonality(e, mask), (codebook,))
    orthogonality(codebook, mask).backward()
    assert codebook.grad is not None
    assert codebook.grad[0].abs().max() > 0
    assert (codebook.grad[1].abs().max() > 0) != masked


def test_orthogonality_of_many_codes_is_cheap_and_accurate() -> None:
    """K = 4,096 makes no K x K tensor, and float32 keeps five digits of the naive float64 value."""
    codebook = normal(0, 4_096, 16).float()
    with LargestTensor() as largest:
        orthogonality(codebook)
    assert largest.elements == codebook.numel()
    units = torch.nn.functional.normalize(codebook.double(), dim=1)
    with LargestTensor() as largest:
        naive = (units @ units.T - torch.eye(4_096)).square().mean()
    assert largest.elements == 4_096**2
    assert orthogonality(codebook).item() == pytest.approx(naive.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("codebook", "mask", "error", "message"),
    [
        (torch.zeros(3), None, ValueError, "codebook must be of shape (K, C), got shape (3,)."),
        (torch.zeros(3, 2).int(), None, TypeError, "codebook must be floating point, got torch.int32."),
        (torch.zeros(3, 2), torch.ones(3, 1).bool(), ValueError, "mask must be of shape (K,), got shape (3, 1)."),
        (torch.zeros(3, 2), torch.ones(2).bool(), ValueError, "mask axis 0 must be K=3, got 2 (mask shape (2,))."),
        (torch.zeros(3, 2), torch.ones(3), TypeError, "mask must be bool, got torch.float32; pass mask.bool()."),
    ],
)
def test_orthogonality_refuses(
    codebook: Tensor, mask: Tensor | None, error: type[Exception], message: str
) -> None:
    """Each misfit has its own sentence."""
    with pytest.raises(error, match=exactly(message)):
        orthogonality(codebook, mask)


# perplexity


@given(st.lists(st.integers(0, 1_000), min_size=1, max_size=20))
@quick
def test_perplexity_is_the_exponential_of_the_entropy(counts: list[int]) -> None:
    """Against a loop over the shares; all zero gives 0; it lies in [0, K]."""
    value = perplexity(torch.tensor(counts, dtype=torch.float64))
    total = sum(counts)
    entropy = -sum(n / total * math.log(n / total) for n in counts if n)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(math.exp(entropy) if total else 0.0, rel=1e-12)
    assert 0 <= value.item() <= len(counts) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float32, torch.float64])
def test_perplexity_of_even_use_is_the_number_of_codes(dtype: torch.dtype) -> None:
    """Codes used alike are counted, whatever the others; weights need no normalization."""
    histogram = torch.zeros(12, dtype=dtype)
    histogram[:5] = 3
    assert perplexity(histogram).item() == pytest.approx(5)
    with pytest.raises(ValueError, match=r"^histogram must be of shape \(K,\), got shape \(3, 4\)\.$"):
        perplexity(histogram.view(3, 4))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32]
)
def test_perplexity_of_anything_but_float64_is_float32(dtype: torch.dtype) -> None:
    """To six digits, also of many codes; devices without float64 never see one."""
    counts = torch.randint(0, 100, (5_000,))
    value = perplexity(counts.to(dtype))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(perplexity(counts.double()).item(), rel=1e-5)


def test_perplexity_of_broken_statistics_is_not_that_of_an_unused_codebook() -> None:
    """Zero means that no code is in use; what is not a number stays so."""
    for broken in (math.nan, math.inf):
        assert perplexity(torch.tensor([broken, 2.0])).isnan()
    assert perplexity(torch.zeros(3)) == 0


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*")
def test_straight_through_in_forward_mode_and_for_each_sample() -> None:
    """The tangent passes unchanged, and a gradient a sample is that of the sample alone."""
    latents, codes, tangent = torch.randn(3, 5, 4, dtype=torch.float64).unbind()
    found, moved = torch.func.jvp(lambda z: straight_through(z, codes), (latents,), (tangent,))
    assert torch.equal(found, codes)
    assert torch.equal(moved, tangent)

    def energy(latent: Tensor, code: Tensor) -> Tensor:
        return (straight_through(latent, code) * latent).sum()

    each = torch.stack([torch.func.grad(energy)(*pair) for pair in zip(latents, codes, strict=True)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(energy))(latents, codes), each)
    torch.testing.assert_close(each, codes + latents)
