"""Constants follow from options: exact in every dtype, on every device, and never lost with a buffer."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from te_quant import FSQ, LFQ, AutoencoderConfig, VectorQuantizer, VQAutoencoder, _constants
from te_quant.layers import (
    BlurPool2d,
    BlurUpsample2d,
    BlurUpsampleConv,
    ConvBlurPool,
    FilteredActivation,
    FourierDownsample2d,
    MaxBlurPool,
    PolynomialActivation,
    PolyphaseUpsample2d,
    PolyphaseUpsampleConv,
)
from tests.helpers import exactly

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]

SUBJECTS: dict[str, Callable[[], nn.Module]] = {
    "blur-pool": lambda: BlurPool2d(kernel_size=9),
    "blur-pool-even": lambda: BlurPool2d(kernel_size=4, padding_mode="zeros"),
    "max-blur-pool": lambda: MaxBlurPool(padding_mode="circular"),
    "conv-blur-pool": lambda: ConvBlurPool(4, padding_mode="reflect"),
    "blur-upsample": lambda: BlurUpsample2d(kernel_size=5),
    "blur-upsample-conv": lambda: BlurUpsampleConv(4, padding_mode="zeros"),
    "polyphase-upsample": lambda: PolyphaseUpsample2d(3, interpolate=True),
    "polyphase-upsample-conv": lambda: PolyphaseUpsampleConv(4, padding_mode="circular"),
    "fourier-downsample": lambda: FourierDownsample2d(2),
    "filtered-activation": lambda: FilteredActivation(),
    "polynomial-activation": lambda: PolynomialActivation(4),
    "fsq": lambda: FSQ((8, 5, 7, 2)),
    "lfq": lambda: LFQ(4),
    "lfq-groups": lambda: LFQ(4, entropy_group_dim=2),
    "autoencoder-fsq": lambda: VQAutoencoder(
        AutoencoderConfig(
            image_channels=4,
            base_channels=8,
            norm_groups=4,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            downsample="conv_blur_pool",
            upsample="blur",
            quantizer={"name": "FSQ", "levels": [8, 5, 5]},
        )
    ),
}


def _results(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Everything that ``module`` computes from the same images, as one list."""
    images = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    images = 4 * images - 2
    if getattr(module, "adaptive", False):
        return [module(images, torch.tensor([[1, 0], [0, 1]]))]
    result = module(images)
    if not isinstance(result, tuple):
        return [result]
    decoded = getattr(module, "decode_indices", getattr(module, "decode", None))
    assert decoded is not None
    return [*result, decoded(result[2] if isinstance(module, VQAutoencoder) else result.indices)]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _filled_by_to_empty(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    module = _on_meta(build).to_empty(device="cpu")
    module.load_state_dict(state)
    return module


def _assigned(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    module = _on_meta(build)
    module.load_state_dict(state, assign=True)
    return module


def _as_transformers_loads(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """Buffers that no checkpoint holds are replaced one by one, and nobody calls ``_apply``."""
    module = _assigned(build, state)
    for part in module.modules():
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers[name]
            assert buffer is not None
            part._buffers[name] = torch.full_like(buffer, 97, device="cpu")
    return module


def _cast(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    module = build().bfloat16().half().float()
    module.load_state_dict(state)
    return module


def _on_the_default_device(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    torch.set_default_device("meta")
    try:
        return _assigned(build, state)
    finally:
        torch.set_default_device(None)


def _copied(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    module = build()
    module.load_state_dict(state)
    _results(module)
    return copy.deepcopy(module)


def _pickled(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    module: nn.Module = pickle.loads(pickle.dumps(_copied(build, state)))
    return module


MOVES = {
    "meta-to-empty": _filled_by_to_empty,
    "meta-assign": _assigned,
    "transformers": _as_transformers_loads,
    "cast": _cast,
    "default-device": _on_the_default_device,
    "deepcopy": _copied,
    "pickle": _pickled,
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_results_are_bit_equal_after_a_move(name: str, move: str) -> None:
    """However a module came to be on the CPU in float32 with the same weights."""
    module = SUBJECTS[name]()
    moved = MOVES[move](SUBJECTS[name], module.state_dict())
    assert _equal(_results(moved), _results(module))
    assert _equal(_results(moved, torch.float32), _results(module))


class _WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", torch.tensor([0.1, 0.2]), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.sum() * self.taps


@pytest.mark.parametrize("move", ["transformers", "cast"])
def test_a_non_persistent_buffer_does_not_survive_the_moves(move: str) -> None:
    """The negative control of the test above."""
    assert not _equal(_results(MOVES[move](_WithBuffer, {})), _results(_WithBuffer()))


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_buffer_is_missing_from_the_state_dict(name: str) -> None:
    """A buffer that is not saved is a constant that somebody else may lose."""
    module = SUBJECTS[name]()
    assert {name for name, _ in module.named_buffers()} <= set(module.state_dict())
    assert {name for name, _ in _WithBuffer().named_buffers()} > set(_WithBuffer().state_dict())


def _binomial(size: int) -> list[Fraction]:
    return [Fraction(math.comb(size - 1, place), 2 ** (size - 1)) for place in range(size)]


def _triangle(stride: int) -> list[Fraction]:
    return [Fraction(min(place, 2 * stride - place)) for place in range(1, 2 * stride)]


def _plane(taps: list[Fraction], dtype: torch.dtype) -> Tensor:
    """Each product of few digits is exact in float64, and rounded once from there."""
    return torch.tensor([[float(row * column) for column in taps] for row in taps], dtype=torch.float64).to(dtype)


# Nine taps have products of 13 bits, more than bfloat16 and float16 hold.
FILTERS: dict[str, tuple[Callable[[], nn.Module], list[Fraction]]] = {
    "blur-pool": (lambda: BlurPool2d(kernel_size=9, stride=1, padding_mode="zeros"), _binomial(9)),
    "blur-pool-even": (lambda: BlurPool2d(kernel_size=14, stride=1, padding_mode="zeros"), _binomial(14)),
    "blur-upsample": (lambda: BlurUpsample2d(kernel_size=13, stride=1, padding_mode="zeros"), _binomial(13)),
    "polyphase-upsample": (lambda: PolyphaseUpsample2d(32, interpolate=True), _triangle(32)),
}
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda layer: layer,
    "bfloat16-float": lambda layer: layer.bfloat16().float(),
    "half-double": lambda layer: layer.half().double(),
    "within-a-model": lambda layer: nn.Sequential(layer).to(torch.bfloat16).to(torch.float32)[0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", FILTERS)
def test_response_to_an_impulse_is_the_filter_rounded_once(name: str, cast: str, dtype: torch.dtype) -> None:
    """Against exact fractions, whatever the layer was before."""
    build, taps = FILTERS[name]
    layer, size = CASTS[cast](build()), len(taps)
    if isinstance(layer, PolyphaseUpsample2d):
        # The layer divides by s², a power of two here.
        impulse = torch.zeros(1, 1, 3, 3, dtype=dtype)
        impulse[..., 1, 1] = layer.stride**2
        response = layer(impulse, torch.zeros(1, 2, dtype=torch.int64))[0, 0, 1 : size + 1, 1 : size + 1]
    else:
        impulse = torch.zeros(1, 1, size, size, dtype=dtype)
        impulse[..., size // 2, size // 2] = 1
        response = layer(impulse)[0, 0]
    assert response.dtype == dtype
    assert torch.equal(response, _plane(taps, dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [name for name in SUBJECTS if "-conv" not in name and "conv-" not in name])
def test_layer_built_under_a_half_default_dtype_takes_float32_images(name: str, dtype: torch.dtype) -> None:
    """With the result of a layer that was built in float32; quantizers are in half precision then."""
    with _default_dtype(dtype):
        module = SUBJECTS[name]()
    assert _equal(_results(module.float()), _results(SUBJECTS[name]())) or name == "autoencoder-fsq"
    if isinstance(module, FSQ | LFQ | VQAutoencoder):
        with _default_dtype(dtype):
            quantizer = getattr(SUBJECTS[name](), "quantizer", SUBJECTS[name]())
        assert quantizer.dtype == dtype


@pytest.mark.parametrize("name", SUBJECTS)
def test_results_on_a_default_device_are_on_the_device_of_the_images(name: str) -> None:
    """Even when the default device is another than that of the images."""
    module = SUBJECTS[name]()
    before = _results(module)
    _constants._shared.cache_clear()
    images, phase = torch.rand(2, 4, 12, 12), torch.zeros(2, 2, dtype=torch.int64)
    with torch.device("meta"):
        result = module(images, phase) if getattr(module, "adaptive", False) else module(images)
    assert all(tensor.device.type == "cpu" for tensor in (result if isinstance(result, tuple) else (result,)))
    assert _equal(_results(module), before)


@pytest.mark.parametrize("name", ["fsq", "lfq"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizer_without_tensors_follows_conversions(name: str, dtype: torch.dtype) -> None:
    """As a parameter would: inside a model, by every method, and in copies of it."""
    model = nn.Sequential(SUBJECTS[name]()).half().to(dtype)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    quantizer = model.to("cpu").to(memory_format=torch.channels_last).share_memory()[0]
    assert quantizer.dtype == dtype
    output = quantizer(torch.randn(2, 4, 3, 3, dtype=dtype))
    assert output.codes.dtype == dtype
    assert torch.equal(quantizer.decode(output.indices), output.codes)


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_quantizer_without_tensors_refuses_latents_of_another_dtype(name: str) -> None:
    """By name, as a quantizer with a codebook does."""
    quantizer = SUBJECTS[name]().double()
    message = "latents must be torch.float64 as the quantizer, got torch.float32; convert one of the two."
    with pytest.raises(TypeError, match=exactly(message)):
        quantizer(torch.zeros(2, 4))


@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_quantizers_without_tensors_take_the_dtypes_that_others_take(own: torch.dtype, given: torch.dtype) -> None:
    """A codebook is the oracle; float64 goes with nothing else, and float32 not into half precision."""
    quantizers = [SUBJECTS[name]().to(own) for name in ("fsq", "lfq")] + [VectorQuantizer(4, 4).to(own)]
    latents = torch.randn(2, 4).to(given)
    for quantizer in quantizers:
        if own == given or (given in (torch.float16, torch.bfloat16) and own != torch.float64):
            output = quantizer(latents)
            assert (output.quantized.dtype, output.codes.dtype) == (given, own)
        else:
            message = f"latents must be {own} as the quantizer, got {given}; convert one of the two."
            with pytest.raises(TypeError, match=exactly(message)):
                quantizer(latents)


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_quantizer_without_tensors_runs_where_the_latents_are(name: str) -> None:
    """Its device is not tracked: nothing of it is on a device."""
    quantizer = SUBJECTS[name]().eval()
    quantizer.nonfinite = "off"
    output = quantizer(torch.zeros(2, 4, 3, 3, device="meta"))
    assert {tensor.device.type for tensor in (*output, quantizer.decode(output.indices))} == {"meta"}


@pytest.mark.parametrize("name", ["fsq", "lfq", "blur-pool"])
def test_state_of_an_older_version_loads(name: str) -> None:
    """Constants were buffers that no state held."""
    assert SUBJECTS[name]().state_dict() == {}
    SUBJECTS[name]().load_state_dict({}, strict=True)


def _integers(start: int) -> list[int]:
    return [start, start + 1]


def _made(dtype: torch.dtype = torch.float32) -> Tensor:
    return _constants.constant(_integers, 3, dtype=dtype, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    _constants._shared.cache_clear()


def test_eager_calls_share_one_tensor_per_dtype() -> None:
    """Equal options give the same tensor, other dtypes another."""
    assert _made() is _made()
    assert torch.equal(_made(), torch.tensor([3.0, 4.0]))
    assert _made(torch.float64).dtype == torch.float64


def _within_fake_mode() -> None:
    with FakeTensorMode():
        assert type(_made()).__name__ == "FakeTensor"


def _within(transform: Callable[..., Any]) -> Callable[[], None]:
    def run() -> None:
        def function(values: Tensor) -> Tensor:
            return (values * _made()).sum()

        if transform is torch.func.jvp:
            transform(function, (torch.ones(2),), (torch.ones(2),))
        else:
            transform(function)(torch.ones(1, 2) if transform is torch.func.vmap else torch.ones(2))

    return run


def _within_inference_mode() -> None:
    with torch.inference_mode():
        _made()


def _within_compile() -> None:
    compiled = torch.compile(lambda values: values * _made(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(2)), torch.tensor([3.0, 4.0]))


class _Scaled(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * _made()


def _within_export(strict: bool) -> Callable[[], None]:
    def run() -> None:
        program = torch.export.export(_Scaled(), (torch.ones(2),), strict=strict)
        assert torch.equal(program.module()(torch.ones(2)), torch.tensor([3.0, 4.0]))

    return run


# Of torch's own jvp.
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(_within_fake_mode, id="fake"),
        *(
            pytest.param(_within(transform), id=transform.__name__)
            for transform in (torch.func.grad, torch.func.vmap, torch.func.jvp, torch.func.jacrev)
        ),
        pytest.param(_within_inference_mode, id="inference"),
        pytest.param(_within_compile, id="compile"),
        pytest.param(_within_export(True), id="export-strict"),
        pytest.param(_within_export(False), id="export"),
    ],
)
def test_constant_that_was_first_needed_elsewhere_is_plain_in_eager_code(first: Callable[[], None]) -> None:
    """And the constant of eager code serves elsewhere too."""
    first()
    values = _made()
    assert type(values) is Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(values)
    leaf = torch.ones(2, requires_grad=True)
    (leaf * values).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.tensor([3.0, 4.0]))
    first()


COMPILED = [name for name in SUBJECTS if name != "autoencoder-fsq"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_module_has_one_graph_and_never_recompiles(name: str) -> None:
    """One graph for the whole module, before and after eager calls; equal to eager code."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = SUBJECTS[name]()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    inputs = [torch.rand(2, 4, 12, 12) * 4 - 2]
    if getattr(module, "adaptive", False):
        inputs.append(torch.tensor([[1, 0], [0, 1]]))
    for _ in range(2):
        first, eager = compiled(*inputs), module(*inputs)
        for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (first, eager)), strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["blur-pool", "blur-upsample", "polyphase-upsample", "fsq", "lfq"])
def test_exported_module_needs_no_constant_of_this_process(name: str, strict: bool) -> None:
    """Constants are in the graph: a saved program gives the same results without the cache."""
    module = SUBJECTS[name]().eval()
    inputs: tuple[Tensor, ...] = (torch.rand(2, 4, 12, 12) * 4 - 2,)
    if getattr(module, "adaptive", False):
        inputs = (*inputs, torch.tensor([[1, 0], [0, 1]]))
    program = torch.export.export(module, inputs, strict=strict)
    _constants._shared.cache_clear()
    exported, eager = program.module()(*inputs), module(*inputs)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (exported, eager)), strict=True):
        assert torch.equal(one, other)
