"""The model that a command runs, from wherever it lies."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from te_quant import adapters, interop
from te_quant._checks import require
from te_quant._pretrained import CONFIG_FILE, WEIGHTS_FILE
from te_quant.adapters import Tokenizer
from te_quant.autoencoder import VQAutoencoder
from te_quant.autoencoder.config import description
from te_quant.cli.arguments import Options

# Options of the decoder that its weights do not show.
_DECODING = ("activation", "decoder_padding", "norm", "norm_groups", "upsample")
# Options of quantizers that training needs and decoding does not.
_TRAINING = (
    "codebook_update",
    "codebook_weight",
    "commitment_weight",
    "decay",
    "diversity_weight",
    "entropy_group_dim",
    "entropy_weight",
    "gradient_estimator",
    "loss_weights",
    "nonfinite",
    "orthogonal_active_only",
    "orthogonal_max_codes",
    "orthogonal_reg",
    "quantizer_dropout",
    "revival_threshold",
    "temperature",
)
# Buffers of them likewise.
_STATISTICS = (
    "code_sums",
    "pending_counts",
    "pending_rows",
    "pending_subset",
    "pending_sums",
    "revivals",
    "usage",
)

__all__ = ["device_of", "identity", "load_autoencoder", "load_tokenizer"]


def load_autoencoder(options: Options, dtype: torch.dtype | None = torch.float32) -> VQAutoencoder:
    """Return the model in evaluation mode on its device.

    Args:
        options: of the command.
        dtype: of the weights; float32 also where they were saved in half precision. None keeps the saved ones.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files or the options do not fit.
    """
    shared: dict[str, Any] = {
        "device": device_of(options.device),
        "dtype": dtype,
        "revision": options.revision,
        "local_files_only": options.offline,
    }
    if options.format != "te_quant":
        load: Callable[..., VQAutoencoder] = getattr(interop, f"load_{options.format}")
        needed = options.format != "te_vqgan" or options.config is not None
        require(needed, "--config", "given for te_vqgan: model.params of its YAML file, as JSON", None)
        where = {"config": options.config, "filename": options.filename, "subfolder": options.subfolder}
        return load(options.model, **where, **shared)
    for name in ("config", "filename", "subfolder"):
        value = getattr(options, name)
        require(value is None, f"--{name}", "given with a --format of another library", value)
    path = Path(options.model)
    if path.is_dir() and not (path / CONFIG_FILE).exists():
        inside = [config.parent.as_posix() for config in sorted(path.glob(f"*/{CONFIG_FILE}"))]
        cure = f"{path}; pass {' or '.join(inside)}"
        require(not inside, "model", f"a folder with {CONFIG_FILE}", cure)
    if not path.is_file():
        return VQAutoencoder.from_pretrained(options.model, **shared)
    expected = f"a folder, a hub id, or the file {WEIGHTS_FILE} of a folder"
    require(path.name == WEIGHTS_FILE, "model", expected, f"{path}; pass --format to say whose weights it has")
    return VQAutoencoder.from_pretrained(path.parent, **shared)


def load_tokenizer(options: Options) -> tuple[Tokenizer, VQAutoencoder | None]:
    """Return a tokenizer of any format, and the model of this library where it is one."""
    if options.format == "cosmos":
        return _load_cosmos(options), None
    if options.format == "python":
        return _load_python(options.model), None
    model = load_autoencoder(options)
    single = model.quantizer.num_quantizers is None
    require(single, "model", "one with one index per token", f"{model.quantizer.num_quantizers} indices")
    tokenizer = Tokenizer(
        model.encode_to_indices, _decoding(model), model.config.stride, model.quantizer.num_codes
    )
    return tokenizer, model


def device_of(name: str) -> torch.device:
    """Return the device, which must be here.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be a device such as 'cpu' or 'cuda', got {name!r}.") from error
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = device.type == "cpu" or (here is not None and device.type == here.type)
    require(
        known, "--device", f"one of this machine ('cpu'{'' if here is None else f', {here.type!r}'})", repr(name)
    )
    return device


