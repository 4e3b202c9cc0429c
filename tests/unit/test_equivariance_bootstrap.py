"""Intervals: what they cover, what they equal, and on what they do not depend."""

import math

import numpy as np
import pytest
import torch

from te_quant._measuring import bootstrap
from te_quant._measuring.bootstrap import ImageSums, Resamples
from te_quant.equivariance import measure_equivariance, placement_agreement
from te_quant.equivariance.metrics import pair_tally
from te_quant.equivariance.metrics.pair_tally import PairTally


def numpy_intervals(first, second, mask, num_codes, resamples, seed, symmetric):
    """Rate and κ of every resample, with dense counts and one resample at a time in float64."""
    n = len(first)
    drawn = torch.randint(0, n, (resamples, n), generator=torch.Generator().manual_seed(seed)).numpy()
    rates, kappas = [], []
    for images in drawn:
        a = np.concatenate([first[i][mask[i]] for i in images])
        b = np.concatenate([second[i][mask[i]] for i in images])
        if len(a) == 0:
            continue
        if symmetric:
            a, b = np.concatenate([a, b]), np.concatenate([b, a])
        p, q = (np.bincount(side, minlength=num_codes) / len(side) for side in (a, b))
        rates.append(np.mean(a == b))
        if 1 - p @ q > 1e-12:
            kappas.append((rates[-1] - p @ q) / (1 - p @ q))
    return [bounds(values) for values in (rates, kappas)]


