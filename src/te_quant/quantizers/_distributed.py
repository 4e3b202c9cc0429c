"""Sums and random rows over all processes of a group, looked up when they are needed.

Shape letters: N rows of this process, C row length.

Every function runs the same collectives on every rank whatever its data, an empty batch included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from te_quant._checks import require_type

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GroupReference", "all_reduce_sum", "sample_rows"]


class GroupReference:
    """A process group that a module may hold: copies share it, pickling is refused."""

    def __init__(self, group: ProcessGroup | None) -> None:
        if group is not None and dist.is_available():
            # What new_group gives to a process that is no member is an int.
            kinds = (dist.ProcessGroup, type(dist.GroupMember.NON_GROUP_MEMBER))
            require_type("process_group", group, kinds, "a torch.distributed.ProcessGroup")
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> GroupReference:
        """Share the group: it stands for live connections, which cannot be copied."""
        return self

    def __reduce__(self) -> str | tuple[object, ...]:
        if self.group is not None:
            raise TypeError("process_group must be None when a quantizer is pickled, got a live group.")
        return GroupReference, (None,)

    def resolve(self) -> ProcessGroup | None:
        """The group to reduce over now: the given one, else the default one; None when there is nobody else."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if self.group is None else self.group
        return group if dist.get_world_size(group) > 1 else None


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum ``tensor`` over the group, in place."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def sample_rows(rows: Tensor, count: int, generator: torch.Generator | None, group: ProcessGroup | None) -> Tensor:
    """Draw up to ``count`` rows without replacement from the rows of all ranks; the same rows on every rank.

    Args:
        rows: (N, C) of this rank; N may be 0.
        count: how many, at least 1.
        generator: this rank's randomness.
        group: None for only this process.

    Returns:
        (min(count, total N), C) in random order.
    """
    # Uniform keys: the largest ``count`` keys of the union are a uniform sample, and each rank's own largest
    # ``count`` are enough to know them. Integers, as some devices have no float64; on a CPU these are the very
    # draws of float64 in [0, 1), times 2^53.
    keys = torch.empty(rows.shape[0], device=rows.device, dtype=torch.int64)
    keys.random_(0, 2**53, generator=generator)
    kept = keys.topk(min(count, rows.shape[0])).indices
    keys, rows = keys[kept], rows[kept]
    if group is not None:
        missing = count - keys.shape[0]
        keys = torch.cat([keys, keys.new_full((missing,), -1)])
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
        world = dist.get_world_size(group)
        all_keys = [torch.empty_like(keys) for _ in range(world)]
        all_rows = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(all_keys, keys, group=group)
        dist.all_gather(all_rows, rows.contiguous(), group=group)
        keys, rows = torch.cat(all_keys), torch.cat(all_rows)
        chosen = keys.topk(count).indices
        chosen = chosen[keys[chosen] >= 0]
        rows = rows[chosen]
    return rows
