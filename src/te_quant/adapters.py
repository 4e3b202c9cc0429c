"""Tokenizers of other libraries as a pair of functions: images to a grid of indices, and back.

Nothing is imported from those libraries. Every adapter takes the model that they built and calls its published
methods, so the weights stay where they are. :mod:`te_quant.interop` copies weights into a
:class:`~te_quant.VQAutoencoder` instead; use it where it knows the format.

Shape letters: B batch, I image channels, H W pixels, s stride, h = H/s and w = W/s token grid, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from te_quant._checks import require, require_int, require_type

__all__ = ["Tokenizer", "cosmos", "diffusers", "llamagen", "open_magvit2", "taming"]

# The way out for a model that no adapter fits.
_OWN_FUNCTIONS = "write the two functions of an adapters.Tokenizer yourself"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as measurements take it: two functions and two facts.

    Attributes:
        encode: (B, I, H, W) images in [-1, 1] to (B, h, w) int64 indices.
        decode: (B, h, w) indices to (B, I, H, W) images.
        stride: s, pixels per token.
        num_codes: K.

    Example:
        >>> from te_quant import measure_equivariance
        >>> def encode(images):
        ...     return (images[:, 0, ::4, ::4] > 0).long()
        >>> def decode(indices):
        ...     return (indices * 2.0 - 1)[:, None].repeat_interleave(4, -2).repeat_interleave(4, -1)
        >>> tokenizer = Tokenizer(encode, decode, stride=4, num_codes=2)
        >>> images = torch.sin(torch.arange(512.0)).view(2, 1, 16, 16)
        >>> report = measure_equivariance(
        ...     tokenizer.encode,
        ...     images,
        ...     protocol="circular",
        ...     stride=tokenizer.stride,
        ...     num_codes=tokenizer.num_codes,
        ...     reconstruct=tokenizer.reconstruct,
        ... )
        >>> report.aligned.rate
        1.0
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    stride: int
    num_codes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", require_int("stride", self.stride, 1))
        object.__setattr__(self, "num_codes", require_int("num_codes", self.num_codes, 1))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return ``decode(encode(images))``."""
        return self.decode(self.encode(images))


def diffusers(model: nn.Module) -> Tokenizer:
    """Adapt a ``VQModel`` of diffusers, with or without ``lookup_from_codebook``.

    Args:
        model: in evaluation mode; images in [-1, 1].

    Raises:
        TypeError: ``model`` lacks a method or a field that a ``VQModel`` has.

    Source: diffusers, ``models/autoencoders/vq_model.py``.
    """
    vq = _published(model, "a VQModel of diffusers", "encode", "quantize", "decode", "config")
    quantize = _part(vq, "quantize", "that of a VQModel", "get_codebook_entry", "re_embed", "vq_embed_dim")
    config = _part(vq, "config", "that of a VQModel", "block_out_channels", "lookup_from_codebook")

    def encode(images: Tensor) -> Tensor:
        latents = vq.encode(_as_weights(model, images)).latents
        return _grid(quantize(latents)[2][2], latents)

    def decode(indices: Tensor) -> Tensor:
        batch, height, width = indices.shape
        shape = (batch, height, width, quantize.vq_embed_dim)
        if config.lookup_from_codebook:
            image = vq.decode(indices.flatten(), force_not_quantize=True, shape=shape).sample
        else:
            codes = quantize.get_codebook_entry(indices.flatten(), shape)
            image = vq.decode(codes, force_not_quantize=True).sample
        return _widened(image)

    stride = 2 ** (len(config.block_out_channels) - 1)
    return Tokenizer(_without_gradient(encode), _without_gradient(decode), stride, quantize.re_embed)


def taming(model: nn.Module, *, stride: int | None = None, num_codes: int | None = None) -> Tokenizer:
    """Adapt a ``VQModel`` of taming-transformers, the code of LDM included.

    Its ``decode_code`` expects another shape in every version, so the codes are looked up by
    ``quantize.get_codebook_entry(indices, shape=(B, h, w, C))``.

    Args:
        model: in evaluation mode; images in [-1, 1]. Gumbel quantizers have another method and are refused.
        stride: s. None: what ``model.encoder.num_resolutions`` tells.
        num_codes: K. None: what ``model.quantize.n_e`` tells, or ``re_embed`` if it has one.

    Raises:
        TypeError: ``model`` lacks a method or a field that such a model has.

    Source: taming-transformers, ``taming/models/vqgan.py``.
    """
    vq = _published(model, "a VQModel of taming-transformers", "encode", "quantize", "decode")
    quantize = _part(vq, "quantize", "a VectorQuantizer2", "get_codebook_entry", "e_dim")
    stride = _stride(vq) if stride is None else stride
    num_codes = getattr(quantize, "re_embed", None) if num_codes is None else num_codes
    num_codes = _num_codes(vq) if num_codes is None else num_codes

    def encode(images: Tensor) -> Tensor:
        codes, _, info = vq.encode(_as_weights(model, images))
        return _grid(info[2], codes)

    def decode(indices: Tensor) -> Tensor:
        shape = (*indices.shape, quantize.e_dim)
        return _widened(vq.decode(quantize.get_codebook_entry(indices.flatten(), shape=shape)))

    return Tokenizer(_without_gradient(encode), _without_gradient(decode), stride, num_codes)


