"""Results as one value: gathered from folders, brought together from several reports, and written among them."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.te_vqgan.classifier.model import weights_path
from examples.te_vqgan.cli.options import announce
from examples.te_vqgan.reports import report
from examples.te_vqgan.reports.results import collect, commands, finished_gpts, merged, read_results, to_text
from examples.te_vqgan.runs.checkpoint import load_checkpoint, save_checkpoint
from examples.te_vqgan.runs.files import sha256
from examples.te_vqgan.runs.running import WEIGHTS
from examples.te_vqgan.stage1.presets import ARMS

SIZES = (32, 16)


def _write(folder: Path, **parts: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def _settings(seed: int, data: str = "digits") -> dict[str, Any]:
    return {"seed": seed, "data": data, "steps": 6, "model": {"num_codes": 16}}


def _finish(
    out: Path, arm: str, seed: int, sizes: tuple[int, ...] = SIZES, data: str = "digits", **facts: Any
) -> None:
    """Leave behind what a finished run of both stages does; pictures tell whose they are."""
    folder = out / f"{arm}-seed{seed}"
    _write(folder, settings=_settings(seed, data), evaluation={"test": facts}, provenance={}, reading={"of": arm})
    lines = [{"step": step, "loss": float(step)} for step in range(1, 7)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_checkpoint(folder / "samples.safetensors", {"seed": torch.tensor(seed)}, {})
    for size in sizes:
        inner = folder / f"stage2-{size}"
        second = {"seed": seed, "train_images": size, "steps": 9, "stage1": _settings(seed, data)}
        _write(inner, settings=second, evaluation={}, provenance={})
        _write(inner, **{"rule-paper": {"held_out": [arm, seed, size]}})
        (inner / "log.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
        texts = {split: {"captions": [f"{split} caption"], "written": ["x"]} for split in ("held_out", "seen")}
        pictures = {"is": torch.tensor([seed, size]), "seen.generated": torch.zeros(1)}
        save_checkpoint(inner / "rule-paper.safetensors", pictures, texts)


def _runs(results: dict[str, Any]) -> list[tuple[str, int]]:
    return [(run["arm"], run["seed"]) for run in results["runs"]]


def test_everything_finished_is_gathered(tmp_path: Path) -> None:
    """Both stages, the classifier, the other data; in the order of arms and seeds; nothing that is unfinished."""
    for arm, seed in (("te_vqgan", 10), ("te_vqgan", 9), ("vqgan", 9)):
        _finish(tmp_path, arm, seed)
    _finish(tmp_path, "stride_exact", 1, sizes=())
    _finish(tmp_path, "stride_exact_te", 0)
    (tmp_path / "stride_exact_te-seed0" / "evaluation.json").unlink()
    (tmp_path / "vqgan-seed9" / "stage2-16" / "evaluation.json").unlink()
    (tmp_path / "vqgan-seed9" / "stage2-32" / "rule-paper.json").unlink()
    _write(tmp_path / "classifier", evaluation={"test": 1}, settings={"a": 1})
    _finish(tmp_path / "fashion-mnist", "vqgan", 9, sizes=(), data="fashion-mnist")
    _write(tmp_path / "fashion-mnist" / "classifier", evaluation={"test": 2})
    _write(tmp_path / "mnist" / "mb-seed0", settings={})

    results = collect(tmp_path, command="as typed", wall_seconds=3.0)
    assert _runs(results) == [("vqgan", 9), ("te_vqgan", 9), ("te_vqgan", 10), ("stride_exact", 1)]
    assert (results["commands"], results["wall_seconds"]) == (["as typed"], 3.0)
    assert results["classifier"] == {"settings": {"a": 1}, "evaluation": {"test": 1}}
    assert list(results["other"]) == ["fashion-mnist"]
    assert _runs(results["other"]["fashion-mnist"]) == [("vqgan", 9)]
    assert results["other"]["fashion-mnist"]["classifier"] == {"evaluation": {"test": 2}}
    first, second, *_ = results["runs"]
    assert first["title"] == "VQGAN"
    assert first["folder"] == "vqgan-seed9"
    assert list(first["stage2"]) == ["32"]
    assert first["stage2"]["32"]["rules"] == {}
    assert set(second["stage2"]) == {"32", "16"}
    assert second["stage2"]["16"]["rules"]["paper"] == {"held_out": ["te_vqgan", 9, 16]}
    assert second["stage2"]["16"]["log"] == [{"step": 9, "loss": 1.0}]
    assert [line["step"] for line in second["log"]] == [1, 2, 3, 4, 5, 6]
    assert second["reading"] == {"of": "te_vqgan"}
    assert "stage2" not in results["runs"][3]
    with pytest.raises(ValueError, match="out must be a folder with finished runs, got"):
        collect(tmp_path / "mnist", command="")


def test_logs_are_kept_small(tmp_path: Path) -> None:
    """Some fifty lines, always those of validations and the last, and five digits; counts stay whole."""
    _finish(tmp_path, "vqgan", 0, sizes=())
    lines = [{"step": step, "loss": step / 7, "batch_used_codes": 100_001} for step in range(1, 1000)]
    lines[500]["validation_l1"] = 2 / 3
    (tmp_path / "vqgan-seed0" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = collect(tmp_path, command="")["runs"][0]["log"]
    assert 48 <= len(kept) <= 60
    assert kept[0] == {"step": 1, "loss": 0.14286, "batch_used_codes": 100_001}
    assert {"step": 501, "loss": 71.571, "batch_used_codes": 100_001, "validation_l1": 0.66667} in kept
    assert kept[-1]["step"] == 999


def test_maps_over_shifts_are_kept_small(tmp_path: Path) -> None:
    """Six digits of every number in them, and all digits of what tables show."""
    entry = {"shift": [0, 1], "agreement": {"rate": 2 / 3, "interval": [1 / 3, 1.0], "compared": 1_234_567}}
    measured = {"aligned": 2 / 3, "aligned_by_shift": [entry], "sub_stride_by_shift": [entry]}
    _finish(tmp_path, "vqgan", 0, sizes=())
    _write(tmp_path / "vqgan-seed0", evaluation={"test": {"l1": 1 / 3}, "equivariance": measured})
    found = collect(tmp_path, command="")["runs"][0]["evaluation"]
    short = {"shift": [0, 1], "agreement": {"rate": 0.666667, "interval": [0.333333, 1.0], "compared": 1_234_567}}
    assert found["test"] == {"l1": 1 / 3}
    assert found["equivariance"] == {"aligned": 2 / 3, "aligned_by_shift": [short], "sub_stride_by_shift": [short]}


def test_a_classifier_that_is_not_finished_is_left_out(tmp_path: Path) -> None:
    """Its settings say nothing yet; and without other data there is no entry for them."""
    _finish(tmp_path, "vqgan", 0)
    _write(tmp_path / "classifier", settings={"a": 1})
    results = collect(tmp_path, command="")
    assert results.keys() == {"commands", "wall_seconds", "runs"}


def _collected(folder: Path, *runs: tuple[str, int], **options: Any) -> dict[str, Any]:
    """Results of these runs; JSON as they will be read."""
    for arm, seed in runs:
        _finish(folder, arm, seed, **options)
    return json.loads(json.dumps(collect(folder, command=f"into {folder.name}")))


def test_new_seeds_and_arms_are_added_in_order(tmp_path: Path) -> None:
    """Whichever is first; the commands say both; the same results again change nothing."""
    first = _collected(tmp_path / "a", ("vqgan", 1), ("k16", 0))
    second = _collected(tmp_path / "b", ("vqgan", 0), ("vqgan", 2), ("mb", 0))
    forth, back = merged(first, second), merged(second, first)
    order = [("vqgan", 0), ("vqgan", 1), ("vqgan", 2), ("mb", 0), ("k16", 0)]
    assert _runs(forth) == _runs(back) == order
    assert forth["runs"] == back["runs"]
    assert (forth["commands"], back["commands"]) == (["into a", "into b"], ["into b", "into a"])
    assert forth["wall_seconds"] is None
    assert merged(forth, second) == forth
    assert merged(first, first) == first
    whole = _collected(tmp_path / "c", *order)
    assert forth["runs"] == whole["runs"]
    # Nothing was changed in place.
    assert _runs(first) == [("vqgan", 1), ("k16", 0)]


def test_the_same_run_is_updated_and_keeps_what_was_not_measured_again(tmp_path: Path) -> None:
    """Other sizes of Stage 2 stay, other rules, and the count of exactness; what is in both is taken anew."""
    before = _collected(tmp_path / "a", ("vqgan", 0), ("mb", 0), l1=1.0)
    after = _collected(tmp_path / "b", ("vqgan", 0), sizes=(32,), l1=2.0)
    before["runs"][0]["exactness"] = {"counts": {}}
    after["runs"][0]["stage2"]["32"]["rules"] = {"2": "new"}
    result = merged(before, after)
    run, other = result["runs"]
    assert run["evaluation"]["test"] == {"l1": 2.0}
    assert other["evaluation"]["test"] == {"l1": 1.0}
    assert run["stage2"]["32"]["rules"] == {"paper": {"held_out": ["vqgan", 0, 32]}, "2": "new"}
    assert run["stage2"]["16"] == before["runs"][0]["stage2"]["16"]
    assert run["exactness"] == {"counts": {}}


@pytest.mark.parametrize("part", ["tokenizer", "GPT"])
def test_a_run_of_other_settings_does_not_replace_one(tmp_path: Path, part: str) -> None:
    """It is refused by its name and by what differs, also if no other seed is there to compare it with."""
    before, after = (_collected(tmp_path / name, ("vqgan", 0)) for name in ("a", "b"))
    run = after["runs"][0]
    if part == "tokenizer":
        del run["stage2"]
    whose, changed, was = {
        "tokenizer": ("vqgan, seed 0", run, 6),
        "GPT": ("the GPT of vqgan, seed 0, on 16 images", run.get("stage2", {}).get("16"), 9),
    }[part]
    changed["settings"]["steps"] = 70
    message = f"settings must be the same for {whose}, in both results, got steps was {was}, now 70; choose"
    with pytest.raises(ValueError, match=message):
        merged(before, after)


def _of_weights(run: dict[str, Any], tokenizer: str, gpt: str = "gpt") -> None:
    run["provenance"] = {"hashes": {"weights": tokenizer}}
    for part in run["stage2"].values():
        part["provenance"] = {"hashes": {"weights": gpt, "tokenizer": tokenizer}}


def test_what_stands_on_another_tokenizer_is_not_kept(tmp_path: Path) -> None:
    """Nor lost without a word: a run with other weights needs all of the GPTs that are there, measured anew."""
    before, after = (_collected(tmp_path / name, ("vqgan", 0)) for name in ("a", "b"))
    _of_weights(before["runs"][0], "first")
    before["runs"][0]["exactness"] = {}
    before["runs"][0]["stage2"]["32"]["rules"]["2"] = {"held_out": "of before"}
    _of_weights(after["runs"][0], "second", "other gpt")
    assert merged(before, after)["runs"] == after["runs"]
    del after["runs"][0]["stage2"]["16"]
    message = r"tokenizer must be the one of vqgan, seed 0, in both results, got other weights without the GPT on"
    with pytest.raises(ValueError, match=message):
        merged(before, after)
    # Equal weights, or some of a version that recorded none, keep it; a GPT trained again has its own rules.
    for hashes in ({"weights": "first"}, {}):
        after["runs"][0]["provenance"]["hashes"] = hashes
        (run,) = merged(before, after)["runs"]
        assert run["stage2"].keys() == {"32", "16"}
        assert list(run["stage2"]["32"]["rules"]) == ["paper"]
        assert "exactness" in run


def test_results_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """Seeds of other settings, Stage 2 of other settings, other data; only the seed may differ."""
    before = _collected(tmp_path / "a", ("vqgan", 0))
    longer = _collected(tmp_path / "b", ("vqgan", 1))
    longer["runs"][0]["settings"]["model"]["num_codes"] = 32
    message = r"settings must be the same for every seed of vqgan, got model.num_codes was 16, now 32; choose"
    with pytest.raises(ValueError, match=message):
        merged(before, longer)
    # Another arm may be another model.
    longer["runs"][0] |= {"arm": "k16", "title": ARMS["k16"].title}
    assert len(merged(before, longer)["runs"]) == 2
    gpt = _collected(tmp_path / "c", ("mb", 1))
    gpt["runs"][0]["stage2"]["16"]["settings"]["steps"] = 8
    message = r"settings must be the same for every Stage 2 of 16 images, got steps was 9, now 8; choose another"
    with pytest.raises(ValueError, match=message):
        merged(before, gpt)
    other = _collected(tmp_path / "d", ("mb", 0), sizes=(), data="mnist")
    with pytest.raises(ValueError, match="data must be the same in both results, got digits and mnist"):
        merged(before, other)


def test_classifiers_of_other_settings_are_refused(tmp_path: Path) -> None:
    """Accuracies that different readers gave do not stand in one table; a result without a reader has no say."""
    before, after = (_collected(tmp_path / name, ("vqgan", seed)) for name, seed in (("a", 0), ("b", 1)))
    before["classifier"] = {"settings": {"steps": 5, "seed": 0}, "evaluation": {}}
    after.pop("classifier", None)
    assert merged(before, after)["classifier"] == merged(after, before)["classifier"] == before["classifier"]
    after["classifier"] = {"settings": {"steps": 5, "seed": 3}, "evaluation": {}}
    assert merged(before, after)["classifier"] == after["classifier"]
    after["classifier"]["settings"]["steps"] = 6
    message = r"settings must be the same for the classifiers of the data, got steps was 5, now 6; choose another"
    with pytest.raises(ValueError, match=message):
        merged(before, after)
    others = [{**one, "classifier": {}, "other": {"mnist": one}} for one in (before, after)]
    with pytest.raises(ValueError, match=r"the classifiers of mnist, got steps was 5, now 6;"):
        merged(*others)


def test_other_data_sets_are_merged_too(tmp_path: Path) -> None:
    """Added, and seed by seed within one; a main result without any keeps those of the other."""

    def made(name: str, data: str, seed: int) -> dict[str, Any]:
        _finish(tmp_path / name / data, "vqgan", seed, sizes=(), data=data)
        return _collected(tmp_path / name, ("vqgan", 0))

    first, second = made("a", "fashion-mnist", 0), made("b", "fashion-mnist", 1)
    third, none = made("c", "mnist", 0), _collected(tmp_path / "d", ("vqgan", 0))
    both = merged(first, second)
    assert _runs(both["other"]["fashion-mnist"]) == [("vqgan", 0), ("vqgan", 1)]
    assert list(merged(third, both)["other"]) == list(merged(both, third)["other"]) == ["fashion-mnist", "mnist"]
    for results in (merged(both, none), merged(none, both)):
        assert results["other"] == both["other"]
    assert "other" not in merged(none, none)
    second["other"]["fashion-mnist"]["runs"][0]["settings"]["steps"] = 7
    with pytest.raises(ValueError, match=r"every seed of vqgan, got steps was 6, now 7"):
        merged(first, second)


def test_results_of_before_had_one_command(tmp_path: Path) -> None:
    """Published ones are read and added to all the same."""
    after = _collected(tmp_path / "a", ("vqgan", 0))
    before = copy.deepcopy(after)
    before["command"] = "as it was"
    del before["commands"]
    assert commands(before) == ["as it was"]
    result = merged(before, after)
    assert commands(result) == ["as it was", "into a"]
    assert "command" not in result


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and texts are a function of what lies beside them; the command line's tests draw them."""
    monkeypatch.setattr(report, "rendered", lambda results, stored: {})


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _tensor(folder: Path, name: str, key: str) -> Any:
    return load_checkpoint(folder / "samples" / f"{name}.safetensors")[0][key].tolist()