def identity(model: VQAutoencoder, *, with_options: bool = True) -> str:
    """Return a digest of what gives tokens their meaning: the codes and the decoder.

    Where a model lies, its encoder, how it was trained, the statistics of its codebook and widening its weights do
    not change it.

    Args:
        model: from :func:`load_autoencoder`.
        with_options: False gives the digest in token files of format 1, which is that of the weights only.
    """
    digest = hashlib.sha256()
    if with_options:
        config = model.config
        options = {name: getattr(config, name) for name in _DECODING}
        if config.norm != "group":
            # Without effect then.
            del options["norm_groups"]
        options["quantizer"] = _meaning(description(model.quantizer))
        digest.update(json.dumps(options, sort_keys=True).encode())
    for part, module in (("quantizer", model.quantizer), ("decoder", model.decoder)):
        for name, tensor in sorted(module.state_dict().items()):
            if part == "quantizer" and name.rpartition(".")[2] in _STATISTICS:
                continue
            digest.update(f"{part}.{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _meaning(described: Any) -> Any:
    """Return what the description of a quantizer, and of those inside, says of decoding indices."""
    if isinstance(described, list):
        return [_meaning(part) for part in described]
    if not isinstance(described, Mapping):
        return described
    options = {name: _meaning(value) for name, value in described.items() if name not in _TRAINING}
    if options.get("metric") != "cosine":
        # Only this one changes the codes; the others choose among them.
        options.pop("metric", None)
    return options


def _decoding(model: VQAutoencoder) -> Any:
    return torch.no_grad()(model.decode_indices)


def _load_cosmos(options: Options) -> Tokenizer:
    folder = Path(options.model)
    for name in ("encoder.jit", "decoder.jit"):
        require(
            (folder / name).is_file(), "model", "a folder with encoder.jit and decoder.jit", f"no {folder / name}"
        )
    require(options.stride is not None, "--stride", "given for cosmos, such as 8 for DI8x8", None)
    device = device_of(options.device)
    encoder, decoder = (_load_jit(folder / name, device) for name in ("encoder.jit", "decoder.jit"))
    tokenizer = adapters.cosmos(encoder, decoder, stride=options.stride or 1)
    return tokenizer if options.num_codes is None else replace(tokenizer, num_codes=options.num_codes)


def _load_jit(path: Path, device: torch.device) -> Any:
    try:
        with warnings.catch_warnings():
            # Cosmos has no other files than these, so there is nothing that the advice of torch could change.
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is")
            return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), "another file").rstrip(".")
        raise ValueError(f"{path} must be a file that torch.jit.save wrote, got {reason}.") from error


def _load_python(place: str) -> Tokenizer:
    """Call the function that ``file.py:function`` or ``module:function`` names."""
    source, colon, name = place.rpartition(":")
    is_file = source.endswith(".py")
    named = is_file or all(part.isidentifier() for part in source.split("."))
    require(bool(colon and name) and named, "model", "'file.py:function' or 'module:function'", repr(place))
    if is_file and not Path(source).is_file():
        raise FileNotFoundError(f"model must name a Python file that exists, got {source}.")
    with _errors_of(place):
        module = _run_file(source) if is_file else importlib.import_module(source)
    function = getattr(module, name, None)
    require(callable(function), "model", f"'{source}:function' with a function of {source}", repr(place))
    with _errors_of(place):
        tokenizer = function() if function is not None else None
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"{place} must return a te_quant.adapters.Tokenizer, got {type(tokenizer).__name__}.")
    return tokenizer


def _run_file(source: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _errors_of(place: str) -> Iterator[None]:
    """Let a bug in a user's Python file end the command with a traceback, without which its place is unknown.

    A file that is not Python, and packages and files that it does not find, need no more than a sentence.

    Raises:
        ValueError: the file is not Python.
        RuntimeError: the code raised what the command would take for a refusal by the library.
    """
    try:
        yield
    except SyntaxError as error:
        raise ValueError(f"{place} must be valid Python, got {error}.") from error
    except (TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{place} must run without an error, got {got}") from error
