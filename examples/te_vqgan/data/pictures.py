"""A folder of pictures as a data set: which files it holds, in which split each is, and their pixels.

``--data images:FOLDER`` names it. In settings the folder is called ``images:DIGEST``: the digest follows from the
contents of the files, so that a folder may be moved or renamed, and another picture makes it another data set.

Shape letters: H W pixels.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.decoding import decode, reduced
from examples.te_vqgan.data.sources import PICTURES, SPLITS, is_pictures
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import sha256

__all__ = [
    "SUFFIXES",
    "PictureFile",
    "PictureFolder",
    "PictureSource",
    "changed_pictures",
    "data_name",
    "find_pictures",
    "folder_of",
    "load_pictures",
    "short_name",
    "split_by_content",
    "split_regions",
]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""The files of a folder that count as pictures, in lower case; hidden files never do."""

_FEWEST = 3
_SHARES = 5
_DIGEST = 16
# Files that a message names.
_NAMED = 5
# The shorter side of a picture is brought to between so many and twice as many sides of a crop. A crop of a large
# photograph at its full size would show next to no structure.
_CROPS_PER_SIDE = 8


class PictureFile(NamedTuple):
    """One picture.

    Attributes:
        name: path within its folder, with slashes.
        path: of the file.
        sha256: of its content, in hexadecimal.
    """

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder.

    Attributes:
        files: at least one, in the order of their hashes; equal contents once.
        left_out: names of files that are no pictures by their suffix, or a second copy of one.
    """

    files: tuple[PictureFile, ...]
    left_out: tuple[str, ...]

    @property
    def copies(self) -> int:
        """How many of the files that were left out are second copies."""
        return sum(Path(name).suffix.lower() in SUFFIXES for name in self.left_out)

    @property
    def data(self) -> str:
        """The name of the data set in settings: it follows from the contents of the files only."""
        return data_name([file.sha256 for file in self.files])


def data_name(digests: Sequence[str]) -> str:
    """Return the name in settings of the pictures with these hashes, which are sorted."""
    return PICTURES + hashlib.sha256("".join(digests).encode()).hexdigest()[:_DIGEST]


def changed_pictures(before: Sequence[Mapping[str, Any]], found: PictureFolder) -> str:
    """Name the files that a folder has lost, got or changed; a file that has another name only is none of them.

    Args:
        before: the manifest of :class:`PictureSource`.
        found: the pictures now.
    """
    old = {str(row["name"]): str(row["sha256"]) for row in before}
    new = {file.name: file.sha256 for file in found.files}
    kinds = {
        "missing": [name for name in old if name not in new and old[name] not in new.values()],
        "new": [name for name in new if name not in old and new[name] not in old.values()],
        "changed": [name for name in old if name in new and old[name] != new[name]],
    }
    return "; ".join(f"{kind} {_first_of(sorted(names))}" for kind, names in kinds.items() if names)


def _first_of(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def folder_of(data: str) -> Path:
    """Return FOLDER of ``images:FOLDER``.

    Raises:
        ValueError: no folder is named.
    """
    name = data.removeprefix(PICTURES)
    require(is_pictures(data) and bool(name), "data", "images:FOLDER with your pictures in FOLDER", repr(data))
    return Path(name).expanduser()


def short_name(data: str) -> str:
    """Return the last part of FOLDER of ``images:FOLDER``, for names of other folders."""
    name = re.sub(r"[^\w.-]+", "-", folder_of(data).resolve().name).strip("-.")
    return name or "pictures"


def find_pictures(folder: Path) -> PictureFolder:
    """List the pictures in ``folder`` and in the folders below it.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: it holds no picture.
    """
    if not folder.exists():
        raise FileNotFoundError(f"data must name a folder that exists, got {folder}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"data must name a folder of pictures, got the file {folder}.")
    folder = folder.resolve()
    seen = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder))
    pictures = [path for path in seen if path.suffix.lower() in SUFFIXES]
    others = [path.relative_to(folder).as_posix() for path in seen if path.suffix.lower() not in SUFFIXES]
    files: dict[str, PictureFile] = {}
    copies = []
    for path in pictures:
        facts, name = path.stat(), path.relative_to(folder).as_posix()
        digest = _digest(path, facts.st_size, facts.st_mtime_ns)
        if digest in files:
            copies.append(name)
        else:
            files[digest] = PictureFile(name, path, digest)
    kinds = ", ".join(SUFFIXES)
    with_others = f" with {len(others)} other files" if others else ""
    require(bool(files), "data", f"a folder with at least one picture ({kinds})", f"{folder}{with_others}")
    return PictureFolder(tuple(files[digest] for digest in sorted(files)), (*others, *copies))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


@functools.cache
def _digest(path: Path, _size: int, _changed: int) -> str:
    # One command asks several times; size and time of the last change tell whether a file is still the same.
    return sha256(path)


def split_by_content(digests: Sequence[str]) -> dict[str, str]:
    """Assign whole pictures to splits: a fifth tests, a fifth validates, at least one each, the others train.

    Args:
        digests: hashes of the contents, at least three; the order of their values decides.

    Returns:
        The split of each.
    """
    share = max(1, round(len(digests) / _SHARES))
    names = ["test"] * share + ["validation"] * share
    names += ["train"] * (len(digests) - len(names))
    return dict(zip(sorted(digests), names, strict=True))


def split_regions(side: int, margin: int) -> dict[str, slice]:
    """Cut the longer side of a picture: three fifths train, then a fifth validates, then a fifth tests.

    Args:
        side: pixels.
        margin: pixels between two parts that belong to neither, so that no crop lies next to one of another split.
    """
    part = max(0, side - 2 * margin) // _SHARES
    test, validation = side - part, side - 2 * part - margin
    return {
        "train": slice(0, max(0, validation - margin)),
        "validation": slice(validation, validation + part),
        "test": slice(test, side),
    }


@dataclass(frozen=True, eq=False)
class PictureSource:
    """The pixels of a folder, by split.

    Attributes:
        name: the name of the data set in settings, ``images:DIGEST``.
        pixels: by split, those of each picture, or of its part; every side is at least ``smallest``.
        manifest: a row per picture, for the record of a run: ``name``, ``sha256``, ``width`` and ``height`` of the
            upright picture, ``reduced_by`` and ``split``.
        smallest: pixels.

    Shape:
        pixels: (H, W, 3) uint8 each.
    """

    name: str
    pixels: Mapping[str, Sequence[NDArray[np.uint8]]]
    manifest: Sequence[Mapping[str, Any]]
    smallest: int


def load_pictures(folder: Path, *, crop_size: int, smallest: int) -> PictureSource:
    """Decode the pictures of a folder and split them.

    Splits consist of whole pictures. Where they are fewer than three, each picture is cut into three parts with
    half a crop between them. A large picture is reduced by the whole number that leaves its shorter side at least
    eight crops long. All pixels stay in memory, about one to five megabytes per picture for crops of 64 pixels.

    Args:
        folder: of the pictures; see :func:`find_pictures`.
        crop_size: side of the crops, pixels.
        smallest: no side of a picture, or of a part, may be shorter, pixels.

    Raises:
        FileNotFoundError, NotADirectoryError: as :func:`find_pictures`.
        ValueError: there is no picture; or one cannot be decoded or is too small, which the message names.
    """
    found = find_pictures(folder)
    whole = len(found.files) >= _FEWEST
    splits = split_by_content([file.sha256 for file in found.files]) if whole else {}
    pixels: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in SPLITS}
    manifest = []
    margin = crop_size // 2
    longer = smallest if whole else _SHARES * smallest + 2 * margin
    expected = f"at least {smallest} pixels high and wide"
    if not whole:
        copies = f" ({found.copies} {'copy' if found.copies == 1 else 'copies'} left out)" if found.copies else ""
        few = f"fewer than {_FEWEST} pictures{copies} are cut into three parts each"
        expected += f", and {longer} along one side, as {few}"
    for file in found.files:
        picture = decode(file.path.read_bytes(), str(file.path))
        height, width = picture.shape[:2]
        factor = max(1, min(min(height, width) // (_CROPS_PER_SIDE * crop_size), max(height, width) // longer))
        small = reduced(picture, factor)
        parts = {splits[file.sha256]: small} if whole else _parts(small, margin)
        fits = all(min(part.shape[:2]) >= smallest for part in parts.values())
        require(fits, str(file.path), expected, f"{height} pixels high and {width} wide")
        for split, part in parts.items():
            pixels[split].append(part)
        manifest.append(
            {
                "name": file.name,
                "sha256": file.sha256,
                "width": width,
                "height": height,
                "reduced_by": factor,
                "split": splits.get(file.sha256, "three parts"),
            }
        )
    return PictureSource(found.data, pixels, manifest, smallest)


def _parts(picture: NDArray[np.uint8], margin: int) -> dict[str, NDArray[np.uint8]]:
    height, width = picture.shape[:2]
    regions = split_regions(max(height, width), margin)
    return {split: picture[region] if height > width else picture[:, region] for split, region in regions.items()}
