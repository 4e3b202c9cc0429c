"""The learning rate as a pure function of the step, so that it needs no place in a checkpoint."""

from __future__ import annotations

import math

__all__ = ["rate_factor"]


def rate_factor(step: int, *, steps: int, warmup_steps: int, final_share: float) -> float:
    """Return the share of the peak rate that step number ``step`` takes.

    Args:
        step: counted from 0.
        steps: length of the run.
        warmup_steps: rises linearly to 1, which the last of these steps takes.
        final_share: the share at ``step == steps``, in [0, 1], reached on half a cosine.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, Eq. 5, one cycle.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
