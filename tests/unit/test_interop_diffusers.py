"""``VQModel`` of the installed diffusers, read and written: tokens are equal, images up to rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from te_quant import FSQ, AutoencoderConfig, VectorQuantizer, VQAutoencoder
from te_quant.interop import load_diffusers, save_diffusers

safetensors = pytest.importorskip("safetensors.torch")

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIGS: dict[str, dict[str, Any]] = {
    # The defaults of VQModel, narrower: one level, attention only in the middle.
    "defaults": {"block_out_channels": (8,), "norm_num_groups": 4},
    "widths without a common factor of two": {"block_out_channels": (12, 20), "norm_num_groups": 4},
    "attention at the last level": {"attention": (False, True)},
    "attention at the first level only": {"attention": (True, False), "mid_block_add_attention": False},
    "no attention": {"attention": (False, False), "mid_block_add_attention": False},
    "codes smaller than the channels around them": {"latent_channels": 6, "vq_embed_dim": 3},
    "two blocks, three levels": {"block_out_channels": (8, 8, 16), "layers_per_block": 2, "norm_num_groups": 8},
    "grey images": {"in_channels": 1, "out_channels": 1},
}


def options(*, attention: tuple[bool, ...] | None = None, **changes: Any) -> dict[str, Any]:
    """What VQModel is given."""
    given = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_vq_embeddings": 24, **changes}
    attends = attention or (False,) * len(given["block_out_channels"])
    down = tuple(f"{'Attn' * each}DownEncoderBlock2D" for each in attends)
    up = tuple(f"{'Attn' * each}UpDecoderBlock2D" for each in reversed(attends))
    return {"down_block_types": down, "up_block_types": up, **given}


def original(changes: dict[str, Any]) -> Any:
    """A VQModel of random weights whose codes lie near its latents, so that many are used."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.VQModel(**options(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 10)
        rows = model.encode(images_for(model)).latents.movedim(1, -1).flatten(0, -2)
        codebook = model.quantize.embedding.weight
        codebook.copy_(
            rows[torch.randperm(len(rows))[: len(codebook)]] + rows.std() / 10 * torch.randn_like(codebook)
        )
    return model


def images_for(model: Any) -> Tensor:
    return torch.rand(2, model.config.in_channels, 16, 16) * 2 - 1


