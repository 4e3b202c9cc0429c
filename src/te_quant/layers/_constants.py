"""Filters that follow from a layer's options, exact in the dtype that the layer has at the moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["ConstantFilter"]

_Self = TypeVar("_Self", bound="ConstantFilter")


class ConstantFilter(nn.Module):
    """A layer with one filter that is computed from its options and adds nothing to a ``state_dict``.

    A subclass defines :meth:`_compute_filter` and calls :meth:`_set_filter` once its options are set. Afterwards
    ``filter`` has the dtype and device of the layer.
    """

    filter: Tensor

    def _compute_filter(self) -> Tensor:
        """Return the filter in float64, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must define _compute_filter().")

    def _set_filter(self, like: Tensor | None = None) -> None:
        """Register the filter with the dtype and device of ``like``; by default those of new tensors."""
        like = torch.empty(0) if like is None else like
        # In this order, as some devices have no float64.
        self.register_buffer("filter", self._compute_filter().to(like.dtype).to(like.device), persistent=False)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """Compute the filter again: the converted one has lost digits, or was never filled."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set_filter(self.filter)
        return self
