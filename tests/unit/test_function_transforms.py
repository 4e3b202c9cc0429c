"""Transforms of ``torch.func`` over quantizers that do not learn: evaluation mode, frozen, or without statistics.

The oracles are a loop over samples, reverse-mode autograd in float64, and diffusers' quantizer.

Shape letters: B samples, b vectors of a sample, C code size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from te_quant import FSQ, LFQ, ProductQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from te_quant.functional import rotation_trick, straight_through
from te_quant.quantizers import Quantizer
from tests.helpers import exactly, not_finite, plain_quantizer
from tests.unit.quantizer_cases import QUANTIZERS, latents_for, state_of

DOUBLE = torch.float64
NAMES = [name for name in QUANTIZERS if not name.endswith("-skip")]


def build(name: str, nonfinite: str | None, frozen: bool = False) -> Quantizer:
    """A quantizer in float64 that does not learn."""
    quantizer: Quantizer = QUANTIZERS[name](nonfinite=nonfinite).to(DOUBLE)
    return quantizer.freeze() if frozen else quantizer.eval()


def scalar(quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
    """A function of one sample that looks at the loss and at every element of ``quantized``."""

    def of(latents: Tensor) -> Tensor:
        output = quantizer(latents)
        weights = torch.arange(1, 1 + output.quantized.numel(), dtype=DOUBLE).view_as(output.quantized)
        return output.loss + (weights * output.quantized).sum()

    return of


def loop_gradient(function: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """Ordinary autograd, one sample after the other."""
    leaf = samples.clone().requires_grad_()
    for sample in leaf:
        function(sample).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize(
    ("name", "nonfinite"),
    [(name, "off") for name in NAMES]
    + [
        pytest.param(name, mode, marks=() if name == "vq" else pytest.mark.slow)
        for name in NAMES
        for mode in (None, "skip")
    ],
)
def test_transforms_equal_a_loop(name: str, nonfinite: str | None) -> None:
    """``vmap``, ``grad``, per-sample gradients, ``jacrev``, ``jacfwd`` and ``jvp``, in evaluation mode."""
    quantizer = build(name, nonfinite)
    samples = torch.stack([latents_for(quantizer, (2, -1, 2, 3), DOUBLE) for _ in range(3)])
    function = scalar(quantizer)
    state = state_of(quantizer)
    for got, wanted in zip(vmap(quantizer)(samples), zip(*map(quantizer, samples), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(wanted))
    wanted_gradient = loop_gradient(function, samples)
    torch.testing.assert_close(torch.stack([grad(function)(sample) for sample in samples]), wanted_gradient)
    torch.testing.assert_close(vmap(grad(function))(samples), wanted_gradient)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(function)(samples[0]), wanted_gradient[0])
    _, tangent = jvp(function, (samples[0],), (samples[1],))
    torch.testing.assert_close(tangent, (wanted_gradient[0] * samples[1]).sum())
    indices = vmap(quantizer.encode)(samples)
    assert torch.equal(indices, torch.stack([quantizer.encode(sample) for sample in samples]))
    torch.testing.assert_close(vmap(quantizer.decode)(indices), torch.stack(list(map(quantizer.decode, indices))))
    assert all(torch.equal(value, state[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize("name", ["vq", "vq-rotation", "vq-cosine", "vq-ema", "rvq-ema", "sim", "fsq", "lfq"])
def test_frozen_quantizers_in_training_mode(name: str) -> None:
    """Per-sample gradients, as for differential privacy; no statistic changes."""
    quantizer = build(name, "off", frozen=True)
    samples = torch.stack([latents_for(quantizer, (2, -1, 3), DOUBLE) for _ in range(3)])
    state = state_of(quantizer)
    function = scalar(quantizer)
    torch.testing.assert_close(vmap(grad(function))(samples), loop_gradient(function, samples))
    assert all(torch.equal(value, state[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_gradients_per_sample_of_the_codebook(metric: str) -> None:
    """With the codebook as an argument, through ``functional_call``."""
    quantizer = plain_quantizer(9, 6, metric=metric, nonfinite="off").double().eval()  # type: ignore[arg-type]
    samples = torch.randn(4, 5, 6, dtype=DOUBLE)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        value: Tensor = functional_call(quantizer, parameters, (sample,)).loss
        return value

    parameters = {name: value.detach() for name, value in quantizer.named_parameters()}
    got = vmap(grad(loss), in_dims=(None, 0))(parameters, samples)["codebook"]
    for sample, each in zip(samples, got, strict=True):
        quantizer.zero_grad()
        quantizer(sample).loss.backward()
        torch.testing.assert_close(each, quantizer.codebook.grad)


def test_the_loss_has_the_derivative_that_finite_differences_see() -> None:
    """An oracle without autograd: within a cell the commitment loss is a smooth function of the latents."""
    quantizer = plain_quantizer(9, 6, nonfinite="off").double().eval()
    latents, direction = torch.randn(5, 6, dtype=DOUBLE), torch.randn(5, 6, dtype=DOUBLE)
    step = 1e-6
    ahead, behind = (quantizer(latents + sign * step * direction).commitment_loss for sign in (1, -1))
    _, tangent = jvp(lambda z: quantizer(z).commitment_loss, (latents,), (direction,))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("estimator", [straight_through, rotation_trick])
def test_forward_derivatives_are_the_transpose_of_backward_ones(
    estimator: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """The rotation is held constant in both."""
    latents, codes = torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    forward = jacfwd(estimator)(latents, codes)
    torch.testing.assert_close(forward, jacrev(estimator)(latents, codes))
    assert not jacfwd(estimator, argnums=1)(latents, codes).any()


def test_zero_rows_under_cosine_pass_no_derivative() -> None:
    """Neither NaN nor the inverse of a tiny length."""
    quantizer = plain_quantizer(9, 6, metric="cosine", nonfinite="off").double().eval()
    latents = torch.randn(5, 6, dtype=DOUBLE)
    latents[2] = 0
    for jacobian in (jacrev, jacfwd):
        of_zero = jacobian(lambda z: quantizer(z).quantized.sum())(latents)[2]
        assert torch.equal(of_zero, torch.zeros(6, dtype=DOUBLE))


def test_checks_look_at_all_samples() -> None:
    """Under ``vmap`` NaN latents and indices out of range raise the sentences of eager code."""
    quantizer = plain_quantizer(9, 6).eval()
    samples = torch.randn(3, 5, 6)
    samples[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match=exactly(not_finite(1, 90))):
        vmap(quantizer)(samples)
    with pytest.raises(ValueError, match=exactly("indices must be in [-1, num_codes=9), got 9.")):
        vmap(quantizer.decode)(torch.tensor([[1, 2], [9, 0]]))


def test_sampling_under_vmap_follows_its_randomness() -> None:
    """At a temperature every sample draws its own codes, with ``randomness="different"`` only."""
    quantizer = plain_quantizer(9, 6, temperature=5.0, nonfinite="off").freeze()
    samples = torch.randn(1, 200, 6).expand(2, -1, -1)
    first, second = vmap(lambda z: quantizer(z).indices, randomness="different")(samples)
    assert not torch.equal(first, second)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda z: quantizer(z).indices)(samples)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("name", ["vq", "vq-cosine", "rvq", "fsq", "lfq", "sim"])
@pytest.mark.parametrize("nonfinite", ["off", None])
def test_transforms_compile(name: str, nonfinite: str | None) -> None:
    """A compiled function may contain per-sample gradients."""
    quantizer = build(name, nonfinite)
    samples = torch.stack([latents_for(quantizer, (2, -1, 3), DOUBLE) for _ in range(4)])
    function = scalar(quantizer)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: vmap(grad(function))(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(samples), loop_gradient(function, samples))


@pytest.mark.slow
def test_the_same_as_diffusers() -> None:
    """Indices and per-sample gradients of its VectorQuantizer with the same codebook."""
    module: Any = pytest.importorskip("diffusers.models.autoencoders.vae")
    theirs = module.VectorQuantizer(9, 6, beta=0.25, legacy=False).double().eval()
    ours = plain_quantizer(9, 6, commitment_weight=0.25, nonfinite="off").double().eval()
    with torch.no_grad():
        ours.codebook.copy_(theirs.embedding.weight.normal_())
    samples = torch.randn(3, 2, 6, 4, 4, dtype=DOUBLE)
    weights = torch.randn(2, 6, 4, 4, dtype=DOUBLE)

    def of_theirs(z: Tensor) -> Tensor:
        quantized, loss, _ = theirs(z)
        value: Tensor = loss + (weights * quantized).sum()
        return value

    def of_ours(z: Tensor) -> Tensor:
        output = ours(z)
        return output.loss + (weights * output.quantized).sum()

    assert torch.equal(vmap(ours)(samples).indices.flatten(), vmap(lambda z: theirs(z)[2][2])(samples).flatten())
    torch.testing.assert_close(vmap(of_ours)(samples), vmap(of_theirs)(samples))
    torch.testing.assert_close(vmap(grad(of_ours))(samples), vmap(grad(of_theirs))(samples))
    # Theirs has no forward derivatives, because torch.cdist has none.
    torch.testing.assert_close(jacfwd(of_ours)(samples[0]), jacrev(of_theirs)(samples[0]))


RECORDING = {
    "vq": lambda: plain_quantizer(9, 6),
    "vq-ema": lambda: VectorQuantizer(9, 6),
    "rvq": lambda: ResidualVectorQuantizer(9, 6, 2),
    "stages": lambda: ResidualVectorQuantizer(stages=[FSQ((3, 3)), VectorQuantizer(9, 2)]),
    "product": lambda: ProductQuantizer([FSQ((3, 3)), SimVQ(9, 2)]),
    "sim": lambda: SimVQ(9, 6),
}
MESSAGE = (
    "mode must be evaluation or frozen under torch.func, got training, which would lose what it records; "
    "call eval() or freeze() first."
)


@pytest.mark.parametrize("name", RECORDING)
def test_training_that_would_record_is_refused(name: str) -> None:
    """As batch normalization does: what the passes saw would be lost, and a new codebook would never start."""
    quantizer: Any = RECORDING[name]()
    samples = torch.randn(3, 5, quantizer.code_dim)
    parameters = {key: value.detach() for key, value in quantizer.named_parameters()}
    calls: list[Callable[[], Any]] = [
        lambda: vmap(quantizer)(samples),
        lambda: grad(lambda z: quantizer(z).loss)(samples[0]),
        lambda: jvp(lambda z: quantizer(z).loss, (samples[0],), (samples[1],)),
        lambda: grad_and_value(lambda p: functional_call(quantizer, p, (samples[0],)).loss)(parameters),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=exactly(MESSAGE)):
            call()
    for cure in (quantizer.eval, quantizer.train, quantizer.freeze):
        cure()
        if not quantizer.training or quantizer.frozen:
            for call in calls:
                call()
    with pytest.raises(RuntimeError, match="running_mean"):
        vmap(torch.nn.BatchNorm1d(6))(torch.randn(3, 5, 6))


@pytest.mark.parametrize(
    "build",
    [
        partial(FSQ, (5, 3)),
        partial(LFQ, 2),
        lambda: ProductQuantizer([FSQ((5,)), LFQ(1)]),
        lambda: ResidualVectorQuantizer(stages=[FSQ((5, 3)), VectorQuantizer(9, 2).freeze()]),
    ],
    ids=["fsq", "lfq", "product", "frozen-stage"],
)
def test_training_that_records_nothing_gives_what_a_loop_gives(build: Callable[[], Any]) -> None:
    """Quantizers without statistics, and those whose parts are frozen, lose nothing."""
    quantizer = build()
    assert quantizer.training
    samples = torch.randn(3, 5, 2)
    function = scalar(quantizer)
    torch.testing.assert_close(vmap(grad(function))(samples), loop_gradient(function, samples))


def test_batched_backward_passes_repeat_a_checkpointed_step() -> None:
    """``is_grads_batched`` is a vmap of the backward pass, which only repeats a forward pass that was recorded."""
    quantizer, latents = VectorQuantizer(9, 6), torch.randn(5, 6, requires_grad=True)
    quantizer(torch.randn(50, 6))
    output = checkpoint(lambda z: quantizer(z).quantized, latents, use_reentrant=False)
    (got,) = torch.autograd.grad(output, latents, torch.eye(30).view(30, 5, 6), is_grads_batched=True)
    torch.testing.assert_close(got, torch.eye(30).view(30, 5, 6))
    assert quantizer.pending_counts.sum() == 5
