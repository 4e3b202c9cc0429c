"""The plan of a preset as jobs, each after what it needs, and the order in which processes run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.te_vqgan.__main__ import _parse
from examples.te_vqgan.classifier.trainer import CLASSIFIERS
from examples.te_vqgan.cli import run as run_command
from examples.te_vqgan.cli.options import out_folder, stage1_settings
from examples.te_vqgan.cli.plans import PLANS, Plan
from examples.te_vqgan.cli.run import other_data_folder, plan_jobs, run_plan
from examples.te_vqgan.reports import report
from examples.te_vqgan.reports.results import run_folder
from examples.te_vqgan.runs import pipeline
from examples.te_vqgan.runs.pipeline import Job, JobFailed, run_jobs
from examples.te_vqgan.stage1.presets import ARMS, DEFAULT_ARMS, to_dict
from examples.te_vqgan.stage2.settings import STAGE2, stage2_settings_for
from examples.te_vqgan.stage2.train import plain_settings
from tests.helpers import numpy_generator


def _options(out: Path, *words: str, preset: str = "small") -> argparse.Namespace:
    return _parse(["run", "--preset", preset, "--out", str(out), *words])


def _jobs(out: Path, *words: str, preset: str = "small") -> list[Job]:
    return list(plan_jobs(_options(out, *words, preset=preset)))


def _read(job: Job) -> argparse.Namespace:
    """The options of a job's process, which therefore knows all its words."""
    return _options_of(*job.arguments)


@functools.cache
def _options_of(*words: str) -> argparse.Namespace:
    return _parse([*words, "--parent", "1"])


def _commands(jobs: Sequence[Job]) -> Counter[str]:
    return Counter(job.arguments[0] for job in jobs)


@pytest.mark.parametrize("preset", sorted(PLANS.keys() - {"photos"}))
def test_every_job_comes_after_what_it_needs(preset: str, tmp_path: Path) -> None:
    """The classifier and the tokenizer before what reads with them, the GPT before its measurement."""
    jobs = _jobs(tmp_path, preset=preset)
    assert len({job.name for job in jobs}) == len(jobs)
    before: dict[str, Job] = {}
    for job in jobs:
        assert set(job.after) <= before.keys()
        command = job.arguments[0]
        needed = {before[name].arguments[0] for name in job.after}
        if command in ("classifier", "stage1"):
            assert needed == set()
        if command == "stage2":
            assert needed == {"stage1"}
            assert [before[name].folder for name in job.after] == [job.folder.parent]
        if command == "evaluate":
            alone = _read(job).tokenizer_alone
            assert needed == {"classifier", "stage1" if alone else "stage2"}
            assert before[job.after[0]].folder == job.folder
            assert (
                before[job.after[1]].folder == (job.folder if alone else job.folder.parent).parent / "classifier"
            )
        before[job.name] = job


def test_the_paper_is_all_arms_and_seeds_both_sizes_and_both_data_sets(tmp_path: Path) -> None:
    """Counted: what is trained, what only as a tokenizer, and what on the other digits."""
    for preset in ("small", "paper"):
        plan = PLANS[preset]
        jobs = _jobs(tmp_path / preset, preset=preset)
        others = (*PLANS["small-alive"].arms, *PLANS["small-best"].arms)
        assert plan.arms == tuple(arm for arm in ARMS if arm not in others)
        assert plan.smaller_images is not None
        seeds, base = len(plan.seeds), STAGE2[preset]
        assert seeds == 3
        assert base is not None
        assert plan.smaller_images == pytest.approx(base.train_images / 3, rel=1e-3)
        stage2 = (len(plan.arms) - 1 + 2) * seeds
        assert _commands(jobs) == {
            "classifier": 2,
            "stage1": (len(plan.arms) + 2) * seeds,
            "stage2": stage2,
            "evaluate": stage2 + seeds + 2 * seeds,
        }
        other = other_data_folder(tmp_path / preset, "fashion-mnist")
        there = [job for job in jobs if job.folder.is_relative_to(other)]
        assert _commands(there) == {"classifier": 1, "stage1": 2 * seeds, "evaluate": 2 * seeds}
        assert all(_read(job).data == "fashion-mnist" for job in there)
        assert all(_read(job).data == "mnist" for job in jobs if job not in there)
        alone = {
            _read(job).arm for job in jobs if job not in there and getattr(_read(job), "tokenizer_alone", False)
        }
        assert alone == {"integer_exact"}
        smaller = {_read(job).arm for job in jobs if job.folder.name == f"stage2-{plan.smaller_images}"}
        assert smaller == set(DEFAULT_ARMS)


