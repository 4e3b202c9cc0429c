"""A model on disk: ``model.safetensors`` and ``config.json`` in one folder, or in one repository of the hub."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from te_quant._checks import require, require_type
from te_quant._execution import require_savable

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "WEIGHTS_FILE",
    "Hub",
    "Report",
    "described_state",
    "download",
    "folder_to_write",
    "load",
    "locate",
    "push",
    "read_config",
    "read_weights",
    "require_local",
    "require_repository",
    "safetensors",
    "save",
    "write_atomically",
    "write_card",
]

_Config = TypeVar("_Config", bound="_Described")
_Model = TypeVar("_Model", bound=nn.Module)

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
_HUB_ID = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?")
FORMAT_VERSION = 1
"""Raised whenever an older library could not read, or would misread, a newly written folder."""


class Hub(NamedTuple):
    """How a repository of the hub is downloaded.

    Attributes:
        revision: branch, tag or commit.
        token: of an account that may read it; True reads the one that is stored on this machine.
        cache_dir: where downloads are kept.
        local_files_only: use only what has been downloaded before.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


class _Described(Protocol):
    """A config."""

    def to_dict(self) -> dict[str, Any]:
        """Return all options."""
        ...


class Report(Protocol):
    """Anything that writes itself as Markdown: the reports of this library, or your own."""

    def to_markdown(self) -> str:
        """Return tables."""
        ...


