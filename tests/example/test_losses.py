"""What Stage 1 minimizes: losses, adaptive weight, discriminator, learning rate.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from examples.te_vqgan.runs.schedule import rate_factor
from examples.te_vqgan.stage1.discriminator import PatchDiscriminator
from examples.te_vqgan.stage1.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from examples.te_vqgan.stage1.presets import settings_for


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(3, 3, 5, 7, dtype=torch.float64) * 2 - 1
    return images + torch.randn_like(images), images


def test_reconstruction_loss_is_the_weighted_sum_of_both_errors() -> None:
    """L1 and L2 against numpy, in float64 to its last digits."""
    reconstruction, images = _pair()
    difference = reconstruction.numpy() - images.numpy()
    expected = 0.7 * np.mean(np.abs(difference)) + 3.0 * np.mean(difference**2)
    loss = reconstruction_loss(reconstruction, images, l1_weight=0.7, l2_weight=3.0)
    assert loss.item() == pytest.approx(expected, rel=1e-14)


def test_reconstruction_loss_has_the_analytic_gradient() -> None:
    """d/dr = (w1 sign(r - x) + 2 w2 (r - x)) / n."""
    reconstruction, images = _pair()
    reconstruction.requires_grad_()
    reconstruction_loss(reconstruction, images, l1_weight=0.7, l2_weight=3.0).backward()
    difference = reconstruction.detach() - images
    expected = (0.7 * torch.sign(difference) + 6.0 * difference) / images.numel()
    assert reconstruction.grad is not None
    torch.testing.assert_close(reconstruction.grad, expected, rtol=1e-12, atol=1e-15)


def test_perceptual_term_is_added_with_its_weight_and_not_computed_at_weight_zero() -> None:
    """The callable's mean counts; at weight 0 it is not called."""
    reconstruction, images = _pair()
    calls: list[int] = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (a - b).square().flatten(1).sum(1)

    plain = reconstruction_loss(reconstruction, images)
    without = reconstruction_loss(reconstruction, images, perceptual=distance)
    assert without.item() == plain.item()
    assert not calls
    with_it = reconstruction_loss(reconstruction, images, perceptual=distance, perceptual_weight=0.5)
    expected = plain.item() + 0.5 * np.mean(np.sum((reconstruction - images).numpy() ** 2, axis=(1, 2, 3)))
    assert with_it.item() == pytest.approx(expected, rel=1e-14)


def test_reconstruction_loss_refuses_other_shapes() -> None:
    """Shapes that broadcast would give a wrong mean in silence."""
    reconstruction, images = _pair()
    with pytest.raises(
        ValueError, match=r"reconstruction must be of shape \(3, 3, 5, 7\), got shape \(1, 3, 5, 7\)"
    ):
        reconstruction_loss(reconstruction[:1], images)


def test_a_perceptual_weight_needs_a_distance() -> None:
    """It would be ignored."""
    with pytest.raises(ValueError, match="perceptual must be a distance if perceptual_weight > 0"):
        reconstruction_loss(*_pair(), perceptual_weight=1.0)


def test_hinge_losses_match_their_definition() -> None:
    """Against a loop over logits."""
    real, fake = torch.randn(2, 1, 4, 4, dtype=torch.float64) * 2, torch.randn(2, 1, 4, 4, dtype=torch.float64) * 2
    on_real = sum(max(0.0, 1.0 - value) for value in real.flatten().tolist()) / 32
    on_fake = sum(max(0.0, 1.0 + value) for value in fake.flatten().tolist()) / 32
    assert discriminator_loss(real, fake).item() == pytest.approx((on_real + on_fake) / 2, rel=1e-13)
    assert generator_loss(fake).item() == pytest.approx(-sum(fake.flatten().tolist()) / 32, rel=1e-12)


def test_hinge_loss_is_zero_behind_the_margin_and_knows_which_side_is_real() -> None:
    """Perfect logits cost nothing, exchanged ones cost 1 + margin."""
    real, fake = torch.full((4,), 1.5), torch.full((4,), -1.5)
    assert discriminator_loss(real, fake).item() == 0.0
    assert discriminator_loss(fake, real).item() == 2.5


@pytest.mark.parametrize("delta", [1e-6, 1e-4, 1.0])
def test_adaptive_weight_is_the_ratio_of_the_gradient_norms(delta: float) -> None:
    """Both losses are linear or quadratic in the weight, so their gradients are known."""
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    direction = torch.randn(4, 3, dtype=torch.float64)
    reconstruction, adversarial = 3.0 * weight.square().sum(), (direction * weight).sum()
    expected = np.linalg.norm(6.0 * weight.detach().numpy()) / (np.linalg.norm(direction.numpy()) + delta)
    result = adaptive_weight(reconstruction, adversarial, weight, delta=delta)
    assert result.item() == pytest.approx(expected, rel=1e-12)
    assert not result.requires_grad


