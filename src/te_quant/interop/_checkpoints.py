"""Files of other libraries: their tensors, read without running any code in them, and their names checked."""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from te_quant._checks import require

__all__ = ["read_tensors", "require_names", "some", "tensors_of"]

# A checkpoint of a training run holds its weights under this name.
_CONTAINER = "state_dict"


def tensors_of(source: object) -> dict[str, Tensor]:
    """Return the tensors of a module, a state dict or a file, by name.

    Args:
        source: a module; a state dict, or a mapping that has one under ``"state_dict"``; or the path of a file that
            :func:`read_tensors` reads.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: it is none of these.
        ValueError: it holds something else than tensors.
        ImportError: safetensors is not installed and the file needs it.
    """
    if isinstance(source, nn.Module):
        return dict(source.state_dict())
    if isinstance(source, (str, os.PathLike)):
        return read_tensors(source)
    if not isinstance(source, Mapping):
        raise TypeError(f"source must be a module, a state dict or the path of a file, got {source!r}.")
    return _unpacked("source", source)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU.

    Args:
        path: a safetensors file, or a pickle of ``torch.save``: a state dict, or a mapping that has one under
            ``"state_dict"``. Pickles are read with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of neither format, or holds something else than tensors.
        ImportError: safetensors is not installed and the file needs it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"source must be an existing file, got {str(path)!r}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        expected = "a safetensors file, or a pickle that holds only tensors"
        cure = "if you trust it, load it yourself and pass its state dict"
        raise ValueError(f"{path} must be {expected}, got {_first_line(error)}; {cure}.") from error
    return _unpacked(str(path), content)


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
    require(not missing, name, f"complete ({len(expected)} tensors)", f"none named {some(missing)}")
    surplus = [key for key in found if key not in expected]
    require(not surplus, name, f"of {len(expected)} tensors", f"unexpected {some(surplus)}")


def some(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"safetensors must be installed to read {path}: pip install 'te_quant[hub]'.") from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got {error}.") from error


def _unpacked(name: str, content: object) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get(_CONTAINER), Mapping):
        content = content[_CONTAINER]
    expected = "tensors by name, directly or under 'state_dict'"
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must hold {expected}, got {type(content).__name__}.")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{name} must hold {expected}, got something else under {some(others)}.")
    return dict(content)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
