"""Weights that FSDP2 has sharded: read, written to as a whole, or refused where only whole ones will do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["gathered", "overwrite", "require_savable", "require_whole", "reshard_owners"]


def require_whole(parameters: Iterable[Tensor], model: str, variable: str, method: str) -> None:
    """Refuse shards outside of ``forward``, for which FSDP2 gathers the weights.

    Args:
        parameters: that nothing else gathers.
        model: what the error calls the module.
        variable: a name for it in code.
        method: one of its methods.

    Raises:
        RuntimeError: one of them is a shard.
    """
    for parameter in parameters:
        # Only a DTensor has placements; importing its class here would slow down everybody's first forward pass.
        if any(place.is_shard() for place in getattr(parameter, "placements", ())):
            raise RuntimeError(
                f"weights must be whole outside of forward, got shards of FSDP2; shard the {model} itself with "
                f"fully_shard({variable}), and declare every method that you call, for example by "
                f"register_fsdp_forward_method({variable}, '{method}')."
            )


def require_savable(state: Mapping[str, Tensor]) -> None:
    """Refuse a state that is spread over processes.

    Raises:
        RuntimeError: one of its tensors is a DTensor.
    """
    if any(hasattr(tensor, "placements") for tensor in state.values()):
        raise RuntimeError(
            "model must be whole to be saved, got shards of FSDP2; on all processes call "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, load what it "
            "returns into a model without shards, and save that one."
        )


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 has sharded, which all ranks must ask for together; any other as it is."""
    # Only DTensor has this method; asking for the class would import a quarter of torch.distributed.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def reshard_owners(module: nn.Module) -> None:
    """Let FSDP2 put the parameters of ``module`` back into shards.

    After a pass in evaluation a root keeps whole parameters, and its next step forgets what was written to them.
    """
    # Neither is imported unless something is sharded. A parameter knows nothing of the module that shards it.
    fsdp, states = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "_composable_state"))
    if fsdp is None or states is None:
        return
    own = set(module.modules())
    for owner in list(states._module_state_mapping):
        if isinstance(owner, fsdp.FSDPModule) and not own.isdisjoint(owner.modules()):
            owner.reshard()


@torch.no_grad()
def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Write ``values``, the same on all ranks, into ``tensor``, of which this rank may hold a shard only."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        sharded = cast("DTensor", tensor)
        # No source rank: every rank takes its shard of what it has.
        values = distribute_tensor(
            values.to(tensor.dtype), sharded.device_mesh, sharded.placements, src_data_rank=None
        )
    tensor.copy_(values)
