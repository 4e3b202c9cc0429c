"""Trainings on pictures of a folder, from the command line to the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.te_vqgan.__main__ import _parse, main
from examples.te_vqgan.cli.options import image_source, out_folder, stage1_settings
from examples.te_vqgan.cli.run import plan_jobs
from examples.te_vqgan.data.pictures import PictureSource, find_pictures, load_pictures
from examples.te_vqgan.reports.pictures import picture_findings
from examples.te_vqgan.reports.results import run_folder
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checkpoint import load_checkpoint
from examples.te_vqgan.runs.pipeline import STOPPED
from examples.te_vqgan.runs.running import CHECKPOINT, Interrupted
from examples.te_vqgan.stage1.pictures import Interior, crops, evaluate_pictures, smallest_side
from examples.te_vqgan.stage1.presets import PRESETS, Stage1Settings, settings_for
from examples.te_vqgan.stage1.train import train_stage1
from te_quant import EquivarianceReport, VQAutoencoder, measure_equivariance
from te_quant.shifts import crop
from tests.example.tiny_runs import save_picture, write_pictures
from tests.helpers import numpy_generator

TINY = dataclasses.replace(
    PRESETS["photos"],
    model=PRESETS["smoke"].model,
    canvas_size=32,
    train_images=64,
    steps=4,
    batch_size=4,
    bf16=False,
    warmup_steps=1,
    log_every=1,
    validate_every=2,
    checkpoint_every=1,
    eval_images=8,
    eval_sprites=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures."""
    path = tmp_path_factory.mktemp("My pictures")
    write_pictures(path, 5)
    return path


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "photos", TINY)


def _settings(folder: Path, arm: str = "vqgan") -> Stage1Settings:
    return settings_for("photos", arm, {"data": find_pictures(folder).data})


def _source(folder: Path, settings: Stage1Settings) -> PictureSource:
    return load_pictures(folder, crop_size=settings.canvas_size, smallest=smallest_side(settings))


def _words(command: str, folder: Path, out: Path, *more: str) -> list[str]:
    return [command, "--preset", "photos", "--data", f"images:{folder}", "--out", str(out), *more]


