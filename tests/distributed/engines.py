"""What the two processes of ``test_engines.py`` do: every public module under DDP and under FSDP2, in float64.

``fully_shard`` is called as its users do: on the whole model, or on each of its children and then on the whole.

Shape letters: B batch, C channels.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from te_quant import Quantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer, VQAutoencoder
from tests.unit.module_cases import (
    CASES,
    QUANTIZER_CASES,
    ModuleCase,
    descend,
    fresh,
    loss_of,
    state_of,
    tensors_in,
)

__all__ = [
    "ACCUMULATED",
    "ENGINES",
    "FREEZES",
    "LIVING",
    "SAVED",
    "STEPS",
    "UNEVEN",
    "WALKED",
    "WALKS",
    "WORLD",
    "Host",
    "blocks",
    "host_of",
    "train",
    "work",
]

WORLD = 2
STEPS = 5
# Rows of each rank in a step, with nothing for one of them or for both.
UNEVEN = [(4, 1), (2, 0), (0, 0), (0, 3), (4, 4)]

WALKED = list(CASES)
_PARTED_MODELS = ["autoencoder", "autoencoder-ema", "autoencoder-residual", "gpt-learned"]
REMEMBERING = [
    name
    for name, case in QUANTIZER_CASES.items()
    if set(case.kinds) & {VectorQuantizer, ResidualVectorQuantizer, SimVQ}
]
LIVING = [
    *REMEMBERING,
    "autoencoder",
    "autoencoder-ema",
    "autoencoder-cosine",
    "autoencoder-polyphase",
    "autoencoder-residual",
]
"""The cases with a quantizer that can be used between two steps."""
# A penalty on the codes that a batch uses is another for every part of it, and so are the latents for dead codes.
ACCUMULATED = [name for name in REMEMBERING if not CASES[name].random and name not in ("vq-cosine", "vq-revival")]


class Host(nn.Module):
    """A stranger's model: a convolution or a linear map, and a module of the table behind it."""

    def __init__(self, case: ModuleCase) -> None:
        super().__init__()
        self.inner = case.build()
        channels = case.example(0)[0].shape[1]
        self.before = nn.Conv2d(channels, channels, 1)
        nn.init.eye_(self.before.weight.view(channels, channels))

    def forward(self, images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Return all that the module returns."""
        return tuple(tensors_in(self.inner(self.before(images), *others)))


def host_of(name: str, seed: int = 0) -> nn.Module:
    """A model that learns something: the module itself where it is a whole model, else a host around it."""
    case = CASES[name]
    torch.manual_seed(seed)
    whole = not case.example(0)[0].is_floating_point() or name.startswith(("autoencoder", "encoder", "decoder"))
    return (fresh(case, seed) if whole else Host(case)).double().train()


def share_of(case: ModuleCase, step: int, rank: int | None) -> tuple[Tensor, ...]:
    """The rows of a rank, or all of them."""
    inputs = case.example(step, torch.float64)
    return inputs if rank is None else tuple(x.detach().chunk(WORLD)[rank] for x in inputs)


def train(model: nn.Module, case: ModuleCase, rank: int | None, steps: range = range(STEPS)) -> None:
    """Train on the rows of a rank, or on all of them."""
    for step in steps:
        torch.manual_seed(100 * step + (rank or 0))
        loss = loss_of(tensors_in(model(*share_of(case, step, rank))))
        assert loss is not None
        loss.backward()
        descend(model)


def train_unevenly(model: nn.Module, case: ModuleCase, rank: int) -> None:
    """Train on different numbers of rows, down to none, of which no mean exists."""
    for step, rows in enumerate(UNEVEN):
        torch.manual_seed(100 * step + rank)
        inputs = (x.detach()[: rows[rank]] for x in case.example(2 * step + rank, torch.float64))
        results = tensors_in(model(*inputs))
        terms = [
            result if result.ndim == 0 else result.square().sum() / 100
            for result in results
            if result.requires_grad
        ]
        torch.stack(terms).sum().backward()
        descend(model)


def blocks(model: nn.Module, quantizer: Quantizer, case: ModuleCase, rank: int | None) -> None:
    """Three optimizer steps of two micro-batches each, as one: the codebook moves once per block."""
    for step in range(3):
        micro = [tuple(x[i : i + 1] for x in share_of(case, step, rank)) for i in range(2)]
        with quantizer.accumulate():
            with model.no_sync():
                (loss_of(tensors_in(model(*micro[0]))) / 2).backward()
            (loss_of(tensors_in(model(*micro[1]))) / 2).backward()
        descend(model)


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state with every shard in its place."""
    return {
        name.removeprefix("module."): (value.full_tensor() if isinstance(value, DTensor) else value)
        .detach()
        .clone()
        for name, value in model.state_dict().items()
    }


def _replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        # What is never called cannot be sharded: lists of modules, for example.
        if type(child).forward is nn.Module.forward or isinstance(child, nn.ModuleList):
            yield from _parts(child)
        else:
            yield child


def _sharded_by_parts(model: nn.Module) -> nn.Module:
    for part in _parts(model):
        fully_shard(part)
    return fully_shard(model)


ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": _replicated,
    "fsdp": _sharded,
    "fsdp-parts": _sharded_by_parts,
}


# A layer in a host is one part either way, and all models have parts of the same kinds.
WALKS = {engine: [*QUANTIZER_CASES, *_PARTED_MODELS] if engine == "fsdp-parts" else WALKED for engine in ENGINES}
"""The cases of each engine."""
# The layers hold ordinary parameters, which is all that the models left out add to those that are saved.
SAVED = [*QUANTIZER_CASES, *_PARTED_MODELS, "gpt-sinusoidal"]
"""The cases that go through a distributed checkpoint."""


