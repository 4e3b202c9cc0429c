"""Two processes over gloo: the same codebook on every rank, and that of one process on all the data.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import copy
import datetime
import io
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from te_quant import VectorQuantizer
from tests.helpers import exactly, plain_quantizer

WORLD = 2
TIMEOUT = 90.0

# name -> options of the quantizer; K = 6, C = 4, float64
SCENARIOS: dict[str, dict[str, Any]] = {
    "ema": {"codebook_update": "ema", "decay": 0.8},
    "ema-penalty": {"codebook_update": "ema", "decay": 0.8, "orthogonal_reg": 10.0},
    "ema-active": {"codebook_update": "ema", "orthogonal_reg": 10.0, "orthogonal_active_only": True},
    "ema-cosine": {"codebook_update": "ema", "decay": 0.8, "metric": "cosine"},
    "ema-cosine-raw": {"codebook_update": "ema", "decay": 0.8, "metric": "cosine_raw"},
    "ema-skip": {"codebook_update": "ema", "nonfinite": "skip"},
    "gradient": {"orthogonal_reg": 10.0},
    "gradient-dot": {"metric": "dot", "codebook_weight": 0.25},
    "gradient-active": {"orthogonal_reg": 10.0, "orthogonal_active_only": True},
}
SUBSETS: dict[str, dict[str, Any]] = {
    "subset": {"codebook_update": "ema", "orthogonal_reg": 10.0, "orthogonal_max_codes": 2},
    "subset-gradient": {"orthogonal_reg": 10.0, "orthogonal_max_codes": 2},
}


def build(options: dict[str, Any]) -> VectorQuantizer:
    """The same quantizer in every process."""
    quantizer = plain_quantizer(6, 4, **options, generator=torch.Generator().manual_seed(0)).double()
    codes = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        quantizer.codebook.copy_(codes)
        if quantizer.codebook_update == "ema":
            quantizer.code_sums.copy_(codes)
    return quantizer


def batch(step: int, rank: int) -> Tensor:
    """Different data on every rank and step; rank 1 has nothing at step 1, nobody at step 3."""
    if step == 3 or (step == 1 and rank == 1):
        return torch.empty(0, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(20 + 7 * rank, 4, dtype=torch.float64, generator=generator) + rank


def train(quantizer: VectorQuantizer, ranks: tuple[int, ...], seed: int | None = None) -> list[Tensor]:
    """Five steps on the data of these ranks; the losses of the penalty."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    penalties = []
    for step in range(5):
        latents = torch.cat([batch(step, rank) for rank in ranks]).requires_grad_()
        output = quantizer(latents, generator=generator)
        output.loss.backward()
        penalties.append(output.regularization_loss.detach())
    return penalties


def work(rank: int, folder: str) -> None:
    """One process: every scenario, its final state written to a file."""
    torch.set_num_threads(1)
    # Built before the group exists: the group must be looked up at each call.
    quantizers = {name: build(options) for name, options in {**SCENARIOS, **SUBSETS}.items()}
    lifecycle = {update: build({"codebook_update": update}) for update in ("gradient", "ema")}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )
    result: dict[str, Any] = {}
    for name, quantizer in quantizers.items():
        torch.manual_seed(rank)
        penalties = train(quantizer, (rank,), seed=10 + rank if name in SUBSETS else None)
        result[name] = {**quantizer.state_dict(), "penalties": torch.stack(penalties)}
    for update, quantizer in lifecycle.items():
        generator = torch.Generator().manual_seed(rank)
        quantizer.kmeans_init(batch(0, rank), generator=generator, iterations=0)
        result[f"kmeans-start-{update}"] = {k: v.clone() for k, v in quantizer.state_dict().items()}
        quantizer.kmeans_init(batch(0, rank), generator=generator, iterations=3)
        result[f"kmeans-{update}"] = {k: v.clone() for k, v in quantizer.state_dict().items()}
        quantizer.usage[:4] = 0
        revived = quantizer.revive_dead_codes(batch(2, rank), generator=generator)
        result[f"revive-{update}"] = {
            **{k: v.clone() for k, v in quantizer.state_dict().items()},
            "which": revived,
        }
        # Only rank 0 has rows, and fewer than there are codes.
        few = batch(0, 0)[:3] if rank == 0 else batch(3, rank)
        quantizer.kmeans_init(few, generator=generator)
        result[f"kmeans-few-{update}"] = {k: v.clone() for k, v in quantizer.state_dict().items()}
    # What replaces dead codes; the start is the largest case.
    fresh = VectorQuantizer(40, 4, generator=torch.Generator().manual_seed(0)).double()
    for step in range(3):
        fresh(batch(step, rank))
        fresh.apply_pending()
        result[f"start-{step}"] = {k: v.clone() for k, v in fresh.state_dict().items()}
    # A group of this rank alone: nothing is shared.
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    private = build({"codebook_update": "ema", "process_group": alone})
    train(private, (rank,))
    result["alone"] = dict(private.state_dict())
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


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_agree_and_equal_one_process(name: str, results: list[Any]) -> None:
    """Bit-identical state on both ranks, equal to a single process that saw all the data."""
    states = [{k: v for k, v in rank[name].items() if k != "penalties"} for rank in results]
    assert identical(*states)
    single = build(SCENARIOS[name])
    penalties = train(single, (0, 1))
    for key, value in single.state_dict().items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-10, atol=1e-12)
    for rank in results:
        torch.testing.assert_close(rank[name]["penalties"], torch.stack(penalties), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCENARIOS)
