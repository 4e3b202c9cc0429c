"""The report of a comparison: ``report.html``, ``report.md``, PNGs, ``results.json`` and ``samples/``.

``results.json`` and ``samples/`` hold everything that the other files are made of, so that a published report can
be written anew without the runs, and so that runs of several machines can be brought together in one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.sources import CLASS_NAMES, is_pictures
from examples.te_vqgan.reports.document import (
    Block,
    Bullets,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from examples.te_vqgan.reports.figures import draw_curves, draw_placements, draw_reconstructions, draw_shifts
from examples.te_vqgan.reports.findings import findings
from examples.te_vqgan.reports.generation.report import generation_blocks, generation_figures, generation_tables
from examples.te_vqgan.reports.generation.tables import full_size, generations, shown_rule
from examples.te_vqgan.reports.pictures import picture_samples, render_pictures
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.reports.results import (
    METRICS,
    by_arm,
    cell,
    collect,
    commands,
    merged,
    read_results,
    tell_unfinished,
    to_text,
)
from examples.te_vqgan.reports.samples import Stored, load_run_samples, load_samples
from examples.te_vqgan.reports.trial import trial_size
from examples.te_vqgan.runs.checkpoint import save_checkpoint
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import write_bytes_atomically, write_text_atomically
from examples.te_vqgan.stage2.rules import HEADLINE
from te_quant import EquivarianceReport
from te_quant.equivariance import plot_reports

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["render", "rendered", "write_report"]

# Pictures that show images, whose colours are kept.
_PHOTOGRAPHS = ("reconstructions.png", "generated.png", "captions.png")
# Arms that a title names.
_FEW_ARMS = 4
_RESULTS, _TEXT = "results.json", "report.md"
# Only one rule keeps pictures; runs that the first version measured have its own.
_PICTURES = {HEADLINE: "rule-paper.safetensors", "tenth": "generation.safetensors"}
_CAPTIONS = {
    "token_grids.png": "One test digit at the centre and in the four quadrants, and the index of the code at "
    "every token. Equal numbers and colours within an arm are equal codes; outlined is the block of tokens that "
    "the digit covers. This is the paper's Fig. 1. All moves are whole tokens, so aliasing cannot show here.",
    "token_shifts.png": "The same digit moved right pixel by pixel, up to one whole token. Moves below a token "
    "are where aliasing shows.",
    "reconstructions.png": "Test images, and what each arm makes of their tokens.",
    "loss_curves.png": "Training: reconstruction error, codebook loss, code use, and how far the codes are from "
    "orthogonal, over the steps.",
    "equivariance.png": "All agreements with their κ, and the agreement by sub-stride shift; of each arm "
    "the first seed (the table has all).",
}


def write_report(out: Path, *, command: str, wall_seconds: float | None = None, into: Path | None = None) -> Path:
    """Gather the finished runs below ``out`` and write the report.

    Args:
        out: the folder of a preset.
        command: what was typed to get the results.
        wall_seconds: how long that took, if it did everything.
        into: folder of the report, ``out/report`` by default. The runs of a report that is there already stay, but
            for those that are in ``out`` too. A report of digits that has only ``results.json`` gets nothing else.

    Returns:
        The folder of the report.

    Raises:
        ValueError: no run is finished, samples are missing or damaged, or as :func:`~.reports.results.collect` and
            :func:`~.reports.results.merged`. Nothing is written then.
    """
    tell_unfinished(out, CLASS_NAMES)
    collected = collect(out, command=command, wall_seconds=wall_seconds)
    folder = out / "report" if into is None else into
    path = folder / _RESULTS
    results = collected
    if into is not None and path.is_file():
        results = merged(read_results(path), collected)
        bare = not (folder / _TEXT).exists() and not (folder / "samples").exists()
        if bare and not _of_pictures(results):
            write_text_atomically(path, to_text(results))
            return folder
    # All is read and drawn before the first file is written, so that what cannot be shown leaves the old report.
    if _of_pictures(results):
        fresh = picture_samples(results, collected, out, folder)
    else:
        fresh = {**_first_samples(results, collected, out), **_generated(results, collected, out)}
    stored = _stored(results, folder, fresh)
    files = rendered(results, stored)
    for name, (tensors, facts) in fresh.items():
        save_checkpoint(folder / name, tensors, facts)
    write_text_atomically(path, to_text(results))
    _write(folder, files)
    return folder


def render(folder: Path) -> None:
    """Write everything in ``folder`` that follows from its ``results.json`` and ``samples/``.

    Raises:
        ValueError: there is no ``results.json``, or samples that it names are missing or damaged.
    """
    path = folder / _RESULTS
    require(path.is_file(), "results", "a folder with results.json", str(folder))
    results = read_results(path)
    _write(folder, rendered(results, _stored(results, folder, {})))


def rendered(results: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, bytes]:
    """Return the files of a report, by name, that follow from its results and the files of samples named there."""
    arrays = {
        name: {key: np.asarray(tensor) for key, tensor in tensors.items()} for name, (tensors, _) in stored.items()
    }
    if _of_pictures(results):
        return render_pictures(results, arrays[results["samples"]])
    samples = {title: arrays[name] for title, name in results["samples"].items()}
    generated = {arm: arrays[name] for arm, name in results.get("generated", {}).items()}
    figures = _figures(results, samples) | generation_figures(results, generated)
    pictures = {name: encode_png(figure, photographs=name in _PHOTOGRAPHS) for name, figure in figures.items()}
    blocks = _blocks(results)
    texts = {_TEXT: to_markdown(blocks), "report.html": to_html(blocks, pictures, _title(results))}
    if full_size(results) is not None:
        texts |= {f"{name}.md": to_markdown([table]) for name, table in generation_tables(results).items()}
    return {**pictures, **{name: text.encode() for name, text in texts.items()}}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_bytes_atomically(folder / name, content)


def _of_pictures(results: Mapping[str, Any]) -> bool:
    return is_pictures(results["runs"][0]["settings"]["data"])


def _stored(results: Mapping[str, Any], folder: Path, fresh: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the files of samples that ``results`` names: those that are ``fresh``, the others from ``folder``."""
    samples = results["samples"]
    names = [samples] if isinstance(samples, str) else [*samples.values(), *results.get("generated", {}).values()]
    return {name: fresh[name] if name in fresh else load_samples(folder / name) for name in names}


