"""What ``import te_quant`` offers, and what it costs."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import te_quant

HEAVY = {
    "huggingface_hub", "matplotlib", "pooch", "safetensors", "scipy", "sklearn", "tensorboard", "tqdm",
}  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_public_names_exist() -> None:
    """Everything promised is there, sorted, and nothing else of ours is public."""
    assert te_quant.__all__ == sorted(te_quant.__all__)
    for name in te_quant.__all__:
        assert hasattr(te_quant, name)
    quantizers = {"VectorQuantizer", "ResidualVectorQuantizer", "FSQ", "LFQ", "SimVQ", "QuantizerOutput"}
    assert quantizers | {"CodebookUsage", "CodebookUsageReport", "__version__"} <= set(te_quant.__all__)


def test_version_is_stated_once() -> None:
    """The attribute is the installed version, in the form of a release."""
    assert te_quant.__version__ == importlib.metadata.version("te_quant")
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", te_quant.__version__)


def test_package_is_typed() -> None:
    """Type checkers find the marker."""
    assert (Path(te_quant.__file__).parent / "py.typed").exists()


def test_import_is_light() -> None:
    """Beyond torch, einops and numpy only the package's own modules are loaded, the compiler not among them."""
    torch_alone = modules_after("import torch, einops, numpy, einops._backends")
    ours = modules_after("from te_quant import VectorQuantizer") - torch_alone
    assert any(name.startswith("te_quant") for name in ours)
    extra = {name.split(".")[0] for name in ours}
    assert not extra & HEAVY
    assert not {name for name in ours if name.startswith(("torch._dynamo", "torch._inductor"))}
    assert "matplotlib" in modules_after("import matplotlib")


def test_functional_is_importable_alone() -> None:
    """The pure functions need no quantizer."""
    loaded = modules_after("import te_quant.functional")
    assert "te_quant.functional" in loaded


def test_dir_shows_the_names_that_are_imported_late() -> None:
    """Completion in a shell finds them before they are used."""
    assert set(te_quant.__all__) <= set(dir(te_quant))
