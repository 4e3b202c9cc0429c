"""Models of the code that was published with the paper (TE-VQGAN)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from te_quant import _pretrained
from te_quant._checks import require, require_choice
from te_quant.autoencoder import VQAutoencoder
from te_quant.interop._autoencoders import build, quantizer_options, refuse_other_kinds, structure_of
from te_quant.interop._files import Source, options_of, weights_in
from te_quant.interop._layout import TAMING
from te_quant.interop.taming import dropped, network_in, network_options

__all__ = ["load_te_vqgan"]

_KINDS = {
    "strided_conv": "strided_conv",
    "maxpool": "max_pool",
    "maxblurpool": "unpadded_max_blur_pool",
    "convblurpool": "conv_blur_pool",
}
_PARAMS = ("ortho_reg_coef", "force_emb_len_1", "distance_measure", "eq_metric_dataset")
_NETWORK = ("downsampling_method", "use_replicationpad", "version")
# Its cosine similarity chooses a code, whose length stays.
_METRICS = {"L2": "l2", "cos_sim": "cosine_raw"}


def load_te_vqgan(
    source: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | str | os.PathLike[str],
    filename: str | None = None,
    subfolder: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> VQAutoencoder:
    """Return a model of the paper's code as an autoencoder of this library, in evaluation mode.

    Tokens are those of the original, and images agree up to rounding. Its four downsamplings become
    ``strided_conv``, ``max_pool``, ``unpadded_max_blur_pool`` and ``conv_blur_pool``, or
    ``conv_replicate_blur_pool`` where the convolutions pad with zeros. ``force_emb_len_1`` shows in the codebook;
    further training does not keep it.

    Args:
        source: a checkpoint (``last.ckpt``), a folder with one, or a hub id ``owner/name``.
        config: ``model.params`` of the YAML file, as a mapping or a JSON file. The weights do not tell the metric,
            the padding of downsampling layers (``version``), nor the weight of the penalty.
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
        ValueError: the config has an unknown key or an option without a counterpart here, or contradicts the
            weights; a tensor is missing, unexpected or of another shape, or a file is damaged.
        ImportError: huggingface_hub is not installed (``te_quant[hub]``).

    Source: the code of Shin et al. 2021, arXiv:2112.00384.

    Example:
        >>> params = {"distance_measure": "L2", "ortho_reg_coef": 10.0, "ddconfig": {"version": "v2"}}
        >>> model = load_te_vqgan("logs/checkpoints/last.ckpt", config=params)  # doctest: +SKIP
    """
    hub = _pretrained.Hub(revision, token, cache_dir, local_files_only)
    weights = Source(source, filename, subfolder, hub).weights()
    state = {name: tensor for name, tensor in dropped(weights_in(weights)).items() if not name.endswith(".filt")}
    refuse_other_kinds(state)
    given = options_of(config)
    network = network_in(given, _PARAMS, _NETWORK)
    padded = "encoder.conv_in.1.weight" in state
    kind = network.get("downsampling_method", "strided_conv")
    require_choice("config ddconfig.downsampling_method", kind, _KINDS)
    layout = TAMING._replace(padded=padded)
    if kind == "convblurpool":
        layout = layout._replace(parts=(*layout.parts, ("downsample.conv", "downsample.module.0")))
    options = network_options(structure_of(state, layout), given, network)
    options |= _padding(network, kind, padded=padded)
    size = (options.pop("num_codes"), options.pop("code_dim"))
    metric = given.get("distance_measure", "L2")
    require_choice("config distance_measure", metric, _METRICS)
    reg = given.get("ortho_reg_coef", 0.0)
    options["quantizer"] = quantizer_options(
        *size, metric=_METRICS[metric], commitment_weight=0.25, orthogonal_reg=reg
    )
    return build(options, state, layout, device=device, dtype=dtype)


def _padding(network: Mapping[str, Any], kind: str, *, padded: bool) -> dict[str, Any]:
    """Return the downsampling and the padding; refuse layers that pad otherwise than the convolutions do."""
    replicates = network.get("use_replicationpad", False)
    name = "config ddconfig.use_replicationpad"
    require(replicates == padded, name, f"{padded} as in the weights", replicates)
    version = network.get("version", "v1")
    require_choice("config ddconfig.version", version, ("v1", "v2"))
    # v1 pads these layers with zeros; v2 as the convolutions, or by replication behind a blur.
    layers = {"strided_conv": version == "v2" and padded, "convblurpool": version == "v2"}.get(kind, padded)
    expected = f"one that pads {kind} as use_replicationpad={padded} pads the convolutions"
    require(layers == padded, "config ddconfig.version", expected, repr(version))
    own = _KINDS[kind]
    if kind == "convblurpool" and not padded:
        own = "conv_replicate_blur_pool"
    return {"downsample": own, "encoder_padding": "replicate" if padded else "zeros"}
