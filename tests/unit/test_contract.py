"""Every encoder that the builder accepts, held to its own contract, and what must fail shown to fail."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from te_quant.autoencoder import AutoencoderConfig, Encoding, EquivarianceContract, VQAutoencoder, build_encoder
from te_quant.contract import GROUPS, Reach
from te_quant.filters import PADDING_MODES, PaddingMode, pad2d
from te_quant.layers import (
    ACTIVATIONS,
    DOWNSAMPLERS,
    NORMS,
    UPSAMPLERS,
    ConvPolyphaseDownsample,
    Downsample,
    PolyphaseDownsample2d,
    PolyphaseUpsampleConv,
)
from te_quant.shifts import canvas, crop, fourier_shift
from te_quant.testing import check_downsample, image_sides, shifts
from tests.unit.grid_oracles import fresh, roll

TOLERANCE = 1e-9
BROKEN = 1e-4
# These two replicate the border whatever they are told, so they have a test of their own.
REPLICATING = ("unpadded_max_blur_pool", "conv_replicate_blur_pool")
AXES = {
    "downsample": tuple(kind for kind in get_args(Downsample) if kind not in REPLICATING),
    "encoder_padding": PADDING_MODES,
    "norm": NORMS,
    "attention_levels": ((), (1,)),
    "activation": ACTIVATIONS,
}
COMBINATIONS = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def config_of(combination: dict, **options: object) -> AutoencoderConfig:
    given = {"upsample": "polyphase" if combination["downsample"] == "polyphase" else "nearest", **combination}
    widths = {"image_channels": 1, "base_channels": 4, "channel_multipliers": (1, 1), "norm_groups": 2}
    codes = {"num_codes": 32, "code_dim": 4, "decoder_padding": "circular"}
    return AutoencoderConfig(**{**widths, **codes, **given, **options})


def accepted(combination: dict) -> bool:
    try:
        config_of(combination)
    except ValueError:
        return False
    return True


def name_of(combination: dict) -> str:
    attention = "attention" if combination["attention_levels"] else "no_attention"
    return "-".join([*(v for v in combination.values() if isinstance(v, str)), attention])


ACCEPTED = [c for c in COMBINATIONS if accepted(c)]


def promising(*groups: str) -> pytest.MarkDecorator:
    """The accepted combinations whose encoders promise one of these groups."""
    chosen = [c for c in ACCEPTED if build_encoder(config_of(c)).equivariance.group in groups]
    assert chosen
    # Every fourth runs in the fast suite.
    parameters = [
        pytest.param(c, id=name_of(c), marks=pytest.mark.slow if place % 4 else ())
        for place, c in enumerate(chosen)
    ]
    return pytest.mark.parametrize("combination", parameters)


def model_of(config: AutoencoderConfig) -> VQAutoencoder:
    """In float64, with codes spread as the latents are, so that many are used."""
    model = VQAutoencoder(config).double().eval()
    latents = model.encode(fresh(4, 1, 8 * config.stride, 8 * config.stride)).detach()
    points = latents.movedim(1, -1).reshape(-1, config.code_dim)
    model.quantizer.codebook.data = points[torch.randperm(len(points))[: config.num_codes]].clone()
    return model


def law(encoding: Encoding, shifted: Encoding, shift: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """By how many tokens each image must have moved, from o = Σ_l 2^l·phase_l, in Python's own integers."""
    result = []
    for before, after in zip(encoding.phases.tolist(), shifted.phases.tolist(), strict=True):
        move = []
        for axis in (0, 1):
            pixels = shift[axis] + sum(2**n * (before[n][axis] - after[n][axis]) for n in range(len(before)))
            assert pixels % stride == 0
            move.append(pixels // stride)
        result.append(tuple(move))
    return result


def roll_each(grids: Tensor, moves: list[tuple[int, int]]) -> Tensor:
    return torch.stack([grid.roll(move, (-2, -1)) for grid, move in zip(grids, moves, strict=True)])


def error_of(encoder: nn.Module, images: Tensor, shift: tuple[int, int]) -> float:
    """How far the latents are from following, over their size; infinite where no whole shift could follow."""
    before, after = encoder.with_phases(images), encoder.with_phases(roll(images, *shift))
    try:
        moves = law(before, after, shift, encoder.config.stride)
    except AssertionError:
        return math.inf
    error = (after.latents - roll_each(before.latents, moves)).abs().max() / before.latents.abs().max()
    return error.item()


def error_at_best(encoder: nn.Module, images: Tensor, shift: tuple[int, int]) -> float:
    """The same, with whatever token shift suits best."""
    before, after = encoder(images), encoder(roll(images, *shift))
    moves = itertools.product(range(before.shape[2]), range(before.shape[3]))
    return min((after - roll(before, *move)).abs().max().item() for move in moves) / before.abs().max().item()


def local_reach(combination: dict) -> int:
    """The receptive field with nothing in the network that sees the whole image."""
    local = {**combination, "norm": "channel", "attention_levels": (), "activation": "silu"}
    reach = build_encoder(config_of(local)).equivariance.receptive_field
    assert reach is not None
    return reach


def windows(side: int, shift: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A window and a shifted one, cut from a larger image that is loud where only one of the two shows it."""
    larger = fresh(1, 1, side + 16, side + 16)
    loud = torch.ones_like(larger)
    loud[..., 8 : 8 + side, 8 : 8 + side] = 0
    larger = larger + 30 * loud * fresh(*larger.shape)
    return crop(larger, (0, 0), size=(side, side)), crop(larger, shift, size=(side, side))


def inside(grid: tuple[int, int], sides: tuple[int, int], stride: int, distance: int) -> Tensor:
    """The tokens at least this many pixels from every side."""
    axes = [
        [stride * u >= distance and side - 1 - stride * u >= distance for u in range(tokens)]
        for tokens, side in zip(grid, sides, strict=True)
    ]
    return torch.tensor(axes[0])[:, None] & torch.tensor(axes[1])


def interior_error(encoder: nn.Module, pair: tuple[Tensor, Tensor], move: tuple[int, int], distance: int) -> float:
    """Largest difference between tokens u and u + k that both keep the distance; there must be some."""
    stride = encoder.equivariance.stride
    before, after = encoder(pair[0]), encoder(pair[1])
    mask = inside(before.shape[-2:], pair[0].shape[-2:], stride, distance)
    mask = mask & mask.roll(tuple(-k for k in move), (0, 1))
    assert mask.sum() >= 4
    moved = roll(after, -move[0], -move[1])
    return ((moved - before).abs().amax(1)[..., mask].max() / before.abs().max()).item()


def test_combinations_are_all_there() -> None:
    """Of 288 combinations the builder refuses those that transform the image as a period and pad it as none."""
    assert len(COMBINATIONS) == 6 * 4 * 2 * 2 * 3
    for combination in COMBINATIONS:
        periodic = combination["downsample"] == "fourier" or combination["activation"] != "silu"
        assert accepted(combination) == (combination["encoder_padding"] == "circular" or not periodic)
    groups = [build_encoder(config_of(c)).equivariance.group for c in ACCEPTED]
    assert {group: groups.count(group) for group in GROUPS} == {
        "integer": 12,
        "stride": 60,
        "interior": 12,
        "none": 48,
    }


@promising("integer", "stride")
def test_circular_encoders_keep_their_contract(combination: dict) -> None:
    """Latents, tokens: every integer shift or every stride multiple, any ratio of sides, three levels too."""

    @given(
        levels=st.sampled_from([(1, 1), (1, 1, 2)]),
        cells=image_sides(1, largest=5),
        shift=shifts(23, identity=True),
    )
    @settings(deadline=None, max_examples=6)
    def holds(levels: tuple[int, ...], cells: tuple[int, int], shift: tuple[int, int]) -> None:
        model = model_of(config_of(combination, channel_multipliers=levels))
        contract = model.equivariance
        stride = contract.stride
        if contract.group == "stride":
            shift = (stride * shift[0], stride * shift[1])
        assert contract.holds_for(shift)
        images = fresh(2, 1, stride * cells[0], stride * cells[1])
        before, after = model.encode_with_phases(images), model.encode_with_phases(roll(images, *shift))
        moves = law(before, after, shift, stride)
        assert contract.token_shifts(shift, before, after).tolist() == [list(move) for move in moves]
        expected = roll_each(before.latents, moves)
        tolerance = TOLERANCE * before.latents.abs().max().item()
        torch.testing.assert_close(after.latents, expected, rtol=0, atol=tolerance)
        tokens = model.quantizer.encode(before.latents)
        assert torch.equal(model.encode_to_indices(roll(images, *shift)), roll_each(tokens, moves))

    holds()


@promising("stride")
def test_stride_is_not_integer(combination: dict) -> None:
    """Negative control: one pixel is followed by no token shift at all."""
    encoder = build_encoder(config_of(combination)).double()
    assert not encoder.equivariance.holds_for((1, 0))
    images = fresh(1, 1, 12, 16)
    for shift in ((1, 0), (0, 1), (3, 2)):
        assert error_at_best(encoder, images, shift) > BROKEN


@promising("interior")
def test_interior_encoders_keep_their_contract(combination: dict) -> None:
    """Whatever enters at a border, tokens whose receptive field lies inside both times are equal."""
    encoder = build_encoder(config_of(combination)).double()
    stride, distance = encoder.equivariance.stride, encoder.equivariance.receptive_field
    side = 2 * (distance + 6)

    @given(move=shifts(2, identity=True))
    @settings(deadline=None, max_examples=4)
    def holds(move: tuple[int, int]) -> None:
        pair = windows(side, (stride * move[0], stride * move[1]))
        assert interior_error(encoder, pair, move, distance) < TOLERANCE

    holds()
    pair = windows(side, (stride, 0))
    assert interior_error(encoder, pair, (1, 0), 0) > BROKEN
    assert interior_error(encoder, windows(side, (1, 0)), (0, 0), distance) > BROKEN


@promising("interior")
def test_content_that_keeps_off_the_border_moves_with_all_tokens(combination: dict) -> None:
    """On constant ground; under zeros a ring stays where it is, and content at the border moves under nothing."""
    encoder = build_encoder(config_of(combination)).double()
    stride, distance = encoder.equivariance.stride, encoder.equivariance.receptive_field
    height, width = 2 * (distance + 8), 2 * (distance + 10)

    def latents(top: int, left: int, move: tuple[int, int]) -> tuple[Tensor, Tensor]:
        images = torch.full((1, 1, height, width), -1.0, dtype=torch.float64)
        images[..., top : top + 5, left : left + 5] = content
        moved = canvas(images, (stride * move[0], stride * move[1]), fill=-1)
        return roll(encoder(images), *move), encoder(moved)

    content = fresh(5, 5)
    for move in ((1, 0), (2, 3), (0, 4)):
        expected, got = latents(distance + 1, distance + 1, move)
        scale = got.abs().max()
        ring = combination["encoder_padding"] == "zeros"
        assert bool((got - expected).abs().max() < TOLERANCE * scale) == (not ring)
        mask = inside(got.shape[-2:], (height, width), stride, distance)
        mask = mask & mask.roll(move, (0, 1))
        assert ((got - expected).abs()[..., mask] < TOLERANCE * scale).all()
    expected, got = latents(0, distance + 1, (1, 0))
    assert (got - expected).abs().max() > BROKEN * got.abs().max()


@promising("none")
def test_no_contract_means_that_none_holds(combination: dict) -> None:
    """Far inside, at a stride multiple, what enters at the border is felt: by norm, attention or phase."""
    encoder = build_encoder(config_of(combination)).double()
    contract, distance = encoder.equivariance, local_reach(combination)
    assert not contract.holds_for((contract.stride, 0))
    side = 2 * (distance + 4)
    for _ in range(40):
        pair = windows(side, (2 * contract.stride, 0))
        if interior_error(encoder, pair, (2, 0), distance) > 10 * TOLERANCE:
            return
    pytest.fail("40 pairs of images were followed, although nothing was promised")


@pytest.mark.parametrize("kind", [k for k in get_args(Downsample) if k != "fourier"])
@pytest.mark.parametrize("levels", [(2,), (1, 1), (1, 1, 2)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_receptive_field_is_what_the_gradient_says(kind: str, levels: tuple[int, ...], blocks: int) -> None:
    """First to last pixel that moves one latent, along both axes."""
    local = {"norm": "channel", "attention_levels": (), "encoder_padding": "zeros", "activation": "silu"}
    config = config_of({"downsample": kind, **local}, channel_multipliers=levels, num_res_blocks=blocks)
    encoder = build_encoder(config).double()
    reach = encoder.equivariance.receptive_field
    side = (2 * reach // config.stride + 2) * config.stride
    images = fresh(1, 1, side, side).requires_grad_()
    latents = encoder(images)
    middle = latents.shape[-1] // 2
    (gradient,) = torch.autograd.grad(latents[0, :, middle, middle].sum(), images)
    for axis in (0, 1):
        touched = gradient[0, 0].abs().sum(axis).nonzero().flatten()
        assert touched[-1] - touched[0] + 1 == reach


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "group"},
        {"attention_levels": (0,)},
        {"middle_attention": True},
        {"downsample": "fourier"},
        {"activation": "filtered"},
        {"activation": "polynomial"},
    ],
)
def test_receptive_field_is_none_where_all_pixels_are_seen(options: dict) -> None:
    """One pixel moves every latent; in the same network without the option it does not."""
    local = {"downsample": "strided_conv", "norm": "channel", "attention_levels": (), "activation": "silu"}
    for used in (local, {**local, **options}):
        encoder = build_encoder(config_of({"encoder_padding": "circular", **used})).double()
        images = fresh(1, 1, 64, 64).requires_grad_()
        (gradient,) = torch.autograd.grad(encoder(images)[0, :, 5, 5].sum(), images)
        everywhere = bool((gradient != 0).all())
        assert everywhere == (used is not local) == (encoder.equivariance.receptive_field is None)


@pytest.mark.parametrize("kind", REPLICATING)
def test_layers_that_replicate_promise_the_interior_only(kind: str) -> None:
    """Circular convolutions around them do not help; with GroupNorm nothing is left."""
    local = {"downsample": kind, "encoder_padding": "circular", "norm": "channel", "attention_levels": ()}
    encoder = build_encoder(config_of(local)).double()
    assert encoder.equivariance.group == "interior"
    assert error_of(encoder, fresh(1, 1, 16, 16), (2, 2)) > BROKEN
    assert build_encoder(config_of({**local, "norm": "group"})).equivariance.group == "none"


def test_attention_in_the_middle_alone_takes_the_interior_away() -> None:
    """Every token then feels the zeros at the border."""
    local = {"downsample": "strided_conv", "encoder_padding": "zeros", "norm": "channel", "attention_levels": ()}
    groups = [
        build_encoder(config_of(local, middle_attention=middle)).equivariance.group for middle in (None, True)
    ]
    assert groups == ["interior", "none"]
    circular = build_encoder(config_of({**local, "encoder_padding": "circular"}, middle_attention=True)).double()
    assert circular.equivariance.group == "stride"
    assert error_of(circular, fresh(1, 1, 16, 16), (2, 4)) < TOLERANCE


@pytest.mark.parametrize("options", [{"z_channels": 6}, {"widths": (4, 6), "decoder_widths": (6, 4)}])
def test_widths_do_not_change_the_contract(options: dict) -> None:
    """Neither the channels around the quantizer nor those of the levels."""
    local = {"encoder_padding": "circular", "norm": "channel", "attention_levels": ()}
    config = AutoencoderConfig(image_channels=1, widths=(4, 4), num_codes=32, code_dim=4, **local)
    encoder = build_encoder(dataclasses.replace(config, **options)).double()
    assert encoder.equivariance == build_encoder(config).equivariance
    assert error_of(encoder, fresh(1, 1, 16, 16), (2, 4)) < TOLERANCE


def test_contract_says_what_it_is() -> None:
    """Stride and divisor from the levels; one level alone has no stride to lose a shift to."""
    combination = {"downsample": "strided_conv", "encoder_padding": "circular", "norm": "channel"}
    local = {**combination, "attention_levels": (), "activation": "silu"}
    one, three = (config_of(local, channel_multipliers=levels) for levels in ((1,), (1, 1, 2)))
    assert build_encoder(one).equivariance == EquivarianceContract(1, "integer", 17, 1)
    assert build_encoder(three).equivariance == EquivarianceContract(4, "stride", 77, 4)
    model = VQAutoencoder(three)
    assert model.equivariance == model.encoder.equivariance
    assert hash(model.equivariance) == hash(EquivarianceContract(4, "stride", 77, 4))
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'stride'"):
        model.equivariance.stride = 1
    images = fresh(2, 1, 5, 7)
    encoder = build_encoder(one).double()
    assert encoder.with_phases(images).phases.shape == (2, 0, 2)
    assert error_of(encoder, images, (1, 3)) < TOLERANCE


PHASES = torch.tensor([[[1, 0], [0, 1], [1, 1]], [[0, 0], [1, 0], [0, 0]]])


def test_offsets_weigh_the_phases_by_their_level() -> None:
    """Finest first: 1, 2, 4."""
    assert Encoding(torch.zeros(2), PHASES).offsets.tolist() == [[5, 6], [2, 0]]
    assert Encoding(torch.zeros(2), torch.zeros(2, 0, 2).long()).offsets.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (PHASES[0], ValueError, r"phases must be of shape \(B, L, 2\)"),
        (PHASES.float(), TypeError, "phases must be an integer tensor"),
        (PHASES.repeat(1, 1, 2), ValueError, "phases axis 2 must be 2=2, got 4"),
    ],
)
def test_offsets_of_other_phases_are_refused(wrong: Tensor, error: type[Exception], match: str) -> None:
    """By name."""
    with pytest.raises(error, match=match):
        _ = Encoding(torch.zeros(2), wrong).offsets


CIRCULAR = {"encoder_padding": "circular", "norm": "group", "attention_levels": (1,), "activation": "silu"}
INTEGER = {"downsample": "polyphase", **CIRCULAR}
STRIDE = {"downsample": "strided_conv", **CIRCULAR}


@pytest.mark.parametrize("kind", get_args(Downsample))
@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
def test_other_padding_does_not_pass_for_circular(kind: str, mode: str) -> None:
    """Negative control: held to multiples of the stride over the whole grid, no other padding holds."""
    if kind == "fourier":
        return
    encoder = build_encoder(config_of({**CIRCULAR, "downsample": kind, "encoder_padding": mode})).double()
    assert error_of(encoder, fresh(1, 1, 12, 16), (4, 2)) > BROKEN


@pytest.mark.parametrize("combination", [INTEGER, STRIDE], ids=name_of)
def test_absolute_positions_break_the_contract(combination: dict) -> None:
    """Negative control: with a position added to every feature the same test fails."""

    class Positions(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)

    encoder = build_encoder(config_of(combination)).double()
    images = fresh(2, 1, 12, 16)
    assert error_of(encoder, images, (4, 2)) < TOLERANCE
    encoder.conv_in = nn.Sequential(encoder.conv_in, Positions())
    assert error_of(encoder, images, (4, 2)) > BROKEN
    assert (encoder.equivariance.group, encoder.equivariance.receptive_field) == ("none", None)


def test_a_phase_that_does_not_follow_the_content_breaks_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the same network that always keeps the first component loses one pixel."""
    encoder = build_encoder(config_of(INTEGER)).double()
    images = fresh(2, 1, 12, 16)
    assert error_of(encoder, images, (1, 3)) < TOLERANCE
    first = torch.zeros(2, 2, dtype=torch.int64)
    monkeypatch.setattr(PolyphaseDownsample2d, "forward", lambda self, x: (x[..., ::2, ::2], first))
    assert error_of(encoder, images, (2, 4)) < TOLERANCE
    assert error_of(encoder, images, (1, 3)) > BROKEN
    assert error_at_best(encoder, images, (1, 3)) > BROKEN


@pytest.mark.parametrize("kind", get_args(Downsample))
@pytest.mark.parametrize("sides", [(6, 8), (8, 6), (7, 8)])
@pytest.mark.parametrize("method", ["forward", "with_phases"])
def test_sides_that_the_divisor_does_not_divide_are_refused(
    kind: str, sides: tuple[int, int], method: str
) -> None:
    """By the encoder, also for the phases; both axes."""
    encoder = build_encoder(config_of({**CIRCULAR, "downsample": kind}, channel_multipliers=(1, 1, 1)))
    assert encoder.equivariance.divisor == 4
    with pytest.raises(ValueError, match="images sides must be positive multiples of the divisor 4"):
        getattr(encoder, method)(fresh(1, 1, *sides, dtype=torch.float32))


def padded(channels: int, *, padding_mode: str) -> nn.Module:
    """A layer of torch that pads with zeros, whatever the encoder does."""
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class _Mean(nn.Module):
    """A stranger's layer: the mean of every 2x2 cell."""

    def __init__(self, channels: int, *, padding_mode: str) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 2)


class _StatedMean(_Mean):
    reach, exact_for = Reach(2, stride=2), "stride"


class _Padded(nn.Module):
    """A stranger's zero-padded convolution, which can state anything."""

    reach, exact_for = Reach(3, stride=2), "interior"

    def __init__(self, channels: int, *, padding_mode: str) -> None:
        super().__init__()
        self.conv = padded(channels, padding_mode=padding_mode)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


LOCAL = {"encoder_padding": "circular", "norm": "channel", "attention_levels": (), "activation": "silu"}


@pytest.mark.parametrize(
    ("factory", "group"),
    [
        (padded, "interior"),
        (lambda channels, *, padding_mode: nn.AvgPool2d(2), "stride"),
        (_Mean, "none"),
        (_StatedMean, "stride"),
        (_Padded, "interior"),
    ],
    ids=["zero-padded", "AvgPool2d", "states nothing", "states stride", "states interior"],
)
def test_contract_follows_from_what_a_strangers_layer_states(
    factory: object, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class, one line; whole-grid shifts are promised for no layer that breaks them."""
    monkeypatch.setitem(DOWNSAMPLERS, "own", factory)
    encoder = build_encoder(config_of({"downsample": "own", **LOCAL})).double()
    contract = encoder.equivariance
    assert (contract.stride, contract.group) == (2, group)
    assert (contract.receptive_field is None) == (group == "none")
    error = error_of(encoder, fresh(2, 1, 12, 16), (4, 2))
    assert error < TOLERANCE if factory not in (padded, _Padded) else error > 0.01
    assert contract.holds_for((4, 2)) <= (error < TOLERANCE)
    # Behind the whole image the same layers keep as much, or nothing where a border is felt.
    wide = build_encoder(config_of({"downsample": "own", **CIRCULAR})).equivariance
    assert (wide.group, wide.receptive_field) == ("stride" if group == "stride" else "none", None)


def test_an_adaptive_layer_of_a_stranger_is_taken_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair, the phases and the decoder follow from the statement, not from the name."""

    class Down(ConvPolyphaseDownsample):
        pass

    class Up(PolyphaseUpsampleConv):
        pass

    monkeypatch.setitem(DOWNSAMPLERS, "own", Down)
    monkeypatch.setitem(UPSAMPLERS, "own", Up)
    model = model_of(config_of({"downsample": "own", "upsample": "own", **CIRCULAR}))
    assert model.equivariance.group == "integer"
    images = fresh(2, 1, 12, 16)
    error = model(roll(images, 1, 3)).reconstruction - roll(model(images).reconstruction, 1, 3)
    assert error.abs().max() < TOLERANCE
    assert model.decoder.adaptive
    assert model(images).phases.any()


def test_a_layer_of_another_stride_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders double, so tokens would not lie where they are looked for."""
    monkeypatch.setitem(DOWNSAMPLERS, "own", lambda channels, *, padding_mode: nn.AvgPool2d(4))
    match = "downsample must be a layer whose reach states stride=2, got 'own', which states 4"
    with pytest.raises(ValueError, match=match):
        build_encoder(config_of({"downsample": "own", **LOCAL}))


@pytest.mark.parametrize("name", get_args(Downsample))
def test_every_layer_passes_the_check_for_strangers(name: str) -> None:
    """Each padding mode that the layer takes."""
    check_downsample(DOWNSAMPLERS[name])


@pytest.mark.parametrize("factory", [_StatedMean, _Padded, lambda channels, *, padding_mode: nn.AvgPool2d(2)])
def test_honest_layers_pass_the_check(factory: object) -> None:
    """Of a stranger, or of torch."""
    check_downsample(factory)


@pytest.mark.parametrize("size", [5, 15, 27, 41])
@pytest.mark.parametrize("shift", [0, 1])
def test_layers_of_any_reach_are_checked(size: int, shift: int) -> None:
    """The images are larger than the margins that the layer reflects; one pixel too far is still found."""

    class Wide(nn.Module):
        reach, exact_for = Reach(size, stride=2), "interior"

        def __init__(self, channels: int, *, padding_mode: PaddingMode) -> None:
            super().__init__()
            self.mode, reads = padding_mode, size + 2 * shift
            self.conv = nn.Conv2d(channels, channels, reads, 2, groups=channels)

        def forward(self, images: Tensor) -> Tensor:
            margin = size // 2 + shift
            return self.conv(pad2d(images, (margin,) * 4, self.mode))

    with pytest.raises(AssertionError, match=f"reach of {size}") if shift else contextlib.nullcontext():
        check_downsample(Wide)


class _ThreePixels(_Padded):
    reach = Reach(2, stride=2)


class _Adaptive(_Padded):
    adaptive = True


class _WholeGrid(_Padded):
    exact_for = "stride"


class _Integer(ConvPolyphaseDownsample):
    def __init__(self, channels: int, *, padding_mode: str) -> None:
        super().__init__(channels, padding_mode="zeros")
        self.reach, self.exact_for = Reach(3, stride=2), "integer"

    reach = exact_for = None


class _Positions(_Padded):
    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images) + torch.linspace(0, 1, images.shape[-1] // 2, dtype=images.dtype)


class _SameSize(_StatedMean):
    def forward(self, images: Tensor) -> Tensor:
        return images


class _Wider(_StatedMean):
    reach = Reach(2, stride=4)


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (_Mean, r"_Mean with padding_mode='zeros' must state reach and exact_for, and is treated as 'none'\."),
        (
            _WholeGrid,
            r"_WholeGrid .* states exact_for='stride', but it is not equivariant at shift .* padding",
        ),
        (_Integer, "_Integer .* states exact_for='integer', but it is"),
        (_Positions, r"_Positions .* states exact_for='interior', but pixels 3 pixels from the border feel it\."),
        (_ThreePixels, r"_ThreePixels .* states a reach of 2 pixels, but it reads 3\."),
        (_Adaptive, r"_Adaptive .* states adaptive=True, but it returns no phase\."),
        (
            _SameSize,
            r"_SameSize .* must turn \(4, 3, 12, 16\) into \(4, 3, 6, 8\), but returns \(4, 3, 12, 16\)\.",
        ),
        (_Wider, r"_Wider .* states a stride of 4, but it must be 2\."),
    ],
)
def test_broken_layers_fail_the_check(factory: object, match: str) -> None:
    """Negative controls: each breaks one promise, which the message names."""
    with pytest.raises(AssertionError, match=match):
        check_downsample(factory)


def test_the_check_leaves_the_random_state_alone() -> None:
    """Weights are drawn from a seed of its own."""
    state = torch.get_rng_state()
    check_downsample(_Padded)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", UPSAMPLERS)
def test_reconstructions_follow_where_tokens_do(kind: str) -> None:
    """Circular decoders: every integer shift with phases, multiples of the stride with any upsampling."""
    down = "polyphase" if kind == "polyphase" else "conv_blur_pool"
    model = model_of(config_of({**CIRCULAR, "downsample": down, "upsample": kind}, channel_multipliers=(1, 1, 2)))
    images = fresh(2, 1, 12, 16)
    for shift in ((4, 8), (1, 0), (3, 6)):
        expected = roll(model(images).reconstruction, *shift)
        error = (model(roll(images, *shift)).reconstruction - expected).abs().max() / expected.abs().max()
        assert (error < TOLERANCE) == (kind == "polyphase" or shift == (4, 8))


def test_tokens_alone_do_not_fix_the_position_below_the_stride() -> None:
    """Negative control: decoded without its phases, an image and its shifts are multiples of the stride apart."""
    model = model_of(config_of(INTEGER, channel_multipliers=(1, 1, 2)))
    images = fresh(1, 1, 12, 16)
    with_phases, without = [], []
    for shift in itertools.product(range(4), range(4)):
        output = model(roll(images, *shift))
        with_phases.append(model.decode(output.codes, output.phases))
        without.append(model.decode(output.codes))
    distinct = [len({tuple(round(v, 6) for v in x.flatten().tolist()) for x in y}) for y in (with_phases, without)]
    assert distinct[0] == 16
    assert distinct[1] < 16
    rolled = [roll(without[0], 4 * i, 4 * j) for i in range(3) for j in range(4)]
    for other in without:
        assert min((other - one).abs().max().item() for one in rolled) < TOLERANCE


def test_ideal_filters_and_polynomials_make_latents_follow_fractions() -> None:
    """Every integer shift of the image is a fractional one of the latents; SiLU, the negative control, is not."""
    options = {"downsample": "fourier", **CIRCULAR, "attention_levels": ()}
    errors = {}
    for activation in ("polynomial", "filtered", "silu"):
        config = config_of({**options, "activation": activation}, channel_multipliers=(1, 1, 2))
        encoder = build_encoder(config).double()
        images = fresh(2, 1, 16, 24)
        latents = encoder(images)
        shifted = encoder(roll(images, 1, 6))
        errors[activation] = ((shifted - fourier_shift(latents, (0.25, 1.5))).norm() / latents.norm()).item()
    assert errors["polynomial"] < 1e-12
    # A filtered SiLU leaves little beyond twice the band: some 1e-4 here, which is still no rounding error.
    assert errors["silu"] > 1e-3
    assert errors["silu"] > errors["filtered"] > 1e-8


def test_training_does_not_lose_the_contract() -> None:
    """Ten steps in float32, then float64: the latents follow every shift still."""
    model = VQAutoencoder(config_of(INTEGER, channel_multipliers=(1, 1, 2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images = fresh(4, 1, 16, 16, dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(10):
        output = model(images)
        optimizer.zero_grad()
        ((output.reconstruction - images).abs().mean() + output.loss).backward()
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    model = model.double().eval()
    for shift in ((1, 0), (5, 11), (-3, 2)):
        assert error_of(model.encoder, images.double(), shift) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_gives_phases_too(dtype: torch.dtype) -> None:
    """The same fields; in float32 the phases are those of float64."""
    model = VQAutoencoder(config_of(INTEGER)).eval()
    images = fresh(4, 1, 12, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        encoding = model.encode_with_phases(images)
    assert encoding.latents.dtype == dtype
    assert (encoding.phases.shape, encoding.phases.dtype) == ((4, 1, 2), torch.int64)
    if dtype == torch.float32:
        assert torch.equal(encoding.phases, model.double().encode_with_phases(images.double()).phases)
