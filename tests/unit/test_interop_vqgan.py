"""Checkpoints of taming-transformers, the paper's code and LlamaGen, in fixtures that have their layouts."""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from te_quant import VQAutoencoder
from te_quant.interop import load_llamagen, load_taming, load_te_vqgan
from tests.unit.vqgan_oracles import Shape, State, as_llamagen, decode, run, tensors

Loader = Callable[..., VQAutoencoder]
# Of the paper's code: how it downsamples, whether it replicates borders, and the version that pads its layers so.
PADDINGS = [
    ("strided_conv", True, "v2"),
    ("strided_conv", False, "v1"),
    ("strided_conv", False, "v2"),
    ("maxpool", True, "v1"),
    ("maxpool", False, "v2"),
    ("maxblurpool", True, "v2"),
    ("maxblurpool", False, "v1"),
    ("convblurpool", True, "v2"),
    ("convblurpool", False, "v1"),
]
# The others run in the slow suite.
FAST = (("strided_conv", True, "v2"), ("maxblurpool", False, "v1"), ("convblurpool", False, "v1"))


NARROW = Shape(mult=(1, 1))


@functools.cache
def _narrow() -> State:
    return tensors(NARROW)


def narrow() -> State:
    """A small model, for whatever does not look at values."""
    return dict(_narrow())


def params(shape: Shape, **changes: object) -> dict[str, Any]:
    """``model.params`` of the fixture, as its YAML file has it; ``ddconfig`` takes what it knows."""
    network = {
        "double_z": False,
        "z_channels": shape.z,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": list(shape.mult),
        "num_res_blocks": shape.blocks,
        "attn_resolutions": [16 // 2**level for level in shape.attention],
        "dropout": 0.0,
    }
    outside = {"embed_dim": shape.codes[1], "n_embed": shape.codes[0], "lossconfig": {"target": "x"}}
    own = ("remap", "kl_weight", "distance_measure", "ortho_reg_coef", "ddconfig", "embed_dim", "n_embed")
    own += ("distance_metric", "first_stage_config")
    inner = {name: value for name, value in changes.items() if name not in own}
    return {**outside, "ddconfig": {**network, **inner}, **{k: v for k, v in changes.items() if k in own}}


def saved(folder: Path, state: Mapping[str, object], container: str | None = "state_dict") -> Path:
    torch.save({container: dict(state), "epoch": 3} if container else dict(state), folder / "last.ckpt")
    return folder / "last.ckpt"


def with_codes(state: State, shape: Shape, images: Tensor, *, cosine: bool = False) -> State:
    """Codes near the latents, so that many are used."""
    rows = run(state, shape, images, cosine=cosine).latents.movedim(1, -1).flatten(0, -2)
    count = shape.codes[0]
    codes = rows[:: len(rows) // count][:count] + rows.std() / 10 * torch.randn(shape.codes).double()
    return {**state, "quantize.embedding.weight": codes}


def images() -> Tensor:
    return torch.rand(2, 3, 16, 16).double() * 2 - 1


def agrees(model: VQAutoencoder, state: State, shape: Shape, given: Tensor, *, cosine: bool = False) -> bool:
    """Whether tokens are equal, and latents and images up to rounding."""
    expected = run(state, shape, given, cosine=cosine)
    assert len(expected.indices.unique()) > 3
    output = model(given)
    close = [
        torch.allclose(found, wanted, rtol=0, atol=1e-9)
        for found, wanted in ((output.latents, expected.latents), (output.reconstruction, expected.images))
    ]
    return all(close) and torch.equal(output.indices, expected.indices)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        pytest.param(Shape(mult=(2, 1, 3), attention=(0, 2), blocks=2), marks=pytest.mark.slow),
        Shape(attention=()),  # the first stages of latent diffusion
        Shape(mult=(1,), attention=(), z=5),
    ],
)
def test_taming_models_agree(shape: Shape, tmp_path: Path) -> None:
    """Tokens are equal and images up to rounding; the config only confirms what the weights say."""
    given = images()
    state = with_codes(tensors(shape), shape, given)
    path = saved(tmp_path, state)
    model = load_taming(path)
    assert not model.training
    assert agrees(model, state, shape, given)
    confirmed = load_taming(path, config=params(shape, dropout=0.1))
    assert confirmed.config.dropout == 0.1
    assert torch.equal(confirmed(given).indices, model(given).indices)


