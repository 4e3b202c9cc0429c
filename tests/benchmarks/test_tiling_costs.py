"""The benchmark of tiles: its measures on known cases, and where seams lie."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tiling
from te_quant import AutoencoderConfig, VQAutoencoder


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
