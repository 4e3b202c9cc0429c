"""Where numbers come from: the command, the versions, the commit, the machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.te_vqgan.runs import distributed

__all__ = ["Execution", "command_line", "git_commit", "versions"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Where a run is computed. Does not change what is computed beyond rounding.

    Args:
        device: as torch names it; under a launcher ``cuda`` is each process's own GPU.
        threads: of torch's CPU kernels, shared by the processes of a host; 0 leaves torch's own choice.
        channels_last: keep images and convolutions in that order in memory.
        compiled: train what :func:`torch.compile` makes of the networks.
    """

    device: str = "cpu"
    threads: int = 0
    channels_last: bool = False
    compiled: bool = False

    def apply(self) -> torch.device:
        """Set the number of threads and return the device."""
        if self.threads:
            torch.set_num_threads(max(1, self.threads // distributed.local_size()))
        return distributed.own_device(self.device)


def command_line(arguments: Sequence[str]) -> str:
    """Return the command with these arguments, as one would type it."""
    return shlex.join(["python", "-m", "examples.te_vqgan", *arguments])


def git_commit(folder: Path | None = None) -> str | None:
    """Return the commit of this code, with ``-dirty`` behind if files were changed; ``None`` outside of git."""
    where = folder or Path(__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def versions() -> dict[str, Any]:
    """Return the versions of everything that could change the numbers."""
    packages = ("te_quant", "torch", "numpy", "safetensors", "scikit-learn", "matplotlib")
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
