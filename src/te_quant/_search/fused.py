"""The search on a GPU in one kernel: scores live in registers, and neither they nor their minima reach memory.

Shape letters: N latent vectors, C code size, K codes, S parts into which the codes are split.

The arithmetic is that of :mod:`te_quant._search.tiled`: latents and codes are shifted to the middle of the codes,
and a later code is taken only where it is strictly nearer. One difference has no consequence: a score that is NaN,
which only latents that are not finite have, never wins. A latent with no other scores gets code 0.

No GPU has measured it yet. Three choices come from the compiler's report (``python -m benchmarks.gpu.compiled``):

- the lowest score of a tile is found first and its index afterwards, in half of the instructions that finding
  both together takes;
- codes beyond K have an infinite norm, so no score is masked;
- with tensor cores, short latents stay in registers while all codes pass. Without them that would spill.

Triton is imported with this module, so it is imported where it is used.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from te_quant._search import tiles

__all__ = ["Tiling", "fused_argmin", "kernel_of", "tiling_for"]


class Tiling(NamedTuple):
    """How one program of the kernel works.

    Attributes:
        precision: of the products. ``"ieee"`` is float32, ``"tf32"`` and ``"bf16"`` round the factors, and
            ``"tf32x3"`` makes up for the rounding with three products, nearly to float32.
        rows: latents per program.
        codes: codes per tile; a program holds (rows, codes) scores.
        channels: channels per product, a power of two, at least 16.
        warps: 32 threads each.
        stages: tiles in flight between memory and registers.
    """

    precision: str
    rows: int
    codes: int
    channels: int
    warps: int
    stages: int

    def keeps_latents(self, size: int) -> bool:
        """Say whether latents of ``size`` channels are loaded only once."""
        return size <= self.channels


# Without tensor cores a thread does best with 64 scores of its own, and more channels at once would spill.
_FLOAT32 = Tiling("ieee", 128, 128, 16, 8, 3)
# All fit into the 99 KiB of shared memory that the smallest GPUs with tensor cores for float32 give to a program.
_SHORT = {"tf32": Tiling("tf32", 128, 128, 64, 8, 2), "bf16": Tiling("bf16", 128, 128, 64, 8, 3)}
_LONG = {"tf32": Tiling("tf32", 128, 128, 32, 8, 3), "bf16": Tiling("bf16", 128, 128, 64, 8, 2)}
# So many latents or fewer fill only half of those rows.
_FEW_ROWS = 64
_MIN_CHANNELS = 16
# A multiprocessor should have so many programs, or codes are split; a part has at least so many tiles of codes.
_PROGRAMS, _MIN_TILES = 4, 2
# Compute capability from which on float32 products may be taken by tensor cores.
_TENSOR_CORES = (8, 0)
_NO_CODE = tl.constexpr(2**31 - 1)


# No annotations: Triton reads them as its own.
@triton.jit
def _load_latents(latents, center, rows, channels, N, C):  # type: ignore[no-untyped-def]
    inside = channels < C
    there = (rows < N)[:, None] & inside[None, :]
    middle = tl.load(center + channels, inside, 0.0)
    return tl.load(latents + rows[:, None] * C + channels[None, :], there, 0.0) - middle[None, :]


@triton.jit
def _load_codes(codes, columns, channels, K, C):  # type: ignore[no-untyped-def]
    there = (channels < C)[:, None] & (columns < K)[None, :]
    return tl.load(codes + columns[None, :].to(tl.int64) * C + channels[:, None], there, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(left, right, products, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    if PRECISION == "bf16":
        products = tl.dot(left.to(tl.bfloat16), right, products)
    else:
        products = tl.dot(left, right, products, input_precision=PRECISION)
    return products


# N, K and the length of a part only bound loops and masks: one machine code serves all of them.
@triton.jit(do_not_specialize=["N", "K", "part"])  # type: ignore[untyped-decorator]
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
    KEEP_LATENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Rows are counted in 64 bits: N · C may be more than 2^31.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * part
    lowest = tl.full((ROWS,), float("inf"), tl.float32)
    nearest = tl.zeros((ROWS,), tl.int32)
    channels = tl.arange(0, CHANNELS)
    if KEEP_LATENTS:
        left = _load_latents(latents, center, rows, channels, N, C)
    for start in range(first, min(first + part, K), CODES):
        columns = start + tl.arange(0, CODES)
        products = tl.zeros((ROWS, CODES), tl.float32)
        if KEEP_LATENTS:
            products = _multiply(left, _load_codes(codes, columns, channels, K, C), products, PRECISION)
        else:
            for channel in range(0, C, CHANNELS):
                some = _load_latents(latents, center, rows, channel + channels, N, C)
                right = _load_codes(codes, columns, channel + channels, K, C)
                products = _multiply(some, right, products, PRECISION)
        distances = tl.load(half_norms + columns, columns < K, float("inf"))[None, :] - products
        value = tl.min(distances, 1)
        place = tl.min(tl.where(distances == value[:, None], columns[None, :], _NO_CODE), 1)
        better = value < lowest
        lowest = tl.where(better, value, lowest)
        nearest = tl.where(better, place, nearest)
    target = tl.program_id(1).to(tl.int64) * N + rows
    tl.store(scores + target, lowest, rows < N)
    tl.store(indices + target, nearest.to(tl.int64), rows < N)


def tiling_for(precision: str, rows: int, size: int) -> Tiling:
    """Return the tiling for ``rows`` latents of ``size`` channels."""
    if precision == "ieee":
        tiling = _FLOAT32
    else:
        tiling = _SHORT[precision]
        if size > tiling.channels:
            tiling = _LONG[precision]
        else:
            tiling = tiling._replace(channels=max(_MIN_CHANNELS, triton.next_power_of_2(size)))
    if rows <= _FEW_ROWS:
        tiling = tiling._replace(rows=tiling.rows // 2, warps=tiling.warps // 2)
    return tiling


def kernel_of(tiling: Tiling, size: int) -> tuple[triton.JITFunction, dict[str, object], dict[str, object]]:
    """Return the kernel, its constants and its compiler options, for latents of ``size`` channels."""
    constants = {
        "ROWS": tiling.rows,
        "CODES": tiling.codes,
        "CHANNELS": tiling.channels,
        "KEEP_LATENTS": tiling.keeps_latents(size),
        "PRECISION": tiling.precision,
    }
    # Said because Triton 3.9 warns that its default will change.
    options: dict[str, object] = {"num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": True}
    return _nearest, constants, options


def fused_argmin(
    latents: Tensor,
    codebook: Tensor,
    center: Tensor,
    multiprocessors: int | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Return the index of the code nearest to each row.

    Args:
        latents: (N, C) float32.
        codebook: (K, C) float32.
        center: (C,), any point amid the codes.
        multiprocessors: how many the device has; read from the device if ``None``.
        tiling: ``None`` is :func:`tiling_for` the precision that torch's own product would use.

    Returns:
        (N,) int64.
    """
    (rows, size), codes = latents.shape, codebook.shape[0]
    indices = torch.empty(rows, dtype=torch.int64, device=latents.device)
    if rows == 0:
        return indices
    if tiling is None:
        tiling = tiling_for(_precision(latents.device), rows, size)
    # A difference keeps the strides of what it is made of.
    centered = (codebook - center).contiguous()
    if tiling.precision == "bf16":
        # The norms are those of the rounded codes, so scores are distances between rounded points: what rounding
        # changes then shrinks with the distance.
        centered = centered.to(torch.bfloat16).float()
    factors, half_norms = tiles.factors_of(centered)
    if tiling.precision == "bf16":
        factors = factors.to(torch.bfloat16)
    if multiprocessors is None:
        multiprocessors = torch.cuda.get_device_properties(latents.device).multi_processor_count
    blocks, code_tiles = triton.cdiv(rows, tiling.rows), triton.cdiv(codes, tiling.codes)
    wanted = triton.cdiv(_PROGRAMS * multiprocessors, blocks)
    tiles_a_part = triton.cdiv(code_tiles, max(1, min(wanted, code_tiles // _MIN_TILES)))
    parts = triton.cdiv(code_tiles, tiles_a_part)
    lowest = latents.new_empty(parts, rows)
    nearest = indices if parts == 1 else indices.new_empty(parts, rows)
    kernel, constants, options = kernel_of(tiling, size)
    # Triton launches on the current device, whatever device its arguments are on.
    on_device = torch.cuda.device(latents.device) if latents.is_cuda else nullcontext()
    with on_device:
        kernel[(blocks, parts)](
            latents.contiguous(),
            factors,
            half_norms,
            center.contiguous(),
            lowest,
            nearest,
            rows,
            codes,
            size,
            tiles_a_part * tiling.codes,
            **constants,
            **options,
        )
    if parts > 1:
        # The first of the lowest parts, which has the lower codes.
        torch.gather(nearest, 0, lowest.min(0, keepdim=True).indices, out=indices.unsqueeze(0))
    return indices


def _precision(device: torch.device) -> str:
    """Return the precision that torch was asked to multiply float32 matrices with on ``device``."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _TENSOR_CORES:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    try:
        # torch.set_float32_matmul_precision: "high" asks for TF32, "medium" for bfloat16.
        return "bf16" if torch.get_float32_matmul_precision() == "medium" else "tf32"
    except RuntimeError:
        # torch refuses to answer where backends were set apart from each other.
        return "tf32"
