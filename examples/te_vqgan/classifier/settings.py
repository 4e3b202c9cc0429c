"""What decides the numbers of a classifier's training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.te_vqgan.classifier.cells import Distortion
from examples.te_vqgan.runs.checks import require, require_int, require_number
from examples.te_vqgan.runs.files import read_json_object

__all__ = ["ClassifierSettings", "check_widths", "require_reader_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """Everything that decides the numbers of a classifier's training, and nothing else.

    Args:
        data: name of the digits, as ``prepare`` takes it.
        canvas_size: side of the images whose cells are read, pixels; a multiple of 32.
        seed: of the initial weights and of the cells drawn.
        steps: optimizer steps, at least 1.
        batch_size: cells per step.
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW, only for the weights of convolutions and heads.
        warmup_steps: the rate rises linearly for so many steps.
        final_lr_share: ...and then falls on half a cosine to this share of its peak, in [0, 1].
        label_smoothing: of the digit's cross entropy, in [0, 1].
        widths: channels of the stages, as :class:`~examples.te_vqgan.classifier.model.CellClassifier` takes them.
        blocks: residual blocks per stage.
        stem_stride: stride of its first convolution, at least 1.
        margin: pixels at each border of a cell that it does not look at, at least 0.
        shift: a field of :class:`~examples.te_vqgan.classifier.cells.Distortion`.
        rotation: a field of it too.
        scale: a field of it too.
        shear: a field of it too.
        flaws: a field of it too.
        bf16: compute the network in bfloat16 (the losses stay in float32).
        log_every: a line in the log after so many steps.
        validate_every: validation numbers in that line after so many steps; a multiple of ``log_every``.
        checkpoint_every: a checkpoint after so many steps.
        validation_cells: cells on which the validation during training looks.
    """

    data: str = "mnist"
    canvas_size: int = 32
    seed: int = 0
    steps: int = 4800
    batch_size: int = 128
    learning_rate: float = 5e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    final_lr_share: float = 0.0
    label_smoothing: float = 0.0
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    stem_stride: int = 2
    margin: int = 0
    shift: float = 0.0625
    rotation: float = 10.0
    scale: float = 0.1
    shear: float = 0.1
    flaws: float = 0.2
    bf16: bool = False
    log_every: int = 10
    validate_every: int = 200
    checkpoint_every: int = 200
    validation_cells: int = 1000

    def __post_init__(self) -> None:
        for name in ("canvas_size", "steps", "batch_size", "blocks", "stem_stride", "validation_cells"):
            require_int(name, getattr(self, name), 1)
        for name in ("log_every", "validate_every", "checkpoint_every"):
            require_int(name, getattr(self, name), 1)
        for name in ("seed", "warmup_steps", "margin"):
            require_int(name, getattr(self, name), 0)
        for name in ("learning_rate", "weight_decay"):
            require_number(name, getattr(self, name), 0.0)
        require_number("final_lr_share", self.final_lr_share, 0.0, 1.0)
        require_number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        check_widths(self.widths)
        self.distortion.check()
        require(self.canvas_size % 32 == 0, "canvas_size", "a multiple of 32", self.canvas_size)
        require(
            self.validate_every % self.log_every == 0,
            "validate_every",
            f"a multiple of log_every={self.log_every}",
            self.validate_every,
        )

    @property
    def distortion(self) -> Distortion:
        """How far training cells may differ from the digits."""
        return Distortion(**{name: getattr(self, name) for name in Distortion._fields})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in the form in which JSON gives them back."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "widths": list(self.widths)}

    @classmethod
    def present_form(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings that an older version wrote as this one writes them: what it lacked has its default."""
        return {**cls().to_dict(), **stored}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ClassifierSettings:
        """Undo :meth:`to_dict`, of older versions too."""
        return cls(**{**plain, "widths": tuple(plain["widths"])})


def require_reader_of(data: str, canvas_size: int, folder: Path) -> None:
    """Refuse the classifier in ``folder`` if it learned other digits or other sizes of them.

    Its network and training settings are not checked. A folder without settings passes.

    Raises:
        ValueError: the settings name other digits or another canvas.
    """
    path = folder / "settings.json"
    if path.is_file():
        known = read_json_object(path)
        found = known["data"], known["canvas_size"]
        require(
            found == (data, canvas_size),
            "classifier",
            f"one of '{data}' on {canvas_size} pixels",
            f"one of '{found[0]}' on {found[1]} in {folder}; remove that folder, or choose another one with --out",
        )


def check_widths(widths: Sequence[int]) -> None:
    """Refuse anything but a tuple of at least one positive int."""
    require(isinstance(widths, tuple) and len(widths) > 0, "widths", "a tuple of one or more ints", repr(widths))
    for width in widths:
        require_int("widths", width, 1)
