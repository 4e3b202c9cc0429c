"""Perceptual distances: which one a training has, what is refused before it starts, and what ST-LPIPS computes.

Shape letters: B images, C channels, H W pixels.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from examples.te_vqgan.__main__ import _parse, main
from examples.te_vqgan.cli import run as run_command
from examples.te_vqgan.cli.options import stage1_settings
from examples.te_vqgan.cli.run import plan_jobs, run_plan
from examples.te_vqgan.family.train import train_family
from examples.te_vqgan.reports import report
from examples.te_vqgan.stage1.perceptual import load_perceptual, measured_distances, require_perceptual
from examples.te_vqgan.stage1.presets import PERCEPTUAL, PRESETS, settings_for
from examples.te_vqgan.stage1.st_lpips import STLPIPS, load_st_lpips
from tests.example.tiny_runs import random_source
from tests.example.tiny_runs import stage1_settings as tiny_settings
from tests.helpers import exactly

WIDTHS = (3, 4, 6, 5, 2, 3)
NAMES = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
SIDES = (11, 5, 3, 3, 3)


# which distance a training has -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "name", "weight"),
    [("paper", "none", 0.0), ("paper", "st-lpips", 1.0), ("small", "lpips", 1.0), ("small", "none", 0.0)],
)
def test_the_weight_follows_the_distance(preset: str, name: str, weight: float) -> None:
    """As ``--perceptual`` gives it, with and without one in the preset."""
    words = ["stage1", "--arm", "vqgan", "--preset", preset, "--perceptual", name]
    settings = stage1_settings(_parse(words), "vqgan")
    assert (settings.perceptual, settings.perceptual_weight) == (name, weight)


def test_a_weight_that_is_given_stays() -> None:
    """Next to a distance and without one; without both the preset's stay."""
    given = settings_for("small", "vqgan", {"perceptual": "lpips", "perceptual_weight": 0.25})
    assert given.perceptual_weight == 0.25
    assert settings_for("paper", "vqgan", {"perceptual_weight": 0.5}).perceptual_weight == 0.5
    unchanged = settings_for("paper", "vqgan")
    assert (unchanged.perceptual, unchanged.perceptual_weight) == (
        PRESETS["paper"].perceptual,
        PRESETS["paper"].perceptual_weight,
    )
    with pytest.raises(ValueError, match="perceptual_weight must be 0 without a perceptual distance"):
        settings_for("small", "vqgan", {"perceptual": "none", "perceptual_weight": 1.0})


# what is refused before it starts --------------------------------------------------------------------------


