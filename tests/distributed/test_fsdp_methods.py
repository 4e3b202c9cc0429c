"""Methods of models that FSDP2 has sharded, and trainings under FSDP1, in a group of one process.

``fully_shard`` gathers weights for ``forward`` only; ``test_engines.py`` compares trainings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method

from te_quant import GPT, AutoencoderConfig, GPTConfig, Segment, VQAutoencoder
from te_quant.layers import ResidualBlock
from tests.helpers import exactly

REFUSAL = (
    "weights must be whole outside of forward, got shards of FSDP2; shard the autoencoder itself with "
    "fully_shard(autoencoder), and declare every method that you call, for example by "
    "register_fsdp_forward_method(autoencoder, 'encode_to_indices')."
)
INDICES = torch.arange(4).view(1, 2, 2)


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _model(update: str = "gradient") -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(
        AutoencoderConfig(
            base_channels=8, norm_groups=4, channel_multipliers=(1, 2), num_res_blocks=1, num_codes=16, code_dim=4,
            codebook_update=update,
        )
    )  # fmt: skip


def _images() -> Tensor:
    return torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _by_coders(model: VQAutoencoder) -> VQAutoencoder:
    for part in (model.encoder, model.decoder):
        fully_shard(part)
    return fully_shard(model)


def _by_blocks(model: VQAutoencoder) -> VQAutoencoder:
    for part in model.modules():
        if isinstance(part, ResidualBlock):
            fully_shard(part)
    return fully_shard(model)


def _inside_another(model: VQAutoencoder) -> VQAutoencoder:
    fully_shard(nn.Sequential(model))
    return model


SHARDINGS: dict[str, Callable[[VQAutoencoder], VQAutoencoder]] = {
    "whole": fully_shard,
    "blocks": _by_blocks,
    "inside-another": _inside_another,
}
METHODS: dict[str, Callable[[VQAutoencoder], Any]] = {
    "encode": lambda model: model.encode(_images()),
    "encode_with_phases": lambda model: model.encode_with_phases(_images()),
    "encode_to_indices": lambda model: model.encode_to_indices(_images()),
    "decode": lambda model: model.decode(torch.ones(1, 4, 2, 2)),
    "decode_indices": lambda model: model.decode_indices(INDICES),
}


def _train(model: nn.Module) -> None:
    output = model(_images())
    (output.loss + output.reconstruction.square().mean()).backward()


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_methods_on_shards_are_refused_by_name(sharding: str, method: str, update: str) -> None:
    """Before the first step, when no weight is whole."""
    model = SHARDINGS[sharding](_model(update))
    with pytest.raises(RuntimeError, match=exactly(REFUSAL)):
        METHODS[method](model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharding", [_by_blocks, fully_shard])
def test_methods_are_refused_after_a_step(sharding: Callable[[Any], Any], method: str) -> None:
    """The backward pass leaves shards behind."""
    model = sharding(_model())
    _train(model)
    with pytest.raises(RuntimeError, match=exactly(REFUSAL)):
        METHODS[method](model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharding", [_by_blocks, fully_shard])
def test_methods_that_are_declared_give_the_same_bits(sharding: Callable[[Any], Any], method: str) -> None:
    """As the model without shards, again and again."""
    plain = _model().eval()
    model = sharding(copy.deepcopy(plain))
    register_fsdp_forward_method(model, method)
    for _ in range(2):
        found, expected = METHODS[method](model), METHODS[method](plain)
        pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_coders_that_gather_their_own_weights_need_no_declaration(method: str) -> None:
    """Each of them is called as a module, which is what FSDP2 waits for."""
    plain = _model().eval()
    model = _by_coders(copy.deepcopy(plain))
    found, expected = METHODS[method](model), METHODS[method](plain)
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("sharding", [_by_blocks, _by_coders, fully_shard])
def test_forward_is_never_refused(sharding: Callable[[Any], Any]) -> None:
    """In training and in evaluation."""
    plain = _model()
    model = sharding(copy.deepcopy(plain))
    for one in (plain, model):
        _train(one)
    assert torch.equal(model.eval()(_images()).reconstruction, plain.eval()(_images()).reconstruction)


def test_declaring_one_method_serves_those_that_call_it() -> None:
    """``encode_to_indices`` encodes; the quantizer between needs no declaration."""
    plain = _model().eval()
    model = fully_shard(copy.deepcopy(plain))
    register_fsdp_forward_method(model, "encode")
    assert torch.equal(model.encode_to_indices(_images()), plain.encode_to_indices(_images()))


def _gpt(declared: tuple[str, ...] = ("generate",)) -> GPT:
    """Sharded by blocks."""
    torch.manual_seed(0)
    image = Segment("image", 16, (2, 2), "sinusoidal")
    gpt = GPT(GPTConfig((image,), width=16, depth=2, num_heads=2))
    for block in gpt.blocks:
        fully_shard(block)
    fully_shard(gpt)
    for method in declared:
        register_fsdp_forward_method(gpt, method)
    return gpt


def test_a_gpt_trains_after_it_has_generated() -> None:
    """Weights that are gathered for the first time in inference mode could never be trained."""
    plain, gpt = _gpt(), _gpt()
    tokens = gpt.generate(torch.empty(2, 0, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    for model in (plain, gpt):
        model(tokens)[..., 0].sum().backward()
    pairs = zip(plain.parameters(), gpt.parameters(), strict=True)
    assert all(torch.equal(one.grad.full_tensor(), other.grad.full_tensor()) for one, other in pairs)


GPT_METHODS: dict[str, Callable[[GPT], Tensor]] = {
    "generate": lambda gpt: gpt.generate(torch.empty(2, 0, dtype=torch.int64), temperature=0),
    "losses": lambda gpt: gpt.losses(INDICES.view(1, 4))["image"],
    "log_prob": lambda gpt: gpt.log_prob(INDICES.view(1, 4)),
    "next_logits": lambda gpt: gpt.next_logits(gpt.new_cache(2)),
}


@pytest.mark.parametrize("method", GPT_METHODS)
def test_methods_of_a_gpt_on_shards_are_refused_by_name(method: str) -> None:
    """But for those that are declared, which give the same bits as without shards."""
    declared = _gpt((method,))
    gpt = _gpt(())
    names = (("the autoencoder", "the GPT"), ("autoencoder", "gpt"), ("encode_to_indices", "generate"))
    message = REFUSAL
    for name, other in names:
        message = message.replace(name, other)
    with pytest.raises(RuntimeError, match=exactly(message)):
        GPT_METHODS[method](gpt)
    plain = GPT(gpt.config)
    plain.load_state_dict(get_model_state_dict(gpt, options=StateDictOptions(full_state_dict=True)))
    assert torch.equal(GPT_METHODS[method](declared), GPT_METHODS[method](plain))


@pytest.mark.parametrize("build", [lambda: fully_shard(_model()), lambda: fully_shard(_model("ema")), _gpt])
def test_shards_are_not_saved(build: Callable[[], Any], tmp_path: Path) -> None:
    """The cure that the message names works, and gives the model that was sharded."""
    model = build()
    message = (
        "model must be whole to be saved, got shards of FSDP2; on all processes call "
        "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, load what it "
        "returns into a model without shards, and save that one."
    )
    with pytest.raises(RuntimeError, match=exactly(message)):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    # fully_shard gives the module a class of its own, derived from the first one.
    plain = type(model).__mro__[2](model.config)
    plain.load_state_dict(state)
    plain.save_pretrained(tmp_path / "model")
    again = type(plain).from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())


# Of torch's own layers; it seeds them alike all the same.
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support:UserWarning")
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_sharded_model_from_the_meta_device_starts_as_a_new_one(update: str) -> None:
    """By the method that recipes for FSDP2 call for every module that has it."""
    with torch.device("meta"):
        model = fully_shard(_model(update))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    codes = model.quantizer.codebook
    assert 0 < float((codes.full_tensor() if update == "gradient" else codes).detach().abs().max()) <= 1 / 16
    for _ in range(2):
        _train(model)
    assert all(tensor.isfinite().all() for tensor in get_model_state_dict(model).values())


def test_a_sharded_gpt_from_the_meta_device_starts_as_a_new_one() -> None:
    """With the very bits."""
    with torch.device("meta"):
        gpt = _gpt()
    gpt.to_empty(device="cpu")
    torch.manual_seed(0)
    gpt.reset_parameters()
    plain = _gpt()
    for one, other in zip(gpt.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other.full_tensor())


# Of one process it shards nothing, and says so.
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_models_train_under_fsdp1(update: str) -> None:
    """With flat parameters, the default, modules inside hold plain tensors. The first step is that without it."""
    plain, model = _model(update), _model(update)
    wrapped: Any = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    assert not list(model.decoder.parameters())
    outputs = [one(_images()) for one in (plain, wrapped)]
    for output in outputs:
        (output.loss + output.reconstruction.square().mean()).backward()
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    norms = [torch.cat([p.grad.flatten() for p in one.parameters()]).norm() for one in (plain, wrapped)]
    torch.testing.assert_close(norms[1], norms[0])
