"""The two halves of the VQGAN family: from images to latents, and from codes to images.

Shape letters: B batch, I image channels, H W pixels, s stride, L downsamplings, C code size, h = H/s and
w = W/s token grid.

Source: Esser et al. 2021, arXiv:2012.09841. Differs: padding is an option of each half, where the original pads
    with zeros; by default the middle has attention only if some level has; where the encoder chooses a phase, the
    decoder uses it.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from te_quant._checks import (
    padding_cure,
    require,
    require_axis,
    require_floating,
    require_integer_tensor,
    require_rank,
)
from te_quant._execution import refuse_training_export
from te_quant._precision import HALF, is_autocast
from te_quant.autoencoder.config import AutoencoderConfig
from te_quant.autoencoder.contract import encoder_contract
from te_quant.contract import Encoding, EquivarianceContract, Statement
from te_quant.filters import PaddingMode, in_format_of
from te_quant.layers import (
    PaddedConv2d,
    ResidualBlock,
    SelfAttention2d,
    build_activation,
    build_downsample,
    build_norm,
    build_upsample,
    derived,
    in_series,
)

__all__ = ["build_decoder", "build_encoder", "require_divisible"]


# A 3x3 convolution on the token grid reflects one row, which needs another to mirror it at.
_REFLECTED = 2
# Not resampling, whose input the block before has to hand over anyway.
_BLOCKS = (ResidualBlock, SelfAttention2d)
# The types that convolutions compute in; weights may be stored in others until their layer runs.
_COMPUTED = (*HALF, torch.float32, torch.float64)


class Level(nn.Sequential):
    """Layers in a row; in a decoder an adaptive upsampling takes the phase.

    Attributes:
        gradient_checkpointing: whether the backward pass computes each residual and attention block again, instead
            of keeping what it computed in the forward pass.
    """

    gradient_checkpointing = False
    reach, exact_for = derived(lambda self: in_series(*self))

    @property
    def adaptive(self) -> bool:
        """Whether one of the layers chooses or takes a phase."""
        return in_series(*self).adaptive

    def forward(self, hidden: Tensor, phase: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Run all layers, one after another."""
        # A program for inference has no backward pass, and the strict export refuses checkpoints.
        recomputed = self.gradient_checkpointing and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        for layer in self:
            if phase is not None and getattr(layer, "adaptive", False):
                hidden = layer(hidden, phase)
            elif recomputed and isinstance(layer, _BLOCKS):
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return hidden


class Encoder(nn.Module):
    """Images to latents; see :func:`build_encoder`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        mode = config.encoder_padding
        channels = config.base_channels
        self.conv_in = PaddedConv2d(config.image_channels, channels, 3, padding_mode=mode)
        self.levels = nn.ModuleList()
        last = len(config.widths) - 1
        for level, width in enumerate(config.widths):
            stage = _stage(config, level, channels, width, config.num_res_blocks, mode)
            if level < last:
                stage.add_module("downsample", build_downsample(config.downsample, width, padding_mode=mode))
            self.levels.append(stage)
            channels = width
        self.middle = _middle(config, channels, mode)
        self.norm_out = build_norm(config.norm, channels, norm_groups=config.norm_groups)
        self.activation = build_activation(config.activation, channels)
        self.conv_out = PaddedConv2d(channels, _z_channels(config), 3, padding_mode=mode)
        self.to_latents = nn.Conv2d(_z_channels(config), config.code_dim, 1)

    @property
    def equivariance(self) -> EquivarianceContract:
        """The shifts of the images that the tokens follow, from what the layers state."""
        return encoder_contract(self._layers(), stride=self.config.stride, divisor=self.config.divisor)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of images; None if it is known only when the layers run."""
        return _dtype_of(self.conv_in)

    def with_phases(self, images: Tensor) -> Encoding:
        """Encode (B, I, H, W) images in [-1, 1] to (B, C, h, w) latents and (B, L, 2) phases."""
        # A call of the module, so that its hooks and its compiled version serve both ways of encoding.
        encoding: Encoding = self(images, return_phases=True)
        return encoding

    @overload
    def forward(self, images: Tensor, *, return_phases: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, images: Tensor, *, return_phases: Literal[True]) -> Encoding: ...

    def forward(self, images: Tensor, *, return_phases: bool = False) -> Tensor | Encoding:
        """Encode (B, I, H, W) images in [-1, 1] to (B, C, h, w) latents, with the (B, L, 2) phases on request."""
        self._check(images)
        hidden = images
        phases = []
        for layer in self._layers():
            hidden = layer(hidden)
            # An adaptive downsampling, the last layer of its level, returns the phase that it chose too.
            if isinstance(hidden, tuple):
                hidden, phase = hidden
                phases.append(phase)
        latents = in_format_of(images, hidden)
        shape = (images.shape[0], len(self.levels) - 1, 2)
        chosen = torch.stack(phases, 1) if phases else torch.zeros(shape, dtype=torch.int64, device=images.device)
        return Encoding(latents, chosen) if return_phases else latents

    def _layers(self) -> list[nn.Module]:
        """Return every layer in the order in which it runs; the forward and the contract share this list."""
        last = [self.middle, self.norm_out, self.activation, self.conv_out, self.to_latents]
        return [self.conv_in, *self.levels, *last]

    def _check(self, images: Tensor) -> None:
        refuse_training_export(self.training, "an encoder")
        require_rank("images", images, (4,), f"(B, {self.config.image_channels}, H, W)")
        require_floating("images", images)
        _require_dtype("images", images, self.dtype)
        require_axis("images", images, 1, self.config.image_channels, "image_channels")
        divisor = self.config.divisor
        require_divisible(images, divisor)
        height, width = images.shape[-2:]
        if self.config.encoder_padding == "reflect" and min(height, width) < _REFLECTED * divisor:
            expected = f"at least {_REFLECTED * divisor} for encoder_padding='reflect'"
            require(False, "images sides", expected, f"images shape {tuple(images.shape)}")


