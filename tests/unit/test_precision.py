"""What autocast, half precision and compilers must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from te_quant import Quantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from te_quant._precision import unit_rows
from te_quant.functional import orthogonality
from tests.helpers import plain_quantizer, plain_residual


# From opcheck itself, in torch 2.14.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_unit_rows_have_the_gradient_of_a_normalization() -> None:
    """Against finite differences, in float64; a compiler may trace it (opcheck)."""
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit_rows(rows), rows / rows.square().sum(1, keepdim=True).sqrt())
    assert torch.autograd.gradcheck(unit_rows, rows)
    torch.library.opcheck(torch.ops.te_quant.unit_rows.default, (rows,))


@pytest.mark.parametrize("scale", [1e-37, 1e-22, 1e19, 1e37])
def test_rows_of_every_scale_get_unit_length(scale: float) -> None:
    """Also next to ordinary ones, which keep their bits; the gradient has the inverse scale."""
    generator = torch.Generator().manual_seed(0)
    ordinary, upstream = torch.randn(2, 6, 5, generator=generator)
    rows = torch.cat([ordinary, ordinary * scale]).requires_grad_()
    units = unit_rows(rows)
    assert torch.equal(units[:6], unit_rows(ordinary))
    torch.testing.assert_close(units[6:], units[:6], rtol=0, atol=1e-6)
    (units * torch.cat([upstream, upstream])).sum().backward()
    assert rows.grad is not None
    expected = rows.grad[:6].double() / scale
    torch.testing.assert_close(rows.grad[6:].double() / expected.abs().max(), expected / expected.abs().max())


def test_a_zero_latent_gets_no_gradient_under_cosine() -> None:
    """One blank token must not dominate the gradient of a batch; the others get theirs."""
    quantizer = plain_quantizer(9, 5, metric="cosine")
    latents = torch.randn(4, 5)
    latents[2] = 0
    latents.requires_grad_()
    quantizer(latents).loss.backward()
    assert latents.grad is not None
    assert latents.grad[2].eq(0).all()
    assert 0 < latents.grad.abs().max() < 1e3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_float32_in_a_half_precision_module(dtype: torch.dtype) -> None:
    """Counts past the range of float16 stay finite, and equal those of a float32 module on the same latents."""
    quantizer = plain_quantizer(8, 4, codebook_update="ema", decay=0.5)
    with torch.no_grad():
        quantizer.codebook.normal_()
        quantizer.code_sums.copy_(quantizer.codebook)
    half = copy.deepcopy(quantizer).to(dtype)
    assert half.codebook.dtype == dtype
    latents = torch.randn(70_000, 4).to(dtype)
    for _ in range(8):
        out = half(latents)
    assert half.usage.dtype == half.code_sums.dtype == torch.float32
    torch.testing.assert_close(half.usage.sum(), torch.tensor(70_000.0), rtol=0.01, atol=0)
    assert half.codebook.isfinite().all()
    assert torch.equal(half.decode(out.indices), out.codes)


_WITH_STATISTICS: dict[str, Callable[[], Quantizer]] = {
    "vq": lambda: plain_quantizer(8, 4),
    "vq-ema": lambda: plain_quantizer(8, 4, codebook_update="ema", decay=0.5),
    "vq-ema-cosine-penalty": lambda: plain_quantizer(
        8, 4, codebook_update="ema", decay=0.5, metric="cosine", orthogonal_reg=1.0
    ),
    "rvq-ema": lambda: ResidualVectorQuantizer(8, 4, 2, codebook_update="ema", decay=0.5),
    "rvq-shared": lambda: plain_residual(8, 4, 2, shared_codebook=True),
    "sim": lambda: SimVQ(8, 4),
}


def _built_under(dtype: torch.dtype, build: Callable[[], Quantizer]) -> Quantizer:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def _statistics(quantizer: Quantizer) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in quantizer.named_buffers()
        if name.rsplit(".", maxsplit=1)[-1] in (*VectorQuantizer.statistics, *SimVQ.statistics)
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", _WITH_STATISTICS)
def test_quantizer_built_under_a_half_default_dtype_has_statistics_in_float32(
    name: str, dtype: torch.dtype
) -> None:
    """And trains, with more latents than float16 can count, as a fresh cast one that loads its state."""
    built = _built_under(dtype, _WITH_STATISTICS[name])
    assert {tensor.dtype for tensor in _statistics(built).values()} == {torch.float32}
    assert built.dtype == dtype
    cast = _WITH_STATISTICS[name]().to(dtype)
    cast.load_state_dict(built.state_dict())
    latents = torch.randn(70_000, 4).to(dtype)
    for _ in range(4):
        assert torch.equal(built(latents).indices, cast(latents).indices)
    for key, tensor in built.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, cast.state_dict()[key])
    counts = next(iter(_statistics(built).values())).sum()
    assert counts > 2000


@pytest.mark.parametrize("name", _WITH_STATISTICS)
def test_quantizer_built_under_float64_has_statistics_in_float64(name: str) -> None:
    """Float32 is the least, not the most."""
    built = _built_under(torch.float64, _WITH_STATISTICS[name])
    assert {tensor.dtype for tensor in _statistics(built).values()} == {torch.float64}


def test_orthogonality_ignores_autocast() -> None:
    """Products in bfloat16 would leave orthonormal codes at 1e-7 and more."""
    codes = torch.linalg.qr(torch.randn(64, 16)).Q.T.contiguous()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = orthogonality(codes)
        rough = ((codes @ codes.T).float() - torch.eye(16)).square().sum() / 16**2
    assert inside == orthogonality(codes) < 1e-12
    assert rough > 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantizer", [plain_quantizer(4, 2, codebook_update="ema"), SimVQ(4, 2)], ids=repr)
def test_conversion_leaves_the_statistics_as_they_are(
    quantizer: VectorQuantizer | SimVQ, dtype: torch.dtype
) -> None:
    """Counts past 65,504 would be infinite in float16, and three digits long in bfloat16, for ever."""
    names = [name for name in ("usage", "code_sums") if hasattr(quantizer, name)]
    for name in names:
        getattr(quantizer, name).uniform_(1e5, 1e6)
    before = {name: getattr(quantizer, name).clone() for name in names}
    for converted in (copy.deepcopy(quantizer).to(dtype), copy.deepcopy(quantizer).to(dtype).float()):
        assert all(torch.equal(getattr(converted, name), value) for name, value in before.items())
    assert copy.deepcopy(quantizer).double().usage.dtype == torch.float64
    assert copy.deepcopy(quantizer).to(dtype).to("meta").usage.device.type == "meta"
