"""Copy the first table of each report that the README names into the README: ``python -m tests.readme_tables``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def first_table(text: str) -> str:
    """The first run of lines that begin with ``|``."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[start:end]) + "\n"


def filled(page: str) -> str:
    """``page`` with every marked table as its source has it now."""
    return _MARKED.sub(lambda m: m[1] + first_table((ROOT / m[2]).read_text(encoding="utf-8")) + m[3], page)


def main() -> None:
    """Fill the README."""
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
