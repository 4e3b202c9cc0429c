"""The table and the picture of what round trips cost."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.data.sources import load_digits
from examples.te_vqgan.reports import round_trips
from examples.te_vqgan.reports.round_trips import render, write_round_trips
from examples.te_vqgan.stage1.evaluation import dataset
from examples.te_vqgan.stage1.presets import settings_for, to_dict
from examples.te_vqgan.stage1.round_trip import measure_round_trips
from examples.te_vqgan.stage1.token_search import search_tokens
from te_quant import VQAutoencoder
from tests.published import published


def _run(weight: float, seed: int, match: float, psnr: float) -> dict[str, Any]:
    settings = settings_for("smoke", "integer_exact", {"seed": seed, "round_trip_weight": weight})
    trip = {
        "images": 8,
        "match": [match, 0.99],
        "psnr": [psnr, psnr - 0.1],
        "ink": 0.5,
        "whole": 0.25,
        "phases": 1.0,
    }
    return {
        "arm": "integer_exact",
        "settings": to_dict(settings),
        "round_trip": trip,
        "test": {"images": 16, "psnr": psnr, "used_codes": 100, "perplexity": 50.0},
        "kappa": {"aligned": 1.0, "sub_stride": 1.0},
        "seconds": 1.0,
        "commit": "abc",
    }


RUNS = {
    "a/integer_exact-seed0": _run(0.0, 0, 0.7, 28.0),
    "a/integer_exact-seed1": _run(0.0, 1, 0.8, 29.0),
    "b/integer_exact-seed0": _run(1.0, 0, 0.9, 27.5),
    "b/integer_exact-seed1": _run(1.0, 1, 0.94, 28.7),
    "c/integer_exact-seed5": _run(3.0, 5, 0.99, 27.0),
}


def test_what_is_lost_is_paired_by_seed(tmp_path: Path) -> None:
    """And is left out where there is no training of that seed without the loss."""
    write_round_trips(tmp_path, RUNS, command="x")
    rows = [line.split("|") for line in (tmp_path / "round-trips.md").read_text().splitlines() if line[:1] == "|"]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows[2:]}
    assert cells["0"][:2] == ["0, 1", "0.750 ± 0.071"]
    assert cells["1"][:2] == ["0, 1", "0.920 ± 0.028"]
    lost = rows[0].index(" lost, dB ") - 2
    assert [cells[weight][lost] for weight in ("0", "1", "3")] == ["0.00 ± 0.00", "0.40 ± 0.14", ""]


def _searched(run: dict[str, Any], encoder: float, psnr: float | None) -> dict[str, Any]:
    trip = run["round_trip"]
    found = {**run, "encoder": {**trip, "psnr": [encoder]}}
    if psnr is not None:
        found["search"] = {
            **trip,
            "match": [1.0],
            "psnr": [psnr],
            "used_codes": 90,
            "perplexity": 40.0,
            "kappa": {"aligned": 1.0, "sub_stride": 0.99},
            "shifted": 4,
            "penalties": [0.1],
            "cpu_seconds_per_image": 5.0,
        }
    return found


def test_the_search_is_compared_with_both_encoders_over_the_same_images(tmp_path: Path) -> None:
    """Its own one, and that of the training of its seed without the loss."""
    write_round_trips(tmp_path, RUNS, command="x")
    assert not (tmp_path / "search.md").exists()
    names = list(RUNS)
    numbers = [(30.0, None), (31.0, None), (27.0, 28.0), (27.5, 28.7), (26.0, 27.0)]
    runs = {name: _searched(RUNS[name], *pair) for name, pair in zip(names, numbers, strict=True)}
    write_round_trips(tmp_path, runs, command="x")
    rows = [line.split("|") for line in (tmp_path / "search.md").read_text().splitlines() if line[:1] == "|"]
    header = [cell.strip() for cell in rows[0]]
    cells = {row[1].strip(): [cell.strip() for cell in row] for row in rows[2:]}
    assert list(cells) == ["1", "3"]
    gained, lost = header.index("gained, dB"), header.index("lost, dB")
    assert [cells[weight][gained] for weight in cells] == ["1.10 ± 0.14", "1.00"]
    assert [cells[weight][lost] for weight in cells] == ["2.15 ± 0.21", ""]


def test_later_runs_join_the_earlier_ones(tmp_path: Path) -> None:
    """One of the same name is replaced."""
    write_round_trips(tmp_path, dict(list(RUNS.items())[:2]), command="x")
    write_round_trips(tmp_path, dict(list(RUNS.items())[1:]), command="y")
    runs = json.loads((tmp_path / "round-trips.json").read_text())["runs"]
    assert list(runs) == list(RUNS)
    assert [run["command"] for run in runs.values()] == ["x", "y", "y", "y", "y"]
    assert (tmp_path / "round-trips.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_of_other_settings_are_refused(tmp_path: Path) -> None:
    """Only seed and weight may differ."""
    other = copy.deepcopy(RUNS["a/integer_exact-seed0"])
    other["settings"]["steps"] = 7
    with pytest.raises(
        ValueError,
        match="with settings that differ in seed and weight only, got 2 kinds; give others another --into",
    ):
        write_round_trips(tmp_path, {**RUNS, "d/integer_exact-seed0": other}, command="x")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"into must be a folder with round-trips\.json"):
        render(tmp_path / "nothing")


def test_settings_of_an_older_version_are_the_same(tmp_path: Path) -> None:
    """A setting that it did not have yet takes its default; the same setting with another value is refused."""
    older = copy.deepcopy(RUNS["a/integer_exact-seed1"])
    assert older["settings"].pop("shift_weight") == 0
    write_round_trips(tmp_path, {**RUNS, "a/integer_exact-seed1": older}, command="x")
    older["settings"]["shift_weight"] = 0.5
    with pytest.raises(ValueError, match="settings that differ in seed and weight only, got 2 kinds"):
        write_round_trips(tmp_path, {"a/integer_exact-seed1": older}, command="x")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("round_trip", {"images": 9}, "images must be the same for all runs in --into, got 8 and 9"),
        ("encoder", {"images": 9}, "search-images must be the same for all runs in --into, got 8 and 9"),
        ("search", {"images": 9}, "search-images must be the same for all runs in --into, got 8 and 9"),
        (
            "search",
            {"penalties": [7]},
            r"penalties must be the same for all runs in --into, got \[0.1\] and \[7\]",
        ),
    ],
)
def test_runs_that_were_measured_differently_are_refused(
    tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    """The note under a table speaks of all of its rows."""
    runs = {name: _searched(run, 30.0, 29.0) for name, run in RUNS.items()}
    write_round_trips(tmp_path, runs, command="x")
    other = runs["b/integer_exact-seed1"]
    with pytest.raises(ValueError, match=message):
        write_round_trips(tmp_path, {"b/integer_exact-seed1": other | {part: other[part] | change}}, command="x")
    write_round_trips(tmp_path, RUNS, command="x")
    assert not (tmp_path / "search.md").exists()


@pytest.mark.slow
def test_the_command_measures_finished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From training to table, with and without the loss; the search is a short one."""
    short = functools.partial(search_tokens, penalties=[0.1], candidates=4, max_steps=2)
    monkeypatch.setattr(round_trips, "search_tokens", short)
    for weight in ("0", "1"):
        words = ["stage1", "--preset", "smoke", "--data", "digits", "--arm", "integer_exact", "--threads", "1"]
        assert main([*words, "--round-trip-weight", weight, "--out", str(tmp_path / weight)]) == 0
    folders = [str(tmp_path / weight / "integer_exact-seed0") for weight in ("0", "1")]
    into = str(tmp_path / "results")
    words = ["round-trips", "--runs", *folders, "--into", into, "--images", "8", "--threads", "1"]
    assert main([*words, "--search-images", "4"]) == 0
    assert "of the tokens come back" in capsys.readouterr().out
    runs = json.loads((tmp_path / "results" / "round-trips.json").read_text(encoding="utf-8"))["runs"]
    assert ["search" in run for run in runs.values()] == [False, True]
    [searched] = [run["search"] for run in runs.values() if "search" in run]
    [encoder] = [run["encoder"] for run in runs.values() if "search" in run]
    assert searched["images"] == 4
    costs = [10 ** (-trip["psnr"][0] / 10) * 4 + 0.1 * (1 - trip["match"][0]) for trip in (searched, encoder)]
    assert costs[0] < costs[1]
    assert main(["round-trips", "--into", into]) == 0
    assert "| weight | seeds |" in capsys.readouterr().out
    other = copy.deepcopy(RUNS["a/integer_exact-seed0"])
    write_round_trips(
        tmp_path / "other", {"d": other | {"settings": other["settings"] | {"steps": 7}}}, command="x"
    )
    monkeypatch.setattr(round_trips, "measure_run", None)  # would take long
    assert main(["round-trips", "--runs", *folders, "--into", str(tmp_path / "other")]) == 1
    assert "that differ in seed and weight only, got 2 kinds" in capsys.readouterr().err
    assert main(["round-trips", "--runs", *folders, "--into", into, "--images", "9"]) == 1
    assert "images must be the same for all runs in --into, got 8 and 9" in capsys.readouterr().err
    assert main(["round-trips", "--runs", str(tmp_path), "--into", into]) == 1
    assert "folder must be that of a finished stage1 run" in capsys.readouterr().err


def test_the_published_tokenizer_reads_back_its_pictures() -> None:
    """Far more of them than one that was trained without the loss, also of digits of another data set."""
    settings = settings_for("small", "integer_exact", {"data": "digits", "held_out": False, "eval_images": 32})
    images = dataset(settings, load_digits("digits"), "test")
    matches = []
    for name in ("round-trips/tokenizer", "small/weights/tokenizer"):
        folder = published(f"{name}/model.safetensors").parent
        model = VQAutoencoder.from_pretrained(folder, dtype=torch.float32)
        matches.append(measure_round_trips(model, images, 32, torch.device("cpu"), cycles=1)["match"][0])
    assert matches[0] > 0.65
    assert matches[1] < 0.55


def test_the_published_table_follows_from_its_data(tmp_path: Path) -> None:
    """A picture may differ with the version of matplotlib."""
    (tmp_path / "round-trips.json").write_bytes(published("round-trips/round-trips.json").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_trips, "encode_png", lambda *_, **__: b"")
        render(tmp_path)
    for name in ("round-trips.md", "search.md"):
        assert (tmp_path / name).read_text() == published(f"round-trips/{name}").read_text()
