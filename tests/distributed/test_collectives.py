"""How many collectives each quantizer runs; each is a wait for all processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.collectives import COUNTED, EVENTS, collectives, collectives_table, group_of_two

# Counts and sums in one all-reduce, of all steps of a residual quantizer together. The scores that draw the codes
# under the penalty are another, and LFQ has one for each group of bits whose entropy it takes.
OF_A_TRAINING_STEP = {
    "VectorQuantizer, gradient": 1,
    "VectorQuantizer, ema": 1,
    "VectorQuantizer, gradient, penalty": 1,
    "VectorQuantizer, ema, penalty": 1,
    "VectorQuantizer, gradient, orthogonal_max_codes": 2,
    "VectorQuantizer, ema, orthogonal_max_codes": 2,
    "ResidualVectorQuantizer, gradient": 1,
    "ResidualVectorQuantizer, ema": 1,
    "ResidualVectorQuantizer, ema, shared_codebook": 1,
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


def test_the_table_has_every_quantizer_and_event() -> None:
    """It is what the docs print."""
    text = collectives_table().to_markdown()
    assert all(name in text for name in (*COUNTED, *EVENTS))
