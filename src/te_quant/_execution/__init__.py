"""How the code is run, whether a forward pass is repeated, and whether this process has the whole weights."""

from te_quant._execution.modes import in_transform, is_exporting, refuse_training_export, wants_plain
from te_quant._execution.recomputation import between_steps, refuse_redraw, refuse_transform
from te_quant._execution.sharding import gathered, overwrite, require_savable, require_whole, reshard_owners

__all__ = [
    "between_steps",
    "gathered",
    "in_transform",
    "is_exporting",
    "overwrite",
    "refuse_redraw",
    "refuse_training_export",
    "refuse_transform",
    "require_savable",
    "require_whole",
    "reshard_owners",
    "wants_plain",
]
