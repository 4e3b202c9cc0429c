"""How translation-equivariant is a tokenizer in the quantized space? Any callable ``images -> indices``."""

from te_quant.equivariance.audits.auditor import audit
from te_quant.equivariance.audits.constant_image import ConstantImageReport, constant_image_probe
from te_quant.equivariance.audits.report import AuditReport
from te_quant.equivariance.audits.rows import AuditRow, SkippedModule, decibels
from te_quant.equivariance.measure import measure_equivariance
from te_quant.equivariance.metrics.agreement import Agreement, PairCounts, count_pairs, foreground_tokens
from te_quant.equivariance.metrics.margin import Margin, Spread, code_margins
from te_quant.equivariance.metrics.numerical_floor import numerical_floor
from te_quant.equivariance.metrics.placement import place_sprites, placement_agreement, placement_offsets
from te_quant.equivariance.metrics.shift_error import ShiftError
from te_quant.equivariance.metrics.sub_stride import best_token_shift
from te_quant.equivariance.report.plot import plot_reports, plot_shift_maps
from te_quant.equivariance.report.report import EquivarianceReport
from te_quant.equivariance.report.tables import ComparisonTable, comparison_table
from te_quant.equivariance.report.values import EquivarianceSettings, ReconstructionError, ShiftAgreement

__all__ = [
    "Agreement",
    "AuditReport",
    "AuditRow",
    "ComparisonTable",
    "ConstantImageReport",
    "EquivarianceReport",
    "EquivarianceSettings",
    "Margin",
    "PairCounts",
    "ReconstructionError",
    "ShiftAgreement",
    "ShiftError",
    "SkippedModule",
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
