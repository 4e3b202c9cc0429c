"""Which module of a model loses equivariance, and in which way; any :class:`torch.nn.Module`, untouched.

Shape letters: B batch, C channels, H W sides of the image, h w sides of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from te_quant._checks import require, require_floating, require_int, require_rank
from te_quant._measuring.calls import buffers_put_back, modules_behind
from te_quant._measuring.progress import progress as with_progress
from te_quant._values import require_finite
from te_quant.equivariance.audits._grid import (
    MIN_SIDE,
    first_grid,
    first_map,
    has_positions,
    map_tensors,
    refuse_sides,
    stride_of,
)
from te_quant.equivariance.audits._trials import Trial, UnitSums
from te_quant.equivariance.audits.report import AuditReport
from te_quant.equivariance.audits.rows import AuditRow, SkippedModule
from te_quant.shifts import Shift, roll

__all__ = ["audit"]

_FIXED_SIDES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def audit(
    module: nn.Module,
    images: Tensor,
    *,
    run: Callable[[Tensor], object] | None = None,
    shifts: Iterable[Shift] | None = None,
    sub_stride_shifts: Iterable[Shift] | None = None,
    whole: Collection[str] = (),
    batch_size: int = 4,
    progress: bool | None = None,
) -> AuditReport:
    """Show images and circularly shifted images to a model and report where equivariance is lost.

    Every leaf module u that maps one grid to another (see below) becomes a row. The model sees x and T x; let a
    be the input of u on x, a' its input on T x, b = u(a), and T also the same shift in positions of a or b.

    *After* each module, the error with all that came before: of u's output on T x against T b. Under shifts by
    whole strides T is a roll. Under shifts below the stride it is, image by image, whichever fits best of the
    Fourier shift (both sides without Nyquist) and the whole shifts next to it; the latter is how adaptive
    polyphase layers move.

    *Added* by each module alone, which is therefore run again on inputs that are clean or wrong in a known way.
    Positions are *near a border* if they are closer to it than a quarter of the side, before or after the shift;
    the others are the interior. A density is a mean over positions; hw of it is the error it makes on the map.

    - border: e = u(T a) - T b under whole strides; Σ‖e‖² less hw times the density of ‖e‖² in the interior.
      Padding adds it, and nothing else that commutes with rolls.
    - global: u sees T a, but a' in positions closer to a border than an eighth of the side: hw times the density
      of ‖u(·) - T b‖² in the interior. It is what statistics and attention spread from the border over the whole
      map, and what absolute positions cost even on clean inputs. A convolution has none while it reaches less
      than an eighth of the side. On inputs with a side below 8 only the clean part is measured.
    - aliasing: for u of stride r > 1, u(T a) under shifts by 1 and by r // 2 input positions along either axis,
      against T b as under sub-stride shifts; hw times the density in the interior.

    All are divided by Σ‖b - b̄‖². They tell modules of one model apart; as errors are amplified and damped further
    on, they do not add up to the error at the end. What pointwise nonlinearities lose behind a downsampling, where
    the content has moved by a fraction of a position, is in the error after them and in none of the parts.

    A module with children has a row too where a child cannot be audited on its own (the padding stands outside of
    the convolution, attention works on sequences), where it loses something and none of the children does, and
    where it is taken as a whole: its class name says attention, or ``whole`` names it. The last kind hides its
    children.
    A module that maps positions to positions and is in no row, such as a convolution without padding or a layer on
    a sequence of tokens, is named first in every form of the report: the worst of the audited modules need not be
    the worst of the model then.

    The model is put into evaluation mode by its training flags, and so is every model that ``run`` names. These
    flags, hooks, buffers and the random state are as before afterwards, also if it fails; a codebook that learns
    by moving averages does not move. All shifts of a batch go through the model at once, so normalization by
    statistics of the *batch* is not audited soundly.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU())
        >>> report = audit(model, torch.rand(2, 3, 16, 16))
        >>> report.worst("border").name, report.worst("global") is None
        ('0', True)

    Args:
        module: the model.
        images: what it takes, H and W multiples of its stride and at least four times as large. Photographs show
            more than noise.
        run: calls the model, as ``lambda x: vq.encode(x)``; the module itself if None.
        shifts: whole shifts (dy, dx), multiples of the largest stride and at most a quarter of the sides. None:
            one stride down and one to the right.
        sub_stride_shifts: shifts by less than the largest stride, not (0, 0). None: one pixel down and one to
            the right.
        whole: names of modules to be taken as one.
        batch_size: images at once; each is shown once more for each shift.
        progress: whether to write the number of passes and a progress bar to standard error. None: if that is a
            terminal. One pass finds the strides, and one per batch measures.

    Shape:
        images: (B, C, H, W) float32 or float64.
        grid: (B, ·, h, w) floating, H/h = W/w or its inverse an integer, h and w at least 4. A module that gives
            a tuple, list or mapping is judged by the first grid in it. All grids among its inputs are moved.

    Raises:
        ValueError: no module maps grid to grid, sides are too small or do not fit the stride of a module, a shift
            is out of range, ``whole`` has an unknown name, or images or what a module takes or gives are not
            finite.
        TypeError: module is no module, ``whole`` is a string, or images or what a module takes or gives are not
            float32 or float64. The rounding of half precision, also under ``torch.autocast``, is as large as what
            padding loses.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    require_rank("images", images, (4,), "(B, C, H, W)")
    require_floating("images", images)
    _refuse_half("images must be", images, "pass model.float() and images.float()")
    require_finite("images", images)
    require(len(images) > 0, "images", "at least one", 0)
    batch_size = require_int("batch_size", batch_size, 1)
    call = module if run is None else run
    # Of a compiled model the one that was written, so that names are those of its author.
    module = getattr(module, "_orig_mod", module)
    names = {name for name, _ in module.named_modules()}
    if isinstance(whole, str):
        raise TypeError(f"whole must be a collection of names, got the string {whole!r}.")
    for name in whole:
        require(name in names, "whole entry", "the name of a module", repr(name))
    auditor = _Auditor(module, (int(images.shape[2]), int(images.shape[3])), frozenset(whole))
    devices = [images.device] if images.device.type == "cuda" else []
    # `run` may call a model of which `module` is a part.
    roots = [module, *modules_behind(call)]
    flags = [(child, child.training) for child in dict.fromkeys(c for root in roots for c in root.modules())]
    batches = torch.split(images, batch_size)

    def passes() -> Iterator[list[Tensor]]:
        yield [images[:1]]
        auditor.plan(shifts, sub_stride_shifts)
        for batch in batches:
            yield [batch, *(roll(batch, t) for t in (*auditor.shifts, *auditor.sub_shifts))]

    views = with_progress(passes(), total=1 + len(batches), description="audit", show=progress)
    handles = auditor.attach()
    try:
        # Not by eval(), which would apply what a codebook has pending, and change what its last indices decode to.
        for child, _ in flags:
            child.training = False
        # A compiled model is followed as it was written: hooks cannot be traced.
        eager = torch.compiler.set_stance("force_eager")
        kept = buffers_put_back(roots)
        with kept, eager, torch.no_grad(), torch.random.fork_rng(devices=devices):
            for shown in views:
                auditor.look(shown)
                call(torch.cat(shown))
    finally:
        for handle in handles:
            handle.remove()
        for child, training in flags:
            child.training = training
    return auditor.report(len(images))