@pytest.mark.parametrize(
    ("down", "replicate", "version"),
    [pytest.param(*each, marks=() if each in FAST else pytest.mark.slow) for each in PADDINGS],
)
def test_models_of_the_papers_code_agree(down: str, replicate: bool, version: str, tmp_path: Path) -> None:
    """All four downsamplings, where its layers pad as its convolutions do, or the blur replicates."""
    shape = Shape(down=down, replicate=replicate, down_replicates=replicate)
    given = images()
    state = with_codes(tensors(shape), shape, given)
    config = params(shape, downsampling_method=down, use_replicationpad=replicate, version=version)
    model = load_te_vqgan(saved(tmp_path, state), config={**config, "ortho_reg_coef": 10.0})
    assert agrees(model, state, shape, given)
    assert (model.config.orthogonal_reg, model.config.commitment_weight) == (10.0, 0.25)


def test_cosine_similarity_in_the_papers_code_keeps_the_length_of_codes(tmp_path: Path) -> None:
    """Tokens by angle, images from the codes as they are; by distance, both would be others."""
    shape, given = Shape(), images()
    state = with_codes(tensors(shape), shape, given)
    path = saved(tmp_path, state)
    model = load_te_vqgan(path, config=params(shape, distance_measure="cos_sim"))
    expected = run(state, shape, given, cosine=True).indices
    assert torch.equal(model(given).indices, expected)
    codes = state["quantize.embedding.weight"][expected].movedim(-1, 1)
    torch.testing.assert_close(model(given).reconstruction, decode(state, codes, 2), rtol=0, atol=1e-9)
    assert not torch.equal(load_te_vqgan(path, config=params(shape))(given).indices, expected)
    with pytest.raises(ValueError, match="config distance_measure must be one of 'L2', 'cos_sim', got 'dot'"):
        load_te_vqgan(path, config=params(shape, distance_measure="dot"))


@pytest.mark.parametrize("cosine", [True, False])
def test_llamagen_models_agree(cosine: bool, tmp_path: Path) -> None:
    """Codes smaller than the channels around them, other widths behind the quantizer, both metrics."""
    shape = Shape(mult=(1, 2, 1), decoder_mult=(2, 1, 2), attention=(2,), z=9, codes=(12, 4), blocks=2)
    given = images()
    state = with_codes(tensors(shape), shape, given, cosine=cosine)
    path = saved(tmp_path, {**as_llamagen(state), "quantize.codebook_used": torch.zeros(65536)}, "model")
    model = load_llamagen(path, config=None if cosine else {"codebook_l2_norm": False})
    assert agrees(model, state, shape, given, cosine=cosine)
    assert (model.config.z_channels, model.config.code_dim) == (9, 4)
    assert (model.config.widths, model.config.decoder_widths) == ((32, 64, 32), (64, 32, 64))


def test_fixtures_have_published_names() -> None:
    """Some of them, as the files on the web have them."""
    state = tensors(Shape())
    assert state["encoder.down.1.attn.0.proj_out.weight"].shape == (64, 64, 1, 1)
    assert {"decoder.up.0.block.1.conv2.bias", "encoder.mid.block_1.norm1.weight"} < state.keys()
    assert {"decoder.up.1.upsample.conv.weight", "decoder.up.0.block.0.nin_shortcut.weight"} < state.keys()
    llamagen = as_llamagen(state)
    assert {"encoder.conv_blocks.0.downsample.conv.weight", "encoder.mid.1.q.weight"} < llamagen.keys()
    assert {"decoder.conv_blocks.0.attn.1.norm.bias", "decoder.mid.2.conv2.weight"} < llamagen.keys()
    replicating = tensors(Shape(down="convblurpool", replicate=True))
    assert {"encoder.conv_in.1.weight", "encoder.down.0.downsample.module.0.weight"} < replicating.keys()
    assert "encoder.down.0.downsample.module.1.filt" in replicating


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("encoder.mid.block_1.", "encoder.mid.block_2."),
        ("decoder.mid.attn_1.q.", "decoder.mid.attn_1.k."),
        ("decoder.up.1.block.0.", "decoder.up.1.block.1."),
    ],
)
def test_a_permuted_name_is_noticed(one: str, other: str, tmp_path: Path) -> None:
    """Negative control: tensors of equal shape under each other's name give other images."""
    shape, given = Shape(), images()
    state = with_codes(tensors(shape), shape, given)

    def swapped(name: str) -> str:
        for old, new in ((one, other), (other, one)):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    model = load_taming(saved(tmp_path, {swapped(name): tensor for name, tensor in state.items()}))
    assert not agrees(model, state, shape, given)


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if not name.startswith(names)}


