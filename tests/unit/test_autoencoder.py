"""The autoencoder: its shape, its contracts, its equivariance, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from te_quant import FSQ, LFQ, Quantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from te_quant.autoencoder import (
    AutoencoderConfig,
    AutoencoderOutput,
    Encoding,
    VQAutoencoder,
    build_decoder,
    build_encoder,
)
from te_quant.filters import PADDING_MODES
from te_quant.layers import (
    ACTIVATIONS,
    UPSAMPLERS,
    Downsample,
    PaddedConv2d,
    PolyphaseUpsample2d,
    ResidualBlock,
    SelfAttention2d,
)
from te_quant.layers.downsample import BlurPool2d, MaxBlurPool
from te_quant.quantizers import QUANTIZERS, Rows
from tests.helpers import plain_quantizer, plain_residual
from tests.unit.grid_oracles import fresh, roll

# These two have layers that replicate the border whatever they are told.
REPLICATING = ("unpadded_max_blur_pool", "conv_replicate_blur_pool")
PADDED_AS_TOLD = tuple(kind for kind in get_args(Downsample) if kind not in REPLICATING)
SMALL = AutoencoderConfig(
    image_channels=1, base_channels=4, norm_groups=2, num_codes=8, code_dim=6, orthogonal_reg=10.0
)


def small(**options: object) -> AutoencoderConfig:
    if options.get("downsample") == "polyphase":
        options = {"upsample": "polyphase", **options}
    return dataclasses.replace(SMALL, **options)


def conv(i: int, o: int, k: int = 3) -> int:
    return i * o * k * k + o


def residual(i: int, o: int) -> int:
    return 2 * i + conv(i, o) + 2 * o + conv(o, o) + (conv(i, o, 1) if i != o else 0)


def attention(c: int) -> int:
    return 2 * c + 4 * conv(c, c, 1)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_networks_are_by_default_the_papers() -> None:
    """Width 128, 1-2-2, attention at stride 4, 256-d codes, replicate before and zeros behind the quantizer."""
    config = AutoencoderConfig()
    assert (config.base_channels, config.channel_multipliers, config.attention_levels) == (128, (1, 2, 2), (2,))
    assert (config.code_dim, config.num_codes) == (256, 256)
    assert (config.downsample, config.encoder_padding, config.decoder_padding) == (
        "strided_conv",
        "replicate",
        "zeros",
    )
    assert (config.stride, config.divisor) == (4, 4)


@pytest.mark.parametrize("multipliers", [(1,), (2, 1), (1, 2, 2), (1, 1, 1, 1)])
def test_stride_follows_from_the_levels(multipliers: tuple[int, ...]) -> None:
    """L levels halve the sides L - 1 times, and the decoder doubles them as often."""
    config = small(channel_multipliers=multipliers, attention_levels=())
    side = config.stride * 2
    latents = build_encoder(config)(fresh(2, 1, side, 2 * side, dtype=torch.float32))
    assert config.stride == 2 ** (len(multipliers) - 1)
    assert latents.shape == (2, 6, 2, 4)
    assert build_decoder(config)(latents).shape == (2, 1, side, 2 * side)


def test_number_of_parameters_is_what_the_structure_says() -> None:
    """Counted by hand for widths 4, 8, 12, two residual blocks a level and attention on the last."""
    config = small(channel_multipliers=(1, 2, 3), num_res_blocks=2, codebook_update="gradient")
    middle = 2 * residual(12, 12) + attention(12)
    expected = conv(1, 4) + conv(12, 6) + 2 * 12 + conv(6, 6, 1) + middle
    expected += 2 * residual(4, 4) + conv(4, 4)
    expected += residual(4, 8) + residual(8, 8) + conv(8, 8)
    expected += residual(8, 12) + residual(12, 12) + 2 * attention(12)
    assert count(build_encoder(config)) == expected
    expected = conv(6, 6, 1) + conv(6, 12) + middle + 2 * 4 + conv(4, 1)
    expected += 3 * residual(12, 12) + 3 * attention(12) + conv(12, 12)
    expected += residual(12, 8) + 2 * residual(8, 8) + conv(8, 8)
    expected += residual(8, 4) + 2 * residual(4, 4)
    assert count(build_decoder(config)) == expected
    assert count(VQAutoencoder(config)) == expected + count(build_encoder(config)) + 8 * 6


def test_published_width_has_the_known_size() -> None:
    """At width 128 the two halves have 6,683,264 and 10,489,859 parameters, counted from the structure."""
    config = AutoencoderConfig()
    with torch.device("meta"):
        encoder, decoder = build_encoder(config), build_decoder(config)
    middle = 2 * residual(256, 256) + attention(256)
    expected = conv(3, 128) + residual(128, 128) + conv(128, 128) + residual(128, 256) + conv(256, 256)
    expected += residual(256, 256) + attention(256) + middle + 512 + conv(256, 256) + conv(256, 256, 1)
    assert count(encoder) == expected == 6_683_264
    expected = conv(256, 256, 1) + conv(256, 256) + middle + 2 * (residual(256, 256) + attention(256))
    expected += conv(256, 256) + 2 * residual(256, 256) + conv(256, 256)
    expected += residual(256, 128) + residual(128, 128) + 256 + conv(128, 3)
    assert count(decoder) == expected == 10_489_859


def test_no_attention_level_means_no_attention_at_all() -> None:
    """The middle goes without it too, so that such a model sees only its receptive field."""
    model = VQAutoencoder(small(attention_levels=()))
    assert not [m for m in model.modules() if isinstance(m, SelfAttention2d)]
    everywhere = VQAutoencoder(small(attention_levels=(0, 1, 2)))
    blocks = [m for m in everywhere.modules() if isinstance(m, ResidualBlock)]
    assert len([m for m in everywhere.modules() if isinstance(m, SelfAttention2d)]) == len(blocks) - 2


def test_attention_false_is_a_model_without_attention() -> None:
    """One word for ``attention_levels=()``: an equal config, for any number of levels; True changes nothing."""
    options = {
        "downsample": "polyphase",
        "upsample": "polyphase",
        "encoder_padding": "circular",
        "norm": "channel",
    }
    config = AutoencoderConfig(**options, base_channels=8, code_dim=8, attention=False)
    assert config == AutoencoderConfig(**options, base_channels=8, code_dim=8, attention_levels=())
    assert config.attention_levels == ()
    assert not [m for m in VQAutoencoder(config).modules() if isinstance(m, SelfAttention2d)]
    assert AutoencoderConfig(attention=False, channel_multipliers=(1,)).attention_levels == ()
    assert AutoencoderConfig(attention=False, attention_levels=()).attention_levels == ()
    assert AutoencoderConfig(attention=True) == AutoencoderConfig(attention=None) == AutoencoderConfig()
    assert AutoencoderConfig(attention=True, attention_levels=(0, 1)).attention_levels == (0, 1)
    assert [m for m in build_encoder(small(attention=True)).modules() if isinstance(m, SelfAttention2d)]


def test_attention_is_an_argument_and_not_an_option_to_store() -> None:
    """Saved configs keep one spelling, old ones load, and replaced levels need no second word."""
    config = AutoencoderConfig(attention=False)
    stored = json.loads(json.dumps(config.to_dict()))
    assert "attention" not in stored
    assert stored["attention_levels"] == []
    assert AutoencoderConfig.from_dict(stored) == config
    assert AutoencoderConfig.from_dict({"attention": False}) == config
    assert hash(AutoencoderConfig.from_dict({"attention": False})) == hash(config)
    assert dataclasses.replace(config, attention_levels=(1,)).attention_levels == (1,)
    assert dataclasses.replace(AutoencoderConfig(), attention_levels=()) == config
    assert dataclasses.replace(AutoencoderConfig(), attention=False) == config
    with pytest.raises(
        ValueError, match=r"attention must be True or None with attention_levels=\(1,\), got False"
    ):
        dataclasses.replace(AutoencoderConfig(attention_levels=(1,)), attention=False)


def attentions(half: torch.nn.Module) -> set[str]:
    return {name for name, module in half.named_modules() if isinstance(module, SelfAttention2d)}


@pytest.mark.parametrize(
    ("options", "encoder", "decoder"),
    [
        ({"attention_levels": (), "middle_attention": True}, {"middle.attention"}, {"middle.attention"}),
        (
            {"attention_levels": (0,), "middle_attention": False},
            {"levels.0.attention0"},
            {"levels.2.attention0", "levels.2.attention1"},
        ),
        ({"attention": True, "attention_levels": (), "middle_attention": True}, *[{"middle.attention"}] * 2),
        ({"attention": False, "middle_attention": False}, set(), set()),
    ],
)
def test_attention_in_the_middle_is_independent_of_the_levels(
    options: dict, encoder: set[str], decoder: set[str]
) -> None:
    """Both halves follow the option, and a file keeps it."""
    config = small(**options)
    assert attentions(build_encoder(config)) == encoder
    assert attentions(build_decoder(config)) == decoder
    assert config.has_middle_attention == ("middle.attention" in encoder)
    assert AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_channels_around_the_quantizer_may_differ_from_the_codes() -> None:
    """1x1 convolutions map between; latents and codes keep C."""
    config = small(z_channels=10)
    model = VQAutoencoder(config)
    assert (model.encoder.to_latents.in_channels, model.encoder.to_latents.out_channels) == (10, 6)
    assert (model.decoder.from_codes.in_channels, model.decoder.from_codes.out_channels) == (6, 10)
    output = model(fresh(1, 1, 8, 8, dtype=torch.float32))
    assert output.latents.shape == output.codes.shape == (1, 6, 2, 2)
    assert AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # Counted: two 3x3 and two 1x1 convolutions are wider than with z_channels = C.
    wider = conv(8, 10) + conv(10, 6, 1) + conv(6, 10, 1) + conv(10, 8)
    same = 2 * conv(6, 6, 1) + conv(8, 6) + conv(6, 8)
    assert count(model) - count(VQAutoencoder(small())) == wider - same


def test_widths_are_those_of_the_levels() -> None:
    """Of the encoder, and of the decoder where they differ; the first convolution has the base width."""
    config = AutoencoderConfig(widths=(12, 16), decoder_widths=(20, 8), num_codes=8, code_dim=4)
    assert (config.base_channels, config.channel_multipliers, config.norm_groups) == (12, (), 4)
    assert (config.stride, config.attention_levels) == (2, (1,))
    model = VQAutoencoder(config)
    assert [level.block0.conv2.out_channels for level in model.encoder.levels] == [12, 16]
    assert [level.block0.conv2.out_channels for level in model.decoder.levels] == [8, 20]
    assert (model.encoder.conv_in.out_channels, model.decoder.conv_in.out_channels) == (12, 8)
    assert model(fresh(1, 3, 4, 4, dtype=torch.float32)).reconstruction.shape == (1, 3, 4, 4)
    own = dataclasses.replace(config, base_channels=4)
    assert build_encoder(own).conv_in.out_channels == 4


@pytest.mark.parametrize(
    "options",
    [{"widths": (12, 16)}, {"decoder_widths": (8, 16, 32)}, {"widths": (6, 4), "decoder_widths": (4, 6)}],
)
def test_configs_with_widths_are_stored(options: dict) -> None:
    """Only what was given is written, and it comes back equal."""
    config = AutoencoderConfig(**options, code_dim=4)
    stored = json.loads(json.dumps(config.to_dict()))
    assert {"widths", "decoder_widths"} & stored.keys() == options.keys()
    assert ("channel_multipliers" in stored) == ("widths" not in options)
    assert AutoencoderConfig.from_dict(stored) == config == pickle.loads(pickle.dumps(config))
    assert hash(AutoencoderConfig.from_dict(stored)) == hash(config)
    assert dataclasses.replace(config, code_dim=8).widths == config.widths


def test_widths_follow_from_multipliers() -> None:
    """The default spelling builds the same network, and its files look as they always have."""
    config = AutoencoderConfig(base_channels=4, channel_multipliers=(1, 3))
    assert config.widths == config.decoder_widths == (4, 12)
    absent = {"widths", "decoder_widths", "middle_attention", "z_channels", "quantizer"}
    assert not absent & config.to_dict().keys()
    assert dataclasses.replace(config, base_channels=2).widths == (2, 6)
    spelled = AutoencoderConfig(widths=(4, 12), norm_groups=config.norm_groups)
    shapes = [
        {name: tensor.shape for name, tensor in build_encoder(each).state_dict().items()}
        for each in (config, spelled)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"widths": ()}, ValueError, r"widths must be at least one int, got \(\)"),
        ({"widths": (0, 8)}, ValueError, "widths entry must be an int >= 1, got 0"),
        ({"widths": 8}, TypeError, "widths must be a sequence of ints, got 8"),
        (
            {"widths": (8, 8), "channel_multipliers": (1, 1)},
            ValueError,
            r"channel_multipliers must be left out with widths=\(8, 8\), got \(1, 1\)",
        ),
        ({"decoder_widths": (8, 8)}, ValueError, r"decoder_widths must be 3 ints, one per level, got \(8, 8\)"),
        ({"widths": (8, 12), "norm_groups": 8}, ValueError, r"norm_groups must be a divisor of widths=\(8, 12\)"),
        (
            {"decoder_widths": (8, 8, 9), "norm_groups": 8},
            ValueError,
            r"norm_groups must be a divisor of decoder_widths=\(8, 8, 9\), got 8",
        ),
        ({"widths": (8, 1), "norm": "channel"}, ValueError, "widths must be at least 2 for norm='channel', got"),
        ({"z_channels": 0}, ValueError, "z_channels must be an int >= 1, got 0"),
        ({"middle_attention": 1}, TypeError, "middle_attention must be True, False or None, got 1"),
        (
            {"attention": False, "middle_attention": True},
            ValueError,
            r"attention must be True or None with attention_levels=\(\) and middle_attention=True, got False",
        ),
    ],
)
def test_widths_and_middles_that_cannot_be_are_refused(options: dict, error: type[Exception], match: str) -> None:
    """By the name of an option that was given."""
    with pytest.raises(error, match=match):
        AutoencoderConfig(**options)


@pytest.mark.parametrize(
    ("options", "levels", "groups"),
    [
        ({}, (2,), 32),
        ({"channel_multipliers": (1, 2)}, (1,), 32),
        ({"channel_multipliers": (1,)}, (0,), 32),
        ({"channel_multipliers": (1, 1, 2, 2)}, (3,), 32),
        ({"base_channels": 16}, (2,), 16),
        ({"base_channels": 96}, (2,), 32),
        ({"base_channels": 20}, (2,), 4),
        ({"base_channels": 7}, (2,), 1),
        ({"base_channels": 16, "norm": "channel"}, (2,), 32),
        ({"base_channels": 16, "norm_groups": 8, "attention_levels": (0,)}, (0,), 8),
    ],
)
def test_defaults_adapt_to_what_is_given(options: dict, levels: tuple[int, ...], groups: int) -> None:
    """The coarsest level, and groups that divide the width; given values stay. `replace` adapts them again."""
    config = AutoencoderConfig(**options)
    assert (config.attention_levels, config.norm_groups) == (levels, groups)
    assert config == AutoencoderConfig(**{**options, "attention_levels": levels, "norm_groups": groups})
    assert dataclasses.replace(AutoencoderConfig(), **options) == config
    assert AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert f"attention_levels={levels}, " in repr(config)
    assert f"norm_groups={groups}, " in repr(config)


def test_small_configs_build() -> None:
    """With the defaults that have adapted, forward and all."""
    for options in ({"channel_multipliers": (1, 2), "base_channels": 16}, {"base_channels": 6}):
        model = VQAutoencoder(AutoencoderConfig(**options, num_codes=8, code_dim=4))
        images = fresh(1, 3, 8, 8, dtype=torch.float32)
        assert model(images).reconstruction.shape == images.shape


OPTIONS = {
    "base_channels": 12,
    "channel_multipliers": (1, 2),
    "norm": "channel",
    "norm_groups": 5,
    "downsample": "polyphase",
    "upsample": "polyphase",
    "activation": "polynomial",
    "encoder_padding": "circular",
    "decoder_padding": "circular",
    "attention": False,
    "attention_levels": (2,),
    "widths": (12, 20),
    "decoder_widths": (10, 14),
    "middle_attention": True,
}


def blamed(names: tuple[str, ...]) -> str | None:
    """The option that the refusal of these options names first, or None if they are accepted."""
    try:
        AutoencoderConfig(**{name: OPTIONS[name] for name in names})
    except ValueError as error:
        return str(error).split(" ")[0]
    return None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_error_blames_an_option_that_was_not_given(count: int) -> None:
    """Every set of up to three options that are far from the defaults; most are accepted, some refused."""
    sets = list(itertools.combinations(OPTIONS, count))
    refused = [names for names in sets if blamed(names) is not None]
    assert 0 < len(refused) < len(sets)
    assert [names for names in refused if blamed(names) not in names] == []


@pytest.mark.parametrize("kind", PADDED_AS_TOLD)
def test_padding_modes_reach_every_layer_of_their_half(kind: str) -> None:
    """No convolution, blur or pool keeps a mode of its own."""
    model = VQAutoencoder(small(encoder_padding="circular", decoder_padding="reflect", downsample=kind))
    for half, mode in ((model.encoder, "circular"), (model.decoder, "reflect")):
        convolutions = [m for m in half.modules() if isinstance(m, PaddedConv2d)]
        assert len(convolutions) > 10
        blurs = [m for m in half.modules() if isinstance(m, BlurPool2d | PolyphaseUpsample2d)]
        assert {m.padding_mode for m in convolutions + blurs} == {mode}
        assert {m.pool_mode for m in half.modules() if isinstance(m, MaxBlurPool)} <= {mode}


def test_two_downsamplings_replicate_the_border_whatever_they_are_told() -> None:
    """As the paper's code does; only the convolution in front of the blur pads with zeros."""
    for kind, convolved in zip(REPLICATING, (set(), {"zeros"}), strict=True):
        encoder = build_encoder(small(encoder_padding="zeros", downsample=kind))
        layers = [level.downsample for level in encoder.levels[:-1]]
        assert {layer.blur.padding_mode for layer in layers} == {"replicate"}
        assert {layer.conv.padding_mode for layer in layers if hasattr(layer, "conv")} == convolved
        assert encoder.conv_in.padding_mode == "zeros"


