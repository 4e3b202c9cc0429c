"""Each row of the page for migrants is a test here, which runs their code, or its formula, next to ours.

Shape letters: B batch, C code size, h w token grid, K codes, N latent vectors.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant import (
    FSQ,
    LFQ,
    CodebookUsage,
    ProductQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
)
from te_quant.interop import load_diffusers, load_vector_quantize, reverse_bits
from te_quant.layers import BlurPool2d

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "migrating.md").read_text(encoding="utf-8")
K, C = 9, 4

Row = Callable[[], None]
ROWS: dict[str, Row] = {}


def row(library: str, title: str) -> Callable[[Row], Row]:
    """Say which row of the page a test belongs to."""

    def add(test: Row) -> Row:
        assert f"{library}: {title}" not in ROWS
        ROWS[f"{library}: {title}"] = test
        return test

    return add


def rows_of(page: str) -> list[str]:
    """``library: first cell`` of every row of every table, the library being the heading above it."""
    found, library = [], ""
    for line in page.splitlines():
        if line.startswith("## "):
            library = line.removeprefix("## ").removeprefix("From ")
        elif line.startswith("| ") and not line.startswith(("| what |", "| --- |")):
            found.append(f"{library}: {line.split('|')[1].strip()}")
    return found


def test_page_and_tests_have_the_same_rows() -> None:
    """In any order, each once."""
    found = rows_of(PAGE)
    assert len(set(found)) == len(found)
    assert set(found) == set(ROWS)


def test_a_row_without_a_test_is_noticed() -> None:
    """Negative control."""
    assert set(rows_of(PAGE + "\n| new row | a | b | c |\n")) != set(ROWS)


def peers() -> Any:
    """Their package."""
    return pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")


def pair(ours: dict[str, Any] | None = None, **theirs: Any) -> tuple[Any, VectorQuantizer]:
    """Both with the same codes, channel last, their settings and ours."""
    other = peers().VectorQuantize(**{"dim": C, "codebook_size": K, **theirs})
    with torch.no_grad():
        other._codebook.embed.copy_(torch.randn(1, K, C))
        other._codebook.embed_avg.copy_(other._codebook.embed)
    mine = VectorQuantizer(**{"num_codes": K, "code_dim": C, "channel_dim": -1, **(ours or {})})
    mine.set_codebook(other.codebook.detach())
    return other, mine


OFF: dict[str, Any] = {"revival_threshold": 0.0}
LEARNT: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}


def rows(n: int = 200) -> Tensor:
    """Latents with gradient, (1, n, C)."""
    return torch.randn(1, n, C, requires_grad=True)


def gradient_of(output: Any, latents: Tensor) -> Tensor:
    """That of the latents, from the quantized values and nothing else."""
    weights = torch.linspace(-1, 1, output[0].numel()).view_as(output[0])
    (gradient,) = torch.autograd.grad((output[0] * weights).sum(), latents, retain_graph=True)
    return gradient


VQP = "vector-quantize-pytorch"


@row(VQP, "sizes")
def vqp_sizes() -> None:
    other, mine = pair()
    latents = rows()
    assert torch.equal(mine.eval()(latents).indices, other.eval()(latents)[1])


@row(VQP, "layout")
def vqp_layout() -> None:
    images = torch.randn(2, C, 3, 5)
    other, mine = pair({"channel_dim": 1}, accept_image_fmap=True)
    quantized, indices, _ = other.eval()(images)
    output = mine.eval()(images)
    assert torch.equal(output.indices, indices)
    assert indices.shape == (2, 3, 5)
    torch.testing.assert_close(output.quantized, quantized)


@row(VQP, "result")
def vqp_result() -> None:
    other, mine = pair()
    latents = rows()
    assert len(other(latents)) == 3
    assert mine(latents)._fields[:3] == ("quantized", "indices", "loss")
    with pytest.raises(ValueError, match="too many values to unpack"):
        _, _, _ = mine(latents)


@row(VQP, "loss in evaluation")
def vqp_loss_in_evaluation() -> None:
    other, mine = pair(OFF)
    latents = rows()
    trained = mine(latents).loss
    assert other.eval()(latents)[2].item() == 0
    # The codebook that was searched is that of before; nothing has been applied.
    mine.set_codebook(other.codebook)
    assert mine.eval()(latents).loss == trained > 0


@row(VQP, "commitment_weight")
def vqp_commitment_weight() -> None:
    other, mine = pair()
    latents = rows()
    torch.testing.assert_close(mine(latents).loss, other(latents)[2].squeeze())


@row(VQP, "decay")
def vqp_decay() -> None:
    latents = rows()
    distances = []
    for options in ({"decay": 0.8}, {}):
        other, mine = pair({**OFF, **options})
        other(latents), mine(latents)
        mine.apply_pending()
        distances.append((mine.codebook - other.codebook).abs().max())
    assert distances[0] < 1e-5 < 1e-2 < distances[1]


@row(VQP, "rotation_trick")
def vqp_rotation_trick() -> None:
    latents = rows()
    other, mine = pair({"gradient_estimator": "rotation_trick"})
    wanted = gradient_of(other(latents), latents)
    torch.testing.assert_close(gradient_of(mine(latents), latents), wanted, rtol=1e-4, atol=1e-5)
    other, mine = pair()
    assert (gradient_of(mine(latents), latents) - wanted).abs().max() > 0.01
    plain, mine = pair(rotation_trick=False)
    assert torch.equal(gradient_of(mine(latents), latents), gradient_of(plain(latents), latents))


@row(VQP, "when the codebook moves")
def vqp_when_the_codebook_moves() -> None:
    other, mine = pair({**OFF, "decay": 0.8})
    latents = rows()
    before = other.codebook.clone()
    quantized, indices, _ = other(latents)
    output = mine(latents)
    torch.testing.assert_close(output.quantized, quantized)
    assert not torch.equal(other.codebook[indices], before[indices])
    assert torch.equal(mine.decode(output.indices), output.codes)
    mine.eval()
    torch.testing.assert_close(mine.codebook, other.codebook)


@row(VQP, "threshold_ema_dead_code")
def vqp_dead_codes() -> None:
    latents = rows()
    replaced = []
    for seed in (0, 1):
        torch.manual_seed(1)
        other, mine = pair({"revival_threshold": 0.5}, threshold_ema_dead_code=5)
        far = other.codebook + 100 * torch.eye(K)[:, :1]
        with torch.no_grad():
            other._codebook.embed[0, :1] = far[:1]
            other._codebook.cluster_size.fill_(10.0)
            other._codebook.cluster_size[0, 0] = 0.0
        mine.set_codebook(other.codebook, other._codebook.cluster_size[0])
        torch.manual_seed(seed)
        other(latents), mine(latents)
        mine.apply_pending()
        replaced.append((other.codebook[0].clone(), mine.codebook[0].clone()))
        for codebook in (other.codebook, mine.codebook):
            assert (codebook[0] - latents[0]).abs().sum(1).min() < 1e-5
    # Theirs depends on the random state, ours does not.
    assert not torch.equal(replaced[0][0], replaced[1][0])
    assert torch.equal(replaced[0][1], replaced[1][1])


@row(VQP, "dead codes by default")
def vqp_dead_codes_by_default() -> None:
    latents = rows()
    theirs, mine = pair()
    for quantizer in (theirs, mine):
        for _ in range(3):
            quantizer(latents)
    fresh = VectorQuantizer(K, C, channel_dim=-1)
    fresh(latents)
    fresh.apply_pending()
    assert fresh.revivals > 0
    assert theirs._codebook.threshold_ema_dead_code == 0


@row(VQP, "kmeans_init")
def vqp_kmeans_init() -> None:
    latents = rows()
    other = peers().VectorQuantize(dim=C, codebook_size=K, kmeans_init=True)
    assert not other._codebook.initted
    other(latents)
    assert other._codebook.initted
    mine = VectorQuantizer(K, C, channel_dim=-1)
    mine.kmeans_init(latents.detach())
    # Both are close to the latents; a random start is not.
    errors = [torch.cdist(latents[0], q.codebook).min(1).values.square().mean() for q in (other, mine)]
    random = torch.cdist(latents[0], VectorQuantizer(K, C).codebook).min(1).values.square().mean()
    assert max(errors) < 0.7 * random


@row(VQP, "learnable_codebook")
def vqp_learnable_codebook() -> None:
    options = {"codebook_update": "gradient", "commitment_weight": 0.5, "codebook_weight": 0.5}
    other, mine = pair({**options, "gradient_estimator": "rotation_trick"}, commitment_weight=0.5, **LEARNT)
    latents = rows()
    loss, output = other(latents)[2].sum(), mine(latents)
    torch.testing.assert_close(output.loss, 2 * loss)
    wanted = torch.autograd.grad(loss, (latents, other._codebook.embed))
    found = torch.autograd.grad(output.loss, (latents, mine.codebook))
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1][0])


@row(VQP, "use_cosine_sim")
def vqp_use_cosine_sim() -> None:
    other, mine = pair({"metric": "cosine"}, use_cosine_sim=True)
    with torch.no_grad():
        other._codebook.embed.copy_(F.normalize(other._codebook.embed, dim=-1))
    latents = rows()
    quantized, indices, loss = other(latents)
    output = mine(latents)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(output.loss, loss.squeeze())


@row(VQP, "orthogonal_reg_weight")
def vqp_orthogonal_reg_weight() -> None:
    latents = rows()
    learnt = {"orthogonal_reg": 3.0, "codebook_update": "gradient"}
    other, mine = pair(learnt, orthogonal_reg_weight=3.0, **LEARNT)
    terms = other(latents, return_loss_breakdown=True)[3]
    torch.testing.assert_close(mine(latents).regularization_loss, 3 * terms.orthogonal_reg)
    # Under moving averages theirs writes the means whatever the weight; ours keeps away from them.
    found = []
    for weight in (0.0, 300.0):
        torch.manual_seed(0)
        other, mine = pair({"orthogonal_reg": weight, "decay": 0.8, **OFF}, orthogonal_reg_weight=weight)
        for _ in range(20):
            other(latents), mine(latents)
        mine.apply_pending()
        found.append((other.codebook.detach(), mine.codebook))
    torch.testing.assert_close(found[0][0], found[0][1], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0][0], found[1][0])
    squares = [(F.normalize(codes, dim=1) @ F.normalize(codes, dim=1).T).square().mean() for codes in found[1]]
    # 1/C is the least that more codes than channels can reach.
    assert squares[1] - 1 / C < 0.5 * (squares[0] - 1 / C)


@row(VQP, "orthogonal_reg_active_codes_only")
def vqp_orthogonal_reg_active_codes_only() -> None:
    settings = {"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True, **LEARNT}
    learnt = {"orthogonal_reg": 3.0, "orthogonal_active_only": True, "codebook_update": "gradient"}
    other, mine = pair(learnt, **settings)
    latents = rows(4)
    terms = other(latents, return_loss_breakdown=True)[3]
    output = mine(latents)
    assert len(output.indices.unique()) < K
    torch.testing.assert_close(output.regularization_loss, 3 * terms.orthogonal_reg)


@row(VQP, "sample_codebook_temp")
def vqp_sample_codebook_temp() -> None:
    temperature = 0.7
    other, mine = pair(
        {"temperature": temperature}, stochastic_sample_codes=True, sample_codebook_temp=temperature
    )
    distances = torch.cdist(torch.zeros(1, C), mine.codebook)[0]
    latents = torch.zeros(1, 20_000, C)
    counts = [
        torch.bincount(q.flatten(), minlength=K) / 20_000 for q in (other(latents)[1], mine(latents).indices)
    ]
    assert (counts[0] - (-distances / temperature).softmax(0)).abs().max() < 0.02
    assert (counts[1] - (-distances.square() / (2 * temperature)).softmax(0)).abs().max() < 0.02
    assert (counts[0] - counts[1]).abs().max() > 0.03


@row(VQP, "mask")
def vqp_mask() -> None:
    other, mine = pair()
    latents, mask = torch.randn(2, 5, C), torch.arange(5) < torch.tensor([[5], [2]])
    quantized, indices, loss = other(latents, mask=mask)
    output = mine(latents, mask=mask)
    assert torch.equal(output.indices, indices)
    assert (indices[~mask] == -1).all()
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(output.loss, loss.squeeze())


@row(VQP, "freeze_codebook")
def vqp_freeze_codebook() -> None:
    other, mine = pair(freeze_codebook=True)
    before = mine.freeze().codebook.clone()
    for _ in range(3):
        other(rows()), mine(rows())
    assert torch.equal(mine.codebook, before)
    assert torch.equal(other.codebook, before)


@row(VQP, "codebook_dim")
def vqp_codebook_dim() -> None:
    other = peers().VectorQuantize(dim=6, codebook_dim=C, codebook_size=K).eval()
    state = {name: tensor for name, tensor in other.state_dict().items() if "project" not in name}
    mine = load_vector_quantize(state, into=VectorQuantizer(K, C, channel_dim=-1)).eval()
    latents = torch.randn(1, 50, 6)
    output = mine(other.project_in(latents))
    quantized, indices, _ = other(latents)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(other.project_out(output.quantized), quantized)


@row(VQP, "heads")
def vqp_heads() -> None:
    other = peers().VectorQuantize(
        dim=2 * C, codebook_dim=C, codebook_size=K, heads=2, separate_codebook_per_head=True
    )
    parts = [VectorQuantizer(K, C, channel_dim=-1) for _ in range(2)]
    for part, codes in zip(parts, other.codebook, strict=True):
        part.set_codebook(codes)
    mine = ProductQuantizer(parts, channel_dim=-1).eval()
    latents = torch.randn(1, 50, 2 * C)
    quantized, indices, _ = other.eval()(latents)
    output = mine(latents)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, quantized)


@row(VQP, "get_codes_from_indices")
def vqp_get_codes_from_indices() -> None:
    other, mine = pair()
    indices = torch.randint(K, (2, 7))
    assert torch.equal(mine.decode(indices), other.get_codes_from_indices(indices))


@row(VQP, "ResidualVQ")
def vqp_residual() -> None:
    other = peers().ResidualVQ(
        dim=C, codebook_size=K, num_quantizers=3, rotation_trick=False, shared_codebook=False
    )
    levels = [load_vector_quantize(other, prefix=f"layers.{level}.") for level in range(3)]
    mine = ResidualVectorQuantizer(stages=levels, channel_dim=-1)
    latents = rows()
    quantized, indices, losses = other(latents)
    output = mine(latents)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, quantized)
    assert losses.numel() == 3
    torch.testing.assert_close(output.loss, losses.mean())


@row(VQP, "ResidualVQ, how it learns")
def vqp_residual_learning() -> None:
    # From the same codes, and without revival all levels move alike.
    latents = rows()
    other = peers().ResidualVQ(dim=C, codebook_size=K, num_quantizers=3)
    levels = [layer._codebook for layer in other.layers]
    for level in levels:
        level.embed_avg.data.copy_(level.embed)
    alike, default = (
        ResidualVectorQuantizer(K, C, 3, channel_dim=-1, **own) for own in ({"decay": 0.8, **OFF}, {})
    )
    for mine in (alike, default):
        for stage, level in zip(mine.stages, levels, strict=True):
            stage.set_codebook(level.embed[0])  # type: ignore[operator]
        mine(latents)
        mine.apply_pending()
    other(latents)
    for stage, level in zip(alike.stages, levels, strict=True):
        torch.testing.assert_close(stage.codebook, level.embed[0])
    assert not torch.allclose(default.stages[0].codebook, levels[0].embed[0])  # type: ignore[arg-type]


@row(VQP, "LFQ")
def vqp_lfq() -> None:
    other, mine = peers().LFQ(dim=6, codebook_size=64).eval(), LFQ(6, channel_dim=-1).eval()
    latents = torch.randn(1, 50, 6)
    quantized, indices, _ = other(latents)
    output = mine(latents)
    assert torch.equal(output.quantized, quantized)
    assert torch.equal(output.indices, reverse_bits(indices, 6))
    assert not torch.equal(output.indices, indices)


@row(VQP, "FSQ")
def vqp_fsq() -> None:
    other, mine = peers().FSQ([8, 5, 5, 5]).eval(), FSQ((8, 5, 5, 5), channel_dim=-1).eval()
    latents = torch.randn(1, 20_000, 4)
    _, indices = other(latents)
    same = (mine(latents).indices == indices).double().mean()
    assert 0.97 < same < 1


# taming-transformers, whose formulas are written here


TAMING = "taming-transformers"


class Taming(nn.Module):
    """The formulas of its quantizer, for (B, C, h, w)."""

    def __init__(self, codes: Tensor, beta: float = 0.25, legacy: bool = True) -> None:
        super().__init__()
        self.codes, self.beta, self.legacy = nn.Parameter(codes.clone()), beta, legacy

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized latents, loss, flat indices."""
        z = latents.movedim(1, -1)
        flat = z.reshape(-1, z.shape[-1])
        squares = flat.square().sum(1, keepdim=True) + self.codes.square().sum(1)
        indices = (squares - 2 * flat @ self.codes.T).argmin(1)
        e = self.codes[indices].view(z.shape)
        moves_latents, moves_codes = (e.detach() - z).square().mean(), (e - z.detach()).square().mean()
        weights = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        loss = weights[0] * moves_latents + weights[1] * moves_codes
        return (z + (e - z).detach()).movedim(-1, 1), loss, indices


