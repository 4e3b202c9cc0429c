"""The fixed environment of a check, whatever the caller has set: CPU, single precision, gradients, own seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["fixed_surroundings", "seed_cpu"]


@contextmanager
def fixed_surroundings(seed: int) -> Iterator[None]:
    """Run a check as a fresh process would, and put everything back afterwards.

    Args:
        seed: of the generator of the CPU; the generators of accelerators stay as they are.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        torch.set_default_dtype(torch.float32)
        seed_cpu(seed)
        yield


def seed_cpu(seed: int) -> None:
    """Seed the generator that is forked; ``torch.manual_seed`` would seed accelerators too, for good."""
    torch.default_generator.manual_seed(seed)
