"""A quantizer's share of a training step: equal contenders, marks in the right places, and the arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import share
from benchmarks.contest import OURS, Context
from benchmarks.plots import write_plots
from benchmarks.share import DIFFUSERS, IDENTITY, VQP, Layer, Step, build_step, with_settings_of
from benchmarks.stage1 import losses_differ
from benchmarks.tables import tables
from benchmarks.targets import TARGETS, judge
from benchmarks.timing import Limits
from benchmarks.tokenizers import TOKENIZERS, Tokenizer, build_coders

CPU = torch.device("cpu")
VQGAN, VIT = TOKENIZERS["quick"]
MODULES = {DIFFUSERS: "diffusers", VQP: "vector_quantize_pytorch"}


@pytest.mark.parametrize(
    "tokenizer",
    [VIT, *(pytest.param(t, marks=pytest.mark.slow) for t in TOKENIZERS["full"])],
    ids=lambda t: t.label,
)
def test_tokenizers_have_the_shapes_that_they_state(tokenizer: Tokenizer) -> None:
    """Without weights: N latents of C channels, and images back."""
    with torch.device("meta"):
        encoder, decoder = build_coders(tokenizer)
        images = torch.empty(tokenizer.batch, 3, tokenizer.side, tokenizer.side)
        latents = encoder(images)
        assert decoder(latents).shape == images.shape
    assert latents.shape[1 if tokenizer.channels_first else 2] == tokenizer.C
    assert latents.numel() == tokenizer.tokens * tokenizer.C


@pytest.mark.parametrize("peer", share.PEERS)
@pytest.mark.parametrize("tokenizer", [VIT, pytest.param(VQGAN, marks=pytest.mark.slow)], ids=lambda t: t.name)
def test_equal_settings_give_equal_steps(tokenizer: Tokenizer, peer: str) -> None:
    """Loss and gradient of the first step are the peer's; those of the other peer, and our defaults', are not."""
    for module in MODULES.values():
        pytest.importorskip(module)
    names = (peer, with_settings_of(peer), OURS, *(name for name in share.PEERS if name != peer))
    firsts = {}
    for name in names:
        step = build_step(name, tokenizer, CPU)
        assert step.verdict() is None
        firsts[name] = step.first()
    expected = [firsts.pop(peer)]
    equal = [firsts.pop(with_settings_of(peer))]
    assert losses_differ(equal, expected, bf16=False) is None
    for other in firsts.values():
        assert losses_differ([other], expected, bf16=False) is not None


def test_wrong_indices_are_refused() -> None:
    """The verdict compares with float64: the next index, and none at all, are named."""
    step = build_step(OURS, VIT, CPU)
    right = step.layer.forward
    step.layer = step.layer._replace(forward=lambda latents: (*right(latents)[:2], (right(latents)[2] + 1) % 256))
    assert "not those of the nearest code" in str(step.verdict())
    step.layer = step.layer._replace(forward=lambda latents: (*right(latents)[:2], None))
    assert step.verdict() == "no indices came back"


class _Work(torch.autograd.Function):
    """Moves a clock by one amount in the forward and by another in the backward pass."""

    @staticmethod
    def forward(context: Any, values: Tensor, clock: list[float], there: float, back: float) -> Tensor:
        context.rest = clock, back
        clock[0] += there
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        clock, back = context.rest
        clock[0] += back
        return gradient, None, None, None


class _Half(nn.Module):
    def __init__(self, clock: list[float], there: float, back: float) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3, 3, 1)
        self.work = clock, there, back

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = _Work.apply(self.linear(values), *self.work)
        return result


def test_the_passes_of_the_quantizer_are_timed_inside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each part moves by its own amount: also what only the loss needs is the quantizer's."""
    clock = [0.0]
    monkeypatch.setattr(share, "_now", lambda _: clock[0])

    def forward(latents: Tensor) -> tuple[Tensor, Tensor, None]:
        quantized = _Work.apply(latents, clock, 1.0, 2.0)
        # After the output, as losses often are.
        loss = _Work.apply(latents.square().mean(), clock, 4.0, 8.0)
        return quantized, loss, None

    coders = _Half(clock, 100.0, 200.0), _Half(clock, 400.0, 800.0)
    step = Step(coders, Layer(nn.Identity(), forward), [torch.randn(1, 3, 4, 4)])
    step()
    assert step.timings == [share.Timing(1515.0, 5.0, 10.0)]


