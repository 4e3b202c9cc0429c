"""Do tokens survive decoding and encoding? For any callables ``images -> indices`` and ``indices -> images``."""

from te_quant.stability.measure import measure_stability
from te_quant.stability.metric import TokenStability
from te_quant.stability.plot import plot_stability
from te_quant.stability.report import StabilityReport
from te_quant.stability.tables import StabilityTable, stability_table
from te_quant.stability.transforms import (
    JPEG,
    CropAndPlace,
    EightBit,
    Flip,
    Identity,
    Resize,
    ShiftPixels,
    ShiftTokens,
    Transform,
    default_transforms,
)
from te_quant.stability.values import CycleStability, ImageShare, StabilitySettings, TransformStability

__all__ = [
    "JPEG",
    "CropAndPlace",
    "CycleStability",
    "EightBit",
    "Flip",
    "Identity",
    "ImageShare",
    "Resize",
    "ShiftPixels",
    "ShiftTokens",
    "StabilityReport",
    "StabilitySettings",
    "StabilityTable",
    "TokenStability",
    "Transform",
    "TransformStability",
    "default_transforms",
    "measure_stability",
    "plot_stability",
    "stability_table",
]
