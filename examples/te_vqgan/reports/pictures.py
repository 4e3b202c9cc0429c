"""The report of tokenizers that were trained on pictures of a folder: tables, one figure, one file of samples.

Everything is a function of ``results.json`` and ``samples/pictures.safetensors`` in the report's folder.

Shape letters: A arms, B images, S side of a crop, h w token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.te_vqgan.data.photographs import CATALOGUE, PACKAGES
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
from examples.te_vqgan.reports.figures import code_colors
from examples.te_vqgan.reports.png import encode_png
from examples.te_vqgan.reports.results import by_arm, commands
from examples.te_vqgan.reports.samples import Stored, load_run_samples, load_samples
from examples.te_vqgan.reports.trial import trial_size
from te_quant import EquivarianceReport
from te_quant.equivariance import Agreement, best_token_shift

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_pictures", "picture_findings", "picture_samples", "picture_tables", "render_pictures"]

SAMPLES = "samples/pictures.safetensors"
_FIGURE = "pictures.png"
# By so much fewer effective codes may be what raises an agreement.
_FEWER = 1.25
_COMPARED = (
    ("a window that moves by whole tokens", "equivariance", "aligned"),
    ("a window that moves by less than a token", "equivariance", "sub_stride"),
    ("circular shifts by whole tokens", "equivariance_circular", "aligned"),
    ("circular shifts by less than a token", "equivariance_circular", "sub_stride"),
)
_HIGHER = "higher"
_SHARED = ("images", "moved_images")
# Shown of one crop only.
_OF_ONE = ("moved_images", "tokens", "moved_tokens")
_NONE = "—"


def picture_samples(
    results: dict[str, Any], collected: Mapping[str, Any], out: Path, folder: Path
) -> dict[str, Stored]:
    """Move what the runs share to the top of ``results``, and read the samples of each arm's first seed.

    Args:
        results: of all runs; changed in place. ``pictures`` holds the manifest once, and logs keep the lines that
            have validation numbers.
        collected: the runs in ``out``.
        out: the folder of a preset.
        folder: of the report, whose samples of other runs stay.

    Returns:
        The file of samples, by its name in the folder of the report.

    Raises:
        ValueError: samples are missing or damaged.
    """
    for run in results["runs"]:
        manifest = run["provenance"].pop("pictures", None)
        results["pictures"] = manifest or results.get("pictures", [])
        run["log"] = [line for line in run["log"] if "validation_l1" in line]
    here = {(run["arm"], run["seed"]): run["folder"] for run in collected["runs"]}
    samples = load_samples(folder / SAMPLES)[0] if (folder / SAMPLES).exists() else {}
    for first, *_ in by_arm(results["runs"]).values():
        name = here.get((first["arm"], first["seed"]))
        if name is None:
            continue
        tensors, _ = load_run_samples(out / name)
        shown = _most_contrast(tensors["images"].numpy())
        for key, tensor in tensors.items():
            kept = tensor[shown : shown + 1] if key in _OF_ONE else tensor
            samples[key if key in _SHARED else f"{first['arm']}.{key}"] = kept
    results["samples"] = SAMPLES
    return {SAMPLES: (samples, {})}


def render_pictures(results: Mapping[str, Any], samples: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """Return the report, its tables and its figure by the names of their files.

    Args:
        results: of the runs.
        samples: as :func:`picture_samples` keeps them.
    """
    pictures = {_FIGURE: encode_png(draw_pictures(results, samples), photographs=True)}
    title = f"Tokenizers of {results['runs'][0]['settings']['data']}"
    blocks = [Heading(1, title), *_blocks(results)]
    texts = {"report.md": to_markdown(blocks), "report.html": to_html(blocks, pictures, title)}
    texts |= {f"{name}.md": to_markdown([table]) for name, table in picture_tables(results).items()}
    texts["findings.md"] = to_markdown([Bullets(picture_findings(results))])
    return {**pictures, **{name: text.encode() for name, text in texts.items()}}


def picture_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables by the names of their files: quality, moving window, circular shifts, pictures."""
    runs = results["runs"]
    names = [_name(run, runs) for run in runs]
    moving, interior, circular = (
        [EquivarianceReport.from_dict(run["evaluation"][name]) for run in runs]
        for name in ("equivariance", "equivariance_interior", "equivariance_circular")
    )
    quality = [
        [label, *(format(read(run["evaluation"]), pattern) for run in runs)] for label, read, pattern in _QUALITY
    ]
    rows = [[label, *map(read, moving)] for label, read in _MEASURED.items()]
    inside = [[f"interior tokens: {label}", *map(read, interior)] for label, read in _INTERIOR.items()]
    around = [[label, *map(read, circular)] for label, read in _MEASURED.items()]
    return {
        "quality": Table(["", *names], quality),
        "window": Table(["the window moves", *names], [*rows, *inside]),
        "circular": Table(["circular shifts", *names], around),
        "pictures": _pictures_table(results["pictures"]),
    }


