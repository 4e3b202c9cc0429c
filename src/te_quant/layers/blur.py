"""A low-pass filter with a stride, which two of the paper's downsampling layers share.

Shape letters: B batch, C channels, H W pixels, k taps, s stride.
"""

from __future__ import annotations

from torch import Tensor, nn

from te_quant._checks import require_choice, require_int
from te_quant.contract import Statement, sliding_window
from te_quant.filters import PADDING_MODES, PaddingMode, binomial_plane, filter_constant
from te_quant.layers.stating import derived

__all__ = ["BlurPool2d"]


class BlurPool2d(nn.Module):
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
        >>> import torch
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

    def forward(self, images: Tensor) -> Tensor:
        """Filter, then subsample."""
        return filter_constant(
            images, binomial_plane, self.kernel_size, stride=self.stride, padding_mode=self.padding_mode
        )

    def _statement(self) -> Statement:
        before, after = (self.kernel_size - 1) // 2, self.kernel_size // 2
        circular = self.padding_mode == "circular"
        return sliding_window(self.kernel_size, stride=self.stride, before=before, after=after, circular=circular)

    def extra_repr(self) -> str:
        """The options."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding_mode={self.padding_mode}"