def test_adaptive_weight_is_cut_off_where_the_adversarial_gradient_vanishes() -> None:
    """A dead discriminator must not blow up the loss."""
    weight = nn.Parameter(torch.ones(3))
    assert adaptive_weight(weight.sum() * 1e3, (weight * 0.0).sum(), weight).item() == 1e4


def test_discriminator_judges_patches_one_by_one() -> None:
    """A changed corner changes the logits near it, through convolutions alone never those of another image."""
    torch.manual_seed(0)
    judge = PatchDiscriminator(3, 8, 2).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    logits = judge(images)
    assert logits.shape[:2] == (2, 1)
    assert min(logits.shape[2:]) > 1
    changed = images.clone()
    changed[0, :, :4, :4] += 1.0
    again = judge(changed)
    assert torch.equal(again[1], logits[1])
    assert not torch.equal(again[0, 0, 0, 0], logits[0, 0, 0, 0])


def test_the_papers_discriminator() -> None:
    """Counted by hand: kernels of 4x4, 64 to 512 channels, biases only at both ends, and batch normalization."""
    torch.manual_seed(0)
    settings = settings_for("paper", "vqgan")
    judge = PatchDiscriminator(
        3, settings.discriminator_channels, settings.discriminator_layers, norm=settings.discriminator_norm
    )
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert sum(parameter.numel() for parameter in judge.parameters()) == kernels + 64 + 1 + 2 * (128 + 256 + 512)
    norms = [layer for layer in judge.layers if isinstance(layer, nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == [128, 256, 512]
    assert not any(isinstance(layer, nn.GroupNorm) for layer in judge.layers)
    for layer in judge.layers:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    scales = torch.cat([norm.weight for norm in norms])
    assert scales.mean().item() == pytest.approx(1.0, abs=0.01)
    assert scales.std().item() == pytest.approx(0.02, rel=0.2)
    assert judge(torch.rand(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    with pytest.raises(ValueError, match="norm must be one of 'group', 'batch', got 'layer'"):
        PatchDiscriminator(norm="layer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 2), "image_channels must be an int >= 1, got 0"),
        ((3, 2, 2), "base_channels must be an int >= 4, got 2"),
        ((3, 8, 0), "num_layers must be an int >= 1, got 0"),
    ],
)
def test_discriminator_refuses_bad_sizes(arguments: tuple[int, int, int], message: str) -> None:
    """Each argument by name."""
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(*arguments)


def test_a_discriminator_learns_to_tell_and_fools_no_longer() -> None:
    """Descending the hinge loss separates two kinds of images; ascending it (the negative control) does not."""
    final = {}
    for sign in (1.0, -1.0):
        torch.manual_seed(0)
        judge = PatchDiscriminator(3, 8, 1)
        optimizer = torch.optim.Adam(judge.parameters(), 1e-3)
        real, fake = torch.rand(8, 3, 16, 16), torch.rand(8, 3, 16, 16) - 1
        for _ in range(20):
            optimizer.zero_grad()
            (sign * discriminator_loss(judge(real), judge(fake))).backward()
            optimizer.step()
        final[sign] = (judge(real).mean() - judge(fake).mean()).item()
    assert final[1.0] > 0.5
    assert final[-1.0] < 0.0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(1, 200), st.floats(0.0, 1.0))
def test_rate_rises_linearly_then_falls_on_a_cosine(warmup: int, after: int, final: float) -> None:
    """Against the closed form, at every step of the run."""
    steps = warmup + after
    rates = [rate_factor(t, steps=steps, warmup_steps=warmup, final_share=final) for t in range(steps + 1)]
    for t in range(warmup):
        assert rates[t] == pytest.approx((t + 1) / warmup)
    for t in range(warmup, steps + 1):
        expected = final + (1 - final) * math.cos(math.pi / 2 * (t - warmup) / after) ** 2
        assert rates[t] == pytest.approx(expected, abs=1e-12)
    assert rates[-1] == pytest.approx(final, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 7), st.floats(0.0, 1.0))
def test_rate_restarts_as_often_as_it_is_told(warmup: int, length: int, cycles: int, final: float) -> None:
    """Every cycle is the one of a run that has it alone, bit for bit at its start."""
    steps = warmup + cycles * length
    rates = [
        rate_factor(t, steps=steps, warmup_steps=warmup, final_share=final, cycles=cycles) for t in range(steps)
    ]
    single = [
        rate_factor(t, steps=warmup + length, warmup_steps=warmup, final_share=final)
        for t in range(warmup + length)
    ]
    assert rates == pytest.approx(single + (cycles - 1) * single[warmup:])
    assert [rates[warmup + cycle * length] for cycle in range(cycles)] == [1.0] * cycles
    assert rate_factor(steps, steps=steps, warmup_steps=warmup, final_share=final, cycles=cycles) == pytest.approx(
        final, abs=1e-12
    )


def test_rate_stays_at_its_end_behind_the_run() -> None:
    """The cosine must not rise again."""
    assert rate_factor(500, steps=100, warmup_steps=10, final_share=0.25) == 0.25
