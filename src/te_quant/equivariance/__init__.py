"""How translation-equivariant is a tokenizer in the quantized space? Any callable ``images -> indices``."""

from te_quant.equivariance.agreement import Agreement, PairCounts, count_pairs, foreground_tokens
from te_quant.equivariance.audit import audit
from te_quant.equivariance.audit_constant import ConstantImageReport, constant_image_probe
from te_quant.equivariance.audit_report import AuditReport, AuditRow, decibels
from te_quant.equivariance.errors import ShiftError
from te_quant.equivariance.floor import numerical_floor
from te_quant.equivariance.margin import Margin, Spread, code_margins
from te_quant.equivariance.metrics import measure_equivariance
from te_quant.equivariance.placement import place_sprites, placement_agreement, placement_offsets
from te_quant.equivariance.plot import plot_reports, plot_shift_maps
from te_quant.equivariance.report import EquivarianceReport
from te_quant.equivariance.results import CodeUse, EquivarianceSettings, ReconstructionError, ShiftAgreement
from te_quant.equivariance.sub_stride import best_token_shift
from te_quant.equivariance.tables import comparison_table

__all__ = [
    "Agreement",
    "AuditReport",
    "AuditRow",
    "CodeUse",
    "ConstantImageReport",
    "EquivarianceReport",
    "EquivarianceSettings",
    "Margin",
    "PairCounts",
    "ReconstructionError",
    "ShiftAgreement",
    "ShiftError",
    "Spread",
    "audit",
    "best_token_shift",
    "code_margins",
    "comparison_table",
    "constant_image_probe",
    "count_pairs",
    "decibels",
    "foreground_tokens",
    "measure_equivariance",
    "numerical_floor",
    "place_sprites",
    "placement_agreement",
    "placement_offsets",
    "plot_reports",
    "plot_shift_maps",
]
