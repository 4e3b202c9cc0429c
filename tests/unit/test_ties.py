"""Equal codes are found among those that share their first entries, and only equal ones are merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from te_quant._search.ties import first_of_equals


def codes(K: int, C: int, seed: int = 0) -> Tensor:
    return torch.randn(K, C, generator=torch.Generator().manual_seed(seed))


def lowest_equal(codebook: Tensor) -> Tensor:
    """By comparing all pairs; ``argmax`` returns the first that is equal."""
    return (codebook.unsqueeze(1) == codebook).all(2).int().argmax(1)


def repeated(K: int, C: int) -> Tensor:
    """Each of K / 3 codes three times, in random order."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    return codes(K // 3, C).repeat(3, 1)[order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C", [1, 3, 4, 5, 64])
def test_each_code_goes_to_the_lowest_equal_one(C: int, dtype: torch.dtype) -> None:
    """Against all pairs, with codes shorter and longer than what is looked at first."""
    codebook = repeated(60, C).to(dtype)
    assert first_of_equals(codebook) is not None
    assert torch.equal(first_of_equals(codebook), lowest_equal(codebook))


@pytest.mark.parametrize("entry", [0, 3, 4, 7])
def test_codes_that_differ_in_one_entry_stay_apart(entry: int) -> None:
    """Whether that entry is looked at first or not; the copies that are left are merged all the same."""
    codebook = codes(1, 8).repeat(6, 1)
    codebook[[1, 4], entry] += 1
    first = first_of_equals(codebook)
    assert first is not None
    assert first.tolist() == [0, 1, 0, 0, 1, 0]


def test_zeros_of_either_sign_are_equal() -> None:
    """They compare equal although their bits differ, in the entries looked at first and in the others."""
    codebook = torch.zeros(3, 6)
    codebook[1, ::2] = -0.0
    codebook[2, 5] = 1
    first = first_of_equals(codebook)
    assert first is not None
    assert first.tolist() == [0, 0, 2]


def test_nothing_is_returned_where_first_entries_differ() -> None:
    """Also where all codes agree in each entry with some other code."""
    assert first_of_equals(codes(500, 8)) is None
    assert first_of_equals(torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))) is None
    assert first_of_equals(torch.zeros(1, 4)) is None
