"""The contract of an encoder, put together from what its layers state."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from te_quant.contract import EquivarianceContract
from te_quant.layers import in_series

__all__ = ["encoder_contract"]


def encoder_contract(layers: Iterable[nn.Module], *, stride: int, divisor: int) -> EquivarianceContract:
    """Return the contract of an encoder that runs ``layers`` one after another.

    A layer that states nothing makes it ``none`` with an unknown receptive field: no promise, and no error.

    Args:
        layers: every layer, in the order in which it runs.
        stride: s, pixels from one token to the next.
        divisor: the sides of an image must be divisible by it.
    """
    kept = in_series(*layers)
    # Tokens that lie at another distance than the encoder counts with would move by another number of tokens.
    group = kept.exact_for if kept.reach.stride == stride else "none"
    return EquivarianceContract(stride, group, kept.reach.size, divisor)
