"""The loss that keeps tokens where their pixels move, and what else Stage 1 can do for alive codes."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from examples.te_vqgan.stage1.joint import vector_quantizer
from examples.te_vqgan.stage1.presets import settings_for
from examples.te_vqgan.stage1.shift_loss import Moves, draw_moves, roll_each, shift_loss, wanted_tokens
from examples.te_vqgan.stage1.trainer import Stage1Trainer

CPU = torch.device("cpu")
STRIDE = 4
SIDE = 32


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([(16, 2), (32, 4), (32, 8)]))
def test_moves_are_those_that_are_described(seed: int, count: int, sizes: tuple[int, int]) -> None:
    """Half-sides for every other image, less than a token for the second half, and the nearest tokens."""
    side, stride = sizes
    torch.manual_seed(seed)
    moves = draw_moves(count, side, stride, CPU)
    rest = moves.pixels % stride
    assert bool((rest[: count // 2] == 0).all())
    assert bool((rest[count // 2 :] > 0).all())
    assert bool((((moves.pixels - rest)[::2] % (side // 2)) == 0).all())
    assert bool(((moves.tokens >= 0) & (moves.tokens < side // stride)).all())
    # Of two that are as near the smaller: a displacement of half a token is to the right.
    apart = (moves.pixels - moves.tokens * stride) % side
    signed = torch.where(apart > side // 2, apart - side, apart)
    assert bool(((signed > -stride / 2) & (signed <= stride / 2)).all())


@given(st.integers(0, 10_000))
def test_each_image_is_rolled_by_its_own_offset(seed: int) -> None:
    """As torch.roll does one by one, whatever lies between the axes."""
    torch.manual_seed(seed)
    images, offsets = torch.rand(3, 2, 4, 6), torch.randint(-3, 9, (3, 2))
    pairs = zip(images, offsets.tolist(), strict=True)
    expected = torch.stack([image.roll((down, right), (-2, -1)) for image, (down, right) in pairs])
    assert torch.equal(roll_each(images, offsets), expected)
    assert torch.equal(roll_each(images[:, 0], offsets), expected[:, 0])


def _moves(tokens: tuple[int, int], pixels: tuple[int, int]) -> Moves:
    return Moves(torch.tensor([tokens]), torch.tensor([pixels]))


def _square(first: int, last: int) -> Tensor:
    """Draw a white square on the ground."""
    image = torch.full((1, 3, SIDE, SIDE), -1.0)
    image[..., first:last, first:last] = 1
    return image


def test_tokens_count_where_their_pixels_are_equal() -> None:
    """All of them after whole tokens, or a pixel beside; after two not those at the edges of what is drawn."""
    image = _square(4, 20)
    for pixels in ((8, 4), (9, 3), (7, 4)):
        assert bool(wanted_tokens(image, _moves((2, 1), pixels), STRIDE).all())
    # The border of tokens around 0 is that around the side.
    assert bool(wanted_tokens(image, _moves((0, 0), (31, 0)), STRIDE).all())
    equal = wanted_tokens(image, _moves((0, 0), (2, 0)), STRIDE)
    # The upper edge enters the row of tokens 1, the lower one row 5, each from column 1 to 4.
    expected = torch.ones(1, 8, 8, dtype=torch.bool)
    expected[:, 1, 1:5] = expected[:, 5, 1:5] = False
    assert torch.equal(equal, expected)


def test_an_image_that_the_border_cuts_does_not_count() -> None:
    """In either direction; the same square a token before the border does."""
    image = _square(4, 20)
    for pixels in ((16, 0), (0, 16)):
        assert not bool(wanted_tokens(image, _moves((pixels[0] // 4, pixels[1] // 4), pixels), STRIDE).any())
    assert bool(wanted_tokens(image, _moves((3, 3), (12, 12)), STRIDE).all())


def _encoder(place: float) -> Any:
    """Say which colour most of a token's pixels have; ``place`` adds what depends on the row."""

    def encode(images: Tensor) -> Tensor:
        pooled = (F.avg_pool2d(images[:, :2], STRIDE) > 0) * 2.0 - 1
        return pooled + place * torch.linspace(0, 1, pooled.shape[2])[:, None]

    return types.SimpleNamespace(encode=encode, config=types.SimpleNamespace(stride=STRIDE))


