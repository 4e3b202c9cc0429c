"""The audits of models of others and of ours: what they name, and that what is published follows from its data."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.reports.audits import AUDITED, photographs, render, resnet_stem, run_audit, write_audits
from te_quant.equivariance import AuditReport
from tests.published import RESULTS, published
from tests.readme_tables import ROOT
from tests.unit.grid_oracles import fresh


@pytest.fixture(scope="module")
def reports() -> dict[str, AuditReport]:
    """Small audits of everything, on other images and weights than those published."""
    images = photographs(3, 32)
    with warnings.catch_warnings():
        # Deprecation notes of diffusers' own code.
        warnings.simplefilter("ignore")
        return {name: run_audit(audited, images, seed=7) for name, audited in AUDITED.items()}


@pytest.mark.parametrize("name", ["stem", "vq_model", "zeros"])
def test_zero_padding_is_the_culprit_under_whole_tokens(reports: dict[str, AuditReport], name: str) -> None:
    """Every module that adds to the border part pads or holds one that does; the worst is such a convolution."""
    report = reports[name]
    worst = report.worst("border")
    assert worst is not None
    assert worst.padding == "pads (zeros)"
    assert worst.kind in ("Conv2d", "PaddedConv2d")
    for row in report.rows:
        assert (row.part("border") > 0) == bool(row.padding or row.unaudited), row.name
    assert report.rows[-1].whole_error > 1e-3


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("stem", {"conv1", "maxpool"}),
        ("vq_model", {f"encoder.down_blocks.{level}.downsamplers.0" for level in (0, 1)}),
        *((name, {"levels.0.downsample.conv", "levels.1.downsample.conv"}) for name in ("zeros", "replicate")),
        ("circular", {"levels.0.downsample.conv", "levels.1.downsample.conv"}),
    ],
)
def test_strided_layers_are_the_culprits_under_one_pixel(
    reports: dict[str, AuditReport], name: str, layers: set[str]
) -> None:
    """They and no other layer add to the aliasing part."""
    report = reports[name]
    assert {row.name for row in report.rows if row.part("aliasing")} == layers
    assert report.worst("aliasing").name in layers


def test_statistics_and_attention_spread_what_the_border_lost(reports: dict[str, AuditReport]) -> None:
    """Global parts are theirs alone, and there are none without a border."""
    for name in ("vq_model", "zeros", "replicate"):
        kinds = {row.kind for row in reports[name].rows if row.part("global")}
        assert kinds in ({"GroupNorm", "Attention"}, {"GroupNorm", "SelfAttention2d"})
    assert reports["stem"].worst("global") is None


def test_circular_padding_mends_the_border_and_polyphase_the_rest(reports: dict[str, AuditReport]) -> None:
    """The control: no culprit where none should be, and exact outputs."""
    assert reports["circular"].worst("border") is reports["circular"].worst("global") is None
    assert reports["circular"].rows[-1].whole_error < 1e-20 < reports["circular"].rows[-1].sub_stride_error
    assert set(reports["polyphase"].culprits().values()) == {None}
    assert reports["polyphase"].rows[-1].sub_stride_error < 1e-20


def test_stem_is_that_of_a_resnet() -> None:
    """Layers of He et al.: 64 filters of 7x7 with stride 2, 3x3 pool with stride 2; 9,536 weights."""
    stem = resnet_stem()
    assert [type(layer) for layer in stem] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert sum(p.numel() for p in stem.parameters()) == 3 * 64 * 49 + 2 * 64
    assert stem(fresh(1, 3, 224, 224, dtype=torch.float32)).shape == (1, 64, 56, 56)
    assert float(stem.conv1.weight.detach().std()) == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)


def test_photographs_are_different_crops_in_range() -> None:
    """In [-1, 1], from both pictures, none twice."""
    crops = photographs(8, 64)
    assert crops.shape == (8, 3, 64, 64)
    assert crops.dtype == torch.float64
    assert float(crops.abs().max()) <= 1
    assert float(crops.std()) > 0.2
    assert len({crop.numpy().tobytes() for crop in crops}) == 8


@pytest.mark.parametrize(
    ("count", "match"),
    [
        (31, "count must be at most the 30 crops of side 64, got 31"),
        (0, "count must be an int >= 1, got 0"),
    ],
)
def test_more_photographs_than_there_are_are_refused(count: int, match: str) -> None:
    """And none."""
    with pytest.raises(ValueError, match=match):
        photographs(count, 64)


def test_command_writes_json_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same by the same seed, and the global random state is left alone."""
    state = torch.get_rng_state()
    assert main(["audit", "--out", str(tmp_path), "--modules", "stem"]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert "| ResNet stem (torch.nn) |" in capsys.readouterr().out
    stored = json.loads((tmp_path / "audits.json").read_text())
    assert stored["command"].endswith("audit --out " + str(tmp_path) + " --modules stem")
    assert set(stored["audits"]) == {"stem"}
    assert (tmp_path / "stem.png").read_bytes().startswith(b"\x89PNG")
    again = run_audit(AUDITED["stem"], photographs(8, 64))
    assert AuditReport.from_dict(stored["audits"]["stem"]["report"]) == again
    assert run_audit(AUDITED["stem"], photographs(8, 64), seed=1) != again


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name, a negative seed, a folder without data, and diffusers missing: one sentence each."""
    assert main(["audit", "--out", str(tmp_path), "--modules", "resnet"]) == 1
    assert "error: modules entry must be one of 'stem', 'vq_model', " in capsys.readouterr().err
    with pytest.raises(ValueError, match="seed must be an int >= 0, got -1"):
        write_audits(tmp_path, seed=-1)
    with pytest.raises(ValueError, match=r"folder must be one with audits\.json, got"):
        render(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert main(["audit", "--out", str(tmp_path), "--modules", "vq_model"]) == 1
    expected = "error: diffusers must be installed to audit its VQModel: pip install diffusers."
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_published_tables_follow_from_their_data(tmp_path: Path) -> None:
    """The committed Markdown is what the committed JSON gives; a picture lies beside it for each audit."""
    (tmp_path / "audits.json").write_bytes(published("audits/audits.json").read_bytes())
    render(tmp_path)
    for name in ("audits.md", "modules.md"):
        assert (tmp_path / name).read_text() == published(f"audits/{name}").read_text()
    assert {path.stem for path in (RESULTS / "audits").glob("*.png")} == set(AUDITED)


def test_published_audits_name_what_the_page_says() -> None:
    """Zero padding for whole tokens, the strided convolution for one pixel, nothing where all is exact."""
    stored = json.loads(published("audits/audits.json").read_text())["audits"]
    found = {name: AuditReport.from_dict(entry["report"]) for name, entry in stored.items()}
    assert set(found) == set(AUDITED)
    for name in ("stem", "vq_model", "zeros"):
        assert found[name].worst("border").padding == "pads (zeros)"
    for name in ("zeros", "replicate", "circular"):
        assert found[name].worst("aliasing").name == "levels.1.downsample.conv"
    assert found["circular"].worst("border") is None
    assert set(found["polyphase"].culprits().values()) == {None}
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for path in sorted((RESULTS / "audits").glob("*.md")):
        assert re.search(rf"\{{include\}} (\.\./)+examples/te_vqgan/results/audits/{path.name}", pages)
