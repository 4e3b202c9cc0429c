"""Which module loses equivariance, in models of others, untouched, and in ours: ``audits.json``, tables, pictures.

Weights are random, drawn from a seed: what padding and strides lose is a matter of structure. The images are crops
of the two photographs that come with scikit-learn.

Shape letters: B images, H W pixels.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.runs.checks import require, require_choice, require_int
from examples.te_vqgan.runs.files import read_json_object, write_bytes_atomically, write_text_atomically
from examples.te_vqgan.runs.provenance import git_commit, versions
from examples.te_vqgan.stage1.presets import settings_for
from te_quant import build_encoder
from te_quant.equivariance import AuditReport, AuditRow, audit
from te_quant.tables import Table

__all__ = ["AUDITED", "Audited", "photographs", "render", "resnet_stem", "run_audit", "write_audits"]

_IMAGES = 8
_SIDE = 64


class Audited(NamedTuple):
    """What is audited.

    Attributes:
        title: how the tables call it.
        build: makes it, with weights from the global random state.
        method: name of the method that takes the images; the module itself if None.
    """

    title: str
    build: Callable[[], nn.Module]
    method: str | None = None


def resnet_stem() -> nn.Module:
    """Build the first four layers of a ResNet, with torchvision's names, options and initial weights.

    Source: He et al. 2016, arXiv:1512.03385, table 1 (conv1 and the pool behind it).
    """
    convolution = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", convolution),
        ("bn1", nn.BatchNorm2d(64)),
        ("relu", nn.ReLU(inplace=True)),
        ("maxpool", nn.MaxPool2d(kernel_size=3, stride=2, padding=1)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _diffusers_vq_model() -> nn.Module:
    try:
        with warnings.catch_warnings():
            # Deprecation notes of its own imports.
            warnings.simplefilter("ignore")
            from diffusers import VQModel
    except ImportError as error:
        raise ImportError("diffusers must be installed to audit its VQModel: pip install diffusers.") from error
    build: Callable[..., Any] = VQModel
    # Width and depth of the encoders of ours beside it.
    model: nn.Module = build(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        num_vq_embeddings=256,
        norm_num_groups=8,
    )
    return model


def _encoder(arm: str, **changes: Any) -> nn.Module:
    return build_encoder(dataclasses.replace(settings_for("quick", arm).model, **changes))


AUDITED: dict[str, Audited] = {
    "stem": Audited("ResNet stem (torch.nn)", resnet_stem),
    "vq_model": Audited("`VQModel.encode` (diffusers)", _diffusers_vq_model, "encode"),
    "zeros": Audited("VQGAN encoder, zero padding", lambda: _encoder("vqgan", encoder_padding="zeros")),
    "replicate": Audited("VQGAN encoder, replicate padding (the paper's)", lambda: _encoder("vqgan")),
    "circular": Audited("circular padding, strided convolutions", lambda: _encoder("stride_exact")),
    "polyphase": Audited("circular padding, adaptive polyphase", lambda: _encoder("integer_exact")),
}


def photographs(count: int, side: int) -> Tensor:
    """Cut square crops, evenly spread over scikit-learn's two photographs at half their size.

    Args:
        count: B, at most as many as there are.
        side: H = W, pixels; a photograph has 213x320.

    Shape:
        result: (B, 3, H, W) float64 in [-1, 1].
    """
    from sklearn.datasets import load_sample_images

    require_int("count", count, 1)
    require_int("side", side, 1)
    crops = []
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(photograph.copy()).movedim(-1, 0).double() / 127.5 - 1
        half = F.avg_pool2d(pixels, 2)
        tiles = half.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4)
        crops.append(tiles.flatten(0, 1))
    tiles = torch.cat(crops)
    require(count <= len(tiles), "count", f"at most the {len(tiles)} crops of side {side}", count)
    return tiles[torch.arange(count) * len(tiles) // count].contiguous()


def run_audit(audited: Audited, images: Tensor, *, seed: int = 0) -> AuditReport:
    """Build the module in float64, where rounding cannot pass for a loss, and audit it.

    Args:
        audited: what.
        images: what it is shown.
        seed: of its weights.

    Shape:
        images: (B, 3, H, W) float64.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = audited.build().double()
    return audit(module, images, run=None if audited.method is None else getattr(module, audited.method))


def write_audits(
    folder: Path, *, names: Sequence[str] = tuple(AUDITED), seed: int = 0, command: str | None = None
) -> None:
    """Audit and write everything that :func:`render` makes of it, and ``audits.json`` itself.

    Args:
        folder: where.
        names: keys of :data:`AUDITED`.
        seed: of the weights, the same for each.
        command: what was typed, for the record.
    """
    for name in names:
        require_choice("modules entry", name, tuple(AUDITED))
    require_int("seed", seed, 0)
    images = photographs(_IMAGES, _SIDE)
    found = {
        name: {"title": AUDITED[name].title, "report": run_audit(AUDITED[name], images, seed=seed).to_dict()}
        for name in names
    }
    facts = {"command": command, "commit": git_commit(), "versions": versions(), "seed": seed}
    write_text_atomically(folder / "audits.json", json.dumps({**facts, "audits": found}, indent=1) + "\n")
    render(folder)


def render(folder: Path) -> None:
    """Write what follows from ``audits.json``: ``audits.md``, ``modules.md`` and a picture of each audit.

    Raises:
        ValueError: there is no ``audits.json``.
    """
    path = folder / "audits.json"
    require(path.is_file(), "folder", "one with audits.json", str(folder))
    audits = read_json_object(path)["audits"]
    reports = {found["title"]: AuditReport.from_dict(found["report"]) for found in audits.values()}
    write_text_atomically(folder / "audits.md", _summary(reports))
    tables = [f"**{title}**\n\n{_modules(report)}" for title, report in reports.items()]
    write_text_atomically(folder / "modules.md", "\n".join(tables))
    for name, report in zip(audits, reports.values(), strict=True):
        write_bytes_atomically(folder / f"{name}.png", encode_png(report.plot(), dpi=100))


def _summary(reports: dict[str, AuditReport]) -> str:
    header = ["", "whole tokens", "one pixel", "border: most by", "global: most by", "aliasing: most by"]
    lines = []
    for title, report in reports.items():
        last = report.rows[-1]
        cells = [last.text(last.whole_error), last.text(last.sub_stride_error)]
        lines.append([title, *cells, *(_culprit(row, part) for part, row in report.culprits().items())])
    first = next(iter(reports.values()))
    height, width = first.image_size
    note = (
        f"Errors in dB below the signal, more is better: first of the output, with all that came before, "
        f"then of the module that adds most to each part. {first.num_images} crops of photographs, "
        f"{height}x{width} pixels, circular shifts down and to the right; float64, random weights."
    )
    return Table(header, lines, "lrrlll", note).to_markdown()


def _culprit(row: AuditRow | None, part: Literal["border", "global", "aliasing"]) -> str:
    if row is None:
        return "nothing"
    return f"`{row.name}` ({row.description()}), {row.text(row.part(part))}"


def _modules(report: AuditReport) -> str:
    if any(report.culprits().values()):
        return report.to_markdown(losses_only=True)
    return f"None of its {len(report.rows)} modules adds more than rounding to any part.\n"
