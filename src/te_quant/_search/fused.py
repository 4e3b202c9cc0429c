"""The search on a GPU in one kernel: scores live in registers, and neither they nor their minima reach memory.

Shape letters: N latent vectors, C code size, K codes, S parts into which the codes are split.

The same arithmetic as :mod:`te_quant._search` (latents and codes are shifted to the middle of the codes, a later
code is taken only where it is strictly nearer), with one difference of no consequence: of scores that are not
numbers, which infinite latents have, the first counts as the lowest.

Triton is imported with this module, so it is imported where it is used.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fused_argmin"]


class _Tiles(NamedTuple):
    """One program holds (rows, codes) scores, takes ``channels`` channels at a time, and runs ``warps`` warps."""

    rows: int
    codes: int
    channels: int
    warps: int


# Without tensor cores a thread does best with 64 scores of its own; their operands are wider.
_TILES = {"ieee": _Tiles(128, 128, 16, 8), "tf32": _Tiles(128, 128, 32, 8)}
_STAGES = 3
# A multiprocessor should have so many programs, or codes are split; a part has at least so many tiles of codes.
_PROGRAMS, _MIN_TILES = 4, 4
# Compute capability from which on float32 products may be taken by tensor cores.
_TENSOR_CORES = (8, 0)


# No annotations: Triton reads them as its own.
@triton.jit  # type: ignore[untyped-decorator]
def _nearest(  # type: ignore[no-untyped-def]
    latents,
    codes,
    half_norms,
    center,
    scores,
    indices,
    N,
    K,
    C,
    part,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Rows are counted in 64 bits: N · C may be more than 2^31.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * part
    lowest = tl.full((ROWS,), float("inf"), tl.float32)
    nearest = tl.zeros((ROWS,), tl.int32)
    for start in range(first, min(first + part, K), CODES):
        columns = start + tl.arange(0, CODES)
        products = tl.zeros((ROWS, CODES), tl.float32)
        for channel in range(0, C, CHANNELS):
            channels = channel + tl.arange(0, CHANNELS)
            inside = channels < C
            middle = tl.load(center + channels, inside, 0.0)
            there = (rows < N)[:, None] & inside[None, :]
            left = tl.load(latents + rows[:, None] * C + channels[None, :], there, 0.0) - middle[None, :]
            there = inside[:, None] & (columns < K)[None, :]
            right = tl.load(codes + columns[None, :].to(tl.int64) * C + channels[:, None], there, 0.0)
            products = tl.dot(left, right, products, input_precision=PRECISION)
        distances = tl.load(half_norms + columns, columns < K, 0.0)[None, :] - products
        distances = tl.where(distances == distances, distances, float("-inf"))
        distances = tl.where((columns < K)[None, :], distances, float("inf"))
        value, place = tl.min(distances, 1, return_indices=True, return_indices_tie_break_left=True)
        better = value < lowest
        lowest = tl.where(better, value, lowest)
        nearest = tl.where(better, start + place, nearest)
    target = tl.program_id(1).to(tl.int64) * N + rows
    tl.store(scores + target, lowest, rows < N)
    tl.store(indices + target, nearest.to(tl.int64), rows < N)


def fused_argmin(latents: Tensor, codebook: Tensor, center: Tensor, multiprocessors: int | None = None) -> Tensor:
    """Return the index of the code nearest to each row.

    Args:
        latents: (N, C) float32.
        codebook: (K, C) float32.
        center: (C,), any point amid the codes.
        multiprocessors: how many the device has; read from the device if ``None``.

    Returns:
        (N,) int64.
    """
    (rows, size), codes = latents.shape, codebook.shape[0]
    indices = torch.empty(rows, dtype=torch.int64, device=latents.device)
    if rows == 0:
        return indices
    # A difference keeps the strides of what it is made of.
    centered = (codebook - center).contiguous()
    half_norms = centered.square().sum(1).mul_(0.5)
    precision = _precision(latents.device)
    tiles = _TILES[precision]
    if multiprocessors is None:
        multiprocessors = torch.cuda.get_device_properties(latents.device).multi_processor_count
    blocks, code_tiles = triton.cdiv(rows, tiles.rows), triton.cdiv(codes, tiles.codes)
    wanted = triton.cdiv(_PROGRAMS * multiprocessors, blocks)
    tiles_a_part = triton.cdiv(code_tiles, max(1, min(wanted, code_tiles // _MIN_TILES)))
    parts = triton.cdiv(code_tiles, tiles_a_part)
    lowest = latents.new_empty(parts, rows)
    nearest = indices if parts == 1 else indices.new_empty(parts, rows)
    # Triton launches on the current device, whatever device its arguments are on.
    on_device = torch.cuda.device(latents.device) if latents.is_cuda else nullcontext()
    with on_device:
        _nearest[(blocks, parts)](
            latents.contiguous(),
            centered,
            half_norms,
            center.contiguous(),
            lowest,
            nearest,
            rows,
            codes,
            size,
            tiles_a_part * tiles.codes,
            ROWS=tiles.rows,
            CODES=tiles.codes,
            CHANNELS=tiles.channels,
            PRECISION=precision,
            num_warps=tiles.warps,
            num_stages=_STAGES,
        )
    if parts > 1:
        # The first of the lowest parts, which has the lower codes.
        torch.gather(nearest, 0, lowest.min(0, keepdim=True).indices, out=indices.unsqueeze(0))
    return indices


def _precision(device: torch.device) -> str:
    """Return the precision that torch's own product would use on ``device``."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _TENSOR_CORES:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
