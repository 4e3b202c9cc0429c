"""Small autoencoders trained in the same way with one quantizer after another, ours and those of others.

What somebody gets who replaces one layer by another and reads no options: the network, the images of every step
and the optimizer are equal, and every quantizer adds the loss that it returns. What is measured is the
reconstruction of test images, the codes that these use, and the time of a step. A quantizer that chooses its own
code size (FSQ, LFQ) gets it, as the convolutions next to it are linear.

Shape letters: B batch, K codes, C code size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import Cell, Context, Unavailable, optional_module
from benchmarks.timing import describe
from examples.te_vqgan.data.sources import load_digits
from te_quant import FSQ, LFQ, CodebookUsage, Quantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer

__all__ = [
    "CONTENDERS",
    "CURVE_STEPS",
    "DEFAULTS",
    "NONE",
    "OWN",
    "PEER",
    "PEER_ALIVE",
    "RATE",
    "Grid",
    "Layer",
    "Network",
    "Trained",
    "cells",
    "levels_of",
    "library_layer",
    "results",
    "start",
    "train",
]

NONE = "no quantizer"
DEFAULTS = "VectorQuantizer"
PEER = "vector-quantize-pytorch"
PEER_ALIVE = "vector-quantize-pytorch, k-means and expiry"

_SIDE = 32
_PEAK = 2.0
RATE = 1e-3
"""Learning rate; the first seed is trained with a third and three times of it too."""
_BATCH = 32
CURVE_STEPS = 25
"""Steps per point of the training curve."""


class Layer(NamedTuple):
    """A quantizer as it is trained.

    Attributes:
        module: with its parameters.
        forward: (B, C, h, w) latents to quantized latents, indices and () loss.
        code_dim: C, what the encoder has to produce.
        num_codes: how many different indices there are.
    """

    module: nn.Module
    forward: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    code_dim: int
    num_codes: int


class Network(nn.Module):
    """Three convolutions to 8 x 8 tokens, and three back, 32 and 64 channels wide."""

    def __init__(self, layer: Layer | None, code_dim: int) -> None:
        super().__init__()
        size = code_dim if layer is None else layer.code_dim
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, size, 3, 1, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(size, 64, 3, 1, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
        )
        self.layer = layer
        self.quantizer = None if layer is None else layer.module

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(B, 1, 32, 32) to its reconstruction, the indices and the quantizer's loss."""
        latents = self.encoder(images)
        if self.layer is None:
            return self.decoder(latents), None, latents.new_zeros(())
        quantized, indices, loss = self.layer.forward(latents)
        return self.decoder(quantized), indices, loss


class Grid(NamedTuple):
    """What is trained on which images.

    Attributes:
        data: the images.
        K, C: of the quantizers that take them.
        seeds: of weights and batches.
    """

    data: str
    K: int
    C: int
    seeds: int


GRIDS: dict[str, tuple[Grid, ...]] = {
    "quick": (Grid("digits", 64, 4, 1),),
    "full": (
        Grid("mnist", 128, 32, 3),
        Grid("mnist", 1024, 8, 3),
        Grid("mnist", 8192, 8, 3),
        Grid("fashion-mnist", 1024, 8, 3),
        Grid("digits", 1024, 8, 3),
    ),
}
_STEPS = {"quick": 12, "full": 500}
_TEST_IMAGES = {"quick": 64, "full": 1000}
# Of the learning rate, for the first seed.
_FACTORS = {"quick": (1.0,), "full": (1.0, 1 / 3, 3.0)}
# From so many codes on vector-quantize-pytorch takes half a second per step: one seed at one rate is enough.
_SLOW_PEERS = 8192


def library_layer(build: Callable[[int, int], Quantizer]) -> Callable[[int, int], Layer]:
    """Wrap a quantizer of this library: (K, C) to it."""

    def layer(K: int, C: int) -> Layer:
        module = build(K, C)

        def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            output = module(latents)
            return output.quantized, output.indices, output.loss

        combinations = module.num_codes ** (module.num_quantizers or 1)
        return Layer(module, forward, module.code_dim, combinations)

    return layer


