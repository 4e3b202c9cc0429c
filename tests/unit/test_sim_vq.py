"""SimVQ against plain sums, what tells it from a free codebook, and beside another library's.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import SimVQ
from te_quant.functional import rotation_trick
from tests.helpers import exactly, plain_quantizer
from tests.unit.quantizer_oracles import assert_nearest


def spread(codes: int = 9, dim: int = 4, **options: Any) -> SimVQ:
    """A float64 quantizer with a basis that is no longer the identity."""
    quantizer = SimVQ(codes, dim, **options).double()
    with torch.no_grad():
        quantizer.basis.copy_(torch.randn(dim, dim, dtype=torch.float64) * 2)
    return quantizer


def codes_oracle(quantizer: SimVQ) -> Tensor:
    """(K, C), each code as a sum over the rows of the basis, one number at a time."""
    rows, basis = quantizer.coefficients.tolist(), quantizer.basis.tolist()
    listed = [[sum(a * basis[j][i] for j, a in enumerate(row)) for i in range(quantizer.code_dim)] for row in rows]
    return torch.tensor(listed, dtype=torch.float64)


@given(st.integers(1, 12), st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_the_nearest_of_the_transformed_codes(codes: int, dim: int) -> None:
    """Codes are coefficients times basis, and the nearest of them is chosen; the losses are mean squares."""
    quantizer = spread(codes, dim, commitment_weight=0.5)
    latents = torch.randn(40, dim, dtype=torch.float64)
    table = codes_oracle(quantizer)
    output = quantizer(latents)
    torch.testing.assert_close(quantizer.codebook.detach(), table, rtol=1e-12, atol=1e-12)
    assert_nearest(output.indices, latents, table, clear_share=0.9)
    torch.testing.assert_close(output.codes, table[output.indices])
    assert torch.equal(quantizer.decode(output.indices), output.codes)
    mean_square = (latents - table[output.indices]).square().mean()
    torch.testing.assert_close(output.codebook_loss, mean_square)
    torch.testing.assert_close(output.commitment_loss, 0.5 * mean_square)
    assert output.regularization_loss == 0


def test_gradients_of_latents_and_basis() -> None:
    """The codebook term moves the basis alone, by outer products; the commitment term the latents alone."""
    quantizer = spread(commitment_weight=0.5)
    latents = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    output = quantizer(latents)
    error = output.codes - latents.detach()
    to_basis = quantizer.coefficients[output.indices].T @ error * 2 / error.numel()
    gradients = torch.autograd.grad(
        output.codebook_loss, (latents, quantizer.basis), allow_unused=True, retain_graph=True
    )
    assert gradients[0] is None
    torch.testing.assert_close(gradients[1], to_basis)
    gradients = torch.autograd.grad(
        output.commitment_loss, (latents, quantizer.basis), allow_unused=True, retain_graph=True
    )
    torch.testing.assert_close(gradients[0], -0.5 * error * 2 / error.numel())
    assert gradients[1] is None
    weights = torch.randn_like(error)
    (straight,) = torch.autograd.grad((output.quantized * weights).sum(), latents)
    assert torch.equal(straight, weights)


def test_rotation_trick_is_the_one_of_functional() -> None:
    """The same gradient to the latents."""
    quantizer = spread(gradient_estimator="rotation_trick")
    latents = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(30, 4, dtype=torch.float64)
    output = quantizer(latents)
    wanted = torch.autograd.grad((rotation_trick(latents, output.codes) * weights).sum(), latents)
    got = torch.autograd.grad((output.quantized * weights).sum(), latents)
    torch.testing.assert_close(got, wanted)
    assert not torch.equal(got[0], weights)


def test_a_step_moves_codes_that_nobody_chose() -> None:
    """That is the point: with a free codebook, the control, they stay where they are."""
    latents = torch.randn(20, 4) * 0.01 + torch.tensor([2.0, 0, 0, 0])
    moved = {}
    for name, quantizer in (("sim", SimVQ(64, 4)), ("free", plain_quantizer(64, 4))):
        before = quantizer.codebook.detach().clone()
        output = quantizer(latents)
        output.loss.backward()
        torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
        idle = torch.ones(64, dtype=torch.bool)
        idle[output.indices.unique()] = False
        moved[name] = (quantizer.codebook.detach() - before)[idle].abs().amax(1)
    assert (moved["sim"] > 0).all()
    assert (moved["free"] == 0).all()


def test_training_reaches_the_latents() -> None:
    """Latents on a far plane, which no code is near at first: the loss falls to a few percent."""
    quantizer = SimVQ(256, 3)
    coefficients = quantizer.coefficients.clone()
    plane = torch.tensor([[6.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        output = quantizer(torch.randn(256, 2) @ plane)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.codebook_loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(quantizer.coefficients, coefficients)


def test_usage_is_a_moving_average_of_the_counts() -> None:
    """Counted over the rows that are finite, in training only."""
    quantizer = spread(decay=0.75, nonfinite="skip")
    latents = torch.randn(50, 4, dtype=torch.float64)
    latents[4] = math.nan
    wanted = torch.ones(9, dtype=torch.float64)
    for _ in range(3):
        indices = quantizer(latents).indices
        counts = torch.zeros(9, dtype=torch.float64)
        for row, index in enumerate(indices.tolist()):
            counts[index] += row != 4
        wanted = 0.75 * wanted + 0.25 * counts
    quantizer.apply_pending()
    torch.testing.assert_close(quantizer.usage.double(), wanted)
    quantizer.eval()(latents)
    torch.testing.assert_close(quantizer.usage.double(), wanted)


def test_frozen_means_frozen() -> None:
    """No gradient, no count, nothing left for an optimizer; and back."""
    quantizer = spread()
    latents = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    quantizer(latents).loss.backward()
    assert quantizer.freeze() is quantizer
    assert quantizer.basis.grad is None
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(latents).loss.backward()
    torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    quantizer.freeze(False)(latents).loss.backward()
    assert quantizer.basis.grad is not None
    quantizer.apply_pending()
    assert not torch.equal(quantizer.usage, before["usage"])


def test_statistics_stay_float32_in_half_precision() -> None:
    """The coefficients follow the module's dtype, the counts do not."""
    quantizer = SimVQ(5, 3).half()
    assert quantizer.coefficients.dtype == quantizer.basis.dtype == torch.float16
    assert quantizer.usage.dtype == quantizer.codebook.dtype == torch.float32


