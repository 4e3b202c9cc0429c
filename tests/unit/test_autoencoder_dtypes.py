"""The dtypes of images, codes, weights and quantizer of an autoencoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant import AutoencoderConfig, Quantizer, VQAutoencoder
from te_quant.autoencoder import build_decoder, build_encoder

HALF = [torch.float16, torch.bfloat16]

QUANTIZERS: dict[str, dict[str, Any]] = {
    "vq": {"name": "VectorQuantizer", "num_codes": 16, "code_dim": 3},
    "vq-ema": {"name": "VectorQuantizer", "num_codes": 16, "code_dim": 3, "codebook_update": "ema"},
    "vq-cosine": {"name": "VectorQuantizer", "num_codes": 16, "code_dim": 3, "metric": "cosine"},
    "rvq": {"name": "ResidualVectorQuantizer", "num_codes": 8, "code_dim": 3, "num_quantizers": 2},
    "sim": {"name": "SimVQ", "num_codes": 16, "code_dim": 3},
    "fsq": {"name": "FSQ", "levels": [8, 5, 7]},
    "lfq": {"name": "LFQ", "code_dim": 3},
}
LAYERS: dict[str, dict[str, Any]] = {
    "blur": {"downsample": "conv_blur_pool", "upsample": "blur"},
    "max-blur": {"downsample": "max_blur_pool", "upsample": "nearest", "norm": "channel", "norm_groups": 1},
    "polyphase": {"downsample": "polyphase", "upsample": "polyphase", "encoder_padding": "circular"},
    "fourier": {
        "downsample": "fourier",
        "upsample": "fourier",
        "encoder_padding": "circular",
        "decoder_padding": "circular",
        "activation": "filtered",
    },
    "polynomial": {"activation": "polynomial", "encoder_padding": "circular", "decoder_padding": "circular"},
}


def _model(quantizer: str = "fsq", layers: str = "blur") -> VQAutoencoder:
    options: dict[str, Any] = {"norm_groups": 4, **LAYERS[layers]}
    if options["norm_groups"] == 1:
        del options["norm_groups"]
    config = AutoencoderConfig(
        base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, quantizer=QUANTIZERS[quantizer], **options
    )
    return VQAutoencoder(config).eval()


class _Corners(Quantizer):
    """A stranger's quantizer without any tensor: the signs of two channels."""

    def __init__(self) -> None:
        super().__init__(4, 2)

    def search(self, rows: Any) -> Tensor:
        """Return the index."""
        return ((rows.searchable > 0) * torch.tensor([1, 2])).sum(1)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the corner, in float32."""
        return (indices.unsqueeze(-1) >> torch.arange(2) & 1) * 2.0 - 1


def _with_corners() -> VQAutoencoder:
    config = AutoencoderConfig(base_channels=8, channel_multipliers=(1, 1), norm_groups=4, code_dim=2)
    return VQAutoencoder(config, quantizer=_Corners()).eval()


def _never(layer: nn.Module, *_: object) -> None:
    raise AssertionError(layer)


def _guarded(model: VQAutoencoder, dtype: torch.dtype) -> VQAutoencoder:
    """A model of ``dtype`` in which no convolution may run."""
    for layer in model.to(dtype).modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(_never)
    return model


CALLS: dict[str, Callable[[VQAutoencoder, Tensor], object]] = {
    "forward": lambda model, images: model(images),
    "encode": lambda model, images: model.encode(images),
    "encode-with-phases": lambda model, images: model.encode_with_phases(images),
    "encode-to-indices": lambda model, images: model.encode_to_indices(images),
    "encoder": lambda model, images: model.encoder(images),
}


def _message(name: str, weights: torch.dtype, given: torch.dtype, autocast: bool = True) -> str:
    cure = f"pass {name}.to({weights})" + (" or use torch.autocast" if autocast else "")
    return "^" + re.escape(f"{name} must be {weights} as the weights, got {given}; {cure}.") + "$"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("weights", "given"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_images_of_another_dtype_are_refused_by_name(call: str, weights: torch.dtype, given: torch.dtype) -> None:
    """Before any convolution runs, with both cures."""
    model = _guarded(_model(), weights)
    with pytest.raises(TypeError, match=_message("images", weights, given)):
        CALLS[call](model, torch.zeros(1, 3, 8, 8, dtype=given))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("weights", "given"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_float64_images_are_refused_even_under_autocast(
    weights: torch.dtype, given: torch.dtype, autocast: bool
) -> None:
    """Autocast leaves float64 as it is, so the convolution would refuse it."""
    model = _guarded(_model(), weights)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=_message("images", weights, given, autocast=False)),
    ):
        model.encode(torch.zeros(1, 3, 8, 8, dtype=given))


@pytest.mark.parametrize("method", ["decode", "decoder"])
def test_codes_of_another_dtype_are_refused_by_name(method: str) -> None:
    """As images are."""
    model = _guarded(_model(), torch.float16)
    with pytest.raises(TypeError, match=_message("codes", torch.float16, torch.float32)):
        getattr(model, method)(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_takes_images_of_another_dtype(weights: torch.dtype, given: torch.dtype) -> None:
    """Torch casts there."""
    model = _model().to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.encode(torch.zeros(1, 3, 8, 8, dtype=given))
        assert model.decode(latents).shape == (1, 3, 8, 8)
    assert latents.dtype == torch.bfloat16


def test_weights_that_are_cast_when_their_layer_runs_are_not_compared() -> None:
    """Tools store weights in fewer bits, or in parts, and put them together just before the layer runs."""
    config = _model().config
    encoder, decoder = build_encoder(config), build_decoder(config)
    for first in (encoder.conv_in, decoder.from_codes):
        first.to(torch.float8_e4m3fn)
        first.register_forward_pre_hook(lambda layer, _: layer.float() and None)
    assert encoder.dtype is decoder.dtype is None
    latents = encoder(torch.zeros(1, 3, 8, 8))
    assert decoder(latents).shape == (1, 3, 8, 8)
    assert encoder.dtype == decoder.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [*QUANTIZERS, "stranger"])
def test_tokens_decode_with_a_half_precision_decoder(name: str, dtype: torch.dtype) -> None:
    """Also where the quantizer stayed in float32, or has no dtype: codes are cast to that of the decoder."""
    model = _with_corners() if name == "stranger" else _model(name)
    tokens = torch.arange(8).reshape(1, 2, 2, 2) if name == "rvq" else torch.arange(4).reshape(1, 2, 2)
    model.encoder.to(dtype)
    model.decoder.to(dtype)
    for converted in (False, True):
        if converted:
            model.quantizer.to(dtype)
        images = model.decode_indices(tokens)
        assert images.dtype == dtype
        assert torch.equal(images, model.decode(model.quantizer.decode(tokens).contiguous().to(dtype)))


def _tokens(model: VQAutoencoder, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype) * 2 - 1
    output = model(images)
    assert output.reconstruction.dtype == output.latents.dtype == dtype
    return output.indices, model.decode_indices(output.indices, output.phases)


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_pretrained_model_in_a_dtype_is_the_saved_one_converted(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Every quantizer, with device and dtype given, from a file in float32."""
    model = _model(name)
    model.save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path, device="cpu", dtype=dtype)
    assert loaded.quantizer.dtype == dtype
    for one, other in zip(_tokens(loaded, dtype), _tokens(model.to(dtype), dtype), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layers", LAYERS)
def test_pretrained_layers_work_in_every_dtype(layers: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Blur, polyphase and Fourier layers, saved in one dtype and loaded in another."""
    model = _model(layers=layers)
    model.save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path, device=torch.device("cpu"), dtype=dtype)
    for one, other in zip(_tokens(loaded, dtype), _tokens(model.to(dtype), dtype), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_pretrained_model_comes_back_in_the_dtype_it_was_saved_in(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Also a quantizer that has no tensor in the file."""
    model = _model(name).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path)
    assert loaded.quantizer.dtype == dtype
    for one, other in zip(_tokens(loaded, dtype), _tokens(model, dtype), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_pretrained_model_on_the_meta_device_has_shapes(name: str, tmp_path: Path) -> None:
    """``device=`` moves everything that there is."""
    _model(name).save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path, device="meta", dtype=torch.bfloat16)
    output = loaded(torch.zeros(2, 3, 8, 8, device="meta", dtype=torch.bfloat16))
    assert output.reconstruction.shape == (2, 3, 8, 8)
    assert output.reconstruction.is_meta
