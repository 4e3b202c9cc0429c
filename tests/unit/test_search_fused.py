"""The search in one kernel, by Triton's interpreter, against brute force in float64.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant._search import ENGINE, FUSED, operators, tiles
from te_quant._search.tiled import tiled_argmin
from te_quant.functional import nearest_code
from tests.unit.quantizer_oracles import assert_nearest

# numpy no longer lets the interpreter of older versions make a number of an array.
pytest.importorskip("triton", minversion="3.7")

from triton.runtime import interpreter

from te_quant._search import fused
from te_quant._search.fused import fused_argmin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
quick = settings(deadline=None, max_examples=20)


def search(latents: Tensor, codebook: Tensor, multiprocessors: int = 1) -> Tensor:
    """In one kernel, as if the device had so many multiprocessors."""
    latents, codebook = latents.to(DEVICE), codebook.to(DEVICE)
    return fused_argmin(latents, codebook, tiles.center_of(codebook), multiprocessors).cpu()


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 150),
    k=st.integers(1, 300),
    c=st.integers(1, 40),
    offset=st.sampled_from([0.0, 1000.0]),
)
@quick
def test_finds_the_nearest_code(seed: int, n: int, k: int, c: int, offset: float) -> None:
    """Ragged rows, codes and channels; far from zero as well."""
    generator = torch.Generator().manual_seed(seed)
    latents, codebook = (torch.randn(count, c, generator=generator) + offset for count in (n, k))
    assert_nearest(search(latents, codebook), latents, codebook)


@pytest.mark.parametrize("multiprocessors", [1, 3, 1000])
def test_parts_of_the_codes_are_joined(multiprocessors: int) -> None:
    """However the codes are split, the index is the same; codes of every part are found."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(count, 24, generator=generator) for count in (130, 1500))
    found = search(latents, codebook, multiprocessors)
    assert torch.equal(found, torch.cdist(latents.double(), codebook.double()).argmin(1))
    assert torch.equal(found, tiled_argmin(latents, codebook, 0.0, None))
    assert len({int(index) // 256 for index in found}) == 6


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_largest_products_are_found(multiprocessors: int) -> None:
    """The same kernel without norms; the nearest code is usually another."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(count, 24, generator=generator).to(DEVICE) for count in (70, 300))
    center = tiles.center_of(codebook)
    found = fused_argmin(latents, codebook, center, multiprocessors, dot=True).cpu()
    assert torch.equal(found, (latents.double() @ codebook.double().T).argmax(1).cpu())
    assert (found != search(latents, codebook)).any()


@pytest.mark.parametrize(("n", "k", "c"), [(3, 70, 1100), (1, 2000, 12), (64, 1030, 5), (65, 300, 257)])
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_long_codes_and_few_latents(n: int, k: int, c: int, multiprocessors: int) -> None:
    """C beyond any tile; so few latents that the codes are split among the programs."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(count, c, generator=generator) for count in (n, k))
    assert_nearest(search(latents, codebook, multiprocessors), latents, codebook, clear_share=0.5)


def interpreted_dot(self: Any, left: Any, right: Any, sums: Any, *_: object) -> Any:
    """Multiply bfloat16 as the numbers that its 16 bits stand for; the interpreter takes them for integers."""
    factors = [
        torch.from_numpy(side.data.astype("int32") << 16).view(torch.float32)
        if str(side.dtype) == "bf16"
        else torch.from_numpy(side.data)
        for side in (left, right)
    ]
    return interpreter.TensorHandle((factors[0] @ factors[1]).numpy() + sums.data, sums.dtype.scalar)


@pytest.mark.parametrize("size", [20, 70])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_rounded_products_find_codes_that_are_far_apart(
    monkeypatch: pytest.MonkeyPatch, precision: str, size: int
) -> None:
    """The other tilings and precisions, latents that stay and latents that do not; far from zero."""
    monkeypatch.setattr(fused, "_precision", lambda device: precision)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreted_dot)
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(200, size, generator=generator) + 100
    wanted = torch.randint(200, (140,), generator=generator)
    latents = codebook[wanted] + 0.01 * torch.randn(140, size, generator=generator)
    assert torch.equal(search(latents, codebook), wanted)


def test_bfloat16_measures_between_rounded_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, so the index is that of float64 between the points rounded by hand; without rounding it is not."""
    monkeypatch.setattr(fused, "_precision", lambda device: "bf16")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreted_dot)
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(count, 3, generator=generator) for count in (400, 900))
    center = tiles.center_of(codebook)
    e = (codebook - center).bfloat16().float()
    # Of latents the interpreter cuts the bits off that a GPU rounds.
    z = ((latents - center).view(torch.int32) & ~0xFFFF).view(torch.float32)
    found = search(latents, codebook)
    assert_nearest(found, z, e)
    exact = torch.cdist(latents.double(), codebook.double()).argmin(1)
    assert 0 < int((found != exact).sum()) < 80


@pytest.mark.parametrize(
    ("asked", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "bf16"), (None, "tf32")]
)
def test_precision_is_the_one_that_torch_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, expected: str
) -> None:
    """By torch.set_float32_matmul_precision, or for CUDA only; never on GPUs without such tensor cores."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda")
    try:
        if asked is None:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(asked)
        assert fused._precision(device) == expected
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert fused._precision(device) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_ties_go_to_the_lowest_index(multiprocessors: int) -> None:
    """Within a tile, between tiles and between parts; the highest would be another (the negative control)."""
    codebook = torch.eye(16).repeat(80, 1)
    latents = torch.eye(16) * 2
    assert torch.equal(search(latents, codebook, multiprocessors), torch.arange(16))
    distances = torch.cdist(latents, codebook)
    assert not torch.equal(len(codebook) - 1 - distances.flip(1).argmin(1), torch.arange(16))