def adding(**tensors_: Tensor) -> Callable[[State], State]:
    return lambda state: {**state, **{name.replace("__", "."): value for name, value in tensors_.items()}}


ONE = torch.zeros(1)
BATCH = "encoder.down.0.block.0.norm1.running_mean"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            without("encoder.mid.attn_1.k.bias"),
            r"source must be complete .*none named 'encoder\.mid\.attn_1\.k\.bias'",
        ),
        (without("decoder.up.0.block.1.norm2"), r"none named 'decoder\.up\.0\.block\.1\.norm2\.weight', .*bias'"),
        (without("quant_conv.bias"), r"none named 'quant_conv\.bias'"),
        (without("quantize"), r"source must hold a tensor 'quantize\.embedding\.weight', got \d+ others; check"),
        (without("encoder.down"), r"source must hold a tensor 'encoder\.down\.0\.block\.0\.conv1\.weight'"),
        (adding(encoder__extra=ONE), r"source must be of \d+ tensors, got unexpected 'encoder\.extra'"),
        (
            adding(encoder__norm_out__bias=ONE),
            r"encoder\.norm_out\.bias must be floating point of shape \(32,\), got torch.float32 of shape \(1,\)",
        ),
        (adding(quantize__proj__weight=ONE), r"source must be .*got 'quantize\.proj\.weight': a Gumbel quantizer"),
        (adding(quantize__used=ONE), r"got 'quantize\.used': a codebook whose indices are remapped"),
        (adding(decoder__norm_out__conv_y__weight=ONE), r"got 'decoder.norm_out.conv_y.weight': MoVQ"),
        (adding(**{BATCH.replace(".", "__"): ONE}), r"norm1\.running_mean': batch normalization"),
        (
            without("encoder.conv_in.bias"),
            r"source must be a VQGAN whose convolutions have biases, got no 'encoder\.conv_in\.bias', as in O",
        ),
        (
            without("encoder.down.0.downsample"),
            r"resamp_with_conv must be True, got no 'encoder\.down\.0\.downsample\.conv\.weight' in the weights",
        ),
        (
            without("decoder.up.1.attn"),
            r"attention levels of the decoder must be those of the encoder, \(1,\), got \(\)",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(change: Callable[[State], State], match: str, tmp_path: Path) -> None:
    """Missing and unexpected ones, other shapes, and those that only other kinds of models have."""
    with pytest.raises(ValueError, match=match):
        load_taming(saved(tmp_path, change(narrow())))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"remap": "used.npy"}, "config remap must be None, got 'used.npy'"),
        ({"kl_weight": 1e-8}, "config must be that of a VQModel, got 'kl_weight', which a Gumbel quantizer has"),
        ({"double_z": True}, "config ddconfig.double_z must be False, got True"),
        ({"resamp_with_conv": False}, "config ddconfig.resamp_with_conv must be True, got False"),
        ({"attn_type": "linear"}, "config ddconfig.attn_type must be 'vanilla', got 'linear'"),
        ({"attn_type": "none"}, "config ddconfig.attn_type must be 'vanilla', got 'none'"),
        ({"use_linear_attn": True}, "config ddconfig.use_linear_attn must be False, got True"),
        ({"tanh_out": True}, "config ddconfig.tanh_out must be False, got True"),
        ({"give_pre_end": True}, "config ddconfig.give_pre_end must be False, got True"),
        ({"dropuot": 0.1}, r"config ddconfig key must be one of double_z, .*, tanh_out, got 'dropuot'\."),
        ({"downsampling_method": "maxpool"}, "config ddconfig key must be one of .*, got 'downsampling_method'"),
        ({"distance_measure": "L2"}, "config key must be one of embed_dim, .*, use_ema, got 'distance_measure'"),
        ({"ddconfig": None}, "config ddconfig must be a mapping, got None"),
        ({"n_embed": 99}, "config n_embed must be 12 as in the weights, got 99"),
        ({"embed_dim": 7}, "config embed_dim must be 5 as in the weights, got 7"),
        ({"ch_mult": [1, 4]}, r"config ddconfig.ch_mult must be \[1.0, 1.0\] as in the weights, got \[1, 4\]"),
        ({"num_res_blocks": 2}, "config ddconfig.num_res_blocks must be 1 as in the weights, got 2"),
        (
            {"attn_resolutions": [16]},
            r"config ddconfig.attn_resolutions must be those of the levels \(1,\) as in .*, got levels \(0,\)",
        ),
    ],
)
def test_configs_that_say_something_else_are_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    """By the path of the option."""
    with pytest.raises((ValueError, TypeError), match=match):
        load_taming(saved(tmp_path, narrow()), config=params(NARROW, **change))


