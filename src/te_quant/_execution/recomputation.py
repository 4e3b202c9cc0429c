"""State changes once per training step, although autograd may run a forward pass again.

Activation checkpointing discards what a forward pass computed and runs it a second time during the backward pass.
The second time must see the codebook that the first one saw, and must not count the batch again. torch.func may
run a function any number of times, on tensors that no buffer can hold; there a pass that would record is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from te_quant._execution.modes import in_transform

__all__ = ["between_steps", "refuse_redraw", "refuse_transform"]

_library = torch.library.Library("te_quant", "FRAGMENT")
# Without an argument a compiler might compute the answer once and for all.
_library.define("recomputing(Tensor anchor) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("refuse_redraw(Tensor drawn) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.no_grad()
def between_steps(checked: Tensor, buffers: Iterable[Tensor], change: Callable[[], None]) -> None:
    """Run ``change``, which changes ``buffers`` in place, unless autograd repeats a forward pass.

    Args:
        checked: the latents that their check returned. A compiled graph may order its nodes as it likes, but
            what depends on these comes after the check, so that a refused batch changes nothing.
        buffers: all that may change.
        change: what to do.
    """
    if not torch.compiler.is_compiling():
        if not _in_backward():
            change()
        return
    # One graph serves both passes, so what it changed is taken back where the pass turns out to be the second.
    before = [(buffer, buffer.clone()) for buffer in buffers]
    change()
    again = torch.ops.te_quant.recomputing(checked)
    for buffer, old in before:
        buffer.copy_(torch.where(again, old, buffer))


def refuse_transform() -> None:
    """Refuse a training pass that torch.func runs: what it recorded would be lost."""
    # A backward pass may be batched too, and only repeats what was recorded before.
    if in_transform() and (torch.compiler.is_compiling() or not _in_backward()):
        raise RuntimeError(
            "mode must be evaluation or frozen under torch.func, got training, which would lose what it records; "
            "call eval() or freeze() first."
        )


def refuse_redraw(drawn: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return ``drawn``, which came from ``generator``; refuse a generator while a forward pass is repeated.

    Checkpointing restores the global generators, but knows nothing of others: the second pass would draw other
    numbers than the first.
    """
    if generator is None:
        return drawn
    result: Tensor = torch.ops.te_quant.refuse_redraw(drawn)
    return result


def _in_backward() -> bool:
    # Hooks, version counters and attributes were tried too: none holds in every nesting of checkpoint and compile.
    return bool(torch._C._current_graph_task_id() != -1)


def _recomputing(anchor: Tensor) -> Tensor:
    return anchor.new_full((), _in_backward(), dtype=torch.bool)


def _recomputing_shape(anchor: Tensor) -> Tensor:
    return anchor.new_empty((), dtype=torch.bool)


def _refuse_redraw(drawn: Tensor) -> Tensor:
    if _in_backward():
        raise RuntimeError(
            "generator must be None under activation checkpointing, which restores only torch's own generators, "
            "got a generator while a forward pass is recomputed."
        )
    return drawn.clone()


_library.impl("recomputing", _recomputing, "CompositeExplicitAutograd")
_library.impl("refuse_redraw", _refuse_redraw, "CompositeExplicitAutograd")
torch.library.register_fake("te_quant::recomputing", _recomputing_shape, lib=_library)
torch.library.register_fake("te_quant::refuse_redraw", torch.clone, lib=_library)
