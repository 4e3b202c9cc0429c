"""Margins against the definition pair by pair, and the certificate they give."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from te_quant._measuring.bootstrap import Resamples
from te_quant.equivariance import Spread, code_margins, measure_equivariance
from te_quant.equivariance.metrics import margin
from te_quant.functional import nearest_code
from te_quant.testing import codebooks, latents_off_boundaries


def loop_margins(z: np.ndarray, codebook: np.ndarray, indices: np.ndarray) -> list[float]:
    """The definition, one pair of vector and code at a time."""
    found = []
    for vector, c in zip(z, indices, strict=True):
        walls = [
            (((vector - e) ** 2).sum() - ((vector - codebook[c]) ** 2).sum())
            / (2 * np.linalg.norm(e - codebook[c]))
            for e in codebook
            if not np.array_equal(e, codebook[c])
        ]
        found.append(min(walls, default=math.inf))
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 20), st.booleans(), st.integers(0, 2**31))
def test_margins_match_the_definition(num_codes, dim, count, copies, seed):
    """Any codebook, copies of codes included, any index: nearest or not."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(num_codes, dim, generator=generator, dtype=torch.float64)
    if copies:
        codebook = codebook[torch.randint(0, num_codes, (num_codes,), generator=generator)]
    z = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    indices = torch.randint(0, num_codes, (count,), generator=generator)
    result = code_margins(z, codebook, indices)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(
        result.numpy(), loop_margins(z.numpy(), codebook.numpy(), indices.numpy()), rtol=1e-8, atol=1e-9
    )
    assert torch.all(code_margins(z, codebook, nearest_code(z, codebook)) >= -1e-9)


@settings(deadline=None, max_examples=40)
@given(codebooks(), st.floats(0, 0.24), st.data())
def test_latents_drawn_off_boundaries_have_the_margin_they_were_drawn_with(codebook, least, data):
    """The strategy of te_quant.testing and the measurement mean the same; exact copies of codes change nothing."""
    latents, indices = data.draw(latents_off_boundaries(codebook, margin=least))
    rows = latents.movedim(1, -1).flatten(0, 2)
    found = code_margins(rows, codebook, indices.flatten())
    assert float(found.min()) >= least - 1e-12
    again = code_margins(rows, torch.cat([codebook, codebook]), indices.flatten())
    torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-12)


def test_margin_is_how_far_one_may_go_in_the_worst_direction():
    """A step just below the margin towards the wall keeps the code, one just above changes it."""
    codebook = torch.randn(20, 3, dtype=torch.float64)
    z = torch.randn(50, 3, dtype=torch.float64)
    indices = nearest_code(z, codebook)
    r = code_margins(z, codebook, indices)
    changed = torch.zeros(50, dtype=torch.bool)
    for j in range(20):
        way = codebook[j] - codebook[indices]
        way = way / way.norm(dim=1, keepdim=True).clamp_min(1e-300)
        assert torch.equal(nearest_code(z + 0.999 * r[:, None] * way, codebook), indices)
        changed |= nearest_code(z + 1.001 * r[:, None] * way, codebook) != indices
    assert torch.all(changed)


def test_close_codes_far_from_the_origin_lose_no_accuracy():
    """Two codes 1e-6 apart at distance 1000 from a third, with copies: the wall is half way between them."""
    codes = [[1000.0, 0.0], [1000.0, 1e-6], [0.0, 0.0], [1000.0, 0.0], [0.0, 0.0]]
    codebook = torch.tensor(codes, dtype=torch.float64)
    z = torch.tensor([[1000.0, 0.0], [1000.0, 3e-7], [1003.0, 0.0]], dtype=torch.float64)
    result = code_margins(z, codebook, torch.zeros(3, dtype=torch.int64))
    np.testing.assert_allclose(result.numpy(), [5e-7, 2e-7, 5e-7], rtol=1e-9)
    far = code_margins(torch.tensor([[1.0, 0.0]], dtype=torch.float64), codebook, torch.tensor([2]))
    np.testing.assert_allclose(far.numpy(), [499.0], rtol=1e-12)
    copies = code_margins(codebook[2:3], codebook[[2, 4]], torch.tensor([1]))
    assert copies.tolist() == [math.inf]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_indices_may_have_any_integer_dtype(dtype):
    """As files hold them."""
    codebook, latents = torch.randn(9, 3), torch.randn(20, 3)
    indices = nearest_code(latents, codebook)
    found = code_margins(latents, codebook, indices.to(dtype))
    assert torch.equal(found, code_margins(latents, codebook, indices))


def test_chunks_change_nothing(monkeypatch):
    """Blocks of a few vectors at a time give the same margins."""
    codebook, z = torch.randn(6, 4), torch.randn(40, 4)
    indices = nearest_code(z, codebook)
    whole = code_margins(z, codebook, indices)
    monkeypatch.setattr(margin, "_MOST_ELEMENTS", 12)
    torch.testing.assert_close(code_margins(z, codebook, indices), whole, rtol=1e-9, atol=1e-9)


