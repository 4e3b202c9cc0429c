"""Values in float64, in which errors and margins are summed, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["float64"]

# Device types whose tensors cannot be float64.
_WITHOUT = frozenset({"mps"})


def float64(values: Tensor) -> Tensor:
    """Return the values in float64: on their device, or on the CPU where the device has no float64."""
    return (values.cpu() if values.device.type in _WITHOUT else values).to(torch.float64)
