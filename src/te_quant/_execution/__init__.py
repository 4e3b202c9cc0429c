"""Who runs the code, whether a forward pass is repeated, and whether this process has the whole weights."""

from te_quant._execution.modes import in_transform, is_exporting, wants_plain
from te_quant._execution.recomputation import between_steps, refuse_redraw, refuse_transform
from te_quant._execution.sharding import require_savable, require_whole

__all__ = [
    "between_steps",
    "in_transform",
    "is_exporting",
    "refuse_redraw",
    "refuse_transform",
    "require_savable",
    "require_whole",
    "wants_plain",
]