@pytest.mark.usefixtures("unrendered")
def test_a_report_written_into_a_folder_twice_is_the_same_as_once(tmp_path: Path) -> None:
    """Byte for byte; and its own folder is written anew, not added to."""
    out, target = tmp_path / "runs", tmp_path / "published"
    _finish(out, "vqgan", 0)
    _finish(out, "mb", 0)
    _finish(out / "mnist", "vqgan", 0, sizes=(), data="mnist")
    _write(out / "classifier", evaluation={})
    assert report.write_report(out, command="as typed", into=target) == target
    once = _files(target)
    assert {"results.json", "samples/vqgan.safetensors", "samples/mb-generated.safetensors"} <= once.keys()
    report.write_report(out, command="as typed", into=target)
    assert _files(target) == once
    assert report.write_report(out, command="as typed") == out / "report"
    assert _files(out / "report") == once
    for path in (out / "mb-seed0").rglob("evaluation.json"):
        path.unlink()
    report.write_report(out, command="as typed", into=target)
    assert _files(target) == once
    report.write_report(out, command="as typed")
    assert _runs(json.loads((out / "report" / "results.json").read_text())) == [("vqgan", 0)]


@pytest.mark.usefixtures("unrendered")
def test_reports_of_several_folders_are_one(tmp_path: Path) -> None:
    """In any order the same runs, pictures and captions as from one folder with all of them."""
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    for arm, seed, part in (("vqgan", 1, first), ("k16", 0, first), ("vqgan", 0, second), ("mb", 1, second)):
        for out in (whole, part):
            _finish(out, arm, seed)
    report.write_report(whole, command="typed")
    expected = _files(whole / "report")
    for number, order in enumerate(((first, second), (second, first))):
        target = tmp_path / f"published{number}"
        for out in order:
            report.write_report(out, command="typed", into=target)
        found = _files(target)
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"results.json"}:
            assert found[name] == expected[name], name
        assert json.loads(found["results.json"]) == json.loads(expected["results.json"])
    # The pictures are those of each arm's first seed and of the larger training set.
    assert _tensor(target, "vqgan", "seed") == 0
    assert _tensor(target, "vqgan-generated", "is") == [0, 32]
    # Figures show nothing of seen combinations.
    assert load_checkpoint(target / "samples" / "vqgan-generated.safetensors")[0].keys() == {"is"}
    results = json.loads((target / "results.json").read_text())
    assert list(results["samples"]) == ["VQGAN", "MB", "SC, K = 16"]
    assert results["captions"] == {"held_out": ["held_out caption"], "seen": ["seen caption"]}


