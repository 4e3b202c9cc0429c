"""Quantizers in a ``PreTrainedModel``, which fills what a checkpoint lacks with whatever is in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant import Quantizer, QuantizerOutput, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from te_quant.integrations.transformers import initialize_quantizer
from tests.helpers import plain_quantizer

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.slow

K, C = 16, 4
QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "gradient": lambda: plain_quantizer(K, C),
    "ema": lambda: plain_quantizer(K, C, codebook_update="ema"),
    "subset": lambda: plain_quantizer(
        K, C, codebook_update="ema", orthogonal_reg=1.0, orthogonal_max_codes=5, decay=0.8
    ),
    "residual": lambda: ResidualVectorQuantizer(K, C, 2, codebook_update="ema"),
    "sim": lambda: SimVQ(K, C),
}


class _Config(transformers.PreTrainedConfig):  # type: ignore[misc]
    def __init__(self, quantizer: str = "ema", **options: Any) -> None:
        super().__init__(**options)
        self.quantizer = quantizer


class _Careless(transformers.PreTrainedModel):  # type: ignore[misc]
    config_class = _Config

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.encoder = nn.Conv2d(3, C, 4, stride=4)
        self.quantizer = QUANTIZERS[config.quantizer]()
        self.post_init()

    def forward(self, images: Tensor) -> QuantizerOutput:
        """Quantize."""
        return self.quantizer(self.encoder(images))


class _Careful(_Careless):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_quantizer(module)


def _trained(name: str, kind: type[_Careless] = _Careful, steps: int = 3) -> _Careless:
    torch.manual_seed(0)
    model = kind(_Config(quantizer=name)).train()
    for _ in range(steps):
        model(torch.randn(8, 3, 16, 16))
    return model


def _saved(model: _Careless, folder: Path, lacking: tuple[str, ...] = ()) -> Path:
    """A checkpoint without the tensors whose names contain one of these words."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not any(word in name for word in lacking)}
    assert len(kept) < len(tensors) or not lacking
    safetensors.save_file(kept, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def _dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written to holds NaN, not by chance the right numbers."""
    plain = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, **options: _poisoned(plain(*args, **options))
    )  # fmt: skip


def _poisoned(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not tensor.is_meta:
        with torch.no_grad():
            tensor.fill_(float("nan"))
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_whole_checkpoint_comes_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With what was pending, which ``from_pretrained`` applies by calling ``eval()``; statistics in float32."""
    model = _trained(name)
    _saved(model, tmp_path)
    loaded = _Careful.from_pretrained(tmp_path, dtype=dtype)
    expected = model.to(dtype).eval().state_dict()
    for key, value in loaded.state_dict().items():
        statistic = key.rpartition(".")[2] in VectorQuantizer.statistics
        if value.is_floating_point():
            assert value.dtype == (torch.float32 if statistic else dtype)
        assert torch.equal(value, expected[key])


LACKING = {"pending": ("pending",), "statistics": ("pending", "usage", "code_sums")}


@pytest.mark.parametrize("lacking", LACKING)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_checkpoint_without_statistics_loads_as_into_a_new_model(
    name: str, lacking: str, tmp_path: Path
) -> None:
    """Equal to ``load_state_dict``, which derives what is missing; and the next step is the same."""
    model = _trained(name)
    _saved(model, tmp_path, LACKING[lacking])
    loaded = _Careful.from_pretrained(tmp_path).train()
    expected = _Careful(_Config(quantizer=name))
    expected.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
    images = torch.randn(8, 3, 16, 16)
    for _ in range(2):
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, expected.state_dict()[key])
        torch.manual_seed(1)
        loaded(images)
        torch.manual_seed(1)
        expected.train()(images)


@pytest.mark.parametrize("name", ["gradient", "ema", "residual", "sim"])
def test_without_the_function_the_codes_or_their_use_are_lost(name: str, tmp_path: Path) -> None:
    """Negative control: nothing tells the user."""
    _saved(_trained(name, _Careless), tmp_path, ("pending", "usage"))
    loaded = _Careless.from_pretrained(tmp_path)
    assert any(tensor.isnan().any() for tensor in loaded.quantizer.state_dict().values())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_that_is_new_to_a_checkpoint_starts_as_a_new_one(name: str, tmp_path: Path) -> None:
    """Finite codes of the usual size, and nothing pending."""
    _saved(_trained(name), tmp_path, ("quantizer",))
    loaded = _Careful.from_pretrained(tmp_path).quantizer
    fresh = QUANTIZERS[name]()
    for key, value in loaded.state_dict().items():
        wanted = fresh.state_dict()[key]
        assert value.dtype == wanted.dtype
        assert value.isfinite().all()
        assert value.abs().max() <= 5 * wanted.abs().max()
    assert all(
        "pending" not in key or not v.is_floating_point() or not v.any() for key, v in loaded.named_buffers()
    )


def test_other_modules_are_left_alone() -> None:
    """The function may be called for every module."""
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    initialize_quantizer(layer)
    assert torch.equal(layer.weight, before)
