"""What users wrap in ``DistributedDataParallel``, in two processes over gloo: a GPT, a model that counts, and
quantizers with masks.

Shape letters: B batch, T tokens.
"""

from __future__ import annotations

import datetime
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from te_quant import (
    GPT,
    LFQ,
    CodebookUsage,
    GPTConfig,
    Quantizer,
    ResidualVectorQuantizer,
    Segment,
    VectorQuantizer,
)
from tests.helpers import plain_quantizer

WORLD = 2
TIMEOUT = 90.0
STEPS = 3
K = 10


def build() -> GPT:
    """The same network in every process, float64."""
    torch.manual_seed(0)
    segments = (Segment("text", 8, (3,), "learned"), Segment("image", 16, (2, 2), "sinusoidal"))
    return GPT(GPTConfig(segments, width=16, depth=1, num_heads=2, tied_head=False)).double()


class Losses(nn.Module):
    """Call ``combine`` on the losses inside of ``forward``, as the guide says."""

    def __init__(self, combine: Callable[[dict[str, Tensor]], Any]) -> None:
        super().__init__()
        self.gpt = build()
        self.combine = combine

    def forward(self, tokens: Tensor, order: tuple[str, ...]) -> Any:
        """The losses, combined."""
        return self.combine(self.gpt.losses(tokens, order))


BOTH, LAST, IMAGE = ("text", "image"), ("image", "text"), ("image",)
# combine, order, options of DistributedDataParallel
CURES: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "all": (lambda losses: sum(losses.values()), BOTH, {}),
    "weight-zero": (lambda losses: losses["image"] + 0 * losses["text"], BOTH, {}),
    "weight-zero-last": (lambda losses: losses["image"] + 0 * losses["text"], LAST, {}),
    "one-returned": (lambda losses: losses["image"], BOTH, {"find_unused_parameters": True}),
    "both-returned": (lambda losses: losses, BOTH, {"find_unused_parameters": True}),
    "one-segment": (lambda losses: losses["image"], IMAGE, {"find_unused_parameters": True}),
}
TRAPS: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "one-loss": (lambda losses: losses["image"], BOTH, {}),
    "one-loss-last": (lambda losses: losses["image"], LAST, {}),
    "one-segment": (lambda losses: losses["image"], IMAGE, {}),
}


def tokens(step: int, rank: int, order: tuple[str, ...]) -> Tensor:
    """(4, T) of this process."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    columns = {
        "text": torch.randint(8, (4, 3), generator=generator),
        "image": torch.randint(16, (4, 4), generator=generator),
    }
    return torch.cat([columns[name] for name in order], 1)


def train(model: nn.Module, order: tuple[str, ...], ranks: tuple[int, ...]) -> None:
    """Three steps; of several ranks the mean of their losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(STEPS):
        outputs = [model(tokens(step, rank, order), order) for rank in ranks]
        losses = [output["image"] if isinstance(output, dict) else output for output in outputs]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()


class Counting(nn.Module):
    """A model that counts its own indices, and the same with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.usage = CodebookUsage(K)
        self.buffer: Tensor
        self.register_buffer("buffer", torch.zeros(K, dtype=torch.int64))

    def forward(self, indices: Tensor) -> Tensor:
        """Count, and return something with a gradient."""
        self.usage.update(indices)
        self.buffer += torch.bincount(indices, minlength=K)
        return self.layer(indices[:1, None].float()).sum()


def indices(step: int, rank: int) -> Tensor:
    """Other codes on every rank; another number of them."""
    return torch.arange(3 + 2 * rank) % 4 + 5 * rank + (step == 2)


def quantizer(name: str) -> Quantizer:
    """The same one in every process, float64."""
    generator = torch.Generator().manual_seed(0)
    penalty: dict[str, Any] = {"orthogonal_reg": 10.0, "orthogonal_active_only": True}
    built: dict[str, Callable[[], Quantizer]] = {
        "gradient": lambda: plain_quantizer(6, 4, **penalty, generator=generator),
        "ema": lambda: plain_quantizer(6, 4, codebook_update="ema", **penalty, generator=generator),
        "revival": lambda: VectorQuantizer(6, 4, generator=generator),
        "residual": lambda: ResidualVectorQuantizer(6, 4, 2, codebook_update="ema", generator=generator),
        "lfq": lambda: LFQ(4, temperature=0.5),
    }
    return built[name]().double()


MASKED = ("gradient", "ema", "revival", "residual", "lfq")


def masked_batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Other latents and another mask on every rank and step; rank 1 masks all at step 1, both do at step 3."""
    generator = torch.Generator().manual_seed(1000 + 100 * step + rank)
    latents = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator) + rank
    mask = torch.rand(2, 3, 5, generator=generator) < 0.4 + 0.3 * rank
    return latents, mask & (step != 3 and (step, rank) != (1, 1))


def train_masked(name: str, ranks: tuple[int, ...], *, masked: bool = True) -> dict[str, Tensor]:
    """Five steps on the tokens that count, with the mask or cut out of the latents; losses, gradients, state."""
    trained = quantizer(name)
    learns = any(parameter.requires_grad for parameter in trained.parameters())
    module = DistributedDataParallel(trained) if learns else trained
    optimizer = torch.optim.SGD(trained.parameters(), 0.1) if learns else None
    found = {}
    for step in range(5):
        batches = [masked_batch(step, rank) for rank in ranks]
        latents, mask = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if masked:
            latents = torch.where(mask.unsqueeze(1), latents, float("nan")).requires_grad_()
            output = module(latents, mask=mask)
        else:
            latents = latents.movedim(1, -1)[mask].requires_grad_()
            output = module(latents)
        module.zero_grad()
        (output.loss + output.quantized.square().sum()).backward()
        if optimizer is not None:
            optimizer.step()
        assert latents.grad is not None
        found[f"loss-{step}"] = output.loss.detach()
        found[f"gradient-{step}"] = latents.grad.movedim(1, -1)[mask] if masked else latents.grad
    return {**found, **trained.state_dict()}