class _Broken(ModuleType):
    """A module whose class fails as a torchvision for another torch, or a download, does."""

    def __init__(self, error: Exception) -> None:
        super().__init__("lpips")
        self.error = error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.error


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (None, "ModuleNotFoundError: import of lpips halted"),
        (_Broken(RuntimeError("operator torchvision::nms does not exist")), "RuntimeError: operator torchvision"),
        (_Broken(OSError("no route to host")), "OSError: no route to host"),
    ],
    ids=["missing", "torchvision", "download"],
)
def test_a_broken_lpips_is_refused_with_its_cure(
    module: ModuleType | None, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, the message says what to install, and why."""
    monkeypatch.setitem(sys.modules, "lpips", module)
    with pytest.raises(ImportError, match=re.escape(cause)) as refused:
        require_perceptual("lpips")
    assert "--constraint constraints.txt" in str(refused.value)
    assert "--perceptual none" in str(refused.value)


def test_lpips_that_fails_to_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real import that ends in RuntimeError."""
    (tmp_path / "lpips.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    with pytest.raises(ImportError, match="RuntimeError: operator torchvision::nms does not exist"):
        load_perceptual("lpips")


def test_no_distance_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an unknown one is refused by name."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert load_perceptual("none") is None
    require_perceptual("none")
    choices = ", ".join(map(repr, PERCEPTUAL))
    with pytest.raises(ValueError, match=exactly(f"perceptual must be one of {choices}, got 'vgg'.")):
        load_perceptual("vgg")


def test_stage1_is_refused_before_its_folder_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the same command without the distance is no run of other settings."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    words = ["stage1", "--preset", "smoke", "--steps", "1", "--arm", "vqgan", "--out", str(tmp_path)]
    assert main([*words, "--perceptual", "lpips"]) == 1
    assert "--perceptual lpips needs" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert main([*words, "--perceptual", "none"]) == 0


def test_the_family_is_refused_before_its_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Stage 1."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    settings = tiny_settings(perceptual="lpips", perceptual_weight=1.0)
    with pytest.raises(ImportError, match="--perceptual lpips needs"):
        train_family(settings, tmp_path, random_source(), names=["vq"], progress=False)
    assert not any(tmp_path.iterdir())


def test_run_is_refused_before_its_first_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier would train for minutes before Stage 1 finds out; without the distance the jobs start."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(run_command, "run_jobs", lambda jobs, **_: pytest.fail(f"started {jobs[0].name}"))
    words = ["run", "--preset", "smoke", "--out", str(tmp_path)]
    with pytest.raises(ImportError, match="--perceptual lpips needs"):
        run_plan(_parse([*words, "--perceptual", "lpips"]), perform=lambda _: None)
    with pytest.raises(pytest.fail.Exception, match=r"started .*classifier"):
        run_plan(_parse(words), perform=lambda _: None)


def test_run_needs_no_distance_where_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report can be written on a machine that has no LPIPS."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(run_command, "plan_jobs", lambda options: [])
    monkeypatch.setattr(run_command, "announce", lambda folder: None)
    monkeypatch.setattr(report, "write_report", lambda out, **_: out)
    options = _parse(["run", "--preset", "smoke", "--out", str(tmp_path), "--perceptual", "lpips"])
    run_plan(options, perform=lambda _: None)


def test_every_job_that_needs_the_distance_is_told(tmp_path: Path) -> None:
    """Stage 1 and the evaluations; the others take no such option."""
    options = _parse(["run", "--preset", "smoke", "--out", str(tmp_path), "--perceptual", "st-lpips"])
    told = {job.arguments[0]: "--perceptual st-lpips" in " ".join(job.arguments) for job in plan_jobs(options)}
    assert told == {"classifier": False, "stage1": True, "stage2": False, "evaluate": True}


# ST-LPIPS --------------------------------------------------------------------------------------------------


def _tensors() -> dict[str, Tensor]:
    """Random weights of a narrow network under the names of the package's file, and what else lies in it."""
    tensors = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for name, side, inputs, width in zip(NAMES, SIDES, WIDTHS, WIDTHS[1:], strict=False):
        scale = (inputs * side**2) ** -0.5
        tensors[f"net.{name}.weight"] = torch.randn(width, inputs, side, side) * scale
        tensors[f"net.{name}.bias"] = torch.randn(width) * 0.1
    for number, width in enumerate(WIDTHS[1:]):
        tensors[f"lin{number}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return tensors


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package of that name whose import fails, with tiny weights; return the folder it lies in."""
    site = tmp_path / "site"
    file = site / "stlpips_pytorch" / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
    file.parent.mkdir(parents=True)
    torch.save(_tensors(), file)
    (site / "stlpips_pytorch" / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    facts = site / "stlpips_pytorch-0.0.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: stlpips-pytorch\nVersion: 0.0.2\n")
    (facts / "RECORD").write_text(f"stlpips_pytorch/__init__.py,,\n{file.relative_to(site).as_posix()},,\n")
    monkeypatch.syspath_prepend(site)
    return site


def _pair(count: int = 3, height: int = 24, width: int = 29) -> tuple[Tensor, Tensor]:
    first = torch.rand(count, 3, height, width) * 2 - 1
    return first, (first + 0.3 * torch.randn_like(first)).clamp(-1, 1)


def _convolved(image: NDArray[np.float64], weight: NDArray[np.float64], padding: int) -> NDArray[np.float64]:
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(padded, weight.shape[2:], axis=(1, 2))
    return np.einsum("chwij,kcij->khw", windows, weight)


def _halved(image: NDArray[np.float64]) -> NDArray[np.float64]:
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    taps = np.array([0.25, 0.5, 0.25])
    return np.einsum("chwij,i,j->chw", windows, taps, taps)


def _features(image: NDArray[np.float64], tensors: dict[str, NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """The network written out in numpy."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    hidden = (image - shift[:, None, None]) / scale[:, None, None]
    found = []
    for number, name in enumerate(NAMES):
        if number in (1, 2):
            hidden = _halved(sliding_window_view(hidden, (3, 3), axis=(1, 2)).max((-1, -2)))
        weight, bias = tensors[f"net.{name}.weight"], tensors[f"net.{name}.bias"]
        hidden = _convolved(hidden, weight, 2 if number < 2 else 1) + bias[:, None, None]
        hidden = np.maximum(_halved(hidden) if number == 0 else hidden, 0)
        found.append(hidden)
    return found


def test_st_lpips_is_the_network_written_out() -> None:
    """In float64, image by image, on sides that are odd and even; other weights give another distance."""
    tensors = _tensors()
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    first, second = _pair()
    found = STLPIPS(tensors).double()(first.double(), second.double())
    for number, distance in enumerate(found.tolist()):
        expected = 0.0
        images = (image[number].double().numpy() for image in (first, second))
        for layer, (one, two) in enumerate(zip(*(_features(image, arrays) for image in images), strict=True)):
            units = [part / (np.linalg.norm(part, axis=0) + 1e-10) for part in (one, two)]
            head = arrays[f"lin{layer}.model.1.weight"].reshape(-1, 1, 1)
            expected += ((units[0] - units[1]) ** 2 * head).sum(0).mean()
        assert distance == pytest.approx(expected, rel=1e-6)
    assert not torch.allclose(STLPIPS(_tensors()).double()(first.double(), second.double()), found, rtol=1e-2)


def test_st_lpips_is_a_distance_of_pairs() -> None:
    """0 for equal images only, the same both ways round, and whatever else is in the batch."""
    distance = STLPIPS(_tensors())
    first, second = _pair()
    found = distance(first, second)
    assert found.shape == (3,)
    assert (found > 0).all()
    assert torch.equal(distance(first, first), torch.zeros(3))
    torch.testing.assert_close(distance(second, first), found)
    torch.testing.assert_close(distance(first[1:2], second[1:2]), found[1:2])


def test_st_lpips_trains_images_and_nothing_else() -> None:
    """The gradient is finite, also where all features vanish; the weights take none."""
    tensors = _tensors()
    for name in NAMES:
        tensors[f"net.{name}.bias"] = torch.full_like(tensors[f"net.{name}.bias"], -0.2)
    distance = STLPIPS(tensors)
    first, second = _pair()
    first[0] = 0.0
    first.requires_grad_()
    distance(first, second).sum().backward()
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()
    assert first.grad[1:].abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((2, 3, 20, 32), (2, 3, 20, 32), "first must be .* with sides of at least 21 pixels, got .2, 3, 20, 32."),
        ((2, 1, 32, 32), (2, 1, 32, 32), r"first must be \(B, 3, H, W\)"),
        ((2, 3, 32, 32), (1, 3, 32, 32), r"second must be as first, \(2, 3, 32, 32\), got \(1, 3, 32, 32\)"),
    ],
)
def test_st_lpips_refuses_other_shapes(first: tuple[int, ...], second: tuple[int, ...], message: str) -> None:
    """By name, before anything is broadcast or reflected."""
    with pytest.raises(ValueError, match=message):
        STLPIPS(_tensors())(torch.zeros(first), torch.zeros(second))


def test_st_lpips_takes_the_smallest_sides() -> None:
    """The negative control of the refusal above."""
    images = torch.rand(1, 3, 21, 21)
    assert STLPIPS(_tensors())(images, -images).item() > 0


@pytest.mark.usefixtures("package")
def test_st_lpips_reads_the_package_without_importing_it() -> None:
    """Its import fails, so a distance says that only the file was read."""
    distance = load_perceptual("st-lpips")
    assert distance is not None
    first, second = _pair()
    assert (distance(first, second) > 0).all()
    assert "stlpips_pytorch" not in sys.modules


def test_st_lpips_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its version."""

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ImportError, match=re.escape("pip install stlpips-pytorch==0.0.2")):
        load_st_lpips()


def test_another_version_of_the_package_is_refused(package: Path) -> None:
    """One without the file; one whose file lacks a weight; a damaged file."""
    (file,) = package.rglob("*.pth")
    tensors = _tensors()
    del tensors["net.slice3.9.bias"]
    torch.save(tensors, file)
    with pytest.raises(ValueError, match=r"weights must be those of .*, got none called net.slice3.9.bias"):
        load_st_lpips()
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} must hold the weights of"):
        load_st_lpips()
    file.unlink()
    with pytest.raises(ImportError, match=r"stlpips-pytorch must be version 0.0.2, got one without"):
        load_st_lpips()


def test_readings_of_before_have_their_distance() -> None:
    """Under two keys then, by name now."""
    assert measured_distances({}) == {}
    assert measured_distances({"perceptual": "lpips", "perceptual_distance": 0.5}) == {"lpips": 0.5}
    assert measured_distances({"perceptual_distances": {"st-lpips": 0.25}}) == {"st-lpips": 0.25}


def _recorded_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 45, 38)))
    square = torch.full((1, 3, 32, 32), -1.0, dtype=torch.float64)
    square[:, :, 8:20, 10:22] = 1.0
    red = square.clone()
    red[:, 1:] = -1.0
    return {
        "two noises": (noise[:1], noise[1:]),
        "noise and half of it": (noise[:1], noise[:1] / 2),
        "square, one pixel apart": (square, square.roll(1, 3)),
        "square, eight pixels apart": (square, square.roll(8, 3)),
        "white and red square": (square, red),
        "square and nothing": (square, torch.full_like(square, -1.0)),
    }


# Computed by the code of stlpips-pytorch 0.0.2, LPIPS(net="alex", variant="shift_tolerant"), in float64.
_RECORDED = {
    "two noises": 0.045755971,
    "noise and half of it": 0.140978811,
    "square, one pixel apart": 0.009842712,
    "square, eight pixels apart": 0.298696222,
    "white and red square": 0.685466642,
    "square and nothing": 0.537759341,
}


@pytest.fixture(scope="module")
def real_distance() -> STLPIPS:
    """ST-LPIPS with the weights of the real package."""
    try:
        importlib.metadata.version("stlpips-pytorch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("stlpips-pytorch is not installed (the extra `perceptual`)")
    return load_st_lpips().double()


@pytest.mark.parametrize("name", _RECORDED)
def test_st_lpips_agrees_with_the_code_of_its_package(name: str, real_distance: STLPIPS) -> None:
    """On noise and on shapes, with the published weights."""
    assert real_distance(*_recorded_pairs()[name]).item() == pytest.approx(_RECORDED[name], abs=2e-9)
