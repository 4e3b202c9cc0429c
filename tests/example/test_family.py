"""The comparison of quantizers: each is trained once, in the same way, and measured."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.data.sources import DigitSource
from examples.te_vqgan.family import train as family
from examples.te_vqgan.family.train import FAMILY, build_quantizer, collect_family, member_settings, train_family
from examples.te_vqgan.reports.compare import scatter
from examples.te_vqgan.reports.family import family_scatter, family_table, write_family
from examples.te_vqgan.runs.logs import read_log
from examples.te_vqgan.stage1.joint import joint_indices, num_combinations, vector_quantizer
from examples.te_vqgan.stage1.trainer import Stage1Trainer
from te_quant import FSQ, AutoencoderConfig, ResidualVectorQuantizer, VQAutoencoder
from te_quant.autoencoder.config import quantizer_fields
from tests.example.tiny_runs import random_source, stage1_settings
from tests.helpers import plain_quantizer
from tests.published import published

SETTINGS = stage1_settings()


@pytest.fixture(scope="module")
def source() -> DigitSource:
    """Random pictures: nothing here depends on what they show."""
    return random_source()


@pytest.fixture(scope="module")
def trained(source: DigitSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole family, each a few steps."""
    out = tmp_path_factory.mktemp("family")
    assert train_family(SETTINGS, out, source, progress=False, command="typed") == list(FAMILY)
    return out


@pytest.mark.parametrize("name", FAMILY)
def test_every_quantizer_learns(name: str) -> None:
    """Its loss on one batch falls in a few steps."""
    maker = functools.partial(build_quantizer, name, SETTINGS.model.code_dim)
    trainer = Stage1Trainer(member_settings(SETTINGS, name), torch.device("cpu"), quantizer=maker)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    losses = [float(trainer.train_step(images)["loss"]) for _ in range(SETTINGS.steps)]
    assert losses[-1] < losses[0]


def test_every_quantizer_is_measured(trained: Path) -> None:
    """No loss is lost, and all numbers of the evaluation are there."""
    runs = collect_family(SETTINGS, trained, seeds=[0], command="typed")["runs"]
    assert [run["name"] for run in runs] == list(FAMILY)
    for run in runs:
        losses = [line["loss"] for line in read_log(trained / f"{run['name']}-seed0" / "log.jsonl")]
        assert len(losses) == SETTINGS.steps
        assert all(math.isfinite(loss) for loss in losses), run["name"]
        test = run["evaluation"]["test"]
        assert 1 <= test["perplexity"] <= test["used_codes"] <= run["evaluation"]["combinations"]
        assert test["l1"] > 0
        assert run["provenance"]["command"] == "typed"
        assert run["settings"]["quantizer"]["kind"] == FAMILY[run["name"]].kind
    assert {run["evaluation"]["combinations"] for run in runs} == {240, 256}
    learnt = {run["name"]: run["evaluation"]["learnt_numbers"] for run in runs}
    assert learnt["vq"] == learnt["vq_ema"] == learnt["vq_defaults"]
    assert learnt["vq"]["quantizer"] == 256 * SETTINGS.model.code_dim
    assert learnt["fsq"]["quantizer"] == 0