def taming(ours: dict[str, Any] | None = None, **theirs: Any) -> tuple[Taming, VectorQuantizer, Tensor]:
    """Both with the same codes, and latents."""
    other = Taming(torch.randn(K, C), **theirs)
    mine = VectorQuantizer(K, C, codebook_update="gradient", **(ours or {}))
    mine.set_codebook(other.codes.detach())
    return other, mine, torch.randn(2, C, 3, 5, requires_grad=True)


def same_training(other: Any, codes: Tensor, mine: VectorQuantizer, latents: Tensor) -> None:
    """Loss, and the gradients of latents and codes."""
    loss, output = other(latents)[1], mine(latents)
    torch.testing.assert_close(output.loss, loss)
    wanted = torch.autograd.grad(loss, (latents, codes))
    found = torch.autograd.grad(output.loss, (latents, mine.codebook))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@row(TAMING, "sizes")
def taming_sizes() -> None:
    other, mine, latents = taming()
    assert torch.equal(mine(latents).indices.flatten(), other(latents)[2])


@row(TAMING, "beta, legacy=True")
def taming_beta() -> None:
    other, mine, latents = taming({"commitment_weight": 1.0, "codebook_weight": 0.25})
    same_training(other, other.codes, mine, latents)
    # The paper's weights give the codes four times the gradient, and the latents a quarter.
    output = VectorQuantizer(K, C, codebook_update="gradient", commitment_weight=0.25)
    output.set_codebook(other.codes.detach())
    found = torch.autograd.grad(output(latents).loss, (latents, output.codebook))
    wanted = torch.autograd.grad(other(latents)[1], (latents, other.codes))
    torch.testing.assert_close(found[0], wanted[0] / 4)
    torch.testing.assert_close(found[1], wanted[1] * 4)


