"""Autoencoders from the tensors of other libraries.

Shape letters: K codes, C code size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from te_quant._checks import require
from te_quant.autoencoder import AutoencoderConfig, VQAutoencoder
from te_quant.interop._layout import Layout, names_of
from te_quant.interop._sources import prefix_of, require_names, some

__all__ = ["build", "facts_of", "quantizer_options", "refuse_other_kinds", "require_agreement", "structure_of"]

# Names that only other kinds of models have, and what these are.
_OTHER_KINDS = (
    ("quantize.proj.weight", "a Gumbel quantizer, which has no codebook to search"),
    ("quantize.embed.weight", "a Gumbel quantizer, which has no codebook to search"),
    ("quantize.used", "a codebook whose indices are remapped (remap)"),
    ("conv_y.weight", "MoVQ, whose decoder normalizes with the codes (spatial norm)"),
    ("running_mean", "batch normalization (norm_type='batch')"),
)


def refuse_other_kinds(state: Mapping[str, Tensor]) -> None:
    """Refuse the tensors of models that look alike and compute something else."""
    for ending, meaning in _OTHER_KINDS:
        found = [name for name in state if name.endswith(ending)]
        require(not found, "source", "a VQGAN with GroupNorm and a codebook", f"{some(found)}: {meaning}")
    bare = "encoder.conv_in.weight" in state and "encoder.conv_in.bias" not in state
    meaning = "no 'encoder.conv_in.bias', as in Open-MAGVIT2 and the VQGAN of MaskGIT, whose blocks differ"
    require(not bare, "source", "a VQGAN whose convolutions have biases", meaning)


def structure_of(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
    """Read the options of an :class:`~te_quant.AutoencoderConfig` off names and shapes.

    Not all of it can be read: the options of the quantizer besides its size, padding, and groups are left out.

    Raises:
        ValueError: a tensor that shows the structure is missing.
    """
    levels = 1 + _largest(state, re.escape(layout.down))

    def shape(own: str) -> tuple[int, ...]:
        name = names_of(own, layout, levels)[0]
        if name not in state:
            others = prefix_of(state, [name]) or "; check the format"
            raise ValueError(f"source must hold a tensor {name!r}, got {len(state)} others{others}.")
        return tuple(state[name].shape)

    def has_attention(half: str, level: int) -> bool:
        name = names_of(f"{half}.levels.{level}.attention0.norm.weight", layout, levels)[0]
        return any(key.startswith(name.removesuffix("weight")) for key in state)

    shape("encoder.levels.0.block0.conv1.weight")
    attention = tuple(level for level in range(levels) if has_attention("encoder", level))
    behind = tuple(level for level in range(levels) if has_attention("decoder", levels - 1 - level))
    require(attention == behind, "attention levels of the decoder", f"those of the encoder, {attention}", behind)
    middle = names_of("encoder.middle.attention.norm.weight", layout, levels)[0] in state
    base, image_channels = shape("encoder.conv_in.weight")[:2]
    widths = tuple(shape(f"encoder.levels.{level}.block0.conv1.weight")[0] for level in range(levels))
    behind = tuple(shape(f"decoder.levels.{level}.block0.conv1.weight")[0] for level in reversed(range(levels)))
    num_codes, code_dim = shape("quantizer.codebook")
    return {
        "image_channels": image_channels,
        "base_channels": base,
        "widths": widths,
        "decoder_widths": behind,
        "num_res_blocks": 1 + _largest(state, re.escape(f"{layout.down}.{layout.block}")),
        "attention_levels": attention,
        "middle_attention": middle,
        "z_channels": shape("encoder.conv_out.weight")[0],
        "num_codes": num_codes,
        "code_dim": code_dim,
    }


def facts_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what taming-transformers calls the options that :func:`structure_of` has read."""
    return {
        "embed_dim": options["code_dim"],
        "n_embed": options["num_codes"],
        "ddconfig.z_channels": options["z_channels"],
        "ddconfig.in_channels": options["image_channels"],
        "ddconfig.out_ch": options["image_channels"],
        "ddconfig.ch": options["base_channels"],
        "ddconfig.ch_mult": [width / options["base_channels"] for width in options["widths"]],
        "ddconfig.num_res_blocks": options["num_res_blocks"],
    }


