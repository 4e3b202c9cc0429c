"""The commands that measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from te_quant.adapters import Tokenizer
from te_quant.autoencoder import VQAutoencoder
from te_quant.cli.arguments import Options
from te_quant.cli.files import require_plot, write_plot
from te_quant.cli.models import device_of, load_autoencoder, load_tokenizer
from te_quant.cli.pictures import Picture, find_pictures, read_batch
from te_quant.cli.rows import put_row, require_table
from te_quant.cli.sizes import require_protocol, require_sides
from te_quant.equivariance import EquivarianceReport, audit, measure_equivariance
from te_quant.equivariance.audits._grid import MIN_SIDE
from te_quant.quantizers import VectorQuantizer
from te_quant.stability import StabilityReport, default_transforms, measure_stability

__all__ = ["measure", "run_audit", "stability"]

_NOT_MEASURED = ""
# The columns of a table before and behind those of the command.
_FIRST = ("tokenizer", "images", "pixels per token", "codes")
_LAST = ("codes used", "PSNR, dB")
_KAPPAS = ("whole tokens: κ", "below a token: κ")


def run_audit(options: Options) -> tuple[str, dict[str, Any]]:
    """Audit the encoder."""
    require_plot(options.plot, overwrite=options.overwrite)
    pictures = find_pictures(options.images, options.limit)
    model = load_autoencoder(options)
    images = _images(pictures, options, model)
    require_sides(_sides(images), model.config.stride, MIN_SIDE)
    report = audit(model.encoder, images, batch_size=options.batch_size, progress=options.progress)
    if options.plot is not None:
        write_plot(report.plot(), options.plot)
    return str(report), report.to_dict()


def measure(options: Options) -> tuple[str, dict[str, Any]]:
    """Measure equivariance, and put a row into a table if one is named."""
    require_plot(options.plot, overwrite=options.overwrite)
    require_table(options.table, _header(_KAPPAS))
    pictures = find_pictures(options.images, options.limit)
    tokenizer, model = load_tokenizer(options)
    images = _images(pictures, options, model)
    require_protocol(_sides(images), options.window, options.protocol, tokenizer.stride)
    report = measure_equivariance(
        tokenizer.encode,
        images,
        stride=tokenizer.stride,
        num_codes=tokenizer.num_codes,
        protocol=options.protocol,  # type: ignore[arg-type]
        canvas_size=options.window,
        sub_stride_shifts=options.sub_stride_shifts,
        batch_size=options.batch_size,
        progress=options.progress,
        **_more(tokenizer, model),
    )
    settings = report.settings
    kappas = dict(zip(_KAPPAS, (report.aligned.kappa_text(), report.sub_stride.kappa_text()), strict=True))
    facts = _facts(settings.num_images, settings.image_size, settings.protocol, tokenizer)
    return _told(options, report, facts, kappas)


def stability(options: Options) -> tuple[str, dict[str, Any]]:
    """Measure token stability, and put a row into a table if one is named."""
    require_plot(options.plot, overwrite=options.overwrite)
    transforms = default_transforms()
    require_table(options.table, _header([transform.name for transform in transforms]))
    pictures = find_pictures(options.images, options.limit)
    tokenizer, model = load_tokenizer(options)
    images = _images(pictures, options, model)
    require_sides(_sides(images), tokenizer.stride)
    report = measure_stability(
        tokenizer.encode,
        tokenizer.decode,
        images,
        transforms=transforms,
        cycles=options.cycles,
        num_codes=tokenizer.num_codes,
        batch_size=options.batch_size,
        progress=options.progress,
    )
    settings = report.settings
    matches = {
        name: f"{found.match.rate:.3f} ({found.match.kappa:.3f})" for name, found in report.transforms.items()
    }
    facts = _facts(settings.num_images, settings.image_size, "token match (κ)", tokenizer)
    return _told(options, report, facts, matches)


def _images(pictures: list[Picture], options: Options, model: VQAutoencoder | None) -> Tensor:
    channels = 3 if model is None else model.config.image_channels
    return read_batch(pictures, channels, options.size).to(device_of(options.device))


def _sides(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _more(tokenizer: Tokenizer, model: VQAutoencoder | None) -> dict[str, Any]:
    """What a report can say beyond the indices: with our own models latents, margins and phases."""
    if model is None:
        return {"reconstruct": tokenizer.reconstruct}
    quantizer = model.quantizer
    more: dict[str, Any] = {
        "reconstruct": lambda images: model(images).reconstruction,
        "latents": model.encode,
        "quantize": quantizer.encode,
    }
    if type(quantizer) is VectorQuantizer and quantizer.metric == "l2":
        more["codebook"] = quantizer.codebook.detach()
    return more


def _header(own: Iterable[str]) -> list[str]:
    """Return the titles of a table, those of the command among them."""
    return [*_FIRST, *own, *_LAST]


def _facts(num_images: int, size: tuple[int, int], condition: str, tokenizer: Tokenizer) -> tuple[str, str, str]:
    images = f"{num_images:,} of {size[0]}x{size[1]}, {condition}"
    return images, f"{tokenizer.stride}", f"{tokenizer.num_codes:,}"


def _model_name(options: Options) -> str:
    """MODEL and the options that choose one of several models in it, so that each has its own row."""
    parts = (options.model.rstrip("/"), options.subfolder, options.filename)
    name = "/".join(part for part in parts if part)
    return name if options.revision is None else f"{name}@{options.revision}"


def _told(
    options: Options,
    report: EquivarianceReport | StabilityReport,
    facts: Iterable[str],
    own: Mapping[str, str],
) -> tuple[str, dict[str, Any]]:
    """Draw the report and put it into a table, where that was asked for, and return it as text and as values.

    Args:
        options: of the command.
        report: what was measured.
        facts: cells of the table behind its first.
        own: title to cell, for the columns that only this command has.
    """
    if options.plot is not None:
        write_plot(report.plot(), options.plot)
    if options.table is not None:
        error = report.reconstruction
        name = options.name or _model_name(options)
        last = (f"{report.code_use.used_codes:,}", _NOT_MEASURED if error is None else f"{error.psnr:.2f}")
        header, row = _header(own), [name, *facts, *own.values(), *last]
        put_row(options.table, header, row, "ll" + "r" * (len(row) - 2))
    return str(report), report.to_dict()
