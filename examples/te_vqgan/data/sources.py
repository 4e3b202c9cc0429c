"""Where the digits come from: MNIST and Fashion-MNIST as IDX files, or the digits that scikit-learn brings.

Whatever the source, the result is three disjoint splits of single-channel pictures with labels. Both IDX data
sets are known by the SHA-256 of their unpacked files, so a local copy is held to the same as a download.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.archives import (
    CHECKSUMS,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    download_idx_folder,
    find_idx_folder,
    idx_path,
)
from examples.te_vqgan.data.idx import read_idx
from examples.te_vqgan.runs.checks import require, require_choice

__all__ = [
    "CLASS_NAMES",
    "PICTURES",
    "SOURCES",
    "SPLITS",
    "DigitSource",
    "DigitSplit",
    "is_pictures",
    "load_digits",
]

SOURCES = ("mnist", "fashion-mnist", "digits")
PICTURES = "images:"
"""How the name of a data set begins that consists of pictures in a folder; see :mod:`~.data.pictures`."""

SPLITS = ("train", "validation", "test")

_NUM_VALIDATION = 5_000
_DIGITS_SEED = 0
_NUMERALS = tuple("0123456789")
_GARMENTS = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

CLASS_NAMES = {"mnist": _NUMERALS, "fashion-mnist": _GARMENTS, "digits": _NUMERALS}
"""Of labels 0, 1, ..., by data set."""


@dataclass(frozen=True, eq=False)
class DigitSplit:
    """Pictures of one split.

    Shape:
        images: (N, n, n) uint8, 0 ground to 255 ink. labels: (N,) int64.

    Raises:
        ValueError: other shapes or types, or no picture at all.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        square = self.images.ndim == 3 and self.images.shape[1] == self.images.shape[2]
        if not square or self.images.dtype != np.uint8:
            raise ValueError(f"images must be (N, n, n) uint8, got {self.images.dtype} of {self.images.shape}.")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.int64:
            expected = self.images.shape[:1]
            raise ValueError(
                f"labels must be int64 of {expected}, got {self.labels.dtype} of {self.labels.shape}."
            )
        if len(self.labels) == 0:
            raise ValueError("images must hold at least one picture, got none.")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DigitSource:
    """Three disjoint splits of one data set.

    Args:
        name: as in :data:`SOURCES`, or your own.
        class_names: of labels 0, 1, ...
        train, validation, test: no picture is in two of them.

    Raises:
        ValueError: a label that has no name.
    """

    name: str
    class_names: tuple[str, ...]
    train: DigitSplit
    validation: DigitSplit
    test: DigitSplit

    def __post_init__(self) -> None:
        for name in SPLITS:
            labels = self.split(name).labels
            if labels.min() < 0 or labels.max() >= len(self.class_names):
                raise ValueError(f"{name}.labels must be in [0, {len(self.class_names)}), got one that is not.")

    def split(self, name: str) -> DigitSplit:
        """The split called "train", "validation" or "test"."""
        require_choice("split", name, SPLITS)
        chosen: DigitSplit = getattr(self, name)
        return chosen

    def fingerprint(self) -> str:
        """SHA-256 over all pictures and labels, to tell whether a later run sees the same data."""
        digest = hashlib.sha256()
        for name in SPLITS:
            split = self.split(name)
            digest.update(f"{name} {split.images.shape} ".encode())
            digest.update(np.ascontiguousarray(split.images).tobytes())
            digest.update(np.ascontiguousarray(split.labels, "<i8").tobytes())
        return digest.hexdigest()


def is_pictures(data: str) -> bool:
    """Say whether ``data``, from the command line or from settings, names pictures of a folder."""
    return data.startswith(PICTURES)


def load_digits(name: str, data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> DigitSource:
    """Load a data set, from local files if there are any.

    The IDX files are looked for in ``data_dir``, then in the folder that the environment variable
    TE_QUANT_DATA names, then where Debian installs them, and are downloaded last. The last 5,000 pictures of
    the training file are the validation split, the others train; the test file is the test split. The
    pictures of scikit-learn, 8x8 with values 0 to 16, are split 60/20/20 within each class by a fixed seed
    and scaled to 0..255.

    Args:
        name: "mnist", "fashion-mnist" or "digits" (scikit-learn's: 1,797 pictures, no download).
        data_dir: folder with the four IDX files, plain or ``.gz``, directly or in a folder called ``name``;
            given, nothing else is tried. Not for "digits".
        cache_dir: where downloads are kept; by default the user's cache folder.

    Raises:
        ValueError: an unknown name, ``data_dir`` with "digits", or a file that is not what it should be.
        FileNotFoundError: the files are not there and cannot be downloaded.
    """
    digits = ", ".join(map(repr, SOURCES))
    expected = f"one of {digits} for this step; prepare, stage1, run and report take pictures of a folder too"
    require(not is_pictures(name), "data", expected, repr(name))
    require_choice("name", name, SOURCES)
    if name == "digits":
        if data_dir is not None:
            raise ValueError(f"data_dir must be None for 'digits', which scikit-learn brings, got {data_dir!r}.")
        return _load_sklearn()
    folder = find_idx_folder(name, data_dir)
    if folder is None:
        folder = download_idx_folder(name, cache_dir)

    def read(stem: str, ndim: int) -> NDArray[np.uint8]:
        return read_idx(idx_path(folder, stem), ndim, sha256=CHECKSUMS[name][stem].unpacked)

    images, labels = read(TRAIN_IMAGES, 3), read(TRAIN_LABELS, 1).astype(np.int64)
    cut = len(images) - _NUM_VALIDATION
    return DigitSource(
        name,
        CLASS_NAMES[name],
        DigitSplit(images[:cut], labels[:cut]),
        DigitSplit(images[cut:], labels[cut:]),
        DigitSplit(read(TEST_IMAGES, 3), read(TEST_LABELS, 1).astype(np.int64)),
    )


def _load_sklearn() -> DigitSource:
    from sklearn.datasets import load_digits as load_sklearn_digits

    bunch = load_sklearn_digits()
    images, labels = bunch.images, bunch.target.astype(np.int64)
    # 16 is full ink; integers keep the scaling the same on every machine.
    scaled = ((images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    rng = np.random.default_rng(_DIGITS_SEED)
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    for label in range(len(_NUMERALS)):
        order = rng.permutation(np.flatnonzero(labels == label))
        for part, rows in zip(parts, np.split(order, [len(order) * 3 // 5, len(order) * 4 // 5]), strict=True):
            part.append(rows)
    rows_of = [np.sort(np.concatenate(part)) for part in parts]
    return DigitSource(
        "digits", CLASS_NAMES["digits"], *(DigitSplit(scaled[rows], labels[rows]) for rows in rows_of)
    )
