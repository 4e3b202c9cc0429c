"""The numbers of finished runs as one JSON value, and what tables and sentences ask of it."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.te_vqgan.classifier.model import weights_path
from examples.te_vqgan.classifier.settings import ClassifierSettings
from examples.te_vqgan.data.sources import CLASS_NAMES
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.runs.differences import differing
from examples.te_vqgan.runs.files import read_json_object, sha256
from examples.te_vqgan.runs.logs import read_log
from examples.te_vqgan.runs.recorded import require_recorded
from examples.te_vqgan.runs.running import has_ended
from examples.te_vqgan.stage1.presets import ARMS
from examples.te_vqgan.stage1.presets import present_form as stage1_form
from examples.te_vqgan.stage2.rules import RULES
from examples.te_vqgan.stage2.settings import present_form as stage2_form
from te_quant import EquivarianceReport

__all__ = [
    "METRICS",
    "Metric",
    "by_arm",
    "cell",
    "collect",
    "commands",
    "finished_gpts",
    "finished_runs",
    "mean_and_deviation",
    "merged",
    "read_results",
    "run_folder",
    "tell_unfinished",
    "to_text",
    "values_of",
]

# Enough points for the curves, and digits for the maps; the archive of a release holds every line and digit.
_LOG_LINES = 48
_BY_SHIFT = ("aligned_by_shift", "sub_stride_by_shift")
_ELSEWHERE = "choose another folder for --into"
# Copies that a user put next to the runs, such as vqgan-seed0-old, have other names.
_RUN = re.compile(r"(.+)-seed(0|[1-9][0-9]*)")
_GPT = re.compile(r"stage2-([1-9][0-9]*)")
_RULE = re.compile(rf"rule-({'|'.join(RULES)}|[1-9][0-9]*)")


class Metric(NamedTuple):
    """A row of the report's table.

    Attributes:
        label: the row's name, units in it.
        value: reads it from a run's evaluation; NaN where it is undefined.
        format: of one value.
        kappa: reads the chance-corrected value that must stand beside an agreement.
    """

    label: str
    value: Callable[[Mapping[str, Any]], float]
    format: str
    kappa: Callable[[Mapping[str, Any]], float] | None = None


def _entry(*path: str) -> Callable[[Mapping[str, Any]], float]:
    def read(evaluation: Mapping[str, Any]) -> float:
        value: Any = evaluation
        for name in path:
            value = value[name]
        return float(value)

    return read


def _agreement(name: str, label: str) -> Metric:
    def read(field: str) -> Callable[[Mapping[str, Any]], float]:
        def value(evaluation: Mapping[str, Any]) -> float:
            report = EquivarianceReport.from_dict(evaluation["equivariance"])
            return float(getattr(report.agreements()[name], field))

        return value

    return Metric(label, read("rate"), ".3f", read("kappa"))


METRICS: dict[str, Metric] = {
    "l1": Metric("reconstruction L1, images in [-1, 1]", _entry("test", "l1"), ".4f"),
    "l2": Metric("reconstruction L2 (mean square)", _entry("test", "l2"), ".5f"),
    "psnr": Metric("reconstruction PSNR, dB", _entry("test", "psnr"), ".2f"),
    "used": Metric("codes used at least once", _entry("test", "used_codes"), ".0f"),
    "frequent": Metric("codes above 0.1 % of use", _entry("test", "frequent_codes"), ".0f"),
    "perplexity": Metric("perplexity of the code use", _entry("test", "perplexity"), ".1f"),
    "orthogonality": Metric(
        "orthogonality penalty of all codes (Eq. 5 without λ)", _entry("codebook", "orthogonality"), ".5f"
    ),
    "cosine": Metric("mean |cosine| of two used codes", _entry("codebook", "mean_abs_cosine_used"), ".3f"),
    "placement": _agreement("placement", "placement agreement, as the paper measures (κ)"),
    "placement_foreground": _agreement("placement_foreground", "placement, only tokens with ink (κ)"),
    "aligned": _agreement("aligned", "agreement after shifts by whole tokens (κ)"),
    "aligned_foreground": _agreement("aligned_foreground", "whole tokens, only those with ink (κ)"),
    "sub_stride": _agreement("sub_stride", "agreement after shifts below a token (κ)"),
    "sub_stride_foreground": _agreement("sub_stride_foreground", "below a token, only those with ink (κ)"),
    "sub_stride_fourier": _agreement("sub_stride_fourier", "below a token, against Fourier-shifted latents (κ)"),
}


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Return where the run of ``arm`` with ``seed`` lies."""
    return out / f"{arm}-seed{seed}"


