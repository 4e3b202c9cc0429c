"""Seeds for every test, and fixtures that several test files share."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already; with as many threads each they would mostly wait for one another. OpenMP
    # reads it when torch is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which torch may do at any time: kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

FAST = "not slow and not long"  # the -m of addopts in pyproject.toml


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--seed``."""
    parser.addoption(
        "--seed",
        type=int,
        metavar="N",
        help="seed every test and every shared fixture with N, not with a hash of its name",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Fix what Hypothesis draws, and run a test that is named by its id whatever its markers are."""
    seed = config.getoption("seed")
    # The same examples and verdict every time, also on a busy machine: no database of earlier failures, and
    # no limit that a clock sets. A given seed explores other examples.
    hypothesis.settings.register_profile(
        "fixed",
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("fixed")
    if seed is not None:
        hypothesis.core.global_force_seed = seed
    if config.option.markexpr == FAST and any("::" in argument for argument in config.args):
        config.option.markexpr = ""


def pytest_report_header(config: pytest.Config) -> str:
    """Say where the seeds come from."""
    seed = config.getoption("seed")
    return f"seed: {'a hash of the name of each test, or --seed N' if seed is None else seed}"


def _seed_of(name: str, config: pytest.Config) -> int:
    """The seed of the test or fixture ``name``: the same in every process, Python version and order of tests."""
    seed = config.getoption("seed")
    return zlib.crc32(name.encode()) if seed is None else int(seed)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - whatever draws from the global state must repeat too
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def seeded_by_name(request: pytest.FixtureRequest) -> None:
    """Seed ``random``, numpy and torch from the test's name or by ``--seed``."""
    _seed_all(_seed_of(request.node.nodeid, request.config))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed a fixture that tests share from its own name: which of them comes first must not change it."""
    if fixturedef.scope == "function":
        return (yield)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    _seed_all(_seed_of(f"{fixturedef.baseid}::{fixturedef.argname}[{request.param_index}]", request.config))
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Seed what a module draws when it is imported."""
    _seed_all(_seed_of(collector.nodeid, collector.config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Tell with a failure which seed it had."""
    report = yield
    if report.failed:
        report.sections.append(("seed", f"random, numpy and torch: {_seed_of(item.nodeid, item.config)}"))
    return report


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder that holds the folder ``mnist`` with the real IDX files; the test is skipped without it."""
    folder = os.environ.get("TE_QUANT_DATA")
    if not folder:
        pytest.skip("real MNIST is not here: set TE_QUANT_DATA to a folder with its IDX files")
    return Path(folder)
