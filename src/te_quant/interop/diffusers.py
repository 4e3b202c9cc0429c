"""``VQModel`` of diffusers, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_quant import _pretrained
from te_quant._checks import require, require_type
from te_quant.autoencoder import AutoencoderConfig, VQAutoencoder
from te_quant.autoencoder.config import with_present_quantizer
from te_quant.interop._autoencoders import build, quantizer_options, refuse_other_kinds
from te_quant.interop._files import Source, options_of, weights_in
from te_quant.interop._layout import DIFFUSERS, names_of
from te_quant.quantizers import VectorQuantizer

__all__ = ["load_diffusers", "save_diffusers"]

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLED = "diffusion_pytorch_model.bin"
# The options of VQModel and their defaults, to which config files leave what was not given.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "sample_size": 32,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "scaling_factor": 0.18215,
    "norm_type": "group",
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
    "force_upcast": False,
}
# What EMAModel.save_pretrained writes next to the options of the model; all of it concerns the training only.
_AVERAGING = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# Of attention blocks, in files from before version 0.17.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_diffusers(
    source: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    filename: str | None = None,
    subfolder: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> VQAutoencoder:
    """Return a ``VQModel`` of diffusers as an autoencoder of this library, in evaluation mode.

    Tokens are those of the original, and images agree up to rounding. diffusers itself is not needed. The model
    trains on as the original does: diffusers has β = 0.25 on the codebook term, so ``commitment_weight`` is 1 and
    ``codebook_weight`` 0.25. ``scaling_factor``, which belongs to the diffusion model, is not kept.

    Args:
        source: a folder that ``save_pretrained`` of a ``VQModel`` or of its ``EMAModel`` wrote, a file with its
            weights, or a hub id ``owner/name``.
        config: the options of the ``VQModel``, or the path of their JSON file; by default ``config.json`` next to
            the weights.
        filename: of the weights; by default ``diffusion_pytorch_model.safetensors``, else ``.bin``.
        subfolder: of the folder or repository, such as ``"vqvae"`` in a pipeline.
        device: where to put the model; None is the CPU.
        dtype: floating-point type to convert it to; None keeps the saved ones.
        revision: branch, tag or commit, for a hub id only.
        token: of an account that may read the repository, for a hub id only.
        cache_dir: where downloads are kept, for a hub id only.
        local_files_only: use only what has been downloaded before.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: an option has no counterpart here (``norm_type="spatial"``, other blocks, attention on other
            levels of the decoder), a tensor is missing, unexpected or of another shape, or a file is damaged.
        ImportError: safetensors or huggingface_hub is not installed (``te_quant[hub]``).

    Example:
        >>> from te_quant import AutoencoderConfig, VQAutoencoder
        >>> zeros = {"encoder_padding": "zeros", "decoder_padding": "zeros"}
        >>> model = VQAutoencoder(AutoencoderConfig(widths=(8, 16), code_dim=4, num_codes=32, **zeros))
        >>> save_diffusers(model, "tokenizer")
        >>> load_diffusers("tokenizer").config.widths
        (8, 16)
    """
    hub = _pretrained.Hub(revision, token, cache_dir, local_files_only)
    where = Source(source, filename, subfolder, hub)
    weights = where.weights((_WEIGHTS, _PICKLED))
    beside = where.beside(weights, _CONFIG) if config is None else None
    require(config is not None or beside is not None, "config", f"given where no {_CONFIG} lies beside", None)
    options = options_of(config if beside is None else beside)
    own = _own_options(options)
    state = {_present(name): tensor for name, tensor in weights_in(weights).items()}
    refuse_other_kinds(state)
    return build(own, state, DIFFUSERS, device=device, dtype=dtype)


def save_diffusers(model: VQAutoencoder, folder: str | os.PathLike[str]) -> None:
    """Write the files that ``VQModel.from_pretrained`` of diffusers reads.

    They are ``config.json`` and ``diffusion_pytorch_model.safetensors``. Tokens of the ``VQModel`` are those of
    ``model``, and images agree up to rounding. Losses and dropout are not kept, because diffusers has its own.

    Args:
        model: zero padding in both halves, ``strided_conv``, ``nearest``, GroupNorm, SiLU, equal widths of both
            halves, the first of which is ``base_channels``, and a :class:`~te_quant.VectorQuantizer` under ``l2``.
        folder: where to write; it is made if need be.

    Raises:
        ValueError: an option of the model has no counterpart in diffusers, or a layer is not the one that its
            config describes; the message names it. Or ``folder`` is a file.
        TypeError: model is no ``VQAutoencoder``.
        ImportError: safetensors is not installed (``te_quant[hub]``).
    """
    require_type("model", model, VQAutoencoder, "a VQAutoencoder")
    options = _their_options(model)
    state = model._described_state(model._present_config())
    save_file = _pretrained.safetensors().save_file
    # It writes to the tensors that the state holds.
    model.quantizer.apply_pending()
    levels = len(model.config.widths)
    statistics = {f"quantizer.{name}" for name in (*model.quantizer.statistics, "revivals")}
    tensors: dict[str, Tensor] = {}
    for own, tensor in state.items():
        if own in statistics:
            continue
        names = names_of(own, DIFFUSERS, levels)
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            # Their attention has linear layers.
            linear = ".attentions." in name and part.ndim > 1
            tensors[name] = part.detach().flatten(1).clone() if linear else part.detach().clone()
    text = json.dumps({"_class_name": "VQModel", **options}, indent=2) + "\n"
    folder = _pretrained.folder_to_write(folder)
    _pretrained.write_atomically(
        folder / _WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    _pretrained.write_atomically(folder / _CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _own_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the options of a VQModel to those of an AutoencoderConfig."""
    own = "class_name" in config and "_class_name" not in config
    cure = "those of a model of te_quant; use VQAutoencoder.from_pretrained, in a shell --format te_quant"
    require(not own, "config", "the options of a VQModel of diffusers", cure)
    kind = config.get("_class_name", "VQModel")
    require(kind == "VQModel", "config _class_name", "'VQModel'", repr(kind))
    given = {name: value for name, value in config.items() if not name.startswith("_") and name not in _AVERAGING}
    for name in given:
        require(name in _DEFAULTS, "config key", f"one of {', '.join(_DEFAULTS)}", repr(name))
    given = {**_DEFAULTS, **given}
    _require_option(given, "norm_type", ("group",), "MoVQ (spatial norm) is not supported")
    _require_option(given, "act_fn", ("silu", "swish"))
    _require_option(given, "out_channels", (given["in_channels"],))
    widths = tuple(given["block_out_channels"])
    levels = {}
    for name, kinds in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        blocks = list(given[name])
        for block in blocks:
            require(block in kinds, f"config {name} entry", f"one of {', '.join(kinds)}", repr(block))
        require(len(blocks) == len(widths), f"config {name}", f"{len(widths)} blocks, one per width", blocks)
        levels[name] = [kinds[block] for block in blocks]
    attention = tuple(level for level, attends in enumerate(levels["down_block_types"]) if attends)
    expected = f"with attention on the levels {attention} of the encoder"
    same = levels["up_block_types"][::-1] == levels["down_block_types"]
    require(same, "config up_block_types", expected, list(given["up_block_types"]))
    z_channels = given["latent_channels"]
    code_dim = z_channels if given["vq_embed_dim"] is None else given["vq_embed_dim"]
    size = (given["num_vq_embeddings"], code_dim)
    return {
        "image_channels": given["in_channels"],
        "widths": widths,
        "num_res_blocks": given["layers_per_block"],
        "attention_levels": attention,
        "middle_attention": given["mid_block_add_attention"],
        "norm_groups": given["norm_num_groups"],
        "z_channels": z_channels,
        "encoder_padding": "zeros",
        "decoder_padding": "zeros",
        "quantizer": quantizer_options(*size, commitment_weight=1.0, codebook_weight=0.25),
    }


