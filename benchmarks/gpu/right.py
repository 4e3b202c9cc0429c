"""Is everything right on this device? Searches against float64, the rest against the CPU.

Shape letters: B batch, N latents, K codes, C code size.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.contest import Cell, Context
from benchmarks.generation import Setting, build_gpt
from benchmarks.gpu import searches
from benchmarks.problem import Size
from examples.te_vqgan.stage1.exactness import moved
from examples.te_vqgan.stage1.presets import settings_for
from te_quant import FSQ, LFQ, Quantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer, VQAutoencoder

__all__ = ["QUANTIZERS", "SEARCH_SIZES", "CheckError", "cells", "search_errors"]


class CheckError(AssertionError):
    """A check does not hold; the message says what was found."""


# One of everything, small and odd ones, one code, long codes, few and many rows, parts.
SEARCH_SIZES: dict[str, tuple[Size, ...]] = {
    "quick": (
        Size(1, 1, 1),
        Size(7, 5, 2),
        Size(65, 129, 33),
        Size(130, 700, 17),
        Size(3, 300, 130),
    ),
    "full": tuple(
        Size(*size)
        for size in (
            (1, 1, 1),
            (1, 2, 1),
            (1, 1000, 3),
            (2, 3, 4000),
            (3, 65537, 256),
            (5, 65536, 8),
            (7, 5, 2),
            (15, 1, 40),
            (31, 2047, 1100),
            (33, 17, 9),
            (50, 3000, 1024),
            (63, 64, 65),
            (64, 65536, 64),
            (64, 64, 64),
            (65, 129, 65),
            (100, 8192, 300),
            (127, 255, 31),
            (128, 128, 16),
            (129, 130, 17),
            (255, 257, 15),
            (300, 40, 257),
            (511, 4095, 48),
            (777, 777, 77),
            (1000, 1023, 33),
            (1024, 1, 8),
            (1024, 16384, 12),
            (2000, 12345, 6),
            (4096, 256, 8),
            (4097, 4097, 24),
            (4096, 65536, 64),
            (8192, 16384, 8),
            (10000, 1000, 100),
            (16384, 1024, 64),
            (16384, 8192, 32),
            (16385, 1025, 63),
            (30000, 30000, 10),
            (65536, 2048, 128),
            (100003, 777, 5),
            (262144, 256, 8),
            (262144, 1024, 256),
        )
    ),
}
"""For the searches, by grid: 40 on a GPU."""

_OFFSETS = (0.0, 1000.0)
# With float64 at most so many rows are compared, spread over all; and so many distances at once.
_ROWS, _PAIRS = 4096, 1 << 26
_LARGE = 1 << 22

# With the defaults of the published measurements.
_residual = partial(ResidualVectorQuantizer, 24, 6, 3, commitment_weight=0.25, decay=0.99)

QUANTIZERS: dict[str, Callable[..., Quantizer]] = {
    "vq": partial(VectorQuantizer, 48, 6, codebook_update="gradient"),
    "vq-penalty": partial(VectorQuantizer, 48, 6, codebook_update="gradient", orthogonal_reg=10.0),
    "vq-rotation": partial(VectorQuantizer, 48, 6, gradient_estimator="rotation_trick"),
    "vq-cosine": partial(VectorQuantizer, 48, 6, metric="cosine"),
    "vq-ema": partial(VectorQuantizer, 48, 6, codebook_update="ema"),
    "vq-ema-penalty": partial(VectorQuantizer, 48, 6, codebook_update="ema", orthogonal_reg=10.0, decay=0.5),
    "rvq": partial(_residual, codebook_update="gradient"),
    "rvq-ema": partial(_residual, codebook_update="ema", shared_codebook=True),
    "fsq": partial(FSQ, (8, 5, 5, 5)),
    "lfq": partial(LFQ, 9, entropy_group_dim=4),
    "sim": partial(SimVQ, 48, 6),
}
"""By name: every quantizer of the library, without those that draw at random."""

_COMPILED = ("vq", "vq-ema", "rvq-ema", "fsq", "lfq", "sim")
# float32 sums in another order; float64, which no tensor core rounds; half precision against the CPU's.
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}
_HALF_AGREEMENT = 0.98


def cells(context: Context) -> list[Cell]:
    """Quick and important ones first."""
    return [
        _cell("precision", {}, _precisions),
        _cell("ties", {}, _ties),
        _cell("nonfinite", {}, _nonfinite),
        *(
            _cell(f"search-{size.label}", size._asdict(), partial(_search, size=size))
            for size in SEARCH_SIZES[context.grid]
        ),
        *(_cell(f"quantizer-{name}", {"name": name}, partial(_quantizer, name=name)) for name in QUANTIZERS),
        *(
            _cell(f"{kind}-{name}", {"name": name}, partial(check, name=name))
            for kind, check in (("half", _half), ("autocast", _autocast))
            for name in QUANTIZERS
        ),
        *(
            _cell(f"deterministic-{name}", {"name": name}, partial(_deterministic, name=name))
            for name in QUANTIZERS
        ),
        _cell("integer-exact", {}, _integer_exact),
        _cell("generation", {}, _generation),
        _cell("one-process", {}, _one_process),
        _cell("operator", {}, _operator),
        *(_cell(f"compiled-{name}", {"name": name}, partial(_compiled, name=name)) for name in _COMPILED),
    ]


def _cell(name: str, settings: dict[str, Any], check: Callable[[Context], dict[str, Any]]) -> Cell:
    @functools.wraps(check)
    def run(context: Context) -> dict[str, Any]:
        try:
            facts = check(context)
        except CheckError as found:
            return {"status": "wrong", "reason": str(found)}
        return {"status": "ok", "facts": facts}

    return Cell(f"right/{name}", settings, run)


def _hold(condition: bool, found: str) -> None:
    if not condition:
        raise CheckError(found)


# Searches


def search_errors(indices: Tensor, latents: Tensor, codebook: Tensor) -> tuple[int, float]:
    """Compare with float64: how many indices differ, and by how much of the squared lengths the worst is farther.

    Shape:
        indices: (N,). latents: (N, C). codebook: (K, C).
    """
    codes = codebook.double()
    middle = codes.mean(0)
    codes = codes - middle
    norms = codes.square().sum(1)
    step = max(1, len(latents) // _ROWS)
    rows = torch.arange(0, len(latents), step, device=latents.device)
    differing, worst = 0, 0.0
    for some in rows.split(max(1, _PAIRS // len(codes))):
        z = latents[some].double() - middle
        distances = norms - 2 * z @ codes.T
        lowest = distances.min(1)
        excess = distances.gather(1, indices[some, None]).squeeze(1) - lowest.values
        differing += int((indices[some] != lowest.indices).sum())
        worst = max(worst, float((excess / (z.square().sum(1) + norms.max() + 1e-30)).max()))
    return differing, worst


def _search(context: Context, size: Size) -> dict[str, Any]:
    """Every search at one size, near zero and far from it."""
    facts: dict[str, Any] = {}
    # The precisions that one has to ask for are compiled apart, so they have fewer sizes.
    asked = ("TF32", "bf16") if size.N * size.K >= _LARGE and context.device.type == "cuda" else ()
    for offset in _OFFSETS:
        latents, codebook = (
            _normal(context, 10 + number, (rows, size.C)) + offset for number, rows in enumerate((size.N, size.K))
        )
        for name, search, tolerance in _named_searches(asked):
            indices = search(latents, codebook)
            _hold(
                indices.shape == (size.N,) and int(indices.min()) >= 0 and int(indices.max()) < size.K,
                f"{name} at offset {offset:g} returns indices that are out of range",
            )
            differing, worst = search_errors(indices, latents, codebook)
            facts[f"{name}, offset {offset:g}"] = {"differing": differing, "excess": float(f"{worst:.2g}")}
            _hold(worst <= tolerance, f"{name} at offset {offset:g} is off by {worst:.1e}: {differing} indices")
    return facts


def _named_searches(asked: Sequence[str] = ()) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor], float]]:
    tolerance = searches.TOLERANCES["float32"]
    yield "tiled", searches.tiled, tolerance
    yield "fused", searches.fused, tolerance
    yield "fused tf32x3", searches.fused_with(searches.THREE_PRODUCTS), tolerance
    for name in asked:
        yield f"fused {name}", partial(_in_precision, name), searches.TOLERANCES[name]


def _in_precision(name: str, latents: Tensor, codebook: Tensor) -> Tensor:
    with searches.precision(name):
        return searches.fused(latents, codebook)


def _ties(context: Context) -> dict[str, Any]:
    """Equal distances and equal codes: the lowest index."""
    device = context.device
    expected = torch.arange(16, device=device)
    codebook, latents = torch.eye(16, device=device).repeat(80, 1), 2 * torch.eye(16, device=device)
    for name, search, _ in _named_searches():
        found = search(latents, codebook)
        _hold(torch.equal(found, expected), f"{name} answers ties with {found.tolist()}")
    some = _normal(context, 0, (300, 24))
    latents = _normal(context, 1, (500, 24))
    for name, search in (("tiled", searches.tiled), ("fused", searches.fused)):
        once, often = search(latents, some), search(latents, some.repeat(5, 1))
        # On a CPU the kernel is called without the operator, which sends equal codes to the first.
        if name == "fused" and device.type == "cpu":
            often = often % len(some)
        _hold(torch.equal(once, often), f"{name} does not answer with the first of equal codes")
    # If every product of the kernel is rounded alike, the operator need not look for equal codes.
    alone = {"float32": searches.kernel_alone, "tf32x3": searches.fused_with(searches.THREE_PRODUCTS)}
    return {
        f"of the kernel alone in {name}, answers with another than the first of equal codes": int(
            (search(latents, some.repeat(5, 1)) >= len(some)).sum()
        )
        for name, search in alone.items()
    }


def _nonfinite(context: Context) -> dict[str, Any]:
    """NaN and infinite latents leave other rows alone, and are raised or skipped where that was asked for."""
    latents, codebook = _normal(context, 0, (200, 12)), _normal(context, 1, (700, 12))
    broken = latents.clone()
    broken[5], broken[17, 3], broken[40, 2] = torch.nan, torch.inf, -torch.inf
    rest = torch.isfinite(broken).all(1)
    facts: dict[str, Any] = {}
    for name, search, _ in _named_searches():
        whole, found = search(latents, codebook), search(broken, codebook)
        _hold(int(found.min()) >= 0 and int(found.max()) < 700, f"{name} leaves the range")
        _hold(torch.equal(whole[rest], found[rest]), f"{name} lets a row change others")
        _hold(int(found[5]) == 0, f"{name} gives NaN the code {int(found[5])}, not 0")
        facts[name] = [int(found[17]), int(found[40])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        skipping = VectorQuantizer(700, 12, channel_dim=-1, nonfinite="skip", codebook_update="ema")
    here, there = (_step(skipping, place, broken) for place in (context.device, torch.device("cpu")))
    _compare("nonfinite='skip'", here, there, torch.float32, rows=rest)
    unchecked = VectorQuantizer(700, 12, channel_dim=-1, nonfinite="off").to(context.device)(broken).indices
    _hold(int(unchecked.min()) >= 0 and int(unchecked.max()) < 700, "nonfinite='off' leaves the range")
    raising = VectorQuantizer(700, 12, channel_dim=-1, nonfinite="raise").to(context.device)
    try:
        raising(broken)
    except ValueError as error:
        facts["raises"] = [str(error)]
    else:
        raise CheckError("nonfinite='raise' raises nothing")
    return facts


def _precisions(context: Context) -> dict[str, Any]:
    """What torch makes of the three settings; how far its own products are off; the device."""
    left, right = _normal(context, 0, (256, 256)), _normal(context, 1, (256, 256))
    exact = left.double() @ right.double()
    facts: dict[str, Any] = {}
    for name in searches.PRECISIONS:
        with searches.precision(name):
            error = float((left @ right - exact).abs().max() / exact.abs().max())
        facts[f"error of a product in {name}"] = float(f"{error:.2g}")
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        facts["device"] = properties.name
        facts["multiprocessors"] = properties.multi_processor_count
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["GiB"] = round(properties.total_memory / 2**30, 1)
        facts["CUDA"] = torch.version.cuda
    return facts


def _operator(context: Context) -> dict[str, Any]:
    """What ``torch.library`` asks of an operator."""
    latents, codebook = _normal(context, 0, (100, 8)), _normal(context, 1, (50, 8))
    with searches.one_kernel(context.device.type == "cuda"):
        torch.library.opcheck(torch.ops.te_quant.search_codes.default, (latents, codebook))
    return {}


# Quantizers


def _quantizer(context: Context, name: str) -> dict[str, Any]:
    """Forward, backward and what is remembered, in float32 and float64, against the CPU."""
    for dtype in _CLOSE:
        for training in (True, False):
            quantizer = _build(name).to(dtype).train(training)
            latents = _latents(quantizer, dtype)
            here, there = (_step(quantizer, place, latents) for place in (context.device, torch.device("cpu")))
            _compare(f"{name} in {dtype}", here, there, dtype)
    return {}


def _half(context: Context, name: str) -> dict[str, Any]:
    """A module in half precision against the same one on the CPU."""
    return _low_precision(context, name, convert=True)


def _autocast(context: Context, name: str) -> dict[str, Any]:
    """A float32 module that gets half-precision latents under autocast."""
    return _low_precision(context, name, convert=False)


def _low_precision(context: Context, name: str, *, convert: bool) -> dict[str, Any]:
    facts = {}
    for dtype in (torch.bfloat16, torch.float16):
        quantizer = _build(name).train()
        latents = _latents(quantizer, torch.float32).to(dtype)
        if convert:
            quantizer = quantizer.to(dtype)
        results = []
        for place in (context.device, torch.device("cpu")):
            with torch.autocast(place.type, dtype, enabled=not convert):
                results.append(_step(quantizer, place, latents))
        here, there = results
        agreement = float((here["indices"] == there["indices"]).double().mean())
        facts[str(dtype)] = agreement
        _hold(here["quantized"].dtype == there["quantized"].dtype, f"{dtype}: {here['quantized'].dtype} comes out")
        _hold(agreement >= _HALF_AGREEMENT, f"{dtype}: {1 - agreement:.1%} of the indices are others")
        for key in ("latents.grad", "loss"):
            _hold(bool(torch.isfinite(here[key]).all()), f"{dtype}: {key} is not finite")
    return facts


def _compiled(context: Context, name: str) -> dict[str, Any]:
    """One graph, forward and backward; the rehearsal leaves code generation out."""
    quantizer = _build(name).train()
    latents = _latents(quantizer, torch.float32)
    backend = "inductor" if context.device.type == "cuda" else "aot_eager"
    torch._dynamo.reset()
    eager = _step(quantizer, context.device, latents)
    compiled = _step(
        quantizer, context.device, latents, lambda module: torch.compile(module, fullgraph=True, backend=backend)
    )
    _compare(f"{name} compiled", compiled, eager, torch.float32)
    return {}


def _deterministic(context: Context, name: str) -> dict[str, Any]:
    """Runs where torch is asked for deterministic algorithms only, and gives the same bits twice."""
    quantizer = _build(name).train()
    latents = _latents(quantizer, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (_step(quantizer, context.device, latents) for _ in range(2))
    except RuntimeError as error:
        raise CheckError(str(error).splitlines()[0]) from error
    finally:
        torch.use_deterministic_algorithms(False)
    _hold(all(torch.equal(first[key], second[key]) for key in first), "it gives other bits the second time")
    return {}


def _one_process(context: Context) -> dict[str, Any]:
    """A process group of one, with NCCL on a GPU: the same as without."""
    backend = "nccl" if context.device.type == "cuda" else "gloo"
    quantizer = _build("vq-ema-penalty").train()
    latents = _latents(quantizer, torch.float32)
    alone = _step(quantizer, context.device, latents)
    gradient = _build("vq").train()
    dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        together = _step(quantizer, context.device, latents)
        value = torch.ones(3, device=context.device)
        dist.all_reduce(value)
        _hold(value.tolist() == [1.0, 1.0, 1.0], f"a sum over one process is {value.tolist()}")
        _hold(_learns_under_ddp(gradient, latents, context.device), "DDP leaves the codebook without a gradient")
    finally:
        # The modules first: where the last reference to a group is theirs, torch waits for the thread of the group
        # with the interpreter locked, and the thread may wait for that lock.
        gc.collect()
        dist.destroy_process_group()
    _compare(f"one {backend} process", together, alone, torch.float32)
    return {"backend": backend}


def _learns_under_ddp(quantizer: Quantizer, latents: Tensor, device: torch.device) -> bool:
    module = nn.parallel.DistributedDataParallel(copy.deepcopy(quantizer).to(device))
    module(latents.to(device)).loss.backward()
    return module.module.codebook.grad is not None


def _step(
    quantizer: Quantizer,
    device: torch.device,
    latents: Tensor,
    wrap: Callable[[nn.Module], Any] = lambda module: module,
) -> dict[str, Tensor]:
    """Run a copy forward and backward on ``device``: results, gradients and state, on the CPU."""
    module = copy.deepcopy(quantizer).to(device)
    inputs = latents.detach().to(device).requires_grad_()
    call = wrap(module)
    with searches.one_kernel(device.type == "cuda"):
        output = call(inputs)
        weights = torch.linspace(-1, 1, output.quantized.numel(), dtype=torch.float64).view(output.quantized.shape)
        kept = output.quantized.isfinite()
        value = torch.where(kept, output.quantized, 0).float() * weights.to(device).float()
        (value.sum() + output.loss.float()).backward()
    found = {name: getattr(output, name) for name in ("quantized", "indices", "codes", "loss")}
    found["latents.grad"] = inputs.grad
    found |= {f"{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None}
    found |= module.state_dict()
    return {name: value.detach().cpu() for name, value in found.items()}


def _compare(
    what: str,
    here: dict[str, Tensor],
    there: dict[str, Tensor],
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> None:
    """Hold results to those of the CPU: indices exactly, the rest up to rounding."""
    _hold(here.keys() == there.keys(), f"{what}: {sorted(here)} are not {sorted(there)}")
    for name, value in here.items():
        expected = there[name]
        if rows is not None and name in ("quantized", "indices", "codes", "latents.grad"):
            value, expected = value[rows.cpu()], expected[rows.cpu()]
        if value.dtype.is_floating_point:
            limit = _CLOSE[dtype] * float(expected.abs().max().clamp(min=1)) if expected.numel() else 0.0
            error = float((value - expected).abs().max()) if expected.numel() else 0.0
            _hold(error <= limit, f"{what}: {name} is off by {error:.1e}, more than {limit:.1e}")
        else:
            count = int((value != expected).sum())
            _hold(count == 0, f"{what}: {count} of {value.numel()} entries of {name} are others")


def _build(name: str) -> Quantizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        quantizer = QUANTIZERS[name]()
        start = getattr(quantizer, "kmeans_init", None)
        if start is not None:
            # As wide as the latents, or one code would take all of them.
            start(torch.randn(512, quantizer.code_dim), iterations=2)
        return quantizer


def _latents(quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, quantizer.code_dim, 9, 13, generator=generator, dtype=torch.float64).to(dtype)


# Networks


def _integer_exact(context: Context) -> dict[str, Any]:
    """The encoder that promises every integer shift keeps it: always in float64, nearly always in float32."""
    facts: dict[str, Any] = {}
    for name, dtype, allowed in (("float64", torch.float64, 0.0), ("float32", torch.float32, 1e-2)):
        for tensor_cores in (False, True) if dtype == torch.float32 else (False,):
            with _convolutions(tensor_cores):
                differing, compared = _count_differing(context, dtype)
            label = f"{name}, convolutions in TF32" if tensor_cores else name
            facts[label] = {"differing": differing, "compared": compared}
            _hold(differing <= allowed * compared, f"{label}: {differing} of {compared} indices differ")
    return facts


@torch.no_grad()
def _count_differing(context: Context, dtype: torch.dtype) -> tuple[int, int]:
    """Shift images around their edges and compare tokens with those of the images, moved as promised."""
    full = context.grid == "full"
    side, count = (32, 8) if full else (16, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQAutoencoder(settings_for("smoke", "integer_exact").model).to(context.device, dtype).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64) * 2 - 1
    images = images.to(context.device, dtype)
    # Fresh codes are so small that one would take every latent.
    quantizer: Any = model.quantizer
    quantizer.kmeans_init(model.encode(images), generator=torch.Generator(context.device).manual_seed(0))
    before = model.encode_with_phases(images)
    tokens, start = model.quantizer.encode(before.latents).cpu(), before.offsets.cpu()
    stride, differing, compared = model.config.stride, 0, 0
    for dy, dx in [(1, 0), (0, 1), (3, 5), (-2, 7), (6, -3), (11, 13)][: 6 if full else 2]:
        after = model.encode_with_phases(images.roll((dy, dx), (-2, -1)))
        found = model.quantizer.encode(after.latents).cpu()
        shift = torch.tensor([dy, dx]) + start - after.offsets.cpu()
        differing += int((moved(tokens, shift.div(stride, rounding_mode="floor")) != found).sum())
        compared += found.numel()
    return differing, compared


@contextmanager
def _convolutions(tensor_cores: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tensor_cores
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _generation(context: Context) -> dict[str, Any]:
    """The likeliest tokens are the same with a cache, without, and on the CPU."""
    full = context.grid == "full"
    setting = Setting(2, side=8, width=64, depth=3, num_heads=4) if full else Setting(2, 4, 32, 2, 2)
    gpt = build_gpt(setting)
    prompt = torch.zeros(setting.batch, 1, dtype=torch.int64)
    prompt[:, 0] = torch.arange(setting.batch)
    results = []
    for place, cache in ((context.device, True), (context.device, False), (torch.device("cpu"), False)):
        drawn = gpt.to(place).generate(prompt.to(place), temperature=0.0, use_cache=cache)
        results.append(drawn.cpu())
    cached, uncached, on_cpu = results
    _hold(torch.equal(cached, uncached), f"the cache changes {_share(cached, uncached)} of the tokens")
    _hold(torch.equal(cached, on_cpu), f"the CPU draws {_share(cached, on_cpu)} of the tokens otherwise")
    return {"tokens": cached.numel()}


def _share(one: Tensor, other: Tensor) -> str:
    return f"{float((one != other).double().mean()):.1%}"


def _normal(context: Context, seed: int, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator(context.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=context.device)
