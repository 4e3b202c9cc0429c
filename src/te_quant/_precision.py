"""Arithmetic that autocast and half precision must not touch.

Shape letters: N rows, C row length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from te_quant._execution import is_exporting, wants_plain
from te_quant._magnitudes import LARGE, SMALL, moderating

__all__ = [
    "AUTOCAST_DEVICES",
    "HALF",
    "full_precision",
    "is_autocast",
    "unit_rows",
    "wide_buffers",
    "widen",
]

HALF = (torch.float16, torch.bfloat16)
# Asked once: older compilers cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(name)
)

_library = torch.library.Library("te_quant", "FRAGMENT")
_library.define("unit_rows(Tensor rows) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off: distances and means need float32."""
    if is_autocast(device) or (device.type in AUTOCAST_DEVICES and not is_exporting()):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for ``device``."""
    return device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def widen(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in HALF else tensor


@contextmanager
def wide_buffers(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While the module is converted, keep statistics as they are: half precision would round them, or overflow."""
    before = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and name in names}
    yield
    for name, buffer in before.items():
        converted = module._buffers[name]
        if converted is not None and converted.dtype in HALF:
            module._buffers[name] = widen(buffer).to(converted.device)


def unit_rows(rows: Tensor) -> Tensor:
    """Scale each row to unit length; a zero row stays zero and passes no gradient: (N, C) -> (N, C).

    One operator for eager and compiled code, since a compiler may round the division otherwise, and codes have to
    be the same bits in both.
    """
    if wants_plain():
        lengths = _lengths(rows)
        # Forward the same, backward the zero of the operator where the length is as good as zero.
        return torch.where(lengths > _shortest(rows.dtype), rows, rows.detach()) / lengths
    result: Tensor = torch.ops.te_quant.unit_rows(rows)
    return result


def _unit_rows(rows: Tensor) -> Tensor:
    if rows.device.type == "cpu" and rows.numel():
        # Asked where that waits for no device: nearly always no row is out of range.
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        shortest, longest = map(float, lengths.aminmax())
        if shortest >= SMALL and longest <= LARGE:
            return rows / lengths
    return rows / _lengths(rows)


def _lengths(rows: Tensor) -> Tensor:
    factors = moderating(torch.linalg.vector_norm(rows.detach(), torch.inf, dim=-1, keepdim=True))
    lengths: Tensor = torch.linalg.vector_norm(rows * factors, dim=-1, keepdim=True) / factors
    # Where the length is not a number that one can divide by, the row is as good as zero.
    return lengths.clamp_min(_shortest(rows.dtype))


def _shortest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
    # Not the rows themselves: they may be a codebook, which may be written to before the backward pass.
    ctx.save_for_backward(_lengths(inputs[0]), output)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
    lengths, units = ctx.saved_tensors  # type: ignore[attr-defined]
    across = (gradient - (gradient * units).sum(-1, keepdim=True) * units) / lengths
    return torch.where(lengths > _shortest(units.dtype), across, 0.0)


_library.impl("unit_rows", _unit_rows, "CompositeExplicitAutograd")
torch.library.register_fake("te_quant::unit_rows", torch.empty_like, lib=_library)
torch.library.register_autograd("te_quant::unit_rows", _backward, setup_context=_setup, lib=_library)
