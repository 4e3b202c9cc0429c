"""The arguments of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from te_quant._version import __version__
from te_quant.shifts import PROTOCOLS

__all__ = ["FORMATS", "Options", "build_parser"]

FORMATS = ("te_quant", "diffusers", "taming", "llamagen", "te_vqgan", "cosmos", "python")
"""How weights may be stored; the last two can be measured, but not loaded into a model of this library."""


@dataclass
class Options:
    """The arguments of one command; each has those that its parser defines, and defaults for the others."""

    command: str
    json: bool = False
    quiet: bool = False
    traceback: bool = False
    model: str = ""
    format: str = "te_quant"
    config: Path | None = None
    filename: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    offline: bool = False
    device: str = "cpu"
    images: Sequence[Path] = field(default_factory=list)
    size: int | None = None
    limit: int | None = None
    batch_size: int = 16
    tile_size: int | None = None
    tokens: Path = Path()
    output: Path | None = None
    overwrite: bool = False
    stride: int | None = None
    num_codes: int | None = None
    protocol: str = "circular"
    window: int | None = None
    sub_stride_shifts: int | None = None
    cycles: int = 1
    to: str = "te_quant"
    plot: Path | None = None
    table: Path | None = None
    name: str | None = None

    @property
    def progress(self) -> bool | None:
        """What the progress bars are told: off when quiet, else on if standard error is a terminal."""
        return False if self.quiet else None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``te-quant`` with all commands."""
    parser = argparse.ArgumentParser(
        prog="te-quant", description="Encode images to tokens, decode them, and measure what the tokens do."
    )
    parser.add_argument("--version", action="version", version=f"te-quant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_encode, _decode, _audit, _measure, _stability, _convert):
        command = add(commands.add_parser)
        _common(command)
    return parser


def _encode(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _command(add, "encode", "Write the tokens of images into one safetensors file.")
    _model(parser)
    _images(parser)
    _output(parser, "tokens.safetensors", "file to write")
    _batches(parser)
    return parser


def _decode(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _command(add, "decode", "Write the images that tokens stand for as PNG files.")
    _model(parser)
    parser.add_argument("tokens", type=Path, metavar="TOKENS", help="file that te-quant encode wrote")
    _output(parser, "FOLDER", "folder to write into")
    _batches(parser)
    return parser


def _audit(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _command(add, "audit", "Name the layers of the encoder that lose equivariance.")
    _model(parser)
    _images(parser)
    _reports(parser)
    parser.add_argument("--batch-size", type=_positive, default=4, metavar="N", help="images at once (default 4)")
    return parser


def _measure(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _command(add, "measure", "Measure whether tokens move with the image.")
    _model(parser, foreign=True)
    _images(parser)
    _reports(parser)
    _row(parser)
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="circular",
        help="how the content moves: around the image (circular, the default), on constant ground (canvas), or as "
        "if the camera moved (crop)",
    )
    parser.add_argument(
        "--window",
        type=_positive,
        metavar="N",
        help="pixels along each side that the tokenizer sees (canvas, crop)",
    )
    parser.add_argument(
        "--sub-stride-shifts",
        type=_positive,
        metavar="N",
        help="how many shifts below a token are drawn (default: all up to a stride of 8, 64 above)",
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=16, metavar="N", help="images at once (default 16)"
    )
    return parser


def _stability(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _command(add, "stability", "Measure whether tokens survive decoding and encoding.")
    _model(parser, foreign=True)
    _images(parser)
    _reports(parser)
    _row(parser)
    parser.add_argument("--cycles", type=_positive, default=1, metavar="N", help="round trips (default 1)")
    parser.add_argument(
        "--batch-size", type=_positive, default=16, metavar="N", help="images at once (default 16)"
    )
    return parser


def _convert(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _command(add, "convert", "Write the weights of another library as a model of te_quant, or back.")
    _model(parser)
    _output(parser, "FOLDER", "folder to write into")
    parser.add_argument(
        "--to", choices=("te_quant", "diffusers"), default="te_quant", help="what to write (default: te_quant)"
    )
    return parser


def _command(add: Callable[..., argparse.ArgumentParser], name: str, does: str) -> argparse.ArgumentParser:
    return add(name, help=does, description=does)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def _model(parser: argparse.ArgumentParser, *, foreign: bool = False) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, file or hub id owner/name")
    known = FORMATS if foreign else FORMATS[:-2]
    parser.add_argument(
        "--format", choices=known, default=known[0], help=f"whose weights they are (default: {known[0]})"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON file with the options of foreign weights"
    )
    parser.add_argument("--filename", metavar="NAME", help="weights in a folder or repository that has several")
    parser.add_argument("--subfolder", metavar="NAME", help="folder of the model inside MODEL")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument("--offline", action="store_true", help="use only what was downloaded before")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where to run (default: cpu)")
    if foreign:
        parser.add_argument("--stride", type=_positive, metavar="N", help="pixels per token (cosmos)")
        parser.add_argument("--num-codes", type=_positive, metavar="N", help="number of codes (cosmos: 64000)")


def _images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="files, and folders of them")
    parser.add_argument(
        "--size", type=_positive, metavar="N", help="resize the shorter side to N pixels and cut out N x N"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="take the first N images only")


def _output(parser: argparse.ArgumentParser, metavar: str, does: str) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=metavar, help=does)
    _overwrite(parser)


def _overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=_positive, default=16, metavar="N", help="images at once (default 16)"
    )
    parser.add_argument(
        "--tile-size",
        type=_positive,
        metavar="N",
        help="work in tiles of N pixels, to save memory; layers that read the whole image, such as GroupNorm and "
        "attention, see only the tile then, which changes the tokens",
    )


def _reports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the report into a PNG, PDF or SVG file")
    _overwrite(parser)


def _row(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="add a row to a table in Markdown, or replace the row of that name",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the row (default: MODEL with --subfolder, --filename and --revision)",
    )


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}.")
    return number
