"""The command te-quant, in this process: what it writes, and every mistake in one sentence."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import math
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("huggingface_hub")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from te_quant import AutoencoderConfig, VQAutoencoder
from te_quant.autoencoder import pad_to_divisor
from te_quant.cli import codec, main, measures, models
from te_quant.cli.arguments import Options
from te_quant.cli.pictures import write_picture
from te_quant.cli.token_file import compact_dtype
from te_quant.quantizers import QUANTIZERS

SMALL: dict[str, Any] = {
    "base_channels": 2,
    "channel_multipliers": (1, 1, 1),
    "attention": False,
    "norm": "channel",
    "num_codes": 16,
    "code_dim": 4,
    "encoder_padding": "circular",
    "decoder_padding": "circular",
}
Run = Callable[..., tuple[int, str, str]]


def make(seed: int = 0, **options: Any) -> VQAutoencoder:
    """A model with random weights that uses several codes."""
    torch.manual_seed(seed)
    model = VQAutoencoder(AutoencoderConfig(**{**SMALL, **options})).eval()
    if "quantizer" not in options:
        side = 4 * math.ceil(math.sqrt(model.config.num_codes))
        latents = model.encode(torch.rand(1, model.config.image_channels, side, side) * 2 - 1)
        model.quantizer.set_codebook(latents.detach().flatten(2)[0].T[: model.config.num_codes].contiguous())
    return model


def picture(path: Path, height: int, width: int, seed: int = 0) -> None:
    """Noise of whole numbers, as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def pixels_of(path: Path) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).movedim(-1, 0) / 127.5 - 1


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in the test's folder; return its status and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def model(tmp_path: Path) -> VQAutoencoder:
    """Saved in the folder ``model``, next to the pictures of ``photos``."""
    made = make()
    made.save_pretrained(tmp_path / "model")
    picture(tmp_path / "photos" / "a.png", 10, 15, seed=1)
    picture(tmp_path / "photos" / "more" / "b.png", 16, 16, seed=2)
    picture(tmp_path / "photos" / "c.png", 16, 16, seed=3)
    return made


def test_tokens_are_those_of_the_model(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """Each picture at its own size, padded; in bytes, with the size and what the model is."""
    status, out, err = run("encode", "model", "photos", "-o", "tokens.safetensors", "--json")
    assert (status, err) == (0, "")
    tokens = load_file(tmp_path / "tokens.safetensors")
    assert sorted(tokens) == ["tokens/a.png", "tokens/c.png", "tokens/more/b.png"]
    for name, found in tokens.items():
        images = pixels_of(tmp_path / "photos" / name.removeprefix("tokens/"))[None]
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), model.encode_to_indices(pad_to_divisor(images, 4))[0])
    with safe_open(tmp_path / "tokens.safetensors", "pt") as file:
        about = json.loads(file.metadata()["te_quant_tokens"])
    values = json.loads(out)
    assert about["images"] == {"a.png": [10, 15], "c.png": [16, 16], "more/b.png": [16, 16]}
    assert (about["num_codes"], about["stride"], about["model"]) == (16, 4, "model")
    assert about["identity"] == values["identity"]
    assert values["images"] == 3
    assert values["tokens"] == 3 * 4 + 2 * 16


@pytest.mark.parametrize("batch_size", [1, 2])
def test_decoded_pictures_have_their_first_size(
    run: Run, model: VQAutoencoder, tmp_path: Path, batch_size: int
) -> None:
    """The padding is cut off, and values are rounded to 8 bits."""
    run("encode", "model", "photos", "-o", "tokens.safetensors", "--batch-size", batch_size)
    status, _, _ = run("decode", "model", "tokens.safetensors", "-o", "out", "--batch-size", batch_size)
    assert status == 0
    for name in ("a.png", "c.png", "more/b.png"):
        images = pixels_of(tmp_path / "photos" / name)
        whole = model(pad_to_divisor(images[None], 4)).reconstruction[0, :, : images.shape[1], : images.shape[2]]
        found = pixels_of(tmp_path / "out" / name)
        assert found.shape == images.shape
        assert (found - whole.clamp(-1, 1)).abs().max() <= 0.501 / 127.5