def _their_options(model: VQAutoencoder) -> dict[str, Any]:
    """Translate the options of an autoencoder to those of a VQModel; refuse what has no counterpart."""
    config = model.config
    fixed = {
        "downsample": "strided_conv",
        "upsample": "nearest",
        "encoder_padding": "zeros",
        "decoder_padding": "zeros",
        "norm": "group",
        "activation": "silu",
        "base_channels": config.widths[0],
        "decoder_widths": config.widths,
    }
    for name, expected in fixed.items():
        value = getattr(config, name)
        require(value == expected, name, f"{expected!r} for diffusers", repr(value))
    # As it is now, and of a compiled one what was compiled.
    quantizer = getattr(model.quantizer, "_orig_mod", model.quantizer)
    plain = type(quantizer) is VectorQuantizer
    require(plain, "quantizer", "a VectorQuantizer for diffusers", type(quantizer).__name__)
    metric = getattr(quantizer, "metric", None)
    require(metric == "l2", "metric", "'l2' for diffusers", repr(metric))
    config = with_present_quantizer(config, quantizer)
    return {**_DEFAULTS, **_sizes(config), **_blocks(config)}


def _sizes(config: AutoencoderConfig) -> dict[str, Any]:
    return {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.code_dim if config.z_channels is None else config.z_channels,
        "num_vq_embeddings": config.num_codes,
        "norm_num_groups": int(config.norm_groups),
        "vq_embed_dim": config.code_dim,
    }


def _blocks(config: AutoencoderConfig) -> dict[str, Any]:
    attends = [level in config.attention_levels for level in range(len(config.widths))]
    return {
        "down_block_types": [f"{'Attn' * attend}DownEncoderBlock2D" for attend in attends],
        "up_block_types": [f"{'Attn' * attend}UpDecoderBlock2D" for attend in reversed(attends)],
        "mid_block_add_attention": config.has_middle_attention,
    }


def _require_option(config: Mapping[str, Any], name: str, allowed: tuple[object, ...], reason: str = "") -> None:
    value = config[name]
    expected = " or ".join(repr(each) for each in allowed)
    require(value in allowed, f"config {name}", expected, repr(value) + (f"; {reason}" if reason else ""))


def _present(name: str) -> str:
    """Return the present name of a tensor."""
    for former, present in _FORMER.items():
        if ".attentions." in name:
            name = name.replace(f".{former}.", f".{present}.")
    return name
