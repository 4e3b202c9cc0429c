"""Arithmetic on pixel grids, which :mod:`te_quant.filters` is made of."""

from te_quant._pixels.band_limit import resample_by_products
from te_quant._pixels.padding import pad_borders

__all__ = ["pad_borders", "resample_by_products"]