def collect(out: Path, *, command: str, wall_seconds: float | None = None) -> dict[str, Any]:
    """Read every finished run below ``out``.

    Args:
        out: the folder of a preset.
        command: what was typed to get the results.
        wall_seconds: how long that took, if it did everything.

    Raises:
        ValueError: no run is finished; or one has another seed than its folder, or weights, or a tokenizer, other
            than its provenance records, or was measured with another classifier than that in ``out``.
    """
    runs = _runs_in(out)
    require(bool(runs), "out", "a folder with finished runs", str(out))
    results: dict[str, Any] = {"commands": [command], "wall_seconds": wall_seconds, "runs": runs}
    classifier = _parts(out / "classifier", "settings", "evaluation", "provenance")
    if "evaluation" in classifier:
        results["classifier"] = classifier
    for data in sorted(CLASS_NAMES):
        runs = _runs_in(out / data)
        if runs:
            results.setdefault("other", {})[data] = {
                "runs": runs,
                "classifier": _parts(out / data / "classifier", "settings", "evaluation", "provenance"),
            }
    return results


def finished_runs(out: Path) -> list[Path]:
    """Return the folders of the finished runs in ``out``, in the order of the arms and of their seeds."""
    return [folder for folder in _named_runs(out) if has_ended(folder)]


def finished_gpts(tokenizer: Path) -> list[Path]:
    """Return the folders of the finished Stage 2 runs in that of their tokenizer."""
    return [folder for folder in _named_gpts(tokenizer) if has_ended(folder)]


def tell_unfinished(out: Path, others: Iterable[str] = ()) -> None:
    """Name on standard error the runs in ``out``, and in its folders of other data, that have not ended."""
    folders = (folder for part in (out, *(out / data for data in others)) for folder in _unfinished(part))
    names = ", ".join(folder.relative_to(out).as_posix() for folder in folders)
    if names:
        print(f"left out, unfinished: {names}", file=sys.stderr)


def _unfinished(out: Path) -> Iterator[Path]:
    for run in _named_runs(out):
        # The trainings on an unfinished tokenizer go with it.
        for folder in (run, *_named_gpts(run)) if has_ended(run) else (run,):
            if (folder / "settings.json").exists() and not has_ended(folder):
                yield folder


def _named_runs(out: Path) -> list[Path]:
    """Return the folders ``ARM-seedN`` in ``out``, finished or not."""
    names = {folder: _RUN.fullmatch(folder.name) for folder in out.glob("*-seed*")}
    known = {folder: (name[1], int(name[2])) for folder, name in names.items() if name and name[1] in ARMS}
    arms = list(ARMS)
    return sorted(known, key=lambda folder: (arms.index(known[folder][0]), known[folder][1]))


def _named_gpts(tokenizer: Path) -> list[Path]:
    return sorted(folder for folder in tokenizer.glob("stage2-*") if _GPT.fullmatch(folder.name))


def _runs_in(out: Path) -> list[dict[str, Any]]:
    runs = []
    weights = weights_path(out / "classifier")
    reader = sha256(weights) if weights.is_file() else None
    for folder in finished_runs(out):
        require_recorded(folder)
        arm, _, seed = folder.name.rpartition("-seed")
        run: dict[str, Any] = {"arm": arm, "title": ARMS[arm].title, "folder": folder.name}
        run |= _parts(folder, "settings", "evaluation", "provenance", "exactness", "reading")
        run["seed"] = run["settings"]["seed"]
        _require_own_name(folder, "seed", seed, run["settings"])
        maps = run["evaluation"].get("equivariance", {})
        maps.update({name: _shortened(maps[name], 6) for name in _BY_SHIFT if name in maps})
        _require_reader(reader, folder / "reading.json", run.get("reading", {}))
        run["log"] = _thinned(read_log(folder / "log.jsonl"))
        second = {}
        for inner in finished_gpts(folder):
            require_recorded(inner)
            # Files that the first version wrote, before there were rules.
            older = [path.stem for path in inner.glob("generation*.json")]
            part = _parts(inner, "settings", "evaluation", "provenance", *older)
            size = inner.name.removeprefix("stage2-")
            _require_own_name(inner, "train_images", size, part["settings"])
            named = [path.stem for path in inner.glob("rule-*.json") if _RULE.fullmatch(path.stem)]
            rules = _parts(inner, *named)
            for name, numbers in rules.items():
                _require_reader(reader, inner / f"{name}.json", numbers)
            part["rules"] = {name.removeprefix("rule-"): numbers for name, numbers in rules.items()}
            part["log"] = _thinned(read_log(inner / "log.jsonl"))
            second[size] = part
        if second:
            run["stage2"] = second
        runs.append(_present(run))
    return runs


