"""Peak memory, each measurement in a fresh process.

On Linux the kernel keeps the high-water mark of a process's resident memory (``VmHWM``), and writing 5 to
``/proc/self/clear_refs`` lowers it to what is resident now. So: build everything, warm up on a tiny problem, lower
the mark, make one call, read it. Reported is by how much it rose, less what the call returned: what is needed
*beyond* input and output. A fresh process, because memory that an earlier contender has freed may still be
resident and would then be taken again for nothing. Where the mark cannot be lowered, ``ru_maxrss`` serves, which
is right as long as nothing before the call needed more. On CUDA the allocator counts.

``python -m benchmarks.memory JSON`` is such a process.

Shape letters: N latents, K codes, C code size.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Cell, Context, Unavailable
from benchmarks.peers import MODES, QUANTIZERS, build_quantizer, require_pairs
from benchmarks.problem import Problem, Size
from benchmarks.quantizers import quantizer_call
from benchmarks.search import build_search, searches
from benchmarks.sizes import MEMORY_SIZES
from benchmarks.timing import describe

__all__ = ["cells", "extra_peak", "measure_apart", "measure_here", "measure_in_process", "peak_of", "resident"]

_ROOT = Path(__file__).resolve().parents[1]
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
_TIMEOUT = 600
_WARM = (256, 64)


def extra_peak(call: Callable[[], Iterable[Tensor]], device: torch.device) -> dict[str, Any]:
    """Bytes at the peak of ``call`` beyond those before it and those of the tensors that it returns."""
    before, peak, method, results = peak_of(call, device)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in results}
    returned = sum(storages.values())
    return {"bytes": max(0, peak - before - returned), "returned": returned, "method": method}


def peak_of(call: Callable[[], Iterable[Tensor]], device: torch.device) -> tuple[int, int, str, list[Tensor]]:
    """Bytes in use before ``call`` and at its peak, how they were found, and what it returns."""
    before = resident(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        results = list(call())
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated", results
    method = _lower_mark()
    if method != "VmHWM":
        before = _maxrss()
    results = list(call())
    return before, _resident("VmHWM") if method == "VmHWM" else _maxrss(), method, results


def resident(device: torch.device) -> int:
    """Bytes in use, once what is free has been given back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    _trim()
    return _resident("VmRSS") if _STATUS.exists() else _maxrss()


def measure_here(name: str, mode: str, size: Size, device: torch.device) -> dict[str, Any]:
    """The entry of one contender, in this process.

    Args:
        name: of :func:`benchmarks.search.searches` for ``mode="search"``, else of
            :data:`benchmarks.peers.QUANTIZERS`.
        mode: ``search`` or one of :data:`benchmarks.peers.MODES`.
        size: N, K and C.
        device: where to compute.
    """
    try:
        warm = Size(min(_WARM[0], size.N), min(_WARM[1], size.K), size.C)
        list(_call(name, mode, Problem(warm, device))(0))
        problem = Problem(size, device)
        call = _call(name, mode, problem)
        # Made when first asked for; part of the input.
        _ = problem.codebook, problem.latents, problem.upstream
        return {"status": "ok", **extra_peak(lambda: call(0), device)}
    except Unavailable as absence:
        return {"status": absence.status, "reason": str(absence)}
    except Exception as error:
        return {"status": "failed", "reason": describe(error)}


def measure_apart(name: str, mode: str, size: Size, context: Context) -> dict[str, Any]:
    """As :func:`measure_here`, in a fresh process."""
    try:
        # Known without starting one.
        require_pairs(name, mode, size)
    except Unavailable as absence:
        return {"status": absence.status, "reason": str(absence)}
    return measure_in_process("benchmarks.memory", {"name": name, "mode": mode, "size": list(size)}, context)


def measure_in_process(
    module: str, request: Mapping[str, Any], context: Context, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``python -m MODULE JSON`` with ``request``, device and threads; return the JSON that it prints last.

    ``variables`` are set in its environment.
    """
    request = {**request, "device": str(context.device), "threads": context.threads}
    environment = {**os.environ, "OMP_NUM_THREADS": str(context.threads), **(variables or {})}
    command = [sys.executable, "-m", module, json.dumps(request)]
    try:
        result = subprocess.run(
            command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=True, timeout=_TIMEOUT
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        return {"status": "failed", "reason": f"the process ended with code {error.returncode}. " + "".join(last)}
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "reason": f"took more than {_TIMEOUT} s"}
    entry: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return entry


def cells(context: Context) -> list[Cell]:
    """One a mode and size."""
    return [
        Cell(
            f"memory/{mode}-{size.label}",
            {"mode": mode, **size._asdict()},
            partial(_run, mode=mode, size=size),
        )
        for size in MEMORY_SIZES[context.grid]
        for mode in ("search", *MODES)
    ]


def _run(context: Context, mode: str, size: Size) -> dict[str, Any]:
    names = searches(context.device) if mode == "search" else QUANTIZERS
    return {"contenders": {name: measure_apart(name, mode, size, context) for name in names}}


def _call(name: str, mode: str, problem: Problem) -> Callable[[int], list[Tensor]]:
    if mode != "search":
        return quantizer_call(build_quantizer(name, mode, problem), mode, problem)
    search = build_search(name, problem)
    return lambda number: [search(number)]


def _lower_mark() -> str:
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return "ru_maxrss"
    return "VmHWM"


def _resident(entry: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} must have a line {entry}, got none.")


def _maxrss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _trim() -> None:
    """Give back what the allocator holds free, or the call would use it without becoming larger."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        # Not glibc.
        return


def main() -> None:
    """Measure what the argument asks for and print its entry."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    size = Size(*request["size"])
    print(json.dumps(measure_here(request["name"], request["mode"], size, torch.device(request["device"]))))


if __name__ == "__main__":
    main()