def _peer(name: str, own_size: bool = False, **options: Any) -> Callable[[int, int], Layer]:
    """A class of vector-quantize-pytorch; all of them return quantized, indices and, but for FSQ, the loss."""

    def layer(K: int, C: int) -> Layer:
        library = optional_module("vector_quantize_pytorch", PEER)
        if name == "FSQ":
            sizes: dict[str, Any] = {"levels": levels_of(K)}
            size, codes = len(sizes["levels"]), math.prod(sizes["levels"])
        elif own_size:
            size, codes = int(math.log2(K)), K
            sizes = {"codebook_size": K, "dim": size}
        else:
            size, codes = C, K
            sizes = {"codebook_size": K, "dim": C}
        images = {"VectorQuantize": {"accept_image_fmap": True}, "SimVQ": {"channel_first": True}}.get(name, {})
        module = getattr(library, name)(**sizes, **images, **options)

        def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            quantized, indices, *loss = module(latents)
            return quantized, indices, loss[0].sum() if loss else latents.new_zeros(())

        return Layer(module, forward, size, codes)

    return layer


def _diffusers(K: int, C: int) -> Layer:
    library = optional_module("diffusers.models.autoencoders.vae", "diffusers")
    module = library.VectorQuantizer(K, C, beta=0.25)

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, loss, (_, _, indices) = module(latents)
        return quantized, indices, loss

    return Layer(module, forward, C, K)


def levels_of(num_codes: int) -> list[int]:
    """Levels of an FSQ with about ``num_codes`` codes: those that its authors recommend, or their like."""
    known = {64: [8, 8], 128: [8, 4, 4], 256: [8, 6, 5], 1024: [8, 5, 5, 5], 8192: [8, 8, 5, 5, 5]}
    return known[num_codes]


CONTENDERS: dict[str, Callable[[int, int], Layer] | None] = {
    NONE: None,
    DEFAULTS: library_layer(lambda K, C: VectorQuantizer(K, C)),
    "VectorQuantizer, cosine": library_layer(lambda K, C: VectorQuantizer(K, C, metric="cosine")),
    "VectorQuantizer, rotation trick": library_layer(
        lambda K, C: VectorQuantizer(K, C, gradient_estimator="rotation_trick")
    ),
    "VectorQuantizer, gradient": library_layer(lambda K, C: VectorQuantizer(K, C, codebook_update="gradient")),
    "SimVQ": library_layer(lambda K, C: SimVQ(K, C)),
    "FSQ": library_layer(lambda K, _: FSQ(levels_of(K))),
    "LFQ": library_layer(lambda K, _: LFQ(int(math.log2(K)))),
    "ResidualVectorQuantizer, 2 levels": library_layer(
        # The defaults when it was measured.
        lambda K, C: ResidualVectorQuantizer(
            2 ** math.ceil(math.log2(K) / 2),
            C,
            2,
            codebook_update="gradient",
            commitment_weight=0.25,
            decay=0.99,
        )
    ),
    PEER: _peer("VectorQuantize"),
    PEER_ALIVE: _peer("VectorQuantize", kmeans_init=True, threshold_ema_dead_code=2),
    "vector-quantize-pytorch SimVQ": _peer("SimVQ"),
    "vector-quantize-pytorch FSQ": _peer("FSQ"),
    "vector-quantize-pytorch LFQ": _peer("LFQ", own_size=True),
    "diffusers VectorQuantizer": _diffusers,
}
"""By name: (K, C) to a quantizer; None for none."""

OWN = tuple(name for name in CONTENDERS if not name.startswith((PEER, "diffusers", NONE)))
"""Those of this library."""