def test_an_identity_takes_no_time_inside_and_gives_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the marks nothing moves the clock."""
    clock = [0.0]
    monkeypatch.setattr(share, "_now", lambda _: clock[0])
    coders = _Half(clock, 100.0, 200.0), _Half(clock, 400.0, 800.0)
    step = Step(coders, share.CONTENDERS[IDENTITY](VIT, torch.empty(0)), [torch.randn(1, 3, 4, 4)])
    step()
    assert step.timings == [share.Timing(1500.0, 0.0, 0.0)]


def _entry(step: list[float], inside: list[float], peak: list[int] | None = None) -> dict[str, Any]:
    entry = {"status": "ok", "median": 1.0, "low": 1.0, "high": 1.0, "rounds": len(step), "calls": 1}
    entry |= {"step_samples": step, "forward_samples": inside, "backward_samples": inside}
    return entry if peak is None else entry | {"peak_samples": peak, "held": 0}


def _cell(**contenders: dict[str, Any]) -> dict[str, Any]:
    names = {"identity": IDENTITY, "diffusers": DIFFUSERS, "te_quant": OURS, "equal": with_settings_of(DIFFUSERS)}
    settings = {"network": "vit", "side": 128, "N": 2048, "K": 16384, "C": 8, "batch": 8}
    return {"settings": settings, "contenders": {names[name]: entry for name, entry in contenders.items()}}


MIB = 2**20
MEASURED = _cell(
    identity=_entry([0.8, 1.6, 0.8], [0.0] * 3, [60 * MIB] * 3),
    # The second round was disturbed: both took twice as long, and the share is the same.
    diffusers=_entry([1.0, 2.0, 1.0], [0.05, 0.1, 0.05], [100 * MIB] * 3),
    te_quant=_entry([0.8 / 0.95, 1.6 / 0.95, 0.8 / 0.95], [0.01] * 3, [75 * MIB] * 3),
    equal=_entry([1.0, 2.0, 1.0], [0.01] * 3),
)


@pytest.mark.parametrize(("field", "expected"), [("step", 0.2), ("inside", 0.1), ("peak", 0.4)])
def test_shares_are_paired_medians(field: str, expected: float) -> None:
    """By hand; a round that was disturbed as a whole changes nothing, not even the interval."""
    assert share.share(MEASURED, DIFFUSERS, field) == pytest.approx((expected, expected, expected))


def test_the_interval_widens_with_the_rounds() -> None:
    """Shares of 10, 20 and 30 %: the median in the middle, the ends at the samples."""
    cell = _cell(identity=_entry([0.9, 0.8, 0.7], [0.0] * 3), diffusers=_entry([1.0] * 3, [0.0] * 3))
    assert share.share(cell, DIFFUSERS, "step") == pytest.approx((0.1, 0.2, 0.3))
    assert share.share(cell, IDENTITY, "step") == pytest.approx((0, 0, 0))


@pytest.mark.parametrize(("name", "field"), [(VQP, "step"), (with_settings_of(DIFFUSERS), "peak")])
def test_no_share_of_what_was_not_measured(name: str, field: str) -> None:
    """Neither of an absent contender nor of memory that a process failed to measure."""
    assert share.share(MEASURED, name, field) is None
    assert share.relative_share(MEASURED, OURS, name, field) is None


def test_shares_are_judged_where_the_peer_is_noticeable() -> None:
    """Defaults and equal settings, each / the peer; a peer below 3 % is no yardstick."""
    step, inside, peak = (target for target in TARGETS if target.values.__qualname__.startswith("_share"))
    verdict = judge(step, {"share/vit": MEASURED})
    assert (verdict.points, verdict.failing) == (2, 1)
    assert verdict.worst == pytest.approx(1.0)
    assert verdict.where == "vit (te_quant, settings of diffusers / diffusers)"
    assert verdict.mean == pytest.approx(0.25**0.5)
    assert judge(inside, {"share/vit": MEASURED}).met is True
    assert judge(peak, {"share/vit": MEASURED}).worst == pytest.approx(0.2 / 0.4)
    little = _entry([1.0], [0.01], [100])
    small = _cell(identity=_entry([0.98], [0.0], [98]), diffusers=little, te_quant=little)
    assert [judge(target, {"share/vit": small}).points for target in (step, inside, peak)] == [0, 0, 0]


def test_shares_are_written() -> None:
    """Every number with its interval; a contender without numbers is named with the reason."""
    absent = {VQP: {"status": "not installed", "reason": "no such module"}}
    cell = {**MEASURED, "contenders": MEASURED["contenders"] | absent}
    table = tables({"runs": {}, "cells": {"share/vit": cell}})["share"]
    assert (
        "| vit, 128 px | 2,048, 16,384, 8 | diffusers | 1000.0 [1000.0, 2000.0] | 20.0 % [20.0, 20.0] "
        "| 100.0 [100.0, 200.0] | 10.0 % [10.0, 10.0] | 100.0 [100.0, 100.0] | 40.0 % [40.0, 40.0] |"
    ) in table
    assert "Not measured: vector-quantize-pytorch: not installed (no such module)." in table


@pytest.mark.slow
def test_shares_are_drawn(tmp_path: Path) -> None:
    """One picture, also where a contender has no memory."""
    write_plots({"cells": {"share/vit": MEASURED}}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["share.png"]


@pytest.mark.long
def test_a_quick_cell_holds_times_and_memory() -> None:
    """Contenders take turns, and fresh processes measure memory: more with the quantizer's state than without."""
    context = Context(CPU, 1, "quick", Limits(budget=0.0, min_rounds=2, max_rounds=2))
    [cell] = [cell for cell in share.cells(context) if cell.settings["network"] == "vit"]
    measured = {"settings": dict(cell.settings), **cell.run(context)}
    entries = measured["contenders"]
    assert list(entries) == list(share.CONTENDERS)
    for name in (IDENTITY, OURS):
        assert len(entries[name]["step_samples"]) == 2
        assert min(entries[name]["step_samples"]) > max(entries[name]["forward_samples"]) > 0
        assert len(entries[name]["peak_samples"]) == 3
    assert share.share(measured, OURS, "peak") is not None


@pytest.mark.slow
def test_memory_counts_what_is_built_and_kept() -> None:
    """A network of 4 MiB holds at least itself, its two moments and, at the peak, its gradient."""
    context = Context(CPU, 1, "quick", Limits(budget=0.0, min_rounds=1, max_rounds=1))
    found = share._memory_apart(IDENTITY, VIT._replace(width=256), context)
    encoder, decoder = build_coders(VIT._replace(width=256))
    weights = 4 * sum(parameter.numel() for half in (encoder, decoder) for parameter in half.parameters())
    assert min(found["peak_samples"]) > 0.9 * 4 * weights
    assert 0.9 * 3 * weights < found["held"] < 8 * weights
