"""What Stage 1 minimizes besides the quantizer's own loss.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checks import require

__all__ = [
    "Perceptual",
    "adaptive_weight",
    "discriminator_loss",
    "generator_loss",
    "reconstruction_loss",
]

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(B, C, H, W) twice, in [-1, 1] -> a distance of any shape that has a mean."""


def reconstruction_loss(
    reconstruction: Tensor,
    images: Tensor,
    *,
    l1_weight: float = 1.0,
    l2_weight: float = 4.0,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 0.0,
) -> Tensor:
    """Return the weighted sum of mean absolute, mean squared and perceptual error.

    Args:
        reconstruction: what the decoder gave, in the images' units.
        images: in [-1, 1].
        l1_weight: of the mean absolute error, >= 0.
        l2_weight: of the mean squared error, >= 0.
        perceptual: a distance of two batches.
        perceptual_weight: its weight, >= 0; it is not evaluated at 0.

    Shape:
        reconstruction, images: (B, C, H, W). Result: ().

    Raises:
        ValueError: shapes differ, or a perceptual weight comes without a distance.

    Source: Esser et al. 2021, arXiv:2012.09841, section 3.1, where L2 stands beside a perceptual loss.
        Differs: on a mostly constant ground L1 alone is minimal at the ground's colour, and training stays
        there for hundreds of steps; the squared error leads out, so both are summed.
    """
    same = reconstruction.shape == images.shape
    require(same, "reconstruction", f"of shape {tuple(images.shape)}", f"shape {tuple(reconstruction.shape)}")
    require(
        perceptual_weight == 0 or perceptual is not None, "perceptual", "a distance if perceptual_weight > 0", None
    )
    difference = reconstruction - images
    loss: Tensor = l1_weight * difference.abs().mean() + l2_weight * difference.square().mean()
    if perceptual is not None and perceptual_weight > 0:
        loss = loss + perceptual_weight * perceptual(reconstruction, images).mean()
    return loss


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator, ½(mean max(0, 1 - real) + mean max(0, 1 + fake)).

    Args:
        real: logits of real patches, any shape.
        fake: logits of reconstructed patches, any shape.

    Source: Lim and Ye 2017, arXiv:1705.02894, with the factor ½ usual in VQGANs.
    """
    return 0.5 * (functional.relu(1.0 - real).mean() + functional.relu(1.0 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Return minus the mean logit of the reconstructed patches: low where they pass for real."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, delta: float = 1e-6, maximum: float = 1e4
) -> Tensor:
    """Return the factor that gives the adversarial term a gradient as large as the reconstruction's.

    Both are the gradients of the mean of all processes' losses, so that the factor is the same everywhere.

    Args:
        reconstruction: the reconstruction loss, ().
        adversarial: the generator's loss, ().
        last_layer: the decoder's last weight, on which both gradients are taken.
        delta: δ, which keeps the factor finite, above 0; 1e-6 in the equation, 1e-4 in its authors' code.
        maximum: where the factor is cut off.

    Source: Esser et al. 2021, Eq. 7: λ = ‖∇ rec‖ / (‖∇ adv‖ + δ).
    """
    rec = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    adv = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
    distributed.average([rec, adv])
    ratio: Tensor = rec.norm() / (adv.norm() + delta)
    return ratio.clamp(0.0, maximum).detach()
