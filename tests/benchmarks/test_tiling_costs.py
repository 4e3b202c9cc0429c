"""The benchmark of tiles: its measures on known cases, and its published tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import tiling
from te_quant import AutoencoderConfig, VQAutoencoder

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "tiling"


def test_tables_are_those_of_the_measurements() -> None:
    """Written from the JSON file next to them."""
    document = json.loads((FOLDER / "tiling.json").read_text(encoding="utf-8"))
    assert tiling.table(document["cells"]) == (FOLDER / "tiling.md").read_text(encoding="utf-8")
    assert tiling.memory_table(document["memory"]) == (FOLDER / "memory.md").read_text(encoding="utf-8")


def test_published_tiles_are_exact_where_the_library_says_so() -> None:
    """Without layers that read the image, at the default overlap: every token; without overlap some differ."""
    cells = json.loads((FOLDER / "tiling.json").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        exact = cell["equal_near"] == cell["equal_far"] == 1.0 and cell["max_near"] < 1e-4
        if cell["model"] != tiling.LOCAL or cell["overlap"] == 0:
            assert not exact
        elif not cell["given"]:
            assert exact


@torch.no_grad()
def test_errors_lie_where_the_benchmark_looks_for_them() -> None:
    """Without overlap, tokens of a model that reads little differ at the seams only."""
    torch.manual_seed(0)
    local = {"norm": "channel", "attention": False, "encoder_padding": "zeros"}
    model = VQAutoencoder(AutoencoderConfig(base_channels=4, channel_multipliers=(1,), code_dim=4, **local)).eval()
    result = tiling.compare(model, torch.rand(1, 3, 100, 120) * 2 - 1, 60, 0, cut=False)
    assert result["equal_near"] < 1.0
    assert result["equal_far"] > 0.999
    assert result["max_near"] > 1e-3


@pytest.mark.parametrize(
    ("side", "size", "overlap", "expected"), [(8, 8, 4, []), (16, 8, 0, [8]), (13, 8, 2, [6])]
)
def test_seams_lie_in_the_middle_of_overlaps(side: int, size: int, overlap: int, expected: list[int]) -> None:
    """Between the starts that are spread evenly."""
    assert tiling.seams(side, size, overlap) == expected
