"""Exported graphs: torch.export and ONNX, at other sizes than those they were made with, and without te_quant.

Shape letters: B batch, C code size, h w token grid, H W pixels.
"""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from te_quant import (
    FSQ,
    LFQ,
    AutoencoderConfig,
    ProductQuantizer,
    ResidualVectorQuantizer,
    SimVQ,
    VectorQuantizer,
    VQAutoencoder,
)
from te_quant._pixels.band_limit import resample_by_products
from te_quant.filters import fourier_resample
from te_quant.gpt import GPT, GPTConfig, KeyValueCache, Segment
from te_quant.quantizers import Quantizer
from tests.helpers import plain_quantizer, plain_residual

# To watch every call that the exporters make takes longer than the exporters themselves.
pytestmark = [pytest.mark.no_cover]

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "export.md"

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "vq": partial(plain_quantizer, 32, 6),
    "vq-cosine": partial(plain_quantizer, 32, 6, metric="cosine"),
    "vq-ema": partial(plain_quantizer, 32, 6, codebook_update="ema"),
    "vq-ema-cosine": partial(plain_quantizer, 32, 6, codebook_update="ema", metric="cosine"),
    "vq-rotation": partial(plain_quantizer, 32, 6, gradient_estimator="rotation_trick"),
    "vq-one-code": partial(plain_quantizer, 1, 6),
    "rvq": partial(plain_residual, 32, 6, 3),
    "rvq-shared": partial(plain_residual, 32, 6, 3, shared_codebook=True),
    "rvq-dropout": partial(plain_residual, 32, 6, 3, quantizer_dropout=True),
    "residual-fsq": lambda: ResidualVectorQuantizer(stages=[FSQ((7, 5, 5)), FSQ((5, 5, 5))]),
    "product": lambda: ProductQuantizer([VectorQuantizer(32, 4), LFQ(2, spherical=True)]),
    "fsq": partial(FSQ, (8, 5, 5)),
    "lfq": partial(LFQ, 9),
    "lfq-long": partial(LFQ, 40, diversity_weight=0.0),
    "sim": partial(SimVQ, 32, 6),
}
FAST = ("vq", "rvq", "fsq")
FEW = (*FAST, "vq-cosine", "lfq", "sim")
slow_but_few = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in QUANTIZERS]
long_but_few = [
    pytest.param(name, marks=pytest.mark.slow if name in FEW else pytest.mark.long) for name in QUANTIZERS
]


@pytest.fixture(autouse=True)
def quiet_exporters() -> Iterator[None]:
    """Deprecations inside torch and the exporters are not ours."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx|onnxscript|copyreg)\b.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.* is deprecated.*")
        yield


class Method(nn.Module):
    """One method of a module as the forward of a module, as the guide shows it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs: Tensor) -> Any:
        """Call the method."""
        return getattr(self.model, self.name)(*inputs)


def build(name: str) -> Quantizer:
    """A quantizer in evaluation mode with codes among normal latents."""
    quantizer = QUANTIZERS[name]().eval()
    if isinstance(quantizer, VectorQuantizer | ResidualVectorQuantizer):
        quantizer.kmeans_init(torch.randn(256, quantizer.code_dim), iterations=2)
    return quantizer


def dynamic(*axes: int) -> dict[int, Any]:
    """Axes of any size."""
    return dict.fromkeys(axes, Dim.DYNAMIC)


def exported(
    model: nn.Module, inputs: tuple[Tensor, ...], *shapes: Mapping[int, Any], strict: bool = False
) -> ExportedProgram:
    """``model`` as a program for inference whose named axes have any size."""
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=(tuple(shapes),), strict=strict)


