"""Performance targets, and whether the measurements meet them.

A target looks at ratios within one cell, contender against contender in the same rounds, never at times of
different runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.contest import OURS
from benchmarks.floor import rates_of
from benchmarks.generation import COMPILED, HUGGING_FACE, HUGGING_FACE_COMPILED, SUMMED
from benchmarks.problem import Size
from benchmarks.search import FUSED, WITHOUT_FAISS
from benchmarks.share import PEERS, relative_share, share, with_settings_of
from benchmarks.stage1 import MODES, plain_name
from benchmarks.training import DEFAULTS, NONE, PEER, PEER_ALIVE, results

__all__ = [
    "OWN_SEARCHES",
    "TARGETS",
    "TRAINING_TARGETS",
    "YARDSTICKS",
    "Target",
    "Verdict",
    "judge",
    "ratio",
]

YARDSTICKS = ("tiled product", "product", "fill of the result", "copy")
"""Contenders that do only a part of the work."""
OWN_SEARCHES = (OURS, FUSED, WITHOUT_FAISS)
"""Contenders that are this library."""

# Searches of which the fastest other takes less have a wider limit; seconds.
_SHORT = 0.005
_MANY_CODES = 1024
_WIDE = 128
_MIB = 2**20
_LARGE = Size(65536, 16384, 64)
# A quantizer that causes less of a training step cannot make it noticeably slower.
_NOTICEABLE = 0.03

Cells = Mapping[str, Mapping[str, Any]]
Values = Iterator[tuple[str, float]]


class Target(NamedTuple):
    """A promise.

    Attributes:
        text: what is promised.
        limit: the value.
        at_most: whether values must not exceed the limit, or not fall below it.
        values: from the cells to pairs of a label and a value.
        mean: the geometric mean counts, not the worst.
        unit: behind values in tables.
    """

    text: str
    limit: float
    at_most: bool
    values: Callable[[Cells], Values]
    mean: bool = False
    unit: str = " x"


class Verdict(NamedTuple):
    """What came out.

    Attributes:
        points: how many values there are; 0 means that nothing was measured.
        worst: the worst of them.
        where: its label.
        mean: their geometric mean.
        met: whether the promise is kept; ``None`` without values.
        missed_by: by how much of the limit it is missed, 0.1 for a tenth; 0 where met.
        failing: how many values break the limit.
    """

    points: int
    worst: float
    where: str
    mean: float
    met: bool | None
    missed_by: float
    failing: int


def judge(target: Target, cells: Cells) -> Verdict:
    """Hold the measurements against a promise."""
    pairs = list(target.values(cells))
    if not pairs:
        return Verdict(0, math.nan, "", math.nan, None, 0.0, 0)
    sign = 1 if target.at_most else -1
    where, worst = max(pairs, key=lambda pair: sign * pair[1])
    values = [value for _, value in pairs]
    mean = math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))
    counted = mean if target.mean else worst
    met = counted <= target.limit if target.at_most else counted >= target.limit
    quotient = counted / target.limit if target.at_most else target.limit / max(counted, 1e-12)
    failing = sum(sign * value > sign * target.limit for value in values)
    return Verdict(len(pairs), worst, where, mean, met, 0.0 if met else quotient - 1, failing)


def ratio(cell: Mapping[str, Any], over: str, under: str) -> float | None:
    """Median time of ``over`` by that of ``under``; ``None`` if one has none."""
    entries = [cell["contenders"].get(name, {}) for name in (over, under)]
    if any(entry.get("status") != "ok" or "median" not in entry for entry in entries):
        return None
    return float(entries[0]["median"] / entries[1]["median"])


def _ratios(
    section: str,
    over: str,
    under: str,
    keep: Callable[[Mapping[str, Any]], bool] = lambda _: True,
) -> Callable[[Cells], Values]:
    def values(cells: Cells) -> Values:
        for key, cell in cells.items():
            if key.startswith(section) and keep(cell["settings"]):
                value = ratio(cell, over, under)
                if value is not None:
                    yield _label(key, under if over == OURS else over), value

    return values


def _against_all(cells: Cells) -> Values:
    """How much longer each other implementation takes, everywhere but in Stage 1 and generation."""
    for key, cell in cells.items():
        if not key.startswith(("search/", "quantizer/", "blur/", "growth/time")):
            continue
        for name in cell["contenders"]:
            if name in (*OWN_SEARCHES, *YARDSTICKS):
                continue
            value = ratio(cell, name, OURS)
            if value is not None:
                yield _label(key, name), value


def _against_fastest(short: bool) -> Callable[[Cells], Values]:
    """Yield the time of ours / that of the fastest other search, where the latter takes less than 5 ms, or not."""

    def values(cells: Cells) -> Values:
        for key, cell in cells.items():
            # Without faiss the fastest other search is not the fastest that there is.
            if not key.startswith("search/") or cell["contenders"].get("faiss", {}).get("status") != "ok":
                continue
            times = {
                name: entry["median"]
                for name, entry in cell["contenders"].items()
                if entry["status"] == "ok" and name not in (*OWN_SEARCHES, *YARDSTICKS)
            }
            best = min(times, key=times.__getitem__, default=None)
            if best is None or (times[best] < _SHORT) != short:
                continue
            value = ratio(cell, OURS, best)
            if value is not None:
                yield _label(key, best), value

    return values


def _memory(*modes: str) -> Callable[[Cells], Values]:
    """Of the large size alone; the quick grid has none."""

    def values(cells: Cells) -> Values:
        for mode in modes:
            key = f"memory/{mode}-{_LARGE.label}"
            entry = cells.get(key, {}).get("contenders", {}).get(OURS, {})
            if entry.get("status") == "ok":
                yield _label(key, OURS), entry["bytes"] / _MIB

    return values


def _stage1(cells: Cells) -> Values:
    """Of each mode in which both networks were measured."""
    for key, cell in cells.items():
        if not key.startswith("stage1/modes"):
            continue
        for mode in MODES:
            value = ratio(cell, f"{OURS} {mode.name}", plain_name(mode))
            if value is not None:
                yield _label(key, mode.name), value


def _share(field: str) -> Callable[[Cells], Values]:
    """Ours, at its defaults and with the peer's settings, / each peer's, where the peer's is noticeable."""

    def values(cells: Cells) -> Values:
        for key, cell in cells.items():
            if not key.startswith("share/"):
                continue
            for peer in PEERS:
                theirs = share(cell, peer, field)
                if theirs is None or theirs.median <= _NOTICEABLE:
                    continue
                for name in (OURS, with_settings_of(peer)):
                    found = relative_share(cell, name, peer, field)
                    if found is not None:
                        # A geometric mean needs positive ratios.
                        yield _label(key, f"{name} / {peer}"), max(found, 0.01)

    return values