def _first_samples(results: dict[str, Any], collected: Mapping[str, Any], out: Path) -> dict[str, Stored]:
    """Read the samples of each arm's first seed, if it is among those in ``out``, and name those of all arms."""
    here = {(run["arm"], run["seed"]) for run in collected["runs"]}
    before, fresh = results.get("samples", {}), {}
    results["samples"] = {}
    for title, (first, *_) in by_arm(results["runs"]).items():
        name = results["samples"][title] = before.get(title, f"samples/{first['arm']}.safetensors")
        if (first["arm"], first["seed"]) in here:
            fresh[name] = load_run_samples(out / first["folder"])
    return fresh


def _generated(results: dict[str, Any], collected: Mapping[str, Any], out: Path) -> dict[str, Stored]:
    """Read what each arm's first seed generated, if it is among those in ``out``, and note the captions of all.

    Only evaluations under the headline rule keep pictures; an arm measured only under other rules has none.
    """
    images = full_size(results)
    if images is None:
        return {}
    rule = shown_rule(results)
    here = {(arm, run["seed"]) for arm, runs in generations(collected, images, rule).items() for run in runs}
    arms = generations(results, images, rule)
    firsts = {arm: runs[0] for arm, runs in arms.items() if (arm, runs[0]["seed"]) in here}
    inner = {arm: out / run["folder"] / f"stage2-{images}" for arm, run in firsts.items()}
    # Of one rule for all arms, the one that the tables show if it has pictures.
    by_rule = (
        {arm: path / _PICTURES[name] for arm, path in inner.items() if (path / _PICTURES[name]).is_file()}
        for name in sorted(_PICTURES, key=lambda name: name != rule)
    )
    names = {arm: name for arm, name in results.get("generated", {}).items() if arm in arms}
    fresh = {}
    for arm, source in next(filter(None, by_rule), {}).items():
        names[arm] = f"samples/{arm}-generated.safetensors"
        tensors, texts = load_samples(source, cure="restore it, or give `evaluate` again")
        # Figures show held-out combinations; the archive of a release has the seen ones.
        shown = {name: tensor for name, tensor in tensors.items() if not name.startswith("seen.")}
        fresh[names[arm]] = (shown, texts)
        results["captions"] = {split: part["captions"] for split, part in texts.items()}
    results["generated"] = names
    return fresh


