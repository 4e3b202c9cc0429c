"""What the GPU check found, as Markdown, all from the JSON alone; and the targets that it judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import OURS, Context
from benchmarks.gpu import right, tuned
from benchmarks.gpu.fast import CDIST, FLASH_KMEANS, FUSED, THREE_PRODUCTS, allowance, product_name
from benchmarks.peers import MODES
from benchmarks.problem import Size
from benchmarks.results import three_digits
from benchmarks.tables import Document, contest_table, machine_table, targets_table
from benchmarks.targets import Cells, Target, Values, ratio
from benchmarks.timing import Limits
from examples.te_vqgan.reports.document import Paragraph, Table, to_markdown
from examples.te_vqgan.runs.files import write_text_atomically

__all__ = ["MAX_BYTES", "TARGETS", "tables", "write_tables"]

MAX_BYTES = 1_000_000
"""Of ``results.json``."""

_WIDE = 64
_FLOAT = 4
_NONE = "–"


def _searches(over: str, under: str, least: int = 1) -> Callable[[Cells], Values]:
    """Yield how many times longer ``over`` takes than ``under``, for codes of at least so many channels."""

    def values(cells: Cells) -> Values:
        for key, cell in cells.items():
            if key.startswith("fast/search-") and "contenders" in cell and cell["settings"]["C"] >= least:
                value = ratio(cell, over, under)
                if value is not None:
                    yield key.removeprefix("fast/search-"), value

    return values


def _memory(cells: Cells) -> Values:
    """Yield what our searches and quantizers need, where N x K scores would be twice as much as is allowed."""
    for key, cell in cells.items():
        kind = key.partition("/")[2].partition("-")[0]
        if not key.startswith("fast/") or kind not in ("search", *MODES):
            continue
        size = Size(*(cell["settings"][name] for name in ("N", "K", "C")))
        if 2 * allowance(size) > _FLOAT * size.N * size.K:
            continue
        for name, needed in cell.get("facts", {}).items():
            if not name.startswith("bytes of "):
                continue
            yield f"{key.partition('/')[2]} ({name.removeprefix('bytes of ')})", needed / allowance(size)


TARGETS: tuple[Target, ...] = (
    Target(
        "search in one kernel / product in float32, C >= 64",
        1.3,
        True,
        _searches(FUSED, product_name("float32"), _WIDE),
    ),
    Target(
        "the kernel with three TF32 products / product in float32, C >= 64",
        1.3,
        True,
        _searches(THREE_PRODUCTS, product_name("float32"), _WIDE),
    ),
    Target(
        "search in one kernel / product, both in TF32, C >= 64",
        1.3,
        True,
        _searches(f"{FUSED} (TF32)", product_name("TF32"), _WIDE),
    ),
    Target(
        "search in one kernel / product, both in bfloat16, C >= 64",
        1.3,
        True,
        _searches(f"{FUSED} (bf16)", product_name("bf16"), _WIDE),
    ),
    Target("cdist and argmin / search in one kernel", 3.0, False, _searches(CDIST, FUSED)),
    Target("search in one kernel in TF32 / flash-kmeans", 1.0, True, _searches(f"{FUSED} (TF32)", FLASH_KMEANS)),
    Target("peak memory beyond input and output / (64 MiB + 8 times latents and codes)", 1.0, True, _memory),
)
"""In the order of the table."""


def tables(document: Document) -> dict[str, str]:
    """Markdown by file name without its ending."""
    return {
        "targets": _checks(document) + "\n" + targets_table(document, TARGETS),
        "right": _right(document),
        "fast": _fast(document),
        "tuned": _tuned(document),
        "machine": machine_table(document),
    }


def write_tables(document: Document, folder: Path) -> None:
    """Write every table into a file of its own."""
    for name, text in tables(document).items():
        write_text_atomically(folder / f"{name}.md", text)


def _checks(document: Document) -> str:
    """Say how many checks hold, and which do not."""
    verdicts = {key.partition("/")[2]: cell["status"] for key, cell in _cells(document, "right/")}
    if not verdicts:
        return to_markdown([Paragraph("Checks of results: not measured.")])
    broken = [name for name, status in verdicts.items() if status != "ok"]
    # Which there are depends on the grid alone.
    context = Context(torch.device("cpu"), 1, document["grid"], Limits())
    missing = [name for cell in right.cells(context) if (name := cell.key.partition("/")[2]) not in verdicts]
    parts = [f"{len(verdicts) - len(broken)} of {len(verdicts) + len(missing)} checks of results hold."]
    parts += [f"**Broken:** {', '.join(broken)}."] if broken else []
    parts += [f"**Not run:** {', '.join(missing)}."] if missing else []
    return to_markdown([Paragraph(" ".join(parts))])


def _right(document: Document) -> str:
    """One row per check: its verdict and what it found."""
    rows = [
        [key.partition("/")[2], cell["status"], _shown(cell.get("reason") or cell.get("facts", {}))]
        for key, cell in _cells(document, "right/")
    ]
    if not rows:
        return to_markdown([Paragraph("Not measured.")])
    return to_markdown([Table(("check", "verdict", "found"), rows)])


def _fast(document: Document) -> str:
    """Every contest, one table per kind, and the facts next to them."""
    texts = []
    for kind, columns, ours in (
        ("search", ("N", "K", "C"), FUSED),
        *((mode, ("mode", "N", "K", "C"), OURS) for mode in MODES),
        ("stage1", ("mode",), OURS),
        ("generation", ("B",), OURS),
    ):
        found = [cell for _, cell in _cells(document, f"fast/{kind}-")]
        timed = [cell for cell in found if "contenders" in cell]
        failed = [f"{cell['settings']}: {cell['reason']}" for cell in found if "contenders" not in cell]
        if timed:
            texts.append(contest_table(timed, columns, _facts, ("besides",), ours_is=ours))
        texts += [to_markdown([Paragraph(f"Failed: {text}.")]) for text in failed]
    return "\n".join(texts) or to_markdown([Paragraph("Not measured.")])


def _facts(cell: Mapping[str, Any]) -> list[str]:
    return [_shown(cell["facts"])]


def _tuned(document: Document) -> str:
    """Milliseconds of every tiling at every size, in the order of the list."""
    found = dict(_cells(document, "tuned/"))
    sizes = list(dict.fromkeys(name for cell in found.values() for name in cell.get("contenders", {})))
    rows = []
    for tiling in tuned.TILINGS:
        cell = found.get(f"tuned/{tuned.label(tiling)}")
        if cell is None:
            continue
        entries = cell.get("contenders", {})
        rows.append([tuned.label(tiling), *(_milliseconds(entries.get(size), cell) for size in sizes)])
    if not rows:
        return to_markdown([Paragraph("Not measured.")])
    return to_markdown([Table(("tiling", *(f"{size}, ms" for size in sizes)), rows)])


def _milliseconds(entry: Mapping[str, Any] | None, cell: Mapping[str, Any]) -> str:
    if entry is None:
        return str(cell.get("reason", _NONE))
    return (
        three_digits(1000 * entry["median"])
        if entry["status"] == "ok"
        else f"{entry['status']} ({entry['reason']})"
    )


def _cells(document: Document, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((key, cell) for key, cell in document["cells"].items() if key.startswith(prefix))


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name} ({_shown(item)})" if isinstance(item, Mapping) else f"{name}: {_shown(item)}"
            for name, item in value.items()
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "/")
