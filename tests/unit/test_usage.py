"""Codebook health: counts that do not depend on how the data is split."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from te_quant import CodebookUsage, CodebookUsageReport, VectorQuantizer
from tests.helpers import exactly

tokens = st.lists(st.integers(0, 9), max_size=60)


def report(*batches: Tensor, frequent_share: float = 1e-3) -> CodebookUsageReport:
    """Count the batches one after the other."""
    usage = CodebookUsage(10, frequent_share=frequent_share)
    for batch in batches:
        usage.update(batch)
    return usage.compute()


@given(tokens, st.floats(0, 0.5))
@settings(deadline=None, max_examples=60)
def test_report_is_what_counting_gives(values: list[int], share: float) -> None:
    """Every field against plain Python counting."""
    result = report(torch.tensor(values, dtype=torch.int64), frequent_share=share)
    counts = Counter(values)
    n = len(values)
    entropy = -sum(c / n * math.log(c / n) for c in counts.values())
    assert result.num_codes == 10
    assert result.tokens == n
    assert result.used_codes == len(counts)
    assert result.frequent_codes == sum(c > share * n for c in counts.values())
    assert result.frequent_share == share
    assert result.perplexity == pytest.approx(math.exp(entropy) if n else 0.0)


@given(tokens, st.lists(st.integers(0, 60), max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_splitting_the_data_changes_nothing(values: list[int], cuts: list[int], random: object) -> None:
    """Any partition, in any order and shape, gives the same report, to the last bit."""
    whole = torch.tensor(values, dtype=torch.int64)
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [whole[a:b] for a, b in itertools.pairwise(edges)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    expected = report(whole)
    assert report(*parts) == expected
    assert report(*(part.int().view(-1, 1, 1) for part in parts)) == expected
    merged = CodebookUsage(10)
    for part in parts:
        worker = CodebookUsage(10)
        worker.update(part)
        merged.merge(worker.histogram)
    assert merged.compute() == expected


def test_the_histogram_counts_every_code() -> None:
    """(K,) int64, over all batches."""
    usage = CodebookUsage(4)
    for batch in (torch.tensor([3, 3]), torch.tensor([[1], [3]])):
        usage.update(batch)
    assert usage.histogram.dtype == torch.int64
    assert usage.histogram.tolist() == [0, 1, 0, 3]


def test_frequent_codes_are_counted_in_float64() -> None:
    """A share just below a code's own, which float32 cannot tell from it, counts the code."""
    assert report(torch.tensor([0, 1]), frequent_share=0.5 - 1e-12).frequent_codes == 2
    assert report(torch.tensor([0, 1]), frequent_share=0.5).frequent_codes == 0


def test_other_data_changes_the_report() -> None:
    """Negative control: a token more is seen."""
    assert report(torch.tensor([1, 2])) != report(torch.tensor([1, 2, 2]))


def test_reset_forgets() -> None:
    """After reset the counter is as new, and reports made before are not touched."""
    usage = CodebookUsage(10)
    usage.update(torch.tensor([3, 3]))
    before = usage.compute()
    usage.reset()
    assert usage.compute() == report()
    assert before.tokens == 2
    usage.update(torch.tensor([4]))
    assert usage.histogram.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_report_is_frozen() -> None:
    """A report cannot be edited."""
    with pytest.raises(dataclasses.FrozenInstanceError, match="tokens"):
        report().tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_codes": 0}, ValueError, "num_codes must be an int >= 1, got 0."),
        ({"num_codes": True}, TypeError, "num_codes must be an int >= 1, got True."),
        ({"num_codes": 3, "frequent_share": 1.0}, ValueError, "frequent_share must be a finite number >= 0 and < 1, got 1.0."),  # noqa: E501
        ({"num_codes": 3, "frequent_share": -0.1}, ValueError, "frequent_share must be a finite number >= 0 and < 1, got -0.1."),  # noqa: E501
    ],
)  # fmt: skip
def test_refuses_options(arguments: dict[str, float], error: type[Exception], message: str) -> None:
    """Each bad option has its own sentence."""
    with pytest.raises(error, match=exactly(message)):
        CodebookUsage(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([0.0]), TypeError, "indices must be an integer tensor, got torch.float32."),
        (torch.tensor([True]), TypeError, "indices must be an integer tensor, got torch.bool."),
        (torch.tensor([0, -1]), ValueError, "indices must be in [0, num_codes=10), got -1; count indices[indices >= 0], without masked tokens and levels left out."),  # noqa: E501
        (torch.tensor([0, 10]), ValueError, "indices must be in [0, num_codes=10), got 10."),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "indices must be on cpu as the histogram, got meta."),  # noqa: E501
    ],
)  # fmt: skip
def test_refuses_indices(indices: Tensor, error: type[Exception], message: str) -> None:
    """Refused indices are not counted, not even the good ones beside them."""
    usage = CodebookUsage(10)
    with pytest.raises(error, match=exactly(message)):
        usage.update(indices)
    assert usage.compute().tokens == 0