@pytest.mark.parametrize("kind", PADDED_AS_TOLD)
def test_circular_encoder_commutes_with_stride_multiples(kind: str) -> None:
    """Latents move with the image, attention and GroupNorm included; so do the tokens."""
    model = VQAutoencoder(small(encoder_padding="circular", downsample=kind)).double().eval()
    images = fresh(2, 1, 16, 24)
    latents, tokens = model.encode(images), model.encode_to_indices(images)
    for k in ((1, 0), (0, 1), (3, 5)):
        shifted = roll(images, 4 * k[0], 4 * k[1])
        torch.testing.assert_close(model.encode(shifted), roll(latents, *k), rtol=0, atol=1e-11)
        assert torch.equal(model.encode_to_indices(shifted), roll(tokens, *k))


@pytest.mark.parametrize(("mode", "shift"), [("zeros", 4), ("replicate", 4), ("reflect", 4), ("circular", 1)])
def test_other_paddings_and_smaller_shifts_break_it(mode: str, shift: int) -> None:
    """Negative control: what lies at the border, or between the kept pixels, shows."""
    encoder = build_encoder(small(encoder_padding=mode)).double()
    images = fresh(2, 1, 16, 16)
    shifted, latents = encoder(roll(images, shift, shift)), encoder(images)
    for k in (0, 1):
        assert (shifted - roll(latents, k, k)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_only_circular_decoders_commute_with_token_shifts(mode: str) -> None:
    """One token is four pixels behind the decoder."""
    decoder = build_decoder(small(decoder_padding=mode)).double()
    codes = fresh(2, 6, 4, 5)
    error = (decoder(roll(codes, 1, 2)) - roll(decoder(codes), 4, 8)).abs().max()
    assert (error < 1e-11) == (mode == "circular")


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"codebook_update": "ema"}])
@pytest.mark.parametrize("sides", [(16, 8), (4, 4)])
@pytest.mark.parametrize("batch", [3, 1])
def test_tokens_decode_to_the_reconstruction(options: dict, sides: tuple[int, int], batch: int) -> None:
    """Bit for bit: decode_indices(indices), decode(codes) and, in evaluation, the reconstruction."""
    model = VQAutoencoder(small(**options))
    images = fresh(batch, 1, *sides, dtype=torch.float32)
    for training in (True, False):
        output = model.train(training)(images)
        assert torch.equal(model.decode_indices(output.indices), model.decode(output.codes))
    assert torch.equal(output.reconstruction, model.decode(output.codes))
    assert torch.equal(output.indices, model.encode_to_indices(images))
    assert torch.equal(output.latents, model.encode(images))