def test_finished_members_are_not_trained_again(
    trained: Path, source: DigitSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call takes no step; a member that is gone (the negative control) is trained anew, to equal bits."""
    steps: list[int] = []
    step = Stage1Trainer.train_step

    def counted(self: Stage1Trainer, images: torch.Tensor) -> dict[str, torch.Tensor]:
        steps.append(self.step)
        return step(self, images)

    monkeypatch.setattr(Stage1Trainer, "train_step", counted)
    assert train_family(SETTINGS, trained, source, progress=False) == []
    assert steps == []
    path = trained / "rvq-seed0" / "evaluation.json"
    before = path.read_bytes()
    for file in ("evaluation.json", "checkpoint.safetensors"):
        (trained / "rvq-seed0" / file).unlink()
    assert train_family(SETTINGS, trained, source, progress=False, command="typed") == ["rvq"]
    assert steps == list(range(SETTINGS.steps))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "name",
    ["vq_orthogonal", pytest.param("fsq", marks=pytest.mark.slow), pytest.param("rvq", marks=pytest.mark.slow)],
)
def test_stopped_member_goes_on(name: str, source: DigitSource, tmp_path: Path, monkeypatch: Any) -> None:
    """From the last checkpoint, to the same bits as without the stop."""
    step = Stage1Trainer.train_step

    def crash(self: Stage1Trainer, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step == 5:
            raise RuntimeError("power cut")
        return step(self, images)

    train_family(SETTINGS, tmp_path / "once", source, names=[name], progress=False)
    monkeypatch.setattr(Stage1Trainer, "train_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train_family(SETTINGS, tmp_path / "often", source, names=[name], progress=False)
    monkeypatch.undo()
    assert train_family(SETTINGS, tmp_path / "often", source, names=[name], progress=False) == [name]
    for file in ("evaluation.json", "log.jsonl"):
        once, often = (tmp_path / out / f"{name}-seed0" / file for out in ("once", "often"))
        assert once.read_bytes() == often.read_bytes()


def test_all_start_from_the_same_encoder() -> None:
    """Layer by layer but for those whose size is the quantizer's; another seed gives another one."""
    states = {}
    for name in FAMILY:
        settings = member_settings(SETTINGS, name)
        maker = functools.partial(build_quantizer, name, SETTINGS.model.code_dim)
        trainer = Stage1Trainer(settings, torch.device("cpu"), quantizer=maker)
        states[name] = trainer.model.encoder.state_dict()
        codebooks = sum(p.numel() for n, p in trainer.model.quantizer.named_parameters() if "codebook" in n)
        apart = [group for group in trainer.optimizer.param_groups if group["factor"] != 1.0]
        assert sum(p.numel() for group in apart for p in group["params"]) == codebooks
        assert {group["factor"] for group in apart} <= {settings.codebook_lr_factor}
    for name, state in states.items():
        same = [key for key, tensor in state.items() if tensor.shape == states["vq"][key].shape]
        assert len(same) >= len(state) - 4
        for key in same:
            assert torch.equal(state[key], states["vq"][key]), (name, key)
    other = Stage1Trainer(dataclasses.replace(member_settings(SETTINGS, "vq"), seed=1), torch.device("cpu"))
    assert any(
        not torch.equal(tensor, states["vq"][key]) for key, tensor in other.model.encoder.state_dict().items()
    )


def test_settings_of_members_differ_in_the_quantizer_alone() -> None:
    """Whatever the preset's model says of its own."""
    model = dataclasses.replace(SETTINGS.model, orthogonal_reg=10.0, metric="cosine")
    for name in FAMILY:
        settings = member_settings(dataclasses.replace(SETTINGS, model=model), name)
        assert settings == member_settings(SETTINGS, name)
        sizes = {"num_codes": settings.model.num_codes, "code_dim": settings.model.code_dim}
        described = {field: getattr(AutoencoderConfig(), field) for field in quantizer_fields()}
        assert settings.model == dataclasses.replace(SETTINGS.model, **{**described, **sizes})
        assert dataclasses.replace(settings, model=SETTINGS.model) == SETTINGS


def test_settings_of_an_earlier_version_are_read_as_they_were(
    trained: Path, source: DigitSource, tmp_path: Path
) -> None:
    """They name no default of the residual quantizer, whose defaults were others; other settings are refused."""
    folder = tmp_path / "rvq-seed0"
    shutil.copytree(trained / "rvq-seed0", folder)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["quantizer"]["codebook_update"] == "gradient"
    settings["quantizer"] = {"kind": "ResidualVectorQuantizer", "num_codes": 16, "num_quantizers": 2}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    assert train_family(SETTINGS, tmp_path, source, names=["rvq"], progress=False) == []
    settings["quantizer"]["codebook_update"] = "ema"
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError, match="settings must be those of the run in"):
        train_family(SETTINGS, tmp_path, source, names=["rvq"], progress=False)