def test_every_decoded_picture_has_a_file_of_its_own(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """Also where a name with one more ending is the other ending of a third; names that do not meet stay short."""
    for number, name in enumerate(("a.jpg", "a.png", "a.png.bmp", "b.jpg")):
        picture(tmp_path / "alike" / name, 8, 8, seed=number)
    run("encode", "model", "alike", "-o", "alike.safetensors")
    status, out, _ = run("decode", "model", "alike.safetensors", "-o", "out", "--json")
    names = ["a.jpg.png", "a.png.bmp.png", "a.png.png", "b.png"]
    assert (status, sorted(json.loads(out)["pictures"])) == (0, names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


@pytest.mark.parametrize(
    ("num_codes", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.uint16),
        (2**16, torch.uint16),
        (2**16 + 1, torch.int32),
        (2**31, torch.int32),
        (2**31 + 1, torch.int64),
    ],
)
def test_tokens_take_the_smallest_integers(num_codes: int, dtype: torch.dtype) -> None:
    """The largest index, K - 1, fits."""
    assert compact_dtype(num_codes) == dtype


@pytest.mark.parametrize(
    "options",
    [
        {"downsample": "polyphase", "upsample": "polyphase"},
        {
            "quantizer": {
                "name": "ResidualVectorQuantizer",
                "num_codes": 16,
                "code_dim": 4,
                "num_quantizers": 2,
                "codebook_update": "ema",
            }
        },
        {"image_channels": 1},
        {"num_codes": 300},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_models_come_back_too(run: Run, model: VQAutoencoder, tmp_path: Path, options: dict) -> None:
    """Phases, several indices per token, grey pictures, and more than a byte per token."""
    other = make(**options)
    other.save_pretrained(tmp_path / "other")
    assert run("encode", "other", "photos/c.png", "-o", "t.safetensors")[0] == 0
    assert run("decode", "other", "t.safetensors", "-o", "out")[0] == 0
    grey = other.config.image_channels == 1
    image = Image.open(tmp_path / "photos" / "c.png").convert("L" if grey else "RGB")
    pixels = torch.from_numpy(np.asarray(image).copy().reshape(16, 16, -1)).movedim(-1, 0)[None] / 127.5 - 1
    found = np.asarray(Image.open(tmp_path / "out" / "c.png")).reshape(16, 16, -1)
    expected = (other(pixels).reconstruction[0].clamp(-1, 1) + 1) * 127.5
    assert np.abs(found - expected.detach().movedim(0, -1).numpy()).max() <= 0.51


@pytest.mark.long
def test_tiles_give_the_same_tokens(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """For this model tiles are exact; the decoder takes them too."""
    make(base_channels=4, channel_multipliers=(1, 2, 2)).save_pretrained(tmp_path / "model")
    picture(tmp_path / "large.png", 120, 124)
    assert run("encode", "model", "large.png", "-o", "whole.safetensors")[0] == 0
    assert run("encode", "model", "large.png", "-o", "tiles.safetensors", "--tile-size", 116)[0] == 0
    whole, tiles = (load_file(tmp_path / f"{name}.safetensors")["tokens/large.png"] for name in ("whole", "tiles"))
    assert (whole == tiles).float().mean() > 0.999
    assert run("decode", "model", "tiles.safetensors", "-o", "out", "--tile-size", 116)[0] == 0
    assert pixels_of(tmp_path / "out" / "large.png").shape == (3, 120, 124)


@pytest.mark.parametrize(("norm", "tile", "warns"), [("group", 8, True), ("channel", 112, False)])
def test_tiles_that_change_tokens_are_announced(
    run: Run, tmp_path: Path, norm: str, tile: int, warns: bool
) -> None:
    """On standard error, also without progress; a model whose tiles are exact says nothing."""
    make(norm=norm, channel_multipliers=(1, 1)).save_pretrained(tmp_path / "model")
    picture(tmp_path / "x.png", 16, 16)
    status, out, err = run("encode", "model", "x.png", "-o", "t", "--tile-size", tile, "--quiet")
    assert status == 0
    assert "warning" not in out
    told = f"te-quant encode: warning: pictures larger than a tile of {tile} pixels get other tokens than without"
    assert err.startswith(told) == warns
    assert err.count("\n") == int(warns)


def test_another_model_does_not_decode(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """One other code is enough, and nothing is written."""
    run("encode", "model", "photos", "-o", "tokens.safetensors")
    model.quantizer.set_codebook(model.quantizer.codebook.roll(1, 0))
    model.save_pretrained(tmp_path / "other")
    status, out, err = run("decode", "other", "tokens.safetensors", "-o", "out")
    assert (status, out) == (2, "")
    assert err.startswith("te-quant decode: model must be the model that wrote the tokens (model, identity ")
    assert not (tmp_path / "out").exists()


def same_weights(model: VQAutoencoder, **changes: Any) -> VQAutoencoder:
    """A model with other options."""
    other = VQAutoencoder(replace(model.config, **changes))
    own = other.state_dict()
    other.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in own})
    return other.eval()


FSQ_8_5, FSQ_5_8 = ({"name": "FSQ", "levels": levels} for levels in ([8, 5], [5, 8]))


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {"decoder_padding": "zeros"}),
        ({}, {"metric": "cosine"}),
        ({}, {"activation": "filtered"}),
        ({}, {"upsample": "blur"}),
        ({"norm": "group"}, {"norm_groups": 1}),
        ({"quantizer": FSQ_8_5, "code_dim": 2, "num_codes": 256}, {"quantizer": FSQ_5_8, "num_codes": 256}),
        (
            {"quantizer": {"name": "LFQ", "code_dim": 4}, "num_codes": 256},
            {"quantizer": {"name": "LFQ", "code_dim": 4, "spherical": True}, "num_codes": 256},
        ),
    ],
    ids=lambda options: ", ".join(options),
)
def test_other_options_of_the_decoding_do_not_decode(
    run: Run, tmp_path: Path, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    """The weights are equal, but the pictures would differ."""
    model = make(**options)
    other = same_weights(model, **changes)
    tokens = torch.arange(16).view(1, 4, 4)
    assert not torch.equal(model.decode_indices(tokens), other.decode_indices(tokens))
    model.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "other")
    picture(tmp_path / "x.png", 16, 16)
    assert run("encode", "model", "x.png", "-o", "t")[0] == 0
    status, out, err = run("decode", "other", "t", "-o", "out")
    assert (status, out) == (2, "")
    assert err.startswith("te-quant decode: model must be the model that wrote the tokens (model, identity ")
    assert run("decode", "model", "t", "-o", "out")[0] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_padding": "zeros", "dropout": 0.5, "norm_groups": 1},
        {"codebook_update": "gradient", "commitment_weight": 0.5, "orthogonal_reg": 1.0, "revival_threshold": 0.0},
        {"metric": "cosine_raw", "decay": 0.5, "gradient_estimator": "rotation_trick"},
    ],
    ids=lambda changes: next(iter(changes), "weights"),
)
def test_what_gives_tokens_no_meaning_is_not_compared(
    run: Run, model: VQAutoencoder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The place of the model, its encoder and training, the use of its codes, and weights in a wider dtype."""
    run("encode", "model", "photos", "-o", "tokens.safetensors")
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    model.quantizer.usage.add_(1)
    same_weights(model, **changes).double().save_pretrained(tmp_path / "moved")
    assert run("decode", "moved", "tokens.safetensors", "-o", "out") == (0, "out: 3 pictures\n", "")


def test_every_option_of_a_quantizer_is_sorted() -> None:
    """Into those that say how indices are decoded, and those that an identity leaves out."""
    decoding = {"num_codes", "code_dim", "levels", "spherical", "metric", "quantizers", "stages"}
    decoding |= {"num_groups", "num_quantizers", "shared_codebook"}
    runs = {"channel_dim", "process_group", "generator"}
    options = {name for kind in QUANTIZERS.values() for name in inspect.signature(kind).parameters}
    assert options - runs - decoding == set(models._TRAINING)


def former_identity(model: VQAutoencoder) -> str:
    """The digest of format 1: the tensors only, those of the codebook without its statistics."""
    digest = hashlib.sha256()
    tensors = {f"decoder.{name}": tensor for name, tensor in model.decoder.state_dict().items()}
    for name, tensor in [("quantizer.codebook", model.quantizer.codebook), *sorted(tensors.items())]:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def test_tokens_of_the_former_format_are_decoded(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """Their identity has no options, so only other weights are refused; a warning says so."""
    run("encode", "model", "photos", "-o", "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        about = json.loads(file.metadata()["te_quant_tokens"])
    assert about["format"] == 2
    about |= {"format": 1, "identity": former_identity(model)}
    tokens = load_file(tmp_path / "new.safetensors")
    save_file(tokens, tmp_path / "old.safetensors", metadata={"te_quant_tokens": json.dumps(about)})
    status, _, err = run("decode", "model", "old.safetensors", "-o", "out")
    assert status == 0
    assert err == (
        "te-quant decode: warning: old.safetensors is of format 1, whose identity leaves out options such as the "
        "padding of the decoder; encode the pictures again to have these compared too.\n"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png", "more"]
    make(seed=1).save_pretrained(tmp_path / "other")
    status, _, err = run("decode", "other", "old.safetensors", "-o", "more")
    assert status == 2
    assert f"(model, identity {former_identity(model)}), got other, identity " in err


def interrupt(*_: object, **__: object) -> None:
    """Half of a file, then the user presses Ctrl-C."""
    path = next(argument for argument in _ if isinstance(argument, str | Path))
    Path(path).write_bytes(b"half")
    raise KeyboardInterrupt


def test_an_interrupted_encode_keeps_the_old_file(
    run: Run, model: VQAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 130, one line, and no other file."""
    run("encode", "model", "photos/a.png", "-o", "tokens.safetensors")
    before = (tmp_path / "tokens.safetensors").read_bytes()
    files = sorted(tmp_path.iterdir())
    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    status, out, err = run("encode", "model", "photos", "-o", "tokens.safetensors", "--overwrite")
    assert (status, out, err) == (130, "", "te-quant encode: interrupted\n")
    assert (tmp_path / "tokens.safetensors").read_bytes() == before
    assert sorted(tmp_path.iterdir()) == files


def test_an_interrupted_decode_leaves_no_half_picture(
    run: Run, model: VQAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds whole pictures only; here none."""
    run("encode", "model", "photos", "-o", "tokens.safetensors")
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **_: interrupt(path))
    assert run("decode", "model", "tokens.safetensors", "-o", "out")[0] == 130
    assert list((tmp_path / "out").rglob("*.*")) == []


def test_an_interrupted_decode_tells_how_far_it_came(
    run: Run, model: VQAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And how to go on: what it says works."""
    run("encode", "model", "photos", "-o", "tokens.safetensors")
    words = ("decode", "model", "tokens.safetensors", "-o", "out")
    done: list[Path] = []

    def write(path: Path, pixels: Tensor) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        write_picture(path, pixels)
        done.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(codec, "write_picture", write)
        status, out, err = run(*words)
    told = "interrupted, 2 of 3 pictures written to out; pass --overwrite to write all of them"
    assert (status, out, err) == (130, "", f"te-quant decode: {told}\n")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2
    assert run(*words, "--overwrite") == (0, "out: 3 pictures\n", "")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


@pytest.mark.slow
def test_measure_reports_what_python_reports(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """As JSON the whole report, with everything that our models can tell; and a row of a table."""
    from te_quant import EquivarianceReport, measure_equivariance

    names = ("photos/c.png", "photos/more/b.png")
    status, out, _ = run("measure", "model", *names, "--json", "--table", "table.md", "--name", "tiny")
    report = EquivarianceReport.from_dict(json.loads(out))
    images = torch.stack([pixels_of(tmp_path / name) for name in names])
    expected = measure_equivariance(
        model.encode_to_indices, images, protocol="circular", stride=4, num_codes=16, resamples=0
    )
    assert status == 0
    assert report.aligned.rate == expected.aligned.rate == 1
    assert report.sub_stride.rate == expected.sub_stride.rate < 1
    assert report.margin is not None
    assert report.feature_error is not None
    assert report.reconstruction is not None
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[0].startswith("| tokenizer | images | pixels per token | codes | whole tokens: κ |")
    assert rows[2].startswith("| tiny | 2 of 16x16, circular | 4 | 16 | 1.000 [1.000, 1.000] |")


@pytest.mark.slow
def test_stability_reports_what_python_reports(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """As JSON the whole report; and a row with the token match of every transform."""
    from te_quant.stability import StabilityReport, measure_stability

    status, out, _ = run("stability", "model", "photos/c.png", "--json", "--cycles", 2, "--table", "table.md")
    report = StabilityReport.from_dict(json.loads(out))
    images = pixels_of(tmp_path / "photos" / "c.png")[None]
    expected = measure_stability(model.encode_to_indices, model.decode_indices, images, num_codes=16, resamples=0)
    assert status == 0
    assert report.settings.cycles == 2
    rates = {name: found.match.rate for name, found in report.transforms.items()}
    assert rates == {name: found.match.rate for name, found in expected.transforms.items()}
    row = (tmp_path / "table.md").read_text().splitlines()[2]
    assert row.startswith("| model | 1 of 16x16, token match (κ) | 4 | 16 |")
    assert f" {rates['identity']:.3f} (" in row


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model": "runs/vq/"}, "runs/vq"),
        ({"model": "runs", "filename": "last.ckpt"}, "runs/last.ckpt"),
        ({"model": "me/vq", "subfolder": "vqvae", "revision": "v2"}, "me/vq/vqvae@v2"),
        ({"model": "mine.py:load", "name": "mine"}, "mine"),
    ],
)
def test_every_model_has_a_row_of_its_own(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Two files of one folder, or two revisions, do not replace each other."""
    table = tmp_path / "table.md"
    report = SimpleNamespace(reconstruction=None, code_use=SimpleNamespace(used_codes=3), to_dict=dict)
    facts = ("1 of 4x4", "4", "16")
    measures._told(Options("measure", table=table, **options), report, facts, {})  # type: ignore[arg-type]
    assert table.read_text().splitlines()[2] == f"| {name} | 1 of 4x4 | 4 | 16 | 3 |  |"


@pytest.mark.slow
def test_audit_names_layers(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """As text and as JSON."""
    status, out, _ = run("audit", "model", "photos/c.png")
    assert status == 0
    assert "levels.0.downsample" in out
    rows = json.loads(run("audit", "model", "photos/c.png", "--json")[1])["rows"]
    assert any(row["name"].startswith("levels.0.downsample") for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["audit", "stability"])
def test_reports_are_drawn(run: Run, model: VQAutoencoder, tmp_path: Path, command: str) -> None:
    """A whole PNG file, which replaces another one only on request."""
    (tmp_path / "report.png").write_text("x")
    assert run(command, "model", "photos/c.png", "--plot", "report.png", "--overwrite")[0] == 0
    with Image.open(tmp_path / "report.png") as image:
        image.verify()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("out", "output must be a file, got the folder out/a.png; choose another name."),
        ("t", "output must be in a folder, got t/a.png, where t is a file; choose another name."),
    ],
)
def test_no_picture_replaces_a_folder(
    run: Run, model: VQAutoencoder, tmp_path: Path, output: str, told: str
) -> None:
    """Nor do pictures go into a file; nothing is decoded."""
    run("encode", "model", "photos", "-o", "t")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert run("decode", "model", "t", "-o", output, "--overwrite") == (2, "", f"te-quant decode: {told}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_are_made_equal(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """--size resizes and cuts, and --limit takes the first."""
    assert run("encode", "model", "photos", "-o", "t", "--size", 8, "--limit", 2)[0] == 0
    assert {name: found.shape for name, found in load_file(tmp_path / "t").items()} == {
        "tokens/a.png": (2, 2),
        "tokens/c.png": (2, 2),
    }


@pytest.mark.slow
def test_convert_carries_a_model_to_diffusers_and_back(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """The tokens stay the same, and so does what gives them their meaning."""
    zeros = {"norm": "group", "encoder_padding": "zeros", "decoder_padding": "zeros"}
    make(**zeros).save_pretrained(tmp_path / "mine")
    status, out, _ = run("convert", "mine", "-o", "theirs", "--to", "diffusers", "--json")
    assert status == 0
    assert json.loads(out)["files"] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert run("convert", "theirs", "-o", "back", "--format", "diffusers")[0] == 0
    run("encode", "mine", "photos", "-o", "mine.safetensors")
    run("encode", "theirs", "photos", "-o", "theirs.safetensors", "--format", "diffusers")
    mine, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("mine", "theirs"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert run("decode", "back", "mine.safetensors", "-o", "out")[0] == 0


def test_the_file_of_the_weights_stands_for_its_folder(run: Run, model: VQAutoencoder) -> None:
    """Shells complete to it."""
    assert run("encode", "model/model.safetensors", "photos", "-o", "t.safetensors")[0] == 0


def test_one_picture_is_singular(run: Run, model: VQAutoencoder) -> None:
    """In what both commands print."""
    out = run("encode", "model", "photos/c.png", "-o", "t", "--size", 4)[1]
    assert out.startswith("t: 1 token of 1 image as uint8, 1 of 16 codes used")
    assert run("decode", "model", "t", "-o", "out")[1] == "out: 1 picture\n"


PYTHON = """
import torch
from te_quant.adapters import Tokenizer

def load():
    def encode(images):
        return (images[:, 0, ::4, ::4] > 0).long()
    def decode(indices):
        grey = (indices * 2.0 - 1)[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
        return grey.expand(-1, 3, -1, -1)
    return Tokenizer(encode, decode, stride=4, num_codes=2)

def nothing():
    return None
"""


@pytest.mark.parametrize("place", ["mine.py:load", "mine:load"])
def test_tokenizers_of_other_libraries_are_measured(
    run: Run, model: VQAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A function that returns the two functions; each token here is one pixel, which comes back."""
    (tmp_path / "mine.py").write_text(PYTHON)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    out = run("stability", place, "photos/c.png", "--format", "python", "--json")[1]
    assert json.loads(out)["transforms"]["identity"]["cycles"][0]["match"]["rate"] == 1
    report = json.loads(run("measure", place, "photos/c.png", "--format", "python", "--json")[1])
    assert report["aligned"]["rate"] == 1
    assert report["reconstruction"] is not None


@pytest.mark.parametrize("commands", [("stability", "measure"), ("measure", "stability")])
def test_the_table_of_the_other_command_is_refused_at_once(
    run: Run, model: VQAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: tuple[str, str]
) -> None:
    """Before anything is measured and drawn; the own table takes another row."""
    (tmp_path / "mine.py").write_text(PYTHON)
    arguments = ("mine.py:load", "photos/c.png", "--format", "python", "--table", "t.md", "--quiet")
    for name in ("first", "second"):
        assert run(commands[0], *arguments, "--name", name)[0] == 0
    before = (tmp_path / "t.md").read_text()
    head = before.splitlines()[0]
    assert before.count("\n") == 4
    for name in ("measure_equivariance", "measure_stability"):
        monkeypatch.setattr(measures, name, lambda *_, **__: pytest.fail("measured"))
    status, out, err = run(commands[1], *arguments, "--plot", "p.png")
    assert (status, out) == (2, "")
    assert err.startswith(
        f"te-quant {commands[1]}: t.md must be a file with a table that begins with '| tokenizer "
    )
    assert err.endswith(f"got {head!r}; pass another file.\n")
    assert (tmp_path / "t.md").read_text() == before
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_report_is_printed_in_every_encoding(
    run: Run, model: VQAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """As escapes where standard output has no κ; the table is UTF-8 as always."""
    (tmp_path / "mine.py").write_text(PYTHON)
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("measure", "mine.py:load", "photos/c.png", "--format", "python", "--table", "t.md")[0] == 0
    stream.flush()
    header = stream.buffer.getvalue().decode(encoding).splitlines()[0]
    assert header.split() == [
        "measured",
        "rate",
        "or",
        "value",
        "κ" if encoding == "utf-8" else "\\u03ba",
        "chance",
    ]
    assert "whole tokens: κ" in (tmp_path / "t.md").read_text(encoding="utf-8")


class _CosmosEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return (images[:, 0, ::4, ::4] * self.weight > 0).int(), images


class _CosmosDecoder(nn.Module):
    def forward(self, indices: Tensor) -> Tensor:
        grey = (indices * 2.0 - 1).unsqueeze(1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return grey.expand(-1, 3, -1, -1)


def test_cosmos_is_two_files(run: Run, model: VQAutoencoder, tmp_path: Path) -> None:
    """The stride is not in them, so it is asked for."""
    (tmp_path / "di8x8").mkdir()
    for name, module in (("encoder", _CosmosEncoder()), ("decoder", _CosmosDecoder())):
        torch.jit.save(torch.jit.script(module), tmp_path / "di8x8" / f"{name}.jit")
    arguments = ("stability", "di8x8", "photos/c.png", "--format", "cosmos")
    status, out, _ = run(*arguments, "--stride", 4, "--num-codes", 2, "--json")
    assert status == 0
    assert json.loads(out)["settings"]["num_codes"] == 2
    assert json.loads(out)["transforms"]["identity"]["cycles"][0]["match"]["rate"] == 1
    assert (
        run(*arguments)[2]
        == "te-quant stability: --stride must be given for cosmos, such as 8 for DI8x8, got None.\n"
    )


@pytest.mark.parametrize("name", ["encoder.jit", "decoder.jit"])
@pytest.mark.parametrize("kind", ["empty", "page", "half", "weights"])
def test_other_files_in_the_place_of_cosmos_are_refused(
    run: Run, model: VQAutoencoder, tmp_path: Path, name: str, kind: str
) -> None:
    """As a download that failed leaves them."""
    (tmp_path / "di8x8").mkdir()
    for half, module in (("encoder", _CosmosEncoder()), ("decoder", _CosmosDecoder())):
        torch.jit.save(torch.jit.script(module), tmp_path / "di8x8" / f"{half}.jit")
    path = tmp_path / "di8x8" / name
    whole = path.read_bytes()
    if kind == "weights":
        torch.save({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes({"empty": b"", "page": b"<html></html>", "half": whole[: len(whole) // 2]}[kind])
    status, out, err = run("stability", "di8x8", "photos/c.png", "--format", "cosmos", "--stride", 4)
    assert (status, out) == (2, "")
    assert err.startswith(f"te-quant stability: di8x8/{name} must be a file that torch.jit.save wrote, got ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "encode nowhere photos -o t",
            "source must be an existing folder or a hub id 'owner/name', got 'nowhere'.",
        ),
        ("encode model nowhere -o t", "images must be files or folders that exist, got nowhere."),
        ("encode model empty -o t", "images must be a folder with at least one picture (.bmp, .jpeg"),
        (
            "encode model text.png -o t",
            "text.png must be a picture that Pillow can read, got a file of another kind.",
        ),
        ("encode model half.png -o t", "half.png must be a whole picture, got a damaged file ("),
        (
            "encode model photos photos/a.png other/a.png -o t",
            "pictures must be of different names, got two of 'a.png'",
        ),
        ("encode . photos -o t", "model must be a folder with config.json, got .; pass model."),
        (
            "measure above photos",
            "model must be a folder with config.json, got above; pass above/gpt or above/model.",
        ),
        (
            "encode model photos -o w.npz",
            "--output must be a name that ends in .safetensors or has no suffix, got w.npz.",
        ),
        ("encode model photos -o w.npz --overwrite", "--output must be a name that ends in .safetensors "),
        ("encode model photos -o taken", "output must be a new file, got taken, which exists; pass --overwrite"),
        *(
            (f"{arguments}{more}", f"{name} must be a file, got the folder photos{ending}; choose another name.")
            for arguments, name, ending in (
                ("encode model photos/c.png -o photos", "output", ""),
                ("audit model photos/c.png --plot photos.png", "--plot", ".png"),
                ("measure model photos/c.png --table photos", "--table", ""),
                ("stability model photos/c.png --table photos", "--table", ""),
            )
            for more in ("", " --overwrite")
        ),
        (
            "encode model photos -o taken/t",
            "output must be in a folder, got taken/t, where taken is a file; choose",
        ),
        (
            "convert model -o taken",
            "output must be in a folder, got taken/config.json, where taken is a file; choose",
        ),
        (
            "measure model photos/c.png --table taken/t.md",
            "--table must be in a folder, got taken/t.md, where taken",
        ),
        (
            "encode model photos -o t --device tpu9",
            "--device must be a device such as 'cpu' or 'cuda', got 'tpu9'.",
        ),
        ("encode model photos -o t --device meta", "--device must be one of this machine ('cpu'"),
        (
            "encode model photos -o t --config taken",
            "--config must be given with a --format of another library, got taken.",
        ),
        (
            "encode model/config.json photos -o t",
            "model must be a folder, a hub id, or the file model.safetensors",
        ),
        ("encode two photos -o t", "model must be one for images of 1 or 3 channels, as files have them, got 2."),
        ("encode model photos -o t --revision v1", "revision must be None for a local folder, got 'v1'."),
        (
            "encode x photos -o t --format te_vqgan",
            "--config must be given for te_vqgan: model.params of its YAML file",
        ),
        ("encode model photos -o t --tile-size 6", "tile_size must be a multiple of the divisor 4, got 6."),
        ("decode model nowhere -o out", "tokens must be a file that te-quant encode wrote, got none at nowhere."),
        (
            "decode model text.png -o out",
            "text.png must be a safetensors file that te-quant encode wrote, got a damaged file or one of another",
        ),
        ("decode model other.safetensors -o out", "wrote, got a safetensors file of another kind."),
        (
            "decode model newer.safetensors -o out",
            "newer.safetensors metadata format must be 1 or 2, got 3; update te_quant, or encode the",
        ),
        (
            "decode model evil.safetensors -o out",
            "evil.safetensors image names must be paths inside one folder, got '../x'.",
        ),
        ("measure model photos", "images must be of one size, got 10x15 (a.png) and 16x16 (c.png); pass --size"),
        (
            "measure model photos/a.png --plot report.txt",
            "--plot must be a file that ends in one of .pdf, .png, .svg",
        ),
        (
            "measure model photos/c.png --window 40",
            "--window must be given with --protocol crop or canvas, got --window 40 under circular.",
        ),
        (
            "measure model photos/c.png --window 40 --protocol canvas",
            "images sides must be half of --window 40 under canvas, got 16x16; pass --size 20 to resize and cut",
        ),
        (
            "measure model photos/c.png --protocol canvas --size 12",
            "images sides must be multiples of 8, got 12x12; pass --size 8 to resize and cut them.",
        ),
        (
            "measure model photos/c.png --window 40 --protocol crop",
            "--window must be at most 8 in images of 16x16, got 40; pass --window 8, or larger images.",
        ),
        (
            "measure model photos/c.png --window 12 --protocol crop --size 19",
            "--window must be at most 11 in images of 19x19, got 12; pass --window 8, or larger images.",
        ),
        (
            "measure model photos/c.png --window 4 --protocol crop --size 12",
            "images sides must be at least 16 under crop, got 12x12; pass larger images.",
        ),
        (
            "measure model photos/c.png --window 4 --protocol crop",
            "--window must be at least 8, two tokens, got 4; pass --window 8.",
        ),
        (
            "measure model photos/c.png --window 10 --protocol crop --size 20",
            "--window must be a multiple of 4, got 10; pass --window 8.",
        ),
        (
            "measure model photos/c.png --protocol crop",
            "images sides must be larger than 19 pixels under 'crop', for a window of two tokens that moves by a",
        ),
        *(
            (
                f"{command} model photos/a.png",
                f"images sides must be multiples of 4{more}, got 10x15; pass --size {size} to resize",
            )
            for command, more, size in (("audit", ", at least 16", 16), ("measure", "", 8), ("stability", "", 8))
        ),
        *(
            (
                f"{command} model photos/c.png --plot taken.png",
                "--plot must be a new file, got taken.png, which exists; pass --overwrite to replace it.",
            )
            for command in ("audit", "measure", "stability")
        ),
        (
            "measure model photos/c.png --table text.png",
            "text.png must be a file with a table that begins with '| tok",
        ),
        (
            "measure model photos/c.png --table half.png",
            "half.png must be a text in UTF-8, got another file ('utf-8' codec can't decode byte 0x89",
        ),
        ("stability residual photos/c.png", "model must be one with one index per token, got 2 indices."),
        (
            "measure mine.py photos --format python",
            "model must be 'file.py:function' or 'module:function', got 'mine.py'.",
        ),
        (
            "measure mine.py:no photos --format python",
            "model must be 'mine.py:function' with a function of mine.py, got",
        ),
        (
            "measure mine.py:nothing photos --format python",
            "must return a te_quant.adapters.Tokenizer, got NoneType.",
        ),
        ("measure no.py:load photos --format python", "model must name a Python file that exists, got no.py."),
        ("measure no_such:load photos --format python", "No module named 'no_such'"),
        (
            "measure model photos --format cosmos --stride 8",
            "model must be a folder with encoder.jit and decoder.jit, got no",
        ),
        (
            "measure bad.ckpt photos --format taming",
            "bad.ckpt must be a file of tensors that torch.save wrote, got a damaged file or one of another kind",
        ),
        (
            "measure broken.py:load photos --format python",
            "broken.py:load must be valid Python, got invalid syntax (broken.py, line 2).",
        ),
        (
            "measure lacking.py:load photos --format python",
            "No module named 'no_such_package'",
        ),
        (
            "measure ..mine:load photos --format python",
            "model must be 'file.py:function' or 'module:function', got",
        ),
        ("convert model -o out --to diffusers", "encoder_padding must be 'zeros' for diffusers, got 'circular'."),
        (
            "convert model -o model",
            "output must be a new file, got model/config.json, which exists; pass --overwrite",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Run, model: VQAutoencoder, tmp_path: Path, arguments: str, told: str
) -> None:
    """On standard error, with status 2 and without a traceback; nothing is written."""
    picture(tmp_path / "other" / "a.png", 4, 4)
    (tmp_path / "empty").mkdir()
    for name in ("gpt", "model"):
        (tmp_path / "above" / name).mkdir(parents=True)
        (tmp_path / "above" / name / "config.json").touch()
    (tmp_path / "photos.png").mkdir()
    for name in ("taken", "taken.png"):
        (tmp_path / name).write_text("x")
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "photos" / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "mine.py").write_text(PYTHON)
    (tmp_path / "broken.py").write_text("import torch\ndef load(:\n")
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    (tmp_path / "bad.ckpt").write_bytes(b"hello")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    about = {"format": 1, "model": "m", "identity": "i", "num_codes": 2, "stride": 1, "images": {"../x": [1, 1]}}
    evil = {"tokens/../x": torch.zeros(1, 1, dtype=torch.uint8)}
    save_file(evil, tmp_path / "evil.safetensors", metadata={"te_quant_tokens": json.dumps(about)})
    newer = {"te_quant_tokens": json.dumps({**about, "format": 3})}
    save_file(evil, tmp_path / "newer.safetensors", metadata=newer)
    if arguments.startswith("encode two"):
        make(image_channels=2).save_pretrained(tmp_path / "two")
    if arguments.startswith("stability residual"):
        levels = {"name": "ResidualVectorQuantizer", "num_codes": 16, "code_dim": 4, "num_quantizers": 2}
        make(quantizer=levels).save_pretrained(tmp_path / "residual")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*arguments.split())
    assert (status, out) == (2, "")
    assert told in err
    assert err.startswith(f"te-quant {arguments.split()[0]}: ")
    assert err.count("\n") == 1
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


WHOLE = {"format": 2, "model": "m", "identity": "i", "num_codes": 2, "stride": 4, "images": {"x": [4, 4]}}


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ("{", "must be JSON, got Expecting property name"),
        ("[]", "must be an object, got list."),
        (
            {**WHOLE, "format": None},
            "format must be 1 or 2, got None; update te_quant, or encode the pictures again.",
        ),
        *(
            ({**WHOLE, name: [3]}, f"{name!r} must be of type {kind}, got [3].")
            for name, kind in (("model", "str"), ("identity", "str"), ("num_codes", "int"), ("stride", "int"))
        ),
        ({name: WHOLE[name] for name in WHOLE if name != "images"}, "'images' must be of type dict, got None."),
        ({**WHOLE, "images": {"x": 4}}, "size of 'x' must be two positive integers, got 4."),
        ({**WHOLE, "images": {"x": [4]}}, "size of 'x' must be two positive integers, got [4]."),
        ({**WHOLE, "images": {"x": [4, 0]}}, "size of 'x' must be two positive integers, got [4, 0]."),
        ({**WHOLE, "images": {"y": [4, 4]}}, "must be complete, got no tokens of 'y'."),
    ],
)
def test_other_metadata_are_refused(
    run: Run, model: VQAutoencoder, tmp_path: Path, stored: str | dict[str, object], told: str
) -> None:
    """A sentence that names the file, before any model is loaded."""
    text = stored if isinstance(stored, str) else json.dumps(stored)
    tokens = {"tokens/x": torch.zeros(1, 1, dtype=torch.uint8)}
    save_file(tokens, tmp_path / "t.st", metadata={"te_quant_tokens": text})
    status, out, err = run("decode", "nowhere", "t.st", "-o", "out")
    assert (status, out) == (2, "")
    assert err.startswith("te-quant decode: t.st metadata ") or told.startswith("must be complete")
    assert told in err


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (torch.zeros(3, 2), "must be integers of shape (h, w) or (h, w, Q), got torch.float32 of shape (3, 2)."),
        (torch.zeros(6, dtype=torch.uint8), "(h, w) or (h, w, Q), got torch.uint8 of shape (6,)."),
        (
            torch.zeros(2, 2, dtype=torch.uint8),
            "must be a grid that covers 9x8 pixels at stride 4, got 2x2 tokens.",
        ),
        (torch.zeros(3, 1, 2, dtype=torch.uint8), "covers 9x8 pixels at stride 4, got 3x1 tokens."),
    ],
)
def test_tokens_that_are_no_grid_of_their_image_are_refused(
    run: Run, tmp_path: Path, tokens: Tensor, told: str
) -> None:
    """A smaller picture would be written without a word."""
    text = json.dumps({**WHOLE, "images": {"x": [9, 8]}})
    for stored, message in ((tokens, told), (torch.zeros(3, 2, dtype=torch.uint8), "nowhere")):
        save_file({"tokens/x": stored}, tmp_path / "t.st", metadata={"te_quant_tokens": text})
        status, out, err = run("decode", "nowhere", "t.st", "-o", "out")
        assert (status, out) == (2, "")
        assert message in err


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("len(3)", "TypeError: object of type 'int' has no len()"),
        ("int('x')", "ValueError: invalid literal for int()"),
        ("def load():\n    return len(3)", "TypeError: object of type 'int' has no len()"),
    ],
)
def test_an_error_of_ones_own_file_keeps_its_traceback(
    run: Run, model: VQAutoencoder, tmp_path: Path, source: str, told: str
) -> None:
    """It is a bug in that file, which a sentence does not find."""
    (tmp_path / "mine.py").write_text(f"{source}\n")
    with pytest.raises(
        RuntimeError, match=rf"mine\.py:load must run without an error, got {re.escape(told)}"
    ) as got:
        run("measure", "mine.py:load", "photos", "--format", "python")
    places = traceback.extract_tb(got.value.__cause__.__traceback__)  # type: ignore[union-attr]
    assert Path(places[-1].filename).name == "mine.py"


@pytest.mark.parametrize("stride", [4, 8])
def test_a_proposed_window_moves_by_a_token(run: Run, tmp_path: Path, stride: int) -> None:
    """In photographs of any side; the agreement of whole tokens, the first figure, is a number."""
    (tmp_path / "mine.py").write_text(PYTHON.replace("4", str(stride)))
    told = []
    for side in range(3 * stride, 6 * stride, stride // 4):
        picture(tmp_path / "x.png", side, side)
        arguments = ("measure", "mine.py:load", "x.png", "--format", "python", "--protocol", "crop", "--json")
        error = run(*arguments, "--window", 9 * stride)[2]
        proposed = re.search(r"pass --window (\d+)", error)
        told.append(proposed is None)
        if proposed is None:
            assert f"images sides must be at least {4 * stride} under crop, got {side}x{side}" in error
        else:
            status, out, _ = run(*arguments, "--window", proposed[1], "--sub-stride-shifts", 1)
            assert status == 0
            assert json.loads(out)["aligned"]["rate"] == 1
    assert told == [True] * 4 + [False] * 8


def test_the_place_of_an_error_is_shown_on_request(run: Run) -> None:
    """For reports of bugs."""
    with pytest.raises(FileNotFoundError, match="images must be files or folders that exist, got nothing"):
        run("audit", "nowhere", "nothing", "--traceback")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["measure", "m", "i", "--size", "0"], "argument --size: must be an integer of at least 1, got '0'."),
        (["measure", "m", "i", "--protocol", "roll"], "argument --protocol: invalid choice: 'roll'"),
        (["audit", "m", "i", "--format", "cosmos"], "argument --format: invalid choice: 'cosmos'"),
    ],
)
def test_arguments_that_do_not_parse_end_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """As every command does."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("package", ["PIL", "tqdm", "safetensors", "huggingface_hub", "matplotlib"])
def test_without_the_extra_it_says_how_to_install_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """Before anything else is done."""
    monkeypatch.setitem(sys.modules, package, None)
    told = f"te-quant audit: {package} must be installed to run te-quant audit: pip install 'te_quant[cli]'.\n"
    assert run("audit", "nowhere", "nothing") == (2, "", told)


def test_the_installed_command_is_this_function() -> None:
    """pyproject.toml names it, and the extra holds what the command needs."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '\n[project.scripts]\nte-quant = "te_quant.cli:main"\n' in text
    assert re.search(r"^cli = \[.*tqdm", text, re.MULTILINE)


@pytest.mark.slow
def test_the_module_runs_in_a_fresh_interpreter(model: VQAutoencoder, tmp_path: Path) -> None:
    """The status of ``python -m te_quant`` reaches the shell, and progress does not mix with JSON."""
    command = [sys.executable, "-W", "error", "-m", "te_quant"]
    encode = [*command, "encode", "model", "photos", "-o", "t.safetensors", "--json"]
    done = subprocess.run(encode, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["images"] == 3
