"""The two halves of the VQGAN family: images to latents, codes to images.

Shape letters: B batch, I image channels, H W pixels, s stride, C code size, h = H/s and w = W/s token grid.

Source: Esser et al. 2021, arXiv:2012.09841. Differs: padding is an option of each half, where the original pads
    with zeros; the middle has attention only if some level has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from te_quant._autoencoder_config import AutoencoderConfig
from te_quant._checks import require, require_axis, require_floating, require_rank
from te_quant.filters import PaddingMode
from te_quant.layers import (
    NearestUpsample,
    PaddedConv2d,
    ResidualBlock,
    SelfAttention2d,
    build_downsample,
    group_norm,
)

__all__ = ["build_decoder", "build_encoder"]


class Encoder(nn.Module):
    """Images to latents; see :func:`build_encoder`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        mode = config.encoder_padding
        channels = config.base_channels
        self.conv_in = PaddedConv2d(config.image_channels, channels, 3, padding_mode=mode)
        self.levels = nn.ModuleList()
        last = len(config.channel_multipliers) - 1
        for level, multiplier in enumerate(config.channel_multipliers):
            width = config.base_channels * multiplier
            stage = _stage(config, level, channels, width, config.num_res_blocks, mode)
            if level < last:
                stage.add_module("downsample", build_downsample(config.downsample, width, mode))
            self.levels.append(stage)
            channels = width
        self.middle = _middle(config, channels, mode)
        self.norm_out = group_norm(channels, config.norm_groups)
        self.activation = nn.SiLU()
        self.conv_out = PaddedConv2d(channels, config.code_dim, 3, padding_mode=mode)
        self.to_latents = nn.Conv2d(config.code_dim, config.code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, I, H, W) images in [-1, 1] to (B, C, h, w) latents."""
        self._check(images)
        hidden = self.conv_in(images)
        for level in self.levels:
            hidden = level(hidden)
        hidden = self.conv_out(self.activation(self.norm_out(self.middle(hidden))))
        latents: Tensor = self.to_latents(hidden)
        return latents

    def _check(self, images: Tensor) -> None:
        require_rank("images", images, (4,), f"(B, {self.config.image_channels}, H, W)")
        require_floating("images", images)
        require_axis("images", images, 1, self.config.image_channels, "image_channels")
        divisor = self.config.divisor
        height, width = images.shape[-2:]
        if height % divisor or width % divisor or height == 0 or width == 0:
            expected = f"positive multiples of the divisor {divisor}"
            require(False, "images sides", expected, f"images shape {tuple(images.shape)}")


class Decoder(nn.Module):
    """Codes to images; see :func:`build_decoder`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        mode = config.decoder_padding
        channels = config.base_channels * config.channel_multipliers[-1]
        self.from_codes = nn.Conv2d(config.code_dim, config.code_dim, 1)
        self.conv_in = PaddedConv2d(config.code_dim, channels, 3, padding_mode=mode)
        self.middle = _middle(config, channels, mode)
        self.levels = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            width = config.base_channels * multiplier
            stage = _stage(config, level, channels, width, config.num_res_blocks + 1, mode)
            if level > 0:
                stage.add_module("upsample", NearestUpsample(width, padding_mode=mode))
            self.levels.append(stage)
            channels = width
        self.norm_out = group_norm(channels, config.norm_groups)
        self.activation = nn.SiLU()
        self.conv_out = PaddedConv2d(channels, config.image_channels, 3, padding_mode=mode)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, C, h, w) codes to (B, I, H, W) images, which nothing holds within [-1, 1]."""
        require_rank("codes", codes, (4,), f"(B, {self.config.code_dim}, h, w)")
        require_floating("codes", codes)
        require_axis("codes", codes, 1, self.config.code_dim, "code_dim")
        # Convolutions choose their algorithm by the strides: equal codes must give bit-equal images.
        hidden = self.middle(self.conv_in(self.from_codes(codes.clone(memory_format=torch.contiguous_format))))
        for level in self.levels:
            hidden = level(hidden)
        images: Tensor = self.conv_out(self.activation(self.norm_out(hidden)))
        return images


def build_encoder(config: AutoencoderConfig) -> nn.Module:
    """The network before the quantizer.

    A 3x3 convolution; per level ``num_res_blocks`` residual blocks, attention behind each where the level is
    listed, and a downsampling except on the last level; residual block, attention, residual block in the
    middle; GroupNorm, SiLU, a 3x3 and a 1x1 convolution to C channels.

    Shape:
        images: (B, I, H, W) floating point in [-1, 1], sides divisible by ``config.divisor``.
        latents: (B, C, h, w).

    Raises:
        ValueError: (in its forward) the images have another shape.
        TypeError: (in its forward) the images are not floating point.
    """
    return Encoder(config)


def build_decoder(config: AutoencoderConfig) -> nn.Module:
    """The network behind the quantizer: the encoder mirrored, with one more residual block a level.

    Shape:
        codes: (B, C, h, w) floating point.
        images: (B, I, s·h, s·w).

    Raises:
        ValueError: (in its forward) the codes have another shape.
        TypeError: (in its forward) the codes are not floating point.
    """
    return Decoder(config)


def _stage(
    config: AutoencoderConfig, level: int, channels: int, width: int, blocks: int, mode: PaddingMode
) -> nn.Sequential:
    stage = nn.Sequential()
    for index in range(blocks):
        stage.add_module(f"block{index}", _block(config, channels, width, mode))
        if level in config.attention_levels:
            stage.add_module(f"attention{index}", SelfAttention2d(width, norm_groups=config.norm_groups))
        channels = width
    return stage


def _middle(config: AutoencoderConfig, channels: int, mode: PaddingMode) -> nn.Sequential:
    middle = nn.Sequential()
    middle.add_module("block0", _block(config, channels, channels, mode))
    if config.attention_levels:
        middle.add_module("attention", SelfAttention2d(channels, norm_groups=config.norm_groups))
    middle.add_module("block1", _block(config, channels, channels, mode))
    return middle


def _block(config: AutoencoderConfig, channels: int, width: int, mode: PaddingMode) -> ResidualBlock:
    return ResidualBlock(
        channels, width, norm_groups=config.norm_groups, dropout=config.dropout, padding_mode=mode
    )
