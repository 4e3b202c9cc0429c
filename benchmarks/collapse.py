"""``python -m benchmarks.collapse``: known ways in which a codebook collapses, with their cures; estimators.

The network, images and steps are those of :mod:`benchmarks.training`, with 256 codes of 16 channels. Finished
trainings are kept in the result file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.diveq import diveq_layer
from benchmarks.results import stamp
from benchmarks.training import RATE, Layer, Network, library_layer, train
from examples.te_vqgan.reports.document import Table, to_markdown
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.runs.files import write_bytes_atomically, write_text_atomically
from te_quant import VectorQuantizer

__all__ = ["CASES", "ESTIMATORS", "Case", "Setup", "estimator_table", "figure", "main", "table"]

K, C = 256, 16
_STEPS = 400
_SEEDS = (0, 1, 2)
_TEST_IMAGES = 1000
_FOLDER = Path(__file__).parent / "results" / "collapse"
_DPI = 110

Prepare = Callable[[Network, Tensor], torch.optim.Optimizer]


class Setup(NamedTuple):
    """One way to train.

    Attributes:
        text: what a user would write.
        build: (K, C) to the quantizer.
        prepare: the network and its first batch to the optimizer.
    """

    text: str
    build: Callable[[int, int], Layer]
    prepare: Prepare | None = None


class Case(NamedTuple):
    """A symptom, a training that has it, and one that has not.

    Attributes:
        name: short, for tables.
        failing: collapses.
        cured: differs in one thing.
    """

    name: str
    failing: Setup
    cured: Setup


def _vq(**options: Any) -> Callable[[int, int], Layer]:
    return library_layer(lambda codes, size: VectorQuantizer(codes, size, **options))


def _adam(*, codebook_rate: float = RATE, decay: float = 0.0, codebook_decay: float | None = None) -> Prepare:
    """AdamW with a group of its own for the codebook."""

    def prepare(network: Network, images: Tensor) -> torch.optim.Optimizer:  # noqa: ARG001
        codebook = [] if network.quantizer is None else list(network.quantizer.parameters())
        others = [*network.encoder.parameters(), *network.decoder.parameters()]
        own = decay if codebook_decay is None else codebook_decay
        groups = [
            {"params": others, "lr": RATE, "weight_decay": decay},
            {"params": codebook, "lr": codebook_rate, "weight_decay": own},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]])

    return prepare


def _from_data(network: Network, images: Tensor) -> torch.optim.Optimizer:
    quantizer: Any = network.quantizer
    quantizer.kmeans_init(network.encoder(images))
    return torch.optim.Adam(network.parameters(), RATE)


def _fast_from_data(network: Network, images: Tensor) -> torch.optim.Optimizer:
    """K-means, then ten times the rate for the codebook."""
    inner = [module for module in network.modules() if isinstance(module, VectorQuantizer)]
    inner[0].kmeans_init(network.encoder(images))
    return _adam(codebook_rate=10 * RATE)(network, images)


_GRADIENT: dict[str, Any] = {"codebook_update": "gradient", "commitment_weight": 0.25, "decay": 0.99}
_RANDOM = Setup("codebook_update='gradient', random start", _vq(**_GRADIENT))
_DEFAULT = Setup("the defaults", _vq())

CASES: tuple[Case, ...] = (
    Case("gradient and random start", _RANDOM, _DEFAULT),
    Case(
        "random start, gradient training kept",
        _RANDOM,
        Setup("kmeans_init(latents) before the first step", _vq(**_GRADIENT), _from_data),
    ),
    Case(
        "a codebook that learns too slowly",
        Setup("one learning rate for all", _vq(**_GRADIENT), _adam()),
        Setup("ten times the rate for the codebook", _vq(**_GRADIENT), _adam(codebook_rate=10 * RATE)),
    ),
    Case(
        "weight decay on the codebook",
        Setup("weight_decay=1 for everything", _vq(**_GRADIENT), _adam(codebook_rate=10 * RATE, decay=1.0)),
        Setup(
            "weight_decay=0 for the codebook",
            _vq(**_GRADIENT),
            _adam(codebook_rate=10 * RATE, decay=1.0, codebook_decay=0.0),
        ),
    ),
    Case(
        "moving averages without revival",
        Setup("revival_threshold=0", _vq(revival_threshold=0.0)),
        _DEFAULT,
    ),
    Case(
        "moving averages that are too slow",
        Setup("revival_threshold=0, decay=0.99", _vq(revival_threshold=0.0, decay=0.99)),
        Setup("revival_threshold=0, decay=0.9", _vq(revival_threshold=0.0)),
    ),
    Case(
        "no commitment loss",
        Setup("commitment_weight=0", _vq(commitment_weight=0.0)),
        _DEFAULT,
    ),
)
"""In the order of the table."""

ESTIMATORS: tuple[tuple[str, Setup], ...] = (
    ("straight-through", _DEFAULT),
    ("rotation trick", Setup("the defaults, rotation trick", _vq(gradient_estimator="rotation_trick"))),
    ("straight-through", Setup("gradient, ten times the rate, k-means", _vq(**_GRADIENT), _fast_from_data)),
    (
        "rotation trick",
        Setup(
            "gradient, ten times the rate, k-means, rotation trick",
            _vq(**_GRADIENT, gradient_estimator="rotation_trick"),
            _fast_from_data,
        ),
    ),
    ("DiVeQ", Setup("gradient, ten times the rate, k-means, DiVeQ", diveq_layer, _fast_from_data)),
)
"""Estimator and setup: under moving averages, then under gradients with what the cures above give them."""


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return failure and cure of each case as a table in Markdown."""

    def numbers(name: str, digits: int) -> list[str]:
        return [
            f"{statistics.fmean(values):,.{digits}f} ± {statistics.stdev(values):.{digits}f}"
            for setup in (case.failing, case.cured)
            if (values := [entry[name] for entry in results[setup.text]])
        ]

    rows = []
    for case in CASES:
        codes, errors = numbers("used", 0), numbers("mse", 4)
        # Words are set as words, options and calls as code.
        texts = (case.failing.text, case.cured.text)
        failing, cured = (f"`{text}`" if "=" in text or "(" in text else text for text in texts)
        rows.append([case.name, failing, codes[0], errors[0], cured, codes[1], errors[1]])
    header = ("problem", "failing", "codes used", "test MSE", "cure", "codes used", "test MSE")
    return to_markdown([Table(header, rows)])


