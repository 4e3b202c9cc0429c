"""Autoencoders in tiles: where they equal the whole image, where they cannot, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from te_quant import ResidualVectorQuantizer
from te_quant.autoencoder import AutoencoderConfig, TiledAutoencoder, VQAutoencoder
from te_quant.autoencoder.tiling import _spans, has_exact_tokens
from te_quant.contract import Group, Reach
from te_quant.filters import PADDING_MODES
from te_quant.layers import DOWNSAMPLERS
from tests.unit.grid_oracles import fresh, roll

LOCAL: dict[str, Any] = {"norm": "channel", "attention": False}
TOLERANCE = 1e-11


def model_of(**options: Any) -> VQAutoencoder:
    """In float64, with codes spread as the latents are, so that neighbouring tokens differ."""
    widths = {"image_channels": 1, "base_channels": 4, "channel_multipliers": (1, 1), "norm_groups": 2}
    model = (
        VQAutoencoder(AutoencoderConfig(**{**widths, "num_codes": 32, "code_dim": 4, **options})).double().eval()
    )
    points = model.encode(fresh(1, 1, 32, 32)).detach().movedim(1, -1).reshape(-1, 4)
    model.quantizer.set_codebook(points[torch.randperm(len(points))[:32]])
    return model


def different(tokens: Tensor, other: Tensor) -> Tensor:
    """(h, w) bool."""
    return (tokens != other).any(0)


def equal_in_tiles(model: VQAutoencoder, tiled: TiledAutoencoder, images: Tensor) -> None:
    """Every method gives what it gives for the whole image."""
    latents, tokens = model.encode(images), model.encode_to_indices(images)
    assert len(tokens.unique()) > 5
    torch.testing.assert_close(tiled.encode(images), latents, rtol=0, atol=TOLERANCE)
    assert torch.equal(tiled.encode_to_indices(images), tokens)
    torch.testing.assert_close(tiled.decode(latents), model.decode(latents), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(tiled.decode_indices(tokens), model.decode_indices(tokens), rtol=0, atol=TOLERANCE)


LAYERS = [
    (down, up, mode)
    for down in ("strided_conv", "max_pool", "max_blur_pool", "conv_blur_pool")
    for up in ("nearest", "blur")
    for mode in PADDING_MODES
]


@pytest.mark.parametrize(
    ("down", "up", "mode"),
    [pytest.param(*layers, marks=pytest.mark.slow if n % 18 else ()) for n, layers in enumerate(LAYERS)],
)
@torch.no_grad()
def test_tiles_are_exact_without_layers_that_read_the_image(down: str, up: str, mode: Any) -> None:
    """At the default overlap, with 3 x 2 tiles, for every such layer of the package and every padding."""
    model = model_of(**LOCAL, downsample=down, upsample=up, encoder_padding=mode, decoder_padding=mode)
    tiled = TiledAutoencoder(model, tile_size=72)
    assert 44 <= tiled.overlap <= 56
    equal_in_tiles(model, tiled, fresh(1, 1, 90, 76))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "circular"])
@torch.no_grad()
def test_tiles_are_exact_with_three_levels(mode: Any) -> None:
    """Stride 4, as in the paper's network, and more than one channel and image."""
    options = {
        "channel_multipliers": (1, 1, 2),
        "image_channels": 3,
        "encoder_padding": mode,
        "decoder_padding": mode,
    }
    model = VQAutoencoder(
        AutoencoderConfig(**LOCAL, base_channels=2, code_dim=4, num_codes=32, **options)
    ).double()
    images = fresh(2, 3, 232, 160)
    tiled = TiledAutoencoder(model.eval(), tile_size=144)
    assert (model.equivariance.receptive_field, tiled.overlap) == (77, 112)
    torch.testing.assert_close(tiled.encode(images), model.encode(images), rtol=0, atol=TOLERANCE)
    tokens = model.encode_to_indices(images)
    torch.testing.assert_close(tiled.decode_indices(tokens), model.decode_indices(tokens), rtol=0, atol=TOLERANCE)


EXACT = model_of(**LOCAL)