@row(TAMING, "beta, legacy=False")
def taming_beta_of_the_paper() -> None:
    other, mine, latents = taming({"commitment_weight": 0.25}, legacy=False)
    same_training(other, other.codes, mine, latents)


@row(TAMING, "how the codebook learns")
def taming_update() -> None:
    other, mine, latents = taming()
    assert mine.codebook.requires_grad
    default = VectorQuantizer(K, C)
    assert not default.codebook.requires_grad
    assert torch.autograd.grad(other(latents)[1], other.codes)[0].abs().sum() > 0


@row(TAMING, "result")
def taming_result() -> None:
    other, mine, latents = taming()
    output = mine(latents)
    assert other(latents)[2].shape == (2 * 3 * 5,)
    assert output.indices.shape == (2, 3, 5)
    torch.testing.assert_close(output.quantized, other(latents)[0])


@row(TAMING, "rounding of the codes")
def taming_rounding() -> None:
    other, mine, latents = taming()
    codes = other.codes.detach()[other(latents)[2]].view(2, 3, 5, C).movedim(-1, 1)
    assert not torch.equal(other(latents)[0], codes)
    output = mine(latents)
    assert torch.equal(output.quantized, codes)
    assert torch.equal(mine.decode(output.indices), codes)


@row(TAMING, "initial codebook")
def taming_initial_codebook() -> None:
    codes = nn.Embedding(50, C).weight.data.uniform_(-1 / 50, 1 / 50)
    mine = VectorQuantizer(50, C, codebook_update="gradient")
    for codebook in (codes, mine.codebook):
        assert 0.015 < codebook.abs().max() <= 1 / 50
    torch.testing.assert_close(mine.codebook.std(), codes.std(), rtol=0.2, atol=0)


