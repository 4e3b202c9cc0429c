"""Equal indices and code frequencies, image by image, so that an agreement comes with its interval.

Shape letters: N images, R resamples, B batch, K codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from te_quant._measuring.bootstrap import NO_INTERVAL, ImageSums, Resamples
from te_quant.equivariance.metrics.agreement import CHANCE_GAP, Agreement, PairCounts

__all__ = ["PairTally"]

# Codes whose resampled frequencies are held at once: codes x resamples float64 stay below 32 MiB.
_MOST_ELEMENTS = 2**22


class PairTally:
    """Pairs of indices of one metric, over all images.

    Frequencies are kept as (image, code, count) for the codes that occur, so that memory grows with the tokens and
    with neither N x K nor K.

    Args:
        num_codes: number of codes, K. None: one more than the largest index.
        by_image: keep the code frequencies of every image, for the interval of κ; False keeps the pooled ones.
    """

    def __init__(self, num_codes: int | None, *, by_image: bool = True) -> None:
        self._num_codes, self._by_image = num_codes, by_image
        self._sums = ImageSums()
        self._images = 0
        self._batch = 0
        # Image and code of every counted token, of the batch; then image, code and count, one entry a column.
        self._open: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._closed: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, first: Tensor, second: Tensor, mask: Tensor | None = None) -> None:
        """Compare the images of this batch once more.

        Args:
            first: indices of x.
            second: indices of the shifted x, aligned with ``first``.
            mask: True where a position counts; None counts all.

        Shape:
            first, second, mask: (B, ...), one shape; B the same until ``close``.
        """
        counted = torch.ones_like(first, dtype=torch.bool) if mask is None else mask
        equal = ((first == second) & counted).flatten(1).sum(1)
        self._sums.add(equal, counted.flatten(1).sum(1))
        self._batch = len(first)
        image = torch.arange(len(first), device=first.device).reshape(-1, *(1 for _ in first.shape[1:]))
        for side, codes in enumerate((first, second)):
            self._open[side].append(torch.stack([(image * self._by_image).expand_as(codes), codes])[:, counted])

    def close(self) -> None:
        """End the batch; what is added next belongs to other images."""
        self._sums.close()
        for side in (0, 1):
            if not self._open[side]:
                continue
            image, code = torch.cat(self._open[side], dim=1)
            # One number for both: columns would be sorted one by one.
            width = int(code.max()) + 1 if len(code) else 1
            keys, counts = torch.unique(image * width + code, return_counts=True)
            keys, counts = keys.cpu(), counts.cpu()
            image, code = keys // width + self._images * self._by_image, keys % width
            self._append(side, torch.stack([image, code, counts]))
            self._open[side].clear()
        self._images += self._batch

    def merge(self, other: PairTally) -> None:
        """Count the images of another tally after those of this one; both must be closed."""
        self._sums.merge(other._sums)
        for side in (0, 1):
            for entries in other._closed[side]:
                offset = torch.tensor([[self._images * self._by_image], [0], [0]], device="cpu")
                self._append(side, entries + offset)
        self._images += other._images

    def _append(self, side: int, entries: Tensor) -> None:
        if self._by_image:
            # Half the memory, which by image is what grows.
            self._closed[side].append(entries.to(torch.int32))
            return
        _, code, counts = torch.cat([*self._closed[side], entries], dim=1)
        codes, place = torch.unique(code, return_inverse=True)
        summed = torch.zeros_like(codes).index_add_(0, place, counts)
        self._closed[side][:] = [torch.stack([torch.zeros_like(codes), codes, summed])]

    def _pooled(self, side: int, num_codes: int) -> Tensor:
        """(K,) int64: how often each code occurs."""
        _, code, counts = torch.cat(self._closed[side], dim=1).long()
        return torch.zeros(num_codes, dtype=torch.int64, device="cpu").index_add_(0, code, counts)

    def _codes(self) -> int:
        if self._num_codes is not None:
            return self._num_codes
        return 1 + max(
            [0, *(int(entries[1].max()) for side in self._closed for entries in side if entries.numel())]
        )

    def agreement(self, resamples: Resamples, *, symmetric: bool = False) -> Agreement:
        """Return rate and κ with their intervals; see :meth:`PairCounts.agreement`."""
        sums = self._sums.rows
        codes = self._codes()
        counted = PairCounts(int(sums[:, 0].sum()), self._pooled(0, codes), self._pooled(1, codes))
        pooled = counted.agreement(symmetric=symmetric)
        rate = resamples.interval_of_sums(sums, lambda pooled_sums: pooled_sums[:, 0] / pooled_sums[:, 1])
        kappa = NO_INTERVAL
        if self._by_image and pooled.kappa_defined:
            frequencies = (self._frequencies(0), self._frequencies(1))

            def resampled_kappa(times: Tensor) -> Tensor:
                equal, tokens = (times @ sums).unbind(1)
                gap = 1 - _coincidences(times, frequencies, codes, symmetric=symmetric) / tokens.square()
                return torch.where(gap > CHANCE_GAP, 1 - (1 - equal / tokens) / gap, torch.nan)

            kappa = resamples.interval(resampled_kappa)
        return replace(pooled, rate_interval=rate, kappa_interval=kappa)

    def _frequencies(self, side: int) -> Tensor:
        """(3, entries) int32: code, image and how often, sorted by code."""
        image, code, counts = torch.cat(self._closed[side], dim=1)
        # Stable, because images come in order and have to stay so within a code.
        code, order = code.sort(stable=True)
        return torch.stack([code, image[order], counts[order]])


def _coincidences(times: Tensor, frequencies: tuple[Tensor, Tensor], num_codes: int, *, symmetric: bool) -> Tensor:
    """Return Σ_c n_c m_c of every resample, n and m how often it shows code c on the two sides: (r,) float64."""
    total = torch.zeros(len(times), dtype=torch.float64, device="cpu")
    drawn = times.T.contiguous()
    step = max(1, _MOST_ELEMENTS // max(1, len(times)))
    for start in range(0, num_codes, step):
        stop = min(start + step, num_codes)
        first, second = (torch.sparse.mm(_rows(side, start, stop, len(drawn)), drawn) for side in frequencies)
        if symmetric:
            first = second = (first + second) / 2
        total += (first * second).sum(0)
    return total


def _rows(frequencies: Tensor, start: int, stop: int, num_images: int) -> Tensor:
    """(stop - start, N) sparse float64: the codes from ``start`` on."""
    bounds = torch.tensor([start, stop], dtype=torch.int32, device="cpu")
    low, high = torch.searchsorted(frequencies[0], bounds).tolist()
    code, image, counts = frequencies[:, low:high]
    indices, size = torch.stack([code - start, image]).long(), (stop - start, num_images)
    # torch 2.11 warns of check_invariants=False, too, but not of this.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        return torch.sparse_coo_tensor(indices, counts.double(), size, is_coalesced=True, device="cpu")