def picture_findings(results: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each run but the first: where its κ is higher or lower than that of the first.

    Two values of κ count as different where their intervals do not overlap. The values are in the tables.
    """
    base, *others = results["runs"]
    name = _name(base, results["runs"])
    sentences = []
    for run in others:
        where: dict[str, list[str]] = {}
        for condition, key, kind in _COMPARED:
            relation = _relation(*(_report(one, key, kind) for one in (run, base)))
            where.setdefault(relation, []).append(condition)
        relations = "; ".join(f"{relation} for {_joined(conditions)}" for relation, conditions in where.items())
        perplexity, base_perplexity = (one["evaluation"]["test"]["perplexity"] for one in (run, base))
        fewer = (
            " It has fewer effective codes, which agree more often by themselves."
            if perplexity < base_perplexity / _FEWER and _HIGHER in where
            else ""
        )
        sentences.append(f"{_name(run, results['runs'])}, κ against {name}: {relations}.{fewer}")
    return sentences


def _report(run: Mapping[str, Any], name: str, kind: str) -> Agreement:
    found: Agreement = getattr(EquivarianceReport.from_dict(run["evaluation"][name]), kind)
    return found


def _relation(one: Agreement, other: Agreement) -> str:
    """Say whether two intervals of κ overlap."""
    if not (one.kappa_defined and other.kappa_defined):
        return "undefined"
    if one.kappa_interval[0] > other.kappa_interval[1]:
        return _HIGHER
    if one.kappa_interval[1] < other.kappa_interval[0]:
        return "lower"
    return "not told apart"


def _joined(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def draw_pictures(results: Mapping[str, Any], samples: Mapping[str, NDArray[Any]]) -> Figure:
    """Draw test crops, their reconstructions, and the tokens of one of them before and after a shift by a pixel.

    Args:
        results: of the runs.
        samples: as :func:`picture_samples` keeps them: ``images``, ``moved_images``, and by arm, as in
            ``vqgan.tokens``, ``reconstructions``, ``tokens`` and ``moved_tokens``.

    Shape:
        images, reconstructions: (B, 3, S, S) uint8. moved_images: (1, 3, S, S). tokens, moved_tokens: (1, h, w).
    """
    # Figure, not pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    groups = by_arm(results["runs"])
    images = samples["images"]
    columns = len(images) + 3
    figure = Figure(figsize=(1.32 * columns + 1.6, 1.42 * (1 + len(groups)) + 0.5), layout="constrained", dpi=100)
    axes = figure.subplots(1 + len(groups), columns, squeeze=False)
    for axis in axes.flatten():
        axis.set(xticks=[], yticks=[])
    labels = ["original", *(f"{title}\n{_note(runs[0])}" for title, runs in groups.items())]
    for row, label in zip(axes, labels, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    rows = [images, *(samples[f"{runs[0]['arm']}.reconstructions"] for runs in groups.values())]
    for row, crops in zip(axes, rows, strict=True):
        for axis, crop in zip(row, crops, strict=False):
            axis.imshow(crop.transpose(1, 2, 0), interpolation="nearest")
    shown = _most_contrast(images)
    titles = (f"crop {shown + 1}", "moved by 1 px", "tokens that differ")
    for axis, title in zip(axes[0, len(images) :], titles, strict=True):
        axis.set_title(title, fontsize=8)
    for axis, crop in zip(axes[0, len(images) :], (images[shown], samples["moved_images"][0]), strict=False):
        axis.imshow(crop.transpose(1, 2, 0), interpolation="nearest")
    axes[0, -1].set_axis_off()
    for row, runs in zip(axes[1:, len(images) :], groups.values(), strict=True):
        _draw_tokens(row, *(samples[f"{runs[0]['arm']}.{name}"][0] for name in ("tokens", "moved_tokens")))
    figure.suptitle("Test crops, their reconstructions, and the tokens of one crop", fontsize=10)
    return figure


def _most_contrast(images: NDArray[np.uint8]) -> int:
    """The crop whose tokens are shown: a blurred ground would hide what they do."""
    return int(images.reshape(len(images), -1).astype(np.float64).var(1).argmax())


def _draw_tokens(axes: Sequence[Any], tokens: NDArray[Any], moved: NDArray[Any]) -> None:
    colors = code_colors(np.stack([tokens, moved]))
    for axis, grid in zip(axes, (tokens, moved), strict=False):
        axis.imshow([[colors[int(code)] for code in line] for line in grid], interpolation="nearest")
    before, after = (torch.from_numpy(grid.astype(np.int64))[None] for grid in (tokens, moved))
    differ = (best_token_shift(before, after, protocol="crop") != after)[0].numpy().copy()
    # Without wrapping the first row and column have no partner under a shift by one token.
    differ[0], differ[:, 0] = False, False
    axes[2].imshow(differ, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    compared = (differ.shape[0] - 1) * (differ.shape[1] - 1)
    axes[2].set_xlabel(f"{differ.sum()} of {compared}", fontsize=8)


def _blocks(results: Mapping[str, Any]) -> list[Block]:
    first = results["runs"][0]
    settings, test = first["settings"], first["evaluation"]["test"]
    tables = picture_tables(results)
    conditions = EquivarianceReport.from_dict(first["evaluation"]["equivariance"]).settings
    trial = trial_size(run["settings"] for run in results["runs"])
    warning = f"The numbers in this report mean nothing: it is a trial of {trial}. " if trial else ""
    return [
        Paragraph(
            f"{warning}Trained on crops of {_counted(results['pictures'])}, {settings['canvas_size']} pixels high "
            f"and wide: {settings['steps']:,} steps of {settings['batch_size']} crops, equal seeds and so equal "
            f"crops for all. Measured on {test['images']:,} crops ({test['tokens']:,} tokens) and "
            f"{conditions.num_images:,} windows of pictures, or parts of pictures, that training never saw. "
            f"Stride {conditions.stride}, K = {conditions.num_codes}."
        ),
        tables["quality"],
        Paragraph(
            "Agreements are Cohen's κ with a 95 % interval over windows, and in parentheses the rate of equal "
            "indices. The window moves over a larger picture, so that new content enters on one side; only "
            f"tokens that both windows show are compared. Interior tokens are at least "
            f"{settings['canvas_size'] // 4} pixels away from the border of the window."
        ),
        tables["window"],
        Paragraph("The content of a window is shifted circularly: what leaves on one side enters on the other."),
        tables["circular"],
        *([] if trial else [Bullets(picture_findings(results))]),
        Heading(2, "Pictures"),
        Picture(
            _FIGURE,
            "Test crops and their reconstructions. On the right the tokens of one crop, those of the crop "
            "whose content is moved right by one pixel, and in black the tokens that differ at the best "
            "whole-token alignment.",
        ),
        tables["pictures"],
        Heading(2, "How it was made"),
        Paragraph("Commands: " + ", ".join(f"`{command}`" for command in commands(results)) + "."),
        _runs_table(results["runs"]),
    ]


def _counted(pictures: Sequence[Mapping[str, Any]]) -> str:
    splits = [picture["split"] for picture in pictures]
    if "three parts" in splits:
        return f"the training parts of {len(splits)} picture{'' if len(splits) == 1 else 's'}"
    train, others = splits.count("train"), [splits.count(split) for split in ("validation", "test")]
    return f"{train} of {len(splits)} pictures ({others[0]} validate and {others[1]} test)"


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for run in runs:
        facts = run["provenance"]
        seconds = [facts[name]["cpu_seconds"] for name in ("training", "training_and_evaluation")]
        cells = [_name(run, runs), f"{run['settings']['steps']:,}", f"{seconds[0]:.0f}"]
        rows.append([*cells, f"{seconds[1] - seconds[0]:.0f}", facts["commit"] or "unknown"])
    return Table(["run", "steps", "training, CPU s", "evaluation, CPU s", "commit"], rows)


def _pictures_table(pictures: Sequence[Mapping[str, Any]]) -> Table:
    known = {photograph.sha256: photograph for photograph in CATALOGUE}
    header = ["picture", "pixels", "reduced by", "split", "SHA-256"]
    with_source = any(picture["sha256"] in known for picture in pictures)
    rows = []
    for picture in sorted(pictures, key=lambda one: one["name"]):
        size = f"{picture['width']}x{picture['height']}"
        cells = [picture["name"], size, str(picture["reduced_by"]), picture["split"], picture["sha256"][:12]]
        photograph = known.get(picture["sha256"])
        if with_source and photograph is None:
            cells += [_NONE] * 3
        elif photograph is not None:
            package = PACKAGES[photograph.package]
            # The folder's name repeats the package.
            cells[0] = photograph.file
            cells += [f"{package.name} {package.version}", photograph.author, photograph.licence]
        rows.append(cells)
    return Table([*header, *(["package", "by", "licence"] if with_source else [])], rows)


def _name(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    several = sum(other["arm"] == run["arm"] for other in runs) > 1
    return f"{run['title']}, seed {run['seed']}" if several else str(run["title"])


def _note(run: Mapping[str, Any]) -> str:
    return f"{run['evaluation']['test']['psnr']:.1f} dB"


def _agreement(name: str) -> Callable[[EquivarianceReport], str]:
    def cell(report: EquivarianceReport) -> str:
        agreement = getattr(report, name)
        return f"{agreement.kappa_text()} ({agreement.rate:.3f})"

    return cell


def _decibels(name: str) -> Callable[[EquivarianceReport], str]:
    def cell(report: EquivarianceReport) -> str:
        error = getattr(report, name)
        return str(error.decibels_text())

    return cell


def _margin(name: str) -> Callable[[EquivarianceReport], str]:
    def cell(report: EquivarianceReport) -> str:
        return _NONE if report.margin is None else f"{getattr(report.margin, name).median:.3g}"

    return cell


def _certified(report: EquivarianceReport) -> str:
    return _NONE if report.margin is None else report.margin.certified_text()


_QUALITY: list[tuple[str, Callable[[Mapping[str, Any]], float], str]] = [
    ("reconstruction L1, images in [-1, 1]", lambda found: found["test"]["l1"], ".4f"),
    ("reconstruction PSNR, dB", lambda found: found["test"]["psnr"], ".2f"),
    ("codes used at least once", lambda found: found["test"]["used_codes"], ".0f"),
    ("codes above 0.1 % of use", lambda found: found["test"]["frequent_codes"], ".0f"),
    ("perplexity of the code use", lambda found: found["test"]["perplexity"], ".1f"),
    ("mean |cosine| of two used codes", lambda found: found["codebook"]["mean_abs_cosine_used"], ".3f"),
]
_INTERIOR: dict[str, Callable[[EquivarianceReport], str]] = {
    "whole tokens, κ (rate)": _agreement("aligned"),
    "below a token, κ (rate)": _agreement("sub_stride"),
    "moves less than its margin, whole tokens": _certified,
}
_MEASURED: dict[str, Callable[[EquivarianceReport], str]] = {
    "whole tokens, κ (rate)": _agreement("aligned"),
    "below a token, κ (rate)": _agreement("sub_stride"),
    "below a token, Fourier-shifted latents, κ (rate)": _agreement("sub_stride_fourier"),
    "latents after whole tokens, dB": _decibels("feature_error"),
    "end-to-end PSNR, whole tokens, dB": _decibels("end_to_end"),
    "end-to-end PSNR, below a token, dB": _decibels("end_to_end_sub_stride"),
    "moves less than its margin, whole tokens": _certified,
    "median margin": _margin("margin"),
    "median movement": _margin("movement"),
}
