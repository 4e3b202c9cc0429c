"""The quantizers of the library, each trained alike in the autoencoder of a preset, and measured alike.

The folder of each holds what :mod:`~.runs.running` says, and the weights lie in its checkpoint.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checks import require, require_choice
from examples.te_vqgan.runs.files import read_json_object, write_text_atomically
from examples.te_vqgan.runs.provenance import Execution
from examples.te_vqgan.runs.running import Clock, begun_run, finished_run, provenance, run_steps
from examples.te_vqgan.stage1.evaluation import dataset, quality
from examples.te_vqgan.stage1.joint import joint_indices, num_combinations
from examples.te_vqgan.stage1.perceptual import require_perceptual
from examples.te_vqgan.stage1.presets import Stage1Settings, present_form, to_dict
from examples.te_vqgan.stage1.trainer import Stage1Trainer
from te_quant import (
    AutoencoderConfig,
    ProductQuantizer,
    Quantizer,
    VectorQuantizer,
    VQAutoencoder,
    measure_equivariance,
)
from te_quant.quantizers import QUANTIZERS

__all__ = ["FAMILY", "Member", "build_quantizer", "collect_family", "member_settings", "train_family"]

_VALIDATION_IMAGES = 128


class Member(NamedTuple):
    """One quantizer of the comparison.

    Attributes:
        title: how table and figure call it.
        kind: its class.
        options: of its constructor; a learnt codebook's ``code_dim`` is the preset's. Those of a product name the
            options of its parts, which share the channels equally.
    """

    title: str
    kind: str
    options: Mapping[str, Any]


# As the paper trains its codebook, but for what a title says and for the library's defaults.
_PAPERS: Mapping[str, Any] = {
    "num_codes": 256,
    "codebook_update": "gradient",
    "commitment_weight": 0.25,
    "decay": 0.99,
    "revival_threshold": 0.0,
}

# Defaults of ResidualVectorQuantizer when it was trained; its settings did not name them.
_FORMER_DEFAULTS: Mapping[str, Any] = {"codebook_update": "gradient", "commitment_weight": 0.25, "decay": 0.99}

# About 256 codes each, as the presets have; titles say where it is another number.
FAMILY: dict[str, Member] = {
    "vq": Member("VectorQuantizer", "VectorQuantizer", _PAPERS),
    "vq_defaults": Member("VectorQuantizer, defaults", "VectorQuantizer", {"num_codes": 256}),
    "vq_ema": Member("VectorQuantizer, EMA", "VectorQuantizer", {**_PAPERS, "codebook_update": "ema"}),
    "vq_orthogonal": Member("VectorQuantizer, λ = 10", "VectorQuantizer", {**_PAPERS, "orthogonal_reg": 10.0}),
    "vq_cosine": Member("VectorQuantizer, cosine", "VectorQuantizer", {**_PAPERS, "metric": "cosine"}),
    "simvq": Member("SimVQ", "SimVQ", {"num_codes": 256}),
    "fsq": Member("FSQ (8, 6, 5)", "FSQ", {"levels": [8, 6, 5]}),
    "lfq": Member("LFQ, 8 channels", "LFQ", {"code_dim": 8}),
    "bsq": Member("LFQ on the sphere (BSQ), 8 channels", "LFQ", {"code_dim": 8, "spherical": True}),
    "rvq": Member(
        "Residual, 2 × 16", "ResidualVectorQuantizer", {**_FORMER_DEFAULTS, "num_codes": 16, "num_quantizers": 2}
    ),
    "product": Member("Product, 16 × 16", "ProductQuantizer", {"quantizers": [{**_PAPERS, "num_codes": 16}] * 2}),
}


def build_quantizer(name: str, code_dim: int) -> Quantizer:
    """Build the member called ``name``; ``code_dim`` is that of its codebook, if it has one."""
    kind, options = FAMILY[name].kind, FAMILY[name].options
    if kind == "ProductQuantizer":
        parts = options["quantizers"]
        return ProductQuantizer([VectorQuantizer(code_dim=code_dim // len(parts), **part) for part in parts])
    sizes: dict[str, Any] = {} if kind in ("FSQ", "LFQ") else {"code_dim": code_dim}
    return QUANTIZERS[kind](**sizes, **options)


def member_settings(settings: Stage1Settings, name: str) -> Stage1Settings:
    """Return ``settings`` for the member called ``name``: with its ``num_codes`` and ``code_dim``, else the same.

    The last layer of the encoder and the first of the decoder are linear, so that a smaller ``code_dim`` is the
    same as 1 x 1 convolutions around the quantizer. What else the model says of its quantizer is left out.
    """
    require_choice("quantizer", name, tuple(FAMILY))
    with torch.random.fork_rng(devices=[]):
        quantizer = build_quantizer(name, settings.model.code_dim)
    described = inspect.signature(VectorQuantizer).parameters
    network = {option: value for option, value in settings.model.to_dict().items() if option not in described}
    sizes = {option: getattr(quantizer, option) for option in ("num_codes", "code_dim")}
    return dataclasses.replace(settings, model=AutoencoderConfig.from_dict({**network, **sizes}))


def train_family(
    settings: Stage1Settings,
    out: Path,
    source: DigitSource,
    *,
    names: Sequence[str] = tuple(FAMILY),
    execution: Execution | None = None,
    progress: bool = True,
    command: str | None = None,
) -> list[str]:
    """Train and measure the members that are not finished in ``out``, one after the other.

    Args:
        settings: of the preset; the quantizer that its model describes is not used.
        out: the folder of all of them.
        source: the digits.
        names: keys of :data:`FAMILY`.
        execution: where to compute.
        progress: show a progress bar.
        command: what was typed, for the record.

    Returns:
        The names of those that were trained now.

    Raises:
        ValueError: a folder holds a run of other settings, or several processes were started for this.
        Interrupted: Ctrl-C or SIGTERM ended a training early; the next call goes on from there.
        ImportError: the package of the perceptual distance is not installed, or does not work here.
        FloatingPointError: a loss is no longer finite.
    """
    require(not distributed.launched(), "family", "run in one process", "several of a launcher")
    for name in names:
        require_choice("quantizer", name, tuple(FAMILY))
    where = execution or Execution()
    return [name for name in names if _train(name, settings, out, source, where, progress, command)]


def collect_family(settings: Stage1Settings, out: Path, *, seeds: Sequence[int], command: str) -> dict[str, Any]:
    """Read every finished member in ``out`` with one of the ``seeds``, else of these ``settings``.

    Raises:
        ValueError: none is finished, or one is of other settings.
    """
    runs = []
    for name, member in FAMILY.items():
        for seed in seeds:
            seeded = dataclasses.replace(settings, seed=seed)
            folder = _folder(out, name, seeded)
            if not finished_run(folder, _plain(seeded, name), _present_form):
                continue
            parts = {
                part: read_json_object(folder / f"{part}.json")
                for part in ("settings", "evaluation", "provenance")
            }
            runs.append({"name": name, "title": member.title, **parts})
    require(bool(runs), "out", "a folder with finished quantizers", str(out))
    return {"command": command, "runs": runs}


def _folder(out: Path, name: str, settings: Stage1Settings) -> Path:
    return out / f"{name}-seed{settings.seed}"


def _plain(settings: Stage1Settings, name: str) -> dict[str, Any]:
    quantizer = {"kind": FAMILY[name].kind, **FAMILY[name].options}
    return {**to_dict(member_settings(settings, name)), "quantizer": quantizer}


def _present_form(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored settings as this version writes them."""
    present = present_form(stored)
    if present["quantizer"]["kind"] == "ResidualVectorQuantizer":
        present["quantizer"] = {**_FORMER_DEFAULTS, **present["quantizer"]}
    return present


