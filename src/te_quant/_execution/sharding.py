"""Refusals of weights that FSDP2 has sharded, where only whole ones will do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["require_savable", "require_whole"]


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
