"""Several processes train one model: real groups of two, started by torchrun, against one on the same batches.

Equality is up to rounding: a mean of two halves' means is another sum than the mean of the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.te_vqgan import __main__ as command_line
from examples.te_vqgan.cli import run as run_command
from examples.te_vqgan.data.sources import load_digits
from examples.te_vqgan.reports.results import run_folder
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checkpoint import load_checkpoint
from examples.te_vqgan.runs.pipeline import STOPPED
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.runs.running import CHECKPOINT
from examples.te_vqgan.stage1.presets import settings_for
from examples.te_vqgan.stage1.train import Interrupted, train_stage1
from examples.te_vqgan.stage2.settings import stage2_settings_for
from examples.te_vqgan.stage2.train import stage2_folder, train_stage2
from tests.distributed import worker
from tests.helpers import numpy_generator

ROOT = Path(__file__).parents[2]
ARM = "te_vqgan"
SETTINGS = settings_for("smoke", ARM)
ONE = Execution(threads=1)


def _torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Two processes of one thread each, and what they print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, *words], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )


def _worker(*words: str) -> subprocess.CompletedProcess[str]:
    return _torchrun(str(ROOT / "tests" / "distributed" / "worker.py"), *words)


def _log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _assert_same_log(first: Path, second: Path, relative: float) -> None:
    one, two = _log(first), _log(second)
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for line, other in zip(one, two, strict=True):
        for name, value in line.items():
            assert other[name] == pytest.approx(value, rel=relative, abs=1e-9), (line["step"], name)


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of any entry."""
    assert first.keys() == second.keys()
    return max((tensor.double() - second[name].double()).abs().max().item() for name, tensor in first.items())


def _identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes ended with, in float64."""
    folder = tmp_path_factory.mktemp("trainers")
    done = _worker("trainers", str(folder))
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """What one process ends with."""
    with worker.in_float64():
        found = {name: worker.train_stage1(name) for name in worker.STAGE1}
        return found | {name: worker.train_stage2(name) for name in worker.GPTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*worker.STAGE1, *worker.GPTS])
def test_two_processes_train_the_model_of_one(name: str, ranks: list[Any], one: dict[str, Any]) -> None:
    """Same bits on both ranks; weights, moments, codebook and logged numbers of one process on whole batches.

    In float64, where rounding cannot hide a wrong weight of any term: k-means, adaptive adversarial weight, moving
    averages, captions of different lengths.
    """
    state, numbers = one[name]
    for rank in ranks:
        # 1e-16 in a gradient that is zero but for rounding is divided by Adam's 1e-8.
        assert _distance(rank[name][0], state) < 1e-7
        for step, (found, expected) in enumerate(zip(rank[name][1], numbers, strict=True)):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-9), (step, key)
                assert found[key].is_floating_point() == value.is_floating_point()
    assert _identical(ranks[0][name][0], ranks[1][name][0])
    if name == "judged":
        assert "adversarial_loss" in numbers[1]
        # Far from the usual start, which is uniform up to 1 / K.
        assert state["start"].abs().max() > 3 / 16


def test_captions_of_the_two_processes_differ_in_length() -> None:
    """So the mean over all tokens is not the mean of the processes' means, and the test above can tell."""
    for step in range(worker.STEPS):
        text, _ = worker.pairs(step)
        counts = [(text[rank::2] != worker.PAD).sum().item() for rank in range(2)]
        assert counts[0] > 1.9 * counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ema", "stage2"])
def test_without_averaged_gradients_the_processes_part(name: str, ranks: list[Any], one: dict[str, Any]) -> None:
    """Negative control: each rank follows its own rows, and neither is where one process ends."""
    states = [rank[f"apart-{name}"][0] for rank in ranks]
    assert _distance(*states) > 1e-4
    for found in states:
        assert _distance(found, one[name][0]) > 1e-4


