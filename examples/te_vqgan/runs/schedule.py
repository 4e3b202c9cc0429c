"""The learning rate as a pure function of the step, so that it needs no place in a checkpoint."""

from __future__ import annotations

import math

__all__ = ["rate_factor"]


def rate_factor(step: int, *, steps: int, warmup_steps: int, final_share: float, cycles: int = 1) -> float:
    """Return the share of the peak rate that step number ``step`` takes.

    Args:
        step: counted from 0.
        steps: length of the run.
        warmup_steps: rises linearly to 1, which the last of these steps takes.
        final_share: the share at ``step == steps``, in [0, 1], reached on half a cosine.
        cycles: equal parts of what follows the warm-up, at least 1; each falls from 1 towards ``final_share``.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, Eq. 5.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done, length = step - warmup_steps, max(1, steps - warmup_steps)
    # Whole numbers, so that a restart is exactly at 1.
    progress = done * cycles % length / length if done < length else 1.0
    return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
