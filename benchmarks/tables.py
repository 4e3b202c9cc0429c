"""The measurements as Markdown, one file a table, all from the JSON alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contest import OURS
from benchmarks.floor import rates_of, search_limit
from benchmarks.generation import COMPILED, HUGGING_FACE, HUGGING_FACE_COMPILED, SUMMED, WHOLE
from benchmarks.problem import Size
from benchmarks.results import three_digits
from benchmarks.share import CONTENDERS, Interval, seconds, share
from benchmarks.stage1 import MODES, plain_name
from benchmarks.targets import OWN_SEARCHES, TARGETS, TRAINING_TARGETS, YARDSTICKS, Target, Verdict, judge
from benchmarks.training import RATE, Trained, results
from examples.te_vqgan.reports.document import Paragraph, Table, to_markdown
from examples.te_vqgan.runs.files import write_text_atomically

__all__ = ["TABLES", "contest_table", "machine_table", "tables", "targets_table", "write_tables"]

_MIB = 2**20
_GIB = 2**30
_NONE = "–"
_ABSENT = {"status": "not measured"}

Document = Mapping[str, Any]


def write_tables(document: Document, folder: Path) -> None:
    """Write every table into a file of its own."""
    for name, text in tables(document).items():
        write_text_atomically(folder / f"{name}.md", text)


def tables(document: Document) -> dict[str, str]:
    """Markdown by file name without its ending."""
    return {name: build(document) for name, build in TABLES.items()}


def targets_table(document: Document, targets: Sequence[Target] = TARGETS) -> str:
    """Judge every target by the cells of ``document``."""
    header = ("ratio or size", "limit", "worst", "worst at", "mean", "points", "verdict")
    rows = [_target_row(target, judge(target, document["cells"])) for target in targets]
    return to_markdown([Table(header, rows)])


def _target_row(target: Target, verdict: Verdict) -> list[str]:
    sign, unit = "≤" if target.at_most else "≥", target.unit
    limit = f"{sign} {target.limit:g}{unit}"
    if verdict.met is None:
        return [target.text, limit, _NONE, _NONE, _NONE, "0", "not measured"]
    if verdict.met:
        text = "met"
    else:
        some = "" if target.mean else f", at {verdict.failing} of {verdict.points}"
        text = f"**missed by {verdict.missed_by:.0%}**{some}"
    numbers = [f"{value:.2f}{unit}" for value in (verdict.worst, verdict.mean)]
    return [target.text, limit, numbers[0], verdict.where, numbers[1], str(verdict.points), text]


def _search(document: Document) -> str:
    cells = _of(document, "search/")
    # Older results have one number of threads, which is that of the run.
    columns = (
        ("N", "K", "C", "threads") if any("threads" in cell["settings"] for cell in cells) else ("N", "K", "C")
    )
    rates = rates_of(document["cells"])

    def tile(cell: Mapping[str, Any]) -> str:
        tiles = cell["facts"]["tiles"]
        return f"{tiles['rows']} x {tiles['codes']}" + (", transposed" if tiles["transposed"] else "")

    def bytes_and_tile(cell: Mapping[str, Any]) -> list[str]:
        return [_limit(cell["facts"]["bytes"] / rates.copied), tile(cell)]

    def limits_and_tile(cell: Mapping[str, Any]) -> list[str]:
        settings, entries = cell["settings"], cell["contenders"]
        size = Size(settings["N"], settings["K"], settings["C"])
        limit = search_limit(size, rates_of(document["cells"], settings.get("threads")))
        times = {name: entry["median"] for name, entry in entries.items() if entry["status"] == "ok"}
        ours = _times(times.get(OURS, math.nan) / limit)
        others = {name: time for name, time in times.items() if name not in (*OWN_SEARCHES, *YARDSTICKS)}
        best = min(others, key=others.__getitem__, default=None)
        other = _NONE if best is None else f"{best} {_times(others[best] / limit)}"
        return [_limit(limit), ours, other, tile(cell)]

    last = "tile of the tiled product"
    if math.isnan(rates.comparisons):
        # Nor does their run know all rates of the machine.
        return contest_table(cells, columns, bytes_and_tile, ("bytes alone", last))
    header = ("limit, ms", "te_quant / limit", "fastest other / limit", last)
    return contest_table(cells, columns, limits_and_tile, header)


def _quantizer(document: Document) -> str:
    bandwidth = _bandwidth(document)

    def more(cell: Mapping[str, Any]) -> list[str]:
        return [_limit(cell["facts"]["bytes"] / bandwidth)]

    return contest_table(_of(document, "quantizer/"), ("mode", "N", "K", "C"), more, ("bytes alone",))


def _memory(document: Document) -> str:
    return _sizes(_of(document, "memory/"), ("mode", "N", "K", "C"))


def _growth_time(document: Document) -> str:
    return contest_table(_of(document, "growth/time"), ("along", "N", "K", "C"))


def _growth_memory(document: Document) -> str:
    return _sizes(_of(document, "growth/memory"), ("along", "N", "K", "C"))


def _blur(document: Document) -> str:
    return contest_table(_of(document, "blur/"), ("pass", "padding", "B", "C", "side"))


def _generation(document: Document) -> str:
    bandwidth, speed = _bandwidth(document), _speed(document)
    header = ("variant", "B", "T", "seconds", "/ te_quant", "tokens per second", "/ bytes", "/ arithmetic")
    rows = []
    for cell in _of(document, "generation/"):
        settings, facts = cell["settings"], cell["facts"]
        ours = cell["contenders"].get(OURS, {})
        for name in (OURS, COMPILED, HUGGING_FACE, HUGGING_FACE_COMPILED, WHOLE, SUMMED):
            entry = cell["contenders"].get(name)
            if entry is None:
                continue
            first = [name, str(settings["B"]), str(settings["T"])]
            if entry["status"] != "ok":
                rows.append([*first, _status(entry), *[_NONE] * 4])
                continue
            time = entry["median"]
            made = settings["B"] * settings["T"]
            # Uncached generation has to do more than the bounds of the cached one say.
            cached = name not in (WHOLE, SUMMED)
            bounds = [facts["bytes"] / bandwidth, facts["operations"] / speed] if cached else [math.nan, math.nan]
            seconds = f"{three_digits(time)} [{three_digits(entry['low'])}, {three_digits(entry['high'])}]"
            against = _times(time / ours["median"]) if ours.get("status") == "ok" else _NONE
            rows.append([*first, seconds, against, f"{made / time:,.0f}", *(_times(time / b) for b in bounds)])
    return to_markdown([Table(header, rows)])


def _share(document: Document) -> str:
    times = ("step, ms", "share of the step", "inside the step, ms", "/ step")
    header = ("network", "N, K, C", "quantizer", *times, "peak memory, MiB", "share of it")
    rows = []
    for cell in _of(document, "share/"):
        settings = cell["settings"]
        place = [f"{settings['network']}, {settings['side']} px", "{N:,}, {K:,}, {C}".format(**settings)]
        for name in CONTENDERS:
            entry = cell["contenders"].get(name)
            if entry is None:
                continue
            if entry["status"] != "ok":
                rows.append([*place, name, _word(entry), *[_NONE] * 5])
                continue
            values = [
                _bracketed(seconds(cell, name, "step"), 1000),
                _bracketed(share(cell, name, "step"), 100, " %"),
                _bracketed(seconds(cell, name, "inside"), 1000),
                _bracketed(share(cell, name, "inside"), 100, " %"),
                _bracketed(seconds(cell, name, "peak"), 1 / _MIB),
                _bracketed(share(cell, name, "peak"), 100, " %"),
            ]
            rows.append([*place, name, *values])
    return to_markdown([Table(header, rows), *_reasons(_of(document, "share/"))])


def _bracketed(value: Interval | None, factor: float, unit: str = "") -> str:
    if value is None:
        return _NONE
    low, median, high = (f"{factor * number:.1f}" for number in value)
    return f"{median}{unit} [{low}, {high}]"


def _stage1(document: Document) -> str:
    """Two tables: both networks in equal modes, and the paddings."""
    gains = ("plain torch: gain over eager float32", "te_quant: gain over eager float32")
    header = ("mode", "batch", "plain torch, ms", "te_quant, ms", "te_quant / plain torch", *gains)
    rows = []
    for cell in _of(document, "stage1/modes"):
        entries = cell["contenders"]
        pairs = {mode: (plain_name(mode), f"{OURS} {mode.name}") for mode in MODES}
        for mode, names in pairs.items():
            times = [
                _milliseconds(e) if (e := entries.get(n, _ABSENT))["status"] == "ok" else _word(e) for n in names
            ]
            compared = _quotient(entries, names[1], names[0])
            own = [_quotient(entries, first, name) for first, name in zip(pairs[MODES[0]], names, strict=True)]
            rows.append([mode.name, str(cell["settings"]["batch"]), *times, compared, *own])
    padded = [
        [name, cell["facts"]["mode"], str(cell["settings"]["batch"]), *_padding(cell["contenders"], name)]
        for cell in _of(document, "stage1/padding")
        for name in cell["contenders"]
    ]
    paddings = Table(("padding", "mode", "batch", "ms per step", "over zeros"), padded)
    return to_markdown([Table(header, rows), paddings, *_reasons(_of(document, "stage1/"))])


def _padding(entries: Mapping[str, Any], name: str) -> list[str]:
    entry, zeros = entries[name], entries.get("zeros", _ABSENT)
    if entry["status"] != "ok":
        return [_word(entry), _NONE]
    cost = f"{entry['median'] / zeros['median'] - 1:+.1%}" if zeros["status"] == "ok" else _NONE
    return [_milliseconds(entry), cost]


def _quotient(entries: Mapping[str, Any], over: str, under: str) -> str:
    pair = [entries.get(name, _ABSENT) for name in (over, under)]
    if any(entry["status"] != "ok" for entry in pair):
        return _NONE
    return _times(pair[0]["median"] / pair[1]["median"])


def _rendering(document: Document) -> str:
    header = ("canvas", "batch", "milliseconds per batch", "images per second")
    rows = []
    for cell in _of(document, "rendering/"):
        settings, entry = cell["settings"], cell["contenders"][OURS]
        ok = entry["status"] == "ok"
        rate = f"{settings['batch'] / entry['median']:,.0f}" if ok else _NONE
        last = (_milliseconds(entry) if ok else _status(entry), rate)
        rows.append([f"{settings['canvas']} px", str(settings["batch"]), *last])
    return to_markdown([Table(header, rows)])


def _training(document: Document) -> str:
    measures = ("test MSE", "dB", "codes used", "perplexity", "ms per step", "MSE at rate / 3", "at rate x 3")
    header = ("data", "K, C", "quantizer", *measures)
    rows = []
    for (data, K, C), group in results(document["cells"]).items():
        for name, trained in group.items():
            rows.append([data, f"{K:,}, {C}", name, *_trained(trained)])
    note = (
        "Means over the seeds, with the standard deviation. A third and three times the learning rate: first seed."
    )
    return to_markdown([Table(header, rows), Paragraph(note)])


def _trained(trained: Trained) -> list[str]:
    if not trained.by_rate:
        return [trained.failures[0], *[_NONE] * 6]

    def number(name: str, form: str, rate: float = RATE) -> str:
        value = trained.mean(name, rate)
        return format(value, form) if math.isfinite(value) else _NONE

    error, spread = number("mse", ".4f"), trained.deviation("mse")
    first = f"{error} ± {spread:.4f}" if math.isfinite(spread) else error
    others = [number("mse", ".4f", round(factor * RATE, 6)) for factor in (1 / 3, 3)]
    time = trained.mean("median")
    return [
        first,
        number("psnr", ".2f"),
        number("used", ",.0f"),
        number("perplexity", ",.0f"),
        three_digits(1000 * time),
        *others,
    ]


def machine_table(document: Document) -> str:
    """Say what the measurements were made with, and on."""
    bandwidth, speed, comparisons = rates_of(document["cells"])
    rows = []
    for record in document["runs"].values():
        stamp = record["stamp"]
        packages = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version)
        rows += [
            ["command", f"`{record['command']}`"],
            ["commit", str(stamp["commit"])],
            ["device, CPU", f"{stamp['device']}, {stamp['cpu']}, {stamp['threads']} threads"],
            ["grid", str(stamp["grid"])],
            ["seconds", f"{record['seconds']:,.0f}"],
            ["versions", packages],
        ]
    if math.isfinite(bandwidth):
        rows.append(["copying", f"{bandwidth / _GIB:.1f} GiB/s, read and written"])
    if math.isfinite(speed):
        rows.append(["a square product", f"{speed / 1e9:,.0f} GFLOP/s in float32"])
    if math.isfinite(comparisons):
        rows.append(["a vectorized minimum", f"{comparisons / 1e9:,.0f} · 10⁹ comparisons per second"])
    return to_markdown([Table(("", "of the measurements"), rows)])


TABLES: dict[str, Callable[[Document], str]] = {
    "targets": targets_table,
    "targets-training": partial(targets_table, targets=TRAINING_TARGETS),
    "search": _search,
    "quantizer": _quantizer,
    "share": _share,
    "memory": _memory,
    "growth-time": _growth_time,
    "growth-memory": _growth_memory,
    "blur": _blur,
    "generation": _generation,
    "stage1": _stage1,
    "rendering": _rendering,
    "training": _training,
    "machine": machine_table,
}
"""By file name."""


def contest_table(
    cells: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    more: Callable[[Mapping[str, Any]], list[str]] = lambda _: [],
    more_columns: Sequence[str] = (),
    *,
    ours_is: str = OURS,
) -> str:
    """Milliseconds of each contender, and how many times those of ``ours_is`` that is."""
    names = _names(cells)

    def text(cell: Mapping[str, Any], name: str) -> str:
        entry, ours = cell["contenders"].get(name), cell["contenders"].get(ours_is, {})
        if entry is None:
            return _NONE
        if entry["status"] != "ok":
            return _word(entry)
        time = _milliseconds(entry)
        if name == ours_is or ours.get("status") != "ok":
            return time
        return f"{time} ({_times(entry['median'] / ours['median'])})"

    header = (*columns, *(f"{name}, ms" for name in names), *more_columns)
    rows = []
    for cell in cells:
        shown = (_setting(cell["settings"][column]) for column in columns)
        rows.append([*shown, *(text(cell, name) for name in names), *more(cell)])
    note = "Median, [quartiles] and, in parentheses, times ours."
    return to_markdown([Table(header, rows), Paragraph(note), *_reasons(cells)])


def _sizes(cells: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """MiB of each contender."""
    names = _names(cells)

    def text(entry: Mapping[str, Any] | None) -> str:
        if entry is None:
            return _NONE
        return f"{entry['bytes'] / _MIB:,.1f}" if entry["status"] == "ok" else _word(entry)

    header = (*columns, *(f"{name}, MiB" for name in names))
    rows = []
    for cell in cells:
        shown = (_setting(cell["settings"][column]) for column in columns)
        rows.append([*shown, *(text(cell["contenders"].get(name)) for name in names)])
    return to_markdown([Table(header, rows), *_reasons(cells)])


def _reasons(cells: Iterable[Mapping[str, Any]]) -> list[Paragraph]:
    """Why contenders have no number, each reason once."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name, entry in cell["contenders"].items():
            if entry["status"] != "ok":
                found.setdefault(_status(entry), {})[name] = None
    sentences = [f"{', '.join(names)}: {reason}" for reason, names in found.items()]
    return [Paragraph("Not measured: " + "; ".join(sentences) + ".")] if found else []


