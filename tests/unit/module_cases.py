"""One table of every public module, and how a test trains and compares them.

A new public module joins the walks of ``test_state_moves.py`` and ``tests/distributed/test_engines.py`` by one
line here; ``test_state_moves.py`` fails while the line is missing.

Shape letters: B batch, C channels, H W pixels, T tokens.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_quant
from te_quant import (
    GPT,
    AutoencoderConfig,
    BlurPool2d,
    CodebookUsage,
    GPTConfig,
    ProductQuantizer,
    Quantizer,
    Segment,
    TokenStability,
    VQAutoencoder,
    build_decoder,
    build_encoder,
    layers,
)
from tests.helpers import plain_quantizer
from tests.unit.quantizer_cases import QUANTIZERS, is_random

__all__ = [
    "CASES",
    "EXEMPT",
    "OTHER_SEED",
    "QUANTIZER_CASES",
    "STATISTICS",
    "ModuleCase",
    "assert_same_bits",
    "descend",
    "fresh",
    "loss_of",
    "prepared",
    "probe",
    "public_modules",
    "state_of",
    "tensors_in",
    "training_step",
]

STATISTICS = ("usage", "code_sums", "pending_counts", "pending_sums")
"""Buffers that stay in float32 whatever the module is cast to."""

OTHER_SEED = 999
"""Of a module whose weights are about to be replaced: none of its random values may survive."""

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class ModuleCase:
    """One public module.

    Attributes:
        build: makes it from the global random state.
        inputs: what its forward takes, drawn from the global random state; (B,) first.
        kinds: the public classes that it exercises.
        random: whether a training step draws anything.
        batched: whether the batch may be divided among processes.
        slow: whether the fast suite leaves it out.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    kinds: tuple[type, ...]
    random: bool = False
    batched: bool = True
    slow: bool = False

    def example(self, step: int, dtype: torch.dtype = torch.float32) -> Inputs:
        """Return the inputs of a step: the same in every process, floating ones as leaves with a gradient."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + step)
            drawn = self.inputs()
        return tuple(x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in drawn)


class Sign(Quantizer):
    """A stranger's quantizer: the signs of three channels, nothing learnt or remembered."""

    def __init__(self) -> None:
        super().__init__(num_codes=8, code_dim=3)

    def search(self, rows: Any) -> Tensor:
        """Return the index of each row."""
        places = torch.arange(self.code_dim, device=rows.searchable.device)
        return ((rows.searchable > 0) * 2**places).sum(1)

    def look_up(self, indices: Tensor) -> Tensor:
        """Return the codes."""
        places = torch.arange(self.code_dim, device=indices.device)
        return (indices.unsqueeze(-1) >> places & 1) * 2.0 - 1


def _images(channels: int = 4, side: int = 8) -> Callable[[], Inputs]:
    return lambda: (torch.randn(4, channels, side, side),)


def _with_phase(channels: int = 4, side: int = 4) -> Callable[[], Inputs]:
    return lambda: (torch.randn(4, channels, side, side), torch.randint(2, (4, 2)))


def _quantizer(build: Callable[..., Any], **options: Any) -> ModuleCase:
    built = build()

    # On a grid, so that a layout is lost if a move can lose one.
    def inputs() -> Inputs:
        return (torch.randn(4, built.code_dim, 3, 4),)

    kind = Quantizer if isinstance(built, Sign) else type(built)
    return ModuleCase(build, inputs, (kind,), random=is_random(built), **options)


_TINY: dict[str, Any] = {
    "image_channels": 1,
    "base_channels": 4,
    "channel_multipliers": (1, 2),
    "norm_groups": 2,
}
_CODES: dict[str, Any] = {"num_codes": 7, "code_dim": 3}
# Which latents replace dead codes depends on how they are spread over processes and micro-batches.
_PLAIN: dict[str, Any] = {
    "codebook_update": "gradient",
    "commitment_weight": 0.25,
    "decay": 0.99,
    "revival_threshold": 0.0,
}
_CIRCULAR = {"encoder_padding": "circular", "decoder_padding": "circular"}


def _autoencoder(*, slow: bool = False, **options: Any) -> ModuleCase:
    config = AutoencoderConfig(**{**_TINY, **({} if "quantizer" in options else {**_CODES, **_PLAIN}), **options})
    return ModuleCase(
        partial(VQAutoencoder, config), lambda: (torch.rand(4, 1, 8, 8) * 2 - 1,), (VQAutoencoder,), slow=slow
    )


