"""A convolutional autoencoder around a vector quantizer: the VQGAN family.

Shape letters: B batch, I image channels, H W pixels, s stride, L downsamplings, C code size, h = H/s and
w = W/s token grid.

Source: Shin et al. 2021, arXiv:2112.00384; Esser et al. 2021, arXiv:2012.09841.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from te_quant import _pretrained
from te_quant._checks import require, require_integer_tensor, require_rank, require_type
from te_quant._values import require_in_range
from te_quant.autoencoder.coders import build_decoder, build_encoder
from te_quant.autoencoder.config import AutoencoderConfig
from te_quant.contract import Encoding, EquivarianceContract
from te_quant.quantizers.base import QuantizerOutput
from te_quant.quantizers.vector import VectorQuantizer

__all__ = [
    "AutoencoderConfig",
    "AutoencoderOutput",
    "Encoding",
    "EquivarianceContract",
    "VQAutoencoder",
    "build_decoder",
    "build_encoder",
]


# What a config says of the quantizer beside ``code_dim``, under the quantizer's own names.
_QUANTIZER_OPTIONS = (
    "num_codes",
    "metric",
    "codebook_update",
    "commitment_weight",
    "decay",
    "orthogonal_reg",
    "gradient_estimator",
)


class AutoencoderOutput(NamedTuple):
    """What one pass computed; the same fields in training and in evaluation.

    Attributes:
        reconstruction: (B, I, H, W), what the decoder makes of ``quantized``.
        quantized: (B, C, h, w), the codes, with a gradient path to the latents.
        indices: (B, h, w) int64, the tokens; (B, h, w, Q) of a quantizer with Q codebooks.
        loss: (), of the quantizer alone: the sum of the three terms below. Add your reconstruction loss.
        codebook_loss: (), weighted.
        commitment_loss: (), weighted.
        regularization_loss: (), weighted.
        codes: (B, C, h, w), the codes without gradient; ``decode(codes, phases)`` is
            ``decode_indices(indices, phases)``.
        latents: (B, C, h, w), what the encoder made of the images.
        phases: (B, L, 2) int64, where each downsampling sampled; zeros for kinds that do not choose.
    """

    reconstruction: Tensor
    quantized: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    regularization_loss: Tensor
    codes: Tensor
    latents: Tensor
    phases: Tensor


class VQAutoencoder(nn.Module):
    """Encoder, vector quantizer and decoder.

    Tokens alone do not fix the position of the pixels below the stride where the encoder chooses a phase
    (``downsample="polyphase"``): :meth:`encode_with_phases` gives the phases, and the decoding methods take
    them. Without them they decode to the canonical position, phases of zero. Every other encoder has only that.

    Args:
        config: every option.
        quantizer: used instead of the one that ``config`` describes: any quantizer of this library, or a module
            that behaves as one, ``forward`` giving a :class:`~te_quant.QuantizerOutput` for latents (B, C, h, w),
            with methods ``encode`` and ``decode`` and the attribute ``code_dim``. What ``config`` says of the
            quantizer beyond its defaults must be what this one has. Such a model has no
            :meth:`save_pretrained`, because a checkpoint stores the config alone: keep its ``state_dict``.

    Shape:
        images: (B, I, H, W) floating point in [-1, 1], sides divisible by ``config.divisor``.
        indices: (B, h, w) int64 in [0, K); (B, h, w, Q) of a quantizer with Q codebooks.

    Raises:
        ValueError: images have another rank, number of channels or sides; the quantizer does not fit the config.
        TypeError: images are not floating point, or the quantizer is no quantizer.

    Source: Shin et al. 2021, arXiv:2112.00384, stage 1.
    """

    def __init__(self, config: AutoencoderConfig, *, quantizer: nn.Module | None = None) -> None:
        super().__init__()
        require_type("config", config, AutoencoderConfig, "an AutoencoderConfig")
        if quantizer is not None:
            _require_quantizer(quantizer, config)
        self.config = config
        self.encoder = build_encoder(config)
        self._described = quantizer is None
        # Typed as what it is unless another was given, so that its codebook is at hand without a cast.
        self.quantizer = _described(config) if quantizer is None else cast("VectorQuantizer", quantizer)
        self.decoder = build_decoder(config)

    def forward(self, images: Tensor) -> AutoencoderOutput:
        """Encode, quantize and decode."""
        latents, phases = self.encode_with_phases(images)
        output: QuantizerOutput = self.quantizer(latents)
        return AutoencoderOutput(self.decoder(output.quantized, phases), *output, latents, phases)

    @property
    def equivariance(self) -> EquivarianceContract:
        """For which shifts of the images the tokens follow."""
        return self.encoder.equivariance

    def encode(self, images: Tensor) -> Tensor:
        """(B, I, H, W) images to (B, C, h, w) latents, before quantization."""
        latents: Tensor = self.encoder(images)
        return latents

    def encode_with_phases(self, images: Tensor) -> Encoding:
        """(B, I, H, W) images to (B, C, h, w) latents and (B, L, 2) phases."""
        return self.encoder.with_phases(images)

    def decode(self, codes: Tensor, phases: Tensor | None = None) -> Tensor:
        """(B, C, h, w) codes to (B, I, H, W) images, at the position that (B, L, 2) phases give.

        Raises:
            ValueError: codes or phases have another shape, or a phase is one that this decoder cannot place: not
                0 or 1 for ``upsample="polyphase"``, not 0 for any other.
            TypeError: codes are not floating point, or phases are not integers.
        """
        if phases is not None:
            require_rank("phases", phases, (3,), f"(B, {len(self.config.channel_multipliers) - 1}, 2)")
            require_integer_tensor("phases", phases)
            stop = 2 if self.config.upsample == "polyphase" else 1
            phases = require_in_range("phases", phases, stop, "number of phases of the decoder")
        images: Tensor = self.decoder(codes, phases)
        return images

    @torch.no_grad()
    def encode_to_indices(self, images: Tensor) -> Tensor:
        """(B, I, H, W) images to (B, h, w[, Q]) int64 tokens: no losses, no gradient, no update of any state."""
        return self.quantizer.encode(self.encode(images))

    def decode_indices(self, indices: Tensor, phases: Tensor | None = None) -> Tensor:
        """(B, h, w[, Q]) tokens to (B, I, H, W) images; differentiable in the codebook and the decoder.

        Raises:
            ValueError: an index is negative or >= K, the indices are not a grid of the quantizer, or
                :meth:`decode` refuses the phases.
            TypeError: the indices or phases are not integers.
        """
        if self._described:
            require_rank("indices", indices, (3,), "(B, h, w)")
        else:
            require_rank("indices", indices, (3, 4), "(B, h, w) or (B, h, w, Q)")
        codes = self.quantizer.decode(indices)
        require_rank("the codes of indices", codes, (4,), "(B, C, h, w)")
        return self.decode(codes, phases)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, each as a whole or not at all.

        Raises:
            ValueError: the quantizer was given, and a checkpoint stores the config alone.
            ImportError: safetensors is not installed (``te_quant[hub]``).
        """
        expected = "the one that the config describes, as a checkpoint stores nothing else of it"
        require(self._described, "quantizer", expected, f"a {type(self.quantizer).__name__} of the caller")
        _pretrained.save(folder, "VQAutoencoder", self.config.to_dict(), self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> VQAutoencoder:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode, on the CPU, in the saved dtypes.

        Args:
            source: a local folder, else a hub id ``owner/name``.
            revision: branch, tag or commit, for a hub id only.
            cache_dir: where downloads are kept, for a hub id only.

        Raises:
            FileNotFoundError: no such folder, or a file is missing in it.
            ValueError: a file is damaged, of another format version, or does not fit the other.
            ImportError: safetensors or huggingface_hub is not installed (``te_quant[hub]``).
        """
        return _pretrained.load("VQAutoencoder", AutoencoderConfig.from_dict, cls, source, revision, cache_dir)


def _described(config: AutoencoderConfig) -> VectorQuantizer:
    return VectorQuantizer(
        config.num_codes,
        config.code_dim,
        metric=config.metric,
        codebook_update=config.codebook_update,
        commitment_weight=config.commitment_weight,
        decay=config.decay,
        orthogonal_reg=config.orthogonal_reg,
        gradient_estimator=config.gradient_estimator,
    )


def _require_quantizer(quantizer: object, config: AutoencoderConfig) -> None:
    """Refuse what is no quantizer, or not one for the latents and the options of ``config``."""
    name = type(quantizer).__name__
    methods = all(callable(getattr(quantizer, method, None)) for method in ("encode", "decode"))
    if not (isinstance(quantizer, nn.Module) and methods):
        raise TypeError(f"quantizer must be a module with the methods encode and decode, got {name}.")
    dim = getattr(quantizer, "code_dim", None)
    require(dim == config.code_dim, "quantizer.code_dim", f"config.code_dim={config.code_dim}", f"{dim} ({name})")
    axis = getattr(quantizer, "channel_dim", 1)
    require(axis == 1, "quantizer.channel_dim", "1, as latents are (B, C, h, w)", f"{axis} ({name})")
    defaults = AutoencoderConfig()
    for option in _QUANTIZER_OPTIONS:
        value, default = getattr(config, option), getattr(defaults, option)
        if value != default:
            has = getattr(quantizer, option, "none")
            expected = f"its default {default!r}, or what the given {name} has ({has!r})"
            require(value == has, f"config.{option}", expected, repr(value))
