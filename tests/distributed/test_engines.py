"""Every public module under DDP and FSDP2, in one pair of processes, against one process with the whole batch.

Everything is in float64, so that rounding does not hide a difference. What a step draws at random depends on the
process; such modules are compared between the engines and not with one process.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from te_quant import VectorQuantizer
from tests.distributed.engines import (
    ACCUMULATED,
    FREEZES,
    LIVING,
    SAVED,
    WALKED,
    WALKS,
    WORLD,
    blocks,
    host_of,
    train,
    work,
)
from tests.unit.module_cases import CASES, QUANTIZER_CASES, assert_same_bits, state_of

pytestmark = pytest.mark.slow

TIMEOUT = 400.0
WALKING = [(engine, name) for engine, names in WALKS.items() for name in names]
SHARDED = [(engine, name) for engine, name in WALKING if engine != "ddp"]
# Processes give latents to dead codes in turns, so one process gives others; another test compares the ranks.
REPEATABLE = [name for name in WALKED if not CASES[name].random and name != "vq-revival"]
Results = list[dict[tuple[str, str, str], dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What became of every module in each process; a hang is a failure after ``TIMEOUT`` seconds."""
    folder = tmp_path_factory.mktemp("engines")
    context = mp.spawn(work, args=(str(folder),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=5):
            if time.monotonic() > deadline:
                pytest.fail("the processes hang")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def got(results: Results, engine: str, name: str, what: str) -> list[dict[str, Any]]:
    """What each process has, which must be no error."""
    found = [result.get((engine, name, what), {"error": "the training before it failed"}) for result in results]
    for one in found:
        if "error" in one:
            pytest.fail(one["error"] + "\n" + one.get("traceback", ""), pytrace=False)
    return found


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal up to the rounding of float64."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    """The state after the training of one process on all rows."""
    model = host_of(name)
    train(model, CASES[name], None)
    return state_of(model)


@pytest.mark.parametrize(("engine", "name"), WALKING)
def test_processes_end_with_the_same_bits(name: str, engine: str, results: Results) -> None:
    """Parameters, codebooks and statistics."""
    first, second = got(results, engine, name, "train")
    assert_same_bits(first["state"], second["state"])


@pytest.mark.parametrize(("engine", "name"), [pair for pair in WALKING if pair[1] in REPEATABLE])
def test_training_equals_that_of_one_process(name: str, engine: str, results: Results) -> None:
    """On the same rows, up to rounding."""
    assert_close(got(results, engine, name, "train")[0]["state"], alone(name))


@pytest.mark.parametrize("name", REPEATABLE)
def test_training_moves_what_it_should(name: str) -> None:
    """The negative control: a state that stays as it was is not that of the training."""
    before, after = state_of(host_of(name)), alone(name)
    moving = [key for key in before if not key.endswith(("coefficients", "positions"))]
    still = [key for key in moving if torch.equal(before[key], after[key])]
    # What is added to keys changes no attention weight, and an axial position is not in the example twice.
    assert not [key for key in still if key.rpartition(".")[2] in ("codebook", "basis", "usage", "code_sums")]
    assert len(still) < len(moving)


@pytest.mark.parametrize(("engine", "name"), SHARDED)
def test_sharding_equals_replication(name: str, engine: str, results: Results) -> None:
    """Also where a step draws at random, as both draw the same."""
    assert_close(got(results, engine, name, "train")[0]["state"], got(results, "ddp", name, "train")[0]["state"])


@pytest.mark.parametrize(("engine", "name"), [pair for pair in WALKING if pair[1] in SAVED])
def test_a_distributed_checkpoint_gives_the_next_step(name: str, engine: str, results: Results) -> None:
    """Bit for bit; saved by both processes, and loaded into a model that was trained on something else."""
    for process in got(results, engine, name, "checkpoint"):
        assert_same_bits(process["resumed"], process["continued"])


@pytest.mark.parametrize(("engine", "name"), [pair for pair in WALKING if pair[1] in LIVING])
def test_quantizers_work_between_steps(name: str, engine: str, results: Results) -> None:
    """Encode, decode, k-means and revival: the same bits in both processes, the same values as under DDP."""
    _same_everywhere(results, engine, name, "live")


@pytest.mark.parametrize(("engine", "name"), [pair for pair in WALKING if pair[1] in LIVING])
def test_k_means_holds_after_an_evaluation(name: str, engine: str, results: Results) -> None:
    """After a forward pass a sharded model keeps whole weights until the backward pass; only the shards last."""
    _same_everywhere(results, engine, name, "evaluated")


def _same_everywhere(results: Results, engine: str, name: str, what: str) -> None:
    first, second = got(results, engine, name, what)
    reference = got(results, "ddp", name, what)[0]
    for key, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second[key])
            torch.testing.assert_close(value, reference[key], rtol=1e-9, atol=1e-11)
        else:
            assert_same_bits(value, second[key])
            assert_close(value, reference[key])


@pytest.mark.parametrize("name", QUANTIZER_CASES)
def test_unequal_and_empty_batches_end_with_the_same_bits(name: str, results: Results) -> None:
    """Under DDP; no process waits for another, and none moves apart."""
    first, second = got(results, "ddp", name, "uneven")
    assert_same_bits(first["state"], second["state"])
    assert all(torch.isfinite(value).all() for value in first["state"].values())


@functools.cache
def _blocks_alone(name: str) -> dict[str, Tensor]:
    model = host_of(name)
    for step in range(3):
        train(model, CASES[name], None, range(step, step + 1))
    return state_of(model)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_micro_batches_equal_one_large_batch(name: str, results: Results) -> None:
    """Two processes with two micro-batches each, under ``no_sync``, are one process with all rows."""
    first, second = got(results, "ddp", name, "accumulate")
    assert_same_bits(first["state"], second["state"])
    assert_close(first["state"], _blocks_alone(name))


class _Alone(nn.Module):
    """A model as one process has it, with the method that DDP adds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def no_sync(self) -> Any:
        """Nothing is ever synchronized."""
        return contextlib.nullcontext()

    def forward(self, *inputs: Tensor) -> Any:
        """Pass on."""
        return self.model(*inputs)


def test_micro_batches_without_a_block_move_more_often() -> None:
    """The negative control: one update per micro-batch is another training."""
    model = host_of("vq-ema-fast")
    model.inner.accumulate = contextlib.nullcontext
    blocks(_Alone(model), model.inner, CASES["vq-ema-fast"], None)
    with pytest.raises(AssertionError, match=r"not close|not equal"):
        assert_close(state_of(model), _blocks_alone("vq-ema-fast"))


def test_freezing_after_wrapping_is_what_ddp_refuses(results: Results) -> None:
    """DDP waits for the gradient of a parameter that no longer takes one."""
    for result in results:
        assert "Expected to have finished reduction" in result["ddp", "after", "freeze"]["error"]


@pytest.mark.parametrize("how", [how for how in FREEZES if how != "after"])
def test_freezing_before_wrapping_or_looking_for_unused_parameters(how: str, results: Results) -> None:
    """The two cures that the docs name."""
    first, second = got(results, "ddp", how, "freeze")
    assert_same_bits(first["after"], first["before"])
    assert_same_bits(first["state"], second["state"])
    assert any(isinstance(part, VectorQuantizer) for part in host_of("vq").modules())
