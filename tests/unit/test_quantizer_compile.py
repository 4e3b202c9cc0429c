"""torch.compile(fullgraph=True) gives what eager gives.

Shape letters: B batch, C code size, N latent vectors.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from te_quant.functional import nearest_code
from tests.helpers import exactly, not_finite, plain_quantizer
from tests.unit.quantizer_cases import QUANTIZERS, dtype_of, is_random, latents_for

# To watch every call that the compiler makes takes half as long as the compiler itself.
pytestmark = pytest.mark.no_cover

# Other sizes make no other graph.
GRAPHS = [
    name for name in QUANTIZERS if not name.endswith(("-one-code", "-one-channel", "-wide", "-even", "-fresh"))
]
# The fast suite compiles these, make test-all one or two of each class as well, and make test-long all others.
FIRST = ("vq-ema-penalty", "rvq-dropout", "lfq")
SECOND = ("vq", "vq-cosine", "vq-ema-subset", "vq-revival", "rvq-ema", "fsq", "sim")


def slow_but(fast: tuple[str, ...], names: list[str]) -> list[Any]:
    """The names as parameters, all but ``fast`` marked slow or, if they are in neither list above, long."""
    later = {name: pytest.mark.slow if name in (*FIRST, *SECOND) else pytest.mark.long for name in names}
    return [pytest.param(name, marks=() if name in fast else later[name]) for name in names]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of one test serves another; deprecations inside the compiler are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
        yield
    torch._dynamo.reset()


def spread(quantizer: Any) -> Any:
    """Put the codes among the latents, if they can be put anywhere."""
    if hasattr(quantizer, "kmeans_init"):
        quantizer.kmeans_init(torch.randn(64, quantizer.code_dim, dtype=dtype_of(quantizer)), iterations=2)
    return quantizer


def run(quantizer: Any, latents: Tensor, compiled: Any = None) -> tuple[Any, Tensor]:
    """One training or evaluation step; the output and the latents' gradient."""
    latents = latents.clone().requires_grad_()
    quantizer.zero_grad()
    output = (quantizer if compiled is None else compiled)(latents)
    (output.loss + output.quantized.square().sum()).backward()
    assert latents.grad is not None
    return output, latents.grad


def assert_alike(eager: Any, twin: Any, compiled: Any, latents: Tensor) -> None:
    """The same step of both: outputs, gradients and state."""
    (wanted, wanted_grad), (got, got_grad) = run(eager, latents), run(twin, latents, compiled)
    assert torch.equal(got.indices, wanted.indices)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(got_grad, wanted_grad, rtol=1e-4, atol=1e-5)
    for wanted_parameter, parameter in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted_parameter.grad, rtol=1e-4, atol=1e-6)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)
    assert torch.equal(got.quantized, got.codes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"orthogonal_reg": 10.0},
        {
            "codebook_update": "ema",
            "orthogonal_reg": 10.0,
            "metric": "cosine",
            "gradient_estimator": "rotation_trick",
        },
    ],
)
def test_compiled_equals_eager(options: dict[str, Any]) -> None:
    """With the default backend, in train and eval, over several batch sizes, one of them empty."""
    eager = spread(plain_quantizer(9, 6, **options))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    for batch in (3, 5, 2):
        assert_alike(eager, twin, compiled, torch.randn(batch, 6, 4, 5))
    eager.eval()
    twin.eval()
    latents = torch.randn(4, 6, 4, 5)
    assert_alike(eager, twin, compiled, latents)
    # The indices that a compiled quantizer gives decode, without the compiler, to the codes it gave.
    output = compiled(latents)
    torch.testing.assert_close(twin.decode(output.indices), output.codes)
    if twin.metric == "l2":
        assert torch.equal(twin.decode(output.indices), output.codes)


@pytest.mark.parametrize("name", slow_but(FIRST, GRAPHS))
def test_every_configuration_is_one_graph(name: str) -> None:
    """Traced in full, with autograd, in train, for all batch sizes at once.

    Where nothing is drawn at random the step equals eager.
    """
    eager = spread(QUANTIZERS[name]())
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    # Of sizes that are equal a compiler thinks that they always are, so the first is no other axis of a latent.
    for batch, stance in ((7, "default"), (5, "fail_on_recompile")):
        latents = latents_for(eager, (batch, -1, 4, 5))
        with torch.compiler.set_stance(stance):
            if is_random(eager):
                output, gradient = run(twin, latents, compiled)
                assert gradient.isfinite().all()
                assert torch.equal(twin.decode(output.indices), output.codes)
            else:
                assert_alike(eager, twin, compiled, latents)


