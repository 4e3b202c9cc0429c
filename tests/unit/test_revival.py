"""How a moving-average codebook starts and keeps all its codes in use, without any call.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from te_quant import AutoencoderConfig, ResidualVectorQuantizer, VectorQuantizer, VQAutoencoder
from te_quant.quantizers import _update
from te_quant.quantizers._update import MAX_REPLACEMENTS
from tests.helpers import exactly, plain_quantizer
from tests.unit.quantizer_cases import state_of

GOLDEN = 2654435769


def oracle_places(revivals: int, count: int, slots: int) -> list[int]:
    """Multiples of the golden ratio modulo 1, scaled to ``count`` rows, in Python's integers."""
    return [((revivals + slot) * GOLDEN % 2**32) * count // 2**32 for slot in range(min(slots, count))]


def among(codes: Tensor, rows: Tensor) -> Tensor:
    """Which codes (K, C) are bit-equal to one of the rows (N, C)."""
    return (codes[:, None] == rows[None]).all(2).any(1)


def step(quantizer: VectorQuantizer, latents: Tensor) -> None:
    """A training pass, and what follows from it before the next."""
    quantizer(latents)
    quantizer.apply_pending()


@given(st.integers(1, 12), st.integers(1, 40))
def test_a_codebook_starts_at_the_latents_of_the_first_pass(K: int, N: int) -> None:
    """Codes that the random start did not use take the places of the oracle; where rows run out they wait."""
    quantizer = VectorQuantizer(K, 3)
    before = quantizer.codebook.clone()
    latents = 4 + torch.randn(N, 3)
    chosen = quantizer(latents).indices
    quantizer.apply_pending()
    dead = [code for code in range(K) if code not in chosen]
    places = oracle_places(0, N, K)
    for code, place in zip(dead, places, strict=False):
        assert torch.equal(quantizer.codebook[code], latents[place])
    waiting = dead[len(places) :]
    assert (quantizer.codebook[waiting].abs() <= before.abs().max() + 1e-6).all()
    assert int(quantizer.revivals) == min(len(dead), N)


def test_without_a_threshold_the_codebook_starts_at_random() -> None:
    """Negative control: the unused codes stay where the constructor drew them."""
    quantizer = VectorQuantizer(12, 3, revival_threshold=0.0)
    before = quantizer.codebook.clone()
    latents = 4 + torch.randn(50, 3)
    unused = torch.ones(12, dtype=torch.bool).index_fill_(0, quantizer(latents).indices, False)
    quantizer.apply_pending()
    torch.testing.assert_close(quantizer.codebook[unused], before[unused])
    assert not among(quantizer.codebook[unused], latents).any()


def test_more_codes_than_latents_start_one_batch_after_another() -> None:
    """Every code moves once; none takes a latent twice, as rows never serve two codes of one step."""
    quantizer = VectorQuantizer(30, 2)
    seen = torch.zeros(0, 2)
    for _ in range(5):
        latents = 3 * torch.randn(8, 2)
        seen = torch.cat([seen, latents])
        step(quantizer, latents)
    assert (quantizer.usage > 1e-6).all()
    assert quantizer.codebook.abs().amax(1).min() > 1 / 30


@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_a_code_dies_below_its_share_of_the_average_use(threshold: float) -> None:
    """A code that nothing is near decays by .9 per step, and moves in the step that takes it below the threshold.

    It takes the place of a latent, and the use of an average code.
    """
    quantizer = VectorQuantizer(4, 2, revival_threshold=threshold)
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [1e3, 1e3]])
    quantizer.set_codebook(codes)
    latents = codes[:3].repeat(4, 1)
    usage = torch.ones(4, dtype=torch.float64)
    for _ in range(200):
        step(quantizer, latents)
        usage = 0.9 * usage + 0.1 * torch.tensor([4.0, 4.0, 4.0, 0.0])
        dead = bool(usage[3] < threshold * usage.mean())
        assert int(quantizer.revivals) == dead
        if dead:
            break
    assert dead
    assert among(quantizer.codebook[3:], latents).all()
    torch.testing.assert_close(quantizer.usage[3].double(), usage.mean(), rtol=1e-5, atol=0)
    # It stays: the statistics moved with it.
    moved = quantizer.codebook[3].clone()
    step(quantizer, torch.zeros(0, 2))
    torch.testing.assert_close(quantizer.codebook[3], moved)


