"""What the processes of ``test_example_distributed.py`` do, which ``torchrun`` starts, and one alone beside them.

Arguments: the name of a task below, a folder of the test's own, and what the task takes.

Shape letters: B batch, C channels, S canvas side, L caption tokens, h w token grid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.stage1 import trainer as stage1
from examples.te_vqgan.stage1.presets import PRESETS
from examples.te_vqgan.stage1.trainer import Stage1Trainer
from examples.te_vqgan.stage2.dalle import DalleConfig
from examples.te_vqgan.stage2.settings import STAGE2, Stage2Settings
from examples.te_vqgan.stage2.trainer import Stage2Trainer
from te_quant import GPTConfig, Segment

CPU = torch.device("cpu")
STEPS = 3
# k-means on fewer than a training takes.
KMEANS_IMAGES = 32
PAD = 7

_SMOKE = dataclasses.replace(PRESETS["smoke"], batch_size=8)
_JUDGED = {"adversarial_weight": 0.5, "adversarial_start": 1}
STAGE1 = {
    "judged": dataclasses.replace(
        _SMOKE, **_JUDGED, codebook_init="kmeans", model=dataclasses.replace(_SMOKE.model, orthogonal_reg=10.0)
    ),
    "ema": dataclasses.replace(
        _SMOKE, model=dataclasses.replace(_SMOKE.model, codebook_update="ema", orthogonal_reg=10.0)
    ),
}
STAGE1_DROPOUT = dataclasses.replace(_SMOKE, model=dataclasses.replace(_SMOKE.model, dropout=0.3))
_GPT = GPTConfig(
    segments=(Segment("text", 8, (6,), "learned", pad_token=PAD), Segment("image", 16, (2, 2), "sinusoidal")),
    width=16,
    depth=1,
    num_heads=2,
)
_DALLE = DalleConfig(
    vocab_size=8,
    text_length=6,
    pad_token=PAD,
    start_token=0,
    num_codes=16,
    grid=(2, 2),
    width=16,
    depth=2,
    num_heads=2,
    head_width=4,
)
GPTS = {"stage2": _GPT, "dalle": _DALLE}
assert STAGE2["smoke"] is not None
# Not Muon, which computes in bfloat16 whatever the weights are.
STAGE2_SETTINGS: Stage2Settings = dataclasses.replace(STAGE2["smoke"], optimizer="adam", batch_size=8)


def images(step: int, seed: int = 0) -> Tensor:
    """The whole batch of a step: (8, 3, 32, 32) float64 in [-1, 1]."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.rand(8, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1


