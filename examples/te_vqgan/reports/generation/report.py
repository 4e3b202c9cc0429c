"""The part of the report on Stage 2: the paper's tables, and the pictures of what was generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from examples.te_vqgan.data.sources import CLASS_NAMES
from examples.te_vqgan.reports.document import Block, Bullets, Heading, Paragraph, Picture, Table
from examples.te_vqgan.reports.generation.figures import (
    Point,
    draw_captions,
    draw_confusions,
    draw_generated,
    draw_tradeoff,
)
from examples.te_vqgan.reports.generation.findings import generation_findings
from examples.te_vqgan.reports.generation.tables import (
    accuracies,
    full_size,
    generations,
    rules_table,
    shown_rule,
    table1,
    table2,
    table3,
)
from examples.te_vqgan.reports.trial import trial_size
from examples.te_vqgan.stage1.perceptual import TITLES
from examples.te_vqgan.stage1.presets import ARMS
from examples.te_vqgan.stage2.rules import HEADLINE, rule_title
from te_quant import EquivarianceReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["generation_blocks", "generation_figures", "generation_tables"]

_QUADRANTS = ("quad1", "quad2", "quad3", "quad4")
_RULES_TABLES = {
    "rules-text-to-image": "Text to image by rule of decoding, all digits in quadrants",
    "rules-text-to-image-quad1": "Text to image by rule of decoding, Quad1",
    "rules-image-to-text": "Image to text by rule of decoding, all digits in quadrants",
}

Samples = Mapping[str, Mapping[str, NDArray[Any]]]

_PICTURES = {
    "captions.png": "What the test set is made of: held-out combinations of digit, quadrant and colour, and the "
    "first caption of each image (the paper's Fig. 2).",
    "generated.png": "Images drawn for the same held-out captions, one sample each, the first of the test set.",
    "confusions.png": "Which digit was asked for and which one the classifier reads, all quadrants and seeds.",
    "tradeoff.png": "Text-to-image accuracy on single held-out digits against equivariance, and against the "
    "number of codes in use.",
}


# Those that need generated images, which are kept under one rule only.
_OF_SAMPLES = ("captions.png", "generated.png")


def generation_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """Return the paper's tables by name of their file, those for which there are results."""
    tables = {"table1-text-to-image": table1(results, "text_to_image")}
    tables["table1-image-to-text"] = table1(results, "image_to_text")
    second = table2(results)
    if second is not None:
        tables["table2"] = second
    tables["table3"] = table3(results)
    for name, task, cases in (
        ("rules-text-to-image", "text_to_image", _QUADRANTS),
        ("rules-text-to-image-quad1", "text_to_image", _QUADRANTS[:1]),
        ("rules-image-to-text", "image_to_text", _QUADRANTS),
    ):
        table = rules_table(results, task, cases)
        if table is not None:
            tables[name] = table
    return tables


def generation_blocks(results: Mapping[str, Any]) -> list[Block]:
    """Return what the report says of Stage 2; nothing if no GPT was measured."""
    images = full_size(results)
    if images is None:
        return []
    tables = generation_tables(results)
    rule = shown_rule(results)
    arms = generations(results, images, rule)
    first = next(iter(arms.values()))[0]["stage2"][str(images)]
    settings = first["settings"]
    counts = first["rules"][rule]["held_out"]["text_to_image"]["cases"]
    digits = ", ".join(f"{case['digits']:,} ({name})" for name, case in counts.items())
    trained = [part for runs in arms.values() for run in runs for part in (run, run["stage2"][str(images)])]
    trial = trial_size(part["settings"] for part in trained)
    blocks: list[Block] = [
        Heading(2, "Text to image, image to text"),
        _no_findings(trial) if trial else Bullets(generation_findings(results)),
        Paragraph(_conditions(results, settings, images, digits, rule)),
        *_left_out(results, images),
        Heading(3, "Table 1, text to image"),
        tables["table1-text-to-image"],
        Heading(3, "Table 1, image to text"),
        tables["table1-image-to-text"],
    ]
    if "table2" in tables:
        blocks += [Heading(3, "Table 2: Quad1 of text to image, by size of the training set"), tables["table2"]]
    for name, title in _RULES_TABLES.items():
        if name in tables:
            blocks += [Heading(3, title), tables[name]]
    blocks += [
        Heading(3, "Table 3: code usage and reconstruction"),
        tables["table3"],
        Paragraph(_distances(tables["table3"])),
    ]
    pictured = bool(results.get("generated"))
    blocks += [Picture(name, text) for name, text in _PICTURES.items() if pictured or name not in _OF_SAMPLES]
    if not pictured:
        blocks.append(Paragraph(f"No generated images are stored; `evaluate --rules {HEADLINE}` stores them."))
    return blocks


