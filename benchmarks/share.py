"""What a quantizer costs inside a training step, in time and in peak memory.

One network, the same batches and one optimizer; only what stands between encoder and decoder differs: a quantizer,
or an identity. All contenders take a step each in every round. There are two numbers for the time:

- the *share of the step*, (step with the quantizer - step with the identity) / step with the quantizer, from the
  two steps of each round. It holds everything that the quantizer causes, also Adam's work on its codebook and
  caches that it leaves cold. Reported is the median of the rounds.
- the *time inside the step*: from the latents' arrival at the quantizer to its output, and from the arrival of the
  output's gradient to that of the latents. It misses the optimizer and everything after, but neighbours do not
  disturb it.

Memory is measured in a fresh process per contender: by how much the resident memory at the peak of a step exceeds
that before the network was built. Weights, Adam's moments, activations and gradients all count. There glibc gives
back at once what is freed, so that only what is in use counts.

Other libraries have other defaults, so this library takes part several times: as it is by default, and with the
settings of each peer. Those have to give the loss and the gradient of their peer in the first step, and the
indices of every quantizer have to be those of a nearest code in float64.

``python -m benchmarks.share JSON`` measures memory in such a process.

Shape letters: B batch, C code size, h w token grid, T tokens per image, N latents, K codes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.contest import OURS, Cell, Contender, Context, Unavailable, compete, optional_module
from benchmarks.memory import measure_in_process, peak_of, resident
from benchmarks.peers import BYTES_PER_PAIR
from benchmarks.problem import Problem, Size, require_memory
from benchmarks.stage1 import losses_differ
from benchmarks.timing import describe
from benchmarks.tokenizers import TOKENIZERS, Tokenizer, build_coders
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.sources import load_digits
from te_quant import VectorQuantizer

__all__ = [
    "CONTENDERS",
    "DIFFUSERS",
    "FIELDS",
    "IDENTITY",
    "PEERS",
    "VQP",
    "Interval",
    "Layer",
    "Step",
    "build_step",
    "cells",
    "memory_here",
    "relative_share",
    "seconds",
    "share",
    "with_settings_of",
]

IDENTITY = "identity"
DIFFUSERS = "diffusers"
VQP = "vector-quantize-pytorch"
PEERS = (DIFFUSERS, VQP)
FIELDS = ("step", "inside", "peak")
"""Whole steps, the quantizer's passes inside a step, and peak memory."""

_RATE = 1e-4
# More than for a call of a few milliseconds: rounds are what the interval comes from.
_BUDGET = 25
_MIN_ROUNDS = 7
_BATCHES = 4
_MEMORY_STEPS = 3
_RESAMPLES = 2_000
# Otherwise glibc keeps what was freed, more or less of it from process to process, and peaks differ by a tenth.
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def with_settings_of(peer: str) -> str:
    """Name this library's contender that computes what ``peer`` computes."""
    return f"{OURS}, settings of {peer}"


Forward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


class Layer(NamedTuple):
    """What stands between encoder and decoder.

    Attributes:
        module: for its parameters.
        forward: latents, of the tokenizer's layout, to the same shape, () loss and indices.
        codebook: (K, C), the codes of the next step; None for an identity.
        equal_to: the contender whose first loss and gradient it has to have.
    """

    module: nn.Module
    forward: Forward
    codebook: Callable[[], Tensor] | None = None
    equal_to: str | None = None


class Timing(NamedTuple):
    """Seconds of one step, and of the quantizer's passes inside it."""

    step: float
    forward: float
    backward: float


