"""The perceptual distances that a loss may have and an evaluation may measure, by name.

None of them is part of the repository: each needs a package, which is found, or refused with the command that
installs it, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from examples.te_vqgan.runs.checks import require_choice
from examples.te_vqgan.stage1.losses import Perceptual
from examples.te_vqgan.stage1.presets import PERCEPTUAL

__all__ = ["TITLES", "load_perceptual", "measured_distances", "require_perceptual"]

_CURE = (
    "`pip install --constraint constraints.txt lpips` keeps the pinned torch; a CPU build of torch needs a "
    "torchvision from the same index, named with `--extra-index-url`. --perceptual st-lpips needs no torchvision, "
    "--perceptual none no package."
)

TITLES = {"lpips": "LPIPS", "st-lpips": "ST-LPIPS"}
"""How tables call the distances."""


def load_perceptual(name: str, device: torch.device | str = "cpu") -> Perceptual | None:
    """Return the perceptual distance called ``name``; ``"none"`` gives ``None``.

    Args:
        name: out of :data:`~.stage1.presets.PERCEPTUAL`.
        device: where it computes.

    Raises:
        ValueError: the name is unknown, or the weights are damaged.
        ImportError: the package behind it is not installed, or does not work here.
    """
    require_choice("perceptual", name, PERCEPTUAL)
    if name == "none":
        return None
    if name == "st-lpips":
        from examples.te_vqgan.stage1.st_lpips import load_st_lpips

        return load_st_lpips().to(device)
    return _load_lpips(device)


def require_perceptual(name: str) -> None:
    """Refuse a distance that :func:`load_perceptual` cannot load, before hours go into anything else.

    Raises:
        ValueError: the name is unknown, or the weights are damaged.
        ImportError: the package behind it is not installed, or does not work here.
    """
    load_perceptual(name)


def measured_distances(reading: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean distances in a tokenizer's ``reading.json``, by name."""
    # Older ones have one distance at most, under two keys.
    former = {reading["perceptual"]: reading["perceptual_distance"]} if "perceptual" in reading else {}
    return {**former, **reading.get("perceptual_distances", {})}


def _load_lpips(device: torch.device | str) -> Perceptual:
    try:
        import lpips  # type: ignore[import-not-found,unused-ignore]

        distance = lpips.LPIPS(net="vgg", verbose=False)
    except (ImportError, RuntimeError, OSError) as error:
        # A torchvision for another torch raises RuntimeError on import, a failed download of weights OSError.
        raise ImportError(
            f"--perceptual lpips needs lpips, a torchvision that fits torch {torch.__version__}, and weights, got "
            f"{type(error).__name__}: {error}. {_CURE}"
        ) from error
    frozen: Perceptual = distance.eval().requires_grad_(False).to(device)
    return frozen