@pytest.mark.slow
@given(cells=st.tuples(st.integers(1, 50), st.integers(1, 50)), tile=st.integers(34, 40), wider=st.integers(0, 4))
@settings(max_examples=6)
@torch.no_grad()
def test_any_size_and_tile_gives_the_same_tokens(cells: tuple[int, int], tile: int, wider: int) -> None:
    """Tiles need not divide the image, and a wider overlap changes nothing."""
    tiled = TiledAutoencoder(EXACT, tile_size=2 * tile, overlap=2 * (24 + wider))
    images = fresh(1, 1, 2 * cells[0], 2 * cells[1])
    tokens = EXACT.encode_to_indices(images)
    assert torch.equal(tiled.encode_to_indices(images), tokens)
    expected = EXACT.decode_indices(tokens)
    torch.testing.assert_close(tiled.decode_indices(tokens), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_without_overlap_tokens_at_the_seams_are_others() -> None:
    """Negative control: half a receptive field around the seam, and nowhere else."""
    images = fresh(4, 1, 40, 80)
    tiled = TiledAutoencoder(EXACT, tile_size=40, overlap=0)
    wrong = (tiled.encode(images) - EXACT.encode(images)).abs().amax((0, 1, 2)) > TOLERANCE
    assert different(tiled.encode_to_indices(images), EXACT.encode_to_indices(images)).any()
    # The seam lies between tokens 19 and 20; of a field of 37 pixels 18 lie on either side.
    assert wrong.nonzero().flatten().tolist() == list(range(20 - 9, 20 + 9))


@torch.no_grad()
def test_tokens_of_circular_encoders_follow_shifts_in_tiles_too() -> None:
    """Tiles wrap around the image, so the contract holds over the whole grid; without overlap it does not."""
    model = model_of(**LOCAL, encoder_padding="circular")
    images = fresh(1, 1, 92, 60)
    for tile_size, overlap, holds in ((80, None, True), (46, 0, False)):
        tiled = TiledAutoencoder(model, tile_size=tile_size, overlap=overlap)
        tokens = tiled.encode_to_indices(images)
        shifted = tiled.encode_to_indices(roll(images, 6, -14))
        assert torch.equal(shifted, roll(tokens, 3, -7)) == holds


@pytest.mark.parametrize("options", [{"attention": False}, {"norm": "channel"}])
@torch.no_grad()
def test_layers_that_read_the_image_change_tokens_far_from_seams(options: dict[str, Any]) -> None:
    """Negative control: GroupNorm or attention, with the default overlap of a quarter of the tile."""
    model = model_of(**options)
    images = fresh(1, 1, 32, 64) + torch.linspace(-1, 1, 64)
    tiled = TiledAutoencoder(model, tile_size=48)
    assert tiled.overlap == 12
    error = (tiled.encode(images) - model.encode(images)).abs().amax((0, 1, 2))
    assert error[:4].min() > 1e-4


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@torch.no_grad()
def test_blended_tiles_are_weighted_means(mode: Any) -> None:
    """An oracle in loops over pixels: weights are distances from the ends of a tile, for both axes."""
    model = model_of(decoder_padding=mode)
    codes = fresh(2, 4, 13, 6)
    # 13 tokens in tiles of 8 that share at least 2: two tiles on a line, three around a circle.
    starts = [0, 5] if mode == "zeros" else [-2, 2, 7]
    total, weights = np.zeros((2, 1, 26, 12)), np.zeros(26)
    for start in starts:
        rows = [row % 13 for row in range(start, start + 8)]
        tile = model.decode(codes[:, :, rows]).numpy()
        for place in range(16):
            weight = min(place + 0.5, 15.5 - place)
            total[:, :, (2 * start + place) % 26] += weight * tile[:, :, place]
            weights[(2 * start + place) % 26] += weight
    expected = torch.from_numpy(total / weights[:, None])
    result = TiledAutoencoder(model, tile_size=16, overlap=4).decode(codes)
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_encoded_tiles_are_cut_in_the_middle_of_their_overlap() -> None:
    """Never averaged, because a mean of two latents may lie near a code that neither is near."""
    model = model_of()
    images = fresh(1, 1, 16, 26)
    left, right = model.encode(images[..., :16]), model.encode(images[..., 10:])
    expected = torch.cat([left[..., :6], right[..., 1:]], 3)
    actual = TiledAutoencoder(model, tile_size=16, overlap=4).encode(images)
    # Tokens 5 to 7 are shared; the seam lies before token 6.
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_blending_rounds_once_in_half_precision() -> None:
    """Means of bfloat16 tiles are those of float64, rounded; sums in bfloat16 would often be another number."""
    model = model_of().bfloat16()
    codes = fresh(1, 4, 13, 6, dtype=torch.bfloat16)
    upper, lower = model.decode(codes[:, :, :8]).double(), model.decode(codes[:, :, 5:]).double()
    falling = torch.cat([torch.ones(10), 1 - (torch.arange(6) + 0.5) / 6]).double()[:, None]
    expected = torch.zeros(1, 1, 26, 12, dtype=torch.float64)
    expected[:, :, :16] += falling * upper
    expected[:, :, 10:] += falling.flip(0) * lower
    result = TiledAutoencoder(model, tile_size=16, overlap=4).decode(codes)
    assert result.dtype == torch.bfloat16
    assert (result == expected.bfloat16()).double().mean() > 0.99


@pytest.mark.parametrize("options", [LOCAL, {}])
@torch.no_grad()
def test_one_tile_is_the_whole_image(options: dict[str, Any]) -> None:
    """The same bits, in float32 and channels-last too."""
    model = model_of(**options).float()
    tiled = TiledAutoencoder(model, tile_size=64)
    images = fresh(2, 1, 64, 40, dtype=torch.float32).to(memory_format=torch.channels_last)
    tokens = model.encode_to_indices(images)
    assert torch.equal(tiled.encode(images), model.encode(images))
    assert torch.equal(tiled.encode_to_indices(images), tokens)
    assert torch.equal(tiled.decode_indices(tokens), model.decode_indices(tokens))


@pytest.mark.parametrize("options", [LOCAL, {}])
@torch.no_grad()
def test_results_have_the_memory_format_of_the_images(options: dict[str, Any]) -> None:
    """Channels-last in, channels-last out; contiguous otherwise."""
    tiled = TiledAutoencoder(model_of(**options), tile_size=40, overlap=8)
    images = fresh(2, 1, 48, 40)
    latents = tiled.encode(images)
    assert latents.is_contiguous()
    last = latents.to(memory_format=torch.channels_last)
    assert tiled.decode(latents).is_contiguous()
    assert tiled.decode(last).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_tokens_of_several_codebooks() -> None:
    """(B, h, w, Q) indices are tiled along h and w."""
    config = AutoencoderConfig(base_channels=2, channel_multipliers=(1, 1), code_dim=4, **LOCAL)
    quantizer = ResidualVectorQuantizer(8, 4, num_quantizers=3)
    model = VQAutoencoder(config, quantizer=quantizer).double().eval()
    images = fresh(2, 3, 64, 70)
    tiled, tokens = TiledAutoencoder(model, tile_size=60), model.encode_to_indices(images)
    assert torch.equal(tiled.encode_to_indices(images), tokens)
    expected = model.decode_indices(tokens)
    torch.testing.assert_close(tiled.decode_indices(tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["replicate", "circular"])
def test_gradients_go_through_tiles(mode: Any) -> None:
    """Of the images and the weights, as through the whole image."""
    model = model_of(**LOCAL, encoder_padding=mode, decoder_padding=mode)
    images = fresh(1, 1, 76, 50).requires_grad_()
    upstream = fresh(1, 1, 76, 50)
    tiled = TiledAutoencoder(model, tile_size=64)
    inputs = (images, model.encoder.conv_in.weight)
    results = [torch.autograd.grad(way.decode(way.encode(images)), inputs, upstream) for way in (model, tiled)]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_nothing_in_the_model_changes() -> None:
    """Its state and its mode stay; copies of the wrapper work."""
    model = model_of().train()
    before = copy.deepcopy(model.state_dict())
    tiled = copy.deepcopy(TiledAutoencoder(model, tile_size=16))
    images = fresh(1, 1, 24, 24)
    assert torch.equal(
        tiled.encode_to_indices(images), TiledAutoencoder(model, tile_size=16).encode_to_indices(images)
    )
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Positions(nn.Module):
    """A layer that reads little, and knows where it is."""

    reach = Reach(2, stride=2)
    exact_for: Group = "none"

    def __init__(self, channels: int, *, padding_mode: str) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        """Pool and count."""
        pooled = nn.functional.avg_pool2d(images, 2)
        return pooled + torch.linspace(0, 1, pooled.shape[-1], dtype=pooled.dtype)


def test_a_layer_that_promises_nothing_does_not_count_as_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its window does not say what it computes there, so no overlap is called exact and no tile too small."""
    monkeypatch.setitem(DOWNSAMPLERS, "own", Positions)
    model = model_of(**LOCAL, downsample="own", decoder_padding="circular")
    assert model.equivariance.receptive_field is not None
    assert TiledAutoencoder(model, tile_size=16, overlap=4).overlap == 4


@pytest.mark.parametrize("down", ["conv_replicate_blur_pool", "unpadded_max_blur_pool", "strided_conv"])
@torch.no_grad()
def test_a_layer_that_pads_otherwise_among_circular_ones_is_not_local(down: str) -> None:
    """A tile that wraps shows it what the image does not have there. The last one is the control."""
    circular = {"encoder_padding": "circular", "decoder_padding": "circular"}
    model = model_of(**LOCAL, downsample=down, **circular)
    tiled, images = TiledAutoencoder(model, tile_size=72, overlap=48), fresh(1, 1, 96, 96)
    equal = torch.allclose(tiled.encode(images), model.encode(images), rtol=0, atol=TOLERANCE)
    assert has_exact_tokens(model) == equal == (down == "strided_conv")
    zeros = model_of(**LOCAL, downsample=down, encoder_padding="zeros", decoder_padding="zeros")
    assert has_exact_tokens(zeros)


@given(side=st.integers(1, 60), size=st.integers(1, 30), overlap=st.integers(0, 29), circular=st.booleans())
def test_shares_of_tiles_cover_every_token_once(side: int, size: int, overlap: int, circular: bool) -> None:
    """Each lies in its tile, with half of the overlap to spare except at the border of the image."""
    overlap = min(overlap, size - 1)
    spans = _spans(side, size, overlap, circular=circular)
    assert [token for span in spans for token in range(span.low, span.high)] == list(range(side))
    for span in spans:
        assert span.size == min(size, side)
        before, after = span.low - span.start, span.start + span.size - span.high
        whole = side <= size
        assert before >= overlap // 2 or whole or (span.start == 0 and not circular)
        assert after >= overlap // 2 or whole or (span.high == side and not circular)
        assert circular or 0 <= span.start <= side - span.size


@pytest.mark.parametrize(
    ("options", "tile_size", "overlap", "match"),
    [
        (LOCAL, 36, 4, r"tile_size must be at least the receptive field of the encoder, 37 pixels, got 36\."),
        (
            LOCAL,
            48,
            None,
            r"tile_size must be larger than 48, the overlap that makes tiles exact, got 48; pass overlap=\.\.\. ",
        ),
        ({}, 15, None, r"tile_size must be a multiple of the divisor 2, got 15\."),
        ({}, 0, None, r"tile_size must be an int >= 2, got 0\."),
        ({}, 16, 3, r"overlap must be a multiple of the divisor 2, got 3\."),
        ({}, 16, 16, r"overlap must be smaller than tile_size=16, got 16\."),
        ({}, 16, -2, r"overlap must be an int >= 0, got -2\."),
        (
            {"downsample": "polyphase", "upsample": "polyphase"},
            16,
            None,
            r"model must be an autoencoder that chooses no phases, got downsample='polyphase'\.",
        ),
    ],
)
def test_tiles_that_cannot_work_are_refused(
    options: dict[str, Any], tile_size: int, overlap: int | None, match: str
) -> None:
    """By name and value, with the cure where there is one."""
    with pytest.raises(ValueError, match=match):
        TiledAutoencoder(model_of(**options), tile_size=tile_size, overlap=overlap)


def test_wrong_types_are_refused() -> None:
    """Another module, and a size that is a pair."""
    with pytest.raises(TypeError, match=r"model must be a VQAutoencoder, got Conv2d"):
        TiledAutoencoder(nn.Conv2d(1, 1, 1), tile_size=16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tile_size must be an int >= 2, got \(16, 16\)\."):
        TiledAutoencoder(model_of(), tile_size=(16, 16))  # type: ignore[arg-type]


def test_wrong_tensors_are_refused() -> None:
    """By the shape of the whole, not of a tile."""
    tiled = TiledAutoencoder(model_of(), tile_size=16)
    with pytest.raises(
        ValueError, match=r"multiples of the divisor 2, got images shape \(1, 1, 33, 40\); pad them"
    ):
        tiled.encode(fresh(1, 1, 33, 40))
    with pytest.raises(ValueError, match=r"images must be of shape \(B, 1, H, W\), got shape \(1, 32, 40\)\."):
        tiled.encode_to_indices(fresh(1, 32, 40))
    with pytest.raises(ValueError, match=r"codes must be of shape \(B, 4, h, w\), got shape \(4, 32, 40\)\."):
        tiled.decode(fresh(4, 32, 40))
    with pytest.raises(ValueError, match=r"indices must be of shape \(B, h, w\), got shape \(1, 8, 8, 2\)\."):
        tiled.decode_indices(torch.zeros(1, 8, 8, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"indices must be an integer tensor, got torch.float64\."):
        tiled.decode_indices(fresh(1, 8, 8))