@pytest.mark.parametrize("sides", [(4, 4), (1, 1)])
def test_decoding_does_not_depend_on_the_strides_of_the_codes(sides: tuple[int, int]) -> None:
    """Equal codes give bit-equal images, however they lie in memory."""
    decoder = build_decoder(small(base_channels=32, code_dim=64)).eval()
    codes = fresh(2, 64, *sides, dtype=torch.float32)
    last = torch.empty(2, *sides, 64).copy_(codes.movedim(1, -1)).movedim(-1, 1)
    assert codes.stride() != last.stride()
    assert torch.equal(decoder(last), decoder(codes))


@pytest.mark.parametrize("downsample", ["polyphase", "strided_conv"])
@pytest.mark.parametrize("training", [True, False])
def test_phases_travel_to_the_decoder(downsample: str, training: bool) -> None:
    """Out of the encoder, into the output, and decoding takes them; without them it is the phase of zero."""
    model = VQAutoencoder(small(downsample=downsample)).train(training)
    images = fresh(8, 1, 8, 12, dtype=torch.float32)
    output, encoding = model(images), model.encode_with_phases(images)
    assert isinstance(encoding, Encoding)
    assert torch.equal(encoding.latents, model.encode(images))
    assert torch.equal(encoding.phases, output.phases)
    assert (output.phases.shape, output.phases.dtype) == ((8, 2, 2), torch.int64)
    assert bool(output.phases.any()) == (downsample == "polyphase")
    decoded = model.decode(output.codes, output.phases)
    assert torch.equal(model.decode_indices(output.indices, output.phases), decoded)
    torch.testing.assert_close(output.reconstruction, decoded)
    canonical = model.decode(output.codes)
    assert torch.equal(canonical, model.decode(output.codes, torch.zeros_like(output.phases)))
    assert torch.equal(canonical, model.decode_indices(output.indices))
    same = (canonical == decoded).flatten(1).all(1)
    assert torch.equal(same, ~output.phases.flatten(1).any(1))