@row(TAMING, "perplexity")
def taming_perplexity() -> None:
    other, mine, latents = taming()
    shares = F.one_hot(other(latents)[2], K).float().mean(0)
    wanted = (-(shares * (shares + 1e-10).log()).sum()).exp()
    usage = CodebookUsage(K)
    usage.update(mine(latents).indices)
    assert usage.compute().perplexity == pytest.approx(wanted.item(), rel=1e-5)


@row(TAMING, "get_codebook_entry")
def taming_get_codebook_entry() -> None:
    other, mine, _ = taming()
    indices = torch.randint(K, (2, 3, 5))
    wanted = other.codes[indices.flatten()].view(2, 3, 5, C).permute(0, 3, 1, 2)
    assert torch.equal(mine.decode(indices), wanted)


@row(TAMING, "cos_sim of TE-VQGAN")
def taming_cos_sim() -> None:
    other, mine, latents = taming({"metric": "cosine_raw", "commitment_weight": 0.25})
    flat = latents.detach().movedim(1, -1).reshape(-1, C)
    indices = (F.normalize(flat) @ F.normalize(other.codes.detach()).T).argmax(1)
    output = mine(latents)
    assert torch.equal(output.indices.flatten(), indices)
    assert torch.equal(output.codes, other.codes.detach()[indices].view(2, 3, 5, C).movedim(-1, 1))
    unit = VectorQuantizer(K, C, metric="cosine", codebook_update="gradient")
    unit.set_codebook(other.codes.detach())
    assert torch.equal(unit(latents).indices.flatten(), indices)
    torch.testing.assert_close(unit(latents).codes.norm(dim=1), torch.ones(2, 3, 5))