def namespaces(program: ExportedProgram) -> set[str]:
    """Whose operators a program calls."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return {getattr(target, "namespace", getattr(target, "__module__", "?")) for target in targets}


def run_onnx(program: ExportedProgram) -> Callable[..., list[Tensor]]:
    """The program as ONNX, run by onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    assert {node.domain for node in converted.model_proto.graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
    session = runtime.InferenceSession(converted.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.as_tensor(value) for value in session.run(None, feed)]

    return run


def requests(quantizer: Quantizer) -> list[tuple[str, Tensor, Tensor, dict[int, Any]]]:
    """Each method, with an example input, another of another size, and the axes that differ."""
    latents, others = torch.randn(3, quantizer.code_dim, 4, 5), torch.randn(5, quantizer.code_dim, 7, 3)
    indices, other = quantizer.encode(latents), quantizer.encode(others)
    return [("encode", latents, others, dynamic(0, 2, 3)), ("decode", indices, other, dynamic(0, 1, 2))]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", slow_but_few)
def test_quantizers_export_with_any_batch_and_grid(name: str, strict: bool) -> None:
    """``encode`` and ``decode``, with torch's own operators, give the bits of eager code at another size."""
    quantizer = build(name)
    for method, example, other, axes in requests(quantizer):
        program = exported(Method(quantizer, method), (example,), axes, strict=strict)
        assert namespaces(program) <= {"aten", "_operator", "builtins"}
        assert torch.equal(program.module()(other), getattr(quantizer, method)(other))


@pytest.mark.parametrize("name", slow_but_few)
def test_an_exported_forward_has_the_gradient_of_eager_code(name: str) -> None:
    """All outputs, and the gradient of the latents; codes where latents are NaN."""
    quantizer = build(name)
    latents = torch.randn(3, quantizer.code_dim, 4, 5, requires_grad=True)
    program = torch.export.export(quantizer, (latents.detach(),), dynamic_shapes=(dynamic(0, 2, 3),))
    assert namespaces(program) <= {"aten", "_operator", "builtins"}
    gradients = []
    for call in (quantizer, program.module()):
        output = call(latents)
        weights = torch.linspace(-1, 1, latents.numel()).view_as(latents)
        (gradient,) = torch.autograd.grad(output[2] + (weights * output[0]).sum(), latents)
        gradients.append((*output, gradient))
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, wanted)
    spoilt = latents.detach().clone()
    spoilt[1, 0, 2, 3] = torch.nan
    assert program.module()(spoilt)[0].isfinite().all()


@pytest.mark.parametrize("name", long_but_few)
def test_quantizers_in_onnx(name: str) -> None:
    """``encode`` and ``decode`` at another size than the example's."""
    quantizer = build(name)
    for method, example, other, axes in requests(quantizer):
        (got,) = run_onnx(exported(Method(quantizer, method), (example,), axes))(other)
        torch.testing.assert_close(got, getattr(quantizer, method)(other), rtol=0, atol=1e-5)