def _train(
    name: str,
    base: Stage1Settings,
    out: Path,
    source: DigitSource,
    where: Execution,
    progress: bool,
    command: str | None,
) -> bool:
    folder, plain, settings = _folder(out, name, base), _plain(base, name), member_settings(base, name)
    if finished_run(folder, plain, _present_form):
        return False
    # Before the folder is taken, or it would hold settings that never ran.
    require_perceptual(settings.perceptual)
    with begun_run(folder, plain, resume=True, present=_present_form) as checkpoint:
        trainer = Stage1Trainer(
            settings,
            where.apply(),
            channels_last=where.channels_last,
            compiled=where.compiled,
            quantizer=lambda: build_quantizer(name, base.model.code_dim),
        )
        train, validation = (dataset(settings, source, split) for split in ("train", "validation"))
        if checkpoint is None:
            trainer.initialize(lambda number: train.batch(number, settings.batch_size))
        else:
            trainer.load(*checkpoint)

        def validate() -> dict[str, float]:
            measured = quality(trainer.model, validation, _VALIDATION_IMAGES, trainer.device)
            return {f"validation_{measure}": value for measure, value in measured.items()}

        clock = Clock(None if checkpoint is None else checkpoint[1]["spent"])
        run_steps(
            trainer,
            settings,
            plain,
            folder,
            advance=lambda: trainer.train_step(train.batch(trainer.step, settings.batch_size)),
            validate=validate,
            clock=clock,
            progress=progress,
            shown={"codes": "batch_used_codes"},
        )
        trained = clock.spent()
        numbers = _measure(trainer.model, settings, source, trainer.device)
        facts = provenance(command, where, trained, clock.spent())
        write_text_atomically(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
        write_text_atomically(folder / "evaluation.json", json.dumps(numbers, indent=2) + "\n")
    return True


@torch.no_grad()
def _measure(
    model: VQAutoencoder, settings: Stage1Settings, source: DigitSource, device: torch.device
) -> dict[str, Any]:
    """Measure reconstruction, code use and equivariance on test images, several indices a token as one."""
    model.eval()
    test = dataset(settings, source, "test")

    def tokens(images: Tensor) -> Tensor:
        return joint_indices(model.encode_to_indices(images), model.quantizer)

    report = measure_equivariance(
        tokens,
        test.sprites(settings.eval_sprites, seed=0).to(device),
        stride=model.config.stride,
        num_codes=num_combinations(model.quantizer),
        canvas_size=settings.canvas_size,
    )
    sizes = {"quantizer": _learnt(model.quantizer), "model": _learnt(model)}
    return {
        "test": quality(model, test, settings.eval_images, device),
        "equivariance": report.to_dict(),
        "combinations": num_combinations(model.quantizer),
        "learnt_numbers": sizes,
    }


def _learnt(module: nn.Module) -> int:
    """Count the numbers that training moves: parameters, and codebooks that are averages."""
    parts = (part for part in module.modules() if isinstance(part, VectorQuantizer))
    averages = sum(part.codebook.numel() for part in parts if part.codebook_update == "ema")
    return averages + sum(parameter.numel() for parameter in module.parameters())
