"""The nearest code by faiss, on a CPU where faiss is installed.

Shape letters: N latent vectors, C code size, K codes.

For short codes faiss keeps scores in registers, while a matrix product of torch writes them and a minimum reads
them again. For long codes it multiplies by blocks that stay in cache, and reads each score once. Four things about
it are no concern of the caller:

- It adds ‖z‖² to the scores: for long codes to all of them, for short ones to the best before the last comparison.
  So it rounds more coarsely where latents lie much farther from the middle of the codes than the codes do. Such
  rows, and those that are not finite, are searched again by torch. So are all rows where squares leave the range
  of float32.
- Equal codes may be rounded in different ways. Among short ones these are the codes that are left over from whole
  vectors, so the codes are filled up with copies of the first one, and then it takes the first of equal codes.
  Indices of long codes are sent to the first code that is equal.
- For small N·C it takes a slower path. The global variable that says how small is zero while a search runs.
- It gets torch's number of threads. Imported after torch it takes torch's OpenMP runtime, whose symbols are there
  already; imported before, it has its own.

It rounds in another way than torch does, so near-ties may go to another code. faiss is imported by the first
search that it suits.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from te_quant._search import tiles
from te_quant._search.ties import first_of_equal_codes

__all__ = ["faiss_argmin", "faiss_suits"]

# The version that was measured, and the longest codes that it keeps in registers, by its vector instructions.
_VERSION = (1, 15)
_LONGEST_SHORT = {"AVX512": 32, "AVX2": 16}
# Those with which it is faster than torch at longer codes too.
_FOR_LONG = ("AVX512",)
# Time / that of torch, N x K x C, medians of interleaved calls on two cores with AVX-512. Two threads: 0.27 at
# 1,000 x 1,024 x 8, 0.31 at 8,192 x 16,384 x 8, 0.27 at 262,144 x 256 x 8, 0.10 at 10,000 x 65,536 x 4, 0.42 at
# 4,096 x 1,024 x 16, 0.63 at 16,384 x 8,192 x 32, 0.78 at 65,536 x 1,024 x 32, 0.91 at 64 x 4,096 x 16. The same
# between products of torch, whose threads are still busy waiting: 0.18 to 0.75. One thread, AVX2: 0.11 to 0.84.
# Long codes: 0.69 at 1,000 x 1,024 x 64, 0.82 at 16,384 x 1,024 x 256, 0.72 at 250,000 x 256 x 256, 0.86 at
# 6,000 x 65,536 x 128, 0.84 at 65,536 x 1,024 x 512; between products of torch 0.65 to 0.96, one thread 0.58 to
# 0.84.
# Where calls weigh more than scores: 1.2 at 4,096 x 16 x 8, 1.3 at 65,536 x 8 x 8, 1.4 at 64 x 64 x 8.
_MIN_ROWS, _MIN_CODES, _MIN_SCORES = 64, 64, 1 << 18
# A whole number of vectors of codes.
_UNIT = 16
# Numbers in the rows of one call where latents are shifted, so that their copy stays small.
_BATCH = 1 << 20
# Latents farther from the middle than this many times the distance of most codes are searched by torch. Of so many
# rows most must be nearer, or torch searches them all.
_FAR, _FAR_FROM_LONG = 64.0, 8.0
_SAMPLED = 64

_guard = threading.Lock()
_thresholds: list[int] = []


def faiss_suits(latents: Tensor, codebook: Tensor, dot: bool) -> bool:
    """Say whether faiss is installed and faster than torch at this search."""
    (rows, size), codes = latents.shape, codebook.shape[0]
    if dot or latents.device.type != "cpu" or latents.dtype != torch.float32:
        return False
    # With fewer rows than threads it shares out the codes, and equal codes then differ in their scores.
    if codes < _MIN_CODES or rows < max(_MIN_ROWS, torch.get_num_threads()) or rows * codes < _MIN_SCORES:
        return False
    long = size > max(_LONGEST_SHORT.values())
    # Asked of torch first, so that faiss is not imported where it does not suit.
    if size == 0 or (long and not torch.backends.cpu.get_cpu_capability().startswith(_FOR_LONG)):
        return False
    return size <= _longest_short() or _level().startswith(_FOR_LONG)


def faiss_argmin(latents: Tensor, codebook: Tensor, by_torch: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the index of the nearest code for each row, the lowest one of equal codes.

    Args:
        latents: z.
        codebook: e.
        by_torch: the same search, for rows in which faiss rounds too coarsely.

    Shape:
        latents: (N, C) float32. codebook: (K, C). Returns (N,) int64.
    """
    size = latents.shape[1]
    long = size > _longest_short()
    center = tiles.center_of(codebook)
    typical = tiles.typical_square(codebook, center)
    limit = (_FAR_FROM_LONG if long else _FAR) ** 2 * typical
    lowest, highest = codebook.aminmax()
    longest = size * (2 * max(-float(lowest), float(highest))) ** 2
    sampled = (latents[:: max(1, len(latents) // _SAMPLED)] - center).square().sum(1)
    few_near = 2 * int((sampled <= limit).sum()) < len(sampled)
    # NaN is in no range.
    if not (typical >= tiles.SHORT and longest <= tiles.LONG) or few_near:
        return by_torch(latents, codebook)
    # Where codes lie around zero a shift gains at most a bit, and it is a pass over all latents.
    shifted = float(center.square().sum()) > typical
    table = codebook - center if shifted else codebook
    if len(table) % _UNIT and not long:
        table = torch.cat([table, table[:1].expand(-len(table) % _UNIT, size)])
    found = []
    with _prepared() as faiss:
        # In equal parts: with fewer rows than threads equal codes differ.
        for rows in latents.tensor_split(-(-len(latents) // max(1, _BATCH // size)) if shifted else 1):
            seen = rows - center if shifted else rows
            distances, nearest = faiss.knn(seen.numpy(), table.numpy(), 1)
            # faiss reports the largest float for a row without a distance.
            if distances.max() > limit:
                far = distances[:, 0] > limit
                nearest[far, 0] = by_torch(rows[torch.from_numpy(far)], codebook).numpy()
            found.append(torch.from_numpy(nearest[:, 0]))
    indices = torch.cat(found) if len(found) > 1 else found[0]
    return first_of_equal_codes(indices, codebook) if long else indices


@cache
def _load() -> Any:
    """Return the module; None where it is not installed, older than what was measured, or not on Linux.

    On macOS the OpenMP runtimes of torch and faiss are known to abort a process that loads both.
    """
    if sys.platform != "linux":
        return None
    with warnings.catch_warnings():
        # From Python 3.12 on the types of its wrapper warn.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import faiss
        except ImportError:
            return None
    return faiss if (faiss.FAISS_VERSION_MAJOR, faiss.FAISS_VERSION_MINOR) >= _VERSION else None


def _longest_short() -> int:
    level = _level()
    return next((size for name, size in _LONGEST_SHORT.items() if level.startswith(name)), 0)


def _level() -> str:
    """Return the vector instructions that faiss uses, "" without faiss."""
    faiss = _load()
    # Asked for each time, since it may be set.
    return "" if faiss is None else str(faiss.SIMDConfig.get_level_name())


@contextmanager
def _prepared() -> Iterator[Any]:
    """Give faiss torch's number of threads and its fast path for any number of rows; then put all back."""
    faiss = _load()
    # First, since torch sets it in a thread when it is asked for the first time, and both may share a runtime.
    wanted = torch.get_num_threads()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(wanted)
    # Of several threads that search at once the last one puts the threshold back.
    with _guard:
        _thresholds.append(faiss.cvar.distance_compute_blas_threshold)
        faiss.cvar.distance_compute_blas_threshold = 0
    try:
        yield faiss
    finally:
        with _guard:
            first = _thresholds[0]
            _thresholds.pop()
            if not _thresholds:
                faiss.cvar.distance_compute_blas_threshold = first
        faiss.omp_set_num_threads(threads)