CIRCULAR = {"encoder_padding": "circular", "decoder_padding": "circular"}
POLYPHASE = {"downsample": "polyphase", "upsample": "polyphase"}
FOURIER = {"downsample": "fourier", "upsample": "fourier", **CIRCULAR}
CONFIGS: dict[str, dict[str, Any]] = {
    # One factor at a time.
    "default": {},
    "attention": {"attention_levels": (1,)},
    "max-pool": {"downsample": "max_pool"},
    "max-blur-pool": {"downsample": "max_blur_pool"},
    "conv-blur-pool": {"downsample": "conv_blur_pool"},
    "polyphase": POLYPHASE,
    "fourier": FOURIER,
    "blur-up": {"upsample": "blur"},
    "encoder-zeros": {"encoder_padding": "zeros"},
    "encoder-reflect": {"encoder_padding": "reflect"},
    "encoder-circular": {"encoder_padding": "circular"},
    "decoder-replicate": {"decoder_padding": "replicate"},
    "decoder-reflect": {"decoder_padding": "reflect"},
    "decoder-circular": {"decoder_padding": "circular"},
    "channel-norm": {"norm": "channel"},
    "filtered": {"activation": "filtered", **CIRCULAR},
    "polynomial": {"activation": "polynomial", **CIRCULAR},
    "cosine": {"metric": "cosine"},
    "ema": {"codebook_update": "ema"},
    "residual": {"quantizer": {"name": "ResidualVectorQuantizer", "num_quantizers": 2}},
    "fsq": {"num_codes": 256, "code_dim": 256, "quantizer": {"name": "FSQ", "levels": [8, 5, 5]}},
    "lfq": {"num_codes": 256, "code_dim": 256, "quantizer": {"name": "LFQ", "code_dim": 8}},
    "sim": {"quantizer": {"name": "SimVQ"}},
    # Pairs.
    "polyphase-circular": {**POLYPHASE, **CIRCULAR, "norm": "channel"},
    "polyphase-reflect": {**POLYPHASE, "encoder_padding": "reflect", "decoder_padding": "reflect"},
    "polyphase-residual": {**POLYPHASE, "quantizer": {"name": "ResidualVectorQuantizer", "num_quantizers": 2}},
    "fourier-polynomial": {**FOURIER, "activation": "polynomial"},
    "blur-circular": {"downsample": "conv_blur_pool", "upsample": "blur", **CIRCULAR},
    "cosine-ema-reflect": {"metric": "cosine", "codebook_update": "ema", "encoder_padding": "reflect"},
}
MANY = ("default", "cosine", "polyphase", "fourier", "residual", "fsq")


