"""Images of any size, padded to the divisor of an encoder and cropped back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_quant.autoencoder import AutoencoderConfig, VQAutoencoder, build_encoder, pad_to_divisor
from te_quant.filters import PADDING_MODES
from tests.unit.grid_oracles import NUMPY_MODES, fresh, roll

SMALL: dict[str, Any] = {"image_channels": 1, "base_channels": 4, "channel_multipliers": (1, 1), "code_dim": 4}


def config_of(**options: Any) -> AutoencoderConfig:
    return AutoencoderConfig(**{**SMALL, "num_codes": 16, "norm_groups": 2, **options})


@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    divisor=st.integers(1, 5),
    mode=st.sampled_from(["zeros", "replicate", "circular"]),
)
@settings(max_examples=30)
def test_padding_is_that_of_numpy(sides: tuple[int, int], divisor: int, mode: Any) -> None:
    """On the right and at the bottom, by the fewest pixels; the first pixels are the image."""
    images = fresh(2, 3, *sides)
    padded = pad_to_divisor(images, divisor, mode=mode)
    added = [(0, 0), (0, 0), *((0, int(np.ceil(side / divisor)) * divisor - side) for side in sides)]
    assert np.array_equal(padded.numpy(), np.pad(images.numpy(), added, mode=NUMPY_MODES[mode]))
    assert torch.equal(padded[..., : sides[0], : sides[1]], images)


def test_divisible_images_are_not_copied() -> None:
    """The tensor itself comes back, whatever the mode."""
    images = fresh(1, 1, 8, 12)
    assert all(pad_to_divisor(images, 4, mode=mode) is images for mode in PADDING_MODES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder_padding": "reflect", "norm": "channel", "attention": False},
        {"downsample": "polyphase", "upsample": "polyphase", "encoder_padding": "circular"},
    ],
)
@pytest.mark.parametrize("sides", [(5, 7), (11, 4)])
def test_any_size_goes_through_and_comes_back(options: dict[str, Any], sides: tuple[int, int]) -> None:
    """Tokens, with their phases, decode to what one pass reconstructs, in the size of the image."""
    model = VQAutoencoder(config_of(**options)).eval()
    height, width = sides
    images = fresh(2, 1, height, width, dtype=torch.float32)
    padded = pad_to_divisor(images, model.config.divisor)
    output = model(padded)
    encoding = model.encode_with_phases(padded)
    tokens = model.quantizer.encode(encoding.latents)
    assert tokens.shape[1:] == (-(-height // 2), -(-width // 2))
    decoded = model.decode_indices(tokens, encoding.phases)[..., :height, :width]
    assert decoded.shape == images.shape
    assert torch.equal(decoded, output.reconstruction[..., :height, :width])


@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular"])
def test_padding_changes_only_tokens_that_see_it(mode: Any) -> None:
    """Tokens a receptive field away from the padding are those of the larger image that this one was cut from."""
    encoder = build_encoder(config_of(norm="channel", attention=False)).double()
    field = encoder.equivariance.receptive_field
    assert field is not None
    larger = fresh(1, 1, 80, 80)
    latents, expected = encoder(pad_to_divisor(larger[..., :79, :77], 2, mode=mode)), encoder(larger)
    inside = (77 - field) // 2
    assert inside > 10
    near, far = expected[..., :39], latents
    assert torch.allclose(near[..., :inside, :inside], far[..., :inside, :inside], rtol=0, atol=1e-11)
    assert (near - far).abs().max() > 1e-3


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_padding_ends_the_contract_of_circular_encoders(mode: Any) -> None:
    """Negative control: 15 x 13 pixels, padded, do not follow circular shifts; 16 x 14 pixels do."""
    encoder = build_encoder(config_of(encoder_padding="circular")).double()
    assert encoder.equivariance.holds_for((2, 4))
    for sides, holds in (((16, 14), True), ((15, 13), False)):
        images = fresh(2, 1, *sides)
        shifted = encoder(pad_to_divisor(roll(images, 2, 4), 2, mode=mode))
        error = (shifted - roll(encoder(pad_to_divisor(images, 2, mode=mode)), 1, 2)).abs().max()
        assert (error < 1e-11) == holds


def test_encoders_name_the_cure() -> None:
    """The refusal of other sides gives the call."""
    match = r"multiples of the divisor 2, got .*; pad them with te_quant.autoencoder.pad_to_divisor\(images, 2\)\."
    with pytest.raises(ValueError, match=match):
        build_encoder(config_of())(torch.zeros(1, 1, 5, 8))


@pytest.mark.parametrize(
    ("shape", "divisor", "mode", "match"),
    [
        ((1, 5, 5), 4, "zeros", r"images must be of shape \(B, I, H, W\), got shape \(1, 5, 5\)\."),
        ((1, 1, 0, 5), 4, "zeros", r"images sides must be at least 1, got images shape \(1, 1, 0, 5\)\."),
        ((1, 1, 5, 5), 0, "zeros", r"divisor must be an int >= 1, got 0\."),
        ((1, 1, 5, 5), 4, "mirror", r"mode must be one of 'zeros', .*, got 'mirror'\."),
        ((1, 1, 5, 5), 16, "reflect", r"images sides must be larger than the reflected margins"),
    ],
)
def test_wrong_arguments_are_refused(shape: tuple[int, ...], divisor: int, mode: Any, match: str) -> None:
    """By name and value."""
    with pytest.raises(ValueError, match=match):
        pad_to_divisor(torch.zeros(shape), divisor, mode=mode)


def test_wrong_types_are_refused() -> None:
    """Pixels as integers, and a divisor with a fraction."""
    with pytest.raises(TypeError, match=r"images must be floating point, got torch.uint8\."):
        pad_to_divisor(torch.zeros(1, 1, 5, 5, dtype=torch.uint8), 4)
    with pytest.raises(TypeError, match=r"divisor must be an int >= 1, got 4\.5\."):
        pad_to_divisor(torch.zeros(1, 1, 5, 5), 4.5)  # type: ignore[arg-type]
