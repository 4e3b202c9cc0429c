"""The search by faiss against brute force in float64, and what it must leave as it was.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant._search import by_faiss
from te_quant._search.operators import ENGINE, _by_torch
from te_quant.functional import nearest_code
from tests.unit.quantizer_oracles import assert_nearest

with warnings.catch_warnings():
    # From Python 3.12 on the types of its wrapper warn.
    warnings.simplefilter("ignore", DeprecationWarning)
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")

if by_faiss._load() is None:
    pytest.skip("faiss is older than what was measured", allow_module_level=True)


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let faiss search small problems too, in batches of a few hundred rows, on any CPU."""
    monkeypatch.delenv(ENGINE, raising=False)
    monkeypatch.setattr(by_faiss, "_level", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(by_faiss, "_MIN_SCORES", 1)
    monkeypatch.setattr(by_faiss, "_MIN_ROWS", 1)
    monkeypatch.setattr(by_faiss, "_MIN_CODES", 1)
    monkeypatch.setattr(by_faiss, "_BATCH", 1 << 12)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of faiss, and the number of its threads."""
    made: list[tuple[int, int, int]] = []
    search = faiss.knn

    def counted(latents: object, codes: object, count: int) -> object:
        made.append((len(latents), faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold))
        return search(latents, codes, count)

    monkeypatch.setattr(faiss, "knn", counted)
    return made


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    """That many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(n: int, k: int, c: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal latents and codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=generator), torch.randn(k, c, generator=generator)


def by_faiss_alone(latents: Tensor, codebook: Tensor) -> Tensor:
    """What faiss finds on its fast path, without centring and without a look at its distances."""
    with by_faiss._prepared():
        return torch.from_numpy(faiss.knn(latents.numpy(), codebook.numpy(), 1)[1][:, 0])


@pytest.mark.parametrize("c", [1, 3, 8, 16, 17, 32, 33, 64, 256])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 1), (40, 2), (300, 5), (1, 100), (700, 1000)])
def test_finds_the_nearest_code(n: int, k: int, c: int, calls: list[int]) -> None:
    """In whole vectors of codes and what is left over, in one batch of rows and in several."""
    latents, codebook = draw(n, k, c)
    indices = nearest_code(latents, codebook)
    assert indices.shape == (n,)
    assert indices.dtype == torch.int64
    assert_nearest(indices, latents, codebook)
    # Of one or two codes the middle may be one of them, and then they have no scale. With fewer rows than threads
    # torch searches.
    if k > 2:
        expected = n if n >= torch.get_num_threads() else 0
        assert sum(rows for rows, _, _ in calls) == expected


def test_no_latents_give_no_indices() -> None:
    """An empty batch is no error."""
    assert nearest_code(torch.empty(0, 8), torch.randn(5, 8)).shape == (0,)


def test_threads_are_those_of_torch_and_nothing_stays_changed(threads: int, calls: list[int]) -> None:
    """Number of threads and fast path hold while it searches, and its own settings are back afterwards."""
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    latents, codebook = (tensor + 5 for tensor in draw(900, 300, 8))
    assert_nearest(nearest_code(latents, codebook), latents, codebook)
    # Rows are shifted some at a time, in equal parts.
    assert [rows for rows, _, _ in calls] == [450, 450]
    assert {call[1:] for call in calls} == {(threads, 0)}
    assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == before
    assert before[1] > 0


