"""The imports of a source tree: every statement at any depth, also under TYPE_CHECKING and in functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Import(NamedTuple):
    """One import of a module of the tree, and where it stands."""

    importer: str
    imported: str
    line: int


def modules(folder: Path, package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names; a package is its ``__init__``."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def statements(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[str, str | None, int]]:
    """Yield (module, name or None, line) of every import in ``source``, with relative ones made absolute."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                yield base, alias.name, node.lineno
        elif isinstance(node, ast.Call) and _imports(node.func):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value, None, node.lineno


def _imports(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def imports(tree: Mapping[str, Path]) -> list[Import]:
    """Every import of a module of ``tree`` by another one."""
    sources = {name: (path.read_text(encoding="utf-8"), path.name == "__init__.py") for name, path in tree.items()}
    return imports_of(sources)


def imports_of(sources: Mapping[str, tuple[str, bool]]) -> list[Import]:
    """As :func:`imports`, of (source, whether it is a package) by module."""
    found = []
    for importer, (source, is_package) in sources.items():
        for base, name, line in statements(source, importer, is_package=is_package):
            whole = base if name is None else f"{base}.{name}"
            imported = whole if whole in sources else base
            if imported in sources and imported != importer:
                found.append(Import(importer, imported, line))
    return found


def cycles(edges: list[Import]) -> list[list[Import]]:
    """One path of imports that comes back to its start for every group of modules that import each other."""
    following: dict[str, list[Import]] = {}
    for edge in edges:
        following.setdefault(edge.importer, []).append(edge)
    found, covered = [], set()
    for start in following:
        if start in covered:
            continue
        path = _way_back(start, following)
        if path:
            found.append(path)
            covered |= {edge.importer for edge in path}
    return found


def _way_back(start: str, following: Mapping[str, list[Import]]) -> list[Import]:
    """The shortest path of imports from ``start`` to itself; empty if there is none."""
    reached: dict[str, list[Import]] = {start: []}
    queue = [start]
    while queue:
        module = queue.pop(0)
        for edge in following.get(module, []):
            path = [*reached[module], edge]
            if edge.imported == start:
                return path
            if edge.imported not in reached:
                reached[edge.imported] = path
                queue.append(edge.imported)
    return []


def shown(path: list[Import]) -> str:
    """A path of imports, with the line of each."""
    return "\n".join(f"  {edge.importer} (line {edge.line}) imports {edge.imported}" for edge in path)
