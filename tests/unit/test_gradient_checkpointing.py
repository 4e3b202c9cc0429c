"""Blocks of the autoencoder that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant import AutoencoderConfig, VQAutoencoder
from te_quant.layers import ResidualBlock, SelfAttention2d


def _model(**options: Any) -> VQAutoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        base_channels=8,
        norm_groups=4,
        channel_multipliers=(1, 2),
        attention_levels=(1,),
        num_res_blocks=1,
        **{"num_codes": 16, "code_dim": 4, **options},
    )
    return VQAutoencoder(config)


def _images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _trained(model: VQAutoencoder, enabled: bool, run: Any = None) -> list[Tensor]:
    """Everything that two training steps change or return."""
    model.gradient_checkpointing = enabled
    torch.manual_seed(2)
    results = []
    for _ in range(2):
        output = (model if run is None else run)(_images())
        (output.loss + (output.reconstruction - _images()).square().mean()).backward()
        results += [output.reconstruction.detach(), output.indices, output.loss.detach()]
    return [*results, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "ema": {"codebook_update": "ema"},
    "polyphase": {"downsample": "polyphase", "upsample": "polyphase", "encoder_padding": "circular"},
    "blur": {"downsample": "conv_blur_pool", "upsample": "blur"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_bit_equal_with_checkpointed_blocks(name: str) -> None:
    """And so are results and buffers, over two steps; dropout draws the same numbers again."""
    model = _model(**OPTIONS[name])
    without = _trained(copy.deepcopy(model), False)
    within = _trained(copy.deepcopy(model), True)
    assert len(without) > 50
    assert all(torch.equal(one, other) for one, other in zip(within, without, strict=True))


def _saved_bytes(model: VQAutoencoder) -> int:
    """Bytes of the distinct storages that autograd holds between forward and backward, besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(_images())
    assert output.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_checkpointed_blocks_keep_fewer_bytes_for_the_backward_pass() -> None:
    """Less than half; without gradients nothing is kept either way, and switching off restores the bytes."""
    model = _model()
    kept = _saved_bytes(model)
    model.gradient_checkpointing = True
    assert 0 < _saved_bytes(model) < 0.5 * kept
    model.gradient_checkpointing = False
    assert _saved_bytes(model) == kept


def _calls(model: VQAutoencoder) -> Counter[str]:
    """How often each layer began to run in one training step."""
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    output = model(_images())
    (output.loss + output.reconstruction.square().mean()).backward()
    return counts


def test_every_residual_and_attention_block_is_computed_twice_and_nothing_else() -> None:
    """In encoder, decoder and both middles; resampling and the first and last layers run once."""
    model = _model()
    blocks = [
        name for name, module in model.named_modules() if isinstance(module, ResidualBlock | SelfAttention2d)
    ]
    assert {_calls(copy.deepcopy(model))[name] for name in blocks} == {1}
    model.gradient_checkpointing = True
    counts = _calls(model)
    assert {counts[name] for name in blocks} == {2}
    outside = [name for name in counts if not name.startswith(tuple(blocks))]
    assert {counts[name] for name in outside} == {1}
    assert any("downsample" in name for name in outside)


def test_no_block_is_checkpointed_without_gradients() -> None:
    """Generation pays nothing for the switch."""
    model = _model().eval()
    model.gradient_checkpointing = True
    with torch.no_grad():
        expected = model(_images()).reconstruction
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("te_quant.autoencoder.coders.checkpoint", None)
        assert torch.equal(model(_images()).reconstruction, expected)


@pytest.mark.slow
def test_compiled_model_checkpoints_its_blocks() -> None:
    """In one graph, with the gradients of the compiled model without."""
    results = []
    for enabled in (False, True):
        torch.compiler.reset()
        model = _model()
        results.append(_trained(model, enabled, torch.compile(model, fullgraph=True, backend="aot_eager")))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
def test_exported_model_has_no_checkpoints(strict: bool) -> None:
    """A program for inference has no backward pass."""
    model = _model().eval()
    model.gradient_checkpointing = True
    program = torch.export.export(model, (_images(),), strict=strict)
    assert not [node for node in program.graph.nodes if "checkpoint" in str(node.target)]
    torch.testing.assert_close(program.module()(_images()).reconstruction, model(_images()).reconstruction)


def test_switch_is_no_state() -> None:
    """It is off by default, belongs to the object and its copies, and neither config nor checkpoint holds it."""
    model = _model()
    assert model.gradient_checkpointing is False
    config, keys = model.config.to_dict(), list(model.state_dict())
    model.gradient_checkpointing = True
    assert (model.config.to_dict(), list(model.state_dict())) == (config, keys)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert duplicate.gradient_checkpointing is True
    assert VQAutoencoder(model.config).gradient_checkpointing is False


def test_switch_must_be_a_bool() -> None:
    """A string would count as true."""
    with pytest.raises(TypeError, match=r"^gradient_checkpointing must be a bool, got 'no'\.$"):
        _model().gradient_checkpointing = "no"  # type: ignore[assignment]


def test_libraries_that_look_for_the_attribute_switch_it_on() -> None:
    """As transformers and diffusers do: every module that has it, with a function that is not used here."""
    model = nn.Sequential(_model())
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module._gradient_checkpointing_func = None  # type: ignore[assignment]
            module.gradient_checkpointing = True  # type: ignore[assignment]
    assert model[0].gradient_checkpointing is True
    assert model[0](_images()).loss.requires_grad
