"""What quantizers have in common that hold no tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from te_quant.quantizers.base import Quantizer

__all__ = ["TensorFreeQuantizer"]

_Self = TypeVar("_Self", bound="TensorFreeQuantizer")


class TensorFreeQuantizer(Quantizer):
    """A quantizer without parameters and buffers: its codes follow from its options.

    It runs wherever the latents are. Its dtype follows conversions such as ``half()`` or ``to(torch.float64)``, as
    that of a parameter would; at first it is torch's default dtype.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._floating = torch.get_default_dtype()

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the codes."""
        return self._floating

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """Learn from ``fn`` what it makes of a tensor of the present dtype."""
        super()._apply(fn, recurse)
        converted = fn(torch.empty(0, dtype=self._floating, device="cpu")).dtype
        if converted.is_floating_point:
            self._floating = converted
        return self
