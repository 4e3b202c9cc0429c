"""How far the positions of a grid lie from its border.

Shape letters: h w sides of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["border_distances"]


def border_distances(sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the distance of every row and of every column from the nearest border, which itself has distance 0.

    Args:
        sides: (h, w).

    Shape:
        returns: (h,) and (w,), int64.

    Example:
        >>> rows, columns = border_distances((2, 5))
        >>> rows.tolist(), columns.tolist()
        ([0, 0], [0, 1, 2, 1, 0])
    """
    height, width = sides
    return _axis(height), _axis(width)


def _axis(side: int) -> Tensor:
    places = torch.arange(side, device="cpu")
    return torch.minimum(places, side - 1 - places)
