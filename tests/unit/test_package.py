"""What ``import te_quant`` offers, and what it costs."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import te_quant

HEAVY = {
    "huggingface_hub", "matplotlib", "pooch", "safetensors", "scipy", "sklearn", "tensorboard", "tqdm",
}  # fmt: skip


def printed(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after ``statement``."""
    return set(json.loads(printed(f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))")))


def test_public_names_exist() -> None:
    """Everything promised is there, sorted, and nothing else of ours is public."""
    assert te_quant.__all__ == sorted(te_quant.__all__)
    for name in te_quant.__all__:
        assert hasattr(te_quant, name)
    quantizers = {"VectorQuantizer", "ResidualVectorQuantizer", "ProductQuantizer", "FSQ", "LFQ", "SimVQ"}
    assert quantizers | {"QuantizerOutput"} | {"CodebookUsage", "CodebookUsageReport", "__version__"} <= set(
        te_quant.__all__
    )


def test_version_is_stated_once() -> None:
    """The attribute is the installed version, in the form of a release."""
    assert te_quant.__version__ == importlib.metadata.version("te_quant")
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", te_quant.__version__)


def test_package_is_typed() -> None:
    """Type checkers find the marker."""
    assert (Path(te_quant.__file__).parent / "py.typed").exists()


def test_import_is_light() -> None:
    """A quantizer needs torch, einops, numpy and modules of the package: no compiler, no picture, no report."""
    torch_alone = modules_after("import torch, einops, numpy, einops._backends")
    ours = modules_after("from te_quant import VectorQuantizer") - torch_alone
    assert any(name.startswith("te_quant") for name in ours)
    extra = {name.split(".")[0] for name in ours}
    assert not extra & HEAVY
    assert not {name for name in ours if name.startswith(("torch._dynamo", "torch._inductor"))}
    assert not {name for name in ours if name.startswith(("te_quant.equivariance", "te_quant.gpt"))}
    assert "matplotlib" in modules_after("import matplotlib")


@pytest.mark.slow
def test_functional_is_importable_alone() -> None:
    """The pure functions need no quantizer."""
    loaded = modules_after("import te_quant.functional")
    assert "te_quant.functional" in loaded


def test_dir_shows_the_names_that_are_imported_late() -> None:
    """Completion in a shell finds them before they are used."""
    assert set(te_quant.__all__) <= set(dir(te_quant))


# What a module needs to be imported; `make test` has none of it.
OPTIONAL = {"te_quant.integrations.torchmetrics": "torchmetrics"}
PACKAGES = sorted(
    module.name
    for module in pkgutil.walk_packages(te_quant.__path__, "te_quant.")
    if not any(part.startswith("_") for part in module.name.split("."))
    and importlib.util.find_spec(OPTIONAL.get(module.name, "torch")) is not None
)


def test_import_of_the_package_alone_loads_only_the_operators() -> None:
    """Everything else waits until it is used."""
    ours = {name.split(".")[1] for name in modules_after("import te_quant") if name.startswith("te_quant.")}
    assert ours <= {
        "functional",
        "_checks",
        "_execution",
        "_magnitudes",
        "_precision",
        "_search",
        "_values",
        "_version",
    }


@pytest.mark.slow
def test_import_registers_every_operator() -> None:
    """An exported program can be loaded after ``import te_quant``: the other modules define no more of them."""
    listing = "sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith('te_quant::'))"
    alone = printed(f"import torch, te_quant; print({listing})")
    everything = "; ".join(f"import {name}" for name in PACKAGES)
    assert alone == printed(f"import torch; {everything}; print({listing})")
    assert "te_quant::search_codes" in alone


def hidden(names: list[str]) -> list[str]:
    """The modules that their dotted name does not lead to, once all are imported."""
    found = []
    for name in names:
        importlib.import_module(name)
    for name in names:
        value: object = sys.modules[name.split(".")[0]]
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        if value is not sys.modules[name]:
            found.append(name)
    return found


def test_no_attribute_hides_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """``import te_quant.a.b`` and then ``te_quant.a.b`` is the module, not a function of the same name."""
    assert len(PACKAGES) > 40
    assert hidden(PACKAGES) == []
    # Negative control.
    monkeypatch.setattr(te_quant.equivariance, "measure", print)
    assert hidden(PACKAGES) == ["te_quant.equivariance.measure"]


@pytest.mark.slow
def test_public_submodules_are_attributes() -> None:
    """``import te_quant; te_quant.layers`` works without another import, in a fresh interpreter."""
    found = {name.removeprefix("te_quant.") for name in PACKAGES if name.count(".") == 1}
    assert found == set(te_quant._SUBMODULES)
    names = ", ".join(f"te_quant.{name}.__name__" for name in sorted(found))
    assert printed(f"import te_quant; print([{names}])") == f"{[f'te_quant.{name}' for name in sorted(found)]}\n"
    assert found <= set(dir(te_quant))
    assert not [name for name in dir(te_quant) if name.startswith("_") and not name.startswith("__")]


def test_type_checkers_read_the_same_names() -> None:
    """The imports under TYPE_CHECKING are those that happen on first use."""
    tree = ast.parse(Path(te_quant.__file__).read_text(encoding="utf-8"))
    listed = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("te_quant")
        for alias in node.names
    }
    late = {("te_quant", name) for name in te_quant._SUBMODULES}
    late |= {(f"te_quant.{home}", name) for name, home in te_quant._HOMES.items()}
    early = {("te_quant._version", "__version__"), ("te_quant", "_execution"), ("te_quant", "_values")}
    assert listed == late | early


def test_an_unknown_attribute_is_refused() -> None:
    """As any module does."""
    with pytest.raises(AttributeError, match=r"^module 'te_quant' has no attribute 'VectorQuantiser'$"):
        te_quant.VectorQuantiser  # noqa: B018
