"""Read ``tests/golden``, and compare what was computed there with what is computed now."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
# A CPU of the kind that wrote the files gives the same bits; another one adds in another order.
EXACT = os.environ.get("TE_QUANT_GOLDEN_EXACT") == "1"
# The tolerance in units of the last place of a tensor's largest value: 6e-5 of that value in float32. Negative
# controls change a weight by 1e-2 of it.
_ROUNDING = 500


def golden_tensors(name: str, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a golden file whose names begin with ``prefix``, without it."""
    found = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def unpacked(name: str, folder: Path) -> Path:
    """Unpack a golden run folder into ``folder``."""
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether both have the same shape, dtype and values: integers exactly, floats up to rounding."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if EXACT or not expected.is_floating_point():
        return torch.equal(found, expected)
    finite = expected[expected.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = _ROUNDING * torch.finfo(expected.dtype).eps * size
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True)


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of the expected tensors that were not found, or not with the same values."""
    return [name for name, value in expected.items() if name not in found or not same(found[name], value)]


def differing_numbers(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Say where a JSON value differs; what ``found`` has in addition does not count."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, value in expected.items():
            yield from differing_numbers(found.get(name), value, f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for place, value in enumerate(expected):
            yield from differing_numbers(found[place], value, f"{where}[{place}]")
    elif isinstance(expected, float) and isinstance(found, float) and not EXACT:
        if found != pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True):
            yield f"{where[1:]}: {expected} -> {found}"
    elif found != expected and not (found != found and expected != expected):
        yield f"{where[1:]}: {expected} -> {found}"
