"""Replicated and circular margins, written once and, backwards, added once.

Shape letters: B batch, C channels, H W pixels.

:func:`torch.nn.functional.pad` gives the same numbers, and costs a CPU more: circular padding of channels-last
images takes as long as the convolution behind it. In compiled code the gradient of its replicate mode fails on
channels-last images (torch 2.13: an assertion on strides).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pad_borders"]

Sides = tuple[int, int, int, int]


def pad_borders(images: Tensor, margins: Sides, circular: bool) -> Tensor:
    """(B, C, H, W) to (B, C, top + H + bottom, left + W + right).

    Args:
        images: not empty but for B or C.
        margins: (left, right, top, bottom); if circular, at most a side each.
        circular: continue on the opposite edge; otherwise repeat the edge pixel.
    """
    if torch.compiler.is_compiling():
        # Fused into what comes next, gradient included.
        left, right, top, bottom = margins
        wide = _joined(images, left, right, 3, circular)
        return _joined(wide, top, bottom, 2, circular)
    padded: Tensor = _Borders.apply(images, margins, circular)  # type: ignore[no-untyped-call]
    return padded


def _joined(images: Tensor, before: int, after: int, axis: int, circular: bool) -> Tensor:
    size = images.shape[axis]
    if circular:
        parts = [images.narrow(axis, size - before, before), images, images.narrow(axis, 0, after)]
    else:
        first, last = images.narrow(axis, 0, 1), images.narrow(axis, size - 1, 1)
        parts = [*[first] * before, images, *[last] * after]
    return torch.cat(parts, axis)


class _Borders(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, margins: Sides, circular: bool) -> Tensor:
        if not circular:
            # Forwards torch has a kernel for this that nothing beats.
            return F.pad(images, margins, mode="replicate")
        left, right, top, bottom = margins
        height, width = images.shape[2:]
        batch, channels = images.shape[:2]
        high, wide = top + height + bottom, left + width + right
        if images.stride(1) == 1 and channels > 1 and height * width > 1:
            padded = images.new_empty(batch, high, wide, channels).permute(0, 3, 1, 2)
        else:
            padded = images.new_empty(batch, channels, high, wide)
        rows = padded.narrow(2, top, height)
        rows.narrow(3, left, width).copy_(images)
        _wrap(rows, 3, left, width, right)
        _wrap(padded, 2, top, height, bottom)
        return padded

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sides, bool], output: Tensor) -> None:  # noqa: ARG004
        ctx.margins, ctx.circular = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        left, right, top, bottom = ctx.margins
        height, width = gradient.shape[2] - top - bottom, gradient.shape[3] - left - right
        rows = _collected(gradient, 2, top, height, bottom, ctx.circular)
        return _collected(rows, 3, left, width, right, ctx.circular), None, None


def _wrap(padded: Tensor, axis: int, before: int, size: int, after: int) -> None:
    if before:
        padded.narrow(axis, 0, before).copy_(padded.narrow(axis, size, before))
    if after:
        padded.narrow(axis, before + size, after).copy_(padded.narrow(axis, before, after))


def _collected(gradient: Tensor, axis: int, before: int, size: int, after: int, circular: bool) -> Tensor:
    """The gradient of the inner pixels: their own, and that of each copy."""
    inner = gradient.narrow(axis, before, size)
    if not before and not after:
        return inner
    inner = inner.clone()
    if before:
        part = gradient.narrow(axis, 0, before)
        place = inner.narrow(axis, size - before, before) if circular else inner.narrow(axis, 0, 1)
        place.add_(part if circular or before == 1 else part.sum(axis, keepdim=True))
    if after:
        part = gradient.narrow(axis, before + size, after)
        place = inner.narrow(axis, 0, after) if circular else inner.narrow(axis, size - 1, 1)
        place.add_(part if circular or after == 1 else part.sum(axis, keepdim=True))
    return inner
