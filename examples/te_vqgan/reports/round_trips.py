"""What it costs that tokenizers read back their own pictures: ``round-trips.json``, two tables and a picture."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.reports.results import mean_and_deviation
from examples.te_vqgan.runs.checks import require, require_int
from examples.te_vqgan.runs.files import read_json_object, write_bytes_atomically, write_text_atomically
from examples.te_vqgan.runs.provenance import git_commit, versions
from examples.te_vqgan.stage1.evaluation import dataset
from examples.te_vqgan.stage1.exactness import finished_settings
from examples.te_vqgan.stage1.presets import ARMS, present_form, to_dict
from examples.te_vqgan.stage1.round_trip import measure_round_trips
from examples.te_vqgan.stage1.token_search import PENALTIES, search_tokens
from te_quant import VQAutoencoder, measure_equivariance
from te_quant.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MATCH", "MOST_LOST", "measure_run", "render", "require_alike", "run_name", "write_round_trips"]

MATCH, MOST_LOST = 0.99, 0.3
"""What was aimed at: this share of the tokens comes back, and at most so many dB of PSNR are lost."""

_FILE = "round-trips.json"
_CYCLES = 4
# Images that are shifted to see whether the search is equivariant: each shift is another search.
_SHIFTED = 4
_HEADER = [
    "weight",
    "seeds",
    "tokens that come back",
    "…on the digits",
    "…from a second reading",
    "images whole",
    "PSNR, dB",
    "lost, dB",
    "codes used",
    "perplexity",
    "κ, whole tokens",
    "κ, below a token",
]

_SEARCH_HEADER = [
    "weight",
    "seeds",
    "tokens that come back",
    "…on the digits",
    "images whole",
    "PSNR, dB",
    "gained, dB",
    "lost, dB",
    "codes used",
    "perplexity",
    "κ, whole tokens",
    "κ, below a token",
    "CPU seconds per image",
]

Run = Mapping[str, Any]


def measure_run(folder: Path, source: DigitSource, count: int, searched: int = 0) -> dict[str, Any]:
    """Return the numbers of the finished ``stage1`` run in ``folder``.

    Args:
        folder: of the run.
        source: the digits of its settings.
        count: test images for the round trips; everything else was measured when the run ended.
        searched: the first so many of them are also encoded by search.

    Raises:
        ValueError: the run is not finished, or there are fewer test images.
    """
    settings = finished_settings(folder)
    require_int("images", count, 1)
    require_int("search-images", searched, 0)
    images = dataset(settings, source, "test")
    most = max(count, searched)
    require(most <= len(images), "images", f"at most the {len(images):,} test images", most)
    model = VQAutoencoder.from_pretrained(folder / "model", dtype=torch.float32)
    evaluation = read_json_object(folder / "evaluation.json")
    equivariance = evaluation["equivariance"]
    provenance = read_json_object(folder / "provenance.json")
    search: dict[str, Any] = {}
    if searched:
        search["encoder"] = measure_round_trips(model, images, searched, torch.device("cpu"), cycles=1)
        # What the search gains is compared with the encoder of a training without the loss.
        if settings.round_trip_weight > 0:
            search["search"] = _measure_search(model, images, searched)
    return {
        **search,
        **_what_was_trained(folder),
        "round_trip": measure_round_trips(model, images, count, torch.device("cpu"), cycles=_CYCLES),
        "test": evaluation["test"],
        "kappa": {name: equivariance[name]["kappa"] for name in ("aligned", "sub_stride")},
        "seconds": provenance["training"]["wall_seconds"],
        "commit": provenance["commit"],
    }


def _what_was_trained(folder: Path) -> dict[str, Any]:
    return {"arm": folder.name.rsplit("-seed", 1)[0], "settings": to_dict(finished_settings(folder))}


def run_name(folder: Path) -> str:
    """Return what ``round-trips.json`` calls the run in ``folder``."""
    return f"{folder.resolve().parent.name}/{folder.name}"


def require_alike(folders: Sequence[Path], into: Path, count: int, searched: int = 0) -> None:
    """Say before anything is measured whether :func:`write_round_trips` would refuse it.

    Args:
        folders: of the runs.
        into: where their results will be added.
        count: images of the round trips.
        searched: images that are also encoded by search.

    Raises:
        ValueError: the runs differ in more than seed and weight, are not measured in the same way as those in
            ``into``, or one of them is not finished.
    """
    runs = _present(into)
    for folder in folders:
        planned = {**_what_was_trained(folder), "round_trip": {"images": count}}
        if searched:
            planned["encoder"] = {"images": searched}
            if planned["settings"]["round_trip_weight"] > 0:
                planned["search"] = {"images": searched, "penalties": list(PENALTIES)}
        runs[run_name(folder)] = planned
        _require_alike(list(runs.values()))


def _measure_search(model: VQAutoencoder, images: QuadrantDataset, count: int) -> dict[str, Any]:
    """Return what :func:`~.round_trip.measure_round_trips` says of the search, κ and time."""
    device = torch.device("cpu")
    begin = time.process_time()
    found = measure_round_trips(model, images, count, device, cycles=1, first=search_tokens)
    seconds = (time.process_time() - begin) / count
    stride = model.config.stride
    report = measure_equivariance(
        lambda pictures: search_tokens(model, pictures).indices,
        images.fixed(0, _SHIFTED),
        stride=stride,
        num_codes=model.config.num_codes,
        protocol="circular",
        shifts=[(stride, 0), (2 * stride, 3 * stride)],
        sub_stride_shifts=[(0, 1), (1, 3), (2, 2)],
        progress=False,
    ).to_dict()
    return {
        **found,
        "kappa": {name: report[name]["kappa"] for name in ("aligned", "sub_stride")},
        "shifted": _SHIFTED,
        "cpu_seconds_per_image": seconds,
        "penalties": list(PENALTIES),
    }


def write_round_trips(folder: Path, runs: Mapping[str, Run], *, command: str) -> None:
    """Add runs to those in ``folder``, and write everything that :func:`render` makes of them.

    Args:
        folder: where; a run of the same name is replaced.
        runs: by name.
        command: what was typed, for the record.

    Raises:
        ValueError: they differ from each other, or from those in ``folder``, in more than seed and weight. Nothing
            is written then.
    """
    facts = {"command": command, "measured_at": git_commit(), "versions": versions()}
    after = _present(folder) | {name: {**run, **facts} for name, run in runs.items()}
    _require_alike(list(after.values()))
    write_text_atomically(folder / _FILE, json.dumps({"runs": dict(sorted(after.items()))}, indent=1) + "\n")
    render(folder)


def render(folder: Path) -> None:
    """Write ``round-trips.md``, ``round-trips.png`` and, if tokens were searched, ``search.md`` from the data.

    Raises:
        ValueError: there are none, they differ in more than seed and weight, or were not measured in the same
            way.
    """
    path = folder / _FILE
    require(path.is_file(), "into", f"a folder with {_FILE}", folder)
    runs = list(read_json_object(path)["runs"].values())
    _require_alike(runs)
    write_text_atomically(folder / "round-trips.md", _table(runs))
    if any("search" in run for run in runs):
        write_text_atomically(folder / "search.md", _search_table(runs))
    else:
        (folder / "search.md").unlink(missing_ok=True)
    write_bytes_atomically(folder / "round-trips.png", encode_png(_figure(runs), dpi=110))


def _present(folder: Path) -> dict[str, Any]:
    path = folder / _FILE
    return dict(read_json_object(path)["runs"]) if path.is_file() else {}


def _require_alike(runs: Sequence[Run]) -> None:
    apart = ("seed", "round_trip_weight")
    kinds = {
        json.dumps([run["arm"], {k: v for k, v in present_form(run["settings"]).items() if k not in apart}])
        for run in runs
    }
    expected = "of one arm, with settings that differ in seed and weight only"
    require(len(kinds) == 1, "runs", expected, f"{len(kinds)} kinds; give others another --into")
    # Rows of one table stand for the same images and, if any were searched, the same search.
    measured: dict[str, set[str]] = {}
    for run in runs:
        measured.setdefault("images", set()).add(str(run["round_trip"]["images"]))
        for name in ("encoder", "search"):
            if name in run:
                measured.setdefault("search-images", set()).add(str(run[name]["images"]))
        if "search" in run:
            measured.setdefault("penalties", set()).add(str(run["search"]["penalties"]))
    for name, values in measured.items():
        require(len(values) == 1, name, "the same for all runs in --into", " and ".join(sorted(values)))


def _by_weight(runs: Sequence[Run]) -> dict[float, list[Run]]:
    weights = sorted({run["settings"]["round_trip_weight"] for run in runs})
    return {weight: [run for run in runs if run["settings"]["round_trip_weight"] == weight] for weight in weights}


def _without_loss(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run of the same seed that was trained with weight 0."""
    seed = run["settings"]["seed"]
    without = (other for other in runs if other["settings"]["round_trip_weight"] == 0)
    return next((other for other in without if other["settings"]["seed"] == seed), None)


