"""Token stability over any number of batches and processes.

Shape letters: N images, B batch, C channels, H W pixels, h w token grid, K codes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from te_quant._checks import (
    require,
    require_floating,
    require_int,
    require_integer_tensor,
    require_rank,
)
from te_quant._measuring.bootstrap import ImageSums, Resamples
from te_quant._measuring.calls import call_unchanged
from te_quant._measuring.data_range import (
    DEFAULT_RANGE,
    DataRange,
    checked_range,
    ground_and_tau,
    require_within,
)
from te_quant._values import require_in_range
from te_quant.equivariance.metrics.agreement import mark_foreground, require_repeatable
from te_quant.equivariance.metrics.pair_tally import PairTally
from te_quant.equivariance.metrics.shift_error import PixelTally
from te_quant.equivariance.report.values import reconstruction_error
from te_quant.stability.report import StabilityReport
from te_quant.stability.round_trip import (
    ImageMap,
    RoundTrip,
    decoded,
    first_tokens,
    round_trips,
)
from te_quant.stability.transforms import Transform, checked_transforms
from te_quant.stability.values import CycleStability, ImageShare, StabilitySettings, TransformStability
from te_quant.usage import CodebookUsage

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TokenStability"]


class TokenStability(nn.Module):
    """Measure token stability over any number of batches; the result does not depend on how the data is split.

    As a module it moves with the model that holds it. It keeps counts per image, in integers and float64 on the
    CPU, whatever the model is cast to: with intervals up to 72 bytes per token, transform and cycle.
    ``state_dict()`` does not hold them.

    Args:
        num_codes: K, at least 1. None: the codes are counted that occur.
        transforms: what happens to the images between decoding and encoding. None:
            :func:`~te_quant.stability.default_transforms`, which need Pillow.
        cycles: how often decoding, transform and encoding are repeated, at least 1.
        data_range: (low, high) of the pixel values.
        ground: value of the ground, in the unit of the images. None: the low end of ``data_range``, if every image
            shows a token of it; other images, such as photographs, have no ground, and their report has no
            foreground.
        tau: a token is foreground where a pixel of its cell differs from the ground by more. None: a twentieth of
            ``data_range``.
        resamples: how often the images are resampled for the 95 % intervals; 0 for none.
        seed: of the resampling.

    Example:
        >>> from te_quant.stability import Flip, Identity
        >>> encode = lambda images: (images[:, 0, ::4, ::4] > 0).long()
        >>> decode = lambda indices: torch.where(indices > 0, 1.0, -1.0).repeat_interleave(4, 1).repeat_interleave(
        ...     4, 2
        ... )[:, None]
        >>> metric = TokenStability(num_codes=2, transforms=[Identity(), Flip("vertical")])
        >>> for batch in torch.linspace(-1, 1, 1024).view(2, 2, 1, 16, 16):
        ...     metric.update(encode, decode, batch)
        >>> metric.compute().transforms["flip vertical"].match.rate
        1.0
    """

    def __init__(
        self,
        num_codes: int | None = None,
        *,
        transforms: Sequence[Transform] | None = None,
        cycles: int = 1,
        data_range: DataRange = DEFAULT_RANGE,
        ground: float | None = None,
        tau: float | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_codes = None if num_codes is None else require_int("num_codes", num_codes, 1)
        self.transforms = checked_transforms(transforms)
        self.cycles = require_int("cycles", cycles, 1)
        self.data_range = checked_range(data_range)
        self.ground, self.tau = ground_and_tau(self.data_range, ground, tau)
        self._ground_is_given = ground is not None
        self.resamples = require_int("resamples", resamples, 0)
        self.seed = require_int("seed", seed, 0)
        self.reset()

    def extra_repr(self) -> str:
        """Show the options that change what is measured."""
        names = ", ".join(transform.name for transform in self.transforms)
        return f"{self.num_codes}, cycles={self.cycles}, transforms=({names})"

    def reset(self) -> None:
        """Forget everything counted."""
        low, high = self.data_range
        intervals = self.resamples > 0
        self._tallies = [
            _Tallies(self.num_codes, by_image=intervals, first=cycle == 0)
            for _ in self.transforms
            for cycle in range(self.cycles)
        ]
        self._pixels = PixelTally(peak=high - low)
        self._histogram = torch.zeros(self.num_codes or 0, dtype=torch.int64, device="cpu")
        self._images = 0
        # Of every image so far at least one token shows the ground.
        self._all_show_ground = True
        # (H, W), h w grid, and whether tokens came from images: the same for all batches.
        self._layout: _Layout | None = None

    @torch.no_grad()
    def update(
        self, encode: ImageMap, decode: ImageMap, images: Tensor | None = None, *, tokens: Tensor | None = None
    ) -> None:
        """Measure one more batch.

        The first batch after a reset is encoded twice, to refuse an encoder that draws random numbers.

        Args:
            encode: images -> indices.
            decode: indices -> images.
            images: in ``data_range``; the first tokens are theirs.
            tokens: the first tokens, instead of images. There is then no reconstruction error, and the decoded
                images tell which tokens are foreground.

        Shape:
            images: (B, C, H, W). tokens: (B, h, w). encode: (B, C, H, W) -> (B, h, w) integer. decode: the
            reverse, floating.

        Raises:
            ValueError: not exactly one of ``images`` and ``tokens``; sizes that change between batches; values
                outside of ``data_range``; or a callable returns another shape, indices outside [0, K), values that
                are not finite, or other indices for the same images.
            TypeError: a callable returns something else than tensors of its kind.
        """
        given = "both" if images is not None and tokens is not None else "neither"
        require((images is None) != (tokens is None), "images or tokens", "given, one of them", given)
        if images is not None:
            require_rank("images", images, (4,), "(B, C, H, W)")
            require_floating("images", images)
            if len(images) == 0:
                return
            require_within("images", images, self.data_range)
            first, stride = first_tokens(encode, images, self.num_codes)
            shown, _ = decoded(decode, first, images)
        else:
            assert tokens is not None
            require_rank("tokens", tokens, (3,), "(B, h, w)")
            require_integer_tensor("tokens", tokens)
            if len(tokens) == 0:
                return
            stop, name = (2**31, "2**31") if self.num_codes is None else (self.num_codes, "num_codes")
            first = require_in_range("tokens", tokens.to(torch.int64), stop, name)
            shown, stride = decoded(decode, first, None)
        sides, grid = (shown.shape[-2], shown.shape[-1]), (first.shape[-2], first.shape[-1])
        layout = (sides, grid, images is not None)
        require(
            self._layout in (None, layout),
            "batches",
            f"of one kind and size, {_text(self._layout)}",
            _text(layout),
        )
        if self._layout is None:
            source = shown if images is None else images
            require_repeatable(
                "encode", encode, source, call_unchanged("encode", encode, source) if images is None else first
            )
        marked = mark_foreground(
            shown if images is None else images, stride=stride, ground=self.ground, tau=self.tau
        )
        # Only what has gone well is counted.
        rounds = list(
            round_trips(
                encode,
                decode,
                first,
                shown,
                marked.to(first.device),
                transforms=self.transforms,
                cycles=self.cycles,
                num_codes=self.num_codes,
                data_range=self.data_range,
            )
        )
        for found in rounds:
            self._tallies[found.transform * self.cycles + found.cycle - 1].add(found)
        if images is not None:
            self._pixels.add(images, shown)
            self._pixels.close()
        self._histogram = _sum(self._histogram, torch.bincount(first.flatten()).cpu())
        self._images += len(first)
        self._all_show_ground &= not bool(marked.flatten(1).all(1).any())
        self._layout = layout

    def synchronized(self, process_group: ProcessGroup | None = None) -> TokenStability:
        """Return a metric of what all processes have measured; this one stays as it is.

        Every process has to call it, at the same point. It is a copy where there is one process.

        Args:
            process_group: the processes; all of them if None.

        Raises:
            ValueError: processes have measured images of different sizes.
        """
        total = copy.deepcopy(self)
        if not (dist.is_available() and dist.is_initialized()):
            return total
        states: list[Any] = [None] * dist.get_world_size(process_group)
        own = (
            self._tallies,
            self._pixels,
            self._histogram,
            self._images,
            self._all_show_ground,
            self._layout,
        )
        dist.all_gather_object(states, own, group=process_group)
        total.reset()
        for state in states:
            total._merge(*state)
        return total

    def compute(self) -> StabilityReport:
        """Return what this process has measured since the last :meth:`reset`.

        Raises:
            ValueError: nothing was measured.
        """
        require(self._layout is not None, "images", "at least one before compute", 0)
        assert self._layout is not None
        drawn = Resamples(self._images, self.resamples, self.seed)
        with torch.device("cpu"):
            usage = CodebookUsage(max(1, len(self._histogram)))
            usage.merge(_sum(self._histogram, torch.zeros(1, dtype=torch.int64)))
        image_size, grid, from_images = self._layout
        rounds = [tallies.stability(drawn) for tallies in self._tallies]
        # Photographs have no ground: their foreground would be all tokens but some dark ones.
        has_ground = self._ground_is_given or self._all_show_ground
        if not has_ground:
            rounds = [one.without_foreground() for one in rounds]
        return StabilityReport(
            transforms={
                transform.name: TransformStability(tuple(rounds[start : start + self.cycles]))
                for transform, start in zip(self.transforms, range(0, len(rounds), self.cycles), strict=True)
            },
            code_use=usage.compute(),
            reconstruction=reconstruction_error(self._pixels, drawn) if from_images else None,
            settings=StabilitySettings(
                image_size=image_size,
                grid=grid,
                num_codes=self.num_codes,
                num_images=self._images,
                tokens_from="images" if from_images else "given tokens",
                cycles=self.cycles,
                data_range=self.data_range,
                ground=self.ground if has_ground else None,
                tau=self.tau,
                resamples=self.resamples,
                seed=self.seed,
            ),
        )

    def _merge(
        self,
        tallies: Sequence[_Tallies],
        pixels: PixelTally,
        histogram: Tensor,
        images: int,
        all_show_ground: bool,
        layout: _Layout | None,
    ) -> None:
        """Count the images of another process after those of this one."""
        if layout is None:
            return
        same = self._layout in (None, layout)
        require(same, "images of all processes", f"of one kind and size, {_text(self._layout)}", _text(layout))
        for mine, theirs in zip(self._tallies, tallies, strict=True):
            mine.merge(theirs)
        self._pixels.merge(pixels)
        self._histogram = _sum(self._histogram, histogram)
        self._images += images
        self._all_show_ground &= all_show_ground
        self._layout = layout


_Layout = tuple[tuple[int, int], tuple[int, int], bool]


class _Tallies:
    """What is counted of one transform and cycle; in the first cycle its own step is all there is."""

    def __init__(self, num_codes: int | None, *, by_image: bool, first: bool) -> None:
        names = ("match", "foreground") if first else ("match", "foreground", "step")
        self.pairs = {name: PairTally(num_codes, by_image=by_image) for name in names}
        self.whole = ImageSums(pooled=not by_image)

    def add(self, found: RoundTrip) -> None:
        valid = found.valid.expand_as(found.after)
        compared = {
            "match": (found.expected, valid),
            "foreground": (found.expected, valid & found.foreground),
            "step": (found.before, valid),
        }
        for name, tally in self.pairs.items():
            expected, mask = compared[name]
            tally.add(expected, found.after, mask)
            tally.close()
        whole = ((found.expected == found.after) | ~valid).flatten(1).all(1)
        self.whole.add(whole, torch.ones_like(whole))
        self.whole.close()

    def merge(self, other: _Tallies) -> None:
        for name, tally in self.pairs.items():
            tally.merge(other.pairs[name])
        self.whole.merge(other.whole)

    def stability(self, drawn: Resamples) -> CycleStability:
        agreements = {name: tally.agreement(drawn) for name, tally in self.pairs.items()}
        total = self.whole.total
        return CycleStability(
            match=agreements["match"],
            foreground=agreements["foreground"],
            whole=ImageShare(
                share=float(_share(total)),
                images=int(total[0, 1]),
                interval=drawn.interval_of_sums(self.whole.rows, _share),
            ),
            step=agreements.get("step", agreements["match"]),
        )


def _share(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 1]


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """Add two histograms, of which one may know fewer codes."""
    total = torch.zeros(max(len(first), len(second)), dtype=torch.int64, device="cpu")
    for part in (first, second):
        total[: len(part)] += part
    return total


def _text(layout: _Layout | None) -> str:
    if layout is None:
        return "any"
    (height, width), (rows, columns), from_images = layout
    return f"{height}x{width} pixels, {rows}x{columns} tokens from {'images' if from_images else 'given tokens'}"
