"""The options that several commands share. Each command takes those it uses; argparse refuses the others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.te_vqgan.data.sources import SOURCES
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.stage1.presets import PERCEPTUAL, PRESETS, Stage1Settings, settings_for

__all__ = ["COMPUTE", "SETTINGS", "WHERE", "add_options", "announce", "execution", "out_folder", "stage1_settings"]

WHERE = ("preset", "data", "out")
"""Which folder of results; without ``--out`` preset and data name it."""

SETTINGS = ("seed", "steps", "perceptual", "bf16")
"""What a training changes in its preset."""

COMPUTE = ("data-dir", "device", "threads", "channels-last", "compile")
"""Where and how a training is computed."""

# Made for a GPU, whose time is worth that of a compiler.
_COMPILED = ("paper",)

_OPTIONS: dict[str, dict[str, Any]] = {
    "preset": {
        "choices": tuple(PRESETS),
        "default": "quick",
        "help": "sizes of models, data and trainings (default: quick)",
    },
    "data": {"choices": SOURCES, "help": "data set (default: the preset's)"},
    "out": {"type": Path, "help": "folder of the results (default: runs/te_vqgan/PRESET-DATA)"},
    "data-dir": {"type": Path, "help": "folder of the IDX files (default: $TE_QUANT_DATA, else downloaded)"},
    "seed": {"type": int, "help": "seed of weights and images (default: the preset's, 0)"},
    "steps": {"type": int, "help": "optimiser steps, instead of the preset's"},
    "perceptual": {
        "choices": PERCEPTUAL,
        "help": "perceptual distance, in the loss and measured (default: the preset's; evaluate: the tokenizer's)",
    },
    "bf16": {"action": argparse.BooleanOptionalAction, "help": "train the networks in bfloat16"},
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
    data = options.data or PRESETS[options.preset].data
    return Path("runs", "te_vqgan", f"{options.preset}-{data}") if options.out is None else Path(options.out)


def stage1_settings(options: argparse.Namespace, arm: str) -> Stage1Settings:
    """Return the settings of ``arm`` under the options; a command that does not train has only some of these."""
    changes = {name: getattr(options, name, None) for name in ("data", *SETTINGS)}
    return settings_for(options.preset, arm, changes)


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