def _require_reader(reader: str | None, path: Path, numbers: Mapping[str, Any]) -> None:
    """Refuse what another classifier than that with the hash ``reader`` measured, as far as that is known."""
    good = _agree(reader, numbers.get("classifier"))
    got = f"that of other weights in {path}; delete this file and give `evaluate` again"
    require(good, "classifier", "the one that measured every run", got)


def _require_own_name(folder: Path, name: str, expected: str, settings: Mapping[str, Any]) -> None:
    """Refuse the copy of a run under the name of another one."""
    found = settings[name]
    got = f"{found}; rename the folder, or move it elsewhere"
    require(str(found) == expected, name, f"{expected}, as the name of {folder} says", got)


def read_results(path: Path) -> dict[str, Any]:
    """Return what a report stored, of older versions too, in the form of :func:`collect`."""
    results = read_json_object(path)
    parts = [results, *results.get("other", {}).values()]
    for part in parts:
        part["runs"] = [_present(run) for run in part["runs"]]
    return results


def _present(run: dict[str, Any]) -> dict[str, Any]:
    """Bring a run that an older version stored into the present form."""
    run["settings"] = stage1_form(run["settings"])
    for part in run.get("stage2", {}).values():
        part["settings"] = stage2_form(part["settings"])
        rules = part.setdefault("rules", {})
        # What decoded like a rule of now. Under other numbers of codes captions were written greedily.
        older = {name: part.pop(name) for name in [*part] if name.startswith("generation")}
        older |= part.pop("sampling", {})
        for name, numbers in older.items():
            number = name.removeprefix("generation").removeprefix("-")
            if number:
                held_out = {"text_to_image": numbers["held_out"]["text_to_image"]}
                numbers = {**numbers, "held_out": held_out}
                numbers.pop("seen", None)
            rules.setdefault(number or "tenth", numbers)
    return run


def _parts(folder: Path, *names: str) -> dict[str, Any]:
    """Read those of the JSON files in ``folder`` that are there, by name."""
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: read_json_object(path) for name, path in paths.items() if path.exists()}


