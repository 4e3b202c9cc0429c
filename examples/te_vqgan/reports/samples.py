"""Files of samples, of a run or of a report: tensors under names, and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from examples.te_vqgan.runs.checkpoint import load_checkpoint
from examples.te_vqgan.runs.checks import require

__all__ = ["Stored", "load_run_samples", "load_samples"]

Stored = tuple[dict[str, Tensor], dict[str, Any]]
"""What such a file holds, as :func:`~.runs.checkpoint.save_checkpoint` takes it."""

_CURE = "restore it, or delete evaluation.json there and give `stage1` again with --resume"


def load_run_samples(run: Path) -> Stored:
    """Return the samples of a finished Stage 1 run.

    Raises:
        ValueError: they are missing or damaged; the message names the run and the cure.
    """
    return load_samples(run / "samples.safetensors", cure=_CURE)


def load_samples(path: Path, *, cure: str = "write the report again from the runs") -> Stored:
    """Return what a file of samples holds.

    Args:
        path: the file.
        cure: what helps if it is missing or damaged.

    Raises:
        ValueError: it is missing or damaged.
    """
    require(path.is_file(), path.name, f"in {path.parent}", f"none; {cure}")
    return load_checkpoint(path, cure=cure)
