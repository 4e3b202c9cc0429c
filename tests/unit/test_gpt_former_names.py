"""Weights that older versions of the library wrote, under the names that their layers had then."""

from __future__ import annotations

import pytest
import torch
from gpt_oracles import BOTH, build, draw
from safetensors import safe_open
from torch import Tensor, nn

from te_quant.gpt import GPT, with_present_names
from tests.golden_files import GOLDEN


def former(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that the code before the renaming would have given."""
    return {name.replace(".up.", ".expand.").replace(".down.", ".contract."): v for name, v in state.items()}


def test_an_old_state_dict_loads_and_gives_the_same_logits() -> None:
    """Strictly, and without a change to the caller's dictionary."""
    torch.manual_seed(0)
    gpt, other = build(), build()
    old = former(gpt.state_dict())
    names = list(old)
    other.load_state_dict(old)
    tokens = draw(BOTH, 2, 17)
    assert torch.equal(other(tokens), gpt(tokens))
    assert list(old) == names


def test_an_old_state_dict_loads_into_a_module_that_contains_the_gpt() -> None:
    """The prefix does not matter."""
    wrapped, other = nn.ModuleDict({"inner": GPT(BOTH)}), nn.ModuleDict({"inner": GPT(BOTH)})
    other.load_state_dict(former(wrapped.state_dict()))
    for name, tensor in wrapped.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_unknown_names_are_still_refused() -> None:
    """Negative control: only the two former names are known."""
    state = {name.replace(".up.", ".upward."): tensor for name, tensor in GPT(BOTH).state_dict().items()}
    with pytest.raises(RuntimeError, match=r"blocks\.0\.upward\.weight"):
        GPT(BOTH).load_state_dict(state)


def test_golden_weights_have_former_names_and_load() -> None:
    """Every tensor of the file is in the model, under its present name."""
    with safe_open(GOLDEN / "gpt/model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert any(".contract." in name for name in stored)
    loaded = GPT.from_pretrained(GOLDEN / "gpt").state_dict()
    assert not any(".contract." in name or ".expand." in name for name in loaded)
    present = with_present_names(stored)
    assert present.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in present.items())


@pytest.mark.parametrize(
    "name", ["contract.weight", "myblocks.0.contract.weight", "blocks.0.contraction.weight", "blocks.contract.x"]
)
def test_other_names_are_kept(name: str) -> None:
    """A name is only changed where it is that of a layer of a block."""
    assert with_present_names({name: 1}) == {name: 1}