def generation_figures(results: Mapping[str, Any], samples: Samples) -> dict[str, Figure]:
    """Return the figures by file name.

    Args:
        results: as ``collect`` gives them.
        samples: by arm, the pictures of its first seed, if there are any.
    """
    images = full_size(results)
    if images is None:
        return {}
    rule = shown_rule(results)
    arms = generations(results, images, rule)
    points, counts = [], {}
    for arm, runs in arms.items():
        tables = [
            run["stage2"][str(images)]["rules"][rule]["held_out"]["text_to_image"]["confusion"] for run in runs
        ]
        counts[ARMS[arm].title] = np.sum([np.array(table) for table in tables], axis=0)
        for run in runs:
            report = EquivarianceReport.from_dict(run["evaluation"]["equivariance"])
            kappa, perplexity = report.agreements()["sub_stride"].kappa, run["evaluation"]["test"]["perplexity"]
            # None if a tiny test set has no single digit.
            found = accuracies([run], images, rule, "text_to_image", "quad1")
            points += [Point(ARMS[arm].title, kappa, perplexity, accuracy) for accuracy in found]
    figures = {
        "confusions.png": draw_confusions(counts, CLASS_NAMES[results["runs"][0]["settings"]["data"]]),
        "tradeoff.png": draw_tradeoff(points),
    }
    if not samples:
        return figures
    texts: Sequence[str] = results["captions"]["held_out"]
    originals = next(iter(samples.values()))["held_out.images"]
    generated = {ARMS[arm].title: samples[arm]["held_out.generated"] for arm in arms if arm in samples}
    pictures = {
        "captions.png": draw_captions(originals[:8], texts[:8]),
        "generated.png": draw_generated(texts, originals, generated),
    }
    return pictures | figures


def _distances(table: Table) -> str:
    text = (
        "Codes used, reconstruction L1 and LPIPS: ours / the paper's. Our L1 is of images in [-1, 1]; the "
        "range of the paper's is not stated. LPIPS is measured where its package and weights are installed "
        "(`--perceptual lpips`). Feature distance is the mean distance in the features of our own "
        "classifier; it is not LPIPS and not comparable with the paper's perceptual loss."
    )
    if TITLES["st-lpips"] in table.header:
        text += (
            " ST-LPIPS (`--perceptual st-lpips`) is shift-tolerant LPIPS with an AlexNet (Ghildyal and Liu 2022, "
            "arXiv:2207.13686); it is not comparable with the paper's LPIPS either."
        )
    return text


def _no_findings(size: str) -> Paragraph:
    return Paragraph(f"No findings are drawn from a trial of {size}; the numbers of this section mean nothing.")


def _left_out(results: Mapping[str, Any], images: int) -> list[Block]:
    """Name what was trained on more images than the GPTs that the tables compare; fewer are in Table 2."""
    found: dict[str, None] = {}
    for run in results["runs"]:
        for size, part in run.get("stage2", {}).items():
            if part.get("rules") and int(size) > images:
                found[f"{run['title']} on {int(size):,} images"] = None
    return [Paragraph(f"Measured too, but not in the tables below: {', '.join(found)}.")] if found else []


def _conditions(
    results: Mapping[str, Any], settings: Mapping[str, Any], images: int, digits: str, rule: str
) -> str:
    return (
        f"A GPT of width {settings['width']} and depth {settings['depth']} on captions (style "
        f"`{settings['caption_style']}`) and tokens of {images:,} training images, {settings['steps']:,} steps of "
        f"{settings['batch_size']} pairs with `{settings['optimizer']}`, directions in turn: "
        f"{', '.join(settings['directions'])}. Digit accuracy over held-out combinations of digit, quadrant and "
        f"colour; digits counted: {digits}. Rule of decoding in tables that show one: {rule_title(rule)}. "
        f"{_classifier(results)} Every cell: ours / the paper's, mean (standard "
        "deviation between seeds). “Seen” are combinations that training had, on test digits. “Read in "
        "reconstructions” is what the classifier reads in test images decoded from their own tokens, a "
        "measure of what the tokens can show. It is no bound: images that are more typical than test images are "
        "easier to read."
    )


def _classifier(results: Mapping[str, Any]) -> str:
    test = results["classifier"]["evaluation"]["test"]
    return (
        f"The classifier reads {100 * test['digit_accuracy']:.2f} % of the {test['cells']:,} test digits, "
        "coloured at random, right."
    )