def _listed(names: Iterable[str]) -> str:
    """Write "a", "a and b" or "a; b; c": a title may hold a comma."""
    known = list(names)
    return " and ".join(known) if len(known) < 3 else "; ".join(known)


def _figures(results: Mapping[str, Any], samples: Mapping[str, dict[str, NDArray[Any]]]) -> dict[str, Figure]:
    groups = by_arm(results["runs"])
    notes = {title: f"L1 {cell(METRICS['l1'], runs)} on test" for title, runs in groups.items()}
    reports = {
        f"{title}, seed {run['seed']}" if several else title: EquivarianceReport.from_dict(
            run["evaluation"]["equivariance"]
        )
        for title, (run, *several) in groups.items()
    }
    return {
        "token_grids.png": draw_placements(samples),
        "token_shifts.png": draw_shifts(samples),
        "reconstructions.png": draw_reconstructions(samples, notes),
        "loss_curves.png": draw_curves({title: [run["log"] for run in runs] for title, runs in groups.items()}),
        "equivariance.png": plot_reports(reports),
    }


def _blocks(results: Mapping[str, Any]) -> list[Block]:
    groups = by_arm(results["runs"])
    first = results["runs"][0]
    settings, measured = first["settings"], first["evaluation"]
    conditions = EquivarianceReport.from_dict(measured["equivariance"]).settings
    header = ["", *groups]
    rows = [[metric.label, *(cell(metric, runs) for runs in groups.values())] for metric in METRICS.values()]
    model = settings["model"]
    grid = settings["canvas_size"] // conditions.stride
    seeds = sorted({run["seed"] for run in results["runs"]})
    pictures: list[Block] = [Picture(name, caption) for name, caption in _CAPTIONS.items()]
    trial = trial_size(run["settings"] for run in results["runs"])
    warning = [] if trial is None else [Paragraph(_meaningless(trial))]
    return [
        Heading(1, _title(results)),
        *warning,
        Paragraph(
            f"{_listed(groups)}: {_budget(results)}, on pictures of one to four "
            f"digits (`{settings['data']}`), {settings['canvas_size']}x{settings['canvas_size']} pixels, and "
            f"measured on digits that training never saw. Stride {conditions.stride}, so {grid}x{grid} tokens; "
            f"K = {model['num_codes']} codes of size C = {model['code_dim']}."
        ),
        Heading(2, "What came out"),
        *([] if trial else [Bullets(findings(results))]),
        Table(header, rows),
        Paragraph(
            f"Reconstruction and code use over {measured['test']['images']:,} test images "
            f"({measured['test']['tokens']:,} tokens); agreements over {conditions.num_images:,} single test "
            f"digits. An agreement is a share of equal indices; in brackets is Cohen's κ, which is 0 where the "
            f"agreement is what chance gives with the same code use. The placement metric moves a digit only "
            f"by whole tokens. Shifts below a token are measured at the best whole-token alignment of each "
            f"image, and against the quantized Fourier-shifted latents. “Used at least once” grows with the "
            f"number of tokens; perplexity and codes above 0.1 % hardly do."
        ),
        *generation_blocks(results),
        Heading(2, "Pictures"),
        *pictures,
        Heading(2, "How it was made"),
        Paragraph(_commands(results) + _took(results["wall_seconds"])),
        _runs_table(results),
        Paragraph(_provenance(results["runs"]) + f" Seeds: {', '.join(map(str, seeds))}."),
        Paragraph("Settings of each arm that differ from the first arm's:"),
        Bullets(_differences(groups)),
        Paragraph("All settings of the first arm: `" + json.dumps(_of_effect(settings), sort_keys=True) + "`"),
    ]