def _error(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms trained and measured, and their report; the pictures are prepared first."""
    path = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "photos", TINY)
        assert main(_words("prepare", folder, path)) == 0
        for arm in ("vqgan", "integer_exact"):
            assert main(_words("stage1", folder, path, "--arm", arm)) == 0
        assert main(["report", "--preset", "photos", "--out", str(path)]) == 0
    return path


def test_prepare_tells_every_picture_and_what_it_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, hashes and splits as JSON, and crops of every split as a picture."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "notes.txt").touch()
    assert main(_words("prepare", copy, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "3 train, 1 validation, 1 test pictures" in printed
    assert "Left out, by their suffix or as copies: notes.txt" in printed
    facts = json.loads((tmp_path / "out" / "data" / "data.json").read_text())
    assert facts["data"] == find_pictures(folder).data
    assert [row["split"] for row in facts["pictures"]].count("train") == 3
    assert (tmp_path / "out" / "data" / "samples.png").stat().st_size > 1_000


@pytest.mark.slow
def test_a_run_tells_on_what_it_was_trained(folder: Path, out: Path) -> None:
    """The manifest is in its provenance, the digest in its settings; the path is in neither."""
    run = run_folder(out, "vqgan", 0)
    facts = json.loads((run / "provenance.json").read_text())
    source = _source(folder, _settings(folder))
    assert facts["pictures"] == list(source.manifest)
    assert {row["sha256"] for row in facts["pictures"]} == {file.sha256 for file in find_pictures(folder).files}
    settings = (run / "settings.json").read_text()
    assert json.loads(settings)["data"] == find_pictures(folder).data
    assert folder.name not in settings


def test_equal_seeds_give_every_arm_the_same_crops(folder: Path) -> None:
    """Whatever their networks are; another seed gives others, but is measured on the same."""
    source = _source(folder, _settings(folder))
    first, *others = (_settings(folder, arm) for arm in ("vqgan", "te_vqgan", "stride_exact", "integer_exact"))
    expected = crops(first, source, "train").batch(3, 4)
    for settings in others:
        assert torch.equal(crops(settings, source, "train").batch(3, 4), expected)
    reseeded = dataclasses.replace(first, seed=1)
    assert not torch.equal(crops(reseeded, source, "train").batch(3, 4), expected)
    test = crops(first, source, "test").fixed(0, 8)
    assert torch.equal(crops(reseeded, source, "test").fixed(0, 8), test)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(folder: Path, out: Path, tmp_path: Path) -> None:
    """It needs no state of a loader, as crops follow from the step."""
    settings = _settings(folder)
    source = _source(folder, settings)
    with pytest.raises(Interrupted, match="stopped at step"):
        train_stage1(settings, tmp_path, source, stop=lambda step: step == 2, progress=False)
    assert train_stage1(settings, tmp_path, source, resume=True, progress=False)
    whole = run_folder(out, "vqgan", 0)
    first, second = (load_checkpoint(path / CHECKPOINT)[0] for path in (whole, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "log.jsonl").read_bytes() == (tmp_path / "log.jsonl").read_bytes()
    assert (whole / "evaluation.json").read_bytes() == (tmp_path / "evaluation.json").read_bytes()


@pytest.mark.slow
def test_other_pictures_are_another_run(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A moved folder is the same data and nothing is left to do; with one more picture it is refused."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert main(_words("stage1", moved, out, "--arm", "vqgan", "--resume")) == 0
    assert "was finished before, nothing to do" in capsys.readouterr().out
    save_picture(moved / "new.png", 255)
    for words in (["stage1", "--arm", "vqgan", "--resume"], ["stage1", "--arm", "mb"], ["prepare"], ["run"]):
        error = _error(_words(words[0], moved, out, *words[1:]), capsys)
        told = (
            "error: data must be the pictures of the run in .*-seed0, got others: new new.png; use another --out."
        )
        assert re.fullmatch(told, error.strip()), error
    assert find_pictures(folder).data in (out / "data" / "data.json").read_text()
    with pytest.raises(ValueError, match=r"data must be the pictures 'images:.*' of the settings, got images:"):
        crops(_settings(folder), _source(moved, TINY), "test")


@pytest.mark.slow
def test_other_pictures_under_an_interrupted_run_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what ``prepare`` recorded; without it, by the names of the data sets."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(folder, pictures)
    words = _words("stage1", pictures, out, "--arm", "vqgan")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "agree", lambda _: True)
        assert main(words) == STOPPED
    assert main(_words("prepare", pictures, out)) == 0
    capsys.readouterr()
    before = find_pictures(pictures).data
    (pictures / "0.png").unlink()
    error = _error([*words, "--resume"], capsys)
    assert "got others: missing 0.png; use another --out." in error
    (out / "data" / "data.json").unlink()
    error = _error([*words, "--resume"], capsys)
    assert f"others: data was '{before}', now '{find_pictures(pictures).data}'; " in error


@pytest.mark.slow
def test_runs_on_different_pictures_do_not_share_a_report(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in one folder nor by --into."""
    other = tmp_path / "other"
    write_pictures(other, 4)
    assert main(_words("stage1", other, tmp_path / "runs", "--arm", "vqgan")) == 0
    report = tmp_path / "report"
    shutil.copytree(out / "report", report)
    words = ["report", "--preset", "photos", "--out", str(tmp_path / "runs"), "--into", str(report)]
    assert "data must be the same in both results, got images:" in _error(words, capsys)


@pytest.mark.long
def test_an_arm_can_be_added_to_a_report(folder: Path, out: Path, tmp_path: Path) -> None:
    """The others stay with their samples, and what follows from results.json is written anew."""
    report = tmp_path / "report"
    shutil.copytree(out / "report", report)
    runs = tmp_path / "runs"
    assert main(_words("stage1", folder, runs, "--arm", "stride_exact")) == 0
    assert main(["report", "--preset", "photos", "--out", str(runs), "--into", str(report)]) == 0
    results = json.loads((report / "results.json").read_text())
    assert [run["arm"] for run in results["runs"]] == ["vqgan", "stride_exact", "integer_exact"]
    before, after = (
        load_checkpoint(path / "samples" / "pictures.safetensors")[0] for path in (out / "report", report)
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert "stride_exact.reconstructions" in after
    written = {path.name: path.read_bytes() for path in report.iterdir() if path.suffix in (".md", ".png")}
    assert main(["report", "--results", str(report)]) == 0
    for name, content in written.items():
        assert (report / name).read_bytes() == content


@pytest.mark.slow
def test_the_report_shows_the_numbers_of_the_runs(folder: Path, out: Path) -> None:
    """PSNR and κ with its interval; every picture with its hash; no test number without the number of codes."""
    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    assert "The numbers in this report mean nothing: it is a trial of 4 optimizer steps and 8 test images." in text
    assert "| | VQGAN | polyphase (integer-exact) |".replace(" ", "") in text.replace(" ", "")
    for arm in ("vqgan", "integer_exact"):
        evaluation = json.loads((run_folder(out, arm, 0) / "evaluation.json").read_text())
        assert f"{evaluation['test']['psnr']:.2f}" in text
        for name in ("equivariance", "equivariance_interior", "equivariance_circular"):
            found = EquivarianceReport.from_dict(evaluation[name]).aligned
            assert f"{found.kappa_text()} ({found.rate:.3f})" in text
    for file in find_pictures(folder).files:
        assert file.sha256[:12] in text
    results = json.loads((out / "report" / "results.json").read_text())
    assert len(results["pictures"]) == 5
    assert all("pictures" not in run["provenance"] for run in results["runs"])
    for name in ("quality", "window", "circular", "pictures"):
        assert (out / "report" / f"{name}.md").read_text(encoding="utf-8").rstrip() in text


@pytest.mark.slow
def test_digits_and_pictures_have_reports_of_their_own(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What compares digits refuses pictures."""
    error = _error(["compare", "--results", str(out / "report")], capsys)
    assert "results must be a folder with results of digits; the report of pictures holds its comparison" in error


@pytest.mark.parametrize(
    "words",
    [
        ["classifier", "--preset", "smoke"],
        ["stage2", "--preset", "smoke", "--arm", "vqgan"],
        ["evaluate", "--preset", "smoke", "--arm", "vqgan"],
        ["family", "--preset", "quick"],
    ],
)
def test_steps_that_need_digits_refuse_pictures(
    words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And name those that take them."""
    error = _error([*words, "--data", f"images:{folder}", "--out", str(tmp_path)], capsys)
    assert "data must be one of 'mnist', 'fashion-mnist', 'digits' for this step; prepare, stage1, run" in error


@pytest.mark.slow
def test_the_count_of_an_exact_arm_needs_digits(
    out: Path, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    """The pictures have their circular report."""
    error = _error(_words("exactness", folder, out, "--arm", "integer_exact"), capsys)
    assert "data must be one of 'mnist', 'fashion-mnist', 'digits' for this step" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "--preset", "smoke"],
            "data must be a data set of digits for a preset with a Stage 2; 'photos' and",
        ),
        (["run", "--preset", "small"], "held_out must be False for pictures, which have no digits to hold out"),
        (["stage1", "--preset", "small", "--arm", "vqgan"], "held_out must be False for pictures"),
        (
            ["stage1", "--preset", "photos", "--arm", "vqgan", "--data-dir", "x"],
            "data_dir must be unset for pictures of images:FOLDER, got x",
        ),
        (
            ["stage1", "--preset", "photos", "--arm", "vqgan", "--max-reduction", "3"],
            "max_reduction must be a power of two, got 3",
        ),
    ],
)
def test_options_that_do_not_fit_pictures_are_refused(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written."""
    assert message in _error([*words, "--data", f"images:{folder}", "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out" / "vqgan-seed0" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "photos"], "data must be images:FOLDER with your pictures in FOLDER, got 'images:'"),
        (["--preset", "photos", "--data", "digits"], "max_reduction must be 1 for the digits of 'digits'"),
        (["--preset", "quick", "--max-reduction", "2"], "max_reduction must be 1 for the digits of 'digits'"),
        (["--preset", "photos", "--data", "images:/no/such"], "data must name a folder that exists, got /no/such"),
    ],
)
def test_data_that_do_not_fit_the_preset_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only pictures are reduced, and only a folder holds them."""
    assert message in _error(["stage1", "--arm", "vqgan", *words], capsys)


def test_an_unknown_data_set_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder among them."""
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "--data", "imagenet"])
    error = capsys.readouterr().err
    assert "invalid choice: 'imagenet' (choose from 'mnist', 'fashion-mnist', 'digits', 'images:FOLDER')" in error


def test_canvas_sides_of_pictures_are_whole_quarters() -> None:
    """A window moves by a quarter of its side, by whole tokens."""
    with pytest.raises(ValueError, match="canvas_size must be a multiple of 16 for pictures, got 40"):
        dataclasses.replace(TINY, canvas_size=40)


def _options(*words: str) -> argparse.Namespace:
    return _parse(list(words))


def test_a_folder_of_results_is_not_named_by_a_path(folder: Path) -> None:
    """By preset and the last part of the folder."""
    options = _options("run", "--preset", "photos", "--data", f"images:{folder}/")
    assert out_folder(options).parts == ("runs", "te_vqgan", f"photos-{folder.name.replace(' ', '-')}")


def test_the_plan_trains_four_arms_from_the_folder(folder: Path, tmp_path: Path) -> None:
    """The words of each job, read back, are the settings that the plan compares."""
    options = _options(*_words("run", folder, tmp_path, "--max-reduction", "2", "--steps", "7"))
    jobs = list(plan_jobs(options))
    arms = []
    for job in jobs:
        read = _parse([*job.arguments, "--parent", "1"])
        arms.append(read.arm)
        assert stage1_settings(read, read.arm) == stage1_settings(options, read.arm)
        assert stage1_settings(read, read.arm).max_reduction == 2
        assert isinstance(image_source(read, stage1_settings(read, read.arm)), PictureSource)
    assert arms == ["vqgan", "te_vqgan", "stride_exact", "integer_exact"]


def _measured(arm: str, seed: int, kappa: float, **test: float) -> dict[str, Any]:
    """A run whose every κ is given, with an interval of ±0.05."""
    report = measure_equivariance(
        lambda x: (x[:, 0, ::4, ::4] > 0).long(),
        torch.rand(2, 1, 24, 24) * 2 - 1,
        protocol="crop",
        canvas_size=16,
        stride=4,
        num_codes=16,
    ).to_dict()
    for name in ("aligned", "sub_stride"):
        report[name] |= {"kappa": kappa, "kappa_defined": True, "kappa_interval": [kappa - 0.05, kappa + 0.05]}
    quality = {"psnr": 24.0, "used_codes": 50, "perplexity": 40.0, **test}
    names = ("equivariance", "equivariance_interior", "equivariance_circular")
    evaluation = {"test": quality, **dict.fromkeys(names, report)}
    return {"arm": arm, "title": arm.upper(), "settings": {"seed": seed}, "seed": seed, "evaluation": evaluation}


_EVERYWHERE = (
    "a window that moves by whole tokens, a window that moves by less than a token, circular shifts by whole "
    "tokens and circular shifts by less than a token"
)


@pytest.mark.parametrize(("kappa", "relation"), [(0.71, "higher"), (0.49, "lower"), (0.69, "not told apart")])
def test_findings_tell_only_what_intervals_tell(kappa: float, relation: str) -> None:
    """At every protocol."""
    (sentence,) = picture_findings({"runs": [_measured("a", 0, 0.6), _measured("b", 0, kappa)]})
    assert sentence == f"B, κ against A: {relation} for {_EVERYWHERE}."


def test_findings_differ_by_protocol() -> None:
    """Higher in one, lower in two, and the rest is not told apart."""
    base, run, higher, lower = (
        _measured(arm, 0, kappa) for arm, kappa in zip("abcd", (0.6, 0.6, 0.8, 0.4), strict=True)
    )
    run["evaluation"]["equivariance"] = {
        **run["evaluation"]["equivariance"],
        "sub_stride": lower["evaluation"]["equivariance"]["sub_stride"],
    }
    run["evaluation"]["equivariance_circular"] = {
        **lower["evaluation"]["equivariance_circular"],
        "aligned": higher["evaluation"]["equivariance_circular"]["aligned"],
    }
    (sentence,) = picture_findings({"runs": [base, run]})
    assert sentence == (
        "B, κ against A: not told apart for a window that moves by whole tokens; lower for a window that moves by "
        "less than a token and circular shifts by less than a token; higher for circular shifts by whole tokens."
    )


def test_findings_warn_of_fewer_codes_only_where_agreement_is_higher() -> None:
    """More agreement of a smaller effective codebook may mean nothing."""
    told = "It has fewer effective codes, which agree more often by themselves."
    for kappa, perplexity, warned in ((0.8, 20.0, True), (0.8, 39.0, False), (0.6, 20.0, False)):
        runs = [_measured("a", 0, 0.6), _measured("b", 0, kappa, perplexity=perplexity)]
        assert (told in picture_findings({"runs": runs})[0]) == warned


def test_findings_of_an_undefined_kappa_say_so() -> None:
    """A collapsed codebook is not compared; a second seed is named."""
    collapsed = _measured("a", 1, 0.6)
    for name in ("aligned", "sub_stride"):
        collapsed["evaluation"]["equivariance"][name] |= {"kappa": "nan", "kappa_defined": False}
    (sentence,) = picture_findings({"runs": [_measured("a", 0, 0.6), collapsed]})
    assert sentence == f"A, seed 1, κ against A, seed 0: undefined for {_EVERYWHERE}."


def _pictures(count: int, side: int) -> torch.Tensor:
    return torch.from_numpy(numpy_generator().random((count, 3, side, side))).float() * 2 - 1


def test_stacked_quarters_are_the_window_at_every_shift() -> None:
    """What the measurement cuts out of the stack is the crop of the picture."""
    interior, pictures = Interior(32, 4), _pictures(2, 48)
    stacked = interior.stacked(pictures)
    for shift in ((0, 0), (3, -5), (-8, 8)):
        expected = crop(pictures, shift, size=(32, 32))
        assert torch.equal(interior.windows(crop(stacked, shift, size=(16, 16))), expected)


def _agreement(tokenize: object, pictures: torch.Tensor) -> tuple[float, float]:
    """Rates over all tokens that both windows show, and over interior ones, after shifts by whole tokens."""
    assert callable(tokenize)
    interior = Interior(32, 4)
    whole = measure_equivariance(tokenize, pictures, protocol="crop", canvas_size=32, stride=4, num_codes=8)
    inside = measure_equivariance(
        lambda quarters: interior.of_tokens(tokenize(interior.windows(quarters))),
        interior.stacked(pictures),
        protocol="crop",
        canvas_size=16,
        stride=4,
        num_codes=8,
    )
    return whole.aligned.rate, inside.aligned.rate


def test_interior_tokens_do_not_see_the_border_of_the_window() -> None:
    """A tokenizer that fails only there is perfect inside, one that fails only inside is not (the control)."""

    def local(images: torch.Tensor) -> torch.Tensor:
        return ((images[:, 0, ::4, ::4] + 1) * 4).long().clamp(0, 7)

    edge = torch.ones(8, 8, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    places = torch.arange(64).view(8, 8) % 8
    pictures = _pictures(3, 48)
    assert _agreement(local, pictures) == (1.0, 1.0)
    whole, inside = _agreement(lambda images: torch.where(edge, places, local(images)), pictures)
    assert whole < 0.9
    assert inside == 1.0
    whole, inside = _agreement(lambda images: torch.where(edge, local(images), places), pictures)
    assert inside < 0.5


@pytest.mark.long
def test_exact_arms_agree_after_circular_shifts(tmp_path: Path) -> None:
    """Whole tokens for the stride-exact one, also below a token for the other; VQGAN (the control) for neither."""
    folder, rates = tmp_path, {}
    for number in range(3):
        noise = numpy_generator().integers(0, 256, (50, 60, 3), dtype=np.uint8)
        noise[0, 0, 0] = number
        Image.fromarray(noise).save(folder / f"{number}.png")
    for arm in ("vqgan", "stride_exact", "integer_exact"):
        settings = _settings(folder, arm)
        source = _source(folder, settings)
        model = VQAutoencoder(settings.model)
        latents = model.encode(crops(settings, source, "train").batch(0, 64)).detach()
        model.quantizer.kmeans_init(latents)
        numbers, samples = evaluate_pictures(model, settings, source, torch.device("cpu"))
        found = EquivarianceReport.from_dict(numbers["equivariance_circular"])
        rates[arm] = (found.aligned.rate, found.sub_stride.rate)
        assert numbers["test"]["images"] == 8
        assert samples["images"].shape == samples["reconstructions"].shape == (3, 3, 32, 32)
        assert samples["tokens"].shape == samples["moved_tokens"].shape == (3, 8, 8)
        assert numbers["equivariance"]["end_to_end"] is not None
        assert numbers["equivariance_interior"]["settings"]["image_size"] == [16, 16]
    assert rates["stride_exact"][0] > 0.999
    assert min(rates["integer_exact"]) > 0.999
    assert max(rates["vqgan"]) < 0.99
    assert rates["stride_exact"][1] < 0.99
