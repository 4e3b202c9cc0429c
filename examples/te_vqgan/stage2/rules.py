"""How an evaluation decodes: how many of the likeliest tokens it draws from, for images and for captions.

A rule belongs to an evaluation and not to a training, so that finished runs are measured under several.
"""

from __future__ import annotations

from typing import NamedTuple

from examples.te_vqgan.runs.checks import require

__all__ = ["DEFAULT_RULES", "HEADLINE", "RULES", "Rule", "rule_named", "rule_title"]

HEADLINE = "paper"
"""The rule shown by tables and pictures that show only one."""

RULES = (HEADLINE, "tenth", "greedy", "2", "16", "38", "all")
"""Names of rules; any other positive whole number is a rule too."""

DEFAULT_RULES = (HEADLINE, "2")
"""The rules that ``run`` evaluates."""

# Text vocabulary and positions of the authors' code, whose logits count towards its tenth.
_PAPER_TEXT = 78 + 50


class Rule(NamedTuple):
    """How many candidates a token is drawn from, at temperature 1.

    Attributes:
        name: as it is typed.
        images: how many of the largest logits of an image token may be drawn; 1 is greedy.
        captions: the same for a token of a caption.
    """

    name: str
    images: int
    captions: int


def rule_named(name: str, num_codes: int, vocabulary: int) -> Rule:
    """Return the rule ``name`` for a codebook and a vocabulary of these sizes.

    Args:
        name: ``"paper"`` keeps k = ⌊0.1·(128 + K)⌋ logits in both directions, as the released code does; the text
            of the paper states no rule. ``"tenth"`` keeps ⌊0.1·K⌋ for images and writes captions greedily, which
            is what this example did in its first version. ``"greedy"`` takes the likeliest token, ``"all"`` draws
            from all tokens, and a number from that many of the likeliest; each for images and for captions. A rule
            never keeps more tokens than the codebook or the vocabulary has.
        num_codes: K.
        vocabulary: number of caption tokens.

    Raises:
        ValueError: there is no such rule.

    Source: the code of Shin et al. 2021, arXiv:2112.00384.
    """
    kept = {
        "paper": (int(0.1 * (_PAPER_TEXT + num_codes)),) * 2,
        # 0.1·K in floating point may be a little less than a whole number.
        "tenth": (int(0.1 * num_codes + 1e-9), 1),
        "greedy": (1, 1),
        "all": (num_codes, vocabulary),
    }
    known = ", ".join(map(repr, kept))
    if name.isascii() and name.isdigit() and int(name) > 0:
        kept[name] = (int(name),) * 2
    require(name in kept, "rules", f"{known} or whole numbers above 0", repr(name))
    images, captions = kept[name]
    return Rule(name, min(max(1, images), num_codes), min(captions, vocabulary))


def rule_title(name: str, task: str | None = None) -> str:
    """Return the title of a rule in tables, for one task or, without ``task``, for both."""
    tenth = {"text_to_image": "a tenth of K", "image_to_text": "greedy"}
    titles = {
        "paper": "the released code's",
        "tenth": tenth.get(task or "", "a tenth of K for images, greedy for captions"),
        "greedy": "greedy",
        "all": "all",
    }
    return titles.get(name, f"{name} candidates")
