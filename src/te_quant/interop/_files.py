"""The weights of other libraries: a file, a folder, or a repository of the hub."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_quant import _pretrained
from te_quant._checks import require, require_type

__all__ = ["Source", "options_of", "tensors_in", "weights_in", "without_wrappers"]

# Instructions of a pickle that leave an object where it is, filled or built.
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD", "REDUCE", "NEWOBJ")
# By which torch's restricted reader ends where a file only begins like a pickle.
_STRAY = (AssertionError, AttributeError, LookupError, TypeError, ValueError, struct.error)
# Where training loops put the weights, the best place first.
_CONTAINERS = ("state_dict", "model")
# Behind the name of weights, of the file that lists their shards.
_INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class Source(NamedTuple):
    """Where weights are.

    Attributes:
        path: a file, a folder, or a hub id ``owner/name``.
        filename: of the weights, inside a folder or repository.
        subfolder: of a folder or repository.
        hub: how to download.
    """

    path: str | os.PathLike[str]
    filename: str | None = None
    subfolder: str | None = None
    hub: _pretrained.Hub = _pretrained.Hub()

    def weights(self, usual: Sequence[str] = ()) -> Path:
        """Return the file with the weights, downloaded if need be.

        Args:
            usual: names to look for if there is no ``filename``, the best first. Without any of them a folder must
                hold only one file of weights.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: several files could be meant, the weights are in shards, or an option does not fit the kind
                of source.
            ImportError: huggingface_hub is not installed.
        """
        path = Path(self.path)
        if path.is_file():
            for name in ("filename", "subfolder"):
                value = getattr(self, name)
                require(value is None, name, "None for a file", repr(value))
            _pretrained.require_local(self.hub, "file")
            return path
        if not path.is_dir():
            return self._download(usual)
        _pretrained.require_local(self.hub, "folder")
        folder = path / (self.subfolder or "")
        for name in [self.filename] if self.filename else usual:
            if (folder / name).is_file():
                return folder / name
        if self.filename or not folder.is_dir():
            raise FileNotFoundError(f"source must hold {self.filename or 'weights'}, got none in {folder}.")
        for name in usual:
            _refuse_shards((folder / f"{name}{_INDEX}").is_file(), str(folder))
        found = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
        if not found:
            raise FileNotFoundError(f"source must hold weights ({', '.join(_SUFFIXES)}), got none in {folder}.")
        require(len(found) == 1, "filename", f"given for {folder}", f"{len(found)} files: {', '.join(found)}")
        return folder / found[0]

    def beside(self, weights: Path, name: str) -> Path | None:
        """Return the file ``name`` that lies next to ``weights``, or None."""
        path = Path(self.path)
        if path.exists():
            file = weights.with_name(name)
            return file if file.is_file() else None
        # Weights that are found by their usual name lie at the top.
        return self._fetch(str(PurePosixPath(self.filename or name).with_name(name)))

    def _download(self, usual: Sequence[str]) -> Path:
        # A repository may be called like a file of weights, but a mistyped path is more likely.
        mistyped = self.filename is None and PurePosixPath(self.path).suffix in _SUFFIXES
        _pretrained.require_repository(self.path, "an existing file or folder", mistyped=mistyped)
        names = [self.filename] if self.filename else usual
        got = "None; no file or folder has that name here"
        require(len(names) > 0, "filename", f"the weights file in the repository {self.path!r}", got)
        for name in names:
            file = self._fetch(name)
            if file is not None:
                return file
        for name in names if self.filename is None else ():
            _refuse_shards(self._fetch(f"{name}{_INDEX}") is not None, f"the repository {self.path!r}")
        raise FileNotFoundError(
            f"source must hold {' or '.join(names)}, got none in the repository {self.path!r}."
        )

    def _fetch(self, name: str) -> Path | None:
        """Return a file of the repository, or None if it does not have it."""
        return _pretrained.download(str(self.path), name, self.hub, self.subfolder)


def _refuse_shards(found: bool, place: str) -> None:
    cure = "load them with their library and call save_pretrained(folder, max_shard_size='100GB')"
    require(not found, "source", "weights in one file", f"shards in {place}; {cure}")


def options_of(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the options in a mapping or a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON.
        TypeError: there is something else than a mapping.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"config must be a mapping or the path of a JSON file, got {config!r}.")
    if not Path(config).is_file():
        raise FileNotFoundError(f"config must be a mapping or an existing JSON file, got {os.fspath(config)!r}.")
    try:
        content = json.loads(Path(config).read_text(encoding="utf-8"))
    except ValueError as error:
        cure = "read other formats yourself and pass a mapping"
        raise ValueError(f"config must be a JSON file, got {os.fspath(config)!r} ({error}); {cure}.") from error
    require_type("config", content, dict, "an object of options")
    return dict(content)


def tensors_in(path: Path, containers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a file, on the CPU.

    A pickle runs nothing: torch's restricted reader builds tensors and plain containers, and whatever else a file
    names (callbacks, arguments) becomes an object without content, or a plain dict or list if it is one of these.

    Args:
        path: a safetensors file, or one that ``torch.save`` wrote.
        containers: entries that may hold the tensors, the best first; without any of them the file itself does.

    Raises:
        ValueError: the file cannot be read, or holds something else than tensors.
        ImportError: safetensors is not installed.
    """
    content = _safe(path) if path.suffix == ".safetensors" else _unpickled(path)
    for name in containers:
        inside = content.get(name) if isinstance(content, Mapping) else None
        if isinstance(inside, Mapping):
            content = inside
            break
    require(isinstance(content, Mapping), str(path), "a mapping of tensors", type(content).__name__)
    for name, value in content.items():
        cure = "; save its tensors on their own, under the key 'state_dict'" if isinstance(value, Mapping) else ""
        require(isinstance(value, Tensor), f"{path} {name!r}", "a tensor", f"{type(value).__name__}{cure}")
    return {str(name): value.detach() for name, value in content.items()}