def pairs(step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: captions (8, 6), images (8, 2, 2); odd rows have 1 to 3 tokens, even ones 6."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(PAD, (8, 6), generator=generator)
    lengths = torch.randint(1, 4, (8,), generator=generator)
    lengths[::2] = 6
    text[torch.arange(6) >= lengths[:, None]] = PAD
    return text, torch.randint(16, (8, 2, 2), generator=generator)


def _state(trainer: Stage1Trainer | Stage2Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items() if not name.startswith("rng")}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Leave in float64 what the trainers convert to float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(stage1, "_KMEANS_IMAGES", KMEANS_IMAGES)
        yield


def train_stage1(name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The state after a few steps, and the numbers of each, as its log would have them."""
    trainer = Stage1Trainer(STAGE1[name], CPU)
    trainer.model.double()
    trainer.discriminator.double()
    trainer.initialize(images)
    start = {"start": trainer.model.quantizer.codebook.detach().clone()}
    numbers = [
        distributed.mean_of(trainer.train_step(distributed.share(images(step, seed=1)))) for step in range(STEPS)
    ]
    return start | _state(trainer), numbers


def train_stage2(name: str = "stage2") -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The same for a GPT."""
    trainer = Stage2Trainer(STAGE2_SETTINGS, GPTS[name], CPU)
    trainer.model.double()
    trainer.initialize()
    numbers = []
    for step in range(STEPS):
        text, image = map(distributed.share, pairs(step))
        numbers.append(distributed.mean_of(trainer.train_step(text, image)))
    return _state(trainer), numbers


def _dropout() -> dict[str, Any]:
    """Two equal trainers, one of them written and read in the middle; and one step on equal rows everywhere."""
    whole = Stage1Trainer(STAGE1_DROPOUT, CPU)
    whole.initialize(images)
    part = Stage1Trainer(STAGE1_DROPOUT, CPU)
    part.initialize(images)
    for step in range(STEPS):
        batch = distributed.share(images(step).float())
        whole.train_step(batch)
        if step == 1:
            torch.manual_seed(99 + distributed.rank())
            content = distributed.from_main(lambda: (dict(part.tensors()), {"step": part.step}))  # noqa: B023
            part = Stage1Trainer(STAGE1_DROPOUT, CPU)
            part.load(*content)
        part.train_step(batch)
    result: dict[str, Any] = {"whole": _state(whole), "resumed": _state(part)}
    for name, settings in {"with": STAGE1_DROPOUT, "without": _SMOKE}.items():
        result[name] = Stage1Trainer(settings, CPU).train_step(images(0).float())["loss"]
    return result


def _functions() -> dict[str, Any]:
    """What each function of ``distributed`` says here."""
    rank = distributed.rank()
    numbers = {"loss": torch.tensor(1.0 + 2 * rank), "codes": torch.tensor(5)}
    means = distributed.mean_of(numbers)
    result: dict[str, Any] = {
        "size": distributed.size(),
        "rank": rank,
        "main": distributed.is_main(),
        "threads": distributed.local_size(),
        "share": distributed.share(torch.arange(6)),
        "total": distributed.total(torch.tensor([1, 10 * rank])),
        "mean": means["loss"].item(),
        "count": means["codes"].item(),
        "agree": [distributed.agree(wish) for wish in (False, rank == 0, rank == 1, True)],
        "sent": distributed.from_main(lambda: f"from {os.getpid()}") == f"from {os.getpid()}",
        "inside": distributed.from_main(
            lambda: [distributed.size(), distributed.rank(), distributed.launched(), distributed.local_size()]
        ),
    }
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    for parameter, value in zip(parameters[:2], (1.0, 10.0), strict=True):
        parameter.grad = torch.full_like(parameter, value * (rank + 1))
    # Another order in memory must not change which value is averaged with which.
    parameters[0].grad = torch.arange(6.0).reshape(3, 2).T * (rank + 1)
    distributed.average_gradients(parameters)
    result["gradients"] = [parameters[0].grad, parameters[1].grad]
    result["untouched"] = parameters[2].grad is None
    for name, call in {"refused": _refuse, "odd": lambda: distributed.share(torch.arange(5))}.items():
        try:
            distributed.from_main(call) if name == "refused" else call()
        except (ValueError, distributed.MainFailed) as error:
            result[name] = f"{type(error).__name__}: {error}"
    return result


def _refuse() -> None:
    raise ValueError("refused in the main process")


def trainers(folder: Path) -> int:
    """Train in float64 with and without averaged gradients, and write what every process ends with."""
    distributed.start()
    with in_float64():
        result: dict[str, Any] = {name: train_stage1(name) for name in STAGE1}
        result |= {name: train_stage2(name) for name in GPTS}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "average_gradients", lambda _: None)
            result |= {"apart-ema": train_stage1("ema"), "apart-stage2": train_stage2()}
    result |= {"dropout": _dropout(), "functions": _functions()}
    group, rank = weakref.ref(torch.distributed.group.WORLD), distributed.rank()
    distributed.stop()
    result["group_is_gone"] = group() is None
    torch.save(result, folder / f"{rank}.pt")
    return 0


def stopped(folder: Path, *words: str) -> int:
    """Run a command in which the last process gets SIGTERM in the middle of its fourth step.

    Every process has a folder for itself, as hosts without a common file system.
    """
    rank = os.environ["RANK"]
    step = Stage1Trainer.train_step

    def signalled(self: Stage1Trainer, batch: Tensor) -> dict[str, Tensor]:
        if self.step == 3 and rank == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        numbers = step(self, batch)
        torch.save((self.step, _state(self)), folder / f"seen{rank}.pt")
        return numbers

    Stage1Trainer.train_step = signalled  # type: ignore[method-assign]
    return main([*words, "--out", str(folder / f"host{rank}")])


if __name__ == "__main__":
    task = {"trainers": trainers, "stopped": stopped}[sys.argv[1]]
    sys.exit(task(Path(sys.argv[2]), *sys.argv[3:]))
