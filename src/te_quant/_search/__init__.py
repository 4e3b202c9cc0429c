"""The nearest code of every latent vector, in tiles, as dispatcher operators."""

from te_quant._search.operators import FUSED, sample_codes, search_codes

__all__ = ["FUSED", "sample_codes", "search_codes"]