@pytest.mark.parametrize("wrap", [lambda part: part, lambda part: torch.compile(part, backend="eager")])
def test_hooks_of_the_encoder_see_every_way_of_encoding(wrap: Callable[..., torch.nn.Module]) -> None:
    """As do a compiled or a wrapped encoder: all go through one call."""
    model = VQAutoencoder(small(downsample="polyphase"))
    inner, seen = model.encoder, []
    model.encoder = wrap(inner)
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    uses = [model, model.encode, model.encode_with_phases, model.encode_to_indices]
    for use in [*uses, model.encoder.with_phases] if model.encoder is inner else uses:
        use(images)
    assert len(seen) == (5 if model.encoder is inner else 4)


def test_phases_that_are_no_tensor_are_refused() -> None:
    """Before their values are looked at."""
    model = VQAutoencoder(SMALL)
    with pytest.raises(TypeError, match="phases must be a tensor, got list"):
        model.decode(torch.zeros(2, SMALL.code_dim, 2, 2), [[[0, 0]]])


@pytest.mark.parametrize("method", ["decode", "decode_indices"])
@pytest.mark.parametrize(
    ("phases", "error", "match"),
    [
        (
            torch.zeros(2, 2, dtype=torch.int64),
            ValueError,
            r"phases must be of shape \(B, 2, 2\), got shape \(2, 2\)",
        ),
        (torch.zeros(3, 2, 2, dtype=torch.int64), ValueError, "phases axis 0 must be B=2, got 3"),
        (torch.zeros(2, 1, 2, dtype=torch.int64), ValueError, "phases axis 1 must be L=2, got 1"),
        (torch.zeros(2, 2, 3, dtype=torch.int64), ValueError, "phases axis 2 must be 2=2, got 3"),
        (torch.zeros(2, 2, 2), TypeError, "phases must be an integer tensor, got torch.float32"),
        (torch.full((2, 2, 2), -1), ValueError, r"phases must be in \[0, .*=2\), got -1"),
        (torch.full((2, 2, 2), 2), ValueError, r"phases must be in \[0, .*=2\), got 2"),
    ],
)
def test_phases_that_do_not_fit_are_refused(
    method: str, phases: Tensor, error: type[Exception], match: str
) -> None:
    """Shape, kind and range."""
    model = VQAutoencoder(small(downsample="polyphase"))
    grid = images_of(2, 6, 2, 3) if method == "decode" else torch.zeros(2, 2, 3).long()
    with pytest.raises(error, match=match):
        getattr(model, method)(grid, phases)


