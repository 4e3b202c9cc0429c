"""What the README of a GPT on the hub says of it."""

from __future__ import annotations

from collections.abc import Mapping

from te_quant._pretrained import Report, write_card
from te_quant.gpt.config import GPTConfig
from te_quant.tables import Table

__all__ = ["gpt_card"]


def gpt_card(
    config: GPTConfig,
    parameters: int,
    *,
    repo_id: str,
    reports: Mapping[str, Report],
    license_name: str | None,
) -> str:
    """Return the card; see :meth:`~te_quant.GPT.model_card`."""
    facts = [
        [f"segment `{segment.name}`", f"{_sides(segment.shape)} tokens of a vocabulary of {segment.vocab_size:,}"]
        for segment in config.segments
    ]
    facts += [
        ["width", f"{config.width}"],
        ["blocks", f"{config.depth}"],
        ["attention heads", f"{config.num_heads}"],
        ["parameters", f"{parameters:,}"],
    ]
    total = sum(segment.length for segment in config.segments)
    return write_card(
        repo_id,
        tags=("gpt", "image-tokens"),
        summary="A transformer that predicts the tokens of a sequence one after the other, segment by segment.",
        code=(
            "import torch\n\n"
            "from te_quant import GPT\n\n"
            f"gpt = GPT.from_pretrained({repo_id!r})\n"
            "prompt = torch.empty(1, 0, dtype=torch.int64)  # (B, P), the tokens that are given\n"
            f"tokens = gpt.generate(prompt)  # (B, {total})\n"
        ),
        facts=Table(["property", "value"], facts, "ll").to_markdown(),
        reports=reports,
        license_name=license_name,
    )


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{side:,}" for side in shape)
