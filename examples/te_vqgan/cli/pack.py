"""The command ``pack``, from parsed options to one archive."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from examples.te_vqgan.cli.options import WHERE, out_folder

__all__ = ["add_pack_command"]


def add_pack_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Register it.

    Args:
        add: makes the parser of a command from its name, function, help text and shared options.
    """
    pack = add("pack", _pack, "pack weights, logs, samples and reports into one archive", *WHERE)
    pack.add_argument("--into", type=Path, required=True, help="archive to create, FILE.tar or FILE.tar.gz")
    pack.add_argument("--unfinished", action="store_true", help="pack unfinished runs too")


def _pack(options: argparse.Namespace) -> None:
    from examples.te_vqgan.runs.archive import pack

    packed = pack(out_folder(options), options.into, unfinished=options.unfinished)
    print(f"{options.into}: {packed.files:,} files of {packed.runs} runs, {packed.size / 2**20:.1f} MiB.")