def test_a_decoder_without_polyphase_layers_takes_no_phase_but_zero() -> None:
    """Any other would be ignored."""
    with pytest.raises(ValueError, match=r"phases must be in \[0, .*=1\), got 1"):
        VQAutoencoder(SMALL).decode(images_of(2, 6, 2, 3), torch.ones(2, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("kind", UPSAMPLERS)
def test_every_decoder_doubles_and_learns(kind: str) -> None:
    """With each of the activations and both norms: the shape of the images, and no weight without a gradient."""
    for activation in ACTIVATIONS:
        config = small(
            downsample="polyphase" if kind == "polyphase" else "conv_blur_pool",
            upsample=kind,
            norm="channel",
            activation=activation,
            encoder_padding="circular",
            decoder_padding="circular",
        )
        model = VQAutoencoder(config)
        images = fresh(2, 1, 8, 12, dtype=torch.float32)
        output = model(images)
        assert output.reconstruction.shape == images.shape
        ((output.reconstruction - images).square().mean() + output.loss).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_output_has_the_same_fields_in_training_and_evaluation() -> None:
    """Shapes and dtypes too; the loss is the sum of its terms."""
    model = VQAutoencoder(SMALL)
    images = fresh(2, 1, 8, 12, dtype=torch.float32)
    for training in (True, False):
        output = model.train(training)(images)
        assert isinstance(output, AutoencoderOutput)
        assert output.reconstruction.shape == images.shape
        assert output.quantized.shape == output.codes.shape == output.latents.shape == (2, 6, 2, 3)
        assert output.indices.shape == (2, 2, 3)
        assert output.indices.dtype == torch.int64
        terms = output.codebook_loss + output.commitment_loss + output.regularization_loss
        torch.testing.assert_close(output.loss, terms)
        assert output.regularization_loss > 0


def test_every_weight_learns() -> None:
    """Reconstruction and quantizer loss together reach every parameter, through the quantizer."""
    model = VQAutoencoder(small(codebook_update="gradient"))
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    output = model(images)
    # Not the absolute error: as many pixels above as below would cancel exactly.
    ((output.reconstruction - images).square().mean() + output.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_encoding_to_tokens_needs_no_gradient_and_changes_nothing() -> None:
    """Training mode with moving averages is where it could."""
    model = VQAutoencoder(small(codebook_update="ema")).train()
    before = copy.deepcopy(model.state_dict())
    images = fresh(2, 1, 8, 8, dtype=torch.float32).requires_grad_()
    assert not model.encode_to_indices(images).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(images)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_empty_batch_gives_empty_results() -> None:
    """All shapes but the first axis stay."""
    output = VQAutoencoder(SMALL)(fresh(0, 1, 8, 8, dtype=torch.float32))
    assert output.reconstruction.shape == (0, 1, 8, 8)
    assert output.indices.shape == (0, 2, 2)
    assert output.loss.isfinite()


@pytest.mark.parametrize(
    "options", [{"downsample": "conv_blur_pool"}, {"downsample": "polyphase", "norm": "channel"}]
)
def test_compiles_as_one_graph_with_the_same_result(options: dict) -> None:
    """torch.compile finds nothing to break at, in the training pass with every kind of layer in it."""
    config = small(attention_levels=(1,), channel_multipliers=(1, 1), **options)
    model = VQAutoencoder(config)
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    for got, expected in zip(compiled(images), model(images), strict=True):
        torch.testing.assert_close(got, expected)
    decode = torch.compile(model.decode_indices, fullgraph=True, backend="eager")
    output = model.eval()(images)
    torch.testing.assert_close(decode(output.indices, output.phases), model.decode(output.codes, output.phases))


def test_autocast_computes_in_bfloat16_and_keeps_the_contract() -> None:
    """Half precision in the convolutions, float32 in the quantizer."""
    model = VQAutoencoder(SMALL).eval()
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
        assert torch.equal(model.decode_indices(output.indices), model.decode(output.codes))
    assert output.reconstruction.dtype == output.latents.dtype == torch.bfloat16
    assert output.codes.dtype == torch.float32
    assert (output.reconstruction - model.decode(output.codes)).abs().max() < 0.2


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_behave_the_same(twin: object) -> None:
    """Nothing in the model refers to something outside it."""
    model = VQAutoencoder(SMALL).eval()
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    assert torch.equal(twin(model)(images).reconstruction, model(images).reconstruction)


def test_state_dict_carries_everything_to_another_model() -> None:
    """Two models of one config agree after loading, not before."""
    model, other = VQAutoencoder(SMALL).eval(), VQAutoencoder(SMALL).eval()
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    assert not torch.equal(other(images).reconstruction, model(images).reconstruction)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images).reconstruction, model(images).reconstruction)


def images_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("method", ["forward", "encode", "encode_to_indices"])
@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (
            images_of(2, 1, 10, 8),
            ValueError,
            r"images sides must be positive multiples of the divisor 4, got .*10, 8",
        ),
        (
            images_of(2, 1, 8, 6),
            ValueError,
            r"images sides must be positive multiples of the divisor 4, got .*8, 6",
        ),
        (
            images_of(2, 1, 0, 8),
            ValueError,
            r"images sides must be positive multiples of the divisor 4, got .*0, 8",
        ),
        (
            images_of(2, 1, 8, 0),
            ValueError,
            r"images sides must be positive multiples of the divisor 4, got .*8, 0",
        ),
        (
            images_of(2, 3, 8, 8),
            ValueError,
            r"images axis 1 must be image_channels=1, got 3 \(images shape \(2, 3",
        ),
        (images_of(1, 8, 8), ValueError, r"images must be of shape \(B, 1, H, W\), got shape \(1, 8, 8\)"),
        (images_of(2, 1, 8, 8, dtype=torch.uint8), TypeError, r"images must be floating point, got torch.uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    method: str, images: Tensor, error: type[Exception], match: str
) -> None:
    """Sides, channels, rank and dtype, each by name."""
    with pytest.raises(error, match=match):
        getattr(VQAutoencoder(SMALL), method)(images)


@pytest.mark.parametrize("kind", [kind for kind in get_args(Downsample) if kind != "fourier"])
@pytest.mark.parametrize("levels", [(1,), (1, 1), (1, 1, 2)])
@pytest.mark.parametrize("strides", [(1, 3), (2, 1)])
def test_images_too_small_to_reflect_are_refused_by_the_encoder(
    kind: str, levels: tuple[int, ...], strides: tuple[int, int]
) -> None:
    """A sentence about the images, not of a layer inside; twice the stride is enough, other modes need less."""
    options = {"channel_multipliers": levels, "downsample": kind, "attention_levels": ()}
    encoder = build_encoder(small(**options, encoder_padding="reflect"))
    stride = encoder.config.stride
    assert encoder(images_of(1, 1, 2 * stride, 2 * stride)).shape[-2:] == (2, 2)
    height, width = (stride * number for number in strides)
    expected = f"images sides must be at least {2 * stride} for encoder_padding='reflect', got images shape "
    with pytest.raises(ValueError, match=expected + rf"\(1, 1, {height}, {width}\)\.$"):
        encoder(images_of(1, 1, height, width))
    build_encoder(small(**options, encoder_padding="replicate"))(images_of(1, 1, height, width))


@pytest.mark.parametrize("kind", [kind for kind in UPSAMPLERS if kind != "fourier"])
def test_codes_too_few_to_reflect_are_refused_by_the_decoder(kind: str) -> None:
    """The same behind the quantizer: a grid of 2x2 is enough."""
    sampling = {"upsample": kind, "downsample": "polyphase" if kind == "polyphase" else "max_pool"}
    decoder = build_decoder(small(**sampling, decoder_padding="reflect"))
    assert decoder(images_of(1, 6, 2, 2)).shape == (1, 1, 8, 8)
    expected = r"codes sides must be at least 2 for decoder_padding='reflect', got codes shape \(1, 6, 1, 3\)\.$"
    with pytest.raises(ValueError, match=expected):
        decoder(images_of(1, 6, 1, 3))
    build_decoder(small(**sampling, decoder_padding="zeros"))(images_of(1, 6, 1, 3))


@pytest.mark.parametrize(
    ("codes", "error", "match"),
    [
        (images_of(2, 5, 2, 2), ValueError, r"codes axis 1 must be code_dim=6, got 5"),
        (images_of(6, 2, 2), ValueError, r"codes must be of shape \(B, 6, h, w\), got shape \(6, 2, 2\)"),
        (images_of(2, 6, 2, 2, dtype=torch.int64), TypeError, "codes must be floating point, got torch.int64"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: Tensor, error: type[Exception], match: str) -> None:
    """Tokens passed in place of codes are the likely mistake."""
    with pytest.raises(error, match=match):
        VQAutoencoder(SMALL).decode(codes)


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        (
            torch.zeros(2, 4, dtype=torch.int64),
            ValueError,
            r"indices must be of shape \(B, h, w\), got shape \(2, 4\)",
        ),
        (torch.zeros(2, 2, 2), TypeError, "indices must be an integer tensor"),
        (torch.full((1, 2, 2), -2), ValueError, r"indices must be in \[-1, num_codes=8\), got -2"),
        (torch.full((1, 2, 2), 8), ValueError, r"indices must be in \[-1, num_codes=8\), got 8"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(indices: Tensor, error: type[Exception], match: str) -> None:
    """A row of tokens has lost its grid; -2 and K are no codes."""
    with pytest.raises(error, match=match):
        VQAutoencoder(SMALL).decode_indices(indices)


@pytest.mark.parametrize("name", ["image_channels", "base_channels", "num_res_blocks", "norm_groups"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_config_refuses_counts_that_are_none(name: str, value: object, error: type[Exception]) -> None:
    """Ints of at least one."""
    with pytest.raises(error, match=f"{name} must be an int >= 1, got {value}"):
        AutoencoderConfig(**{name: value})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"norm_groups": 3}, ValueError, "norm_groups must be a divisor of base_channels=128, got 3"),
        ({"channel_multipliers": ()}, ValueError, "channel_multipliers must be at least one int, got"),
        ({"channel_multipliers": (1, 0, 1)}, ValueError, "channel_multipliers entry must be an int >= 1, got 0"),
        ({"channel_multipliers": "122"}, TypeError, "channel_multipliers must be a sequence of ints, got '122'"),
        ({"channel_multipliers": 3}, TypeError, "channel_multipliers must be a sequence of ints, got 3"),
        ({"attention_levels": (3,)}, ValueError, "attention_levels entry must be an int >= 0 and <= 2, got 3"),
        ({"attention_levels": (-1,)}, ValueError, "attention_levels entry must be an int >= 0 and <= 2, got -1"),
        ({"attention_levels": (1, 1)}, ValueError, r"attention_levels must be without repetition, got \(1, 1\)"),
        (
            {"attention": False, "attention_levels": (2,)},
            ValueError,
            r"attention must be True or None with attention_levels=\(2,\), got False",
        ),
        (
            {"attention": True, "attention_levels": ()},
            ValueError,
            r"attention must be False or None with attention_levels=\(\), got True",
        ),
        ({"attention": 0}, TypeError, "attention must be True, False or None, got 0"),
        (
            {"attention": True, "attention_levels": 2},
            TypeError,
            "attention_levels must be a sequence of ints, got 2",
        ),
        ({"downsample": "stride"}, ValueError, r"downsample must be one of 'strided_conv', .*got 'stride'"),
        ({"upsample": "bilinear"}, ValueError, r"upsample must be one of 'nearest', .*got 'bilinear'"),
        ({"norm": "batch"}, ValueError, r"norm must be one of 'group', 'channel', got 'batch'"),
        ({"norm": "channel", "base_channels": 1}, ValueError, "base_channels must be at least 2 .*, got 1"),
        ({"activation": "relu"}, ValueError, r"activation must be one of 'silu', .*got 'relu'"),
        (
            {"downsample": "polyphase"},
            ValueError,
            "downsample must be used with an adaptive upsample such as 'polyphase', "
            "got 'polyphase' with upsample='nearest'",
        ),
        (
            {"upsample": "polyphase"},
            ValueError,
            "upsample must be used with an adaptive downsample such as 'polyphase', "
            "got 'polyphase' with downsample='strided_conv'",
        ),
        (
            {"downsample": "fourier"},
            ValueError,
            "downsample must be used with encoder_padding='circular', "
            "got 'fourier' with encoder_padding='replicate'",
        ),
        (
            {"upsample": "fourier"},
            ValueError,
            "upsample must be used with decoder_padding='circular', got 'fourier' with decoder_padding='zeros'",
        ),
        (
            {"activation": "filtered"},
            ValueError,
            "activation must be used with encoder_padding='circular', got 'filtered' with",
        ),
        (
            {"activation": "polynomial", "encoder_padding": "circular"},
            ValueError,
            "activation must be used with decoder_padding='circular', got 'polynomial' with",
        ),
        ({"encoder_padding": "same"}, ValueError, r"encoder_padding must be one of 'zeros', .*got 'same'"),
        ({"decoder_padding": "same"}, ValueError, r"decoder_padding must be one of 'zeros', .*got 'same'"),
        ({"dropout": 1.0}, ValueError, "dropout must be a finite number >= 0 and < 1, got 1.0"),
        ({"num_codes": 0}, ValueError, "num_codes must be an int >= 1, got 0"),
        ({"code_dim": 0}, ValueError, "code_dim must be an int >= 1, got 0"),
        ({"metric": "manhattan"}, ValueError, "metric must be one of 'l2', 'cosine', .*'dot', got 'manhattan'"),
        ({"codebook_update": "sgd"}, ValueError, "codebook_update must be one of 'gradient', 'ema', got 'sgd'"),
        ({"commitment_weight": -1}, ValueError, "commitment_weight must be a finite number >= 0, got -1"),
        ({"decay": 1}, ValueError, "decay must be a finite number >= 0 and < 1, got 1"),
        ({"orthogonal_reg": "10"}, TypeError, "orthogonal_reg must be a finite number >= 0, got '10'"),
        ({"gradient_estimator": "ste"}, ValueError, "gradient_estimator must be one of 'straight_through'"),
    ],
)
def test_config_refuses(options: dict, error: type[Exception], match: str) -> None:
    """Every option out of its range, at construction."""
    with pytest.raises(error, match=match):
        AutoencoderConfig(**options)


def test_config_goes_through_json_and_back() -> None:
    """Equal and hashable again, lists having become tuples."""
    config = small(channel_multipliers=(1, 3), attention_levels=(0, 1), metric="cosine", decay=0.9)
    again = AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert again != SMALL
    assert AutoencoderConfig(channel_multipliers=[1, 2, 2]) == AutoencoderConfig()
    assert AutoencoderConfig.from_dict({}) == AutoencoderConfig()


def test_config_refuses_keys_it_does_not_know() -> None:
    """A misspelt option is no option."""
    with pytest.raises(ValueError, match=r"config key must be one of image_channels, .*, got 'base_chanels'"):
        AutoencoderConfig.from_dict({"base_chanels": 64})


def test_config_options_reach_the_quantizer() -> None:
    """Under the same names."""
    config = small(
        metric="cosine",
        codebook_update="ema",
        commitment_weight=0.5,
        decay=0.8,
        orthogonal_reg=3.0,
        gradient_estimator="rotation_trick",
    )
    quantizer = VQAutoencoder(config).quantizer
    for name in ("num_codes", "code_dim", "metric", "codebook_update", "commitment_weight", "decay"):
        assert getattr(quantizer, name) == getattr(config, name)
    assert quantizer.orthogonal_reg == 3.0
    assert quantizer.gradient_estimator == "rotation_trick"


def test_a_quantizer_option_without_a_field_is_stored() -> None:
    """``codebook_weight`` is described with the quantizer, and comes back from a file."""
    described = {"name": "VectorQuantizer", "codebook_update": "gradient", "codebook_weight": 0.25}
    config = AutoencoderConfig(
        base_channels=8, channel_multipliers=(1, 2), num_codes=8, code_dim=6, quantizer=described
    )
    again = AutoencoderConfig.from_dict(config.to_dict())
    assert again == config
    quantizer = VQAutoencoder(again).quantizer
    assert isinstance(quantizer, VectorQuantizer)
    assert (quantizer.codebook_weight, quantizer.codebook_update) == (0.25, "gradient")


OWN = {
    "vector": lambda: plain_quantizer(8, 6, orthogonal_reg=10.0),
    "ema": lambda: plain_quantizer(8, 6, codebook_update="ema"),
    "sim": lambda: SimVQ(8, 6),
    "fsq": lambda: FSQ((4, 3, 5)),
    "lfq": lambda: LFQ(5),
    "residual": lambda: plain_residual(4, 6, 3),
}


def with_own(name: str, **options: object) -> VQAutoencoder:
    """A model of the config's defaults around a quantizer of ours."""
    quantizer = OWN[name]()
    config = small(num_codes=256, orthogonal_reg=0.0, code_dim=quantizer.code_dim, **options)
    return VQAutoencoder(config, quantizer=quantizer)


@pytest.mark.parametrize("name", OWN)
def test_any_quantizer_takes_the_place(name: str) -> None:
    """Its own indices, which decode to the codes bit for bit, and a gradient to the encoder and to it."""
    model = with_own(name)
    images = fresh(2, 1, 8, 12, dtype=torch.float32)
    output = model(images)
    grid = (2, 2, 3, 3) if name == "residual" else (2, 2, 3)
    assert (output.indices.shape, output.indices.dtype) == (grid, torch.int64)
    assert torch.equal(model.decode_indices(output.indices), model.decode(output.codes))
    (output.reconstruction.square().mean() + output.loss).backward()
    for half in (model.encoder, model.quantizer, model.decoder):
        for parameter in half.parameters():
            assert not parameter.requires_grad or parameter.grad is not None
    assert any(parameter.grad.any() for parameter in model.encoder.parameters())
    output = model.eval()(images)
    assert torch.equal(output.indices, model.encode_to_indices(images))
    assert torch.equal(output.indices, model.quantizer.encode(model.encode(images)))
    assert torch.equal(output.reconstruction, model.decode(output.codes))


def test_coarse_tokens_decode_and_are_not_the_fine_ones() -> None:
    """The first indices of a residual quantizer are a grid of tokens too; the others matter."""
    model = with_own("residual").eval()
    indices = torch.ones(2, 2, 3, 3, dtype=torch.int64)
    coarse, fine = model.decode_indices(indices[..., :1]), model.decode_indices(indices)
    assert coarse.shape == fine.shape == (2, 1, 8, 12)
    assert not torch.equal(coarse, fine)


def test_given_quantizer_decides_and_not_the_config() -> None:
    """Equal weights give equal models, and with another codebook (the negative control) they are not equal."""
    model = VQAutoencoder(small(metric="cosine")).eval()
    same = VQAutoencoder(
        model.config, quantizer=VectorQuantizer(8, 6, metric="cosine", orthogonal_reg=10.0)
    ).eval()
    same.load_state_dict(model.state_dict())
    other = copy.deepcopy(same)
    with torch.no_grad():
        other.quantizer.codebook.neg_()
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    expected, indices = model(images), model.encode_to_indices(images)
    for one, two in zip(expected, same(images), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(same.decode_indices(indices), model.decode_indices(indices))
    assert not torch.equal(other.encode_to_indices(images), indices)
    assert not torch.equal(other.decode_indices(indices), model.decode_indices(indices))


@pytest.mark.parametrize(
    ("quantizer", "options", "error", "match"),
    [
        (
            FSQ((4, 3, 5)),
            {},
            ValueError,
            r"config\.code_dim must be its default 256, or what the given quantizer has \(3, FSQ\), got 6",
        ),
        (torch.nn.Identity(), {}, TypeError, r"quantizer must be a te_quant\.Quantizer, got Identity"),
        ("fsq", {}, TypeError, r"quantizer must be a te_quant\.Quantizer, got str"),
        (SimVQ(8, 6, channel_dim=-1), {}, ValueError, r"quantizer\.channel_dim must be 1, .*, got -1 \(SimVQ\)"),
        (
            SimVQ(8, 6),
            {"orthogonal_reg": 10.0},
            ValueError,
            r"config\.orthogonal_reg must be its default 0\.0, or what .* has \(None, SimVQ\), got 10\.0",
        ),
        (
            SimVQ(9, 6),
            {"num_codes": 8},
            ValueError,
            r"config\.num_codes must be its default 256, or .*\(9, SimVQ\)",
        ),
        (
            plain_quantizer(256, 6),
            {"metric": "cosine"},
            ValueError,
            r"config\.metric must be its default 'l2', or what .* has \('l2', VectorQuantizer\), got 'cosine'",
        ),
        (
            FSQ((4, 3)),
            {"quantizer": {"name": "FSQ", "levels": [3, 4]}, "code_dim": 256},
            ValueError,
            r"quantizer must be the config's \{'name': 'FSQ', 'levels': \[3, 4\]\}, got .*\[4, 3\]",
        ),
    ],
)
def test_quantizers_that_do_not_fit_are_refused(
    quantizer: object, options: dict, error: type[Exception], match: str
) -> None:
    """At construction, and what the config says of a quantizer is not silently ignored."""
    config = small(**{"num_codes": 256, "orthogonal_reg": 0.0, **options})
    with pytest.raises(error, match=match):
        VQAutoencoder(config, quantizer=quantizer)


def test_options_of_a_residual_quantizer_fit_the_config() -> None:
    """A residual quantizer keeps its options, so that a config that says the same accepts it."""
    quantizer = ResidualVectorQuantizer(4, 6, 3, codebook_update="ema", decay=0.5, commitment_weight=0.5)
    config = small(
        num_codes=4, orthogonal_reg=0.0, codebook_update="ema", decay=0.5, commitment_weight=0.5, code_dim=6
    )
    assert VQAutoencoder(config, quantizer=quantizer).config.quantizer == {
        "name": "ResidualVectorQuantizer",
        "num_codes": 4,
        "code_dim": 6,
        "num_quantizers": 3,
        "codebook_update": "ema",
        "decay": 0.5,
        "commitment_weight": 0.5,
    }


@pytest.mark.parametrize(
    ("build", "shape", "match"),
    [
        (
            lambda: with_own("fsq"),
            (2, 2, 3, 2),
            r"indices must be of shape \(B, h, w\), got shape \(2, 2, 3, 2\)",
        ),
        (lambda: with_own("residual"), (2, 6), r"indices must be of shape \(B, h, w, Q\), got shape \(2, 6\)"),
        (
            lambda: VQAutoencoder(SMALL),
            (2, 2, 3, 2),
            r"indices must be of shape \(B, h, w\), got shape \(2, 2, 3, 2\)",
        ),
    ],
    ids=["fsq", "residual", "vector"],
)
def test_grids_of_another_quantizer_are_refused(
    build: Callable[[], VQAutoencoder], shape: tuple[int, ...], match: str
) -> None:
    """Several indices a token where it has one, or a row of tokens."""
    with pytest.raises(ValueError, match=match):
        build().decode_indices(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("name", OWN)
def test_every_quantizer_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Without help, since the config describes each of ours; the tokens and the images are the same bits."""
    model = with_own(name).eval()
    model.save_pretrained(tmp_path)
    again = VQAutoencoder.from_pretrained(tmp_path)
    assert again.config == model.config
    assert type(again.quantizer) is type(model.quantizer)
    assert again.quantizer.options() == model.quantizer.options()
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    for one, two in zip(model(images), again(images), strict=True):
        assert torch.equal(one, two)


class Halves(Quantizer):
    """A stranger's: rounds to multiples of one half."""

    def __init__(self, num_codes: int, *, channel_dim: int = 1, nonfinite: str | None = None) -> None:
        super().__init__(num_codes, 1, channel_dim=channel_dim, nonfinite=nonfinite)

    def search(self, rows: Rows) -> torch.Tensor:
        """Round."""
        return (rows.searchable * 2).round().clamp(0, self.num_codes - 1).long().squeeze(1)

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Halve."""
        return indices.unsqueeze(-1) / 2


def with_halves() -> VQAutoencoder:
    """A model around a stranger's quantizer."""
    return VQAutoencoder(small(num_codes=256, orthogonal_reg=0.0, code_dim=256), quantizer=Halves(5)).eval()


def test_a_strangers_quantizer_is_loaded_with_an_instance(tmp_path: Path) -> None:
    """The file names the class and the options; the caller brings the class."""
    model = with_halves()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["config"]
    assert saved["quantizer"] == {"name": "Halves", "num_codes": 5}
    again = VQAutoencoder.from_pretrained(tmp_path, quantizer=Halves(5))
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    assert torch.equal(again.encode_to_indices(images), model.encode_to_indices(images))
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


def test_a_strangers_quantizer_is_not_imported(tmp_path: Path) -> None:
    """A class that is not registered needs an instance, and the error says how."""
    with_halves().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantizer name must be one of 'FSQ', .*, got 'Halves'; add your class"):
        VQAutoencoder.from_pretrained(tmp_path)


def test_a_config_that_names_a_strangers_class_builds_no_other() -> None:
    """Only around an instance."""
    config = with_halves().config
    with pytest.raises(ValueError, match=r"quantizer name must be one of .*, got 'Halves'; add your class"):
        VQAutoencoder(config)
    assert VQAutoencoder(config, quantizer=Halves(5)).config == config


@pytest.mark.parametrize("other", [Halves(6), FSQ((5,))])
def test_another_quantizer_than_the_saved_one_is_refused(other: Quantizer, tmp_path: Path) -> None:
    """Other options and another class alike."""
    with_halves().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantizer must be the one that the file describes, \{'name': 'Halves'"):
        VQAutoencoder.from_pretrained(tmp_path, quantizer=other)


def test_a_registered_class_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line registers it."""
    monkeypatch.setitem(QUANTIZERS, "Halves", Halves)
    model = VQAutoencoder(small(num_codes=256, orthogonal_reg=0.0, code_dim=256, quantizer=HALVES))
    model.save_pretrained(tmp_path)
    assert VQAutoencoder.from_pretrained(tmp_path).config == model.config
    assert model.config.code_dim == 1
    assert model.config.num_codes == 5


HALVES = {"name": "Halves", "num_codes": 5}


@pytest.mark.parametrize(
    ("described", "sizes"),
    [
        ({"name": "FSQ", "levels": (4, 3, 5)}, (60, 3)),
        ({"name": "LFQ", "code_dim": 5}, (32, 5)),
        ({"name": "SimVQ", "num_codes": 9, "code_dim": 7}, (9, 7)),
        ({"name": "SimVQ"}, (256, 256)),
        ({"name": "ResidualVectorQuantizer", "num_quantizers": 2, "num_codes": 3}, (3, 256)),
        ({"name": "VectorQuantizer", "num_codes": 3, "temperature": 0.5}, (3, 256)),
    ],
)
def test_configs_describe_any_quantizer(described: dict, sizes: tuple[int, int]) -> None:
    """Its sizes are those of the config; JSON keeps it; equal configs have equal hashes."""
    config = AutoencoderConfig(quantizer=described)
    assert (config.num_codes, config.code_dim) == sizes
    quantizer = config.build_quantizer()
    assert type(quantizer).__name__ == described["name"]
    again = AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert again.build_quantizer().options() == quantizer.options()


def test_a_plain_vector_quantizer_needs_no_description() -> None:
    """What the fields can say is said by the fields."""
    config = AutoencoderConfig(quantizer={"name": "VectorQuantizer", "num_codes": 3, "codebook_update": "ema"})
    assert config == AutoencoderConfig(num_codes=3, codebook_update="ema")
    assert "quantizer" not in config.to_dict()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"quantizer": "FSQ"}, TypeError, "quantizer must be a mapping with a name and options, got 'FSQ'"),
        ({"quantizer": {}}, ValueError, "quantizer name must be one of 'FSQ', .*, got None"),
        ({"quantizer": {"name": "os.system"}}, ValueError, "quantizer name must be one of .*, got 'os.system'"),
        (
            {"quantizer": {"name": "FSQ", "level": 3}},
            ValueError,
            "FSQ option must be one of levels, .*, got 'level'",
        ),
        ({"quantizer": {"name": "FSQ", "levels": [1]}}, ValueError, r"levels\[0\] must be an int >= 2, got 1"),
        ({"quantizer": {"name": "FSQ"}}, ValueError, "FSQ options must be complete, with levels, got {}"),
        (
            {"quantizer": {"name": "LFQ"}},
            ValueError,
            r"^code_dim must be at most 62 with the quantizer LFQ, .* got 256; pass code_dim=10 for 1,024 codes",
        ),
        (
            {"quantizer": {"name": "FSQ", "levels": [3], "channel_dim": -1}},
            ValueError,
            r"quantizer\.channel_dim must be 1, as latents are \(B, C, h, w\), got -1",
        ),
        (
            {"quantizer": {"name": "SimVQ", "generator": torch.Generator()}},
            ValueError,
            "quantizer options must be values that JSON has",
        ),
        (
            {"quantizer": {"name": "FSQ", "levels": [3]}, "metric": "cosine"},
            ValueError,
            r"config\.metric must be its default 'l2', or what config\.quantizer has \(None, FSQ\), got 'cosine'",
        ),
    ],
)
def test_descriptions_that_fit_nothing_are_refused(options: dict, error: type[Exception], match: str) -> None:
    """By the name of what is wrong."""
    with pytest.raises(error, match=match):
        AutoencoderConfig(**options)


def test_the_generator_reaches_the_quantizer() -> None:
    """Equal generators draw equal codes, whatever the global random state; other generators others."""
    model = VQAutoencoder(small(quantizer={"name": "VectorQuantizer", "temperature": 100.0}, orthogonal_reg=0.0))
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    drawn = [model(images, generator=torch.Generator().manual_seed(seed)).indices for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
