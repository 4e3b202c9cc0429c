"""Saving and loading: bit-identical, and refused where the files do not fit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from te_quant import (
    FSQ,
    GPT,
    GPTConfig,
    ProductQuantizer,
    Quantizer,
    ResidualVectorQuantizer,
    Segment,
    VectorQuantizer,
    _pretrained,
)
from te_quant.autoencoder import AutoencoderConfig, VQAutoencoder
from te_quant.quantizers import QUANTIZERS
from tests.unit.grid_oracles import fresh

SMALL = AutoencoderConfig(
    image_channels=1,
    base_channels=4,
    channel_multipliers=(1, 2),
    attention_levels=(1,),
    norm_groups=2,
    num_codes=8,
    code_dim=6,
    downsample="max_blur_pool",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    VQAutoencoder(SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_loaded_model_is_the_saved_one(tmp_path: Path, dtype: torch.dtype, update: str) -> None:
    """Same config, same outputs to the bit, same dtypes, in evaluation mode; after a training step too."""
    model = VQAutoencoder(AutoencoderConfig.from_dict({**SMALL.to_dict(), "codebook_update": update}))
    model(fresh(4, 1, 8, 8, dtype=torch.float32))
    model = model.to(dtype).eval()
    model.save_pretrained(tmp_path / "new" / "model")
    again = VQAutoencoder.from_pretrained(str(tmp_path / "new" / "model"))
    assert not again.training
    assert again.config == model.config
    images = fresh(2, 1, 8, 8, dtype=dtype)
    for got, expected in zip(again(images), model(images), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == trainable


@pytest.mark.parametrize("quantizer", ["VectorQuantizer", "ResidualVectorQuantizer"])
@pytest.mark.parametrize("updates", [("gradient", "ema"), ("ema", "gradient")])
def test_a_saved_model_continues_with_the_other_update(
    tmp_path: Path, updates: tuple[str, str], quantizer: str
) -> None:
    """The file decides what is loaded; a changed config takes its weights, and trains."""
    saved, other = updates
    described: dict[str, object] = {"name": quantizer, "codebook_update": saved}
    if quantizer == "ResidualVectorQuantizer":
        described |= {"num_codes": 8, "code_dim": 6, "num_quantizers": 2}
    config = replace(SMALL, codebook_update=saved, quantizer=described)
    model = VQAutoencoder(config)
    model(fresh(4, 1, 8, 8, dtype=torch.float32))
    model.eval().save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path)
    assert loaded.config == config
    assert loaded.config.codebook_update == saved
    config = loaded.config
    changed = None if config.quantizer is None else {**config.quantizer, "codebook_update": other}
    continued = VQAutoencoder(replace(config, codebook_update=other, quantizer=changed)).eval()
    drops = pytest.warns(UserWarning, match="dropped") if other == "gradient" else nullcontext()
    with drops:
        continued.load_state_dict(loaded.state_dict())
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    assert torch.equal(continued.encode_to_indices(images), loaded.encode_to_indices(images))
    before = [codebook.clone() for name, codebook in continued.state_dict().items() if "codebook" in name]
    optimizer = torch.optim.SGD(continued.parameters(), lr=1.0)
    continued.train()(images).loss.backward()
    optimizer.step()
    continued.eval()
    after = [codebook for name, codebook in continued.state_dict().items() if "codebook" in name]
    assert len(after) == (1 if changed is None else 2)
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_folder_holds_two_readable_files(folder: Path) -> None:
    """Nothing else, and the config says what it is."""
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    content = json.loads((folder / "config.json").read_text())
    assert content == {"class_name": "VQAutoencoder", "format_version": 1, "config": SMALL.to_dict()}


def test_loading_does_not_touch_the_random_state(folder: Path) -> None:
    """Weights that are overwritten at once need no draw from the caller's generator."""
    before = torch.get_rng_state()
    VQAutoencoder.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_model_does_not_follow_its_file(folder: Path) -> None:
    """Overwriting the file in place leaves a loaded model alone."""
    model = VQAutoencoder.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = folder / "model.safetensors"
    with path.open("rb+") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_interrupted_saving_keeps_the_old_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder loads as before, with nothing added."""
    import safetensors.torch

    before = (folder / "model.safetensors").read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(before[:100])
        raise KeyboardInterrupt("stopped")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        VQAutoencoder(SMALL).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    VQAutoencoder.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    """Either of the two."""
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"folder must hold config.json and model.safetensors.*{name}"):
        VQAutoencoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"_class_name": "VQModel"}', "names a VQModel of diffusers: load it with te_quant.interop.load_diff"),
        ('{"_class_name": "UNet2DModel"}', "model.safetensors."),
        ("[]", "model.safetensors."),
        ("no JSON", "model.safetensors."),
    ],
)
def test_folders_of_diffusers_name_their_loader(folder: Path, content: str, told: str) -> None:
    """Where a loader can read them; other folders are refused as before."""
    (folder / "config.json").write_text(content)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(told)) as got:
        VQAutoencoder.from_pretrained(folder)
    assert ("load_diff" in str(got.value)) == ("load_diff" in told)


@pytest.mark.parametrize("make", [str, Path])
def test_folder_that_is_not_there_is_no_hub_id(tmp_path: Path, make: type) -> None:
    """Absolute paths and Path objects never reach the network."""
    with pytest.raises(FileNotFoundError, match="source must be an existing folder or a hub id 'owner/name', got"):
        VQAutoencoder.from_pretrained(make(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_is_no_hub_id(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a folder looks like one; nothing is asked of the hub."""
    monkeypatch.chdir(folder.parent)
    got = rf"the file 'model/{name}'; pass its folder, 'model'\."
    with pytest.raises(ValueError, match=f"source must be a folder or a hub id 'owner/name', got {got}"):
        VQAutoencoder.from_pretrained(f"model/{name}")
    with pytest.raises(ValueError, match=r"source must be a folder or a hub id .*; pass its folder"):
        GPT.from_pretrained(folder / name)