@pytest.mark.parametrize("loader", [load_taming, load_te_vqgan])
@pytest.mark.parametrize(
    ("nested", "cure"),
    [
        (lambda own: {"data": {}, "model": {"params": own}}, "config['model']['params']"),
        (lambda own: {"target": "x", "params": own}, "config['params']"),
        (
            lambda own: {"model": {"params": {"first_stage_config": {"params": own}}}},
            "config['model']['params']['first_stage_config']['params']",
        ),
    ],
)
def test_whole_files_are_refused_with_the_part_to_pass(
    loader: Loader, nested: Callable[[dict], dict], cure: str, tmp_path: Path
) -> None:
    """Read as options they would say nothing, and the defaults would count."""
    with pytest.raises(ValueError, match=rf"config key must be one of embed_dim, .*; pass {re.escape(cure)}\."):
        loader(saved(tmp_path, narrow()), config=nested(params(NARROW)))


def test_published_configs_are_read(tmp_path: Path) -> None:
    """Negative control: the keys that the three codes have; one that concerns another of them is refused."""
    path = saved(tmp_path, narrow())
    taming = {"image_key": "image", "ckpt_path": None, "ignore_keys": [], "monitor": "val/rec_loss"}
    taming |= {"remap": None, "sane_index_shape": True, "colorize_nlabels": None, "use_ema": True}
    taming |= {"batch_resize_range": None, "scheduler_config": None, "lr_g_factor": 1.0}
    network = {"tanh_out": False, "give_pre_end": False, "use_linear_attn": False, "attn_type": "vanilla"}
    load_taming(path, config={**params(NARROW, **network), **taming})
    paper = {"ortho_reg_coef": 0.0, "force_emb_len_1": False, "eq_metric_dataset": "mnist", "monitor": None}
    given = {**params(NARROW, version="v2", use_replicationpad=False), **paper}
    load_te_vqgan(path, config=given)
    with pytest.raises(ValueError, match=r"config key must be one of .*, got 'distance_metric'\."):
        load_te_vqgan(path, config={**given, "distance_metric": "cos_sim"})


def test_models_without_any_attention_are_read(tmp_path: Path) -> None:
    """As VQ-f4 of latent diffusion: ``attn_type: none`` says that the middle has none either."""
    shape, given = Shape(attention=()), images()
    state = without("encoder.mid.attn_1", "decoder.mid.attn_1")(with_codes(tensors(shape), shape, given))
    path = saved(tmp_path, state)
    # Levels that are named have none either.
    config = params(shape, attn_type="none", attn_resolutions=[8])
    model = load_taming(path, config=config)
    assert (model.config.attention_levels, model.config.has_middle_attention) == ((), False)
    assert torch.equal(model(given).reconstruction, load_taming(path)(given).reconstruction)
    with pytest.raises(ValueError, match=r"config ddconfig\.attn_type must be 'none', got 'vanilla'"):
        load_taming(path, config={**config, "ddconfig": {**config["ddconfig"], "attn_type": "vanilla"}})


@pytest.mark.parametrize(
    ("shape", "change", "match"),
    [
        (
            Shape(replicate=True),
            {"use_replicationpad": True, "version": "v1"},
            "config ddconfig.version must be one that pads strided_conv as use_replicationpad=True pads .* 'v1'",
        ),
        (
            Shape(down="convblurpool"),
            {"downsampling_method": "convblurpool", "version": "v2"},
            "config ddconfig.version must be one that pads convblurpool as use_replicationpad=False pads .* 'v2'",
        ),
        (
            Shape(replicate=True),
            {},
            "config ddconfig.use_replicationpad must be True as in the weights, got False",
        ),
        (Shape(), {"version": "v3"}, "config ddconfig.version must be one of 'v1', 'v2', got 'v3'"),
        (
            Shape(),
            {"downsampling_method": "avgpool"},
            "config ddconfig.downsampling_method must be one of 'strided",
        ),
        (Shape(), {"downsampling_method": "maxpool"}, r"unexpected 'encoder\.down\.0\.downsample\.conv"),
    ],
)
def test_models_of_the_papers_code_that_cannot_be_built_are_refused(
    shape: Shape, change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    """Layers that pad otherwise than the convolutions, and configs that do not fit."""
    with pytest.raises(ValueError, match=match):
        load_te_vqgan(saved(tmp_path, tensors(shape)), config=params(shape, **change))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"norm_type": "batch"}, "config key must be one of codebook_size, .*got 'norm_type'"),
        ({"codebook_size": 16384}, "config codebook_size must be 12 as in the weights, got 16384"),
        (
            {"encoder_ch_mult": [1, 2]},
            r"config encoder_ch_mult must be \[1.0, 1.0\] as in the weights, got \[1, 2\]",
        ),
    ],
)
def test_llamagen_configs_that_do_not_fit_are_refused(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    """By the name of the option."""
    with pytest.raises(ValueError, match=match):
        load_llamagen(saved(tmp_path, as_llamagen(narrow())), config=config)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("decoder.mid.1.v.weight"), r"none named 'decoder\.mid\.1\.v\.weight'"),
        (adding(**{BATCH.replace(".", "__"): ONE}), "batch normalization"),
        (
            without("encoder.conv_blocks.0.downsample"),
            "resamp_with_conv must be True, got no 'encoder.conv_blocks.0",
        ),
    ],
)
def test_other_tensors_in_a_llamagen_file_are_refused(
    change: Callable[[State], State], match: str, tmp_path: Path
) -> None:
    """As in the other layouts."""
    with pytest.raises(ValueError, match=match):
        load_llamagen(saved(tmp_path, change(as_llamagen(narrow()))))


