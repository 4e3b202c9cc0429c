"""Every public module through every move that other systems make with a module.

A move that changes no dtype leaves the module as it was, bit for bit: its results, the gradients of its inputs,
and its state after one more training step. After a cast the module equals a fresh one of that dtype that loads the
same state, and statistics stay in float32. The modules come from the table in ``module_cases.py``.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from te_quant import (
    FSQ,
    GPT,
    LFQ,
    AutoencoderConfig,
    GPTConfig,
    ProductQuantizer,
    Quantizer,
    ResidualVectorQuantizer,
    Segment,
    SimVQ,
    VectorQuantizer,
    VQAutoencoder,
)
from te_quant.layers import ACTIVATIONS, DOWNSAMPLERS, NORMS, UPSAMPLERS
from tests.unit.module_cases import (
    CASES,
    EXEMPT,
    QUANTIZER_CASES,
    STATISTICS,
    ModuleCase,
    assert_same_bits,
    fresh,
    prepared,
    probe,
    public_modules,
    state_of,
    tensors_in,
    training_step,
)

HALF = [torch.bfloat16, torch.float16]

# (case, move or cast) -> why the two do not meet. Nothing else is left out.
SKIPS: dict[tuple[str, str], str] = {}


# -- moves that change no dtype


@contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """Fill memory that torch hands out unwritten with NaN and the largest integers, as a bad day would."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _to_cpu(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    return module.to("cpu")


