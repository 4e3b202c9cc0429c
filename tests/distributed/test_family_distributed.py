"""Two processes over gloo: what LFQ, SimVQ and ResidualVectorQuantizer share, and what one process would do.

Shape letters: N latent vectors, C code size.
"""

from __future__ import annotations

import datetime
import math
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from te_quant import LFQ, SimVQ
from tests.helpers import plain_residual

WORLD = 2
TIMEOUT = 90.0

# Which latents replace dead codes depends on how they are spread over processes.
_RVQ_EMA = partial(plain_residual, 6, 4, decay=0.8, codebook_update="ema")
STATEFUL: dict[str, Any] = {
    "sim": partial(SimVQ, 6, 4, decay=0.8),
    "sim-skip": partial(SimVQ, 6, 4, decay=0.8, nonfinite="skip"),
    "rvq": partial(plain_residual, 6, 4, 2, decay=0.8, orthogonal_reg=3.0),
    "rvq-ema": partial(_RVQ_EMA, num_quantizers=2, orthogonal_reg=3.0),
    "rvq-ema-shared": partial(_RVQ_EMA, num_quantizers=3, shared_codebook=True),
}
LOOKUP_FREE: dict[str, Any] = {
    "lfq": partial(LFQ, 4, temperature=0.5, diversity_weight=2.0),
    "lfq-groups": partial(LFQ, 4, temperature=0.5, diversity_weight=2.0, entropy_group_dim=3),
    "lfq-skip": partial(LFQ, 4, temperature=0.5, diversity_weight=2.0, nonfinite="skip"),
}


def build(factory: Any) -> Any:
    """The same quantizer in every process."""
    return factory(generator=torch.Generator().manual_seed(0)).double()


def batch(step: int, rank: int) -> Tensor:
    """Different data on every rank and step; rank 1 has nothing at step 1, nobody at step 3."""
    if step == 3 or (step == 1 and rank == 1):
        return torch.empty(0, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(20 + 7 * rank, 4, dtype=torch.float64, generator=generator) * 0.5 + rank


def paired(rank: int, *, spoil: bool) -> Tensor:
    """As many rows on both ranks, so that means over ranks are means over rows; some of them not finite."""
    generator = torch.Generator().manual_seed(7 + rank)
    rows = torch.randn(30, 4, dtype=torch.float64, generator=generator) * 0.5 + 0.4 * rank
    if spoil:
        rows[3 * rank + 1, 2] = math.nan
    return rows


def encoder() -> Tensor:
    """The weights whose gradient DDP would average."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 4, dtype=torch.float64, generator=generator).requires_grad_()


def lookup_free(name: str, rows: Tensor) -> dict[str, Tensor]:
    """One step of an encoder before an LFQ: the penalty and its gradient."""
    weights, quantizer = encoder(), LOOKUP_FREE[name]().double()
    latents = rows.nan_to_num() @ weights
    output = quantizer(torch.where(rows.isnan(), math.nan, latents))
    output.loss.backward()
    assert weights.grad is not None
    return {"penalty": output.regularization_loss.detach(), "gradient": weights.grad}


def train(quantizer: Any, ranks: tuple[int, ...]) -> None:
    """Five steps on the data of these ranks."""
    for step in range(5):
        quantizer(torch.cat([batch(step, rank) for rank in ranks]).requires_grad_()).loss.backward()


def work(rank: int, folder: str) -> None:
    """One process: every scenario, its result written to a file."""
    torch.set_num_threads(1)
    # Built before the group exists: the group must be looked up at each call.
    quantizers = {name: build(factory) for name, factory in STATEFUL.items()}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )
    result: dict[str, Any] = {}
    for name, quantizer in quantizers.items():
        train(quantizer, (rank,))
        result[name] = dict(quantizer.state_dict())
    for name in LOOKUP_FREE:
        result[name] = lookup_free(name, paired(rank, spoil="skip" in name))
    # One rank has nothing: it takes part all the same.
    empty = LFQ(4).double()(batch(1, rank).requires_grad_())
    empty.loss.backward()
    result["lfq-empty"] = {"penalty": empty.regularization_loss.detach()}
    if rank == 0:
        # Evaluation waits for nobody.
        result["lfq-eval"] = {"loss": LFQ(4).double().eval()(batch(0, 0)).loss}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank ended with; a hang is a failure after ``TIMEOUT`` seconds."""
    folder = tmp_path_factory.mktemp("gloo")
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


@pytest.mark.parametrize("name", STATEFUL)
def test_ranks_agree_and_equal_one_process(name: str, results: list[Any]) -> None:
    """Bit-identical state on both ranks, that of one process with all data, and not that of one rank's data."""
    first, second = (rank[name] for rank in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    single, alone = build(STATEFUL[name]), build(STATEFUL[name])
    train(single, (0, 1))
    train(alone, (0,))
    for key, value in single.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-10, atol=1e-12)
    assert any(not torch.allclose(alone.state_dict()[key], value, rtol=1e-6) for key, value in first.items())


@pytest.mark.parametrize("name", LOOKUP_FREE)
def test_averaged_entropy_gradients_are_those_of_all_rows(name: str, results: list[Any]) -> None:
    """Averaged over the ranks, as DDP does, gradients equal those of one process; a rank alone has others."""
    spoil = "skip" in name
    everything = torch.cat([paired(rank, spoil=spoil) for rank in range(WORLD)])
    single, alone = lookup_free(name, everything), lookup_free(name, paired(0, spoil=spoil))
    for key, value in single.items():
        mean = sum(rank[name][key] for rank in results) / WORLD
        torch.testing.assert_close(mean, value, rtol=1e-10, atol=1e-12)
        assert not torch.allclose((alone[key] + 0 * value), results[0][name][key], rtol=1e-4)


def test_a_rank_without_rows_takes_part(results: list[Any]) -> None:
    """It has no assignment entropy of its own, and misses what the group misses."""
    rows = batch(1, 0)
    with_rows = LFQ(4).double()(rows).regularization_loss
    torch.testing.assert_close(results[0]["lfq-empty"]["penalty"], with_rows)
    without = results[1]["lfq-empty"]["penalty"]
    assert 0 < without < with_rows


def test_evaluation_waits_for_nobody(results: list[Any]) -> None:
    """One rank evaluates alone, on its own rows."""
    assert results[0]["lfq-eval"]["loss"] == LFQ(4).double().eval()(batch(0, 0)).loss