NO_HUB_IDS = ["model", "./model", "a/b/c", "~/model", "owner/", "/name"]
# What the hub's own client refuses.
NO_HUB_IDS += ["runs/exp 1", "runs/exp-", "runs/a--b", "a..b/c", "runs/exp:1", "runs/a.git", "runs/" + "a" * 97]


@pytest.mark.parametrize("source", [*NO_HUB_IDS, Path("owner/name")])
def test_only_owner_and_name_make_a_hub_id(source: object) -> None:
    """Everything else is a folder that does not exist."""
    with pytest.raises(FileNotFoundError, match="source must be an existing folder or a hub id"):
        VQAutoencoder.from_pretrained(source)


@pytest.mark.parametrize("option", [{"revision": "main"}, {"cache_dir": "cache"}, {"token": True}])
def test_hub_options_are_refused_with_a_folder(folder: Path, option: dict) -> None:
    """They would have no effect."""
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be None for a local folder, got"):
        VQAutoencoder.from_pretrained(folder, **option)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(format_version=2), r"config\.json format_version must be 1, got 2"),
        (lambda c: c.update(class_name="GPT"), r"config\.json class_name must be 'VQAutoencoder', got 'GPT'"),
        (
            lambda c: c.pop("format_version"),
            r"config\.json must be an object of .*, got \['class_name', 'config'\]",
        ),
        (lambda c: c.update(config=[1]), r"config\.json config must be an object, got \[1\]"),
        (
            lambda c: c["config"].update(depth=1),
            r"config\.json must hold a valid config, got: config key .*'depth'",
        ),
        (lambda c: c["config"].update(code_dim=0), r"config\.json must hold a valid config, got: code_dim must"),
        (lambda c: c["config"].update(code_dim="6"), r"config\.json must hold a valid config, got: code_dim must"),
        (
            lambda c: c["config"].update(code_dim=5),
            r"model\.safetensors must be saved together with the config\.json beside it, got other options: "
            r"'code_dim'",
        ),
    ],
)
def test_config_that_does_not_fit_is_refused(folder: Path, change: Callable, match: str) -> None:
    """Version, class, keys, values, and agreement with the weights."""
    edit(folder, change)
    with pytest.raises(ValueError, match=match):
        VQAutoencoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{", r"config\.json must be JSON in UTF-8, got"),
        (b"\xff\xfe\xff", r"config\.json must be JSON in UTF-8, got"),
        (b"[1]", r"config\.json must be an object of .*, got list"),
    ],
)
def test_config_that_is_no_config_is_refused(folder: Path, text: bytes, match: str) -> None:
    """Whatever else may lie under that name."""
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=match):
        VQAutoencoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t.pop("quantizer.codebook"),
            r"must be complete \(\d+ tensors\), got none named 'quantizer\.codebook'",
        ),
        (lambda t: t.clear(), r"must be complete \(\d+ tensors\), got none named '.*', '.*', '.*' and \d+ more"),
        (lambda t: t.update(extra=torch.zeros(1)), r"must be of \d+ tensors, got unexpected 'extra'"),
        (
            lambda t: t.update({"quantizer.codebook": torch.zeros(8, 7)}),
            r"quantizer\.codebook must be of shape \(8, 6\), got shape \(8, 7\)",
        ),
        (
            lambda t: t.update({"quantizer.codebook": torch.zeros(8, 6, dtype=torch.int64)}),
            r"quantizer\.codebook must be of the kind of torch\.float32, got torch\.int64",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, change: Callable, match: str) -> None:
    """Missing, unexpected, of another shape or of another kind: by name."""
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=r"model\.safetensors.*" + match):
        VQAutoencoder.from_pretrained(folder)


