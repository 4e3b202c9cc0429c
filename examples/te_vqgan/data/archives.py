"""The IDX archives of MNIST and Fashion-MNIST: their checksums, where they may lie, where they come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from examples.te_vqgan.data.idx import read_idx

__all__ = [
    "CHECKSUMS",
    "DATA_VARIABLE",
    "IdxFile",
    "download_idx_folder",
    "find_idx_folder",
    "idx_path",
]

DATA_VARIABLE = "TE_QUANT_DATA"
"""The environment variable that names a folder with the IDX files, directly or in a folder a data set."""


@dataclass(frozen=True)
class IdxFile:
    """A file of a data set: SHA-256 of the unpacked content, and of the ``.gz`` that the mirrors hold.

    A local ``.gz`` may be packed otherwise, so it is held to the first alone.
    """

    unpacked: str
    packed: str


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

CHECKSUMS: dict[str, dict[str, IdxFile]] = {
    "mnist": {
        TRAIN_IMAGES: IdxFile(
            unpacked="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            packed="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        TRAIN_LABELS: IdxFile(
            unpacked="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            packed="3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        TEST_IMAGES: IdxFile(
            unpacked="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            packed="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        TEST_LABELS: IdxFile(
            unpacked="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            packed="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    },
    "fashion-mnist": {
        TRAIN_IMAGES: IdxFile(
            unpacked="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            packed="3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        TRAIN_LABELS: IdxFile(
            unpacked="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            packed="a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        TEST_IMAGES: IdxFile(
            unpacked="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            packed="346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        TEST_LABELS: IdxFile(
            unpacked="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            packed="67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    },
}
MIRRORS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
}
# Torchvision's folders, which hold the files in a folder "raw".
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
# How many names of a folder's entries a message shows.
_SHOWN = 5
# Where Debian's package dataset-fashion-mnist puts its files.
SYSTEM_FOLDER = Path("/usr/share/datasets")


def find_idx_folder(name: str, data_dir: str | Path | None = None) -> Path | None:
    """The local folder that holds the four files of ``name``; None when there is none and a download is due.

    Raises:
        FileNotFoundError: ``data_dir`` is given but has none of the files, or some folder has only some.
    """
    if data_dir is not None:
        places = [Path(data_dir)]
    else:
        variable = os.environ.get(DATA_VARIABLE)
        places = ([Path(variable)] if variable else []) + [SYSTEM_FOLDER]
    for place in places:
        for folder in _folders(name, place):
            missing = [stem for stem in CHECKSUMS[name] if not idx_path(folder, stem).is_file()]
            if not missing:
                if _is_of_another(name, folder):
                    continue
                return folder
            if len(missing) < len(CHECKSUMS[name]):
                raise FileNotFoundError(f"{folder} must hold all files of {name!r}, got none called {missing}.")
    if data_dir is not None:
        files = ", ".join(CHECKSUMS[name])
        cure = _found_deeper(name, Path(data_dir))
        raise FileNotFoundError(f"data_dir must hold the files of {name!r} ({files}), got {data_dir}{cure}.")
    return None


def _folders(name: str, place: Path) -> list[Path]:
    """List where the files may lie in ``place``: directly or in a folder per data set, as torchvision has them."""
    # The data set's own folders come first: two data sets share their file names.
    parents = (place / name, place / _TORCHVISION[name], place)
    return [folder for parent in parents for folder in (parent, parent / "raw")]


def _found_deeper(name: str, place: Path) -> str:
    """Name the folder in ``place`` that would have been right, else what is in there, for a message."""
    entries = sorted(place.iterdir()) if place.is_dir() else []
    for entry in entries:
        if not entry.is_dir():
            continue
        for folder in _folders(name, entry):
            complete = all(idx_path(folder, stem).is_file() for stem in CHECKSUMS[name])
            if complete and not _is_of_another(name, folder):
                return f"; they are in {folder}"
    if not entries:
        return ""
    more = ", ..." if len(entries) > _SHOWN else ""
    return f" with {', '.join(entry.name for entry in entries[:_SHOWN])}{more}"


def _is_of_another(name: str, folder: Path) -> bool:
    """Whether the smallest file is exactly another data set's: all data sets share their file names."""
    others = (files[TEST_LABELS].unpacked for other, files in CHECKSUMS.items() if other != name)
    return any(_has_checksum(idx_path(folder, TEST_LABELS), sha256) for sha256 in others)


def _has_checksum(path: Path, sha256: str) -> bool:
    try:
        read_idx(path, 1, sha256=sha256)
    except ValueError:
        return False
    return True


def idx_path(folder: Path, stem: str) -> Path:
    """The file ``stem`` in ``folder``, also if a dot stands before ``idx``; an unpacked one goes first."""
    names = (stem, stem.replace("-idx", ".idx"))
    paths = [folder / f"{name}{suffix}" for suffix in ("", ".gz") for name in names]
    return next((path for path in paths if path.is_file()), folder / f"{stem}.gz")


def download_idx_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """Fetch what is not yet in the cache, from the first mirror that answers; returns the folder.

    Raises:
        FileNotFoundError: no mirror can be reached.
        ValueError: a mirror sent a file with another SHA-256; it is not kept.
    """
    import pooch

    folder = Path(pooch.os_cache("te_quant") if cache_dir is None else cache_dir) / name
    for stem, file in CHECKSUMS[name].items():
        _download_file(name, f"{stem}.gz", file.packed, folder)
    return folder


def _download_file(name: str, file_name: str, sha256: str, folder: Path) -> None:
    failures = []
    for mirror in MIRRORS[name]:
        failure = _try_mirror(mirror + file_name, file_name, sha256, folder)
        if failure is None:
            return
        failures.append(f"{mirror}: {failure}")
    raise FileNotFoundError(
        f"{name!r} must be on this machine or reachable, got no {file_name} from any mirror. Give the folder "
        f"of its four IDX files by the data_dir option or in {DATA_VARIABLE}. ({'; '.join(failures)})"
    )


def _try_mirror(url: str, file_name: str, sha256: str, folder: Path) -> str | None:
    """None when the file is there, else why the mirror could not be reached."""
    import pooch

    try:
        pooch.retrieve(url, known_hash=f"sha256:{sha256}", fname=file_name, path=folder)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None
