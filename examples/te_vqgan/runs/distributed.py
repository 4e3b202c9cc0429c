"""Several processes that train one model, as ``torchrun`` starts them on the GPUs of a host or on many hosts.

Every process has the same weights and takes its rows of the same batch, which is a pure function of the step;
gradients are averaged. Rank 0, the main process, alone touches files, logs and evaluates. Hosts need not share a
file system: what it reads, it sends.

Without a launcher there is one process, and every function here gives back what it was given.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.te_vqgan.runs.checks import require

__all__ = [
    "MainFailed",
    "agree",
    "average",
    "average_gradients",
    "from_main",
    "is_main",
    "launched",
    "local_size",
    "mean_of",
    "own_device",
    "rank",
    "seed_step",
    "share",
    "size",
    "start",
    "stop",
    "total",
]

T = TypeVar("T")
Rows = TypeVar("Rows", Tensor, NDArray[np.int64])

# The others wait while the main process evaluates. If one dies, the launcher ends all of them, so that nobody
# really waits so long.
_PATIENCE = datetime.timedelta(days=1)
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


class MainFailed(Exception):  # noqa: N818  (the error itself is raised in the main process)
    """The main process could not compute what this one waited for, and says why itself."""


def start(device: str = "cpu") -> None:
    """Join the processes of the launcher, which its environment variables describe; without them do nothing.

    Args:
        device: where all of them will compute, as torch names it.

    Raises:
        ValueError: there is no such device, or the host has fewer GPUs than processes.
    """
    computing = _existing(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    # Its functions have the default group as default of an argument. Imported later, by the first optimizer, they
    # would hold on to this one for ever, and its threads would meet an interpreter that is shutting down.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "gloo"
    if computing.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(local < count, "LOCAL_RANK", f"below {count}, the GPUs of the host", local)
        torch.cuda.set_device(local)
        # Flags and objects travel between CPUs: who waits for them must not keep a GPU busy.
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)


def stop() -> None:
    """Leave the processes that :func:`start` joined."""
    if launched():
        dist.destroy_process_group()


def launched() -> bool:
    """Say whether :func:`start` joined other processes; unlike :func:`size`, within :func:`from_main` too."""
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if launched() and not _alone.get() else 1


def rank() -> int:
    """Return the number of this process, in [0, :func:`size`)."""
    return dist.get_rank() if launched() and not _alone.get() else 0


def is_main() -> bool:
    """Say whether this process is the one that reads, writes and evaluates."""
    return rank() == 0


def local_size() -> int:
    """Return the number of processes that share this host's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1


def own_device(name: str) -> torch.device:
    """Return the device called ``name``; under a launcher ``cuda`` is the GPU of this process.

    Raises:
        ValueError: there is no such device, or a GPU is named by its number under a launcher.
    """
    device = _existing(name)
    if device.type != "cuda" or not launched():
        return device
    require(device.index is None, "device", "cuda under a launcher, which numbers the GPUs", name)
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def share(rows: Rows) -> Rows:
    """Return this process's part of the rows of a batch: every :func:`size`-th from :func:`rank` on.

    The parts are equally large, so that the mean over a batch is the mean of the means over its parts.

    Raises:
        ValueError: the batch cannot be divided.
    """
    processes = size()
    require(len(rows) % processes == 0, "batch_size", f"a multiple of the {processes} processes", len(rows))
    return rows[rank() :: processes]


def total(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes, in place, and return it."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, the same bits on all of them; in one message.

    Args:
        tensors: of one device; as many, and of the same shapes, on every process.
    """
    if size() == 1:
        return
    tensors = list(tensors)
    flat = total(torch.cat([tensor.reshape(-1) for tensor in tensors])).div_(size())
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by those of the mean of all processes' losses.

    Not ``DistributedDataParallel``: one process must run the very same code, and the adversarial weight needs
    averaged gradients before the backward pass.
    """
    average(parameter.grad for parameter in parameters if parameter.grad is not None)


def mean_of(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each number, (), as its mean over all processes; integers are counts of all of them already."""
    if size() == 1:
        return dict(numbers)
    names = [name for name, value in numbers.items() if value.is_floating_point()]
    means = torch.stack([numbers[name].detach().to("cpu", torch.float64) for name in names])
    average([means])
    return {**numbers, **dict(zip(names, means.unbind(), strict=True))}


def agree(wish: bool) -> bool:
    """Say whether any process has the wish; all call it together and hear the same."""
    if size() == 1:
        return wish
    wishes = torch.tensor(int(wish))
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return bool(wishes)


def from_main(compute: Callable[[], T]) -> T:
    """Return to every process what ``compute`` returns in the main one, where alone it is called.

    The others wait. Meanwhile the main process counts as the only one, so ``compute`` may be anything that works
    without a launcher, but for the training of a quantizer, which would look for the others itself.

    Raises:
        MainFailed: in the others, where ``compute`` raised something in the main process.
    """
    if size() == 1:
        return compute()
    box: list[Any] = [None, None]
    if is_main():
        try:
            with _as_the_only_one():
                box = [True, compute()]
        except Exception:
            # After a signal to all of them they may be gone.
            with contextlib.suppress(RuntimeError):
                dist.broadcast_object_list(box, device=torch.device("cpu"))
            raise
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if not box[0]:
        raise MainFailed("The main process failed.")
    value: T = box[1]
    return value


def seed_step(seed: int, step: int) -> None:
    """Seed torch anew for one step, by rank: dropout must not drop the same places of every process's rows.

    The numbers of a step then depend on nothing before it, and a resumed training needs the state of no other
    generator than the main process's, which a single process goes on with. A single process is not seeded anew.
    """
    if size() > 1:
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))


def _existing(name: str) -> torch.device:
    """Return the device called ``name``, without starting it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, such as 'cpu' or 'cuda', got {name!r}.") from error
    if device.type == "cpu":
        return device
    available = getattr(getattr(torch, device.type, None), "is_available", None)
    there = available is not None and available()
    require(there, "device", f"'cpu', as torch finds no {device.type} here", repr(name))
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        require(device.index < count, "device", f"numbered below {count}, the GPUs of the host", repr(name))
    return device


@contextlib.contextmanager
def _as_the_only_one() -> Iterator[None]:
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)
