"""The transformers of Stage 2: the GPT of the library and that of the authors, built and loaded in one way."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from examples.te_vqgan.runs.checks import require_choice
from examples.te_vqgan.runs.files import read_json_object
from examples.te_vqgan.stage2.dalle import DalleConfig, DalleTransformer
from te_quant import GPT, GPTConfig

__all__ = ["Transformer", "TransformerConfig", "build_transformer", "load_transformer"]

Transformer: TypeAlias = GPT | DalleTransformer
TransformerConfig: TypeAlias = GPTConfig | DalleConfig


def build_transformer(config: TransformerConfig) -> Transformer:
    """Return a transformer with weights drawn from torch's generator."""
    return GPT(config) if isinstance(config, GPTConfig) else DalleTransformer(config)


def load_transformer(folder: Path) -> Transformer:
    """Return the transformer in a run's ``model/``, of the class named there, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or of another class.
    """
    classes: dict[str, type[Transformer]] = {"GPT": GPT, "DalleTransformer": DalleTransformer}
    path = folder / "config.json"
    name = str(read_json_object(path).get("class_name"))
    require_choice(f"{path} class_name", name, tuple(classes))
    return classes[name].from_pretrained(folder)
