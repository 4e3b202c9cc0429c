"""Which tokens may look at which, in each kind of attention of the authors' transformer.

Every kind is causal, and lets text look at everything before it and image tokens look at all the text before them.
Each kind decides which earlier image tokens an image token sees.

Shape letters: n tokens of a sequence, h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.te_vqgan.runs.checks import require, require_choice, require_int

__all__ = ["ATTENTION_KINDS", "attention_pattern", "require_order"]

ATTENTION_KINDS = ("full", "row", "column", "convolution")
"""Earlier image tokens that an image token sees: all; those of its row; of its column; of a square around it."""

_SEGMENTS = ("text", "image")


def require_order(order: Sequence[str]) -> tuple[str, str]:
    """Return ``order`` if it names text and image once each."""
    good = not isinstance(order, str) and sorted(order) == sorted(_SEGMENTS)
    require(good, "order", "('text', 'image') or ('image', 'text')", order)
    first, second = order
    return first, second


def attention_pattern(
    kind: str,
    order: Sequence[str],
    text_length: int,
    grid: tuple[int, int],
    *,
    kernel_size: int = 5,
    device: torch.device | None = None,
) -> Tensor:
    """Return which column (second axis) each column of a sequence (first axis) looks at.

    Args:
        kind: one of :data:`ATTENTION_KINDS`.
        order: ``("text", "image")`` or ``("image", "text")``.
        text_length: columns of the text, at least 1.
        grid: (h, w) of the image tokens, which are read row by row.
        kernel_size: side of the square of kind ``convolution``, odd.
        device: of the result.

    Shape:
        result: (n, n) bool, n = text_length + h·w.

    Raises:
        ValueError: an option is unknown or out of range.

    Source: Ramesh et al. 2021, arXiv:2102.12092, section 2.2 and appendix B.1; Shin et al. 2021, arXiv:2112.00384,
        for the order in which the image comes first and cannot see the text.
    """
    require_choice("kind", kind, ATTENTION_KINDS)
    require_int("text_length", text_length, 1)
    require_int("kernel_size", kernel_size, 1)
    require(kernel_size % 2 == 1, "kernel_size", "odd", kernel_size)
    first, _ = require_order(order)
    height, width = grid
    before = text_length if first == "text" else 0
    after = 0 if first == "text" else text_length
    columns = torch.arange(text_length + height * width, device=device)
    visible = columns[:, None] >= columns
    if kind == "full":
        return visible
    place = columns[before : len(columns) - after] - before
    row, column = place // width, place % width
    rows, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    reach = kernel_size // 2
    near = {"row": rows == 0, "column": across == 0, "convolution": (rows <= reach) & (across <= reach)}[kind]
    image = slice(before, len(columns) - after)
    visible[image, image] &= near
    return visible
