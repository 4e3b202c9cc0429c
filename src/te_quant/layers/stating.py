"""Read what layers state about themselves, alone and in a row.

A layer states ``reach`` and ``exact_for`` as attributes or properties (:mod:`te_quant.contract`), and
``adaptive = True`` if it samples at a phase that it chooses. Layers of torch state nothing; those that
autoencoders are made of are known here. Every other layer without these attributes is
:data:`~te_quant.contract.UNKNOWN`, also one that merely contains known layers: its forward decides what
happens to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from te_quant._checks import require_choice, require_type
from te_quant.contract import GROUPS, UNKNOWN, Reach, Statement, sliding_window

__all__ = ["both_axes", "derived", "in_series", "statement_of"]

# One pixel of the result depends on one pixel of the images. Dropout does so in evaluation.
_POINTWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d),
    *(nn.SiLU, nn.GELU, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish),
)
# Statistics over all pixels, which no circular shift changes.
_NORMS = (nn.GroupNorm, nn.InstanceNorm2d, nn.BatchNorm2d)


def statement_of(layer: nn.Module) -> Statement:
    """Return what ``layer`` states, or what is known of it if it comes from torch.

    Raises:
        ValueError: ``exact_for`` is not a group of shifts.
        TypeError: ``reach`` is not a :class:`~te_quant.contract.Reach`.

    Example:
        >>> statement_of(nn.Conv2d(8, 8, 3, stride=2, padding=1))
        Statement(reach=Reach(size=3, stride=2), exact_for='interior', adaptive=False)
        >>> statement_of(nn.Linear(8, 8)).exact_for
        'none'
    """
    reach, exact_for = getattr(layer, "reach", None), getattr(layer, "exact_for", None)
    if reach is None or exact_for is None:
        return _of_torch(layer)
    name = type(layer).__name__
    require_type(f"{name}.reach", reach, Reach, "a Reach")
    require_choice(f"{name}.exact_for", exact_for, GROUPS)
    return Statement(reach, exact_for, bool(getattr(layer, "adaptive", False)))


def in_series(*layers: nn.Module) -> Statement:
    """Return the statement of ``layers``, each run on the result of the one before.

    Example:
        >>> in_series(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.AvgPool2d(2))
        Statement(reach=Reach(size=2, stride=2), exact_for='stride', adaptive=False)
    """
    result = Statement(Reach(1), "integer")
    for layer in layers:
        result = result.then(statement_of(layer))
    return result


def derived(statement: Callable[[Any], Statement]) -> tuple[property, property]:
    """Return ``reach`` and ``exact_for`` as properties of a class, from its statement.

    They are read when they are asked for, so a part that is replaced later changes them too.

    Example:
        >>> class Smooth(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.conv = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular")
        ...         self.pool = nn.AvgPool2d(2)
        ...
        ...     reach, exact_for = derived(lambda self: in_series(self.conv, self.pool))
        ...
        ...     def forward(self, images):
        ...         return self.pool(self.conv(images))
        >>> Smooth(8).reach, Smooth(8).exact_for
        (Reach(size=4, stride=2), 'stride')
    """
    return property(lambda self: statement(self).reach), property(lambda self: statement(self).exact_for)


def _of_torch(layer: nn.Module) -> Statement:
    if isinstance(layer, nn.Sequential) and _runs(layer, nn.Sequential):
        return in_series(*layer)
    if _runs(layer, *_POINTWISE):
        return Statement(Reach(1), "integer")
    if _runs(layer, *_NORMS):
        return Statement(Reach(None), "integer")
    if isinstance(layer, nn.Conv2d) and _runs(layer, nn.Conv2d):
        return _of_convolution(layer)
    if isinstance(layer, nn.AvgPool2d | nn.MaxPool2d) and _runs(layer, nn.AvgPool2d, nn.MaxPool2d):
        return _of_pooling(layer)
    return UNKNOWN


def _runs(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the forward of ``layer`` is that of a kind: a subclass with another one is another layer.

    Parametrized and sharded layers, whose classes are made at run time, keep the forward of the original.
    """
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)


def _of_convolution(layer: nn.Conv2d) -> Statement:
    circular = layer.padding_mode == "circular"
    axes = []
    for axis in (0, 1):
        size = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        if isinstance(layer.padding, str):
            total = size - 1 if layer.padding == "same" else 0
            before, after = total // 2, total - total // 2
        else:
            before = after = layer.padding[axis]
        axes.append(sliding_window(size, stride=layer.stride[axis], before=before, after=after, circular=circular))
    return both_axes(*axes)


def _of_pooling(layer: nn.AvgPool2d | nn.MaxPool2d) -> Statement:
    if layer.ceil_mode or getattr(layer, "return_indices", False):
        return UNKNOWN
    axes = []
    for axis in (0, 1):
        size, stride, padding, dilation = (
            value if isinstance(value, int) else value[axis]
            for value in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1))
        )
        size = dilation * (size - 1) + 1
        axes.append(sliding_window(size, stride=stride, before=padding, after=padding))
    return both_axes(*axes)


def both_axes(rows: Statement, columns: Statement) -> Statement:
    """Return the statement of a window from those of its two axes, or UNKNOWN if its strides differ."""
    if rows.reach.stride != columns.reach.stride:
        return UNKNOWN
    sizes = (rows.reach.size or 1, columns.reach.size or 1)
    group = max(rows.exact_for, columns.exact_for, key=GROUPS.index)
    return Statement(Reach(max(sizes), rows.reach.stride), group)