def work(rank: int, folder: str) -> None:
    """One process: everything, its results written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )
    result: dict[str, Any] = {}
    for name, (combine, order, options) in CURES.items():
        model = Losses(combine)
        train(DistributedDataParallel(model, **options), order, (rank,))
        result[name] = dict(model.gpt.state_dict())
    for name, (combine, order, options) in TRAPS.items():
        try:
            train(DistributedDataParallel(Losses(combine), **options), order, (rank,))
        except RuntimeError as error:
            result["trap " + name] = str(error)
    for name in MASKED:
        for masked in (True, False):
            result[f"{name}, masked: {masked}"] = train_masked(name, (rank,), masked=masked)
    counting = Counting()
    wrapped = DistributedDataParallel(counting)
    for step in range(STEPS):
        wrapped(indices(step, rank)).backward()
    own = counting.usage.histogram.clone()
    total = counting.usage.synchronized()
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    result |= {
        "own": own,
        "after": counting.usage.histogram,
        "total": total.histogram,
        "again": counting.usage.synchronized().histogram,
        "alone": counting.usage.synchronized(alone).histogram,
        "buffer": counting.buffer,
    }
    if importlib.util.find_spec("torchmetrics"):
        from te_quant.integrations.torchmetrics import CodebookPerplexity, UsedCodes

        for name, metric in (("perplexity", CodebookPerplexity(K)), ("used", UsedCodes(K))):
            for step in range(STEPS):
                metric.update(indices(step, rank))
            result[name] = metric.compute()
            result[name + " own"] = metric.histogram
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CURES)
def test_a_gpt_trains_as_in_one_process(results: list[dict[str, Any]], name: str) -> None:
    """Equal bits on every rank, and the weights of one process that sees the mean of all losses."""
    combine, order, _ = CURES[name]
    alone = Losses(combine)
    train(alone, order, tuple(range(WORLD)))
    expected = alone.gpt.state_dict()
    assert not torch.equal(expected["start"], build().start)
    for key, value in expected.items():
        assert torch.equal(results[0][name][key], results[1][name][key])
        torch.testing.assert_close(results[0][name][key], value, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_a_segment_that_is_not_trained_stops_the_second_step(results: list[dict[str, Any]], name: str) -> None:
    """Negative control of the cures: what the guide warns of does happen."""
    for result in results:
        assert "Expected to have finished reduction in the prior iteration" in result["trap " + name]


def counts(ranks: tuple[int, ...]) -> Tensor:
    """The histogram of these ranks over all steps."""
    return sum(torch.bincount(indices(s, r), minlength=K) for s in range(STEPS) for r in ranks)  # type: ignore[return-value]


@pytest.mark.slow
def test_counts_are_summed_over_processes(results: list[dict[str, Any]]) -> None:
    """On request, as often as one likes, over any group; what a process has counted itself stays as it is."""
    for rank, result in enumerate(results):
        for name in ("own", "after", "alone"):
            assert torch.equal(result[name], counts((rank,)))
        for name in ("total", "again"):
            assert torch.equal(result[name], counts((0, 1)))


@pytest.mark.slow
def test_a_buffer_would_lose_the_counts_of_all_but_one_process(results: list[dict[str, Any]]) -> None:
    """Why the histogram is none: wrapping broadcasts the first process's buffers."""
    assert torch.equal(results[0]["buffer"], counts((0,)))
    assert not torch.equal(results[1]["buffer"], counts((1,)))


@pytest.mark.slow
def test_torchmetrics_are_summed_over_processes(results: list[dict[str, Any]]) -> None:
    """Every process computes the value of all indices, and keeps its own counts."""
    pytest.importorskip("torchmetrics")
    usage = CodebookUsage(K)
    usage.merge(counts((0, 1)))
    for rank, result in enumerate(results):
        assert result["perplexity"].item() == pytest.approx(usage.compute().perplexity, rel=1e-6)
        assert result["used"] == usage.compute().used_codes
        assert torch.equal(result["used own"], counts((rank,)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_masked_tokens_count_on_no_rank(name: str, results: list[Any]) -> None:
    """Other masks on each: losses, gradients and state are those of ranks that have the other tokens only."""
    for rank in results:
        found, wanted = rank[f"{name}, masked: True"], rank[f"{name}, masked: False"]
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-10, atol=1e-12, msg=key)
    first, second = (rank[f"{name}, masked: True"] for rank in results)
    assert all(torch.equal(first[key], second[key]) for key in quantizer(name).state_dict())


@pytest.mark.slow
def test_masked_statistics_are_those_of_one_process(results: list[Any]) -> None:
    """With the tokens of both ranks; those of one rank would end elsewhere."""
    both, one = train_masked("ema", (0, 1)), train_masked("ema", (0,))
    for key in quantizer("ema").state_dict():
        torch.testing.assert_close(results[0]["ema, masked: True"][key], both[key], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(one["usage"], both["usage"], rtol=1e-3)
