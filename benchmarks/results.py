"""What was measured, as one JSON file a device: kept cell by cell, so that an interrupted run goes on.

::

    {"format": 1, "device": "cpu", "grid": "full",
     "runs": {ID: {"stamp": {commit, versions, machine, threads, ...}, "command": ..., "seconds": ...}},
     "cells": {"search/N4096-K256-C8": {"run": ID, "settings": {...}, "seconds": ...,
               "contenders": {NAME: {"status": "ok", "median": s, "low": s, "high": s, "rounds": n, "calls": n}
                                    or {"status": "ok", "bytes": n, "returned": n, "method": ...}
                                    or {"status": "skipped" | "refused" | "failed" | "not installed",
                                        "reason": ...}},
               "facts": {...}}}}

``low`` and ``high`` are quartiles. A run is identified by its stamp, which holds everything that decides the
numbers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.te_vqgan.runs.files import write_text_atomically
from examples.te_vqgan.runs.provenance import versions

__all__ = ["FORMAT", "Store", "command_line", "commit", "stamp", "three_digits"]

FORMAT = 1

_ROOT = Path(__file__).resolve().parents[1]
# What decides the numbers: results and documents are written while the code that made them stays as it is.
_CODE = (
    ":(top)src",
    ":(top)benchmarks",
    ":(top)examples/te_vqgan",
    ":(top,exclude)benchmarks/results",
    ":(top,exclude)examples/te_vqgan/results",
)
_PEERS = (
    "vector-quantize-pytorch",
    "diffusers",
    "transformers",
    "kornia",
    "antialiased-cnns",
    "faiss-cpu",
    "scipy",
    "triton",
    "flash-kmeans",
)
_CPUINFO = Path("/proc/cpuinfo")


class Store:
    """The results of one device.

    Args:
        path: the file; read if it is there.
        device: ``cpu`` or ``cuda``.
        grid: ``quick`` or ``full``.
        stamp: of the run that will add cells.
        command: that started it.
        fresh: forget what the file holds of another grid.

    Raises:
        ValueError: the file holds another grid, device or format.
    """

    def __init__(
        self, path: Path, *, device: str, grid: str, stamp: dict[str, Any], command: str, fresh: bool = False
    ) -> None:
        self.path = path
        self.run = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:8]
        empty: dict[str, Any] = {"format": FORMAT, "device": device, "grid": grid, "runs": {}, "cells": {}}
        self.document = empty
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in ("format", "device", "grid") if found.get(name) != empty[name]]
            if not differing:
                self.document = found
            elif not fresh:
                name = differing[0]
                text = f"{path} must hold {name} {empty[name]!r}, got {found.get(name)!r}"
                raise ValueError(f"{text}; use --fresh or another --out.")
        runs = self.document["runs"]
        before = runs.get(self.run, {}).get("seconds", 0.0)
        self._record = {"stamp": stamp, "command": command, "seconds": before}

    @property
    def cells(self) -> dict[str, Any]:
        """All cells by key."""
        cells: dict[str, Any] = self.document["cells"]
        return cells

    def finished(self, key: str) -> bool:
        """Whether the cell is there from a run with the same stamp."""
        cell = self.cells.get(key)
        return cell is not None and cell["run"] == self.run

    def put(self, key: str, cell: dict[str, Any], seconds: float) -> None:
        """Add a cell, or replace it, and write the file."""
        self._record["seconds"] = round(self._record["seconds"] + seconds, 1)
        self.document["runs"][self.run] = self._record
        self.cells[key] = {"run": self.run, "seconds": round(seconds, 1), **cell}
        self.write()

    def forget(self, section: str, keep: Sequence[str] = ()) -> None:
        """Remove the cells of a section, but for some."""
        for key in list(self.cells):
            if key.startswith(f"{section}/") and key not in keep:
                del self.cells[key]

    def write(self) -> None:
        """Write the file as a whole, without the runs that no cell is from."""
        used = {cell["run"] for cell in self.cells.values()}
        runs = {name: run for name, run in self.document["runs"].items() if name in used}
        # Sorted as it is written, not in place: others hold the cells.
        document = {**self.document, "runs": runs, "cells": dict(sorted(self.cells.items()))}
        write_text_atomically(self.path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def stamp(*, device: torch.device, grid: str, threads: int, budget: float) -> dict[str, Any]:
    """Everything that decides the numbers."""
    return {
        "commit": commit(),
        "grid": grid,
        "device": _device_name(device),
        "threads": threads,
        "budget": budget,
        "cpu": _cpu_model(),
        "versions": {**versions(), **{name: _version(name) for name in _PEERS}},
    }


def commit(folder: Path = _ROOT) -> str | None:
    """The last commit that touched the code, with a hash of changes since, if any; ``None`` without git."""
    head = _git(folder, "log", "-1", "--abbrev=12", "--format=%h", "--", *_CODE)
    if not head:
        return None
    changes = _git(folder, "diff", "HEAD", "--", *_CODE)
    if not changes:
        return head
    return f"{head}-dirty-{hashlib.sha256(changes.encode()).hexdigest()[:8]}"


def command_line(arguments: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(["python", "-m", "benchmarks", *arguments])


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu_model() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def three_digits(value: float) -> str:
    """Write a number with three significant digits and without an exponent: 0.0123, 174, 2,520.

    Below a ten-thousandth it has one.
    """
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"
