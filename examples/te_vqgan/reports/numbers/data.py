"""The data that markers read: published results of the example, the paper's tables, benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.te_vqgan.reports.generation.paper import CLASSIFIER, TABLE1, TABLE2, TABLE3
from examples.te_vqgan.reports.generation.tables import full_size, read_right, share
from examples.te_vqgan.reports.numbers.values import Json, Place, Sample, Spread, Value, of_json
from examples.te_vqgan.reports.results import METRICS, read_results
from examples.te_vqgan.runs.checks import require, require_choice
from examples.te_vqgan.runs.files import read_json_object

__all__ = ["DATA", "ROOT", "Results", "confirmatory"]

ROOT = Path(__file__).resolve().parents[4]

_TASKS = {"t2i": "text_to_image", "i2t": "image_to_text"}
_QUADRANTS = ("quad1", "quad2", "quad3", "quad4")


class Results(Place):
    """Results of the example: an arm by its name, another data set as ``other["NAME"]``, or a part of the file.

    Args:
        content: as ``results.json`` has it.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def get(self, name: str) -> Value:
        """Return the runs of an arm, or another part of the results."""
        runs = [run for run in self.content["runs"] if run["arm"] == name]
        if runs:
            return _Runs(runs, full_size(self.content))
        if name == "other":
            return _Others(self.content["other"])
        arms = dict.fromkeys(str(run["arm"]) for run in self.content["runs"])
        require_choice("name", name, (*arms, *self.content))
        return Json(self.content).get(name)


class _Others(Place):
    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def at(self, key: int | str) -> Results:
        require_choice("data set", key, tuple(self.content))
        return Results(self.content[str(key)])


class _Runs(Place):
    """The runs of an arm: a task, a metric of the report, ``read``, a seed, or a part of each run's data."""

    def __init__(self, runs: Sequence[Mapping[str, Any]], images: int | None) -> None:
        self.runs = {int(run["seed"]): run for run in runs}
        self.images = images

    def get(self, name: str) -> Value:
        if name in _TASKS:
            return _Task(self.runs, _TASKS[name], {"images": self.images, "rule": "tenth", "split": "held_out"})
        if name == "read":
            measured = {seed: run for seed, run in self.runs.items() if "reading" in run}
            return Sample({seed: read_right(run, "reconstruction") for seed, run in measured.items()})
        if name == "kappa":
            return _Kappa(self.runs)
        if name in METRICS:
            return Sample({seed: METRICS[name].value(run["evaluation"]) for seed, run in self.runs.items()})
        parts = dict.fromkeys(part for run in self.runs.values() for part in run)
        require_choice("name", name, (*_TASKS, "read", "kappa", *METRICS, *parts))
        return _Parts({seed: Json(run).at(name) for seed, run in self.runs.items()})

    def at(self, key: int | str) -> Value:
        require_choice("seed", key, tuple(self.runs))
        return Json(self.runs[int(key)])


class _Kappa(Place):
    """The chance-corrected value of an agreement."""

    def __init__(self, runs: Mapping[int, Mapping[str, Any]]) -> None:
        self.runs = runs

    def get(self, name: str) -> Sample:
        kappas = {known: metric.kappa for known, metric in METRICS.items() if metric.kappa is not None}
        require_choice("agreement", name, tuple(kappas))
        return Sample({seed: kappas[name](run["evaluation"]) for seed, run in self.runs.items()})


class _Parts(Place):
    """The same part of every run."""

    def __init__(self, parts: Mapping[int, Value]) -> None:
        self.parts = parts

    def get(self, name: str) -> Value:
        return self.at(name)

    def at(self, key: int | str) -> Value:
        inner: dict[int, Value] = {}
        numbers: dict[int, float] = {}
        for seed, part in self.parts.items():
            found = part.at(key) if isinstance(part, Place) else part
            if isinstance(found, Place):
                inner[seed] = found
            else:
                numbers[seed] = found
        return _Parts(inner) if inner else Sample(numbers)