def test_weights_of_another_config_are_refused(folder: Path) -> None:
    """Of two saves that were mixed, as by a writer stopped between its files, nothing loads."""
    edit(folder, lambda content: content["config"].update(encoder_padding="circular"))
    with pytest.raises(ValueError, match=r"model\.safetensors must be saved together with the config\.json"):
        VQAutoencoder.from_pretrained(folder)


def test_an_edited_config_names_both_values_and_the_cure(folder: Path) -> None:
    """What the message says loads the weights; the file is not the place to change an option."""
    edit(folder, lambda content: content["config"].update(dropout=0.5))
    match = (
        r"got other options: 'dropout' \(0\.0 when saved, 0\.5 now\); undo the edit of config.json, .* to change "
        r"an option of a loaded model, build another with dataclasses\.replace\(model\.config, dropout=\.\.\.\) "
        r"and call its "
    )
    with pytest.raises(ValueError, match=match):
        VQAutoencoder.from_pretrained(folder)
    edit(folder, lambda content: content["config"].update(dropout=0.0))
    model = VQAutoencoder.from_pretrained(folder)
    changed = VQAutoencoder(replace(model.config, dropout=0.5))
    changed.load_state_dict(model.state_dict())
    edit(
        folder,
        lambda content: content["config"].update(dict.fromkeys(["dropout", "decay", "norm_groups", "metric"], 1)),
    )
    with pytest.raises(ValueError, match=r"config\.json must hold a valid config"):
        VQAutoencoder.from_pretrained(folder)