@pytest.mark.usefixtures("unrendered")
def test_results_alone_stay_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds are added to a published ``results.json`` without samples; a report that lost them is refused."""
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    for seed, part in ((0, first), (1, second)):
        for out in (whole, part):
            _finish(out, "vqgan", seed)
    for out in (whole, first):
        report.write_report(out, command="typed")
    target = tmp_path / "published"
    target.mkdir()
    shutil.copy(first / "report" / "results.json", target)
    announce(report.write_report(second, command="typed", into=target))
    said = f"Results: {target / 'results.json'} (no report, as the folder has no samples)\n"
    assert capsys.readouterr().out == said
    found, expected = _files(target), _files(whole / "report")
    assert found.keys() == {"results.json"}
    assert json.loads(found["results.json"]) == json.loads(expected["results.json"])
    (target / "report.md").touch()
    with pytest.raises(ValueError, match=r"vqgan.safetensors must be in .*samples, got none; write"):
        report.write_report(second, command="typed", into=target)
    assert _files(target) == {**found, "report.md": b""}


@pytest.mark.usefixtures("unrendered")
def test_a_smaller_training_set_does_not_replace_the_pictures(tmp_path: Path) -> None:
    """Those of the larger one stay, though the run that is added has the same arm and seed."""
    large, small, target = (tmp_path / name for name in ("large", "small", "target"))
    _finish(large, "vqgan", 0, sizes=(32,))
    _finish(small, "vqgan", 0, sizes=(16,))
    report.write_report(large, command="typed", into=target)
    report.write_report(small, command="typed", into=target)
    assert _tensor(target, "vqgan-generated", "is") == [0, 32]
    (run,) = json.loads((target / "results.json").read_text())["runs"]
    assert run["stage2"].keys() == {"32", "16"}
    # The other way round they do.
    other = tmp_path / "other"
    report.write_report(small, command="typed", into=other)
    assert _tensor(other, "vqgan-generated", "is") == [0, 16]
    report.write_report(large, command="typed", into=other)
    assert _tensor(other, "vqgan-generated", "is") == [0, 32]
    # A tokenizer alone generates nothing.
    _finish(tmp_path / "alone", "mp", 0, sizes=())
    report.write_report(tmp_path / "alone", command="typed")
    assert "generated" not in json.loads((tmp_path / "alone" / "report" / "results.json").read_text())


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("rule", ["2", "tenth", "50"])
def test_runs_measured_under_other_rules_have_no_pictures(tmp_path: Path, rule: str) -> None:
    """Only the rule ``paper`` keeps them; the numbers are gathered all the same. With both there are pictures."""
    _finish(tmp_path, "vqgan", 0, sizes=(32,))
    _finish(tmp_path, "k16", 0, sizes=(32,))
    for arm in ("vqgan", "k16"):
        inner = tmp_path / f"{arm}-seed0" / "stage2-32"
        numbers = (inner / "rule-paper.json").read_text()
        (inner / f"rule-{rule}.json").write_text(numbers)
        if arm == "k16":
            for name in ("rule-paper.json", "rule-paper.safetensors"):
                (inner / name).unlink()
    report.write_report(tmp_path, command="typed")
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["generated"] == {"vqgan": "samples/vqgan-generated.safetensors"}
    for name in ("rule-paper.json", "rule-paper.safetensors"):
        (tmp_path / "vqgan-seed0" / "stage2-32" / name).unlink()
    report.write_report(tmp_path, command="typed")
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["generated"] == {}
    assert "captions" not in results
    assert [list(run["stage2"]["32"]["rules"]) for run in results["runs"]] == [[rule], [rule]]


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("name", ["samples.safetensors", "stage2-32/rule-paper.safetensors"])
def test_damaged_samples_leave_the_report_as_it_was(tmp_path: Path, name: str) -> None:
    """They are refused by the name of the run, and nothing is written, also if they come last."""
    out, target = tmp_path / "runs", tmp_path / "published"
    for arm in ("vqgan", "mb"):
        _finish(out, arm, 0)
    report.write_report(out, command="typed", into=target)
    before = _files(target)
    path = out / "mb-seed0" / name
    path.write_bytes(path.read_bytes()[:-1])
    (out / "vqgan-seed0" / "reading.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"mb-seed0/{name} must be a file that .*\); restore it, or "):
        report.write_report(out, command="typed again", into=target)
    assert _files(target) == before


@pytest.mark.usefixtures("unrendered")
def test_missing_samples_are_told_with_the_cure(tmp_path: Path) -> None:
    """Those of a run, and those of a published report."""
    _finish(tmp_path, "vqgan", 0)
    report.write_report(tmp_path, command="typed")
    (tmp_path / "report" / "samples" / "vqgan.safetensors").unlink()
    message = r"vqgan.safetensors must be in .*samples, got none; write the report again from the runs\."
    with pytest.raises(ValueError, match=message):
        report.render(tmp_path / "report")
    (tmp_path / "vqgan-seed0" / "samples.safetensors").unlink()
    message = r"samples.safetensors must be in .*vqgan-seed0, got none; restore it, or delete evaluation"
    with pytest.raises(ValueError, match=message):
        report.write_report(tmp_path, command="typed")


def test_what_cannot_be_drawn_leaves_the_report_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is drawn before the first file is written."""

    def rendered(*_arguments: Any) -> Any:
        raise ValueError("results must be drawable, got others.")

    monkeypatch.setattr(report, "rendered", rendered)
    _finish(tmp_path, "vqgan", 0)
    with pytest.raises(ValueError, match="results must be drawable"):
        report.write_report(tmp_path, command="typed")
    assert not (tmp_path / "report").exists()


