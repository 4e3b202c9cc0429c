"""The entropies of soft assignments to binary codes, without a tensor that has N x K elements.

Shape letters: N latent vectors, C channels, G channels of one group, K = 2^C codes.

With q(c|z) ∝ exp(z·c / T) over c in {-1, 1}^C the channels are independent given z, channel i being 1 with
probability σ(2·z_i / T). So the entropy of one assignment is a sum of C binary entropies; and the mean
assignment of N latents is, with the channels cut into a low and a high half, a matrix product of two tables of
2^(C/2) columns: 2·N·K operations and 2·N·√K + K elements.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from te_quant.quantizers._distributed import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["assignment_entropy", "missing_entropy"]


def assignment_entropy(logits: Tensor, weights: Tensor | None) -> Tensor:
    """E[H(q(c|z))] in nats over the rows that count: (N, C), (N, 1) -> (); 0 if there is none.

    Args:
        logits: 2·z / T; channel i is 1 with probability σ of it.
        weights: 0 or 1 a row; None if every row counts.
    """
    # H(σ(x)) = log(1 + eˣ) - x·σ(x), of |x| since it is even and nothing cancels then.
    sizes = logits.abs()
    entropies = (F.softplus(-sizes) + sizes * torch.sigmoid(-sizes)).sum(1, keepdim=True)
    if weights is None:
        return entropies.sum() / max(logits.shape[0], 1)
    return (entropies * weights).sum() / weights.sum().clamp_min(1)


def missing_entropy(logits: Tensor, weights: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """How far the mean assignment is from uniform: log 2^G - H(E[q(c|z)]) >= 0 in nats: (N, G), (N, 1) -> ().

    The mean is over the rows of all processes. Its gradient reaches the rows of this one, and is multiplied by
    the number of processes, as the gradient of an all-reduce would be when all of them have this term in their
    loss: averaged over the processes, as DDP does, it is the gradient of one process that has all rows.

    Args:
        logits: see :func:`assignment_entropy`.
        weights: see there.
        group: the other processes; None for this one alone.

    Returns:
        (); 0 if there is no row at all.
    """
    low, high = logits.tensor_split([logits.shape[1] // 2], dim=1)
    heads = _products(high)
    if weights is not None:
        heads = heads * weights
    total = (heads.T @ _products(low)).flatten()
    counted = total.new_full((1,), logits.shape[0]) if weights is None else weights.sum().view(1).to(total.dtype)
    if group is not None:
        everywhere = all_reduce_sum(torch.cat([total.detach(), counted]), group)
        total = everywhere[:-1] + dist.get_world_size(group) * (total - total.detach())
        counted = everywhere[-1:]
    mean = total / counted.clamp_min(1)
    # KL from uniform. The logarithm is held above that of the smallest number: at 0 its gradient is infinite.
    floor = torch.finfo(mean.dtype).tiny
    distance = (mean * (mean.clamp_min(floor).log() + logits.shape[1] * math.log(2))).sum()
    # Rounding may leave a uniform mean just below zero.
    return distance.clamp_min(0)


def _products(logits: Tensor) -> Tensor:
    """Probability of every combination of bits, the first channel the lowest bit: (N, G) -> (N, 2^G)."""
    ones, zeros = torch.sigmoid(logits), torch.sigmoid(-logits)
    table = logits.new_ones(logits.shape[0], 1)
    for channel in range(logits.shape[1]):
        column = slice(channel, channel + 1)
        table = torch.cat([table * zeros[:, column], table * ones[:, column]], dim=1)
    return table
