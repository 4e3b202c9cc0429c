"""Slow float64 reference computations for the quantizer tests, written from the formulas."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from te_quant._search.operators import _search
from te_quant._search.tiled import tiled_argmin

__all__ = [
    "LargestTensor",
    "assert_nearest",
    "mean_squared_cosine",
    "objective",
    "orthogonality_oracle",
    "squared_distances",
]


def squared_distances(latents: Tensor, codebook: Tensor) -> np.ndarray:
    """‖z - e‖² by differences, (N, K) float64."""
    z = latents.detach().to(torch.float64).numpy()
    e = codebook.detach().to(torch.float64).numpy()
    result = np.empty((len(z), len(e)))
    for k in range(len(e)):
        result[:, k] = ((z - e[k]) ** 2).sum(1)
    return result


def assert_nearest(indices: Tensor, latents: Tensor, codebook: Tensor, *, clear_share: float = 0.0) -> None:
    """Judge a search: no code is nearer beyond rounding, and the lowest of the nearest where that is certain."""
    distances = squared_distances(latents, codebook)
    codes = codebook.to(torch.float64).numpy()
    spread = ((codes - codes.mean(0)) ** 2).sum(1).max() if len(codes) else 0.0
    best = distances.min(1)
    rounding = 8 * (codes.shape[1] + 2) * torch.finfo(codebook.dtype).eps * (best + spread)
    chosen = distances[np.arange(len(distances)), indices.numpy()]
    assert (chosen <= best + rounding).all(), "a code that was not chosen is nearer"
    lowest = distances.argmin(1)
    # Equal codes are ties, not near-ties, so they leave a row certain.
    close = distances <= (best + 2 * rounding)[:, None]
    equal = (codes[lowest][:, None, :] == codes[None, :, :]).all(2)
    certain = (~close | equal).all(1)
    assert certain.sum() >= clear_share * len(certain)
    np.testing.assert_array_equal(indices.numpy()[certain], lowest[certain])


def orthogonality_oracle(codebook: Tensor, mask: Tensor | None = None) -> float:
    """Eq. 5 without λ over all pairs, one at a time."""
    rows = [row for i, row in enumerate(codebook.detach().to(torch.float64).tolist()) if mask is None or mask[i]]
    total = 0.0
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0
            total += (cosine - (i == j)) ** 2
    return total / len(rows) ** 2 if rows else 0.0


def mean_squared_cosine(codebook: Tensor) -> float:
    """Mean over pairs of different codes of their squared cosine."""
    units = torch.nn.functional.normalize(codebook.detach().to(torch.float64), dim=1)
    cosines = units @ units.T
    off = ~torch.eye(len(units), dtype=torch.bool)
    return cosines[off].square().mean().item()


def objective(
    codebook: Tensor, means: Tensor, shares: Tensor, weight: float, mask: Tensor | None = None
) -> Tensor:
    """F(e) = Σ w_k/C ‖e_k - m_k‖² + λ ‖ÊÊᵀ - I‖²_F / n² over the codes under the mask; differentiable."""
    if mask is not None:
        codebook, means, shares = codebook[mask], means[mask], shares[mask]
    units = codebook / codebook.norm(dim=1, keepdim=True)
    fit = ((codebook - means).square().mean(1) * shares).sum()
    gram = units @ units.T - torch.eye(len(units), dtype=units.dtype)
    return fit + weight * gram.square().sum() / max(len(units), 1) ** 2


class LargestTensor(TorchDispatchMode):
    """Record the size, in elements, of the largest tensor that any operator makes while the mode is on."""

    # The dispatcher does not look into an operator of our own, so its kernel is called with the mode on.
    _KERNELS: ClassVar = {"search_codes": _search, "sample_codes": tiled_argmin}

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = self._KERNELS.get(func._schema.name.split("::")[1])
        if func.namespace == "te_quant" and kernel:
            with self:
                result = kernel(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result
