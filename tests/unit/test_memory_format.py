"""Contiguous images give contiguous results, channels-last images give channels-last ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from te_quant import AutoencoderConfig, Quantizer, SimVQ, VectorQuantizer, VQAutoencoder
from te_quant.layers import (
    ACTIVATIONS,
    NORMS,
    PADDING_MODES,
    UPSAMPLERS,
    BlurPool2d,
    BlurUpsample2d,
    Downsample,
    FourierUpsample2d,
    PolyphaseUpsample2d,
    ResidualBlock,
    SelfAttention2d,
    build_activation,
    build_downsample,
    build_norm,
    build_upsample,
)
from te_quant.quantizers._rows import Layout

FORMATS = [torch.contiguous_format, torch.channels_last]
OTHER = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}


def _fits(name: str, padding: str) -> bool:
    return padding == "circular" or name not in ("fourier",)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{name}-{padding}": lambda name=name, padding=padding: build_downsample(name, 8, padding_mode=padding)
        for name in get_args(Downsample)
        for padding in PADDING_MODES
        if _fits(name, padding)
    },
    **{
        f"up-{name}-{padding}": lambda name=name, padding=padding: build_upsample(name, 8, padding_mode=padding)
        for name in UPSAMPLERS
        for padding in PADDING_MODES
        if _fits(name, padding)
    },
    **{f"norm-{name}": lambda name=name: build_norm(name, 8, norm_groups=4) for name in NORMS},
    **{f"activation-{name}": lambda name=name: build_activation(name, 8) for name in ACTIVATIONS},
    **{f"attention-{name}": lambda name=name: SelfAttention2d(8, norm=name, norm_groups=4) for name in NORMS},
    **{
        f"block-{padding}": lambda padding=padding: ResidualBlock(8, 16, norm="channel", padding_mode=padding)
        for padding in PADDING_MODES
    },
    "blur-pool": lambda: BlurPool2d(),
    "blur-upsample": lambda: BlurUpsample2d(kernel_size=4, stride=3),
    "fourier-upsample": lambda: FourierUpsample2d(2),
    "polyphase-upsample": lambda: PolyphaseUpsample2d(2),
    "polyphase-upsample-interpolated": lambda: PolyphaseUpsample2d(2, interpolate=True),
}


def _result(layer: nn.Module, images: Tensor) -> Tensor:
    takes_phase = getattr(layer, "adaptive", False) and "Upsample" in type(layer).__name__
    result = layer(images, torch.zeros(len(images), 2, dtype=torch.int64)) if takes_phase else layer(images)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_keeps_the_memory_format(name: str, memory_format: torch.memory_format) -> None:
    """And the values do not depend on it, but for the rounding of convolutions."""
    layer, images = LAYERS[name](), torch.rand(2, 8, 8, 8)
    result = _result(layer, images.contiguous(memory_format=memory_format))
    assert result.is_contiguous(memory_format=memory_format)
    assert not result.is_contiguous(memory_format=OTHER[memory_format])
    torch.testing.assert_close(result, _result(layer, images))


@pytest.mark.parametrize("name", ["up-blur-circular", "norm-channel", "activation-filtered", "up-polyphase-zeros"])
def test_gradient_does_not_depend_on_the_memory_format(name: str) -> None:
    """Laying a result out again passes the gradient on."""
    layer, gradients = LAYERS[name](), []
    values, weights = torch.rand(2, 8, 8, 8), torch.rand(2, 8, 16, 16)
    for memory_format in FORMATS:
        images = values.clone(memory_format=memory_format).requires_grad_()
        result = _result(layer, images)
        (result * weights[..., : result.shape[2], : result.shape[3]]).sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(*gradients)


CIRCULAR = {"encoder_padding": "circular", "decoder_padding": "circular"}
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"down-{name}": {"downsample": name, **CIRCULAR} for name in get_args(Downsample) if name != "polyphase"},
    **{f"up-{name}": {"upsample": name, **CIRCULAR} for name in UPSAMPLERS if name != "polyphase"},
    "polyphase": {"downsample": "polyphase", "upsample": "polyphase", **CIRCULAR},
    **{f"activation-{name}": {"activation": name, **CIRCULAR} for name in ACTIVATIONS},
    **{f"padding-{name}": {"encoder_padding": name, "decoder_padding": name} for name in PADDING_MODES},
    "channel-norm": {"norm": "channel"},
    "no-attention": {"attention_levels": ()},
    "attention-everywhere": {"attention_levels": (0, 1)},
}


def _model(**options: Any) -> VQAutoencoder:
    groups = {} if options.get("norm") == "channel" else {"norm_groups": 4}
    config = AutoencoderConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        num_codes=16,
        code_dim=4,
        **groups,
        **options,
    )
    return VQAutoencoder(config).eval()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", OPTIONS)
def test_reconstruction_has_the_memory_format_of_the_images(
    name: str, memory_format: torch.memory_format, weights: torch.memory_format
) -> None:
    """Whatever the format of the weights; ``decode`` follows the codes, and tokens decode to contiguous images."""
    model = _model(**OPTIONS[name]).to(memory_format=weights)
    output = model((torch.rand(2, 3, 16, 16) * 2 - 1).contiguous(memory_format=memory_format))
    for tensor in (output.latents, output.reconstruction):
        assert tensor.is_contiguous(memory_format=memory_format)
        assert not tensor.is_contiguous(memory_format=OTHER[memory_format])
    decoded = model.decode(output.codes.contiguous(memory_format=memory_format), output.phases)
    assert decoded.is_contiguous(memory_format=memory_format)
    assert torch.equal(decoded, output.reconstruction)
    again = model.decode_indices(output.indices, output.phases)
    assert again.is_contiguous()
    assert torch.equal(again, output.reconstruction)


def test_single_tokens_and_channels_have_the_format_of_the_images() -> None:
    """Where a tensor in the middle has both formats: the images decide."""
    model = _model(image_channels=1)
    images = (torch.rand(2, 1, 2, 2) * 2 - 1).contiguous(memory_format=torch.channels_last)
    assert model(images).reconstruction.shape == (2, 1, 2, 2)
    model = _model()
    images = (torch.rand(2, 3, 2, 2) * 2 - 1).contiguous(memory_format=torch.channels_last)
    assert model(images).reconstruction.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("grid", "codes", "size", "again"),
    [
        ((2, 32, 32), 1024, 32, True),
        ((3, 1024), 7, 40, True),
        ((2, 32, 32), 1025, 32, False),
        ((2, 32, 32), 1024, 31, False),
        ((0, 32, 32), 16, 32, True),
    ],
)
def test_codes_that_are_looked_up_again_are_those_that_were(
    grid: tuple[int, ...], codes: int, size: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, contiguous, with the shape of what is moved; only where there are no more codes than tokens."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(codes, size, generator=generator)
    indices = torch.randint(codes, (math.prod(grid),), generator=generator)
    layout = Layout(grid, 1)
    expected = layout.arrange(table[indices])
    moves: list[Tensor] = []
    monkeypatch.setattr(
        Layout, "arrange", lambda self, rows: (moves.append(rows), self.view(rows).contiguous())[1]
    )
    found = layout.look_up(table, indices, table[indices])
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert found.shape == expected.shape
    assert bool(moves) != again
    # Nothing is moved, and so nothing looked up again, where channels stay innermost.
    for other in (Layout(grid, -1), Layout(grid, 1, channels_last=True)):
        moves.clear()
        other.look_up(table, indices, table[indices])
        assert moves


@pytest.mark.parametrize("build", [VectorQuantizer, SimVQ], ids=["vector", "sim"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_quantizers_return_the_codes_that_their_indices_decode_to(
    build: Callable[[int, int], Quantizer], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with masks, which are moved; a layout that looks up other codes would be seen."""
    torch.manual_seed(0)
    quantizer = build(64, 32).train(training)
    latents = torch.randn(2, 32, 32, 32, requires_grad=training)
    output = quantizer(latents)
    assert torch.equal(output.codes, quantizer.decode(output.indices))
    assert torch.equal(output.quantized, output.codes)
    mask = torch.rand(2, 32, 32) > 0.5
    masked = quantizer(latents, mask=mask)
    assert not masked.codes.movedim(1, -1)[~mask].any()
    original = Layout.look_up
    monkeypatch.setattr(Layout, "look_up", lambda self, table, *rest: original(self, table + 1, *rest))
    wrong = quantizer(latents)
    assert not torch.equal(wrong.codes, quantizer.decode(wrong.indices))
