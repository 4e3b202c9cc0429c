"""How many threads every contender may use, whichever library it calls.

torch has its own setting. faiss, scikit-learn and scipy bring runtimes of their own, which threadpoolctl finds
when they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.contest import Unavailable, optional_module

__all__ = ["limited_module", "use_threads"]

_CONTROL = "threadpoolctl"


def limited_module(module: str, package: str) -> Any:
    """Import ``module``, whose number of threads :func:`use_threads` can set.

    Raises:
        Unavailable: ``package``, which brings it, is not there, or threadpoolctl is not.
    """
    optional_module(_CONTROL, _CONTROL)
    return optional_module(module, package)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch, and every other library that is loaded already, compute with ``count`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        control = optional_module(_CONTROL, _CONTROL)
    except Unavailable:
        # Then limited_module returns nothing either.
        control = None
    limits = control and control.threadpool_limits(count)
    try:
        yield
    finally:
        if limits:
            limits.restore_original_limits()
        torch.set_num_threads(before)