def require_agreement(facts: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse a config that says something else than the weights; a dot in a name leads into a mapping."""
    for path, fact in facts.items():
        place: Any = config
        for name in path.split("."):
            place = place.get(name) if isinstance(place, Mapping) else None
        value = list(place) if isinstance(place, Sequence) and not isinstance(place, str) else place
        require(value is None or value == fact, f"config {path}", f"{fact} as in the weights", value)


def quantizer_options(num_codes: int, code_dim: int, **options: Any) -> dict[str, Any]:
    """Return the description of a quantizer whose codebook follows gradients, as all of these were trained."""
    size = {"num_codes": num_codes, "code_dim": code_dim}
    return {"name": "VectorQuantizer", **size, "codebook_update": "gradient", **options}


def build(
    options: Mapping[str, Any],
    state: Mapping[str, Tensor],
    layout: Layout,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> VQAutoencoder:
    """Return the autoencoder with these tensors, in evaluation mode.

    Args:
        options: of :class:`~te_quant.AutoencoderConfig`.
        state: the tensors, by their names in ``layout``.
        layout: the other library.
        device: where to put the model; None is the CPU.
        dtype: floating-point type to convert it to; None keeps that of the tensors.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the model.
    """
    if dtype is not None:
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        require(floating, "dtype", "a floating-point torch.dtype, or None", repr(dtype))
    # The weights are replaced at once, so drawing them must not move the caller's random state. What is not in the
    # file must be where the weights are, not on the default device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = VQAutoencoder(AutoencoderConfig(**options))
    own = model.state_dict()
    # Statistics start as in a new quantizer.
    own = {name: tensor for name, tensor in own.items() if name not in _statistics(model)}
    names = {name: names_of(name, layout, len(model.config.widths)) for name in own}
    # In the order of the network.
    require_names("source", state, dict.fromkeys(theirs for each in names.values() for theirs in each))
    weights = {}
    for name, expected in own.items():
        parts = [_as_convolution(state[theirs], expected) for theirs in names[name]]
        shape = (expected.shape[0] // len(parts), *expected.shape[1:])
        for theirs, part in zip(names[name], parts, strict=True):
            same = tuple(part.shape) == shape and part.is_floating_point()
            require(same, theirs, f"floating point of shape {shape}", f"{part.dtype} of shape {tuple(part.shape)}")
        weights[name] = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
    _load(model, weights)
    return model.to(device=device, dtype=dtype).eval()


def _load(model: VQAutoencoder, weights: Mapping[str, Tensor]) -> None:
    statistics = {name: tensor for name, tensor in model.state_dict().items() if name in _statistics(model)}
    # assign, not copy: half precision comes back as it was.
    model.load_state_dict({**statistics, **weights}, assign=True)


def _statistics(model: VQAutoencoder) -> set[str]:
    return {f"quantizer.{name}" for name in model.quantizer.statistics}


def _as_convolution(tensor: Tensor, expected: Tensor) -> Tensor:
    """Return the weight of a linear layer as that of the 1x1 convolution which computes the same."""
    return tensor[:, :, None, None] if (tensor.ndim, expected.ndim) == (2, 4) else tensor


def _largest(state: Mapping[str, Tensor], template: str) -> int:
    """Return the largest number at the last placeholder of an escaped template; -1 if no name fits it."""
    pattern = re.compile(template.replace(r"\{\}", r"(\d+)") + r"\.")
    found = (pattern.match(name) for name in state)
    return max((int(match.groups()[-1]) for match in found if match), default=-1)