class _Task(Place):
    """Digit accuracy in one task: a case by its name, ``quads`` for all digits in quadrants.

    Its options are the size of the training set, the decoding rule, and the split.
    """

    def __init__(self, runs: Mapping[int, Mapping[str, Any]], task: str, options: Mapping[str, Any]) -> None:
        self.runs = runs
        self.task = task
        self.options = options

    def select(self, **options: int | float | str) -> _Task:
        for name in options:
            require_choice("option", name, tuple(self.options))
        return _Task(self.runs, self.task, {**self.options, **options})

    def get(self, name: str) -> Sample:
        cases = _QUADRANTS if name == "quads" else (name,)
        values = {}
        for seed, run in self.runs.items():
            found = self._measured(run)
            if found is not None:
                require_choice("case", name, ("quads", *found))
                values[seed] = share(found[case] for case in cases)
        return Sample(values)

    def _measured(self, run: Mapping[str, Any]) -> Mapping[str, Any] | None:
        rules = run.get("stage2", {}).get(str(self.options["images"]), {}).get("rules", {})
        split = rules.get(str(self.options["rule"]), {}).get(self.options["split"], {})
        cases: Mapping[str, Any] | None = split.get(self.task, {}).get("cases")
        return cases


class _Tree(Place):
    """Values by name."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = values

    def get(self, name: str) -> Value:
        require_choice("name", name, tuple(self.values))
        return self.values[name]

    def at(self, key: int | str) -> Value:
        return self.get(str(key))


class _PrintedTask(_Tree):
    """A row of Table 1, and for the other size of the training set of Table 2."""

    def __init__(self, values: Mapping[str, Value], arm: str) -> None:
        super().__init__(values)
        self.arm = arm

    def select(self, **options: int | float | str) -> Value:
        require_choice("options", tuple(options), [("images",)])
        require_choice("images", options["images"], tuple(TABLE2))
        return _Tree({"quad1": Spread(*TABLE2[int(options["images"])][self.arm])})


def _paper() -> Place:
    """The paper's tables: ``ARM.t2i.quad1``, ``ARM.t2i(images=100000).quad1``, ``table3["mnist"].ARM.codes``."""
    arms: dict[str, Value] = {}
    for arm, tasks in TABLE1.items():
        rows: dict[str, Value] = {}
        for name, task in _TASKS.items():
            cells = zip(_QUADRANTS, tasks[task], strict=True)
            rows[name] = _PrintedTask({case: Spread(*cell) for case, cell in cells}, arm)
        arms[arm] = _Tree(rows)
    table3 = {
        data: _Tree(
            {arm: _Tree({name: float(x) for name, x in row._asdict().items()}) for arm, row in rows.items()}
        )
        for data, rows in TABLE3.items()
    }
    return _Tree({**arms, "table3": _Tree(table3), "classifier": CLASSIFIER})


class _Cells(Place):
    """The cells of a measurement, some of them by their settings; the parts of all of them by name.

    Args:
        cells: each with its settings on the top level.
    """

    def __init__(self, cells: Sequence[Mapping[str, Any]]) -> None:
        self.cells = cells

    def select(self, **options: int | float | str) -> _Cells:
        for name in options:
            require_choice("option", name, self._names())
        found = [cell for cell in self.cells if all(cell[name] == value for name, value in options.items())]
        chosen = ", ".join(f"{name}={value}" for name, value in options.items())
        require(bool(found), "options", "those of at least one cell", chosen)
        return _Cells(found)

    def get(self, name: str) -> Value:
        require_choice("name", name, self._names())
        return _Parts({number: of_json(cell[name]) for number, cell in enumerate(self.cells)})

    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for cell in self.cells for name in cell))


