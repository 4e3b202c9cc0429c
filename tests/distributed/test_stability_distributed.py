"""Token stability of two processes over gloo: the counts of both, with the intervals of one process."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from te_quant import TokenStability, measure_stability
from te_quant.stability import Flip, Identity
from tests.unit.stability_cases import K, cell_images, decode, spoilt, tokens_of

WORLD, TIMEOUT = 2, 90.0
OPTIONS: dict[str, Any] = {"transforms": [Identity(), Flip()], "cycles": 2, "resamples": 20}
# Images of each process; the second has fewer.
SPLIT = (5, 2)


def work(rank: int, folder: str) -> None:
    """What one process does."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    images = torch.split(cell_images(tokens_of(sum(SPLIT))), SPLIT)[rank]
    metric, idle = TokenStability(K, **OPTIONS), TokenStability(K, **OPTIONS)
    metric.update(spoilt, decode, images)
    if rank == 1:
        idle.update(spoilt, decode, images)
    result: dict[str, Any] = {
        "total": metric.synchronized().compute(),
        "own": metric.compute(),
        "idle": idle.synchronized().compute(),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("stability")
    mp.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.slow
def test_both_processes_report_all_images(results: list[dict[str, Any]]) -> None:
    """As one process does that sees them in the same order, intervals included."""
    images = cell_images(tokens_of(sum(SPLIT)))
    expected = measure_stability(spoilt, decode, images, num_codes=K, **OPTIONS)
    parts = [
        measure_stability(spoilt, decode, part, num_codes=K, **OPTIONS) for part in torch.split(images, SPLIT)
    ]
    for result, part in zip(results, parts, strict=True):
        assert result["total"] == expected
        assert result["own"] == part
        assert result["total"] != result["own"]
        assert result["idle"] == parts[1]
