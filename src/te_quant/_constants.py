"""Tensors that follow from options, such as the taps of a filter.

A buffer for them can be lost: a model that is built on the meta device, or loaded by a library that replaces every
buffer a checkpoint does not hold, would compute with memory that was never filled. So modules keep the options and
ask for the tensor whenever they need it, in the dtype and on the device of their input.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from te_quant._execution import in_transform

__all__ = ["constant"]


def constant(values: Callable[..., Any], *options: Hashable, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values(*options)`` as a tensor that must not be changed, because eager calls share it.

    Args:
        values: a function of a module that returns nested lists of numbers. Each number is rounded once.
        *options: arguments of ``values``.
        dtype: type of the result.
        device: where the result lives.

    Example:
        >>> constant(range, 3, dtype=torch.float32, device=torch.device("cpu"))
        tensor([0., 1., 2.])
    """
    if _traced():
        return torch.tensor(values(*options), dtype=dtype, device=device)
    return _shared(values, options, dtype, device)


def _traced() -> bool:
    """Whether a tensor made now may be fake, wrapped, or part of a graph: such a tensor must not be shared."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._len_torch_dispatch_stack() > 0
        or in_transform()
    )


@lru_cache(maxsize=256)
def _shared(
    values: Callable[..., Any], options: tuple[Hashable, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    # A tensor made in inference mode could not take part in training later.
    with torch.inference_mode(False):
        return torch.tensor(values(*options), dtype=dtype, device=device)