def to_text(results: Mapping[str, Any]) -> str:
    """Write results as compact JSON, with a line for each run so that a difference shows which of them changed."""
    lines = []
    for name, value in results.items():
        runs = ",\n".join(map(_compact, value)) if name == "runs" else ""
        text = f"[\n{runs}\n]" if name == "runs" else _compact(value)
        lines.append(f"{json.dumps(name)}:{text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def commands(results: Mapping[str, Any]) -> list[str]:
    """Return what was typed, a line for each time that runs were added."""
    # Results of before runs could be added have one, under another name.
    return list(results["commands"] if "commands" in results else [results["command"]])


def merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``before`` with everything that ``after`` has anew or in addition.

    A run is known by its arm and seed. One that is in both is taken from ``after``, with the measurements and the
    trainings of Stage 2 that only ``before`` has of the same weights.

    Raises:
        ValueError: the results are of different data; or a run has other settings in ``after``, or other weights
            without all of its trainings of Stage 2; or two seeds of an arm, or two trainings of Stage 2 on as many
            images, differ in other settings than the seed; or their classifiers do.
    """
    _require_one_reader("the data", before, after)
    result = {**before, **after, "runs": _merged_runs(before["runs"], after["runs"])}
    result.pop("command", None)
    other = {**before.get("other", {}), **after.get("other", {})}
    for data in set(before.get("other", {})) & set(after.get("other", {})):
        _require_one_reader(data, before["other"][data], after["other"][data])
        runs = _merged_runs(before["other"][data]["runs"], after["other"][data]["runs"])
        other[data] = {**after["other"][data], "runs": runs}
    if other:
        result["other"] = dict(sorted(other.items()))
    typed = dict.fromkeys([*commands(before), *commands(after)])
    return {**result, "commands": list(typed), "wall_seconds": None}


def _merged_runs(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    data = list(dict.fromkeys(run["settings"]["data"] for run in (*before, *after)))
    require(len(data) == 1, "data", "the same in both results", " and ".join(data))
    known = {(run["arm"], run["seed"]): dict(run) for run in before}
    for run in after:
        key = (run["arm"], run["seed"])
        known[key] = _updated(known[key], run) if key in known else dict(run)
    runs = sorted(known.values(), key=lambda run: (list(ARMS).index(run["arm"]), run["seed"]))
    for arm in dict.fromkeys(run["arm"] for run in runs):
        _require_alike(f"every seed of {arm}", [run["settings"] for run in runs if run["arm"] == arm])
    trainings = [(size, part["settings"]) for run in runs for size, part in run.get("stage2", {}).items()]
    for size in dict.fromkeys(size for size, _ in trainings):
        of_size = [{**settings, "stage1": None} for number, settings in trainings if number == size]
        _require_alike(f"every Stage 2 of {size} images", of_size)
    return runs


def _updated(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run as it is now, with what only ``old`` has of the same weights."""
    whose = f"{new['arm']}, seed {new['seed']}"
    _require_alike(f"{whose}, in both results", [old["settings"], new["settings"]])
    before, after = old.get("stage2", {}), new.get("stage2", {})
    # In the order of ``before``, so that adding the same results again changes nothing.
    shared = [size for size in before if size in after]
    for size in shared:
        settings = [part[size]["settings"] for part in (before, after)]
        _require_alike(f"the GPT of {whose}, on {size} images, in both results", settings)
    weights = [_recorded(run, "weights") for run in (old, new)]
    lost = [
        size
        for size, part in before.items()
        if size not in after and not _agree(*weights, _recorded(part, "tokenizer"))
    ]
    got = f"other weights without the GPT on {' and '.join(lost)} images that the results have; {_ELSEWHERE}"
    require(not lost, "tokenizer", f"the one of {whose}, in both results", got)
    if not _agree(*weights):
        return dict(new)
    second = {**before, **after}
    for size in shared:
        one, two = before[size], after[size]
        if _agree(_recorded(one, "weights"), _recorded(two, "weights")):
            second[size] = {**one, **two, "rules": {**one["rules"], **two["rules"]}}
    return {**old, **new, **({"stage2": second} if second else {})}


def _recorded(part: Mapping[str, Any], name: str) -> str | None:
    found: str | None = part.get("provenance", {}).get("hashes", {}).get(name)
    return found


def _agree(*hashes: str | None) -> bool:
    """Say whether hashes are equal, as far as they were recorded."""
    return len({*hashes} - {None}) < 2


def _require_one_reader(whose: str, *results: Mapping[str, Any]) -> None:
    read = [one["classifier"]["settings"] for one in results if "settings" in one.get("classifier", {})]
    _require_alike(f"the classifiers of {whose}", [ClassifierSettings.present_form(stored) for stored in read])


def _require_alike(whose: str, settings: Sequence[Mapping[str, Any]]) -> None:
    for other in settings[1:]:
        changes = differing({**settings[0], "seed": 0}, {**other, "seed": 0})
        require(not changes, "settings", f"the same for {whose}", f"{'; '.join(changes)}; {_ELSEWHERE}")


def by_arm(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group the runs by their title, in the order of the runs."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["title"], []).append(run)
    return groups


def values_of(metric: Metric, runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return one value of ``metric`` a run."""
    return [metric.value(run["evaluation"]) for run in runs]


def cell(metric: Metric, runs: Sequence[Mapping[str, Any]]) -> str:
    """Write the mean of ``metric`` over ``runs``, with its standard deviation if they are several, and κ."""
    text = mean_and_deviation(values_of(metric, runs), metric.format)
    if metric.kappa is None:
        return text
    return f"{text} ({mean_and_deviation([metric.kappa(run['evaluation']) for run in runs], metric.format)})"


def named(title: str, runs: int, most: int) -> str:
    """Write ``title``, and of how many seeds it is where another group has more."""
    return title if runs == most else f"{title}, {runs} of {most} seeds"


def mean_and_deviation(values: Sequence[float], pattern: str) -> str:
    """Write the mean of ``values`` and, if they are several, ± their standard deviation; NaN is "undefined"."""
    mean = statistics.fmean(values)
    if math.isnan(mean):
        return "undefined"
    text = format(mean, pattern)
    return text if len(values) == 1 else f"{text} ± {format(statistics.stdev(values), pattern)}"


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep every nth line, those with validation numbers, and the last, of numbers five digits."""
    every = max(1, len(lines) // _LOG_LINES)
    last = len(lines) - 1
    return [
        _shortened(line, 5)
        for number, line in enumerate(lines)
        if number % every == 0 or "validation_l1" in line or number == last
    ]


def _shortened(value: Any, digits: int) -> Any:
    """Return a value of JSON with this many significant digits of every number that is not whole."""
    match value:
        case float():
            return float(f"{value:.{digits}g}")
        case dict():
            return {name: _shortened(part, digits) for name, part in value.items()}
        case list():
            return [_shortened(part, digits) for part in value]
    return value
