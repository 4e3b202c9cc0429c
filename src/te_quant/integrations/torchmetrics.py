"""Code use as metrics of torchmetrics, which sum over processes and which Lightning's ``self.log`` takes.

Shape letters: K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_quant._checks import require_int
from te_quant.functional import perplexity
from te_quant.usage import CodebookUsage

try:
    from torchmetrics import Metric
except ImportError as error:
    message = "te_quant.integrations.torchmetrics needs torchmetrics: pip install torchmetrics."
    raise ImportError(message) from error

__all__ = ["CodebookPerplexity", "UsedCodes"]


class _CodeUse(Metric):
    """Counts indices; the subclasses say what follows from the counts."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    histogram: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.num_codes = require_int("num_codes", num_codes, 1)
        self.add_state("histogram", torch.zeros(self.num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Count ``indices``: any shape, integer, in [0, K)."""
        counter = CodebookUsage(self.num_codes, device=self.histogram.device)
        counter.update(indices)
        self.histogram = self.histogram + counter.histogram

    def set_dtype(self, dst_type: str | torch.dtype) -> _CodeUse:  # noqa: ARG002
        """Keep the counts, which another dtype would round."""
        return self


class CodebookPerplexity(_CodeUse):
    """The effective number of codes, in [0, K], of all indices since the last reset, over all processes.

    Args:
        num_codes: K, at least 1.
    """

    def compute(self) -> Tensor:
        """Return exp of the entropy of the code use, () float32."""
        return perplexity(self.histogram)


class UsedCodes(_CodeUse):
    """How many codes were seen at least once since the last reset, over all processes.

    Args:
        num_codes: K, at least 1.
    """

    def compute(self) -> Tensor:
        """Return the number of used codes, () int64."""
        return (self.histogram > 0).sum()