def test_a_config_without_a_default_is_the_same(folder: Path) -> None:
    """A key that is missing has its default, and is no other option."""
    expected = VQAutoencoder.from_pretrained(folder)
    edit(folder, lambda content: [content["config"].pop(name) for name in ("dropout", "upsample")])
    assert VQAutoencoder.from_pretrained(folder).config == expected.config
    edit(folder, lambda content: content["config"].pop("downsample"))
    match = r"got other options: 'downsample' \('max_blur_pool' when saved, 'strided_conv' now\); undo"
    with pytest.raises(ValueError, match=match):
        VQAutoencoder.from_pretrained(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    """A pickle under the name of the weights is refused as a wrong format, without running it."""

    class Trap:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("the pickle was opened",))

    torch.save({"x": Trap()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors must be a safetensors file, got"):
        VQAutoencoder.from_pretrained(folder)


def test_hub_ids_are_those_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused by its client too. Dots, digits and underscores (the control) are not."""
    hub = pytest.importorskip("huggingface_hub")
    validate = pytest.importorskip("huggingface_hub.utils").validate_repo_id
    errors = pytest.importorskip("huggingface_hub.errors")
    for source in NO_HUB_IDS[6:]:
        with pytest.raises(errors.HFValidationError, match=r"Repo|repo_id"):
            validate(source)
    monkeypatch.setattr(hub, "hf_hub_download", lambda **options: str(folder / options["filename"]))
    for source in ("a/b", "CompVis/ldm-vq_f4.v1", "0x/9", "runs/model.ckpt", "_a/b_", "a/" + "b" * 96):
        validate(source)
        assert VQAutoencoder.from_pretrained(source).config == SMALL


def test_hub_id_downloads_both_files_with_its_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Revision and cache go to the hub's own client, once for each file."""
    import huggingface_hub

    calls = []

    def download(**options: object) -> str:
        calls.append(options)
        return str(folder / options["filename"])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = VQAutoencoder.from_pretrained("owner/name", revision="v1", cache_dir="cache")
    assert model.config == SMALL
    common = {
        "repo_id": "owner/name",
        "revision": "v1",
        "token": None,
        "cache_dir": "cache",
        "local_files_only": False,
    }
    assert calls == [{"filename": name, **common} for name in ("config.json", "model.safetensors")]


def test_existing_folder_wins_over_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative path of two parts is a folder if it exists."""
    (tmp_path / "owner").mkdir()
    folder.rename(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert VQAutoencoder.from_pretrained("owner/name").config == SMALL


def test_missing_hub_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub must be installed .*'owner/name'.* 'te_quant\[hub\]'"):
        VQAutoencoder.from_pretrained("owner/name")


def test_missing_safetensors_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For saving and for loading; nothing is written then."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ImportError, match=r"safetensors must be installed to save and load weights.*te_quant\[hub\]"
    ):
        VQAutoencoder.from_pretrained(folder)
    with pytest.raises(ImportError, match="safetensors must be installed"):
        VQAutoencoder(SMALL).save_pretrained(folder / "other")
    assert not (folder / "other").exists()


def test_format_version_is_written_and_read_by_the_same_constant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of a later format is refused by this version."""
    with monkeypatch.context() as later:
        later.setattr(_pretrained, "FORMAT_VERSION", 2)
        VQAutoencoder(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="format_version must be 1, got 2"):
        VQAutoencoder.from_pretrained(tmp_path)


def test_config_of_before_the_newer_options_still_loads(tmp_path: Path) -> None:
    """Saved without them, a model comes back with what it was: nearest, GroupNorm and SiLU."""
    model = VQAutoencoder(SMALL).eval()
    old = {name: v for name, v in SMALL.to_dict().items() if name not in ("upsample", "norm", "activation")}
    _pretrained.save(tmp_path / "old", "VQAutoencoder", old, model.state_dict())
    again = VQAutoencoder.from_pretrained(tmp_path / "old")
    assert (again.config.upsample, again.config.norm, again.config.activation) == ("nearest", "group", "silu")
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


def test_model_with_phases_is_saved_and_loaded(tmp_path: Path) -> None:
    """Polyphase sampling, per-pixel norms and polynomial activations included."""
    options = {"downsample": "polyphase", "upsample": "polyphase", "norm": "channel", "activation": "polynomial"}
    paddings = {"encoder_padding": "circular", "decoder_padding": "circular"}
    model = VQAutoencoder(AutoencoderConfig.from_dict({**SMALL.to_dict(), **options, **paddings})).eval()
    model.save_pretrained(tmp_path / "model")
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    for got, expected in zip(
        VQAutoencoder.from_pretrained(tmp_path / "model")(images), model(images), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_converts_to_a_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Parameters are converted; the device is that asked for."""
    model = VQAutoencoder.from_pretrained(folder, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(torch.zeros(1, 1, 8, 8, dtype=dtype)).reconstruction.dtype == dtype


def test_loading_refuses_a_dtype_that_is_not_floating(folder: Path) -> None:
    """By its name, before anything is read."""
    with pytest.raises(
        ValueError, match=r"dtype must be a floating-point torch\.dtype, or None, got torch\.int64"
    ):
        VQAutoencoder.from_pretrained(folder, dtype=torch.int64)


RESIDUAL = {"name": "ResidualVectorQuantizer", "num_codes": 8, "code_dim": 6, "num_quantizers": 2}
FORMER = {"codebook_update": "gradient", "commitment_weight": 0.25, "decay": 0.99}
PRESENT = {"codebook_update": "ema", "commitment_weight": 1.0, "decay": 0.9}


def learning(config: AutoencoderConfig) -> dict[str, Any]:
    """How the one residual quantizer that a config builds learns."""
    (found,) = (part for part in config.build_quantizer().modules() if isinstance(part, ResidualVectorQuantizer))
    return {name: found.options()[name] for name in FORMER}


def with_quantizer(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Descriptions by the place of the quantizer."""
    return {"alone": described, "inside": {"name": "ProductQuantizer", "quantizers": [described]}}


@pytest.mark.parametrize("own", [{}, {"codebook_update": "ema"}, {"decay": 0.5}], ids=["none", "ema", "decay"])
@pytest.mark.parametrize("place", ["alone", "inside"])
def test_files_that_name_no_changed_default_keep_the_former_ones(own: dict, place: str) -> None:
    """Files named only what was no default at their time; a config without a file (the control) is new."""
    described = with_quantizer({**RESIDUAL, **own})[place]
    # At the top a file shows what its quantizer has, so a product shows only the defaults.
    shown = {**FORMER, **own} if place == "alone" else {}
    stored = {**SMALL.to_dict(), **shown, "quantizer": described}
    config = AutoencoderConfig.from_dict(json.loads(json.dumps(stored)))
    assert learning(config) == {**FORMER, **own}
    assert learning(AutoencoderConfig(quantizer=described)) == {**PRESENT, **own}


@pytest.mark.parametrize("own", [{}, FORMER, {"decay": 0.5}], ids=["present", "former", "decay"])
@pytest.mark.parametrize("place", ["alone", "inside"])
def test_files_name_options_whose_default_has_changed(own: dict, place: str) -> None:
    """So each version reads the same quantizer."""
    config = AutoencoderConfig(quantizer=with_quantizer({**RESIDUAL, **own})[place])
    described = config.to_dict()["quantizer"]
    assert set(FORMER) <= set(described if place == "alone" else described["quantizers"][0])
    again = AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert learning(again) == learning(config) == {**PRESENT, **own}


@pytest.mark.parametrize("given", [{}, {"codebook_update": "ema"}, {"commitment_weight": 1.0, "decay": 0.9}])
def test_fields_at_their_defaults_describe_what_is_built(given: dict) -> None:
    """They cannot be told from fields that were left out, so a residual quantizer has the same defaults."""
    config = AutoencoderConfig(quantizer=RESIDUAL, **given)
    assert learning(config) == PRESENT
    assert {name: getattr(config, name) for name in PRESENT} == PRESENT


def test_fields_beyond_their_defaults_must_be_what_is_built() -> None:
    """Negative control: the described quantizer has another update than the field says."""
    message = r"config\.codebook_update must be its default 'ema', or what config\.quantizer has \('ema', "
    with pytest.raises(ValueError, match=message + r"ResidualVectorQuantizer\), got 'gradient'\."):
        AutoencoderConfig(quantizer=RESIDUAL, codebook_update="gradient")


@pytest.mark.parametrize("place", ["alone", "inside"])
def test_files_with_former_defaults_take_an_instance_that_has_them(tmp_path: Path, place: str) -> None:
    """The same model as without the instance; one with the present defaults (the control) is another quantizer."""
    former = AutoencoderConfig(quantizer=with_quantizer({**RESIDUAL, **FORMER})[place]).build_quantizer()
    model = VQAutoencoder(replace(SMALL, quantizer=with_quantizer({**RESIDUAL, **FORMER})[place]))
    stored = {**model.config.to_dict(), "quantizer": with_quantizer(RESIDUAL)[place]}
    _pretrained.save(tmp_path, "VQAutoencoder", stored, model.state_dict())
    again = VQAutoencoder.from_pretrained(tmp_path, quantizer=former)
    assert again.config == VQAutoencoder.from_pretrained(tmp_path).config == model.config
    present = AutoencoderConfig(quantizer=with_quantizer(RESIDUAL)[place]).build_quantizer()
    with pytest.raises(ValueError, match="quantizer must be the one that the file describes"):
        VQAutoencoder.from_pretrained(tmp_path, quantizer=present)


def with_changed(change: str) -> VQAutoencoder:
    """A trained model whose quantizer is no longer what its config built."""
    residual = {"name": "ResidualVectorQuantizer", "num_quantizers": 2}
    model = VQAutoencoder(replace(SMALL, quantizer=residual) if change == "levels" else SMALL)
    if change == "metric":
        model.quantizer = VectorQuantizer(32, 6, metric="cosine")
    elif change == "class":
        model.quantizer = ProductQuantizer([FSQ((3, 3, 3)), VectorQuantizer(4, 3, metric="cosine")])
    elif change == "schedules":
        model.quantizer.decay, model.quantizer.orthogonal_reg, model.quantizer.temperature = 0.99, 10.0, 0.5
    else:
        model.quantizer.decay = 0.99
        # No latents are kept in what is built without revival.
        model.quantizer.revival_threshold = 0.0
    model(fresh(4, 1, 8, 8, dtype=torch.float32))
    return model.eval()


@pytest.mark.parametrize("change", ["metric", "class", "schedules", "levels", "revival"])
def test_files_describe_the_quantizer_as_it_is(tmp_path: Path, change: str) -> None:
    """Not as it was built: another one, and options that a schedule has assigned, come back."""
    model = with_changed(change)
    model.save_pretrained(tmp_path)
    again = VQAutoencoder.from_pretrained(tmp_path)
    assert repr(again.quantizer) == repr(model.quantizer)
    assert again.quantizer.options().keys() == model.quantizer.options().keys()
    images = fresh(2, 1, 8, 8, dtype=torch.float32)
    for got, expected in zip(again(images), model(images), strict=True):
        assert torch.equal(got, expected)
    again.save_pretrained(tmp_path / "twice")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_options_that_an_unchanged_model_was_given_are_written_as_given(tmp_path: Path) -> None:
    """Negative control: a number that equals the quantizer's is left in its form."""
    model = VQAutoencoder(replace(SMALL, commitment_weight=2))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (stored, type(stored["commitment_weight"])) == (model.config.to_dict(), int)


def test_model_cards_describe_the_quantizer_as_it_is() -> None:
    """As the files next to them do."""
    assert "`ProductQuantizer`" in with_changed("class").model_card("me/digits")
    assert "`VectorQuantizer`" in VQAutoencoder(SMALL).model_card("me/digits")


@pytest.mark.parametrize(
    ("quantizer", "match"),
    [
        (FSQ((3, 3)), r"quantizer\.code_dim must be 6 as the config's, got 2"),
        (FSQ((3,) * 6, channel_dim=-1), r"quantizer\.channel_dim must be 1, as latents are .*, got -1"),
    ],
)
def test_a_quantizer_that_does_not_fit_the_networks_is_not_saved(
    tmp_path: Path, quantizer: FSQ, match: str
) -> None:
    """No file could say how to build that model, and none is written."""
    model = VQAutoencoder(SMALL)
    model.quantizer = quantizer
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def compiled(part: torch.nn.Module) -> Any:
    return torch.compile(part, backend="eager")


@pytest.mark.parametrize("part", ["encoder", "quantizer", "decoder.levels.0", "decoder.conv_out"])
def test_files_of_models_with_compiled_parts_are_those_without(tmp_path: Path, part: str) -> None:
    """A compiled module is a wrapper, whose name would stand in front of those of its tensors."""
    model = VQAutoencoder(SMALL)
    model.quantizer.revival_threshold = 0.0
    model.save_pretrained(tmp_path / "plain")
    owner, _, name = part.rpartition(".")
    setattr(model.get_submodule(owner), name, compiled(model.get_submodule(part)))
    assert any("_orig_mod" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "compiled")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_files_of_gpts_with_compiled_blocks_are_those_without(tmp_path: Path) -> None:
    """As those of autoencoders."""
    gpt = GPT(GPTConfig((Segment("image", 7, (2, 2), "learned"),), 16, 1, 2))
    gpt.save_pretrained(tmp_path / "plain")
    gpt.blocks[0] = compiled(gpt.blocks[0])
    gpt.save_pretrained(tmp_path / "compiled")
    file = "model.safetensors"
    assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_models_that_no_config_describes_are_not_saved(tmp_path: Path) -> None:
    """Their files could not be loaded: wrappers and parametrizations give tensors other names."""
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    model = VQAutoencoder(SMALL)
    weight_norm(model.decoder.conv_in)
    gpt = GPT(GPTConfig((Segment("image", 7, (2, 2), "learned"),), 16, 1, 2))
    weight_norm(gpt.blocks[0].up)
    for one, name in ((model, r"decoder\.conv_in\.weight"), (gpt, r"blocks\.0\.up\.weight")):
        expected = f"model must be made of the layers that its config describes, got no '{name}'; remove"
        with pytest.raises(ValueError, match=expected):
            one.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_tied_weights_are_refused_by_name(tmp_path: Path) -> None:
    """Each would come back on its own; weights that are equal (the control) are saved."""
    model = VQAutoencoder(SMALL)
    first, second = model.decoder.levels[0].block0, model.decoder.levels[0].block1
    second.conv2.weight = first.conv2.weight
    match = (
        r"weights must be in separate memory, got 'decoder\.levels\.0\.block0\.conv2\.weight' and "
        r"'decoder\.levels\.0\.block1\.conv2\.weight' in the same place; clone one of them\."
    )
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    second.conv2.weight = torch.nn.Parameter(first.conv2.weight.detach().clone())
    model.save_pretrained(tmp_path / "model")


def with_layer(path: str, layer: torch.nn.Module) -> VQAutoencoder:
    model = VQAutoencoder(replace(SMALL, encoder_padding="circular"))
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, layer)
    return model


OTHER_LAYERS = {
    "padding": (
        "encoder.conv_in",
        torch.nn.Conv2d(1, 4, 3, padding=1),
        r"Conv2d\(1, 4, .*\) in place of PaddedConv2d\(1, 4, .*circular\) at 'encoder\.conv_in'; build",
    ),
    "groups": (
        "decoder.norm_out",
        torch.nn.GroupNorm(4, 4, eps=1e-6),
        r"GroupNorm\(4, 4, .*\) in place of GroupNorm\(2, 4, .*\) at 'decoder\.norm_out'",
    ),
    "kernel": ("decoder.conv_out", torch.nn.Conv2d(4, 1, 5, padding=2), r"Conv2d\(4, .* at 'decoder\.conv_out'"),
    "bias": (
        "encoder.to_latents",
        torch.nn.Conv2d(8, 6, 1, bias=False),
        r"no 'encoder\.to_latents\.bias'; remove parametrizations",
    ),
    "activation": (
        "decoder.activation",
        torch.nn.ReLU(),
        r"ReLU\(\) in place of SiLU\(\) at 'decoder\.activation'",
    ),
    "dropout": (
        "encoder.levels.1.block0.dropout",
        torch.nn.Dropout(0.5),
        r"Dropout\(p=0\.5.* at 'encoder\.levels\.1\.block0\.dropout'",
    ),
    "extra": (
        "extra",
        torch.nn.Linear(2, 2),
        r"'extra\.weight', 'extra\.bias' too; remove what was added, or save",
    ),
    "inserted": (
        "decoder.middle.noise",
        torch.nn.Dropout(0.1),
        r"layers \['block0', .*'noise'\] in place of .*'decoder\.middle'",
    ),
    "level": (
        "quantizer",
        ResidualVectorQuantizer(8, 6, 2),
        r"VectorQuantizer\(.*cosine.*\) in place of VectorQuantizer\(.*\) at 'quantizer\.stages\.1'",
    ),
}


@pytest.mark.parametrize("change", OTHER_LAYERS)
def test_models_with_other_layers_are_not_saved(folder: Path, change: str) -> None:
    """Their files would load as another model, or not at all; the good files that are there stay."""
    path, layer, got = OTHER_LAYERS[change]
    model = with_layer(path, layer)
    if change == "level":
        model.quantizer.stages[1] = VectorQuantizer(8, 6, metric="cosine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=rf"model must be made of the layers that its config describes, got {got}"
    ):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ["heads", "pad", "dropout"])
def test_gpts_with_other_layers_are_not_saved(tmp_path: Path, change: str) -> None:
    """Blocks of the same shapes compute something else with other heads."""
    config = GPTConfig((Segment("image", 7, (2, 2), "learned", pad_token=0),), 16, 1, 2)
    gpt = GPT(config)
    if change == "heads":
        gpt.blocks[0] = GPT(replace(config, num_heads=4)).blocks[0]
    elif change == "pad":
        gpt.ends[0] = GPT(replace(config, segments=(replace(config.segments[0], pad_token=1),))).ends[0]
    else:
        gpt.blocks[0].dropout = 0.5
    got = r"got (Block|SegmentEnds)\(.* at '(blocks|ends)\.0'"
    with pytest.raises(ValueError, match=rf"model must be made of the layers that its config describes, {got}"):
        gpt.save_pretrained(tmp_path / "gpt")
    assert not (tmp_path / "gpt").exists()


class Signs(Quantizer):
    """A quantizer of someone else, whose options a file holds in another form."""

    def __init__(self, code_dim: int, *, scales: tuple[float, ...] = (1.0,)) -> None:
        super().__init__(2**code_dim, code_dim)
        self.scales = scales
        self.scale = torch.nn.Parameter(torch.ones(()))


class Grown(VQAutoencoder):
    """A model with one more layer, which its constructor builds."""

    def __init__(self, config: AutoencoderConfig, *, quantizer: Quantizer | None = None) -> None:
        super().__init__(config, quantizer=quantizer)
        self.head = torch.nn.Linear(2, 2)


USED = ["half", "hooks", "frozen", "checkpointing", "wrapped", "compiled", "registered", "instance", "derived"]


@pytest.mark.parametrize("use", USED)
def test_models_in_use_are_saved(tmp_path: Path, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what changes no layer, and what is described in another form."""
    quantizer = Signs(6, scales=(1.0, 2.0)) if use in ("registered", "instance") else None
    kind = Grown if use == "derived" else VQAutoencoder
    model = kind(replace(SMALL, num_codes=64) if quantizer else SMALL, quantizer=quantizer)
    if use == "half":
        model.bfloat16()
    elif use == "hooks":
        model.encoder.conv_in.register_forward_hook(lambda *_: None)
        model.decoder.forward = model.decoder.forward  # as accelerate does
    elif use == "frozen":
        model.quantizer.freeze()
        model.encoder.requires_grad_(False).eval()
    elif use == "checkpointing":
        model.gradient_checkpointing = True
    elif use == "wrapped":
        model.decoder.middle = checkpoint_wrapper(compiled(model.decoder.middle))
    elif use == "compiled":
        model.encoder = compiled(checkpoint_wrapper(model.encoder))
        model.compile(backend="eager")
    elif use == "registered":
        monkeypatch.setitem(QUANTIZERS, "Signs", Signs)
    model.save_pretrained(tmp_path)
    given = {"quantizer": Signs(6, scales=(1.0, 2.0))} if use == "instance" else {}
    again = kind.from_pretrained(tmp_path, **given)
    expected = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


class Collects(Signs):
    """Signs whose options nothing can read."""

    def __init__(self, code_dim: int, **options: Any) -> None:
        super().__init__(code_dim, **options)


class Forgets(Signs):
    """Signs that do not keep an option."""

    def __init__(self, code_dim: int, *, mood: str = "good") -> None:
        super().__init__(code_dim)


UNREADABLE = [
    (
        Collects,
        r"Collects must name every option in its constructor, got \*\*options: 'Any'; what is in it cannot be",
    ),
    (
        Forgets,
        r"Forgets must keep every option as an attribute of the same name, got none named 'mood'; set self\.mood",
    ),
]


@pytest.mark.parametrize(("kind", "told"), UNREADABLE)
def test_options_that_cannot_be_read_name_the_rule(tmp_path: Path, kind: Callable, told: str) -> None:
    """Where the model is built, where it is saved, and where only the quantizer is asked."""
    with pytest.raises(TypeError, match=rf"^quantizer must say how it was built: {told}"):
        VQAutoencoder(replace(SMALL, num_codes=64), quantizer=kind(6))
    model = VQAutoencoder(SMALL)
    model.quantizer = kind(6)
    with pytest.raises(TypeError, match=rf"^quantizer must say how it was built: {told}"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(AttributeError, match=f"^{told}"):
        kind(6).options()


@pytest.mark.parametrize(
    ("target", "got"),
    [
        ("", r"the path of a folder, got ''; pass '\.' for"),
        ("file", "the path of a folder, .*'file'"),
        ("file/in", "the path of a folder, .*'file'"),
    ],
)
def test_only_folders_are_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, got: str
) -> None:
    """Neither the current folder by chance, nor a file; the current one by its name (the control) is fine."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    gpt = GPT(GPTConfig((Segment("image", 7, (2, 2), "learned"),), 16, 1, 2))
    for model in (VQAutoencoder(SMALL), gpt):
        with pytest.raises(ValueError, match=f"folder must be {got}"):
            model.save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    gpt.save_pretrained(".")
    assert Path("config.json").is_file()


def test_models_without_values_are_not_saved(tmp_path: Path) -> None:
    """Those of the meta device, where the cure makes values."""
    with torch.device("meta"):
        models = VQAutoencoder(SMALL), GPT(GPTConfig((Segment("image", 7, (2, 2), "learned"),), 16, 1, 2))
    for model in models:
        match = r"model must be on a device with memory, got '.*' and \d+ more on the meta device; load its"
        with pytest.raises(ValueError, match=match):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
    models[1].to_empty(device="cpu").reset_parameters()
    models[1].save_pretrained(tmp_path / "model")
