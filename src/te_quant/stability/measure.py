"""One call that measures token stability: ``report = measure_stability(encode, decode, images)``.

Shape letters: N images, B batch, C channels, H W pixels, h w token grid, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from te_quant._checks import require, require_int, require_rank
from te_quant._measuring.data_range import DEFAULT_RANGE, DataRange, warn_of_another_range
from te_quant._measuring.progress import progress as shown_progress
from te_quant.stability.metric import TokenStability
from te_quant.stability.report import StabilityReport
from te_quant.stability.round_trip import ImageMap, passes
from te_quant.stability.transforms import Transform

__all__ = ["measure_stability"]


def measure_stability(
    encode: ImageMap,
    decode: ImageMap,
    images: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    transforms: Sequence[Transform] | None = None,
    cycles: int = 1,
    num_codes: int | None = None,
    data_range: DataRange = DEFAULT_RANGE,
    ground: float | None = None,
    tau: float | None = None,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
) -> StabilityReport:
    """Measure how many tokens survive decoding, a transform and encoding.

    For a transform T whose action on the token grid is known, it compares encode(T(decode(t))) with T·t, over the
    tokens that both have. Put your model in evaluation mode first; nothing here touches its state.

    Example:
        >>> from te_quant.stability import Identity, ShiftPixels, ShiftTokens
        >>> def encode(images):
        ...     return (images[:, 0, ::4, ::4] > 0).long()
        >>> def decode(indices):
        ...     images = torch.where(indices > 0, 1.0, -1.0)[:, None]
        ...     return images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        >>> images = torch.sin(torch.arange(2048.0)).view(8, 1, 16, 16)
        >>> report = measure_stability(
        ...     encode, decode, images, transforms=[Identity(), ShiftTokens((1, 0)), ShiftPixels((1, 0))]
        ... )
        >>> [round(found.match.rate, 2) for found in report.transforms.values()]
        [1.0, 1.0, 0.5]

    Args:
        encode: images -> indices.
        decode: indices -> images.
        images: in ``data_range``; the first tokens are theirs.
        tokens: the first tokens, instead of images. There is then no reconstruction error, and the decoded images
            tell which tokens are foreground.
        transforms: objects of :mod:`te_quant.stability`, or your own. None: identity, 8-bit rounding, JPEG at
            qualities 90, 75 and 50, shifts by one token and by one pixel, crop and place back, both flips, half
            size and back; JPEG needs Pillow.
        cycles: how often decoding, transform and encoding are repeated. Every cycle is compared with the first
            tokens and with those of the cycle before.
        num_codes: K, at least 1. None: the codes are counted that occur.
        data_range: (low, high) of the pixel values, such as (0, 1) or (0, 255). PSNR takes ``high - low`` as its
            peak; 8-bit rounding and JPEG clamp to it. Images that leave it by more than a quarter are refused.
        ground: value of the ground, in the unit of ``images``. None: the low end of ``data_range``, if every image
            shows a token of it; other images, such as photographs, have no ground, and their report has no
            foreground.
        tau: a token is foreground where a pixel of its cell differs from the ground by more. None: a twentieth of
            ``data_range``, which is 0.1 for [-1, 1].
        batch_size: images per call.
        resamples: how often the images are resampled for the intervals; 0 for none, which needs less memory.
        seed: of the resampling.
        progress: show on standard error how many passes there are and how far it is. None: if that is a terminal.

    Shape:
        images: (N, C, H, W). tokens: (N, h, w). encode: (B, C, H, W) -> (B, h, w) integer. decode: the reverse,
        floating.

    Raises:
        ValueError: not exactly one of ``images`` and ``tokens``, none at all, values outside of ``data_range``, or
            a callable returns another shape, indices outside [0, K), values that are not finite, or other indices
            for the same images.
        TypeError: a callable returns something else than tensors of its kind.
        ImportError: ``transforms`` is None and Pillow is not installed (``te_quant[jpeg]``).

    Source: κ: Cohen 1960; the intervals: Efron 1979. Others call the first cycle token match or reverse-cycle
        consistency.
    """
    metric = TokenStability(
        num_codes,
        transforms=transforms,
        cycles=cycles,
        data_range=data_range,
        ground=ground,
        tau=tau,
        resamples=resamples,
        seed=seed,
    )
    batch_size = require_int("batch_size", batch_size, 1)
    given = "both" if images is not None and tokens is not None else "neither"
    require((images is None) != (tokens is None), "images or tokens", "given, one of them", given)
    batches: list[tuple[Tensor | None, Tensor | None]]
    if images is not None:
        require_rank("images", images, (4,), "(N, C, H, W)")
        require(len(images) > 0, "images", "at least one", f"shape {tuple(images.shape)}")
        warn_of_another_range("images", images, metric.data_range, ground=None, tau=metric.tau, stacklevel=2)
        batches = [(batch, None) for batch in torch.split(images, batch_size)]
    else:
        assert tokens is not None
        require_rank("tokens", tokens, (3,), "(N, h, w)")
        require(len(tokens) > 0, "tokens", "at least one grid", f"shape {tuple(tokens.shape)}")
        batches = [(None, batch) for batch in torch.split(tokens, batch_size)]
    # The encoder is checked once for being repeatable, which takes two passes where it has made no first tokens.
    per_batch = passes(metric.transforms, cycles, from_images=images is not None)
    total = per_batch * len(batches) + (1 if images is not None else 2)
    ticks = shown_progress(repeat(None, total), total=total, description="measure_stability", show=progress)
    counted_encode, counted_decode = _counted(encode, ticks), _counted(decode, ticks)
    for batch, start in batches:
        metric.update(counted_encode, counted_decode, batch, tokens=start)
    # The last pass is done only now.
    next(ticks, None)
    return metric.compute()


def _counted(function: ImageMap, ticks: Iterator[None]) -> ImageMap:
    def call(tensor: Tensor) -> Tensor:
        next(ticks, None)
        return function(tensor)

    return call
