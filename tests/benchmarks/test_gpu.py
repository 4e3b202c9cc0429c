"""The GPU check: its rehearsal, its deadlines, its verdicts and the compiler's report. None of it needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.7")

from benchmarks.contest import OURS, Cell, Context
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import right, searches, tuned
from benchmarks.gpu.compiled import Compiled, Loop, instructions_per_score, loops, occupancy, table
from benchmarks.gpu.fast import CDIST, FLASH_KMEANS, FUSED, allowance, product_name
from benchmarks.gpu.parts import PARTS, chosen, run_cells
from benchmarks.gpu.report import MAX_BYTES, TARGETS, tables
from benchmarks.gpu.searches import Tiling
from benchmarks.problem import Size
from benchmarks.results import Store
from benchmarks.targets import judge
from benchmarks.timing import Limits

CPU = torch.device("cpu")
CONTEXT = Context(CPU, 1, "quick", Limits(budget=0.0, min_rounds=1, max_rounds=1, sample=0.0))


def store_at(path: Path) -> Store:
    return Store(path, device="cpu", grid="quick", stamp={"test": True}, command="test")


# The whole command


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one rehearsal."""
    folder = tmp_path_factory.mktemp("gpu")
    assert command.main(["--rehearse", "--out", str(folder)]) == 0
    return folder


def cells_of(folder: Path) -> dict[str, Any]:
    cells: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["cells"]
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_rehearsal_measures_every_cell(rehearsal: Path, part: str) -> None:
    """Toy sizes on the CPU, in Triton's interpreter: every check holds, and all that is ours is timed."""
    cells = cells_of(rehearsal)
    asked = [cell.key for cell in PARTS[part].cells(CONTEXT)]
    assert asked == sorted(set(asked), key=asked.index)
    for key in asked:
        assert key in cells, (rehearsal / "log.txt").read_text(encoding="utf-8")
        if part == "right":
            assert cells[key]["status"] == "ok", f"{key}: {cells[key]}"
            continue
        entries = cells[key]["contenders"]
        for name, entry in entries.items():
            absent = entry["status"] == "not installed" and not name.startswith(OURS)
            assert entry["status"] == "ok" or absent, f"{key}, {name}: {entry}"


@pytest.mark.slow
def test_rehearsal_leaves_few_small_files(rehearsal: Path) -> None:
    """One JSON of at most a megabyte, a log and the tables; with compiled.md no more than eight."""
    names = {path.name for path in rehearsal.iterdir()}
    assert names == {
        "results.json",
        "log.txt",
        "targets.md",
        "right.md",
        "fast.md",
        "tuned.md",
        "machine.md",
    }
    assert (rehearsal / "results.json").stat().st_size < MAX_BYTES // 4
    checks = len(PARTS["right"].cells(CONTEXT))
    verdict = (rehearsal / "targets.md").read_text(encoding="utf-8").splitlines()[0]
    assert verdict == f"{checks} of {checks} checks of results hold."


@pytest.mark.slow
def test_the_same_command_resumes(rehearsal: Path) -> None:
    """What is finished is not measured again, unless --fresh asks for it; what is skipped stays away."""
    before = cells_of(rehearsal)
    arguments = ["--rehearse", "--out", str(rehearsal), "--only", "right/ties,right/precision"]
    assert command.main(arguments) == 0
    assert cells_of(rehearsal) == before
    log = rehearsal / "log.txt"
    log.write_text("", encoding="utf-8")
    assert command.main([*arguments, "--fresh", "--skip", "right/precision"]) == 0
    assert "right/ties: ok" in log.read_text(encoding="utf-8")
    assert "right/precision" not in log.read_text(encoding="utf-8")
    assert cells_of(rehearsal).keys() == before.keys()


