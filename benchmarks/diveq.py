"""DiVeQ on a codebook of this library, which does not provide it, for benchmarks.

Shape letters: B batch, C code size, K codes, h w grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import Layer
from te_quant import VectorQuantizer

__all__ = ["Diveq", "diveq_layer"]


class Diveq(nn.Module):
    """Move each latent by its distance to the nearest code, in a noisy direction towards that code.

    The distance carries gradients to the latent and to the code; the direction carries none. There are no losses.

    Args:
        quantizer: one whose codebook is trained by gradient.
        variance: of the noise that is added to the difference of code and latent before its direction is taken,
            per channel.

    Shape:
        latents: (B, C, h, w). Returns quantized latents of the same shape, and indices (B, h, w).

    Source: Vali et al. 2025, arXiv:2509.26469, "Differentiable vector quantization using the reparameterization
        trick".
    """

    def __init__(self, quantizer: VectorQuantizer, *, variance: float = 1e-3) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.deviation = variance**0.5

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized latents, in evaluation the codes themselves, and indices."""
        indices = self.quantizer(latents).indices
        codes = F.embedding(indices, self.quantizer.codebook).movedim(-1, 1)
        if not self.training:
            return codes, indices
        difference = codes - latents
        noise = self.deviation * torch.randn_like(difference)
        direction = F.normalize(difference.detach() + noise, dim=1)
        return latents + difference.norm(dim=1, keepdim=True) * direction, indices


def diveq_layer(num_codes: int, code_dim: int) -> Layer:
    """Build it with a codebook that moves by gradient."""
    module = Diveq(VectorQuantizer(num_codes, code_dim, codebook_update="gradient"))

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *module(latents), latents.new_zeros(())

    return Layer(module, forward, code_dim, num_codes)
