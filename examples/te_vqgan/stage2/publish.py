"""The step ``publish``: the weights of one arm, small enough to lie beside the results, for the notebook.

Writes ``tokenizer/`` (for ``from_pretrained``), ``gpt/`` (for ``load_transformer``), ``classifier/`` (for
``load_classifier``) and ``about.json``.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from examples.te_vqgan.classifier.model import load_classifier, save_classifier
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.files import read_json_object, write_text_atomically
from examples.te_vqgan.runs.recorded import require_recorded
from examples.te_vqgan.runs.running import require_finished
from examples.te_vqgan.stage1.presets import to_dict
from examples.te_vqgan.stage2.settings import Stage2Settings
from examples.te_vqgan.stage2.train import load_tokenizer, stage2_folder
from examples.te_vqgan.stage2.transformers import load_transformer

__all__ = ["publish"]

_CPU = torch.device("cpu")


def publish(
    settings: Stage2Settings, tokenizer: Path, classifier: Path, target: Path, *, command: str | None = None
) -> int:
    """Write the models of one finished chain into ``target``, weights in half precision.

    Args:
        settings: name the Stage 2 run; what it was trained with is read from its folder.
        tokenizer: folder of the finished Stage 1 run that it stands on.
        classifier: folder of the finished classifier.
        target: a new folder, written as a whole or not at all.
        command: what was typed, for the record.

    Returns:
        Bytes of all weights.

    Raises:
        ValueError: ``target`` exists, a run is not finished, or the weights of the GPT or of its tokenizer are not
            those that it ended with.
    """
    require(not target.exists(), "into", "a new folder", f"{target}, which exists; choose another, or delete it")
    folder = stage2_folder(tokenizer, settings)
    autoencoder, stage1 = load_tokenizer(tokenizer, _CPU)
    arm, _, seed = tokenizer.name.rpartition("-seed")
    require_finished(folder, "stage2", f"stage2 --arm {arm} --seed {seed}")
    require_recorded(folder)
    trained = read_json_object(folder / "settings.json")
    about: dict[str, Any] = {
        "command": command,
        "arm": tokenizer.name,
        "data": stage1.data,
        "canvas_size": stage1.canvas_size,
        "results": tokenizer.resolve().parent.name,
        "stage1": to_dict(stage1),
        "stage2": {name: value for name, value in trained.items() if name != "stage1"},
        "provenance": read_json_object(folder / "provenance.json"),
    }
    gpt, reader = load_transformer(folder / "model"), load_classifier(classifier)
    with _new_folder(target) as made:
        # Half of the bytes; the values are far from the range of float16. Whoever loads them computes in float32.
        autoencoder.half().save_pretrained(made / "tokenizer")
        gpt.half().save_pretrained(made / "gpt")
        save_classifier(reader.half(), made / "classifier")
        write_text_atomically(made / "about.json", json.dumps(about, indent=2) + "\n")
    return sum(path.stat().st_size for path in target.rglob("*.safetensors"))


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a folder that becomes ``target`` at the end of the block, and goes away if the block fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The same parent, since a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
        made = Path(aside) / target.name
        made.mkdir()
        yield made
        made.rename(target)