def test_a_part_is_ended_after_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while its process hangs; importing torch takes longer than the second it has."""
    monkeypatch.setattr(command, "_GRACE", 0.0)
    options = command._parser().parse_args(["--rehearse", "--out", str(tmp_path)])
    begin = time.time()
    assert command._run_process(options, "tuned", begin - 1, tmp_path) < 0
    assert time.time() - begin < 30
    assert "ended" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_log_says_where_a_hanging_process_was(tmp_path: Path) -> None:
    """By a traceback of its threads."""
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "import time\nprint('ready', flush=True)\ntime.sleep(60)"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,
        )
    while "ready" not in log.read_text(encoding="utf-8"):
        time.sleep(0.05)
    assert command._end(process) < 0
    assert "line 3 in <module>" in log.read_text(encoding="utf-8")


def test_it_all_fits_eight_minutes() -> None:
    """The parts with the time that the last one may take beyond its end."""
    assert sum(part.seconds for part in PARTS.values()) + command._GRACE < 8 * 60


def test_a_gpu_is_needed_but_for_the_rehearsal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One line that names the cure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "--rehearse needs none" in capsys.readouterr().err


def test_wheels_are_importable(tmp_path: Path) -> None:
    """Without pip, which a bare machine may lack."""
    with zipfile.ZipFile(tmp_path / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "")
    command._unpack(tmp_path, tmp_path / "site")
    assert (tmp_path / "site" / "peer" / "__init__.py").exists()


# Cell by cell


def _cell(key: str, calls: list[str], error: Exception | None = None) -> Cell:
    def run(context: Context) -> dict[str, Any]:
        calls.append(key)
        if error is not None:
            raise error
        return {"status": "ok"}

    return Cell(key, {}, run)


def test_each_cell_is_stored_and_a_failure_stops_nothing(tmp_path: Path) -> None:
    """A second run measures only what is left."""
    calls: list[str] = []
    store = store_at(tmp_path / "results.json")
    cells = [_cell("right/a", calls), _cell("right/b", calls, RuntimeError("no luck")), _cell("right/c", calls)]
    assert run_cells(store, cells[:2], CONTEXT, time.time() + 100, lambda line: None)
    assert store_at(store.path).cells["right/b"]["reason"] == "RuntimeError: no luck"
    assert run_cells(store_at(store.path), cells, CONTEXT, time.time() + 100, lambda line: None)
    assert calls == ["right/a", "right/b", "right/c"]


def test_no_cell_starts_after_the_deadline(tmp_path: Path) -> None:
    """It is left for the next call."""
    calls: list[str] = []
    lines: list[str] = []
    store = store_at(tmp_path / "results.json")
    assert run_cells(store, [_cell("right/a", calls)], CONTEXT, time.time() - 1, lines.append)
    assert not calls
    assert not store.cells
    assert lines == ["right/a: no time left"]


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        ([], [], True),
        (["right"], [], True),
        (["right/search"], [], False),
        (["right/ties"], ["fast"], True),
        (["fast"], [], False),
        ([], ["right"], False),
        ([], ["right/ties"], False),
        ([], ["right/tie"], False),
    ],
)
def test_cells_are_chosen_by_their_beginnings(only: list[str], skip: list[str], expected: bool) -> None:
    """Of a part, or of a key."""
    assert chosen("right/ties", only, skip) is expected


# Verdicts


def test_a_wrong_index_is_found() -> None:
    """Against float64; the right indices pass, far from zero as well."""
    codebook, latents = torch.randn(40, 8) + 1000, torch.randn(300, 8) + 1000
    indices = searches.tiled(latents, codebook)
    assert right.search_errors(indices, latents, codebook)[1] < searches.TOLERANCES["float32"]
    indices[7] = (indices[7] + 1) % 40
    differing, worst = right.search_errors(indices, latents, codebook)
    assert differing == 1
    assert worst > searches.TOLERANCES["bf16"]


def test_a_check_that_does_not_hold_says_so() -> None:
    """Negative control: a quantizer whose results are others."""
    quantizer = right._build("vq")
    latents = right._latents(quantizer, torch.float32)
    here, there = (right._step(quantizer, CPU, latents) for _ in range(2))
    right._compare("vq", here, there, torch.float32)
    there["loss"] = there["loss"] * 1.01
    with pytest.raises(right.CheckError, match="loss is off by"):
        right._compare("vq", here, there, torch.float32)

    def broken(context: Context) -> dict[str, Any]:
        raise right.CheckError("it does not hold")

    assert right._cell("x", {}, broken).run(CONTEXT) == {"status": "wrong", "reason": "it does not hold"}


def contest(size: Size, **milliseconds: float) -> dict[str, Any]:
    names = {
        "fused": FUSED,
        "tf32": f"{FUSED} (TF32)",
        "product": product_name("float32"),
        "cdist": CDIST,
        "flash": FLASH_KMEANS,
    }
    entries = {
        names[name]: {"status": "ok", "median": time, "low": time, "high": time}
        for name, time in milliseconds.items()
    }
    return {"settings": size._asdict(), "contenders": entries, "facts": {}}


def test_targets_are_judged() -> None:
    """Only where C is at least 64 for the product; missed by cdist at one size, met against flash-kmeans."""
    cells = {
        "fast/search-a": contest(Size(1, 1, 8), fused=1.0, product=0.1, cdist=2.9),
        "fast/search-b": contest(Size(1, 1, 64), fused=1.2, product=1.0, cdist=12.0, tf32=0.9, flash=1.0),
        "fast/search-c": {"settings": Size(1, 1, 64)._asdict(), "status": "failed", "reason": "none"},
    }
    verdicts = {target.text: judge(target, cells) for target in TARGETS}
    product, _, _, _, cdist, flash, memory = verdicts.values()
    assert (product.points, product.worst, product.met) == (1, 1.2, True)
    assert (cdist.points, cdist.worst, cdist.failing, cdist.met) == (2, 2.9, 1, False)
    assert (flash.worst, flash.met) == (0.9, True)
    assert memory.met is None


def test_n_times_k_scores_are_found_in_the_memory() -> None:
    """Where N x K scores would be twice of what is allowed; smaller sizes cannot tell."""
    size = Size(262144, 8192, 8)
    cells = {
        "fast/search-a": {"settings": size._asdict(), "facts": {f"bytes of {FUSED}": 4 * size.N * size.K}},
        "fast/eval-a": {"settings": size._asdict(), "facts": {f"bytes of {OURS}": allowance(size) // 2}},
        "fast/ema-b": {"settings": Size(64, 64, 8)._asdict(), "facts": {f"bytes of {OURS}": 1 << 40}},
    }
    verdict = judge(TARGETS[-1], cells)
    assert (verdict.points, verdict.failing, verdict.met) == (2, 1, False)
    assert verdict.where == f"search-a ({FUSED})"


def test_broken_and_missing_checks_are_named() -> None:
    """One that was not run counts against the verdict as much."""
    asked = [cell.key for cell in right.cells(CONTEXT)]
    cells = {key: {"settings": {}, "status": "ok", "facts": {}} for key in asked if key != "right/operator"}
    cells["right/ties"] = {"settings": {}, "status": "wrong", "reason": "the last one wins"}
    text = tables({"grid": "quick", "cells": cells, "runs": {}})["targets"].splitlines()[0]
    count = len(asked)
    expected = f"{count - 2} of {count} checks of results hold. **Broken:** ties. **Not run:** operator."
    assert text == expected


def test_nothing_measured_says_so() -> None:
    """In every table and for every target."""
    texts = tables({"cells": {}, "runs": {}})
    assert texts["targets"].count("not measured") == len(TARGETS) + 1
    assert all(texts[name] == "Not measured.\n" for name in ("right", "fast", "tuned"))


def test_committed_tables_follow_from_the_committed_results() -> None:
    """Before a GPU was at hand they say that nothing was measured."""
    folder = Path(command.__file__).parents[1] / "results" / "gpu"
    results = folder / "results.json"
    document = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"cells": {}, "runs": {}}
    for name in ("targets",) if not results.exists() else tables(document):
        assert (folder / f"{name}.md").read_text(encoding="utf-8") == tables(document)[name]


# The kernel's tilings


@pytest.mark.parametrize("tiling", [t for t in tuned.TILINGS if t.precision != "bf16"], ids=tuned.label)
def test_every_tiling_finds_the_nearest(tiling: Tiling) -> None:
    """In the interpreter, which multiplies in float32 whatever the precision; short and long codes."""
    for size in (9, 70):
        latents, codebook = torch.randn(40, size), torch.randn(150, size)
        indices = searches.fused_with(tiling)(latents, codebook)
        assert right.search_errors(indices, latents, codebook) == (0, 0.0)


def test_tilings_differ() -> None:
    """No tiling is tried twice."""
    assert len({tuned.label(tiling) for tiling in tuned.TILINGS}) == len(tuned.TILINGS)


# The compiler's report

CODE = """
        /*0000*/                   FADD R1, R2, R3 ;