class _Benchmarks(Place):
    """Median times in seconds: ``search["N4096-K256-C8"]["cdist"]``."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def get(self, name: str) -> Value:
        cells = self.content["cells"].items()
        found = {key.partition("/")[2]: cell["contenders"] for key, cell in cells if key.startswith(f"{name}/")}
        require_choice("section", name, (name,) if found else sorted({key.partition("/")[0] for key, _ in cells}))
        return _Tree({label: _Tree(_medians(contenders)) for label, contenders in found.items()})


def _medians(contenders: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    return {name: float(entry["median"]) for name, entry in contenders.items() if "median" in entry}


def _family(content: Mapping[str, Any]) -> Results:
    return Results(
        {"runs": [{**run, "arm": run["name"], "seed": run["settings"]["seed"]} for run in content["runs"]]}
    )


def confirmatory(content: Mapping[str, Any]) -> Place:
    """Return the tests of ``hypotheses.json``: ``primary.H3[1].p_holm`` is of the second comparison of H3.

    Args:
        content: of the file.
    """
    families: dict[str, Value] = {}
    for rule in content["rules"].values():
        tests: dict[str, list[Any]] = {}
        for comparison in rule["comparisons"]:
            tests.setdefault(comparison["hypothesis"], []).append(comparison)
        families[rule["family"]] = Json(tests)
    return _Tree(families)


def _cells(content: Mapping[str, Any]) -> Place:
    return _Tree({name: _Cells(content[name]) for name in ("cells", "sizes") if name in content})


def _trips(content: Mapping[str, Any]) -> Place:
    """Return trainings with and without the round-trip loss: ``cells(weight=1).trip.match``."""
    cells = []
    for run in content["runs"].values():
        settings, trip, test = run["settings"], run["round_trip"], run["test"]
        numbers = {
            "match": trip["match"][0],
            "again": trip["match"][1],
            "first": trip["psnr"][0],
            "second": trip["psnr"][1],
            "phases": trip["phases"],
            "psnr": test["psnr"],
            "codes": test["used_codes"],
            "perplexity": test["perplexity"],
        }
        cell = {"weight": settings["round_trip_weight"], "seed": settings["seed"], "trip": numbers}
        if "search" in run:
            found = run["search"]
            gained = found["psnr"][0] - run["encoder"]["psnr"][0]
            searched = {name: found[name] for name in ("whole", "used_codes", "cpu_seconds_per_image")}
            cell["search"] = {**searched, "match": found["match"][0], "psnr": found["psnr"][0], "gained": gained}
        if "encoder" in run:
            cell["encoder"] = {"psnr": run["encoder"]["psnr"][0]}
        cells.append(cell)
    return _cells({"cells": cells})


@functools.cache
def _results(name: str) -> Place:
    return Results(read_results(ROOT / "examples" / "te_vqgan" / "results" / name / "results.json"))


@functools.cache
def _read(path: str, place: Callable[[Mapping[str, Any]], Place] = Json) -> Place:
    return place(read_json_object(ROOT / path))


DATA: Mapping[str, Callable[[], Place]] = {
    "small": lambda: _results("small"),
    "fine": lambda: _results("small-fine"),
    "alive": lambda: _results("alive"),
    "photos": lambda: _results("photos"),
    "confirm": lambda: _results("confirmatory"),
    "attempts": lambda: _results("attempts"),
    "best": lambda: _results("best"),
    "narrow": lambda: _results("narrow"),
    "explore": lambda: _results("exploratory"),
    # Not there before all confirmatory runs are.
    "tests": lambda: _read("examples/te_vqgan/results/confirmatory/hypotheses.json", confirmatory),
    "family": lambda: _read("examples/te_vqgan/results/family/results.json", _family),
    "paper": functools.cache(_paper),
    "bench": lambda: _read("benchmarks/results/cpu/results.json", _Benchmarks),
    "avx2": lambda: _read("benchmarks/results/avx2/cpu/results.json", _Benchmarks),
    "paired": lambda: _read("benchmarks/results/paired/paired.json", _cells),
    "trips": lambda: _read("examples/te_vqgan/results/round-trips/round-trips.json", _trips),
    "copies": lambda: _read("benchmarks/results/copies/copies.json", _cells),
}
"""By the name that a marker begins with."""
