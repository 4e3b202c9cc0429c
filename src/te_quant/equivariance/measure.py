"""One call that measures how equivariant any tokenizer is: ``report = measure_equivariance(tokenize, …)``.

Shape letters: B batch, C channels, H W sides of what the tokenizer sees, h w token grid, S canvas side,
s stride, K codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral

import torch
from torch import Tensor

from te_quant._checks import (
    require,
    require_axis,
    require_floating,
    require_int,
    require_rank,
)
from te_quant._measuring.data_range import (
    DEFAULT_RANGE,
    DataRange,
    checked_range,
    ground_and_tau,
    warn_of_another_range,
)
from te_quant._measuring.progress import progress as with_progress
from te_quant._values import require_finite
from te_quant.equivariance._draw import FractionalShift
from te_quant.equivariance._measurement import Callables, ImageMap, Measurement
from te_quant.equivariance.metrics.agreement import mark_foreground
from te_quant.equivariance.metrics.numerical_floor import Variant, check_variants
from te_quant.equivariance.report.report import EquivarianceReport
from te_quant.equivariance.report.values import EquivarianceSettings
from te_quant.equivariance.views import Sides, SubStrideShifts, Views
from te_quant.functional import nearest_code
from te_quant.shifts import Protocol, Shift

__all__ = ["measure_equivariance"]


@torch.no_grad()
def measure_equivariance(
    tokenize: ImageMap,
    images: Tensor,
    *,
    stride: int,
    num_codes: int,
    canvas_size: Sides | None = None,
    protocol: Protocol = "canvas",
    reconstruct: ImageMap | None = None,
    latents: ImageMap | None = None,
    quantize: ImageMap | None = None,
    codebook: Tensor | None = None,
    variants: Mapping[str, Variant] | None = None,
    shifts: Iterable[Shift] | None = None,
    sub_stride_shifts: SubStrideShifts | None = None,
    fractional_shifts: Iterable[FractionalShift] | int | None = None,
    data_range: DataRange = DEFAULT_RANGE,
    ground: float | None = None,
    tau: float | None = None,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
) -> EquivarianceReport:
    """Measure whether indices move with the content, for any callable ``images -> indices``.

    Put your model in evaluation mode first; nothing here touches its state. One image costs one call of
    ``tokenize``, ``latents`` and ``reconstruct``, as far as they are given, for every shift, plus five for the
    placements: one *pass* is one such call for a batch. The first batch is tokenized once more, to refuse a
    tokenizer that draws random numbers. The 95 % intervals come from resampling the images (the
    sprites): they say how far the figures would move with other images, not with another training run or another
    draw of shifts.

    Example:
        >>> def tokenize(images):
        ...     return (images[:, 0, ::4, ::4] > 0).long()
        >>> images = torch.sin(torch.arange(512.0)).view(2, 1, 16, 16)
        >>> report = measure_equivariance(tokenize, images, protocol="circular", stride=4, num_codes=2)
        >>> report.aligned.rate, report.sub_stride.rate < 0.9
        (1.0, True)

    The guide "Measure and test your own tokenizer" in the documentation calls it on tokenizers of other libraries.

    Args:
        tokenize: images -> indices.
        images: in ``data_range``. Under ``canvas`` sprites, half as wide and high as the canvas, pasted at its
            centre. Under ``circular`` full images, or sprites if ``canvas_size`` is twice their side. Under
            ``crop`` photographs larger than the window, which moves over them.
        stride: s, pixels per token.
        num_codes: number of codes, K.
        canvas_size: side, or (height, width), in pixels of what the tokenizer sees: the canvas, or under ``crop``
            the window. None: twice the sprites under ``canvas``, the images themselves under ``circular``, and
            under ``crop`` the largest multiple of the stride that can move by a token in every direction.
        protocol: how content moves: ``canvas``, ``circular`` or ``crop``; see :mod:`te_quant.shifts`.
        reconstruct: images -> images; adds the reconstruction error, and end to end the PSNR of decoded shifted
            images against shifted decoded images.
        latents: images -> latents z before quantization; adds the feature errors in dB, and with ``quantize`` or
            ``codebook`` the Fourier form of the sub-stride agreement.
        quantize: latents -> indices. None: the nearest code in L2, if ``codebook`` is given.
        codebook: with ``latents``, adds margins and the certified rate. Has to be what ``tokenize`` compares with
            in L2; for cosine similarity give normalized codes and latents.
        variants: other ways to compute the same indices, for the numerical floor; see :func:`numerical_floor`.
            None: batches of one, unless ``batch_size`` is 1. ``{}`` for none.
        shifts: pixel shifts (dy, dx) by whole tokens, the identity excluded. None: by one token and as far
            as possible, in every direction; a window of ``crop`` that cannot move by a token is refused.
        sub_stride_shifts: pixel shifts below one token; ``"all"`` for {0..s-1}² but the identity; or their number,
            for a draw that is spread evenly over these (stratified, by ``seed``). None: all of them up to a stride
            of 8, and a draw of 64 above. The report says whether they were drawn.
        fractional_shifts: pixel shifts (dy, dx) from 0 to below s, one of the two at least not whole; or their
            number, for a stratified draw. Adds the figures of these shifts. Circular images are interpolated as
            band-limited signals, others with Lanczos' window of 6 pixels. None: not measured.
        data_range: (low, high) of the pixel values, such as (0, 1) or (0, 255). PSNR takes ``high - low`` as its
            peak. Values that leave it by more than a quarter are refused.
        ground: value of the ground, in the unit of ``images``; a warning says where no sprite contains it. None:
            the low end of ``data_range`` for sprites, and for images that all show at least one token of it. Other
            images, such as photographs, have no ground, and their report has no figures of the foreground.
        tau: a token is foreground when any pixel of its cell differs from the ground by more. None: a twentieth of
            ``data_range``, which is 0.1 for [-1, 1].
        batch_size: images per call.
        resamples: how often the images are resampled for the intervals; 0 for none.
        seed: of the resampling, and of the draws of shifts.
        progress: whether to write the number of passes and a progress bar to standard error. None: if that is a
            terminal.

    Shape:
        images: (B, C, H, W) or (B, C, S/2, S/2). tokenize: (N, C, H, W) -> (N, H/s, W/s) integer.
        reconstruct: (N, C, H, W) -> the same. latents: (N, C, H, W) -> (N, D, H/s, W/s) floating.
        quantize: (N, D, H/s, W/s) -> (N, H/s, W/s) integer. codebook: (K, D).

    Raises:
        ValueError: sizes that do not fit protocol and stride, values outside of ``data_range``, shifts out of
            range, ``quantize`` or ``codebook`` without ``latents``, a codebook whose nearest codes are not what
            ``tokenize`` returns, a ``tokenize`` that returns other indices for the same images, or a callable that
            returns other shapes, latents that are not finite, or indices outside [0, K).
        TypeError: a callable returns something else than tensors of its kind.

    Source: placement: evaluation code of Shin et al. 2021, arXiv:2112.00384; κ: Cohen 1960; end to
        end: EQ-T and EQ-T_frac of Karras et al. 2021 (StyleGAN3), over encoded images and the shifts given here;
        the others and their reasons: "What the measurements see" in the documentation. Code use and
        reconstruction are taken over the sprites at their five placements, or over the unshifted images.
    """
    data_range = checked_range(data_range)
    chosen_ground, chosen_tau = ground_and_tau(data_range, ground, tau)
    views = Views.plan(images, protocol=protocol, canvas_size=canvas_size, stride=stride, ground=chosen_ground)
    batch_size = require_int("batch_size", batch_size, 1)
    has_ground = views.sprites or ground is not None or _show(views, images, chosen_ground, chosen_tau, batch_size)
    expected = f"given with tau, as not every image shows a token of the ground {chosen_ground:g}"
    require(has_ground or tau is None, "ground", expected, None)
    num_codes = require_int("num_codes", num_codes, 1)
    for name, part in (("quantize", quantize), ("codebook", codebook)):
        require(part is None or latents is not None, name, "given with latents", f"{name} without latents")
    if codebook is not None:
        codebook = _checked_codebook(codebook, num_codes)
        quantize = quantize or _nearest(codebook)
    resamples = require_int("resamples", resamples, 0)
    seed = require_int("seed", seed, 0)
    below = views.sub_stride_shifts(sub_stride_shifts, seed)
    settings = EquivarianceSettings(
        protocol=protocol,
        image_size=views.size,
        stride=views.stride,
        num_codes=num_codes,
        num_images=len(images),
        ground=chosen_ground if has_ground else None,
        tau=chosen_tau,
        shifts=views.stride_shifts(shifts),
        sub_stride_shifts=below,
        reference_images=f"{len(images):,} "
        + ("sprites at five places each" if views.sprites else "unshifted images"),
        resamples=resamples,
        seed=seed,
        data_range=data_range,
        sub_stride_drawn=_drawn(sub_stride_shifts) and len(below) < views.stride**2 - 1,
        fractional_shifts=views.fractional_shifts(fractional_shifts, seed),
    )
    given = Callables(tokenize, reconstruct, latents, quantize, codebook, check_variants(variants, batch_size))
    # The decorator above is one more frame.
    warn_of_another_range("images", images, data_range, ground=views.ground, tau=chosen_tau, stacklevel=3)
    run = Measurement(views, settings, given)
    batches = torch.split(images, batch_size)
    # The first batch is tokenized once more.
    total = 1 + len(batches) * run.passes_per_batch
    for _ in with_progress(run.passes(batches), total=total, description="measure_equivariance", show=progress):
        pass
    return run.report()


def _show(views: Views, images: Tensor, ground: float, tau: float, batch_size: int) -> bool:
    """Whether every image shows the ground, over a whole token at least; photographs do not."""
    for batch in torch.split(images, batch_size):
        inked = mark_foreground(views.shifted(batch, (0, 0)), stride=views.stride, ground=ground, tau=tau)
        if bool(inked.all(dim=(1, 2)).any()):
            return False
    return True


def _drawn(sub_stride_shifts: object) -> bool:
    return sub_stride_shifts is None or isinstance(sub_stride_shifts, int | Integral)


def _checked_codebook(codebook: Tensor, num_codes: int) -> Tensor:
    require_rank("codebook", codebook, (2,), "(K, C)")
    require_floating("codebook", codebook)
    require_axis("codebook", codebook, 0, num_codes, "num_codes")
    return require_finite("codebook", codebook)


def _nearest(codebook: Tensor) -> ImageMap:
    def quantize(z: Tensor) -> Tensor:
        require_axis("latents(images)", z, 1, codebook.shape[1], "codebook axis 1")
        dtype = torch.promote_types(z.dtype, codebook.dtype)
        vectors = z.movedim(1, -1).to(dtype)
        codes = codebook.to(device=z.device, dtype=dtype)
        return nearest_code(vectors.flatten(0, 2), codes).reshape(vectors.shape[:-1])

    return quantize