.L_x_0:
        /*0010*/                   LDS R1, [R2] ;
.L_x_1:
        /*0020*/                   FFMA R1, R2, R3, R4 ;
        /*0030*/              @!P0 FFMA.FTZ R1, R2, R3, R4 ;
        /*0040*/                   LDS R1, [R2] ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   FMNMX R1, R2, R3, PT ;
        /*0070*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   EXIT ;
        /*0090*/                   BRA `(.L_x_2) ;
"""


def compiled(**changes: Any) -> Compiled:
    tiling = Tiling("ieee", 128, 128, 16, 8, 3)
    values = Compiled(90, tiling, 64, 255, 0, 40_000, False, (Loop(100, 60), Loop(500, 120)))
    return values._replace(**changes)


def test_loops_of_machine_code() -> None:
    """Both that multiply, the inner one first; the idle loop at the end is none."""
    assert loops(CODE) == [Loop(4, 2), Loop(7, 2)]


def test_instructions_per_score() -> None:
    """By hand: 4 rounds over 16 channels, the first of which the outer loop counts; 64 scores per thread."""
    assert instructions_per_score(compiled(), 64) == (500 + 3 * 100) / 64
    assert instructions_per_score(compiled(), 256) == (500 + 15 * 100) / 64
    assert instructions_per_score(compiled(), 16) is None
    kept = compiled(size=8, loops=(Loop(640, 512),))
    assert instructions_per_score(kept, 8) == 10
    assert instructions_per_score(kept, 64) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1),  # 255 registers are 256 for each of 8 warps: all of the 65,536
        ({"registers": 128}, 2),
        ({"registers": 32, "shared": 100_000}, 2),
        ({"registers": 32, "shared": 100_000, "capability": 80}, 1),
        ({"registers": 32, "shared": 0}, 8),  # of 64 warps
    ],
)
def test_occupancy(changes: dict[str, Any], expected: int) -> None:
    """By registers, by shared memory, by warps."""
    assert occupancy(compiled(**changes)) == expected


def test_report_has_a_row_per_tiling() -> None:
    """With a dash where the kernel was compiled for other sizes."""
    text = table([compiled()])
    assert "| 90 | ieee | 128 x 128 x 16 | 8 | 3 | 64 | 255 | 0 | 39.1 | 1 | – | 12.5 | 31.2 |" in text


def compile_defaults(*requests: str) -> list[dict[str, Any]]:
    """Compile in a fresh process: here kernels are for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.compiled", "--json", *requests],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(command.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "requests",
    [
        ("ieee,64", "tf32,64"),
        pytest.param(("ieee,8", "tf32,8", "tf32,256", "bf16,8", "bf16,64", "bf16,256"), marks=pytest.mark.long),
    ],
    ids=["defaults", "others"],
)
def test_kernel_compiles_for_gpus(requests: tuple[str, ...]) -> None:
    """To machine code, without a GPU; nothing spills, and every GPU has the shared memory that it needs."""
    kernels = compile_defaults(*requests)
    assert [kernel["capability"] for kernel in kernels] == [80] * len(requests) + [90] * len(requests)
    for kernel in kernels:
        assert kernel["tensor_cores"] == (kernel["tiling"]["precision"] != "ieee")
        assert kernel["registers"] <= 255
        assert kernel["spilled"] <= 32
        # 99 KiB are what a program may have on the smallest of the architecture.
        assert kernel["shared"] <= 99 * 1024
        assert kernel["loops"]
