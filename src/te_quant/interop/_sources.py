"""Tensors from a module, a state dict or a file, and the names that they must have."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from te_quant._checks import require
from te_quant.interop._files import Source, tensors_in

__all__ = ["prefix_of", "require_names", "some", "tensors_of"]

# A checkpoint of a training run holds its weights under this name.
_CONTAINER = "state_dict"


def tensors_of(source: object) -> dict[str, Tensor]:
    """Return the tensors of a module, a state dict or a file, by name.

    Args:
        source: a module; a state dict, or a mapping that has one under ``"state_dict"``; or the path of a file
            with either of these.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: it is none of these.
        ValueError: it holds something else than tensors.
        ImportError: safetensors is not installed and the file needs it.
    """
    if isinstance(source, nn.Module):
        return dict(source.state_dict())
    if isinstance(source, (str, os.PathLike)):
        return tensors_in(Source(source).weights(), (_CONTAINER,))
    if not isinstance(source, Mapping):
        raise TypeError(f"source must be a module, a state dict or the path of a file, got {source!r}.")
    inside = source.get(_CONTAINER)
    state = inside if isinstance(inside, Mapping) else source
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    require(not others, "source", "tensors by name, directly or under 'state_dict'", f"others: {some(others)}")
    return dict(state)


def require_names(name: str, found: Collection[str], expected: Collection[str]) -> None:
    """Refuse missing and unexpected names.

    Args:
        name: what an error calls the source.
        found: names that it holds.
        expected: names that it has to hold, and none other.

    Raises:
        ValueError: some are missing, or others are there.
    """
    missing = [key for key in expected if key not in found]
    got = f"none named {some(missing)}{prefix_of(found, missing)}"
    require(not missing, name, f"complete ({len(expected)} tensors)", got)
    surplus = [key for key in found if key not in expected]
    require(not surplus, name, f"of {len(expected)} tensors", f"unexpected {some(surplus)}")


def prefix_of(found: Collection[str], missing: Sequence[str]) -> str:
    """Say behind which prefix the first missing name is found, and how to remove it; empty if it is not."""
    for name in found if missing else ():
        if name.endswith(f".{missing[0]}"):
            prefix = name.removesuffix(missing[0])
            cure = "{name[%d:]: tensor for name, tensor in state.items() if name.startswith(%r)}"
            return f", but one with the prefix {prefix!r}; save the state dict " + cure % (len(prefix), prefix)
    return ""


def some(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
