"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already; with as many threads each they would mostly wait for one another. OpenMP
    # reads it when torch is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if not _has_gpu():
    # Triton reads it when it is first imported, which torch may do at any time: kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder that holds the folder ``mnist`` with the real IDX files; the test is skipped without it."""
    folder = os.environ.get("TE_QUANT_DATA")
    if not folder:
        pytest.skip("real MNIST is not here: set TE_QUANT_DATA to a folder with its IDX files")
    return Path(folder)
