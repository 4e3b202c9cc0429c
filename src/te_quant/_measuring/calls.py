"""Calls of what users hand to a measurement: on copies, and with an eye on models that change by being called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn

from te_quant._checks import require

__all__ = ["buffers_put_back", "call_on_copy", "call_unchanged", "modules_behind"]

# A lambda over a function over a model is as far as one looks.
_DEPTH = 2


def call_on_copy(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Call on a copy and return one: a function may write into its input, or return the same memory each time."""
    result = function(values.clone())
    return result.clone() if isinstance(result, Tensor) else result


def call_unchanged(name: str, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Call on a copy, and refuse a function that writes to a parameter or buffer of a model behind it.

    Models are found in modules, their methods, objects that hold modules, and functions that name them.

    Args:
        name: what the error calls the function.
        function: to be called.
        values: what it is given.
    """
    before = _versions(function)
    result = call_on_copy(function, values)
    after = _versions(function)
    changed = next((key.partition("/")[2] for key in before if after.get(key, before[key]) != before[key]), None)
    got = f"one that changes {changed!r}; call model.eval() first, or keep counters out of the model"
    require(changed is None, name, "a function that leaves its model as it is", got)
    return result


def modules_behind(function: object) -> list[nn.Module]:
    """Return the outermost modules that a callable is, holds or names."""
    return list(dict.fromkeys(_modules(function, _DEPTH)))


@contextmanager
def buffers_put_back(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore all buffers of modules and of the modules in them on exit, also those replaced by other tensors."""
    inner = list(dict.fromkeys(child for module in modules for child in module.modules()))
    before = [(child, dict(child._buffers)) for child in inner]
    values = {
        id(tensor): (tensor, tensor.clone())
        for _, buffers in before
        for tensor in buffers.values()
        # Outside of inference mode nothing can be written to the others.
        if tensor is not None and not tensor.is_inference()
    }
    try:
        yield
    finally:
        for child, buffers in before:
            # A scripted module writes into its buffers, but does not exchange them.
            if not isinstance(child, torch.jit.ScriptModule):
                child._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values.values():
                # By value: batch norm writes its statistics without a new version.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _versions(function: object) -> dict[str, int]:
    """Return how often each parameter and buffer was written to."""
    versions: dict[str, int] = {}
    for number, module in enumerate(modules_behind(function)):
        state = (*module.named_parameters(), *module.named_buffers())
        for name, tensor in state:
            if not tensor.is_inference():
                versions[f"{number}/{name}"] = tensor._version
    return versions


def _modules(holder: object, depth: int) -> Iterator[nn.Module]:
    if isinstance(holder, nn.Module):
        yield holder
        return
    if depth < 0 or isinstance(holder, Tensor | type | ModuleType):
        return
    if isinstance(holder, functools.partial):
        held: list[object] = [holder.func, *holder.args, *holder.keywords.values()]
    elif isinstance(holder, MethodType):
        held = [holder.__self__]
    elif isinstance(holder, FunctionType):
        # Not by inspect.getclosurevars, which fails for a variable that was never assigned.
        cells = [cell for cell in holder.__closure__ or () if cell != CellType()]
        names = [name for name in holder.__code__.co_names if name in holder.__globals__]
        held = [*(cell.cell_contents for cell in cells), *(holder.__globals__[name] for name in names)]
    else:
        held = list(getattr(holder, "__dict__", {}).values())
    for one in held:
        yield from _modules(one, depth - 1)