@dataclass
class _Call:
    """One call under way: its module, what it was given, and what came of the calls inside it."""

    name: str
    module: nn.Module
    inputs: Any
    whole: bool
    children: int = 0
    failed: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)


class _Auditor:
    """Follows the calls of a model by hooks; the first pass finds the strides, the next ones measure."""

    def __init__(self, model: nn.Module, sides: tuple[int, int], whole: frozenset[str]) -> None:
        self.model, self.sides, self.whole = model, sides, whole
        self.shifts: tuple[Shift, ...] = ()
        self.sub_shifts: tuple[Shift, ...] = ()
        self.stride = 1
        self.measuring = False
        self.busy = False
        self.units: dict[str, UnitSums] = {}
        self.rows_below: dict[str, tuple[str, ...]] = {}
        self.unaudited: dict[str, tuple[str, ...]] = {}
        self.skipped: dict[str, SkippedModule] = {}

    def attach(self) -> list[Any]:
        """Hook every module; the caller removes the handles."""
        handles = []
        for name, module in self.model.named_modules():
            # Before the hooks of others, which run again when the module is repeated.
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave))
        return handles

    def look(self, views: list[Tensor]) -> None:
        """Get ready for one run of the model on these images, one after the other in one batch."""
        self.images, self.batch = len(views[0]), sum(len(view) for view in views)
        self.stack: list[_Call] = []
        self.counts: dict[str, int] = {}

    def plan(self, shifts: Iterable[Shift] | None, sub_shifts: Iterable[Shift] | None) -> None:
        """Choose or check the shifts, now that the strides are known."""
        s = self.stride
        fits = min(self.sides) >= MIN_SIDE * s
        require(fits, "images sides", f"at least {MIN_SIDE} times the stride {s} of the model", self.sides)
        self.shifts = ((s, 0), (0, s)) if shifts is None else _pairs(shifts)
        nearest = ((1, 0), (0, 1)) if s > 1 else ()
        self.sub_shifts = nearest if sub_shifts is None else _pairs(sub_shifts)
        require(len(self.shifts) > 0, "shifts", "at least one", self.shifts)
        limits = [side // MIN_SIDE for side in self.sides]
        for shift in (*self.shifts, *self.sub_shifts):
            require(any(shift), "shifts and sub_stride_shifts", "without the identity", shift)
        for shift in self.shifts:
            expected = f"multiples of the stride {s} within a quarter of the sides {self.sides}"
            fits = all(part % s == 0 and abs(part) <= most for part, most in zip(shift, limits, strict=True))
            require(fits, "shifts", expected, shift)
        for shift in self.sub_shifts:
            below = all(abs(part) < s for part in shift)
            require(below, "sub_stride_shifts", f"below the stride {s} of the model", shift)
        self.measuring = True
        self.skipped.clear()

    def report(self, num_images: int) -> AuditReport:
        """All rows that stand on their own, and the sums behind them as relative errors."""
        require(
            bool(self.units), "module", "one that maps grids over the image to grids", type(self.model).__name__
        )
        rows = [self._row(name) for name in self.units if self._listed(name)]
        shifts, below = self.shifts, self.sub_shifts
        skipped = tuple(self.skipped.values())
        return AuditReport(tuple(rows), skipped, self.stride, self.sides, num_images, shifts, below)

    def _row(self, name: str) -> AuditRow:
        return self.units[name].row(name, self.unaudited.get(name, ()))

    def _listed(self, name: str) -> bool:
        """Leaves always; others if they answer for a child, or lose something where no child does."""
        if name not in self.rows_below or self.unaudited.get(name):
            return True
        row = self._row(name)
        # Ten times the amplitude of one module's rounding: that of the children has added up.
        own = max(row.border_error, row.global_error) > 100 * row.floor
        below = [self._row(child) for child in self.rows_below[name]]
        return own and not any(child.part(part) for child in below for part in ("border", "global"))

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.busy:
                return
            hidden = any(call.whole for call in self.stack)
            self.counts[name] = self.counts.get(name, 0) + 1
            unique = name if self.counts[name] == 1 else f"{name}#{self.counts[name]}"
            # A copy, as the module may write into its input.
            inputs = None if hidden else map_tensors((args, kwargs), Tensor.clone)
            self.stack.append(_Call(unique, module, inputs, name in self.whole or _is_attention(module)))

        return hook

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        if self.busy:
            return
        call = self.stack.pop()
        if call.inputs is None:
            return
        parent = self.stack[-1] if self.stack else None
        if parent is not None:
            parent.children += 1
        source, result = (first_grid(v, self.sides, self.batch) for v in (call.inputs, output))
        if source is None or result is None:
            self._skip(call, parent, source, output)
            return
        for grid in (source, result):
            name = f"module {call.name!r} ({type(call.module).__name__})"
            _refuse_half(f"{name} must compute in", grid, "call model.float() and leave torch.autocast")
            require_finite(name, grid, "look at its weights and at what it is given")
            stride = stride_of(grid, self.sides, self.batch)
            self.stride = math.lcm(self.stride, stride.numerator if stride else 1)
        if parent is not None:
            parent.rows += [*call.rows, call.name]
        if self.measuring:
            self._measure(call, source, result)

    def _skip(self, call: _Call, parent: _Call | None, source: Tensor | None, output: object) -> None:
        kind = type(call.module).__name__
        found = first_map(call.inputs if source is None else output, self.batch)
        # Sides that a module chooses by itself say nothing about the images.
        if source is not None and found is not None and not isinstance(call.module, _FIXED_SIDES):
            refuse_sides(f"module {call.name!r} ({kind})", source, found, self.sides)
        which, over = "input" if source is None else "output", "the image"
        if found is not None:
            which += " of {}x{}".format(*found.shape[2:])
            over = "images of {}x{}".format(*self.sides)
        self.skipped[call.name] = SkippedModule(call.name, kind, f"its {which} is no grid over {over}")
        if not call.missed and has_positions(call.inputs) and has_positions(output):
            call.missed.append(call.name)
        if parent is not None:
            parent.failed.append(call.name)
            parent.rows += call.rows
            parent.missed += call.missed
            return
        # No module around it has a row.
        for name in call.missed:
            self.skipped[name] = replace(self.skipped[name], missed=True)

    def _measure(self, call: _Call, source: Tensor, result: Tensor) -> None:
        if call.children and not call.whole:
            self.rows_below[call.name] = tuple(call.rows)
            self.unaudited[call.name] = tuple(call.failed)
            if not call.failed and any(self._loses(name) for name in call.rows):
                # It would only show its children's losses again.
                self.units.pop(call.name, None)
                return
        trial = Trial(call.module, call.inputs, source, result, self.sides, self.images)
        if call.name not in self.units:
            self.units[call.name] = UnitSums(trial)
        self.busy = True
        try:
            self.units[call.name].add(trial, self.shifts, self.sub_shifts)
        finally:
            self.busy = False

    def _loses(self, name: str) -> bool:
        row = self._row(name) if name in self.units else None
        return row is None or bool(row.part("border") or row.part("global"))


def _pairs(shifts: Iterable[Shift]) -> tuple[Shift, ...]:
    """Return them as pairs of plain ints, and refuse all else."""
    pairs = list(shifts)
    for shift in pairs:
        roll(torch.empty(1, 1, device="cpu"), shift)  # refuses what is no pair of ints
    return tuple((int(dy), int(dx)) for dy, dx in pairs)


def _refuse_half(start: str, grid: Tensor, cure: str) -> None:
    """Refuse half precision: its rounding would hide errors as large as those of padding."""
    if torch.finfo(grid.dtype).eps > torch.finfo(torch.float32).eps:
        expected = "float32 or float64, as the rounding of half precision hides errors"
        raise TypeError(f"{start} {expected}, got {grid.dtype}; {cure}.")


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()