def test_joint_index_is_one_to_one() -> None:
    """All K^Q combinations are all numbers below K^Q; one index a token stays as it is."""
    quantizer = ResidualVectorQuantizer(3, 2, 2)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(1, 3, 3, 2)
    assert num_combinations(quantizer) == 9
    joint = joint_indices(pairs, quantizer)
    assert joint.shape == (1, 3, 3)
    assert joint.flatten().sort().values.tolist() == list(range(9))
    assert torch.equal(joint, pairs[..., 0] + 3 * pairs[..., 1])
    plain = plain_quantizer(5, 2)
    assert num_combinations(plain) == 5
    assert joint_indices(joint, plain) is joint
    dropping = ResidualVectorQuantizer(3, 2, 2, quantizer_dropout=True)
    with pytest.raises(
        ValueError, match="quantizer_dropout must be False where combinations are counted, got True"
    ):
        joint_indices(pairs, dropping)


def test_arms_have_a_codebook() -> None:
    """What evaluation asks of a codebook is refused by name where there is none."""
    model = VQAutoencoder(SETTINGS.model)
    assert vector_quantizer(model) is model.quantizer
    model.quantizer = FSQ((3, 3))
    with pytest.raises(TypeError, match="quantizer must be a VectorQuantizer, got FSQ"):
        vector_quantizer(model)


