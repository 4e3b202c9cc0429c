"""A low-pass filter with a stride, which two of the paper's downsampling layers share.

Shape letters: B batch, C channels, H W pixels, k taps, s stride.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from te_quant._checks import require_axis, require_choice, require_int, require_rank
from te_quant.contract import Statement, sliding_window
from te_quant.filters import PADDING_MODES, PaddingMode, binomial_plane, filter_constant
from te_quant.layers.stating import derived

__all__ = ["BlurPool2d"]

# How far the entries of a stored kernel may be from the binomial ones: half precision rounds them by less.
_ROUNDING = 1e-3


class BlurPool2d(nn.Module):
    """A binomial low-pass filter, then one pixel in ``stride``.

    It takes any number of channels, any floating dtype and any side; it has no weights and adds nothing to
    a ``state_dict``. It loads in place of the ``BlurPool`` of antialiased-cnns, whose kernel (``filt``) is dropped
    after a check that it is the one of this layer. Its padding is not stored: pass ``padding_mode``, which is
    ``reflect`` there by default. Constants stay as they are, except next to a border that is padded with zeros.
    Exact for: multiples of the stride, under circular padding.

    Args:
        kernel_size: k, at least 1, odd or even; 5 in Shin et al. 2021.
        stride: s, pixels, at least 1.
        padding_mode: ``zeros``, ``replicate``, ``reflect`` or ``circular``; ``(k - 1) // 2`` pixels before
            and ``k // 2`` after.
        channels: C, at least 1; images with another number are refused. None takes any. Libraries such as timm
            name it when they build a layer: ``aa_layer=BlurPool2d``.

    Shape:
        images: (B, C, H, W).
        result: (B, C, ⌈H/s⌉, ⌈W/s⌉).

    Raises:
        ValueError: an option is out of range; a side is too small to be reflected; images do not have
            ``channels``.
        RuntimeError: from ``load_state_dict``, if it holds another kernel.

    Source: Zhang 2019, arXiv:1904.11486. Differs: any k and s.

    Example:
        >>> import torch
        >>> impulse = torch.tensor([[[[0.0, 0.0, 4.0, 0.0]]]])
        >>> BlurPool2d(kernel_size=3, stride=2, padding_mode="circular")(impulse)
        tensor([[[[0., 2.]]]])
    """

    reach, exact_for = derived(lambda self: self._statement())

    def __init__(
        self,
        *,
        kernel_size: int = 5,
        stride: int = 2,
        padding_mode: PaddingMode = "replicate",
        channels: int | None = None,
    ) -> None:
        super().__init__()
        kernel_size = require_int("kernel_size", kernel_size, 1)
        stride = require_int("stride", stride, 1)
        require_choice("padding_mode", padding_mode, PADDING_MODES)
        if channels is not None:
            channels = require_int("channels", channels, 1)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding_mode: PaddingMode = padding_mode
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """Filter, then subsample."""
        if self.channels is not None:
            require_rank("images", images, (4,), "(B, C, H, W)")
            require_axis("images", images, 1, self.channels, "channels")
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

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Drop the kernel that antialiased-cnns stores for each channel, if it is the one of this layer."""
        stored = state_dict.pop(f"{prefix}filt", None)
        if stored is not None and not self._is_own(stored):
            own = f"the binomial kernel of {self.kernel_size} taps for each channel"
            error_msgs.append(f"{prefix}filt must be {own}, got another of shape {tuple(stored.shape)}.")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _is_own(self, stored: Tensor) -> bool:
        """Whether (C, 1, k, k) are copies of the kernel of this layer."""
        size = self.kernel_size
        if stored.ndim != 4 or tuple(stored.shape[1:]) != (1, size, size):
            return False
        if self.channels is not None and len(stored) != self.channels:
            return False
        own = torch.tensor(binomial_plane(size), dtype=torch.float64)
        return bool((stored.to("cpu", torch.float64) - own).abs().max() < _ROUNDING * own.max())
