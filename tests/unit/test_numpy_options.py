"""Numbers of numpy as options: sweeps and config readers give them, and what is stored has to be JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from te_quant import (
    FSQ,
    GPT,
    LFQ,
    AutoencoderConfig,
    GPTConfig,
    ResidualVectorQuantizer,
    Segment,
    SimVQ,
    VectorQuantizer,
    _checks,
)
from te_quant.equivariance import audit, measure_equivariance
from te_quant.filters import binomial_kernel, fourier_resample
from te_quant.layers import (
    BlurPool2d,
    BlurUpsample2d,
    FilteredActivation,
    FourierDownsample2d,
    FourierUpsample2d,
    PolynomialActivation,
    PolyphaseDownsample2d,
    PolyphaseUpsample2d,
)
from te_quant.shifts import fourier_shift, roll
from te_quant.usage import CodebookUsage
from tests.helpers import exactly

INTS = [np.int8(3), np.int64(3), np.uint16(3)]
REALS = [np.float16(0.5), np.float32(0.5), np.float64(0.5)]
EIGHT, HALF = np.int64(8), np.float32(0.5)


@pytest.mark.parametrize("value", INTS, ids=repr)
def test_numpy_integer_becomes_a_plain_int(value: Any) -> None:
    """Its class is int itself."""
    number = _checks.require_int("k", value, 1, 3)
    assert type(number) is int
    assert number == 3


@pytest.mark.parametrize("value", [*REALS, np.int32(1)], ids=repr)
def test_numpy_real_becomes_a_plain_number(value: Any) -> None:
    """The value is the same."""
    number = _checks.require_number("x", value, 0.0, 1.0)
    assert type(number) in (int, float)
    assert number == value.item()


@pytest.mark.parametrize("value", [True, np.True_, np.str_("3"), np.array([3]), np.array(3)], ids=repr)
def test_numpy_bool_string_and_array_are_no_int(value: Any) -> None:
    """A bool of numpy is refused as one of Python."""
    with pytest.raises(TypeError, match=exactly(f"k must be an int >= 1, got {value!r}.")):
        _checks.require_int("k", value, 1)


@pytest.mark.parametrize("value", [True, np.False_, np.complex64(1), np.array(0.5)], ids=repr)
def test_numpy_bool_complex_and_array_are_no_real_number(value: Any) -> None:
    """Neither has an order."""
    with pytest.raises(TypeError, match=exactly(f"x must be a finite number, got {value!r}.")):
        _checks.require_number("x", value)


@pytest.mark.parametrize("value", [np.float32("nan"), np.float16("inf")], ids=repr)
def test_numpy_nonfinite_number_is_refused(value: Any) -> None:
    """As Python's."""
    with pytest.raises(ValueError, match=exactly(f"x must be a finite number, got {float(value)!r}.")):
        _checks.require_number("x", value)


QUANTIZERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "vq": (
        VectorQuantizer,
        {
            "num_codes": EIGHT,
            "code_dim": EIGHT,
            "commitment_weight": HALF,
            "orthogonal_reg": HALF,
            "orthogonal_max_codes": np.int16(4),
            "temperature": HALF,
            "decay": HALF,
            "channel_dim": np.int64(-1),
        },
    ),
    "vq-ema": (VectorQuantizer, {"num_codes": EIGHT, "code_dim": EIGHT, "codebook_update": "ema", "decay": HALF}),
    "vq-gradient": (
        VectorQuantizer,
        {"num_codes": EIGHT, "code_dim": EIGHT, "codebook_update": "gradient", "codebook_weight": HALF},
    ),
    "rvq": (
        ResidualVectorQuantizer,
        {
            "num_codes": EIGHT,
            "code_dim": EIGHT,
            "num_quantizers": np.int64(2),
            "decay": HALF,
            "orthogonal_reg": HALF,
        },
    ),
    "fsq": (FSQ, {"levels": (EIGHT, np.int8(5)), "channel_dim": np.int64(1)}),
    # As int8, 2 ** 8 would overflow.
    "lfq": (
        LFQ,
        {
            "code_dim": np.int8(8),
            "commitment_weight": HALF,
            "entropy_weight": HALF,
            "diversity_weight": HALF,
            "temperature": HALF,
            "entropy_group_dim": np.int64(4),
        },
    ),
    "sim": (SimVQ, {"num_codes": EIGHT, "code_dim": EIGHT, "commitment_weight": HALF, "decay": HALF}),
}


