"""What Stage 2 showed, in sentences made from its numbers and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from examples.te_vqgan.reports.generation.paper import TABLE1
from examples.te_vqgan.reports.generation.tables import accuracies, full_size, generations, shown_rule
from examples.te_vqgan.reports.inference import welch
from examples.te_vqgan.stage1.presets import ARMS
from examples.te_vqgan.stage2.rules import HEADLINE, rule_title

__all__ = ["generation_findings"]

_TASKS = {"text_to_image": "text to image", "image_to_text": "image to text"}
_BASE = "vqgan"
_QUESTIONS = {
    "te_vqgan": "the penalty (TE-VQGAN)",
    "k16": "a codebook of 16 codes without penalty",
    "stride_exact": "the stride-exact encoder",
    "stride_exact_te": "the stride-exact encoder with the penalty",
}


def generation_findings(results: Mapping[str, Any]) -> list[str]:
    """Answer the paper's questions on held-out single digits (Quad1), arm by arm against the strided VQGAN."""
    images = full_size(results)
    if images is None:
        return []
    # A tiny test set may have no single digit.
    rule = shown_rule(results)
    every = generations(results, images, rule)
    arms = {arm: runs for arm, runs in every.items() if accuracies(runs, images, rule, "text_to_image", "quad1")}
    if not arms:
        return []
    sentences = []
    for task, words in _TASKS.items():
        if _BASE not in arms:
            break
        base = accuracies(arms[_BASE], images, rule, task, "quad1")
        for arm, question in _QUESTIONS.items():
            if arm in arms:
                sentences.append(
                    _against(words, question, accuracies(arms[arm], images, rule, task, "quad1"), base)
                )
    for task, words in _TASKS.items():
        best = max(arms, key=lambda arm: statistics.fmean(accuracies(arms[arm], images, rule, task, "quad1")))
        value = statistics.fmean(accuracies(arms[best], images, rule, task, "quad1"))
        goal = TABLE1["te_vqgan"][task][0].mean
        relation = "above" if value > goal else "not above"
        comparison = (
            f", {relation} the paper's {goal:.3f} (another canvas and training, see below)"
            if rule == HEADLINE
            else f"; the paper's {goal:.3f} follows another rule"
        )
        sentences.append(
            f"Best arm at Quad1, {words} (rule: {rule_title(rule, task)}): "
            f"{ARMS[best].title} with {value:.3f}{comparison}."
        )
    fewest = min(len(runs) for runs in arms.values())
    if fewest == 1:
        sentences.append("At least one arm has a single seed, so the spread between its seeds is not known.")
    return sentences


def _against(words: str, question: str, values: Sequence[float], base: Sequence[float]) -> str:
    """Say whether ``values`` lie above ``base`` by more than the spread between seeds."""
    gap = statistics.fmean(values) - statistics.fmean(base)
    numbers = f"{statistics.fmean(values):.3f} against {statistics.fmean(base):.3f} at Quad1"
    if f"{abs(gap):.3f}" == "0.000":
        return f"{words.capitalize()}: {question} makes no difference to digit accuracy ({numbers})."
    text = f"{words.capitalize()}: {question} {'gains' if gap > 0 else 'loses'} {abs(gap):.3f} ({numbers})"
    if len(values) > 1 and len(base) > 1:
        spread = welch(values, base).error
        certain = abs(gap) > 2 * spread
        text += f", {'more' if certain else 'less'} than twice the standard error of {spread:.3f} between seeds"
    return text + "."
