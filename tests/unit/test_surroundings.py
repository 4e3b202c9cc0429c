"""Measurements and checks do not depend on defaults of torch: device, dtype, gradients, autocast, other seeds.

The default device of these tests is ``meta``, where any tensor that was meant to be on the CPU is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from te_quant import FSQ, AutoencoderConfig, VectorQuantizer, VQAutoencoder
from te_quant.autoencoder import TiledAutoencoder
from te_quant.equivariance import (
    PairCounts,
    audit,
    code_margins,
    constant_image_probe,
    count_pairs,
    measure_equivariance,
    numerical_floor,
    placement_agreement,
)
from te_quant.layers import DOWNSAMPLERS
from te_quant.stability import CropAndPlace, Flip, Resize, ShiftPixels, ShiftTokens, measure_stability
from te_quant.testing import (
    assert_shift_equivariant,
    check_downsample,
    check_quantizer,
    codebooks,
    equivariance_error,
    images,
    latents_off_boundaries,
)
from tests.unit.stability_cases import cell_images, decode, encode

MODEL = VQAutoencoder(
    AutoencoderConfig(base_channels=8, channel_multipliers=(1, 2), norm_groups=4, num_codes=8, code_dim=4)
).eval()
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
CELLS = cell_images(torch.randint(0, 16, (3, 4, 5), generator=torch.Generator().manual_seed(1)))
SPRITES = CELLS[..., :8, :8]
CONSTANT = torch.full((1, 3, 32, 32), 0.5)
TRANSFORMS = (ShiftPixels((4, -4)), ShiftTokens((1, 0)), CropAndPlace(0.5), Flip(), Resize(0.5))


def _equivariance() -> Any:
    report = measure_equivariance(
        encode,
        CELLS[..., :16],
        stride=4,
        num_codes=16,
        canvas_size=32,
        reconstruct=lambda x: decode(encode(x)),
        fractional_shifts=4,
        sub_stride_shifts=3,
    )
    return report.to_dict()


def _tiles() -> list[Tensor]:
    # Its norm reads all pixels, so that tiles are blended.
    tiled = TiledAutoencoder(MODEL, tile_size=16, overlap=8)
    large = IMAGES.repeat(1, 1, 2, 2)
    tokens = tiled.encode_to_indices(large)
    return [tokens, tiled.decode_indices(tokens)]


MEASUREMENTS: dict[str, Callable[[], Any]] = {
    "equivariance": _equivariance,
    "placement": lambda: placement_agreement(
        encode, SPRITES, canvas_size=16, stride=4, num_codes=16, ground=float(SPRITES.min())
    ),
    "floor": lambda: numerical_floor(encode, CELLS, num_codes=16),
    "stability": lambda: measure_stability(
        encode, decode, CELLS, transforms=TRANSFORMS, cycles=2, ground=-1.0
    ).to_dict(),
    "audit": lambda: audit(MODEL.encoder, IMAGES).to_dict(),
    "constant": lambda: constant_image_probe(lambda x: MODEL(x).reconstruction, CONSTANT, stride=2).profile,
    "error": lambda: equivariance_error(MODEL.encoder, IMAGES, (2, 2)).relative_error,
    "assertion": lambda: assert_shift_equivariant(lambda x: x.roll(1, -1), IMAGES, shifts=[(1, 2)]),
    "pairs": lambda: PairCounts.zero(16) + count_pairs(encode(CELLS), encode(CELLS), 16),
    "margins": lambda: code_margins(IMAGES[0, 0], IMAGES[1, 0], IMAGES[2, 0, 0].long()),
    "tiles": _tiles,
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_default_device_does_not_matter(name: str) -> None:
    """Everything that was given is on the CPU, and so is what comes of it."""
    expected = MEASUREMENTS[name]()
    with torch.device("meta"):
        found = MEASUREMENTS[name]()
    assert str(found) == str(expected)


def test_the_default_device_would_be_noticed() -> None:
    """Negative control: what is made without a device is on the default one, where it has no value."""
    with torch.device("meta"):
        assert torch.zeros(1).is_meta
        with pytest.raises(RuntimeError, match=r"(meta|Meta)"):
            (IMAGES + torch.zeros(1)).sum().item()


@given(images(sides=(8, 8)), codebooks())
def test_strategies_draw_on_the_cpu(drawn: Tensor, codes: Tensor) -> None:
    """Whatever the default device."""
    assert drawn.is_cpu
    assert codes.is_cpu


def test_strategies_do_not_see_the_default_device() -> None:
    """Hypothesis draws while the device is set."""
    pairs = latents_off_boundaries(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), margin=0.5)

    @given(pairs)
    def drawn(pair: tuple[Tensor, Tensor]) -> None:
        assert pair[0].is_cpu
        assert pair[1].is_cpu

    with torch.device("meta"):
        test_strategies_draw_on_the_cpu()
        drawn()


def _float64() -> AbstractContextManager[Any]:
    return _DefaultDtype(torch.float64)


class _DefaultDtype(AbstractContextManager[Any]):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": _float64,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_checks_of_strangers_run_as_in_a_fresh_process(name: str) -> None:
    """Correct classes pass, and what was set is set afterwards."""
    with SURROUNDINGS[name]():
        before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.empty(0).device)
        check_quantizer(partial(FSQ, (8, 5, 5)))
        check_quantizer(partial(VectorQuantizer, 16, 4))
        check_downsample(DOWNSAMPLERS["max_blur_pool"])
        assert before == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.empty(0).device)


def test_checks_of_strangers_do_not_seed_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their generators would not be put back."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(1)
    assert seeds == [1]  # torch's own way reaches them
    check_quantizer(partial(FSQ, (8, 5, 5)))
    check_downsample(DOWNSAMPLERS["max_blur_pool"])
    assert seeds == [1]
