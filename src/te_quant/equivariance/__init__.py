"""How translation-equivariant is a tokenizer in the quantized space? Any callable ``images -> indices``."""

from te_quant.equivariance.agreement import Agreement, PairCounts, count_pairs, foreground_tokens
from te_quant.equivariance.metrics import measure_equivariance
from te_quant.equivariance.placement import place_sprites, placement_agreement, placement_offsets
from te_quant.equivariance.plot import plot_reports
from te_quant.equivariance.report import (
    CodeUse,
    EquivarianceReport,
    EquivarianceSettings,
    ReconstructionError,
    ShiftAgreement,
)
from te_quant.equivariance.sub_stride import best_token_shift
from te_quant.equivariance.tables import comparison_table

__all__ = [
    "Agreement",
    "CodeUse",
    "EquivarianceReport",
    "EquivarianceSettings",
    "PairCounts",
    "ReconstructionError",
    "ShiftAgreement",
    "best_token_shift",
    "comparison_table",
    "count_pairs",
    "foreground_tokens",
    "measure_equivariance",
    "place_sprites",
    "placement_agreement",
    "placement_offsets",
    "plot_reports",
]