# Both of numpy, in the interpreter.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_indices_are_in_range_whatever_comes(value: float) -> None:
    """What is no number gives some code; other rows are as without it, and padding is never chosen."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(count, 5, generator=generator) for count in (9, 131))
    whole = search(latents, codebook)
    latents[4, 2] = value
    found = search(latents, codebook)
    assert 0 <= int(found[4]) < 131
    if value != value:
        assert int(found[4]) == int(tiled_argmin(latents, codebook, 0.0, None)[4]) == 0
    keep = torch.arange(9) != 4
    assert torch.equal(found[keep], whole[keep])


def test_views_are_searched() -> None:
    """Strides of latents and codebook do not matter."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(6, count, generator=generator).T for count in (50, 40))
    assert torch.equal(search(latents, codebook), torch.cdist(latents.double(), codebook.double()).argmin(1))


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel is for float32 on CUDA devices, and only where it is asked for, by either variable."""
    monkeypatch.delenv(FUSED, raising=False)
    monkeypatch.delenv(ENGINE, raising=False)
    assert not operators._fused_wanted("cuda", torch.float32)
    monkeypatch.setenv(ENGINE, "fused")
    assert operators._fused_wanted("cuda", torch.float32)
    assert not operators._fused_wanted("cpu", torch.float32)
    monkeypatch.setenv(ENGINE, "auto")
    assert not operators._fused_wanted("cuda", torch.float32)
    monkeypatch.setenv(FUSED, "1")
    assert operators._fused_wanted("cuda", torch.float32)
    assert not operators._fused_wanted("cuda", torch.float64)
    assert not operators._fused_wanted("cpu", torch.float32)
    monkeypatch.setenv(FUSED, "yes")
    with pytest.raises(ValueError, match="TE_QUANT_FUSED_SEARCH must be 0 or 1, got 'yes'"):
        operators._fused_wanted("cuda", torch.float32)


def test_variables_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of them is disabled silently."""
    monkeypatch.setenv(FUSED, "1")
    monkeypatch.setenv(ENGINE, "torch")
    with pytest.raises(
        ValueError, match="TE_QUANT_FUSED_SEARCH must be 0 or unset where TE_QUANT_SEARCH is torch"
    ):
        operators._fused_wanted("cuda", torch.float32)


def test_operator_dispatches_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is wanted the operator calls it, and equal codes still give the first."""
    calls = []

    def counted(latents: Tensor, codebook: Tensor, center: Tensor, dot: bool = False) -> Tensor:
        calls.append(len(latents))
        return fused_argmin(latents, codebook, center, 1, dot=dot)

    monkeypatch.setattr(fused, "fused_argmin", counted)
    monkeypatch.setattr(operators, "_fused_wanted", lambda device, dtype: True)
    monkeypatch.setattr(tiles, "CPU_TILE", 1 << 40)
    codebook = torch.randn(40, 5)
    codebook[30] = codebook[3]
    assert int(nearest_code(codebook[30:31], codebook)) == 3
    assert calls == [1]


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        (FUSED, "1", "TE_QUANT_FUSED_SEARCH must be 0 or unset where triton cannot be imported, got 1"),
        (ENGINE, "fused", "TE_QUANT_SEARCH must be auto or torch where triton cannot be imported, got fused"),
    ],
)
def test_without_triton_the_variable_is_refused(
    variable: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence that names it."""
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(operators, "_fused_wanted", lambda device, dtype: True)
    monkeypatch.setitem(sys.modules, "te_quant._search.fused", None)
    with pytest.raises(ImportError, match=sentence):
        nearest_code(torch.randn(2, 5), torch.randn(3, 5))


_LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

class NoGPU:
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(NoGPU())
from te_quant._search.fused import kernel_of, tiling_for

floats, indices = MockTensor.wrap_dtype(torch.float32), MockTensor.wrap_dtype(torch.int64)
for N, K, C in ((16384, 1024, 64), (1, 1, 64), (77, 3001, 64), (77, 3001, 63)):
    kernel, constants, options = kernel_of(tiling_for("tf32", 1024, C), C)
    kernel.warmup(*[floats] * 5, indices, N, K, C, 256, grid=(1, 1), **constants, **options)
    print(len(kernel.device_caches[0][0]))
"""


@pytest.mark.slow
def test_one_machine_code_serves_any_number_of_latents_and_codes() -> None:
    """As Triton would launch it on a GPU; codes whose size is no multiple of 16 need another (the control)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LAUNCH],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1", "1", "2"]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
def test_operator_uses_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the operator, compiled or not: the indices of the tiled search, and no N x K memory."""
    monkeypatch.setenv(FUSED, "1")
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(n, 64, generator=generator).to(DEVICE) for n in (65_536, 16_384))
    nearest_code(latents, codebook)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = nearest_code(latents, codebook)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
    assert_nearest(found[:512].cpu(), latents[:512].cpu(), codebook.cpu())
    torch.library.opcheck(torch.ops.te_quant.search_codes, (latents[:100], codebook[:50]))
    compiled = torch.compile(nearest_code, fullgraph=True)
    assert torch.equal(compiled(latents, codebook), found)