class Decoder(nn.Module):
    """Codes to images; see :func:`build_decoder`.

    Attributes:
        adaptive: whether the phases place the pixels; otherwise only phases of zero can be decoded.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        mode = config.decoder_padding
        channels = config.decoder_widths[-1]
        self.from_codes = nn.Conv2d(config.code_dim, _z_channels(config), 1)
        self.conv_in = PaddedConv2d(_z_channels(config), channels, 3, padding_mode=mode)
        self.middle = _middle(config, channels, mode)
        self.levels = nn.ModuleList()
        for level, width in reversed(list(enumerate(config.decoder_widths))):
            stage = _stage(config, level, channels, width, config.num_res_blocks + 1, mode)
            if level > 0:
                stage.add_module("upsample", build_upsample(config.upsample, width, padding_mode=mode))
            self.levels.append(stage)
            channels = width
        # Asked once, since compilers cannot trace the statements of layers.
        self.adaptive = any(stage.adaptive for stage in self.levels)
        self.norm_out = build_norm(config.norm, channels, norm_groups=config.norm_groups)
        self.activation = build_activation(config.activation, channels)
        self.conv_out = PaddedConv2d(channels, config.image_channels, 3, padding_mode=mode)

    @property
    def statement(self) -> Statement:
        """What the layers state in a row; the reach counts tokens."""
        first = (self.from_codes, self.conv_in, self.middle)
        return in_series(*first, *self.levels, self.norm_out, self.activation, self.conv_out)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of codes; None if it is known only when the layers run."""
        return _dtype_of(self.from_codes)

    def forward(self, codes: Tensor, phases: Tensor | None = None) -> Tensor:
        """Decode (B, C, h, w) codes to (B, I, H, W) images, which are not clamped to [-1, 1]."""
        refuse_training_export(self.training, "a decoder")
        require_rank("codes", codes, (4,), f"(B, {self.config.code_dim}, h, w)")
        require_floating("codes", codes)
        _require_dtype("codes", codes, self.dtype)
        require_axis("codes", codes, 1, self.config.code_dim, "code_dim")
        if self.config.decoder_padding == "reflect" and min(codes.shape[-2:]) < _REFLECTED:
            expected = f"at least {_REFLECTED} for decoder_padding='reflect'"
            require(False, "codes sides", expected, f"codes shape {tuple(codes.shape)}")
        phases = self._phases(codes, phases)
        # Convolutions choose their algorithm by the strides: equal codes must give bit-equal images.
        hidden = self.middle(self.conv_in(self.from_codes(codes.clone(memory_format=torch.contiguous_format))))
        for number, level in enumerate(self.levels):
            # The encoder's last downsampling is undone first; the last level has none to undo.
            hidden = level(hidden, phases[:, -1 - number] if number + 1 < len(self.levels) else None)
        images: Tensor = self.conv_out(self.activation(self.norm_out(hidden)))
        return images

    def _phases(self, codes: Tensor, phases: Tensor | None) -> Tensor:
        batch, count = codes.shape[0], len(self.levels) - 1
        if phases is None:
            return torch.zeros((batch, count, 2), dtype=torch.int64, device=codes.device)
        require_rank("phases", phases, (3,), f"(B, {count}, 2)")
        require_integer_tensor("phases", phases)
        for axis, (size, name) in enumerate(((batch, "B"), (count, "L"), (2, "2"))):
            require_axis("phases", phases, axis, size, name)
        return phases