@pytest.mark.parametrize("preset", ["smoke", "quick", "small"])
def test_what_a_job_trains_is_what_the_plan_asks_for(preset: str, tmp_path: Path) -> None:
    """Its words, read back, name the folder that the plan looks into, and the settings that it compares."""
    words = ["--steps", "7", "--seeds", "3", "4", "--no-bf16"]
    words += [] if STAGE2[preset] is None else ["--stage2-steps", "1005"]
    options = _options(tmp_path, *words, preset=preset)
    for job in plan_jobs(options):
        read = _read(job)
        command = job.arguments[0]
        if command == "stage1":
            expected = dataclasses.replace(stage1_settings(options, read.arm), data=read.data, seed=read.seed)
            assert stage1_settings(read, read.arm) == expected
            assert expected.steps == job.steps == 7
            assert not expected.bf16
            assert run_folder(out_folder(read), read.arm, expected.seed) == job.folder
            assert read.seed in (3, 4)
        if command == "stage2":
            assert read.steps == job.steps == 1005
            assert read.bf16 is False
            assert job.folder == run_folder(out_folder(read), read.arm, read.seed) / f"stage2-{read.train_images}"
        if command == "evaluate" and not read.tokenizer_alone:
            assert read.stage2_steps == 1005
            assert read.bf16 is False
            assert job.folder == run_folder(out_folder(read), read.arm, read.seed) / f"stage2-{read.train_images}"
        if command != "evaluate":
            assert read.resume
    # The presets have something to lose: without the words the steps are others.
    assert all(job.steps != 7 for job in _jobs(tmp_path, preset=preset) if job.arguments[0] == "stage1")


