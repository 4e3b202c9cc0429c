"""One message format for every refused argument: ``NAME must be EXPECTED, got ACTUAL.``.

The functions raise ``ValueError`` for a wrong value, ``TypeError`` for a wrong type. Those for numbers accept
numpy's scalars too and return a plain ``int`` or ``float``, which JSON can store.
Nothing here reads tensor *values*, so all of it is free of device synchronization and safe to trace;
:mod:`te_quant._values` holds the checks that must look at the data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "padding_cure",
    "plain",
    "plain_fields",
    "require",
    "require_axis",
    "require_choice",
    "require_device",
    "require_floating",
    "require_generator",
    "require_int",
    "require_integer_tensor",
    "require_mask",
    "require_number",
    "require_rank",
    "require_type",
]


def require(condition: bool, name: str, expected: str, actual: object) -> None:
    """Raise ``ValueError`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {actual}.")


def require_type(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Refuse a value of another class."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {expected}, got {value!r}.")


def plain(value: object) -> Any:
    """Return the integers and real numbers of other libraries as ``int`` and ``float``, and the rest as it is.

    A ``bool`` stays a ``bool``, and numpy's bool is no number.
    """
    # Numbers of Python come first: a compiled graph may hold a symbolic one, which has to stay symbolic.
    if isinstance(value, int) or type(value) is float:
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def plain_fields(instance: Any) -> None:
    """Replace the numbers of other libraries in the fields of a frozen dataclass; see :func:`plain`."""
    for field in dataclasses.fields(instance):
        object.__setattr__(instance, field.name, plain(getattr(instance, field.name)))


def require_generator(generator: object) -> None:
    """Refuse what is neither ``None`` nor a source of randomness."""
    if generator is not None:
        require_type("generator", generator, torch.Generator, "a torch.Generator")


def require_int(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """Refuse anything but an integer (``bool`` is not one) in ``[minimum, maximum]``; return it as an ``int``."""
    expected = "an int" + _bounds(minimum, maximum)
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be {expected}, got {value!r}.")
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {expected}, got {number!r}.")
    return number


def require_number(
    name: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    below: float | None = None,
) -> float:
    """Refuse anything but a finite real number in ``[minimum, maximum]``, or ``[minimum, below)``; return it."""
    expected = "a finite number" + _bounds(minimum, maximum) + ("" if below is None else f" and < {below:g}")
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {value!r}.")
    inside = (
        -math.inf < number < math.inf
        and (minimum is None or number >= minimum)
        and (maximum is None or number <= maximum)
        and (below is None or number < below)
    )
    # The message is made only when needed: a compiled graph may hold a symbolic value that has no repr.
    if not inside:
        raise ValueError(f"{name} must be {expected}, got {number!r}.")
    return number


def require_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Refuse a value that is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(repr(c) for c in choices)}, got {value!r}.")


def require_rank(name: str, tensor: Tensor, ranks: Collection[int], layout: str) -> None:
    """Refuse a tensor whose number of axes is not in ``ranks``; ``layout`` names the shape wanted."""
    _require_tensor(name, tensor)
    if tensor.ndim not in ranks:
        raise ValueError(f"{name} must be of shape {layout}, got shape {tuple(tensor.shape)}.")


def require_axis(name: str, tensor: Tensor, axis: int, size: int, size_name: str) -> None:
    """Refuse a tensor whose ``axis`` does not have ``size`` elements."""
    actual = tensor.shape[axis]
    if actual != size:
        shape = tuple(tensor.shape)
        raise ValueError(f"{name} axis {axis} must be {size_name}={size}, got {actual} ({name} shape {shape}).")


def padding_cure(divisor: int) -> str:
    """Return how images get sides that are multiples of ``divisor``, for the end of a message."""
    return f"pad them with te_quant.autoencoder.pad_to_divisor(images, {divisor})"


def require_floating(name: str, tensor: Tensor) -> None:
    """Refuse integer, boolean and complex tensors."""
    _require_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}.")


def require_integer_tensor(name: str, tensor: Tensor) -> None:
    """Refuse floating-point, complex and boolean tensors."""
    _require_tensor(name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {tensor.dtype}.")


def require_device(name: str, tensor: Tensor, device: torch.device, owner: str) -> None:
    """Refuse a tensor that does not live where ``owner`` does."""
    _require_tensor(name, tensor)
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the {owner}, got {tensor.device}.")


def require_mask(name: str, mask: Tensor, shape: tuple[int, ...], device: torch.device, owner: str) -> None:
    """Refuse what is no boolean tensor of ``shape`` on ``device``; ``owner`` names what both belong to."""
    _require_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}; pass {name}.bool().")
    if mask.shape != shape:
        raise ValueError(f"{name} must be of shape {tuple(shape)} as the {owner}, got shape {tuple(mask.shape)}.")
    require_device(name, mask, device, owner)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")


def _bounds(minimum: float | None, maximum: float | None) -> str:
    low = "" if minimum is None else f" >= {minimum:g}"
    high = "" if maximum is None else f" <= {maximum:g}"
    return " and".join(part for part in (low, high) if part)
