"""Reader of IDX files, the format of MNIST: a magic number, the sides, then bytes; plain or gzipped.

Only unsigned bytes are read, since no data set here holds anything else. Whatever is not exactly such a
file is refused by its name: a picture cut short would otherwise become digits shifted by some pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_idx"]

_UNSIGNED_BYTE = 8
_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
# Twenty times MNIST: enough for any data set here, and a damaged header cannot ask for all memory.
_LARGEST = 2**30
_CHUNK = 2**20


def read_idx(path: str | Path, ndim: int, *, sha256: str | None = None) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes.

    Args:
        path: the file, gzipped if its name ends in ``.gz``.
        ndim: number of axes it must have: 3 for images, 1 for labels.
        sha256: of the unpacked file, in hexadecimal; not checked by default.

    Shape:
        result: as the file says, ``ndim`` axes; writable, its own memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an IDX file, another type or number of axes, cut short, bytes after the end, a damaged
            gzip stream, or another SHA-256. The message names the file.

    Source: "The IDX file format", http://yann.lecun.com/exdb/mnist/.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            header, shape = _read_header(file, path, ndim)
            size = math.prod(shape)
            # One byte more than there should be, to see whether there is one.
            body = _read(file, size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file, got a damaged one ({error}).") from error
    if len(body) < size:
        raise ValueError(f"{path} must hold {size} bytes for its shape {shape}, got {len(body)}: it is cut short.")
    if len(body) > size:
        raise ValueError(f"{path} must end after {size} bytes for its shape {shape}, got more.")
    if sha256 is not None:
        actual = hashlib.sha256(header + body).hexdigest()
        if actual != sha256:
            raise ValueError(f"{path} must have the unpacked SHA-256 {sha256}, got {actual}.")
    values: NDArray[np.uint8] = np.frombuffer(body, np.uint8).reshape(shape).copy()
    return values


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _read_header(file: BinaryIO, path: Path, ndim: int) -> tuple[bytes, tuple[int, ...]]:
    magic = _read(file, 4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES:
        raise ValueError(f"{path} must start with an IDX magic number, got {magic.hex(' ') or 'an empty file'}.")
    if magic[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} must hold uint8, got {_TYPES[magic[2]]}.")
    if magic[3] != ndim:
        raise ValueError(f"{path} must have {ndim} axes, got {magic[3]}.")
    sides = _read(file, 4 * ndim)
    if len(sides) < 4 * ndim:
        raise ValueError(f"{path} must hold {ndim} sides, got {len(sides)} bytes of them: it is cut short.")
    shape = tuple(int(side) for side in np.frombuffer(sides, ">u4"))
    if not 0 < math.prod(shape) <= _LARGEST:
        raise ValueError(f"{path} must hold between 1 and {_LARGEST} bytes, got the shape {shape}.")
    return magic + sides, shape


def _read(file: BinaryIO, size: int) -> bytes:
    """Up to ``size`` bytes, in pieces: memory follows what the file has, not what its header claims."""
    pieces = []
    while size > 0 and (piece := file.read(min(size, _CHUNK))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