def test_a_generator_decides_the_coefficients() -> None:
    """And the identity is where the basis starts."""
    first, second = (SimVQ(200, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.coefficients, second.coefficients)
    assert torch.equal(first.codebook, first.coefficients)
    assert first.coefficients.square().mean().item() == pytest.approx(1 / 5, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "num_codes must be an int >= 1, got 0."),
        ((4, 1.5), {}, TypeError, "code_dim must be an int >= 1, got 1.5."),
        ((4, 4), {"commitment_weight": -1}, ValueError, "commitment_weight must be a finite number >= 0, got -1."),
        ((4, 4), {"decay": 1.0}, ValueError, "decay must be a finite number >= 0 and < 1, got 1.0."),
        ((4, 4), {"channel_dim": 2}, ValueError, "channel_dim must be one of 1, -1, got 2."),
        (
            (4, 4),
            {"gradient_estimator": "none"},
            ValueError,
            "gradient_estimator must be one of 'straight_through', 'rotation_trick', got 'none'.",
        ),
    ],
)
def test_refuses_bad_options(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    """One sentence that names the option, what is wanted and what came."""
    with pytest.raises(error, match=exactly(message)):
        SimVQ(*arguments, **options)


def test_shows_its_sizes() -> None:
    """In print."""
    assert repr(SimVQ(4, 3)) == "SimVQ(num_codes=4, code_dim=3)"


def test_beside_vector_quantize_pytorch() -> None:
    """Same codes, same losses, same gradients, for the same coefficients and matrix."""
    peers = pytest.importorskip("vector_quantize_pytorch")
    ours = SimVQ(40, 6, channel_dim=-1)
    with torch.no_grad():
        ours.basis.normal_()
    theirs = peers.SimVQ(dim=6, codebook_size=40, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.coefficients)
    with torch.no_grad():
        theirs.code_transform.weight.copy_(ours.basis.T)
    latents = torch.randn(2, 50, 6, requires_grad=True)
    output = ours(latents)
    quantized, indices, loss = theirs(latents)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(output.loss, loss)
    got = torch.autograd.grad(output.loss, (latents, ours.basis))
    wanted = torch.autograd.grad(loss, (latents, theirs.code_transform.weight))
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1].T)
