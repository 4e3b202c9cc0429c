"""A low-pass filter with a stride, which two of the paper's downsampling layers share, and how layers hold one.

Shape letters: B batch, C channels, H W pixels, k taps, s stride.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from te_quant._checks import require_choice, require_int
from te_quant.contract import Statement, sliding_window
from te_quant.filters import PADDING_MODES, PaddingMode, binomial_kernel, filter_by
from te_quant.layers.stating import derived

__all__ = ["BlurPool2d", "ConstantFilter"]

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


class BlurPool2d(ConstantFilter):
    """A binomial low-pass filter, then one pixel in ``stride``.

    It takes any number of channels, any floating dtype and any side; it has no weights and adds nothing to
    a ``state_dict``. Constants stay as they are, except next to a border that is padded with zeros.
    Exact for: multiples of the stride, under circular padding.

    Args:
        kernel_size: k, at least 1, odd or even; 5 in the paper.
        stride: s, pixels, at least 1.
        padding_mode: ``zeros``, ``replicate``, ``reflect`` or ``circular``; ``(k - 1) // 2`` pixels before
            and ``k // 2`` after.

    Shape:
        images: (B, C, H, W).
        result: (B, C, ⌈H/s⌉, ⌈W/s⌉).

    Raises:
        ValueError: an option is out of range; a side is too small to be reflected.

    Source: Zhang 2019, arXiv:1904.11486. Differs: the size is ⌈H/s⌉ for even k too, and for any k and s.

    Example:
        >>> impulse = torch.tensor([[[[0.0, 0.0, 4.0, 0.0]]]])
        >>> BlurPool2d(kernel_size=3, stride=2, padding_mode="circular")(impulse)
        tensor([[[[0., 2.]]]])
    """

    reach, exact_for = derived(lambda self: self._statement())

    def __init__(self, *, kernel_size: int = 5, stride: int = 2, padding_mode: PaddingMode = "replicate") -> None:
        super().__init__()
        kernel_size = require_int("kernel_size", kernel_size, 1)
        stride = require_int("stride", stride, 1)
        require_choice("padding_mode", padding_mode, PADDING_MODES)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding_mode: PaddingMode = padding_mode
        self._set_filter()

    def forward(self, images: Tensor) -> Tensor:
        """Filter, then subsample."""
        return filter_by(images, self.filter, self.stride, self.padding_mode)

    def _compute_filter(self) -> Tensor:
        taps = binomial_kernel(self.kernel_size, device="cpu")
        return torch.outer(taps, taps)

    def _statement(self) -> Statement:
        before, after = (self.kernel_size - 1) // 2, self.kernel_size // 2
        circular = self.padding_mode == "circular"
        return sliding_window(self.kernel_size, stride=self.stride, before=before, after=after, circular=circular)

    def extra_repr(self) -> str:
        """The options."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding_mode={self.padding_mode}"