def test_discriminators_are_left_out_and_averages_taken_on_request(tmp_path: Path) -> None:
    """Names of averages have no dots."""
    state = narrow()
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in state.items()}
    others = {"loss.discriminator.main.0.weight": ONE, "model_ema.decay": ONE, "colorize": ONE}
    path = saved(tmp_path, {**state, **averages, **others})
    codebook = state["quantize.embedding.weight"]
    assert torch.equal(load_taming(path).quantizer.codebook, codebook)
    assert torch.equal(load_taming(path, averaged=True).quantizer.codebook, codebook + 1)
    with pytest.raises(ValueError, match="source must be with averages for averaged=True, 'model_ema"):
        load_taming(saved(tmp_path, state), averaged=True)


@pytest.mark.parametrize(("containers", "taken"), [(("model",), "model"), (("model", "ema"), "ema"), ((), None)])
def test_llamagen_files_hold_the_weights_somewhere(
    containers: tuple[str, ...], taken: str | None, tmp_path: Path
) -> None:
    """``ema`` before ``model`` before the file itself."""
    state = as_llamagen(narrow())
    sets = {
        name: {**state, "quant_conv.bias": torch.full((5,), number + 0.5)}
        for number, name in enumerate(containers)
    }
    torch.save(sets or state, tmp_path / "vq.pt")
    bias = load_llamagen(tmp_path / "vq.pt").encoder.to_latents.bias
    assert torch.equal(bias, (sets[taken] if taken else state)["quant_conv.bias"])


def test_models_train_on_as_their_originals_do(tmp_path: Path) -> None:
    """β lies on the codebook term in taming-transformers, and on the commitment term in LlamaGen."""
    taming = load_taming(saved(tmp_path, narrow())).train()
    llamagen = load_llamagen(saved(tmp_path, as_llamagen(narrow()), "model")).train()
    for model, commitment, codebook in ((taming, 1.0, 0.25), (llamagen, 0.25, 1.0)):
        latents = torch.randn(2, 5, 4, 4).double()
        output = model.quantizer(latents)
        if model is llamagen:
            latents = torch.nn.functional.normalize(latents, dim=1)
        error = (latents - output.codes).square().mean()
        torch.testing.assert_close(output.commitment_loss, commitment * error)
        torch.testing.assert_close(output.codebook_loss, codebook * error)
        assert isinstance(model.quantizer.codebook, torch.nn.Parameter)


