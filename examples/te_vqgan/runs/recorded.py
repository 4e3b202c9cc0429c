"""The weights of a finished run against the hashes in its provenance, so that damaged and foreign ones show."""

from __future__ import annotations

from pathlib import Path

from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import sha256
from examples.te_vqgan.runs.running import WEIGHTS, recorded_hash

__all__ = ["require_recorded"]

_CURE = "restore {}, or train the run again"


def require_recorded(run: Path) -> None:
    """Refuse a finished run with other weights than it ended with, or on another tokenizer than it was trained on.

    Files that are not there are not compared. Runs of older versions recorded no hashes and pass.

    Args:
        run: folder of a tokenizer, or of a GPT in that of its tokenizer.

    Raises:
        ValueError: the weights of the run, or those of its tokenizer, are others.
    """
    weights, tokenizer = run / WEIGHTS, run.parent / WEIGHTS
    expected = f"the one that the run in {run} ended with"
    require(_is_recorded(run, "weights", weights), "model", expected, f"other weights; {_CURE.format(weights)}")
    expected = f"the one that the run in {run} was trained with"
    good = _is_recorded(run, "tokenizer", tokenizer)
    require(good, "tokenizer", expected, f"other weights; {_CURE.format(tokenizer)}")


def _is_recorded(run: Path, name: str, path: Path) -> bool:
    known = recorded_hash(run, name)
    return known is None or not path.is_file() or sha256(path) == known
