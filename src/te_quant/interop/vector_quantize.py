"""Codebooks of vector-quantize-pytorch.

Shape letters: C code size, K codes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from te_quant._checks import require, require_int, require_integer_tensor, require_type
from te_quant._values import require_in_range
from te_quant.interop._sources import require_names, some, tensors_of
from te_quant.quantizers import VectorQuantizer
from te_quant.quantizers._update import EPSILON

__all__ = ["load_vector_quantize", "reverse_bits"]

_BOOK = "_codebook."
_NAMES = tuple(f"{_BOOK}{name}" for name in ("initted", "cluster_size", "embed_avg", "embed"))
# Names of settings, and the only value that has an equivalent here; for each, what to do instead.
_UNSUPPORTED: dict[str, tuple[object, str]] = {
    "heads": (1, "put one quantizer per head into a ProductQuantizer"),
    "separate_codebook_per_head": (False, "put one quantizer per head into a ProductQuantizer"),
    "has_projections": (False, "apply project_in and project_out around the quantizer"),
    "commitment_use_cross_entropy_loss": (False, "write that loss with quantizer.codebook"),
    "has_codebook_diversity_loss": (False, "write that loss with quantizer.codebook"),
    "directional_reparam": (False, "train with another estimator"),
    "sync_update_v": (0.0, "train with another estimator"),
    "route_gradients_to_input": (True, "detach the latents"),
    "in_place_codebook_optimizer": (None, "give quantizer.codebook to an optimizer of your own"),
}
_UNSUPPORTED_OF_CODEBOOK: dict[str, tuple[object, str]] = {
    "affine_param": (False, "train without it"),
    "vq_bridge": (None, "use SimVQ"),
    "manual_ema_update": (False, "use accumulate()"),
}
# Other quantizers there, and what to do with each.
_OTHER_CLASSES = {
    "ResidualVQ": "load each level and pass them all to ResidualVectorQuantizer(stages=[...])",
    "GroupedResidualVQ": "load each level, and put one ResidualVectorQuantizer per group into a ProductQuantizer",
    "FSQ": "it has no codebook, so build te_quant.FSQ with its levels",
    "LFQ": "it has no codebook, so build te_quant.LFQ; reverse_bits converts indices",
}


def load_vector_quantize(
    source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    prefix: str = "",
    into: VectorQuantizer | None = None,
) -> VectorQuantizer:
    """Return a quantizer with the codebook and the statistics of a ``VectorQuantize`` of vector-quantize-pytorch.

    Its next steps are those of the original: the averages continue where they were. Weights do not say how a
    quantizer was set up (metric, decay, weights of the loss, layout): that is read from a module, or is that of
    ``into``. Where the codebook is learnt, ``loss`` has two terms with the gradients of the one there, so that its
    value is twice as large.

    Args:
        source: a ``VectorQuantize``, a module that contains one under ``prefix``, a state dict, or the path of a
            file: safetensors, or a pickle of tensors, also with ``"state_dict"`` in between.
        prefix: of the names of its tensors: ``"vq."`` for ``"vq._codebook.embed"``; each level of a ``ResidualVQ``
            has its own, ``"layers.0."``.
        into: a new quantizer with your settings, which is filled and returned. None builds one with the settings
            of the module.

    Returns:
        The quantizer, in training mode if the module was.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the source is none of these, or holds no module at ``prefix`` and ``into`` is None.
        ValueError: a tensor is missing, unexpected or of another shape; there are several codebooks, or no k-means
            start has happened yet; or a setting has no equivalent. The message names the cure where there is one.
        ImportError: safetensors is not installed and the file needs it.

    Example:
        >>> from te_quant import VectorQuantizer
        >>> state = {
        ...     "vq._codebook.initted": torch.tensor(True),
        ...     "vq._codebook.cluster_size": torch.full((1, 16), 8.0),
        ...     "vq._codebook.embed_avg": torch.ones(1, 16, 4),
        ...     "vq._codebook.embed": torch.full((1, 16, 4), 1 / 8),
        ... }
        >>> mine = VectorQuantizer(16, 4, decay=0.8, channel_dim=-1, revival_threshold=0.0)
        >>> load_vector_quantize(state, prefix="vq.", into=mine).codebook[0]
        tensor([0.1250, 0.1250, 0.1250, 0.1250])
    """
    require_type("prefix", prefix, str, "a str")
    if into is not None:
        require_type("into", into, VectorQuantizer, "a te_quant.VectorQuantizer, or None")
    tensors = _tensors_under(prefix, tensors_of(source), _class_at(source, prefix))
    books, codes, size = tensors[f"{_BOOK}embed"].shape
    cure = "load each with a state dict of its own, and put them into a ProductQuantizer"
    require(books == 1, f"{prefix}{_BOOK}embed axis 0", "1, one codebook", f"{books}; {cure}")
    started = bool(tensors[f"{_BOOK}initted"].all())
    require(started, f"{prefix}{_BOOK}initted", "True, after the k-means start", "False")
    if into is None:
        module = _module_at(source, prefix)
        with tensors[f"{_BOOK}embed"].device:
            quantizer = VectorQuantizer(codes, size, **_settings(module, tensors)).train(module.training)
    else:
        quantizer = into
        for name, own, found in (("num_codes", into.num_codes, codes), ("code_dim", into.code_dim, size)):
            require(own == found, f"into.{name}", f"{found} as the codebook", own)
    state = {"codebook": tensors[f"{_BOOK}embed"][0], "usage": tensors[f"{_BOOK}cluster_size"][0]}
    if quantizer.codebook_update == "ema":
        state["code_sums"] = tensors[f"{_BOOK}embed_avg"][0]
    # What is not said follows from these: nothing is pending.
    quantizer.load_state_dict(state)
    if into is None and module.freeze_codebook:
        quantizer.freeze()
    return quantizer


def reverse_bits(indices: Tensor, bits: int) -> Tensor:
    """Return indices with their lowest ``bits`` binary digits in reverse order; applied twice, it changes nothing.

    ``LFQ`` of vector-quantize-pytorch reads the first channel as the highest digit, :class:`te_quant.LFQ` as the
    lowest. So ``te_quant.LFQ(C).decode(reverse_bits(theirs, C))`` are their codes.

    Args:
        indices: integers in [0, 2^bits), of any shape.
        bits: C, at least 1 and at most 62.

    Returns:
        int64, of the same shape.

    Raises:
        ValueError: an index or ``bits`` is out of range.
        TypeError: the indices are not integers.

    Example:
        >>> reverse_bits(torch.tensor([1, 2, 6]), 3)
        tensor([4, 2, 3])
    """
    bits = require_int("bits", bits, 1, 62)
    require_integer_tensor("indices", indices)
    left = require_in_range("indices", indices.long(), 1 << bits, "2^bits")
    result = torch.zeros_like(left)
    for _ in range(bits):
        result, left = result << 1 | left & 1, left >> 1
    return result


def _class_at(source: object, prefix: str) -> str:
    """The name of the class of the module at ``prefix``; empty for anything but a module."""
    modules = dict(source.named_modules()) if isinstance(source, nn.Module) else {}
    return type(modules[prefix.rstrip(".")]).__name__ if prefix.rstrip(".") in modules else ""


def _tensors_under(prefix: str, tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The four tensors of a codebook without ``prefix``; the names of all others are refused.

    ``kind`` is the class that they come from, where that is known.
    """
    under = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if f"{_BOOK}embed" not in under:
        known = [name.removesuffix(f"{_BOOK}embed") for name in tensors if name.endswith(f"{_BOOK}embed")]
        if not known and kind not in _OTHER_CLASSES:
            given = kind or (some(list(tensors)) if tensors else "no tensors")
            require(False, "source", f"one that holds a VectorQuantize, with a tensor '...{_BOOK}embed'", given)
        expected = "one of " + some(known) if known else "that of a VectorQuantize"
        # Without a module, names tell the classes that hold several codebooks.
        inside = {"ResidualVQ": "layers.0.", "GroupedResidualVQ": "rvqs.0.layers.0."}
        kind = next((name for name, first in inside.items() if f"{prefix}{first}" in known), kind)
        told = f" ({kind}); {_OTHER_CLASSES[kind]}" if kind in _OTHER_CLASSES else ""
        require(False, "prefix", expected, f"{prefix!r}{told}")
    projections = [name for name in under if name.startswith(("project_in", "project_out"))]
    cure = "load the codebook from a state dict without them, and apply them around the quantizer"
    require(not projections, "source", "without projections", f"{some(projections)}; {cure}")
    require_names("source", under, _NAMES)
    embed = under[f"{_BOOK}embed"]
    require(embed.ndim == 3, f"{prefix}{_BOOK}embed", "of shape (1, K, C)", f"shape {tuple(embed.shape)}")
    for name, shape in (("cluster_size", embed.shape[:2]), ("embed_avg", embed.shape)):
        found = under[f"{_BOOK}{name}"].shape
        require(found == shape, f"{prefix}{_BOOK}{name}", f"of shape {tuple(shape)}", f"shape {tuple(found)}")
    return under


