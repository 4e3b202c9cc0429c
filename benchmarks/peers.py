"""Searches and quantizers of other libraries, and two plain ones of each, behind one interface.

Each is imported when it is asked for. All quantizers get the same codebook and latents and return the codes, their
indices and a loss. What they return beyond, or leave out, is theirs: vector-quantize-pytorch computes no loss in
evaluation and puts its commitment weight on both terms where the codebook takes gradients.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import OURS, Unavailable, optional_module
from benchmarks.problem import Problem, Size, require_memory
from benchmarks.threads import limited_module
from te_quant import VectorQuantizer

__all__ = [
    "BYTES_PER_PAIR",
    "EMA_REVIVAL",
    "MODES",
    "QUANTIZERS",
    "Adapter",
    "Search",
    "build_quantizer",
    "nearest_by_cdist",
    "nearest_by_faiss",
    "nearest_by_scikit_learn",
    "nearest_by_scipy",
    "nearest_expanded",
    "require_pairs",
]

MODES = ("eval", "gradient", "ema")
"""Forward in evaluation; forward and backward with the codebook by gradient, and by moving averages."""
EMA_REVIVAL = "ema, revival"
"""By moving averages, and unused codes are replaced where the version of this library does that."""

_BETA = 0.25
_DECAY = 0.99
_EPSILON = 1e-5

BYTES_PER_PAIR: dict[str, dict[str, int]] = {
    "cdist": {"search": 5, "eval": 5, "gradient": 5, "ema": 5},
    "scipy": {"search": 4},
    "expanded": {"search": 12, "eval": 12, "gradient": 12, "ema": 12},
    "diffusers": {"eval": 5, "gradient": 5, "ema": 5},
    "vector-quantize-pytorch": {"eval": 24, "gradient": 32, "ema": 32},
}
"""What each was measured to hold at once for each pair of a latent and a code: distances, one-hots."""


Search = Callable[[Tensor, Tensor], Tensor]
"""(N, C) latents and (K, C) codes to (N,) indices."""


class Adapter(NamedTuple):
    """A quantizer as it is measured.

    Attributes:
        module: for its mode and its gradients.
        forward: (N, C) latents to (N, C) quantized, (N,) indices and () loss.
        codebook: the tensor of codes, which may have a gradient.
    """

    module: nn.Module
    forward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    codebook: Tensor


def nearest_by_cdist(latents: Tensor, codebook: Tensor) -> Tensor:
    """The two-liner: all distances, then the smallest of each row."""
    return torch.cdist(latents, codebook).argmin(1)


def nearest_expanded(latents: Tensor, codebook: Tensor) -> Tensor:
    """‖z‖² - 2·z·e + ‖e‖², as taming-transformers and many after it write it."""
    squares = latents.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return (squares - 2 * latents @ codebook.T).argmin(1)


def nearest_by_faiss() -> Search:
    """The function of faiss for a search without an index; its wheels are named faiss-cpu."""
    library = limited_module("faiss", "faiss-cpu")
    return lambda latents, codebook: torch.from_numpy(library.knn(latents.numpy(), codebook.numpy(), 1)[1][:, 0])


def nearest_by_scikit_learn() -> Search:
    """``sklearn.metrics.pairwise_distances_argmin``."""
    nearest = limited_module("sklearn.metrics", "scikit-learn").pairwise_distances_argmin
    return lambda latents, codebook: torch.from_numpy(nearest(latents.numpy(), codebook.numpy()))


def nearest_by_scipy() -> Search:
    """``scipy.cluster.vq.vq``."""
    nearest = limited_module("scipy.cluster.vq", "scipy").vq
    return lambda latents, codebook: torch.from_numpy(nearest(latents.numpy(), codebook.numpy())[0])


class PlainQuantizer(nn.Module):
    """What one writes without a library: a search, a lookup, two losses, straight-through, moving averages."""

    usage: Tensor
    sums: Tensor

    def __init__(self, codebook: Tensor, search: Callable[[Tensor, Tensor], Tensor], ema: bool) -> None:
        super().__init__()
        self.search = search
        self.ema = ema
        self.codebook = nn.Parameter(codebook.clone(), requires_grad=not ema)
        self.register_buffer("usage", torch.ones_like(codebook[:, 0]))
        self.register_buffer("sums", codebook.clone())

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize."""
        with torch.no_grad():
            indices = self.search(latents, self.codebook)
            if self.ema and self.training:
                self._update(latents, indices)
        codes = F.embedding(indices, self.codebook)
        loss = _BETA * F.mse_loss(latents, codes.detach())
        if not self.ema:
            loss = loss + F.mse_loss(codes, latents.detach())
        return latents + (codes - latents).detach(), indices, loss

    def _update(self, latents: Tensor, indices: Tensor) -> None:
        # Sums by index, not by a product with one-hots, which would be much slower.
        counts = torch.bincount(indices, minlength=len(self.usage)).to(self.usage.dtype)
        self.usage.lerp_(counts, 1 - _DECAY)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, indices, latents), 1 - _DECAY)
        total = self.usage.sum()
        smoothed = (self.usage + _EPSILON) / (total + len(self.usage) * _EPSILON) * total
        self.codebook.copy_(self.sums / smoothed.unsqueeze(1))


