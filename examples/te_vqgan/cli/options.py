"""The options that several commands share. Each command takes those it uses; argparse refuses the others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.te_vqgan.data.pictures import PictureSource, find_pictures, folder_of, load_pictures, short_name
from examples.te_vqgan.data.sources import PICTURES, SOURCES, DigitSource, is_pictures, load_digits
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.stage1.presets import PERCEPTUAL, PRESETS, Stage1Settings, settings_for

__all__ = [
    "COMPUTE",
    "SETTINGS",
    "WHERE",
    "add_options",
    "announce",
    "execution",
    "image_source",
    "out_folder",
    "stage1_settings",
]

WHERE = ("preset", "data", "out")
"""Which folder of results; without ``--out`` preset and data name it."""

SETTINGS = ("seed", "steps", "perceptual", "bf16", "max-reduction", "round-trip-weight")
"""What a training changes in its preset."""

COMPUTE = ("data-dir", "device", "threads", "channels-last", "compile")
"""Where and how a training is computed."""

# Made for a GPU, whose time is worth that of a compiler.
_COMPILED = ("paper",)


def _data(word: str) -> str:
    if word not in SOURCES and not is_pictures(word):
        known = ", ".join(map(repr, SOURCES))
        raise argparse.ArgumentTypeError(f"invalid choice: {word!r} (choose from {known}, '{PICTURES}FOLDER')")
    return word


_OPTIONS: dict[str, dict[str, Any]] = {
    "preset": {
        "choices": tuple(PRESETS),
        "default": "quick",
        "help": "sizes of models, data and trainings (default: quick)",
    },
    "data": {
        "type": _data,
        "metavar": "{" + ",".join((*SOURCES, f"{PICTURES}FOLDER")) + "}",
        "help": f"data set, or pictures of a folder for {PICTURES}FOLDER (default: the preset's)",
    },
    "out": {"type": Path, "help": "folder of the results (default: runs/te_vqgan/PRESET-DATA)"},
    "data-dir": {"type": Path, "help": "folder of the IDX files (default: $TE_QUANT_DATA, else downloaded)"},
    "seed": {"type": int, "help": "seed of weights and images (default: the preset's, 0)"},
    "steps": {"type": int, "help": "optimiser steps, instead of the preset's"},
    "perceptual": {
        "choices": PERCEPTUAL,
        "help": "perceptual distance, in the loss and measured (default: the preset's; evaluate: the tokenizer's)",
    },
    "bf16": {"action": argparse.BooleanOptionalAction, "help": "train the networks in bfloat16"},
    "max-reduction": {
        "type": int,
        "metavar": "FACTOR",
        "help": "take crops from pictures reduced 1, 2, 4, ... times, up to FACTOR (default: the preset's)",
    },
    "round-trip-weight": {
        "type": float,
        "metavar": "WEIGHT",
        "help": "weight of the loss that makes decoded pictures encode to the same tokens, which starts after 40 "
        "percent of the steps (default: the preset's, 0 for none)",
    },
    "device": {"default": "cpu", "help": "torch device (default: cpu)"},
    "channels-last": {
        "action": argparse.BooleanOptionalAction,
        "help": "channels-last memory format (default: only for preset paper)",
    },
    "compile": {
        "action": argparse.BooleanOptionalAction,
        "help": "compile the networks (default: only for preset paper)",
    },
    "threads": {"type": int, "default": 0, "help": "CPU threads in total (default: one per core)"},
}


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Give ``parser`` the shared options of these names, without the dashes."""
    for name in names:
        parser.add_argument(f"--{name}", **_OPTIONS[name])


def out_folder(options: argparse.Namespace) -> Path:
    """Return the folder of results that ``--preset``, ``--data`` and ``--out`` name."""
    if options.out is not None:
        return Path(options.out)
    data = options.data or PRESETS[options.preset].data
    return Path("runs", "te_vqgan", f"{options.preset}-{short_name(data) if is_pictures(data) else data}")


def stage1_settings(options: argparse.Namespace, arm: str) -> Stage1Settings:
    """Return the settings of ``arm`` under the options; a command that does not train has only some of these."""
    names = ("data", *(name.replace("-", "_") for name in SETTINGS))
    changes = {name: getattr(options, name, None) for name in names}
    data = options.data or PRESETS[options.preset].data
    if is_pictures(data):
        changes["data"] = find_pictures(folder_of(data)).data
    return settings_for(options.preset, arm, changes)


def image_source(options: argparse.Namespace, settings: Stage1Settings) -> DigitSource | PictureSource:
    """Load the digits or the pictures that ``settings``, made of the same options, name.

    Raises:
        ValueError, OSError: they cannot be loaded, or ``--data-dir`` is given with pictures.
    """
    from examples.te_vqgan.stage1.pictures import smallest_side

    if not is_pictures(settings.data):
        return load_digits(settings.data, options.data_dir)
    require(options.data_dir is None, "data_dir", f"unset for pictures of {PICTURES}FOLDER", options.data_dir)
    folder = folder_of(options.data)
    return load_pictures(folder, crop_size=settings.canvas_size, smallest=smallest_side(settings))


def execution(options: argparse.Namespace) -> Execution:
    """Return where to compute under the options; a command that does not train has only some of these."""
    given = {name: getattr(options, name, None) for name in ("channels_last", "compile")}
    default = options.preset in _COMPILED
    channels_last, compiled = (default if value is None else value for value in given.values())
    return Execution(options.device, options.threads, channels_last, compiled)


def announce(folder: Path) -> None:
    """Print the report in ``folder`` up to its pictures, and where it is."""
    print((folder / "report.md").read_text(encoding="utf-8").split("## Pictures")[0].strip())
    print(f"\nReport: {folder / 'report.html'}")
