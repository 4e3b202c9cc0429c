"""Freely licensed photographs of packages: their catalogue, and the command that gathers them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.data import photographs
from examples.te_vqgan.data.photographs import CATALOGUE, PACKAGES, Package, Photograph, gather, package_folder
from examples.te_vqgan.data.pictures import (
    SUFFIXES,
    PictureFile,
    PictureFolder,
    find_pictures,
    load_pictures,
    split_by_content,
)
from examples.te_vqgan.data.sources import SPLITS
from examples.te_vqgan.runs.files import sha256
from examples.te_vqgan.stage1.pictures import crops, smallest_side
from examples.te_vqgan.stage1.presets import settings_for
from tests.example.tiny_runs import save_picture
from tests.published import ROOT, published

FREE = re.compile(r"CC0( 1\.0)?|CC BY(-SA)? \d\.\d|public domain")


def test_every_photograph_is_free_and_known_once() -> None:
    """Its licence allows use and changes, its author is named, and it counts as a picture."""
    assert len({photograph.sha256 for photograph in CATALOGUE}) == len(CATALOGUE)
    for photograph in CATALOGUE:
        assert FREE.fullmatch(photograph.licence), photograph
        assert photograph.author
        assert re.fullmatch("[0-9a-f]{64}", photograph.sha256)
        assert Path(photograph.file).suffix in SUFFIXES
        assert photograph.package in PACKAGES
    assert {photograph.package for photograph in CATALOGUE} == set(PACKAGES)


def test_the_photographs_of_scikit_learn_are_those_of_the_catalogue(tmp_path: Path) -> None:
    """They need no download, so the command works wherever the example is installed."""
    gathered = gather(tmp_path, root=tmp_path / "nothing")
    here = [photograph for photograph in gathered.copied if photograph.package == "scikit-learn"]
    assert [photograph.file for photograph in here] == ["china.jpg", "flower.jpg"]
    for photograph in here:
        assert sha256(tmp_path / f"scikit-learn-{photograph.file}") == photograph.sha256


def test_the_two_photographs_of_scikit_learn_are_enough_to_train_on(tmp_path: Path) -> None:
    """Each is cut into three parts, at the sizes of the preset."""
    settings = settings_for("photos", "vqgan")
    gather(tmp_path, catalogue=[one for one in CATALOGUE if one.package == "scikit-learn"])
    source = load_pictures(tmp_path, crop_size=settings.canvas_size, smallest=smallest_side(settings))
    assert [row["split"] for row in source.manifest] == ["three parts"] * 2
    for split in SPLITS:
        dataset = crops(dataclasses.replace(settings, data=source.name), source, split)
        assert dataset.fixed(0, 2).shape == (2, 3, 64, 64)
        assert len(source.pixels[split]) == 2


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Photograph]:
    """Three photographs of a Debian package, of which one is there, one is another, and one is not there."""
    monkeypatch.setitem(PACKAGES, "walls", Package("walls", "1.0", None, "usr/share/walls", "copyright"))
    folder = tmp_path / "root" / "usr" / "share" / "walls"
    save_picture(folder / "sea" / "a.png", 1)
    save_picture(folder / "b.png", 2)
    known = Photograph("sea/a.png", "walls", "Ann", "CC0", sha256(folder / "sea" / "a.png"))
    changed = Photograph("b.png", "walls", "Ben", "CC0", "0" * 64)
    missing = Photograph("c.png", "walls", "Cas", "CC0", "1" * 64)
    return [known, changed, missing]


def test_only_the_files_whose_licence_was_read_are_copied(tmp_path: Path, catalogue: list[Photograph]) -> None:
    """The others are told."""
    known, changed, missing = catalogue
    gathered = gather(tmp_path / "into", root=tmp_path / "root", catalogue=catalogue)
    assert (gathered.copied, gathered.changed, gathered.missing) == ([known], [changed], [missing])
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["walls-sea-a.png"]
    elsewhere = gather(tmp_path / "into", root=tmp_path / "nowhere", catalogue=catalogue)
    assert elsewhere.missing == catalogue


def test_the_command_writes_licences_and_says_what_is_missing(
    tmp_path: Path,
    catalogue: list[Photograph],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the name of the data set, by which a published result tells its pictures."""
    monkeypatch.setattr(photographs, "CATALOGUE", tuple(catalogue))
    into = tmp_path / "into"
    assert main(["photographs", "--into", str(into), "--root", str(tmp_path / "root")]) == 0
    printed = capsys.readouterr().out
    assert "Left out, as its licence was read for another file: walls, b.png" in printed
    assert (
        "Not here: 1 of walls 1.0 (apt-get download walls && dpkg -x walls_*.deb ROOT, then --root ROOT)"
        in printed
    )
    assert f"{into}: 1 of 3 photographs, {find_pictures(into).data}" in printed
    [row] = json.loads((into / "photographs.json").read_text())
    assert (row["author"], row["licence"], row["checked_version"]) == ("Ann", "CC0", "1.0")


