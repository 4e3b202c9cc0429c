"""The checks that must look at tensor values; :mod:`te_quant._checks` looks at types and shapes alone.

Each returns the tensor that it has passed. Use the returned one: in a compiled graph, where Python cannot branch
on values, the check is an opaque operator, and only its result keeps it from being dropped as dead code. The
error is the same in both worlds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from te_quant._execution import in_transform, is_exporting, wants_plain

__all__ = ["may_be_true", "require_finite", "require_in_range"]

_library = torch.library.Library("te_quant", "FRAGMENT")
_library.define(
    "check_finite(Tensor values, str name, str cure='') -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    "check_range(Tensor values, str name, SymInt stop, str stop_name, SymInt start=0, str cure='') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def require_finite(name: str, tensor: Tensor, cure: str = "") -> Tensor:
    """Refuse NaN and infinities. Reads the values: waits for the device. Carries no gradient.

    ``cure`` ends the message, after a semicolon.
    """
    if is_exporting():
        return tensor.detach()
    if torch.compiler.is_compiling() or in_transform():
        checked: Tensor = torch.ops.te_quant.check_finite(tensor.detach(), name, cure)
        return checked
    _refuse_nonfinite(tensor, name, cure)
    return tensor.detach()


def require_in_range(
    name: str, tensor: Tensor, stop: int, stop_name: str, start: int = 0, cure: str = ""
) -> Tensor:
    """Refuse integers outside ``[start, stop)``. Reads the values: waits for the device.

    ``cure`` ends the message, after a semicolon, where an integer is below ``start``.
    """
    if is_exporting():
        return tensor
    if torch.compiler.is_compiling() or in_transform():
        checked: Tensor = torch.ops.te_quant.check_range(tensor, name, stop, stop_name, start, cure)
        return checked
    _refuse_outside(tensor, name, stop, stop_name, start, cure)
    return tensor


def may_be_true(condition: Tensor) -> bool:
    """Whether any element of ``condition`` is true; True also where looking is impossible or would take a wait."""
    if torch.compiler.is_compiling() or wants_plain() or condition.device.type != "cpu":
        return True
    return bool(condition.any())


def _refuse_nonfinite(tensor: Tensor, name: str, cure: str) -> None:
    # There are no values on the meta device. Elsewhere a finite sum proves finite terms and costs one pass without
    # a mask; the reverse does not hold (a sum of finite numbers may overflow), so only a suspicious sum is looked
    # at term by term.
    if tensor.is_meta or not tensor.numel() or tensor.sum().isfinite():
        return
    nonfinite = int(tensor.isfinite().logical_not().sum())
    if nonfinite:
        found = f"{nonfinite} NaN or infinite of {tensor.numel()} values"
        raise ValueError(f"{name} must be finite, got {found}{_behind(cure)}.")


def _refuse_outside(tensor: Tensor, name: str, stop: int, stop_name: str, start: int, cure: str) -> None:
    if tensor.is_meta or not tensor.numel():
        return
    low, high = (int(v) for v in torch.aminmax(tensor))
    if low < start or high >= stop:
        found = f"{low}{_behind(cure)}" if low < start else high
        raise ValueError(f"{name} must be in [{start}, {stop_name}={stop}), got {found}.")


def _behind(cure: str) -> str:
    return f"; {cure}" if cure else ""


def _check_finite(values: Tensor, name: str, cure: str = "") -> Tensor:
    _refuse_nonfinite(values, name, cure)
    return values.clone()


def _check_range(values: Tensor, name: str, stop: int, stop_name: str, start: int = 0, cure: str = "") -> Tensor:
    _refuse_outside(values, name, stop, stop_name, start, cure)
    return values.clone()


def _batched(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int | None]]:
    """The rule of an operator under ``vmap``: the samples are looked at together."""

    def rule(
        _: object, in_dims: tuple[int | None, ...], values: Tensor, *options: Any
    ) -> tuple[Tensor, int | None]:
        return operator(values, *options), in_dims[0]

    return rule


def _same(values: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(values)


_library.impl("check_finite", _check_finite, "CompositeExplicitAutograd")
_library.impl("check_range", _check_range, "CompositeExplicitAutograd")
torch.library.register_fake("te_quant::check_finite", _same, lib=_library)
torch.library.register_fake("te_quant::check_range", _same, lib=_library)
for _name in ("check_finite", "check_range"):
    _operator = getattr(torch.ops.te_quant, _name)
    torch.library.register_vmap(f"te_quant::{_name}", _batched(_operator), lib=_library)
