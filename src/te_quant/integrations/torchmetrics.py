"""Code use and token stability as metrics of torchmetrics, which sum over processes and which ``self.log`` takes.

Shape letters: B images, C channels, H W pixels, h w tokens, K codes.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from te_quant._checks import require_floating, require_int, require_rank, require_type
from te_quant._measuring.data_range import DEFAULT_RANGE, DataRange, checked_range, require_within
from te_quant.equivariance.metrics.agreement import PairCounts, count_pairs, require_repeatable
from te_quant.functional import perplexity
from te_quant.stability.round_trip import ImageMap, decoded, first_tokens, round_trips
from te_quant.stability.transforms import Identity, Transform
from te_quant.usage import CodebookUsage

try:
    from torchmetrics import Metric
except ImportError as error:
    message = "te_quant.integrations.torchmetrics needs torchmetrics: pip install torchmetrics."
    raise ImportError(message) from error

__all__ = ["CodebookPerplexity", "TokenMatch", "TokenMatchKappa", "UsedCodes", "WholeImages"]


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


class _Stability(Metric):
    """Counts the tokens that return; the subclasses say what follows from the counts."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    equal: Tensor
    first: Tensor
    second: Tensor
    whole: Tensor
    images: Tensor
    kind: Tensor

    def __init__(
        self, num_codes: int, *, transform: Transform | None = None, data_range: DataRange = DEFAULT_RANGE
    ) -> None:
        super().__init__()
        self.num_codes = require_int("num_codes", num_codes, 1)
        if transform is not None:
            require_type("transform", transform, Transform, "a te_quant.stability.Transform")
        self.transform = Identity() if transform is None else transform
        self.data_range = checked_range(data_range)
        # The counts do not tell whether a batch is the first one, as ``forward`` sets them to 0 for each batch.
        self._is_checked = False
        for name, shape in (("equal", ()), ("first", (num_codes,)), ("second", (num_codes,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("whole", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # A MetricCollection updates only one of several metrics whose states are equal after the first batch.
        told = f"{self.transform.name} {self.data_range}".encode()
        self.add_state("kind", torch.tensor([*hashlib.sha256(told).digest()]), dist_reduce_fx="max")

    @torch.no_grad()
    def update(self, encode: ImageMap, decode: ImageMap, images: Tensor) -> None:
        """Send a batch through ``encode``, ``decode``, the transform and ``encode`` again.

        The first batch is encoded once more, to refuse an encoder that draws random numbers.

        Args:
            encode: images -> indices; put the model in evaluation mode first.
            decode: indices -> images.
            images: (B, C, H, W) floating point, in ``data_range``.
        """
        require_rank("images", images, (4,), "(B, C, H, W)")
        require_floating("images", images)
        if len(images) == 0:
            return
        require_within("images", images, self.data_range)
        tokens, _ = first_tokens(encode, images, self.num_codes)
        if not self._is_checked:
            require_repeatable("encode", encode, images, tokens)
            self._is_checked = True
        shown, _ = decoded(decode, tokens, images)
        (found,) = round_trips(
            encode,
            decode,
            tokens,
            shown,
            torch.ones_like(tokens, dtype=torch.bool),
            transforms=[self.transform],
            cycles=1,
            num_codes=self.num_codes,
            data_range=self.data_range,
        )
        valid = found.valid.expand_as(found.after)
        counts = count_pairs(found.expected, found.after, self.num_codes, valid)
        self.equal = self.equal + counts.equal
        self.first = self.first + counts.first.to(self.first.device)
        self.second = self.second + counts.second.to(self.second.device)
        whole = ((found.expected == found.after) | ~valid).flatten(1).all(1)
        self.whole = self.whole + whole.sum().to(self.whole.device)
        self.images = self.images + len(images)

    def set_dtype(self, dst_type: str | torch.dtype) -> _Stability:  # noqa: ARG002
        """Keep the counts, which another dtype would round."""
        return self

    def _counts(self) -> PairCounts:
        return PairCounts(int(self.equal), self.first.cpu(), self.second.cpu())


class TokenMatch(_Stability):
    """The share of tokens that survive decoding, a transform and encoding, over all processes.

    Args:
        num_codes: K, at least 1.
        transform: of :mod:`te_quant.stability`, or your own; None leaves the images as they are.
        data_range: (low, high) of the pixel values.
    """

    def compute(self) -> Tensor:
        """Return the share, () float32; NaN before the first update."""
        return torch.tensor(self._counts().agreement().rate)


class TokenMatchKappa(_Stability):
    """Cohen's κ of the tokens that survive: 0 for what chance gives, over all processes.

    Args:
        num_codes: K, at least 1.
        transform: of :mod:`te_quant.stability`, or your own; None leaves the images as they are.
        data_range: (low, high) of the pixel values.
    """

    def compute(self) -> Tensor:
        """Return κ, () float32; NaN where it is undefined."""
        return torch.tensor(self._counts().agreement().kappa)


class WholeImages(_Stability):
    """The share of images of which every token survives decoding, a transform and encoding, over all processes.

    Args:
        num_codes: K, at least 1.
        transform: of :mod:`te_quant.stability`, or your own; None leaves the images as they are.
        data_range: (low, high) of the pixel values.
    """

    def compute(self) -> Tensor:
        """Return the share, () float32; NaN before the first update."""
        return self.whole / self.images
