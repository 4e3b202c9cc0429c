"""The conformance table: every quantizer that the library offers, in the configurations users choose.

A new quantizer joins every test of ``test_quantizer_contract.py`` by one line here. A factory takes the
``channel_dim`` and builds a quantizer from the global random state; it must expose ``code_dim``, ``num_codes``,
``forward``, ``encode`` and ``decode``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from te_quant import VectorQuantizer

__all__ = ["EMPTY_SHAPES", "QUANTIZERS", "SHAPES", "latents_for", "state_of"]

_vq = partial(VectorQuantizer, 11, 6)

QUANTIZERS: dict[str, Callable[..., Any]] = {
    "vq": _vq,
    "vq-penalty": partial(_vq, orthogonal_reg=10.0),
    "vq-rotation": partial(_vq, gradient_estimator="rotation_trick"),
    "vq-temperature": partial(_vq, temperature=0.5),
    "vq-skip": partial(_vq, nonfinite="skip"),
    "vq-cosine": partial(_vq, metric="cosine", orthogonal_reg=1.0, orthogonal_active_only=True),
    "vq-cosine-rotation": partial(_vq, metric="cosine", gradient_estimator="rotation_trick"),
    "vq-ema": partial(_vq, codebook_update="ema"),
    "vq-ema-penalty": partial(_vq, codebook_update="ema", orthogonal_reg=10.0, decay=0.5),
    "vq-ema-subset": partial(
        _vq,
        codebook_update="ema",
        orthogonal_reg=10.0,
        orthogonal_active_only=True,
        orthogonal_max_codes=5,
        gradient_estimator="rotation_trick",
    ),
    "vq-ema-cosine": partial(_vq, codebook_update="ema", metric="cosine", temperature=0.1),
    "vq-ema-cosine-penalty": partial(_vq, codebook_update="ema", metric="cosine", orthogonal_reg=3.0, decay=0.0),
    "vq-one-code": partial(VectorQuantizer, 1, 6, orthogonal_reg=1.0),
    "vq-one-channel": partial(VectorQuantizer, 5, 1, codebook_update="ema", orthogonal_reg=1.0),
}

# (channel_dim, shape with C left as -1)
SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {
    "BChw": (1, (3, -1, 4, 5)),
    "BCN": (1, (3, -1, 7)),
    "NC": (1, (9, -1)),
    "BCdhw": (1, (2, -1, 2, 3, 2)),
    "BNC": (-1, (3, 7, -1)),
    "NC-last": (-1, (9, -1)),
    "BhwC": (-1, (2, 3, 4, -1)),
    "BdhwC": (-1, (2, 2, 3, 2, -1)),
}

EMPTY_SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {
    "no-images": (1, (0, -1, 4, 5)),
    "no-width": (1, (2, -1, 4, 0)),
    "no-rows": (1, (0, -1)),
    "no-sequences": (-1, (0, 7, -1)),
    "no-tokens": (-1, (3, 0, -1)),
    "rank-5": (-1, (2, 2, 0, 2, -1)),
}


def latents_for(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh normal latents of ``shape``, in which -1 stands for the code size."""
    sizes = [quantizer.code_dim if size == -1 else size for size in shape]
    return torch.randn(sizes, dtype=torch.float64).to(dtype)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of everything in ``state_dict``."""
    return {name: value.clone() for name, value in module.state_dict().items()}