def test_an_unknown_package_is_refused() -> None:
    """With the known ones."""
    with pytest.raises(ValueError, match=r"package must be one of 'scikit-learn', .*, got 'gimp'"):
        package_folder("gimp")
    assert package_folder("scikit-learn") is not None


PAGE = ROOT / "docs" / "reference" / "results" / "photographs.md"


def _hash(file: PictureFile) -> str:
    return file.sha256


def _results() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(published("photos/results.json").read_text(encoding="utf-8"))
    return results


def test_the_published_pictures_are_those_of_the_catalogue() -> None:
    """All of them, so that everybody can gather them and gets the data set of the same name."""
    results = _results()
    assert {picture["sha256"] for picture in results["pictures"]} == {one.sha256 for one in CATALOGUE}
    by_hash = sorted((PictureFile(one.file, Path(one.file), one.sha256) for one in CATALOGUE), key=_hash)
    assert {run["settings"]["data"] for run in results["runs"]} == {PictureFolder(tuple(by_hash), ()).data}
    splits = split_by_content([one.sha256 for one in CATALOGUE])
    assert {picture["sha256"]: picture["split"] for picture in results["pictures"]} == splits


def test_every_published_picture_is_attributed() -> None:
    """The page shows crops of them, so it names package, author and licence of each."""
    table = published("photos/pictures.md").read_text(encoding="utf-8")
    assert "{include} ../../../examples/te_vqgan/results/photos/pictures.md" in PAGE.read_text(encoding="utf-8")
    for photograph in CATALOGUE:
        [row] = [line for line in table.splitlines() if photograph.sha256[:12] in line]
        assert photograph.author in row
        assert photograph.licence in row
        assert f"{photograph.package} {PACKAGES[photograph.package].version}" in row


def test_the_page_shows_every_table_and_the_commands() -> None:
    """Tables are included from the results, and the recipe names the versions of the packages."""
    text = PAGE.read_text(encoding="utf-8")
    for name in ("quality", "window", "circular", "pictures", "findings"):
        assert f"{{include}} ../../../examples/te_vqgan/results/photos/{name}.md" in text
    for package in PACKAGES.values():
        assert package.name in text
    for command in _results()["commands"]:
        assert " ".join(command.split()[:6]) in text


def test_published_results_are_small_and_of_one_commit() -> None:
    """Four tokenizers with one seed, in less than a megabyte."""
    files = [path for path in published("photos/results.json").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2**20
    runs = _results()["runs"]
    assert [run["arm"] for run in runs] == ["vqgan", "te_vqgan", "stride_exact", "integer_exact"]
    assert len({run["provenance"]["commit"] for run in runs}) == 1


def test_published_exact_encoders_keep_their_promise_on_photographs() -> None:
    """After circular shifts: both at whole tokens, only the polyphase encoder below a token, VQGAN at neither."""
    kappas = {
        run["arm"]: [
            run["evaluation"]["equivariance_circular"][kind]["kappa"] for kind in ("aligned", "sub_stride")
        ]
        for run in _results()["runs"]
    }
    assert kappas["stride_exact"][0] > 0.999
    assert min(kappas["integer_exact"]) > 0.999
    assert kappas["stride_exact"][1] < 0.9
    assert max(kappas["vqgan"]) < 0.9


def test_the_published_table_of_pictures_is_that_of_the_manifest() -> None:
    """Sizes and splits, so that the page says on what was trained and what was tested."""
    rows = published("photos/pictures.md").read_text(encoding="utf-8")
    files = {one.sha256: one.file for one in CATALOGUE}
    for picture in _results()["pictures"]:
        size = f"{picture['width']}x{picture['height']}"
        assert f"| {files[picture['sha256']]} | {size} | {picture['reduced_by']} |" in rows
        assert f"| {picture['split']} | {picture['sha256'][:12]} |" in rows