# diffusers


DIFFUSERS = "diffusers"


def diffusers(ours: dict[str, Any] | None = None, **theirs: Any) -> tuple[Any, VectorQuantizer, Tensor]:
    """Both with the same codes, and latents."""
    vae = pytest.importorskip("diffusers.models.autoencoders.vae", reason="diffusers is not installed")
    other = vae.VectorQuantizer(K, C, **{"beta": 0.25, **theirs})
    nn.init.normal_(other.embedding.weight)
    mine = VectorQuantizer(K, C, codebook_update="gradient", **(ours or {}))
    mine.set_codebook(other.embedding.weight.detach())
    return other, mine, torch.randn(2, C, 3, 5, requires_grad=True)


def vq_model() -> Any:
    """A small one of theirs."""
    package = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return package.VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=C, num_vq_embeddings=K
    ).eval()


@row(DIFFUSERS, "sizes")
def diffusers_sizes() -> None:
    other, mine, latents = diffusers()
    assert torch.equal(mine(latents).indices.flatten(), other(latents)[2][2])


@row(DIFFUSERS, "beta, legacy=True")
def diffusers_beta() -> None:
    other, mine, latents = diffusers({"commitment_weight": 1.0, "codebook_weight": 0.25})
    same_training(other, other.embedding.weight, mine, latents)


