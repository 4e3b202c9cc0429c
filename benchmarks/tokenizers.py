"""Two tokenizers without a quantizer, of plain torch, to put quantizers of any library into.

The convolutional one is shaped like VQGAN with 16 pixels per token: five levels of widths 1-1-2-2-4, attention at
the coarsest, 256 channels of latents. The other is a vision transformer with a linear bottleneck. Both are
narrower than the published ones, so that a step takes about a second on two CPU cores.

Shape letters: B batch, H W pixels, h w token grid, T = h*w tokens, D width, C code size, P patch side.

Source: Esser et al. 2021, arXiv:2012.09841; Yu et al. 2022, arXiv:2110.04627.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.plain_network import PlainAutoencoder
from te_quant import AutoencoderConfig

__all__ = ["TOKENIZERS", "Tokenizer", "build_coders"]

_VQGAN_MULTIPLIERS = (1, 1, 2, 2, 4)
_HEAD = 32


class Tokenizer(NamedTuple):
    """A network and the quantizer that it needs.

    Attributes:
        name: ``vqgan`` or ``vit``.
        side: of the square images, pixels.
        batch: images per step.
        K: codes.
        C: code size.
        width: channels of the finest level, or of the transformer.
        depth: residual blocks per level of the encoder, or layers of each transformer.
        patch: pixels per token, along one side.
    """

    name: str
    side: int
    batch: int
    K: int
    C: int
    width: int
    depth: int
    patch: int

    @property
    def tokens(self) -> int:
        """N, the latents of a step."""
        return self.batch * (self.side // self.patch) ** 2

    @property
    def label(self) -> str:
        """For a key."""
        return f"{self.name}-S{self.side}-B{self.batch}-K{self.K}-C{self.C}"

    @property
    def channels_first(self) -> bool:
        """Whether latents are (B, C, h, w), not (B, T, C)."""
        return self.name == "vqgan"


TOKENIZERS: dict[str, tuple[Tokenizer, ...]] = {
    "quick": (
        Tokenizer("vqgan", side=64, batch=2, K=128, C=16, width=8, depth=1, patch=16),
        Tokenizer("vit", side=32, batch=2, K=256, C=8, width=32, depth=1, patch=8),
    ),
    "full": (
        Tokenizer("vqgan", side=64, batch=16, K=1024, C=256, width=32, depth=1, patch=16),
        Tokenizer("vqgan", side=128, batch=8, K=1024, C=256, width=32, depth=1, patch=16),
        Tokenizer("vqgan", side=128, batch=8, K=16384, C=256, width=32, depth=1, patch=16),
        Tokenizer("vit", side=128, batch=8, K=16384, C=8, width=256, depth=4, patch=8),
    ),
}
"""What is measured, by grid."""


def build_coders(tokenizer: Tokenizer) -> tuple[nn.Module, nn.Module]:
    """Return the encoder and the decoder.

    Shape:
        encoder: (B, 3, H, W) images to (B, C, h, w) or, for a transformer, (B, T, C) latents.
        decoder: the other way.
    """
    if tokenizer.name == "vit":
        return _VitEncoder(tokenizer), _VitDecoder(tokenizer)
    config = AutoencoderConfig(
        base_channels=tokenizer.width,
        channel_multipliers=_VQGAN_MULTIPLIERS,
        num_res_blocks=tokenizer.depth,
        attention_levels=(len(_VQGAN_MULTIPLIERS) - 1,),
        # Its own quantizer is thrown away.
        num_codes=1,
        code_dim=tokenizer.C,
        codebook_update="gradient",
    )
    plain = PlainAutoencoder(config)
    return plain.encoder, plain.decoder


class _VitEncoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        width, patch = tokenizer.width, tokenizer.patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn((tokenizer.side // patch) ** 2, width))
        self.layers = _transformer(tokenizer)
        self.to_latents = nn.Linear(width, tokenizer.C)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.places
        result: Tensor = self.to_latents(self.layers(hidden))
        return result


class _VitDecoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        width, patch = tokenizer.width, tokenizer.patch
        self.rows = tokenizer.side // patch
        self.from_codes = nn.Linear(tokenizer.C, width)
        self.places = nn.Parameter(0.02 * torch.randn(self.rows**2, width))
        self.layers = _transformer(tokenizer)
        self.to_pixels = nn.Linear(width, 3 * patch**2)
        self.shuffle = nn.PixelShuffle(patch)

    def forward(self, codes: Tensor) -> Tensor:
        pixels = self.to_pixels(self.layers(self.from_codes(codes) + self.places))
        result: Tensor = self.shuffle(pixels.transpose(1, 2).unflatten(2, (self.rows, self.rows)))
        return result


def _transformer(tokenizer: Tokenizer) -> nn.Module:
    width = tokenizer.width
    layer = nn.TransformerEncoderLayer(
        width, width // _HEAD, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, tokenizer.depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
