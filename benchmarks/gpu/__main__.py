"""``python -m benchmarks.gpu``: is it right on a GPU, how fast is it, and which tiling of the kernel is best?

Each part runs in its own process, which is ended when its time is over. What was measured until then is on
disk, and the same command resumes from there.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.contest import Context
from benchmarks.gpu.parts import PARTS, chosen, run_cells
from benchmarks.gpu.report import MAX_BYTES, tables, write_tables
from benchmarks.results import Store, stamp
from benchmarks.timing import Limits

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[2]
_LIMITS = Limits(budget=0.5, min_rounds=3, max_rounds=15, sample=0.003, call=4.0)
_REHEARSAL = Limits(budget=0.0, min_rounds=1, max_rounds=1, sample=0.0)
# The last cell of a part may take so long beyond its deadline before the process is ended.
_GRACE = 15.0
# Then it may take so long to write where each of its threads is.
_TRACEBACK = 3.0
_UNUSABLE = 3
_THREADS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if not options.rehearse and not options.tables and not torch.cuda.is_available():
        print("error: a CUDA device must be there; --rehearse needs none.", file=sys.stderr)
        return 2
    if options.part is not None:
        return _run_part(options)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.tables:
        _run_parts(options)
    store = _store(options)
    write_tables(store.document, options.out)
    print(tables(store.document)["targets"])
    size = store.path.stat().st_size if store.path.exists() else 0
    if size > MAX_BYTES:
        print(f"error: results.json must be at most {MAX_BYTES:,} bytes, got {size:,}.", file=sys.stderr)
        return 1
    return 0


def _run_parts(options: argparse.Namespace) -> None:
    """Run the parts that were asked for, one after another; the time that one leaves goes to the next."""
    if options.fresh:
        store = _store(options)
        for key in list(store.cells):
            if chosen(key, options.only, options.skip):
                del store.cells[key]
        store.write()
    deadline = time.time()
    with tempfile.TemporaryDirectory() as site:
        _unpack(options.wheels, Path(site))
        for name, part in PARTS.items():
            if not chosen(name, [key.partition("/")[0] for key in options.only], options.skip):
                continue
            deadline += part.rehearsal_seconds if options.rehearse else part.seconds
            # A process that can no longer use the device is followed by another one.
            while _run_process(options, name, deadline, Path(site)) == _UNUSABLE and time.time() < deadline:
                pass
            try:
                write_tables(_store(options).document, options.out)
            except Exception:
                # Tables can be written again at any time; the time on the machine is for the next part.
                traceback.print_exc()


def _run_process(options: argparse.Namespace, part: str, deadline: float, site: Path) -> int:
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--deadline", str(deadline)]
    command += ["--out", str(options.out.resolve())]
    command += [f"--{name}={','.join(keys)}" for name in ("only", "skip") if (keys := getattr(options, name))]
    command += ["--rehearse"] if options.rehearse else []
    paths = [str(_ROOT / "src"), str(_ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # Deterministic products need it, and it must be set before the first of them.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if options.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with (options.out / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(1.0, deadline + _GRACE - time.time()))
        except subprocess.TimeoutExpired:
            log.write(f"{part}: ended {_GRACE:g} s after its deadline\n")
            status = _end(process)
        except BaseException:
            _end(process)
            raise
    print(f"{part}: exit status {status}")
    return status


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a process with all that it started, such as a compiler's workers; the log then shows where it was."""
    process.send_signal(signal.SIGABRT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_TRACEBACK)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _run_part(options: argparse.Namespace) -> int:
    """Run one part in this process."""
    device = torch.device("cpu" if options.rehearse else "cuda")
    torch.set_num_threads(1 if options.rehearse else _THREADS)
    store = _store(options)
    limits = _REHEARSAL if options.rehearse else _LIMITS
    context = Context(device, torch.get_num_threads(), _grid(options), limits, store.cells)
    cells = [cell for cell in PARTS[options.part].cells(context) if chosen(cell.key, options.only, options.skip)]

    def log(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    return 0 if run_cells(store, cells, context, options.deadline, log) else _UNUSABLE


def _store(options: argparse.Namespace) -> Store:
    device = "cpu" if options.rehearse else "cuda"
    facts = stamp(
        device=torch.device(device if device == "cpu" or torch.cuda.is_available() else "cpu"),
        grid=_grid(options),
        threads=1 if options.rehearse else _THREADS,
        budget=_LIMITS.budget,
    )
    path = options.out / "results.json"
    command = "python -m benchmarks.gpu" + (" --rehearse" if options.rehearse else "")
    return Store(path, device=device, grid=_grid(options), stamp=facts, command=command, fresh=options.fresh)


def _grid(options: argparse.Namespace) -> str:
    return "quick" if options.rehearse else "full"


def _unpack(wheels: Path, site: Path) -> None:
    """Make what the wheels hold importable from ``site``, without pip."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = f"parts ({', '.join(PARTS)}) or beginnings of cells, such as right/search"
    parser.add_argument("--only", type=_keys, default=[], metavar="KEY,...", help=f"run only these {names}")
    parser.add_argument("--skip", type=_keys, default=[], metavar="KEY,...", help="leave these out")
    parser.add_argument(
        "--out",
        type=Path,
        default=_ROOT / "benchmarks" / "results" / "gpu",
        help="folder of results.json, log.txt and tables (default: benchmarks/results/gpu)",
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=_ROOT / "wheels",
        help="folder of wheels that this machine lacks (default: wheels)",
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables again")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser


def _keys(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