def test_loading_moves_no_random_state_and_converts(tmp_path: Path) -> None:
    """The dtype is that of the file, or the one asked for; statistics are those of a new quantizer."""
    path = saved(tmp_path, {name: tensor.half() for name, tensor in narrow().items()})
    before = torch.get_rng_state()
    model = load_taming(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.equal(model.quantizer.pending_counts, torch.zeros(12))
    assert {parameter.dtype for parameter in load_taming(path, dtype=torch.float32).parameters()} == {
        torch.float32
    }
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch\.dtype, or None, got torch\.int8"):
        load_taming(path, dtype=torch.int8)


@pytest.mark.parametrize("asked", [None, "cpu"])
@pytest.mark.parametrize("loader", [load_taming, load_llamagen, VQAutoencoder.from_pretrained])
def test_loaded_models_are_on_one_device_under_any_default(
    loader: Loader, asked: str | None, tmp_path: Path
) -> None:
    """The CPU if none is asked for, statistics included. What a default device gets is on the meta device here."""
    path = saved(tmp_path, as_llamagen(narrow()) if loader is load_llamagen else narrow())
    if loader not in (load_taming, load_llamagen):
        path = tmp_path / "own"
        load_taming(tmp_path / "last.ckpt").save_pretrained(path)
    torch.set_default_device("meta")
    try:
        model = loader(path, device=asked)
        assert torch.zeros(1).is_meta
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert torch.isfinite(model(torch.zeros(1, 3, 8, 8, dtype=model.encoder.dtype)).loss)
    assert {tensor.device.type for tensor in loader(path, device="meta").state_dict().values()} == {"meta"}


class _Callback:
    """What a training loop pickles next to its weights."""

    def __init__(self) -> None:
        self.best = 1.0


def _spring(message: str) -> None:
    raise AssertionError(message)


class _Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (_spring, ("the pickle was run",))


class _Command:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("exit 1",))


class _Options(dict):
    """As EasyDict and AttributeDict: entries are attributes too."""

    def __setitem__(self, name: str, value: object) -> None:
        pytest.fail("the class of the file was used")


class _Steps(list):
    def append(self, value: object) -> None:
        pytest.fail("the class of the file was used")

    extend = append


def _options(**entries: object) -> _Options:
    options = _Options()
    dict.update(options, entries)
    options.__dict__.update(entries)
    return options


def _beside() -> dict[str, object]:
    steps = _Steps()
    list.extend(steps, [1, [2], _options(c=3)])
    return {
        "options": _options(lr=1.0, model=_options(widths=[1, 2]), empty=_options()),
        "counts": collections.defaultdict(list, a=[1], b=[_Callback()]),
        "last": collections.deque([1.0, (2.0, 3.0)], maxlen=3),
        "one": [collections.deque([1.0]), {"steps": steps}],
    }


@pytest.mark.parametrize("name", [*_beside(), "all", "around"])
def test_dicts_and_lists_of_other_classes_are_passed_over(name: str, tmp_path: Path) -> None:
    """Beside the weights and around them; none of their code runs."""
    state = narrow()
    beside = _beside() if name == "all" else {name: _beside().get(name)}
    content = _options(state_dict=state, epoch=_Steps()) if name == "around" else {"state_dict": state, **beside}
    torch.save(content, tmp_path / "last.ckpt")
    assert torch.equal(load_taming(tmp_path).quantizer.codebook, state["quantize.embedding.weight"])


def test_a_list_with_attributes_is_refused_by_its_class(tmp_path: Path) -> None:
    """The restricted reader has no object that takes both."""
    steps = _Steps()
    list.append(steps, 1)
    steps.name = "x"
    torch.save({"state_dict": narrow(), "steps": steps}, tmp_path / "last.ckpt")
    match = r"must be a file of tensors .*, got a list with attributes of the class '.*_Steps'; save its"
    with pytest.raises(ValueError, match=match):
        load_taming(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_of_training_leave_no_prefix(prefix: str, tmp_path: Path) -> None:
    """Nor in the averages; the metrics of both loaders see the names of the model itself."""
    state = narrow()
    codebook = state["quantize.embedding.weight"]
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in state.items()}
    loss = {"loss.discriminator.running_mean": ONE}
    wrapped = {f"{prefix}{name}": tensor for name, tensor in {**state, **averages, **loss}.items()}
    path = saved(tmp_path, wrapped, "model")
    assert torch.equal(load_taming(path).quantizer.codebook, codebook)
    assert torch.equal(load_taming(path, averaged=True).quantizer.codebook, codebook + 1)
    path = saved(tmp_path, {f"{prefix}{name}": tensor for name, tensor in as_llamagen(state).items()}, "model")
    assert load_llamagen(path).config.num_codes == 12


@pytest.mark.parametrize("averaged", [False, True])
def test_parts_of_larger_models_name_their_prefix(averaged: bool, tmp_path: Path) -> None:
    """Also where not all is inside; what the message says makes a file that is read."""
    state = {f"first_stage_model.{name}": tensor for name, tensor in narrow().items()}
    path = saved(tmp_path, {**state, "module.scale": ONE})
    match = (
        r"source must hold a tensor 'encoder\.down\.0\.block\.0\.conv1\.weight', got \d+ others, but one with the "
        r"prefix 'first_stage_model\.'; save the state dict "
        r"(\{name\[18:\]: .* if name\.startswith\('first_stage_model\.'\)\})\."
    )
    with pytest.raises(ValueError, match=match) as caught:
        load_taming(path, averaged=averaged)
    found = re.search(match, str(caught.value))
    assert found is not None
    assert load_taming(saved(tmp_path, eval(found[1], {"state": state}))).config.num_codes == 12