def estimator_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return codes in use and error of each estimator as a table in Markdown."""
    rows = []
    for estimator, setup in ESTIMATORS:
        codebook = "moving averages and revival (the defaults)" if setup.text.startswith("the defaults") else ""
        codebook = codebook or "gradient at ten times the rate, from k-means"
        cells = [
            f"{statistics.fmean(values):,.{digits}f} ± {statistics.stdev(values):.{digits}f}"
            for name, digits in (("used", 0), ("mse", 4))
            if (values := [entry[name] for entry in results[setup.text]])
        ]
        rows.append([codebook, estimator, *cells])
    return to_markdown([Table(("codebook", "estimator", "codes used", "test MSE"), rows)])


def figure(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Draw how many codes are used along the training, failing and cured, every seed a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = 4
    lines = -(-len(CASES) // columns)
    drawn, grid = plt.subplots(
        lines, columns, figsize=(11, 2.6 * lines), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axes, case in zip(grid.flat, CASES, strict=False):
        for setup, color in ((case.failing, "tab:red"), (case.cured, "tab:green")):
            for number, entry in enumerate(results[setup.text]):
                steps = [25 * (place + 1) for place in range(len(entry["used_curve"]))]
                axes.plot(steps, entry["used_curve"], color=color, label=None if number else setup.text)
        axes.set_title(case.name, fontsize="small")
        axes.legend(fontsize=6, frameon=False)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(CASES) :]:
        axes.set_axis_off()
    drawn.supxlabel("step")
    drawn.supylabel(f"codes used in 25 steps, of {K}")
    content = encode_png(drawn, dpi=_DPI)
    plt.close(drawn)
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.collapse", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", default="mnist", help="images (default: mnist)")
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"of each training (default: {_STEPS})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_FOLDER)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = stamp(device=torch.device("cpu"), grid="full", threads=options.threads, budget=0.0)
    facts |= {"data": options.data, "steps": options.steps}
    path = options.out / "collapse.json"
    document: dict[str, Any] = {"stamp": facts, "results": {}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["stamp"] == facts:
            document = found
    setups = {setup.text: setup for case in CASES for setup in (case.failing, case.cured)}
    setups |= {setup.text: setup for _, setup in ESTIMATORS}
    waiting = [
        (text, seed) for text in setups for seed in _SEEDS if len(document["results"].get(text, ())) <= seed
    ]
    for text, seed in tqdm(waiting, unit="training", file=sys.stderr):
        setup = setups[text]
        entry = train(
            setup.build,
            options.data,
            K,
            C,
            seed=seed,
            rate=RATE,
            steps=options.steps,
            test_images=_TEST_IMAGES,
            prepare=setup.prepare,
        )
        document["results"].setdefault(text, []).append(entry)
        write_text_atomically(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    write_text_atomically(options.out / "collapse.md", table(document["results"]))
    write_text_atomically(options.out / "estimators.md", estimator_table(document["results"]))
    write_bytes_atomically(options.out / "collapse.png", figure(document["results"]))
    print(table(document["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