class Tokenizer:
    """A linear encoder of cells plus something that depends on position, and its nearest codes."""

    def __init__(self, num_codes: int, position: float, generator: torch.Generator) -> None:
        self.mix = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.codebook = torch.randn(num_codes, 3, generator=generator, dtype=torch.float64)
        self.position = position * torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Encode (B, 1, 8, 8)."""
        cells = images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)[:, 0]
        return (cells @ self.mix).movedim(-1, 1) + self.position

    def quantize(self, z: torch.Tensor) -> torch.Tensor:
        """Nearest codes, by a full table of distances."""
        return (z.movedim(1, -1).unsqueeze(-2) - self.codebook).norm(dim=-1).argmin(-1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Tokenize."""
        return self.quantize(self.latents(images))

    def measure(self, images: torch.Tensor, **options):
        """Measure with margins."""
        given = {"stride": 2, "num_codes": len(self.codebook), "latents": self.latents, "codebook": self.codebook}
        return measure_equivariance(self, images, **(given | options))


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["canvas", "circular", "crop"]),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    st.integers(0, 2**31),
)
def test_certified_rate_never_exceeds_the_agreement(protocol, num_codes, position, seed):
    """C <= A, and certified pairs never differ; without any dependence on position both are 1."""
    generator = torch.Generator().manual_seed(seed)
    side = {"canvas": 4, "circular": 8, "crop": 14}[protocol]
    images = torch.rand(3, 1, side, side, generator=generator, dtype=torch.float64) * 2 - 1
    images[..., 0] = -1
    tokenizer = Tokenizer(num_codes, position, generator)
    report = tokenizer.measure(images, protocol=protocol, canvas_size=None if protocol == "circular" else 8)
    assert report.margin.tokens == report.aligned.tokens
    assert report.margin.contradictions == 0
    assert report.margin.certified_rate <= report.aligned.rate
    if position == 0.0:
        assert report.margin.certified_rate == 1.0
        assert report.margin.movement.high < 1e-12
    if num_codes == 1:
        assert report.margin.margin.median == math.inf
        assert report.margin.certified_rate == 1.0