def save(
    folder: str | os.PathLike[str],
    class_name: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> None:
    """Write both files, each atomically; the weights carry a copy of the config, so that a mix-up shows.

    Args:
        folder: made if need be.
        class_name: of the model.
        config: its options.
        state: its tensors, as :func:`described_state` returns them.

    Raises:
        ValueError: two weights are tied, or the folder is empty or a file.
        ImportError: safetensors is not installed.
    """
    save_file = safetensors().save_file
    folder = folder_to_write(folder)
    content = {"class_name": class_name, "format_version": FORMAT_VERSION, "config": dict(config)}
    text = json.dumps(content, indent=2) + "\n"
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    _require_untied(tensors)
    # One key: several would be written in an order that differs from run to run.
    metadata = {"te_quant": json.dumps(content["config"])}
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def folder_to_write(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that can be made or written to; refuse files, and an empty name."""
    # It would be the folder in which Python runs.
    require(os.fspath(folder) != "", "folder", "the path of a folder", "''; pass '.' for the current one")
    for path in (Path(folder), *Path(folder).parents):
        require(
            path.is_dir() or not path.exists(),
            "folder",
            "the path of a folder, new or existing",
            f"the file {str(path)!r}; choose another name",
        )
    return Path(folder)


def described_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    described: nn.Module,
    expected: Mapping[str, Tensor],
    options_of: Callable[[nn.Module], str] = lambda layer: layer.extra_repr(),
) -> dict[str, Tensor]:
    """Return the tensors of a model by the names that they had before parts of it were compiled.

    Args:
        model: what is saved.
        state: its tensors.
        described: a model built from its config, on any device.
        expected: the tensors of that model.
        options_of: says with which options a layer was built.

    Raises:
        ValueError: the model is not made of the layers of ``described``, so that its file would load as another
            model, or not at all; or it has no values.
        RuntimeError: the state is spread over processes.
    """
    require_savable(state)
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    cure = "load its weights, or call to_empty and reset_parameters of its modules"
    require(not empty, "model", "on a device with memory", f"{_some(empty)} on the meta device; {cure}")
    missing = [name for name in expected if name not in state]
    _require_layers(not missing, f"no {_some(missing)}; remove parametrizations and wrappers")
    if type(model) is not type(described):
        # A class derived from it may build other layers, and builds them again when it is loaded.
        return state
    for name, module in described.named_children():
        _require_same(name, _unwrapped(getattr(model, name)), module, options_of)
    surplus = [name for name in state if name not in expected]
    _require_layers(not surplus, f"{_some(surplus)} too; remove what was added")
    for name, tensor in expected.items():
        got = f"{name!r} of {_shape(state[name])} in place of {_shape(tensor)}; build the model with other options"
        _require_layers(state[name].shape == tensor.shape, got)
    return state


def _require_same(
    path: str, module: nn.Module, described: nn.Module, options_of: Callable[[nn.Module], str]
) -> None:
    """Refuse a layer of another class or with other options than the config describes, also inside of it."""
    if module is described:
        return
    own, other = (f"{type(layer).__name__}({options_of(layer)})" for layer in (module, described))
    same = type(module) is type(described) and own == other
    _require_layers(same, f"{own} in place of {other} at {path!r}; build the model with other options")
    children, expected = dict(module.named_children()), dict(described.named_children())
    same = list(children) == list(expected)
    got = f"layers {list(children)} in place of {list(expected)} at {path!r}; remove what was added"
    _require_layers(same, got)
    for name, child in children.items():
        _require_same(f"{path}.{name}", _unwrapped(child), expected[name], options_of)


def _require_layers(condition: bool, got: str) -> None:
    expected = "made of the layers that its config describes"
    require(condition, "model", expected, f"{got}, or save its state_dict yourself")


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return what ``torch.compile`` or torch's ``checkpoint_wrapper`` has wrapped; the state names neither."""
    for wrapped in ("_orig_mod", "_checkpoint_wrapped_module"):
        if wrapped in module._modules:
            return _unwrapped(module.get_submodule(wrapped))
    return module


def _require_untied(tensors: Mapping[str, Tensor]) -> None:
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        # Zero for tensors without elements, and on the meta device.
        place = tensor.data_ptr()
        other = owners.setdefault(place, name) if place else name
        got = f"{other!r} and {name!r} in the same place; clone one of them"
        require(other == name, "weights", "in separate memory", got)


def load(
    class_name: str,
    make_config: Callable[[Mapping[str, Any]], _Config],
    make_model: Callable[[_Config], _Model],
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    hub: Hub,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> _Model:
    """Return the model that :func:`save` wrote, in evaluation mode, on the CPU, in the saved dtypes.

    Args:
        class_name: what :func:`save` was told.
        make_config: its options to a config; refuses wrong ones with ``TypeError`` or ``ValueError``.
        make_model: the config to a model, of any weights.
        source: a local folder, else a hub id ``owner/name``.
        device: where to put it, if not on the CPU.
        dtype: floating-point type to convert it to, if not as saved.
        hub: how to download.
        rename: gives the tensors of an older file their present names.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a file is damaged, of another format version, or does not fit the other.
        ImportError: safetensors or huggingface_hub is not installed.
    """
    if dtype is not None:
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        require(floating, "dtype", "a floating-point torch.dtype, or None", repr(dtype))
    config_path, weights_path = locate(source, hub)
    options = read_config(config_path, class_name)

    def make(path: Path, options: Mapping[str, Any]) -> _Config:
        try:
            return make_config(options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} must hold a valid config, got: {error}") from error

    config = make(config_path, options)
    saved_with = config_in(weights_path)
    if saved_with is not None and saved_with != options:
        # Options that a file leaves out have their defaults, so only those that are built may differ.
        _require_same_options(weights_path, make(weights_path, saved_with).to_dict(), config.to_dict())
    # The weights are replaced at once, so drawing them must not move the caller's random state. What is not in the
    # file must be where the weights are, not on the default device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = make_model(config)
    # assign, not copy: a model saved in bfloat16 or float64 comes back as it was.
    weights = read_weights(weights_path, model.state_dict(), rename, _derivable(model))
    model.load_state_dict(weights, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def locate(source: str | os.PathLike[str], hub: Hub) -> tuple[Path, Path]:
    """The config and the weights of ``source``, downloaded if it is a repository of the hub.

    A folder that exists wins over a repository of the same name.

    Raises:
        FileNotFoundError: ``source`` is neither a folder nor of the form ``owner/name``, or a file is missing.
        ValueError: ``source`` is a file, or an option of the hub was given with a folder, which has none.
        ImportError: huggingface_hub is not installed.
    """
    folder = Path(source)
    if folder.is_dir():
        require_local(hub, "folder")
        config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        for path in (config, weights):
            if not path.is_file():
                expected = f"{CONFIG_FILE} and {WEIGHTS_FILE}"
                raise FileNotFoundError(
                    f"folder must hold {expected}, got none at {path}{_other_library(config)}."
                )
        return config, weights
    got = f"the file {os.fspath(source)!r}; pass its folder, {str(folder.parent)!r}"
    require(not folder.is_file(), "source", "a folder or a hub id 'owner/name'", got)
    require_repository(source, "an existing folder")
    paths: list[Path] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        found = download(str(source), name, hub)
        if found is None:
            expected = f"an existing folder or a hub id whose repository holds {CONFIG_FILE} and {WEIGHTS_FILE}"
            offline = ", or it was not downloaded before and offline mode allows no download"
            reason = _other_library(paths[0]) if paths else ""
            reason = reason or (offline if _is_offline(hub) else "")
            raise FileNotFoundError(
                f"source must be {expected}, got {_place(str(source), hub)} without {name}{reason}."
            )
        paths.append(found)
    config, weights = paths
    return config, weights


def _other_library(config: Path) -> str:
    """Say how to load what diffusers has written; empty for anything else."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # This only adds to an error; there is no such file, or it is no JSON.
        return ""
    if not isinstance(content, dict) or content.get("_class_name") != "VQModel":
        return ""
    cure = "load it with te_quant.interop.load_diffusers, in a shell with --format diffusers"
    return f"; {CONFIG_FILE} names a VQModel of diffusers: {cure}"


def download(repository: str, name: str, hub: Hub, subfolder: str | None = None) -> Path | None:
    """Return a file of a repository of the hub, or None if the repository does not have it.

    Offline a repository has what has been downloaded of it.

    Raises:
        FileNotFoundError: there is no such repository or revision, or the token may not read it; or the hub cannot
            be reached, and the file has not been downloaded before.
        ImportError: huggingface_hub is not installed.
    """
    client = _huggingface_hub(f"load {repository!r}, which is no local folder")
    errors, place = client.errors, _place(repository, hub)
    options = {**hub._asdict(), **({} if subfolder is None else {"subfolder": subfolder})}
    try:
        path = client.hf_hub_download(repo_id=repository, filename=name, **options)
    except errors.LocalEntryNotFoundError as error:
        if _is_offline(hub):
            return None
        reason = f"an existing folder, or a repository of the hub, which has to be reached to load {name} at first"
        got = f"no folder named {place}, and no answer from the hub"
        raise FileNotFoundError(f"source must be {reason}, got {got}.") from error
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"source must be open to you, got {place}, which is gated; pass token=... ."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"revision must exist, got {place}.") from error
    except errors.RepositoryNotFoundError as error:
        reason = (
            "no folder has this name, and the repository does not exist or is private; pass token=... to see it"
        )
        raise FileNotFoundError(
            f"source must be an existing folder or a repository of the hub, got {place}: {reason}."
        ) from error
    return Path(path)


def _place(repository: str, hub: Hub) -> str:
    return f"{repository!r}" if hub.revision is None else f"{repository!r} at revision {hub.revision!r}"


def _is_offline(hub: Hub) -> bool:
    from huggingface_hub import constants

    return hub.local_files_only or bool(constants.HF_HUB_OFFLINE)


def push(
    repo_id: str,
    save_into: Callable[[str], object],
    *,
    card: str | None,
    default_card: Callable[[], str],
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload a model in one commit, so that the repository never holds one file without the other.

    Args:
        repo_id: ``owner/name``; the repository is made if it does not exist.
        save_into: writes both files into the folder it is given.
        card: content of ``README.md``, which is replaced. None writes ``default_card()`` into a repository that
            has none, and otherwise leaves it as it is.
        default_card: called where it is needed.
        private: whether a new repository is private; None follows the settings of the owner.
        token: of an account that may write; None reads the one that is stored on this machine.
        revision: branch, made if it does not exist; None is the default one.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: ``repo_id`` is not of the form ``owner/name``.
        ImportError: safetensors or huggingface_hub is not installed.
    """
    _require_repository(repo_id)
    api = _huggingface_hub(f"push to {repo_id!r}").HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        # First, so that a model that cannot be saved leaves no empty repository behind.
        save_into(folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if card is None and not api.file_exists(repo_id, CARD_FILE, revision=revision):
            card = default_card()
        if card is not None:
            (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
        )
    return str(commit.commit_url)


def write_card(
    repo_id: str,
    *,
    tags: Sequence[str],
    summary: str,
    code: str,
    facts: str,
    reports: Mapping[str, Report],
    license_name: str | None,
) -> str:
    """Return the README of a repository, of any model.

    Args:
        repo_id: ``owner/name``.
        tags: for the search of the hub.
        summary: what the model is, in a sentence or two.
        code: how to load and call it, in Python.
        facts: a table of its properties, in Markdown.
        reports: title to report.
        license_name: identifier of the licence, if there is one.

    Raises:
        ValueError: a report has no ``to_markdown``.
        TypeError: another argument is of the wrong kind.
    """
    _require_repository(repo_id)
    require_type("reports", reports, Mapping, "a mapping from titles to reports")
    for title, report in reports.items():
        has = callable(getattr(report, "to_markdown", None))
        require(has, f"reports[{title!r}]", "a report with to_markdown()", type(report).__name__)
    header = ["library_name: te_quant", "tags:", *(f"- {tag}" for tag in tags)]
    if license_name is not None:
        require_type("license_name", license_name, str, "an identifier of the hub such as 'mit', or None")
        header.insert(0, f"license: {license_name}")
    sections = [
        "---\n" + "\n".join(header) + "\n---\n",
        f"# {repo_id.rpartition('/')[2]}\n",
        f"{summary}\n",
        f"```python\n{code}```\n",
        facts,
    ]
    for title, report in reports.items():
        sections += [f"## {title}\n", report.to_markdown().rstrip() + "\n"]
    return "\n".join(sections)


def require_local(hub: Hub, kind: str) -> None:
    """Refuse options of the hub for a source that is not there; ``kind`` says what it is."""
    require(hub.revision is None, "revision", f"None for a local {kind}", repr(hub.revision))
    require(hub.token is None, "token", f"None for a local {kind}", "one")
    require(hub.cache_dir is None, "cache_dir", f"None for a local {kind}", repr(hub.cache_dir))


def require_repository(source: object, otherwise: str, *, mistyped: bool = False) -> None:
    """Refuse what has not the form of a hub id, or is known to be a mistyped path.

    ``otherwise`` says what else the source may be.
    """
    if mistyped or not isinstance(source, str) or not _is_repository(source):
        raise FileNotFoundError(f"source must be {otherwise} or a hub id 'owner/name', got {source!r}.")


def read_config(path: Path, class_name: str) -> dict[str, Any]:
    """The options of a model of class ``class_name``.

    Raises:
        ValueError: the file is not JSON, was written by another version of the format or for another class.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON in UTF-8, got {error}.") from error
    keys = {"class_name", "format_version", "config"}
    found = sorted(content) if isinstance(content, dict) else type(content).__name__
    require(isinstance(content, dict) and set(content) == keys, str(path), f"an object of {sorted(keys)}", found)
    version, name, options = content["format_version"], content["class_name"], content["config"]
    require(version == FORMAT_VERSION, f"{path} format_version", str(FORMAT_VERSION), repr(version))
    require(name == class_name, f"{path} class_name", repr(class_name), repr(name))
    require(isinstance(options, dict), f"{path} config", "an object", repr(options))
    return dict(options)


def config_in(path: Path) -> dict[str, Any] | None:
    """Return the options that :func:`save` wrote into the weights; None if there are none.

    Raises:
        ValueError: the file is not in the safetensors format.
        ImportError: safetensors is not installed.
    """
    with _opened(path) as file:
        saved_with = (file.metadata() or {}).get("te_quant")
    return None if saved_with is None else dict(json.loads(saved_with))


def _require_same_options(path: Path, own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse weights that were saved with other options: of a writer that was stopped, or of an edited config."""
    differing = sorted(key for key in {*own, *other} if own.get(key) != other.get(key))
    if differing:
        values = [f"{key!r} ({own.get(key)!r} when saved, {other.get(key)!r} now)" for key in differing[:3]]
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        cure = (
            "undo the edit of config.json, or save the model again; to change an option of a loaded model, build "
            f"another with dataclasses.replace(model.config, {differing[0]}=...) and call its load_state_dict"
        )
        got = f"other options: {', '.join(values)}{more}; {cure}"
        require(False, str(path), f"saved together with the {CONFIG_FILE} beside it", got)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got {error}.") from error


def read_weights(
    path: Path,
    expected: Mapping[str, Tensor],
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    derivable: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of ``path``, in the dtypes they were saved in, on the CPU.

    Args:
        path: a safetensors file. Pickles are never opened.
        expected: names and shapes that the file must hold, and none other.
        rename: gives the tensors of an older file their present names.
        derivable: names that it may leave out.

    Raises:
        ValueError: the file is not in the safetensors format, or holds other names, shapes or kinds of numbers.
        ImportError: safetensors is not installed.
    """
    with _opened(path) as file:
        # A copy, because the loader may hand out a view of the file itself.
        found = rename({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
    missing = [name for name in expected if name not in found and name not in derivable]
    require(not missing, str(path), f"complete ({len(expected)} tensors)", f"none named {_some(missing)}")
    surplus = [name for name in found if name not in expected]
    require(not surplus, str(path), f"of {len(expected)} tensors", f"unexpected {_some(surplus)}")
    for name, tensor in found.items():
        wanted = expected[name]
        require(tensor.shape == wanted.shape, f"{path} {name}", f"of {_shape(wanted)}", _shape(tensor))
        floating = tensor.is_floating_point() == wanted.is_floating_point()
        require(floating, f"{path} {name}", f"of the kind of {wanted.dtype}", tensor.dtype)
    return found


def _derivable(model: nn.Module) -> set[str]:
    """The statistics of quantizers, which loading derives where a file does not have them."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name in getattr(module, "statistics", ())
    }


def _require_repository(repo_id: object) -> None:
    require_type("repo_id", repo_id, str, "a hub id 'owner/name'")
    require(_is_repository(str(repo_id)), "repo_id", "a hub id 'owner/name'", repr(repo_id))


def _is_repository(source: str) -> bool:
    # As the hub's own client says.
    banned = "--" in source or ".." in source or source.endswith(".git")
    return not banned and _HUB_ID.fullmatch(source) is not None


def _huggingface_hub(purpose: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(_missing("huggingface_hub", purpose)) from error
    return huggingface_hub


def safetensors() -> Any:
    """Return ``safetensors.torch``.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        import safetensors.torch as module
    except ImportError as error:
        raise ImportError(_missing("safetensors", "save and load weights")) from error
    return module


def _missing(package: str, purpose: str) -> str:
    return f"{package} must be installed to {purpose}: pip install 'te_quant[hub]'."


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_atomically(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Let ``writer`` fill a file next to ``path``, then rename it over ``path``.

    Whatever interrupts the writer, ``path`` keeps its old content and no other file stays behind. Missing
    parent folders are made.

    Args:
        path: the file to write. A symbolic link is replaced by a file, not followed.
        writer: receives the path it must create; it ends like ``path`` (``.safetensors``, ``.png``), because
            some libraries choose the format by that.

    Raises:
        FileNotFoundError: the writer returned without creating its file.
        IsADirectoryError: ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file, got the folder {target}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and the rename would keep that.
    beside = target.with_name(f".tmp-{secrets.token_hex(6)}-{target.name}")
    try:
        # Some libraries make files that only their owner may read; a new file of Python has the usual mode.
        beside.touch()
        mode = beside.stat().st_mode
        beside.unlink()
        writer(beside)
        if not beside.is_file():
            raise FileNotFoundError(f"writer must create the file it is given, got none for {target}.")
        beside.chmod(mode)
        _flush(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    # Without it a power cut after the rename can leave an empty file under the final name.
    with path.open("rb+") as file:
        os.fsync(file.fileno())