def test_other_containers_name_the_cure(tmp_path: Path) -> None:
    """A dict under another name."""
    with pytest.raises(
        ValueError,
        match=r"'net' must be a tensor, got dict; save its tensors on their own, under the key 'state_dict'\.",
    ):
        load_taming(saved(tmp_path, narrow(), "net"))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    """Callbacks and arguments beside the weights are passed over; a trap among them is not sprung."""
    state = narrow()
    beside = {"callbacks": {_Callback: _Callback()}, "args": argparse.Namespace(lr=1.0), "trap": _Trap()}
    torch.save({"state_dict": state, **beside}, tmp_path / "last.ckpt")
    assert torch.equal(load_taming(tmp_path).quantizer.codebook, state["quantize.embedding.weight"])
    torch.save({"state_dict": {**state, "quant_conv.bias": _Trap()}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt 'quant_conv\.bias' must be a tensor, got _Anything"):
        load_taming(tmp_path)
    torch.save({"state_dict": state, "command": _Command()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"must be a file of tensors that torch\.save wrote, got .*blocked"):
        load_taming(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle at all", b"PK\x03\x04 torn", b"hello", b"M", b"t", b"X\x01\0\0\0\xff."]
)
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    """Whatever is in them."""
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt must be a file of tensors that torch\.save wrote, got"):
        load_taming(tmp_path / "last.ckpt")


@pytest.mark.parametrize("length", [40, 5_000, 20_000, 60_000, 100_000])
def test_files_that_were_cut_short_are_refused(length: int, tmp_path: Path) -> None:
    """Of some lengths the reader looks for the end in front of the file, which is an error of the system."""
    path = tmp_path / "last.ckpt"
    torch.save({f"layers.{layer}.weight": torch.zeros(64, 64) for layer in range(10)}, path)
    os.truncate(path, length)
    match = (
        r"last\.ckpt must be a file of tensors that torch\.save wrote, got a damaged one \(.*; copy or download it"
    )
    with pytest.raises(ValueError, match=match):
        load_taming(path)


def test_files_that_cannot_be_opened_are_named_by_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not damaged."""

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*last\.ckpt'"):
        load_taming(saved(tmp_path, narrow()))


def test_a_list_of_tensors_is_refused(tmp_path: Path) -> None:
    """The names are missing."""
    torch.save([ONE], tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt must be a mapping of tensors, got list"):
        load_taming(tmp_path)


def test_folders_and_files(tmp_path: Path) -> None:
    """One file of weights in a folder is enough; of several one is named. safetensors are read as well."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = narrow()
    (tmp_path / "sub").mkdir()
    save_file(state, tmp_path / "sub" / "vqgan.safetensors")
    assert load_taming(tmp_path, subfolder="sub").config.num_codes == 12
    saved(tmp_path / "sub", state)
    with pytest.raises(
        ValueError, match=r"filename must be given for .*, got 2 files: last.ckpt, vqgan.safetensors"
    ):
        load_taming(tmp_path / "sub")
    assert load_taming(tmp_path / "sub", filename="last.ckpt").config.num_codes == 12
    file = tmp_path / "sub" / "last.ckpt"
    for options, match in (
        ({"filename": "x"}, "filename must be None for a file, got 'x'"),
        ({"subfolder": "x"}, "subfolder must be None for a file, got 'x'"),
        ({"revision": "v1"}, "revision must be None for a local file, got 'v1'"),
    ):
        with pytest.raises(ValueError, match=match):
            load_taming(file, **options)


@pytest.mark.parametrize(
    ("source", "options", "match"),
    [
        ("empty", {}, r"source must hold weights \(\.safetensors, .*\), got none in "),
        ("empty", {"filename": "x.pt"}, r"source must hold x\.pt, got none in "),
        ("empty", {"subfolder": "no"}, r"source must hold weights, got none in "),
        ("./nowhere", {}, r"source must be an existing file or folder or a hub id 'owner/name', got '\./nowhere'"),
    ],
)
def test_missing_files_are_refused(
    source: str, options: dict[str, str], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what was looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=match):
        load_taming(source, **options)


def test_a_repository_needs_the_name_of_its_file() -> None:
    """Before anything is downloaded; or the path was meant to be one of this machine."""
    match = "filename must be the weights file in the repository 'owner/name', got None; no file or folder has"
    with pytest.raises(ValueError, match=match):
        load_llamagen("owner/name")


@pytest.mark.parametrize("source", ["checkpoints/last.ckpt", "checkpoints/vq.safetensors", "runs/exp 1"])
@pytest.mark.parametrize("loader", [load_taming, load_llamagen])
def test_mistyped_paths_are_no_repositories(loader: Loader, source: str) -> None:
    """The name of a file of weights, or what no repository is called."""
    match = rf"source must be an existing file or folder or a hub id 'owner/name', got '{source}'\."
    with pytest.raises(FileNotFoundError, match=match):
        loader(source)


def test_repositories_may_be_called_like_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with ``filename`` it is clear what is meant."""
    hub = pytest.importorskip("huggingface_hub")
    path = saved(tmp_path, narrow())
    monkeypatch.setattr(hub, "hf_hub_download", lambda **options: str(path))
    assert load_taming("owner/model.pt", filename="last.ckpt").config.num_codes == 12


def test_hub_ids_download_one_file_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Revision and the rest go to the hub's own client."""
    hub = pytest.importorskip("huggingface_hub")
    path, calls = saved(tmp_path, as_llamagen(narrow()), "model"), []
    monkeypatch.setattr(hub, "hf_hub_download", lambda **options: calls.append(options) or str(path))
    load_llamagen("owner/name", filename="vq.pt", subfolder="a", revision="v1", local_files_only=True)
    assert calls == [
        {
            "repo_id": "owner/name",
            "filename": "vq.pt",
            "subfolder": "a",
            "revision": "v1",
            "token": None,
            "cache_dir": None,
            "local_files_only": True,
        }
    ]


@pytest.mark.parametrize("loader", [load_taming, load_te_vqgan, load_llamagen])
def test_configs_that_are_no_options_are_refused(loader: Loader, tmp_path: Path) -> None:
    """A YAML file is for its owner to read."""
    state = narrow()
    path = saved(tmp_path, as_llamagen(state) if loader is load_llamagen else state)
    (tmp_path / "model.yaml").write_text("model:\n  params: {}\n")
    with pytest.raises(
        ValueError, match=r"config must be a JSON file, got .*model\.yaml.*; read other formats your"
    ):
        loader(path, config=tmp_path / "model.yaml")
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(TypeError, match=r"config must be an object of options, got \[\]"):
        loader(path, config=tmp_path / "model.json")
    with pytest.raises(TypeError, match="config must be a mapping or the path of a JSON file, got 3"):
        loader(path, config=3)
    with pytest.raises(
        FileNotFoundError, match=r"config must be a mapping or an existing JSON file, got 'no\.json'"
    ):
        loader(path, config="no.json")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["taming", "llamagen", "te_vqgan"])
def test_the_command_takes_published_layouts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoded, audited and converted from the shell; the tokens are those of the original."""
    pytest.importorskip("tqdm")
    pixels, load_file = pytest.importorskip("PIL.Image"), pytest.importorskip("safetensors.torch").load_file
    from te_quant.cli import main

    monkeypatch.chdir(tmp_path)
    given = (torch.rand(2, 3, 16, 16) * 255).round()
    for name, image in zip("ab", given.byte(), strict=True):
        pixels.fromarray(image.movedim(0, -1).numpy()).save(f"{name}.png")
    given = given.double() / 127.5 - 1
    shape = Shape(down="maxblurpool") if kind == "te_vqgan" else Shape()
    cosine = kind == "llamagen"
    state = with_codes(tensors(shape), shape, given, cosine=cosine)
    saved(tmp_path, as_llamagen(state) if cosine else state, "model" if cosine else "state_dict")
    model = ["last.ckpt", "--format", kind]
    if kind == "te_vqgan":
        (tmp_path / "params.json").write_text(json.dumps(params(shape, downsampling_method="maxblurpool")))
        model += ["--config", "params.json"]
    expected = run(state, shape, given, cosine=cosine).indices
    assert main(["encode", *model, "a.png", "b.png", "-o", "tokens"]) == 0
    assert main(["convert", *model, "-o", "converted"]) == 0
    assert main(["encode", "converted", "a.png", "b.png", "-o", "again"]) == 0
    for tokens in map(load_file, ("tokens", "again")):
        assert torch.equal(torch.stack([tokens["tokens/a.png"], tokens["tokens/b.png"]]).long(), expected)
    capsys.readouterr()
    assert main(["audit", *model, "a.png", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any(row["name"].startswith("levels.0.downsample") for row in rows)