def _paddings(cells: Cells) -> Values:
    for key, cell in cells.items():
        if not key.startswith("stage1/padding"):
            continue
        for name in ("circular", "replicate"):
            value = ratio(cell, name, "zeros")
            if value is not None:
                yield _label(key, name), value


def _excess(*peers: str) -> Callable[[Cells], Values]:
    """Error beyond that of the network without a quantizer: ours at its defaults / the best of ``peers``.

    Images on which the best peer does as well as no quantizer say nothing, and are left out: its excess has to be
    more than twice its standard error over the seeds.
    """

    def values(cells: Cells) -> Values:
        for (data, K, C), group in results(cells).items():
            known = {name for name in (DEFAULTS, NONE, *peers) if name in group}
            known = {name for name in known if math.isfinite(group[name].mean("mse"))}
            theirs = known & set(peers)
            if not theirs or not {DEFAULTS, NONE} <= known:
                continue
            best = min(theirs, key=lambda name: group[name].mean("mse"))
            ours, excess = (group[name].mean("mse") - group[NONE].mean("mse") for name in (DEFAULTS, best))
            if excess > 2 * math.hypot(*(group[name].standard_error("mse") for name in (best, NONE))):
                # A geometric mean needs positive ratios.
                yield f"{data}, K = {K}, C = {C}", max(ours / excess, 0.01)

    return values


def _against_worst(cells: Cells) -> Values:
    for (data, K, C), group in results(cells).items():
        errors = {name: trained.mean("mse") for name, trained in group.items() if name != NONE}
        others = [error for name, error in errors.items() if name != DEFAULTS and math.isfinite(error)]
        if others and math.isfinite(errors.get(DEFAULTS, math.nan)):
            yield f"{data}, K = {K}, C = {C}", errors[DEFAULTS] / max(others)


def _used_share(cells: Cells) -> Values:
    for (data, K, C), group in results(cells).items():
        share = group[DEFAULTS].mean("used") / K if DEFAULTS in group else math.nan
        if K <= _MANY_CODES and math.isfinite(share):
            yield f"{data}, K = {K}, C = {C}", share


def _by_bytes(cells: Cells) -> Values:
    """Yield how many times as long compiled generation of one image takes as copying the bytes it has to read."""
    copied = rates_of(cells).copied
    for key, cell in cells.items():
        entry = cell["contenders"].get(COMPILED, {})
        if key.startswith("generation/B1-") and entry.get("status") == "ok" and math.isfinite(copied):
            yield _label(key, COMPILED), entry["median"] * copied / cell["facts"]["bytes"]


