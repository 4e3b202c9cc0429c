"""The range of the pixel values, and what follows from it: the ground, the tolerance around it, and PSNR's peak.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from te_quant._checks import require, require_number

__all__ = [
    "DEFAULT_RANGE",
    "DataRange",
    "checked_range",
    "ground_and_tau",
    "require_within",
    "warn_of_another_range",
]

DataRange = tuple[float, float]
DEFAULT_RANGE: DataRange = (-1.0, 1.0)
# Conventions that images usually follow, the narrowest first; refusals and warnings propose them.
_CONVENTIONS: tuple[DataRange, ...] = ((0.0, 1.0), DEFAULT_RANGE, (0.0, 255.0))
# Resampling and noise overshoot; a quarter of the range is more than they do, and less than another range does.
_OVERSHOOT = 0.25


def checked_range(data_range: object) -> DataRange:
    """Refuse anything but a pair of finite numbers in rising order, and return it as floats."""
    if not isinstance(data_range, tuple | list):
        raise TypeError(f"data_range must be a pair of numbers (low, high), got {data_range!r}.")
    require(len(data_range) == 2, "data_range", "a pair of numbers (low, high)", repr(data_range))
    low, high = (float(require_number(f"data_range[{i}]", bound)) for i, bound in enumerate(data_range))
    require(low < high, "data_range", "(low, high) with low < high", (low, high))
    return low, high


def ground_and_tau(data_range: DataRange, ground: float | None, tau: float | None) -> tuple[float, float]:
    """Return the ground and the tolerance around it: as given, or the low end and a twentieth of the range."""
    low, high = data_range
    chosen_ground = low if ground is None else float(require_number("ground", ground))
    chosen_tau = (high - low) / 20 if tau is None else float(require_number("tau", tau, 0))
    return chosen_ground, chosen_tau


def require_within(name: str, images: Tensor, data_range: DataRange) -> DataRange:
    """Refuse values clearly outside of the range, and return the smallest and the largest value.

    Args:
        name: what errors call the images.
        images: (B, C, H, W), at least one value.
        data_range: low and high.

    Raises:
        ValueError: a value is not finite, or lies outside by more than a quarter of the range.
    """
    smallest, largest = (float(bound) for bound in images.aminmax())
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        bad = int(images.isfinite().logical_not().sum())
        require(False, name, "finite", f"{bad} NaN or infinite of {images.numel()} values")
    low, high = data_range
    slack = _OVERSHOOT * (high - low)
    inside = smallest >= low - slack and largest <= high + slack
    values = f"values from {smallest:g} to {largest:g}"
    if not inside:
        cure = _fitting(smallest, largest, _CONVENTIONS) or "(low, high) of your images, such as (0, 1)"
        values += f"; pass data_range={cure}"
    require(inside, name, f"in data_range={_text(data_range)}", values)
    return smallest, largest


def warn_of_another_range(
    name: str, images: Tensor, data_range: DataRange, *, ground: float | None, tau: float, stacklevel: int
) -> None:
    """Refuse values clearly outside of the range, and warn where they look like those of another range.

    Args:
        name: what messages call the images.
        images: (B, C, H, W), at least one value.
        data_range: low and high.
        ground: on which sprites are pasted; None where nothing is pasted.
        tau: how much a pixel of the ground may differ from it.
        stacklevel: of the warning, counted from the caller.
    """
    smallest, largest = require_within(name, images, data_range)
    # A wider one contains these values too, which says nothing.
    narrower = _CONVENTIONS[: _CONVENTIONS.index(data_range)] if data_range in _CONVENTIONS else ()
    other = _fitting(smallest, largest, narrower)
    values = f"values from {smallest:g} to {largest:g}"
    if ground is not None and not bool(((images - ground).abs() <= tau).any()):
        message = f"The ground {ground:g} on which {name} are pasted occurs in none of them: they have {values}. "
        cure = "the value of their own ground as ground="
        message += f"Pass {cure}." if other is None else f"Pass data_range={other}, or {cure}."
    # An image of one value fits every range.
    elif other is not None and smallest < largest:
        message = f"The {name} look as if their range was not data_range={_text(data_range)}: they have {values}. "
        message += f"Pass data_range={other} if that is their range; PSNR and the foreground depend on it."
    else:
        return
    warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)


def _fitting(smallest: float, largest: float, conventions: tuple[DataRange, ...]) -> str | None:
    """Write the narrowest convention that contains both values."""
    fitting = (_text((low, high)) for low, high in conventions if low <= smallest and largest <= high)
    return next(fitting, None)


def _text(data_range: DataRange) -> str:
    return f"({data_range[0]:g}, {data_range[1]:g})"
