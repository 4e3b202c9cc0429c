"""What is published follows from what is published with it: reports from results, tokens from weights."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from examples.te_vqgan.__main__ import main
from te_quant import VQAutoencoder
from tests.golden_files import golden_tensors
from tests.published import RESULTS, published

REPORTS = sorted(path.parent.name for path in RESULTS.glob("*/report.md"))
# As the plan has them; the first is the base.
REGIMES = [name for name in ("small", "small-fine") if name in REPORTS]


@pytest.fixture
def white_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures but save white pixels, as rasterizing takes nearly all of the time."""
    white = io.BytesIO()
    Image.new("RGB", (1, 1), "white").save(white, "png")

    def savefig(_figure: Figure, target: io.BytesIO, **_options: Any) -> None:
        target.write(white.getvalue())

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.mark.usefixtures("white_pictures")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in REGIMES else ()) for name in REPORTS]
)
def test_published_report_follows_from_its_data(name: str, tmp_path: Path) -> None:
    """Every word and number of the report and of its tables, from ``results.json`` and the samples."""
    shutil.copy(published(f"{name}/results.json"), tmp_path)
    shutil.copytree(published(f"{name}/samples"), tmp_path / "samples")
    assert main(["report", "--results", str(tmp_path)]) == 0
    written = sorted(path.name for path in tmp_path.glob("*.md"))
    assert "report.md" in written
    for file in written:
        assert (tmp_path / file).read_text() == (RESULTS / name / file).read_text(), file


def test_published_regimes_follow_from_their_reports(tmp_path: Path) -> None:
    """The table over the presets, from their published results."""
    folders = [str(published(f"{name}/results.json").parent) for name in REGIMES]
    assert main(["regimes", "--results", *folders, "--into", str(tmp_path / "regimes.md")]) == 0
    assert (tmp_path / "regimes.md").read_text() == (RESULTS / "regimes.md").read_text()


def _tokenizer() -> VQAutoencoder:
    return VQAutoencoder.from_pretrained(published("small/weights/tokenizer/model.safetensors").parent).float()


def test_published_weights_give_the_tokens_they_gave() -> None:
    """Digits of the test set, as when the weights were published.

    The golden file has captions as well, of a GPT whose weights have made room for a better one's.
    """
    golden = golden_tensors("published")
    tokenizer = _tokenizer()
    indices = tokenizer.encode_to_indices(golden["pixels"] / 127.5 - 1)
    assert torch.equal(indices, golden["indices"].long())


def test_changed_weights_give_other_tokens() -> None:
    """The negative control of the test above: codes turned by a little."""
    golden = golden_tensors("published")
    tokenizer = _tokenizer()
    with torch.no_grad():
        codebook = tokenizer.quantizer.codebook
        codebook += 0.1 * codebook.roll(1, -1)
    assert not torch.equal(tokenizer.encode_to_indices(golden["pixels"] / 127.5 - 1), golden["indices"].long())
