"""The examples of the guides run and print what they say."""

from __future__ import annotations

import doctest
from pathlib import Path
from unittest.mock import patch

import pytest

from te_quant.layers import DOWNSAMPLERS

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
EXAMPLES = ("add-a-downsampling-layer.md",)


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page: str) -> None:
    """Names that an example adds to a public dict are taken out again."""
    with patch.dict(DOWNSAMPLERS):
        result = doctest.testfile(str(GUIDES / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 10
    assert result.failed == 0