def _lost(run: Run, runs: Sequence[Run]) -> float | None:
    """Return the PSNR that a run loses against that of its seed without the loss."""
    other = _without_loss(run, runs)
    return None if other is None else float(other["test"]["psnr"] - run["test"]["psnr"])


def _table(runs: Sequence[Run]) -> str:
    rows = []
    for weight, group in _by_weight(runs).items():
        trips = [run["round_trip"] for run in group]
        lost = [value for run in group if (value := _lost(run, runs)) is not None]
        columns = [
            ([trip["match"][0] for trip in trips], ".3f"),
            ([trip["ink"] for trip in trips], ".3f"),
            ([trip["match"][1] for trip in trips], ".3f"),
            ([trip["whole"] for trip in trips], ".3f"),
            ([run["test"]["psnr"] for run in group], ".2f"),
            (lost, ".2f"),
            ([run["test"]["used_codes"] for run in group], ".0f"),
            ([run["test"]["perplexity"] for run in group], ".1f"),
            ([run["kappa"]["aligned"] for run in group], ".3f"),
            ([run["kappa"]["sub_stride"] for run in group], ".3f"),
        ]
        seeds = ", ".join(str(run["settings"]["seed"]) for run in group)
        cells = [mean_and_deviation(values, pattern) if values else "" for values, pattern in columns]
        rows.append([f"{weight:g}", seeds, *cells])
    first = runs[0]
    settings, trip = first["settings"], first["round_trip"]
    note = (
        f"{ARMS[first['arm']].title}: {settings['steps']:,} steps of {settings['batch_size']} images of "
        f"{settings['data']}, {settings['canvas_size']} px wide. Means ± standard deviations over seeds. "
        f"Round trips over {trip['images']:,} test images, PSNR and codes over {first['test']['images']:,}. "
        f"What is lost is the difference to the training of the same seed with weight 0. The figure shows "
        f"the PSNR of the images of the round trips, rounded to 8 bits, so it differs slightly."
    )
    return Table(_HEADER, rows, note=note).to_markdown()


