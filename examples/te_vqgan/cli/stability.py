"""The command ``stability``: how many tokens of finished tokenizers survive decoding and encoding."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from examples.te_vqgan.cli.options import require_folder
from examples.te_vqgan.data.pictures import PictureSource, folder_of, load_pictures
from examples.te_vqgan.data.sources import PICTURES, DigitSource, is_pictures, load_digits
from examples.te_vqgan.runs.checks import require

__all__ = ["add_stability_command"]


def add_stability_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Register it.

    Args:
        add: makes the parser of a command from its name, function, help text and shared options.
    """
    text = "measure how many tokens of finished tokenizers survive decoding and encoding"
    stability = add("stability", _stability, text, "data", "data-dir", "threads")
    stability.add_argument(
        "--tokenizers",
        type=Path,
        nargs="+",
        help="folders of finished stage1 runs, or of published weights (default: only render --into again)",
    )
    stability.add_argument("--into", type=Path, required=True, help="add the results to those in this folder")
    stability.add_argument("--images", type=int, default=256, help="test images for each (default: 256)")


def _stability(options: argparse.Namespace) -> None:
    import torch

    from examples.te_vqgan.reports.stability import find_tokenizer, measure_tokenizer, render, write_stability
    from examples.te_vqgan.runs.provenance import command_line
    from examples.te_vqgan.stage1.pictures import smallest_side

    require_folder("into", options.into)
    if options.threads:
        torch.set_num_threads(options.threads)
    source: DigitSource | PictureSource
    for folder in options.tokenizers or ():
        tokenizer = find_tokenizer(folder)
        settings = tokenizer.settings
        if is_pictures(settings.data):
            given = options.data is not None and is_pictures(options.data)
            require(given, "data", f"{PICTURES}FOLDER with the pictures of {folder}", options.data)
            source = load_pictures(
                folder_of(options.data), crop_size=settings.canvas_size, smallest=smallest_side(settings)
            )
        else:
            source = load_digits(settings.data, options.data_dir)
        print(f"{tokenizer.name} ({tokenizer.title})", flush=True)
        report = measure_tokenizer(tokenizer, source, count=options.images)
        # One by one, so that an interruption loses only the current one.
        write_stability(
            options.into, {tokenizer.name: (tokenizer.title, report)}, command=command_line(options.words)
        )
    if not options.tokenizers:
        render(options.into)
    print((options.into / "stability.md").read_text(encoding="utf-8"))
