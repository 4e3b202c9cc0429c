"""Callables that write into their input, return the same memory each time, or change while they are measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant.equivariance import measure_equivariance, numerical_floor, placement_agreement
from te_quant.stability import EightBit, Identity, measure_stability
from te_quant.testing import equivariance_error
from tests.helpers import plain_quantizer

ImageMap = Callable[[Tensor], Tensor]


def encode(images: Tensor) -> Tensor:
    """Means of 4x4 pixels, in sixteen steps."""
    return ((nn.functional.avg_pool2d(images[:, 0], 4) + 1) * 8).long().clamp(0, 15)


def render(indices: Tensor) -> Tensor:
    """Not quite the middle of each step, so that some tokens do not come back."""
    values = indices.to(torch.float64) / 8 - 0.97 + 0.1 * (indices % 3)
    return values.clamp(-1, 1)[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)


def same_memory(function: ImageMap) -> ImageMap:
    """As replayed graphs and engines do it."""
    kept: dict[Any, Tensor] = {}

    def call(values: Tensor) -> Tensor:
        result = function(values)
        return kept.setdefault(result.shape, torch.empty_like(result)).copy_(result)

    return call


def overwriting(function: ImageMap) -> ImageMap:
    """Return the right result, and leave nothing of the input."""

    def call(values: Tensor) -> Tensor:
        result = function(values)
        values.zero_()
        return result

    return call


def _equivariance(tokenize: ImageMap, decode: ImageMap, images: Tensor) -> Any:
    return measure_equivariance(
        tokenize,
        images,
        protocol="circular",
        stride=4,
        num_codes=16,
        reconstruct=lambda x: decode(tokenize(x)),
        latents=lambda x: nn.functional.avg_pool2d(x, 4),
        resamples=0,
    )


MEASURES: dict[str, Callable[[ImageMap, ImageMap, Tensor], Any]] = {
    "equivariance": _equivariance,
    "placement": lambda tokenize, _, images: placement_agreement(
        tokenize, images, canvas_size=64, stride=4, num_codes=16, resamples=0
    ),
    "floor": lambda tokenize, _, images: numerical_floor(tokenize, images, num_codes=16, resamples=0),
    "stability": lambda tokenize, decode, images: measure_stability(
        tokenize, decode, images, transforms=[Identity(), EightBit()], cycles=2, num_codes=16, resamples=0
    ),
}


@pytest.mark.filterwarnings("ignore:The ground -1 on which")
@pytest.mark.parametrize("manner", [same_memory, overwriting])
@pytest.mark.parametrize("name", MEASURES)
def test_figures_do_not_depend_on_whose_memory_it_is(name: str, manner: Callable[[ImageMap], ImageMap]) -> None:
    """Nor do images change that belong to the caller."""
    images = torch.rand(6, 1, 32, 32, dtype=torch.float64) * 2 - 1
    before = images.clone()
    plain = MEASURES[name](encode, render, images)
    found = MEASURES[name](manner(encode), manner(render), images)
    assert str(found) == str(plain)
    assert torch.equal(images, before)


@pytest.mark.filterwarnings("ignore:The ground -1 on which")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
@pytest.mark.parametrize("name", MEASURES)
def test_indices_have_any_integer_dtype(name: str, dtype: torch.dtype) -> None:
    """Also the one in which large codebooks are stored, for which torch has few operations."""
    images = torch.rand(6, 1, 32, 32, dtype=torch.float64) * 2 - 1
    plain = MEASURES[name](encode, render, images)
    narrow = MEASURES[name](lambda x: encode(x).to(dtype), lambda t: render(t.long()), images)
    assert str(narrow) == str(plain)


def test_an_output_of_the_same_memory_is_no_equal_one() -> None:
    """The first pixel moves, so the output has to differ: by as much as without the memory."""
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    found = [
        equivariance_error(function, images, (1, 2))
        for function in (lambda x: x[:, 0, 0, :3], same_memory(lambda x: x[:, 0, 0, :3]))
    ]
    assert found[0] == found[1]
    assert found[1].differing == 9


class _Holder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def tokens(self, images: Tensor) -> Tensor:
        """A method of an object that is no module."""
        indices: Tensor = self.model(images).indices
        return indices


def test_learning_is_seen_behind_every_kind_of_callable() -> None:
    """Statistics move before tokens do."""
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    quantizer = plain_quantizer(16, 1, codebook_update="ema", decay=0.999)
    model = nn.Sequential(nn.AvgPool2d(4), quantizer)

    def inner(x: Tensor) -> Tensor:
        indices: Tensor = model(x).indices
        return indices

    kinds: list[ImageMap] = [
        inner,
        lambda x: inner(x),
        functools.partial(lambda network, x: network(x).indices, model),
        _Holder(model).tokens,
    ]
    for tokenize in kinds:
        model.train()
        assert (tokenize(images) == tokenize(images)).float().mean() > 0.9
        with pytest.raises(
            ValueError,
            match="tokenize must be a function that leaves its model as it is, got one that changes",
        ):
            numerical_floor(tokenize, images, num_codes=16)
        model.eval()
        numerical_floor(tokenize, images, num_codes=16)


def test_a_model_in_training_mode_that_changes_nothing_is_measured() -> None:
    """Only what happens counts, not the flag."""
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    quantizer = plain_quantizer(16, 1, codebook_update="ema").train()
    floor = numerical_floor(lambda x: quantizer.encode(nn.functional.avg_pool2d(x, 4)), images, num_codes=16)
    assert floor["batch of one"].rate == 1


@pytest.mark.parametrize("name", ["reconstruct", "latents", "decode"])
def test_other_functions_may_not_learn_either(name: str) -> None:
    """They would move the codebook between the tokens of two shifts. In evaluation mode they are measured."""
    images = torch.rand(2, 1, 32, 32, dtype=torch.float64) * 2 - 1
    quantizer = plain_quantizer(16, 1, codebook_update="ema").double()

    def learning(x: Tensor) -> Tensor:
        quantizer(nn.functional.avg_pool2d(x, 4))
        return x

    options: dict[str, Any] = {"protocol": "circular", "stride": 4, "num_codes": 16, "resamples": 0}
    calls = {
        "reconstruct": lambda: measure_equivariance(encode, images, reconstruct=learning, **options),
        "latents": lambda: measure_equivariance(
            encode, images, latents=lambda x: nn.functional.avg_pool2d(learning(x), 4), **options
        ),
        "decode": lambda: measure_stability(
            encode, lambda t: learning(render(t)), images, transforms=[Identity()], num_codes=16
        ),
    }
    match = (
        f"{name} must be a function that leaves its model as it is, got one that changes 'usage'|'pending_counts'"
    )
    with pytest.raises(ValueError, match=match):
        calls[name]()
    quantizer.eval()
    calls[name]()


def test_a_decoder_that_gives_nan_is_refused() -> None:
    """Means of it would be undefined without a reason."""
    images = torch.rand(3, 1, 32, 32, dtype=torch.float64) * 2 - 1

    def broken(indices: Tensor) -> Tensor:
        result = render(indices)
        result[1] = torch.nan
        return result

    with pytest.raises(ValueError, match=r"^reconstruct\(images\) must be finite, got 1024 NaN or infinite"):
        _equivariance(encode, broken, images)


def test_a_variable_that_was_never_assigned_is_passed_by() -> None:
    """As in functions that have a model for one of two cases; the model of the other is still seen."""

    def make(*, learns: bool) -> ImageMap:
        if learns:
            counted = nn.BatchNorm2d(1).double()
        return lambda x: encode(counted(x) if learns else x)

    images = torch.rand(2, 1, 16, 16, dtype=torch.float64) * 2 - 1
    assert numerical_floor(make(learns=False), images, num_codes=16)["batch of one"].rate == 1
    with pytest.raises(ValueError, match=r"got one that changes '(num_batches_tracked|running_mean)'"):
        numerical_floor(make(learns=True), images, num_codes=16)
