"""One table over several presets that differ in one thing each: where does the penalty help?

Reads the ``results.json`` of each preset's published report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.te_vqgan.reports.document import Table, to_markdown
from examples.te_vqgan.reports.generation.tables import counted, full_size, mean, quadrants, read_right
from examples.te_vqgan.reports.results import read_results
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import write_text_atomically
from examples.te_vqgan.stage1.presets import ARMS, DEFAULT_ARMS
from examples.te_vqgan.stage2.rules import rule_title
from te_quant import EquivarianceReport

__all__ = ["regimes", "write_regimes"]

_SHOWN = {"text_to_image": ("paper", "tenth", "2"), "image_to_text": ("paper", "tenth")}
# Columns before those of the rules.
_MEASURED = 6
_HEADER = [
    "preset",
    "tokenizer",
    "tokens",
    "codes used",
    "below a token: κ",
    "read in reconstructions",
    *(f"text to image, {rule_title(rule, 'text_to_image')}" for rule in _SHOWN["text_to_image"]),
    *(f"image to text, {rule_title(rule, 'image_to_text')}" for rule in _SHOWN["image_to_text"]),
]


def write_regimes(folders: Sequence[Path], path: Path) -> None:
    """Write the table of the reports in ``folders``, each named as its preset, to ``path``.

    Raises:
        ValueError: a folder has no ``results.json`` with a measured Stage 2.
    """
    for folder in folders:
        require((folder / "results.json").is_file(), "results", "folders with results.json", str(folder))
    results = {folder.resolve().name: read_results(folder / "results.json") for folder in folders}
    write_text_atomically(path, to_markdown([regimes(results)]))


def regimes(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for VQGAN and one for TE-VQGAN of each preset; means over seeds, deviations in brackets.

    Rules of decoding that no result has take no column.
    """
    rows: list[list[str]] = []
    for preset, one in results.items():
        images = full_size(one)
        if images is None:
            raise ValueError("results must hold a measured Stage 2, got none.")
        for arm in DEFAULT_ARMS:
            runs = [run for run in one["runs"] if run["arm"] == arm]
            if runs:
                rows.append([f"`{preset}`", *_cells(arm, runs, str(images))])
    kept = [n for n in range(len(_HEADER)) if n < _MEASURED or any(row[n] != mean([]) for row in rows)]
    return Table([_HEADER[n] for n in kept], [[row[n] for n in kept] for row in rows])


def _cells(arm: str, runs: Sequence[Mapping[str, Any]], images: str) -> list[str]:
    # A tokenizer may stand here before its GPT is trained.
    measured = [run["stage2"][images] for run in runs if images in run.get("stage2", {})]
    reports = [EquivarianceReport.from_dict(run["evaluation"]["equivariance"]) for run in runs]
    kappas = [report.sub_stride.kappa for report in reports if report.sub_stride is not None]
    test = [run["evaluation"]["test"] for run in runs]
    return [
        f"{ARMS[arm].title}{counted(runs)}",
        f"{test[0]['tokens'] // test[0]['images']}",
        mean([one["used_codes"] for one in test], ".0f"),
        mean(kappas),
        mean([read_right(run, "reconstruction") for run in runs if "reading" in run]),
        *(
            mean([quadrants(part["rules"][rule], task) for part in measured if rule in part.get("rules", {})])
            for task, rules in _SHOWN.items()
            for rule in rules
        ),
    ]
