"""Quantizers inside a ``PreTrainedModel`` of transformers."""

from __future__ import annotations

import torch
from torch import nn

from te_quant.quantizers import Quantizer

__all__ = ["initialize_quantizer"]


@torch.no_grad()
def initialize_quantizer(module: nn.Module) -> None:
    """Fill what a checkpoint lacks, if ``module`` is a quantizer; call it in your ``_init_weights``.

    ``from_pretrained`` allocates every missing tensor without writing to it, then calls ``_init_weights`` for the
    modules that have one. Without this function a checkpoint that lacks statistics, for example one of an older
    version, would move the codebook by whatever was in memory. Missing statistics are derived from the codebook;
    whatever else is missing starts as in a new quantizer. What was loaded stays as it is.

    Args:
        module: any module; others than quantizers are left alone.

    Raises:
        AttributeError: a quantizer of your own has an option that is not an attribute of the same name.

    Example:
        >>> from te_quant import VectorQuantizer
        >>> initialize_quantizer(VectorQuantizer(num_codes=16, code_dim=4))
    """
    if not isinstance(module, Quantizer):
        return
    # Submodules are initialized on their own.
    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if "." not in name}
    if not state:
        return
    # The mark that transformers 5 puts on what it has loaded.
    loaded = {name: tensor for name, tensor in state.items() if getattr(tensor, "_is_hf_initialized", False)}
    fresh = type(module)(**module.options())
    fresh.load_state_dict(loaded, strict=False)
    values = fresh.state_dict()
    for name in state.keys() - loaded.keys():
        state[name].copy_(values[name])
