"""The trials of one module on clean and on disturbed inputs, and the sums they make.

Shape letters: B batch, C channels, h w sides of a feature map.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from te_quant._checks import require
from te_quant._measuring.float64 import float64
from te_quant.equivariance.audits._grid import (
    error_map,
    first_grid,
    map_tensors,
    near_border,
    stride_of,
    token_amount,
)
from te_quant.equivariance.audits.rows import AuditRow
from te_quant.shifts import Shift, fourier_shift

__all__ = ["Trial", "UnitSums"]

# Positions closer to the border than side // _INTERIOR are outside of the interior; disturbances are let in only
# closer than side // _ZONE, so that a window has to reach an eighth of the side to carry one into the interior.
_INTERIOR = 4
_ZONE = 8
# Rounding of one module, in units of the machine epsilon, in amplitude: a sum of 1,000 terms stays below.
_ROUNDING = 32


class Trial:
    """One call of one module, to be repeated with other inputs.

    Args:
        module: the module.
        inputs: (args, kwargs) as they were before the call, all views in one batch.
        source: the first grid among the inputs.
        result: the first grid among the outputs.
        sides: (H, W) of the images.
        images: how many images a view has; the first view is the unshifted one.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        source: Tensor,
        result: Tensor,
        sides: tuple[int, int],
        images: int,
    ) -> None:
        self.module, self.inputs, self.sides, self.images = module, inputs, sides, images
        self.result = torch.split(result, images)
        self.batch = len(source)
        stride_in, stride_out = (stride_of(grid, sides, self.batch) for grid in (source, result))
        # The caller has made sure that both are grids.
        self.stride_in, self.stride_out = stride_in or Fraction(1), stride_out or Fraction(1)

    def repeat(self, shift: tuple[Fraction, Fraction], view: int | None = None) -> Tensor:
        """The module's output where every grid it is given is moved by ``shift`` pixels, and all else is not.

        With ``view`` the places beside the borders hold what the module saw in that view instead.
        """

        def replace(value: Tensor) -> Tensor:
            shared = value.ndim > 0 and len(value) == self.batch
            first = (value[: self.images] if shared else value).clone()
            stride = stride_of(value, self.sides, self.batch)
            if stride is None:
                return first
            amount = (shift[0] / stride, shift[1] / stride)
            clean = fourier_shift(first, (float(amount[0]), float(amount[1])))
            if view is None:
                return clean
            zone = near_border((int(value.shape[2]), int(value.shape[3])), amount, _ZONE).to(value.device)
            disturbed = value[view * self.images : (view + 1) * self.images]
            return torch.where(zone, disturbed, clean)

        args, kwargs = map_tensors(self.inputs, replace)
        output = first_grid(self.module(*args, **kwargs), self.sides, self.images)
        fits = output is not None and output.shape == self.result[0].shape
        name = type(self.module).__name__
        require(fits, f"output of {name}", "of one shape for equal shapes of input", "another one when repeated")
        return self.result[0] if output is None else output