@row(DIFFUSERS, "beta, legacy=False")
def diffusers_beta_of_the_paper() -> None:
    other, mine, latents = diffusers({"commitment_weight": 0.25}, legacy=False)
    same_training(other, other.embedding.weight, mine, latents)


@row(DIFFUSERS, "result")
def diffusers_result() -> None:
    other, mine, latents = diffusers()
    quantized, _, (_, _, indices) = other(latents)
    assert indices.shape == (2 * 3 * 5,)
    output = mine(latents)
    assert torch.equal(output.indices, indices.view(2, 3, 5))
    torch.testing.assert_close(output.quantized, quantized)


@row(DIFFUSERS, "get_codebook_entry")
def diffusers_get_codebook_entry() -> None:
    other, mine, _ = diffusers()
    indices = torch.randint(K, (2, 3, 5))
    assert torch.equal(mine.decode(indices), other.get_codebook_entry(indices.flatten(), (2, 3, 5, C)))


@row(DIFFUSERS, "VQModel.from_pretrained")
@torch.no_grad()
def diffusers_from_pretrained() -> None:
    other, mine, images = loaded()
    torch.testing.assert_close(mine.encode(images), other.encode(images).latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine(images).reconstruction, other(images).sample, rtol=1e-4, atol=1e-5)


@row(DIFFUSERS, "tokens of images")
@torch.no_grad()
def diffusers_tokens() -> None:
    other, mine, images = loaded()
    _, _, (_, _, indices) = other.quantize(other.encode(images).latents)
    assert torch.equal(mine.encode_to_indices(images).flatten(), indices)


