"""The loss of latents that should have certain codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples.te_vqgan.stage1.wanted_codes import wanted_code_loss


def _oracle(latents: Tensor, codebook: Tensor, indices: Tensor, margin: float) -> float:
    rows = np.moveaxis(latents.double().numpy(), 1, -1).reshape(-1, latents.shape[1])
    codes = codebook.double().numpy()
    total = 0.0
    for row, index in zip(rows, indices.flatten().tolist(), strict=True):
        distances = ((row - codes) ** 2).sum(1)
        own, other = distances[index], np.delete(distances, index).min()
        total += max(0.0, (own - other) / (own + other) + margin)
    return total / len(rows)


@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_loss_is_that_of_its_formula_at_every_scale(seed: int, margin: float, scale: float) -> None:
    """An oracle with loops in float64; a factor on latents and codes changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 3, 2, 2, generator=generator)
    codebook = torch.randn(5, 3, generator=generator)
    indices = torch.randint(5, (2, 2, 2), generator=generator)
    found = wanted_code_loss(scale * latents, scale * codebook, indices, margin=margin)
    assert float(found) == pytest.approx(_oracle(latents, codebook, indices, margin), rel=1e-4, abs=1e-6)


def test_the_loss_is_zero_on_the_codes_and_largest_on_others() -> None:
    """And its gradient moves a latent to its code and away from the nearest other one."""
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    indices = torch.tensor([[[0, 1, 2]]])
    on_codes = codebook.T.reshape(1, 2, 1, 3)
    assert float(wanted_code_loss(on_codes, codebook, indices, margin=0.3)) == 0
    assert float(wanted_code_loss(on_codes, codebook, indices.roll(1, 2), margin=0.3)) == pytest.approx(1.3)
    between = torch.full((1, 2, 1, 1), 0.4, requires_grad=True)
    wanted_code_loss(between, codebook, torch.tensor([[[0]]]), margin=0.5).backward()
    assert between.grad is not None
    assert bool((between.grad > 0).all())


def test_only_tokens_that_count_have_a_loss() -> None:
    """The mean is over them alone, the others have no gradient, and none at all gives zero."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 2, 2, generator=generator, requires_grad=True)
    codebook = torch.randn(5, 3, generator=generator)
    indices = torch.randint(5, (2, 2, 2), generator=generator)
    where = torch.tensor([[[True, False], [False, False]], [[True, True], [False, True]]])
    loss = wanted_code_loss(latents, codebook, indices, margin=0.5, where=where)
    rows = latents.detach().movedim(1, -1)[where].T[None, :, None]
    assert float(loss.detach()) == pytest.approx(_oracle(rows, codebook, indices[where], 0.5), rel=1e-5)
    loss.backward()
    assert latents.grad is not None
    moved = latents.grad.abs().sum(1) > 0
    assert not bool((moved & ~where).any())
    assert bool(moved.any())
    none = wanted_code_loss(latents, codebook, indices, margin=0.5, where=torch.zeros_like(where))
    assert float(none.detach()) == 0
