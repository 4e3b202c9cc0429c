"""What a release holds and says: the source distribution, its metadata, the citation."""

from __future__ import annotations

import email
import email.message
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

import te_quant

ROOT = Path(__file__).resolve().parents[2]
# What points into the repository: a Markdown link or picture, or an attribute of an HTML tag.
_RELATIVE = re.compile(r"\]\((?!https?://)[^)]*\)|(?:src|href)=[\"'](?!https?://)")
_LINK = re.compile(r"(?<!!)\[([^\]!]+)\]\((?!https?://)[^)]*\)")


class Sdist(NamedTuple):
    """A source distribution as its metadata and the sizes of its files in bytes, by path in the repository."""

    metadata: email.message.Message
    files: dict[str, int]
    size: int


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Sdist:
    """The source distribution that the build backend makes of this folder."""
    build = pytest.importorskip("hatchling.build")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        path = folder / build.build_sdist(str(folder))
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive if member.isfile()}
        content = archive.extractfile(members["PKG-INFO"])
        assert content is not None
        metadata = email.message_from_bytes(content.read())
    return Sdist(metadata, {name: member.size for name, member in members.items()}, path.stat().st_size)


def test_result_archives_stay_out_of_the_sdist(sdist: Sdist) -> None:
    """Weights, samples and raw numbers do; the code and the small files that tests read are in."""
    results = [name for name in sdist.files if name.startswith("examples/te_vqgan/results/")]
    assert results
    assert {Path(name).suffix for name in results} == {".md", ".png"}
    weights = [name for name in sdist.files if name.endswith(".safetensors")]
    assert not [name for name in weights if not name.startswith("tests/golden/")]
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert code <= set(sdist.files)
    assert sdist.size < 4 * 2**20


def test_tracked_files_stay_below_30_megabytes() -> None:
    """Published results are the bulk of a clone."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert len(files) > 100
    assert sum(file.stat().st_size for file in files if file.is_file()) < 30e6


def test_sdist_holds_what_the_documentation_shows(sdist: Sdist) -> None:
    """The pages can be built from it: every table that one includes and every picture is there."""
    shown = re.compile(r"(?:\{include\} |!\[[^\]]*\]\()([^\s)]+)")
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    wanted = {
        (page.parent / name).resolve().relative_to(ROOT).as_posix()
        for page in pages
        for name in shown.findall(page.read_text(encoding="utf-8"))
    }
    assert wanted
    assert wanted <= set(sdist.files)


def test_description_has_no_relative_links(sdist: Sdist) -> None:
    """A package index cannot follow them; their words stay. The README itself has some."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    description = sdist.metadata.get_payload()
    assert isinstance(description, str)
    assert sdist.metadata["Description-Content-Type"] == "text/markdown"
    assert _RELATIVE.search(readme)
    assert not _RELATIVE.search(description)
    assert "<!--" not in description
    for words in _LINK.findall(readme):
        assert words in description
    assert "](https://arxiv.org/abs/2112.00384)" in description


def test_comments_leave_no_gap_in_the_description() -> None:
    """One on lines of its own goes with its line, one behind a number leaves the words around it."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = "<!-- table: a\ncolumns: b -->\n| 1 |\n\n"
    text += "It is 0.5<!-- small: vqgan.l1 -->\nand 0.25<!-- small:\nk16.l1 -->.\n"
    for step in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(step["pattern"], step["replacement"], text)
    assert text == "| 1 |\n\nIt is 0.5\nand 0.25.\n"


def test_extra_testing_installs_hypothesis_only(sdist: Sdist) -> None:
    """It is what the strategies of te_quant.testing name where hypothesis is missing."""
    needed = [line for line in sdist.metadata.get_all("Requires-Dist", []) if "extra == 'testing'" in line]
    assert len(needed) == 1
    assert needed[0].startswith("hypothesis>=")


def test_citation_names_this_version() -> None:
    """In the fields and in the BibTeX below them; the paper is cited too."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {te_quant.__version__}\n" in citation
    assert f"version = {{{te_quant.__version__}}}" in citation
    assert citation.count("arXiv:2112.00384") == 2
