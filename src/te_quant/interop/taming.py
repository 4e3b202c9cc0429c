"""VQGANs of taming-transformers, and first stages of latent diffusion, which share its code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_quant import _pretrained
from te_quant._checks import require, require_type
from te_quant.autoencoder import VQAutoencoder
from te_quant.interop._autoencoders import (
    build,
    facts_of,
    quantizer_options,
    refuse_other_kinds,
    require_agreement,
    structure_of,
)
from te_quant.interop._files import Source, options_of, weights_in
from te_quant.interop._layout import TAMING

__all__ = ["dropped", "load_taming", "network_in", "network_options"]

# Of ``model.params``, in taming-transformers and in latent diffusion; most concern only the training.
_PARAMS = (
    "embed_dim",
    "n_embed",
    "ddconfig",
    "lossconfig",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "n_labels",
    "monitor",
    "remap",
    "sane_index_shape",
    "batch_resize_range",
    "scheduler_config",
    "lr_g_factor",
    "use_ema",
)
# Of the encoder and the decoder.
_NETWORK = (
    "double_z",
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "dropout",
    "resamp_with_conv",
    "attn_type",
    "use_linear_attn",
    "give_pre_end",
    "tanh_out",
)
# Of these, the only value that has a counterpart here.
_FIXED = {
    "double_z": False,
    "resamp_with_conv": True,
    "use_linear_attn": False,
    "give_pre_end": False,
    "tanh_out": False,
}
# Where ``model.params`` lies in a whole file, the innermost place first.
_PLACES = (
    ("model", "params", "first_stage_config", "params"),
    ("first_stage_config", "params"),
    ("model", "params"),
    ("params",),
)
_AVERAGES = "model_ema."
# Discriminator and perceptual loss, averages, and the colours in which segmentations are shown.
_OTHER_PARTS = ("loss.", _AVERAGES, "colorize")


def load_taming(
    source: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    averaged: bool = False,
    filename: str | None = None,
    subfolder: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> VQAutoencoder:
    """Return a VQGAN of taming-transformers as an autoencoder of this library, in evaluation mode.

    The ``VQModel`` of latent diffusion has the same layout. Tokens are those of the original, and images agree up
    to rounding. The structure is read off names and shapes, so no config is needed. The model trains on as the
    original does: β = 0.25 is on the codebook term, so ``commitment_weight`` is 1 and ``codebook_weight`` 0.25.
    ``loss.*`` (discriminator and perceptual loss) is left out.

    Args:
        source: a checkpoint (``last.ckpt``), a folder with one, or a hub id ``owner/name``.
        config: ``model.params`` of the YAML file, as a mapping or a JSON file. It must agree with the weights, and
            its dropout is kept; a key that is not known is refused.
        averaged: take the moving averages of the weights (``model_ema.*``), which latent diffusion keeps.
        filename: of the checkpoint inside a folder or repository; needed unless a folder has only one.
        subfolder: of the folder or repository.
        device: where to put the model; None is the CPU.
        dtype: floating-point type to convert it to; None keeps the saved ones.
        revision: branch, tag or commit, for a hub id only.
        token: of an account that may read the repository, for a hub id only.
        cache_dir: where downloads are kept, for a hub id only.
        local_files_only: use only what has been downloaded before.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the model is another one (Gumbel quantizer, MoVQ, ``resamp_with_conv=False``, remapped indices,
            bias-free convolutions, ``tanh_out=True``), the config contradicts the weights or has an unknown key, a
            tensor is missing, unexpected or of another shape, or a file is damaged.
        ImportError: huggingface_hub is not installed (``te_quant[hub]``).

    Example:
        >>> model = load_taming("vqgan_imagenet_f16_1024/last.ckpt")  # doctest: +SKIP
        >>> model.config.stride, model.config.num_codes  # doctest: +SKIP
        (16, 1024)
    """
    require_type("averaged", averaged, bool, "a bool")
    hub = _pretrained.Hub(revision, token, cache_dir, local_files_only)
    weights = Source(source, filename, subfolder, hub).weights()
    tensors = weights_in(weights)
    state = dropped(tensors)
    refuse_other_kinds(state)
    given = {} if config is None else options_of(config)
    options = structure_of(state, TAMING)
    if averaged:
        state = {name: _average(tensors, name) for name in state}
    pooled = "encoder.down.0.downsample.conv.weight" not in state and len(options["widths"]) > 1
    require(not pooled, "resamp_with_conv", "True", "no 'encoder.down.0.downsample.conv.weight' in the weights")
    own = network_options(options, given, network_in(given))
    size = (own.pop("num_codes"), own.pop("code_dim"))
    own["quantizer"] = quantizer_options(*size, commitment_weight=1.0, codebook_weight=0.25)
    return build({**own, "encoder_padding": "zeros"}, state, TAMING, device=device, dtype=dtype)


def dropped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the autoencoder itself."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_OTHER_PARTS)}


def network_in(
    config: Mapping[str, Any], params: Sequence[str] = (), network: Sequence[str] = ()
) -> Mapping[str, Any]:
    """Return the ``ddconfig`` in ``model.params``; refuse keys that are not known.

    Args:
        config: ``model.params``.
        params: keys of it that only one of the codes has.
        network: keys of the ``ddconfig`` that only one of the codes has.
    """
    for name in ("temperature_scheduler_config", "kl_weight"):
        require(name not in config, "config", "that of a VQModel", f"{name!r}, which a Gumbel quantizer has")
    known = (*_PARAMS, *params)
    for name in config:
        require(name in known, "config key", f"one of {', '.join(known)}", f"{name!r}{_inner(config)}")
    inside = config.get("ddconfig", {})
    require_type("config ddconfig", inside, Mapping, "a mapping")
    known = (*_NETWORK, *network)
    for name in inside:
        require(name in known, "config ddconfig key", f"one of {', '.join(known)}", repr(name))
    found: Mapping[str, Any] = inside
    return found


def _inner(config: Mapping[str, Any]) -> str:
    """Say where ``model.params`` lies in a whole file; empty for anything else."""
    for place in _PLACES:
        part: Any = config
        for name in place:
            part = part.get(name) if isinstance(part, Mapping) else None
        if isinstance(part, Mapping):
            return "; pass config" + "".join(f"[{name!r}]" for name in place)
    return ""


def network_options(
    options: Mapping[str, Any], config: Mapping[str, Any], network: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options read off the weights with what only a config says; refuse contradictions.

    Args:
        options: as read off the weights.
        config: ``model.params``.
        network: its ``ddconfig``.
    """
    require(config.get("remap") is None, "config remap", "None", repr(config.get("remap")))
    # Without attention of any type, levels that should have it have none either, nor has the middle.
    attends = bool(options["attention_levels"] or options["middle_attention"])
    for name, expected in (*_FIXED.items(), ("attn_type", "vanilla" if attends else "none")):
        value = network.get(name, expected)
        require(value == expected, f"config ddconfig.{name}", repr(expected), repr(value))
    require_agreement(facts_of(options), config)
    if "resolution" in network and "attn_resolutions" in network and network.get("attn_type") != "none":
        sides = [network["resolution"] // 2**level for level in range(len(options["widths"]))]
        found = tuple(level for level, side in enumerate(sides) if side in network["attn_resolutions"])
        attention = options["attention_levels"]
        name = "config ddconfig.attn_resolutions"
        require(found == attention, name, f"those of the levels {attention} as in the weights", f"levels {found}")
    fixed = {"decoder_padding": "zeros", "norm_groups": 32, "dropout": network.get("dropout", 0.0)}
    return {**options, **fixed}


def _average(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    # Names of buffers have no dots, so the averages are stored without them.
    average = _AVERAGES + name.replace(".", "")
    require(average in tensors, "source", f"with averages for averaged=True, {average!r} among them", "none")
    return tensors[average]