def _of(document: Document, prefix: str) -> list[Mapping[str, Any]]:
    cells = [cell for key, cell in document["cells"].items() if key.startswith(prefix)]

    def place(cell: Mapping[str, Any]) -> list[tuple[bool, float, str]]:
        values = cell["settings"].values()
        return [(isinstance(value, str), 0 if isinstance(value, str) else value, str(value)) for value in values]

    return sorted(cells, key=place)


def _names(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of all contenders, as they follow each other."""
    return list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))


def _bandwidth(document: Document) -> float:
    """Bytes a second; NaN if that was not measured."""
    return rates_of(document["cells"]).copied


def _speed(document: Document) -> float:
    """Operations a second."""
    return rates_of(document["cells"]).operations


def _limit(seconds: float) -> str:
    return three_digits(1000 * seconds) if math.isfinite(seconds) else _NONE


def _milliseconds(entry: Mapping[str, Any]) -> str:
    low, median, high = (three_digits(1000 * entry[name]) for name in ("low", "median", "high"))
    return f"{median} [{low}, {high}]"


def _times(value: float) -> str:
    return f"{value:.2f} x" if math.isfinite(value) else _NONE


def _setting(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _word(entry: Mapping[str, Any]) -> str:
    return str(entry["status"])


def _status(entry: Mapping[str, Any]) -> str:
    return f"{entry['status']} ({entry['reason']})"
