"""Codebook health: which codes are used, and how evenly.

Shape letters: K codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

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

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CodebookUsage", "CodebookUsageReport"]

_COUNTED = "count indices[indices >= 0], without masked tokens and levels left out"


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


class CodebookUsage(nn.Module):
    """Count indices over any number of batches; the result does not depend on how the data is split.

    As a module it moves with the model that holds it. The counts stay integers whatever the model is cast to, and
    ``state_dict()`` does not hold them.

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
        >>> from te_quant import ResidualVectorQuantizer
        >>> quantizer = ResidualVectorQuantizer(num_codes=4, code_dim=2, num_quantizers=3)
        >>> levels = [CodebookUsage(size) for size in quantizer.codebook_sizes]
        >>> for counter, indices in zip(levels, quantizer.encode(torch.randn(50, 2)).unbind(-1)):
        ...     counter.update(indices)
        >>> [counter.compute().tokens for counter in levels]
        [50, 50, 50]
    """

    def __init__(
        self, num_codes: int, *, frequent_share: float = 1e-3, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        num_codes = require_int("num_codes", num_codes, 1)
        frequent_share = require_number("frequent_share", frequent_share, 0.0, below=1.0)
        self.num_codes = num_codes
        self.frequent_share = float(frequent_share)
        # Not a buffer: DistributedDataParallel would give every process the counts of the first.
        self.histogram = torch.zeros(num_codes, dtype=torch.int64, device=device)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{self.num_codes}, frequent_share={self.frequent_share:g}"

    def update(self, indices: Tensor) -> None:
        """Count ``indices``: any shape, integer, in [0, K).

        The index -1 of masked tokens and of levels left out is refused: count ``indices[indices >= 0]``. Where
        tokens have Q indices, all are counted as of one codebook. To see each level, use one counter per level
        and give it ``indices[..., level]``.

        Raises:
            ValueError: an index is out of range, or on another device.
            TypeError: the indices are not integers.
        """
        require_integer_tensor("indices", indices)
        indices = indices.long()
        if self.histogram.is_meta:
            self._move(indices.device)
        require_device("indices", indices, self.histogram.device, "histogram")
        indices = require_in_range("indices", indices, self.num_codes, "num_codes", cure=_COUNTED)
        # Not in place, which tensors of inference mode refuse outside of it.
        self.histogram = self.histogram + torch.bincount(indices.flatten(), minlength=self.num_codes)

    def merge(self, histogram: Tensor) -> None:
        """Add the histogram, (K,) int64, of another counter.

        Raises:
            ValueError: it does not have K entries, or one is negative.
            TypeError: it does not hold integers.
        """
        require_integer_tensor("histogram", histogram)
        histogram = histogram.long()
        require_rank("histogram", histogram, (1,), "(K,)")
        require_axis("histogram", histogram, 0, self.num_codes, "num_codes")
        lowest = int(histogram.min())
        require(lowest >= 0, "histogram", "counts >= 0", lowest)
        self.histogram = self.histogram + histogram.to(self.histogram.device)

    def synchronized(self, process_group: ProcessGroup | None = None) -> CodebookUsage:
        """Return a counter of what all processes have counted; this one stays as it is.

        Every process has to call it, at the same point. It is a copy where there is one process.

        Args:
            process_group: the processes; all of them if None.
        """
        total = copy.deepcopy(self)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total.histogram, group=process_group)
        return total

    def compute(self) -> CodebookUsageReport:
        """Return the use of the codebook since the last :meth:`reset`, as counted by this process."""
        # On the CPU, because some devices have no float64.
        histogram = self.histogram.cpu()
        tokens = int(histogram.sum())
        return CodebookUsageReport(
            num_codes=self.num_codes,
            tokens=tokens,
            used_codes=int((histogram > 0).sum()),
            frequent_codes=int((histogram.double() > self.frequent_share * tokens).sum()),
            frequent_share=self.frequent_share,
            perplexity=float(perplexity(histogram.double())),
        )

    def reset(self) -> None:
        """Forget everything counted."""
        self.histogram = torch.zeros_like(self.histogram)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodebookUsage:
        """Follow the model to another device; a cast changes nothing, as it would round the counts."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._move(fn(self.histogram).device)
        return self

    def _move(self, device: torch.device) -> None:
        # Nothing can have been counted on the meta device.
        if self.histogram.is_meta:
            self.histogram = torch.zeros(self.num_codes, dtype=torch.int64, device=device)
        self.histogram = self.histogram.to(device)