def _inner(model: nn.Module) -> nn.Module:
    model = getattr(model, "module", model)
    return getattr(model, "inner", getattr(model, "quantizer", model))


def _trained(name: str, engine: str, rank: int) -> dict[str, Any]:
    """The state after training, and of a copy that went through a distributed checkpoint and one more step."""
    case = CASES[name]
    model = ENGINES[engine](host_of(name))
    train(model, case, rank)
    return {"model": model, "state": _whole_state(model)}


def _checkpointed(name: str, engine: str, rank: int, model: nn.Module, folder: Path) -> dict[str, Any]:
    """What the model and a fresh one that loads its checkpoint do in the next step."""
    case = CASES[name]
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / f"{engine}-{name}")
    other = ENGINES[engine](host_of(name, seed=99))
    train(other, case, rank, range(50, 51))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / f"{engine}-{name}")
    set_model_state_dict(other, state["model"])
    for one in (model, other):
        train(one, case, rank, range(STEPS, STEPS + 1))
    return {"continued": _whole_state(model), "resumed": _whole_state(other)}


def _latents(quantizer: Quantizer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, quantizer.code_dim, 3, 4, generator=generator, dtype=torch.float64)


@torch.no_grad()
def _lived(model: nn.Module, case: ModuleCase, rank: int) -> dict[str, Any]:
    """What a quantizer, and a model around it, do between two steps."""
    quantizer: Any = _inner(model)
    indices = quantizer.encode(_latents(quantizer, 0))
    result = {"indices": indices, "codes": quantizer.decode(indices)}
    own = _latents(quantizer, 1).chunk(WORLD)[rank]
    if not isinstance(quantizer, SimVQ):
        quantizer.kmeans_init(own, generator=torch.Generator().manual_seed(rank))
        result["started"] = _whole_state(quantizer)
        for part in quantizer.modules():
            if isinstance(part, VectorQuantizer):
                part.usage[: part.num_codes // 2] = 0
        result["revived"] = quantizer.revive_dead_codes(own, generator=torch.Generator().manual_seed(rank))
        result["after"] = _whole_state(quantizer)
    if isinstance(model, VQAutoencoder):
        # Only forward gathers the weights of a sharded model, and what is declared to do so as well.
        for method in ("encode_to_indices", "decode_indices"):
            register_fsdp_forward_method(model, method)
        images = case.example(20, torch.float64)[0].detach()
        result["tokens"] = model.encode_to_indices(images)
        result["images"] = model.decode_indices(result["tokens"])
    return result


@torch.no_grad()
def _evaluated(model: nn.Module, case: ModuleCase, rank: int) -> dict[str, Any]:
    """What k-means leaves after an evaluation: no backward pass has put the shards back in their place."""
    quantizer: Any = _inner(model)
    model.eval()(*share_of(case, 22, rank))
    model.train()
    if not isinstance(quantizer, SimVQ):
        own = _latents(quantizer, 2).chunk(WORLD)[rank]
        quantizer.kmeans_init(own, generator=torch.Generator().manual_seed(rank))
    indices = quantizer.encode(_latents(quantizer, 0))
    return {"restarted": _whole_state(quantizer), "indices": indices, "codes": quantizer.decode(indices)}


def _trained_unevenly(name: str, rank: int) -> dict[str, Any]:
    model = _replicated(host_of(name))
    train_unevenly(model, CASES[name], rank)
    return {"state": _whole_state(model)}


def _accumulated(name: str, rank: int) -> dict[str, Any]:
    model = _replicated(host_of(name))
    blocks(model, _inner(model), CASES[name], rank)
    return {"state": _whole_state(model)}


def _freeze_after(model: nn.Module) -> nn.Module:
    replicated = DistributedDataParallel(model)
    _inner(model).freeze()
    return replicated


def _freeze_before(model: nn.Module) -> nn.Module:
    _inner(model).freeze()
    return DistributedDataParallel(model)


def _freeze_after_but_look(model: nn.Module) -> nn.Module:
    replicated = DistributedDataParallel(model, find_unused_parameters=True)
    _inner(model).freeze()
    return replicated


FREEZES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "after": _freeze_after,
    "before": _freeze_before,
    "after-but-look": _freeze_after_but_look,
}


def _frozen(how: str, rank: int) -> dict[str, Any]:
    model = FREEZES[how](host_of("vq"))
    before = state_of(_inner(model))
    train(model, CASES["vq"], rank)
    return {"before": before, "after": state_of(_inner(model)), "state": _whole_state(model)}


def _try(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The result, or what was raised: one module that fails must not hide the others."""
    try:
        return function(*args)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def work(rank: int, folder: str) -> None:
    """One process: every case under every engine, what became of each written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )
    result: dict[str, Any] = {}
    for engine in ENGINES:
        for name in WALKS[engine]:
            trained = _try(_trained, name, engine, rank)
            model = trained.pop("model", None)
            result[engine, name, "train"] = trained
            if model is not None:
                if name in SAVED:
                    result[engine, name, "checkpoint"] = _try(
                        _checkpointed, name, engine, rank, model, Path(folder)
                    )
                if name in LIVING:
                    bare = getattr(model, "module", model)
                    result[engine, name, "live"] = _try(_lived, bare, CASES[name], rank)
                    result[engine, name, "evaluated"] = _try(_evaluated, bare, CASES[name], rank)
    for name in QUANTIZER_CASES:
        result["ddp", name, "uneven"] = _try(_trained_unevenly, name, rank)
    for name in ACCUMULATED:
        result["ddp", name, "accumulate"] = _try(_accumulated, name, rank)
    for how in FREEZES:
        result["ddp", how, "freeze"] = _try(_frozen, how, rank)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
