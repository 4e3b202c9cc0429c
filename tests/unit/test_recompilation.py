"""Weights may change from step to step without a graph for each value."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from te_quant import LFQ, SimVQ
from te_quant.functional import nearest_code
from tests.helpers import plain_quantizer, plain_residual

pytestmark = pytest.mark.no_cover

LFQ_WEIGHTS = ("commitment_weight", "entropy_weight", "diversity_weight", "temperature")
CASES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "temperature": (lambda: plain_quantizer(9, 6, temperature=1e-9), ("temperature",)),
    "commitment": (lambda: plain_quantizer(9, 6), ("commitment_weight",)),
    "codebook": (lambda: plain_quantizer(9, 6), ("codebook_weight",)),
    "decay": (lambda: plain_quantizer(9, 6), ("decay",)),
    "decay-ema": (lambda: plain_quantizer(9, 6, codebook_update="ema"), ("decay",)),
    "penalty": (lambda: plain_quantizer(9, 6, orthogonal_reg=1.0), ("orthogonal_reg",)),
    "penalty-ema": (lambda: plain_quantizer(9, 6, codebook_update="ema", orthogonal_reg=1.0), ("orthogonal_reg",)),
    "all-of-vq": (
        lambda: plain_quantizer(9, 6, codebook_update="ema", orthogonal_reg=1.0, temperature=1e-9),
        ("temperature", "commitment_weight", "orthogonal_reg", "decay"),
    ),
    "all-of-lfq": (lambda: LFQ(6), LFQ_WEIGHTS),
    "all-of-sim": (lambda: SimVQ(9, 6), ("commitment_weight", "decay")),
    "residual": (
        lambda: plain_residual(9, 6, 2, orthogonal_reg=1.0),
        ("commitment_weight", "orthogonal_reg"),
    ),
    **{f"lfq-{name}": (lambda: LFQ(6), (name,)) for name in LFQ_WEIGHTS},
}
FAST = ("temperature", "decay-ema")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of one test serves another; deprecations inside the compiler are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
        yield
    torch._dynamo.reset()


def step(call: Any, latents: Tensor) -> Any:
    """One training step; the output."""
    output = call(latents.clone().requires_grad_())
    output.loss.backward()
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.long) for n in CASES])
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.long)])
def test_weights_that_change_every_step_compile_at_most_twice(name: str, dynamic: bool | None) -> None:
    """The first change may make a second graph, none under ``dynamic=True``; that graph uses the new values."""
    make, weights = CASES[name]
    eager = make()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for number in range(6):
        for quantizer in (eager, twin):
            for weight in weights:
                setattr(quantizer, weight, getattr(quantizer, weight) * 0.9)
        # Of sizes that are equal a compiler thinks that they always are.
        latents = torch.randn(32, 6)
        last = number > 1 or (dynamic and number > 0)
        with torch.compiler.set_stance("fail_on_recompile" if last else "default"):
            got = step(compiled, latents)
        wanted = step(eager, latents)
        assert torch.equal(got.indices, wanted.indices)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[key], value)


def test_another_option_does_recompile() -> None:
    """Negative control: what the test above forbids is noticed."""
    quantizer = plain_quantizer(9, 6)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    step(compiled, torch.randn(32, 6))
    quantizer.gradient_estimator = "rotation_trick"
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompil"):
        step(compiled, torch.randn(32, 6))


@pytest.mark.slow
def test_the_temperature_of_a_function_is_an_input() -> None:
    """``nearest_code`` compiles once more for the first other temperature, and never again."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def drawn(latents: Tensor, codebook: Tensor, temperature: float) -> Tensor:
        return nearest_code(latents, codebook, temperature=temperature)

    latents, codebook = torch.randn(20, 4), torch.randn(6, 4)
    for number in range(5):
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            found = drawn(latents, codebook, 1e-9 * (1 + number))
        assert torch.equal(found, nearest_code(latents, codebook))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
def test_weights_that_change_at_different_steps_compile_nothing_under_dynamic(dynamic: bool | None) -> None:
    """Without it, the first change of each compiles another graph."""
    make, weights = CASES["all-of-vq"]
    quantizer = make()
    compiled = torch.compile(quantizer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    latents = torch.randn(32, 6)
    step(compiled, latents)
    expected = nullcontext() if dynamic else pytest.raises(RuntimeError, match="recompil")
    for name in weights:
        before = getattr(quantizer, name)
        setattr(quantizer, name, 0.5 * before)
        with torch.compiler.set_stance("fail_on_recompile"), expected:
            step(compiled, latents)
        setattr(quantizer, name, before)
