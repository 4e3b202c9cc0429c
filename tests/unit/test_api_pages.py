"""The pages of the API show everything that is public."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import te_quant

PAGES = Path(__file__).parents[2] / "docs" / "reference" / "api"
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
MODULES = sorted(
    path.stem
    for path in Path(te_quant.__file__).parent.iterdir()
    if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
)


def documented(text: str) -> set[int]:
    """The identities of the objects that ``text`` documents; a module stands for its public names."""
    shown = set()
    for kind, name in re.findall(
        r"^\.\. (automodule|autoclass|autofunction|py:data):: ([\w.]+)$", text, re.MULTILINE
    ):
        if kind == "automodule":
            module = importlib.import_module(name)
            shown |= {id(getattr(module, public)) for public in getattr(module, "__all__", ())}
        else:
            home, _, public = name.rpartition(".")
            shown.add(id(getattr(importlib.import_module(home), public)))
    return shown


def missing(module: str, text: str) -> list[str]:
    """The public classes, functions and registries of ``module`` that ``text`` lacks; other types may lack."""
    home = importlib.import_module(module)
    values = {name: getattr(home, name) for name in home.__all__}
    shown = documented(text)
    return [
        name
        for name, value in values.items()
        if (inspect.isclass(value) or inspect.isfunction(value) or isinstance(value, dict))
        and id(value) not in shown
    ]


@pytest.mark.parametrize("module", ["te_quant", *(f"te_quant.{name}" for name in MODULES)])
def test_every_public_name_has_a_place(module: str) -> None:
    """A page documents the module as a whole, or each of its names."""
    assert missing(module, TEXT) == []


def test_a_missing_name_is_noticed() -> None:
    """Negative control: without its line, the class is reported."""
    line = ".. autoclass:: te_quant.quantizers.Rows\n"
    assert line in TEXT
    assert missing("te_quant.quantizers", TEXT.replace(line, "")) == ["Rows"]