class Both(nn.Module):
    """Images to tokens and phases, and tokens with phases to images, as one graph."""

    def __init__(self, model: VQAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, indices: Tensor, phases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens and phases of the images, and the images of the tokens and phases."""
        latents, chosen = self.model.encode_with_phases(images)
        return self.model.quantizer.encode(latents), chosen, self.model.decode_indices(indices, phases)


def autoencoder(name: str) -> VQAutoencoder:
    """A small model with codes among its latents."""
    small = {"base_channels": 4, "channel_multipliers": (1, 2), "num_codes": 32, "code_dim": 6}
    options = small | {"attention_levels": ()} | CONFIGS[name]
    model = VQAutoencoder(AutoencoderConfig(**options)).eval()
    if hasattr(model.quantizer, "kmeans_init"):
        model.quantizer.kmeans_init(model.encode(pictures(8, 32, 32)).detach(), iterations=2)
    return model


def pictures(batch: int, height: int, width: int) -> Tensor:
    """Images in [-1, 1] without repetition."""
    return torch.rand(batch, 3, height, width) * 2 - 1


def away_from_ties(quantizer: Quantizer, latents: Tensor, indices: Tensor) -> Tensor:
    """True for tokens whose index no small change of the latents turns; far more than runtimes differ by."""
    stable = torch.ones_like(indices, dtype=torch.bool)
    for _ in range(4):
        disturbed = latents + 1e-4 * latents.std() * torch.randn_like(latents)
        stable &= quantizer.encode(disturbed) == indices
    return stable


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in MANY[:2] else pytest.mark.long) for name in CONFIGS],
)
def test_autoencoders_in_torch_export_and_onnx(name: str) -> None:
    """Tokens, phases and images at other sizes than those of the example."""
    model = autoencoder(name)
    with torch.no_grad():
        examples = [(images, model.encode_to_indices(images), model.encode_with_phases(images).phases)
                    for images in (pictures(3, 12, 16), pictures(5, 20, 10))]  # fmt: skip
        wanted = Both(model)(*examples[1])
        latents = model.encode(examples[1][0])
        shapes = (dynamic(0, 2, 3), dynamic(0, 1, 2), dynamic(0))
        program = torch.export.export(Both(model), examples[0], dynamic_shapes=shapes)
    assert namespaces(program) <= {"aten", "_operator", "builtins", "math", "torch"}
    for run in (program.module(), run_onnx(program)):
        indices, phases, images = run(*examples[1])
        safe = away_from_ties(model.quantizer, latents, wanted[0])
        assert torch.equal(indices[safe], wanted[0][safe])
        assert safe.double().mean() > 0.99
        assert torch.equal(phases, wanted[1])
        scale = max(1.0, float(wanted[2].abs().max()))
        torch.testing.assert_close(images / scale, wanted[2] / scale, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MANY[:3], *(pytest.param(name, marks=pytest.mark.long) for name in MANY[3:])])
def test_of_100_000_indices_none_differs(name: str) -> None:
    """``encode_to_indices`` by onnxruntime, over tokens that are away from ties."""
    model = autoencoder(name)
    with torch.no_grad():
        run = run_onnx(exported(Method(model, "encode_to_indices"), (pictures(3, 16, 32),), dynamic(0, 2, 3)))
        compared = 0
        while compared < 100_000:
            images = pictures(20, 64, 96)
            wanted = model.encode_to_indices(images)
            safe = away_from_ties(model.quantizer, model.encode(images), wanted)
            (got,) = run(images)
            assert torch.equal(got[safe], wanted[safe])
            assert safe.double().mean() > 0.99
            compared += int(safe.sum())


@pytest.mark.parametrize(
    "method", ["encode", "encode_with_phases", "encode_to_indices", "decode", "decode_indices"]
)
def test_models_in_training_are_not_exported(method: str) -> None:
    """Each run of such a program would draw another dropout; calling it (the control) and evaluation are fine."""
    model = VQAutoencoder(replace(autoencoder("default").config, dropout=0.5)).train()
    codes, indices = torch.zeros(2, model.config.code_dim, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
    inputs = {"decode": codes, "decode_indices": indices}.get(method, pictures(2, 16, 16))
    getattr(model, method)(inputs)
    kind = "a quantizer" if method == "decode_indices" else "a decoder" if method == "decode" else "an encoder"
    with pytest.raises(
        RuntimeError, match=rf"mode must be evaluation to export {kind}, got training; call eval\(\)"
    ):
        torch.export.export(Method(model, method), (inputs,))
    torch.export.export(Method(model, method).eval(), (inputs,))


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_quantizers_in_training_are_not_exported(method: str) -> None:
    """The codebook of the program would lack what is pending; a frozen one (the control) has nothing pending."""
    quantizer = plain_quantizer(32, 6).train()
    inputs = torch.randn(3, 6, 4, 5) if method == "encode" else torch.zeros(3, 4, 5, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=r"mode must be evaluation to export a quantizer, got training; call eval"
    ):
        torch.export.export(Method(quantizer, method), (inputs,))
    torch.export.export(Method(quantizer.freeze(), method), (inputs,))


def test_gpts_that_drop_are_not_exported() -> None:
    """Without dropout nothing in them depends on the mode, and pipelines of several devices trace training."""
    config = GPTConfig((Segment("image", 7, (2, 2), "learned"),), 16, 1, 2, dropout=0.5)
    gpt = GPT(config).train()
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=r"mode must be evaluation to export a GPT with dropout, got training; call eval\(\)"
    ):
        torch.export.export(gpt, (tokens,))
    torch.export.export(gpt.eval(), (tokens,))
    torch.export.export(GPT(replace(config, dropout=0.0)).train(), (tokens,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "polyphase"])
def test_named_dimensions_may_say_what_sides_divide(name: str) -> None:
    """``Dim`` instead of ``Dim.DYNAMIC``: the sides of images are multiples of the divisor."""
    model = autoencoder(name)
    batch, height, width = Dim("batch"), 2 * Dim("rows"), 2 * Dim("columns")
    with torch.no_grad():
        program = torch.export.export(
            Method(model, "encode_to_indices"),
            (pictures(3, 16, 32),),
            dynamic_shapes=(({0: batch, 2: height, 3: width},),),
        )
        images = pictures(2, 24, 8)
        assert torch.equal(program.module()(images), model.encode_to_indices(images))


FIRST = 7
"""Keys before the first image token: the start and six of the text."""


class Step(nn.Module):
    """One step of a GPT, with the keys and values so far as input and output."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt, self.layout = gpt, gpt.new_cache(0).layout

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1) tokens and (depth, 2, B, H, past, D/H) to (B, V) logits and one more column of memory."""
        room = [F.pad(block, (0, 0, 0, 1)) for block in memory]
        state = memory.new_zeros(tokens.shape[0], 1, self.gpt.config.width)
        cache = KeyValueCache(self.layout, room, state)
        cache.length = memory.shape[-2] - 1
        return self.gpt.next_logits(cache, tokens), torch.stack(cache.memory)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("positions", ["axial", "learned", "sinusoidal"])
def test_one_step_of_the_gpt_with_its_cache(positions: Any, strict: bool) -> None:
    """Any batch and any number of tokens before: all logits of a sequence, one step after another."""
    text, image = Segment("text", 40, (6,), "learned", pad_token=0), Segment("image", 16, (4, 4), positions)
    gpt = GPT(GPTConfig((text, image), width=32, depth=2, num_heads=2)).eval()
    caption, tokens = torch.randint(0, 40, (3, 6)), torch.randint(0, 16, (3, 16))
    with torch.no_grad():
        wanted = gpt(torch.cat([caption, tokens], 1))[:, FIRST:]
    cache = gpt.new_cache(3)
    gpt.next_logits(cache, caption)
    start = torch.stack([block[..., :FIRST, :] for block in cache.memory])
    batch, past = Dim("batch"), Dim("past", min=FIRST, max=21)
    with torch.no_grad():
        program = torch.export.export(
            Step(gpt).eval(),
            (tokens[:, :1], start),
            dynamic_shapes=({0: batch}, {2: batch, 4: past}),
            strict=strict,
        )
    assert namespaces(program) <= {"aten", "_operator", "builtins"}
    runs = [program.module()] if strict else [program.module(), run_onnx(program)]
    for run in runs:
        memory = start[:, :, :2]
        for column in range(15):
            logits, memory = run(tokens[:2, column : column + 1], memory)
            known = wanted[:2, column].isfinite()
            assert torch.equal(logits.isfinite(), known)
            torch.testing.assert_close(logits[known], wanted[:2, column][known], rtol=0, atol=1e-5)


CLIENT = """
import sys
from pathlib import Path

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "te_quant":
            raise ImportError("te_quant is not installed here")