def test_weights_of_another_run_are_refused(tmp_path: Path) -> None:
    """By the hashes in the provenance: of the model, and of the tokenizer that a GPT was trained on."""
    _finish(tmp_path, "vqgan", 0, sizes=(32,))
    run = tmp_path / "vqgan-seed0"
    gpt = run / "stage2-32"
    for folder, content in ((run, b"tokenizer"), (gpt, b"gpt")):
        (folder / "model").mkdir()
        (folder / WEIGHTS).write_bytes(content)
    hashes = {"weights": sha256(gpt / WEIGHTS), "tokenizer": sha256(run / WEIGHTS)}
    _write(gpt, provenance={"hashes": hashes})
    _write(run, provenance={"hashes": {"weights": hashes["tokenizer"]}})
    assert len(collect(tmp_path, command="")["runs"]) == 1
    (gpt / WEIGHTS).write_bytes(b"gp")
    with pytest.raises(ValueError, match=r"model must be the one that the run in .*stage2-32 ended with, got"):
        collect(tmp_path, command="")
    # Numbers remain without the weights.
    (gpt / WEIGHTS).unlink()
    collect(tmp_path, command="")
    (run / WEIGHTS).write_bytes(b"retrained")
    with pytest.raises(ValueError, match=r"model must be the one that the run in .*vqgan-seed0 ended with, got"):
        collect(tmp_path, command="")
    _write(run, provenance={"hashes": {"weights": sha256(run / WEIGHTS)}})
    message = r"tokenizer must be the one that the run in .*stage2-32 was trained with, got other weights; restore"
    with pytest.raises(ValueError, match=message):
        collect(tmp_path, command="")
    _write(gpt, provenance={})
    collect(tmp_path, command="")


