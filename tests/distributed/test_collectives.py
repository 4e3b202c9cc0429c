"""How many collectives each quantizer runs; each is a wait for all processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from te_quant import ResidualVectorQuantizer, VectorQuantizer
from tests.distributed.collectives import COUNTED, EVENTS, collectives, collectives_table, group_of_two

# Counts and sums in one all-reduce, of all steps of a residual quantizer together. The scores that draw the codes
# under the penalty are another, and so are the sums where the penalty needs the counts first. LFQ has one for each
# group of bits whose entropy it takes.
OF_A_TRAINING_STEP = {
    "VectorQuantizer, gradient": 1,
    "VectorQuantizer, ema": 1,
    "VectorQuantizer, gradient, penalty": 1,
    "VectorQuantizer, ema, penalty": 1,
    "VectorQuantizer, gradient, orthogonal_max_codes": 2,
    "VectorQuantizer, ema, orthogonal_max_codes": 2,
    "VectorQuantizer, gradient, orthogonal_active_only": 1,
    "VectorQuantizer, ema, orthogonal_active_only": 2,
    "ResidualVectorQuantizer, gradient": 1,
    "ResidualVectorQuantizer, ema": 1,
    "ResidualVectorQuantizer, ema, shared_codebook": 1,
    "ResidualVectorQuantizer, stages": 1,
    "ProductQuantizer of ResidualVectorQuantizer": 1,
    "SimVQ": 1,
    "FSQ": 0,
    "LFQ": 1,
    "LFQ, two groups": 2,
    "LFQ, diversity_weight=0": 0,
}


@pytest.fixture
def _grouped() -> Iterator[None]:
    with group_of_two():
        yield


@pytest.mark.usefixtures("_grouped")
@pytest.mark.parametrize("name", COUNTED)
def test_collectives_of_a_training_step(name: str) -> None:
    """Forward and backward."""
    assert collectives(COUNTED[name], "training step") == OF_A_TRAINING_STEP[name]


@pytest.mark.usefixtures("_grouped")
@pytest.mark.parametrize("event", [event for event in EVENTS if event != "training step"])
@pytest.mark.parametrize("name", COUNTED)
def test_nothing_else_runs_a_collective(name: str, event: str) -> None:
    """Processes may evaluate, save and move the codebook at different times."""
    assert collectives(COUNTED[name], event) == 0


@pytest.mark.usefixtures("_grouped")
@pytest.mark.parametrize(("stages", "build"), [(1, VectorQuantizer), (3, ResidualVectorQuantizer)])
def test_collectives_of_k_means_and_revival(stages: int, build: Any) -> None:
    """Keys and rows to draw from, then counts and sums per iteration; each codebook for itself."""
    quantizer = build(5, 4, **({} if stages == 1 else {"num_quantizers": stages}))
    with CommDebugMode() as counter:
        quantizer.kmeans_init(torch.randn(20, 4), iterations=3)
    assert counter.get_total_counts() == stages * (2 + 2 * 3)
    with CommDebugMode() as counter:
        quantizer.revive_dead_codes(torch.randn(20, 4))
    assert counter.get_total_counts() == stages * 2


def test_the_docs_have_the_table() -> None:
    """With every quantizer and event."""
    text = collectives_table().to_markdown()
    assert all(name in text for name in (*COUNTED, *EVENTS))
    page = Path(__file__).parents[2] / "docs" / "integrations" / "distributed.md"
    assert f"<!-- python -m tests.distributed.collectives -->\n{text}\n" in page.read_text(encoding="utf-8")
