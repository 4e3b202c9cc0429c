"""Figures that belong to no window. matplotlib is imported when the first one is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["add_legend", "new_figure"]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: inches.
        height: inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib must be installed to draw a report: pip install 'te_quant[plot]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def add_legend(figure: Figure, handles: Mapping[str, Any], **options: Any) -> None:
    """Add a legend without a frame.

    Args:
        figure: to be changed.
        handles: what stands for each label. A label may begin with an underscore, which matplotlib leaves out of
            legends: it is written afterwards.
        **options: of matplotlib's ``legend``.
    """
    legend = figure.legend(list(handles.values()), ["label"] * len(handles), frameon=False, **options)
    for text, label in zip(legend.get_texts(), handles, strict=True):
        text.set_text(label)
