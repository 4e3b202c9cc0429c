"""The conformance table: every quantizer that the library offers, in the configurations users choose.

A new quantizer joins every test of ``test_quantizer_contract.py`` by one line here. A factory takes
``channel_dim`` and ``nonfinite`` and builds a quantizer from the global random state. The functions below
the table read from public attributes how quantizers differ; the tests do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from te_quant import FSQ, LFQ, SimVQ, VectorQuantizer
from tests.helpers import plain_quantizer, plain_residual

__all__ = [
    "QUANTIZERS",
    "dtype_of",
    "has_loss",
    "index_axes",
    "index_layout",
    "is_random",
    "latents_for",
    "mostly_slow",
    "state_of",
]

_vq = partial(plain_quantizer, 11, 6)
_rvq = partial(plain_residual, 11, 6, 3)


def _sim(num_codes: int = 11, code_dim: int = 6, **options: Any) -> SimVQ:
    """With a basis that training has turned away from the identity."""
    quantizer = SimVQ(num_codes, code_dim, **options)
    torch.nn.init.normal_(quantizer.basis)
    return quantizer


QUANTIZERS: dict[str, Callable[..., Any]] = {
    "vq": _vq,
    "vq-penalty": partial(_vq, orthogonal_reg=10.0),
    "vq-codebook-weight": partial(_vq, codebook_weight=0.25, commitment_weight=1.0),
    "vq-rotation": partial(_vq, gradient_estimator="rotation_trick"),
    "vq-temperature": partial(_vq, temperature=0.5),
    "vq-skip": partial(_vq, nonfinite="skip"),
    "vq-cosine": partial(_vq, metric="cosine", orthogonal_reg=1.0, orthogonal_active_only=True),
    "vq-cosine-rotation": partial(_vq, metric="cosine", gradient_estimator="rotation_trick"),
    "vq-cosine-raw": partial(_vq, metric="cosine_raw", gradient_estimator="rotation_trick"),
    "vq-dot": partial(_vq, metric="dot", orthogonal_reg=1.0),
    "vq-dot-temperature": partial(_vq, metric="dot", temperature=0.5),
    "vq-ema-cosine-raw": partial(_vq, codebook_update="ema", metric="cosine_raw", orthogonal_reg=3.0, decay=0.5),
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
    "vq-revival": partial(VectorQuantizer, 11, 6),
    "vq-one-code": partial(plain_quantizer, 1, 6, orthogonal_reg=1.0),
    "vq-one-channel": partial(plain_quantizer, 5, 1, codebook_update="ema", orthogonal_reg=1.0),
    "rvq": _rvq,
    "rvq-shared": partial(_rvq, shared_codebook=True, orthogonal_reg=10.0),
    "rvq-dropout": partial(_rvq, quantizer_dropout=True, gradient_estimator="rotation_trick"),
    "rvq-ema": partial(_rvq, codebook_update="ema", orthogonal_reg=10.0, decay=0.5),
    "rvq-ema-shared-dropout": partial(_rvq, codebook_update="ema", shared_codebook=True, quantizer_dropout=True),
    "rvq-skip-dropout": partial(_rvq, nonfinite="skip", codebook_update="ema", quantizer_dropout=True),
    "rvq-one-step": partial(plain_residual, 11, 6, 1, quantizer_dropout=True),
    "fsq": partial(FSQ, (8, 5, 5, 5)),
    "fsq-even": partial(FSQ, [4, 2, 6]),
    "fsq-one-channel": partial(FSQ, (7,)),
    "fsq-skip": partial(FSQ, (3, 4), nonfinite="skip"),
    "lfq": partial(LFQ, 5),
    "lfq-groups": partial(LFQ, 9, entropy_group_dim=4, temperature=0.5),
    "lfq-sure": partial(LFQ, 30, diversity_weight=0.0),
    "lfq-plain": partial(LFQ, 6, entropy_weight=0.0),
    "lfq-one-channel": partial(LFQ, 1, temperature=1.0),
    "lfq-skip": partial(LFQ, 4, nonfinite="skip"),
    "sim": _sim,
    "sim-fresh": partial(SimVQ, 11, 6),
    "sim-wide": partial(_sim, 300, 40),
    "sim-rotation": partial(_sim, gradient_estimator="rotation_trick", decay=0.0),
    "sim-skip": partial(_sim, nonfinite="skip"),
    "sim-one-channel": partial(_sim, 5, 1),
}


# They stand for the others in the fast suite, where a test has to do with what every quantizer inherits.
_REPRESENTATIVES = (
    "vq-skip",
    "vq-ema-penalty",
    "vq-revival",
    "vq-cosine-rotation",
    "rvq-dropout",
    "rvq-ema",
    "fsq",
    "lfq-groups",
    "sim",
)


def mostly_slow() -> list[Any]:
    """The names of all cases as parameters, marked slow but for one or two of each class."""
    return [pytest.param(name, marks=() if name in _REPRESENTATIVES else pytest.mark.slow) for name in QUANTIZERS]


def latents_for(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh normal latents of ``shape``, in which -1 stands for the code size."""
    sizes = [quantizer.code_dim if size == -1 else size for size in shape]
    return torch.randn(sizes, dtype=torch.float64).to(dtype)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of everything in ``state_dict``."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def dtype_of(quantizer: Any) -> torch.dtype:
    """The module's floating dtype."""
    dtype: torch.dtype = quantizer.dtype
    return dtype


def index_axes(quantizer: Any) -> tuple[int, ...]:
    """The axes that indices have behind those of the tokens: (Q,) where a token has Q of them."""
    return () if quantizer.num_quantizers is None else (quantizer.num_quantizers,)


def index_layout(quantizer: Any) -> str:
    """The shape of indices, as errors name it."""
    if index_axes(quantizer):
        return "(N, Q), (B, T, Q), (B, h, w, Q) or (B, d, h, w, Q)"
    return "(N,), (B, T), (B, h, w) or (B, d, h, w)"


def has_loss(quantizer: Any) -> bool:
    """Whether anything is learnt or asked of the latents; FSQ has no loss at all, by construction."""
    return not isinstance(quantizer, FSQ)


def is_random(quantizer: Any) -> bool:
    """Whether a training step draws anything at random."""
    if isinstance(quantizer, VectorQuantizer):
        return quantizer.temperature > 0 or quantizer.orthogonal_max_codes is not None
    return bool(getattr(quantizer, "quantizer_dropout", False))
