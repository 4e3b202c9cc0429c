"""Masked tokens count for nothing: what every pass gives and changes is that of the other tokens only.

``check_quantizer`` holds every quantizer to this in eager mode; here is what it does not reach.

Shape letters: B batch, C code size, N latent vectors.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from te_quant import (
    FSQ,
    LFQ,
    CodebookUsage,
    ProductQuantizer,
    Quantizer,
    ResidualVectorQuantizer,
    SimVQ,
    VectorQuantizer,
)
from te_quant.quantizers import Rows
from tests.helpers import exactly, plain_quantizer, plain_residual
from tests.unit.quantizer_cases import QUANTIZERS, is_random, mostly_slow, state_of

DOUBLE = torch.float64


def draw(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """(3, C, 4, 5) latents, NaN where the (3, 4, 5) mask is False."""
    mask = torch.rand(3, 4, 5) < 0.6
    latents = torch.randn(3, quantizer.code_dim, 4, 5, dtype=DOUBLE)
    return torch.where(mask.unsqueeze(1), latents, math.nan), mask


def kept(latents: Tensor, mask: Tensor) -> Tensor:
    """(n, C), the vectors that count."""
    return latents.movedim(1, -1)[mask]


def step(quantizer: Any, latents: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """One training step; its output, and the gradient of the latents."""
    latents = latents.clone().requires_grad_()
    output = quantizer(latents, **options)
    (gradient,) = torch.autograd.grad(output.loss + output.quantized.square().sum(), latents)
    return output, gradient


def assert_same_state(quantizer: Quantizer, other: Quantizer) -> None:
    """In every buffer and parameter."""
    for name, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", mostly_slow())
def test_codebooks_start_and_move_as_without_masked_tokens(name: str) -> None:
    """From a fresh codebook, over steps with ever other masks, one of them empty; without the mask they do not."""
    quantizer: Quantizer = QUANTIZERS[name]().double()
    if is_random(quantizer):
        return
    twin, careless = copy.deepcopy(quantizer), copy.deepcopy(quantizer)
    for place in range(4):
        latents, mask = draw(quantizer)
        mask &= place != 2
        output, gradient = step(quantizer, latents, mask=mask)
        expected, wanted = step(twin, kept(latents, mask))
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(kept(gradient, mask), wanted, rtol=1e-11, atol=1e-14)
        assert not kept(gradient, ~mask).any()
        assert_same_state(quantizer, twin)
        step(careless, latents.nan_to_num())
    careless.apply_pending()
    twin.apply_pending()
    states = careless.state_dict(), twin.state_dict()
    assert not states[0] or not all(torch.allclose(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["lfq", "bsq", "groups"])
def test_entropies_are_those_of_the_tokens_that_count(name: str) -> None:
    """Both of them, by name; zeros in place of the masked latents would change each."""
    options: dict[str, Any] = {"bsq": {"spherical": True}, "groups": {"entropy_group_dim": 2}}.get(name, {})
    quantizer = LFQ(4, temperature=0.5, **options).double()
    latents, mask = draw(quantizer)
    others, zeros = kept(latents, mask), latents.nan_to_num()
    found = quantizer.loss_terms(latents, quantizer(latents, mask=mask).indices)
    wanted = quantizer.loss_terms(others, quantizer(others).indices)
    careless = quantizer.loss_terms(zeros, quantizer(zeros).indices)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(found.values()), quantizer(latents, mask=mask).loss)
    assert all(abs(careless[term] - wanted[term]) > 1e-3 for term in ("entropy", "diversity", "commitment"))


NESTINGS: dict[str, Any] = {
    "vq": partial(plain_quantizer, 9, 4),
    "sim": partial(SimVQ, 9, 4),
    "rvq": partial(ResidualVectorQuantizer, 9, 4, 3, codebook_update="ema"),
    "dropout": partial(plain_residual, 9, 4, 3, quantizer_dropout=True),
    "stages": lambda: ResidualVectorQuantizer(stages=[FSQ((5, 5)), LFQ(2)], loss_weights=(1.0, 0.5)),
    "product": lambda: ProductQuantizer([plain_residual(9, 2, 2), FSQ((3, 3))]),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_terms_of_the_loss_leave_masked_tokens_out(name: str) -> None:
    """They know them by their indices, and add up to what ``forward`` returned."""
    quantizer: Quantizer = NESTINGS[name]().double().train()
    latents, mask = draw(quantizer)
    output = quantizer(latents, mask=mask)
    terms = quantizer.loss_terms(latents, output.indices)
    torch.testing.assert_close(sum(terms.values()), output.loss, rtol=1e-12, atol=1e-14)
    assert quantizer.loss_terms(latents, torch.full_like(output.indices, -1)).keys() == terms.keys()


@pytest.mark.parametrize("name", [*mostly_slow(), "dropout", "stages", "product"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)])
def test_terms_of_an_empty_batch_are_those_of_its_loss(name: str, shape: tuple[int, ...]) -> None:
    """As in a last batch of which a filter has left nothing; each has a gradient or none, as with tokens."""
    quantizer: Quantizer = (QUANTIZERS.get(name) or NESTINGS[name])().eval()
    quantizer.channel_dim = -1
    latents = torch.empty(*shape, quantizer.code_dim, requires_grad=True)
    output = quantizer(latents)
    terms = quantizer.loss_terms(latents, output.indices)
    torch.testing.assert_close(sum(terms.values()), output.loss)
    sum(terms.values()).backward()


@pytest.mark.parametrize("name", NESTINGS)
def test_no_index_decodes_to_zeros(name: str) -> None:
    """-1 has the code zero, and leaves the codes of other tokens the same bits."""
    quantizer: Quantizer = NESTINGS[name]().eval()
    indices = quantizer.encode(torch.randn(3, quantizer.code_dim, 4, 5))
    masked = indices.clone()
    masked[1] = -1
    codes = quantizer.decode(masked)
    assert not codes[1].any()
    assert torch.equal(codes[::2], quantizer.decode(indices)[::2])
    assert quantizer.decode(indices)[1].any()


def test_a_strangers_quantizer_with_several_indices_never_sees_minus_one() -> None:
    """``look_up`` gets codes only; a token without all of its indices is zero."""

    class Pair(Quantizer):
        """The signs of two channels, an index for each."""

        num_quantizers = 2

        def search(self, rows: Rows) -> Tensor:
            """Return the bits."""
            return (rows.searchable > 0).long()

        def look_up(self, indices: Tensor) -> Tensor:
            """Return -1 and 1."""
            assert indices.min() >= 0
            return 2.0 * indices - 1

    quantizer, latents, mask = Pair(2, 2), torch.randn(5, 2), torch.arange(5) < 3
    output = quantizer(latents, mask=mask)
    assert torch.equal(quantizer.decode(output.indices), output.codes)
    assert torch.equal(output.codes, latents.sign() * mask.unsqueeze(1))
    assert (output.indices[~mask] == -1).all()


@pytest.mark.parametrize(
    "factory",
    [
        partial(plain_quantizer, 6, 4),
        partial(plain_quantizer, 6, 4, codebook_update="ema", metric="cosine"),
        partial(plain_residual, 6, 4, 2),
        lambda: ProductQuantizer([VectorQuantizer(6, 2), VectorQuantizer(6, 2)]),
    ],
    ids=["gradient", "ema", "rvq", "product"],
)
def test_kmeans_and_revival_see_only_the_tokens_that_count(factory: Any) -> None:
    """Both are those of the other tokens; masked ones may be NaN."""
    quantizer = factory().double()
    twin = copy.deepcopy(quantizer)
    latents, mask = draw(quantizer)
    quantizer.kmeans_init(latents, mask=mask, generator=torch.Generator().manual_seed(3))
    twin.kmeans_init(kept(latents, mask), generator=torch.Generator().manual_seed(3))
    assert_same_state(quantizer, twin)
    for part in (*quantizer.modules(), *twin.modules()):
        if isinstance(part, VectorQuantizer):
            part.usage[:4] = 0
    revived = quantizer.revive_dead_codes(latents, mask=mask, generator=torch.Generator().manual_seed(4))
    wanted = twin.revive_dead_codes(kept(latents, mask), generator=torch.Generator().manual_seed(4))
    assert torch.equal(revived, wanted)
    assert revived.any()
    assert_same_state(quantizer, twin)
    before = state_of(quantizer)
    quantizer.kmeans_init(latents, mask=torch.zeros_like(mask))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    # Without the mask they are refused.
    with pytest.raises(ValueError, match=r"^latents must be finite, got \d+ NaN or infinite of 240 values; build"):
        quantizer.kmeans_init(latents)


def test_kmeans_and_revival_refuse_a_mask_that_does_not_fit() -> None:
    """As forward."""
    quantizer, latents = VectorQuantizer(6, 4), torch.randn(3, 4, 2, 2)
    message = "mask must be of shape (3, 2, 2) as the latents without their channel axis, got shape (3, 4)."
    for method in (quantizer.kmeans_init, quantizer.revive_dead_codes):
        with pytest.raises(ValueError, match=exactly(message)):
            method(latents, mask=torch.ones(3, 4).bool())
        with pytest.raises(TypeError, match=exactly("mask must be bool, got torch.float32; pass mask.bool().")):
            method(latents, mask=torch.ones(3, 2, 2))


def test_a_full_mask_changes_no_bit_of_the_codes() -> None:
    """All True is no mask."""
    for name in ("vq", "fsq", "rvq"):
        quantizer = QUANTIZERS[name]().eval()
        latents = torch.randn(3, quantizer.code_dim, 4, 5)
        output, plain = quantizer(latents, mask=torch.ones(3, 4, 5).bool()), quantizer(latents)
        assert torch.equal(output.indices, plain.indices)
        assert torch.equal(output.quantized, plain.quantized)
        torch.testing.assert_close(output.loss, plain.loss)


def test_skipped_tokens_among_those_that_count_stay_skipped() -> None:
    """A vector that is not finite has the code of zero, and a masked one has none."""
    quantizer = plain_quantizer(6, 4, nonfinite="skip")
    latents = torch.randn(5, 4)
    latents[0], latents[1] = math.nan, math.inf
    mask = torch.tensor([True, False, True, True, False])
    output = quantizer(latents, mask=mask)
    assert output.indices[[1, 4]].tolist() == [-1, -1]
    assert output.indices[0] == quantizer.encode(torch.zeros(1, 4))
    torch.testing.assert_close(output.loss, quantizer(latents[2:4]).loss)


def test_gradients_of_masked_codes_reach_nothing() -> None:
    """Not even if the loss behind them is NaN, and not the parameters of a projection."""

    class Turned(FSQ):
        """FSQ behind a learnt matrix."""

        def __init__(self) -> None:
            super().__init__((5, 5))
            self.matrix = torch.nn.Parameter(torch.tensor([[1.0, 0.5], [-0.5, 1.0]]))

        def project(self, vectors: Tensor) -> Tensor:
            """Turn, then bound."""
            return super().project(vectors @ self.matrix + 1)

    quantizer = Turned()
    latents, mask = torch.randn(3, 2, requires_grad=True), torch.tensor([True, False, True])
    quantized = quantizer(latents, mask=mask).quantized
    quantized.backward(torch.where(mask.unsqueeze(1), torch.ones(3, 2), math.nan))
    wanted = torch.autograd.grad(quantizer(latents[mask]).quantized.sum(), (latents, quantizer.matrix))
    torch.testing.assert_close((latents.grad, quantizer.matrix.grad), wanted)


def test_usage_counts_the_indices_of_tokens_that_count() -> None:
    """``indices[mask]`` are codes only; the index of a masked token is refused."""
    quantizer, usage = FSQ((5, 3)), CodebookUsage(15)
    mask = torch.rand(3, 4, 5) < 0.5
    indices = quantizer(torch.randn(3, 2, 4, 5), mask=mask).indices
    usage.update(indices[mask])
    assert usage.compute().tokens == mask.sum()
    with pytest.raises(ValueError, match=r"num_codes=15\), got -1; count indices\[indices >= 0\]"):
        usage.update(indices)


def test_a_prefix_of_levels_leaves_masked_tokens_out() -> None:
    """``encode`` for a few levels too."""
    quantizer = plain_residual(7, 4, 3)
    mask = torch.rand(3, 5) < 0.5
    latents = torch.where(mask.unsqueeze(1), torch.randn(3, 4, 5), math.nan)
    indices = quantizer.encode(latents, mask=mask)
    assert (indices[~mask] == -1).all()
    assert (indices[mask] >= 0).all()
    assert torch.equal(quantizer.encode(latents, mask=mask, num_quantizers=2), indices[..., :2])


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """No graph of one test serves another; deprecations inside the compiler are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
        yield
    torch._dynamo.reset()


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vq-revival", "fsq", "lfq", "sim")),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("vq-ema-penalty", "rvq-ema")),
    ],
)
def test_masks_in_a_compiled_graph(name: str) -> None:
    """One graph for every mask: outputs, gradients and state are those of the other tokens in eager mode."""
    quantizer: Quantizer = QUANTIZERS[name]().double()
    twin = copy.deepcopy(quantizer)
    with fresh_compiler():
        compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
        for place in range(3):
            latents, mask = draw(quantizer)
            mask &= place != 1
            with torch.compiler.set_stance("fail_on_recompile" if place else "default"):
                output, gradient = step(compiled, latents, mask=mask)
            expected, wanted = step(twin, kept(latents, mask))
            assert torch.equal(output.indices[mask], expected.indices)
            assert (output.indices[~mask] == -1).all()
            torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(kept(gradient, mask), wanted, rtol=1e-11, atol=1e-14)
            assert not kept(gradient, ~mask).any()
            assert_same_state(quantizer, twin)
            assert torch.equal(output.quantized, output.codes)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("name", ["fsq", "rvq", "product"])