@pytest.mark.parametrize("name", slow_but(("vq",), [*FIRST]))
def test_a_second_batch_size_is_the_last_to_compile(name: str) -> None:
    """Without being told, the compiler makes the size symbolic at the second one; none compiles after it."""
    quantizer = spread(QUANTIZERS[name]())
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for batch, stance in ((3, "default"), (5, "default"), (2, "fail_on_recompile"), (9, "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            run(quantizer, latents_for(quantizer, (batch, -1, 4, 5)), compiled)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompil"):
        run(quantizer, latents_for(quantizer, (3, -1)), compiled)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_empty_batches_in_a_compiled_graph(update: str) -> None:
    """An empty batch among others changes no state there either."""
    quantizer = spread(plain_quantizer(9, 6, codebook_update=update, orthogonal_reg=1.0))  # type: ignore[arg-type]
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    run(quantizer, torch.randn(3, 6), compiled)
    quantizer.apply_pending()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    output, _ = run(quantizer, torch.empty(0, 6), compiled)
    assert output.commitment_loss == 0
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_autocast_in_a_compiled_graph() -> None:
    """Half-precision latents under autocast are computed in float32 there too."""
    quantizer = spread(plain_quantizer(9, 6)).eval()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    latents = torch.randn(3, 6, 4, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = quantizer(latents), compiled(latents)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert got.codes.dtype == torch.float32


@pytest.mark.parametrize("name", slow_but(("vq",), ["vq", "vq-rotation", "rvq", "fsq", "lfq", "sim"]))
def test_values_nobody_looks_at_get_codes_in_a_compiled_graph_too(name: str) -> None:
    """Straight-through must not carry NaN from the latents into what the decoder sees."""
    quantizer = spread(QUANTIZERS[name](nonfinite="off")).eval()
    latents = latents_for(quantizer, (5, -1))
    latents[1, 0], latents[3, 1] = math.nan, math.inf
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    wanted, got = quantizer(latents), compiled(latents.requires_grad_())
    assert got.quantized.isfinite().all()
    assert torch.equal(got.indices, wanted.indices)
    assert torch.equal(got.quantized, wanted.quantized)
    assert torch.equal(got.codes, wanted.codes)


def test_encode_and_decode_compile() -> None:
    """Both are one graph; a bad index is refused with the sentence of eager code."""
    quantizer = spread(plain_quantizer(9, 6))
    encode = torch.compile(quantizer.encode, fullgraph=True, backend="aot_eager")
    decode = torch.compile(quantizer.decode, fullgraph=True, backend="aot_eager")
    latents = torch.randn(3, 6, 4, 5)
    indices = encode(latents)
    assert torch.equal(indices, quantizer.encode(latents))
    assert torch.equal(decode(indices), quantizer.decode(indices))
    for bad in (-2, 9):
        wrong = indices.clone()
        wrong[1, 2, 3] = bad
        message = f"indices must be in [-1, num_codes=9), got {bad}."
        # Older compilers write on which node it happened below the sentence.
        with pytest.raises(ValueError, match=f"^{re.escape(message)}(\n|$)"):
            decode(wrong)


@pytest.mark.slow
def test_bad_values_are_refused_by_the_default_backend() -> None:
    """NaN latents and indices out of range stop a fully optimized graph too, and leave the state as it was."""
    quantizer = spread(plain_quantizer(9, 6, codebook_update="ema"))
    forward = torch.compile(quantizer, fullgraph=True)
    decode = torch.compile(quantizer.decode, fullgraph=True)
    latents = torch.randn(3, 6, 4, 5)
    output = forward(latents)
    assert torch.equal(decode(output.indices), quantizer.decode(output.indices))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    latents[1, 2, 3, 4] = math.nan
    with pytest.raises(ValueError, match=exactly(not_finite(1, 360))):
        forward(latents)
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    with pytest.raises(ValueError, match=r"^indices must be in \[-1, num_codes=9\), got 9\.$"):
        decode(output.indices * 0 + 9)


def test_nearest_code_compiles_with_temperature() -> None:
    """Searching and sampling are operators that a graph may hold; the temperature is an argument."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(latents: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return nearest_code(latents, codebook), nearest_code(latents, codebook, temperature=temperature)

    latents, codebook = torch.randn(20, 4), torch.randn(6, 4)
    for temperature in (1e-9, 2e-9):
        nearest, drawn = both(latents, codebook, temperature)
        assert torch.equal(nearest, nearest_code(latents, codebook))
        assert torch.equal(drawn, nearest)


@pytest.mark.slow
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_compiled_codes_are_the_bits_that_eager_decode_gives(update: str) -> None:
    """Under cosine too, where both have to normalize."""
    quantizer = plain_quantizer(64, 16, metric="cosine", codebook_update=update)
    with torch.no_grad():
        quantizer.codebook.normal_()
    out = torch.compile(quantizer, fullgraph=True)(torch.randn(32, 16))
    assert torch.equal(quantizer.decode(out.indices), out.codes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "rvq-ema-shared-dropout",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("fsq", "lfq", "sim-rotation")),
    ],
)
def test_the_default_backend_gives_the_bits_that_eager_decode_gives(name: str) -> None:
    """Optimized, over several batch sizes: codes, quantized and the decoded indices are the same bits."""
    quantizer = spread(QUANTIZERS[name]())
    compiled = torch.compile(quantizer, fullgraph=True, dynamic=True)
    for batch in (3, 5, 2):
        output, gradient = run(quantizer, latents_for(quantizer, (batch, -1, 4, 5)), compiled)
        assert torch.equal(quantizer.decode(output.indices), output.codes)
        assert torch.equal(output.quantized, output.codes)
        assert gradient.isfinite().all()
