"""Agreements beside code use and reconstruction error, a row an arm and a row a run; a plot; counts of exactness.

Reads the ``results.json`` that ``report`` wrote, so that a published comparison can be written again from the data
only. Several of them become one, of runs under equal conditions.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.te_vqgan.data.sources import is_pictures
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.reports.results import (
    by_arm,
    commands,
    mean_and_deviation,
    merged,
    named,
    read_results,
    to_text,
)
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import read_json_object, write_bytes_atomically, write_text_atomically
from te_quant import EquivarianceReport
from te_quant.equivariance import Agreement, comparison_table
from te_quant.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "agreement_cell",
    "comparison",
    "draw_agreement",
    "exactness",
    "gather",
    "scatter",
    "write_comparison",
]

_AGREEMENTS = {
    "placement": "placement (the paper's)",
    "aligned": "whole tokens",
    "sub_stride": "below a token",
    "sub_stride_foreground": "below a token, only ink",
}
_DISTINCT = {"distinct_images": "distinct images", "distinct_pairs": "distinct (image, shift) pairs"}
# What a comparison of several folders keeps of a run, and what must be equal.
_COMPARED = ("arm", "title", "folder", "settings", "evaluation", "provenance", "seed")
_CONDITIONS = ("data", "canvas_size", "steps", "batch_size", "eval_images", "eval_sprites")
_HEADER = [
    "tokenizer",
    *(f"{label}: κ" for label in _AGREEMENTS.values()),
    "codes > 0.1 %",
    "perplexity",
    "test L1",
    "PSNR, dB",
]


def gather(folders: Sequence[Path], arms: Sequence[str], into: Path, *, command: str) -> None:
    """Write a ``results.json`` of selected tokenizers of several folders, with the fields that a comparison needs.

    Args:
        folders: each with a ``results.json``. If several hold the same run, the last one wins.
        arms: keys of :data:`~.stage1.presets.ARMS`; the order of the runs.
        into: folder to write to.
        command: the command line, for the record.

    Raises:
        ValueError: a folder has no ``results.json``, or one without arms; an arm is in none of them, or named
            twice; or the runs are of different data or of pictures, trained for different numbers of steps, or
            measured on different numbers of images. Nothing is written then.
    """
    repeated = sorted({arm for arm in arms if arms.count(arm) > 1})
    require(not repeated, "arms", "different ones", f"several times {repeated}")
    found = [_of_arms(folder) for folder in folders]
    runs = functools.reduce(merged, found)["runs"]
    known = sorted({run["arm"] for run in runs})
    kept = []
    for arm in arms:
        own = [{name: run[name] for name in _COMPARED} for run in runs if run["arm"] == arm]
        require(bool(own), "arms", f"some of {known}, which the results have", repr(arm))
        kept += own
    conditions = [{name: run["settings"][name] for name in _CONDITIONS} for run in kept]
    for one in conditions:
        require(one == conditions[0], "results", f"runs under equal conditions, {conditions[0]}", str(one))
    typed = dict.fromkeys([*(line for one in found for line in commands(one)), command])
    write_text_atomically(into / "results.json", to_text({"commands": list(typed), "runs": kept}))


def _of_arms(folder: Path) -> dict[str, Any]:
    """Read a report of digits."""
    path = _results(folder)
    plain = read_json_object(path)
    ours = all("arm" in run for run in plain.get("runs", [{}]))
    require(ours, "results", "reports of arms, as `report` writes them", f"{path}, which has none")
    results = read_results(path)
    _require_digits(results["runs"], path)
    return results


def _require_digits(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    data = runs[0].get("settings", {}).get("data", "")
    expected = "a folder with results of digits; the report of pictures holds its comparison"
    require(not is_pictures(data), "results", expected, f"{data!r} in {path}")


def write_comparison(folder: Path) -> None:
    """Write ``comparison.md`` and ``.png``, ``metrics.md`` and, if it was counted, ``exactness.md``.

    Raises:
        ValueError: there is no ``results.json``.
    """
    path = _results(folder)
    runs = read_results(path)["runs"]
    _require_digits(runs, path)
    write_text_atomically(folder / "comparison.md", comparison(runs))
    reports = {_name(run, runs): _report(run) for run in runs}
    write_text_atomically(folder / "metrics.md", comparison_table(reports).to_markdown())
    counted = [run for run in runs if "exactness" in run]
    if counted:
        write_text_atomically(folder / "exactness.md", exactness(counted))
    write_bytes_atomically(folder / "comparison.png", encode_png(scatter(runs), dpi=110))


def _results(folder: Path) -> Path:
    path = folder / "results.json"
    require(path.is_file(), "results", "a folder with results.json", str(folder))
    return path


def comparison(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a row an arm in Markdown, and one with a row a run where an arm has several."""
    test, conditions = runs[0]["evaluation"]["test"], _report(runs[0]).settings
    measured = (
        f"{conditions.num_images:,} test digits; code use and reconstruction over {test['images']:,} test images, "
        f"{test['tokens']:,} tokens.\n"
    )
    each = _comparison_table([(_name(run, runs), [run]) for run in runs])
    each += f"\n\nκ [95 % bootstrap interval over images] (rate of equal indices), {measured}"
    arms = by_arm(runs)
    if len(arms) == len(runs):
        return each
    most = max(map(len, arms.values()))
    table = _comparison_table([(named(title, len(group), most), group) for title, group in arms.items()])
    means = "Means over seeds ± standard deviation between them, intervals as below where there is one seed: "
    means += "κ (rate of equal indices), "
    return f"{table}\n\n{means}{measured}\n{each}"


