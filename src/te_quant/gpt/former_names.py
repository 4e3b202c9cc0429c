"""Former names of weights, so that files of older versions keep loading after a layer was renamed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

__all__ = ["with_present_names"]

_Value = TypeVar("_Value")

# Both layers of the MLP, in a state dict of a GPT or of anything that contains one.
_LAYER = re.compile(r"(?<![^.])(blocks\.\d+\.)(expand|contract)(?=\.)")
_PRESENT = {"expand": "up", "contract": "down"}


def with_present_names(state: Mapping[str, _Value]) -> dict[str, _Value]:
    """Rename the entries that an older version wrote; others keep their names, and all keep their order.

    :meth:`te_quant.GPT.from_pretrained` and ``load_state_dict`` do this by themselves. Call it for other values
    that are kept by the name of a parameter, such as the moments of an optimizer.

    Args:
        state: values by the name of a parameter, with any prefix and suffix.

    Example:
        >>> with_present_names({"blocks.3.contract.weight/exp_avg": 0.5, "norm.bias": 1.0})
        {'blocks.3.down.weight/exp_avg': 0.5, 'norm.bias': 1.0}
    """
    return {_LAYER.sub(lambda found: found[1] + _PRESENT[found[2]], name): value for name, value in state.items()}