def weights_in(path: Path, containers: Sequence[str] = _CONTAINERS) -> dict[str, Tensor]:
    """Return the tensors of a file as :func:`tensors_in` does, by the names that they have in the model itself."""
    return without_wrappers(tensors_in(path, containers))


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names that they had before the model was compiled or wrapped for several processes.

    Only ``module.`` in front of all names is that of a wrapper.
    """
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _safe(path: Path) -> Mapping[str, Tensor]:
    load_file = _pretrained.safetensors().load_file
    from safetensors import SafetensorError

    try:
        tensors: Mapping[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got {error}.") from error
    return tensors


class _Anything:
    """An object that was pickled with the weights; it keeps nothing."""

    def __new__(cls, *args: object) -> _Anything:  # noqa: ARG004
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Mapping:
    """Makes a plain mapping in place of an object of a dict's subclass, without what it is built from."""

    def __new__(cls, *args: object) -> dict[object, object]:  # type: ignore[misc]  # noqa: ARG004
        # The only one to which the restricted reader gives attributes too.
        return OrderedDict()


class _List:
    """Makes a plain list in place of an object of a list's subclass, or of a deque."""

    def __new__(cls, *args: object) -> list[object]:  # type: ignore[misc]  # noqa: ARG004
        return []


def _unpickled(path: Path) -> Any:
    try:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:
            # Of before torch 1.6, whose names cannot be listed.
            names = []
        # Without an own entry here, every class that a training loop pickled next to its weights would be refused.
        uses = _uses(path) if names else {}
        with torch.serialization.safe_globals([(_stand_in(path, name, uses), name) for name in names]):
            return _load(path)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            # The file cannot be opened. Without a name, the reader has looked for its end where there is none.
            raise
        # Around its reason torch wraps the advice to open the file without the restrictions.
        reason = str(error.__context__ or error).strip()
        cause = (reason.splitlines() or ["an empty file"])[0].rstrip(".")
        if isinstance(error, OSError) or "zip archive" in cause:
            cause = f"a damaged one ({cause.split('. ')[0]}); copy or download it again"
        raise ValueError(f"{path} must be a file of tensors that torch.save wrote, got {cause}.") from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _STRAY as error:
        expected = "a file of tensors that torch.save wrote"
        got = f"a damaged file or one of another kind ({type(error).__name__}: {error})"
        raise ValueError(f"{path} must be {expected}, got {got}.") from error


def _stand_in(path: Path, name: str, uses: Mapping[str, set[str]]) -> type:
    """Return the type that stands in for the class ``name``, chosen by the instructions that fill its objects."""
    own = uses.get(name, set())
    if own & {"SETITEM", "SETITEMS"}:
        return _Mapping
    if not own & {"APPEND", "APPENDS"}:
        return _Anything
    got = f"a list with attributes of the class {name!r}; save its 'state_dict' without it"
    require("BUILD" not in own, str(path), "a file of tensors that torch.save wrote", got)
    return _List


def _uses(path: Path) -> dict[str, set[str]]:
    """Return, for each class that a pickle names, the instructions that fill its objects.

    Nothing is built: of each object on the stack of the reader only the name is followed.
    """
    uses: dict[str, set[str]] = {}
    stack: list[object] = []
    memo: dict[object, object] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        for instruction, argument, _ in pickletools.genops(pickled):
            before = instruction.stack_before
            own = len(before)
            if pickletools.markobject in before:
                own = before.index(pickletools.markobject)
                while stack.pop() is not pickletools.markobject:
                    pass
            taken = [stack.pop() for _ in range(own)]
            if instruction.name in _FILLING:
                stack.append(taken[-1])
                uses.setdefault(str(taken[-1]), set()).add(instruction.name)
            elif instruction.name == "GLOBAL":
                stack.append(str(argument).replace(" ", "."))
            elif instruction.name.endswith("GET"):
                stack.append(memo[argument])
            else:
                stack += [each if each is pickletools.markobject else None for each in instruction.stack_after]
            if instruction.name.endswith("PUT"):
                memo[argument] = stack[-1]
    except (zipfile.BadZipFile, StopIteration, ValueError, LookupError):
        # Damaged; the reader says how.
        return {}
    return uses