def _module_at(source: object, prefix: str) -> nn.Module:
    if not isinstance(source, nn.Module):
        kind = type(source).__name__
        raise TypeError(f"into must be a VectorQuantizer for a {kind}, which has no settings, got None.")
    return source.get_submodule(prefix.rstrip("."))


def _settings(module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of a VectorQuantizer that does what ``module`` does."""
    book = module._codebook
    for owner, unsupported in ((module, _UNSUPPORTED), (book, _UNSUPPORTED_OF_CODEBOOK)):
        for name, (wanted, cure) in unsupported.items():
            # A setting that this version does not have yet has no effect either.
            value = getattr(owner, name, wanted)
            require(value == wanted, name, repr(wanted), f"{value!r}; {cure}")
    follows = not book.ema_update
    penalty = float(module.orthogonal_reg_weight)
    undone = penalty > 0 and not follows
    cure = "pass into=, whose penalty lasts"
    require(not undone, "orthogonal_reg_weight", "0 under ema_update, which undoes it", f"{penalty}; {cure}")
    learnt = bool(book.learnable_codebook)
    require(learnt == follows, "learnable_codebook", f"{follows} with ema_update={not follows}", learnt)
    weight = float(module.commitment_weight) if module.has_commitment_loss else 0.0
    options: dict[str, Any] = {
        "metric": "cosine" if module.use_cosine_sim else "l2",
        "codebook_update": "gradient" if follows else "ema",
        "commitment_weight": weight,
        "orthogonal_reg": penalty,
        "orthogonal_active_only": module.orthogonal_reg_active_codes_only,
        "orthogonal_max_codes": module.orthogonal_reg_max_codes,
        "gradient_estimator": "rotation_trick" if module.rotation_trick else "straight_through",
        "decay": book.decay,
        "revival_threshold": 0.0 if follows else _revival_threshold(book, tensors),
        "channel_dim": -1 if module.channel_last and not _is_map(module) else 1,
    }
    if not follows:
        cure = "pass into=, whose averages go on with that number"
        require(book.eps == EPSILON, "eps", f"{EPSILON:g}", f"{book.eps:g}; {cure}")
    else:
        options["codebook_weight"] = weight if module.learnable_codebook else 0.0
    sampler = book.gumbel_sample.keywords
    require(not sampler["straight_through"], "straight_through", "False", "True; train with another estimator")
    if sampler["stochastic"]:
        cure = "its softmax is over distances, not squared ones; pass into= with a temperature of your choice"
        squared = module.use_cosine_sim
        require(squared, "stochastic_sample_codes", "False without use_cosine_sim", f"True; {cure}")
        options["temperature"] = float(book.sample_codebook_temp)
    return options


def _is_map(module: Any) -> bool:
    return bool(module.accept_image_fmap or module.accept_3d_fmap)


def _revival_threshold(book: Any, tensors: Mapping[str, Tensor]) -> float:
    """Their threshold, a number of latents, as a fraction of the average usage."""
    threshold = float(book.threshold_ema_dead_code)
    mean = float(tensors[f"{_BOOK}cluster_size"].mean())
    cure = "pass into= with a revival_threshold of your choice"
    expected = f"below the average usage of a code, {mean:g}"
    require(threshold < mean, "threshold_ema_dead_code", expected, f"{threshold:g}; {cure}")
    return threshold / mean