class UnitSums:
    """Pooled sums of one module over images and shifts; float64."""

    def __init__(self, trial: Trial) -> None:
        module, result = trial.module, trial.result[0]
        self.kind, self.padding = type(module).__name__, padding_of(module)
        self.stride = trial.stride_out
        self.grid: tuple[int, int] = (int(result.shape[2]), int(result.shape[3]))
        self.epsilon = torch.finfo(result.dtype).eps
        # Squared error of each part, and over how many shifted copies of the output it was summed.
        self.sums: dict[str, tuple[float, float]] = {}
        self.power, self.variance = 0.0, torch.zeros(result.shape[1], dtype=torch.float64, device="cpu")
        self.mean, self.count = torch.zeros_like(self.variance), 0

    def add(self, trial: Trial, shifts: tuple[Shift, ...], sub_shifts: tuple[Shift, ...]) -> None:
        """Take in one batch of images with all of its shifted views."""
        self._add_signal(float64(trial.result[0]).transpose(0, 1).flatten(1).cpu())
        images = trial.images
        for view, shift in enumerate((*shifts, *sub_shifts), start=1):
            amount = token_amount(shift, trial.stride_out)
            error = error_map(trial.result[0], trial.result[view], amount)
            self._pool("whole" if view <= len(shifts) else "sub_stride", float(error.sum()), images)
        for view, shift in enumerate(shifts, start=1):
            self._add_whole(trial, view, shift)
        ratio = trial.stride_out / trial.stride_in
        # Below a ratio of two, half of it is no step.
        for step in sorted({1, int(ratio) // 2} - {0}) if ratio > 1 else ():
            for direction in ((step, 0), (0, step)):
                self._add_aliasing(trial, direction, ratio)

    def row(self, name: str, unaudited: tuple[str, ...]) -> AuditRow:
        """The sums as relative errors."""
        variance = float(self.variance.sum())
        images = self.count / (self.grid[0] * self.grid[1])
        floor = _ratio((_ROUNDING * self.epsilon) ** 2 * self.power, variance)
        relative = {part: _ratio(error * images / shown, variance) for part, (error, shown) in self.sums.items()}
        return AuditRow(
            name=name,
            kind=self.kind,
            padding=self.padding,
            stride=float(self.stride),
            grid=self.grid,
            whole_error=relative["whole"],
            sub_stride_error=relative.get("sub_stride"),
            # Not image by image: a border that loses nothing has more in one and less in the next.
            border_error=max(0.0, relative["border"]),
            global_error=relative["global"],
            aliasing_error=relative.get("aliasing"),
            floor=floor,
            unaudited=unaudited,
        )

    def _add_whole(self, trial: Trial, view: int, shift: Shift) -> None:
        amount, pixels = token_amount(shift, trial.stride_out), token_amount(shift, Fraction(1))
        interior = ~near_border(self.grid, amount, _INTERIOR)
        error = error_map(trial.result[0], trial.repeat(pixels), amount).sum(0)
        lost = _density(error, interior) * error.numel()
        self._pool("border", float(error.sum()) - lost, trial.images)
        disturbed = error_map(trial.result[0], trial.repeat(pixels, view), amount).sum(0)
        self._pool("global", _density(disturbed, interior) * error.numel(), trial.images)

    def _add_aliasing(self, trial: Trial, direction: Shift, ratio: Fraction) -> None:
        amount = token_amount(direction, ratio)
        interior = ~near_border(self.grid, amount, _INTERIOR)
        moved = trial.repeat((direction[0] * trial.stride_in, direction[1] * trial.stride_in))
        error = error_map(trial.result[0], moved, amount, interior).sum(0)
        self._pool("aliasing", _density(error, interior) * error.numel(), trial.images)

    def _add_signal(self, values: Tensor) -> None:
        """Pool the variance by channel, however the images are split into batches; values (C, n)."""
        n, mean = values.shape[1], values.mean(1)
        step = mean - self.mean
        # Chan, Golub and LeVeque 1979: the difference of two large sums would lose a small variance.
        self.variance += (values - mean[:, None]).square().sum(1) + step.square() * (
            n * self.count / (n + self.count)
        )
        self.mean += step * (n / (n + self.count))
        self.count += n
        self.power += float(values.square().sum())

    def _pool(self, part: str, error: float, images: int) -> None:
        before = self.sums.get(part, (0.0, 0.0))
        self.sums[part] = (before[0] + error, before[1] + images)


def padding_of(module: nn.Module) -> str:
    """How a module pads, in words, as far as the attributes that PyTorch's layers share tell it."""
    amount = getattr(module, "margins", getattr(module, "padding", 0))
    amounts = amount if isinstance(amount, tuple | list) else (amount,)
    if not any(part not in (0, "valid") for part in amounts):
        return ""
    mode = getattr(module, "padding_mode", None)
    return f"pads ({mode})" if isinstance(mode, str) else "pads"


def _density(error: Tensor, interior: Tensor) -> float:
    return float(error[interior.to(error.device)].mean())


def _ratio(error: float, signal: float) -> float:
    if signal > 0:
        return error / signal
    return math.inf if error > 0 else 0.0