def _many_codes(settings: Mapping[str, Any]) -> bool:
    return bool(settings["K"] >= _MANY_CODES)


def _label(key: str, name: str) -> str:
    return f"{key.partition('/')[2]} ({name})"


_VQP = "vector-quantize-pytorch"

TARGETS: tuple[Target, ...] = (
    Target(
        "search time / tiled matmul time, C >= 128",
        1.2,
        True,
        _ratios("search/", OURS, "tiled product", lambda s: _many_codes(s) and s["C"] >= _WIDE),
    ),
    Target(
        "search time / tiled matmul time, C < 128",
        1.6,
        True,
        _ratios("search/", OURS, "tiled product", lambda s: _many_codes(s) and s["C"] < _WIDE),
    ),
    Target(
        "GPU: time of the fused search / matmul time",
        1.3,
        True,
        _ratios("search/", FUSED, "product", _many_codes),
    ),
    Target("search time / that of the fastest other, from 5 ms on", 1.05, True, _against_fastest(short=False)),
    Target("search time / that of the fastest other, below 5 ms", 1.25, True, _against_fastest(short=True)),
    Target("time of cdist and argmin / search time", 1.4, False, _ratios("search/", "cdist", OURS, _many_codes)),
    Target(
        "evaluation, forward: vector-quantize-pytorch / te_quant",
        4.0,
        False,
        _ratios("quantizer/eval", _VQP, OURS, _many_codes),
    ),
    Target("mean of the row above", 10.0, False, _ratios("quantizer/eval", _VQP, OURS, _many_codes), mean=True),
    Target(
        "training by gradient, forward and backward: vector-quantize-pytorch / te_quant",
        5.0,
        False,
        _ratios("quantizer/gradient", _VQP, OURS, _many_codes),
    ),
    Target("mean of the row above", 8.0, False, _ratios("quantizer/gradient", _VQP, OURS, _many_codes), mean=True),
    Target(
        "training by moving averages, forward and backward: vector-quantize-pytorch / te_quant",
        5.0,
        False,
        _ratios("quantizer/ema", _VQP, OURS, _many_codes),
    ),
    Target("mean of the row above", 8.0, False, _ratios("quantizer/ema", _VQP, OURS, _many_codes), mean=True),
    Target("any other implementation / te_quant, any size", 1.0, False, _against_all),
    Target(
        "peak memory beyond input and output, N = 65,536, K = 16,384, C = 64: search and evaluation",
        64.0,
        True,
        _memory("search", "eval"),
        unit=" MiB",
    ),
    Target("peak memory at the same size: training", 64.0, True, _memory("gradient", "ema"), unit=" MiB"),
    Target(
        "quantizer's share of a training step, where a peer's exceeds 3 %: te_quant / peer",
        0.5,
        True,
        _share("step"),
    ),
    Target("the same, timed inside the step", 0.5, True, _share("inside")),
    Target("the same of the step's peak memory", 0.5, True, _share("peak")),
    Target("Stage-1 step: te_quant / plain torch in the same mode", 1.05, True, _stage1),
    Target("Stage-1 step: circular or replicate padding / zero padding", 1.1, True, _paddings),
    Target("generation: uncached / cached", 10.0, False, _ratios("generation/B64", SUMMED, OURS)),
    Target(
        "generation: GPT-2 of transformers / te_quant", 1.5, False, _ratios("generation/B64", HUGGING_FACE, OURS)
    ),
    Target(
        "generation, both compiled, B = 64: GPT-2 of transformers / te_quant",
        1.5,
        False,
        _ratios("generation/B64", HUGGING_FACE_COMPILED, COMPILED),
    ),
    Target("the same, B = 1", 1.0, False, _ratios("generation/B1-", HUGGING_FACE_COMPILED, COMPILED)),
    Target("generation, compiled, B = 1: time / time of its bytes", 1.3, True, _by_bytes),
)
"""Of speed and memory, in the order of the table."""

TRAINING_TARGETS: tuple[Target, ...] = (
    Target(
        "error beyond that without a quantizer, where the peer has any, at the defaults, mean: VectorQuantizer / "
        "vector-quantize-pytorch",
        0.5,
        True,
        _excess(PEER),
        mean=True,
    ),
    Target(
        "the same / the better of vector-quantize-pytorch with and without k-means and expiry, mean",
        0.65,
        True,
        _excess(PEER, PEER_ALIVE),
        mean=True,
    ),
    Target("share of the codes in use at the defaults, K <= 1,024", 0.9, False, _used_share),
    Target("error at the defaults / that of the worst other contender", 1.0, True, _against_worst),
)
"""Of what is trained at the defaults."""