@pytest.mark.parametrize(
    ("histogram", "error", "message"),
    [
        (torch.zeros(9, dtype=torch.int64), ValueError, "histogram axis 0 must be num_codes=10, got 9 (histogram shape (9,))."),  # noqa: E501
        (torch.zeros(10, 10, dtype=torch.int64), ValueError, "histogram must be of shape (K,), got shape (10, 10)."),  # noqa: E501
        (torch.zeros((), dtype=torch.int64), ValueError, "histogram must be of shape (K,), got shape ()."),
        (torch.zeros(10), TypeError, "histogram must be an integer tensor, got torch.float32."),
    ],
)  # fmt: skip
def test_refuses_histograms(histogram: Tensor, error: type[Exception], message: str) -> None:
    """Only a histogram of the same codes can be merged."""
    with pytest.raises(error, match=exactly(message)):
        CodebookUsage(10).merge(histogram)


class Holder(nn.Module):
    """A model that counts its own indices."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.usage = CodebookUsage(10)


COUNTED = [4_099, 0, 2**40 + 1, 0, 0, 0, 0, 0, 0, 1]


def counted() -> Holder:
    """A model with counts that no half precision holds."""
    model = Holder()
    model.usage.merge(torch.tensor(COUNTED))
    return model


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16().double(),
        lambda model: model.type(torch.float16),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.to_empty(device="cpu"),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.share_memory(),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.train().requires_grad_(False),
    ],
)
def test_moves_and_casts_of_the_model_keep_the_counts(move: Callable[[Holder], Holder]) -> None:
    """They are int64 and equal afterwards, and counting goes on."""
    usage = move(counted()).usage
    assert usage.histogram.dtype == torch.int64
    assert usage.histogram.tolist() == COUNTED
    usage.update(torch.tensor([1, 9]))
    assert usage.histogram.tolist() == [COUNTED[0], 1, *COUNTED[2:-1], 2]


def test_copies_count_for_themselves() -> None:
    """What a copy counts is not in the original."""
    usage = counted().usage
    copy.deepcopy(usage).update(torch.tensor([1]))
    usage.synchronized().update(torch.tensor([1]))
    assert usage.histogram.tolist() == COUNTED


def test_the_histogram_moves_with_the_model() -> None:
    """To another device and back, where nothing has been counted: the meta device holds no numbers."""
    model = counted().to("meta")
    assert model.usage.histogram.is_meta
    model.to_empty(device="cpu")
    assert model.usage.histogram.tolist() == [0] * 10
    model.usage.update(torch.tensor([3]))
    assert model.usage.compute().tokens == 1


def test_a_counter_that_stayed_on_the_meta_device_starts_where_the_indices_are() -> None:
    """Loaders that materialize parameters one by one know nothing of the counts."""
    with torch.device("meta"):
        model = Holder()
    assert model.usage.histogram.is_meta
    model.usage.update(torch.tensor([3, 3]))
    assert model.usage.histogram.tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]


def test_checkpoints_do_not_hold_the_counts() -> None:
    """A model loads its former checkpoints, made before it counted."""
    model = counted()
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    assert not list(model.buffers())
    model.load_state_dict(Holder().state_dict())
    assert model.usage.histogram.tolist() == COUNTED


def test_one_process_is_in_step_with_itself() -> None:
    """Without a process group there is nothing to add."""
    usage = counted().usage
    assert usage.synchronized().compute() == usage.compute()
    assert repr(usage) == "CodebookUsage(10, frequent_share=0.001)"


@pytest.mark.slow
def test_counting_needs_no_torchmetrics() -> None:
    """Without it the adapter says what to install."""
    code = """
import sys
sys.modules["torchmetrics"] = None
import torch
from te_quant import CodebookUsage
usage = CodebookUsage(4)
usage.update(torch.tensor([0, 0, 2, 2]))
print(usage.compute().perplexity)
try:
    import te_quant.integrations.torchmetrics