def test_decoding_masked_indices_in_a_compiled_graph(name: str) -> None:
    """The same bits as in eager mode."""
    quantizer = (NESTINGS | {"fsq": partial(FSQ, (5, 3))})[name]().eval()
    mask = torch.rand(3, 5) < 0.5
    indices = quantizer.encode(torch.randn(3, quantizer.code_dim, 5), mask=mask)
    with fresh_compiler():
        decode = torch.compile(quantizer.decode, fullgraph=True, backend="aot_eager")
        assert torch.equal(decode(indices), quantizer.decode(indices))


@pytest.mark.slow
def test_masks_of_exported_graphs_and_function_transforms() -> None:
    """A mask is one more input, and one more thing to map over."""
    quantizer = plain_quantizer(9, 4, channel_dim=-1).eval()
    latents, mask = torch.randn(3, 5, 4), torch.rand(3, 5) < 0.5
    wanted = quantizer(latents, mask=mask)
    exported = torch.export.export(quantizer, (latents,), {"mask": mask}).module()(latents, mask=mask)
    assert torch.equal(exported.indices, wanted.indices)
    assert torch.equal(exported.quantized, wanted.quantized)
    mapped = torch.func.vmap(lambda one, own: quantizer(one, mask=own).quantized)(latents, mask)
    assert torch.equal(mapped, wanted.quantized)