def test_one_rank_alone_would_end_elsewhere(name: str, results: list[Any]) -> None:
    """Negative control: the data of one rank gives another state, so the sums were really shared."""
    for rank in range(WORLD):
        single = build(SCENARIOS[name])
        train(single, (rank,))
        assert not torch.allclose(single.usage, results[rank][name]["usage"], rtol=1e-6)


@pytest.mark.parametrize("name", SUBSETS)
def test_random_subsets_are_the_same_everywhere(name: str, results: list[Any]) -> None:
    """With different generators on the ranks, the penalized codes, and so the codebooks, are the same."""
    assert identical(results[0][name], results[1][name])
    assert (results[0][name]["penalties"] > 0).all()


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("call", ["kmeans-start", "kmeans", "revive", "kmeans-few"])
def test_kmeans_and_revival_are_the_same_everywhere(update: str, call: str, results: list[Any]) -> None:
    """Rows drawn with different generators from different data; every rank ends with the same bits."""
    one, two = (rank[f"{call}-{update}"] for rank in results)
    assert identical(one, two)
    if call == "revive":
        assert one["which"].tolist() == [True] * 4 + [False] * 2
        pool = torch.cat([batch(2, rank) for rank in range(WORLD)])
        assert all((pool == code).all(1).any() for code in one["codebook"][:4])
    if call == "kmeans-few":
        few = batch(0, 0)[:3]
        torch.testing.assert_close(one["codebook"][:3].sort(0).values, few.sort(0).values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_codebooks_start_at_the_latents_of_all_ranks(step: int, results: list[Any]) -> None:
    """The same bits everywhere, from both ranks in turns; rank 1 has nothing in the second step."""
    one, two = (rank[f"start-{step}"] for rank in results)
    assert identical(one, two)
    if step == 0:
        pools = [batch(0, rank) for rank in range(WORLD)]
        own = [sum(bool((pool == code).all(1).any()) for code in one["codebook"]) for pool in pools]
        assert min(own) >= 5
        assert sum(own) == int(one["revivals"])


def test_kmeans_uses_the_rows_of_all_ranks(results: list[Any]) -> None:
    """The start is drawn from the union of the rows, and the centres fit the rows of both ranks."""
    start = results[0]["kmeans-start-ema"]["codebook"]
    assert all((torch.cat([batch(0, 0), batch(0, 1)]) == code).all(1).any() for code in start)
    pool = torch.cat([batch(0, rank) for rank in range(WORLD)])
    centres = results[0]["kmeans-ema"]["codebook"]
    owner = (pool[:, None] - centres).square().sum(2).argmin(1)
    spread = (pool - centres[owner]).square().sum(1).mean()
    assert spread < (pool - pool.mean(0)).square().sum(1).mean() * 0.6
    # The ranks' data lie a unit apart a dimension, so both have centres.
    assert len(owner[:20].unique()) > 1
    assert len(owner[20:].unique()) > 1


def test_a_group_given_is_the_group_used(results: list[Any]) -> None:
    """A quantizer with a group of one process counts that process alone."""
    for rank in range(WORLD):
        single = build({"codebook_update": "ema"})
        train(single, (rank,))
        for name, value in single.state_dict().items():
            torch.testing.assert_close(results[rank]["alone"][name], value)
    assert not identical(results[0]["alone"], results[1]["alone"])


@pytest.fixture
def lone_group(tmp_path: Path) -> Iterator[Any]:
    """A live group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_live_group_is_shared_by_copies_and_never_pickled(lone_group: Any) -> None:
    """A deepcopy keeps the connection; pickle and torch.save refuse it; state_dict is free of it."""
    quantizer = plain_quantizer(6, 4, codebook_update="ema", process_group=lone_group)
    quantizer(torch.randn(9, 4))
    twin = copy.deepcopy(quantizer)
    assert twin._group.resolve() is quantizer._group.resolve()
    assert twin._group.group is lone_group
    message = "process_group must be None when a quantizer is pickled, got a live group."
    for write in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(TypeError, match=exactly(message)):
            write(quantizer)
    assert pickle.loads(pickle.dumps(quantizer.state_dict())).keys() == quantizer.state_dict().keys()
    assert pickle.loads(pickle.dumps(plain_quantizer(6, 4))).num_codes == 6


def test_a_group_of_one_needs_no_sums(lone_group: Any) -> None:
    """With nobody else, a quantizer counts as without a group."""
    with_group, without = (build({"codebook_update": "ema", "process_group": g}) for g in (lone_group, None))
    for quantizer in (with_group, without):
        train(quantizer, (0,))
    assert identical(dict(with_group.state_dict()), dict(without.state_dict()))
