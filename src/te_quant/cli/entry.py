"""Run one command: users' mistakes become one sentence and the exit status 2."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from te_quant.cli import codec, measures
from te_quant.cli.arguments import Options, build_parser

__all__ = ["main"]

Command = Callable[[Options], tuple[str, dict[str, Any]]]

_COMMANDS: dict[str, Command] = {
    "encode": codec.encode,
    "decode": codec.decode,
    "audit": measures.run_audit,
    "measure": measures.measure,
    "stability": measures.stability,
    "convert": codec.convert,
}
# The packages of the extra, by the names under which they are imported.
_EXTRA = ("huggingface_hub", "matplotlib", "PIL", "safetensors", "tqdm")
_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``te-quant`` and return its exit status.

    Args:
        arguments: those of the command line without the name of the program; None reads ``sys.argv``.

    Returns:
        0; or 2 where the arguments, or the files that they name, are wrong, and one sentence on standard error
        says how; or 130 after an interruption, which leaves no file half written.

    Raises:
        SystemExit: an argument does not parse (status 2), or help was asked for (status 0).
        RuntimeError: the user's Python file (``--format python``) has raised a TypeError or a ValueError, a bug
            that only a traceback finds. Its other errors pass as they are, but wrong syntax and packages or files
            that it does not find are told in one sentence.
    """
    options = Options(**vars(build_parser().parse_args(arguments)))
    try:
        _require_extra(options.command)
        text, values = _COMMANDS[options.command](options)
    except KeyboardInterrupt as stop:
        told = f", {stop}" if str(stop) else ""
        sys.stderr.write(f"te-quant {options.command}: interrupted{told}\n")
        return _INTERRUPTED
    except (ImportError, OSError, TypeError, ValueError) as error:
        # What the library refuses, files that cannot be read, packages that are missing.
        if options.traceback:
            raise
        sys.stderr.write(f"te-quant {options.command}: {' '.join(str(error).split())}\n")
        return _USAGE_ERROR
    told = json.dumps(values, indent=2, allow_nan=False) if options.json else text.rstrip()
    # As standard error does: a character that the terminal lacks, such as κ, loses no finished work.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(told.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 0


def _require_extra(command: str) -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        packages = " and ".join(missing)
        raise ImportError(f"{packages} must be installed to run te-quant {command}: pip install 'te_quant[cli]'.")
