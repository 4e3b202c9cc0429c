"""The command ``photographs``: gather freely licensed pictures from packages, for ``--data images:FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from examples.te_vqgan.cli.options import require_folder

__all__ = ["add_photographs_command"]


def add_photographs_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Register it.

    Args:
        add: makes the parser of a command from its name, function, help text and shared options.
    """
    gathered = "copy the freely licensed photographs of installed packages into a folder"
    photographs = add("photographs", _photographs, gathered)
    photographs.add_argument("--into", type=Path, required=True, help="folder to fill")
    photographs.add_argument(
        "--root", type=Path, default=Path("/"), help="where Debian packages are unpacked (default: /)"
    )


def _photographs(options: argparse.Namespace) -> None:
    import json

    from examples.te_vqgan.data.photographs import CATALOGUE, PACKAGES, gather, installed_version
    from examples.te_vqgan.data.pictures import find_pictures
    from examples.te_vqgan.runs.files import write_text_atomically

    require_folder("into", options.into)
    gathered = gather(options.into, options.root)
    facts = [
        {
            **photograph._asdict(),
            "checked_version": PACKAGES[photograph.package].version,
            "installed_version": installed_version(photograph.package),
            "stated": PACKAGES[photograph.package].stated,
        }
        for photograph in gathered.copied
    ]
    write_text_atomically(options.into / "photographs.json", json.dumps(facts, indent=2) + "\n")
    for photograph in gathered.changed:
        print(f"Left out, as its licence was read for another file: {photograph.package}, {photograph.file}")
    for name in dict.fromkeys(photograph.package for photograph in gathered.missing):
        files = sum(photograph.package == name for photograph in gathered.missing)
        package = PACKAGES[name]
        install = (
            f"apt-get download {package.name} && dpkg -x {package.name}_*.deb ROOT, then --root ROOT"
            if package.module is None
            else f"pip install {package.name}=={package.version}"
        )
        print(f"Not here: {files} of {name} {package.version} ({install})")
    found = find_pictures(options.into)
    print(f"{options.into}: {len(gathered.copied)} of {len(CATALOGUE)} photographs, {found.data}")
