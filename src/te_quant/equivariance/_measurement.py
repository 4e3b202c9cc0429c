"""The sums behind one measurement, and how one batch of images adds to them.

Shape letters: B batch, C channels, H W sides of what the tokenizer sees, h w token grid, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from te_quant._checks import require, require_floating, require_rank
from te_quant._measuring.bootstrap import Resamples
from te_quant._measuring.calls import call_unchanged
from te_quant._measuring.float64 import float64
from te_quant._values import require_finite
from te_quant.equivariance._draw import FractionalShift
from te_quant.equivariance.metrics.agreement import (
    Agreement,
    PairCounts,
    mark_foreground,
    require_repeatable,
    tokens_of,
)
from te_quant.equivariance.metrics.margin import MarginTally
from te_quant.equivariance.metrics.numerical_floor import Variant, variant_tokens
from te_quant.equivariance.metrics.pair_tally import PairTally
from te_quant.equivariance.metrics.placement import paste_sprites, placement_pairs
from te_quant.equivariance.metrics.shift_error import FeatureTally, PixelTally, ShiftError
from te_quant.equivariance.metrics.sub_stride import sub_stride_pairs, sub_stride_region
from te_quant.equivariance.report.report import EquivarianceReport
from te_quant.equivariance.report.values import EquivarianceSettings, ShiftAgreement, reconstruction_error
from te_quant.equivariance.views import Views
from te_quant.shifts import Shift, align, fourier_shift
from te_quant.usage import CodebookUsage

__all__ = ["Callables", "ImageMap", "Measurement"]

ImageMap = Callable[[Tensor], Tensor]
_Key = tuple[str, Shift | None]
_PLACEMENTS = 5
_Tally = TypeVar("_Tally", PairTally, FeatureTally, PixelTally)


@dataclass(frozen=True)
class Callables:
    """What is measured; the parts of the tokenizer that are not given are not measured."""

    tokenize: ImageMap
    reconstruct: ImageMap | None
    latents: ImageMap | None
    quantize: ImageMap | None
    codebook: Tensor | None
    variants: Mapping[str, Variant]


@dataclass(frozen=True)
class _Reference:
    """One batch of unshifted images and all that was made of them."""

    images: Tensor
    tokens: Tensor
    foreground: Tensor | None
    latents: Tensor | None
    margins: Tensor | None
    decoded: Tensor | None


class Measurement:
    """The sums of one measurement; :meth:`passes` takes any batches, so the split does not matter."""

    def __init__(self, views: Views, settings: EquivarianceSettings, given: Callables) -> None:
        self.views, self.settings, self.given = views, settings, given
        self.pairs: dict[_Key, PairTally] = {}
        self.features: dict[_Key, FeatureTally] = {}
        self.decoded: dict[_Key, PixelTally] = {}
        low, high = settings.data_range
        self._pixels = partial(PixelTally, peak=high - low)
        self.reconstruction = self._pixels()
        self.margins = None if given.codebook is None else MarginTally(given.codebook)
        self.usage = CodebookUsage(settings.num_codes)

    @property
    def passes_per_batch(self) -> int:
        """How often a batch goes through the tokenizer; the first one once more."""
        s = self.settings
        shifts = len(s.shifts) + len(s.sub_stride_shifts) + len(s.fractional_shifts)
        return 1 + (_PLACEMENTS if self.views.sprites else 0) + shifts + len(self.given.variants)

    def passes(self, batches: Iterable[Tensor]) -> Iterator[None]:
        """Take in batches of images, one pass after the other."""
        for number, batch in enumerate(batches):
            yield from self._passes(batch, first=number == 0)
            self._close()

    def _passes(self, batch: Tensor, *, first: bool) -> Iterator[None]:
        images = self.views.shifted(batch, (0, 0))
        tokens = self._tokens(images)
        if first:
            yield
            require_repeatable("tokenize", self.given.tokenize, images, tokens)
        z = self._latents(images)
        margins = None if self.margins is None or z is None else self.margins.margins(z, tokens)
        reference = _Reference(images, tokens, self._foreground(images), z, margins, self._decode(images))
        yield
        if self.views.ground is not None:
            yield from self._placement(batch, self.views.ground)
        else:
            self._add_reference(images, tokens, reference.decoded)
        s = self.settings
        for shift in s.shifts:
            self._add_aligned(self.views.shifted(batch, shift), shift, reference)
            yield
        for shift in s.sub_stride_shifts:
            self._add_sub_stride(self.views.shifted(batch, shift), shift, reference)
            yield
        for amount in s.fractional_shifts:
            self._add_fractional(self.views.interpolated(batch, amount), amount, reference)
            yield
        for name, variant in self.given.variants.items():
            other = variant_tokens(
                name, variant, self.given.tokenize, images, grid=self.views.grid, num_codes=s.num_codes
            )
            self._pair("floor " + name, tokens, other)
            yield

    def report(self) -> EquivarianceReport:
        """Turn what was summed so far into rates and errors, each with its interval."""
        s = self.settings
        drawn = Resamples(s.num_images, s.resamples, s.seed)

        def shown(name: str) -> Agreement | None:
            tally = self.pairs.get((name, None))
            symmetric = name.startswith("placement")
            return None if tally is None else tally.agreement(drawn, symmetric=symmetric)

        def pooled(name: str) -> Agreement:
            return shown(name) or PairCounts.zero(s.num_codes).agreement()

        def foreground(name: str) -> Agreement | None:
            return None if s.ground is None else pooled(name)

        def error(
            tallies: Mapping[_Key, FeatureTally] | Mapping[_Key, PixelTally], name: str
        ) -> ShiftError | None:
            return tallies[name, None].error(drawn) if (name, None) in tallies else None

        return EquivarianceReport(
            placement=shown("placement"),
            placement_foreground=shown("placement_foreground"),
            aligned=pooled("aligned"),
            aligned_foreground=foreground("aligned_foreground"),
            sub_stride=pooled("sub_stride"),
            sub_stride_foreground=foreground("sub_stride_foreground"),
            sub_stride_fourier=shown("sub_stride_fourier"),
            sub_stride_fourier_foreground=shown("sub_stride_fourier_foreground"),
            feature_error=error(self.features, "aligned"),
            feature_error_sub_stride=error(self.features, "sub_stride"),
            end_to_end=error(self.decoded, "aligned"),
            end_to_end_sub_stride=error(self.decoded, "sub_stride"),
            fractional=shown("fractional"),
            feature_error_fractional=error(self.features, "fractional"),
            end_to_end_fractional=error(self.decoded, "fractional"),
            margin=None if self.margins is None or not s.shifts else self.margins.margin(drawn),
            numerical_floor={name: pooled("floor " + name) for name in self.given.variants},
            code_use=self.usage.compute(),
            reconstruction=(
                None if self.given.reconstruct is None else reconstruction_error(self.reconstruction, drawn)
            ),
            aligned_by_shift=self._by_shift("aligned", s.shifts, drawn),
            sub_stride_by_shift=self._by_shift("sub_stride", s.sub_stride_shifts, drawn),
            settings=s,
        )

    def _placement(self, batch: Tensor, ground: float) -> Iterator[None]:
        s = self.settings
        indices = []
        for images in paste_sprites(batch, canvas_size=s.image_size[0], ground=ground):
            indices.append(self._tokens(images))
            self._add_reference(images, indices[-1], self._decode(images))
            yield
        first, second = placement_pairs(torch.stack(indices), stride=s.stride)
        self._pair("placement", first, second)
        inked = mark_foreground(batch, stride=s.stride, ground=ground, tau=s.tau)
        self._pair("placement_foreground", first, second, inked.unsqueeze(1).expand_as(first))

    def _add_aligned(self, images: Tensor, shift: Shift, reference: _Reference) -> None:
        s = self.settings
        k = (shift[0] // s.stride, shift[1] // s.stride)
        first, second = align(reference.tokens, self._tokens(images), k, protocol=s.protocol)
        self._pair("aligned", first, second, shift=shift)
        if reference.foreground is not None:
            inked, _ = align(reference.foreground, reference.foreground, k, protocol=s.protocol)
            self._pair("aligned_foreground", first, second, inked)
        self._add_decoded("aligned", images, shift, reference)
        moved = self._latents(images)
        if moved is None or reference.latents is None:
            return
        z, z_moved = align(reference.latents, moved, k, protocol=s.protocol)
        for tally in self._tallies(self.features, FeatureTally, "aligned", shift):
            tally.add(z, z_moved)
        if self.margins is not None and reference.margins is not None:
            margins, _ = align(reference.margins, reference.margins, k, protocol=s.protocol)
            self.margins.add(margins, float64(z_moved) - float64(z), first == second)

    def _add_sub_stride(self, images: Tensor, shift: Shift, reference: _Reference) -> None:
        s = self.settings
        tokens, inked = self._tokens(images), self._foreground(images)
        masks = {"": None} if inked is None else {"": None, "_foreground": inked}
        for suffix, mask in masks.items():
            pair = sub_stride_pairs(reference.tokens, tokens, protocol=s.protocol, mask=mask)
            self._pair("sub_stride" + suffix, *pair, shift=None if suffix else shift)
        self._add_decoded("sub_stride", images, shift, reference)
        moved = self._latents(images)
        if moved is None or reference.latents is None:
            return
        expected = fourier_shift(reference.latents, (shift[0] / s.stride, shift[1] / s.stride))
        rows, columns = sub_stride_region(self.views.grid, s.protocol)
        for tally in self._tallies(self.features, FeatureTally, "sub_stride", shift):
            tally.add(expected[..., rows, columns], moved[..., rows, columns])
        if self.given.quantize is None:
            return
        codes = tokens_of(
            self.given.quantize,
            expected,
            grid=self.views.grid,
            num_codes=s.num_codes,
            name="quantize",
            argument="latents",
        ).to(tokens.device)
        for suffix, mask in masks.items():
            pair = sub_stride_pairs(codes, tokens, protocol=s.protocol, mask=mask, search=False)
            self._pair("sub_stride_fourier" + suffix, *pair)

    def _add_fractional(self, images: Tensor, shift: FractionalShift, reference: _Reference) -> None:
        s, key = self.settings, ("fractional", None)
        first, second, _ = sub_stride_pairs(reference.tokens, self._tokens(images), protocol=s.protocol)
        self._pair("fractional", first, second)
        if reference.decoded is not None and (decoded := self._decode(images)) is not None:
            expected, region = self.views.moved(reference.decoded, shift)
            self.decoded.setdefault(key, self._pixels()).add(expected, decoded[..., region[0], region[1]])
        if reference.latents is not None and (moved := self._latents(images)) is not None:
            expected = fourier_shift(reference.latents, (shift[0] / s.stride, shift[1] / s.stride))
            rows, columns = sub_stride_region(self.views.grid, s.protocol)
            tally = self.features.setdefault(key, FeatureTally())
            tally.add(expected[..., rows, columns], moved[..., rows, columns])

    def _add_decoded(self, name: str, images: Tensor, shift: Shift, reference: _Reference) -> None:
        if reference.decoded is None:
            return
        decoded = self._decode(images)
        if decoded is None:
            return
        first, second = align(reference.decoded, decoded, shift, protocol=self.settings.protocol)
        for tally in self._tallies(self.decoded, self._pixels, name, shift):
            tally.add(first, second)

    def _add_reference(self, images: Tensor, tokens: Tensor, decoded: Tensor | None) -> None:
        self.usage.update(tokens.cpu())
        if decoded is not None:
            self.reconstruction.add(images, decoded)

    def _by_shift(self, name: str, shifts: tuple[Shift, ...], drawn: Resamples) -> tuple[ShiftAgreement, ...]:
        def decibels(
            tallies: Mapping[_Key, FeatureTally] | Mapping[_Key, PixelTally], shift: Shift
        ) -> float | None:
            return tallies[name, shift].error(None).decibels if (name, shift) in tallies else None

        return tuple(
            ShiftAgreement(
                shift,
                self.pairs[name, shift].agreement(drawn),
                decibels(self.features, shift),
                decibels(self.decoded, shift),
            )
            for shift in shifts
        )

    def _pair(
        self, name: str, first: Tensor, second: Tensor, mask: Tensor | None = None, *, shift: Shift | None = None
    ) -> None:
        for key in ((name, None),) if shift is None else ((name, None), (name, shift)):
            if key not in self.pairs:
                self.pairs[key] = PairTally(self.settings.num_codes, by_image=key[1] is None)
            self.pairs[key].add(first, second, mask)

    def _tallies(
        self, tallies: dict[_Key, _Tally], kind: Callable[..., _Tally], name: str, shift: Shift
    ) -> tuple[_Tally, _Tally]:
        """Return the tally of all shifts together and the tally of this one."""
        for key in ((name, None), (name, shift)):
            if key not in tallies:
                tallies[key] = kind(pooled=key[1] is not None)
        return tallies[name, None], tallies[name, shift]

    def _close(self) -> None:
        for tallies in (self.pairs, self.features, self.decoded):
            for tally in tallies.values():
                tally.close()
        self.reconstruction.close()
        if self.margins is not None:
            self.margins.close()

    def _tokens(self, images: Tensor) -> Tensor:
        return tokens_of(self.given.tokenize, images, grid=self.views.grid, num_codes=self.settings.num_codes)

    def _decode(self, images: Tensor) -> Tensor | None:
        if self.given.reconstruct is None:
            return None
        decoded = call_unchanged("reconstruct", self.given.reconstruct, images)
        require_floating("reconstruct(images)", decoded)
        fits = decoded.shape == images.shape
        require(fits, "reconstruct(images)", f"of shape {tuple(images.shape)}", f"shape {tuple(decoded.shape)}")
        return require_finite("reconstruct(images)", decoded)

    def _latents(self, images: Tensor) -> Tensor | None:
        if self.given.latents is None:
            return None
        z = call_unchanged("latents", self.given.latents, images)
        require_rank("latents(images)", z, (4,), "(B, C, h, w)")
        require_floating("latents(images)", z)
        fits = (z.shape[0], *z.shape[2:]) == (images.shape[0], *self.views.grid)
        require(fits, "latents(images)", f"of grid {self.views.grid}", f"shape {tuple(z.shape)}")
        return require_finite("latents(images)", z).to(images.device)

    def _foreground(self, images: Tensor) -> Tensor | None:
        s = self.settings
        if s.ground is None:
            return None
        return mark_foreground(images, stride=s.stride, ground=s.ground, tau=s.tau)
