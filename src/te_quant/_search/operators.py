"""The searches as dispatcher operators, and the choice among them.

Shape letters: N latent vectors, C code size, K codes.

argmin_k ‖z - e_k‖² = argmin_k ½‖e_k‖² - z·e_k, so the work is one matrix product, taken a tile at a time into
one reused buffer that stays in cache: no N x K tensor is ever held. Two details make it exact where the plain
expanded form is not:

- latents and codes are first shifted to the middle of the codes (:func:`te_quant._search.tiles.center_of`), which
  changes no distance but keeps the two terms small; without it float32 picks more than half of the codes wrongly
  at an offset of 1,000;
- ties go to the lowest index, also between equal codes (:mod:`te_quant._search.ties`).

The code of the largest product z·e is found in the same way without the norms: the codes are shifted too, which
changes the products of a latent with all codes by the same number, but the latents are not.

A CPU searches by faiss (:mod:`te_quant._search.by_faiss`) where that is installed, faster, and allowed by
:data:`ENGINE`, and else by groups of codes (:mod:`te_quant._search.grouped`) unless one tile holds all scores. An
accelerator minimizes whole tiles (:mod:`te_quant._search.tiled`), or does everything in one kernel where
:data:`ENGINE` asks for it (:mod:`te_quant._search.fused`).

A compiled graph holds one opaque node whatever N is. An exported graph, and a function transform, compute all
N x K scores at once (:mod:`te_quant._search.plain`).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from te_quant._execution import wants_plain
from te_quant._search import tiles
from te_quant._search.by_faiss import faiss_argmin, faiss_suits
from te_quant._search.grouped import grouped_argmin
from te_quant._search.plain import plain_search
from te_quant._search.ties import first_of_equal_codes
from te_quant._search.tiled import tiled_argmin

__all__ = ["FUSED", "sample_codes", "search_codes"]

ENGINE = "TE_QUANT_SEARCH"
"""Set this variable to ``torch`` to search without faiss although it is installed, or to ``fused`` to run float32
searches on CUDA devices as one Triton kernel; ``auto`` or unset: faiss where it is faster, and no kernel."""

FUSED = "TE_QUANT_FUSED_SEARCH"
"""The older variable: 1 is what ``fused`` is for :data:`ENGINE`; 0 or unset leaves the choice to that."""

_ENGINES = ("auto", "torch", "fused")

_library = torch.library.Library("te_quant", "FRAGMENT")
_library.define(
    "search_codes(Tensor latents, Tensor codebook, bool dot=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sample_codes(Tensor latents, Tensor codebook, Tensor temperature, Generator? generator, bool dot=False)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)


def search_codes(latents: Tensor, codebook: Tensor, *, dot: bool = False) -> Tensor:
    """Return the index of the code nearest to each row of ``latents``: (N, C), (K, C) -> (N,) int64.

    With ``dot`` that of the largest product z·e; ties go to the lowest index too.
    """
    if wants_plain():
        return plain_search(latents.detach(), codebook.detach(), dot=dot)
    result: Tensor = torch.ops.te_quant.search_codes(latents.detach(), codebook.detach(), dot)
    return result


def sample_codes(
    latents: Tensor,
    codebook: Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
    *,
    dot: bool = False,
) -> Tensor:
    """Draw a code for each row with probability ∝ exp(-‖z - e‖² / (2 · temperature)): -> (N,) int64.

    With ``dot`` the probability is ∝ exp(z·e / temperature).
    """
    if wants_plain():
        return plain_search(latents.detach(), codebook.detach(), temperature, generator, dot)
    # A tensor, because a compiler would make another graph for every number given to an operator. On the CPU,
    # where reading it waits for no device.
    scale = torch.ones((), dtype=torch.float64, device="cpu") * temperature
    result: Tensor = torch.ops.te_quant.sample_codes(latents.detach(), codebook.detach(), scale, generator, dot)
    return result


def _search(latents: Tensor, codebook: Tensor, dot: bool = False) -> Tensor:
    engine = _engine()
    if _fused_wanted(latents.device.type, latents.dtype):
        # Triton is no dependency: CUDA builds of torch for Linux bring it along.
        try:
            from te_quant._search.fused import fused_argmin
        except ImportError as error:
            text = f"{ENGINE} must be auto or torch where triton cannot be imported, got fused"
            if engine != "fused":
                text = f"{FUSED} must be 0 or unset where triton cannot be imported, got 1"
            raise ImportError(f"{text}.") from error

        return first_of_equal_codes(fused_argmin(latents, codebook, tiles.center_of(codebook), dot=dot), codebook)
    if engine != "torch" and faiss_suits(latents, codebook, dot):
        return faiss_argmin(latents, codebook, _by_torch)
    return _by_torch(latents, codebook, dot)


def _by_torch(latents: Tensor, codebook: Tensor, dot: bool = False) -> Tensor:
    if latents.device.type == "cpu" and len(latents) * len(codebook) > tiles.CPU_TILE:
        return first_of_equal_codes(grouped_argmin(latents, codebook, dot), codebook)
    return first_of_equal_codes(tiled_argmin(latents, codebook, 0.0, None, dot), codebook)


def _engine() -> str:
    """Return what the variable asks for.

    Raises:
        ValueError: it is none of the engines.
    """
    wanted = os.environ.get(ENGINE, "auto")
    if wanted not in _ENGINES:
        raise ValueError(f"{ENGINE} must be auto, torch or fused, got {wanted!r}.")
    return wanted


def _fused_wanted(device: str, dtype: torch.dtype) -> bool:
    """Say whether one kernel does it.

    Raises:
        ValueError: the older variable is neither 0 nor 1, or contradicts the newer one.
    """
    if device != "cuda":
        return False
    engine, wanted = _engine(), os.environ.get(FUSED, "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"{FUSED} must be 0 or 1, got {wanted!r}.")
    if engine == "torch" and wanted == "1":
        raise ValueError(f"{FUSED} must be 0 or unset where {ENGINE} is torch, got 1.")
    return dtype == torch.float32 and (engine == "fused" or wanted == "1")


def _sample(
    latents: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    generator: torch.Generator | None,
    dot: bool = False,
) -> Tensor:
    return tiled_argmin(latents, codebook, float(temperature), generator, dot)


def _indices_like(latents: Tensor, codebook: Tensor, *_: object) -> Tensor:  # noqa: ARG001
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


_library.impl("search_codes", _search, "CompositeExplicitAutograd")
_library.impl("sample_codes", _sample, "CompositeExplicitAutograd")
torch.library.register_fake("te_quant::search_codes", _indices_like, lib=_library)
torch.library.register_fake("te_quant::sample_codes", _indices_like, lib=_library)
