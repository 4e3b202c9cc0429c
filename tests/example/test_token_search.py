"""The search for tokens whose picture is better and reads back as the same tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from examples.te_vqgan.data.sources import load_digits
from examples.te_vqgan.stage1 import token_search
from examples.te_vqgan.stage1.evaluation import dataset
from examples.te_vqgan.stage1.joint import vector_quantizer
from examples.te_vqgan.stage1.presets import settings_for
from examples.te_vqgan.stage1.round_trip import encode_at, read, rounded
from examples.te_vqgan.stage1.token_search import search_tokens
from examples.te_vqgan.stage1.trainer import Stage1Trainer
from examples.te_vqgan.stage1.wanted_codes import wanted_code_losses
from te_quant import VectorQuantizer, VQAutoencoder
from te_quant.shifts import roll
from tests.published import published


def _model(arm: str) -> VQAutoencoder:
    """Return an untrained model whose codes are some of its latents."""
    trainer = Stage1Trainer(settings_for("smoke", arm), torch.device("cpu"))
    model = trainer.model.eval().double().requires_grad_(False)
    latents = model.encode(_images(4, seed=9, side=32)).movedim(1, -1).flatten(0, 2)
    model.quantizer.set_codebook(latents[:: len(latents) // 16][:16])
    return model


def _images(count: int, seed: int = 0, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64) * 2 - 1


def _cost(model: VQAutoencoder, indices: Tensor, phases: Tensor, images: Tensor, penalty: float) -> Tensor:
    """Write the formula of the docstring down once more."""
    pictures = rounded(model.decode_indices(indices, phases))
    again = read(model, pictures)
    squared = ((pictures - images) ** 2).mean((1, 2, 3))
    other_phase = (again.phases != phases).flatten(1).any(1)
    lost = (again.indices != indices) | other_phase[:, None, None]
    return squared + penalty * lost.double().mean((1, 2))


@pytest.mark.parametrize("penalty", [0.0, 0.02, 1.0])
def test_what_is_found_costs_less_than_what_the_encoder_says(penalty: float) -> None:
    """For every image; without a step they are the encoder's."""
    model, images = _model("integer_exact"), _images(3)
    said = read(model, images)
    found = search_tokens(model, images, penalties=[penalty], candidates=4, max_steps=5)
    before = _cost(model, *said, images, penalty)
    after = _cost(model, *found, images, penalty)
    assert bool((after <= before).all())
    assert bool((after < before).any())
    assert torch.equal(found.phases, said.phases)
    still = search_tokens(model, images, penalties=[penalty], candidates=4, max_steps=0)
    assert torch.equal(still.indices, said.indices)


def test_the_penalty_brings_tokens_back() -> None:
    """With it fewer are lost than without, at a larger error."""
    model, images = _model("integer_exact"), _images(4)
    free, held = (
        search_tokens(model, images, penalties=[penalty], candidates=8, max_steps=6) for penalty in (0.0, 1.0)
    )
    errors = [float(_cost(model, *found, images, 0.0).sum()) for found in (free, held)]
    lost = [
        float(_cost(model, *found, images, 1.0).sum()) - error
        for found, error in zip((free, held), errors, strict=True)
    ]
    assert lost[1] < lost[0]
    assert errors[1] > errors[0]


def test_no_step_makes_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and however few changes are on offer; readings help where no change does."""
    model, images = _model("stride_exact"), _images(3)
    ends = []
    for readings in (0, 4):
        monkeypatch.setattr(token_search, "_READINGS", readings)
        costs = [
            _cost(
                model, *search_tokens(model, images, penalties=[0.1], candidates=4, max_steps=steps), images, 0.1
            )
            for steps in (0, 1, 2, 25)
        ]
        assert all(bool((after <= before).all()) for before, after in itertools.pairwise(costs))
        ends.append(costs[-1])
    assert bool((ends[1] <= ends[0]).all())
    assert bool((ends[1] < ends[0]).any())


def test_the_slope_is_that_of_the_smooth_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences of the formula, written down once more; pictures are not rounded, which has no slope."""
    monkeypatch.setattr(token_search, "rounded", lambda pictures: pictures)
    model, images = _model("integer_exact"), _images(2)
    codes = vector_quantizer(model).codebook.detach()
    said = read(model, images)
    again = said.indices.clone()
    again[:, 0, :2] = (again[:, 0, :2] + 1) % len(codes)
    found = token_search._Found(said.indices, images.new_zeros(2), again)
    slope = token_search._slope(model, found, said.phases, images, codes, 0.7)
    lost = again != said.indices

    def parts(quantized: Tensor) -> tuple[Tensor, Tensor]:
        pictures = model.decode(quantized, said.phases)
        latents, _ = encode_at(model, pictures, said.phases)
        hinges = wanted_code_losses(latents, codes, said.indices, margin=token_search._MARGIN)
        return (pictures.clamp(-1, 1) - images).square().flatten(1).mean(1), hinges

    here = codes[said.indices].movedim(-1, 1)
    present = parts(here)[1].clamp_min(1e-4)
    assert bool((present[lost] > 1e-4).any())

    def cost(quantized: Tensor) -> Tensor:
        errors, hinges = parts(quantized)
        return (errors + 0.3 * 0.7 * (hinges / present * lost).flatten(1).mean(1)).sum()

    direction = torch.randn(here.shape, generator=torch.Generator().manual_seed(1), dtype=here.dtype)
    step = 1e-6 * direction
    difference = float(cost(here + step) - cost(here - step)) / 2e-6
    expected = float((slope.movedim(-1, 1) * direction).sum())
    assert difference == pytest.approx(expected, rel=1e-4)
    assert difference != pytest.approx(float((slope.movedim(-1, 1) * direction.flip(0)).sum()), rel=1e-2)


