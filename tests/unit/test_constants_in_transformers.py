"""Inside a ``PreTrainedModel`` of transformers, which builds on the meta device and refills every buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant import AutoencoderConfig, VQAutoencoder
from te_quant.layers import BlurPool2d, BlurUpsample2d, PolyphaseUpsample2d

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

QUANTIZERS: dict[str, dict[str, Any]] = {
    "fsq": {"name": "FSQ", "levels": [8, 5, 7]},
    "lfq": {"name": "LFQ", "code_dim": 3},
}


class _Config(transformers.PretrainedConfig):  # type: ignore[misc]
    def __init__(self, quantizer: str = "fsq", **options: Any) -> None:
        self.quantizer = quantizer
        super().__init__(**options)


class _Tokenizer(transformers.PreTrainedModel):  # type: ignore[misc]
    config_class = _Config
    supports_gradient_checkpointing = True

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.autoencoder = VQAutoencoder(
            AutoencoderConfig(
                base_channels=8,
                norm_groups=4,
                channel_multipliers=(1, 1),
                num_res_blocks=1,
                downsample="conv_blur_pool",
                upsample="blur",
                quantizer=QUANTIZERS[config.quantizer],
            )
        )
        self.resampling = nn.ModuleList([BlurPool2d(), BlurUpsample2d(), PolyphaseUpsample2d(interpolate=True)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as they are."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return everything that the model computes."""
        blurred, enlarged, placed = self.resampling
        phase = torch.zeros(len(images), 2, dtype=torch.int64)
        output = self.autoencoder(images)
        decoded = self.autoencoder.decode_indices(output.indices)
        return [*output, decoded, blurred(images), enlarged(images), placed(images, phase)]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_model_from_pretrained_computes_the_same_bits(
    name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """As the saved model, converted to the dtype that was asked for."""
    model = _Tokenizer(_Config(quantizer=name)).eval()
    model.save_pretrained(tmp_path)
    loaded = _Tokenizer.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype})).eval()
    model.to(dtype or torch.float32)
    assert loaded.autoencoder.quantizer.dtype == model.autoencoder.quantizer.dtype == (dtype or torch.float32)
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).to(dtype or torch.float32)
    for one, other in zip(loaded(images), model(images), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_switch_for_checkpointing_reaches_the_autoencoder() -> None:
    """On and off; transformers 5 renamed the methods, not the attribute that they set."""
    model = _Tokenizer(_Config())
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")()
    assert model.autoencoder.gradient_checkpointing is True
    assert model(torch.rand(1, 3, 8, 8))[0].requires_grad
    getattr(model, f"{kind}_checkpointing_disable")()
    assert model.autoencoder.gradient_checkpointing is False
