"""The sums behind one measurement, and how one batch of images adds to them.

Shape letters: B batch, C channels, H W sides of what the tokenizer sees, h w token grid, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from te_quant._checks import require, require_floating, require_rank
from te_quant.equivariance.agreement import Agreement, PairCounts, count_pairs, foreground_tokens, tokens_of
from te_quant.equivariance.placement import place_sprites, placement_counts
from te_quant.equivariance.report import (
    CodeUse,
    EquivarianceReport,
    EquivarianceSettings,
    ReconstructionError,
    ShiftAgreement,
)
from te_quant.equivariance.sub_stride import sub_stride_counts
from te_quant.equivariance.views import Views
from te_quant.shifts import Shift, align, fourier_shift
from te_quant.usage import CodebookUsage

__all__ = ["ImageMap", "Measurement"]

ImageMap = Callable[[Tensor], Tensor]
# Images live in [-1, 1].
_PEAK_TO_PEAK = 2.0


class Measurement:
    """The sums of one measurement; ``add`` takes any batch, so the split does not matter."""

    def __init__(
        self,
        views: Views,
        settings: EquivarianceSettings,
        tokenize: ImageMap,
        reconstruct: ImageMap | None,
        fourier: tuple[ImageMap, ImageMap] | None,
    ) -> None:
        self.views, self.settings = views, settings
        self.tokenize, self.reconstruct = tokenize, reconstruct
        self.fourier = fourier
        self.sums: dict[str, PairCounts] = {}
        self.by_shift: dict[tuple[str, Shift], PairCounts] = {}
        self.usage = CodebookUsage(settings.num_codes)
        self.absolute = self.squared = 0.0
        self.pixels = 0

    def add(self, batch: Tensor) -> None:
        """Take in one more batch of images."""
        reference = self.views.shifted(batch, (0, 0))
        tokens = self._tokens(reference)
        if self.views.sprites:
            self._add_placement(batch)
        else:
            self._add_reference(reference, tokens)
        self._add_aligned(batch, tokens, self._foreground(reference))
        self._add_sub_stride(batch, tokens, reference)

    def report(self) -> EquivarianceReport:
        """Turn what was summed so far into rates."""

        def shown(name: str, *, symmetric: bool = False) -> Agreement | None:
            counts = self.sums.get(name)
            return None if counts is None else counts.agreement(symmetric=symmetric)

        def pooled(name: str) -> Agreement:
            return self.sums.get(name, PairCounts.zero(self.settings.num_codes)).agreement()

        def mapped(name: str) -> tuple[ShiftAgreement, ...]:
            return tuple(
                ShiftAgreement(shift, counts.agreement())
                for (metric, shift), counts in self.by_shift.items()
                if metric == name
            )

        return EquivarianceReport(
            placement=shown("placement", symmetric=True),
            placement_foreground=shown("placement_foreground", symmetric=True),
            aligned=pooled("aligned"),
            aligned_foreground=pooled("aligned_foreground"),
            sub_stride=pooled("sub_stride"),
            sub_stride_foreground=pooled("sub_stride_foreground"),
            sub_stride_fourier=shown("sub_stride_fourier"),
            sub_stride_fourier_foreground=shown("sub_stride_fourier_foreground"),
            code_use=CodeUse.of(self.usage.compute()),
            reconstruction=self._reconstruction(),
            aligned_by_shift=mapped("aligned"),
            sub_stride_by_shift=mapped("sub_stride"),
            settings=self.settings,
        )

    def _add_placement(self, batch: Tensor) -> None:
        s = self.settings
        placed = place_sprites(batch, canvas_size=s.image_size[0], stride=s.stride, ground=s.ground)
        indices = torch.stack([self._tokens(images) for images in placed])
        for images, tokens in zip(placed, indices, strict=True):
            self._add_reference(images, tokens)
        for suffix, mask in (("", None), ("_foreground", self._foreground(batch))):
            counts = placement_counts(indices, stride=s.stride, num_codes=s.num_codes, foreground=mask)
            self._pool("placement" + suffix, counts)

    def _add_aligned(self, batch: Tensor, tokens: Tensor, foreground: Tensor) -> None:
        s = self.settings
        for shift in s.shifts:
            moved = self._tokens(self.views.shifted(batch, shift))
            k = (shift[0] // s.stride, shift[1] // s.stride)
            first, second = align(tokens, moved, k, protocol=s.protocol)
            inked, _ = align(foreground, foreground, k, protocol=s.protocol)
            counts = count_pairs(first, second, s.num_codes)
            self._pool("aligned", counts, shift)
            self._pool("aligned_foreground", count_pairs(first, second, s.num_codes, inked))

    def _add_sub_stride(self, batch: Tensor, tokens: Tensor, reference: Tensor) -> None:
        s = self.settings
        z = self._latents(reference)
        for shift in s.sub_stride_shifts:
            images = self.views.shifted(batch, shift)
            moved, inked = self._tokens(images), self._foreground(images)
            expected = None
            if self.fourier is not None and z is not None:
                expected = self._fourier_tokens(self.fourier[1], z, shift).to(moved.device)
            for suffix, mask in (("", None), ("_foreground", inked)):
                counts = sub_stride_counts(tokens, moved, s.num_codes, protocol=s.protocol, mask=mask)
                self._pool("sub_stride" + suffix, counts, None if suffix else shift)
                if expected is not None:
                    counts = sub_stride_counts(
                        expected, moved, s.num_codes, protocol=s.protocol, mask=mask, search=False
                    )
                    self._pool("sub_stride_fourier" + suffix, counts)

    def _add_reference(self, images: Tensor, tokens: Tensor) -> None:
        self.usage.update(tokens.cpu())
        if self.reconstruct is None:
            return
        decoded = self.reconstruct(images)
        require_floating("reconstruct(images)", decoded)
        fits = decoded.shape == images.shape
        require(fits, "reconstruct(images)", f"of shape {tuple(images.shape)}", f"shape {tuple(decoded.shape)}")
        difference = decoded.to(images.device).double() - images.double()
        self.absolute += float(difference.abs().sum())
        self.squared += float(difference.square().sum())
        self.pixels += difference.numel()

    def _reconstruction(self) -> ReconstructionError | None:
        if self.reconstruct is None:
            return None
        mse = self.squared / self.pixels
        psnr = 10 * math.log10(_PEAK_TO_PEAK**2 / mse) if mse > 0 else math.inf
        return ReconstructionError(self.absolute / self.pixels, mse, psnr)

    def _pool(self, name: str, counts: PairCounts, shift: Shift | None = None) -> None:
        self.sums[name] = self.sums[name] + counts if name in self.sums else counts
        if shift is not None:
            key = (name, shift)
            self.by_shift[key] = self.by_shift[key] + counts if key in self.by_shift else counts

    def _tokens(self, images: Tensor) -> Tensor:
        return tokens_of(self.tokenize, images, grid=self.views.grid, num_codes=self.settings.num_codes)

    def _latents(self, images: Tensor) -> Tensor | None:
        if self.fourier is None:
            return None
        z = self.fourier[0](images)
        require_rank("latents(images)", z, (4,), "(B, C, h, w)")
        fits = (z.shape[0], *z.shape[2:]) == (images.shape[0], *self.views.grid)
        require(fits, "latents(images)", f"of grid {self.views.grid}", f"shape {tuple(z.shape)}")
        return z

    def _fourier_tokens(self, quantize: ImageMap, z: Tensor, shift: Shift) -> Tensor:
        s = self.settings
        z_moved = fourier_shift(z, (shift[0] / s.stride, shift[1] / s.stride))
        return tokens_of(
            quantize,
            z_moved,
            grid=self.views.grid,
            num_codes=s.num_codes,
            name="quantize",
            argument="latents",
        )

    def _foreground(self, images: Tensor) -> Tensor:
        s = self.settings
        return foreground_tokens(images, stride=s.stride, ground=s.ground, tau=s.tau)
