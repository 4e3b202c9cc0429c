"""Which code a latent takes under each metric, and what follows from it for the rest of the quantizer.

Shape letters: N latent vectors, C code size, K codes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from te_quant import ResidualVectorQuantizer, VectorQuantizer
from te_quant.autoencoder import AutoencoderConfig
from tests.helpers import plain_quantizer


def spread_vq(metric: str, *, codes: int = 40, dim: int = 4, **options: Any) -> VectorQuantizer:
    """A float64 quantizer whose codes differ in length."""
    quantizer = plain_quantizer(codes, dim, metric=metric, **options).double()
    lengths = torch.linspace(0.5, 2.0, codes, dtype=torch.float64).unsqueeze(1)
    quantizer.set_codebook(torch.randn(codes, dim, dtype=torch.float64) * lengths)
    return quantizer


def similarities(metric: str, latents: Tensor, codes: Tensor) -> Tensor:
    """(N, K), by the definition of each metric: the larger, the better."""
    if metric == "dot":
        return torch.einsum("nc,kc->nk", latents, codes)
    if metric == "cosine_raw":
        return F.cosine_similarity(latents[:, None], codes[None], dim=2)
    return -(latents[:, None] - codes[None]).square().sum(2)


@pytest.mark.parametrize("metric", ["l2", "cosine_raw", "dot"])
def test_each_metric_takes_its_own_code(metric: str) -> None:
    """By a table of all similarities; the other tables say something else about many latents."""
    quantizer = spread_vq(metric)
    latents, codes = torch.randn(300, 4, dtype=torch.float64), quantizer.codebook.detach()
    found = quantizer.encode(latents)
    assert torch.equal(found, similarities(metric, latents, codes).argmax(1))
    assert torch.equal(found, quantizer(latents).indices)
    for other in {"l2", "cosine_raw", "dot"} - {metric}:
        assert (found != similarities(other, latents, codes).argmax(1)).double().mean() > 0.1


@pytest.mark.parametrize("metric", ["cosine_raw", "dot"])
def test_codes_are_returned_as_they_are(metric: str) -> None:
    """Rows of the codebook, with their lengths, from ``forward`` and ``decode``."""
    quantizer = spread_vq(metric)
    output = quantizer(torch.randn(300, 4, dtype=torch.float64))
    assert torch.equal(output.codes, quantizer.codebook.detach()[output.indices])
    assert torch.equal(quantizer.decode(output.indices), output.codes)
    assert output.codes.norm(dim=1).std() > 0.1


@pytest.mark.parametrize("metric", ["cosine_raw", "dot"])
def test_losses_are_those_of_the_vectors_as_they_are(metric: str) -> None:
    """Value and gradients of mean (z - e)², as the code of TE-VQGAN writes it."""
    quantizer = spread_vq(metric, commitment_weight=0.25)
    latents = torch.randn(300, 4, dtype=torch.float64, requires_grad=True)
    output = quantizer(latents)
    z, e = (tensor.detach().clone().requires_grad_() for tensor in (latents, quantizer.codebook))
    chosen = e[similarities(metric, z, e).argmax(1)]
    reference = 0.25 * (z - chosen.detach()).square().mean() + (z.detach() - chosen).square().mean()
    assert output.loss.item() == pytest.approx(reference.item(), rel=1e-12)
    got = torch.autograd.grad(output.loss, (latents, quantizer.codebook))
    for a, b in zip(got, torch.autograd.grad(reference, (z, e)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_products_are_those_of_distances_with_one_more_channel() -> None:
    """Nearest in C + 1 channels, where all codes are equally long: the largest product."""
    quantizer = spread_vq("dot")
    latents, codes = torch.randn(300, 4, dtype=torch.float64), quantizer.codebook.detach()
    squares = codes.square().sum(1, keepdim=True)
    nearest = plain_quantizer(40, 5).double()
    nearest.set_codebook(torch.cat([codes, (squares.max() - squares).clamp_min(0).sqrt()], 1))
    assert torch.equal(quantizer.encode(latents), nearest.encode(F.pad(latents, (0, 1))))


def test_products_far_from_zero_keep_their_accuracy() -> None:
    """Codes with a common offset of 100,000: its product with a latent is the same for all, and does not count."""
    generator = torch.Generator().manual_seed(0)
    quantizer = plain_quantizer(256, 16, metric="dot")
    quantizer.set_codebook(torch.randn(256, 16, generator=generator) + 1e5)
    latents, codes = torch.randn(500, 16, generator=generator), quantizer.codebook.detach()
    exact = (latents.double() @ codes.double().T).argmax(1)
    assert (quantizer.encode(latents) == exact).double().mean() > 0.99
    assert ((latents @ codes.T).argmax(1) == exact).double().mean() < 0.99


@pytest.mark.parametrize("scale", [1e-35, 1e-24, 1e20, 1e36])
@pytest.mark.parametrize("rows", [100, 6_000])
def test_products_at_every_scale_of_float32(rows: int, scale: float) -> None:
    """Where their values would overflow or vanish, the largest is found all the same."""
    quantizer = spread_vq("dot", codes=256).float()
    quantizer.set_codebook(quantizer.codebook.detach() * scale)
    latents = torch.randn(rows, 4)
    wanted = (latents.double() @ (quantizer.codebook.detach().double() / scale).T).argmax(1)
    assert (quantizer.encode(latents * scale) == wanted).double().mean() > 0.999


@pytest.mark.parametrize("scale", [1e-22, 1e19])
@pytest.mark.parametrize("metric", ["cosine", "cosine_raw"])
def test_cosines_at_every_scale_of_float32(metric: str, scale: float) -> None:
    """Latents are scaled to unit length although their squares vanish or overflow."""
    quantizer = spread_vq(metric, codes=256).float()
    latents = torch.randn(500, 4)
    wanted = similarities("cosine_raw", latents.double(), quantizer.codebook.detach().double()).argmax(1)
    assert (quantizer.encode(latents * scale) == wanted).double().mean() > 0.99


@pytest.mark.parametrize("rows", [5, 30_000])
def test_equal_products_go_to_the_lowest_index(rows: int) -> None:
    """Copies of a code, and a latent of zero, whose products are all equal; in one tile and in groups."""
    quantizer = spread_vq("dot")
    with torch.no_grad():
        quantizer.codebook[30] = quantizer.codebook[7] = 9 * torch.ones(4)
    latents = torch.zeros(rows, 4, dtype=torch.float64)
    latents[::2] = 1.0
    assert quantizer.encode(latents)[:4].tolist() == [7, 0, 7, 0]
    assert quantizer.encode(latents).unique().tolist() == [0, 7]


@pytest.mark.parametrize(("metric", "temperature"), [("dot", 0.7), ("cosine_raw", 0.2)])
def test_draws_follow_the_softmax_of_the_metric(metric: str, temperature: float) -> None:
    """χ² of 6 codes stays below its 99.9 % quantile; under the other metric it would not."""
    quantizer = spread_vq(metric, codes=6, temperature=temperature)
    latent = torch.randn(1, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = quantizer(latent.expand(20_000, 4), generator=generator).indices
    counts = np.bincount(drawn, minlength=6)

    def chi_square(which: str) -> float:
        scores = similarities(which, latent, quantizer.codebook.detach())[0]
        expected = 20_000 * (scores / temperature).softmax(0).numpy()
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_square(metric) < 20.5
    assert chi_square("dot" if metric == "cosine_raw" else "cosine_raw") > 100


# Moving averages and k-means under the angle


def test_averages_under_the_angle_are_those_of_whole_latents() -> None:
    """One step with decay 0: each code becomes the mean of the latents that chose it, with their lengths."""
    quantizer = spread_vq("cosine_raw", codes=5, codebook_update="ema", decay=0.0)
    latents = 3 * torch.randn(400, 4, dtype=torch.float64)
    chosen = similarities("cosine_raw", latents, quantizer.codebook).argmax(1)
    quantizer(latents)
    quantizer.apply_pending()
    means = torch.stack([latents[chosen == code].mean(0) for code in range(5)])
    torch.testing.assert_close(quantizer.codebook, means, rtol=1e-5, atol=1e-5)
    assert (means.norm(dim=1) > 1.5).all()


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_k_means_under_the_angle_is_a_fixed_point(update: str) -> None:
    """After enough steps each centre is the mean of the latents at the smallest angle to it."""
    quantizer = spread_vq("cosine_raw", codes=5, codebook_update=update)
    latents = 3 * torch.randn(300, 4, dtype=torch.float64)
    quantizer.kmeans_init(latents, iterations=60, generator=torch.Generator().manual_seed(0))
    centers = quantizer.codebook.detach()
    chosen = similarities("cosine_raw", latents, centers).argmax(1)
    means = torch.stack([latents[chosen == code].mean(0) for code in range(5)])
    torch.testing.assert_close(centers, means, rtol=1e-9, atol=1e-12)
    assert not torch.equal(chosen, similarities("l2", latents, centers).argmax(1))


def test_k_means_of_products_is_that_of_distances() -> None:
    """Products would give the latents of one cluster to the longest centre of others."""
    latents = torch.randn(300, 4, dtype=torch.float64)
    found = []
    for metric in ("dot", "l2"):
        quantizer = spread_vq(metric, codes=5)
        quantizer.kmeans_init(latents, generator=torch.Generator().manual_seed(0))
        found.append(quantizer.codebook.detach())
    assert torch.equal(*found)


def test_dead_codes_are_revived_under_products() -> None:
    """They move onto latents, which then take them or longer ones."""
    quantizer = spread_vq("dot", codes=8)
    quantizer.usage[3] = 0
    latents = torch.randn(50, 4, dtype=torch.float64)
    assert quantizer.revive_dead_codes(latents).nonzero().flatten().tolist() == [3]
    assert (latents == quantizer.codebook.detach()[3]).all(1).any()


# Other places


@pytest.mark.parametrize("metric", ["cosine_raw", "dot"])
def test_residuals_are_chosen_by_the_metric_of_each_stage(metric: str) -> None:
    """The second stage sees what the first left over, unscaled."""
    stages = [spread_vq(metric), spread_vq(metric)]
    latents = torch.randn(100, 4, dtype=torch.float64)
    found = ResidualVectorQuantizer(stages=stages).encode(latents)
    first = stages[0].encode(latents)
    left = latents - stages[0].decode(first)
    wanted = torch.stack([first, similarities(metric, left, stages[1].codebook.detach()).argmax(1)], 1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("metric", ["cosine_raw", "dot"])
def test_config_stores_the_metric(metric: str) -> None:
    """As any other."""
    config = AutoencoderConfig(
        base_channels=8, channel_multipliers=(1,), metric=metric, codebook_update="gradient"
    )
    assert AutoencoderConfig.from_dict(config.to_dict()) == config
    quantizer = config.build_quantizer()
    assert isinstance(quantizer, VectorQuantizer)
    assert quantizer.metric == metric


def test_nothing_is_not_a_direction() -> None:
    """A latent of zero has no angle: it takes some code, and its gradient is finite."""
    quantizer = spread_vq("cosine_raw")
    latents = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    output = quantizer(latents)
    (output.loss + output.quantized.sum()).backward()
    assert latents.grad is not None
    assert math.isfinite(latents.grad.sum().item())
    assert 0 <= int(output.indices.min()) <= int(output.indices.max()) < 40
