"""Replicated and circular margins.

Shape letters: B batch, C channels, H W pixels.

:func:`torch.nn.functional.pad` gives the same numbers, and its circular mode costs a CPU more: with channels-last
images as much as the convolution behind it. Here circular margins are written once and, backwards, added once.
In compiled code the gradient of its replicate mode fails on channels-last images (torch 2.13: an assertion on
strides).
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
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        # Fused into what comes next, gradient included. Traced programs cannot be saved with autograd functions.
        left, right, top, bottom = margins
        wide = _joined(images, left, right, 3, circular)
        return _joined(wide, top, bottom, 2, circular)
    if not circular:
        return F.pad(images, margins, mode="replicate")
    padded: Tensor = _Circular.apply(images, margins)  # type: ignore[no-untyped-call]
    return padded


def _joined(images: Tensor, before: int, after: int, axis: int, circular: bool) -> Tensor:
    size = images.shape[axis]
    if circular:
        parts = [images.narrow(axis, size - before, before), images, images.narrow(axis, 0, after)]
    else:
        first, last = images.narrow(axis, 0, 1), images.narrow(axis, size - 1, 1)
        parts = [*[first] * before, images, *[last] * after]
    return torch.cat(parts, axis)


class _Circular(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, margins: Sides) -> Tensor:
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
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sides], output: Tensor) -> None:  # noqa: ARG004
        ctx.margins = inputs[1]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        padded: Tensor = _Circular.apply(tangent, ctx.margins)  # type: ignore[no-untyped-call]
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        left, right, top, bottom = ctx.margins
        height, width = gradient.shape[2] - top - bottom, gradient.shape[3] - left - right
        return _collected(_collected(gradient, 2, top, height, bottom), 3, left, width, right), None


def _wrap(padded: Tensor, axis: int, before: int, size: int, after: int) -> None:
    if before:
        padded.narrow(axis, 0, before).copy_(padded.narrow(axis, size, before))
    if after:
        padded.narrow(axis, before + size, after).copy_(padded.narrow(axis, before, after))


def _collected(gradient: Tensor, axis: int, before: int, size: int, after: int) -> Tensor:
    """The gradient of the inner pixels: their own, and that of each copy."""
    inner = gradient.narrow(axis, before, size)
    if not before and not after:
        return inner
    inner = inner.clone()
    if before:
        inner.narrow(axis, size - before, before).add_(gradient.narrow(axis, 0, before))
    if after:
        inner.narrow(axis, 0, after).add_(gradient.narrow(axis, before + size, after))
    return inner
