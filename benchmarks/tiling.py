"""``python -m benchmarks.tiling``: what tiles cost in error and save in memory, against the whole image.

Three small autoencoders are trained on crops of one photograph of scikit-learn and applied to the other one. Some
of their layers read the whole image, some do not. Errors are differences from the same model on the whole image.
Encoding and decoding are compared separately: both decoders get the tokens of the whole image. Memory is measured
on a square image, each call in a fresh process (:mod:`benchmarks.memory`).

Shape letters: B batch, H W pixels, h w token grid.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.memory import extra_peak
from benchmarks.results import stamp
from te_quant import AutoencoderConfig, VQAutoencoder
from te_quant.autoencoder import TiledAutoencoder

__all__ = ["MODELS", "compare", "main", "seams", "table"]

_ROOT = Path(__file__).parent.parent
LOCAL = "norm of each pixel"
_SMALL: dict[str, Any] = {"base_channels": 16, "code_dim": 16, "num_codes": 256}
MODELS: dict[str, dict[str, Any]] = {
    "GroupNorm, attention": {},
    "GroupNorm": {"attention": False},
    LOCAL: {"attention": False, "norm": "channel"},
}
"""The options of each model beyond those that all have; the first has the layers of the defaults."""
# Sides of which tiles of 128 pixels without overlap leave nothing.
_HEIGHT, _WIDTH, _TILE = 384, 512, 128
_OVERLAPS = (None, 64, 0)
_NEAR = 8
_CROP, _BATCH, _STEPS = 64, 8, 400
# Attention takes minutes over the 256 x 256 positions of a larger image.
_MEMORY_SIDES = {"GroupNorm, attention": 512, "GroupNorm": 1024, LOCAL: 1024}
_WAYS = {"whole": None, "tiled": 256}
_MIB = 2**20


def photographs() -> tuple[Tensor, Tensor]:
    """Return two photographs, (1, 3, 427, 640) each in [-1, 1]: for training and for tests."""
    from sklearn.datasets import load_sample_images

    first, second = (torch.tensor(image).movedim(-1, 0)[None] / 127.5 - 1 for image in load_sample_images().images)
    return first, second


def trained(name: str, photograph: Tensor, steps: int) -> VQAutoencoder:
    """Return a model that has seen ``steps`` batches of crops."""
    torch.manual_seed(0)
    model = VQAutoencoder(AutoencoderConfig(**_SMALL, **MODELS[name]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(steps), desc=name, file=sys.stderr):
        corners = [[int(torch.randint(side - _CROP, ())) for side in photograph.shape[2:]] for _ in range(_BATCH)]
        crops = torch.cat([photograph[..., y : y + _CROP, x : x + _CROP] for y, x in corners])
        output = model(crops)
        optimizer.zero_grad()
        ((output.reconstruction - crops).abs().mean() + output.loss).backward()
        optimizer.step()
    return model.eval()


def seams(side: int, size: int, overlap: int) -> list[int]:
    """Return where tiles of ``size`` meet on an axis of ``side``, all in the same unit."""
    if side <= size:
        return []
    count = -(-(side - size) // (size - overlap)) + 1
    starts = [number * (side - size) // (count - 1) for number in range(count)]
    return [(before + size + after) // 2 for before, after in pairwise(starts)]


def near_seams(grid: Sequence[int], size: int, overlap: int, distance: int) -> Tensor:
    """Return where in a grid a seam is nearer than ``distance``: (rows, columns) bool."""
    axes = []
    for side in grid:
        middles = torch.arange(side) + 0.5
        gaps = [(middles - seam).abs() < distance for seam in seams(side, size, overlap)]
        axes.append(torch.stack(gaps).any(0) if gaps else torch.zeros(side, dtype=torch.bool))
    return axes[0][:, None] | axes[1]


@torch.no_grad()
def compare(
    model: VQAutoencoder, images: Tensor, tile_size: int, overlap: int | None, *, cut: bool
) -> dict[str, Any]:
    """Compare tiles with the whole image.

    Args:
        model: the autoencoder.
        images: (B, 3, H, W).
        tile_size: in pixels.
        overlap: in pixels; None for the default.
        cut: cut decoded tiles in the middle of their overlap, also where the library blends them.
    """
    tiled = TiledAutoencoder(model, tile_size=tile_size, overlap=overlap)
    if cut:
        tiled._blends = False
    stride = model.config.stride
    whole = model.encode_to_indices(images)
    equal = tiled.encode_to_indices(images) == whole
    reconstruction = model.decode_indices(whole)
    error = (tiled.decode_indices(whole) - reconstruction).abs().amax(1)
    both = tiled.decode_indices(tiled.encode_to_indices(images))
    near_tokens = near_seams(
        tuple(whole.shape[1:3]), tile_size // stride, tiled.overlap // stride, _NEAR // stride
    )
    near_pixels = near_seams(images.shape[2:], tile_size, tiled.overlap, _NEAR)
    return {
        "overlap": tiled.overlap,
        "given": overlap is not None,
        "decoded": "blended" if tiled._blends else "cut",
        "equal_near": equal[:, near_tokens].double().mean().item(),
        "equal_far": equal[:, ~near_tokens].double().mean().item(),
        "mean_near": error[:, near_pixels].double().mean().item(),
        "mean_far": error[:, ~near_pixels].double().mean().item(),
        "max_near": error[:, near_pixels].max().item(),
        "max_far": error[:, ~near_pixels].max().item(),
        "psnr_whole": psnr(reconstruction, images),
        "psnr_tiled": psnr(both, images),
    }


def psnr(images: Tensor, original: Tensor) -> float:
    """Decibels, for pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / (images - original).double().square().mean()))


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Return the errors as a table in Markdown."""
    header = ["layers", "overlap, px", "decoded tiles", "equal tokens at seams / elsewhere"]
    header += ["mean error at seams / elsewhere", "largest error at seams / elsewhere", "PSNR whole / tiled, dB"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for cell in cells:
        overlap = f"{cell['overlap']}" + ("" if cell["given"] else " (default)")
        row = [cell["model"], overlap, cell["decoded"]]
        row.append(f"{100 * cell['equal_near']:.1f} % / {100 * cell['equal_far']:.1f} %")
        row += [f"{cell[f'{kind}_near']:.1e} / {cell[f'{kind}_far']:.1e}" for kind in ("mean", "max")]
        row.append(f"{cell['psnr_whole']:.2f} / {cell['psnr_tiled']:.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def memory_table(cells: Sequence[dict[str, Any]]) -> str:
    """Return the peaks as a table in Markdown."""
    lines = ["| layers | image, px | call | whole image, MiB | tiles, MiB |", "|---|---:|---|---:|---:|"]
    for cell in cells:
        whole, tiled = (f"{cell[way] / _MIB:,.0f}" for way in _WAYS)
        lines.append(f"| {cell['model']} | {cell['side']:,}² | `{cell['call']}` | {whole} | {tiled} |")
    return "\n".join(lines) + "\n"


def peak_here(name: str, call: str, side: int, tile_size: int | None) -> int:
    """Bytes beyond input and output that a call needs, in this process; weights are random."""
    torch.manual_seed(0)
    model = VQAutoencoder(AutoencoderConfig(**_SMALL, **MODELS[name])).eval()
    method = getattr(model if tile_size is None else TiledAutoencoder(model, tile_size=tile_size), call)
    images = torch.rand(1, 3, side, side) * 2 - 1
    given = images if call == "encode_to_indices" else torch.randint(256, (1, side // 4, side // 4))
    with torch.no_grad():
        # Warmed up on an image that is smaller than a tile.
        getattr(model, call)(given[..., :64, :64])
        return int(extra_peak(lambda: [method(given)], torch.device("cpu"))["bytes"])


def peak_apart(*request: Any, threads: int) -> int:
    """As :func:`peak_here`, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.tiling", "--threads", str(threads), "--peak", json.dumps(request)]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    return int(result.stdout.strip().splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_here(*json.loads(options.peak)))
        return 0
    facts = stamp(device=torch.device("cpu"), grid="tiling", threads=options.threads, budget=0.0)
    path: Path = options.out / "tiling.json"
    report = json.loads(path.read_text(encoding="utf-8")) if options.memory else {}
    report["memory_stamp"] = facts
    report["memory"] = [
        {"model": name, "call": call, "side": side}
        | {way: peak_apart(name, call, side, size, threads=options.threads) for way, size in _WAYS.items()}
        for name, side in _MEMORY_SIDES.items()
        for call in ("encode_to_indices", "decode_indices")
    ]
    if not options.memory:
        report |= {"stamp": facts, "cells": _errors(options.steps)}
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, text in (("tiling", table(report["cells"])), ("memory", memory_table(report["memory"]))):
        (options.out / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)
    return 0


def _errors(steps: int) -> list[dict[str, Any]]:
    training, test = photographs()
    images = test[..., :_HEIGHT, :_WIDTH]
    cells: list[dict[str, Any]] = []
    for name in MODELS:
        model = trained(name, training, steps)
        for overlap in _OVERLAPS:
            # Only the layers that read the whole image make the library blend.
            ways = (False, True) if overlap and name != LOCAL else (False,)
            cells += [{"model": name, **compare(model, images, _TILE, overlap, cut=cut)} for cut in ways]
    return cells


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiling", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=_STEPS, help="of training, for each model")
    parser.add_argument("--memory", action="store_true", help="measure only the memory again")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "tiling")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