except ImportError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    message = "te_quant.integrations.torchmetrics needs torchmetrics: pip install torchmetrics."
    assert printed.splitlines() == ["2.0", message]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchmetrics_count_as_the_counter_does() -> None:
    """Perplexity and used codes, one batch and all of them, whatever they are cast to."""
    pytest.importorskip("torchmetrics")
    from te_quant.integrations.torchmetrics import CodebookPerplexity, UsedCodes

    batches = torch.randint(0, 7, (3, 40)), torch.full((5_000,), 9), torch.randint(0, 10, (2, 2))
    usage, perplexity, used = CodebookUsage(10), CodebookPerplexity(10), UsedCodes(10)
    for batch in batches:
        usage.update(batch)
        alone = report(batch)
        assert perplexity(batch).item() == pytest.approx(alone.perplexity, rel=1e-6)
        assert used(batch) == alone.used_codes
    for moved in (perplexity, copy.deepcopy(perplexity).half(), copy.deepcopy(perplexity).set_dtype(torch.half)):
        assert moved.histogram.tolist() == usage.histogram.tolist()
        assert moved.compute().item() == pytest.approx(usage.compute().perplexity, rel=1e-6)
    assert used.compute() == usage.compute().used_codes
    perplexity.reset()
    perplexity.update(torch.tensor([1, 2]))
    assert perplexity.compute().item() == pytest.approx(2)
    with pytest.raises(ValueError, match=exactly("indices must be in [0, num_codes=10), got 10.")):
        perplexity.update(torch.tensor([10]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_the_metric(tmp_path: Path) -> None:
    """As the documentation shows it: each epoch's value is that of all its indices, and the next starts anew."""
    lightning = pytest.importorskip("lightning")
    from te_quant.integrations.torchmetrics import CodebookPerplexity, UsedCodes

    class Tokenizer(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = VectorQuantizer(10, 2, codebook_update="gradient")
            self.perplexity, self.used = CodebookPerplexity(10), UsedCodes(10)
            self.usage = CodebookUsage(10)
            self.logged: list[tuple[float, float]] = []
            self.expected: list[tuple[float, float]] = []

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            output = self.quantizer(batch)
            self.perplexity.update(output.indices)
            self.used.update(output.indices)
            self.usage.update(output.indices)
            self.log("perplexity", self.perplexity, on_step=False, on_epoch=True)
            self.log("used", self.used, on_step=False, on_epoch=True)
            return output.loss

        def on_train_epoch_end(self) -> None:
            use = self.usage.synchronized().compute()
            self.expected.append((use.perplexity, float(use.used_codes)))
            self.usage.reset()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Record(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch:
                module.logged.append(tuple(float(trainer.callback_metrics[n]) for n in ("perplexity", "used")))

        on_train_end = on_train_epoch_start

    model = Tokenizer()
    loader = torch.utils.data.DataLoader(torch.randn(40, 2) * torch.linspace(0.01, 2, 40)[:, None], batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Record()],
    )  # fmt: skip
    trainer.fit(model, loader)
    assert len(model.logged) == len(model.expected) == 3
    for logged, expected in zip(model.logged, model.expected, strict=True):
        assert logged == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_integers_of_every_width_are_counted(dtype: torch.dtype) -> None:
    """As token files hold them; torch computes little with unsigned ones. Those out of range are refused."""
    usage = CodebookUsage(10)
    usage.update(torch.tensor([0, 3, 3], dtype=dtype))
    usage.merge(torch.arange(10).to(dtype))
    assert usage.histogram.tolist() == [1, 1, 2, 5, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=exactly("indices must be in [0, num_codes=10), got 10.")):
        usage.update(torch.tensor([10], dtype=dtype))


def test_counters_work_in_and_out_of_inference_mode() -> None:
    """Wherever they were built or last updated."""
    with torch.inference_mode():
        inside = CodebookUsage(4)
        inside.update(torch.tensor([1]))
    outside = CodebookUsage(4)
    for usage in (inside, outside, inside, outside):
        usage.update(torch.tensor([1, 2]))
        usage.merge(torch.tensor([1, 0, 0, 0]))
        with torch.inference_mode():
            usage.update(torch.tensor([3]))
            usage.cpu()
    assert (inside.histogram.tolist(), outside.histogram.tolist()) == ([2, 3, 2, 2], [2, 2, 2, 2])
    assert inside.synchronized().histogram.tolist() == [2, 3, 2, 2]
    inside.reset()
    assert not inside.histogram.any()
