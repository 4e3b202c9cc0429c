"""Codebook health: which codes are used, and how evenly.

Shape letters: K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from te_quant._checks import (
    require,
    require_axis,
    require_device,
    require_int,
    require_integer_tensor,
    require_number,
    require_rank,
)
from te_quant._values import require_in_range
from te_quant.functional import perplexity
from te_quant.tables import Table, Tabular

__all__ = ["CodebookUsage", "CodebookUsageReport"]


@dataclass(frozen=True)
class CodebookUsageReport(Tabular):
    """Use of a codebook over a stated number of tokens.

    Attributes:
        num_codes: number of codes, K.
        used_codes: codes seen at least once; grows with the number of tokens.
        frequent_codes: codes that make up more than ``frequent_share`` of the tokens; hardly grows with it.
        frequent_share: that bound, a share in [0, 1).
        perplexity: exp of the entropy of the histogram, in [0, K]; 0 when nothing was counted.
        tokens: how many indices were counted.

    Example:
        >>> usage = CodebookUsage(64)
        >>> usage.update(torch.tensor([0, 0, 2, 2]))
        >>> print(usage.compute())
        code use                    value
        ------------------------  -------
        used codes                2 of 64
        codes above 0.1 % of use        2
        perplexity                    2.0
        tokens                          4
    """

    num_codes: int
    used_codes: int
    frequent_codes: int
    frequent_share: float
    perplexity: float
    tokens: int

    def summary(self) -> Table:
        """Return the figures as a table."""
        rows = [
            ["used codes", f"{self.used_codes} of {self.num_codes}"],
            [f"codes above {100 * self.frequent_share:g} % of use", f"{self.frequent_codes}"],
            ["perplexity", f"{self.perplexity:.1f}"],
            ["tokens", f"{self.tokens:,}"],
        ]
        return Table(["code use", "value"], rows)


class CodebookUsage:
    """Count indices over any number of batches; the result does not depend on how the data is split.

    Args:
        num_codes: K, at least 1.
        frequent_share: a code is frequent above this share of all tokens; in [0, 1).
        device: where the histogram lives; the indices must be there too.

    Attributes:
        histogram: (K,) int64, how often each code was counted since the last :meth:`reset`.

    Example:
        >>> usage = CodebookUsage(4)
        >>> usage.update(torch.tensor([[0, 0], [2, 2]]))
        >>> usage.compute().perplexity
        2.0
    """

    def __init__(
        self, num_codes: int, *, frequent_share: float = 1e-3, device: torch.device | str | None = None
    ) -> None:
        require_int("num_codes", num_codes, 1)
        require_number("frequent_share", frequent_share, 0.0, below=1.0)
        self.num_codes = num_codes
        self.frequent_share = float(frequent_share)
        self.histogram = torch.zeros(num_codes, dtype=torch.int64, device=device)

    def update(self, indices: Tensor) -> None:
        """Count ``indices``: any shape, integer, in [0, K).

        Raises:
            ValueError: an index is out of range, or on another device.
            TypeError: the indices are not integers.
        """
        require_integer_tensor("indices", indices)
        require_device("indices", indices, self.histogram.device, "histogram")
        indices = require_in_range("indices", indices, self.num_codes, "num_codes")
        self.histogram += torch.bincount(indices.flatten(), minlength=self.num_codes)

    def merge(self, histogram: Tensor) -> None:
        """Add the histogram, (K,) int64, of another counter, for instance another process's.

        Raises:
            ValueError: it does not have K entries, or one is negative.
            TypeError: it does not hold integers.
        """
        require_integer_tensor("histogram", histogram)
        require_rank("histogram", histogram, (1,), "(K,)")
        require_axis("histogram", histogram, 0, self.num_codes, "num_codes")
        lowest = int(histogram.min())
        require(lowest >= 0, "histogram", "counts >= 0", lowest)
        self.histogram += histogram.to(self.histogram.device)

    def compute(self) -> CodebookUsageReport:
        """Return the use of the codebook since the last :meth:`reset`."""
        tokens = int(self.histogram.sum())
        return CodebookUsageReport(
            num_codes=self.num_codes,
            tokens=tokens,
            used_codes=int((self.histogram > 0).sum()),
            frequent_codes=int((self.histogram.double() > self.frequent_share * tokens).sum()),
            frequent_share=self.frequent_share,
            perplexity=float(perplexity(self.histogram)),
        )

    def reset(self) -> None:
        """Forget everything counted."""
        self.histogram.zero_()
