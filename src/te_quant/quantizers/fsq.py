"""Finite scalar quantization: every channel is rounded to a few levels of its own, and nothing is learnt.

Shape letters: B batch, C channels (one a list entry of ``levels``), h w token grid, K = Π levels codes,
N = B*h*w latent vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from te_quant._checks import require, require_int
from te_quant._constants import constant
from te_quant.quantizers._rows import Rows
from te_quant.quantizers._tensor_free import TensorFreeQuantizer
from te_quant.quantizers.base import Losses, NonfiniteMode, Quantized

__all__ = ["FSQ"]


class FSQ(TensorFreeQuantizer):
    """Bound each channel and round it to the nearest of its levels.

    A channel with L levels is squashed to tanh(z + s)·(L - 1)/2 - o, which spans L - 1, rounded to an integer and
    divided by ⌊L/2⌋. An odd L puts its levels symmetrically about zero (o = s = 0). An even one cannot and still
    have zero among them, so it is shifted down by half a step (o = 1/2), with s chosen such that z = 0 lies on the
    level 0: {-1, -1/2, 0, 1/2} for L = 4. For L = 2 no finite s does that, and the boundary lies at z = 0 (s = 0).

    Nothing here is remembered or learnt: no codebook can collapse, there is no statistic, and freezing does
    nothing. To see which codes are used, count the indices with :class:`~te_quant.CodebookUsage`.

    Args:
        levels: L of each channel, each at least 2, product below 2^63; the paper advises 5 or more per channel,
            for instance (8, 5, 5, 5) for about 2^10 codes and (7, 5, 5, 5, 5) for about 2^12.
        channel_dim: the axis of ``latents`` that holds C: 1 for (B, C, h, w), -1 for (B, N, C). Both read (N, C).
        nonfinite: what to do about NaN and infinite latents, as for :class:`~te_quant.VectorQuantizer`. Vectors
            that are skipped are quantized as if zero. Under ``"off"`` NaN becomes the lowest level.

    Shape:
        latents: (B, C, h, w), (B, N, C), (N, C) or up to rank 5, of the module's dtype or in half precision,
            which is computed in float32. As for a module with weights, that dtype is torch's default when it is
            built, and follows ``half()`` or ``double()``. Only a module in float64 takes no half precision.
        quantized: as latents, in [-1, 1]. codes: the same in the module's dtype. indices: the latents' shape
            without the channel axis, int64 in [0, K), or -1 where masked. losses: (), all zero.

    Attributes:
        num_codes: number of codes, K. ``decode(torch.arange(K))`` lists the codes.
        code_dim: size of a code, C.

    Raises:
        ValueError: an option is out of range, axis ``channel_dim`` of latents is not C, the rank or device does
            not fit, or latents are not finite.
        TypeError: latents are not floating point, or of another dtype than the module and not in half precision.

    Source: Mentzer et al. 2023, arXiv:2309.15505, Section 3.1 and appendix A.1, whose order of digits this is:
        index = Σ_i digit_i · Π_{j<i} L_j, so the first channel changes fastest. Differs: the range is not
        narrowed or widened by 10⁻³, as rounding cannot leave it; s is atanh(o / half range), where the paper's
        listing has tan; codes are read from a table by their digits, and so are the bits that ``decode`` gives.

    Example:
        >>> from te_quant import FSQ
        >>> quantizer = FSQ((8, 5, 5, 5))
        >>> quantizer.num_codes, quantizer.code_dim
        (1000, 4)
        >>> quantizer(torch.randn(2, 4, 8, 8)).indices.shape
        torch.Size([2, 8, 8])
    """

    _fixed = (*TensorFreeQuantizer._fixed, "levels")

    def __init__(
        self,
        levels: Sequence[int],
        *,
        channel_dim: int = 1,
        nonfinite: NonfiniteMode | None = None,
    ) -> None:
        if not isinstance(levels, Sequence) or isinstance(levels, (str, bytes)):
            raise TypeError(f"levels must be a sequence of int, got {levels!r}.")
        require(len(levels) >= 1, "levels", "at least one int", "none")
        levels = tuple(require_int(f"levels[{place}]", size, 2) for place, size in enumerate(levels))
        num_codes = math.prod(levels)
        require(num_codes < 2**63, "levels", "of a product below 2^63", num_codes)
        super().__init__(num_codes, len(levels), channel_dim=channel_dim, nonfinite=nonfinite)
        self.levels = levels
        # Half of the distance between two levels: rounding leaves no more than that.
        self.residual_scale = tuple(0.5 / (size // 2) for size in levels)

    def search(self, rows: Rows) -> Tensor:
        """Return the index of each row of bounded channels."""
        return self._pack(self._digits(rows.searchable))

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the codes, in [-1, 1]."""
        strides, sizes = (self._whole(values, indices) for values in (_strides, list))
        return self._codes(indices.unsqueeze(-1) // strides % sizes)

    def project(self, vectors: Tensor) -> Tensor:
        """Bound each channel: one of L levels to [-⌊L/2⌋, ⌈L/2⌉ - 1]."""
        half, offset, shift = (
            constant(values, self.levels, dtype=vectors.dtype, device=vectors.device)
            for values in (_half_ranges, _offsets, _shifts)
        )
        return torch.tanh(vectors + shift) * half - offset

    def project_residual(self, vectors: Tensor) -> Tensor:
        """Clamp residuals in [-1, 1] to the range of the levels: tanh has bounded the latents before."""
        zeros, last = (self._whole(values, vectors) for values in (_zeros, _last_digits))
        return torch.minimum(torch.maximum(vectors * zeros, -zeros), last - zeros)

    def to_code_units(self, projected: Tensor) -> Tensor:
        """Divide by ⌊L/2⌋."""
        return projected / self._whole(_zeros, projected)

    def quantize(self, rows: Rows, generator: torch.Generator | None) -> Quantized:  # noqa: ARG002
        """Round; the same in training and in evaluation, with nothing drawn at random.

        The gradient passes the rounding unchanged and then the bounding function.
        """
        digits = self._digits(rows.searchable)
        codes = self._codes(digits).to(rows.vectors.dtype)
        scaled = self.to_code_units(rows.vectors)
        # The paper has no loss; a zero one, but of the latents, keeps `loss.backward()` valid.
        nothing = (scaled * 0).sum()
        return Quantized(
            surrogate=scaled,
            indices=self._pack(digits),
            codes=codes,
            losses=Losses(codebook=nothing.detach(), commitment=nothing, regularization=nothing.detach()),
        )

    def _digits(self, bounded: Tensor) -> Tensor:
        """(N, C) -> (N, C) int64, of a channel of L levels in [0, L)."""
        digits = bounded.round().long() + self._whole(_zeros, bounded)
        # Only NaN that was not looked for lies outside, as some far integer, and that would be no code at all.
        return torch.minimum(digits.clamp_min(0), self._whole(_last_digits, bounded))

    def _codes(self, digits: Tensor) -> Tensor:
        grid = constant(_grid, self.levels, dtype=self.dtype, device=digits.device)
        return grid[self._whole(_starts, digits) + digits]

    def _pack(self, digits: Tensor) -> Tensor:
        """(N, C) -> (N,), the first channel changing fastest."""
        return (digits * self._whole(_strides, digits)).sum(1)

    def _whole(self, values: Callable[[tuple[int, ...]], list[int]], like: Tensor) -> Tensor:
        """(C,) int64 where ``like`` is."""
        return constant(values, self.levels, dtype=torch.int64, device=like.device)


# All numbers that the levels determine. Lists of Python numbers are exact in every dtype and on every device.


def _grid(levels: tuple[int, ...]) -> list[float]:
    """The values of all levels, channel after channel: a code is looked up, never rounded in two ways."""
    return [(digit - size // 2) / (size // 2) for size in levels for digit in range(size)]


def _starts(levels: tuple[int, ...]) -> list[int]:
    """Where each channel begins in the grid."""
    return [sum(levels[:place]) for place in range(len(levels))]


def _strides(levels: tuple[int, ...]) -> list[int]:
    """What a step of each digit adds to the index."""
    return [math.prod(levels[:place]) for place in range(len(levels))]


def _zeros(levels: tuple[int, ...]) -> list[int]:
    """The digit of the level 0."""
    return [size // 2 for size in levels]


def _last_digits(levels: tuple[int, ...]) -> list[int]:
    return [size - 1 for size in levels]


def _half_ranges(levels: tuple[int, ...]) -> list[float]:
    return [(size - 1) / 2 for size in levels]


def _offsets(levels: tuple[int, ...]) -> list[float]:
    return [(1 - size % 2) / 2 for size in levels]


def _shifts(levels: tuple[int, ...]) -> list[float]:
    return [math.atanh((1 - size % 2) / (size - 1)) if size > 2 else 0.0 for size in levels]
