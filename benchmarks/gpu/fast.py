"""How fast is it on this device, and how much memory does it take?

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import generation, quantizers, stage1
from benchmarks.contest import OURS, Cell, Contender, Context, Unavailable, compete, optional_module
from benchmarks.gpu import searches
from benchmarks.gpu.right import search_errors
from benchmarks.memory import measure_here
from benchmarks.peers import MODES
from benchmarks.problem import Problem, Size
from benchmarks.timing import Call, describe
from examples.te_vqgan.stage1.presets import PRESETS

__all__ = [
    "CDIST",
    "FLASH_KMEANS",
    "FUSED",
    "SIZES",
    "THREE_PRODUCTS",
    "TILED",
    "allowance",
    "cells",
    "product_name",
    "search_builders",
]

FUSED = "te_quant, one kernel"
TILED = "te_quant, tiles"
THREE_PRODUCTS = f"{FUSED} (3 x TF32)"
KERNEL = "the kernel, without the look for equal codes"
CDIST = "cdist and argmin"
FLASH_KMEANS = "flash-kmeans (TF32)"

SIZES: dict[str, tuple[Size, ...]] = {
    "quick": (Size(64, 32, 8), Size(96, 128, 64)),
    # The cheap ones first; all of one C have the same kernel.
    "full": tuple(
        sorted(
            (Size(*size) for size in product((16384, 262144), (1024, 8192, 65536), (8, 32, 64, 256))),
            key=lambda size: size.N * size.K * size.C,
        )
    ),
}
"""By grid."""

# Scores that a product or a distance matrix may hold at once; larger ones are made in parts, as a user would.
_SCORES = 1 << 30
# Products of fewer channels are more than flash-kmeans takes.
_MIN_CHANNELS = 16
_NAMES = (OURS, "vector-quantize-pytorch", "cdist")
_FLOAT, _MIB = 4, 2**20


def cells(context: Context) -> list[Cell]:
    """Searches first, then one of everything, then what remains."""
    sizes = SIZES[context.grid]
    steps = {mode.name: mode for mode in stage1.MODES if not mode.channels_last}
    eager = [name for name, mode in steps.items() if not mode.compiled]
    compiled = [name for name, mode in steps.items() if mode.compiled] if context.grid == "full" else []
    of_stage1 = [_stage1_cell(steps[name]) for name in (*eager, *reversed(compiled))]
    of_quantizers = {
        mode: [
            Cell(f"fast/{mode}-{size.label}", {"mode": mode, **size._asdict()}, partial(_quantizer, mode, size))
            for size in sizes
        ]
        for mode in MODES
    }
    batches = (2, 64) if context.grid == "full" else (2,)
    return [
        *(Cell(f"fast/search-{size.label}", size._asdict(), partial(_search, size)) for size in sizes),
        *of_stage1[:2],
        *(Cell(f"fast/generation-B{batch}", {"B": batch}, partial(_generation, batch)) for batch in batches),
        *of_quantizers["eval"],
        *of_quantizers["gradient"],
        *of_stage1[2:3],
        *of_quantizers["ema"],
        *of_stage1[3:],
    ]


def product_name(precision: str) -> str:
    """The contender that only multiplies, in a precision of :data:`benchmarks.gpu.searches.PRECISIONS`."""
    return f"product {precision}"


def allowance(size: Size) -> int:
    """Bytes that may be needed beyond input and output: a few copies of latents and codes, never N x K."""
    return 64 * _MIB + 8 * _FLOAT * size.C * (size.N + size.K)


# Searches


def search_builders(problem: Problem) -> dict[str, Callable[[], Contender]]:
    """Everything that searches or multiplies, by name."""
    builders: dict[str, Callable[[], Contender]] = {
        FUSED: partial(_searching, searches.fused, problem, "float32"),
        TILED: partial(_searching, searches.tiled, problem, "float32"),
        KERNEL: partial(_searching, searches.kernel_alone, problem, "float32"),
        THREE_PRODUCTS: partial(_searching, searches.fused_with(searches.THREE_PRODUCTS), problem, "float32"),
        CDIST: partial(_searching, _cdist, problem, "float32"),
        product_name("float32"): partial(_product, problem, "float32"),
    }
    for name in ("TF32", "bf16"):
        builders[f"{FUSED} ({name})"] = partial(_searching, searches.fused, problem, name)
        builders[product_name(name)] = partial(_product, problem, name)
    builders[FLASH_KMEANS] = lambda: _flash_kmeans(problem)
    return builders


def _search(size: Size, context: Context) -> dict[str, Any]:
    problem = Problem(size, context.device, sets=3)
    entries = compete(search_builders(problem), context)
    facts: dict[str, Any] = {}
    for name, one_kernel in ((FUSED, True), (TILED, False)):
        if entries[name]["status"] == "ok":
            with searches.one_kernel(one_kernel):
                facts |= _peak(name, "search", size, context)
    return {"contenders": entries, "facts": facts}


def _peak(name: str, mode: str, size: Size, context: Context) -> dict[str, Any]:
    """Measure bytes beyond input and output, of what the operator does now."""
    entry = measure_here(OURS, mode, size, context.device)
    return {f"bytes of {name}": entry["bytes"]} if entry["status"] == "ok" else {"memory": entry["reason"]}


def _searching(search: Callable[[Tensor, Tensor], Tensor], problem: Problem, precision: str) -> Contender:
    @torch.no_grad()
    def call(number: int) -> Tensor:
        with searches.precision(precision):
            return search(problem.latents[number % problem.sets], problem.codebook)

    def check() -> str | None:
        indices = call(0)
        differing, worst = search_errors(indices.long(), problem.latents[0], problem.codebook)
        if worst <= searches.TOLERANCES[precision]:
            return None
        return f"{differing} indices differ from float64's, the worst by {worst:.1e}"

    return Contender(call, check)


def _cdist(latents: Tensor, codebook: Tensor) -> Tensor:
    rows = max(1, _SCORES // len(codebook))
    return torch.cat([torch.cdist(some, codebook).argmin(1) for some in latents.split(rows)])


def _product(problem: Problem, precision: str) -> Contender:
    """The matrix product alone, as cuBLAS does it, into a buffer that is there already."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    latents = [some.to(dtype) for some in problem.latents]
    codes = problem.codebook.to(dtype).T
    rows = max(1, min(problem.size.N, _SCORES // problem.size.K))
    out = torch.empty(rows, problem.size.K, dtype=dtype, device=problem.device)

    def call(number: int) -> Tensor:
        # bfloat16 factors are given as such, so the setting is for the others.
        with searches.precision("TF32" if precision == "TF32" else "float32"):
            for some in latents[number % len(latents)].split(rows):
                torch.mm(some, codes, out=out[: len(some)])
        return out

    return Contender(call)


def _flash_kmeans(problem: Problem) -> Contender:
    """Its assignment of float32 latents, whose products it rounds to TF32; norms of codes are part of the work."""
    module = optional_module("flash_kmeans.assign_euclid_triton", "flash-kmeans")
    if problem.size.C < _MIN_CHANNELS:
        raise Unavailable("skipped", f"takes at least {_MIN_CHANNELS} channels")
    codes = problem.codebook.unsqueeze(0)

    def search(latents: Tensor, _: Tensor) -> Tensor:
        found: Tensor = module.euclid_assign_triton(
            latents.unsqueeze(0), codes, latents.square().sum(1).unsqueeze(0)
        )
        return found.squeeze(0)

    return _searching(search, problem, "TF32")


# Quantizers


def _quantizer(mode: str, size: Size, context: Context) -> dict[str, Any]:
    with searches.one_kernel(context.device.type == "cuda"):
        entries = quantizers.contest(context, size, mode, _NAMES)
        facts = _peak(OURS, mode, size, context)
    return {"contenders": entries, "facts": facts}


# Networks


def _stage1_cell(mode: stage1.Mode) -> Cell:
    name = mode.name.replace(" ", "-")
    return Cell(f"fast/stage1-{name}", {"mode": mode.name}, partial(_stage1_step, mode))


def _stage1_step(mode: stage1.Mode, context: Context) -> dict[str, Any]:
    """A step, beside plain torch in the same mode; they are compared, but not held to each other."""
    full = context.grid == "full"
    settings = dataclasses.replace(
        PRESETS["paper" if full else "smoke"], perceptual="none", perceptual_weight=0.0, l1_weight=1.0
    )
    if full:
        # Half of the preset's batch, which is what each of the authors' two GPUs had.
        settings = dataclasses.replace(settings, batch_size=96)
    generator = torch.Generator(context.device).manual_seed(0)
    shape = (settings.batch_size, 3, settings.canvas_size, settings.canvas_size)
    images = torch.rand(shape, generator=generator, device=context.device) * 2 - 1
    ours = stage1.library_step(settings, images, mode)
    networks: dict[str, Call] = {OURS: ours}
    facts: dict[str, Any] = {"batch": settings.batch_size}
    # A second network would be compiled as long again.
    if not mode.compiled:
        plain = stage1.reference_step(settings, images, mode)
        networks[stage1.REFERENCE] = plain
        facts["difference"] = stage1.losses_differ(ours.losses(), plain.losses(), bf16=True) or "none"
    builders = {name: partial(Contender, network) for name, network in networks.items()}
    limits = context.limits._replace(budget=4 * context.limits.budget, call=120.0)
    return {"contenders": compete(builders, context, limits), "facts": facts}


def _generation(batch: int, context: Context) -> dict[str, Any]:
    """All tokens of a 16 x 16 image from an empty prompt, with a cache."""
    full = context.grid == "full"
    setting = generation.Setting(batch) if full else generation.Setting(batch, 4, 32, 2, 2)
    gpt = generation.build_gpt(setting).to(context.device)
    empty = torch.zeros(batch, 0, dtype=torch.int64, device=context.device)
    builders: dict[str, Callable[[], Contender]] = {
        OURS: lambda: Contender(lambda _: gpt.generate(empty, top_k=setting.top_k))
    }
    facts: dict[str, Any] = {"tokens": batch * setting.tokens}
    if context.device.type == "cuda":
        try:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.autocast("cuda", torch.bfloat16):
                gpt.generate(empty, top_k=setting.top_k)
                begin.record()
                gpt.generate(empty, top_k=setting.top_k)
                end.record()
            torch.cuda.synchronize()
            facts["seconds under autocast to bf16"] = round(float(begin.elapsed_time(end)) / 1000, 4)
        except RuntimeError as error:
            facts["seconds under autocast to bf16"] = describe(error)
    return {"contenders": compete(builders, context), "facts": facts}
