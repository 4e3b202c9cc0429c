"""Who imports whom: no circles, only lower levels, and public names outside of the package.

The order of the packages is listed once, in the map of ``docs/design.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.unit.import_graph import ROOT, Import, cycles, imports, imports_of, modules, shown, statements

LIBRARY, EXAMPLE = ROOT / "src" / "te_quant", ROOT / "examples" / "te_vqgan"
TREES = {
    "te_quant": modules(LIBRARY, "te_quant"),
    "examples.te_vqgan": modules(EXAMPLE, "examples.te_vqgan"),
    "benchmarks": modules(ROOT / "benchmarks", "benchmarks"),
}
FOLDERS = {"te_quant": "src/te_quant/", "examples.te_vqgan": "examples/te_vqgan/"}
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
_ENTRY = re.compile(r"^(?P<indent> *)(?P<name>[\w./]+) +(?:L(?P<level>\d+) +)?\S")


def listed(page: str, folder: str) -> dict[str, int]:
    """The map of a folder: level by path, of packages (which end in a slash) and files."""
    block = page.split(f"```text\n{folder} ")[1].split("```")[0]
    levels: dict[str, int] = {}
    above: list[tuple[int, str]] = []
    for line in (folder + " " + block).splitlines():
        found = _ENTRY.match(line)
        assert found, f"docs/design.md must list one path per line, got {line!r}."
        indent = len(found["indent"])
        above = [(depth, path) for depth, path in above if depth < indent]
        path = (above[-1][1] if above else "") + found["name"]
        inherited = [levels[path] for _, path in above]
        levels[path] = int(found["level"]) if found["level"] else inherited[-1]
        above.append((indent, path))
    return levels


def path_of(module: str, tree: Mapping[str, Path]) -> str:
    """A module as the map writes it: the folder of a package, the file of any other module."""
    file = tree[module].relative_to(ROOT)
    return f"{file.parent.as_posix()}/" if file.name == "__init__.py" else file.as_posix()


def level_of(path: str, levels: Mapping[str, int]) -> int:
    """The level of a path, or of the nearest folder above it that the map lists."""
    while path not in levels:
        path = path.rstrip("/").rpartition("/")[0] + "/"
    return levels[path]


def upward(edges: list[Import], tree: Mapping[str, Path], levels: Mapping[str, int], top: str) -> list[str]:
    """Imports of another package that does not lie lower."""
    found = []
    for edge in edges:
        owners = [
            tuple(path_of(module, tree).removeprefix(top).split("/")[:1])
            for module in (edge.importer, edge.imported)
        ]
        importer, imported = (level_of(path_of(m, tree), levels) for m in (edge.importer, edge.imported))
        if owners[0] != owners[1] and importer <= imported:
            found.append(f"{shown([edge])}, which is not of a lower level (L{importer} imports L{imported})")
    return found


def private(source: str, module: str, public: set[str]) -> list[str]:
    """Imports of ``te_quant`` that are not of a public name of it or of one of its public submodules."""
    found = []
    for base, name, line in statements(source, module):
        if base.split(".")[0] != "te_quant":
            continue
        allowed = base == "te_quant" or (base.count(".") == 1 and base.split(".")[1] in public)
        if not allowed or ((name or "").startswith("_") and name != "__version__"):
            found.append(f"{module} (line {line}) imports {base}{'.' + name if name else ''}")
    return found


PUBLIC = {
    path.removesuffix(".py")
    for path in (entry.name for entry in LIBRARY.iterdir() if entry.is_dir() or entry.suffix == ".py")
    if not path.startswith("_")
}

# Modules that reach inside: one leaves a copy out, one hands the kernel to benchmarks that compile and tune it.
MEASURED_INSIDE = {"benchmarks.copies", "benchmarks.gpu.searches"}


@pytest.mark.parametrize("tree", TREES)
def test_there_is_no_import_circle(tree: str) -> None:
    """Neither at the top of a module nor inside a function nor for type checkers only."""
    found = cycles(imports(TREES[tree]))
    assert not found, "\n\n".join(["modules import each other:", *map(shown, found)])


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "from p import a",
        "from p.a import A",
        "from . import a",
        "from .a import A",
        "def f():\n    from p.a import A",
        "if TYPE_CHECKING:\n    from p.a import A",
        "def f():\n    import importlib\n    importlib.import_module('p.a')",
    ],
)
def test_a_circle_is_found_however_it_hides(back: str) -> None:
    """Negative control: b imports a, which imports b by way of c."""
    others = {"p": ("", True), "p.a": ("from p import b", False), "p.b": ("import p.c", False)}
    sources = {**others, "p.c": (back, False)}
    assert cycles(imports_of(sources))
    sources["p.c"] = ("import math", False)
    assert not cycles(imports_of(sources))


@pytest.mark.parametrize("tree", FOLDERS)
def test_packages_import_only_downwards(tree: str) -> None:
    """Each import of another package goes to a lower level of the map in docs/design.md."""
    levels = listed(DESIGN, FOLDERS[tree])
    found = upward(imports(TREES[tree]), TREES[tree], levels, FOLDERS[tree])
    assert not found, "\n".join(found)


def test_an_import_upwards_is_found() -> None:
    """Negative control: the quantizers must not know of the measurement."""
    edge = Import("te_quant.quantizers.vector", "te_quant.equivariance.measure", 7)
    levels = listed(DESIGN, FOLDERS["te_quant"])
    found = upward([edge], TREES["te_quant"], levels, FOLDERS["te_quant"])
    assert len(found) == 1
    assert "te_quant.quantizers.vector (line 7) imports te_quant.equivariance.measure" in found[0]
    down = Import("te_quant.equivariance.measure", "te_quant.functional", 7)
    assert not upward([down], TREES["te_quant"], levels, FOLDERS["te_quant"])


@pytest.mark.parametrize("tree", ["examples.te_vqgan", "benchmarks"])
def test_examples_and_benchmarks_import_public_names(tree: str) -> None:
    """Only te_quant and its submodules without an underscore."""
    found = [
        line
        for module, path in TREES[tree].items()
        for line in private(path.read_text(encoding="utf-8"), module, PUBLIC)
        if module not in MEASURED_INSIDE
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "statement",
    [
        "from te_quant._checks import require",
        "from te_quant import _checks",
        "import te_quant._search",
        "from te_quant.quantizers.vector import VectorQuantizer",
        "def f():\n    from te_quant.equivariance.report.tables import report_table",
    ],
)
def test_a_private_import_is_found(statement: str) -> None:
    """Negative control."""
    assert len(private(statement, "examples.x", PUBLIC)) == 1
    assert not private("from te_quant import VectorQuantizer, __version__", "examples.x", PUBLIC)
    assert not private("from te_quant.layers import BlurPool2d", "examples.x", PUBLIC)


def test_the_map_names_every_file() -> None:
    """A file that was added belongs into docs/design.md."""
    levels = listed(DESIGN, FOLDERS["te_quant"])
    missing = sorted({path_of(module, TREES["te_quant"]) for module in TREES["te_quant"]} - set(levels))
    assert not missing, f"docs/design.md must name {', '.join(missing)}."


def test_the_map_names_no_file_that_is_not_there() -> None:
    """A file that was removed or renamed leaves docs/design.md."""
    levels = listed(DESIGN, FOLDERS["te_quant"]) | listed(DESIGN, FOLDERS["examples.te_vqgan"])
    gone = sorted(path for path in levels if not (ROOT / path).exists())
    assert not gone, f"docs/design.md must not name {', '.join(gone)}."
    assert listed("```text\nsrc/te_quant/ L1 x\n  gone.py  y\n```", "src/te_quant/") == {
        "src/te_quant/": 1,
        "src/te_quant/gone.py": 1,
    }


def test_at_most_seven_private_files_lie_at_the_root() -> None:
    """Code that one package owns lives in that package."""
    private_files = sorted(path.name for path in LIBRARY.glob("_*.py") if not path.name.startswith("__"))
    assert len(private_files) <= 7, private_files