@pytest.mark.parametrize("penalty", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("arm", ["integer_exact", "stride_exact"])
def test_one_change_is_the_best_of_all_that_were_tried(
    arm: str, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An oracle tries every code at every place; with all as candidates the first step takes the best of them."""
    monkeypatch.setattr(token_search, "_READINGS", 0)
    model, images = _model(arm), _images(1, side=8)
    said = read(model, images)
    found = search_tokens(model, images, penalties=[penalty], candidates=2 * 2 * 15, max_steps=1)
    single = said.indices.expand(2 * 2 * 16, -1, -1).clone().flatten(1)
    place = torch.arange(2 * 2 * 16)
    single[place, place // 16] = place % 16
    every = torch.cat([single.view(-1, 2, 2), read(model, rounded(model.decode_indices(*said))).indices])
    costs = _cost(model, every, said.phases.expand(len(every), -1, -1), images, penalty)
    assert float(_cost(model, *found, images, penalty)) == pytest.approx(float(costs.min()), rel=1e-12)


@pytest.mark.parametrize("shift", [(8, 4), (3, 1), (1, 0), (2, 2)])
def test_the_search_moves_with_the_image(shift: tuple[int, int]) -> None:
    """As the tokens of the encoder do, also by less than a token, and at every phase of the pictures tried."""
    model, images = _model("integer_exact"), _images(3)
    moves = [(i, j) for i in range(4) for j in range(4)]
    changed = 0
    for image in images.split(1):
        still, moved = image, roll(image, shift)
        said = [read(model, some).indices for some in (still, moved)]
        found = [
            search_tokens(model, some, penalties=[1.0], candidates=4, max_steps=4).indices
            for some in (still, moved)
        ]
        [move] = [move for move in moves if torch.equal(roll(said[0], move), said[1])]
        assert torch.equal(roll(found[0], move), found[1])
        changed += int((found[0] != said[0]).sum())
    assert changed > 0


def test_other_metrics_are_refused() -> None:
    """Codes under cosine are scaled before they are decoded."""
    model = _model("integer_exact")
    model.quantizer = VectorQuantizer(16, model.config.code_dim, metric="cosine")
    with pytest.raises(ValueError, match=r"model\.quantizer\.metric must be \"l2\", got 'cosine'"):
        search_tokens(model, _images(1))


def test_images_are_searched_one_by_one() -> None:
    """A batch finds what each image finds."""
    model, images = _model("integer_exact"), _images(3)
    together = search_tokens(model, images, penalties=[0.02], candidates=4, max_steps=4).indices
    for number in range(3):
        one = search_tokens(model, images[number : number + 1], penalties=[0.02], candidates=4, max_steps=4)
        assert torch.equal(one.indices[0], together[number])


@pytest.mark.slow
def test_a_trained_tokenizer_gains_in_both() -> None:
    """Lower error and more tokens that come back, on digits that it has not seen."""
    settings = settings_for("small", "integer_exact", {"data": "digits", "held_out": False, "eval_images": 2})
    images = dataset(settings, load_digits("digits"), "test").fixed(0, 2)
    folder = published("round-trips/tokenizer/model.safetensors").parent
    model = VQAutoencoder.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    said, found = read(model, images), search_tokens(model, images, candidates=8, max_steps=12)
    errors, matches = [], []
    for tokens in (said, found):
        pictures = rounded(model.decode_indices(*tokens))
        errors.append(float((pictures - images).square().mean()))
        matches.append(float((read(model, pictures).indices == tokens.indices).double().mean()))
    assert errors[1] < errors[0]
    assert matches[1] > matches[0]
