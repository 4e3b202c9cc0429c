"""The search in one kernel: by Triton's interpreter against brute force in float64, and compiled for GPUs.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant._search import FUSED, operators, tiles
from te_quant._search.tiled import tiled_argmin
from te_quant.functional import nearest_code
from tests.unit.quantizer_oracles import assert_nearest

pytest.importorskip("triton", reason="triton is not installed")

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
    assert len({int(index) // 384 for index in found}) == 4


def test_tf32_finds_the_same_where_codes_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tiles and precision; latents lie next to a code each."""
    monkeypatch.setattr(fused, "_precision", lambda device: "tf32")
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(200, 70, generator=generator)
    wanted = torch.randint(200, (140,), generator=generator)
    latents = codebook[wanted] + 0.01 * torch.randn(140, 70, generator=generator)
    assert torch.equal(search(latents, codebook), wanted)


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_ties_go_to_the_lowest_index(multiprocessors: int) -> None:
    """Within a tile, between tiles and between parts; the highest would be another (the negative control)."""
    codebook = torch.eye(16).repeat(80, 1)
    latents = torch.eye(16) * 2
    assert torch.equal(search(latents, codebook, multiprocessors), torch.arange(16))
    distances = torch.cdist(latents, codebook)
    assert not torch.equal(len(codebook) - 1 - distances.flip(1).argmin(1), torch.arange(16))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_indices_are_in_range_whatever_comes(value: float) -> None:
    """What is no number gives some code; other rows are as without it, and padding is never chosen."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(count, 5, generator=generator) for count in (9, 131))
    whole = search(latents, codebook)
    latents[4, 2] = value
    found = search(latents, codebook)
    assert 0 <= int(found[4]) < 131
    keep = torch.arange(9) != 4
    assert torch.equal(found[keep], whole[keep])


def test_views_are_searched() -> None:
    """Strides of latents and codebook do not matter."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = (torch.randn(6, count, generator=generator).T for count in (50, 40))
    assert torch.equal(search(latents, codebook), torch.cdist(latents.double(), codebook.double()).argmin(1))


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel is for float32 on CUDA devices, and only where it is asked for."""
    monkeypatch.delenv(FUSED, raising=False)
    assert not operators._fused_wanted("cuda", torch.float32)
    monkeypatch.setenv(FUSED, "1")
    assert operators._fused_wanted("cuda", torch.float32)
    assert not operators._fused_wanted("cuda", torch.float64)
    assert not operators._fused_wanted("cpu", torch.float32)
    monkeypatch.setenv(FUSED, "yes")
    with pytest.raises(ValueError, match="TE_QUANT_FUSED_SEARCH must be 0 or 1, got 'yes'"):
        operators._fused_wanted("cuda", torch.float32)


def test_operator_dispatches_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is wanted the operator calls it, and equal codes still give the first."""
    calls = []

    def counted(latents: Tensor, codebook: Tensor, center: Tensor) -> Tensor:
        calls.append(len(latents))
        return fused_argmin(latents, codebook, center, 1)

    monkeypatch.setattr(fused, "fused_argmin", counted)
    monkeypatch.setattr(operators, "_fused_wanted", lambda device, dtype: True)
    monkeypatch.setattr(tiles, "CPU_TILE", 1 << 40)
    codebook = torch.randn(40, 5)
    codebook[30] = codebook[3]
    assert int(nearest_code(codebook[30:31], codebook)) == 3
    assert calls == [1]


def test_without_triton_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that names it."""
    monkeypatch.setattr(operators, "_fused_wanted", lambda device, dtype: True)
    monkeypatch.setattr(tiles, "CPU_TILE", 1 << 40)
    monkeypatch.setitem(sys.modules, "te_quant._search.fused", None)
    with pytest.raises(
        ImportError, match="TE_QUANT_FUSED_SEARCH must be 0 or unset where triton cannot be imported"
    ):
        nearest_code(torch.randn(2, 5), torch.randn(3, 5))


_COMPILE = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from te_quant._search.fused import _STAGES, _TILES, _nearest

pointers = {name: "*fp32" for name in ("latents", "codes", "half_norms", "center", "scores")} | {"indices": "*i64"}
for capability in (80, 90):
    for precision, tiles in _TILES.items():
        fixed = {"ROWS": tiles.rows, "CODES": tiles.codes, "CHANNELS": tiles.channels, "PRECISION": precision}
        types = pointers | dict.fromkeys(("N", "K", "C", "part"), "i32") | dict.fromkeys(fixed, "constexpr")
        source = ASTSource(fn=_nearest, signature=types, constexprs=fixed)
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tiles.warps, "num_stages": _STAGES},
        )
        ptx = kernel.asm["ptx"]
        facts = {"capability": capability, "precision": precision, "shared": kernel.metadata.shared}
        facts |= {"cubin": len(kernel.asm["cubin"]), "tensor_cores": "mma" in ptx, "fma": "fma.rn.f32" in ptx}
        print(json.dumps(facts))
"""


def test_kernel_compiles_for_gpus() -> None:
    """To machine code, without a GPU; what it needs of shared memory is there on every one of them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(kernel["capability"], kernel["precision"]) for kernel in kernels] == [
        (80, "ieee"),
        (80, "tf32"),
        (90, "ieee"),
        (90, "tf32"),
    ]
    for kernel in kernels:
        assert kernel["cubin"] > 0
        # 99 KiB are what a block may have on the smallest of the architecture.
        assert kernel["shared"] <= 99 * 1024
        assert kernel["tensor_cores"] == (kernel["precision"] == "tf32")
        assert kernel["fma"] or kernel["tensor_cores"]


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
