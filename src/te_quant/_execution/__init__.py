"""Who runs the code, and whether a forward pass is repeated."""

from te_quant._execution.modes import in_transform, is_exporting, wants_plain
from te_quant._execution.recomputation import between_steps, refuse_redraw, refuse_transform

__all__ = ["between_steps", "in_transform", "is_exporting", "refuse_redraw", "refuse_transform", "wants_plain"]
