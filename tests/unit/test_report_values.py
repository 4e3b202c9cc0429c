"""Stored values of all kinds of reports: what is missing, unknown or of another kind at any depth is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from te_quant.equivariance import AuditReport, EquivarianceReport, audit, measure_equivariance
from te_quant.stability import Flip, Identity, StabilityReport, measure_stability
from tests.unit.stability_cases import K, cell_images, decode, encode, tokens_of


def _reports() -> dict[str, Any]:
    cells = cell_images(tokens_of(2, grid=(4, 4)))
    codes = torch.linspace(-1, 1, K)[:, None]
    return {
        "equivariance": measure_equivariance(
            encode,
            cells,
            stride=4,
            num_codes=K,
            protocol="circular",
            reconstruct=lambda x: decode(encode(x)),
            latents=lambda x: nn.functional.avg_pool2d(x, 4),
            codebook=codes,
            shifts=[(4, 0)],
            sub_stride_shifts=[(1, 0)],
            resamples=5,
        ),
        "stability": measure_stability(
            encode, decode, cells, transforms=[Identity(), Flip()], cycles=2, ground=-1.0
        ),
        "audit": audit(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)), cells),
    }


REPORTS = _reports()
# Names of these objects are the caller's.
FREE = ("numerical_floor", "transforms")


def _objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all objects inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield path
    for key, inner in items:
        yield from _objects(inner, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("name", REPORTS)
def test_every_depth_is_checked(name: str) -> None:
    """A missing field is refused, or has a default; an unknown one is refused; so is a number for an object."""
    report = REPORTS[name]
    stored = json.loads(json.dumps(report.to_dict()))
    kind: type[EquivarianceReport] | type[StabilityReport] | type[AuditReport] = type(report)
    assert json.loads(json.dumps(kind.from_dict(stored).to_dict())) == stored
    refused = allowed = 0
    for path in _objects(stored):
        if path[-1:] and path[-1] in FREE:
            continue
        unknown = copy.deepcopy(stored)
        _at(unknown, path)["another"] = 1
        with pytest.raises(ValueError, match=r"(fields|'another')"):
            kind.from_dict(unknown)
        if path:
            flat = copy.deepcopy(stored)
            _at(flat, path[:-1])[path[-1]] = 5
            with pytest.raises(ValueError, match="must be an object in JSON, got int"):
                kind.from_dict(flat)
        for key in _at(stored, path):
            missing = copy.deepcopy(stored)
            del _at(missing, path)[key]
            try:
                kind.from_dict(missing)
            except ValueError as error:
                assert "fields" in str(error) or "report" in str(error)  # noqa: PT017
                refused += 1
            else:
                allowed += 1
    assert refused > 20
    assert allowed < refused


@pytest.mark.parametrize(("name", "field"), [("equivariance", "numerical_floor"), ("stability", "transforms")])
def test_objects_with_free_names_are_objects(name: str, field: str) -> None:
    """A list has no names."""
    stored = json.loads(json.dumps(REPORTS[name].to_dict())) | {field: []}
    with pytest.raises(ValueError, match=f"{field} must be an object in JSON, got list"):
        type(REPORTS[name]).from_dict(stored)
