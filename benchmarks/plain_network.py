"""The paper's Stage-1 network written with plain torch modules: what one has without this library.

Submodules are named as in :class:`te_quant.VQAutoencoder`, so that its weights load. Only what the paper's "SC"
network needs is here: strided convolutions, nearest upsampling, GroupNorm, SiLU, one residual block a level.

Shape letters: B batch, C channels, H W pixels, K codes.

Source: Esser et al. 2021, arXiv:2012.09841.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant import AutoencoderConfig
from te_quant.filters import PaddingMode

__all__ = ["PlainAutoencoder", "load_weights"]

_EPS = 1e-6


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int, mode: str) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=_EPS)
        self.conv1 = _convolution(inputs, outputs, mode)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=_EPS)
        self.conv2 = _convolution(outputs, outputs, mode)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(images)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        result: Tensor = self.shortcut(images) + hidden
        return result


class _Attention(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        queries, keys, values = self.qkv(self.norm(images)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        result: Tensor = images + self.out(mixed.transpose(1, 2).reshape(images.shape))
        return result


class _Down(nn.Module):
    def __init__(self, channels: int, mode: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.mode = "constant" if mode == "zeros" else mode

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.conv(F.pad(images, (0, 1, 0, 1), mode=self.mode))
        return result


class _Up(nn.Module):
    def __init__(self, channels: int, mode: str) -> None:
        super().__init__()
        self.conv = _convolution(channels, channels, mode)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.conv(F.interpolate(images, scale_factor=2.0, mode="nearest"))
        return result


class _Half(nn.Module):
    """What encoder and decoder share: how levels and the middle are built."""

    def __init__(self, config: AutoencoderConfig, mode: str) -> None:
        super().__init__()
        self.config = config
        self.mode = mode

    def stage(self, level: int, inputs: int, outputs: int, blocks: int) -> nn.Sequential:
        stage = nn.Sequential()
        for index in range(blocks):
            stage.add_module(f"block{index}", _Residual(inputs, outputs, self.config.norm_groups, self.mode))
            if level in self.config.attention_levels:
                stage.add_module(f"attention{index}", _Attention(outputs, self.config.norm_groups))
            inputs = outputs
        return stage

    def between(self, channels: int) -> nn.Sequential:
        middle = nn.Sequential()
        middle.add_module("block0", _Residual(channels, channels, self.config.norm_groups, self.mode))
        if self.config.attention_levels:
            middle.add_module("attention", _Attention(channels, self.config.norm_groups))
        middle.add_module("block1", _Residual(channels, channels, self.config.norm_groups, self.mode))
        return middle


class _Encoder(_Half):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, config.encoder_padding)
        channels = config.base_channels
        self.conv_in = _convolution(config.image_channels, channels, self.mode)
        self.levels = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            width = config.base_channels * multiplier
            stage = self.stage(level, channels, width, config.num_res_blocks)
            if level + 1 < len(config.channel_multipliers):
                stage.add_module("downsample", _Down(width, self.mode))
            self.levels.append(stage)
            channels = width
        self.middle = self.between(channels)
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=_EPS)
        self.conv_out = _convolution(channels, config.code_dim, self.mode)
        self.to_latents = nn.Conv2d(config.code_dim, config.code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)
        for level in self.levels:
            hidden = level(hidden)
        hidden = self.conv_out(F.silu(self.norm_out(self.middle(hidden))))
        result: Tensor = self.to_latents(hidden)
        return result


class _Decoder(_Half):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, config.decoder_padding)
        channels = config.base_channels * config.channel_multipliers[-1]
        self.from_codes = nn.Conv2d(config.code_dim, config.code_dim, 1)
        self.conv_in = _convolution(config.code_dim, channels, self.mode)
        self.middle = self.between(channels)
        self.levels = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            width = config.base_channels * multiplier
            stage = self.stage(level, channels, width, config.num_res_blocks + 1)
            if level > 0:
                stage.add_module("upsample", _Up(width, self.mode))
            self.levels.append(stage)
            channels = width
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=_EPS)
        self.conv_out = _convolution(channels, config.image_channels, self.mode)

    def forward(self, codes: Tensor) -> Tensor:
        hidden = self.middle(self.conv_in(self.from_codes(codes)))
        for level in self.levels:
            hidden = level(hidden)
        result: Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
        return result


class _Quantizer(nn.Module):
    """cdist, argmin, a lookup, two losses, straight-through."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(config.num_codes, config.code_dim))
        self.commitment_weight = config.commitment_weight

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        rows = latents.permute(0, 2, 3, 1)
        with torch.no_grad():
            indices = torch.cdist(rows.flatten(0, 2), self.codebook).argmin(1)
        codes = F.embedding(indices, self.codebook).view(rows.shape)
        loss = F.mse_loss(codes, rows.detach()) + self.commitment_weight * F.mse_loss(rows, codes.detach())
        quantized = rows + (codes - rows).detach()
        return quantized.permute(0, 3, 1, 2).contiguous(), loss


class PlainAutoencoder(nn.Module):
    """The network; returns the reconstruction and the quantizer's loss.

    Args:
        config: of the network to rewrite, with the defaults of ``downsample``, ``upsample``, ``norm``,
            ``activation``, ``metric``, ``codebook_update`` and ``gradient_estimator``, no dropout and no penalty.

    Raises:
        ValueError: the config asks for something else.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        plain = AutoencoderConfig(codebook_update="gradient")
        names = ("downsample", "upsample", "norm", "activation", "dropout", "metric", "codebook_update")
        for name in (*names, "gradient_estimator", "orthogonal_reg"):
            if getattr(config, name) != getattr(plain, name):
                expected = getattr(plain, name)
                raise ValueError(f"{name} must be {expected!r} here, got {getattr(config, name)!r}.")
        self.encoder = _Encoder(config)
        self.quantizer = _Quantizer(config)
        self.decoder = _Decoder(config)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, I, H, W) images to images of the same shape, and ()."""
        quantized, loss = self.quantizer(self.encoder(images))
        return self.decoder(quantized), loss


def load_weights(plain: PlainAutoencoder, library: nn.Module) -> None:
    """Copy the weights of a :class:`te_quant.VQAutoencoder`; all but the counts must fit."""
    counts = ("quantizer.usage", "quantizer.pending_counts")
    state = {name: tensor for name, tensor in library.state_dict().items() if name not in counts}
    plain.load_state_dict(state)


def _convolution(inputs: int, outputs: int, mode: str) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode=cast(PaddingMode, mode))