@pytest.mark.parametrize("seed", range(8))
def test_tokens_that_move_with_the_image_have_no_loss(seed: int) -> None:
    """Whatever is drawn; where latents know their row, the loss is above zero (the negative control)."""
    torch.manual_seed(seed)
    images = _square(4, 12).repeat(8, 1, 1, 1)
    codebook = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    indices = (F.avg_pool2d(images[:, 0], STRIDE) > 0).long()
    assert float(shift_loss(_encoder(0.0), images, indices, codebook, margin=0.99)) == 0
    assert float(shift_loss(_encoder(1.0), images, indices, codebook, margin=0.99)) > 0.01
    # Tokens of another image are wanted nowhere.
    assert float(shift_loss(_encoder(0.0), images, 1 - indices, codebook, margin=0.99)) > 1


def _trainer(**changes: Any) -> Stage1Trainer:
    trainer = Stage1Trainer(settings_for("smoke", "vqgan", changes), CPU)
    trainer.initialize(lambda _: torch.zeros(4, 3, SIDE, SIDE))
    return trainer


def _step(trainer: Stage1Trainer, images: Tensor) -> dict[str, Tensor]:
    trainer.step = 3
    return trainer.train_step(images)


@pytest.mark.parametrize(
    ("name", "model"), [("shift", {}), ("margin", {}), ("shift", {"codebook_update": "ema"})], ids=str
)
def test_a_loss_is_logged_and_changes_the_encoder(name: str, model: dict[str, Any]) -> None:
    """And only where its weight is above zero."""
    torch.manual_seed(0)
    images = torch.cat([_square(4, 12), _square(6, 10), _square(18, 26), _square(20, 30)])
    norms = {}
    for weight in (0.0, 5.0):
        config = dataclasses.replace(settings_for("smoke", "vqgan").model, **model)
        trainer = _trainer(**{f"{name}_weight": weight, "model": config})
        numbers = _step(trainer, images)
        assert (f"{name}_loss" in numbers) == (weight > 0)
        norms[weight] = [p.grad.norm() for p in trainer.model.encoder.parameters() if p.grad is not None]
    assert any(not torch.equal(*pair) for pair in zip(norms[0.0], norms[5.0], strict=True))


def test_training_images_are_rolled_if_asked() -> None:
    """An autoencoder sees them, and they are what it shall give; without the setting it sees what it was given."""
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen: dict[bool, Tensor] = {}

    def watch(kind: bool) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, arguments: seen.__setitem__(kind, arguments[0])

    for rolled in (False, True):
        trainer = _trainer(shift_images=rolled)
        trainer.model.encoder.register_forward_pre_hook(watch(rolled))
        _step(trainer, images)
    assert torch.equal(seen[False], images)
    assert not torch.equal(seen[True], images)
    torch.testing.assert_close(seen[True].flatten(1).sort().values, images.flatten(1).sort().values)


def test_orthogonal_codes_stay_orthogonal() -> None:
    """From the first step on, and they move; a codebook without the setting does not stay so."""
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def products(codebook: Tensor) -> Tensor:
        unit = F.normalize(codebook.detach().double())
        return (unit @ unit.T - torch.eye(len(unit))).abs().max()

    trainer = _trainer(orthogonal_codes=True)
    codebook = vector_quantizer(trainer.model).codebook
    assert float(products(codebook)) < 1e-6
    before = codebook.detach().clone()
    _step(trainer, images)
    assert float(products(codebook)) < 1e-6
    assert not torch.equal(before, codebook)
    free = _trainer()
    torch.nn.init.orthogonal_(vector_quantizer(free.model).codebook)
    _step(free, images)
    assert float(products(vector_quantizer(free.model).codebook)) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift_weight": -1.0}, "shift_weight must be a finite number >= 0"),
        ({"shift_margin": 1.5}, "shift_margin must be a finite number >= 0 and <= 1"),
        ({"margin_weight": float("nan")}, "margin_weight must be a finite number >= 0"),
        ({"orthogonal_codes": True, "codebook_init": "kmeans"}, "codebook_init must be 'uniform' with orthogonal"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    """By name."""
    with pytest.raises(ValueError, match=message):
        settings_for("smoke", "vqgan", changes)
