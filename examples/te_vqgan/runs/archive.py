"""A folder of results as one archive for a release: weights, logs, samples, numbers and reports.

What only serves to resume a training stays out: moments of optimizers, token caches and locks. So do the copy of
the log that TensorBoard reads, and archives.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from examples.te_vqgan.runs.checkpoint import load_checkpoint, under
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import atomic_file
from examples.te_vqgan.runs.recorded import require_recorded
from examples.te_vqgan.runs.running import CHECKPOINT, has_ended

__all__ = ["MANIFEST", "Packed", "pack", "unfinished_runs"]

MANIFEST = "SHA256SUMS"
"""The list of files with their hashes, as ``sha256sum --check`` reads it."""

WEIGHTS = "weights.safetensors"
"""Weights of a run without a folder ``model``, under the names that its model gives them."""

_SUFFIXES = (".tar", ".tar.gz")
# The last is that of an archive which was unpacked here.
_LEFT_OUT = (CHECKPOINT, "tokens.safetensors", MANIFEST)
_LEFT_OUT_FOLDERS = ("tensorboard",)


class Packed(NamedTuple):
    """What an archive holds.

    Attributes:
        runs: folders of trainings.
        files: in it, without the manifest.
        size: of the archive, bytes.
    """

    runs: int
    files: int
    size: int


def pack(out: Path, target: Path, *, unfinished: bool = False) -> Packed:
    """Write everything in ``out`` that a release needs into one archive.

    Equal contents give equal bytes: files are sorted, times, owners and permissions are fixed. Names begin with
    that of ``out``, and the manifest is the last of them.

    Args:
        out: a folder of results.
        target: ``FILE.tar`` or ``FILE.tar.gz``, a new file, written as a whole or not at all.
        unfinished: pack unfinished runs too, with the weights of their checkpoints.

    Raises:
        ValueError: another suffix, a file that exists, no run in ``out``, an unfinished one that ``unfinished``
            does not allow, a damaged file of tensors, or as :func:`~.runs.recorded.require_recorded`.
    """
    require(target.name.endswith(_SUFFIXES), "into", " or ".join(f"FILE{end}" for end in _SUFFIXES), target)
    require(not target.exists(), "into", "a new file", f"{target}, which exists; choose another, or delete it")
    runs = _runs(out)
    require(bool(runs), "out", "a folder with runs", out)
    names = ", ".join(str(run.relative_to(out)) for run in unfinished_runs(out))
    good = unfinished or not names
    require(good, "out", "a folder of finished runs, or pass --unfinished", f"one with unfinished {names}")
    for run in runs:
        if has_ended(run):
            require_recorded(run)
    sums: dict[str, str] = {}
    with contextlib.ExitStack() as opened:
        inner = opened.enter_context(_compressed(opened.enter_context(atomic_file(target)), target))
        archive = opened.enter_context(tarfile.open(fileobj=inner, mode="w", format=tarfile.PAX_FORMAT))
        for name, content in _contents(out, runs):
            sums[name] = hashlib.sha256(content).hexdigest()
            _add(archive, f"{out.resolve().name}/{name}", content)
        manifest = "".join(f"{value}  {name}\n" for name, value in sums.items())
        _add(archive, f"{out.resolve().name}/{MANIFEST}", manifest.encode())
    return Packed(len(runs), len(sums), target.stat().st_size)


def unfinished_runs(out: Path) -> list[Path]:
    """Return the folders below ``out`` whose trainings have not ended."""
    return [run for run in _runs(out) if not has_ended(run)]


def _runs(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.rglob("settings.json"))


def _contents(out: Path, runs: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Give name and content of every file, sorted by name."""
    paths = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if _belongs(path, out)}
    # The weights of such runs lie next to their moments, in the checkpoint.
    weights = {
        (run / WEIGHTS).relative_to(out).as_posix(): run / CHECKPOINT
        for run in runs
        if not (run / "model").is_dir() and (run / CHECKPOINT).exists()
    }
    for name in sorted({**paths, **weights}):
        yield name, _weights(weights[name]) if name in weights else _content(paths[name])


def _belongs(path: Path, out: Path) -> bool:
    parts = path.relative_to(out).parts
    left_out = path.name in _LEFT_OUT or path.name.endswith(_SUFFIXES)
    left_out |= any(part.startswith(".") or part in _LEFT_OUT_FOLDERS for part in parts)
    return path.is_file() and not left_out


def _content(path: Path) -> bytes:
    """Read a file, and refuse tensors that were cut short, which runs without recorded hashes would not show."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = path.read_bytes()
    if path.suffix == ".safetensors":
        try:
            load(content)
        except SafetensorError as error:
            raise ValueError(f"{path} must hold tensors, got {error}; restore it before packing.") from error
    return content


def _weights(checkpoint: Path) -> bytes:
    from safetensors.torch import save

    tensors = under("model", load_checkpoint(checkpoint)[0])
    return save(dict(sorted(tensors.items())))


@contextlib.contextmanager
def _compressed(file: IO[bytes], target: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if not target.name.endswith(".gz"):
        yield file
        return
    # Without name and time, which a gzip header has otherwise.
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as inner:
        yield inner


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