def _search_table(everything: Sequence[Run]) -> str:
    runs = [run for run in everything if "search" in run]
    rows = []
    for weight, group in _by_weight(runs).items():
        found = [run["search"] for run in group]
        lost = [value for run in group if (value := _lost_by_search(run, everything)) is not None]
        columns = [
            ([search["match"][0] for search in found], ".3f"),
            ([search["ink"] for search in found], ".3f"),
            ([search["whole"] for search in found], ".3f"),
            ([search["psnr"][0] for search in found], ".2f"),
            ([run["search"]["psnr"][0] - run["encoder"]["psnr"][0] for run in group], ".2f"),
            (lost, ".2f"),
            ([search["used_codes"] for search in found], ".0f"),
            ([search["perplexity"] for search in found], ".1f"),
            ([search["kappa"]["aligned"] for search in found], ".3f"),
            ([search["kappa"]["sub_stride"] for search in found], ".3f"),
            ([search["cpu_seconds_per_image"] for search in found], ".1f"),
        ]
        seeds = ", ".join(str(run["settings"]["seed"]) for run in group)
        cells = [mean_and_deviation(values, pattern) if values else "" for values, pattern in columns]
        rows.append([f"{weight:g}", seeds, *cells])
    first = runs[0]["search"]
    note = (
        f"The first {first['images']:,} test images; κ of {first['shifted']} of them under circular shifts. Means "
        f"± standard deviations over seeds. Gained: against the encoder of the same tokenizer. Lost: against the "
        f"encoder of the tokenizer of the same seed that was trained with weight 0, over the same images."
    )
    return Table(_SEARCH_HEADER, rows, note=note).to_markdown()


def _lost_by_search(run: Run, runs: Sequence[Run]) -> float | None:
    other = _without_loss(run, runs)
    if other is None or "encoder" not in other:
        return None
    return float(other["encoder"]["psnr"][0] - run["search"]["psnr"][0])


def _figure(runs: Sequence[Run]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    without = [run["round_trip"]["psnr"][0] for run in runs if run["settings"]["round_trip_weight"] == 0]
    if without:
        axes.axvspan(statistics.fmean(without) - MOST_LOST, max(without) + 0.1, color="tab:green", alpha=0.08)
        axes.axhspan(MATCH, 1.0, color="tab:green", alpha=0.08)
    searched = False
    for number, (weight, group) in enumerate(_by_weight(runs).items()):
        color = f"C{number}"
        for place, run in enumerate(group):
            trip = run["round_trip"]
            axes.plot(trip["psnr"], trip["match"], color=color, lw=0.8, alpha=0.6, marker=".", ms=4)
            label = f"weight {weight:g}" if place == 0 else None
            axes.plot(trip["psnr"][0], trip["match"][0], color=color, marker="o", ms=7, ls="", label=label)
            if "search" in run and without and (lost := _lost_by_search(run, runs)) is not None:
                label = "by search" if not searched else None
                searched = True
                axes.plot(
                    statistics.fmean(without) - lost,
                    run["search"]["match"][0],
                    color=color,
                    marker="*",
                    ms=12,
                    ls="",
                    label=label,
                )
    axes.set(
        xlabel="PSNR of 8-bit reconstructions of test images, dB (more is better)",
        ylabel="share of the tokens that come back",
        ylim=(None, 1.015),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    figure.suptitle(
        "Tokens that survive a round trip, against the error of the picture.\n"
        "Large points: the image read once. Small ones: read two, three and four times.\n"
        "Stars: tokens by search, placed by what the pictures of the same images lose.\n"
        "Shaded: what was aimed at, where both bands cross.",
        fontsize="small",
    )
    return figure
