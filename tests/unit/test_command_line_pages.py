"""The pages about the command print what the commands print.

The ``console`` blocks of a page, whose lines after ``$`` are commands, and its ``python`` blocks are one session,
in a folder with the published tokenizer and its samples, and photographs. ``...`` stands for anything.
"""

from __future__ import annotations

import doctest
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("huggingface_hub")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from safetensors.torch import load_file

from te_quant.cli import main
from te_quant.cli.pictures import find_pictures, read_batch, write_picture

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
RESULTS = ROOT / "examples" / "te_vqgan" / "results"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages say that it holds."""
    if not (RESULTS / "small" / "weights").exists():
        pytest.skip("the published weights are not here")
    for number, image in enumerate(load_file(RESULTS / "photos" / "samples" / "pictures.safetensors")["images"]):
        write_picture(tmp_path / "photos" / f"{number}.png", image / 127.5 - 1)
    # From which the first page makes its tokenizer and its images.
    small = RESULTS.relative_to(ROOT) / "small"
    shutil.copytree(ROOT / small / "weights" / "tokenizer", tmp_path / small / "weights" / "tokenizer")
    samples = small / "samples" / "stride_exact.safetensors"
    (tmp_path / samples).parent.mkdir(parents=True)
    shutil.copy(ROOT / samples, tmp_path / samples)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps(text: str) -> list[tuple[str, str]]:
    """Each command with the output below it, and each piece of Python with none."""
    found = []
    for kind, block in BLOCK.findall(text):
        if kind == "python":
            found.append((block, ""))
            continue
        for part in block.removeprefix("$ ").split("\n$ "):
            command, _, output = part.partition("\n")
            found.append((f"$ {command}", output))
    return found


def printed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command writes to both streams, as a terminal shows it."""
    words = shlex.split(command.removeprefix("$ "))
    silent = words[-2:] == [">", "/dev/null"]
    words = words[:-2] if silent else words
    if words[0] == "cat":
        return Path(words[1]).read_text(encoding="utf-8")
    assert words[0] == "te-quant"
    main(words[1:])
    out, err = capsys.readouterr()
    return err if silent else err + out


def check(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the session of a page."""
    checker = doctest.OutputChecker()
    names = {"photographs": read_batch(find_pictures([folder / "photos"]), 3)}
    done = steps(page.read_text(encoding="utf-8"))
    assert any(step.startswith("$ ") for step, _ in done)
    for step, expected in done:
        if not step.startswith("$ "):
            exec(compile(step, str(page), "exec"), names)
            continue
        got = printed(step, capsys)
        expected = expected.replace("<BLANKLINE>\n", "\n")
        example = doctest.Example(step, expected)
        # An empty line in the output ends no block of Markdown, so that it may be written as it is.
        same = checker.check_output(expected.replace("\n\n", "\n"), got.replace("\n\n", "\n"), OPTIONS)
        assert same, step + "\n" + checker.output_difference(example, got, OPTIONS)


@pytest.mark.slow
def test_the_page_of_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command with its output."""
    check(GUIDES / "command-line.md", folder, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_page_of_the_audit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three lines and the command name the same layers; the picture is that of the page."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    check(GUIDES / "audit-a-vqmodel.md", folder, capsys)
    assert (GUIDES.parent / "_static" / "audit-vqmodel.png").stat().st_size > 10_000


def test_another_output_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative control."""
    (tmp_path / "photos").mkdir()
    write_picture(tmp_path / "photos" / "x.png", torch.zeros(3, 2, 2))
    page = tmp_path / "page.md"
    page.write_text("```console\n$ te-quant audit nowhere nothing\nte-quant audit: images ... got nothing.\n```\n")
    check(page, tmp_path, capsys)
    page.write_text("```console\n$ te-quant audit nowhere nothing\nte-quant audit: images ... got more.\n```\n")
    with pytest.raises(AssertionError, match="te-quant audit nowhere nothing"):
        check(page, tmp_path, capsys)
