"""Collapsing codebooks next to their cures: the command, and what is published of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import collapse
from benchmarks.diveq import Diveq
from te_quant import VectorQuantizer
from tests.readme_tables import ROOT

RESULTS = ROOT / "benchmarks/results/collapse"


def _setups() -> list[collapse.Setup]:
    cases = [setup for case in collapse.CASES for setup in (case.failing, case.cured)]
    return cases + [setup for _, setup in collapse.ESTIMATORS]


@pytest.mark.slow
def test_the_command_resumes_and_writes_table_and_figure(tmp_path: Path) -> None:
    """A second call trains only what is missing; other settings start again."""
    arguments = ["--data", "digits", "--steps", "2", "--out", str(tmp_path)]
    assert collapse.main(arguments) == 0
    path = tmp_path / "collapse.json"
    first = json.loads(path.read_text(encoding="utf-8"))
    texts = {setup.text for setup in _setups()}
    assert {text: len(entries) for text, entries in first["results"].items()} == dict.fromkeys(texts, 3)
    removed = first["results"]["the defaults"].pop()
    path.write_text(json.dumps(first), encoding="utf-8")
    assert collapse.main(arguments) == 0
    second = json.loads(path.read_text(encoding="utf-8"))
    again = second["results"]["the defaults"].pop()
    assert {**again, "median": 0} == {**removed, "median": 0}
    assert second["results"] == first["results"]
    assert (tmp_path / "collapse.png").read_bytes().startswith(b"\x89PNG")


def test_every_case_changes_one_training_into_another() -> None:
    """Failing and cured have different texts, and one text always means the same training."""
    meanings: dict[str, collapse.Setup] = {}
    for case in collapse.CASES:
        assert case.failing.text != case.cured.text
    for setup in _setups():
        assert meanings.setdefault(setup.text, setup) is setup


def test_published_table_follows_from_the_published_trainings() -> None:
    """Every cell; and each cure uses more codes or has a smaller error than its failure."""
    document = json.loads((RESULTS / "collapse.json").read_text(encoding="utf-8"))
    assert collapse.table(document["results"]) == (RESULTS / "collapse.md").read_text(encoding="utf-8")
    estimators = (RESULTS / "estimators.md").read_text(encoding="utf-8")
    assert collapse.estimator_table(document["results"]) == estimators
    assert document["stamp"]["data"] == "mnist"


def test_diveq_is_what_its_paper_says() -> None:
    """The code in evaluation; in training a vector as long as the error, with gradients by hand as the oracle."""
    torch.manual_seed(0)
    module = Diveq(VectorQuantizer(5, 3, codebook_update="gradient").double(), variance=0.0)
    latents = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    output, indices = module(latents)
    code = module.quantizer.codebook[indices.flatten()]
    torch.testing.assert_close(output.flatten(), code.flatten())
    weights = torch.randn(3, dtype=torch.float64)
    (output.flatten() @ weights).backward()
    unit = torch.nn.functional.normalize((code - latents.flatten()).detach(), dim=1).squeeze(0)
    along = (unit @ weights) * unit
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad.flatten(), weights - along)
    assert module.quantizer.codebook.grad is not None
    torch.testing.assert_close(module.quantizer.codebook.grad[indices.item()], along)
    noisy = Diveq(module.quantizer, variance=1e-3)
    torch.testing.assert_close((noisy(latents)[0] - latents).norm(), (code - latents.flatten()).norm())
    assert not torch.equal(noisy(latents)[0], output)
    assert torch.equal(noisy.eval()(latents)[0].flatten(), code.flatten())
