"""How many collectives each quantizer runs; ``python -m tests.distributed.collectives`` prints them as Markdown.

One process counts them, in a group of two that sends nothing: the collectives of a quantizer do not depend on the
data of the other processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from te_quant import FSQ, LFQ, ProductQuantizer, Quantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from te_quant.tables import Table
from tests.helpers import plain_quantizer, plain_residual

__all__ = ["COUNTED", "EVENTS", "collectives", "collectives_table", "group_of_two"]

K, C, Q = 11, 6, 3
# name -> quantizer
COUNTED: dict[str, Callable[[], Quantizer]] = {
    "VectorQuantizer, gradient": lambda: plain_quantizer(K, C),
    "VectorQuantizer, ema": lambda: plain_quantizer(K, C, codebook_update="ema"),
    "VectorQuantizer, gradient, penalty": lambda: plain_quantizer(K, C, orthogonal_reg=10.0),
    "VectorQuantizer, ema, penalty": lambda: plain_quantizer(K, C, orthogonal_reg=10.0, codebook_update="ema"),
    "VectorQuantizer, gradient, orthogonal_max_codes": lambda: plain_quantizer(
        K, C, orthogonal_reg=10.0, orthogonal_max_codes=4
    ),
    "VectorQuantizer, ema, orthogonal_max_codes": lambda: plain_quantizer(
        K, C, orthogonal_reg=10.0, orthogonal_max_codes=4, codebook_update="ema"
    ),
    "VectorQuantizer, gradient, orthogonal_active_only": lambda: plain_quantizer(
        K, C, orthogonal_reg=10.0, orthogonal_active_only=True
    ),
    "VectorQuantizer, ema, orthogonal_active_only": lambda: plain_quantizer(
        K, C, orthogonal_reg=10.0, orthogonal_active_only=True, codebook_update="ema"
    ),
    "ResidualVectorQuantizer, gradient": lambda: plain_residual(K, C, Q),
    "ResidualVectorQuantizer, ema": lambda: ResidualVectorQuantizer(K, C, Q, codebook_update="ema"),
    "ResidualVectorQuantizer, ema, shared_codebook": lambda: ResidualVectorQuantizer(
        K, C, Q, codebook_update="ema", shared_codebook=True
    ),
    "ResidualVectorQuantizer, stages": lambda: ResidualVectorQuantizer(
        stages=[VectorQuantizer(K, C, codebook_update="ema"), SimVQ(K, C), VectorQuantizer(K, C)]
    ),
    "ProductQuantizer of ResidualVectorQuantizer": lambda: ProductQuantizer(
        [ResidualVectorQuantizer(K, C, Q, codebook_update="ema") for _ in range(2)]
    ),
    "SimVQ": lambda: SimVQ(K, C),
    "FSQ": lambda: FSQ((4, 3)),
    "LFQ": lambda: LFQ(C),
    "LFQ, two groups": lambda: LFQ(C, entropy_group_dim=3),
    "LFQ, diversity_weight=0": lambda: LFQ(C, diversity_weight=0.0),
}


def _train(quantizer: Quantizer, latents: torch.Tensor) -> None:
    output = quantizer(latents)
    (output.loss + output.quantized.sum()).backward()


def _apply(quantizer: Quantizer, latents: torch.Tensor) -> None:
    quantizer.apply_pending()


# name -> what happens to a quantizer that has trained for a step
EVENTS: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "training step": _train,
    "applying what is pending": _apply,
    "evaluation": lambda quantizer, latents: quantizer.eval()(latents),
    "encode": lambda quantizer, latents: quantizer.encode(latents),
    "state_dict": lambda quantizer, latents: quantizer.state_dict(),
}


@contextmanager
def group_of_two() -> Iterator[None]:
    """Be the first of two processes, the other of which does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def collectives(build: Callable[[], Quantizer], event: str) -> int:
    """Return how many collectives an event runs, within :func:`group_of_two`."""
    quantizer = build().train()
    latents = torch.randn(20, quantizer.code_dim, requires_grad=True)
    _train(quantizer, latents)
    with CommDebugMode() as counter:
        EVENTS[event](quantizer, latents)
    return counter.get_total_counts()


def collectives_table() -> Table:
    """Return the counts of every quantizer, one row per quantizer and one column per event."""
    with group_of_two():
        rows = [[name, *(str(collectives(build, event)) for event in EVENTS)] for name, build in COUNTED.items()]
    return Table(["collectives", *EVENTS], rows)


if __name__ == "__main__":
    sys.stdout.write(f"{collectives_table().to_markdown()}\n")