@pytest.mark.parametrize("part", ["reading.json", "stage2-32/rule-2.json"])
def test_what_another_classifier_measured_is_refused(tmp_path: Path, part: str) -> None:
    """By the hash of its weights; where either is not known, nothing is compared."""
    _finish(tmp_path, "vqgan", 0, sizes=(32,))
    path, weights = tmp_path / "vqgan-seed0" / part, weights_path(tmp_path / "classifier")
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"first")
    _write(path.parent, **{path.stem: {"classifier": sha256(weights)}})
    collect(tmp_path, command="-")
    weights.write_bytes(b"second")
    told = f"the one that measured every run, got that of other weights in {path}; delete this file and give"
    with pytest.raises(ValueError, match=re.escape(told)):
        collect(tmp_path, command="-")
    _write(path.parent, **{path.stem: {}})
    collect(tmp_path, command="-")
    weights.unlink()
    _write(path.parent, **{path.stem: {"classifier": "of a classifier that is elsewhere"}})
    collect(tmp_path, command="-")


def test_copies_beside_the_runs_are_left_out(tmp_path: Path) -> None:
    """Of runs, trainings of Stage 2 and measurements, by their names; other folders hold no other data."""
    _finish(tmp_path, "vqgan", 0, sizes=(32,))
    expected = collect(tmp_path, command="")
    for path in ("vqgan-seed0", "vqgan-seed0/stage2-32", "vqgan-seed0/stage2-32/rule-paper.json"):
        source = tmp_path / path
        copy_to = source.with_name(f"{source.stem}-old{source.suffix}")
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy_to)
    for name in ("vqgan-seed", "vqgan-seed00", "unknown-seed0", "old/vqgan-seed0"):
        shutil.copytree(tmp_path / "vqgan-seed0", tmp_path / name)
    assert collect(tmp_path, command="") == expected
    assert [folder.name for folder in finished_gpts(tmp_path / "vqgan-seed0")] == ["stage2-32"]


