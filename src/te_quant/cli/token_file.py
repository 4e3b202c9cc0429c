"""Tokens on disk: one safetensors file with the grid of every image and the identity of the model.

Shape letters: h w token grid, Q indices per token, L downsamplings, K codes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from te_quant._checks import require
from te_quant._pretrained import write_atomically

__all__ = ["TOKENS_SUFFIX", "ImageTokens", "TokenFile", "compact_dtype", "read_tokens", "write_tokens"]

TOKENS_SUFFIX = ".safetensors"
"""What the name of a file of tokens ends in, in lower case."""

_FORMAT = 2
_KEY = "te_quant_tokens"
_TOKENS, _PHASES = "tokens/", "phases/"
# The fields of the metadata, without the format.
_FIELDS = {"model": str, "identity": str, "num_codes": int, "stride": int, "images": dict}
_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image.

    Attributes:
        indices: (h, w[, Q]) integers.
        size: height and width of the image in pixels; the grid may cover more.
        phases: (L, 2) where the encoder chose; None for encoders that do not choose.
    """

    indices: Tensor
    size: tuple[int, int]
    phases: Tensor | None = None


@dataclass(frozen=True)
class TokenFile:
    """What a file of tokens says of the model.

    Attributes:
        model: the place that ``te-quant encode`` was given.
        identity: digest of the codes and the decoder.
        num_codes: K.
        stride: pixels per token.
        format: of the file. In format 1 the identity is that of the weights only.
    """

    model: str
    identity: str
    num_codes: int
    stride: int
    format: int = _FORMAT


def compact_dtype(num_codes: int) -> torch.dtype:
    """Return the smallest integer dtype that holds every index below ``num_codes``."""
    return next(dtype for dtype in _DTYPES if torch.iinfo(dtype).max >= num_codes - 1)


def write_tokens(path: Path, about: TokenFile, images: Mapping[str, ImageTokens]) -> None:
    """Write one tensor ``tokens/NAME`` per image in the smallest integers, completely or not at all.

    Raises:
        ValueError: an index is no code.
    """
    from safetensors.torch import save_file

    dtype = compact_dtype(about.num_codes)
    tensors = {}
    for name, image in images.items():
        low, high = int(image.indices.min()), int(image.indices.max())
        inside = low >= 0 and high < about.num_codes
        require(inside, "tokens", f"indices in [0, {about.num_codes})", f"{low} to {high} in {name}")
        tensors[_TOKENS + name] = image.indices.to(dtype).contiguous()
        if image.phases is not None:
            tensors[_PHASES + name] = image.phases.to(torch.uint8).contiguous()
    sizes = {name: list(image.size) for name, image in images.items()}
    # One key: several would be written in an order that differs from run to run.
    metadata = {_KEY: json.dumps({**asdict(about), "images": sizes})}
    write_atomically(path, lambda beside: save_file(tensors, beside, metadata=metadata))


def read_tokens(path: Path) -> tuple[TokenFile, dict[str, ImageTokens]]:
    """Return what :func:`write_tokens` wrote, with indices as int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of tokens, is damaged, or names a picture outside of the folder to write into.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"tokens must be a file that te-quant encode wrote, got none at {path}.")
    expected = "a safetensors file that te-quant encode wrote"
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be {expected}, got a damaged file or one of another kind.") from error
    require(stored is not None, str(path), expected, "a safetensors file of another kind")
    about, sizes = _metadata(f"{path} metadata", str(stored))
    images = {}
    for name, size in sizes.items():
        _require_inside(path, name)
        require(_TOKENS + name in tensors, str(path), "complete", f"no tokens of {name!r}")
        phases = tensors.get(_PHASES + name)
        indices = tensors[_TOKENS + name]
        _require_grid(f"{path} tokens of {name!r}", indices, size, about.stride)
        images[name] = ImageTokens(indices.long(), size, None if phases is None else phases.long())
    return about, images


def _require_grid(owner: str, indices: Tensor, size: tuple[int, int], stride: int) -> None:
    """Refuse tokens that are no grid of integers, or not one for an image of this size."""
    shape = tuple(indices.shape)
    grid = indices.ndim in (2, 3) and not indices.is_floating_point()
    require(grid, owner, "integers of shape (h, w) or (h, w, Q)", f"{indices.dtype} of shape {shape}")
    covers = all(cells * stride >= side for cells, side in zip(shape[:2], size, strict=True))
    expected = f"a grid that covers {size[0]}x{size[1]} pixels at stride {stride}"
    require(covers, owner, expected, f"{shape[0]}x{shape[1]} tokens")


def _metadata(owner: str, stored: str) -> tuple[TokenFile, dict[str, tuple[int, int]]]:
    """Return what the metadata say, with the size of each image; ``owner`` is what an error calls them."""
    try:
        content = json.loads(stored)
    except ValueError as error:
        raise ValueError(f"{owner} must be JSON, got {error}.") from error
    require(isinstance(content, dict), owner, "an object", type(content).__name__)
    version = content.get("format")
    cure = f"{version}; update te_quant, or encode the pictures again"
    require(version in (1, _FORMAT), f"{owner} format", f"1 or {_FORMAT}", cure)
    for name, kind in _FIELDS.items():
        value = content.get(name)
        require(isinstance(value, kind), f"{owner} {name!r}", f"of type {kind.__name__}", value)
    sizes: dict[str, tuple[int, int]] = {}
    for name, size in content["images"].items():
        pair = isinstance(size, list) and len(size) == 2
        fits = pair and all(isinstance(side, int) and side > 0 for side in size)
        require(fits, f"{owner} size of {name!r}", "two positive integers", size)
        sizes[name] = (size[0], size[1])
    own = {name: content[name] for name in _FIELDS if name != "images"}
    return TokenFile(**own, format=version), sizes


def _require_inside(path: Path, name: str) -> None:
    """Refuse names that lead out of the folder that pictures are written into."""
    parts = PurePosixPath(name)
    inside = not parts.is_absolute() and ".." not in parts.parts and "\\" not in name and ":" not in name
    require(inside and bool(name), f"{path} image names", "paths inside one folder", repr(name))