def tokens_of(model: Any, images: Tensor) -> Tensor:
    latents = model.encode(images).latents
    indices: Tensor = model.quantize(latents)[2][2].view(len(images), *latents.shape[2:])
    return indices


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What diffusers writes, of a model of this library, which needs no diffusers."""
    save_diffusers(VQAutoencoder(expressible()), tmp_path / "vqvae")
    return tmp_path / "vqvae"


def expressible(**changes: Any) -> AutoencoderConfig:
    zeros = {"encoder_padding": "zeros", "decoder_padding": "zeros"}
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_codes": 24, "code_dim": 3}
    return AutoencoderConfig(**{**zeros, **sizes, **changes})


# Importing diffusers takes longer than all of these.
@pytest.mark.slow
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_models_of_diffusers_agree_and_go_back(changes: dict[str, Any], tmp_path: Path) -> None:
    """Latents, tokens, images and the loss; written again, every tensor and every option is as it was."""
    theirs = original(changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_diffusers(tmp_path / "theirs")
    images = images_for(theirs)
    tokens = tokens_of(theirs, images)
    assert len(tokens.unique()) > 5
    assert torch.equal(ours.encode_to_indices(images), tokens)
    torch.testing.assert_close(ours.encode(images), theirs.encode(images).latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(images).reconstruction, theirs(images).sample, rtol=0, atol=1e-4)
    save_diffusers(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    state, expected = again.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    kept = {name: getattr(theirs.config, name) for name in options(**changes)}
    assert {name: _tuple(getattr(again.config, name)) for name in kept} == {n: _tuple(v) for n, v in kept.items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


@pytest.mark.slow
def test_training_goes_on_with_the_loss_of_diffusers(tmp_path: Path) -> None:
    """β is on its codebook term; the value and both gradients are the same."""
    theirs = original({})
    theirs.save_pretrained(tmp_path)
    ours = load_diffusers(tmp_path).train()
    latents = torch.randn(2, 3, 4, 4)
    gradients = []
    for quantizer, codebook in (
        (ours.quantizer, ours.quantizer.codebook),
        (theirs.quantize, theirs.quantize.embedding.weight),
    ):
        leaf = latents.clone().requires_grad_()
        output = quantizer(leaf)
        loss = output.loss if quantizer is ours.quantizer else output[1]
        gradients.append((loss, *torch.autograd.grad(loss, (leaf, codebook))))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_permuted_name_is_noticed(tmp_path: Path) -> None:
    """Negative control: keys for queries, and other tokens or images come out."""
    theirs = original({})
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / WEIGHTS)
    one, other = (f"decoder.mid_block.attentions.0.to_{part}.weight" for part in "qv")
    tensors[one], tensors[other] = tensors[other], tensors[one]
    safetensors.save_file(tensors, tmp_path / WEIGHTS)
    images = images_for(theirs)
    with torch.no_grad():
        difference = load_diffusers(tmp_path)(images).reconstruction - theirs(images).sample
    assert difference.abs().max() > 1e-3


def test_models_of_this_library_go_there_and_come_back(tmp_path: Path) -> None:
    """Bit for bit, with statistics of a new quantizer; a moving-average codebook first takes what is pending."""
    model = VQAutoencoder(expressible(norm_groups=4, z_channels=5, middle_attention=False))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    model(images)
    assert model.quantizer.pending_counts.any()
    save_diffusers(model, tmp_path / "new" / "vqvae")
    again = load_diffusers(tmp_path / "new" / "vqvae")
    expected = model.eval()(images)
    output = again(images)
    assert torch.equal(output.indices, expected.indices)
    assert torch.equal(output.reconstruction, expected.reconstruction)
    assert again.config.codebook_update == "gradient"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"downsample": "max_pool"}, "downsample must be 'strided_conv' for diffusers, got 'max_pool'"),
        ({"upsample": "blur"}, "upsample must be 'nearest' for diffusers, got 'blur'"),
        ({"encoder_padding": "replicate"}, "encoder_padding must be 'zeros' for diffusers, got 'replicate'"),
        ({"decoder_padding": "circular"}, "decoder_padding must be 'zeros' for diffusers, got 'circular'"),
        ({"norm": "channel"}, "norm must be 'group' for diffusers, got 'channel'"),
        ({"channel_multipliers": (2, 2)}, "base_channels must be 16 for diffusers, got 8"),
        ({"decoder_widths": (8, 8)}, r"decoder_widths must be \(8, 16\) for diffusers, got \(8, 8\)"),
        ({"metric": "cosine"}, "metric must be 'l2' for diffusers, got 'cosine'"),
        (
            {"quantizer": {"name": "FSQ", "levels": [3, 3, 3]}, "num_codes": 256, "code_dim": 256},
            "quantizer must be a VectorQuantizer for diffusers, got FSQ",
        ),
    ],
)
def test_models_that_diffusers_cannot_express_are_refused(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    """By the name of the option, and nothing is written."""
    with torch.device("meta"):
        model = VQAutoencoder(expressible(**changes))
    with pytest.raises(ValueError, match=match):
        save_diffusers(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_other_modules_are_not_written(tmp_path: Path) -> None:
    """Nor a quantizer of another class that is no VectorQuantizer."""
    with pytest.raises(TypeError, match="model must be a VQAutoencoder, got FSQ"):
        save_diffusers(FSQ(levels=[3, 3]), tmp_path)

    class Own(VectorQuantizer):
        pass

    model = VQAutoencoder(expressible(), quantizer=Own(24, 3))
    with pytest.raises(ValueError, match="quantizer must be a VectorQuantizer for diffusers, got Own"):
        save_diffusers(model, tmp_path)


def test_the_quantizer_is_written_as_it_is(tmp_path: Path) -> None:
    """One that replaced that of the config, and names of compiled parts are those of the parts."""
    model = VQAutoencoder(expressible()).eval()
    model.quantizer = VectorQuantizer(9, 3)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = model.encode_to_indices(images)
    for part in ("encoder", "quantizer"):
        setattr(model, part, torch.compile(getattr(model, part), backend="eager"))
    save_diffusers(model, tmp_path)
    again = load_diffusers(tmp_path)
    assert again.quantizer.num_codes == 9
    assert torch.equal(again.encode_to_indices(images), tokens)


def test_models_with_other_layers_are_not_written(tmp_path: Path) -> None:
    """Their config would describe another model."""
    model = VQAutoencoder(expressible())
    conv = model.encoder.conv_in
    model.encoder.conv_in = torch.nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, padding=1, padding_mode="circular"
    )
    got = r"Conv2d\(.*circular.*\) in place of PaddedConv2d\(.*\) at 'encoder\.conv_in'"
    with pytest.raises(ValueError, match=f"model must be made of the layers that its config describes, got {got}"):
        save_diffusers(model, tmp_path / "vqvae")
    assert not (tmp_path / "vqvae").exists()


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"norm_type": "spatial"},
            r"config norm_type must be 'group', got 'spatial'; MoVQ \(spatial norm\) is not",
        ),
        ({"act_fn": "relu"}, "config act_fn must be 'silu' or 'swish', got 'relu'"),
        ({"out_channels": 4}, "config out_channels must be 3, got 4"),
        ({"_class_name": "AutoencoderKL"}, "config _class_name must be 'VQModel', got 'AutoencoderKL'"),
        ({"use_quant_conv": True}, "config key must be one of in_channels, .*, got 'use_quant_conv'"),
        (
            {"down_block_types": ["DownBlock2D"] * 2},
            r"config down_block_types entry must be one of DownEncoderBlock2D, .*, got 'DownBlock2D'",
        ),
        (
            {"up_block_types": ["UpDecoderBlock2D"]},
            r"config up_block_types must be 2 blocks, one per width, got \['UpDecoderBlock2D'\]",
        ),
        (
            {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
            r"config up_block_types must be with attention on the levels \(1,\) of the encoder, got \['UpDec",
        ),
        ({"layers_per_block": 2}, r"none named 'encoder\.down_blocks\.0\.resnets\.1\.norm1\.weight'"),
        (
            {"mid_block_add_attention": False},
            r"unexpected 'decoder\.mid_block\.attentions\.0\.group_norm",
        ),
        (
            {"vq_embed_dim": 4},
            r"quant_conv\.weight must be floating point of shape \(4, 3, 1, 1\), got torch.float32",
        ),
        ({"norm_num_groups": 3}, r"norm_groups must be a divisor of widths=\(8, 16\), got 3"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], match: str, folder: Path) -> None:
    """By the name of the option, or of a tensor where the weights are others."""
    edit(folder, **changes)
    with pytest.raises(ValueError, match=match):
        load_diffusers(folder)


def test_folders_of_this_library_name_their_loader(tmp_path: Path) -> None:
    """Its only file of weights is found, and its config has other keys."""
    VQAutoencoder(expressible()).save_pretrained(tmp_path)
    match = "config must be the options of a VQModel of diffusers, got those of a model of te_quant; use VQAutoenc"
    with pytest.raises(ValueError, match=match):
        load_diffusers(tmp_path)


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = dict(safetensors.load_file(folder / WEIGHTS))
    change(tensors)
    safetensors.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda tensors: tensors.pop("decoder.mid_block.attentions.0.to_k.bias"),
            r"source must be complete \(\d+ tensors\), got none named 'decoder\.mid_block\.attentions\.0\.to_k",
        ),
        (
            lambda tensors: tensors.update({"encoder.extra": torch.zeros(1)}),
            r"source must be of \d+ tensors, got unexpected 'encoder\.extra'",
        ),
        (
            lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(7)}),
            r"quant_conv\.bias must be floating point of shape \(3,\), got torch\.float32 of shape \(7,\)",
        ),
        (
            lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(3, dtype=torch.int64)}),
            r"quant_conv\.bias must be floating point of shape \(3,\), got torch\.int64 of shape \(3,\)",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(change: Callable[..., object], match: str, folder: Path) -> None:
    """Missing, unexpected, or of another shape or kind."""
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=match):
        load_diffusers(folder)


def test_wrappers_of_training_leave_no_prefix(folder: Path) -> None:
    """Nor does another prefix stay unnamed."""
    expected = load_diffusers(folder)
    edit_weights(folder, lambda tensors: prefixed(tensors, "module."))
    assert same(load_diffusers(folder), expected)
    edit_weights(folder, lambda tensors: prefixed(tensors, "vqvae."))
    match = (
        r"source must be complete .*, but one with the prefix 'vqvae\.module\.'; save the state dict \{name\[13:\]"
    )
    with pytest.raises(ValueError, match=match):
        load_diffusers(folder)


def prefixed(tensors: dict[str, Tensor], prefix: str) -> None:
    for name in list(tensors):
        tensors[prefix + name] = tensors.pop(name)


def test_attention_of_old_files_has_other_names(folder: Path) -> None:
    """As in files that were written before version 0.17."""
    expected = load_diffusers(folder)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            for new, old in former.items():
                if f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{old}.")] = tensors.pop(name)

    edit_weights(folder, rename)
    assert not [name for name in safetensors.load_file(folder / WEIGHTS) if ".to_q." in name]
    assert same(load_diffusers(folder), expected)


def same(one: VQAutoencoder, other: VQAutoencoder) -> bool:
    states = one.state_dict(), other.state_dict()
    return one.config == other.config and all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_averages_of_diffusers_are_read(tmp_path: Path) -> None:
    """``EMAModel`` saves its own options next to those of the model."""
    pytest.importorskip("diffusers")
    from diffusers import VQModel
    from diffusers.training_utils import EMAModel

    model = original({})
    EMAModel(model.parameters(), model_cls=VQModel, model_config=model.config).save_pretrained(tmp_path / "ema")
    assert "decay" in json.loads((tmp_path / "ema" / "config.json").read_text())
    images = images_for(model)
    with torch.no_grad():
        assert torch.equal(load_diffusers(tmp_path / "ema").encode_to_indices(images), tokens_of(model, images))


@pytest.mark.parametrize("source", ["folder", "hub"])
@pytest.mark.parametrize("index", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_shards_are_refused_with_the_cure(
    source: str, index: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the files is enough; one with another name (the control) still is."""
    (folder / WEIGHTS).rename(folder / "all.safetensors")
    for part in (1, 2):
        shutil.copy(
            folder / "all.safetensors", folder / f"diffusion_pytorch_model-0000{part}-of-00002.safetensors"
        )
    (folder / f"{index}.index.json").write_text("{}")

    def fetch(_: str, name: str, *__: object) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    monkeypatch.setattr("te_quant._pretrained.download", fetch)
    where = folder if source == "folder" else "owner/name"
    match = r"source must be weights in one file, got shards in .*; load them .*\(folder, max_shard_size='100GB'\)"
    with pytest.raises(ValueError, match=match):
        load_diffusers(where)
    assert load_diffusers(where, filename="all.safetensors").config.num_codes == 24