def bounds(values: list[float]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % percentiles, rounded outwards to values that occur."""
    return (
        float(np.percentile(values, 2.5, method="lower")),
        float(np.percentile(values, 97.5, method="higher")),
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_codes", [3, 40_000])
def test_intervals_of_an_agreement_match_numpy(num_codes, symmetric, monkeypatch):
    """Percentiles of rate and κ over the same draws, one image without any token, codes beyond one block."""
    n = 7
    if num_codes == 3:
        # Blocks of two codes.
        monkeypatch.setattr(pair_tally, "_MOST_ELEMENTS", 2 * 200)
    first, second = torch.randint(0, 3, (2, n, 4, 5))
    second = torch.where(torch.rand(n, 4, 5) < 0.6, first, second)
    first, second = ((side * (num_codes // 3)) for side in (first, second))
    mask = torch.rand(n, 4, 5) < 0.7
    mask[2] = False
    tally = PairTally(num_codes)
    for part in (slice(0, 3), slice(3, n)):
        # In two calls a batch, as two shifts of the same images would come.
        for columns in (slice(0, 2), slice(2, 5)):
            tally.add(first[part, :, columns], second[part, :, columns], mask[part, :, columns])
        tally.close()
    result = tally.agreement(Resamples(n, 200, 11), symmetric=symmetric)
    rate, kappa = numpy_intervals(first.numpy(), second.numpy(), mask.numpy(), num_codes, 200, 11, symmetric)
    assert result.rate_interval == pytest.approx(rate, abs=1e-12)
    assert result.kappa_interval == pytest.approx(kappa, abs=1e-10)
    assert result.rate_interval[0] < result.rate < result.rate_interval[1]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Images of unequal difficulty: 95 % intervals hold the true rate in 90 to 98 % of 400 repetitions.

    Negative control: intervals that take all tokens for independent hold it far less often.
    """
    generator = np.random.default_rng(5)
    n, tokens, repetitions = 60, 25, 400
    held = naive = 0
    for repetition in range(repetitions):
        chances = generator.beta(2, 1, n)
        equal = torch.from_numpy(generator.binomial(tokens, chances)).double()
        sums = torch.stack([equal, torch.full_like(equal, tokens)], dim=1)
        low, high = Resamples(n, 400, repetition).interval_of_sums(sums, lambda s: s[:, 0] / s[:, 1])
        held += low <= 2 / 3 <= high
        rate = float(equal.sum()) / (n * tokens)
        half = 1.96 * math.sqrt(rate * (1 - rate) / (n * tokens))
        naive += abs(rate - 2 / 3) <= half
    assert 0.90 <= held / repetitions <= 0.98
    assert naive / repetitions < 0.75


@pytest.mark.parametrize("per_image", [1, 2, 9])
@pytest.mark.parametrize("count", [1, 11, 301])
def test_interval_of_a_median_is_that_of_the_sorted_resamples(per_image, count, monkeypatch):
    """One resample at a time in NumPy: ties, infinities, even and odd numbers, several blocks of draws."""
    n, seed = 9, 5
    values = torch.randn(n, per_image).mul(2).round() / 2
    values[torch.rand(n, per_image) < 0.3] = math.inf
    values[0] -= 3
    monkeypatch.setattr(bootstrap, "_MOST_ELEMENTS", 100 * n)
    resamples = Resamples(n, count, seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat(
        [torch.randint(0, n, (rows, n), generator=generator) for rows in [100] * (count // 100) + [count % 100]]
    )
    medians = [np.sort(values.numpy()[rows].ravel())[round((n * per_image - 1) / 2)] for rows in drawn.numpy()]
    medians.sort()
    expected = (medians[math.floor(0.025 * (count - 1))], medians[math.ceil(0.975 * (count - 1))])
    assert resamples.interval_of_median(values) == expected
    assert resamples.interval_of_median(torch.full((n, 3), math.inf)) == (math.inf, math.inf)


@pytest.mark.slow
def test_intervals_of_a_median_cover_the_truth_about_as_often_as_they_say():
    """Images of unequal level: 95 % intervals hold the true median in 88 to 99 % of 300 repetitions.

    Negative control: intervals that take all tokens for independent hold it far less often.
    """
    generator = torch.Generator().manual_seed(8)
    n, tokens, repetitions = 60, 25, 300
    held = naive = 0
    for repetition in range(repetitions):
        values = torch.randn(n, 1, generator=generator) + torch.randn(n, tokens, generator=generator)
        low, high = Resamples(n, 300, repetition).interval_of_median(values)
        held += low <= 0 <= high
        low, high = Resamples(n * tokens, 100, repetition).interval_of_median(values.reshape(-1, 1))
        naive += low <= 0 <= high
    assert 0.88 <= held / repetitions <= 0.99
    assert naive / repetitions < 0.6


def test_undefined_and_infinite_resamples():
    """NaN is left out, infinity may be a bound; nothing defined, one image or no resamples give NaN."""
    sums = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    low, high = Resamples(3, 500, 0).interval_of_sums(sums, lambda s: s[:, 0] / s[:, 1])
    assert low == pytest.approx(1.0)
    assert high == math.inf
    same = Resamples(3, 500, 0).interval(lambda times: torch.where(times[:, 0] > 0, 4.0, torch.nan))
    assert same == (4.0, 4.0)
    for resamples, estimate in [
        (Resamples(3, 50, 0), lambda times: times[:, 0] * torch.nan),
        (Resamples(1, 50, 0), lambda times: times[:, 0]),
        (Resamples(3, 0, 0), lambda times: times[:, 0]),
    ]:
        assert all(math.isnan(bound) for bound in resamples.interval(estimate))


def test_every_resample_draws_as_many_images_as_there_are():
    """Rows of counts that sum to N, each image about once on average; blocks of rows do not change the draws."""
    times = []
    Resamples(50, 2000, 3).interval(lambda t: times.append(t) or t[:, 0])
    counts = torch.cat(times)
    assert counts.shape == (2000, 50)
    assert torch.all(counts.sum(1) == 50)
    torch.testing.assert_close(counts.mean(0), torch.ones(50, dtype=torch.float64), atol=0.12, rtol=0)
    # The variance of a binomial(N, 1/N) is 1 - 1/N: draws are with replacement.
    assert float(counts.var()) == pytest.approx(1 - 1 / 50, abs=0.03)


def test_image_sums_add_within_a_batch_and_append_between():
    """Rows belong to images; pooled rows are one."""
    for pooled, expected in [(False, [[3.0, 1.0], [5.0, 1.0], [7.0, 0.0]]), (True, [[15.0, 2.0]])]:
        sums = ImageSums(pooled=pooled)
        sums.add(torch.tensor([1, 2]), torch.tensor([0.5, 1.0]))
        sums.add(torch.tensor([2, 3]), torch.tensor([0.5, 0.0]))
        sums.close()
        sums.close()
        sums.add(torch.tensor([[7, 0]]))
        sums.close()
        assert sums.rows.tolist() == expected
        assert sums.total.tolist() == [[15.0, 2.0]]


def some_report(batch_size=4, count=6, **options):
    """Measure a tokenizer that aliases, on seeded images."""
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows = torch.arange(4)[:, None]
    return measure_equivariance(
        lambda x: (((x[:, 0, ::2, ::2] + 1) * 3.9).long() + rows) % 8,
        images,
        stride=2,
        num_codes=8,
        protocol="circular",
        batch_size=batch_size,
        **options,
    )


def test_intervals_are_reproducible_and_leave_global_randomness_alone():
    """Equal by seed, whatever the batch split and the global generator; different by another seed."""
    state = torch.get_rng_state()
    first = some_report()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = some_report(batch_size=1)
    assert again.agreements() == first.agreements()
    low, high = first.aligned.kappa_interval
    assert low < first.aligned.kappa < high
    other = some_report(seed=1)
    assert other.aligned.rate == first.aligned.rate
    assert other.sub_stride.kappa_interval != first.sub_stride.kappa_interval
    assert other.settings.seed == 1


def test_one_image_or_no_resamples_have_no_interval():
    """Nothing can be said about other images then; the rates stay."""
    full = some_report(count=2)
    for report in (some_report(count=1), some_report(count=2, resamples=0)):
        for agreement in report.agreements().values():
            assert all(math.isnan(b) for b in (*agreement.rate_interval, *agreement.kappa_interval))
            assert agreement.kappa_defined
        assert "no intervals" in report.to_markdown()
        assert "[" not in report.to_markdown()
    assert some_report(count=2, resamples=0).aligned.rate == full.aligned.rate


def test_maps_by_shift_have_intervals_of_the_rate_alone():
    """Their κ keeps pooled frequencies only."""
    for entry in some_report().sub_stride_by_shift:
        low, high = entry.agreement.rate_interval
        assert low <= entry.agreement.rate <= high
        assert math.isnan(entry.agreement.kappa_interval[0])
        assert entry.agreement.kappa_defined


def test_placement_alone_has_the_same_intervals():
    """One seed, one set of draws; another seed, others."""
    sprites = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sprites[..., 0] = -1
    rows = torch.arange(8)[:, None]

    def tokenize(x):
        tokens = ((x[:, 0, ::2, ::2] + 1) * 1.9).long()
        return (tokens + (rows > 5) * (tokens > 2)) % 5

    options = {"stride": 2, "num_codes": 5, "canvas_size": 16}
    report = measure_equivariance(tokenize, sprites, **options)
    alone = placement_agreement(tokenize, sprites, **options, batch_size=2)
    assert alone == report.placement
    assert alone.rate_interval[0] < alone.rate < alone.rate_interval[1]
    assert placement_agreement(tokenize, sprites, **options, seed=2).kappa_interval != alone.kappa_interval
