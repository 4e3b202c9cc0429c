"""The tiled search against brute force in float64.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import _precision
from te_quant._search import ENGINE, by_faiss, grouped, operators
from te_quant._search import tiles as shared
from te_quant._search.tiled import tiled_argmin
from te_quant.functional import nearest_code
from te_quant.testing import codebooks, latents_off_boundaries
from tests.helpers import plain_quantizer
from tests.unit.quantizer_oracles import LargestTensor, assert_nearest

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = {
    "seed": st.integers(0, 2**31),
    "n": st.integers(0, 40),
    "k": st.integers(1, 40),
    "c": st.integers(1, 20),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 7 codes and at most 5 rows, so that small data crosses many ragged borders."""
    monkeypatch.setattr(shared, "MAX_TILE_CODES", 7)
    monkeypatch.setattr(shared, "CPU_TILE", 35)
    monkeypatch.setattr(grouped, "_FEW_GROUPS", 1)
    return


@pytest.fixture(params=[False, True], ids=["one tile", "several tiles"])
def several_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single tile is minimized in another way than several: what holds for one must hold for both."""
    if request.param:
        monkeypatch.setattr(shared, "CPU_TILE", 1)


def draw(seed: int, n: int, k: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Normal latents and codes."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, c, generator=generator, dtype=dtype),
        torch.randn(k, c, generator=generator, dtype=dtype),
    )


def expanded_argmin(latents: Tensor, codebook: Tensor) -> Tensor:
    """The plain expanded form that other libraries use."""
    distances = latents.square().sum(1, keepdim=True) - 2 * latents @ codebook.T + codebook.square().sum(1)
    return distances.argmin(1)


@given(**sizes, dtype=st.sampled_from([torch.float32, torch.float64]))
@quick
def test_finds_the_nearest_code(seed: int, n: int, k: int, c: int, dtype: torch.dtype) -> None:
    """In one tile, the choice is that of brute force."""
    latents, codebook = draw(seed, n, k, c, dtype)
    indices = nearest_code(latents, codebook)
    assert indices.shape == (n,)
    assert indices.dtype == torch.int64
    assert_nearest(indices, latents, codebook)


@pytest.mark.usefixtures("small_tiles")
@given(**sizes, dtype=st.sampled_from([torch.float32, torch.float64]))
@quick
def test_finds_the_nearest_code_across_tiles(seed: int, n: int, k: int, c: int, dtype: torch.dtype) -> None:
    """Many tiles and ragged edges change nothing."""
    latents, codebook = draw(seed, n, k, c, dtype)
    assert_nearest(nearest_code(latents, codebook), latents, codebook)


@pytest.mark.usefixtures("small_tiles")
@given(
    codebook=codebooks(num_codes=(1, 40), code_dim=(1, 20)),
    margin=st.floats(0.01, 0.24),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
@quick
def test_finds_the_code_that_latents_were_drawn_around(
    codebook: Tensor, margin: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Off the boundaries there is one right answer, in every tile, and no push below the margin changes it."""
    codebook = codebook.to(dtype)
    latents, indices = data.draw(latents_off_boundaries(codebook, margin=margin, grid=(3, 4)))
    rows = latents.movedim(1, -1).flatten(0, 2)
    assert torch.equal(nearest_code(rows, codebook), indices.flatten())
    push = torch.randn(rows.shape, dtype=dtype)
    push *= 0.99 * margin / push.norm(dim=1, keepdim=True)
    assert torch.equal(nearest_code(rows + push, codebook), indices.flatten())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "choose",
    [
        lambda right, latents, codebook: (right + 1) % 20,
        lambda right, latents, codebook: (latents @ codebook.T).argmin(1),
    ],
    ids=["next", "farthest"],
)
def test_the_judge_sees_wrong_choices(choose: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Negative control: indices shifted by one, and the farthest codes, are both refused."""
    latents, codebook = draw(1, 30, 20, 4)
    wrong = choose(nearest_code(latents, codebook), latents, codebook)
    with pytest.raises(AssertionError, match="a code that was not chosen is nearer"):
        assert_nearest(wrong, latents, codebook)


@pytest.mark.parametrize("tiles", [(1, 1), (1, 8), (3, 3), (7, 35), (8, 64), (4096, 1 << 19)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_codes_give_the_lowest_index(
    tiles: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the copies of a code lie, in one tile or in several, the first copy is chosen."""
    monkeypatch.setattr(shared, "MAX_TILE_CODES", tiles[0])
    monkeypatch.setattr(shared, "CPU_TILE", tiles[1])
    generator = torch.Generator().manual_seed(3)
    for n, k, c in [(5, 9, 7), (1, 17, 64), (33, 65, 64), (40, 130, 31), (3, 50, 1)]:
        for _ in range(4):
            distinct = torch.randn(max(1, k // 5), c, generator=generator, dtype=dtype)
            source = torch.randint(len(distinct), (k,), generator=generator)
            latents = torch.randn(n, c, generator=generator, dtype=dtype)
            indices = nearest_code(latents, distinct[source])
            first = [source.tolist().index(s) for s in source.tolist()]
            assert [first[i] for i in indices.tolist()] == indices.tolist()


def test_equal_codes_in_a_large_codebook() -> None:
    """The same in tiles of the real size, where a matrix product rounds the columns at its edges differently."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(800, 256, generator=generator, dtype=torch.float64)
    source = torch.randint(800, (4097,), generator=generator)
    first = torch.tensor([source.tolist().index(s) for s in source.tolist()])
    latents = torch.randn(300, 256, generator=generator, dtype=torch.float64)
    indices = nearest_code(latents, distinct[source])
    assert torch.equal(first[indices], indices)


def test_equal_codes_among_codes_of_one_length() -> None:
    """Sign codes all have the same length and interleave; only true copies are merged."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randint(0, 2, (200, 6), generator=generator).float() * 2 - 1
    latents = torch.randn(100, 6, generator=generator) * 0.3
    rows = [tuple(row) for row in codebook.tolist()]
    expected = [
        min(k for k in range(200) if rows[k] == tuple(row))
        for row in codebook[
            torch.from_numpy(np.argmin(((latents[:, None] - codebook) ** 2).sum(2).numpy(), 1))
        ].tolist()
    ]
    assert nearest_code(latents, codebook).tolist() == expected


def test_signed_zeros_are_one_code() -> None:
    """-0 and 0 are the same value, so such codes are a tie."""
    codebook = torch.tensor([[9.0, 9.0], [-0.0, 1.0], [0.0, 1.0], [-0.0, 1.0]])
    assert nearest_code(torch.tensor([[0.1, 0.9]]), codebook).tolist() == [1]


@pytest.mark.usefixtures("small_tiles")
@given(seed=st.integers(0, 2**31), k=st.integers(2, 30))
@quick
def test_exact_ties_between_different_codes(seed: int, k: int) -> None:
    """On small integers around zero nothing is rounded, and of equally near codes the first is chosen."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-3, 4, (k, 3), generator=generator).float()
    codebook = torch.cat([half, -half])[torch.randperm(2 * k, generator=generator)]
    latents = torch.randint(-3, 4, (25, 3), generator=generator).float()
    distances = ((latents[:, None] - codebook) ** 2).sum(2).numpy()
    np.testing.assert_array_equal(nearest_code(latents, codebook).numpy(), distances.argmin(1))


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("offset", [0.0, 1_000.0])
def test_large_offsets_are_exact(offset: float) -> None:
    """At an offset of 1,000 float32 still finds the nearest codes; the plain expanded form does not."""
    latents, codebook = draw(5, 2_000, 256, 16)
    latents, codebook = latents + offset, codebook + offset
    assert_nearest(nearest_code(latents, codebook), latents, codebook, clear_share=0.99)
    exact = nearest_code(latents.double(), codebook.double())
    wrong = (expanded_argmin(latents, codebook) != exact).float().mean()
    assert wrong > 0.3 if offset else wrong < 0.01


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("scale", [1e-35, 1e-22, 1e19, 1e36])
def test_every_scale_of_float32_is_exact(scale: float) -> None:
    """Although squares underflow or overflow; the plain expanded form is wrong."""
    latents, codebook = (tensor * scale for tensor in draw(5, 2_000, 256, 16))
    found = nearest_code(latents, codebook)
    assert_nearest(found.clone(), latents.double() / scale, codebook.double() / scale, clear_share=0.99)
    exact = nearest_code(latents.double(), codebook.double())
    assert (expanded_argmin(latents, codebook) != exact).float().mean() > 0.05


@pytest.mark.parametrize("scale", [1e-22, 1e22])
def test_exported_searches_know_every_scale_too(scale: float) -> None:
    """They are one expression, which scales without asking."""
    latents, codebook = (tensor * scale for tensor in draw(5, 200, 64, 8))
    expected = nearest_code(latents.double(), codebook.double())
    vmapped = torch.func.vmap(lambda rows: nearest_code(rows, codebook))(latents.unsqueeze(0))
    assert (vmapped[0] == expected).float().mean() > 0.99


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("runaway", [1e22, 1e36])
def test_the_scale_is_that_of_most_codes(runaway: float) -> None:
    """A code that ran away does not make the others vanish."""
    latents, codebook = draw(5, 2_000, 256, 16)
    expected = nearest_code(latents, codebook[:-1])
    codebook[-1] = runaway
    assert torch.equal(nearest_code(latents, codebook), expected)


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it would be asked for."""
    monkeypatch.setenv(ENGINE, "numpy")
    with pytest.raises(ValueError, match="TE_QUANT_SEARCH must be auto, torch or fused, got 'numpy'"):
        nearest_code(*draw(0, 3, 2, 4))


@pytest.mark.parametrize("installed", [None, "too old"])
def test_without_faiss_torch_searches(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that would suit it is then that by torch, and so it is with a version that was not measured."""
    old = types.SimpleNamespace(FAISS_VERSION_MAJOR=1, FAISS_VERSION_MINOR=7)
    monkeypatch.setitem(sys.modules, "faiss", old if installed else None)
    latents, codebook = draw(0, 2_000, 200, 8)
    by_faiss._load.cache_clear()
    try:
        assert not by_faiss.faiss_suits(latents, codebook, False)
        assert torch.equal(nearest_code(latents, codebook), operators._by_torch(latents, codebook))
    finally:
        by_faiss._load.cache_clear()


def test_float64_is_kept() -> None:
    """A difference that only float64 can hold decides."""
    codebook = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64)
    latents = torch.tensor([[1.0 + 1e-12], [1.0]], dtype=torch.float64)
    assert nearest_code(latents, codebook).tolist() == [1, 0]
    assert nearest_code(latents.float(), codebook.float()).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype) -> None:
    """Half inputs give what their float32 copies give, which distances in half precision do not."""
    latents, codebook = (t.to(dtype) for t in draw(7, 500, 128, 32))
    indices = nearest_code(latents, codebook)
    assert torch.equal(indices, nearest_code(latents.float(), codebook.float()))
    assert_nearest(indices, latents.float(), codebook.float())
    assert not torch.equal(indices, expanded_argmin(latents, codebook))


def test_devices_without_autocast_have_nothing_to_switch_off() -> None:
    """On such a device the context does nothing, and is no error."""
    with _precision.full_precision(torch.device("meta")):
        assert (torch.ones(2, 2, device="meta") @ torch.ones(2, 2, device="meta")).dtype == torch.float32


def test_autocast_does_not_reach_the_search() -> None:
    """Under bfloat16 autocast a quantizer chooses as without it; a product under autocast would not."""
    latents, codebook = draw(11, 2_000, 256, 32)
    quantizer = plain_quantizer(256, 32).eval()
    quantizer.codebook.data.copy_(codebook)
    expected = quantizer.encode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(latents), expected)
        assert torch.equal(quantizer(latents).indices, expected)
        assert not torch.equal(expanded_argmin(latents, codebook), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_no_tensor_of_all_distances(training: bool, update: str, temperature: float) -> None:
    """With many latents and codes nothing near N x K, nor K x K, is made, forward or backward."""
    n, k, c = 4_000, 2_500, 8
    quantizer = plain_quantizer(
        k,
        c,
        codebook_update=update,  # type: ignore[arg-type]
        orthogonal_reg=1.0,
        temperature=temperature,
    ).train(training)
    latents = torch.randn(n, c, requires_grad=True)
    with LargestTensor() as largest:
        quantizer(latents).loss.backward()
        quantizer.decode(quantizer.encode(latents))
    # A tile of scores, the minima of its groups, the codes of the nearest ones.
    scratch = 2 * shared.CPU_TILE + grouped._CPU_MINIMA + grouped._MAX_ROWS * c
    assert n * c <= largest.elements <= scratch + n * c + k * c < k * k < n * k


def test_the_recorder_sees_a_tensor_of_all_distances() -> None:
    """Negative control: cdist and a one-hot both trip it."""
    latents, codebook = draw(0, 400, 250, 8)
    with LargestTensor() as largest:
        torch.cdist(latents, codebook).argmin(1)
    assert largest.elements >= 400 * 250
    with LargestTensor() as largest:
        torch.nn.functional.one_hot(torch.zeros(400, dtype=torch.int64), 250)
    assert largest.elements >= 400 * 250


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic."""
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("tiles", [(2, 20), (4096, 1 << 19)])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_temperature_draws_from_the_softmax(
    tiles: tuple[int, int], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frequencies fit exp(-‖z - e‖²/(2T)), and neither twice nor half that temperature."""
    monkeypatch.setattr(shared, "MAX_TILE_CODES", tiles[0])
    monkeypatch.setattr(shared, "CPU_TILE", tiles[1])
    draws = 6_000 if tiles[0] == 2 else 20_000
    latent, codebook = draw(2, 1, 5, 3)
    indices = nearest_code(
        latent.expand(draws, 3), codebook, temperature=temperature, generator=torch.Generator().manual_seed(4)
    )
    counts = np.bincount(indices.numpy(), minlength=5)

    def statistic(t: float) -> float:
        logits = -((latent - codebook).double() ** 2).sum(1).numpy() / (2 * t)
        weights = np.exp(logits - logits.max())
        return chi_square(counts, draws * weights / weights.sum())

    # The 99.9 % quantile of chi-square with 4 degrees of freedom.
    assert statistic(temperature) < 18.5
    assert statistic(2 * temperature) > 18.5
    assert statistic(temperature / 2) > 18.5


def test_temperature_near_zero_takes_the_nearest() -> None:
    """In the limit sampling is the search."""
    latents, codebook = draw(3, 200, 30, 6)
    sampled = nearest_code(latents, codebook, temperature=1e-9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampled, nearest_code(latents, codebook))


def test_sampling_does_not_merge_equal_codes() -> None:
    """Each copy of a code has its own share of the draws."""
    indices = nearest_code(
        torch.zeros(3_000, 2), torch.ones(3, 2), temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert chi_square(np.bincount(indices, minlength=3), np.full(3, 1_000.0)) < 13.8


def test_sampling_follows_its_generator() -> None:
    """The same seed gives the same draw, another one another, and the global state is not touched."""
    latents, codebook = draw(3, 200, 30, 6)
    state = torch.get_rng_state()
    first, again, other = (
        nearest_code(latents, codebook, temperature=5.0, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("copies", [False, True])
def test_operators_are_well_registered(copies: bool) -> None:
    """Schema, fake kernel and tracing of the two operators agree with what they do."""
    latents, codebook = draw(0, 9, 5, 3)
    if copies:
        codebook[3] = codebook[1]
    torch.library.opcheck(torch.ops.te_quant.search_codes, (latents, codebook))
    torch.library.opcheck(torch.ops.te_quant.search_codes, (latents, codebook, True))
    torch.library.opcheck(
        torch.ops.te_quant.sample_codes,
        (latents, codebook, torch.tensor(0.5, dtype=torch.float64), None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.usefixtures("several_tiles")
def test_one_code_far_away_does_not_cost_the_others_their_accuracy() -> None:
    """A runaway code must not move the point that the search is centred on; centred on the mean, it would."""
    codebook = torch.randn(256, 64)
    codebook[100] = 1e6
    latents = torch.randn(500, 64)
    found = nearest_code(latents, codebook)
    exact = torch.cdist(latents.double(), codebook.double()).argmin(1)
    assert (found == exact).double().mean() > 0.99
    mean = codebook.mean(0)
    shifted, moved = codebook - mean, latents - mean
    dragged = (shifted.square().sum(1) / 2 - moved @ shifted.T).argmin(1)
    assert (dragged == exact).double().mean() < 0.5


@given(
    n=st.integers(0, 40),
    k=st.integers(1, 300),
    c=st.integers(1, 9),
    batch=st.sampled_from([(1, 3), (2, 2048), (64, 2048)]),
    long_code=st.sampled_from([1, 5, 100]),
    tiles=st.sampled_from([(7, 35), (16, 64), (1, 3), (64, 4096)]),
    few=st.sampled_from([1, 64]),
    dot=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=200)
def test_both_searches_find_the_first_nearest_code(
    n: int,
    k: int,
    c: int,
    batch: tuple[int, int],
    long_code: int,
    tiles: tuple[int, int],
    few: int,
    dot: bool,
    seed: int,
) -> None:
    """The CPU's and the other devices', on small integers: their arithmetic is exact, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    latents, codebook = (torch.randint(-2, 3, (rows, c), generator=generator).float() for rows in (n, k))
    expected = torch.cdist(latents.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if dot:
        expected = -(latents.double() @ codebook.double().T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "MAX_TILE_CODES", tiles[0])
        patch.setattr(grouped, "_MAX_TILE_LONG_CODES", tiles[0] // 2 + 1)
        patch.setattr(grouped, "_LONG_CODE", long_code)
        patch.setattr(grouped, "_MIN_ROWS", batch[0])
        patch.setattr(grouped, "_MAX_ROWS", batch[1])
        patch.setattr(shared, "CPU_TILE", tiles[1])
        patch.setattr(grouped, "_FEW_GROUPS", few)
        found = [grouped.grouped_argmin(latents, codebook, dot), tiled_argmin(latents, codebook, 0.0, None, dot)]
    first = [int((row == row.min()).nonzero()[0]) for row in expected]
    assert found[0].tolist() == found[1].tolist() == first


def test_scratch_is_kept_and_may_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are the same memory, also after inference mode; other threads and large ones have their own."""
    monkeypatch.setattr(grouped, "_kept", threading.local())
    with torch.inference_mode():
        first = grouped._scratch(1 << 20, torch.float32)
    second = grouped._scratch(1_000, torch.float32)
    second.fill_(1.0)
    assert second.data_ptr() == first.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(grouped._scratch, 10, torch.float32).result().data_ptr() != first.data_ptr()
    large = grouped._scratch(grouped._MAX_SCRATCH + 1, torch.float32)
    assert large.data_ptr() != grouped._scratch(10, torch.float32).data_ptr() == first.data_ptr()
    assert grouped._scratch(10, torch.float64).dtype == torch.float64


def test_threads_search_at_once() -> None:
    """Each finds what it finds alone."""
    problems = [draw(seed, 5_000, 300, 8) for seed in range(4)]
    alone = [nearest_code(*problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda problem: nearest_code(*problem), problems * 5))
    assert all(map(torch.equal, found, alone * 5))


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("c", [1, 4, 130])
@pytest.mark.parametrize("k", [1, 3, 5, 9, 1000])
def test_what_is_no_number_finds_a_code_that_is_there(k: int, c: int) -> None:
    """Not one of those that fill the last group; rows beside it are not disturbed."""
    latents, codebook = torch.randn(7, c), torch.randn(k, c)
    expected = nearest_code(latents, codebook)
    latents[2, c // 2], latents[4, 0] = torch.nan, torch.inf
    found = nearest_code(latents, codebook)
    assert found.min() >= 0
    assert found.max() < k
    rest = [0, 1, 3, 5, 6]
    assert torch.equal(found[rest], expected[rest])
