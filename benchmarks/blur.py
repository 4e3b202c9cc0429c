"""BlurPool against antialiased-cnns and kornia, five taps and stride 2.

kornia pads with zeros alone; antialiased-cnns reflects, replicates or pads with zeros. Each padding is a contest.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import OURS, Cell, Contender, Context, Unavailable, compete, optional_module
from te_quant.filters import PaddingMode
from te_quant.layers import BlurPool2d

__all__ = ["BLURS", "PADDINGS", "blur_contender", "cells"]

PADDINGS = ("zeros", "reflect", "replicate")

_TAPS = (1.0, 4.0, 6.0, 4.0, 1.0)
_TOLERANCE = 1e-5
# Batch, channels, side: an image, the levels of a small and of a large network.
_SHAPES = {
    "quick": ((2, 8, 16),),
    "full": ((16, 3, 64), (16, 16, 32), (16, 32, 16), (16, 64, 64), (4, 128, 128)),
}


def _ours(channels: int, padding: str) -> nn.Module:  # noqa: ARG001
    return BlurPool2d(kernel_size=5, stride=2, padding_mode=cast(PaddingMode, padding))


def _antialiased(channels: int, padding: str) -> nn.Module:
    library = optional_module("antialiased_cnns", "antialiased-cnns")
    name = {"zeros": "zero"}.get(padding, padding)
    return cast(nn.Module, library.BlurPool(channels, pad_type=name, filt_size=5, stride=2))


def _kornia(channels: int, padding: str) -> nn.Module:  # noqa: ARG001
    if padding != "zeros":
        raise Unavailable("skipped", f"kornia's BlurPool2D pads with zeros, not by {padding}")
    return cast(nn.Module, optional_module("kornia.filters", "kornia").BlurPool2D(5, 2))


BLURS: dict[str, Callable[[int, str], nn.Module]] = {
    OURS: _ours,
    "antialiased-cnns": _antialiased,
    "kornia": _kornia,
}
"""By name: (channels, padding) to a module."""


def blur_contender(name: str, padding: str, images: Tensor, *, backward: bool) -> Contender:
    """Forward, and backward if asked, with a check against float64."""
    module = BLURS[name](images.shape[1], padding).to(images.device)
    leaf = images.clone().requires_grad_(backward)
    sides = [-(-side // 2) for side in images.shape[2:]]
    upstream = torch.ones(*images.shape[:2], *sides, device=images.device)

    def call(_: int) -> Tensor:
        leaf.grad = None
        with torch.set_grad_enabled(backward):
            result: Tensor = module(leaf)
            if backward:
                torch.autograd.backward(result, upstream)
        return result.detach()

    return Contender(call, lambda: _verdict(call(0), images, padding))


def cells(context: Context) -> list[Cell]:
    """One a shape, padding and pass."""
    result = []
    for batch, channels, side in _SHAPES[context.grid]:
        for padding in PADDINGS:
            for backward in (False, True):
                what = "forward + backward" if backward else "forward"
                key = f"blur/{'train' if backward else 'forward'}-{padding}-B{batch}-C{channels}-S{side}"
                settings = {"pass": what, "padding": padding, "B": batch, "C": channels, "side": side}
                result.append(Cell(key, settings, partial(_run, settings=settings)))
    return result


def _run(context: Context, settings: Mapping[str, Any]) -> dict[str, Any]:
    side, padding = settings["side"], settings["padding"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings["B"], settings["C"], side, side, generator=generator).to(context.device)
    backward = settings["pass"] != "forward"
    builders: dict[str, Callable[[], Contender]] = {
        name: partial(blur_contender, name, padding, images, backward=backward) for name in BLURS
    }
    limits = context.limits._replace(budget=context.limits.budget / 4)
    return {"contenders": compete(builders, context, limits)}


def _verdict(result: Tensor, images: Tensor, padding: str) -> str | None:
    taps = torch.tensor(_TAPS, dtype=torch.float64, device=images.device) / sum(_TAPS)
    wide = images.double()
    padded = F.pad(wide, (2, 2, 2, 2)) if padding == "zeros" else F.pad(wide, (2, 2, 2, 2), mode=padding)
    # Both axes one after the other, as sums of shifted images: no convolution to agree with by mistake.
    height, width = images.shape[2:]
    rows = torch.stack([tap * padded[:, :, index : index + height] for index, tap in enumerate(taps)]).sum(0)
    full = torch.stack([tap * rows[..., index : index + width] for index, tap in enumerate(taps)]).sum(0)
    expected = full[:, :, ::2, ::2]
    if result.shape != expected.shape:
        return f"the result is {tuple(result.shape)}, not {tuple(expected.shape)}"
    error = float((result.double() - expected).abs().max())
    return None if error <= _TOLERANCE * float(wide.abs().max()) else f"the result is off by up to {error:.1e}"
