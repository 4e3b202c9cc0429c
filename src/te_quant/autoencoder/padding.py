"""Images of any size, padded to one that an encoder accepts.

Shape letters: B batch, I image channels, H W pixels.
"""

from __future__ import annotations

from torch import Tensor

from te_quant._checks import require, require_floating, require_int, require_rank
from te_quant.filters import PaddingMode, pad2d

__all__ = ["pad_to_divisor"]


def pad_to_divisor(images: Tensor, divisor: int, *, mode: PaddingMode = "replicate") -> Tensor:
    """Pad images on the right and at the bottom until their sides are multiples of ``divisor``.

    The first pixel stays the first one, so ``[..., :H, :W]`` removes the padding again, also from a
    reconstruction, and token (u, v) still stands for the pixels from (s·u, s·v) on. Fewer than ``divisor`` pixels
    are added, so every token stands for at least one pixel of the image. To decode tokens later, keep H and W with
    them.

    An image that was padded is not periodic any more. An encoder with circular padding keeps its contract for the
    padded image, but the tokens do not follow circular shifts of the image inside. Where they must, cut or resize
    the images instead.

    Args:
        images: any floating dtype.
        divisor: what the sides must be multiples of, at least 1: ``model.config.divisor``.
        mode: as in :func:`te_quant.filters.pad2d`. ``replicate`` adds no edge, whatever the padding of the
            encoder; ``circular`` continues images that are periodic.

    Shape:
        images: (B, I, H, W).
        result: (B, I, ⌈H/divisor⌉·divisor, ⌈W/divisor⌉·divisor).

    Raises:
        ValueError: images have another rank or no pixels, divisor is smaller than 1, mode is unknown, or a side is
            too small to be reflected.
        TypeError: images are not floating point, or divisor is not an int.

    Example:
        >>> import torch
        >>> from te_quant import AutoencoderConfig, VQAutoencoder
        >>> model = VQAutoencoder(AutoencoderConfig(base_channels=8, code_dim=4)).eval()
        >>> images = torch.rand(2, 3, 30, 45) * 2 - 1
        >>> tokens = model.encode_to_indices(pad_to_divisor(images, model.config.divisor))
        >>> tokens.shape
        torch.Size([2, 8, 12])
        >>> height, width = images.shape[-2:]
        >>> model.decode_indices(tokens)[..., :height, :width].shape
        torch.Size([2, 3, 30, 45])
    """
    require_rank("images", images, (4,), "(B, I, H, W)")
    require_floating("images", images)
    divisor = require_int("divisor", divisor, 1)
    height, width = images.shape[-2:]
    require(height > 0 and width > 0, "images sides", "at least 1", f"images shape {tuple(images.shape)}")
    return pad2d(images, (0, -width % divisor, 0, -height % divisor), mode)
