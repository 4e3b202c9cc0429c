"""Tokenizers of LlamaGen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from te_quant import _pretrained
from te_quant._checks import require, require_type
from te_quant.autoencoder import VQAutoencoder
from te_quant.interop._autoencoders import (
    build,
    quantizer_options,
    refuse_other_kinds,
    require_agreement,
    structure_of,
)
from te_quant.interop._files import Source, options_of, weights_in
from te_quant.interop._layout import LLAMAGEN

__all__ = ["load_llamagen"]

_DEFAULTS: dict[str, Any] = {
    "codebook_size": None,
    "codebook_embed_dim": None,
    "codebook_l2_norm": True,
    "codebook_show_usage": True,
    "commit_loss_beta": 0.25,
    "entropy_loss_ratio": 0.0,
    "encoder_ch_mult": None,
    "decoder_ch_mult": None,
    "z_channels": None,
    "dropout_p": 0.0,
}


def load_llamagen(
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
    """Return a tokenizer of LlamaGen as an autoencoder of this library, in evaluation mode.

    VQ-8, VQ-16 and other sizes are read. Tokens are those of the original, and images agree up to rounding. Of
    several sets of weights in one file, ``ema`` comes before ``model``, as in its own code. The entropy loss
    (``entropy_loss_ratio``) is not kept.

    Args:
        source: a checkpoint (``vq_ds16_c2i.pt``), its folder, or a hub id ``owner/name``.
        config: the ``ModelArgs``, as a mapping or a JSON file; by default those of the published tokenizers. The
            weights tell all but the metric (``codebook_l2_norm``, True by default), ``commit_loss_beta`` (0.25)
            and ``dropout_p`` (0).
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
        ValueError: the model is another one (``norm_type="batch"``, ``resamp_with_conv=False``), the config
            contradicts the weights, a tensor is missing, unexpected or of another shape, or a file is damaged.
        ImportError: huggingface_hub is not installed (``te_quant[hub]``).

    Example:
        >>> model = load_llamagen("vq_ds16_c2i.pt")  # doctest: +SKIP
        >>> model.config.z_channels, model.config.code_dim, model.config.metric  # doctest: +SKIP
        (256, 8, 'cosine')
    """
    hub = _pretrained.Hub(revision, token, cache_dir, local_files_only)
    weights = Source(source, filename, subfolder, hub).weights()
    state = weights_in(weights, ("ema", "model", "state_dict"))
    state.pop("quantize.codebook_used", None)
    refuse_other_kinds(state)
    given = {} if config is None else options_of(config)
    for name in given:
        require(name in _DEFAULTS, "config key", f"one of {', '.join(_DEFAULTS)}", repr(name))
    options = structure_of(state, LLAMAGEN)
    base = options["base_channels"]
    facts = {
        "codebook_size": options["num_codes"],
        "codebook_embed_dim": options["code_dim"],
        "z_channels": options["z_channels"],
        "encoder_ch_mult": [width / base for width in options["widths"]],
        "decoder_ch_mult": [width / base for width in options["decoder_widths"]],
    }
    require_agreement(facts, given)
    pooled = "encoder.conv_blocks.0.downsample.conv.weight" not in state and len(options["widths"]) > 1
    missing = "no 'encoder.conv_blocks.0.downsample.conv.weight' in the weights"
    require(not pooled, "resamp_with_conv", "True", missing)
    given = {**_DEFAULTS, **given}
    require_type("config codebook_l2_norm", given["codebook_l2_norm"], bool, "a bool")
    quantizer = quantizer_options(
        options.pop("num_codes"),
        options.pop("code_dim"),
        metric="cosine" if given["codebook_l2_norm"] else "l2",
        commitment_weight=given["commit_loss_beta"],
    )
    padding = {"encoder_padding": "zeros", "decoder_padding": "zeros"}
    own = {**options, **padding, "norm_groups": 32, "dropout": given["dropout_p"], "quantizer": quantizer}
    return build(own, state, LLAMAGEN, device=device, dtype=dtype)
