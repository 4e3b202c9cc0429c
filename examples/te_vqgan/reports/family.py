"""The comparison of quantizers as a table and a picture: both are functions of its ``results.json``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.te_vqgan.reports.compare import agreement_cell, draw_agreement
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.reports.results import by_arm, mean_and_deviation, named
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import read_json_object, write_bytes_atomically, write_text_atomically
from te_quant import EquivarianceReport
from te_quant.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["family_scatter", "family_table", "write_family"]

_AGREEMENTS = {
    "placement": "placement (the paper's): κ",
    "aligned": "whole tokens: κ",
    "sub_stride": "below a token: κ",
}
_HEADER = [
    "quantizer",
    "codes",
    "learnt numbers: quantizer",
    "learnt numbers: all",
    "test L1",
    "PSNR, dB",
    "codes used",
    "perplexity",
    *_AGREEMENTS.values(),
]


def write_family(folder: Path) -> None:
    """Write ``family.md`` and ``family.png`` from the ``results.json`` in ``folder``.

    Raises:
        ValueError: there is no ``results.json``.
    """
    path = folder / "results.json"
    require(path.is_file(), "results", "a folder with results.json", str(folder))
    results = read_json_object(path)
    write_text_atomically(folder / "family.md", family_table(results))
    write_bytes_atomically(folder / "family.png", encode_png(family_scatter(results["runs"]), dpi=110))


def family_table(results: Mapping[str, Any]) -> str:
    """Return one row per quantizer in Markdown, the means over its seeds, and below it under which conditions."""
    runs = results["runs"]
    groups = by_arm(runs)
    seeds = {title: [run["settings"]["seed"] for run in group] for title, group in groups.items()}
    every = sorted({seed for some in seeds.values() for seed in some})
    rows = []
    for title, group in groups.items():
        first, tests = group[0]["evaluation"], [run["evaluation"]["test"] for run in group]
        learnt, reports = first["learnt_numbers"], [_report(run) for run in group]
        cells = [f"{number:,}" for number in (first["combinations"], learnt["quantizer"], learnt["model"])]
        for key, pattern in (("l1", ".4f"), ("psnr", ".2f"), ("used_codes", ",.0f"), ("perplexity", ".1f")):
            cells.append(mean_and_deviation([test[key] for test in tests], pattern))
        cells += [agreement_cell([getattr(report, name) for report in reports]) for name in _AGREEMENTS]
        rows.append([named(title, len(group), len(every)), *cells])
    test, settings = runs[0]["evaluation"]["test"], runs[0]["settings"]
    digits = _report(runs[0]).settings.num_images
    commits = sorted({run["provenance"]["commit"] or "unknown" for run in runs})
    alone = any(len(group) == 1 for group in groups.values())
    single = " [of a single training its 95 % bootstrap interval]" if alone else ""
    trained, spread = (
        (f"One training each with seed {every[0]}", f" [95 % bootstrap interval over {digits:,} test digits]")
        if len(every) == 1
        else (
            f"Trainings with seeds {', '.join(map(str, every))}",
            f"{single} over {digits:,} test digits",
        )
    )
    means = "" if len(every) == 1 else " Means ± standard deviations over seeds."
    note = (
        f"{trained}: {settings['steps']:,} steps of "
        f"{settings['batch_size']} images of {settings['data']}, {settings['canvas_size']} px wide.{means} "
        f"κ{spread} (rate of equal indices); the rest over "
        f"{test['images']:,} test images, {test['tokens']:,} tokens. Of a token with several indices the "
        f"combination counts as its code. Commit {', '.join(commits)}; `{results['command']}`."
    )
    return Table(_HEADER, rows, note=note).to_markdown()


def family_scatter(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw κ below a token against PSNR; a training whose κ is undefined is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.4), layout="constrained")
    axes = figure.subplots()
    for index, (title, group) in enumerate(by_arm(runs).items()):
        used = statistics.fmean(run["evaluation"]["test"]["used_codes"] for run in group)
        for run in group:
            agreement, test = _report(run).sub_stride, run["evaluation"]["test"]
            if agreement.kappa_defined:
                draw_agreement(axes, test["psnr"], agreement, index, f"{title} ({used:.0f} codes used)")
    axes.set(
        xlabel="PSNR of reconstructions of test images, dB (more is better)",
        ylabel="κ of indices after shifts below a token",
    )
    axes.grid(alpha=0.3)
    # One entry per quantizer, however many seeds it has.
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2, fontsize="small")
    legend.set_frame_on(False)
    figure.suptitle("Quantizers trained in the same way, one point per training")
    return figure


def _report(run: Mapping[str, Any]) -> EquivarianceReport:
    return EquivarianceReport.from_dict(run["evaluation"]["equivariance"])