def test_sources_of_diffusers(folder: Path, tmp_path: Path) -> None:
    """A folder, a file in it, a pipeline's subfolder, the older pickle, and a config from elsewhere."""
    expected = load_diffusers(folder)
    assert same(load_diffusers(folder / WEIGHTS), expected)
    assert same(load_diffusers(tmp_path, subfolder="vqvae"), expected)
    tensors = safetensors.load_file(folder / WEIGHTS)
    config = shutil.move(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config must be given where no config\.json lies beside, got None"):
        load_diffusers(folder)
    assert same(load_diffusers(folder, config=config), expected)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    assert same(load_diffusers(folder, config=json.loads(Path(config).read_text())), expected)
    with pytest.raises(FileNotFoundError, match=r"source must hold other\.safetensors, got none in"):
        load_diffusers(folder, filename="other.safetensors")


@pytest.mark.parametrize("subfolder", [None, "pipeline"])
def test_the_config_on_the_hub_is_that_beside_the_weights(
    subfolder: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder; another one, at the root of the repository, is not read."""
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def download(*, filename: str, subfolder: str = "", **others: object) -> str:
        asked.append(f"{subfolder}/{filename}".lstrip("/"))
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    expected = load_diffusers(folder)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    found = load_diffusers("owner/name", filename=f"vqvae/{WEIGHTS}", subfolder=subfolder)
    assert same(found, expected)
    inside = "" if subfolder is None else f"{subfolder}/"
    assert asked == [f"{inside}vqvae/{WEIGHTS}", f"{inside}vqvae/config.json"]


def test_damaged_safetensors_are_refused(folder: Path) -> None:
    """By the file."""
    (folder / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors must be a safetensors file, got"):
        load_diffusers(folder)


@pytest.mark.parametrize("offline", [False, True])
def test_hub_ids_find_the_pickle_where_there_are_no_safetensors(
    offline: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, a repository has what was downloaded before; a hub that cannot be reached is an error."""
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    expected = load_diffusers(folder)
    tensors = safetensors.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")

    def download(*, filename: str, local_files_only: bool, **others: object) -> str:
        if not (folder / filename).is_file():
            kind = errors.LocalEntryNotFoundError if local_files_only else errors.EntryNotFoundError
            raise kind(filename)
        return str(folder / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert same(load_diffusers("owner/name", local_files_only=offline), expected)
    (folder / "diffusion_pytorch_model.bin").unlink()
    match = r"source must hold .*\.safetensors or .*\.bin, got none in the repository 'owner/name'"
    with pytest.raises(FileNotFoundError, match=match):
        load_diffusers("owner/name", local_files_only=offline)

    def unreachable(**others: object) -> str:
        raise errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(FileNotFoundError, match="got no folder named 'owner/name', and no answer from the hub"):
        load_diffusers("owner/name")


def test_three_lines_audit_a_model_of_diffusers(folder: Path) -> None:
    """The report names layers of the loaded model."""
    from te_quant.equivariance import audit

    model = load_diffusers(folder)
    report = audit(model, torch.rand(2, 3, 32, 32) * 2 - 1, run=model.encode)
    rows = {row.name for row in report.rows}
    assert "encoder.conv_in" in rows
    assert report.culprits()["aliasing"].name == "encoder.levels.0.downsample.conv"