sys.meta_path.insert(0, Refusing())
try:
    import te_quant
except ImportError:
    pass
else:
    raise AssertionError("te_quant was imported")

import torch

for path in sorted(Path(sys.argv[1]).glob("*.inputs")):
    inputs, wanted = torch.load(path, weights_only=True)
    runs = {".pt2": lambda file: torch.export.load(file).module()(*inputs)}
    if sys.argv[2] == "onnx":
        import onnxruntime
        def run(file):
            session = onnxruntime.InferenceSession(file)
            feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), inputs)}
            return torch.as_tensor(session.run(None, feed)[0])
        runs[".onnx"] = run
    for suffix, run in runs.items():
        torch.testing.assert_close(run(path.with_suffix(suffix)), wanted, rtol=0, atol=1e-5)
        print(path.stem + suffix)
"""


def runs_without_te_quant(folder: Path, formats: str) -> list[str]:
    """What a process that cannot import te_quant has loaded from the folder and found right."""
    command = [sys.executable, "-W", "ignore", "-c", CLIENT, str(folder), formats]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def save(folder: Path, name: str, model: nn.Module, example: Tensor, other: Tensor, axes: dict[int, Any]) -> None:
    """Write a program, and what it has to give for ``other``."""
    with torch.no_grad():
        program = exported(model, (example,), axes)
        torch.export.save(program, folder / f"{name}.pt2")
        torch.save(([other], model(other)), folder / f"{name}.inputs")


@pytest.mark.slow
def test_programs_run_where_te_quant_is_missing(tmp_path: Path) -> None:
    """``.pt2`` files of every quantizer and of an autoencoder."""
    for name in QUANTIZERS:
        quantizer = build(name)
        for method, example, other, axes in requests(quantizer):
            save(tmp_path, f"{name}-{method}", Method(quantizer, method), example, other, axes)
    model = autoencoder("polyphase")
    save(
        tmp_path,
        "tokens",
        Method(model, "encode_to_indices"),
        pictures(3, 12, 16),
        pictures(2, 8, 20),
        dynamic(0, 2, 3),
    )
    assert len(runs_without_te_quant(tmp_path, "pt2")) == 2 * len(QUANTIZERS) + 1


@pytest.mark.slow
def test_onnx_files_run_where_te_quant_is_missing(tmp_path: Path) -> None:
    """``.onnx`` files next to ``.pt2`` files."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in ("vq", "lfq"):
        quantizer = build(name)
        method, example, other, axes = requests(quantizer)[0]
        save(tmp_path, name, Method(quantizer, method), example, other, axes)
        converted = torch.onnx.export(torch.export.load(tmp_path / f"{name}.pt2"), dynamo=True, verbose=False)
        assert converted is not None
        converted.save(tmp_path / f"{name}.onnx")
    assert runs_without_te_quant(tmp_path, "onnx") == ["lfq.pt2", "lfq.onnx", "vq.pt2", "vq.onnx"]