def _to_empty(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    with torch.device("meta"):
        other = fresh(case)
    assert all(tensor.is_meta for tensor in _tensors_of(other))
    with _nan_in_new_memory():
        other.to_empty(device="cpu")
    other.load_state_dict(state_of(module))
    return other


def _assign(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    with _default_device("meta"):
        other = fresh(case)
    other.load_state_dict(state_of(module), assign=True)
    left = [name for name, tensor in (*other.named_parameters(), *other.named_buffers()) if tensor.is_meta]
    assert not left, f"on the meta device: {left}"
    return other


def _load(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    with torch.device("cpu"):
        other = fresh(case)
    other.load_state_dict(state_of(module))
    return other


def _checkpoint(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    torch.save(module.state_dict(), folder / "state.pt")
    other = fresh(case)
    # One that has been trained elsewhere: whatever it remembers of that must go.
    training_step(other.train(), case.example(99), seed=99)
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return other


def _safetensors(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(module.state_dict(), folder / "model.safetensors")
    other = fresh(case)
    other.load_state_dict(safetensors.load_file(folder / "model.safetensors"))
    return other


def _deepcopy(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(module)


def _pickle(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _whole_file(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _averaged(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    averaged = AveragedModel(prepared(case, steps=1))
    averaged.update_parameters(module)
    return averaged.module


def _requires_grad(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    return module.requires_grad_(False).requires_grad_(True)


def _freeze_and_thaw(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    for part in module.modules():
        if isinstance(part, Quantizer):
            part.freeze().freeze(False)
    return module


def _lost_buffers(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    kept = state_of(module)
    for name, buffer in module.named_buffers():
        if name not in kept:
            buffer.fill_(torch.nan if buffer.is_floating_point() else -1)
    return module


def _pretrained(case: ModuleCase, module: nn.Module, folder: Path) -> nn.Module:
    pytest.importorskip("safetensors")
    module.save_pretrained(folder)
    return type(module).from_pretrained(folder)


def _host_class() -> Any:
    """A model of the transformers library around a module of the table."""
    transformers = pytest.importorskip("transformers")

    class HostConfig(transformers.PretrainedConfig):
        model_type = "host"

    class Host(transformers.PreTrainedModel):
        config_class = HostConfig

        def __init__(self, config: HostConfig, case: ModuleCase) -> None:
            super().__init__(config)
            # A file without a tensor is refused.
            self.head = nn.Linear(2, 2)
            self.inner = fresh(case, seed=998)
            self.post_init()

    return Host, HostConfig


def _transformers(case: ModuleCase, module: nn.Module, folder: Path, **options: Any) -> nn.Module:
    Host, HostConfig = _host_class()
    host = Host(HostConfig(), case)
    host.inner = module
    host.save_pretrained(folder)
    with _nan_in_new_memory():
        return Host.from_pretrained(folder, case=case, **options).inner


# -- modules that do not survive


class LosesItsConstant(nn.Module):
    """A random constant that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("constant", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.weight * self.constant


class LosesItsConstantOnDisk(VQAutoencoder):
    """The same in a model that has its own files."""

    def __init__(self, config: AutoencoderConfig, *, quantizer: Quantizer | None = None) -> None:
        super().__init__(config, quantizer=quantizer)
        self.register_buffer("constant", torch.randn(()), persistent=False)

    def forward(self, images: Tensor, **options: Any) -> Any:
        """Multiply."""
        return super().forward(images * self.constant, **options)


class ForgetsWhenCopied(nn.Module):
    """A constant that is no buffer, and that every copy changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.constant = torch.randn(3)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.weight * self.constant

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Change the constant."""
        super().__setstate__(state)
        self.constant = self.constant + 1


class ForgetsWhenMoved(LosesItsConstant):
    """Every call of ``to`` draws another constant."""

    def _apply(self, *args: Any, **options: Any) -> ForgetsWhenMoved:
        super()._apply(*args, **options)
        self.constant = torch.randn(3)
        return self


class CountsInAParameter(nn.Module):
    """A statistic kept as a parameter without gradient, which whoever toggles ``requires_grad`` sets free."""

    def __init__(self) -> None:
        super().__init__()
        self.statistic = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.statistic


class FreezesForGood(Quantizer):
    """Thawing does not undo freezing."""

    def __init__(self) -> None:
        super().__init__(num_codes=1, code_dim=3)
        self.code = nn.Parameter(torch.ones(3))

    def freeze(self, frozen: bool = True) -> FreezesForGood:
        """Stop all gradients."""
        self.code.requires_grad_(False)
        return self

    def search(self, rows: Any) -> Tensor:
        """Return the only index."""
        return torch.zeros(len(rows.searchable), dtype=torch.int64)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the only code."""
        return self.code.expand(*indices.shape, 3)

    def quantize(self, rows: Any, generator: torch.Generator | None) -> Any:
        """Return the codes with a gradient to the only code."""
        result = super().quantize(rows, generator)
        return result._replace(surrogate=result.codes)


def broken(kind: Callable[[], nn.Module]) -> ModuleCase:
    """A case of the table around a module that must not pass."""
    return ModuleCase(kind, lambda: (torch.randn(4, 3),), ())


_BROKEN_ON_DISK = ModuleCase(
    lambda: LosesItsConstantOnDisk(
        AutoencoderConfig(base_channels=2, channel_multipliers=(1,), num_codes=3, code_dim=2)
    ),
    lambda: (torch.randn(2, 3, 4, 4),),
    (),
)


@dataclass(frozen=True)
class Move:
    """A move that changes no dtype.

    Attributes:
        make: the module after it.
        control: a case that must fail it.
        needs: the method without which a module cannot make it.
        slow: whether the fast suite leaves it out.
    """

    make: Callable[[ModuleCase, nn.Module, Path], nn.Module]
    control: ModuleCase
    needs: str | None = None
    slow: bool = False


_LOST = broken(LosesItsConstant)
_COPIED = broken(ForgetsWhenCopied)
MOVES: dict[str, Move] = {
    "to-cpu": Move(_to_cpu, broken(ForgetsWhenMoved), slow=True),
    "to-empty": Move(_to_empty, _LOST),
    "assign": Move(_assign, _LOST),
    "load": Move(_load, _LOST, slow=True),
    "checkpoint": Move(_checkpoint, _LOST, slow=True),
    "safetensors": Move(_safetensors, _LOST, slow=True),
    "deepcopy": Move(_deepcopy, _COPIED, slow=True),
    "pickle": Move(_pickle, _COPIED, slow=True),
    "torch.save": Move(_whole_file, _COPIED, slow=True),
    "averaged": Move(_averaged, _COPIED, slow=True),
    "requires-grad": Move(_requires_grad, broken(CountsInAParameter)),
    "freeze-and-thaw": Move(_freeze_and_thaw, broken(FreezesForGood), slow=True),
    "lost-buffers": Move(_lost_buffers, _LOST),
    "pretrained": Move(_pretrained, _BROKEN_ON_DISK, needs="save_pretrained"),
    "transformers": Move(_transformers, _LOST, slow=True),
}


@functools.cache
def untouched(case: ModuleCase) -> dict[str, Tensor]:
    """What the module of a case does when nothing moves it."""
    return probe(case, prepared(case))


def walk(case: ModuleCase, move: Move, folder: Path) -> None:
    """Assert that the module survives the move."""
    moved = move.make(case, prepared(case), folder)
    assert_same_bits(probe(case, moved), untouched(case))


_LONG = ("to-cpu", "deepcopy", "torch.save", "checkpoint", "cast-in-a-model")


def _cases() -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if case.slow else []) for name, case in CASES.items()]


def _pairs(
    others: dict[str, Any], *, slow: Callable[[str], bool], meet: Callable[[ModuleCase, str], bool]
) -> list[Any]:
    pairs = []
    for other in others:
        for name, case in CASES.items():
            if meet(case, other):
                marks = [pytest.mark.slow] if case.slow or slow(other) else []
                # Much as another move or cast that stays: state_dict, copies, conversions.
                marks = [pytest.mark.long] if other in _LONG else marks
                if (name, other) in SKIPS:
                    marks.append(pytest.mark.skip(reason=SKIPS[name, other]))
                pairs.append(pytest.param(name, other, marks=marks, id=f"{other}-{name}"))
    return pairs


def _fits(case: ModuleCase, move: str) -> bool:
    # The layers of the table have no files of their own, by their public interface.
    needs = MOVES[move].needs
    return needs is None or any(hasattr(kind, needs) for kind in case.kinds)


@pytest.mark.parametrize(("name", "move"), _pairs(MOVES, slow=lambda move: MOVES[move].slow, meet=_fits))
def test_nothing_changes(name: str, move: str, tmp_path: Path) -> None:
    """Results, gradients and state are those of the module that was not moved."""
    walk(CASES[name], MOVES[move], tmp_path)


@pytest.mark.parametrize(
    "move", [pytest.param(name, marks=[pytest.mark.slow] if move.slow else []) for name, move in MOVES.items()]
)
def test_the_walk_finds_a_module_that_does_not_survive(move: str, tmp_path: Path) -> None:
    """The negative control of each move."""
    with pytest.raises(AssertionError, match=r"differs|on the meta device"):
        walk(MOVES[move].control, MOVES[move], tmp_path)


def test_no_public_module_is_missing_from_the_table() -> None:
    """Every class of a module that the package exports has a case, or a reason to have none."""
    covered = {kind for case in CASES.values() for kind in case.kinds} | set(EXEMPT)
    assert not {kind.__name__ for kind in public_modules()} - {kind.__name__ for kind in covered}


def test_every_skip_names_a_case_a_move_and_a_reason() -> None:
    """A skip of something that no longer exists would hide nothing, but mislead."""
    for (name, other), reason in SKIPS.items():
        assert name in CASES
        assert other in {*MOVES, *CASTS}
        assert reason


@pytest.mark.parametrize("name", CASES)
def test_the_state_dict_holds_every_buffer(name: str) -> None:
    """What no checkpoint holds, no checkpoint restores."""
    module = fresh(CASES[name])
    assert {key for key, _ in module.named_buffers()} <= set(module.state_dict())


@pytest.mark.parametrize("name", QUANTIZER_CASES)
def test_prepared_quantizers_hold_statistics_that_are_not_yet_applied(name: str) -> None:
    """So the walk carries them through every move."""
    pending = {key: value for key, value in state_of(prepared(CASES[name])).items() if "pending" in key}
    assert bool(pending) == any(hasattr(part, "usage") for part in fresh(CASES[name]).modules())
    assert all(value.any() for key, value in pending.items() if "draw" not in key)


# -- another default device


class StaysBehind(nn.Module):
    """A constant that is always made on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * torch.ones(3, device="cpu")


class OneDevice(TorchDispatchMode):
    """Refuse every operator that makes, or mixes in, a tensor of another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what goes in and what comes out; a single number may come from the CPU."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.ndim:
                assert tensor.device.type == self.device, f"{func} has a tensor on {tensor.device}"
        return result


def _computes_on_meta(case: ModuleCase, build: Callable[[], nn.Module]) -> None:
    # The meta device checks no values, as an accelerator does not, and needs none to be there.
    module = build()
    assert all(tensor.is_meta for tensor in _tensors_of(module))
    with torch.device("meta"):
        inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in case.inputs())
    for training in (True, False):
        with OneDevice("meta"):
            results = tensors_in(module.train(training)(*inputs))
            differentiable = [result.sum() for result in results if result.requires_grad]
            if differentiable:
                torch.stack(differentiable).sum().backward()
        assert all(result.is_meta for result in results)


def _built_by_default(case: ModuleCase) -> nn.Module:
    with _default_device("meta"):
        return case.build()


def _built_in_context(case: ModuleCase) -> nn.Module:
    with torch.device("meta"):
        return case.build()


def _sent(case: ModuleCase) -> nn.Module:
    return prepared(case, steps=1).to("meta")


ARRIVALS = {"default": _built_by_default, "context": _built_in_context, "to": _sent}
_ARRIVALS = [
    "default",
    pytest.param("context", marks=pytest.mark.slow),
    pytest.param("to", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("arrive", _ARRIVALS)
@pytest.mark.parametrize("name", _cases())
def test_everything_is_on_the_device_of_the_module(name: str, arrive: str) -> None:
    """Parameters, buffers, and constants that are made during a step and its backward pass."""
    case = CASES[name]
    _computes_on_meta(case, lambda: ARRIVALS[arrive](case))


@pytest.mark.parametrize("arrive", _ARRIVALS)
def test_a_constant_on_the_cpu_is_found(arrive: str) -> None:
    """The negative control."""
    case = broken(StaysBehind)
    with pytest.raises(AssertionError, match="has a tensor on cpu"):
        _computes_on_meta(case, lambda: ARRIVALS[arrive](case))


# -- casts


def _cast(case: ModuleCase, module: nn.Module, dtype: torch.dtype, folder: Path) -> nn.Module:
    return module.to(dtype)


def _cast_in_a_model(case: ModuleCase, module: nn.Module, dtype: torch.dtype, folder: Path) -> nn.Module:
    model = nn.Sequential(module)
    return {torch.bfloat16: model.bfloat16, torch.float16: model.half, torch.float64: model.double}[dtype]()[0]


def _built_in(case: ModuleCase, module: nn.Module, dtype: torch.dtype, folder: Path) -> nn.Module:
    with _default_dtype(dtype):
        # Not the seed of the reference: a constant that both lose would be equal by chance.
        other = fresh(case, seed=998)
    other.load_state_dict(state_of(module))
    return other


def _pretrained_as(case: ModuleCase, module: nn.Module, dtype: torch.dtype, folder: Path) -> nn.Module:
    pytest.importorskip("safetensors")
    module.save_pretrained(folder)
    return type(module).from_pretrained(folder, dtype=dtype)


def _transformers_as(case: ModuleCase, module: nn.Module, dtype: torch.dtype, folder: Path) -> nn.Module:
    return _transformers(case, module, folder, dtype=dtype)


@dataclass(frozen=True)
class Cast:
    """A way to another dtype.

    Attributes:
        make: the module after it.
        control: a case that must fail it.
        needs: the method without which a module cannot take it.
        slow: whether the fast suite leaves it out.
        applies: whether it applies pending statistics first, in the dtype before.
    """

    make: Callable[[ModuleCase, nn.Module, torch.dtype, Path], nn.Module]
    control: ModuleCase
    needs: str | None = None
    slow: bool = False
    applies: bool = False


CASTS: dict[str, Cast] = {
    "cast": Cast(_cast, _LOST),
    "cast-in-a-model": Cast(_cast_in_a_model, _LOST, slow=True),
    "default-dtype": Cast(_built_in, _LOST, slow=True),
    "pretrained-dtype": Cast(_pretrained_as, _BROKEN_ON_DISK, needs="save_pretrained", slow=True, applies=True),
    "transformers-dtype": Cast(_transformers_as, _LOST, slow=True),
}


@functools.cache
def fresh_of(case: ModuleCase, dtype: torch.dtype, applied: bool) -> dict[str, Tensor]:
    """What a fresh module of the dtype does that loads the state of the prepared one."""
    source = prepared(case)
    for part in source.modules():
        if applied and isinstance(part, Quantizer):
            part.apply_pending()
    module = fresh(case).to(dtype)
    module.load_state_dict(state_of(source))
    return probe(case, module, dtype)


def cast_and_compare(case: ModuleCase, cast: Cast, dtype: torch.dtype, folder: Path) -> None:
    """Assert that the module becomes what a fresh one of the dtype is."""
    moved = cast.make(case, prepared(case), dtype, folder)
    if dtype in HALF:
        wrong = {
            name: value.dtype
            for name, value in state_of(moved).items()
            if name.rpartition(".")[2] in STATISTICS and value.dtype != torch.float32
        }
        assert not wrong, f"statistics in half precision: {wrong}"
    assert_same_bits(probe(case, moved, dtype), fresh_of(case, dtype, cast.applies))


def _casts(case: ModuleCase, cast: str) -> bool:
    needs = CASTS[cast].needs
    return needs is None or any(hasattr(kind, needs) for kind in case.kinds)


@pytest.mark.parametrize(("name", "cast"), _pairs(CASTS, slow=lambda cast: CASTS[cast].slow, meet=_casts))
def test_a_cast_gives_a_fresh_module_of_that_dtype(name: str, cast: str, tmp_path: Path) -> None:
    """Constants are rounded once, from their exact values; statistics not at all."""
    cast_and_compare(CASES[name], CASTS[cast], torch.bfloat16, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("name", "cast"), _pairs({"cast": None, "default-dtype": None}, slow=lambda cast: True, meet=_casts)
)
def test_a_cast_to_another_dtype(name: str, cast: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same for the other dtypes."""
    cast_and_compare(CASES[name], CASTS[cast], dtype, tmp_path)


@pytest.mark.parametrize(
    "cast", [pytest.param(name, marks=[pytest.mark.slow] if cast.slow else []) for name, cast in CASTS.items()]
)
def test_a_cast_finds_a_constant_that_is_lost(cast: str, tmp_path: Path) -> None:
    """The negative control of each cast."""
    with pytest.raises(AssertionError, match=r"training, tensor \d: differs"):
        cast_and_compare(CASTS[cast].control, CASTS[cast], torch.bfloat16, tmp_path)


class CountsInHalf(nn.Module):
    """A statistic that is cast with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("usage", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.usage.to(x.dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_a_cast_finds_a_statistic_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match="statistics in half precision"):
        cast_and_compare(broken(CountsInHalf), CASTS["cast"], dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", _cases())
def test_a_cast_there_and_back_rounds_nothing_but_the_weights(name: str, dtype: torch.dtype) -> None:
    """The module is a fresh one in float32 that loads the rounded weights."""
    case = CASES[name]
    half = prepared(case).to(dtype)
    other = fresh(case)
    other.load_state_dict(state_of(half))
    assert_same_bits(probe(case, half.float()), probe(case, other))


# -- weights that are averaged, and codebooks that are frozen


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZER_CASES)
def test_averaged_weights_have_the_mean_of_the_parameters_and_the_last_buffers(name: str) -> None:
    """A moving-average codebook is an average already, and its statistics belong to it."""
    case = CASES[name]
    module = prepared(case)
    # torch averages no model without parameters.
    model = nn.ModuleDict({"quantizer": module, "head": nn.Linear(2, 2)})
    averaged = AveragedModel(model)
    seen = []
    for step in range(3):
        training_step(module, case.example(step), seed=step)
        averaged.update_parameters(model)
        seen.append({key: value.detach().clone() for key, value in model.named_parameters()})
    for key, value in averaged.module.named_parameters():
        mean = torch.stack([state[key].double() for state in seen]).mean(0)
        torch.testing.assert_close(value.detach(), mean.float(), rtol=1e-5, atol=1e-7)
    for (key, value), other in zip(averaged.module.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", QUANTIZER_CASES)
def test_frozen_is_frozen_whoever_toggles_gradients(name: str) -> None:
    """As those do who train a discriminator in turn."""
    case = CASES[name]
    quantizer = prepared(case)
    model = nn.Sequential(quantizer)
    quantizer.freeze()
    before = state_of(quantizer)
    model.requires_grad_(False)
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.requires_grad = True
    for step in range(2):
        training_step(model, case.example(step), seed=step, rate=1.0)
    assert_same_bits(state_of(quantizer), before)


def test_averaged_buffers_are_those_of_one_codebook() -> None:
    """With ``use_buffers`` sums and counts are averaged; ``eval()`` makes codes of them, not their own average."""
    quantizer = VectorQuantizer(8, 4)
    averaged = AveragedModel(quantizer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(20):
        quantizer(torch.randn(100, 4))
        averaged.update_parameters(quantizer)
    one: Any = averaged.module
    mean = one.codebook.clone()
    share = 1 - one.decay
    usage = one.usage.lerp(one.pending_counts, share)
    sums = one.code_sums.lerp(one.pending_sums, share)
    averaged.eval()
    torch.testing.assert_close(one.codebook, sums / usage.unsqueeze(1), rtol=1e-4, atol=1e-5)
    assert (one.codebook - mean).abs().max() > 1e-3


STARTS: dict[str, Callable[[], nn.Module]] = {
    "vq": lambda: VectorQuantizer(7, 3),
    "vq-gradient": lambda: VectorQuantizer(7, 3, codebook_update="gradient"),
    "vq-cosine": lambda: VectorQuantizer(7, 3, metric="cosine", revival_threshold=0.0),
    "vq-subset": lambda: VectorQuantizer(7, 3, orthogonal_reg=1.0, orthogonal_max_codes=2),
    "rvq": lambda: ResidualVectorQuantizer(7, 3, 2),
    "rvq-shared": lambda: ResidualVectorQuantizer(7, 3, 2, shared_codebook=True),
    "nested": lambda: ProductQuantizer([ResidualVectorQuantizer(stages=[SimVQ(7, 2), LFQ(2)]), FSQ((3, 3))]),
    "fsq": lambda: FSQ((3, 3, 5)),
    "gpt": lambda: GPT(
        GPTConfig(
            (Segment("text", 5, (4,), "learned", pad_token=0), Segment("image", 7, (2, 2), "axial")), 16, 1, 2
        )
    ),
    "gpt-sinusoidal": lambda: GPT(GPTConfig((Segment("image", 7, (2, 2), "sinusoidal"),), 16, 1, 2)),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_module_from_the_meta_device_may_be_reset(name: str) -> None:
    """``reset_parameters`` gives the bits of a new module; what ``to_empty`` gives (the control) has none."""
    with torch.device("meta"):
        module = STARTS[name]()
    with _nan_in_new_memory():
        module.to_empty(device="cpu")
    empty = [tensor for tensor in _tensors_of(module) if tensor.is_floating_point()]
    assert all(tensor.isnan().any() for tensor in empty)
    torch.manual_seed(0)
    for part in [module] if isinstance(module, GPT) else module.modules():
        if isinstance(part, GPT | Quantizer):
            part.reset_parameters()
    torch.manual_seed(0)
    assert_same_bits(state_of(module), state_of(STARTS[name]()))


# What a config offers for each of these, the others being the default.
LAYERS = [
    *({"activation": each} for each in ACTIVATIONS),
    *({"norm": each} for each in NORMS),
    *({"downsample": each} for each in DOWNSAMPLERS if each != "polyphase"),
    *({"upsample": each} for each in UPSAMPLERS if each != "polyphase"),
    {"downsample": "polyphase", "upsample": "polyphase"},
]


@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(map(str, options.values())))
def test_an_autoencoder_from_the_meta_device_may_be_reset(options: dict[str, Any]) -> None:
    """Whatever it is made of, the recipe of the page on FSDP2 leaves no value undefined."""
    circular = {"encoder_padding": "circular", "decoder_padding": "circular"}
    config = AutoencoderConfig(base_channels=8, code_dim=4, num_codes=32, **circular, **options)
    with torch.device("meta"):
        model = VQAutoencoder(config)
    with _nan_in_new_memory():
        model.to_empty(device="cpu")
    names = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(tensor.isnan().all() for tensor in names.values() if tensor.is_floating_point())
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not [name for name, tensor in names.items() if not tensor.isfinite().all()]
    new = VQAutoencoder(config).state_dict()
    for name, tensor in names.items():
        assert "coefficients" not in name or torch.equal(tensor, new[name])
