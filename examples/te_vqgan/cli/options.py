"""The options that several commands share. Each command takes those it uses; argparse refuses the others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.te_vqgan.data.pictures import (
    PictureFolder,
    PictureSource,
    changed_pictures,
    data_name,
    find_pictures,
    folder_of,
    load_pictures,
    short_name,
)
from examples.te_vqgan.data.prepare import SUMMARY_FILE
from examples.te_vqgan.data.sources import PICTURES, SOURCES, DigitSource, is_pictures, load_digits
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import read_json_object
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.stage1.presets import (
    PERCEPTUAL,
    PRESETS,
    Stage1Settings,
    settings_for,
)

__all__ = [
    "COMPUTE",
    "SETTINGS",
    "WHERE",
    "add_options",
    "announce",
    "execution",
    "image_source",
    "out_folder",
    "positive",
    "require_folder",
    "require_unset",
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


def positive(word: str) -> int:
    """Return the number that ``word`` is, for argparse.

    Raises:
        ArgumentTypeError: it is none above 0.
    """
    if not (word.isascii() and word.isdigit() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"must be an int >= 1, got {word!r}")
    return int(word)


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
    "steps": {"type": int, "help": "optimizer steps, instead of the preset's"},
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
    "threads": {"type": positive, "default": 0, "help": "CPU threads in total (default: one per core)"},
}


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Give ``parser`` the shared options of these names, without the dashes."""
    for name in names:
        parser.add_argument(f"--{name}", **_OPTIONS[name])


def require_folder(name: str, path: Path) -> Path:
    """Return ``path``, where a folder is or can be made.

    Args:
        name: of the option.
        path: its value.

    Raises:
        ValueError: it is a file, or leads through one.
    """
    above = next((folder for folder in (path, *path.parents) if folder.exists()), Path())
    got = f"the file {path}" if above == path else f"{path}, where {above} is a file"
    require(above.is_dir(), name, "a folder", got)
    return path


def require_unset(options: argparse.Namespace, name: str, *others: str) -> None:
    """Refuse options that have no effect next to the option ``name``, which is given.

    Raises:
        ValueError: one of them is given.
    """
    for other in others:
        value = getattr(options, other)
        require(value is None, other, f"unset with --{name}", value)


def out_folder(options: argparse.Namespace) -> Path:
    """Return the folder of results that ``--preset``, ``--data`` and ``--out`` name.

    Raises:
        ValueError: ``--out`` is a file.
    """
    if options.out is not None:
        return require_folder("out", Path(options.out))
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
        ValueError, OSError: they cannot be loaded, ``--data-dir`` is given with pictures, or a run in the
            folder of results has other pictures.
    """
    from examples.te_vqgan.stage1.pictures import smallest_side

    if not is_pictures(settings.data):
        return load_digits(settings.data, options.data_dir)
    require(options.data_dir is None, "data_dir", f"unset for pictures of {PICTURES}FOLDER", options.data_dir)
    folder = folder_of(options.data)
    _require_same_pictures(out_folder(options), find_pictures(folder))
    return load_pictures(folder, crop_size=settings.canvas_size, smallest=smallest_side(settings))


def _require_same_pictures(out: Path, found: PictureFolder) -> None:
    """Refuse other pictures than those of the runs in ``out``, as far as these say which they have."""
    records = [out / "data" / SUMMARY_FILE, *sorted(out.glob("*-seed*/provenance.json"))]
    known = [read_json_object(path).get("pictures", []) for path in records if path.exists()]
    before = {data_name([row["sha256"] for row in rows]): rows for rows in known}
    for path in sorted(out.glob("*-seed*/settings.json")):
        data = read_json_object(path).get("data")
        if data != found.data and data in before:
            others = f"{changed_pictures(before[data], found)}; use another --out"
            raise ValueError(f"data must be the pictures of the run in {path.parent}, got others: {others}.")


def execution(options: argparse.Namespace) -> Execution:
    """Return where to compute under the options; a command that does not train has only some of these."""
    given = {name: getattr(options, name, None) for name in ("channels_last", "compile")}
    default = options.preset in _COMPILED
    channels_last, compiled = (default if value is None else value for value in given.values())
    return Execution(options.device, options.threads, channels_last, compiled)


def announce(folder: Path) -> None:
    """Print the report in ``folder`` up to its pictures, and where it is."""
    if not (folder / "report.md").exists():
        print(f"Results: {folder / 'results.json'} (no report, as the folder has no samples)")
        return
    print((folder / "report.md").read_text(encoding="utf-8").split("## Pictures")[0].strip())
    print(f"\nReport: {folder / 'report.html'}")