def test_table_and_picture_show_the_numbers(trained: Path, tmp_path: Path) -> None:
    """Made-up ones: a row each, kappa with its interval, and undefined where there is one code."""
    results = copy.deepcopy(collect_family(SETTINGS, trained, seeds=[0], command="python -m it"))
    run = results["runs"][0]
    run["evaluation"]["test"] |= {"l1": 0.12345, "psnr": 21.987, "used_codes": 1234, "perplexity": 56.78}
    run["evaluation"]["learnt_numbers"] = {"quantizer": 7654, "model": 987654}
    table = family_table(results)
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(FAMILY)
    assert rows[2].startswith("| VectorQuantizer | 256 | 7,654 | 987,654 | 0.1235 | 21.99 | 1,234 | 56.8 | ")
    assert rows[2].count("[") == 3
    assert "`python -m it`" in table
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_family(tmp_path)
    assert (tmp_path / "family.md").read_text() == table
    picture = (tmp_path / "family.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    labels = [text.get_text() for text in family_scatter(results["runs"]).legends[0].get_texts()]
    assert "VectorQuantizer (1234 codes used)" in labels
    run["evaluation"]["test"]["psnr"] = 3.0
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_family(tmp_path)
    assert (tmp_path / "family.png").read_bytes() != picture


def test_several_seeds_are_averaged(trained: Path) -> None:
    """A row a quantizer with mean and deviation; one that lacks a seed says so."""
    runs = collect_family(SETTINGS, trained, seeds=[0], command="it")["runs"][:2]
    again = copy.deepcopy(runs[0])
    again["settings"]["seed"] = 3
    for run, psnr, kappa in ((runs[0], 20.0, 0.25), (again, 22.0, 0.75)):
        run["evaluation"]["test"]["psnr"] = psnr
        run["evaluation"]["equivariance"]["sub_stride"] |= {"kappa": kappa, "rate": kappa}
    results = {"command": "it", "runs": [runs[0], again, runs[1]]}
    table = family_table(results)
    rows = [line for line in table.splitlines() if line.startswith("| Vector")]
    assert len(rows) == 2
    assert "| 21.00 ± 1.41 |" in rows[0]
    assert rows[0].endswith("| 0.500 ± 0.354 (0.500) |")
    assert rows[1].startswith("| VectorQuantizer, defaults, 1 of 2 seeds |")
    assert "Trainings with seeds 0, 3: " in table
    assert "Means ± standard deviations over seeds." in table
    assert "κ [of a single training its 95 % bootstrap interval] over" in table
    assert "κ over" in family_table({"command": "it", "runs": [runs[0], again]})
    figure = family_scatter(results["runs"])
    assert len(figure.legends[0].get_texts()) == 2
    assert len([line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]) == 3


def test_the_legend_of_the_published_figure_is_whole() -> None:
    """All names lie within the figure."""
    figure = family_scatter(json.loads(published("family/results.json").read_text())["runs"])
    figure.draw_without_rendering()
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1
    assert whole.y0 <= legend.y0 < legend.y1 <= whole.y1


@pytest.mark.slow
def test_seeds_are_trained_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--seeds trains and collects them; with --seed it is refused."""
    words = ["family", "--preset", "smoke", "--out", str(tmp_path), "--steps", "1", "--threads", "1"]
    assert main([*words, "--quantizers", "fsq", "--seeds", "1", "2"]) == 0
    assert "Trainings with seeds 1, 2: 1 steps" in (tmp_path / "family" / "report" / "family.md").read_text()
    first, second = ((tmp_path / "family" / f"fsq-seed{seed}" / "log.jsonl").read_text() for seed in (1, 2))
    assert first != second
    assert main([*words, "--seeds", "1", "--seed", "2"]) == 1
    assert "seed must be None with --seeds, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("draw", [family_scatter, scatter])
def test_interval_is_drawn_where_it_is(trained: Path, draw: Callable[..., Any]) -> None:
    """Also one that does not hold the estimate, as percentiles of resamples may not."""
    run = copy.deepcopy(collect_family(SETTINGS, trained, seeds=[0], command="")["runs"][0])
    run["evaluation"]["equivariance"]["sub_stride"] |= {"kappa": 0.5, "kappa_interval": [0.25, 0.375]}
    heights = [list(line.get_ydata()) for line in draw([run]).axes[0].lines]
    assert heights == [[0.5], [0.25, 0.375]]
    run["evaluation"]["equivariance"]["sub_stride"]["kappa_interval"] = [math.nan, math.nan]
    assert len(draw([run]).axes[0].lines) == 1


def test_what_does_not_belong_is_refused(trained: Path, source: DigitSource, tmp_path: Path) -> None:
    """Unknown names, runs of other settings, folders with nothing, and processes that share a training."""
    with pytest.raises(ValueError, match=r"quantizer must be one of 'vq', .*, got 'pq'"):
        train_family(SETTINGS, tmp_path, source, names=["vq", "pq"], progress=False)
    assert not list(tmp_path.iterdir())
    longer = dataclasses.replace(SETTINGS, steps=7)
    with pytest.raises(ValueError, match="steps was 6, now 7"):
        train_family(longer, trained, source, names=["fsq"], progress=False)
    with pytest.raises(ValueError, match="steps was 6, now 7"):
        collect_family(longer, trained, seeds=[0], command="")
    with pytest.raises(ValueError, match="out must be a folder with finished quantizers, got"):
        collect_family(SETTINGS, tmp_path, seeds=[0], command="")
    with pytest.raises(ValueError, match=r"results must be a folder with results\.json, got"):
        write_family(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family.distributed, "launched", lambda: True)
        with pytest.raises(ValueError, match="family must be run in one process, got several of a launcher"):
            train_family(SETTINGS, tmp_path, source, progress=False)


def test_command_line_trains_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One member, its table where --into says; then the table anew from data alone."""
    into = tmp_path / "published"
    words = ["family", "--preset", "smoke", "--out", str(tmp_path), "--steps", "1", "--threads", "1"]
    assert main([*words, "--quantizers", "fsq", "--into", str(into)]) == 0
    table = (into / "family.md").read_text()
    assert "| FSQ (8, 6, 5) | 240 | 0 | " in table
    assert "LFQ" not in table
    (into / "family.md").unlink()
    assert main(["family", "--results", str(into)]) == 0
    assert (into / "family.md").read_text() == table
    assert table.strip() in capsys.readouterr().out
    assert main([*words, "--quantizers", "pq"]) == 1
    assert "quantizer must be one of" in capsys.readouterr().err


def test_published_table_follows_from_its_data(tmp_path: Path) -> None:
    """The committed table is what the committed results.json gives, with all of the family and its seeds."""
    data = published("family/results.json").read_bytes()
    (tmp_path / "results.json").write_bytes(data)
    write_family(tmp_path)
    assert (tmp_path / "family.md").read_text() == published("family/family.md").read_text()
    runs = json.loads(data)["runs"]
    trained = {(run["name"], run["settings"]["seed"]) for run in runs}
    assert len(runs) == len(trained)
    assert trained == {(name, seed) for name in FAMILY for seed in (0, 1, 2)}
    commits = {run["provenance"]["commit"] for run in runs}
    assert len(commits) == 1
    assert "dirty" not in commits.pop()