def _gpt(positions: str, **options: Any) -> ModuleCase:
    # One vocabulary size: no logit is infinite.
    text = Segment("text", 5, (3,), "learned", pad_token=options.pop("pad_token", None))
    image = Segment("image", 5, (2, 2), positions)
    config = GPTConfig((text, image), width=8, depth=1, num_heads=2, **options)
    return ModuleCase(partial(GPT, config), lambda: (torch.randint(5, (4, 7)),), (GPT,), random=config.dropout > 0)


def _layer(kind: type, *args: Any, inputs: Callable[[], Inputs] | None = None, **options: Any) -> ModuleCase:
    return ModuleCase(partial(kind, *args, **options), inputs or _images(), (kind,))


_VQ = partial(plain_quantizer, 11, 6)
# What the conformance table has no need of: options that add to what is remembered.
_MORE_QUANTIZERS: dict[str, Callable[..., Any]] = {
    "vq-subset": partial(_VQ, orthogonal_reg=10.0, orthogonal_max_codes=5),
    "vq-cosine-subset": partial(_VQ, metric="cosine", orthogonal_reg=1.0, orthogonal_max_codes=5),
    "vq-ema-max-codes": partial(
        _VQ, codebook_update="ema", orthogonal_reg=10.0, orthogonal_max_codes=5, decay=0.5
    ),
    "vq-ema-cosine-subset": partial(
        _VQ, codebook_update="ema", metric="cosine", orthogonal_reg=1.0, orthogonal_max_codes=5, decay=0.5
    ),
    "vq-ema-fast": partial(_VQ, codebook_update="ema", decay=0.5),
    "vq-ema-instant": partial(_VQ, codebook_update="ema", decay=0.0),
    "sign": Sign,
    "product": lambda: ProductQuantizer([plain_quantizer(11, 3), plain_quantizer(7, 2, codebook_update="ema")]),
}
# Those differ from a case that is kept in what they compute, not in what they remember.
_SLOW_QUANTIZERS = {
    "fsq-even",
    "fsq-skip",
    "lfq-one-channel",
    "lfq-plain",
    "lfq-skip",
    "lfq-sure",
    "rvq-one-step",
    "rvq-skip-dropout",
    "sim-fresh",
    "sim-one-channel",
    "sim-skip",
    "sim-wide",
    "vq-cosine-subset",
    "vq-cosine-rotation",
    "vq-ema-instant",
    "vq-ema-cosine-penalty",
    "vq-one-channel",
    "vq-one-code",
    "vq-rotation",
    "vq-skip",
}

QUANTIZER_CASES: dict[str, ModuleCase] = {
    name: _quantizer(build, slow=name in _SLOW_QUANTIZERS)
    for name, build in {**QUANTIZERS, **_MORE_QUANTIZERS}.items()
}

