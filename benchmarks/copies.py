"""``python -m benchmarks.copies``: what it costs a quantizer to return images as contiguous as it got them.

Codes are looked up row by row, channels innermost. For a contiguous (B, C, h, w) result they are moved outwards
once, or looked up a second time channel by channel; without that they would be a view with strides of their own.
Both kinds of forward pass take turns in one process,
in evaluation on 16 images of 32 x 32 tokens.

Shape letters: N latents, K codes, C code size, B batch, h w token grid.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.paired import compare
from benchmarks.problem import Size
from benchmarks.results import stamp, three_digits
from te_quant import VectorQuantizer
from te_quant.quantizers._rows import Layout

__all__ = ["SIZES", "ForwardPass", "main", "table"]

_ROOT = Path(__file__).parent.parent
_BATCH, _SIDE = 16, 32
SIZES = tuple(Size(_BATCH * _SIDE**2, K, C) for K in (1024, 8192) for C in (8, 64, 256))
"""What is measured by default."""


def _view_of_rows(layout: Layout, table: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return layout.view(rows)


class ForwardPass:
    """Times forward passes in this process; answers the questions that :func:`benchmarks.paired.compare` asks.

    Args:
        copies: whether results are contiguous.
    """

    def __init__(self, copies: bool) -> None:
        self.layout = Layout.arrange if copies else Layout.view
        self.look_up = Layout.look_up if copies else _view_of_rows
        self.quantizer: VectorQuantizer
        self.latents: torch.Tensor

    def ask(self, *, size: Sequence[int] | None = None, mode: str = "eval", calls: int = 1, **_: Any) -> float:
        """Build what ``size`` describes, if given, and return the seconds of a call."""
        if size is not None:
            generator = torch.Generator().manual_seed(0)
            images, code_dim = size[0] // _SIDE**2, size[2]
            self.quantizer = VectorQuantizer(size[1], code_dim, generator=generator).train(mode != "eval")
            self.latents = torch.randn(images, code_dim, _SIDE, _SIDE, generator=generator)
            self._run(1)
        return self._run(calls)

    @torch.no_grad()
    def _run(self, calls: int) -> float:
        with mock.patch.multiple(Layout, arrange=self.layout, look_up=self.look_up):
            start = time.perf_counter()
            for _ in range(calls):
                self.quantizer(self.latents)
            return (time.perf_counter() - start) / calls


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Return the cells as a table in Markdown."""
    lines = ["| K | C | as a view, ms | contiguous, ms | cost of the copy |", "|---|---|---|---|---|"]
    for cell in cells:
        mean, low, high = (100 * (cell["ratio"][name] - 1) for name in ("mean", "low", "high"))
        times = f"{three_digits(cell['before_ms'])} | {three_digits(cell['after_ms'])}"
        lines.append(f"| {cell['K']:,} | {cell['C']} | {times} | {mean:.1f} % [{low:.1f}, {high:.1f}] |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.copies", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=30.0, metavar="S", help="seconds for each size")
    parser.add_argument("--min-pairs", type=int, default=12, help="pairs for each size, however long they take")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "copies")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = stamp(device=torch.device("cpu"), grid="copies", threads=options.threads, budget=options.budget)
    pair = [ForwardPass(copies=False), ForwardPass(copies=True)]
    cells = [
        compare(pair, "eval", size, budget=options.budget, min_pairs=options.min_pairs)
        for size in tqdm(SIZES, unit="size", file=sys.stderr)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"stamp": facts, "cells": cells}
    (options.out / "copies.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.out / "copies.md").write_text(table(cells), encoding="utf-8")
    print(table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
