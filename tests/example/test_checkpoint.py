"""Checkpoints and logs of the example: whole or absent, and exact."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import examples.te_vqgan.runs.files as files_module
from examples.te_vqgan.runs.checkpoint import adam_state, load_adam_state, load_checkpoint, save_checkpoint, under
from examples.te_vqgan.runs.logs import RunLog, last_step, read_log


def test_checkpoint_gives_back_every_bit_and_fact(tmp_path: Path) -> None:
    """Tensors of several types, scalars and views included; no pickle in the file."""
    tensors = {
        "a.weight": torch.randn(3, 4)[:, ::2],
        "a.step": torch.tensor(7.0),
        "rng": torch.get_rng_state(),
        "b": torch.randint(-9, 9, (2, 2)),
    }
    facts = {"step": 12, "nested": {"x": [1.5, None]}}
    path = tmp_path / "deep" / "checkpoint.safetensors"
    save_checkpoint(path, tensors, facts)
    read, read_facts = load_checkpoint(path)
    assert read_facts == facts
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert under("a", read).keys() == {"weight", "step"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whether the crash comes while writing or while renaming, the old file is whole and alone."""
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 1})

    def crash(*_: object, **__: object) -> None:
        raise OSError("no space left")

    if moment == "fsync":
        monkeypatch.setattr(files_module.os, "fsync", crash)
    else:
        monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"a": torch.ones(2)}, {"step": 2})
    monkeypatch.undo()
    tensors, facts = load_checkpoint(path)
    assert facts == {"step": 1}
    assert torch.equal(tensors["a"], torch.zeros(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_strange_files_are_refused(tmp_path: Path) -> None:
    """Neither garbage nor someone else's safetensors pass."""
    from safetensors.torch import save_file

    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not a checkpoint at all")
    told = "must be a file that this example wrote, got"
    cure = r"docs/guides/reproducing-the-paper\.md says how to make it again\."
    with pytest.raises(ValueError, match=rf"^{re.escape(str(garbage))} {told} a damaged one \(.+\); {cure}$"):
        load_checkpoint(garbage)
    with pytest.raises(ValueError, match=r"got a damaged one \(.+\); delete it\.$"):
        load_checkpoint(garbage, cure="delete it")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=rf"{told} one without 'facts'; {cure}$"):
        load_checkpoint(other)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor) -> None:
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def test_adam_goes_on_bit_for_bit_from_its_tensors() -> None:
    """Six steps at once equal three, a round trip into a new optimizer, and three; without it they do not."""
    data = torch.randn(6, 4, 5)

    def fresh() -> tuple[nn.Linear, torch.optim.Adam]:
        torch.manual_seed(1)
        model = nn.Linear(5, 2)
        return model, torch.optim.Adam(model.parameters(), 1e-2, betas=(0.5, 0.9))

    model, optimizer = fresh()
    _steps(model, optimizer, data)
    for kept in (True, False):
        first, first_optimizer = fresh()
        _steps(first, first_optimizer, data[:3])
        second, second_optimizer = fresh()
        second.load_state_dict(first.state_dict())
        if kept:
            state = adam_state(first_optimizer, first.named_parameters())
            load_adam_state(second_optimizer, second.named_parameters(), state)
        _steps(second, second_optimizer, data[3:])
        assert torch.equal(second.weight, model.weight) is kept


def test_log_drops_what_came_after_the_checkpoint_and_half_lines(tmp_path: Path) -> None:
    """After a crash at step 5 with a checkpoint of step 3, the log goes on as if nothing had happened."""
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        for step in range(1, 6):
            log.write(step=step, loss=1.0 / step)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert last_step(path) == 5
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4, 5]
    with RunLog(path, start=3) as log:
        log.write(step=4, loss=9.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": s, "loss": 1.0 / s} for s in (1, 2, 3)] + [{"step": 4, "loss": 9.0}]


def test_a_damaged_line_of_a_log_is_named(tmp_path: Path) -> None:
    """With the number that editors show; without it the log is read."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    message = rf"^{re.escape(str(path))} line 2 must be JSON, got a damaged one \(.*\); delete this line\.$"
    with pytest.raises(ValueError, match=message):
        read_log(path)
    path.write_text('{"step": 1}\n{"step": 3}\n')
    assert read_log(path) == [{"step": 1}, {"step": 3}]


def test_last_step_reads_the_end_of_a_long_log(tmp_path: Path) -> None:
    """The same answer as reading it all; 0 where there is nothing yet."""
    path = tmp_path / "log.jsonl"
    assert last_step(path) == 0
    assert read_log(path) == []
    path.write_text('{"step": 1')
    assert last_step(path) == 0
    path.write_text("".join(json.dumps({"step": s, "text": "x" * 90}) + "\n" for s in range(1, 301)))
    assert path.stat().st_size > 20_000
    assert last_step(path) == read_log(path)[-1]["step"] == 300


def test_log_writes_the_same_numbers_for_tensorboard(tmp_path: Path) -> None:
    """The events hold what the lines hold."""
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path / "log.jsonl", tensorboard=tmp_path / "events") as log:
        log.write(step=1, loss=0.5)
        log.write(step=2, loss=0.25)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
