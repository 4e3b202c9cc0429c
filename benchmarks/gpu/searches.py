"""The searches of the library in every precision, and how wrong they may be.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.search import VARIABLE
from te_quant._search.fused import Tiling, fused_argmin, kernel_of, tiling_for
from te_quant._search.tiles import center_of
from te_quant.functional import nearest_code

__all__ = [
    "PRECISIONS",
    "THREE_PRODUCTS",
    "TOLERANCES",
    "Tiling",
    "fused",
    "fused_with",
    "kernel_alone",
    "kernel_of",
    "one_kernel",
    "precision",
    "tiled",
    "tiling_for",
]

PRECISIONS = {"float32": "highest", "TF32": "high", "bf16": "medium"}
"""By name: what :func:`torch.set_float32_matmul_precision` calls it."""

TOLERANCES = {"float32": 1e-5, "TF32": 4e-3, "bf16": 3e-2}
"""A code is wrong if it is farther than the nearest by this share of the squared lengths of latent and code."""

THREE_PRODUCTS = Tiling("tf32x3", 128, 128, 32, 8, 2)
"""The candidate for the default: on tensor cores, and nearly float32."""

# What the interpreter, which has no multiprocessors, is told.
_MULTIPROCESSORS = 4


@contextmanager
def one_kernel(wanted: bool) -> Iterator[None]:
    """Let the operator search in one kernel, or in tiles."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1" if wanted else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Multiply float32 matrices in the precision ``name`` of :data:`PRECISIONS`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[name])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def tiled(latents: Tensor, codebook: Tensor) -> Tensor:
    """Search in tiles: (N, C), (K, C) -> (N,)."""
    with one_kernel(False):
        return nearest_code(latents, codebook)


def fused(latents: Tensor, codebook: Tensor) -> Tensor:
    """Search in one kernel, through the operator; on a CPU in Triton's interpreter."""
    if latents.device.type == "cpu":
        return kernel_alone(latents, codebook)
    with one_kernel(True):
        return nearest_code(latents, codebook)


def kernel_alone(latents: Tensor, codebook: Tensor) -> Tensor:
    """Search in one kernel, without the operator, which sends equal codes to the first of them."""
    processors = _MULTIPROCESSORS if latents.device.type == "cpu" else None
    return fused_argmin(latents, codebook, center_of(codebook), processors)


def fused_with(tiling: Tiling) -> Callable[[Tensor, Tensor], Tensor]:
    """Search in one kernel with a tiling of one's own."""

    def search(latents: Tensor, codebook: Tensor) -> Tensor:
        processors = _MULTIPROCESSORS if latents.device.type == "cpu" else None
        # No more channels than there are.
        channels = min(tiling.channels, tiling_for("tf32", len(latents), latents.shape[1]).channels)
        fitting = tiling._replace(channels=channels) if latents.shape[1] < tiling.channels else tiling
        return fused_argmin(latents, codebook, center_of(codebook), processors, fitting)

    return search