def test_margin_report_matches_loops():
    """Certified rate, its interval, and the percentiles of r, δ and δ/r, token by token in float64."""
    generator = torch.Generator().manual_seed(int(torch.randint(0, 2**31, ())))
    images = torch.rand(4, 1, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    tokenizer = Tokenizer(9, 0.15, generator)
    shifts = [(2, 0), (4, 6)]
    report = tokenizer.measure(images, protocol="circular", shifts=shifts, resamples=80, seed=2, batch_size=3)
    r, delta, certified = [], [], [[] for _ in images]
    codebook = tokenizer.codebook.numpy()
    for n, image in enumerate(images):
        z = tokenizer.latents(image[None])[0].numpy()
        vectors = z.reshape(3, -1).T
        indices = [int(((codebook - v) ** 2).sum(1).argmin()) for v in vectors]
        margins = np.array(loop_margins(vectors, codebook, np.array(indices))).reshape(4, 4)
        r += margins.ravel().tolist()
        for dy, dx in shifts:
            moved = tokenizer.latents(image.roll((dy, dx), (-2, -1))[None])[0].numpy()
            for v in range(4):
                for w in range(4):
                    step = np.linalg.norm(moved[:, (v + dy // 2) % 4, (w + dx // 2) % 4] - z[:, v, w])
                    delta.append((step, step / margins[v, w]))
                    certified[n].append(step < margins[v, w])
    found = report.margin
    assert found.certified_rate == pytest.approx(np.mean(certified), abs=1e-14)
    assert 0.1 < found.certified_rate < 1
    drawn = torch.randint(0, 4, (80, 4), generator=torch.Generator().manual_seed(2)).numpy()
    rates = [np.mean([certified[i] for i in rows]) for rows in drawn]
    expected = [np.percentile(rates, 2.5, method="lower"), np.percentile(rates, 97.5, method="higher")]
    assert found.certified_interval == pytest.approx(expected, abs=1e-14)
    for spread, values in [
        (found.margin, r),
        (found.movement, [d[0] for d in delta]),
        (found.ratio, [d[1] for d in delta]),
    ]:
        ordered = np.sort(np.array(values))
        picked = [ordered[round(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95)]
        assert (spread.low, spread.median, spread.high) == pytest.approx(picked, rel=1e-6)
        by_image = np.array(values).reshape(4, -1)
        medians = []
        for rows in drawn:
            ordered = np.sort(by_image[rows].ravel())
            medians.append(ordered[round(0.5 * (len(ordered) - 1))])
        expected = [np.percentile(medians, 2.5, method="lower"), np.percentile(medians, 97.5, method="higher")]
        assert spread.median_interval == pytest.approx(expected, rel=1e-6)
    # Of the movement it is a point: here no image moves otherwise than another.
    assert found.margin.median_interval[0] < found.margin.median_interval[1]


def test_codebook_alone_gives_the_fourier_form_too():
    """``quantize`` falls back to the nearest code; an explicit one is used instead."""
    tokenizer = Tokenizer(6, 0.0, torch.Generator().manual_seed(1))
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64) * 2 - 1
    options = {"protocol": "circular"}
    default = tokenizer.measure(images, **options)
    given = tokenizer.measure(images, quantize=tokenizer.quantize, **options)
    assert default.sub_stride_fourier == given.sub_stride_fourier
    other = tokenizer.measure(images, quantize=lambda z: torch.zeros(len(z), 4, 4).long(), **options)
    assert other.sub_stride_fourier != default.sub_stride_fourier
    mixed = tokenizer.measure(images, codebook=tokenizer.codebook.float(), **options)
    assert mixed.sub_stride_fourier.rate == pytest.approx(default.sub_stride_fourier.rate, abs=0.02)


def test_margins_need_whole_token_shifts():
    """Without any, there is nothing to certify."""
    tokenizer = Tokenizer(6, 0.0, torch.Generator())
    report = tokenizer.measure(torch.rand(2, 1, 8, 8, dtype=torch.float64) * 2 - 1, protocol="circular", shifts=[])
    assert report.margin is None
    assert report.feature_error is None


def test_another_codebook_is_refused():
    """Tokens that are not nearest codes would make the certificate void."""
    tokenizer = Tokenizer(6, 0.0, torch.Generator())
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64) * 2 - 1
    with pytest.raises(ValueError, match=r"codebook must be such that tokenize\(images\) is the code nearest to"):
        tokenizer.measure(images, protocol="circular", codebook=tokenizer.codebook.flip(0))


def test_contradictions_are_counted_and_shown():
    """Tokens that flip although the latents stay: the certificate is broken, and the report says so."""
    calls = []

    def tokenize(images):
        tokens = (images[:, 0, ::2, ::2] > 0).long()
        calls.append(len(images))
        if len(calls) == 3:
            tokens[0, 0, 0] = 1 - tokens[0, 0, 0]
        return tokens

    report = measure_equivariance(
        tokenize,
        torch.rand(2, 1, 8, 8) * 2 - 1,
        stride=2,
        num_codes=2,
        protocol="circular",
        shifts=[(2, 0)],
        latents=lambda x: x[:, :, ::2, ::2],
        codebook=torch.tensor([[-1.0], [1.0]]),
    )
    assert report.margin.contradictions == report.aligned.differing == 1
    assert "certified, yet the indices differ (rounding) | 1 |" in report.to_markdown()


def test_only_less_than_the_margin_is_certified():
    """δ = r is not enough, just below is; a vector on a wall has an infinite ratio."""
    tally = margin.MarginTally(torch.tensor([[-1.0], [1.0]]))
    margins = tally.margins(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[1, 1]]]))
    assert margins.tolist() == [[[1.0, 0.0]]]
    for movement in (1.0, -0.999):
        tally.add(margins, torch.tensor([[[[movement, 0.0]]]]), torch.ones(1, 1, 2, dtype=torch.bool))
    tally.close()
    found = tally.margin(Resamples(1, 0, 0))
    assert (found.certified_rate, found.tokens, found.contradictions) == (0.25, 4, 0)
    assert found.ratio.high == math.inf


def test_spread_of_nothing_is_not_a_number():
    """No value, no percentile; infinities are values."""
    assert math.isnan(Spread.of(torch.zeros(0)).median)
    assert Spread.of(torch.tensor([math.inf, 1.0, 2.0])) == Spread(1.0, 2.0, math.inf)
    for resamples, values in ((Resamples(2, 9, 0), torch.zeros(2, 0)), (Resamples(1, 9, 0), torch.ones(1, 3))):
        assert all(math.isnan(bound) for bound in Spread.of(values, resamples).median_interval)


Z, E, INDICES = torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: code_margins(Z[0], E, INDICES), ValueError, r"latents must be of shape \(N, C\)"),
        (lambda: code_margins(Z, E[0], INDICES), ValueError, r"codebook must be of shape \(K, C\)"),
        (lambda: code_margins(Z.long(), E, INDICES), TypeError, "latents must be floating point"),
        (lambda: code_margins(Z, E.long(), INDICES), TypeError, "codebook must be floating point"),
        (
            lambda: code_margins(Z[:, :1], E, INDICES),
            ValueError,
            "latents axis 1 must be codebook axis 1=2, got 1",
        ),
        (lambda: code_margins(Z, E, INDICES.float()), TypeError, "indices must be an integer tensor"),
        (lambda: code_margins(Z, E, INDICES[None]), ValueError, r"indices must be of shape \(N,\)"),
        (lambda: code_margins(Z, E, INDICES[:2]), ValueError, "indices axis 0 must be N=3, got 2"),
        (lambda: code_margins(Z, E, INDICES + 4), ValueError, r"indices must be in \[0, K=4\), got 4"),
        (
            lambda: code_margins(Z.to("meta"), E, INDICES),
            ValueError,
            "latents must be on cpu as the codebook, got meta",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, match):
    """One clear error for each."""
    with pytest.raises(error, match=match):
        call()
