"""Images that do not fit into memory, tile by tile.

Shape letters: B batch, I image channels, H W pixels, s stride, C code size, h = H/s and w = W/s token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from te_quant._checks import (
    require,
    require_floating,
    require_int,
    require_integer_tensor,
    require_rank,
    require_type,
)
from te_quant.autoencoder.coders import require_divisible
from te_quant.autoencoder.model import VQAutoencoder
from te_quant.contract import Group
from te_quant.filters import PaddingMode, in_format_of

__all__ = ["TiledAutoencoder", "has_exact_tokens"]

# The overlap is this part of a tile where no overlap makes tiles exact.
_SHARE = 4


class TiledAutoencoder:
    """An autoencoder that encodes and decodes images tile by tile: its memory grows with the tile, not the image.

    It has the methods of :class:`~te_quant.VQAutoencoder` that you call after training, with the same shapes.
    Tiles overlap, and a token comes from the tile in which it lies farther from the border.

    - If no layer reads the whole image (``norm="channel"``, ``attention=False``, no ``fourier``), the default
      overlap makes the result that of the whole image, up to rounding. Circular padding wraps around the image,
      not around the tile, so the contract of the encoder holds for tiles too. The default takes windows to lie
      around their pixel, as those of all layers of this package do. A layer of your own that looks further to one
      side needs more.
    - GroupNorm takes its statistics from the tile, and attention sees only the tile; among circular layers, one
      that pads otherwise (``conv_replicate_blur_pool``, ``unpadded_max_blur_pool``) wraps as they do. The tokens
      then differ from those of the whole image, and not only at seams. The default overlap is a quarter of the
      tile, and decoded tiles are blended linearly.

    Encoders that choose a phase (``polyphase``) are refused, because each tile would choose its own.

    Args:
        model: the autoencoder. Its weights are shared, and nothing in it changes.
        tile_size: side of a tile in pixels, a multiple of the divisor. An image that is not larger is one tile.
        overlap: how many pixels neighbouring tiles share at least, a multiple of the divisor and smaller than
            ``tile_size``. None is the overlap described above.

    Shape:
        images: (B, I, H, W) floating point in [-1, 1], sides divisible by ``model.config.divisor``; see
            :func:`~te_quant.autoencoder.pad_to_divisor`.
        indices: (B, h, w) int64; (B, h, w, Q) of a quantizer with Q codebooks.

    Raises:
        ValueError: an option is out of range or not a multiple of the divisor; the tile is smaller than the
            receptive field of the encoder, or not larger than the overlap; or the model chooses phases.
        TypeError: model is not a VQAutoencoder, or an option is not an int.

    Example:
        >>> from te_quant import AutoencoderConfig, VQAutoencoder
        >>> config = AutoencoderConfig(base_channels=8, code_dim=4, norm="channel", attention=False)
        >>> model = VQAutoencoder(config).eval()
        >>> tiled = TiledAutoencoder(model, tile_size=192)
        >>> tiled
        TiledAutoencoder(tile_size=192, overlap=112)
        >>> images = torch.rand(1, 3, 256, 320) * 2 - 1
        >>> tokens = tiled.encode_to_indices(images)
        >>> bool((tokens == model.encode_to_indices(images)).float().mean() > 0.999)
        True
        >>> tiled.decode_indices(tokens).shape
        torch.Size([1, 3, 256, 320])
    """

    def __init__(self, model: VQAutoencoder, *, tile_size: int, overlap: int | None = None) -> None:
        require_type("model", model, VQAutoencoder, "a VQAutoencoder")
        config, divisor, stride = model.config, model.config.divisor, model.config.stride
        phases = f"downsample={config.downsample!r}"
        require(not model.decoder.adaptive, "model", "an autoencoder that chooses no phases", phases)
        tile_size = require_int("tile_size", tile_size, divisor)
        require(tile_size % divisor == 0, "tile_size", f"a multiple of the divisor {divisor}", tile_size)
        before, behind = _local_reach(model)
        expected = f"at least the receptive field of the encoder, {before} pixels"
        require(before is None or tile_size >= before, "tile_size", expected, tile_size)
        # Tokens whose windows, centred on their pixel, would leave the tile.
        margins = [] if before is None else [-(-(before // 2) // stride)]
        margins += [] if behind is None else [behind // 2]
        if overlap is None:
            overlap = 2 * stride * max(margins) if margins else tile_size // _SHARE // divisor * divisor
            expected = f"larger than {overlap}, the overlap that makes tiles exact"
            cure = f"{tile_size}; pass overlap=... to accept other tokens near seams"
            require(overlap < tile_size, "tile_size", expected, cure)
        overlap = require_int("overlap", overlap, 0)
        require(overlap % divisor == 0, "overlap", f"a multiple of the divisor {divisor}", overlap)
        require(overlap < tile_size, "overlap", f"smaller than tile_size={tile_size}", overlap)
        self.model = model
        self.tile_size = tile_size
        self.overlap = overlap
        # Where only the margin of a tile is wrong, blending would spread it.
        self._blends = behind is None

    def __repr__(self) -> str:
        """The options."""
        return f"TiledAutoencoder(tile_size={self.tile_size}, overlap={self.overlap})"

    def encode(self, images: Tensor) -> Tensor:
        """(B, I, H, W) images to (B, C, h, w) latents, before quantization."""
        return in_format_of(images, self._encode_with(self.model.encode, images, axis=2))

    def encode_to_indices(self, images: Tensor) -> Tensor:
        """(B, I, H, W) images to (B, h, w[, Q]) int64 tokens: no losses, no gradient, no update of any state."""
        return self._encode_with(self.model.encode_to_indices, images, axis=1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, C, h, w) codes to (B, I, H, W) images, which are not clamped to [-1, 1]."""
        require_rank("codes", codes, (4,), f"(B, {self.model.config.code_dim}, h, w)")
        require_floating("codes", codes)
        return in_format_of(codes, self._decode_with(self.model.decode, codes, axis=2))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """(B, h, w[, Q]) tokens to (B, I, H, W) images; differentiable in the codebook and the decoder."""
        require_rank("indices", indices, (3, 4), "(B, h, w) or (B, h, w, Q)")
        require_integer_tensor("indices", indices)
        return self._decode_with(self.model.decode_indices, indices, axis=1)

    def _encode_with(self, encode: Callable[[Tensor], Tensor], images: Tensor, axis: int) -> Tensor:
        config = self.model.config
        require_rank("images", images, (4,), f"(B, {config.image_channels}, H, W)")
        # Of the whole image, because the encoder sees only tiles.
        require_divisible(images, config.divisor)
        grid = (images.shape[2] // config.stride, images.shape[3] // config.stride)
        plan = self._plan(grid, config.encoder_padding, _Layout(2, config.stride), _Layout(axis, 1))
        return plan.cut(encode, images)

    def _decode_with(self, decode: Callable[[Tensor], Tensor], tokens: Tensor, axis: int) -> Tensor:
        config = self.model.config
        grid = (tokens.shape[axis], tokens.shape[axis + 1])
        plan = self._plan(grid, config.decoder_padding, _Layout(axis, 1), _Layout(2, config.stride))
        return plan.blend(decode, tokens) if self._blends else plan.cut(decode, tokens)

    def _plan(self, grid: tuple[int, int], mode: PaddingMode, source: _Layout, target: _Layout) -> _Plan:
        stride = self.model.config.stride
        size, overlap = self.tile_size // stride, self.overlap // stride
        rows, columns = (_spans(side, size, overlap, circular=mode == "circular") for side in grid)
        return _Plan(grid, rows, columns, source, target)


def has_exact_tokens(model: VQAutoencoder) -> bool:
    """Whether tiles with the default overlap have the tokens of the whole image, up to rounding."""
    return _local_reach(model)[0] is not None


def _local_reach(model: VQAutoencoder) -> tuple[int | None, int | None]:
    """Return how many pixels a token reads and how many tokens a pixel reads; None for all, or if it is unknown.

    A layer that depends on the position in the image computes something else in a tile, however little it reads.
    So does a layer that pads otherwise among circular ones, as their tiles wrap around the border.
    """
    encoder, decoder, config = model.equivariance, model.decoder.statement, model.config

    def local(group: Group, padding: PaddingMode) -> bool:
        return group != "none" and (padding != "circular" or group != "interior")

    before = encoder.receptive_field if local(encoder.group, config.encoder_padding) else None
    return before, decoder.reach.size if local(decoder.exact_for, config.decoder_padding) else None


class _Span(NamedTuple):
    """One tile along one axis, in tokens.

    Attributes:
        start: its first token; negative, or beyond the grid, where circular tiles wrap around.
        size: its length.
        low: the first token that it contributes.
        high: the token behind the last that it contributes.
    """

    start: int
    size: int
    low: int
    high: int


class _Layout(NamedTuple):
    """Where a tensor has its rows: the axis, which that of the columns follows, and how many a token has."""

    axis: int
    scale: int


def _spans(side: int, size: int, overlap: int, *, circular: bool) -> list[_Span]:
    """Spread as few tiles as possible evenly over ``side`` tokens."""
    if side <= size:
        return [_Span(0, side, 0, side)]
    step = size - overlap
    if circular:
        count = -(-side // step)
        edges = [number * side // count for number in range(count + 1)]
        # Each tile has its share in its middle.
        return [_Span(low - (size - (high - low)) // 2, size, low, high) for low, high in pairwise(edges)]
    count = -(-(side - size) // step) + 1
    starts = [number * (side - size) // (count - 1) for number in range(count)]
    # Between two tiles the seam lies in the middle of what they share.
    seams = [0, *((start + size + following) // 2 for start, following in pairwise(starts)), side]
    return [_Span(start, size, low, high) for start, (low, high) in zip(starts, pairwise(seams), strict=True)]


class _Plan(NamedTuple):
    """Which tiles to compute, and where they come from and go to."""

    grid: tuple[int, int]
    rows: list[_Span]
    columns: list[_Span]
    source: _Layout
    target: _Layout

    def cut(self, function: Callable[[Tensor], Tensor], whole: Tensor) -> Tensor:
        """Put together what each tile contributes."""
        axis, scale = self.target

        def share(row: _Span, column: _Span) -> Tensor:
            tile = function(self._tile(whole, row, column))
            for place, span in ((axis, row), (axis + 1, column)):
                tile = tile.narrow(place, scale * (span.low - span.start), scale * (span.high - span.low))
            return tile

        strips = (torch.cat([share(row, column) for column in self.columns], axis + 1) for row in self.rows)
        return torch.cat(list(strips), axis)

    def blend(self, function: Callable[[Tensor], Tensor], whole: Tensor) -> Tensor:
        """Average the tiles; along each axis the weight of one falls linearly while that of the next one rises."""
        axis, scale = self.target

        def strip(row: _Span) -> Tensor:
            tiles = (function(self._tile(whole, row, column)) for column in self.columns)
            return _averaged(tiles, self.columns, axis + 1, scale, self.grid[1])

        return _averaged((strip(row) for row in self.rows), self.rows, axis, scale, self.grid[0])

    def _tile(self, whole: Tensor, row: _Span, column: _Span) -> Tensor:
        axis, scale = self.source
        for place, span in ((axis, row), (axis + 1, column)):
            start, size = scale * span.start, scale * span.size
            if 0 <= start <= whole.shape[place] - size:
                whole = whole.narrow(place, start, size)
            else:
                wrapped = torch.arange(start, start + size, device=whole.device) % whole.shape[place]
                whole = whole.index_select(place, wrapped)
        return whole


def _averaged(tiles: Iterator[Tensor], spans: list[_Span], axis: int, scale: int, side: int) -> Tensor:
    """Average overlapping tiles along one axis, weighted by the distance from their ends."""
    places = [
        torch.arange(scale * span.start, scale * (span.start + span.size), device="cpu") % (scale * side)
        for span in spans
    ]
    weights = [_distances(len(place)) for place in places]
    total = torch.zeros(scale * side, dtype=torch.float64, device="cpu")
    for place, weight in zip(places, weights, strict=True):
        total[place] += weight
    first = next(tiles)
    # Half precision would round every summand.
    dtype = torch.promote_types(first.dtype, torch.float32)
    result = first.new_zeros((*first.shape[:axis], scale * side, *first.shape[axis + 1 :]), dtype=dtype)
    for tile, place, weight in zip(chain((first,), tiles), places, weights, strict=True):
        shares = (weight / total[place]).to(result).unflatten(0, (-1, *[1] * (tile.ndim - 1 - axis)))
        result.index_add_(axis, place.to(result.device), tile * shares)
    return result.to(first.dtype)


def _distances(size: int) -> Tensor:
    """Return how far the middle of each pixel lies from the nearer end."""
    middles = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
    return torch.minimum(middles, size - middles)
