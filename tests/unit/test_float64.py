"""Nothing creates float64 next to the latents: some devices, MPS among them, have none.

Here the latents are on the CPU, where float64 would go unnoticed, so a dispatch mode watches every operator.

What runs on the CPU in float64 on purpose, whatever the device of the latents is: the report of ``CodebookUsage``,
which copies its counts there first; the taps of filters and the sinusoids of ``GPT``, computed from options; and
numbers, such as a temperature, as tensors without axes. Measurements sum in float64 on the device of the images,
or on the CPU where the device has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from te_quant import GPT, CodebookUsage, GPTConfig, Segment
from te_quant._measuring.float64 import float64
from te_quant.functional import nearest_code, orthogonality, perplexity
from te_quant.quantizers._distributed import sample_rows
from tests.unit.quantizer_cases import QUANTIZERS, mostly_slow


class NoFloat64(TorchDispatchMode):
    """Fail at the first operator that returns float64 on the device."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A number made of numbers alone is no reduction of the latents.
        wide = [t for t in tensors if t.dtype == torch.float64 and any(other.ndim for other in (t, *given))]
        if any(tensor.device.type == self.device for tensor in wide):
            raise AssertionError(f"{func} returned float64")
        return result


def latents(quantizer: Any) -> Tensor:
    """(64, C) float32, ordinary ones."""
    return torch.randn(64, quantizer.code_dim)


def train(quantizer: Any) -> None:
    """Two steps: what the first recorded moves the codebook in the second."""
    for _ in range(2):
        output = quantizer.train()(latents(quantizer).requires_grad_())
        (output.loss + output.quantized.square().sum()).backward()


def look_up(quantizer: Any) -> None:
    """Evaluation, encoding and decoding."""
    quantizer.eval()(latents(quantizer))
    quantizer.decode(quantizer.encode(latents(quantizer)))


def start(quantizer: Any) -> None:
    """k-means, by those that have a codebook."""
    quantizer.kmeans_init(latents(quantizer), iterations=2)


def revive(quantizer: Any) -> None:
    """All codes but one are dead."""
    for stage in getattr(quantizer, "stages", [quantizer]):
        stage.usage[1:] = 0
    quantizer.revive_dead_codes(latents(quantizer))


def count(quantizer: Any) -> None:
    """Code use, of as many codes as fit into memory."""
    indices = quantizer.encode(latents(quantizer))
    usage = CodebookUsage(min(quantizer.num_codes, 2**16))
    usage.update(indices % usage.num_codes)
    usage.synchronized().reset()
    perplexity(usage.histogram)


CALLS: dict[str, Callable[[Any], None]] = {
    "train": train, "look up": look_up, "k-means": start, "revive": revive, "count": count,
}  # fmt: skip
NEEDS = {"k-means": "kmeans_init", "revive": "revive_dead_codes"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", mostly_slow())
def test_quantizers_create_no_float64(name: str, call: str) -> None:
    """Every quantizer of the table in all that it does with latents."""
    quantizer = QUANTIZERS[name](channel_dim=-1)
    if not hasattr(quantizer, NEEDS.get(call, "encode")):
        assert not hasattr(quantizer, "codebook") or name.startswith("sim")
        return
    with NoFloat64():
        CALLS[call](quantizer)


def test_functions_create_no_float64() -> None:
    """Those that quantizers are built from."""
    rows, codes = torch.randn(20, 3), torch.randn(5, 3)
    with NoFloat64():
        nearest_code(rows, codes)
        nearest_code(rows.half(), codes.half(), temperature=0.5)
        orthogonality(codes, torch.ones(5, dtype=torch.bool))
        sample_rows(rows, 7, torch.Generator().manual_seed(0), None)


@pytest.mark.parametrize(
    "use",
    [
        lambda usage: usage.compute(),
        lambda _: torch.rand(3, dtype=torch.float64),
        lambda _: torch.ones(3).sum(dtype=torch.float64),
        lambda usage: usage.histogram.double(),
        lambda _: QUANTIZERS["vq"](channel_dim=-1).double(),
    ],
)
def test_float64_is_noticed(use: Callable[[CodebookUsage], object]) -> None:
    """Negative control: the report is one of the exceptions above, and the others are plain."""
    usage = CodebookUsage(4)
    with NoFloat64(), pytest.raises(AssertionError, match="returned float64"):
        use(usage)


def test_the_report_is_computed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception holds for a copy on the CPU: every float64 comes after the counts have been moved there."""
    usage = CodebookUsage(4)
    usage.update(torch.tensor([0, 0, 2, 2]))
    moved = []
    original = Tensor.cpu

    def cpu(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return original(tensor)

    monkeypatch.setattr(Tensor, "cpu", cpu)
    assert usage.compute().perplexity == 2.0
    assert [tensor is usage.histogram for tensor in moved] == [True]


def test_random_rows_are_those_of_float64_keys() -> None:
    """Integers in [0, 2^53) are the bits of float64 in [0, 1), so that seeds draw the rows they always drew."""
    rows = torch.arange(200.0).unsqueeze(1)
    for count in (1, 50, 200, 300):
        drawn = sample_rows(rows, count, torch.Generator().manual_seed(count), None)
        keys = torch.rand(200, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
        assert torch.equal(drawn, rows[keys.topk(min(count, 200)).indices])
        assert len(drawn.unique()) == min(count, 200)
    torch.manual_seed(0)
    sample_rows(rows, 3, None, None)
    after = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(200, dtype=torch.float64)
    assert torch.equal(torch.rand(3), after)


def test_random_rows_are_uniform() -> None:
    """Each row is as likely as any other at each place: five standard deviations of 20,000 draws."""
    generator = torch.Generator().manual_seed(0)
    rows, counts = torch.arange(6.0).unsqueeze(1), torch.zeros(3, 6)
    for _ in range(20_000):
        drawn = sample_rows(rows, 3, generator, None).long()
        counts[torch.arange(3), drawn[:, 0]] += 1
    deviation = (20_000 * (1 / 6) * (5 / 6)) ** 0.5
    assert (counts - 20_000 / 6).abs().max() < 5 * deviation


def test_a_gpt_built_on_a_device_creates_no_float64_there() -> None:
    """The sinusoids are computed on the CPU and then moved."""
    config = GPTConfig((Segment("image", 16, (4, 4), "sinusoidal"),), width=16, depth=1, num_heads=2)
    with NoFloat64("meta"), torch.device("meta"):
        positions = GPT(config).ends[0].positions
        assert positions.is_meta
        with pytest.raises(AssertionError, match="returned float64"):
            torch.arange(3, dtype=torch.float64)
    assert not GPT(config).ends[0].positions.is_meta


@pytest.mark.parametrize("device", ["mps", "cuda"])
def test_measurements_leave_a_device_without_float64(device: str) -> None:
    """Sums are float64 everywhere; a device without it sends its values to the CPU first."""
    moves = []

    class Elsewhere:
        device: torch.device

        def cpu(self) -> Tensor:
            moves.append("cpu")
            return torch.ones(2)

        def to(self, dtype: torch.dtype) -> Tensor:
            return torch.ones(2, dtype=dtype)

    Elsewhere.device = torch.device(device)
    assert float64(Elsewhere()).dtype == torch.float64  # type: ignore[arg-type]
    assert moves == (["cpu"] if device == "mps" else [])
