"""ResidualVectorQuantizer against a greedy loop, its dropout, its moving codebooks, and beside another library's.

Shape letters: N latent vectors, C code size, K codes a codebook, Q codebooks.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import ResidualVectorQuantizer, VectorQuantizer
from te_quant.functional import rotation_trick
from tests.helpers import exactly, plain_quantizer, plain_residual
from tests.unit.quantizer_cases import state_of
from tests.unit.quantizer_oracles import orthogonality_oracle


def spread(codes: int = 7, dim: int = 4, steps: int = 3, **options: Any) -> ResidualVectorQuantizer:
    """A float64 quantizer whose codes are spread like the latents, each codebook smaller than the one before."""
    quantizer = plain_residual(codes, dim, steps, **options).double()
    with torch.no_grad():
        for place, stage in enumerate(quantizer.stages):
            stage.codebook.copy_(torch.randn(codes, dim, dtype=torch.float64) / (place + 1))
            if stage.codebook_update == "ema":
                stage.code_sums.copy_(stage.codebook)
    return quantizer


def tables_of(quantizer: ResidualVectorQuantizer) -> list[Tensor]:
    """Q codebooks, as they are now."""
    tables = [stage.codebook.detach().clone() for stage in quantizer.stages]
    return tables * quantizer.num_quantizers if quantizer.shared_codebook else tables


def greedy(row: Tensor, tables: list[Tensor]) -> list[int]:
    """Code after code, the nearest to what is left."""
    left, chosen = row.clone(), []
    for table in tables:
        distances = [(left - code).square().sum().item() for code in table]
        chosen.append(distances.index(min(distances)))
        left = left - table[chosen[-1]]
    return chosen


def loss_oracle(latents: Tensor, chosen: Tensor, tables: list[Tensor]) -> float:
    """The mean square of what every used step left over, over rows, steps and channels."""
    terms = []
    for row, indices in zip(latents, chosen.tolist(), strict=True):
        left = row.clone()
        for index, table in zip(indices, tables, strict=True):
            if index >= 0:
                left = left - table[index]
                terms.append(left.square().mean().item())
    return sum(terms) / len(terms)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=25)
def test_codes_are_those_of_a_greedy_loop(codes: int, dim: int, steps: int, shared: bool) -> None:
    """Index by index; the output is their sum, and the loss the mean over steps."""
    quantizer = spread(codes, dim, steps, shared_codebook=shared, commitment_weight=0.5)
    assert len(quantizer.stages) == (1 if shared else steps)
    latents = torch.randn(20, dim, dtype=torch.float64)
    output, tables = quantizer(latents), tables_of(quantizer)
    assert output.indices.tolist() == [greedy(row, tables) for row in latents]
    wanted = sum(table[indices] for table, indices in zip(tables, output.indices.unbind(1), strict=True))
    torch.testing.assert_close(output.codes, wanted)
    loss = loss_oracle(latents, output.indices, tables)
    assert output.codebook_loss.item() == pytest.approx(loss, rel=1e-10)
    assert output.commitment_loss.item() == pytest.approx(0.5 * loss, rel=1e-10)


def test_one_step_is_a_vector_quantizer() -> None:
    """With Q = 1 every field is that of the stage alone, but for the axis of the indices."""
    options: dict[str, Any] = {"orthogonal_reg": 2.0, "codebook_update": "ema", "decay": 0.5}
    quantizer = spread(steps=1, **options)
    alone = plain_quantizer(7, 4, **options).double()
    alone.load_state_dict(quantizer.stages[0].state_dict())
    for _ in range(3):
        latents = torch.randn(2, 4, 3, 5, dtype=torch.float64)
        output, wanted = quantizer(latents), alone(latents)
        assert torch.equal(output.indices[..., 0], wanted.indices)
        for name in set(output._fields) - {"indices"}:
            torch.testing.assert_close(getattr(output, name), getattr(wanted, name))


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_the_terms(shared: bool) -> None:
    """The codebook term moves each code towards what was left for it, the commitment term the latents alone."""
    quantizer = spread(shared_codebook=shared, commitment_weight=0.5)
    latents = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    output, tables = quantizer(latents), tables_of(quantizer)
    to_codes = [torch.zeros_like(table) for table in tables]
    to_latents = torch.zeros_like(latents)
    for n, indices in enumerate(output.indices.tolist()):
        left = latents[n].detach()
        for step, index in enumerate(indices):
            left = left - tables[step][index]
            to_codes[step][index] -= 2 * left / (30 * 4 * 3)
            to_latents[n] += 0.5 * 2 * left / (30 * 4 * 3)
    codebooks = [stage.codebook for stage in quantizer.stages]
    got = torch.autograd.grad(output.codebook_loss, codebooks, retain_graph=True)
    for gradient, wanted in zip(got, [sum(to_codes)] if shared else to_codes, strict=True):
        torch.testing.assert_close(gradient, wanted)
    both = torch.autograd.grad(output.commitment_loss, [latents, *codebooks], retain_graph=True, allow_unused=True)
    torch.testing.assert_close(both[0], to_latents)
    assert all(gradient is None for gradient in both[1:])
    weights = torch.randn(30, 4, dtype=torch.float64)
    (straight,) = torch.autograd.grad((output.quantized * weights).sum(), latents)
    assert torch.equal(straight, weights)


def test_rotation_is_onto_the_sum() -> None:
    """The gradient is that of the rotation trick from the latents to the sum of the codes."""
    quantizer = spread(gradient_estimator="rotation_trick")
    latents = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(30, 4, dtype=torch.float64)
    output = quantizer(latents)
    wanted = torch.autograd.grad((rotation_trick(latents, output.codes) * weights).sum(), latents)
    torch.testing.assert_close(torch.autograd.grad((output.quantized * weights).sum(), latents), wanted)


@pytest.mark.parametrize("shared", [True, False])
def test_penalty_is_the_mean_over_codebooks(shared: bool) -> None:
    """Of Eq. 5, pair by pair."""
    quantizer = spread(shared_codebook=shared, orthogonal_reg=3.0)
    penalty = quantizer(torch.randn(5, 4, dtype=torch.float64)).regularization_loss.item()
    wanted = [orthogonality_oracle(stage.codebook) for stage in quantizer.stages]
    assert penalty == pytest.approx(3 * sum(wanted) / len(wanted), rel=1e-10)


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_moving_averages_move_between_steps(shared: bool, dropout: bool) -> None:
    """Indices, residuals, codes and losses are of the codebooks before; those after it are the means."""
    quantizer = spread(shared_codebook=shared, quantizer_dropout=dropout, codebook_update="ema", decay=0.8)
    for _ in range(3):
        tables = tables_of(quantizer)
        usages = [stage.usage.clone() for stage in quantizer.stages]
        sums = [stage.code_sums.clone() for stage in quantizer.stages]
        latents = torch.randn(50, 4, dtype=torch.float64)
        output = quantizer(latents)
        assert torch.equal(quantizer.decode(output.indices), output.codes)
        assert output.codebook_loss == 0
        loss = loss_oracle(latents, output.indices, tables)
        assert output.commitment_loss.item() == pytest.approx(0.25 * loss, rel=1e-10)
        quantizer.apply_pending()
        counts = [torch.zeros_like(usage) for usage in usages]
        totals = [torch.zeros_like(total) for total in sums]
        for row, indices in zip(latents, output.indices.tolist(), strict=True):
            wanted, left = greedy(row, tables), row
            for step, index in enumerate(indices):
                assert index in (-1, wanted[step]) if dropout else index == wanted[step]
                if index >= 0:
                    counts[0 if shared else step][index] += 1
                    totals[0 if shared else step][index] += left
                    left = left - tables[step][index]
        for place, stage in enumerate(quantizer.stages):
            usage = 0.8 * usages[place] + 0.2 * counts[place]
            total = 0.8 * sums[place] + 0.2 * totals[place]
            smooth = (usage + 1e-5) / (usage.sum() + 7e-5) * usage.sum()
            torch.testing.assert_close(stage.usage, usage)
            torch.testing.assert_close(stage.code_sums, total)
            torch.testing.assert_close(stage.codebook.detach(), total / smooth[:, None])


def test_dropout_leaves_out_the_last_codebooks() -> None:
    """One depth an image, uniform in 1..Q, in training only; -1 stands for the rest, and losses skip it."""
    quantizer = spread(steps=4, quantizer_dropout=True, commitment_weight=0.5)
    latents = torch.randn(2000, 4, 2, 3, dtype=torch.float64)
    full = quantizer.eval()(latents)
    assert full.indices.min() >= 0
    output = quantizer.train()(latents)
    used = output.indices >= 0
    depths = used.sum(-1)
    assert torch.equal(depths, depths[:, :1, :1].expand_as(depths))
    assert torch.equal(used, torch.arange(4) < depths[..., None])
    assert torch.equal(output.indices[used], full.indices[used])
    shares = torch.bincount(depths[:, 0, 0], minlength=5)[1:] / 2000
    # Five standard deviations of a share.
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    rows = latents[:40].movedim(1, -1).reshape(-1, 4)
    part = quantizer(latents[:40], generator=torch.Generator().manual_seed(1))
    loss = loss_oracle(rows, part.indices.reshape(-1, 4), tables_of(quantizer))
    assert part.codebook_loss.item() == pytest.approx(loss, rel=1e-10)
    again = quantizer(latents[:40], generator=torch.Generator().manual_seed(1))
    assert torch.equal(part.indices, again.indices)


def test_dropped_codebooks_get_nothing() -> None:
    """No count and no gradient where a step was not used."""
    quantizer = spread(steps=2, quantizer_dropout=True, decay=0.0)
    latents = torch.randn(40, 4, dtype=torch.float64)
    output = quantizer(latents)
    used = (output.indices >= 0).sum(0)
    assert used[0] == 40
    assert 0 < used[1] < 40
    quantizer.apply_pending()
    for stage, count in zip(quantizer.stages, used, strict=True):
        assert stage.usage.sum() == count
    output.codebook_loss.backward()
    second = output.indices[output.indices[:, 1] >= 0, 1].unique()
    idle = torch.ones(7, dtype=torch.bool)
    idle[second] = False
    assert quantizer.stages[1].codebook.grad[idle].eq(0).all()
    assert quantizer.stages[1].codebook.grad[~idle].ne(0).any(1).all()


def test_the_first_codebooks_decode_alone() -> None:
    """Fewer indices are a coarser code: partial sums, and what -1 behind them gives."""
    quantizer = spread(quantizer_dropout=True).eval()
    indices = quantizer.encode(torch.randn(2, 4, 3, 5, dtype=torch.float64))
    assert indices.shape == (2, 3, 5, 3)
    total = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    for used, table in enumerate(tables_of(quantizer), start=1):
        total = total + table[indices[..., used - 1]].movedim(-1, 1)
        padded = indices.clone()
        padded[..., used:] = -1
        torch.testing.assert_close(quantizer.decode(indices[..., :used]), total)
        assert torch.equal(quantizer.decode(padded), quantizer.decode(indices[..., :used]))


def test_decode_reaches_the_codebooks() -> None:
    """It is differentiable in them."""
    quantizer = spread()
    indices = quantizer.encode(torch.randn(6, 4, dtype=torch.float64))
    quantizer.decode(indices).sum().backward()
    for stage, column in zip(quantizer.stages, indices.unbind(1), strict=True):
        counts = torch.bincount(column, minlength=7).double()
        assert torch.equal(stage.codebook.grad, counts[:, None].expand(7, 4))


def test_kmeans_fits_what_is_left() -> None:
    """Step after step the error falls; a shared codebook is that of the latents."""
    latents = torch.randn(300, 4, dtype=torch.float64)
    for shared in (True, False):
        quantizer = plain_residual(16, 4, 3, shared_codebook=shared).double()
        generator = torch.Generator().manual_seed(0)
        quantizer.kmeans_init(latents, generator=generator)
        indices = quantizer.encode(latents)
        errors = [(latents - quantizer.decode(indices[:, :n])).square().mean().item() for n in (1, 2, 3)]
        alone = plain_quantizer(16, 4).double()
        alone.kmeans_init(latents, generator=torch.Generator().manual_seed(0))
        assert torch.equal(quantizer.stages[0].codebook, alone.codebook)
        if shared:
            assert len(quantizer.stages) == 1
        else:
            assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]


@pytest.mark.parametrize("shared", [True, False])
def test_revival_uses_what_is_left(shared: bool) -> None:
    """Dead codes land on residuals of their own step; of any step where the codebook is shared."""
    quantizer = spread(shared_codebook=shared)
    for stage in quantizer.stages:
        stage.usage[:3] = 0
    latents = torch.randn(30, 4, dtype=torch.float64)
    before = tables_of(quantizer)
    indices = quantizer.encode(latents)
    revived = quantizer.revive_dead_codes(latents)
    assert revived.tolist() == [[True] * 3 + [False] * 4] * len(quantizer.stages)
    after = tables_of(quantizer)
    pools = [latents]
    for step in range(3 if shared else 1):
        pools.append(pools[-1] - before[step][indices[:, step]])
    rows = torch.cat(pools[:3]) if shared else latents
    for code in after[0][:3]:
        assert (rows - code).abs().amax(1).min() < 1e-12
    assert torch.equal(after[0][3:], before[0][3:])
    if not shared:
        left = latents - after[0][(latents[:, None] - after[0]).square().sum(2).argmin(1)]
        for code in after[1][:3]:
            assert (left - code).abs().amax(1).min() < 1e-12
    if shared:
        for seed in range(20):
            for stage in quantizer.stages:
                stage.codebook.data.copy_(before[0])
                stage.usage[:3] = 0
            quantizer.revive_dead_codes(latents, generator=torch.Generator().manual_seed(seed))
            codes = quantizer.stages[0].codebook[:3]
            if any((latents - code).abs().amax(1).min() > 1e-9 for code in codes):
                break
        else:
            pytest.fail("no code ever came from a later step")


def test_frozen_means_frozen() -> None:
    """Nothing moves, nothing is counted, nothing can be restarted; and back."""
    for update in ("gradient", "ema"):
        quantizer = spread(codebook_update=update)
        latents = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
        assert not quantizer.frozen
        assert quantizer.freeze() is quantizer
        assert quantizer.frozen
        before = state_of(quantizer)
        quantizer(latents).loss.backward()
        assert all(stage.codebook.grad is None for stage in quantizer.stages)
        message = "{} must be called on a quantizer that is not frozen, got a frozen one."
        for method in ("kmeans_init", "revive_dead_codes"):
            with pytest.raises(RuntimeError, match=exactly(message.format(method))):
                getattr(quantizer, method)(latents)
        assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
        quantizer.freeze(False)(latents)
        quantizer.apply_pending()
        assert not torch.equal(before["stages.0.usage"], quantizer.stages[0].usage)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_one_frozen_stage_stays_while_the_others_move(update: str) -> None:
    """It is neither moved nor counted; a restart is refused before any other stage has moved."""
    quantizer = spread(codebook_update=update)
    latents = torch.randn(20, 4, dtype=torch.float64)
    quantizer.stages[1].freeze()
    before = state_of(quantizer)
    quantizer(latents)
    moved = {name for name, value in quantizer.state_dict().items() if not torch.equal(before[name], value)}
    assert {name.split(".")[1] for name in moved} == {str(n) for n in range(len(quantizer.stages)) if n != 1}
    before = state_of(quantizer)
    for method in ("kmeans_init", "revive_dead_codes"):
        message = f"{method} must be called on a quantizer that is not frozen, got a frozen one."
        with pytest.raises(RuntimeError, match=exactly(message)):
            getattr(quantizer, method)(latents)
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4, 2), {}, ValueError, "num_codes must be an int >= 1, got 0."),
        ((4, 0, 2), {}, ValueError, "code_dim must be an int >= 1, got 0."),
        ((4, 4, 0), {}, ValueError, "num_quantizers must be an int >= 1, got 0."),
        ((4, 4, 2.0), {}, TypeError, "num_quantizers must be an int >= 1, got 2.0."),
        ((4, 4, 2), {"decay": 1}, ValueError, "decay must be a finite number >= 0 and < 1, got 1."),
        ((4, 4, 2), {"channel_dim": 3}, ValueError, "channel_dim must be one of 1, -1, got 3."),
        (
            (4, 4, 2),
            {"codebook_update": "both"},
            ValueError,
            "codebook_update must be one of 'gradient', 'ema', got 'both'.",
        ),
    ],
)
def test_refuses_bad_options(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    """One sentence that names the option, what is wanted and what came."""
    with pytest.raises(error, match=exactly(message)):
        ResidualVectorQuantizer(*arguments, **options)


def test_refuses_another_number_of_codebooks() -> None:
    """None and more than Q, and indices below -1."""
    quantizer = spread()
    for shape in ((5, 0), (5, 4), (2, 3, 3, 4)):
        axis, got = len(shape) - 1, f"{shape[-1]} (indices shape {shape})"
        message = f"indices axis {axis} must be 1 to num_quantizers=3, got {got}."
        with pytest.raises(ValueError, match=exactly(message)):
            quantizer.decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=exactly("indices must be in [-1, num_codes=7), got -2.")):
        quantizer.decode(torch.tensor([[0, -1, -2]]))


def test_shows_its_stages() -> None:
    """In print."""
    text = repr(ResidualVectorQuantizer(4, 3, 2, shared_codebook=True))
    assert "num_quantizers=2, shared_codebook=True" in text
    assert "VectorQuantizer(num_codes=4, code_dim=3" in text


@pytest.mark.parametrize("shared", [True, False])
def test_beside_vector_quantize_pytorch(shared: bool) -> None:
    """Same indices and sums for the same codebooks, and the same from the first indices alone.

    The other library drops at one depth a step, here it is one an image, and lists its losses by codebook, of
    which ours is the mean.
    """
    peers = pytest.importorskip("vector_quantize_pytorch")
    ours = plain_residual(12, 5, 3, shared_codebook=shared, quantizer_dropout=True, channel_dim=-1)
    theirs = peers.ResidualVQ(
        dim=5, num_quantizers=3, codebook_size=12, shared_codebook=shared, quantize_dropout=True,
        rotation_trick=False, commitment_weight=0.25, kmeans_init=False,
    )  # fmt: skip
    tables = [torch.randn(12, 5) / (1 if shared else place + 1) for place in range(len(ours.stages))]
    with torch.no_grad():
        for stage, table in zip(ours.stages, tables, strict=True):
            stage.codebook.copy_(table)
        for layer, table in zip(theirs.layers, tables * 3 if shared else tables, strict=True):
            layer._codebook.embed.copy_(table[None])
    latents = torch.randn(2, 40, 5)
    ours.eval()
    output = ours(latents)
    quantized, indices, *_ = theirs.eval()(latents)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, quantized)
    coarse = theirs.get_output_from_indices(indices[..., :2])
    torch.testing.assert_close(ours.decode(output.indices[..., :2]), coarse)


def test_defaults_are_those_of_one_codebook() -> None:
    """Every option that both classes have."""
    ours, single = (inspect.signature(kind).parameters for kind in (ResidualVectorQuantizer, VectorQuantizer))
    shared = [name for name in ours if name in single and name not in ("num_codes", "code_dim")]
    assert {name: ours[name].default for name in shared} == {name: single[name].default for name in shared}
    assert {"codebook_update", "commitment_weight", "decay", "revival_threshold"} <= set(shared)


def test_defaults_use_the_codes() -> None:
    """Almost all at every level after 50 steps; under the settings of the paper (the control) fewer."""
    used = {}
    for name, build in {"defaults": ResidualVectorQuantizer, "paper": plain_residual}.items():
        quantizer = build(32, 4, 3)
        optimizer = torch.optim.Adam(quantizer.parameters(), 1e-3) if name == "paper" else None
        for _ in range(50):
            loss = quantizer(torch.randn(256, 4, requires_grad=True)).loss
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        indices = quantizer.eval()(torch.randn(2048, 4)).indices
        used[name] = [len(level.unique()) for level in indices.unbind(-1)]
    assert min(used["defaults"]) >= 30
    assert max(used["paper"]) < 30