def cells(context: Context) -> list[Cell]:
    """Each contender, seed and learning rate."""
    result = []
    for grid in GRIDS[context.grid]:
        for name in CONTENDERS:
            slow = grid.K >= _SLOW_PEERS and name.startswith(PEER)
            for seed in range(1 if slow else grid.seeds):
                for factor in (1.0,) if slow or seed else _FACTORS[context.grid]:
                    settings = {
                        "data": grid.data,
                        "K": grid.K,
                        "C": grid.C,
                        "seed": seed,
                        "rate": round(factor * RATE, 6),
                        "quantizer": name,
                    }
                    key = f"training/{grid.data}-K{grid.K}-C{grid.C}-seed{seed}-rate{settings['rate']}/{name}"
                    result.append(Cell(key, settings, partial(_run, settings=settings)))
    return result


class Trained(NamedTuple):
    """All trainings of one contender on one grid.

    Attributes:
        data, K, C: of the grid.
        quantizer: name of the contender.
        by_rate: the entries of all seeds that finished, by learning rate.
        failures: statuses of the others.
    """

    data: str
    K: int
    C: int
    quantizer: str
    by_rate: dict[float, list[Mapping[str, Any]]]
    failures: list[str]

    def mean(self, name: str, rate: float = RATE) -> float:
        """Mean of a measure over the seeds; NaN without any."""
        values = [entry[name] for entry in self.by_rate.get(rate, ()) if name in entry]
        return statistics.fmean(values) if values else math.nan

    def deviation(self, name: str) -> float:
        """Its standard deviation over the seeds; NaN below two."""
        values = [entry[name] for entry in self.by_rate.get(RATE, ())]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def standard_error(self, name: str) -> float:
        """The standard error of the mean; 0 with one seed, which has none."""
        deviation = self.deviation(name)
        return deviation / math.sqrt(len(self.by_rate[RATE])) if math.isfinite(deviation) else 0.0


def results(cells: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, int, int], dict[str, Trained]]:
    """Group the cells of this section by grid and contender, in their order."""
    found: dict[tuple[str, int, int], dict[str, Trained]] = {}
    for grids in GRIDS.values():
        for grid in grids:
            place = (grid.data, grid.K, grid.C)
            for name in CONTENDERS:
                found.setdefault(place, {})[name] = Trained(*place, name, {}, [])
    for key, cell in cells.items():
        if not key.startswith("training/"):
            continue
        settings = cell["settings"]
        name = settings["quantizer"]
        trained = found[settings["data"], settings["K"], settings["C"]][name]
        entry = cell["contenders"][name]
        if entry["status"] == "ok":
            trained.by_rate.setdefault(settings["rate"], []).append(entry)
        else:
            trained.failures.append(f"{entry['status']} ({entry['reason']})")
    kept = {
        place: {name: trained for name, trained in group.items() if trained.by_rate or trained.failures}
        for place, group in found.items()
    }
    return {place: group for place, group in kept.items() if group}


def _run(context: Context, settings: Mapping[str, Any]) -> dict[str, Any]:
    name = settings["quantizer"]
    try:
        found = train(
            CONTENDERS[name],
            settings["data"],
            settings["K"],
            settings["C"],
            seed=settings["seed"],
            rate=settings["rate"],
            steps=_STEPS[context.grid],
            test_images=_TEST_IMAGES[context.grid],
            device=context.device,
        )
    except Unavailable as absence:
        return {"contenders": {name: {"status": absence.status, "reason": str(absence)}}}
    except FloatingPointError as error:
        return {"contenders": {name: {"status": "failed", "reason": describe(error)}}}
    facts = {part: found.pop(part) for part in ("curve", "used_curve")}
    return {"contenders": {name: {"status": "ok", **found}}, "facts": facts}