def _ours(codebook: Tensor, mode: str) -> Adapter:
    K, C = codebook.shape
    options: dict[str, Any] = {}
    # Versions that are compared with this one may know no revival.
    if mode != EMA_REVIVAL and "revival_threshold" in inspect.signature(VectorQuantizer).parameters:
        options["revival_threshold"] = 0.0
    by_averages = mode in ("ema", EMA_REVIVAL)
    module = VectorQuantizer(
        K,
        C,
        codebook_update="ema" if by_averages else "gradient",
        commitment_weight=_BETA,
        decay=_DECAY,
        channel_dim=-1,
        **options,
    ).to(codebook.device)
    module.codebook.data.copy_(codebook)
    if by_averages:
        module.code_sums.copy_(codebook)

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = module(latents)
        return output.quantized, output.indices, output.loss

    return Adapter(module, forward, module.codebook)


def _vector_quantize_pytorch(codebook: Tensor, mode: str) -> Adapter:
    library = optional_module("vector_quantize_pytorch", "vector-quantize-pytorch")
    K, C = codebook.shape
    gradient = mode == "gradient"
    module: Any = library.VectorQuantize(
        dim=C,
        codebook_size=K,
        decay=_DECAY,
        commitment_weight=_BETA,
        kmeans_init=False,
        accept_image_fmap=False,
        rotation_trick=False,
        learnable_codebook=gradient,
        ema_update=not gradient,
    ).to(codebook.device)
    inner = module._codebook
    inner.embed.data.copy_(codebook.unsqueeze(0))
    inner.embed_avg.data.copy_(codebook.unsqueeze(0))

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = module(latents.unsqueeze(0))
        return quantized.squeeze(0), indices.squeeze(0), loss

    return Adapter(module, forward, inner.embed)


def _diffusers(codebook: Tensor, mode: str) -> Adapter:
    if mode == "ema":
        raise Unavailable("skipped", "diffusers' VectorQuantizer has no moving averages")
    library = optional_module("diffusers.models.autoencoders.vae", "diffusers")
    K, C = codebook.shape
    module: Any = library.VectorQuantizer(K, C, beta=_BETA, legacy=False).to(codebook.device)
    module.embedding.weight.data.copy_(codebook)

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # It takes images; of these strides, so that its own permutation costs nothing.
        quantized, loss, (_, _, indices) = module(latents.view(1, -1, 1, C).permute(0, 3, 1, 2))
        return quantized.permute(0, 2, 3, 1).view(-1, C), indices, loss

    return Adapter(module, forward, module.embedding.weight)


def _plain(search: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, str], Adapter]:
    def build(codebook: Tensor, mode: str) -> Adapter:
        module = PlainQuantizer(codebook, search, mode == "ema")
        return Adapter(module, module, module.codebook)

    return build


QUANTIZERS: dict[str, Callable[[Tensor, str], Adapter]] = {
    OURS: _ours,
    "vector-quantize-pytorch": _vector_quantize_pytorch,
    "diffusers": _diffusers,
    "cdist": _plain(nearest_by_cdist),
    "expanded": _plain(nearest_expanded),
}
"""By name: (codebook, mode) to an adapter."""


def build_quantizer(name: str, mode: str, problem: Problem) -> Adapter:
    """The quantizer ``name`` with the problem's codebook, in training or evaluation as ``mode`` says.

    Raises:
        Unavailable: it is not installed, lacks the mode, or would not fit into memory.
    """
    require_pairs(name, mode, problem.size)
    adapter = QUANTIZERS[name](problem.codebook, mode)
    adapter.module.train(mode != "eval")
    return adapter


def require_pairs(name: str, mode: str, size: Size) -> None:
    """Refuse what would not fit into memory: see :func:`benchmarks.problem.require_memory`."""
    require_memory(size, BYTES_PER_PAIR.get(name, {}).get(mode, 0))