def llamagen(model: nn.Module, *, stride: int | None = None, num_codes: int | None = None) -> Tokenizer:
    """Adapt a ``VQModel`` of LlamaGen (``VQ_8``, ``VQ_16``).

    Args:
        model: in evaluation mode; images in [-1, 1].
        stride: s. None: what ``model.encoder.num_resolutions`` tells.
        num_codes: K. None: what ``model.quantize.n_e`` tells.

    Raises:
        TypeError: ``model`` lacks a method or a field that such a model has.

    Source: LlamaGen, ``tokenizer/tokenizer_image/vq_model.py``.
    """
    vq = _published(model, "a VQModel of LlamaGen", "encode", "quantize", "decode_code")
    quantize = _part(vq, "quantize", "that of a VQModel", "e_dim")
    stride = _stride(vq) if stride is None else stride
    num_codes = _num_codes(vq) if num_codes is None else num_codes

    def encode(images: Tensor) -> Tensor:
        codes, _, info = vq.encode(_as_weights(model, images))
        return _grid(info[2], codes)

    def decode(indices: Tensor) -> Tensor:
        batch, height, width = indices.shape
        shape = (batch, quantize.e_dim, height, width)
        return _widened(vq.decode_code(indices.flatten(), shape))

    return Tokenizer(_without_gradient(encode), _without_gradient(decode), stride, num_codes)


def open_magvit2(model: nn.Module, *, stride: int) -> Tokenizer:
    """Adapt a ``VQModel`` of Open-MAGVIT2 for images, whose quantizer is lookup-free.

    Args:
        model: in evaluation mode; images in [-1, 1]. Models with factorized tokens have two grids of indices and
            are refused.
        stride: s; 8 for the models of 128 pixels, 16 for those of 256.

    Raises:
        ValueError: ``model`` has factorized tokens.
        TypeError: ``model`` lacks a method or a field that such a model has.

    Source: Open-MAGVIT2 (SEED-Voken), ``models/lfqgan.py``.
    """
    vq = _published(model, "a VQModel of Open-MAGVIT2", "encode", "quantize", "decode")
    quantize = _part(vq, "quantize", "an LFQ", "get_codebook_entry", "codebook_size", "codebook_dim")
    factorized = bool(getattr(quantize, "token_factorization", False))
    require(not factorized, "model", "of one index per token", "factorized tokens, which are two")

    def encode(images: Tensor) -> Tensor:
        codes, _, indices, _ = vq.encode(_as_weights(model, images))
        return _grid(indices, codes)

    def decode(indices: Tensor) -> Tensor:
        shape = (*indices.shape, quantize.codebook_dim)
        codes = quantize.get_codebook_entry(indices.flatten(1), shape, order="")
        return _widened(vq.decode(_as_weights(model, codes)))

    return Tokenizer(_without_gradient(encode), _without_gradient(decode), stride, quantize.codebook_size)


def cosmos(encoder: nn.Module, decoder: nn.Module, *, stride: int, num_codes: int = 64_000) -> Tokenizer:
    """Adapt the two TorchScript modules of a discrete image tokenizer of Cosmos (DI8x8, DI16x16).

    Args:
        encoder: ``torch.jit.load("encoder.jit")``: images to a tuple that begins with the indices.
        decoder: ``torch.jit.load("decoder.jit")``: indices to images.
        stride: s: 8 or 16.
        num_codes: K; that of the published models, whose FSQ has the levels 8, 8, 8, 5, 5, 5.

    Raises:
        TypeError: ``encoder`` or ``decoder`` is no module.

    Source: Cosmos-Tokenizer, ``cosmos_tokenizer/image_lib.py``.
    """
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        require_type(name, module, nn.Module, "a module, as torch.jit.load returns")

    def encode(images: Tensor) -> Tensor:
        indices: Tensor = encoder(_as_weights(encoder, images))[0]
        return indices.long()

    def decode(indices: Tensor) -> Tensor:
        return _widened(decoder(indices))

    return Tokenizer(_without_gradient(encode), _without_gradient(decode), stride, num_codes)


def _published(model: Any, expected: str, *names: str, where: str = "model", cure: str = _OWN_FUNCTIONS) -> Any:
    """Return ``model``, which must have the attributes ``names``."""
    missing = ", ".join(name for name in names if not hasattr(model, name))
    if missing:
        raise TypeError(f"{where} must be {expected}, got {type(model).__name__} without {missing}; {cure}.")
    return model


def _part(vq: Any, name: str, expected: str, *names: str, cure: str = _OWN_FUNCTIONS) -> Any:
    """Return a part of the model, which must have the attributes ``names``."""
    return _published(getattr(vq, name), expected, *names, where=f"model.{name}", cure=cure)


def _stride(vq: Any) -> int:
    cure = "pass stride"
    _published(vq, "a VQModel with an encoder", "encoder", cure=cure)
    encoder = _part(vq, "encoder", "an Encoder", "num_resolutions", cure=cure)
    return int(2 ** (encoder.num_resolutions - 1))


def _num_codes(vq: Any) -> int:
    num_codes: int = _part(vq, "quantize", "one that tells its codes", "n_e", cure="pass num_codes").n_e
    return num_codes


def _grid(indices: Tensor, latents: Tensor) -> Tensor:
    """Indices in any layout of the same order, as the grid of (B, C, h, w) latents."""
    batch, _, height, width = latents.shape
    return indices.reshape(batch, height, width).long()


def _as_weights(model: nn.Module, values: Tensor) -> Tensor:
    weight = next(model.parameters(), None)
    return values if weight is None else values.to(weight.dtype)


def _widened(images: Tensor) -> Tensor:
    # Errors are measured against images in float32, and half precision would round them once more.
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _without_gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    decorated: Callable[[Tensor], Tensor] = torch.no_grad()(function)
    return decorated
