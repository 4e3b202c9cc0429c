"""What the quantizers are made of, as pure functions.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant._checks import (
    require,
    require_axis,
    require_device,
    require_floating,
    require_generator,
    require_number,
    require_rank,
)
from te_quant._execution import in_transform, is_exporting
from te_quant._magnitudes import moderating
from te_quant._precision import full_precision, widen
from te_quant._search import sample_codes, search_codes

__all__ = ["nearest_code", "orthogonality", "perplexity", "rotation_trick", "straight_through"]

_library = torch.library.Library("te_quant", "FRAGMENT")
_library.define("straight_through(Tensor latents, Tensor codes) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def nearest_code(
    latents: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Index of the code nearest to each latent vector in L2; ties go to the lowest index.

    Takes O(N + K) memory: neither an N x K tensor nor a one-hot is built. Half-precision inputs are compared in
    float32, and latents far from the origin lose no accuracy. The matrix product follows
    ``torch.set_float32_matmul_precision``: below ``"highest"`` near-ties may go to another code.

    Args:
        latents: (N, C), floating point.
        codebook: (K, C), same dtype and device. For cosine similarity normalize both first.
        temperature: 0 takes the nearest code; above 0 a code is drawn with probability proportional to
            exp(-‖z - e‖² / (2 · temperature)), in squared units of the latents.
        generator: source of randomness for ``temperature > 0``.

    Returns:
        (N,) int64 in [0, K).

    Raises:
        ValueError: a shape, the device or the temperature does not fit, or there is no code.
        TypeError: a tensor is not floating point, the dtypes differ, or the generator is no ``torch.Generator``.

    Source: Shin et al. 2021, arXiv:2112.00384, Eq. 3.
    """
    for name, tensor in (("latents", latents), ("codebook", codebook)):
        require_rank(name, tensor, (2,), "(N, C)" if name == "latents" else "(K, C)")
        require_floating(name, tensor)
    require(codebook.shape[0] >= 1, "codebook", "at least one code", "none")
    require_axis("latents", latents, 1, codebook.shape[1], "codebook axis 1")
    require_device("latents", latents, codebook.device, "codebook")
    if latents.dtype != codebook.dtype:
        raise TypeError(f"latents must be {codebook.dtype} as the codebook, got {latents.dtype}.")
    temperature = require_number("temperature", temperature, 0.0)
    require_generator(generator)
    if latents.dtype in (torch.float16, torch.bfloat16):
        latents, codebook = latents.float(), codebook.float()
    if temperature:
        return sample_codes(latents, codebook, float(temperature), generator)
    return search_codes(latents, codebook)


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The codes in the forward pass, bit for bit; the identity towards the latents in the backward pass.

    Args:
        latents: any shape.
        codes: same shape; gets no gradient.

    Raises:
        ValueError: the shapes differ.

    Source: Bengio et al. 2013, arXiv:1308.3432; van den Oord et al. 2017, Section 3.2. Not written as
        z + (codes - z), which differs from the codes in the last bits, so that tokens would decode to another
        image than the one trained on, and is NaN where z is not finite.
    """
    _require_same_shape(latents, codes)
    if is_exporting() or in_transform():
        # Adding zero leaves the codes as they are, and a gradient has its path.
        path = latents - latents.detach()
        return codes.detach() + torch.where(latents.isfinite(), path, 0.0)
    # A compiler traces no Function that has forward derivatives, and an operator has none.
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.te_quant.straight_through(latents, codes)
        return traced
    estimate: Tensor = _StraightThrough.apply(latents, codes)  # type: ignore[no-untyped-call]
    return estimate


class _StraightThrough(torch.autograd.Function):
    """Eager mode's: a copy, with derivatives backward and forward."""

    # With its own setup_context, which only transforms need, torch would inspect the signature at every call.
    @staticmethod
    def forward(ctx: Any, latents: Tensor, codes: Tensor) -> Tensor:  # noqa: ARG004
        return codes.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Tensor | None) -> Tensor:  # noqa: ARG004
        return tangent.clone()


def _copy(latents: Tensor, codes: Tensor) -> Tensor:  # noqa: ARG001
    return codes.clone()