_DOWN: dict[str, ModuleCase] = {
    "strided-conv": _layer(layers.StridedConv, 4, padding_mode="circular"),
    "max-pool": _layer(layers.MaxPool),
    "max-blur-pool": _layer(layers.MaxBlurPool, padding_mode="zeros"),
    "unpadded-max-blur-pool": _layer(layers.UnpaddedMaxBlurPool),
    "max-blur-pool-circular": _layer(layers.MaxBlurPool, padding_mode="circular"),
    "conv-blur-pool": _layer(layers.ConvBlurPool, 4, padding_mode="replicate"),
    "conv-polyphase-downsample": _layer(layers.ConvPolyphaseDownsample, 4, padding_mode="circular"),
    "conv-fourier-downsample": _layer(layers.ConvFourierDownsample, 4, padding_mode="circular"),
    "blur-pool": _layer(BlurPool2d),
    "blur-pool-nine": _layer(BlurPool2d, kernel_size=9, padding_mode="circular"),
    "blur-pool-even": _layer(BlurPool2d, kernel_size=4, stride=1, padding_mode="reflect"),
    "fourier-downsample": _layer(layers.FourierDownsample2d),
    "polyphase-downsample": _layer(layers.PolyphaseDownsample2d),
}
_UP: dict[str, ModuleCase] = {
    "nearest-upsample-conv": _layer(layers.NearestUpsampleConv, 4, padding_mode="zeros", inputs=_images(side=4)),
    "blur-upsample": _layer(layers.BlurUpsample2d, kernel_size=4, inputs=_images(side=4)),
    "blur-upsample-conv": _layer(layers.BlurUpsampleConv, 4, padding_mode="replicate", inputs=_images(side=4)),
    "fourier-upsample": _layer(layers.FourierUpsample2d, inputs=_images(side=4)),
    "fourier-upsample-conv": _layer(
        layers.FourierUpsampleConv, 4, padding_mode="circular", inputs=_images(side=4)
    ),
    "polyphase-upsample": _layer(layers.PolyphaseUpsample2d, inputs=_with_phase()),
    "polyphase-upsample-interpolated": _layer(
        layers.PolyphaseUpsample2d, interpolate=True, padding_mode="zeros", inputs=_with_phase()
    ),
    "polyphase-upsample-conv": _layer(
        layers.PolyphaseUpsampleConv, 4, padding_mode="circular", inputs=_with_phase()
    ),
}
_BLOCKS: dict[str, ModuleCase] = {
    "padded-conv": _layer(layers.PaddedConv2d, 4, 6, 3, padding_mode="reflect"),
    "padded-conv-margins": _layer(
        layers.PaddedConv2d, 4, 6, 3, stride=2, margins=(0, 1, 0, 1), padding_mode="circular"
    ),
    "residual-block": _layer(layers.ResidualBlock, 4, 6, norm_groups=2, padding_mode="circular"),
    "residual-block-channel": _layer(layers.ResidualBlock, 4, 4, norm="channel", padding_mode="zeros"),
    "residual-block-filtered": _layer(
        layers.ResidualBlock, 4, 4, norm_groups=2, activation="filtered", padding_mode="circular"
    ),
    "residual-block-polynomial": _layer(
        layers.ResidualBlock, 4, 4, norm_groups=2, activation="polynomial", padding_mode="circular"
    ),
    "residual-block-dropout": ModuleCase(
        partial(layers.ResidualBlock, 4, 4, norm_groups=2, dropout=0.5, padding_mode="circular"),
        _images(),
        (layers.ResidualBlock,),
        random=True,
    ),
    "attention": _layer(layers.SelfAttention2d, 4, norm_groups=2),
    "attention-channel": _layer(layers.SelfAttention2d, 4, norm="channel"),
    "channel-norm": _layer(layers.ChannelNorm, 4),
    "group-norm": ModuleCase(partial(layers.build_norm, "group", 4, norm_groups=2), _images(), ()),
    "filtered-activation": _layer(layers.FilteredActivation),
    "filtered-activation-gelu": _layer(layers.FilteredActivation, F.gelu, upsampling=3),
    "polynomial-activation": _layer(layers.PolynomialActivation, 4),
}
_MODELS: dict[str, ModuleCase] = {
    "autoencoder": _autoencoder(slow=True),
    "autoencoder-ema": _autoencoder(codebook_update="ema", decay=0.5, orthogonal_reg=10.0),
    "autoencoder-cosine": _autoencoder(metric="cosine", orthogonal_reg=1.0, slow=True),
    "autoencoder-blur": _autoencoder(
        downsample="conv_blur_pool",
        upsample="blur",
        norm="channel",
        norm_groups=32,
        codebook_update="ema",
        slow=True,
    ),
    "autoencoder-max-blur": _autoencoder(
        downsample="max_blur_pool", upsample="blur", quantizer={"name": "LFQ", "code_dim": 3}, slow=True
    ),
    "autoencoder-polyphase": _autoencoder(
        downsample="polyphase", upsample="polyphase", **_CIRCULAR, quantizer={"name": "SimVQ", **_CODES}
    ),
    "autoencoder-fourier": _autoencoder(
        downsample="fourier",
        upsample="fourier",
        activation="polynomial",
        attention=False,
        slow=True,
        **_CIRCULAR,
        quantizer={"name": "FSQ", "levels": [4, 3]},
    ),
    "autoencoder-residual": _autoencoder(
        slow=True,
        quantizer={
            "name": "ResidualVectorQuantizer",
            "num_quantizers": 2,
            **_CODES,
            **_PLAIN,
            "codebook_update": "ema",
        },
    ),
    "encoder": ModuleCase(
        partial(build_encoder, AutoencoderConfig(**_TINY, **_CODES, downsample="conv_blur_pool")),
        lambda: (torch.rand(4, 1, 8, 8) * 2 - 1,),
        (),
    ),
    "decoder": ModuleCase(
        partial(build_decoder, AutoencoderConfig(**_TINY, **_CODES, upsample="blur")),
        lambda: (torch.randn(4, 3, 4, 4),),
        (),
    ),
    "gpt-learned": _gpt("learned"),
    "gpt-sinusoidal": _gpt("sinusoidal"),
    "gpt-axial": _gpt("axial", tied_head=False, pad_token=4),
    "gpt-dropout": _gpt("sinusoidal", dropout=0.3),
}
EXEMPT: dict[type, str] = {
    CodebookUsage: "it counts, and has neither a forward pass nor a state dict; test_usage.py moves it",
    TokenStability: "it counts like CodebookUsage; test_stability.py moves it",
}
"""Public classes without a case, and why."""

