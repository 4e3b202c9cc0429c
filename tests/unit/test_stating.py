"""What layers state, against what they do: the reach measured, the shifts tried."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from te_quant.contract import GROUPS, UNKNOWN, Reach, Statement
from te_quant.layers import (
    BlurPool2d,
    BlurUpsample2d,
    BlurUpsampleConv,
    ChannelNorm,
    ConvBlurPool,
    ConvFourierDownsample,
    ConvPolyphaseDownsample,
    FilteredActivation,
    FourierDownsample2d,
    FourierUpsample2d,
    FourierUpsampleConv,
    MaxBlurPool,
    MaxPool,
    NearestUpsampleConv,
    PaddedConv2d,
    PolynomialActivation,
    PolyphaseDownsample2d,
    PolyphaseUpsample2d,
    PolyphaseUpsampleConv,
    ResidualBlock,
    SelfAttention2d,
    StridedConv,
    in_series,
    statement_of,
)
from tests.unit.grid_oracles import fresh, roll

TORCH = {
    "1x1": nn.Conv2d(2, 2, 1),
    "zeros": nn.Conv2d(2, 2, 3, padding=1),
    "circular": nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    "circular, same": nn.Conv2d(2, 2, 4, padding="same", padding_mode="circular"),
    "circular, larger grid": nn.Conv2d(2, 2, 3, padding=2, padding_mode="circular"),
    "valid": nn.Conv2d(2, 2, 3, padding="valid"),
    "strided, zeros": nn.Conv2d(2, 2, 3, stride=2, padding=1),
    "strided, circular": nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="circular"),
    "even kernel, circular": nn.Conv2d(2, 2, 4, stride=2, padding=1, padding_mode="circular"),
    "patches": nn.Conv2d(2, 2, 2, stride=2),
    "dilated": nn.Conv2d(2, 2, 3, padding=2, dilation=2, padding_mode="circular"),
    "one long axis": nn.Conv2d(2, 2, (1, 3), padding=(0, 1)),
    "mean": nn.AvgPool2d(2),
    "mean, overlapping": nn.AvgPool2d(3, 2),
    "mean, padded": nn.AvgPool2d(3, 2, padding=1),
    "maximum": nn.MaxPool2d(2),
    "maximum, padded": nn.MaxPool2d(3, 2, padding=1),
    "silu": nn.SiLU(),
    "identity": nn.Identity(),
    "group norm": nn.GroupNorm(1, 2),
    "batch norm": nn.BatchNorm2d(2),
    "row": nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.SiLU(), nn.AvgPool2d(2)),
    "row, one layer twice": nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")] * 2),
}
PHASE = torch.ones(1, 2, dtype=torch.int64)
CIRCULAR = {"padding_mode": "circular"}
OURS = {
    "PaddedConv2d": PaddedConv2d(2, 2, 4, stride=2, **CIRCULAR),
    "PaddedConv2d, zeros": PaddedConv2d(2, 2, 3, padding_mode="zeros"),
    "PaddedConv2d, no margins": PaddedConv2d(2, 2, 2, stride=2, margins=(0, 0, 0, 0), padding_mode="zeros"),
    "PaddedConv2d, one margin": PaddedConv2d(2, 2, 3, margins=(1, 1, 0, 0), **CIRCULAR),
    "BlurPool2d": BlurPool2d(kernel_size=4, stride=2, **CIRCULAR),
    "BlurPool2d, replicate": BlurPool2d(),
    "StridedConv": StridedConv(2, **CIRCULAR),
    "MaxPool": MaxPool(),
    "MaxBlurPool": MaxBlurPool(**CIRCULAR),
    "MaxBlurPool, zeros": MaxBlurPool(padding_mode="zeros"),
    "ConvBlurPool": ConvBlurPool(2, **CIRCULAR),
    "ConvFourierDownsample": ConvFourierDownsample(2, **CIRCULAR),
    "FourierDownsample2d": FourierDownsample2d(2),
    "ResidualBlock": ResidualBlock(2, 4, norm="channel", **CIRCULAR),
    "ResidualBlock, group norm": ResidualBlock(2, 4, norm_groups=1, **CIRCULAR),
    "ResidualBlock, zeros": ResidualBlock(2, 4, norm="channel", padding_mode="zeros"),
    "SelfAttention2d": SelfAttention2d(2, norm_groups=1),
    "ChannelNorm": ChannelNorm(2),
    "FilteredActivation": FilteredActivation(),
    "PolynomialActivation": PolynomialActivation(2),
}
UP = {
    "NearestUpsampleConv": NearestUpsampleConv(2, **CIRCULAR),
    "NearestUpsampleConv, zeros": NearestUpsampleConv(2, padding_mode="zeros"),
    "BlurUpsample2d": BlurUpsample2d(kernel_size=5, stride=3, **CIRCULAR),
    "BlurUpsampleConv": BlurUpsampleConv(2, **CIRCULAR),
    "FourierUpsample2d": FourierUpsample2d(2),
    "FourierUpsampleConv": FourierUpsampleConv(2, **CIRCULAR),
    "PolyphaseUpsample2d": PolyphaseUpsample2d(2, interpolate=True, **CIRCULAR),
    "PolyphaseUpsampleConv": PolyphaseUpsampleConv(2, **CIRCULAR),
    "PolyphaseUpsampleConv, zeros": PolyphaseUpsampleConv(2, padding_mode="zeros"),
}


def run(layer: nn.Module, images: Tensor) -> Tensor:
    if isinstance(layer, PolyphaseUpsample2d | PolyphaseUpsampleConv):
        return layer(images, PHASE.expand(len(images), 2))
    return layer(images)


def measured_reach(layer: nn.Module, side: int = 24) -> int:
    """Pixels between the first and the last one that move an output pixel in the middle, at any phase."""
    images = fresh(8, 2, side, side).requires_grad_()
    output = run(layer, images)
    spans = []
    for i in range(4):
        pixel = output[..., output.shape[-2] // 2 + i, output.shape[-1] // 2 + i]
        (gradient,) = torch.autograd.grad(pixel.square().sum(), images, retain_graph=True)
        for axis in (-2, -1):
            places = (gradient != 0).any(axis).any(1).any(0).nonzero().flatten()
            spans.append(int(places[-1] - places[0]) + 1)
    return max(spans)


def follows(layer: nn.Module, shift: int, moved: Fraction) -> bool:
    """Whether the output moves by so many of its own pixels, along both axes."""
    images = fresh(2, 2, 12, 12)
    before, after = run(layer, images), run(layer, roll(images, shift, shift))
    assert moved.denominator == 1
    return bool((after - roll(before, int(moved), int(moved))).abs().max() < 1e-9 * before.abs().max())


@pytest.mark.parametrize("name", [*TORCH, *OURS, *UP])
def test_statements_are_what_the_layers_do(name: str) -> None:
    """The reach is the one measured, and whole-grid shifts are promised exactly where they hold."""
    layer = {**TORCH, **OURS, **UP}[name].double().eval()
    reach, exact_for, _ = statement_of(layer)
    everywhere = reach.size is None
    # A layer of torch whose statistics depend on its mode is stated for the mode that reads more.
    if name != "batch norm":
        assert measured_reach(layer) == (24 if everywhere else reach.size)
    step = max(1, reach.stride)
    assert follows(layer, int(step), Fraction(step) / Fraction(reach.stride)) == (
        exact_for in ("integer", "stride")
    )
    assert (exact_for == "integer") <= (reach.stride <= 1)


def test_adaptive_layers_state_that_they_choose() -> None:
    """Every integer shift is promised at a stride of 2, which no layer without a phase can keep."""
    assert statement_of(PolyphaseDownsample2d(3)) == Statement(Reach(1, 3), "integer", adaptive=True)
    layer = ConvPolyphaseDownsample(2, **CIRCULAR)
    assert statement_of(layer) == Statement(Reach(3, 2), "integer", adaptive=True)
    assert statement_of(ConvPolyphaseDownsample(2, padding_mode="zeros")).exact_for == "none"


class _OwnForward(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        return images + torch.linspace(0, 1, images.shape[-1])


class _OwnRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.silu = nn.SiLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.silu(images) + torch.linspace(0, 1, images.shape[-1])


@pytest.mark.parametrize(
    "layer",
    [
        _OwnForward(2, 2, 1),
        _OwnRow(),
        nn.Linear(2, 2),
        nn.LayerNorm(4),
        nn.ModuleList([nn.SiLU()]),
        nn.Upsample(scale_factor=2),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.Conv2d(2, 2, 3, stride=(1, 2)),
        nn.Conv2d(2, 2, 3, padding=3),
        nn.Sequential(nn.SiLU(), _OwnRow()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_nothing_is_claimed_for_other_layers(layer: nn.Module) -> None:
    """A forward of its own, known parts or not, and options that the table does not cover."""
    assert statement_of(layer).exact_for == "none"
    assert in_series(nn.SiLU(), layer, nn.SiLU()).exact_for == "none"


def test_parametrized_layers_stay_known() -> None:
    """Weight normalization changes the class of a layer, and not its forward."""
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 2, stride=2))
    assert type(layer) is not nn.Conv2d
    assert statement_of(layer) == Statement(Reach(2, 2), "stride")


def test_replaced_parts_change_the_statement() -> None:
    """A statement is read when it is asked for."""
    layer = ConvBlurPool(2, **CIRCULAR)
    assert layer.exact_for == "stride"
    layer.conv = PaddedConv2d(2, 2, 3, padding_mode="zeros")
    assert layer.exact_for == "interior"
    layer.conv = _OwnRow()
    assert layer.exact_for == "none"


def test_a_layer_that_runs_twice_counts_twice() -> None:
    """As another one with the same options does."""
    pool = nn.AvgPool2d(2)
    twice = statement_of(nn.Sequential(pool, pool))
    assert twice == statement_of(nn.Sequential(pool, nn.AvgPool2d(2))) == Statement(Reach(4, 4), "stride")


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("exact_for", "whole", ValueError, r"_OwnRow\.exact_for must be one of 'integer', .*got 'whole'"),
        ("reach", (3, 2), TypeError, r"_OwnRow\.reach must be a Reach, got \(3, 2\)"),
    ],
)
def test_statements_in_other_words_are_refused(
    name: str, value: object, error: type[Exception], match: str
) -> None:
    """By the name of the class."""
    layer = _OwnRow()
    layer.reach, layer.exact_for = Reach(1), "integer"
    assert statement_of(layer) == Statement(Reach(1), "integer")
    setattr(layer, name, value)
    with pytest.raises(error, match=match):
        statement_of(layer)


@pytest.mark.parametrize("given", ["reach", "exact_for"])
def test_half_a_statement_is_none(given: str) -> None:
    """Either attribute without the other says too little."""
    layer = _OwnRow()
    setattr(layer, given, {"reach": Reach(1), "exact_for": "integer"}[given])
    assert statement_of(layer) == UNKNOWN


STATEMENTS = st.builds(
    Statement,
    st.builds(Reach, st.none() | st.integers(1, 9), st.sampled_from([1, 2, 4])),
    st.sampled_from(GROUPS),
    st.booleans(),
)


@given(one=STATEMENTS, two=STATEMENTS, three=STATEMENTS)
@settings(deadline=None, max_examples=200)
def test_brackets_do_not_matter(one: Statement, two: Statement, three: Statement) -> None:
    """A level of layers states what its layers state one by one."""
    assert one.then(two).then(three) == one.then(two.then(three))


@given(one=STATEMENTS, two=STATEMENTS)
@settings(deadline=None, max_examples=200)
def test_a_row_promises_no_more_than_its_layers(one: Statement, two: Statement) -> None:
    """No layer improves what another has lost, except that a stride of 1 loses nothing."""
    weaker = max(one.exact_for, two.exact_for, key=GROUPS.index)
    both = one.then(two)
    assert GROUPS.index(both.exact_for) >= GROUPS.index(weaker) or (
        weaker == "stride" and both.exact_for == "integer"
    )
    assert both.adaptive == (one.adaptive or two.adaptive)
    sizes = [statement.reach.size or math.inf for statement in (one, two, both)]
    assert sizes[2] >= max(sizes[0], sizes[1])


def test_an_enlarged_grid_promises_nothing_behind_a_smaller_one() -> None:
    """The product of the strides is 1, and yet a shift by one pixel is lost."""
    row = nn.Sequential(StridedConv(2, **CIRCULAR), NearestUpsampleConv(2, **CIRCULAR)).double()
    assert statement_of(row).exact_for == "none"
    assert not follows(row, 1, Fraction(1))
    assert follows(row, 2, Fraction(2))


def test_branches_add_their_windows() -> None:
    """Both contain the same pixel, on different sides of which they may lie."""
    left, right = Statement(Reach(3), "integer"), Statement(Reach(2), "interior")
    assert left.beside(right) == Statement(Reach(4), "interior")
    assert left.beside(Statement(Reach(1, 2), "stride")).exact_for == "none"
    assert left.beside(Statement(Reach(None), "integer")) == Statement(Reach(None), "integer")