def test_use_is_shared_out_where_half_of_the_codes_would_die() -> None:
    """Of 64 codes for 64 clusters nearly all are in use; without revival few are (the negative control)."""
    centres = 5 * torch.randn(64, 4)
    used = {}
    for threshold in (0.01, 0.0):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, 4, revival_threshold=threshold)
        for _ in range(60):
            latents = centres[torch.randint(64, (1024,))] + 0.1 * torch.randn(1024, 4)
            step(quantizer, latents)
        used[threshold] = len(quantizer.encode(latents).unique())
    assert used[0.01] >= 58
    assert used[0.0] <= 32


def test_skipped_latents_replace_nothing() -> None:
    """Only rows that count are taken, at the places of the oracle among them."""
    quantizer = VectorQuantizer(6, 2, nonfinite="skip")
    latents = 5 + torch.randn(20, 2)
    latents[::2] = torch.nan
    quantizer(latents)
    counted = latents[1::2]
    places = oracle_places(0, 10, 6)
    assert torch.equal(quantizer.pending_rows[:, :2], counted[places])
    assert (quantizer.pending_rows[:, 2] == 1).all()


def test_unit_codes_start_at_directions() -> None:
    """Under "cosine" the codes are the directions of latents."""
    quantizer = VectorQuantizer(16, 3, metric="cosine")
    latents = torch.randn(200, 3) + torch.tensor([3.0, 0.0, 0.0])
    step(quantizer, latents)
    directions = nn.functional.normalize(latents)
    equal = torch.isclose(quantizer.codebook[:, None], directions[None], rtol=0, atol=1e-6).all(2).any(1)
    assert int(equal.sum()) >= int(quantizer.revivals) >= 4


@pytest.mark.parametrize("calls", [1, 3])
def test_an_empty_batch_keeps_what_waits(calls: int) -> None:
    """Passes without latents neither move codes nor forget the latents of the pass before."""
    quantizer = VectorQuantizer(5, 2)
    with quantizer.accumulate():
        quantizer(1 + torch.rand(9, 2))
        waiting = quantizer.pending_rows.clone()
        for _ in range(calls):
            quantizer(torch.zeros(0, 2))
    assert waiting[:, -1].all()
    assert torch.equal(quantizer.pending_rows, waiting)


def test_a_frozen_codebook_revives_nothing() -> None:
    """Nor does one in evaluation."""
    quantizer = VectorQuantizer(8, 2).freeze()
    before = state_of(quantizer)
    step(quantizer, torch.randn(30, 2))
    quantizer.freeze(False).eval()
    quantizer(torch.randn(30, 2))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_a_codebook_that_was_set_is_started() -> None:
    """The first passes leave set codes where they are, used or not."""
    quantizer = VectorQuantizer(4, 2)
    codes = torch.tensor([[0.0, 0.0], [5.0, 5.0], [50.0, 50.0], [-50.0, 0.0]])
    quantizer.set_codebook(codes)
    for _ in range(3):
        step(quantizer, codes[:2].repeat(3, 1))
    # Laplace smoothing moves codes by 1e-5 of their length.
    torch.testing.assert_close(quantizer.codebook, codes, rtol=1e-4, atol=1e-5)


def test_many_codes_start_in_several_steps() -> None:
    """At most 4,096 a step, so that buffers stay small."""
    K = MAX_REPLACEMENTS + 500
    quantizer = VectorQuantizer(K, 1)
    assert quantizer.pending_rows.shape == (MAX_REPLACEMENTS, 2)
    latents = torch.linspace(1, 2, 5000).unsqueeze(1)
    step(quantizer, latents)
    assert int(quantizer.revivals) == MAX_REPLACEMENTS
    step(quantizer, latents)
    assert int(quantizer.revivals) > MAX_REPLACEMENTS


@given(st.integers(0, 2**40), st.integers(1, 5000))
def test_places_lie_within_the_batch(revivals: int, count: int) -> None:
    """However many codes were replaced before."""
    quantizer = VectorQuantizer(7, 1)
    quantizer.revivals.fill_(revivals)
    quantizer(torch.arange(count, dtype=torch.float32).unsqueeze(1))
    taken = quantizer.pending_rows[quantizer.pending_rows[:, 1] > 0, 0].long().tolist()
    assert taken == oracle_places(revivals % 2**31, count, 7) or revivals % 2**31 + 7 > 2**31


