"""Figures as files: small, and equal for equal data."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["encode_png"]


def encode_png(figure: Figure, *, dpi: float | None = None, photographs: bool = False) -> bytes:
    """Draw a figure as PNG, without a date or a version: a function of its data.

    Args:
        figure: to draw.
        dpi: dots per inch; without it those of the figure.
        photographs: keep all colours. A diagram keeps the 256 that it has most of: a third of the bytes.
    """
    from PIL import Image

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi or figure.dpi, metadata={"Software": None})
    if photographs:
        return content.getvalue()
    smaller = io.BytesIO()
    diagram = Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    diagram.save(smaller, format="png", optimize=True)
    return smaller.getvalue()