def test_settings_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the search raises."""

    def broken(*_: object) -> None:
        raise RuntimeError("no such luck")

    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    monkeypatch.setattr(faiss, "knn", broken)
    with pytest.raises(RuntimeError, match="no such luck"):
        nearest_code(*draw(50, 20, 8))
    assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == before


@pytest.mark.parametrize("c", [8, 64])
def test_threads_may_search_at_once(c: int) -> None:
    """Each finds what it finds by itself, and the last one puts the settings back."""
    before = faiss.cvar.distance_compute_blas_threshold
    problems = [draw(1_500, 300, c, seed) for seed in range(4)]
    expected = [nearest_code(*problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda problem: nearest_code(*problem), problems * 5))
    assert all(map(torch.equal, found, expected * 5))
    assert faiss.cvar.distance_compute_blas_threshold == before


@pytest.mark.parametrize("c", [2, 8, 20, 40])
def test_of_equally_near_codes_the_first_is_chosen(c: int) -> None:
    """On small integers nothing is rounded, and ties abound."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randint(-2, 3, (rows, c), generator=generator).float() for rows in (200, 90))
    distances = torch.cdist(latents.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    first = [int((row == row.min()).nonzero()[0]) for row in distances]
    assert nearest_code(latents, codebook).tolist() == first


@pytest.mark.parametrize("k", [2, 15, 16, 17, 333, 512, 1000])
@pytest.mark.parametrize(("c", "offset"), [(4, 0.0), (8, 9.0), (31, 0.0), (33, 0.0), (64, 9.0), (100, 0.0)])
def test_of_equal_codes_the_first_is_chosen(k: int, c: int, offset: float) -> None:
    """Wherever their copies lie, in whole vectors of codes or among those that are left over."""
    distinct, latents = (tensor + offset for tensor in draw(max(2, k // 8), 500, c))
    source = torch.randint(len(distinct), (k,), generator=torch.Generator().manual_seed(0))
    indices = nearest_code(latents, distinct[source])
    first = torch.tensor([source.tolist().index(s) for s in source.tolist()])
    assert torch.equal(first[indices], indices)


@pytest.mark.parametrize("c", [16, 64])
@pytest.mark.parametrize("scale", [1e-35, 1e-24, 1e-22, 1e-13, 1.0, 1e13, 1e19, 1e36])
def test_every_scale_is_exact(scale: float, c: int) -> None:
    """Where squares leave the range of float32 faiss by itself is wrong: the control."""
    latents, codebook = (tensor * scale for tensor in draw(1_000, 256, c))
    exact = latents.double() / scale, codebook.double() / scale
    assert_nearest(nearest_code(latents, codebook), *exact, clear_share=0.99)
    wrong = (by_faiss_alone(latents, codebook) != torch.cdist(*exact).argmin(1)).float().mean()
    assert wrong > 0.2 if not 1e-23 < scale < 1e18 else wrong < 0.1


@pytest.mark.parametrize("c", [16, 64])
@pytest.mark.parametrize("unused", [0, 100])
def test_large_offsets_are_exact(unused: int, c: int) -> None:
    """At an offset of 1,000 faiss by itself is wrong: the control. Codes left near zero change nothing."""
    latents, codebook = (tensor + 1_000 for tensor in draw(1_000, 256, c))
    codebook[:unused] -= 1_000
    live = codebook[unused:]
    assert_nearest(nearest_code(latents, codebook) - unused, latents, live, clear_share=0.99)
    exact = torch.cdist(latents.double(), codebook.double()).argmin(1)
    assert (by_faiss_alone(latents, codebook) != exact).float().mean() > 0.2


@pytest.mark.parametrize("c", [8, 64])
@pytest.mark.parametrize("every", [1, 10])
def test_latents_far_from_the_codes_are_exact(every: int, c: int, calls: list[int]) -> None:
    """All of them, or one in ten. ‖z‖² rounds away what tells codes apart, so faiss by itself is wrong."""
    latents, codebook = draw(600, 256, c)
    latents[::every] *= 1e8
    nearest = nearest_code(latents, codebook)
    assert bool(calls) == (every > 1)
    exact = torch.cdist(latents.double(), codebook.double()).argmin(1)
    assert (nearest == exact).double().mean() > 0.998
    assert (by_faiss_alone(latents[::every], codebook) == exact[::every]).double().mean() < 0.5


@pytest.mark.parametrize("distance", [7.0, 9.0])
def test_long_codes_are_searched_by_torch_from_eight_times_their_distance_on(
    distance: float, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearer latents lose less than three bits to ‖z‖²."""
    latents, codebook = (F.normalize(tensor) for tensor in draw(500, 256, 64))
    latents = latents * distance
    assert_nearest(nearest_code(latents, codebook), latents, codebook, clear_share=0.99)
    assert sum(rows for rows, _, _ in calls) == (500 if distance < 8 else 0)
    # The control: short codes stay with faiss there.
    nearest_code(latents[:, :8], codebook[:, :8])
    assert calls[-1][0] == 500


@pytest.mark.parametrize("c", [8, 64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_rows_without_a_distance_are_searched_by_torch(value: float, k: int, c: int) -> None:
    """They get the same indices as there, and the other rows theirs."""
    latents, codebook = draw(64, k, c)
    expected = nearest_code(latents, codebook)
    latents[5, 2], latents[20, 0], latents[21] = value, value, value
    found = nearest_code(latents, codebook)
    broken = torch.tensor([5, 20, 21])
    assert torch.equal(found[broken], _by_torch(latents[broken], codebook))
    found[broken] = expected[broken]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("c", [8, 64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_codes_that_are_not_finite_are_left_to_torch(value: float, c: int, calls: list[int]) -> None:
    """All rows then get the indices that they get there."""
    latents, codebook = draw(64, 30, c)
    codebook[7, 3] = value
    assert torch.equal(nearest_code(latents, codebook), _by_torch(latents, codebook))
    assert calls == []


def test_views_are_searched() -> None:
    """Strides of latents and codebook do not matter, and neither is written to."""
    latents, codebook = (torch.randn(9, count).T[:, ::2] for count in (50, 40))
    copies = latents.clone(), codebook.clone()
    assert_nearest(nearest_code(latents, codebook), *copies)
    assert torch.equal(latents, copies[0])
    assert torch.equal(codebook, copies[1])


def test_gradients_and_inference_mode_do_not_matter() -> None:
    """Latents may want a gradient, and tensors may be made in inference mode."""
    latents, codebook = draw(50, 40, 8)
    expected = nearest_code(latents, codebook)
    assert torch.equal(nearest_code(latents.requires_grad_(), codebook.requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(nearest_code(latents.clone(), codebook.clone()), expected)


@pytest.mark.parametrize(
    ("change", "searched"),
    [
        (lambda tensor: tensor, True),
        (lambda tensor: tensor.double(), False),
        (lambda tensor: tensor.repeat(1, 5), True),
    ],
    ids=["short float32", "float64", "long float32"],
)
def test_only_float32_is_searched_by_faiss(
    change: Callable[[Tensor], Tensor], searched: bool, calls: list[int]
) -> None:
    """Float64 stays with torch, and so do products."""
    latents, codebook = (change(tensor) for tensor in draw(50, 40, 8))
    nearest_code(latents, codebook)
    assert bool(calls) == searched
    calls.clear()
    torch.ops.te_quant.search_codes(latents, codebook, True)
    assert calls == []


def test_the_variable_keeps_faiss_away(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """The indices are then the bits of the search by torch."""
    latents, codebook = draw(50, 40, 8)
    monkeypatch.setenv(ENGINE, "torch")
    assert torch.equal(nearest_code(latents, codebook), _by_torch(latents, codebook))
    assert calls == []
    monkeypatch.setenv(ENGINE, "auto")
    nearest_code(latents, codebook)
    assert len(calls) == 1


@pytest.mark.parametrize(("limit", "least"), [("_MIN_SCORES", 50 * 40), ("_MIN_ROWS", 50), ("_MIN_CODES", 40)])
def test_small_searches_are_left_to_torch(
    limit: str, least: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """Below each limit the calls around the search cost as much as it saves."""
    monkeypatch.setattr(by_faiss, limit, least)
    nearest_code(*draw(49, 39, 8))
    assert calls == []
    nearest_code(*draw(50, 40, 8))
    assert len(calls) == 1


def test_fewer_rows_than_threads_are_left_to_torch(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """For them faiss takes another path."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 51)
    nearest_code(*draw(50, 40, 8))
    assert calls == []


@pytest.mark.parametrize(
    ("level", "suited"),
    [
        ("AVX512_VPOPCNT", [16, 17, 32, 33, 256]),
        ("AVX512", [16, 17, 32, 33, 256]),
        ("AVX2", [16]),
        ("ARM_NEON", []),
        ("NONE", []),
    ],
)
def test_the_vector_instructions_decide_which_codes_are_searched(
    level: str, suited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other instructions it is slower, or was not measured."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(faiss.SIMDConfig, "get_level_name", staticmethod(lambda: level))
    sizes = [0, 16, 17, 32, 33, 256]
    found = [c for c in sizes if by_faiss.faiss_suits(torch.empty(1_024, c), torch.empty(1_024, c), False)]
    assert found == suited


def test_faiss_is_not_imported_for_long_codes_that_it_does_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows the vector instructions too, and short codes are the control."""
    asked: list[str] = []

    def level() -> str:
        asked.append("level")
        return "AVX2"

    monkeypatch.setattr(by_faiss, "_level", level)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not by_faiss.faiss_suits(torch.empty(1_024, 33), torch.empty(1_024, 33), False)
    assert asked == []
    assert by_faiss.faiss_suits(torch.empty(1_024, 16), torch.empty(1_024, 16), False)
    assert asked


_PROCESSES = """
import sys, torch
from torch.utils.data import DataLoader
from te_quant import VectorQuantizer
from te_quant.functional import nearest_code

torch.set_num_threads(2)
latents, codebook = torch.randn(70_000, SIZE), torch.randn(256, SIZE)

class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return nearest_code(latents, codebook)

def in_workers():
    return list(DataLoader(Tokens(), batch_size=None, num_workers=2, multiprocessing_context="fork"))

VectorQuantizer(64, 64).eval()(torch.randn(2, 64, 4, 4))
nearest_code(latents[:100], codebook)
first = in_workers()
print("faiss" in sys.modules)
for _ in range(20):
    expected = nearest_code(latents, codebook)
    torch.mm(latents.T, latents)
print("faiss" in sys.modules)
print(all(torch.equal(found, expected) for found in [*first, *in_workers()]))
print(torch.get_num_threads())
"""

_FAISS_FIRST = """
import faiss, torch
from te_quant.functional import nearest_code

torch.set_num_threads(1)
faiss.omp_set_num_threads(2)
seen, search = [], faiss.knn
faiss.knn = lambda *given: (seen.append(faiss.omp_get_max_threads()), search(*given))[1]
latents, codebook = torch.randn(70_000, SIZE), torch.randn(256, SIZE)
found = nearest_code(latents, codebook)
print(*seen, faiss.omp_get_max_threads(), torch.get_num_threads())
torch.set_num_threads(2)
for _ in range(20):
    torch.mm(latents.T, latents)
    print(end="" if torch.equal(nearest_code(latents, codebook), found) else "differs")
"""


def run_apart(script: str, size: int) -> list[str]:
    """Return the words that a fresh process prints about codes of that size; it may not hang."""
    command = [sys.executable, "-W", "ignore", "-c", script.replace("SIZE", str(size))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 64])
def test_two_runtimes_share_a_process_and_its_forks(size: int) -> None:
    """Products of torch and searches take turns, and nothing hangs.

    The package and searches that faiss does not suit leave it alone. Worker processes of a DataLoader search as
    well, whether or not their parent has imported it.
    """
    assert run_apart(_PROCESSES, size) == ["False", "True", "True", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 64])
def test_a_runtime_of_its_own_gets_the_number_of_threads_of_torch(size: int) -> None:
    """Imported before torch, faiss has one. Its number is back afterwards; products and searches take turns."""
    assert run_apart(_FAISS_FIRST, size) == ["1", "2", "1"]
