"""Freely licensed photographs that packages ship: where they lie, by whom they are, under which licence.

A photograph is known by the SHA-256 of its file: the licence was read for that content and no other. The list is
``photographs.json`` next to this file.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.te_vqgan.runs.checks import require_choice
from examples.te_vqgan.runs.files import sha256, write_bytes_atomically

__all__ = [
    "CATALOGUE",
    "PACKAGES",
    "Gathered",
    "Package",
    "Photograph",
    "gather",
    "installed_version",
    "package_folder",
]


class Package(NamedTuple):
    """Where photographs come from.

    Attributes:
        name: as ``pip`` or ``apt`` calls it.
        version: in which the pictures and their licences were looked up.
        module: Python module next to whose files they lie; ``None`` for a Debian package.
        folder: of the pictures, within the module's folder or within the root of the file system.
        stated: the file that states the licences, in words.
    """

    name: str
    version: str
    module: str | None
    folder: str
    stated: str


class Photograph(NamedTuple):
    """One picture.

    Attributes:
        file: its path within the folder of its package.
        package: a key of :data:`PACKAGES`.
        author: whom to attribute it to.
        licence: its short name.
        sha256: of its content, in hexadecimal.
    """

    file: str
    package: str
    author: str
    licence: str
    sha256: str


class Gathered(NamedTuple):
    """What :func:`gather` did.

    Attributes:
        copied: photographs that are in the folder now.
        missing: those whose package has no such file here.
        changed: those whose file is another than the one whose licence was read; not copied.
    """

    copied: Sequence[Photograph]
    missing: Sequence[Photograph]
    changed: Sequence[Photograph]


_LISTED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

PACKAGES: dict[str, Package] = {name: Package(name, **facts) for name, facts in _LISTED["packages"].items()}
"""By name."""

CATALOGUE: tuple[Photograph, ...] = tuple(Photograph(**facts) for facts in _LISTED["photographs"])
"""All photographs, none twice."""


def package_folder(name: str, root: Path = Path("/")) -> Path | None:
    """Return the folder of a package's pictures, ``None`` where the package is not installed.

    Args:
        name: a key of :data:`PACKAGES`.
        root: where Debian packages are unpacked; ``/`` where they are installed.

    Raises:
        ValueError: the name is unknown.
    """
    require_choice("package", name, tuple(PACKAGES))
    package = PACKAGES[name]
    if package.module is None:
        folder = root / package.folder
        return folder if folder.is_dir() else None
    # Not imported: scikit-image takes seconds.
    found = importlib.util.find_spec(package.module)
    places = [] if found is None else list(found.submodule_search_locations or [])
    return Path(places[0]) / package.folder if places else None


def gather(into: Path, root: Path = Path("/"), catalogue: Sequence[Photograph] | None = None) -> Gathered:
    """Copy the photographs of the packages that are here into one folder.

    Args:
        into: made if it is not there; a file of the same name is replaced.
        root: where Debian packages are unpacked.
        catalogue: the photographs to look for; all of :data:`CATALOGUE` by default.
    """
    copied, missing, changed = [], [], []
    for photograph in CATALOGUE if catalogue is None else catalogue:
        folder = package_folder(photograph.package, root)
        path = None if folder is None else folder / photograph.file
        if path is None or not path.is_file():
            missing.append(photograph)
        elif sha256(path) != photograph.sha256:
            changed.append(photograph)
        else:
            write_bytes_atomically(into / _name(photograph), path.read_bytes())
            copied.append(photograph)
    return Gathered(copied, missing, changed)


def installed_version(name: str) -> str | None:
    """Return the version of an installed Python package, ``None`` where it is not there or is a Debian package."""
    try:
        return None if PACKAGES[name].module is None else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(photograph: Photograph) -> str:
    """A name that tells equal names of two packages apart."""
    return f"{photograph.package}-{photograph.file.replace('/', '-')}"