def _python(value: Any) -> Any:
    return tuple(map(_python, value)) if isinstance(value, tuple) else getattr(value, "item", lambda: value)()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer_with_numpy_options_has_plain_ones(name: str) -> None:
    """``options()`` is JSON, and the quantizer computes as the one with Python's numbers."""
    kind, options = QUANTIZERS[name]
    plain = {key: _python(value) for key, value in options.items()}
    torch.manual_seed(0)
    ours = kind(**options)
    torch.manual_seed(0)
    reference = kind(**plain)
    assert json.dumps(ours.options()) == json.dumps(reference.options())
    assert type(ours.num_codes) is int
    latents = torch.randn(5, reference.code_dim)
    outputs = [quantizer(latents, generator=torch.Generator().manual_seed(1)) for quantizer in (ours, reference)]
    assert torch.equal(outputs[0].indices, outputs[1].indices)
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_autoencoder_config_with_numpy_options_is_json() -> None:
    """All numbers, those in sequences and those of another quantizer too."""
    config = AutoencoderConfig(
        image_channels=np.int64(1),
        base_channels=np.int32(16),
        channel_multipliers=(np.int64(1), np.int64(2)),
        num_res_blocks=np.int64(1),
        attention_levels=[np.int64(1)],  # type: ignore[arg-type]
        norm_groups=np.int64(8),
        dropout=np.float32(0.5),
        num_codes=np.int64(4),
        code_dim=np.int64(8),
        commitment_weight=np.float32(0.5),
        decay=np.float64(0.5),
        orthogonal_reg=np.float16(2),
    )
    text = json.dumps(config.to_dict())
    assert AutoencoderConfig.from_dict(json.loads(text)) == config
    assert "np." not in repr(config)


def test_config_of_another_quantizer_with_numpy_options_is_json() -> None:
    """Options of a quantizer are a mapping that the config copies."""
    given = {"name": "FSQ", "levels": [EIGHT, np.int8(5)]}
    config = AutoencoderConfig(base_channels=16, quantizer=given)
    assert config == AutoencoderConfig(base_channels=16, quantizer={"name": "FSQ", "levels": [8, 5]})
    assert json.loads(json.dumps(config.to_dict()))["quantizer"]["levels"] == [8, 5]


def test_gpt_config_with_numpy_options_is_json_and_generates() -> None:
    """Numbers of the config, of its segments, and of a draw."""
    segment = Segment("image", EIGHT, (np.int64(2), np.int64(3)), "axial", pad_token=np.int64(7))  # type: ignore[arg-type]
    config = GPTConfig(
        (segment,), width=EIGHT, depth=np.int64(1), num_heads=np.int64(2), mlp_ratio=HALF, dropout=np.float32(0)
    )  # type: ignore[arg-type]
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "np." not in repr(config)
    torch.manual_seed(0)
    gpt, prompt = GPT(config).eval(), torch.zeros(1, 0, dtype=torch.int64)
    drawn = [
        gpt.generate(prompt, generator=torch.Generator().manual_seed(0), **options)
        for options in (
            {"max_new_tokens": np.int64(4), "temperature": HALF, "top_k": np.int64(3), "top_p": HALF},
            {"max_new_tokens": 4, "temperature": 0.5, "top_k": 3, "top_p": 0.5},
        )
    ]
    assert torch.equal(drawn[0], drawn[1])


LAYERS = {
    "blur-pool": lambda n, _: BlurPool2d(kernel_size=n, stride=n),
    "blur-upsample": lambda n, _: BlurUpsample2d(kernel_size=n, stride=n),
    "polyphase-down": lambda n, _: PolyphaseDownsample2d(n),
    "polyphase-up": lambda n, _: PolyphaseUpsample2d(n, interpolate=True),
    "fourier-down": lambda n, _: FourierDownsample2d(n),
    "fourier-up": lambda n, _: FourierUpsample2d(n),
    "filtered": lambda n, _: FilteredActivation(upsampling=n),
    "polynomial": lambda n, _: PolynomialActivation(n),
    "usage": lambda n, x: CodebookUsage(n, frequent_share=x),
    "binomial": lambda n, _: binomial_kernel(n).tolist(),
    "resample": lambda n, _: fourier_resample(torch.ones(1, 1, 4, 4), (n, n)).tolist(),
    "roll": lambda n, _: roll(torch.arange(16.0).view(1, 1, 4, 4), (n, n)).tolist(),
    "fourier-shift": lambda n, x: fourier_shift(torch.arange(16.0).view(1, 1, 4, 4), (n, x)).tolist(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_or_function_with_numpy_options_is_that_with_plain_ones(name: str) -> None:
    """What it prints, or returns, is the same."""
    build: Any = LAYERS[name]
    assert repr(build(np.int64(3), np.float32(0.5))) == repr(build(3, 0.5))


def test_measurement_and_audit_with_numpy_options_are_json() -> None:
    """Their reports hold plain numbers, those of the same call with plain options."""

    def measured(integer: Any, real: Any) -> list[Any]:
        images = torch.linspace(-1, 1, 512).view(2, 1, 16, 16)
        report = measure_equivariance(
            lambda x: (x[:, 0, ::4, ::4] > 0).long(), images,
            stride=integer(4), num_codes=integer(2), protocol="circular", batch_size=integer(1),
            resamples=integer(5), seed=integer(3), tau=real(0.125), ground=real(-1),
            data_range=(real(-1), integer(1)),
            shifts=[(integer(4), 0)], sub_stride_shifts=[(0, integer(1))],
        )  # fmt: skip
        layer = torch.nn.Conv2d(1, 1, 2, stride=2, bias=False)
        torch.nn.init.ones_(layer.weight)
        audited = audit(
            layer, images, shifts=[(integer(4), 0)], sub_stride_shifts=[(0, integer(1))], batch_size=integer(1)
        )
        return json.loads(json.dumps([report.to_dict(), audited.to_dict()]))

    assert measured(np.int64, np.float32) == measured(int, float)