def build_encoder(config: AutoencoderConfig) -> Encoder:
    """Build the network before the quantizer.

    A 3x3 convolution; per level ``num_res_blocks`` residual blocks, attention behind each where the level is
    listed, and a downsampling except on the last level; residual block, attention (by default if any level has
    it), residual block in the middle; norm, activation, a 3x3 and a 1x1 convolution to C channels.
    ``encoder.with_phases(images)`` returns the latents and the phases, and ``encoder.equivariance`` the shifts
    that the tokens follow (:class:`~te_quant.contract.EquivarianceContract`).

    Shape:
        images: (B, I, H, W) floating point in [-1, 1], sides divisible by ``config.divisor``, and at least twice
            that for ``encoder_padding="reflect"``.
        latents: (B, C, h, w).
        phases: (B, L, 2) int64.

    Raises:
        ValueError: (in its forward) the images have another shape.
        TypeError: (in its forward) the images are not floating point, or of another dtype than the weights outside
            autocast.

    Example:
        >>> encoder = build_encoder(AutoencoderConfig(base_channels=8, code_dim=4))
        >>> encoder(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 4, 4, 4])
    """
    return Encoder(config)


def build_decoder(config: AutoencoderConfig) -> Decoder:
    """Build the network behind the quantizer: the encoder mirrored, with one more residual block per level.

    Shape:
        codes: (B, C, h, w) floating point, h and w at least 2 for ``decoder_padding="reflect"``.
        phases: (B, L, 2) int64 in {0, 1} from the encoder, or None for zeros; without effect unless
            ``config.upsample`` is adaptive (``polyphase``).
        images: (B, I, s·h, s·w).

    Raises:
        ValueError: (in its forward) the codes have another shape.
        TypeError: (in its forward) the codes are not floating point, or of another dtype than the weights outside
            autocast.

    Example:
        >>> decoder = build_decoder(AutoencoderConfig(base_channels=8, code_dim=4))
        >>> decoder(torch.zeros(1, 4, 4, 4)).shape
        torch.Size([1, 3, 16, 16])
    """
    return Decoder(config)


def require_divisible(images: Tensor, divisor: int) -> None:
    """Refuse (B, I, H, W) images whose sides are not positive multiples of ``divisor``."""
    height, width = images.shape[-2:]
    if height % divisor or width % divisor or height == 0 or width == 0:
        expected = f"positive multiples of the divisor {divisor}"
        require(False, "images sides", expected, f"images shape {tuple(images.shape)}; {padding_cure(divisor)}")


def _stage(
    config: AutoencoderConfig, level: int, channels: int, width: int, blocks: int, mode: PaddingMode
) -> Level:
    stage = Level()
    for index in range(blocks):
        stage.add_module(f"block{index}", _block(config, channels, width, mode))
        if level in config.attention_levels:
            stage.add_module(f"attention{index}", _attention(config, width))
        channels = width
    return stage


def _middle(config: AutoencoderConfig, channels: int, mode: PaddingMode) -> Level:
    middle = Level()
    middle.add_module("block0", _block(config, channels, channels, mode))
    if config.has_middle_attention:
        middle.add_module("attention", _attention(config, channels))
    middle.add_module("block1", _block(config, channels, channels, mode))
    return middle


def _z_channels(config: AutoencoderConfig) -> int:
    return config.code_dim if config.z_channels is None else config.z_channels


def _block(config: AutoencoderConfig, channels: int, width: int, mode: PaddingMode) -> ResidualBlock:
    return ResidualBlock(
        channels,
        width,
        norm=config.norm,
        norm_groups=config.norm_groups,
        activation=config.activation,
        dropout=config.dropout,
        padding_mode=mode,
    )


def _attention(config: AutoencoderConfig, channels: int) -> SelfAttention2d:
    return SelfAttention2d(channels, norm=config.norm, norm_groups=config.norm_groups)


def _dtype_of(layer: nn.Module) -> torch.dtype | None:
    # The bias, because reading a parametrized weight computes it. Sharded weights are put together, and weights in
    # fewer bits are cast, only when the layer runs.
    bias = getattr(layer, "bias", None)
    known = type(bias) in (Tensor, nn.Parameter) and bias is not None and bias.dtype in _COMPUTED
    return bias.dtype if known and bias is not None else None


def _require_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    """Refuse what convolutions with weights of ``dtype`` would refuse, before any of them runs."""
    if dtype is None or tensor.dtype == dtype:
        return
    # Autocast casts images and weights, except those in float64.
    castable = torch.float64 not in (tensor.dtype, dtype)
    if castable and is_autocast(tensor.device):
        return
    cure = f"pass {name}.to({dtype})" + (" or use torch.autocast" if castable else "")
    raise TypeError(f"{name} must be {dtype} as the weights, got {tensor.dtype}; {cure}.")