@row(DIFFUSERS, "decode")
@torch.no_grad()
def diffusers_decode() -> None:
    other, mine, images = loaded()
    latents = other.encode(images).latents
    tokens = mine.encode_to_indices(images)
    torch.testing.assert_close(mine.decode_indices(tokens), other.decode(latents).sample, rtol=1e-4, atol=1e-5)
    # Theirs quantizes what it decodes, ours does not.
    unquantized = other.decode(latents, force_not_quantize=True).sample
    torch.testing.assert_close(mine.decode(latents), unquantized, rtol=1e-4, atol=1e-5)
    assert (unquantized - other.decode(latents).sample).abs().max() > 1e-3


def loaded() -> tuple[Any, Any, Tensor]:
    """Theirs, ours with its weights, and images."""
    torch.manual_seed(0)
    other = vq_model()
    nn.init.normal_(other.quantize.embedding.weight)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        mine = load_diffusers(folder)
    return other, mine, torch.rand(2, 3, 8, 8) * 2 - 1


BLUR = "antialiased-cnns"


class _BlurPool(nn.Module):
    """The formula of their layer, with its defaults and its buffer."""

    def __init__(self, channels: int, pad_type: str = "reflect", filt_size: int = 4, stride: int = 2) -> None:
        super().__init__()
        self.stride, self.pads = stride, ((filt_size - 1) // 2, filt_size // 2)
        self.mode = {"reflect": "reflect", "repl": "replicate", "zero": "constant"}[pad_type]
        taps = torch.tensor([float(math.comb(filt_size - 1, tap)) for tap in range(filt_size)])
        self.register_buffer("filt", (torch.outer(taps, taps) / taps.sum() ** 2).repeat(channels, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        padded = F.pad(images, self.pads * 2, mode=self.mode)
        return F.conv2d(padded, self.filt, stride=self.stride, groups=len(self.filt))


def moved_blur(theirs: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """The results of theirs and of ours, into which its state is loaded."""
    mine = BlurPool2d(channels=6, **options)
    assert str(mine.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    images = torch.randn(2, 6, 11, 14)
    return theirs(images), mine(images)


@row(BLUR, "the defaults")
def blur_defaults() -> None:
    torch.testing.assert_close(*moved_blur(_BlurPool(6), kernel_size=4, padding_mode="reflect"))
    package = pytest.importorskip("antialiased_cnns", reason="antialiased-cnns is not installed")
    torch.testing.assert_close(*moved_blur(package.BlurPool(6), kernel_size=4, padding_mode="reflect"))


@row(BLUR, "channels")
def blur_channels() -> None:
    mine = BlurPool2d(kernel_size=4, padding_mode="reflect")
    mine.load_state_dict(_BlurPool(6).state_dict())
    images = torch.randn(1, 6, 8, 8)
    torch.testing.assert_close(mine(images), _BlurPool(6)(images))
    with pytest.raises(TypeError, match="positional argument"):
        BlurPool2d(6)  # type: ignore[misc]


@row(BLUR, "filt_size")
def blur_sizes() -> None:
    for size in range(1, 8):
        torch.testing.assert_close(
            *moved_blur(_BlurPool(6, filt_size=size, stride=3), kernel_size=size, stride=3, padding_mode="reflect")
        )
    with pytest.raises(
        RuntimeError, match="filt must be the binomial kernel of 5 taps for each channel, got another"
    ):
        moved_blur(_BlurPool(6))


@row(BLUR, "pad_type")
def blur_paddings() -> None:
    for theirs, ours in (("reflect", "reflect"), ("repl", "replicate"), ("zero", "zeros")):
        torch.testing.assert_close(*moved_blur(_BlurPool(6, theirs), kernel_size=4, padding_mode=ours))
    # Our default loads as well, and changes the border and nothing else.
    before, after = moved_blur(_BlurPool(6), kernel_size=4)
    assert (before - after).abs().max() > 0.1
    torch.testing.assert_close(before[..., 1:-2, 1:-2], after[..., 1:-2, 1:-2])


# Importing diffusers takes seconds, and so does the first mask of vector-quantize-pytorch.
_SLOW = (DIFFUSERS, f"{VQP}: mask")
_NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(_SLOW) else []) for name in ROWS]


@pytest.mark.parametrize("name", _NAMES)
def test_row(name: str) -> None:
    """What the row says."""
    ROWS[name]()


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=lambda b: b[:40])
def test_snippets_run(block: str) -> None:
    """Those before and those after."""
    peers()
    pytest.importorskip("diffusers")
    names: dict[str, Any] = {"latents": torch.randn(8, 64, 16, 16)}
    exec(compile(block, "migrating.md", "exec"), names)