def _meaningless(size: str) -> str:
    return (
        f"The numbers in this report mean nothing: it is a trial of {size}. It shows that every step of the "
        "pipeline runs, and no findings are drawn from it."
    )


def _runs_table(results: Mapping[str, Any]) -> Table:
    rows = []
    for run in results["runs"]:
        facts = run["provenance"]
        training, everything = facts["training"], facts["training_and_evaluation"]
        rows.append(
            [
                f"{run['title']}, seed {run['seed']}",
                f"{run['settings']['steps']:,}",
                f"{training['wall_seconds']:.0f}",
                f"{training['cpu_seconds']:.0f}",
                f"{everything['wall_seconds'] - training['wall_seconds']:.0f}",
                str(facts["threads"]),
                facts["device"],
            ]
        )
    header = ["run", "steps", "training, s", "…CPU seconds", "evaluation, s", "threads", "device"]
    return Table(header, rows)


def _provenance(runs: Sequence[Mapping[str, Any]]) -> str:
    """Name all versions and commits of the trainings of both stages."""
    facts = [part["provenance"] for run in runs for part in (run, *run.get("stage2", {}).values())]
    versions = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in one["versions"].items() if value is not None)
        for one in facts
    )
    commits = dict.fromkeys(
        f"commit `{one['commit']}`" if one["commit"] else "no git commit known" for one in facts
    )
    return f"Versions: {'; or '.join(versions)}; {', '.join(commits)}."


def _differences(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    (base, first), *others = ((title, _flat(runs[0]["settings"])) for title, runs in groups.items())
    lines = [f"{base}: the first arm."]
    for title, settings in others:
        changes = [
            f"`{name}` = {settings[name]} (not {first[name]})" for name in first if settings[name] != first[name]
        ]
        lines.append(f"{title}: {', '.join(changes) or 'none'}.")
    return lines


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    model = {f"model.{name}": value for name, value in settings["model"].items()}
    return {**{name: value for name, value in settings.items() if name not in ("model", "seed")}, **model}


def _of_effect(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what digits do not have, and what parts would be like that a training does without."""
    without = ["max_reduction"]
    if settings["round_trip_weight"] == 0:
        without += [name for name in settings if name.startswith("round_trip_")]
    if settings["adversarial_weight"] == 0:
        without += ["adversarial_delta", *(name for name in settings if name.startswith("discriminator_"))]
    return {name: value for name, value in settings.items() if name not in without}


def _title(results: Mapping[str, Any]) -> str:
    arms = list(by_arm(results["runs"]))
    shown = _listed(arms) if len(arms) <= _FEW_ARMS else f"{len(arms)} tokenizers"
    return f"{shown} on {results['runs'][0]['settings']['data']}"


def _budget(results: Mapping[str, Any]) -> str:
    groups = by_arm(results["runs"])
    budgets = {(run["settings"]["steps"], run["settings"]["batch_size"]) for run in results["runs"]}
    seeds = {tuple(run["seed"] for run in runs) for runs in groups.values()}
    if len(budgets) > 1 or len(seeds) > 1:
        return "trained with budgets or seeds that differ, see below"
    steps, size = budgets.pop()
    return f"trained with equal seeds and budget ({steps:,} steps of {size} images)"


def _commands(results: Mapping[str, Any]) -> str:
    typed = commands(results)
    return f"Command{'s' if len(typed) > 1 else ''}: " + ", ".join(f"`{command}`" for command in typed)


def _took(seconds: float | None) -> str:
    return "" if seconds is None else f" ({seconds:.0f} s of wall time for everything)"