def _comparison_table(rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Write a row for each name and its runs."""
    lines = []
    for name, runs in rows:
        tests = [run["evaluation"]["test"] for run in runs]
        reports = [_report(run) for run in runs]
        cells = [agreement_cell([getattr(report, metric) for report in reports]) for metric in _AGREEMENTS]
        for key, pattern in (("frequent_codes", ".0f"), ("perplexity", ".1f"), ("l1", ".4f"), ("psnr", ".2f")):
            cells.append(mean_and_deviation([test[key] for test in tests], pattern))
        lines.append([name, *cells])
    return Table(_HEADER, lines).to_markdown().rstrip()


def exactness(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the counts of indices that differ after circular shifts in Markdown."""
    header = ["tokenizer", "shifts", "precision", "indices compared", "differing", *_DISTINCT.values()]
    lines = []
    for run in runs:
        # One seed of each is counted, so the row says which.
        name = f"{run['title']}, seed {run['seed']}"
        for precision, count in run["exactness"]["counts"].items():
            numbers = [f"{count['compared']:,}", f"{count['differing']:,}"]
            # Counts of before comparisons were kept distinct do not say.
            numbers += [f"{count[name]:,}" if name in count else "not recorded" for name in _DISTINCT]
            lines.append([name, run["exactness"]["shifts"], precision, *numbers])
    return Table(header, lines, "lll" + "r" * (len(header) - 3)).to_markdown()


def scatter(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw κ below a token against reconstruction error and perplexity, one point per run, one colour per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    titles = list(by_arm(runs))
    for run in runs:
        index = titles.index(run["title"])
        agreement, test = _report(run).sub_stride, run["evaluation"]["test"]
        if not agreement.kappa_defined:
            continue
        for axes, x in ((left, test["l1"]), (right, test["perplexity"])):
            draw_agreement(axes, x, agreement, index, run["title"])
    left.set(
        xlabel="reconstruction error L1 on test images (less is better)",
        ylabel="κ of indices after shifts below a token",
        ylim=(0, 1.03),
    )
    right.set(xlabel="perplexity of the code use")
    # One entry an arm, however many seeds it has.
    entries = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("Equivariance against what it costs: agreement counts for little where few codes are in use")
    return figure


def draw_agreement(axes: Axes, x: float, agreement: Agreement, index: int, label: str) -> None:
    """Draw κ with its interval at ``x``, in the colour and with the mark of the ``index``-th of several.

    The interval stands for itself: one of percentiles need not hold the estimate, so it is no error bar.
    """
    style: dict[str, Any] = {"marker": "osD^vP*X"[index % 8], "color": f"C{index % 10}"}
    axes.plot(x, agreement.kappa, linestyle="none", markersize=8, label=label, **style)
    low, high = agreement.kappa_interval
    if not math.isnan(low):
        axes.plot([x, x], [low, high], marker="_", color=style["color"])


def _report(run: Mapping[str, Any]) -> EquivarianceReport:
    return EquivarianceReport.from_dict(run["evaluation"]["equivariance"])


def _name(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    several = len({other["seed"] for other in runs}) > 1
    return f"{run['title']}, seed {run['seed']}" if several else str(run["title"])


def agreement_cell(agreements: Sequence[Agreement | None]) -> str:
    """Write κ [95 % interval] (rate) of one run; of several the means, with the deviation as the interval."""
    known = [agreement for agreement in agreements if agreement is not None]
    if len(known) < len(agreements):
        return "not measured"
    rate = statistics.fmean(agreement.rate for agreement in known)
    if not all(agreement.kappa_defined for agreement in known):
        return f"undefined ({rate:.3f})"
    kappa = mean_and_deviation([agreement.kappa for agreement in known], ".3f")
    if len(known) == 1:
        low, high = known[0].kappa_interval
        kappa += f" [{low:.3f}, {high:.3f}]"
    return f"{kappa} ({rate:.3f})"