class Step:
    """A training step of a tokenizer: forward, loss, backward, optimizer.

    Args:
        coders: encoder and decoder.
        layer: what stands between them.
        batches: (B, 3, H, W) images; steps take turns among them, so that no latent comes back in the next step.
    """

    def __init__(self, coders: tuple[nn.Module, nn.Module], layer: Layer, batches: Sequence[Tensor]) -> None:
        self.encoder, self.decoder = coders
        self.layer, self.batches = layer, batches
        self.device = batches[0].device
        self.modules = nn.ModuleList([*coders, layer.module]).to(self.device).train()
        self.optimizer = torch.optim.Adam(self.modules.parameters(), _RATE, fused=True)
        self.timings: list[Timing] = []

    def __call__(self, number: int = 0) -> None:
        """Take a step and keep its timing."""
        images = self.batches[number % len(self.batches)]
        cuda = self.device.type == "cuda"
        marks = [_now(cuda)]
        self.gradient(images, marks.append, cuda=cuda)
        self.optimizer.step()
        marks.append(_now(cuda))
        if cuda:
            torch.cuda.synchronize()
        begin, reached, left, returned, passed, end = marks
        seconds = [_seconds(*pair) for pair in ((begin, end), (reached, left), (returned, passed))]
        self.timings.append(Timing(*seconds))

    def gradient(
        self, images: Tensor, mark: Callable[[Any], None] = lambda _: None, *, cuda: bool = False
    ) -> Tensor:
        """Compute the gradient, and mark where the quantizer's two passes begin and end."""
        # Views, so that their gradients come right before and right after those of the quantizer.
        encoded = self.encoder(images)
        latents = encoded.view_as(encoded)
        latents.register_hook(lambda _: mark(_now(cuda)))
        mark(_now(cuda))
        quantized, quantizer_loss, _ = self.layer.forward(latents)
        mark(_now(cuda))
        passed_on = quantized.view_as(quantized)
        passed_on.register_hook(lambda _: mark(_now(cuda)))
        loss = F.mse_loss(self.decoder(passed_on), images) + quantizer_loss
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        return loss.detach()

    def first(self) -> tuple[float, float]:
        """Return the loss and the norm of the encoder's gradient, without a step."""
        loss = self.gradient(self.batches[0])
        gradients = [p.grad for p in self.encoder.parameters() if p.grad is not None]
        return float(loss), float(nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def verdict(self) -> str | None:
        """Say what is wrong with the indices, if anything."""
        if self.layer.codebook is None:
            return None
        self.modules.eval()
        latents = self.encoder(self.batches[0])
        # Read before the call, which may move it.
        codebook = self.layer.codebook().clone()
        _, _, indices = self.layer.forward(latents)
        self.modules.train()
        if indices is None:
            return "no indices came back"
        rows = latents.movedim(1, -1) if latents.dim() == 4 else latents
        size = Size(indices.numel(), *codebook.shape)
        problem = _GivenProblem(size, latents.device, given=(rows.reshape(size.N, size.C), codebook))
        return problem.verdict(indices.flatten())


@dataclass(frozen=True)
class _GivenProblem(Problem):
    """Latents from an encoder and the codes of a quantizer, instead of random ones."""

    given: tuple[Tensor, ...] = ()

    @cached_property
    def codebook(self) -> Tensor:
        return self.given[1]

    @cached_property
    def latents(self) -> list[Tensor]:
        return [self.given[0]]


def _identity(_tokenizer: Tokenizer, _codebook: Tensor) -> Layer:
    return Layer(nn.Identity(), lambda latents: (latents, latents.new_zeros(()), None))


def _ours(tokenizer: Tokenizer, codebook: Tensor, *, equal_to: str | None = None, **options: Any) -> Layer:
    module = VectorQuantizer(
        tokenizer.K, tokenizer.C, channel_dim=1 if tokenizer.channels_first else -1, **options
    ).to(codebook.device)
    if equal_to is not None:
        # By default it starts at latents of its first steps.
        module.set_codebook(codebook)

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = module(latents)
        return output.quantized, output.loss, output.indices

    return Layer(module, forward, lambda: module.codebook, equal_to)


def _diffusers(tokenizer: Tokenizer, codebook: Tensor) -> Layer:
    library = optional_module("diffusers.models.autoencoders.vae", "diffusers")
    # As diffusers' VQModel builds it.
    module: Any = library.VectorQuantizer(tokenizer.K, tokenizer.C, beta=0.25).to(codebook.device)
    module.embedding.weight.data.copy_(codebook)

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # It takes images. Tokens are viewed as one, of strides that spare it the permutation of its input.
        images = latents if tokenizer.channels_first else latents.transpose(1, 2).unsqueeze(-1)
        quantized, loss, (_, _, indices) = module(images)
        return quantized if tokenizer.channels_first else quantized.squeeze(-1).transpose(1, 2), loss, indices

    return Layer(module, forward, lambda: module.embedding.weight)


def _vector_quantize_pytorch(tokenizer: Tokenizer, codebook: Tensor) -> Layer:
    library = optional_module("vector_quantize_pytorch", VQP)
    module: Any = library.VectorQuantize(
        dim=tokenizer.C, codebook_size=tokenizer.K, accept_image_fmap=tokenizer.channels_first
    ).to(codebook.device)
    inner = module._codebook
    inner.embed.data.copy_(codebook.unsqueeze(0))
    inner.embed_avg.data.copy_(codebook.unsqueeze(0))

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = module(latents)
        return quantized, loss.sum(), indices

    return Layer(module, forward, lambda: inner.embed[0])


CONTENDERS: dict[str, Callable[[Tokenizer, Tensor], Layer]] = {
    IDENTITY: _identity,
    DIFFUSERS: _diffusers,
    VQP: _vector_quantize_pytorch,
    OURS: _ours,
    # With legacy=True, its default, diffusers weights the codebook term by beta.
    with_settings_of(DIFFUSERS): partial(
        _ours, equal_to=DIFFUSERS, codebook_update="gradient", commitment_weight=1.0, codebook_weight=0.25
    ),
    with_settings_of(VQP): partial(
        _ours, equal_to=VQP, decay=0.8, revival_threshold=0.0, gradient_estimator="rotation_trick"
    ),
}
"""By name: the tokenizer and (K, C) first codes to a layer. Peers come before what has to equal them."""


def build_step(name: str, tokenizer: Tokenizer, device: torch.device) -> Step:
    """Build the step of one contender; network, images and first codes are the same for all.

    Raises:
        Unavailable: it is not installed, or would not fit into memory.
    """
    pair = BYTES_PER_PAIR.get(name, {}).get("ema" if name == VQP else "gradient", 0)
    require_memory(Size(tokenizer.tokens, tokenizer.K, tokenizer.C), pair)
    batches = _batches(tokenizer, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, decoder = (half.to(device) for half in build_coders(tokenizer))
        with torch.no_grad():
            latents = encoder(batches[0])
        axes = (0, 2, 3) if tokenizer.channels_first else (0, 1)
        mean, deviation = latents.mean(axes), latents.std(axes)
        noise = torch.randn(tokenizer.K, tokenizer.C).to(device)
        layer = CONTENDERS[name](tokenizer, mean + deviation * noise)
    return Step((encoder, decoder), layer, batches)


def _now(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    return float(end - begin) if isinstance(begin, float) else float(begin.elapsed_time(end)) / 1000


def cells(context: Context) -> list[Cell]:
    """One per tokenizer."""
    return [
        Cell(
            f"share/{tokenizer.label}",
            {"network": tokenizer.name, "side": tokenizer.side, "N": tokenizer.tokens}
            | {"K": tokenizer.K, "C": tokenizer.C, "batch": tokenizer.batch},
            partial(_run, tokenizer=tokenizer),
        )
        for tokenizer in TOKENIZERS[context.grid]
    ]


def _run(context: Context, tokenizer: Tokenizer) -> dict[str, Any]:
    steps: dict[str, Step] = {}
    firsts: dict[str, tuple[float, float]] = {}

    def build(name: str) -> Contender:
        step = build_step(name, tokenizer, context.device)

        def check() -> str | None:
            wrong = step.verdict()
            firsts[name] = step.first()
            twin = firsts.get(step.layer.equal_to or "")
            return wrong or (losses_differ([firsts[name]], [twin], bf16=False) if twin else None)

        steps[name] = step
        return Contender(step, check)

    budget, rounds = _BUDGET * context.limits.budget, max(_MIN_ROUNDS, context.limits.min_rounds)
    # One step per sample, so that the timings that a step keeps are the samples.
    limits = context.limits._replace(budget=budget, min_rounds=min(rounds, context.limits.max_rounds), sample=0.0)
    entries = compete({name: partial(build, name) for name in CONTENDERS}, context, limits)
    parameters = sum(
        p.numel() for half in (steps[IDENTITY].encoder, steps[IDENTITY].decoder) for p in half.parameters()
    )
    for name, entry in entries.items():
        if entry["status"] == "ok":
            # Those before were to warm up.
            timings = steps[name].timings[-entry["rounds"] :]
            for field in Timing._fields:
                entry[f"{field}_samples"] = [_rounded(getattr(timing, field)) for timing in timings]
    # The steps hold memory that the processes need.
    steps.clear()
    measured = (IDENTITY, OURS) if context.grid == "quick" else tuple(entries)
    for name in measured:
        entry = entries[name]
        if entry["status"] == "ok":
            entry |= _memory_apart(name, tokenizer, context)
    return {"contenders": entries, "facts": {"parameters": parameters}}


def _memory_apart(name: str, tokenizer: Tokenizer, context: Context) -> dict[str, Any]:
    """Peaks of a few steps in a fresh process, or why there are none."""
    request = {"name": name, "tokenizer": list(tokenizer)}
    found = measure_in_process("benchmarks.share", request, context, _RETURN_MEMORY)
    if found["status"] != "ok":
        return {"memory_status": f"{found['status']} ({found['reason']})"}
    return {"peak_samples": found["peaks"], "held": found["held"], "memory_method": found["method"]}


def memory_here(name: str, tokenizer: Tokenizer, device: torch.device) -> dict[str, Any]:
    """Bytes at the peak of steps, and held between two, beyond those before the network was built."""
    try:
        # What libraries set up at their first step is no cost of this quantizer.
        for warm in TOKENIZERS["quick"]:
            if warm.name == tokenizer.name:
                build_step(name, warm, device)()
        # Images are made before, too.
        _batches(tokenizer, device)
        before = resident(device)
        step = build_step(name, tokenizer, device)
        step()

        def call(number: int) -> list[Tensor]:
            step(number)
            return []

        peaks = []
        for number in range(_MEMORY_STEPS):
            _, peak, method, _ = peak_of(partial(call, number), device)
            peaks.append(peak - before)
        return {"status": "ok", "peaks": peaks, "held": resident(device) - before, "method": method}
    except Unavailable as absence:
        return {"status": absence.status, "reason": str(absence)}
    except Exception as error:
        return {"status": "failed", "reason": describe(error)}


class Interval(NamedTuple):
    """A median, with the ends of its 95 % bootstrap interval."""

    low: float
    median: float
    high: float


def share(cell: Mapping[str, Any], name: str, field: str) -> Interval | None:
    """Return which share of a step is due to ``name``; ``None`` where it or the identity was not measured.

    Args:
        cell: of this section.
        name: a contender.
        field: one of :data:`FIELDS`.
    """
    shares = _shares(cell, name, field)
    return None if shares is None else _interval(shares)


def relative_share(cell: Mapping[str, Any], ours: str, peer: str, field: str) -> float | None:
    """Return the share of ``ours`` / that of ``peer``, of their medians."""
    over, under = share(cell, ours, field), share(cell, peer, field)
    return None if over is None or under is None else over.median / under.median


def seconds(cell: Mapping[str, Any], name: str, field: str) -> Interval | None:
    """Return the seconds of ``step`` or ``inside``, or the bytes of ``peak``."""
    samples = _samples(cell, name, field)
    return None if samples is None else _interval(samples)


def _shares(cell: Mapping[str, Any], name: str, field: str) -> NDArray[np.float64] | None:
    """Of each round."""
    if field == "inside":
        part, whole = _samples(cell, name, "inside"), _samples(cell, name, "step")
        return None if part is None or whole is None else part / whole
    whole, without = _samples(cell, name, field), _samples(cell, IDENTITY, field)
    return None if whole is None or without is None else 1 - without / whole


def _samples(cell: Mapping[str, Any], name: str, field: str) -> NDArray[np.float64] | None:
    entry = cell["contenders"].get(name, {})
    names = ("forward", "backward") if field == "inside" else (field,)
    found = [entry.get(f"{part}_samples") for part in names]
    return None if None in found else np.sum(np.asarray(found, dtype=np.float64), axis=0)


def _interval(samples: NDArray[np.float64]) -> Interval:
    """Resample the rounds."""
    picks = np.random.default_rng(0).integers(len(samples), size=(_RESAMPLES, len(samples)))
    low, high = np.percentile(np.median(samples[picks], axis=1), (2.5, 97.5))
    return Interval(float(low), float(np.median(samples)), float(high))


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


@cache
def _batches(tokenizer: Tokenizer, device: torch.device) -> list[Tensor]:
    data = QuadrantDataset(load_digits("digits"), "train", canvas_size=tokenizer.side, size=1024)
    return [data.batch(number, tokenizer.batch).to(device) for number in range(_BATCHES)]


def main() -> None:
    """Measure the memory that the argument asks for and print it."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    print(
        json.dumps(memory_here(request["name"], Tokenizer(*request["tokenizer"]), torch.device(request["device"])))
    )


if __name__ == "__main__":
    main()