def _pass_on(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG001
    return gradient, None


_library.impl("straight_through", _copy, "CompositeExplicitAutograd")
torch.library.register_fake("te_quant::straight_through", _copy, lib=_library)
torch.library.register_autograd("te_quant::straight_through", _pass_on, lib=_library)


def rotation_trick(latents: Tensor, codes: Tensor) -> Tensor:
    """The codes in the forward pass; backward, the gradient is rotated and rescaled as z is onto its code.

    Args:
        latents: (N, C).
        codes: (N, C); gets no gradient. Where z or its code is zero, or they are opposite, no rotation is
            defined and the row falls back to :func:`straight_through`.

    Raises:
        ValueError: the shapes differ.

    Source: Fifty et al. 2024, arXiv:2410.06424, Eq. 3 and 4, with the rotation held constant.
    """
    _require_same_shape(latents, codes)
    return straight_through(rotated_latents(latents, codes), codes)


def rotated_latents(latents: Tensor, codes: Tensor) -> Tensor:
    """(N, C), latents rotated and rescaled onto their codes; unchanged where no rotation is defined."""
    # Detached, since no_grad would stop the derivatives backward only, not those forward.
    fixed_latents, fixed_codes = latents.detach(), codes.detach()
    latent_norm = fixed_latents.norm(dim=-1, keepdim=True)
    code_norm = fixed_codes.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(latents.dtype).tiny ** 0.5
    unit_latents = fixed_latents / latent_norm.clamp_min(tiny)
    unit_codes = fixed_codes / code_norm.clamp_min(tiny)
    halfway = unit_latents + unit_codes
    halfway_norm = halfway.norm(dim=-1, keepdim=True)
    # Below this the half-way vector is rounding error, not a direction.
    flat = torch.finfo(latents.dtype).eps ** 0.5
    defined = (latent_norm > tiny) & (code_norm > tiny) & (halfway_norm > flat)
    halfway = halfway / halfway_norm.clamp_min(tiny)
    scale = code_norm / latent_norm.clamp_min(tiny)
    reflected = latents - 2 * (latents * halfway).sum(-1, keepdim=True) * halfway
    rotated = scale * (reflected + 2 * (latents * unit_latents).sum(-1, keepdim=True) * unit_codes)
    return torch.where(defined, rotated, latents)


def _require_same_shape(latents: Tensor, codes: Tensor) -> None:
    # Broadcasting would give back another shape than that of the latents.
    if codes.shape != latents.shape:
        require(False, "codes", f"of shape {tuple(latents.shape)} as the latents", f"shape {tuple(codes.shape)}")


def orthogonality(codebook: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far the codes are from being orthogonal: ‖ÊÊᵀ - I‖²_F / K², Ê the codes scaled to unit length.

    0 exactly when all codes are orthogonal, which needs K <= C; beyond that the least value is 1/C - 1/K. A zero
    code counts as the distance of its own diagonal entry from 1. Evaluated by a C x C product when K > C, so the
    cost is O(K·C·min(K, C)) and the memory O(K·C + min(K, C)²).

    Args:
        codebook: (K, C), floating point.
        mask: (K,) bool; the codes to look at, all if None. K then counts these alone; none gives 0.

    Returns:
        () tensor, differentiable; float32 for a codebook in half precision.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the codebook is not floating point or the mask not bool.

    Source: Shin et al. 2021, arXiv:2112.00384, Eq. 5 without λ. For unit rows
        ‖ÊÊᵀ - I‖² = ‖ÊᵀÊ‖² - 2·Σ‖ê‖² + K, which stays true when some rows are zero.
    """
    require_rank("codebook", codebook, (2,), "(K, C)")
    require_floating("codebook", codebook)
    if mask is not None:
        require_rank("mask", mask, (1,), "(K,)")
        require_axis("mask", mask, 0, codebook.shape[0], "K")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}; pass mask.bool().")
    with full_precision(codebook.device):
        codes = widen(codebook)
        codes = codes * moderating(torch.linalg.vector_norm(codes.detach(), torch.inf, dim=1, keepdim=True))
        return _orthogonality(F.normalize(codes, dim=1), mask)


def _orthogonality(units: Tensor, mask: Tensor | None) -> Tensor:
    codes, size = units.shape
    count = units.new_tensor(codes)
    if mask is not None:
        units = units * mask.unsqueeze(1)
        count = mask.sum().to(units.dtype)
    if codes <= size:
        # The K x K form has no cancellation near zero, which is where a trained codebook lies.
        target = torch.eye(codes, dtype=units.dtype, device=units.device)
        if mask is not None:
            target = target * mask
        distance = (units @ units.T - target).square().sum()
    else:
        distance = (units.T @ units).square().sum() - 2 * units.square().sum() + count
        # With C or fewer codes under the mask it may reach zero, and the difference then rounds below it.
        distance = distance.clamp_min(0)
    return distance / count.square().clamp_min(1)


def perplexity(histogram: Tensor) -> Tensor:
    """The effective number of codes: exp of the entropy of a histogram of code use.

    Args:
        histogram: (K,) counts or weights, >= 0, any real dtype. All zero gives 0: no codes are in use.

    Returns:
        () in [0, K], NaN if a weight is; float64 if the histogram is, else float32, because some devices have no
        float64.

    Raises:
        ValueError: the histogram is not of rank 1.
        TypeError: it is complex.
    """
    require_rank("histogram", histogram, (1,), "(K,)")
    if histogram.is_complex():
        raise TypeError(f"histogram must be real, got {histogram.dtype}.")
    weights = histogram if histogram.dtype == torch.float64 else histogram.to(torch.float32)
    total = weights.sum()
    shares = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
    entropy = -torch.xlogy(shares, shares).sum()
    return torch.where(total == 0, 0.0, entropy.exp())