CASES: dict[str, ModuleCase] = {**QUANTIZER_CASES, **_DOWN, **_UP, **_BLOCKS, **_MODELS}


def public_modules() -> Iterator[type]:
    """Every class of a module that the package or one of its public submodules exports."""
    names = [info.name for info in pkgutil.iter_modules(te_quant.__path__) if not info.name.startswith("_")]
    for home in (te_quant, *(importlib.import_module(f"te_quant.{name}") for name in names)):
        for name in home.__all__:
            value = getattr(home, name)
            if isinstance(value, type) and issubclass(value, nn.Module):
                yield value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a result, in order, whatever tuple or dictionary they are in."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, as another process would read it."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def loss_of(results: list[Tensor]) -> Tensor | None:
    """A loss of everything that a module returns: the mean over equal shares of a batch is that of the batch."""
    terms = [result if result.ndim == 0 else result.square().mean() for result in results if result.requires_grad]
    return (
        torch.stack([term if term.dtype == torch.float64 else term.float() for term in terms]).sum()
        if terms
        else None
    )


def training_step(module: nn.Module, inputs: Inputs, *, seed: int, rate: float = 0.1) -> list[Tensor]:
    """One step of gradient descent on everything that the module returns: its results, then the inputs' gradients.

    Args:
        module: in training.
        inputs: leaves.
        seed: of what the step draws.
        rate: of the step.
    """
    torch.manual_seed(seed)
    results = tensors_in(module(*inputs))
    loss = loss_of(results)
    if loss is not None:
        loss.backward()
    descend(module, rate)
    gradients = [x.grad for x in inputs if x.grad is not None]
    return [tensor.detach().clone() for tensor in (*results, *gradients)]


def descend(module: nn.Module, rate: float = 0.1) -> None:
    """Move every parameter that takes a gradient, and forget the gradients."""
    learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if learnt:
        torch.optim.SGD(learnt, lr=rate).step()
    module.zero_grad(set_to_none=True)


def fresh(case: ModuleCase, seed: int = OTHER_SEED) -> nn.Module:
    """A module whose weights are others than those of :func:`prepared`."""
    torch.manual_seed(seed)
    return case.build()


def prepared(case: ModuleCase, steps: int = 2) -> nn.Module:
    """A module in training after a few steps, with statistics of the last one not yet applied where it has any."""
    module = fresh(case, seed=0).train()
    for step in range(steps):
        training_step(module, case.example(step), seed=step)
    return module


def probe(case: ModuleCase, module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the module does from here on: a training step, an evaluation, and the state after each.

    The training step applies the statistics that were pending, and the evaluation those of the training step.

    Args:
        case: of the module.
        module: changed by this.
        dtype: of the inputs.
    """
    results = training_step(module.train(), case.example(7, dtype), seed=7)
    seen = {f"training, tensor {i}": result for i, result in enumerate(results)}
    seen |= {f"state after training, {name}": value for name, value in state_of(module).items()}
    module.eval()
    with torch.no_grad():
        results = tensors_in(module(*case.example(9, dtype)))
    seen |= {f"evaluation, tensor {i}": result for i, result in enumerate(results)}
    if isinstance(module, Quantizer):
        indices = module.encode(*case.example(9, dtype))
        seen |= {"encode": indices, "decode": module.decode(indices).detach()}
    return seen | {f"state at the end, {name}": value for name, value in state_of(module).items()}


def assert_same_bits(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and values, bit for bit; the first difference is named."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        other = got[name]
        assert other.dtype == value.dtype, f"{name}: {other.dtype}, not {value.dtype}"
        assert other.shape == value.shape, f"{name}: {tuple(other.shape)}, not {tuple(value.shape)}"
        assert torch.equal(other, value), f"{name}: differs by up to {(other - value).abs().max()}"