def train(
    build: Callable[[int, int], Layer] | None,
    data: str,
    K: int,
    C: int,
    *,
    seed: int,
    rate: float,
    steps: int,
    test_images: int,
    device: torch.device | str = "cpu",
    prepare: Callable[[Network, Tensor], torch.optim.Optimizer] | None = None,
) -> dict[str, Any]:
    """Train one network and measure it.

    Args:
        build: (K, C) to the quantizer; None for none.
        data: name of the images.
        K: codes.
        C: code size.
        seed: of weights and batches.
        rate: of Adam.
        steps: of training.
        test_images: how many are measured.
        device: where to compute.
        prepare: gets the network and the first batch, and returns the optimizer; None is Adam alone.

    Returns:
        ``mse`` and ``psnr`` (dB, peak 2) on test images, ``used`` codes and ``perplexity`` there, ``median``
        seconds per step, ``curve``, the mean training error of every 25 steps, and ``used_curve``, how many codes
        these used.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        Unavailable: the library is not installed.
    """
    training, test = (images.to(device) for images in _images(data))
    torch.manual_seed(seed)
    layer = None if build is None else build(K, C)
    network = start(layer, C, seed=seed).to(device)
    order = torch.Generator().manual_seed(seed)
    batches = torch.randint(len(training), (steps, _BATCH), generator=order).to(device)
    if prepare is None:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), rate)
    else:
        optimizer = prepare(network, training[batches[0]])
    errors, times = [], []
    recent, counts = CodebookUsage(layer.num_codes if layer else 1).to(device), []
    network.train()
    for batch in batches:
        images = training[batch]
        begin = time.perf_counter()
        reconstruction, indices, loss = network(images)
        error = F.mse_loss(reconstruction, images)
        optimizer.zero_grad()
        torch.autograd.backward(error + loss)
        optimizer.step()
        errors.append(float(error.detach()))
        times.append(time.perf_counter() - begin)
        if not math.isfinite(errors[-1]):
            raise FloatingPointError(f"the error must stay finite, got {errors[-1]} at step {len(errors)}.")
        if layer is not None and indices is not None:
            recent.update(_joint(indices, layer))
            if len(errors) % CURVE_STEPS == 0:
                counts.append(recent.compute().used_codes)
                recent.reset()
    usage = CodebookUsage(layer.num_codes if layer else 1).to(device)
    squares = 0.0
    network.eval()
    with torch.no_grad():
        for images in test[:test_images].split(100):
            reconstruction, indices, _ = network(images)
            squares += float((reconstruction - images).double().square().sum())
            if layer is not None and indices is not None:
                usage.update(_joint(indices, layer))
    mse = squares / test[:test_images].numel()
    curve = [statistics.fmean(errors[start : start + CURVE_STEPS]) for start in range(0, len(errors), CURVE_STEPS)]
    codes = {}
    if layer is not None:
        report = usage.compute()
        codes = {"used": report.used_codes, "perplexity": round(report.perplexity, 2)}
    return {
        "mse": float(f"{mse:.5g}"),
        "psnr": round(10 * math.log10(_PEAK**2 / mse), 3),
        **codes,
        "median": float(f"{statistics.median(times):.4g}"),
        "curve": [float(f"{value:.4g}") for value in curve],
        "used_curve": counts,
    }


def _joint(indices: Tensor, layer: Layer) -> Tensor:
    """Several indices of a token as one: (..., Q) -> (...)."""
    if not isinstance(layer.module, ResidualVectorQuantizer):
        return indices.long()
    # All levels have the same number of codes, the first is the lowest digit.
    places = layer.module.num_codes ** torch.arange(indices.shape[-1], device=indices.device)
    joint: Tensor = (indices * places).sum(-1)
    return joint


def start(layer: Layer | None, code_dim: int, *, seed: int) -> Network:
    """Build the network around ``layer``; its convolutions start equal, whatever the quantizer drew."""
    torch.manual_seed(seed + 1)
    return Network(layer, code_dim)


@cache
def _images(data: str) -> tuple[Tensor, Tensor]:
    """Training and test images, (N, 1, 32, 32) in [-1, 1]: 28 px with a margin, 8 px four times as large."""
    source = load_digits(data)
    return _prepared(source.train.images), _prepared(source.test.images)


def _prepared(images: np.ndarray[Any, Any]) -> Tensor:
    pixels = torch.from_numpy(images).float().div_(127.5).sub_(1).unsqueeze(1)
    side = pixels.shape[-1]
    if side < _SIDE // 2:
        factor = _SIDE // side
        pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        side *= factor
    margin = (_SIDE - side) // 2
    return F.pad(pixels, (margin,) * 4, value=-1.0)