@pytest.mark.slow
def test_dropout_differs_by_process_and_resumes_bit_for_bit(ranks: list[Any]) -> None:
    """On equal rows the masks differ, without dropout nothing does; a written and read training goes on alike."""
    results = [rank["dropout"] for rank in ranks]
    assert results[0]["without"] == results[1]["without"]
    assert results[0]["with"] != results[1]["with"]
    for result in results:
        assert _identical(result["whole"], result["resumed"])
        assert _identical(result["whole"], results[0]["whole"])


@pytest.mark.slow
def test_nothing_outlives_the_group(ranks: list[Any]) -> None:
    """Threads that still serve it while the interpreter shuts down may abort the process after all is done."""
    assert [rank["group_is_gone"] for rank in ranks] == [True, True]


@pytest.mark.slow
def test_what_two_processes_tell_each_other(ranks: list[Any]) -> None:
    """Sums, means, wishes and the main process's word arrive everywhere; its failure too."""
    results = [rank["functions"] for rank in ranks]
    for rank, result in enumerate(results):
        assert (result["size"], result["rank"], result["main"]) == (2, rank, rank == 0)
        assert result["threads"] == 2
        assert result["share"].tolist() == [[0, 2, 4], [1, 3, 5]][rank]
        assert result["total"].tolist() == [2, 10]
        assert (result["mean"], result["count"]) == (2.0, 5)
        assert result["agree"] == [False, True, True, True]
        assert result["sent"] is (rank == 0)
        assert result["inside"] == [1, 0, True, 1]
        assert torch.equal(result["gradients"][0], torch.arange(6.0).reshape(3, 2).T * 1.5)
        assert torch.equal(result["gradients"][1], torch.full((4,), 15.0))
        assert result["untouched"]
        assert result["odd"] == "ValueError: batch_size must be a multiple of the 2 processes, got 5."
    assert results[0]["refused"] == "ValueError: refused in the main process"
    assert results[1]["refused"] == "MainFailed: The main process failed."


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of one process: Stage 1, and Stage 2 on it."""
    out = tmp_path_factory.mktemp("alone")
    source = load_digits("digits", None)
    train_stage1(SETTINGS, run_folder(out, ARM, 0), source, execution=ONE, progress=False)
    train_stage2(stage2_settings_for("smoke"), run_folder(out, ARM, 0), source, execution=ONE, progress=False)
    return out


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_any_number_goes_on(tmp_path: Path, alone: Path) -> None:
    """One process begins, two go on until one of them gets SIGTERM, one finishes: the run of one, up to rounding.

    The second process has no common folder with the first, and writes nothing.
    """
    source = load_digits("digits", None)
    out = tmp_path / "host0"
    folder = run_folder(out, ARM, 0)
    with pytest.raises(Interrupted, match="stopped at step"):
        train_stage1(SETTINGS, folder, source, execution=ONE, progress=False, stop=lambda done: done == 2)
    words = ["--preset", "smoke", "--arm", ARM, "--threads", "2"]
    stopped = _worker("stopped", str(tmp_path), "stage1", *words, "--resume")
    assert stopped.stderr.count("stopped at step 4 of 6; --resume goes on from there") == 1
    assert f"exitcode  : {STOPPED} " in stopped.stderr
    # The launcher's own.
    assert stopped.stderr.count("Traceback (most recent call last)") == 1
    tensors, facts = load_checkpoint(folder / CHECKPOINT)
    assert facts["step"] == 4
    seen = [torch.load(tmp_path / f"seen{rank}.pt", weights_only=True) for rank in range(2)]
    assert [step for step, _ in seen] == [4, 4]
    assert _identical(seen[0][1], seen[1][1])
    assert _identical({name: tensors[name] for name in seen[0][1]}, seen[0][1])
    assert not (tmp_path / "host1").exists()
    assert train_stage1(SETTINGS, folder, source, execution=ONE, resume=True, progress=False)
    # float32 has 7 digits; sums of some thousand terms and six steps leave five of them.
    _assert_same_log(run_folder(alone, ARM, 0), folder, 1e-4)


@pytest.mark.long
def test_run_does_the_whole_plan_once(tmp_path: Path, alone: Path) -> None:
    """All steps in one group of processes, one report, the losses of one process, and nothing left to do."""
    words = ["run", "--preset", "smoke", "--arms", ARM, "--out", str(tmp_path), "--threads", "2"]
    done = _torchrun("-m", "examples.te_vqgan", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    assert done.stdout.count("classifier: finished.") == 1
    folder = run_folder(tmp_path, ARM, 0)
    second = stage2_folder(folder, stage2_settings_for("smoke"))
    for path, processes in ((folder, 2), (second, 2), (tmp_path / "classifier", 1)):
        facts = json.loads((path / "provenance.json").read_text())
        assert facts["processes"] == processes, path
        assert facts["threads"] == (1 if processes == 2 else 2)
        assert not (path / "console.txt").exists()
    for path in (folder / "reading.json", second / "rule-paper.json", tmp_path / "report" / "report.html"):
        assert path.is_file()
    _assert_same_log(run_folder(alone, ARM, 0), folder, 1e-4)
    # Stage 2 on the very tokens that the two processes had. Muon computes in bfloat16, which has three digits, and
    # these are the losses six small steps later.
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin, ignore=shutil.ignore_patterns("stage2-*"))
    source = load_digits("digits", None)
    train_stage2(stage2_settings_for("smoke"), twin, source, execution=ONE, progress=False)
    _assert_same_log(stage2_folder(twin, stage2_settings_for("smoke")), second, 2e-3)
    assert list(run_command.plan_jobs(_options(words))) == []


def _options(words: list[str]) -> argparse.Namespace:
    options: argparse.Namespace = command_line._parse(words)
    return options


# One process, or a pretended number of them.


def test_one_process_gets_back_what_it_gave() -> None:
    """Same objects and same bits, no other process asked, torch's generator left alone."""
    rows = torch.randn(7, 2)
    assert torch.equal(distributed.share(rows), rows)
    assert distributed.total(rows) is rows
    before = rows.clone()
    distributed.average([rows])
    parameter = nn.Parameter(torch.randn(3))
    parameter.grad = torch.randn(3)
    gradient = parameter.grad
    distributed.average_gradients([parameter])
    assert parameter.grad is gradient
    assert torch.equal(rows, before)
    numbers = {"loss": torch.randn(()), "codes": torch.tensor(3)}
    assert distributed.mean_of(numbers) == numbers
    assert [distributed.agree(wish) for wish in (False, True)] == [False, True]
    assert distributed.from_main(lambda: rows) is rows
    with pytest.raises(KeyError, match="own"):
        distributed.from_main(lambda: {}["own"])
    state = torch.get_rng_state()
    distributed.seed_step(0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (distributed.size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert (distributed.launched(), distributed.local_size()) == (False, 1)


def _pretend(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "size", lambda: size)
    monkeypatch.setattr(distributed, "launched", lambda: size > 1)


@given(size=st.integers(1, 9), each=st.integers(1, 9))
def test_shares_are_equal_parts_of_the_batch(size: int, each: int) -> None:
    """Every row belongs to one process, whether rows are numbers or pixels; a remainder is refused."""
    rows = numpy_generator().permutation(size * each)
    with pytest.MonkeyPatch.context() as monkeypatch:
        parts = []
        for rank in range(size):
            _pretend(monkeypatch, rank, size)
            parts.append(distributed.share(rows))
            assert torch.equal(distributed.share(torch.from_numpy(rows)), torch.from_numpy(parts[-1]))
            if size > 1:
                message = f"batch_size must be a multiple of the {size} processes, got {size * each + 1}."
                with pytest.raises(ValueError, match=message):
                    distributed.share(np.arange(size * each + 1))
    assert {len(part) for part in parts} == {each}
    assert sorted(np.concatenate(parts)) == sorted(rows)


def test_steps_are_seeded_by_seed_step_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination draws its own numbers, and the same ones again."""
    drawn = set()
    before = torch.get_rng_state()
    for seed, step, rank in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)] * 2:
        _pretend(monkeypatch, rank, 2)
        distributed.seed_step(seed, step)
        drawn.add(torch.rand(()).item())
    torch.set_rng_state(before)
    assert len(drawn) == 4


def test_a_launcher_of_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without one."""
    for value in (None, "1"):
        if value is not None:
            monkeypatch.setenv("WORLD_SIZE", value)
        distributed.start("cpu")
        assert not distributed.launched()
        distributed.stop()


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named without a number; more processes than GPUs are refused, before any of them waits for another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Execution("cuda:0").apply() == torch.device("cuda:0")
    assert Execution("cuda").apply() == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK must be below 1, the GPUs of the host, got 1"):
        distributed.start("cuda")
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: chosen.append(backend))
    distributed.start("cuda")
    distributed.start("cpu")
    assert chosen == [1, "cpu:gloo,cuda:nccl", "gloo"]
    _pretend(monkeypatch, 1, 2)
    assert Execution("cuda").apply() == torch.device("cuda:1")
    assert Execution("cpu").apply() == torch.device("cpu")
    with pytest.raises(
        ValueError, match="device must be cuda under a launcher, which numbers the GPUs, got cuda:0"
    ):
        Execution("cuda:0").apply()


@pytest.mark.parametrize(("threads", "each"), [(8, 2), (9, 2), (3, 1)])
def test_processes_of_a_host_share_its_threads(threads: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one each."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    given_threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given_threads.append)
    Execution(threads=threads).apply()
    _pretend(monkeypatch, 1, 4)
    Execution(threads=threads).apply()
    assert given_threads == [threads, each]


def test_run_takes_no_workers_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are the workers."""
    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(distributed, "size", lambda: 1)  # as where the plan is made
    options = _options(["run", "--preset", "smoke", "--out", str(tmp_path), "--workers", "2"])
    with pytest.raises(ValueError, match="workers must be unset under a launcher, got 2"):
        list(run_command.plan_jobs(options))
    options.workers = 0
    jobs = list(run_command.plan_jobs(argparse.Namespace(**{**vars(options), "threads": 6})))
    assert {job.arguments[list(job.arguments).index("--threads") + 1] for job in jobs} == {"6"}


def test_a_stopped_step_of_a_plan_stops_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does, since the same command goes on; later steps are not begun."""
    _pretend(monkeypatch, 0, 2)
    done: list[str] = []

    def perform(words: Any) -> None:
        done.append(words[0])
        if words[0] == "stage1":
            raise Interrupted("stopped")

    monkeypatch.setattr(distributed, "from_main", lambda compute: compute())
    jobs = [run_command.Job(name, [name], Path(), 1) for name in ("classifier", "stage1", "stage2")]
    monkeypatch.setattr(run_command, "plan_jobs", lambda _: jobs)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run_command.run_plan(_options(["run", "--preset", "smoke"]), perform=perform)
    assert done == ["classifier", "stage1"]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (distributed.MainFailed("failed"), (0, 0), ("", "")),
        (Interrupted("stopped"), (STOPPED, 0), ("stopped\n", "")),
        (ValueError("wrong"), (1, 1), ("error: wrong\n", "process 1: error: wrong\n")),
    ],
)
def test_the_main_process_speaks_for_all(
    error: Exception,
    status: tuple[int, int],
    told: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What stops all is told once and is one process's failure; what only another process knows, it tells."""

    def fail(options: argparse.Namespace) -> None:
        sys.stdout.write("out\n")
        raise error

    left: list[int] = []
    monkeypatch.setattr(command_line, "_stage1", fail)
    monkeypatch.setattr(distributed, "stop", lambda: left.append(distributed.rank()))
    for rank in range(2):
        _pretend(monkeypatch, rank, 2)
        assert command_line.main(["stage1", "--arm", ARM]) == status[rank]
        assert left[-1] == rank
        captured = capsys.readouterr()
        assert captured.err == told[rank]
        assert captured.out == ("out\n" if rank == 0 else "")
