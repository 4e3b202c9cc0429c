"""Filters that follow from options: exact in every dtype and on every device that a layer is moved to."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant.layers import BlurPool2d, BlurUpsample2d, MaxBlurPool, PolyphaseUpsample2d, PolyphaseUpsampleConv


def _binomial(size: int) -> list[Fraction]:
    return [Fraction(math.comb(size - 1, i), 2 ** (size - 1)) for i in range(size)]


def _outer(size: int) -> list[list[Fraction]]:
    return [[one * other for other in _binomial(size)] for one in _binomial(size)]


def _rounded(exact: Any, dtype: torch.dtype) -> Tensor:
    """Each fraction of few digits is exact in float64, and rounded once from there."""
    return torch.tensor(
        [[float(x) for x in row] if isinstance(row, list) else float(row) for row in exact], dtype=torch.float64
    ).to(dtype)


# Nine taps have products of 13 bits, more than bfloat16 and float16 hold.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "blur-pool": (lambda: BlurPool2d(kernel_size=9), _outer(9)),
    "blur-pool-even": (lambda: BlurPool2d(kernel_size=14), _outer(14)),
    "blur-upsample": (lambda: BlurUpsample2d(kernel_size=14), _binomial(14)),
    "polyphase-upsample": (
        lambda: PolyphaseUpsample2d(200, interpolate=True),
        [min(i, 400 - i) for i in range(1, 400)],
    ),
    "max-blur-pool": (lambda: MaxBlurPool(padding_mode="circular"), None),
    "polyphase-upsample-conv": (lambda: PolyphaseUpsampleConv(2, padding_mode="circular"), None),
}
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16-float": lambda layer: layer.bfloat16().float(),
    "half-float": lambda layer: layer.half().float(),
    "bfloat16-double": lambda layer: layer.bfloat16().double(),
    "half-double": lambda layer: layer.half().double(),
    "float-double": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "within-a-model": lambda layer: nn.Sequential(layer).to(torch.bfloat16).to(torch.float32)[0],
}


def _filters(layer: nn.Module) -> list[Tensor]:
    found = [buffer for name, buffer in layer.named_buffers() if buffer.is_floating_point()]
    assert found
    return found


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", LAYERS)
def test_filter_is_exact_again_after_a_cast_to_half_precision_and_back(name: str, cast: str) -> None:
    """Each tap is the exact fraction, rounded once to the last dtype."""
    build, exact = LAYERS[name]
    reference = build().double()
    for buffer, wide in zip(_filters(CASTS[cast](build())), _filters(reference), strict=True):
        expected = wide.to(buffer.dtype) if exact is None else _rounded(exact, buffer.dtype)
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_filter_of_a_layer_built_in_a_dtype_is_that_of_one_cast_to_it(name: str, dtype: torch.dtype) -> None:
    """It does not matter when the dtype was chosen."""
    build, _ = LAYERS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        built = build()
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(_filters(built), _filters(build().to(dtype)), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LAYERS)
def test_filter_of_a_layer_built_on_the_meta_device_is_filled_by_to_empty(name: str) -> None:
    """No checkpoint holds it, so nobody else would fill it."""
    build, _ = LAYERS[name]
    with torch.device("meta"):
        layer = build()
    assert all(buffer.is_meta for buffer in _filters(layer))
    for one, other in zip(_filters(layer.to_empty(device="cpu")), _filters(build()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("name", LAYERS)
def test_copied_or_pickled_layer_keeps_its_filter(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """And stores none in its state dict."""
    layer = LAYERS[name][0]().bfloat16()
    other = duplicate(layer)
    for one, again in zip(_filters(layer), _filters(other.float()), strict=True):
        assert torch.equal(one.float(), again.to(torch.bfloat16).float())
    assert not [key for key in other.state_dict() if "filter" in key]
