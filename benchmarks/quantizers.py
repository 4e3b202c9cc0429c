"""Whole quantizers: forward in evaluation, forward and backward in training.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Cell, Contender, Context, compete
from benchmarks.floor import necessary_bytes
from benchmarks.peers import MODES, QUANTIZERS, Adapter, build_quantizer
from benchmarks.problem import Problem, Size
from benchmarks.sizes import SIZES

__all__ = ["cells", "contest", "quantizer_call", "quantizer_contender"]

# Of the largest code: a lookup is exact, straight-through rounds once.
_TOLERANCE = 1e-5


def quantizer_call(adapter: Adapter, mode: str, problem: Problem) -> Callable[[int], list[Tensor]]:
    """A call that quantizes and, in training, goes back; it returns all that has come out of it."""
    if mode == "eval":

        @torch.no_grad()
        def evaluate(number: int) -> list[Tensor]:
            return list(adapter.forward(problem.latents[number % problem.sets]))

        return evaluate

    inputs = [latents.clone().requires_grad_() for latents in problem.latents]
    upstream = problem.upstream

    def train(number: int) -> list[Tensor]:
        latents = inputs[number % problem.sets]
        latents.grad = None
        adapter.module.zero_grad(set_to_none=True)
        quantized, indices, loss = adapter.forward(latents)
        torch.autograd.backward((quantized, loss), (upstream, None))
        results = [quantized.detach(), indices, loss.detach(), latents.grad, adapter.codebook.grad]
        return [tensor for tensor in results if tensor is not None]

    return train


def quantizer_contender(name: str, mode: str, problem: Problem) -> Contender:
    """A quantizer with a check of indices, codes and gradients."""
    adapter = build_quantizer(name, mode, problem)
    call = quantizer_call(adapter, mode, problem)
    return Contender(call, lambda: _check(call(0), mode, problem))


def contest(
    context: Context, size: Size, mode: str, names: tuple[str, ...] = tuple(QUANTIZERS)
) -> dict[str, dict[str, Any]]:
    """The entries of the quantizers ``names``."""
    problem = Problem(size, context.device, sets=1 if context.device.type == "cpu" else 3)
    builders: dict[str, Callable[[], Contender]] = {
        name: partial(quantizer_contender, name, mode, problem) for name in names
    }
    return compete(builders, context)


def cells(context: Context) -> list[Cell]:
    """One a mode and size."""
    return [
        Cell(
            f"quantizer/{mode}-{size.label}",
            {"mode": mode, **size._asdict()},
            partial(_run, mode=mode, size=size),
        )
        for mode in MODES
        for size in SIZES[context.grid]
    ]


def _run(context: Context, mode: str, size: Size) -> dict[str, Any]:
    facts = {"bytes": necessary_bytes(size, forward=True)}
    return {"contenders": contest(context, size, mode), "facts": facts}


def _check(results: list[Tensor], mode: str, problem: Problem) -> str | None:
    quantized, indices = results[0], results[1]
    verdict = problem.verdict(indices)
    if verdict is not None:
        return verdict
    # Under moving averages some return the codes from before the update, others those from after it.
    if mode != "ema":
        error = float((quantized - problem.codebook[indices]).abs().max())
        if error > _TOLERANCE * float(problem.codebook.abs().max()):
            return f"what it returns is off the codes of its own indices by up to {error:.1e}"
    expected = {"eval": 0, "gradient": 2, "ema": 1}[mode]
    found = len(results) - 3
    return None if found == expected else f"gradients of {found} tensors came back, not of {expected}"
