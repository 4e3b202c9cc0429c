"""The commands that measure."""

from __future__ import annotations

from typing import Any

from te_quant.adapters import Tokenizer
from te_quant.autoencoder import VQAutoencoder
from te_quant.cli.arguments import Options
from te_quant.cli.files import require_plot, write_plot
from te_quant.cli.models import device_of, load_autoencoder, load_tokenizer
from te_quant.cli.pictures import find_pictures, read_batch
from te_quant.cli.rows import put_row
from te_quant.equivariance import EquivarianceReport, audit, measure_equivariance
from te_quant.quantizers import VectorQuantizer

__all__ = ["measure", "run_audit"]

_NOT_MEASURED = ""


def run_audit(options: Options) -> tuple[str, dict[str, Any]]:
    """Audit the encoder."""
    require_plot(options.plot)
    model = load_autoencoder(options)
    pictures = find_pictures(options.images, options.limit)
    images = read_batch(pictures, model.config.image_channels, options.size).to(device_of(options.device))
    report = audit(model.encoder, images, batch_size=options.batch_size)
    if options.plot is not None:
        write_plot(report.plot(), options.plot)
    return str(report), report.to_dict()


def measure(options: Options) -> tuple[str, dict[str, Any]]:
    """Measure equivariance, and put a row into a table if one is named."""
    require_plot(options.plot)
    tokenizer, model = load_tokenizer(options)
    channels = 3 if model is None else model.config.image_channels
    pictures = find_pictures(options.images, options.limit)
    images = read_batch(pictures, channels, options.size).to(device_of(options.device))
    report = measure_equivariance(
        tokenizer.encode,
        images,
        stride=tokenizer.stride,
        num_codes=tokenizer.num_codes,
        protocol=options.protocol,  # type: ignore[arg-type]
        batch_size=options.batch_size,
        **_more(tokenizer, model),
    )
    if options.plot is not None:
        write_plot(report.plot(), options.plot)
    if options.table is not None:
        row = {"tokenizer": options.name or options.model, **_row(report)}
        put_row(options.table, list(row), list(row.values()), "ll" + "r" * (len(row) - 2))
    return str(report), report.to_dict()


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


def _row(report: EquivarianceReport) -> dict[str, str]:
    settings, use, error = report.settings, report.code_use, report.reconstruction
    height, width = settings.image_size
    return {
        "images": f"{settings.num_images:,} of {height}x{width}, {settings.protocol}",
        "pixels per token": f"{settings.stride}",
        "codes": f"{settings.num_codes:,}",
        "codes used": f"{use.used_codes:,}",
        "whole tokens: κ": report.aligned.kappa_text(),
        "below a token: κ": report.sub_stride.kappa_text(),
        "PSNR, dB": _NOT_MEASURED if error is None else f"{error.psnr:.2f}",
    }