@pytest.mark.parametrize(
    ("source", "copied", "message"),
    [
        ("vqgan-seed0", "vqgan-seed1", r"seed must be 1, as the name of .*vqgan-seed1 says, got 0; rename"),
        (
            "vqgan-seed0/stage2-32",
            "vqgan-seed0/stage2-64",
            r"train_images must be 64, .*stage2-64 says, got 32",
        ),
    ],
)
def test_copies_under_the_name_of_another_run_are_refused(
    tmp_path: Path, source: str, copied: str, message: str
) -> None:
    """They would count twice."""
    _finish(tmp_path, "vqgan", 0, sizes=(32,))
    shutil.copytree(tmp_path / source, tmp_path / copied)
    with pytest.raises(ValueError, match=message):
        collect(tmp_path, command="")


@pytest.mark.usefixtures("unrendered")
def test_unfinished_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error; those that were never begun are not known."""
    _finish(tmp_path, "vqgan", 0)
    report.write_report(tmp_path, command="typed")
    assert capsys.readouterr().err == ""
    _finish(tmp_path, "te_vqgan", 0)
    _finish(tmp_path / "fashion-mnist", "vqgan", 0, sizes=(), data="fashion-mnist")
    unfinished = ("te_vqgan-seed0", "vqgan-seed0/stage2-16", "fashion-mnist/vqgan-seed0")
    for name in unfinished:
        (tmp_path / name / "evaluation.json").unlink()
    (tmp_path / "mb-seed0").mkdir()
    report.write_report(tmp_path, command="typed")
    expected = f"left out, unfinished: {', '.join(sorted(unfinished[:2], reverse=True))}, {unfinished[2]}\n"
    assert capsys.readouterr().err == expected


def test_results_are_written_compactly_and_read_back() -> None:
    """The same value, numbers that JSON lacks included; a line for each run."""
    runs = [{"arm": arm, "title": "λ = 10", "log": [{"loss": 0.1 + 0.2}]} for arm in ("vqgan", "te_vqgan")]
    results = {"commands": ["typed"], "wall_seconds": None, "runs": runs, "other": {"runs": [1.5, float("inf")]}}
    text = to_text(results)
    assert json.loads(text) == results
    assert len(text) < len(json.dumps(results, indent=1))
    assert [line for line in text.splitlines() if line.startswith('{"arm":"vqgan"')]
    assert len(text.splitlines()) == 9


def test_results_of_the_first_version_have_rules(tmp_path: Path) -> None:
    """What it measured alone is the rule of then; what it drew from other numbers of codes had greedy captions."""
    case = {"quad1": {"digits": 1}}
    usual = {split: {"text_to_image": case, "image_to_text": case} for split in ("held_out", "seen")}
    part = {"settings": {"steps": 9, "top_fraction": 0.1, "temperature": 1.0, "stage1": _settings(0)}}
    part |= {"generation": usual, "sampling": {"generation-2": usual}}
    run = {"arm": "vqgan", "seed": 0, "settings": _settings(0), "stage2": {"32": part}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": [run], "other": {"fashion-mnist": {"runs": [run]}}}))
    results = read_results(path)
    for found in (results["runs"][0], results["other"]["fashion-mnist"]["runs"][0]):
        second = found["stage2"]["32"]
        assert second.keys() == {"settings", "rules"}
        assert second["rules"] == {"tenth": usual, "2": {"held_out": {"text_to_image": case}}}
        assert not {"top_fraction", "temperature"} & second["settings"].keys()
        assert second["settings"]["steps"] == 9
        assert second["settings"]["clip_norm"] == 1.0
        assert second["settings"]["stage1"]["l2_weight"] == found["settings"]["l2_weight"] == 4.0
        # Read again, it stays as it is.
    path.write_text(json.dumps(results))
    assert read_results(path) == results
