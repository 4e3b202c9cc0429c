"""Checkpoints: one safetensors file with everything a run needs to go on bit for bit, and no pickle.

Tensors (weights, moments of Adam, states of random generators) lie under dotted names, everything else as JSON in
the header of the same file. So there is one file, replaced in one atomic rename: a crash leaves either the old
checkpoint or the new one, never a mixture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.te_vqgan.runs.files import write_bytes_atomically

__all__ = [
    "adam_state",
    "load_adam_state",
    "load_checkpoint",
    "save_checkpoint",
    "under",
]

_CURE = "docs/guides/reproducing-the-paper.md says how to make it again"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``facts`` to ``path`` as one unit."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes_atomically(path, save(plain, {"facts": json.dumps(facts, sort_keys=True)}))


def load_checkpoint(path: Path, *, cure: str = _CURE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what :func:`save_checkpoint` wrote.

    Args:
        path: of the file.
        cure: what an error says of a file that cannot be read.

    Raises:
        ValueError: the file is damaged, or not such a checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        got = f"one without {error}" if isinstance(error, KeyError) else f"a damaged one ({error})"
        raise ValueError(f"{path} must be a file that this example wrote, got {got}; {cure}.") from error


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose name begins with ``prefix.``, without it."""
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def adam_state(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors called ``PARAMETER/ENTRY``."""
    state: dict[str, Tensor] = {}
    for name, parameter in named:
        for entry, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{entry}"] = torch.as_tensor(value)
    return state


def load_adam_state(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], state: Mapping[str, Tensor]
) -> None:
    """Undo :func:`adam_state`."""
    parameters = dict(named)
    for key, value in state.items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        if entry == "step":
            # Unless it is fused, Adam's counter lives on the CPU whatever the parameter's device.
            place = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            optimizer.state[parameter][entry] = value.to(place)
        else:
            # The fused step walks through memory, so that a moment must lie there as its parameter does.
            optimizer.state[parameter][entry] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
