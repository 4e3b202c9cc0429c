"""The comparison of quantizers as a table and a picture: both are functions of its ``results.json``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.te_vqgan.checks import require
from examples.te_vqgan.compare import agreement_cell, draw_agreement, table_row
from examples.te_vqgan.files import write_bytes_atomically, write_text_atomically
from te_quant import EquivarianceReport

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
    results = json.loads(path.read_text(encoding="utf-8"))
    write_text_atomically(folder / "family.md", family_table(results))
    buffer = io.BytesIO()
    # Without the date and the version a figure is a function of its data.
    family_scatter(results["runs"]).savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_bytes_atomically(folder / "family.png", buffer.getvalue())


def family_table(results: Mapping[str, Any]) -> str:
    """Return a row a quantizer in Markdown, and below it under which conditions."""
    lines = [table_row(_HEADER), table_row(["---", *["---:"] * (len(_HEADER) - 1)])]
    for run in results["runs"]:
        evaluation, report = run["evaluation"], _report(run)
        test, learnt = evaluation["test"], evaluation["learnt_numbers"]
        cells = [f"{number:,}" for number in (evaluation["combinations"], learnt["quantizer"], learnt["model"])]
        cells += [f"{test['l1']:.4f}", f"{test['psnr']:.2f}", f"{test['used_codes']:,}"]
        cells += [f"{test['perplexity']:.1f}", *(agreement_cell(getattr(report, name)) for name in _AGREEMENTS)]
        lines.append(table_row([run["title"], *cells]))
    first = results["runs"][0]
    test, settings = first["evaluation"]["test"], first["settings"]
    digits = _report(first).settings.num_images
    commits = sorted({run["provenance"]["commit"] or "unknown" for run in results["runs"]})
    return "\n".join(lines) + (
        f"\n\nOne training each with seed {settings['seed']}: {settings['steps']:,} steps of "
        f"{settings['batch_size']} images of {settings['data']}, {settings['canvas_size']} px wide. κ [95 % "
        f"bootstrap interval over {digits:,} test digits] (rate of equal indices); the rest over "
        f"{test['images']:,} test images, {test['tokens']:,} tokens. Of a token with several indices the "
        f"combination counts as its code. Commit {', '.join(commits)}; `{results['command']}`.\n"
    )


def family_scatter(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw κ below a token against PSNR; a quantizer whose κ is undefined is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.4), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        agreement, test = _report(run).sub_stride, run["evaluation"]["test"]
        if not agreement.kappa_defined:
            continue
        label = f"{run['title']} ({test['used_codes']} codes used)"
        draw_agreement(axes, test["psnr"], agreement, index, label)
    axes.set(
        xlabel="PSNR of reconstructions of test images, dB (more is better)",
        ylabel="κ of indices after shifts below a token",
    )
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Quantizers trained alike, one seed each")
    return figure


def _report(run: Mapping[str, Any]) -> EquivarianceReport:
    return EquivarianceReport.from_dict(run["evaluation"]["equivariance"])