def _finish(options: argparse.Namespace, job: Job) -> None:
    """Leave behind what says that the job is done."""
    read = _read(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.arguments[0] == "evaluate":
        for name in ("reading",) if read.tokenizer_alone else [f"rule-{rule}" for rule in read.rules]:
            (job.folder / f"{name}.json").write_text("{}")
        return
    if job.arguments[0] != "classifier":
        first = dataclasses.replace(stage1_settings(options, read.arm), data=read.data, seed=read.seed)
        plain = to_dict(first)
        if job.arguments[0] == "stage2":
            changes = {"seed": read.seed, "steps": read.steps, "train_images": read.train_images}
            plain = plain_settings(stage2_settings_for(read.preset, changes), first)
        (job.folder / "settings.json").write_text(json.dumps(plain))
    (job.folder / "evaluation.json").write_text("{}")


@pytest.mark.parametrize("preset", ["smoke", "small"])
def test_what_is_done_is_skipped(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random part of the jobs is done: the others are left, in the same order; they need nothing else."""
    options = _options(tmp_path, preset=preset)
    jobs = list(plan_jobs(options))
    rng = numpy_generator()
    done = [job for job in jobs if rng.random() < 0.5]
    for job in done:
        _finish(options, job)
    capsys.readouterr()
    left = list(plan_jobs(options))
    assert left == [job for job in jobs if job not in done]
    trained = [job for job in done if job.arguments[0] in ("stage1", "stage2")]
    assert capsys.readouterr().out.count("was finished before, skipped.") == len(trained)
    for job in left:
        _finish(options, job)
    assert list(plan_jobs(options)) == []


def test_a_distance_that_was_not_measured_is_left_to_do(tmp_path: Path) -> None:
    """Where the loss has one: the evaluations alone are left, until the readings have it."""
    options = _options(tmp_path, "--arms", "vqgan", "integer_exact", "--perceptual", "st-lpips", preset="smoke")
    for job in list(plan_jobs(options)):
        _finish(options, job)
    for distances, left in (({}, 2), ({"lpips": 0.5}, 2), ({"st-lpips": 0.5}, 0)):
        for arm in ("vqgan", "integer_exact"):
            reading = json.dumps({"perceptual_distances": distances})
            (run_folder(tmp_path, arm, 0) / "reading.json").write_text(reading)
        assert [job.arguments[0] for job in plan_jobs(options)] == ["evaluate"] * left


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    """Rather than skipped or overwritten, be it of Stage 1 or Stage 2."""
    options = _options(tmp_path, "--arms", "vqgan", preset="smoke")
    for command, changed in (("stage1", "--steps"), ("stage2", "--stage2-steps")):
        job = next(job for job in plan_jobs(options) if job.arguments[0] == command)
        _finish(options, job)
        with pytest.raises(
            ValueError, match=r"settings must be those of the run in .*, got others: steps was 6, now 7"
        ):
            _jobs(tmp_path, "--arms", "vqgan", changed, "7", preset="smoke")
    assert [job.arguments[0] for job in plan_jobs(options)] == ["classifier", "evaluate"]


def test_named_arms_and_seeds_are_all_that_is_done(tmp_path: Path) -> None:
    """Without the smaller training set and the other digits; integer_exact as a tokenizer alone."""
    jobs = _jobs(tmp_path, "--arms", "te_vqgan", "integer_exact", "--seed", "5")
    assert _commands(jobs) == {"classifier": 1, "stage1": 2, "stage2": 1, "evaluate": 2}
    assert {job.folder.relative_to(tmp_path).parts[0] for job in jobs} == {
        "classifier",
        "te_vqgan-seed5",
        "integer_exact-seed5",
    }
    jobs = _jobs(tmp_path, "--seeds", "8", "9", preset="smoke")
    assert _commands(jobs) == {"classifier": 1, "stage1": 4, "stage2": 8, "evaluate": 8}
    with pytest.raises(ValueError, match="seed must be None with --seeds, got 5"):
        _jobs(tmp_path, "--seed", "5", "--seeds", "8")
    # The demo has no Stage 2, so nobody reads anything.
    assert _commands(_jobs(tmp_path, preset="quick")) == {"stage1": 2}
    # On the plan's other digits there is no third data set.
    jobs = _jobs(tmp_path, "--data", "fashion-mnist")
    assert {_read(job).data for job in jobs} == {"fashion-mnist"}
    assert _commands(jobs)["classifier"] == 1


@pytest.mark.parametrize(
    ("words", "workers", "threads"),
    [
        (["--threads", "8"], 2, 4),
        (["--threads", "8", "--workers", "3"], 3, 2),
        (["--threads", "1", "--workers", "3"], 3, 1),
        (["--threads", "8", "--seeds", "0", "1", "2"], 6, 1),
        (["--threads", "8", "--arms", "vqgan"], 1, 8),
        # The memory of a GPU is that of one training.
        (["--threads", "8", "--device", "cuda"], 1, 8),
        (["--threads", "8", "--device", "cuda:1", "--workers", "2"], 2, 4),
        (["--threads", "8", "--device", "cpu:0"], 2, 4),
    ],
)
def test_trainings_share_the_cores(
    words: list[str], workers: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many processes as asked for, else as there are runs; every job is told its part."""
    called: dict[str, Any] = {}

    def jobs_run(jobs: Sequence[Job], **options: int) -> None:
        called.update(options, jobs=jobs)

    def written(out: Path, *, command: str, wall_seconds: float | None) -> Path:
        called.update(out=out, command=command, wall_seconds=wall_seconds)
        return out

    monkeypatch.setattr(run_command, "run_jobs", jobs_run)
    monkeypatch.setattr(run_command, "announce", lambda folder: called.update(announced=folder))
    monkeypatch.setattr(report, "write_report", written)
    options = _options(tmp_path, *words, preset="smoke")
    run_plan(options, perform=lambda words: None)
    assert (called["workers"], called["threads"]) == (workers, threads)
    assert all(_read(job).threads == threads for job in called["jobs"])
    assert called["wall_seconds"] >= 0
    assert called["announced"] == called["out"] == tmp_path
    assert called["command"].startswith(f"python -m examples.te_vqgan run --preset smoke --out {tmp_path}")
    for job in called.pop("jobs"):
        _finish(options, job)
    called.clear()
    run_plan(options, perform=lambda words: None)
    assert "workers" not in called
    assert called["wall_seconds"] is None
    # What is left after an interruption does not take the time of everything.
    (tmp_path / "classifier" / "evaluation.json").unlink()
    run_plan(options, perform=lambda words: None)
    assert len(called["jobs"]) == 1
    assert called["wall_seconds"] is None


def test_a_classifier_of_other_digits_is_refused(tmp_path: Path) -> None:
    """Also an unfinished one, and before anything is trained; another network of the same digits may be there."""
    options = _options(tmp_path, "--arms", "vqgan", preset="small")
    (tmp_path / "classifier").mkdir()

    def begin(**changes: Any) -> None:
        settings = dataclasses.replace(CLASSIFIERS["small-strided"], **{"data": "mnist", **changes})
        (tmp_path / "classifier" / "settings.json").write_text(json.dumps(settings.to_dict()))

    for changes, found in (({"data": "digits"}, "'digits' on 32"), ({"canvas_size": 64}, "'mnist' on 64")):
        begin(**changes)
        message = (
            f"classifier must be one of 'mnist' on 32 pixels, got one of {found} in {tmp_path / 'classifier'}; "
        )
        with pytest.raises(ValueError, match=re.escape(message) + "remove that folder, or choose another one"):
            list(plan_jobs(options))
    begin()
    assert _commands(list(plan_jobs(options)))["classifier"] == 1
    (tmp_path / "classifier" / "evaluation.json").write_text("{}")
    assert "classifier" not in _commands(list(plan_jobs(options)))


def test_the_other_data_set_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after hours of training on the first; a plan of named arms needs none."""
    monkeypatch.setattr(run_command, "run_jobs", lambda jobs, **options: pytest.fail("trained"))
    options = _options(tmp_path, "--data-dir", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="data_dir must hold the files of 'fashion-mnist'"):
        run_plan(options, perform=lambda words: None)
    options.arms = ["vqgan"]
    with pytest.raises(pytest.fail.Exception, match="trained"):
        run_plan(options, perform=lambda words: None)


def test_the_narrow_plan_is_three_arms_and_two_seeds(tmp_path: Path) -> None:
    """Both stages of each, and nothing else."""
    assert _commands(_jobs(tmp_path, preset="narrow")) == {
        "classifier": 1,
        "stage1": 6,
        "stage2": 6,
        "evaluate": 6,
    }


def test_plans_name_arms_that_exist() -> None:
    """And every preset has one."""
    assert PLANS.keys() == STAGE2.keys()
    for plan in (Plan(), *PLANS.values()):
        for arms in (plan.arms, plan.without_stage2, plan.smaller_arms, plan.other_arms):
            assert set(arms) <= ARMS.keys()
        assert len(set(plan.arms)) == len(plan.arms)


class _World:
    """Stands for the processes: each ends after some looks at it, or with an error."""

    def __init__(self, looks: dict[str, int], workers: int, failing: str | None = None) -> None:
        self.looks, self.workers, self.failing = looks, workers, failing
        self.started: list[str] = []
        self.ended: list[str] = []
        self.running: set[str] = set()
        self.stopped: list[str] = []

    def start(self, job: Job, number: int, threads: int) -> Any:
        """What ``_Process`` does."""
        assert set(job.after) & self.looks.keys() <= set(self.ended), f"{job.name} was too early"
        self.started.append(job.name)
        self.running.add(job.name)
        assert len(self.running) <= self.workers
        left = self.looks[job.name]

        def poll() -> bool:
            nonlocal left
            left -= 1
            if left > 0:
                return False
            if job.name == self.failing:
                raise JobFailed(f"{job.name} ended with code 1.")
            self.running.remove(job.name)
            self.ended.append(job.name)
            return True

        return SimpleNamespace(job=job, poll=poll, stop=lambda: self.stopped.append(job.name))


def _stub(patched: pytest.MonkeyPatch, world: _World) -> None:
    patched.setattr(pipeline, "_Process", world.start)
    patched.setattr(pipeline, "_POLL_SECONDS", 0.0)


def _job(name: str, *after: str) -> Job:
    return Job(name, ["stage1"], Path("unused"), 1, after)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_jobs_run_once_and_after_what_they_need(data: st.DataObject) -> None:
    """Any acyclic needs in any order of the list, any speed, any number of workers; nobody waits without need."""
    count = data.draw(st.integers(1, 8))
    names = [f"job{number}" for number in range(count)]
    jobs = [
        _job(name, "done before", *data.draw(st.lists(st.sampled_from(names[:number]), unique=True)))
        if number
        else _job(name)
        for number, name in enumerate(names)
    ]
    workers = data.draw(st.integers(1, 3))
    world = _World({name: data.draw(st.integers(1, 4)) for name in names}, workers)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patched:
        _stub(patched, world)
        run_jobs(data.draw(st.permutations(jobs)), workers=workers, threads=1)
    assert sorted(world.ended) == sorted(world.started) == names
    assert world.stopped == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_job_that_waits_lets_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list's order otherwise: a worker is idle only if nothing can start."""
    world = _World({"slow": 9, "needs slow": 1, "first": 1, "second": 1}, 2)
    _stub(monkeypatch, world)
    jobs = [_job("slow"), _job("needs slow", "slow"), _job("first"), _job("second")]
    run_jobs(jobs, workers=2, threads=1)
    assert world.started == ["slow", "first", "second", "needs slow"]
    assert world.ended == ["first", "second", "slow", "needs slow"]


@pytest.mark.parametrize(
    ("jobs", "circle"),
    [([_job("a", "b"), _job("b", "a")], "a, b"), ([_job("a", "a", "b"), _job("b")], "a")],
    ids=["two", "itself"],
)
def test_circles_are_refused(monkeypatch: pytest.MonkeyPatch, jobs: list[Job], circle: str) -> None:
    """By name, and what stands outside of them is done first; a job that needs itself is the smallest circle."""
    world = _World({"a": 1, "b": 1, "free": 2}, 2)
    _stub(monkeypatch, world)
    with pytest.raises(ValueError, match=rf"jobs must be without a circle of dependencies, got {circle}\."):
        run_jobs([*jobs, _job("free")], workers=2, threads=1)
    assert "free" in world.ended
    assert "a" not in world.started


def test_a_failure_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked to write their checkpoints; what comes after does not start."""
    world = _World({"bad": 2, "other": 9, "next": 1}, 2, failing="bad")
    _stub(monkeypatch, world)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(JobFailed, match="bad ended with code 1"):
        run_jobs([_job("bad"), _job("other"), _job("next", "bad")], workers=2, threads=1)
    assert "other" in world.stopped
    assert world.started == ["bad", "other"]
    assert signal.getsignal(signal.SIGTERM) == handler