def test_replacements_come_from_all_parts_of_a_batch() -> None:
    """Of 64 codes over 32 images none takes more than 4 places, and 28 images give at least one."""
    places = torch.tensor(oracle_places(0, 32 * 64, 64)) // 64
    counts = torch.bincount(places, minlength=32)
    assert counts.max() <= 4
    assert (counts > 0).sum() >= 28


def test_a_trained_model_goes_on_after_saving(tmp_path: Any) -> None:
    """A model with its default quantizer is saved, loaded and trained on as if nothing had happened."""
    config = AutoencoderConfig(
        image_channels=1, base_channels=4, channel_multipliers=(1, 1), num_codes=8, code_dim=4, attention=False
    )
    model = VQAutoencoder(config)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    for _ in range(2):
        model(images)
    model.save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path).train()
    assert loaded.config == config
    assert loaded.quantizer.revival_threshold == config.revival_threshold == 0.01
    for one in (model, loaded):
        one(images)
        one.eval()
    assert torch.equal(model.quantizer.codebook, loaded.quantizer.codebook)


def test_a_config_of_an_older_version_revives_nothing() -> None:
    """Its file names the update and no threshold."""
    options = AutoencoderConfig(codebook_update="ema").to_dict()
    assert AutoencoderConfig.from_dict(options).revival_threshold == 0.01
    del options["revival_threshold"]
    assert AutoencoderConfig.from_dict(options).revival_threshold == 0.0


def test_states_load_across_thresholds() -> None:
    """An older state starts without waiting latents; what a quantizer without revival cannot hold is dropped."""
    old, new = plain_quantizer(8, 2, codebook_update="ema"), VectorQuantizer(8, 2)
    latents = torch.randn(40, 2)
    old(latents)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.usage, old.usage)
    assert not new.pending_rows.any()
    new(latents)
    assert new.pending_rows.any()
    with pytest.warns(UserWarning, match="pending_rows and revivals, which these options have no"):
        old.load_state_dict(new.state_dict())
    assert torch.equal(new.pending_sums, old.pending_sums)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_a_threshold_outside_of_its_range_is_refused(value: float) -> None:
    """As every other number."""
    with pytest.raises(ValueError, match=r"^revival_threshold must be a finite number >= 0 and < 1, got"):
        VectorQuantizer(8, 2, revival_threshold=value)


@pytest.mark.parametrize("build", [partial(VectorQuantizer, 8, 2), partial(ResidualVectorQuantizer, 8, 2, 2)])
def test_a_threshold_without_effect_is_refused(build: Callable[..., object]) -> None:
    """A codebook that follows gradients revives nothing by itself; 0 and the default say no more than that."""
    message = (
        "revival_threshold must be 0 or its default 0.01 with codebook_update='gradient', got 0.1; call "
        "revive_dead_codes between two steps."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        build(codebook_update="gradient", revival_threshold=0.1)
    for threshold in (0.0, 0.01):
        build(codebook_update="gradient", revival_threshold=threshold)
    build(codebook_update="ema", revival_threshold=0.1)


def test_compiled_passes_revive_what_eager_ones_do() -> None:
    """One graph serves the start and everything after it."""
    eager = VectorQuantizer(16, 2)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        latents = 2 + torch.randn(24, 2)
        one, two = eager(latents), run(latents)
        assert torch.equal(one.indices, two.indices)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value)
    assert int(eager.revivals) >= 10


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("num_codes", [12, 90])
def test_a_cpu_moves_what_a_device_moves(num_codes: int, nonfinite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing only the rows of dead codes gives the bits that writing whole tensors gives."""
    first = VectorQuantizer(num_codes, 3, nonfinite=nonfinite, revival_threshold=0.5)
    second = copy.deepcopy(first)
    for step in range(24):
        # In half of the steps all latents are near the same code, so that others die.
        latents = torch.randn(20, 3) * (0.01 if step % 12 >= 6 else 1)
        mask = torch.full((20,), step % 7 != 3)
        if nonfinite == "skip":
            latents[step % 20] = torch.nan
        for quantizer, looks in ((first, True), (second, False)):
            monkeypatch.setattr(_update, "_may_look", lambda _, looks=looks: looks)
            quantizer(latents, mask=mask)
    assert int(first.revivals) > num_codes
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
