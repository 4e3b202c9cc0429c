"""A training step of Stage 1: this library in its modes, against the same network in plain torch.

All take the same step, L1 + 4 L2 + the quantizer's loss, backward, clipping and Adam, on the same images and
from the same weights. Both networks run in every mode and are compared in the same mode, because autocast, the
compiler and the memory format are torch's: what they gain, they gain for both. Adam is fused in both, as in the
example. Before anything is timed, losses on three batches and the norms of their gradients have to be those of
plain torch in eager float32, for a bfloat16 step those of plain torch in bfloat16: rounding alone moves these
norms by some per cent. The weights do not move meanwhile: once they do, other rounding sends other latents to
other codes, and losses part by more than is wrong with any of them. Without the gradients a compiler that gave
half of the network none went unnoticed.

Shape letters: B batch, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import OURS, Cell, Contender, Context, compete
from benchmarks.plain_network import PlainAutoencoder, load_weights
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.sources import load_digits
from examples.te_vqgan.stage1.presets import PRESETS, Stage1Settings
from te_quant import VQAutoencoder
from te_quant.filters import PaddingMode

__all__ = [
    "MODES",
    "PADDINGS",
    "REFERENCE",
    "Mode",
    "Step",
    "cells",
    "library_step",
    "losses_differ",
    "plain_name",
    "reference_step",
    "with_padding",
]

REFERENCE = "plain torch"
PADDINGS = ("zeros", "replicate", "circular")
# Images a step on a CPU, beside the preset's number.
_LARGE_BATCH = 64

_BETAS = (0.5, 0.9)
# Relative, without and with bfloat16, of a loss and of the norm of its gradient: rounding, and near-ties.
_TOLERANCES = {False: (1e-4, 1e-3), True: (5e-3, 5e-2)}
# One network after another is compiled in one process.
_COMPILATIONS = 64


Losses = Sequence[tuple[float, float]]


class Mode(NamedTuple):
    """How a network is run."""

    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        parts = ("compiled" if self.compiled else "eager", "bf16" if self.bf16 else "float32")
        return " ".join((*parts, *(["channels-last"] if self.channels_last else [])))


MODES = (
    Mode(),
    Mode(bf16=True),
    Mode(channels_last=True),
    Mode(compiled=True),
    Mode(bf16=True, compiled=True),
    Mode(bf16=True, channels_last=True, compiled=True),
)


def plain_name(mode: Mode) -> str:
    """Name the plain network in ``mode``; in the first of them it is the reference."""
    return REFERENCE if mode == MODES[0] else f"{REFERENCE} {mode.name}"


class Step:
    """A network with its optimizer, and a step of both.

    Args:
        model: images to reconstruction and the quantizer's loss.
        images: (B, 3, H, W), the batch of every step.
        settings: weights of the losses, learning rates and the norm to clip to.
        mode: how to run it.
    """

    def __init__(self, model: nn.Module, images: Tensor, settings: Stage1Settings, mode: Mode) -> None:
        self.settings, self.mode = settings, mode
        layout = torch.channels_last if mode.channels_last else torch.contiguous_format
        self.model = model.to(images.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.images = images.contiguous(memory_format=layout)
        codebook = cast(nn.Module, self.model.quantizer).codebook
        others = [parameter for parameter in self.model.parameters() if parameter is not codebook]
        rate = settings.learning_rate
        groups: list[dict[str, Any]] = [{"params": others}, {"params": [codebook]}]
        groups[1]["lr"] = rate * settings.codebook_lr_factor
        self.optimizer = torch.optim.Adam(groups, rate, betas=_BETAS, fused=True)
        self.forward: Callable[[Tensor], Any] = torch.compile(self.model) if mode.compiled else self.model

    def __call__(self, _: int = 0) -> Tensor:
        """Take a step and return the loss before it."""
        loss = self._gradient(self.images)
        if self.settings.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return loss

    def losses(self) -> list[tuple[float, float]]:
        """Loss and norm of its gradient on the images, on these upside down and mirrored, without a step."""
        found = []
        for axes in ((), (2,), (3,)):
            loss = self._gradient(self.images.flip(axes))
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            found.append((float(loss), float(nn.utils.get_total_norm(gradients))))
        return found

    def _gradient(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.mode.bf16):
            output = self.forward(images)
        # Ours has named fields, the plain one is a pair.
        plain = not hasattr(output, "reconstruction")
        reconstruction, quantizer_loss = output if plain else (output.reconstruction, output.loss)
        reconstruction = reconstruction.float()
        settings = self.settings
        loss: Tensor = settings.l1_weight * F.l1_loss(reconstruction, images) + quantizer_loss
        if settings.l2_weight:
            loss = loss + settings.l2_weight * F.mse_loss(reconstruction, images)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        return loss.detach()


def library_step(settings: Stage1Settings, images: Tensor, mode: Mode) -> Step:
    """With :class:`te_quant.VQAutoencoder`."""
    return Step(_library_network(settings), images, settings, mode)


def reference_step(settings: Stage1Settings, images: Tensor, mode: Mode = MODES[0]) -> Step:
    """With the plain network and the same weights."""
    plain = PlainAutoencoder(settings.model)
    load_weights(plain, _library_network(settings))
    return Step(plain, images, settings, mode)


def cells(context: Context) -> list[Cell]:
    """The modes at one or two sizes of the batch, then the paddings under the fastest mode."""
    settings = _settings(context)
    sizes = {settings.batch_size}
    if context.grid != "quick" and context.device.type == "cpu":
        sizes.add(_LARGE_BATCH)
    parts: list[tuple[str, int, Callable[..., dict[str, Any]]]] = [
        *(("modes", size, _run_modes) for size in sorted(sizes)),
        ("padding", settings.batch_size, _run_paddings),
    ]
    return [
        Cell(
            f"stage1/{what}-B{size}",
            {"what": what, "width": settings.model.base_channels, "side": settings.canvas_size, "batch": size},
            partial(run, settings=dataclasses.replace(settings, batch_size=size)),
        )
        for what, size, run in parts
    ]


def _settings(context: Context) -> Stage1Settings:
    if context.grid == "quick":
        return PRESETS["smoke"]
    if context.device.type == "cpu":
        return PRESETS["small"]
    # Half of its batch, which is what each of the authors' two GPUs had; no perceptual network, no discriminator.
    return dataclasses.replace(PRESETS["paper"], batch_size=96, perceptual="none", perceptual_weight=0.0)


def _run_modes(context: Context, settings: Stage1Settings) -> dict[str, Any]:
    _allow_compilations()
    images = _images(context, settings)
    expected = {bf16: reference_step(settings, images, Mode(bf16=bf16)).losses() for bf16 in (False, True)}
    networks = [
        (name, step, mode)
        for mode in MODES
        for name, step in ((plain_name(mode), reference_step), (f"{OURS} {mode.name}", library_step))
    ]
    builders: dict[str, Callable[[], Contender]] = {
        name: partial(_contender, partial(step, settings, images, mode), expected[mode.bf16], bf16=mode.bf16)
        for name, step, mode in networks
    }
    entries = compete(builders, context, _limits(context))
    return {"contenders": entries, "facts": {"losses": [round(loss, 6) for loss, _ in expected[False]]}}


def _run_paddings(context: Context, settings: Stage1Settings) -> dict[str, Any]:
    _allow_compilations()
    images = _images(context, settings)
    mode = _fastest(context, settings)
    builders: dict[str, Callable[[], Contender]] = {}
    for padding in PADDINGS:
        padded = with_padding(settings, padding)

        def build(padded: Stage1Settings = padded) -> Contender:
            expected = reference_step(padded, images, Mode(bf16=mode.bf16)).losses()
            return _contender(lambda: library_step(padded, images, mode), expected, bf16=mode.bf16)

        builders[padding] = build
    return {"contenders": compete(builders, context, _limits(context)), "facts": {"mode": f"{OURS} {mode.name}"}}


def with_padding(settings: Stage1Settings, padding: str) -> Stage1Settings:
    """The same network with ``padding`` in both halves."""
    mode = cast(PaddingMode, padding)
    model = dataclasses.replace(settings.model, encoder_padding=mode, decoder_padding=mode)
    return dataclasses.replace(settings, model=model)


def _contender(build: Callable[[], Step], expected: Losses, *, bf16: bool) -> Contender:
    step = build()
    return Contender(step, lambda: losses_differ(step.losses(), expected, bf16=bf16))


def losses_differ(found: Losses, expected: Losses, *, bf16: bool) -> str | None:
    """Say by how much, if it is too much."""
    for name, place, tolerance in zip(("losses", "norms of gradients"), (0, 1), _TOLERANCES[bf16], strict=True):
        ours, theirs = ([pair[place] for pair in pairs] for pairs in (found, expected))
        error = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        if not error <= tolerance:
            return f"{name} {ours} are not {theirs}: off by {error:.2%}"
    return None


def _allow_compilations() -> None:
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = _COMPILATIONS
    dynamo.config.accumulated_recompile_limit = 4 * _COMPILATIONS


def _fastest(context: Context, settings: Stage1Settings) -> Mode:
    """Of the modes that were measured, where they were."""
    entries = context.finished.get(f"stage1/modes-B{settings.batch_size}", {}).get("contenders", {})
    times = {
        mode: entry["median"]
        for mode in MODES
        if (entry := entries.get(f"{OURS} {mode.name}", {})).get("status") == "ok"
    }
    return min(times, key=times.__getitem__) if times else MODES[-1]


def _limits(context: Context) -> Any:
    return context.limits._replace(budget=4 * context.limits.budget)


def _images(context: Context, settings: Stage1Settings) -> Tensor:
    data = QuadrantDataset(load_digits("digits"), "train", canvas_size=settings.canvas_size, size=1024)
    return data.batch(0, settings.batch_size).to(context.device)


def _library_network(settings: Stage1Settings) -> VQAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQAutoencoder(settings.model)
