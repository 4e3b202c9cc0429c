"""Codebook health: counts that do not depend on how the data is split."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_quant import CodebookUsage, CodebookUsageReport
from tests.helpers import exactly

tokens = st.lists(st.integers(0, 9), max_size=60)


def report(*batches: Tensor, frequent_share: float = 1e-3) -> CodebookUsageReport:
    """Count the batches one after the other."""
    usage = CodebookUsage(10, frequent_share=frequent_share)
    for batch in batches:
        usage.update(batch)
    return usage.compute()


@given(tokens, st.floats(0, 0.5))
@settings(deadline=None, max_examples=60)
def test_report_is_what_counting_gives(values: list[int], share: float) -> None:
    """Every field against plain Python counting."""
    result = report(torch.tensor(values, dtype=torch.int64), frequent_share=share)
    counts = Counter(values)
    n = len(values)
    entropy = -sum(c / n * math.log(c / n) for c in counts.values())
    assert result.num_codes == 10
    assert result.tokens == n
    assert result.used_codes == len(counts)
    assert result.frequent_codes == sum(c > share * n for c in counts.values())
    assert result.frequent_share == share
    assert result.perplexity == pytest.approx(math.exp(entropy) if n else 0.0)


@given(tokens, st.lists(st.integers(0, 60), max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_splitting_the_data_changes_nothing(values: list[int], cuts: list[int], random: object) -> None:
    """Any partition, in any order and shape, gives the same report, to the last bit."""
    whole = torch.tensor(values, dtype=torch.int64)
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [whole[a:b] for a, b in itertools.pairwise(edges)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    expected = report(whole)
    assert report(*parts) == expected
    assert report(*(part.int().view(-1, 1, 1) for part in parts)) == expected
    merged = CodebookUsage(10)
    for part in parts:
        worker = CodebookUsage(10)
        worker.update(part)
        merged.merge(worker.histogram)
    assert merged.compute() == expected


def test_the_histogram_counts_every_code() -> None:
    """(K,) int64, over all batches."""
    usage = CodebookUsage(4)
    for batch in (torch.tensor([3, 3]), torch.tensor([[1], [3]])):
        usage.update(batch)
    assert usage.histogram.dtype == torch.int64
    assert usage.histogram.tolist() == [0, 1, 0, 3]


def test_frequent_codes_are_counted_in_float64() -> None:
    """A share just below a code's own, which float32 cannot tell from it, counts the code."""
    assert report(torch.tensor([0, 1]), frequent_share=0.5 - 1e-12).frequent_codes == 2
    assert report(torch.tensor([0, 1]), frequent_share=0.5).frequent_codes == 0


def test_other_data_changes_the_report() -> None:
    """Negative control: a token more is seen."""
    assert report(torch.tensor([1, 2])) != report(torch.tensor([1, 2, 2]))


def test_reset_forgets() -> None:
    """After reset the counter is as new, and reports made before are not touched."""
    usage = CodebookUsage(10)
    usage.update(torch.tensor([3, 3]))
    before = usage.compute()
    usage.reset()
    assert usage.compute() == report()
    assert before.tokens == 2
    usage.update(torch.tensor([4]))
    assert usage.histogram.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_report_is_frozen() -> None:
    """A report cannot be edited."""
    with pytest.raises(dataclasses.FrozenInstanceError, match="tokens"):
        report().tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_codes": 0}, ValueError, "num_codes must be an int >= 1, got 0."),
        ({"num_codes": True}, TypeError, "num_codes must be an int >= 1, got True."),
        ({"num_codes": 3, "frequent_share": 1.0}, ValueError, "frequent_share must be a finite number >= 0 and < 1, got 1.0."),  # noqa: E501
        ({"num_codes": 3, "frequent_share": -0.1}, ValueError, "frequent_share must be a finite number >= 0 and < 1, got -0.1."),  # noqa: E501
    ],
)  # fmt: skip
def test_refuses_options(arguments: dict[str, float], error: type[Exception], message: str) -> None:
    """Each bad option has its own sentence."""
    with pytest.raises(error, match=exactly(message)):
        CodebookUsage(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([0.0]), TypeError, "indices must be an integer tensor, got torch.float32."),
        (torch.tensor([True]), TypeError, "indices must be an integer tensor, got torch.bool."),
        (torch.tensor([0, -1]), ValueError, "indices must be in [0, num_codes=10), got -1."),
        (torch.tensor([0, 10]), ValueError, "indices must be in [0, num_codes=10), got 10."),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "indices must be on cpu as the histogram, got meta."),  # noqa: E501
    ],
)  # fmt: skip
def test_refuses_indices(indices: Tensor, error: type[Exception], message: str) -> None:
    """Refused indices are not counted, not even the good ones beside them."""
    usage = CodebookUsage(10)
    with pytest.raises(error, match=exactly(message)):
        usage.update(indices)
    assert usage.compute().tokens == 0


@pytest.mark.parametrize(
    ("histogram", "error", "message"),
    [
        (torch.zeros(9, dtype=torch.int64), ValueError, "histogram axis 0 must be num_codes=10, got 9 (histogram shape (9,))."),  # noqa: E501
        (torch.zeros(10, 10, dtype=torch.int64), ValueError, "histogram must be of shape (K,), got shape (10, 10)."),  # noqa: E501
        (torch.zeros((), dtype=torch.int64), ValueError, "histogram must be of shape (K,), got shape ()."),
        (torch.zeros(10), TypeError, "histogram must be an integer tensor, got torch.float32."),
    ],
)  # fmt: skip
def test_refuses_histograms(histogram: Tensor, error: type[Exception], message: str) -> None:
    """Only a histogram of the same codes can be merged."""
    with pytest.raises(error, match=exactly(message)):
        CodebookUsage(10).merge(histogram)