@pytest.mark.parametrize(
    ("sides", "size"),
    [((8, 8), (16, 16)), ((16, 12), (8, 6)), ((7, 9), (14, 5)), ((1, 2), (2, 4)), ((64, 64), (64, 64))],
)
def test_products_give_the_ideal_filter(sides: tuple[int, int], size: tuple[int, int]) -> None:
    """What replaces the Fourier transforms in a graph, against these in float64."""
    images = torch.randn(2, 3, *sides, dtype=torch.float64)
    wanted = fourier_resample(images, size)
    torch.testing.assert_close(resample_by_products(images, size), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(resample_by_products(images.float(), size).double(), wanted, rtol=0, atol=5e-6)
    half = resample_by_products(images.half(), size)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), wanted, rtol=2e-3, atol=2e-2)


def test_programs_that_return_plain_tuples_are_saved(tmp_path: Path) -> None:
    """Not those that return named ones, as the guide says; torch can register these by a private function only."""
    quantizer, latents = plain_quantizer(32, 6).eval(), torch.randn(2, 6, 4, 5)
    for named in (quantizer, Method(autoencoder("default"), "encode_with_phases")):
        inputs = latents if named is quantizer else pictures(2, 16, 16)
        with pytest.raises(NotImplementedError, match=r"Can't serialize TreeSpec of namedtuple class"):
            torch.export.save(torch.export.export(named, (inputs,)), tmp_path / "named.pt2")
    torch.export.save(torch.export.export(AsTuple(quantizer), (latents,)), tmp_path / "plain.pt2")
    found = torch.export.load(tmp_path / "plain.pt2").module()(latents)
    assert type(found) is tuple
    assert all(torch.equal(*pair) for pair in zip(found, quantizer(latents), strict=True))


class AsTuple(nn.Sequential):
    """A module whose named tuple becomes a plain one."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Call it."""
        return tuple(super().forward(*inputs))


@pytest.mark.slow
def test_sides_that_do_not_fit_are_only_refused_by_torch() -> None:
    """A row of the guide: the ONNX graph has no check of its input."""
    model = Method(autoencoder("default"), "encode_to_indices")
    program = exported(model, (pictures(3, 16, 32),), {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC})
    images = pictures(3, 15, 32)
    with pytest.raises((AssertionError, RuntimeError), match=r"% 2|divisible|Guard"):
        program.module()(images)
    assert run_onnx(program)(images)[0].shape[1] in (7, 8)


@pytest.mark.slow
def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks run one after another."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    session: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), session)
